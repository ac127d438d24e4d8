"""What projecting costs beside the bare passes, and TRAK beside traker and dattri.

``python -m benchmarks.projections`` prints; ``--write`` puts the section into RESULTS.md. Peers are
timed where they are installed (``pip install --no-deps traker dattri``).
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import CASES
from benchmarks.speed import machine, timed, write_section
from influence_kit import TRAK, FactGraSS, GradDot, GraSS, LoGra
from influence_kit.projections.joint_projection import joint_projection

SEQUENCES = 64
TRAIN, TEST, DIM = 5000, 500, 512
HEAD = """# Projections

One batch of {sequences} sequences through the benchmark's GPT (4 x 128, context 64): the bare
forward and backward passes, the capture of per-example gradients, and the capture with each
projection. Below it TRAK end to end on an MLP 64-32-10, {train} training and {test} test examples,
{dim} features. Seconds are the least of {rounds} rounds, measured in turn.

{machine}

"""


def least(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least time of each call; they take turns, after one that is not timed."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if number:
                best[name] = min(best[name], seconds)
    return best


def projecting(rounds: int) -> dict[str, float]:
    """Seconds of a batch of the GPT, by what is done with it."""
    case = CASES[2]
    torch.manual_seed(0)
    model, data = case.build(), case.dataset()
    batch = tuple(tensor[:SEQUENCES] for tensor in data.tensors)
    common = (model, data, [model.state_dict()])
    dots = GradDot(*common, loss_fn=case.loss_fn)
    projected = {
        "LoGra 16 x 16": LoGra(*common, loss_fn=case.loss_fn, projection_dim=(16, 16)),
        "FactGraSS 4096": FactGraSS(*common, loss_fn=case.loss_fn, projection_dim=4096),
        "GraSS 4096": GraSS(*common, loss_fn=case.loss_fn, projection_dim=4096),
    }
    joint = joint_projection(dict(model.named_parameters()), "sjlt", 4096, "features", 0)
    with dots.session() as loader:
        loader.load(0)

        def capture() -> object:
            return dots._source(batch, dots._train_loss)

        def bare() -> None:
            parameters = list(model.parameters())
            with torch.enable_grad():
                torch.autograd.grad(case.loss_fn(model(batch[0]), batch[1]), parameters)

        calls: dict[str, Callable[[], object]] = {"bare passes": bare, "capture": capture}
        calls["SJLT 4096, all parameters"] = lambda: joint(capture())
        for name, method in projected.items():
            calls[name] = lambda method=method: method._projection(capture())
        return least(calls, rounds)


def trak_models() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """The MLP and its random data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = [TensorDataset(torch.randn(n, 64), torch.randint(0, 10, (n,))) for n in (TRAIN, TEST)]
    return model, *data


def ours(projection: str) -> Tensor:
    """TRAK of influence_kit."""
    model, train, test = trak_models()
    trak = TRAK(model, train, [model.state_dict()], projection_dim=DIM, projection=projection)
    return trak.influence(test.tensors)


def traker() -> object:
    """The same by traker, with its projector for CPUs."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    model, train, test = trak_models()
    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(
        grad_dim=size,
        proj_dim=DIM,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
        block_size=100,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=TRAIN,
            proj_dim=DIM,
            device="cpu",
            save_dir=folder,
            use_half_precision=False,
            projector=projector,
            logging_level=50,
        )
        state = model.state_dict()
        found.load_checkpoint(state, model_id=0)
        for batch in DataLoader(train, batch_size=500):
            found.featurize(batch=batch, num_samples=len(batch[0]))
        found.finalize_features()
        found.start_scoring_checkpoint("test", state, model_id=0, num_targets=TEST)
        for batch in DataLoader(test, batch_size=500):
            found.score(batch=batch, num_samples=len(batch[0]))
        return found.finalize_scores(exp_name="test")


def dattri() -> object:
    """The same by dattri."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model, train, test = trak_models()

    def log_probability(parameters: object, example: tuple[Tensor, Tensor]) -> Tensor:
        x, y = example
        outputs = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return -cross_entropy(outputs, y.unsqueeze(0))

    def margin(parameters: object, example: tuple[Tensor, Tensor]) -> Tensor:
        log_p = log_probability(parameters, example)
        return log_p - torch.log(1 - torch.exp(log_p))

    task = AttributionTask(loss_func=margin, model=model, checkpoints=[model.state_dict()])
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=lambda *given: torch.exp(log_probability(*given)),
        device="cpu",
        projector_kwargs={"proj_dim": DIM, "proj_type": "normal", "proj_max_batch_size": 32},
    )
    with torch.no_grad():
        attributor.cache(DataLoader(train, batch_size=500))
        return attributor.attribute(DataLoader(test, batch_size=500))


@contextmanager
def silent() -> Iterator[None]:
    """Without what peers print."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def trak(rounds: int) -> dict[str, float]:
    """Seconds of TRAK, by library."""
    calls: dict[str, Callable[[], object]] = {
        "influence_kit, sjlt (default)": lambda: ours("sjlt"),
        "influence_kit, rademacher": lambda: ours("rademacher"),
    }
    peers = {"trak": ("traker, rademacher", traker), "dattri": ("dattri, normal", dattri)}
    for package, (name, call) in peers.items():
        if importlib.util.find_spec(package) is not None:
            calls[name] = call
    with silent():
        return least(calls, rounds)


def table(title: str, by_threads: Mapping[int, Mapping[str, float]]) -> str:
    """Rows of milliseconds and of ratios to the first row, for each number of threads."""
    names = list(next(iter(by_threads.values())))
    heads = [f"{threads} thread{'s' if threads > 1 else ''}, ms | ratio" for threads in by_threads]
    lines = [f"| {title} | {' | '.join(heads)} |", "| --- |" + " --- | --- |" * len(by_threads)]
    for name in names:
        cells = [
            f"{1000 * seconds[name]:.0f} | {seconds[name] / seconds[names[0]]:.2f}"
            for seconds in by_threads.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    tables = []
    for title, measure in (("GPT, one batch", projecting), ("TRAK, end to end", trak)):
        by_threads = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            by_threads[threads] = measure(given.rounds)
        tables.append(table(title, by_threads))
        print(tables[-1], file=sys.stderr if given.write else sys.stdout)
    if given.write:
        sizes = {"sequences": SEQUENCES, "train": TRAIN, "test": TEST, "dim": DIM}
        head = HEAD.format(rounds=given.rounds, machine=machine(), **sizes)
        write_section(head + "\n".join(tables))


if __name__ == "__main__":
    main()
