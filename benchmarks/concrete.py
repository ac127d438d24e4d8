"""EK-FAC end to end on the concrete data, against kronfluence, in pairs and one thread.

The setting is ``concrete-mlp``, kronfluence's example of UCI data: 927 training and 103 test rows,
an MLP 8-128-128-128-1, the squared error. A call is everything from the trained model and its data
to all scores: factors, eigenvectors, Lambda, scores. Both take the empirical Fisher and the same
absolute damping, so that the scores have to be equal. The two run in turn; the figure is the median
of the ratios of processor time, which other programs on the machine change less than the time of a
clock. kronfluence takes part where it is installed (see ``benchmarks.curvature``).

    python -m benchmarks.concrete --data folder [--pairs 7] [--batch-size 103 309 927] [--write]
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.data import Data
from benchmarks.speed import machine, write_section
from influence_kit import EKFACInfluenceFunction

NAME, DAMPING = "concrete-mlp", 1e-4
HEAD = """# EK-FAC on concrete

Written by `python -m benchmarks.concrete --data folder --write`. Processor seconds from the trained
model and its data to all {m} x {n} scores of the setting `concrete-mlp` (factors, eigenvectors,
Lambda and scores), one thread, the empirical Fisher, the same absolute damping: medians of {pairs}
pairs of runs in turn; the ratio is the median of the pairs' (least to greatest). Off: the largest
difference over the largest score. The batch size is kronfluence's; influence_kit chooses its own.

{machine} Peer: kronfluence {version}.

| dtype | batch size | influence_kit | kronfluence | ratio | off |
| --- | --- | --- | --- | --- | --- |
"""
LOSS = nn.MSELoss(reduction="sum")
Scorer = Callable[[], Tensor]


def ours(model: nn.Module, data: Data) -> Scorer:
    """influence_kit's EK-FAC."""

    def run() -> Tensor:
        method = EKFACInfluenceFunction(
            model,
            data.train,
            [model.state_dict()],
            loss_fn=LOSS,
            damping=DAMPING,
            curvature="empirical_fisher",
        )
        return method.influence(data.test.tensors)

    return run


def kronfluences(setting_model: Callable[[], nn.Module], data: Data, batch_size: int) -> Scorer:
    """EK-FAC of kronfluence, by way of its files."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Regression(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return LOSS(model(batch[0]), batch[1])

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    kind = data.train.tensors[0].dtype
    names = ["activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda"]
    of_factors = {f"{name}_dtype": kind for name in names}
    of_scores = {f"{name}_dtype": kind for name in ("per_sample_gradient", "precondition", "score")}

    def run() -> Tensor:
        task = Regression()
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                analysis_name="concrete",
                model=prepare_model(setting_model(), task),
                task=task,
                cpu=True,
                log_level=logging.ERROR,
                disable_tqdm=True,
                output_dir=folder,
            )
            analyzer.fit_all_factors(
                factors_name="factors",
                dataset=data.train,
                per_device_batch_size=batch_size,
                factor_args=FactorArguments("ekfac", use_empirical_fisher=True, **of_factors),
            )
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=data.test,
                train_dataset=data.train,
                per_device_query_batch_size=len(data.test),
                per_device_train_batch_size=batch_size,
                score_args=ScoreArguments(damping_factor=DAMPING, **of_scores),
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"]

    return run


def timed(run: Scorer) -> tuple[Tensor, float]:
    """What a call gives, and the processor time that it takes, in seconds."""
    start = time.process_time()
    return run(), time.process_time() - start


def trained(data: Data) -> nn.Module:
    """The model of the setting."""
    return SETTINGS[NAME].train(data)


def in_double(data: Data) -> Data:
    """The same data in float64."""
    train, test = (
        TensorDataset(*(tensor.double() for tensor in part.tensors))
        for part in (data.train, data.test)
    )
    return Data(train, test, data.outputs)


def compare(model: nn.Module, data: Data, batch_size: int, pairs: int) -> str:
    """A line of the table for one batch size of kronfluence."""

    def copied() -> nn.Module:
        other = SETTINGS[NAME].new_model(data).to(data.train.tensors[0].dtype)
        other.load_state_dict(model.state_dict())
        return other.eval()

    mine, peer = ours(model, data), kronfluences(copied, data, batch_size)
    mine(), peer()
    found = [(timed(mine), timed(peer)) for _ in range(pairs)]
    (first, _), (second, _) = found[0]
    off = float((first.double() - second.double()).abs().max() / second.abs().max())
    times = [(own, other) for (_, own), (_, other) in found]
    ratios = sorted(own / other for own, other in times)
    kind = str(first.dtype).removeprefix("torch.")
    own, other = (median(side) for side in zip(*times, strict=True))
    ratio = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    return f"| {kind} | {batch_size} | {own:.3f} | {other:.3f} | {ratio} | {off:.0e} |"


def main() -> None:
    """Print the section, and write it where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with concrete.data")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[103, 309, 927])
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = SETTINGS[NAME].load(given.data)
    model = trained(data)
    lines = [compare(model, data, size, given.pairs) for size in given.batch_size]
    lines.append(compare(model.double(), in_double(data), given.batch_size[-1], given.pairs))
    head = HEAD.format(
        m=len(data.test),
        n=len(data.train),
        pairs=given.pairs,
        machine=machine(),
        version=version("kronfluence"),
    )
    section = head + "\n".join(lines) + "\n"
    print(section)
    if given.write:
        write_section(section)


if __name__ == "__main__":
    main()
