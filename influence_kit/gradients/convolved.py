"""The gradients of a convolution's weight, one offset of the kernel at a time.

The gradient at kernel offset k is a plain matrix product over positions of one map with the other
shifted by k, so no map is ever unfolded (an unfolded map takes as many times the memory as the
kernel has elements).

Shapes: as in ``forms``; l and r channels of the fixed map and of the shifted map, g groups, k
elements of the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.scaling import balanced
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form, element_cost, with_formed
from influence_kit.gradients.forms import Dense


@dataclass(frozen=True, eq=False)
class Convolved(Form):
    """Gradients ``[l, r / g, *kernel]``: ``sum_t left[l, t] right[r, t * stride + k * dilation]``.

    left: ``[n, l, *positions]``; right: ``[n, r, *padded]``. For a convolution, left is the output
    gradient and right the padded input; for a transposed one, left is the input and right the
    padded output gradient.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def n(self) -> int:
        return self.left.shape[0]

    @property
    def sample(self) -> Tensor:
        return self.left

    @property
    def positions(self) -> int:
        """The number of positions t."""
        return self.left[0, 0].numel()

    @property
    def kernel(self) -> int:
        """The number of kernel elements k."""
        return math.prod(self.shape[2:])

    def shifted(self) -> Iterator[Tensor]:
        """For each kernel offset, the right map shifted by it, ``[n, r, t]``."""
        return (window.flatten(2) for window in self.windows(self.right))

    def windows(self, maps: Tensor) -> Iterator[Tensor]:
        """For each kernel offset, the part of maps ``[*, *, *padded]`` under it: a view."""
        for offset in itertools.product(*(range(size) for size in self.shape[2:])):
            window = [slice(None), slice(None)]
            steps = zip(offset, self.left.shape[2:], self.stride, self.dilation, strict=True)
            for at, length, stride, dilation in steps:
                first = at * dilation
                window.append(slice(first, first + (length - 1) * stride + 1, stride))
            yield maps[tuple(window)]

    def by_offset(self) -> Iterator[Tensor]:
        """For each kernel offset, the gradients there, ``[n, l * (r / g)]``."""
        left = self.left.flatten(2).unflatten(1, (self.groups, -1)).flatten(0, 1)
        for shifted in self.shifted():
            right = shifted.unflatten(1, (self.groups, -1)).flatten(0, 1)
            yield torch.bmm(left, right.transpose(1, 2)).view(self.n, -1)

    def times(self, right: Tensor) -> Tensor:
        """The gradients as matrices (one group) times a matrix ``[r * k, j]``: ``[n, l, j]``."""
        by_offset = right.view(self.shape[1], self.kernel, -1).transpose(0, 1).contiguous()
        total = self.left.new_zeros(self.n * self.shape[0], right.shape[1])
        for gradients, part in zip(self.by_offset(), by_offset, strict=True):
            total.addmm_(gradients.view(len(total), -1), part)
        return total.view(self.n, self.shape[0], -1)

    def dense(self) -> Tensor:
        return torch.stack(list(self.by_offset()), dim=2).flatten(1)

    def factored(self) -> Factored:
        """The same gradients with the right map unfolded (one group): faster for small maps."""
        inputs = torch.stack(list(self.shifted()), dim=2).flatten(1, 2).transpose(1, 2)
        return Factored(self.left.flatten(2).transpose(1, 2), inputs, self.shape)

    def compact(self) -> Form:
        """Factored if that is cheaper to multiply: few positions, many channels."""
        t = self.positions
        l, i = self.shape[0], math.prod(self.shape[1:])  # noqa: E741 - the formula's letter
        gram = 2 * t * t * (l + i) + 3 * element_cost(self.left) * t * t
        return self.factored() if self.groups == 1 and gram < 2 * l * i else self

    def rows(self, rows: slice) -> Convolved:
        return replace(self, left=self.left[rows], right=self.right[rows])

    def scaled(self, factors: Tensor) -> Convolved:
        return replace(self, left=self.left * factors.view(-1, *[1] * (self.left.dim() - 1)))

    def summed(self) -> Dense:
        chunks = self.example_slices(self.p)
        total = sum(self.rows(rows).dense().sum(0, keepdim=True) for rows in chunks)
        assert isinstance(total, Tensor)
        return Dense(total, self.shape)

    def squared_norms(self) -> Tensor:
        norms = self.left.new_zeros(self.n)
        for gradients in self.by_offset():
            norms += gradients.square().sum(1)
        return norms

    def balanced(self) -> tuple[Form, Tensor]:
        left, of_left = balanced(self.left)
        right, of_right = balanced(self.right)
        return replace(self, left=left, right=right), of_left + of_right

    @cached_property
    def _formed_by_offset(self) -> Tensor:
        return torch.stack(list(self.by_offset()))

    def inner(self, test: Form, total: int) -> Tensor:
        def product(by_offset: Tensor) -> Tensor:
            scores = self.left.new_zeros(self.n, by_offset.shape[1])
            for rows in self.example_slices(self.p // self.kernel):
                part = scores[rows]
                for formed, gradients in zip(by_offset, self.rows(rows).by_offset(), strict=True):
                    part.addmm_(gradients, formed.T)
            return scores.T

        if isinstance(test, Convolved) and test.fits():
            return product(test._formed_by_offset)
        return with_formed(test, lambda formed: product(_offset_first(formed, self.kernel)))

    def joined(self, others: Sequence[Form]) -> Form | None:
        alike = [f for f in (self, *others) if isinstance(f, Convolved)]
        maps = {(f.left.shape[1:], f.right.shape[1:]) for f in alike}
        if len(alike) <= len(others) or len(maps) > 1:
            return None
        left, right = torch.cat([f.left for f in alike]), torch.cat([f.right for f in alike])
        return replace(self, left=left, right=right)

    def plus(self, other: Form) -> Form | None:
        # a layer may be called on several maps of different sizes
        return Dense(self.dense(), self.shape).plus(Dense(other.dense(), self.shape))


def _offset_first(formed: Tensor, kernel: int) -> Tensor:
    """``[m, l * r * k]`` as ``[k, m, l * r]``."""
    return formed.view(len(formed), -1, kernel).permute(2, 0, 1).contiguous()
