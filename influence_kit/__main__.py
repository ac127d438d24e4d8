"""The command line: ``python -m influence_kit demo`` and ``python -m influence_kit inspect``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from influence_kit import __version__, checkpoint_table, demo
from influence_kit.errors import InvalidArgumentError


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        "python -m influence_kit",
        description="Training-data attribution for PyTorch: which training examples made my model "
        "do this?",
    )
    parser.add_argument("--version", action="version", version=f"influence_kit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = (
        "Train a small network on handwritten digits, a tenth of them with a wrong label; show "
        "which training images helped and hurt three predictions (TracInCP); find the wrong labels "
        "by self-influence and, for comparison, by the loss. Takes about ten seconds; downloads "
        "nothing."
    )
    parser = commands.add_parser(
        "demo", help="train a digit classifier, explain it, find wrong labels", description=text
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("influence_kit_demo"),
        help="where to write checkpoints, pictures and a report (default: ./%(default)s)",
    )


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = (
        "Print the checkpoints that a method would use, in order: file, step, learning rate, the "
        "rate's kind (stored, applied, estimated or none) and where it was found. Reads .pt, .pth, "
        ".ckpt, .bin and .safetensors files, the checkpoint-N folders of Hugging Face's Trainer "
        "and the folders of accelerate's save_state."
    )
    parser = commands.add_parser(
        "inspect", help="list checkpoints with step and learning rate", description=text
    )
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINTS",
        nargs="+",
        help="a folder, a glob pattern in quotes, or files",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        if given.command == "demo":
            # progress bars only on a terminal: a log would get one line per step
            bars = sys.stderr.isatty()
            demo.run(
                given.output, say=lambda text: print(f"{text}\n", flush=True), show_progress=bars
            )
        else:
            print(checkpoint_table(_checkpoints(given.checkpoints)))
    except (InvalidArgumentError, ModuleNotFoundError) as error:
        print(f"{parser.prog} {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _checkpoints(paths: Sequence[str]) -> str | list[str]:
    """A single argument may be a folder or a pattern; files are given as a list."""
    if len(paths) == 1 and not Path(paths[0]).is_file():
        return paths[0]
    return list(paths)


if __name__ == "__main__":
    sys.exit(main())
