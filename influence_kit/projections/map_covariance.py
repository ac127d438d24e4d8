"""The covariance of a convolution's inputs under its kernel, without unfolding them all at once.

Shapes: n examples, t positions, g groups, i inputs of a group (with the bias).
"""

import torch
from torch import Tensor

from influence_kit.gradients.convolved import Convolved

# below this many rows, half of a Gram product takes longer than all of it
FEWEST_ROWS = 64


def map_products(form: Convolved, bias: bool, counted: Tensor | None = None) -> Tensor:
    """The sum over examples and positions of [a, 1] [a, 1]^T, a the map under the kernel.

    Args:
        form: the gradients of the convolution's weight.
        bias: whether the 1 is included.
        counted: which positions count, ``[n, t]``; None for all.
    """
    g, k, columns = form.groups, form.kernel, form.n * form.positions
    maps = form.right.transpose(0, 1).contiguous()
    shifted = maps.new_empty(k, len(maps), columns)
    for index, window in enumerate(form.windows(maps)):
        shifted[index].view(window.shape).copy_(window)
    # the kernel's offsets one after the other, each with the channels of a group
    flat = shifted.view(k, g, -1, columns).transpose(0, 1).reshape(g, -1, columns)
    if counted is not None:
        flat = flat[:, :, counted.flatten()]
        columns = flat.shape[2]
    channels, inputs = flat.shape[1] // k, flat.shape[1]
    total = _gram(flat, channels)
    # in the order of the weight: offsets vary fastest
    order = torch.arange(inputs, device=flat.device).view(k, channels).T.flatten()
    total = total[:, order][:, :, order]
    if not bias:
        return total
    sums = flat.sum(2)[:, order]
    joined = total.new_empty(g, inputs + 1, inputs + 1)
    joined[:, :-1, :-1] = total
    joined[:, -1, :-1] = joined[:, :-1, -1] = sums
    joined[:, -1, -1] = columns
    return joined


def map_squares(form: Convolved, bias: bool, counted: Tensor | None = None) -> Tensor:
    """Only the diagonal of ``map_products``, ``[g, i]``, one offset of the kernel at a time."""
    squares = []
    for window in form.windows(form.right):
        values = window.flatten(2)
        if counted is not None:
            values = values * counted[:, None]
        squares.append(values.square().sum((0, 2)))
    total = torch.stack(squares, dim=1).reshape(form.groups, -1)
    if not bias:
        return total
    columns = form.n * form.positions if counted is None else int(counted.sum())
    return torch.cat([total, total.new_full((form.groups, 1), columns)], dim=1)


def _gram(rows: Tensor, step: int) -> Tensor:
    """X X^T of ``[g, i, *]``; computes half of it if ``step`` rows at a time are enough."""
    if step < FEWEST_ROWS:
        return rows @ rows.transpose(1, 2)
    total = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1])
    for first in range(0, rows.shape[1], step):
        some = rows[:, first : first + step]
        total[:, first : first + step, first:] = some @ rows[:, first:].transpose(1, 2)
    return total.triu() + total.triu(1).transpose(1, 2)
