"""The sparse Johnson-Lindenstrauss transform, fast for matrices that are sums of few products.

Shapes: n examples, t positions, r rows and c columns of a matrix, k entries of its image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.draws import Draws
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.gradients.form import element_cost
from influence_kit.projections.maps import VectorMap


class SJLT(VectorMap):
    """Adds each entry of a matrix, with a sign, to one of k entries (arXiv 1012.1577).

    The index of an entry in the image is the sum, modulo k, of a random number of its row and one
    of its column, and its sign is the product of two (TensorSketch; Pham and Pagh, KDD 2013). So
    the image of an outer product is the circular convolution of the images of its factors, and the
    product need not be formed. As many rows as fit in k entries follow one another from a random
    start, so their entries never collide; the same holds for k columns of a longer row.

    For matrices X and Y, the inner product of images has variance at most (|X|^2 |Y|^2 + <X, Y>^2
    + 2 |X Y^T|^2 + 2 |X^T Y|^2) / k. The last two terms arise because indices and signs are made of
    two numbers each; they matter if both matrices have about rank one.

    Args:
        rows: the number of rows r; 1 for vectors, each entry of which has its own sign.
        columns: the number of columns c.
        k: the number of entries of an image.
        key: the key of the random numbers.
    """

    def __init__(self, rows: int, columns: int, k: int, key: int) -> None:
        super().__init__(rows * columns, k)
        self.height, self.width = rows, columns
        self.step = max(1, k // columns)  # how many rows follow one another
        self._starts = Draws(key, 0).below(k, -(-rows // self.step))
        self._offsets = Draws(key, 1).below(k, -(-columns // k))
        self._row_signs, self._signs = Draws(key, 2).signs(rows), Draws(key, 3).signs(columns)

    def __call__(self, values: Tensor) -> Tensor:
        row_signs, signs = self._signs_at(values)
        matrices = values.reshape(-1, self.height, self.width)
        images = values.new_zeros(len(matrices), self.k)
        for rows, start in self._runs():
            self._add(images, matrices[:, rows] * (row_signs[rows, None] * signs), start)
        return images.view(*values.shape[:-1], self.k)

    def of_outer(self, left: Tensor, right: Tensor) -> Tensor:
        if (left.shape[2], right.shape[2]) != (self.height, self.width):  # a map of vectors
            return super().of_outer(left, right)
        row_signs, signs = self._signs_at(left)
        # apply signs to the factors: r + c numbers per position instead of r * c
        left, right = left * row_signs, right * signs
        convolved = self._is_convolved(left)
        row = 4 * left.shape[1] * self.k if convolved else self.p
        rows = rows_within(workspace_bytes(left.device), row * left.element_size())
        image = self._convolved if convolved else self._formed
        parts = zip(left.split(rows), right.split(rows), strict=True)
        return torch.cat([image(some, others) for some, others in parts])

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        row_signs, signs = self._signs_at(like)
        row, column = indices // self.width, indices % self.width
        shifts, offsets = self._shifts.to(indices.device), self._offsets.to(indices.device)
        target = (shifts[row] + offsets[column // self.k] + column) % self.k
        found = like.new_zeros(len(indices), self.k)
        found[torch.arange(len(indices)), target] = row_signs[row] * signs[column]
        return found

    @cached_property
    def _shifts(self) -> Tensor:
        """The index of the image at which each row begins, ``[r]``."""
        row = torch.arange(self.height)
        return (self._starts[row // self.step] + row % self.step * self.width) % self.k

    def _signs_at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The signs of the rows and columns, with the dtype and device of a tensor."""
        if (self._signs.dtype, self._signs.device) != (like.dtype, like.device):
            self._row_signs, self._signs = self._row_signs.to(like), self._signs.to(like)
        return self._row_signs, self._signs

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """The runs of rows that follow one another, and the index at which each begins."""
        for number, start in enumerate(self._starts.tolist()):
            yield slice(number * self.step, (number + 1) * self.step), start

    def _is_convolved(self, left: Tensor) -> bool:
        """Whether Fourier transforms of all positions cost less than forming the matrices."""
        t, element = left.shape[1], element_cost(left)
        transform = self.k * math.log2(max(2, self.k))
        touched = 4 * (self.height + self.width) + 6 * self.k
        convolved = element * ((2 * t + 1) * transform + t * touched)
        return convolved < 2 * t * self.p + 3 * element * self.p

    def _formed(self, left: Tensor, right: Tensor) -> Tensor:
        matrices = torch.bmm(left.transpose(1, 2), right)
        images = left.new_zeros(len(left), self.k)
        for rows, start in self._runs():
            self._add(images, matrices[:, rows], start)
        return images

    def _convolved(self, left: Tensor, right: Tensor) -> Tensor:
        # CPUs have no Fourier transforms in half precision
        exact = torch.promote_types(left.dtype, torch.float32)
        rows = left.new_zeros(*left.shape[:2], self.k, dtype=exact)
        rows.index_add_(2, self._shifts.to(left.device), left.to(exact))
        columns = torch.zeros_like(rows)
        self._add(columns.flatten(0, 1), right.flatten(0, 1), 0)
        spectrum = (torch.fft.rfft(rows) * torch.fft.rfft(columns)).sum(1)
        images: Tensor = torch.fft.irfft(spectrum, n=self.k)
        return images.to(left.dtype)

    def _add(self, images: Tensor, run: Tensor, start: int) -> None:
        """Adds a run of entries ``[n, ..]`` to images ``[n, k]`` from a start, modulo k."""
        parts = run.flatten(1).split(self.k, 1)
        # several rows are one part
        for part, offset in zip(parts, self._offsets.tolist(), strict=True):
            first = (start + offset) % self.k
            there = min(part.shape[1], self.k - first)
            images[:, first : first + there] += part[:, :there]
            images[:, : part.shape[1] - there] += part[:, there:]
