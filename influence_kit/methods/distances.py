"""Distances and similarities of vectors, pair by pair.

Letters: m test and n training vectors.
"""

import math

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.precision import exact


def euclidean_distance(test: Tensor, train: Tensor) -> Tensor:
    """The Euclidean distance of each pair, flattened: ``[m, *]``, ``[n, *]`` to ``[m, n]``.

    Taken from differences, so that equal vectors have distance 0 and equal pairs equal distances,
    wherever they stand.

    Example:
        >>> euclidean_distance(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.]])
    """
    return torch.cdist(_flat(test), _flat(train), compute_mode="donot_use_mm_for_euclid_dist")


def cosine_similarity(test: Tensor, train: Tensor, replace_nan: float = 0) -> Tensor:
    """The cosine of each pair, flattened: ``[m, *]``, ``[n, *]`` to ``[m, n]``.

    Args:
        test: the rows.
        train: the columns.
        replace_nan: the value of a pair with a zero vector, which has no cosine.

    Example:
        >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.]])
    """
    units = []
    for vectors in (_flat(test), _flat(train)):
        norms = _norms(vectors)[:, None]
        units.append(vectors / norms.masked_fill(norms == 0, 1))
    cosines: Tensor = units[0] @ units[1].T
    return cosines.masked_fill(zero_pairs(test, train), replace_nan)


def zero_pairs(test: Tensor, train: Tensor) -> Tensor:
    """Which pairs have a zero vector, bool ``[m, n]``."""
    tests, trains = (_norms(_flat(vectors)) == 0 for vectors in (test, train))
    return tests[:, None] | trains[None, :]


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms


def _flat(vectors: Tensor) -> Tensor:
    if vectors.is_complex():
        raise InvalidArgumentError(
            f"activations of {vectors.dtype} have no distance here: name a layer whose output is "
            "real, or pass a `similarity_metric` of your own"
        )
    return exact(vectors.reshape(len(vectors), math.prod(vectors.shape[1:])))
