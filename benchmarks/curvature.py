"""Times EK-FAC and CG of influence_kit, their floor and their peers side by side.

kronfluence and dattri take part where they are installed (``pip install --no-deps`` of
``kronfluence==1.0.1 accelerate einops opt_einsum einconv dattri==0.3.0``, and ``safetensors``).

A call is everything from the model and its data to all scores at one checkpoint: the method is made
again, its curvature fitted, the queries solved for and compared with all training examples. All in
float32, with the same absolute damping, the empirical Fisher for EK-FAC and the Hessian of the mean
loss for CG. The floor is the one of ``benchmarks.speed``: the plain forward and backward passes of
all training and test examples. Contenders run in turn; the smallest time of the rounds counts.

``off`` is how far scores are from the reference, the largest difference over the largest
reference score: from kronfluence's scores for EK-FAC (they have to be the same), from a dense solve
in float64 for CG. In float32 a near tie in a max pool or at a ReLU's zero may fall either way and
move the scores of its example by up to 1e-2, and rounding in the factors moves all by up to 4e-4
(kronfluence in float32 from itself in float64); ``--check`` compares EK-FAC in float64 as well (in
brackets).

dattri's CG starts from the right-hand side, not from zero: its k iterations cost k + 1 products and
come no nearer than k + 1 iterations from zero, so its scores differ until both have converged. It
solves once for every pair of a training and a test batch and adds the solutions up over the batches
that it keeps for the Hessian; there all examples are one batch here. The training set is one batch,
so that it solves once, and, in a row of its own, batches of 64.

    python -m benchmarks.curvature [--rounds 3] [--case MLP] [--no-peers] [--check] [--write]
"""

import argparse
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_kit
from benchmarks.models import CASES, Case
from benchmarks.speed import LONG, RESULTS, _peak, floor, machine, timed, write_section

Scorer = Callable[[], Tensor]
ITERATIONS = 10
DATTRI_BATCH = 64
# near kronfluence's best for fits and scores; it takes all queries in one batch, so that it passes
# over the training set once
KRONFLUENCE_BATCH = {"MLP": 64, "CNN": 32}


