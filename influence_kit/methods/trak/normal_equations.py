"""TRAK's inverse curvature: Phi^T Phi of the training features, and the slopes of the examples.

Shapes: n training examples, k entries of their features.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from influence_kit.core.distributed import sum_over_ranks
from influence_kit.curvature.damping import TRACE, DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.passes import DataSet
from influence_kit.curvature.wording import Wording
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.methods.trak.output_features import FEATURES, SLOPE
from influence_kit.operators.indefinite import IndefiniteBlockError, indefinite
from influence_kit.operators.solvers import Cholesky

# the inverted matrix is not a curvature, and the number added to it is not a damping
OF_FEATURES = Wording(matrix="Phi^T Phi", damping="ridge", data="the training set")
FLOAT64 = "a model in float64: Phi^T Phi has negative eigenvalues by rounding alone"
GRAM = "gram"
# the share of the mean eigenvalue that ridge="auto" is with one checkpoint
SHARE_OF_ONE = 1.5


class NormalEquations(InverseCurvature):
    """(Phi^T Phi + ridge I)^-1 of the features of the training set; see ``TRAK``.

    Args:
        ridge: a positive number, or a rule by name.
        seed: has no effect; the features have their own seed.
    """

    auto_rule = TRACE
    wording = OF_FEATURES
    takes_own_labels = True

    def __init__(self, ridge: DampingArgument = "auto", seed: int = 0) -> None:
        super().__init__(ridge, seed)

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        return {FEATURES: list(names)}

    def fit(self, data: FitData) -> State:
        return normal_equations(data.cached, data.examples, *data.partition.sizes)

    def share(self, data: FitData) -> float:
        # the mean over checkpoints also reduces noise
        return SHARE_OF_ONE / math.sqrt(len(data.checkpoints))

    def traces(self, state: State, data: FitData) -> Tensor:
        return trace_of_features(state[GRAM], data.count, data.argument)

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        return data.through(inverse_of(state[GRAM], damping))


def normal_equations(
    features: Callable[[Batch], Gradients], data: DataSet, k: int
) -> dict[str, Tensor]:
    """Phi^T Phi ``[k, k]`` and the slopes ``[n]``, float64, summed over all ranks.

    Args:
        features: the features of a batch, with their slopes.
        data: the training set.
        k: the number of features.

    Raises:
        NonFiniteError: if they are NaN or infinite.
    """
    gram = torch.zeros(k, k, dtype=torch.float64, device=data.device)
    slopes = []
    for indices, batch in data.of_this_rank():
        forms = features(batch).forms
        phi = forms[FEATURES].dense()
        gram += phi.T @ phi
        slopes.append((indices, forms[SLOPE].dense()[:, 0].double()))
    of_all = gram.new_zeros(data.count)
    for indices, own in slopes:
        of_all[indices] = own
    gram, of_all = sum_over_ranks(gram), sum_over_ranks(of_all)
    if not torch.isfinite(gram.sum() + of_all.sum()):
        _refuse_non_finite(features, data)
    if data.count < k:
        warnings.warn(
            f"{data.count} training examples have features of {k} entries: Phi^T Phi is "
            "singular, and only the ridge determines most directions; use a "
            "`projection_dim` below the number of examples",
            stacklevel=2,
        )
    return {GRAM: gram, SLOPE: of_all}


def trace_of_features(gram: Tensor, n: int, argument: str) -> Tensor:
    """The trace of Phi^T Phi, ``[1]``, for rules by which the ridge is a share of it.

    Raises:
        InvalidArgumentError: if it is zero.
    """
    trace = gram.trace()[None]
    if not trace > 0:
        raise InvalidArgumentError(
            f"{argument} is a share of the mean eigenvalue of Phi^T Phi, which is {trace.item():g}"
            f": the features of all {n} training examples are zero. Give a number, or look at the "
            "output function, which depends on no parameter"
        )
    return trace


def _refuse_non_finite(features: Callable[[Batch], Gradients], data: DataSet) -> NoReturn:
    """Raise an error that names the example, in another pass."""
    for indices, batch in data.of_this_rank():
        found = features(batch).non_finite()
        if found is not None:
            example, kind = found
            what = "features that are" if kind == FEATURES else "a slope that is"
            raise NonFiniteError(
                f"training example {int(indices[example])} has {what} NaN or infinite at "
                f"checkpoint {data.checkpoint}; look at that example and at the model's output for "
                "it"
            )
    raise NonFiniteError(
        f"Phi^T Phi is NaN or infinite at checkpoint {data.checkpoint}, and the features of this "
        "process are finite: products overflow (use float64), or the error on another rank names "
        "the example"
    )


def inverse_of(gram: Tensor, ridge: Tensor) -> Cholesky:
    """(Phi^T Phi + ridge I)^-1.

    Raises:
        CurvatureError: if the matrix is singular or has negative eigenvalues.
    """
    try:
        return Cholesky([gram], ridge)
    except IndefiniteBlockError as error:
        matrix = "Phi^T Phi of the training set"
        raise indefinite(error.eigenvalues, error.damping, matrix, "ridge", FLOAT64) from None
