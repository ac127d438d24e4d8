"""Shapley values of neighbours in closed form: Jia et al. 2019, arXiv 1908.08619.

Shapes: b test examples, n training examples, K neighbours. Rows are test examples, columns ranks:
the farthest training example first, of rank n, the nearest last, of rank 1.
"""

import torch
from torch import Tensor

from influence_kit.errors import NonFiniteError


def far_to_near(distances: Tensor) -> Tensor:
    """Indices ``[b, n]`` by descending distance; of equal distances the first index is the nearer.

    Raises:
        NonFiniteError: if a distance is not finite.
    """
    if not torch.isfinite(distances).all():
        raise NonFiniteError(
            f"a distance between features overflows in {distances.dtype}; scale the features, or "
            "use a model and data in float64"
        )
    if distances.dtype == torch.float32 and distances.device.type == "cpu":
        # bits of positive floats sort as the floats do; with the index in the lower bits, to break
        # ties, they are integers, whose plain sort takes a sixth of the time of a stable sort of
        # the floats
        keys = (distances.view(torch.int32).long() << 32) | torch.arange(distances.shape[1])
        keys.numpy().sort(axis=1)
        return (keys & 0xFFFFFFFF).flip(1)
    return distances.argsort(dim=1, stable=True).flip(1)


def values_of_matches(matches: Tensor, neighbors: int) -> Tensor:
    """Values of u(S) = sum of c over the K nearest of S / K, ``[b, n]``, for matches c ``[b, n]``.

    s_j = s_{j+1} + (c_j - c_{j+1}) / max(K, j) is theorem 1, whose min(K, j) / (j K) is
    1 / max(K, j); in this form it also holds for K > n.
    """
    steps = torch.diff(matches, dim=1, prepend=matches.new_zeros(len(matches), 1))
    return steps.div_(_ranks(matches).clamp(min=neighbors)).cumsum(1)


def values_of_targets(targets: Tensor, tests: Tensor, neighbors: int) -> Tensor:
    """Values of u(S) = -(sum of y over the K nearest of S / K - y')^2, ``[b, n]``.

    With w(j) = min(K, j) / j and g(j) = w(j) (min(K, j) - 1) / (2 (j - 1)), which are the weights
    of the coalitions in which an example of rank j counts, and in which it counts with another one:

    s_j = s_{j+1} - (y_j - y_{j+1}) / K * (w(j) ((y_j + y_{j+1}) / K - 2 y') + 2 / K * (g(j) * sum
    of the nearer y_l + sum of g(l - 1) y_l over the farther l > j + 1)), with y_{n+1} = 0.

    Args:
        targets: y ``[b, n]``.
        tests: the targets y' of the test examples ``[b, 1]``.
        neighbors: K.
    """
    ranks = _ranks(targets)
    before = torch.cat([targets.new_zeros(len(targets), 1), targets[:, :-1]], dim=1)
    nearer = targets.sum(1, keepdim=True) - targets.cumsum(1)
    pairs = (targets * _pair_weight(ranks - 1, neighbors)).cumsum(1)
    farther = torch.cat([targets.new_zeros(len(targets), 2), pairs], dim=1)[:, : len(ranks)]
    others = (_pair_weight(ranks, neighbors) * nearer + farther) * (2 / neighbors)
    alone = ((targets + before) / neighbors - 2 * tests) * (ranks.clamp(max=neighbors) / ranks)
    return ((before - targets) / neighbors * (alone + others)).cumsum(1)


def _ranks(columns: Tensor) -> Tensor:
    """n, ..., 1, in float64."""
    n = columns.shape[1]
    return torch.arange(n, 0, -1, dtype=torch.float64, device=columns.device)


def _pair_weight(ranks: Tensor, neighbors: int) -> Tensor:
    counting = ranks.clamp(max=neighbors)
    # below rank 2 there is no pair, and the numerator is 0
    return counting * (counting - 1) / (2 * ranks * (ranks - 1)).clamp(min=1)
