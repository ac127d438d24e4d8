"""What TRAK measures of a training set: Phi^T Phi of its features, and the slopes beside them.

Letters: n training examples, k entries of their features.
"""

import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from influence_kit.core.distributed import sum_over_ranks
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.trak.output_features import FEATURES, SLOPE
from influence_kit.operators.wording import Wording

# what is inverted is no curvature, and what is added to it no damping
OF_FEATURES = Wording(
    matrix="Phi^T Phi",
    block="Phi^T Phi of the training set",
    damping="ridge",
    data="the training set",
    remedy="a model in float64: Phi^T Phi has negative eigenvalues by rounding alone",
)
GRAM = "gram"


def normal_equations(
    features: Callable[[Batch], Gradients], data: DataSet, k: int
) -> dict[str, Tensor]:
    """Phi^T Phi ``[k, k]`` and the slopes ``[n]``, float64, of all ranks together.

    Args:
        features: the features of a batch, with their slopes.
        data: the training set.
        k: the letter k.

    Raises:
        NonFiniteError: where they are NaN or infinite.
    """
    gram = torch.zeros(k, k, dtype=torch.float64, device=data.device)
    slopes = []
    for places, batch in data.of_this_rank():
        forms = features(batch).forms
        phi = forms[FEATURES].dense()
        gram += phi.T @ phi
        slopes.append((places, forms[SLOPE].dense()[:, 0].double()))
    of_all = gram.new_zeros(data.count)
    for places, own in slopes:
        of_all[places] = own
    gram, of_all = sum_over_ranks(gram), sum_over_ranks(of_all)
    if not torch.isfinite(gram.sum() + of_all.sum()):
        _refuse_non_finite(features, data)
    if data.count < k:
        warnings.warn(
            f"{data.count} training examples have features of {k} entries: Phi^T Phi is "
            "singular, and the ridge alone decides in most directions; take a "
            "`projection_dim` below the number of examples",
            stacklevel=2,
        )
    return {GRAM: gram, SLOPE: of_all}


def trace_of_features(gram: Tensor, n: int, argument: str) -> Tensor:
    """The trace of Phi^T Phi, ``[1]``, of which a ridge is a share.

    Raises:
        InvalidArgumentError: where it is zero.
    """
    trace = gram.trace()[None]
    if not trace > 0:
        raise InvalidArgumentError(
            f"{argument} is a share of the mean eigenvalue of Phi^T Phi, which is {trace.item():g}"
            f": the features of all {n} training examples are zero. Give a number, or look at the "
            "output function, which no parameter moves"
        )
    return trace


def _refuse_non_finite(features: Callable[[Batch], Gradients], data: DataSet) -> NoReturn:
    """An error that names the example, which takes another pass."""
    for places, batch in data.of_this_rank():
        found = features(batch).non_finite()
        if found is not None:
            example, kind = found
            what = "features that are" if kind == FEATURES else "a slope that is"
            raise NonFiniteError(
                f"training example {int(places[example])} has {what} NaN or infinite at checkpoint "
                f"{data.checkpoint}; look at that example and at the model's output for it"
            )
    raise NonFiniteError(
        f"Phi^T Phi is NaN or infinite at checkpoint {data.checkpoint}, and the features of this "
        "process are not: products overflow (use float64), or another process names the example"
    )