@dataclass(frozen=True)
class Problem:
    """One block of the table: a model with data, a method and its damping."""

    method: str
    case: Case
    damping: float
    peer: str
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.case.name

    def model(self) -> nn.Module:
        model = self.case.build()
        model.load_state_dict(self.case.weights()[0])
        return model.to(self.dtype).eval()

    def train(self) -> TensorDataset:
        torch.manual_seed(1)
        inputs, targets = self.case.dataset().tensors
        return TensorDataset(inputs.to(self.dtype), targets)

    def test(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        inputs, targets = self.case.data(self.case.q)
        return inputs.to(self.dtype), targets


def logistic_regression() -> nn.Module:
    """784-10, 7,850 parameters."""
    return nn.Linear(784, 10)


_SUM = nn.CrossEntropyLoss(reduction="sum")
_MLP, _CNN, _ = (replace(case, checkpoints=1) for case in CASES)
_LOGISTIC = Case("Logistic 784-10", logistic_regression, _MLP.data, _SUM, 1000, 100, 1)
# EK-FAC's dampings are near 0.1 of the mean of Lambda over the whole model; CG's is one with which
# ten iterations come to 1e-4 of the exact scores
PROBLEMS = [
    Problem("EK-FAC", _MLP, 1e-5, "kronfluence"),
    Problem("EK-FAC", _CNN, 1e-6, "kronfluence"),
    Problem(f"CG, {ITERATIONS} iterations", _LOGISTIC, 0.1, "dattri"),
]


def ours(problem: Problem) -> Scorer:
    """influence_kit's EK-FAC or CG."""
    model, train, test = problem.model(), problem.train(), problem.test()
    checkpoints = [model.state_dict()]
    shared = {"loss_fn": problem.case.loss_fn, "damping": problem.damping}

    def run() -> Tensor:
        if problem.method == "EK-FAC":
            influence = influence_kit.EKFACInfluenceFunction(
                model, train, checkpoints, curvature="empirical_fisher", **shared
            )
        else:
            influence = influence_kit.CGInfluenceFunction(
                model,
                train,
                checkpoints,
                curvature="hessian",
                max_iter=ITERATIONS,
                tol=0.0,
                **shared,
            )
        return influence.influence(test)

    return run


def kronfluences(problem: Problem, batch_size: int | None = None) -> Scorer:
    """EK-FAC of kronfluence: factors, eigenvectors, Lambda and scores, by way of its files."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return problem.case.loss_fn(model(batch[0]), batch[1])

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    train, test = problem.train(), TensorDataset(*problem.test())
    size = batch_size or KRONFLUENCE_BATCH[problem.name[:3]]

    def run() -> Tensor:
        task = Classification()
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                analysis_name="benchmark",
                model=prepare_model(problem.model(), task),
                task=task,
                cpu=True,
                log_level=logging.ERROR,
                disable_tqdm=True,
                output_dir=folder,
            )
            analyzer.fit_all_factors(
                factors_name="factors",
                dataset=train,
                per_device_batch_size=size,
                factor_args=FactorArguments(
                    strategy="ekfac",
                    use_empirical_fisher=True,
                    activation_covariance_dtype=problem.dtype,
                    gradient_covariance_dtype=problem.dtype,
                    per_sample_gradient_dtype=problem.dtype,
                    lambda_dtype=problem.dtype,
                ),
            )
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=test,
                train_dataset=train,
                per_device_query_batch_size=len(test),
                per_device_train_batch_size=size,
                score_args=ScoreArguments(
                    damping_factor=problem.damping,
                    per_sample_gradient_dtype=problem.dtype,
                    precondition_dtype=problem.dtype,
                    score_dtype=problem.dtype,
                ),
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"]

    return run


def dattris(problem: Problem, train_batch: int | None = None) -> Scorer:
    """CG of dattri, the Hessian's examples in one batch; the training set in one or in several."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    model, train, test = problem.model(), problem.train(), TensorDataset(*problem.test())

    def loss(parameters: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        # the mean: of one example for a gradient, of all of them for the Hessian
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1])

    # gradients are taken of single examples, which come without their batch axis
    def single(parameters: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return loss(parameters, batch if batch[1].ndim else tuple(part[None] for part in batch))

    def run() -> Tensor:
        attributor = IFAttributorCG(
            AttributionTask(loss_func=single, model=model, checkpoints=[model.state_dict()]),
            max_iter=ITERATIONS,
            regularization=problem.damping,
        )
        attributor.cache(DataLoader(train, batch_size=len(train)))
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # without its progress bars
            scores = attributor.attribute(
                DataLoader(train, batch_size=train_batch or len(train)),
                DataLoader(test, batch_size=len(test)),
            )
        return scores.T

    return run


PEERS = {"kronfluence": kronfluences, "dattri": dattris}


@cache
def exact(problem: Problem) -> Tensor:
    """Scores of logistic regression by its dense damped Hessian, in float64."""
    model = problem.model().double()
    (inputs, targets), (asked, answers) = problem.train().tensors, problem.test()
    inputs, asked = inputs.double(), asked.double()
    with torch.no_grad():
        train_error = _errors(model(inputs), targets)
        test_error = _errors(model(asked), answers)
        shares = model(inputs).softmax(1)
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    asked = torch.cat([asked, asked.new_ones(len(asked), 1)], 1)
    classes, width = shares.shape[1], inputs.shape[1]
    hessian = inputs.new_empty(classes, width, classes, width)
    for one in range(classes):
        for other in range(classes):
            bend = shares[:, one] * (float(one == other) - shares[:, other])
            hessian[one, :, other] = inputs.T @ (bend[:, None] * inputs) / len(inputs)
    hessian = hessian.view(classes * width, -1)
    hessian.diagonal().add_(problem.damping)
    gradients = (test_error[:, :, None] * asked[:, None]).flatten(1)
    solved = torch.cholesky_solve(gradients.T, torch.linalg.cholesky(hessian)).T
    return solved @ (train_error[:, :, None] * inputs[:, None]).flatten(1).T


def _errors(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(1) - nn.functional.one_hot(targets, logits.shape[1])


def off(scores: Tensor, reference: Tensor) -> float:
    """The largest difference, over the largest of the reference's scores."""
    return float((scores.double() - reference.double()).abs().max() / reference.abs().max())


@cache
def off_in_double(problem: Problem) -> float:
    """How far influence_kit is from its peer with both in float64."""
    double = replace(problem, dtype=torch.float64)
    return off(ours(double)(), PEERS[problem.peer](double)())


def contenders(problem: Problem, peers: bool, mine: bool = True) -> dict[str, Callable]:
    """What is timed, by name. The floor has influence_kit's batch size."""
    size = influence_kit.TracInCP(
        problem.model(), problem.train(), problem.case.weights(), loss_fn=problem.case.loss_fn
    ).train_dataloader.batch_size
    found: dict[str, Callable] = {"floor": floor(problem.case, size, with_tests=True)}
    if mine:
        found["influence_kit"] = ours(problem)
    if peers and find_spec(problem.peer):
        found[problem.peer] = PEERS[problem.peer](problem)
        if problem.peer == "dattri":
            name = f"dattri, training batches of {DATTRI_BATCH}"
            found[name] = dattris(problem, DATTRI_BATCH)
    return found


def added_memory(problem: Problem, name: str, threads: int) -> float | None:
    """MiB by which one call raises the peak of a fresh process; None if it cannot be measured."""
    if not sys.platform.startswith("linux"):
        return None
    request = json.dumps({"case": problem.name, "name": name, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.curvature", "--memory", request]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _print_added_memory(request: str) -> None:
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    problem = next(problem for problem in PROBLEMS if problem.name == wanted["case"])
    run = contenders(problem, peers=True, mine=wanted["name"] == "influence_kit")[wanted["name"]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak()
    run()
    print((_peak() - before) / 2**10)


def rows(problem: Problem, threads: int, arguments: argparse.Namespace) -> list[str]:
    """The table's lines for one problem."""
    torch.set_num_threads(threads)
    wanted = contenders(problem, not arguments.no_peers, not arguments.peers_only)
    scores: dict[str, Tensor] = {}

    def keeping(name: str, run: Callable) -> Callable[[], None]:
        return lambda: scores.update({name: run()})

    running = {name: keeping(name, run) for name, run in wanted.items()}
    best = {name: timed(run) for name, run in running.items()}  # the first round warms up
    for _ in range(arguments.rounds - 1):
        for name, run in running.items():
            if best[name] < LONG:
                best[name] = min(best[name], timed(run))
    reference = scores.get(problem.peer) if problem.method == "EK-FAC" else exact(problem)
    lines = []
    for name, seconds in best.items():
        compared = name != "floor" and reference is not None and scores[name] is not reference
        error = f"{off(scores[name], reference):.0e}" if compared else "-"
        if compared and arguments.check and name == "influence_kit" and problem.method == "EK-FAC":
            error += f" ({off_in_double(problem):.0e})"
        added = added_memory(problem, name, threads) if not arguments.no_memory else None
        lines.append(
            f"| {problem.method} | {problem.name} | {problem.case.q} x {problem.case.n} | "
            f"{threads} | {name} | {seconds:.3f} | {seconds / best['floor']:.1f} | "
            f"{'-' if added is None else format(added, '.0f')} | {error} |"
        )
        print(lines[-1], flush=True)
    return lines


HEAD = """# Curvature

Written by `python -m benchmarks.curvature --write`. Seconds from the model and its data to all
scores at one checkpoint (factors, eigenvectors, Lambda and scores for EK-FAC; the solves and scores
for CG), the smallest of {rounds} rounds in which all contenders ran in turn (a contender of more
than {long:.0f} s: of one round); the ratio is to the floor, the plain forward and backward passes
over the same examples; added memory is the growth of a fresh process's peak by one call. float32,
the same absolute damping for all. Off: the largest difference over the largest score, for EK-FAC
(empirical Fisher) from kronfluence, in brackets with both in float64 (in float32 near ties in max
pools and ReLUs fall either way, and factors are rounded); for CG (Hessian) from a dense solve in
float64.

{machine} Peers: {peers}.

| method | model | scores | threads | who | seconds | x floor | added MiB | off |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-peers", action="store_true", help="only the floor and influence_kit")
    parser.add_argument("--peers-only", action="store_true", help="only the floor and the peers")
    parser.add_argument("--no-memory", action="store_true", help="leave added memory out")
    parser.add_argument("--check", action="store_true", help="also compare EK-FAC in float64")
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write and (arguments.case or arguments.no_peers or arguments.peers_only):
        parser.error("--write needs all cases and all contenders")
    warnings.simplefilter("ignore")
    if arguments.memory:
        _print_added_memory(arguments.memory)
        return
    lines = []
    for problem in PROBLEMS:
        if arguments.case not in problem.name:
            continue
        for threads in arguments.threads:
            lines += rows(problem, threads, arguments)
    if arguments.write:
        peers = [f"{name} {version(name)}" for name in PEERS if find_spec(name)]
        head = HEAD.format(
            rounds=arguments.rounds,
            long=LONG,
            machine=machine(),
            peers=", ".join(peers) or "none",
        )
        write_section(head + "\n".join(lines) + "\n")
        print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
