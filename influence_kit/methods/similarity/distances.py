"""Distances and similarities of vectors, pair by pair.

Shapes: m test vectors, n training vectors.
"""

import math

import torch
from torch import Tensor

from influence_kit.core.arguments import check_number, shown
from influence_kit.core.dtypes import exact
from influence_kit.core.scaling import powers_of, times_powers, unit_rows
from influence_kit.errors import InvalidArgumentError


def euclidean_distance(test: Tensor, train: Tensor) -> Tensor:
    """The Euclidean distance of each pair, flattened: ``[m, *]``, ``[n, *]`` to ``[m, n]``.

    Computed from differences, so that equal vectors have distance 0, and equal pairs have equal
    distances at any index.

    Example:
        >>> euclidean_distance(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.]])
    """
    return _distances(*_both_flat(test, train))


def _distances(test: Tensor, train: Tensor) -> Tensor:
    found = _root_of_squares(test, train)
    # squares that vanish or overflow in float32 exist in float64; in float64, all vectors are first
    # divided by one power of two
    if test.dtype == torch.float32 and not _are_usual(found):
        return _root_of_squares(test.double(), train.double()).to(test)
    if not _are_usual(found):
        largest = torch.stack([x.abs().amax() for x in (test, train) if x.numel()]).amax()
        power = powers_of(largest).expand(1)
        test, train = (times_powers(x[None], -power)[0] for x in (test, train))
        return times_powers(_root_of_squares(test, train)[None], power)[0]
    return found


def _root_of_squares(test: Tensor, train: Tensor) -> Tensor:
    return torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist")


def _are_usual(distances: Tensor) -> bool:
    """Whether no square of a difference can have vanished or overflowed."""
    limit = 2.0 ** (-16 if distances.dtype == torch.float32 else -192)
    return bool(((distances > limit) & (distances < 1 / limit)).all())


def cosine_similarity(test: Tensor, train: Tensor, replace_nan: float = 0) -> Tensor:
    """The cosine of each pair, flattened: ``[m, *]``, ``[n, *]`` to ``[m, n]``.

    Args:
        test: the rows.
        train: the columns.
        replace_nan: the value of pairs with a zero vector, which have no cosine.

    Example:
        >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.]])
    """
    check_number(replace_nan, "replace_nan")
    units = [unit_rows(vectors) for vectors in _both_flat(test, train)]
    cosines: Tensor = units[0] @ units[1].T
    return cosines.masked_fill(zero_pairs(test, train), replace_nan)


def zero_pairs(test: Tensor, train: Tensor) -> Tensor:
    """Which pairs have a zero vector, bool ``[m, n]``."""
    tests, trains = ((_flat(vectors) == 0).all(dim=1) for vectors in (test, train))
    return tests[:, None] | trains[None, :]


def _both_flat(test: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Both, flattened, which must have as many numbers per example."""
    tests, trains = _flat(test), _flat(train)
    if tests.shape[1] != trains.shape[1]:
        raise InvalidArgumentError(
            f"test and train have {tests.shape[1]} and {trains.shape[1]} numbers per example; "
            "distances are of the same layer's outputs"
        )
    return tests, trains


def _flat(vectors: Tensor) -> Tensor:
    is_dense = isinstance(vectors, Tensor) and vectors.layout == torch.strided
    if not is_dense or vectors.is_meta or vectors.dim() == 0:
        raise InvalidArgumentError(f"distances are of dense tensors [n, *]; got {shown(vectors)}")
    if vectors.is_complex():
        raise InvalidArgumentError(
            f"activations of {vectors.dtype} have no distance here: name a layer whose output is "
            "real, or pass a `similarity_metric` of your own"
        )
    return exact(vectors.reshape(len(vectors), math.prod(vectors.shape[1:])))
