"""The command line: ``python -m benchmarks.settings list`` and ``... run NAME``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.data import Sizes
from benchmarks.settings.methods import METHODS
from benchmarks.settings.plan import Plan
from benchmarks.settings.run import report, run
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.settings",
        description="The benchmark settings of training-data attribution: what there is, and runs.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the settings, their sizes, metrics and files")
    _add_run(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("run", help="train, attribute, and judge the scores")
    parser.add_argument("name", choices=SETTINGS, metavar="NAME", help="of a setting; see `list`")
    add = parser.add_argument
    add("--data", metavar="FOLDER", type=Path, help="the folder with the data set's own files")
    add("--out", metavar="FOLDER", type=Path, required=True, help="for models, scores, the table")
    add(
        "--methods",
        metavar="METHOD",
        nargs="+",
        default=["GradDot", "TracInCP", "EKFACInfluenceFunction"],
        help=f"{', '.join(METHODS)}; NAME-10 is over ten models on halves (default: %(default)s)",
    )
    add("--subsets", type=int, default=0, help="halves of the training set, for the LDS")
    add("--repeats", type=int, default=1, help="models trained on each half")
    add("--targets", type=int, default=1, help="models whose predictions are attributed")
    add("--left-out", type=int, default=0, help="examples left out in turn, for LOO")
    add("--wrong", type=float, default=0.0, help="share of labels changed, for the AUC")
    add("--train", type=int, metavar="N", help="training examples (default: the setting's)")
    add("--test", type=int, metavar="M", help="test examples (default: the setting's)")
    add("--checkpoints", type=int, default=5, help="of a target's training")
    add("--seed", type=int, default=0, help="of subsets, left-out examples and wrong labels")
    add("--processes", type=int, default=1, help="in which models are trained")
    add("--device", default="cpu", help="where models are trained (default: %(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        print(_list() if given.command == "list" else _run(given))
    except (InvalidArgumentError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"{parser.prog} {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _list() -> str:
    rows = [
        [
            one.name,
            one.title,
            f"{one.sizes.train or 'all'} x {one.sizes.test or 'all'}",
            ", ".join(one.metrics),
            one.needs or "nothing",
        ]
        for one in SETTINGS.values()
    ]
    return text_table(["name", "setting", "train x test", "metrics", "needs"], rows)


def _run(given: argparse.Namespace) -> str:
    setting = SETTINGS[given.name]
    plan = Plan(
        methods=given.methods,
        subsets=given.subsets,
        repeats=given.repeats,
        targets=given.targets,
        left_out=given.left_out,
        wrong_share=given.wrong,
        checkpoints=given.checkpoints,
        seed=given.seed,
        processes=given.processes,
        device=given.device,
        show_progress=sys.stderr.isatty(),  # bars are for people
    )
    plan.check(setting)
    sizes = Sizes(given.train or setting.sizes.train, given.test or setting.sizes.test)
    data = setting.load(given.data, sizes)
    table = report(setting, run(setting, data, plan, given.out))
    title = f"{setting.title}: {len(data.train)} training and {len(data.test)} test examples"
    (given.out / "results.txt").write_text(f"{title}\n\n{table}\n")
    return f"{title}\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())
