"""The sparse Johnson-Lindenstrauss transform, quick for matrices that are sums of few products.

Letters: n examples, t positions, r rows and c columns of a matrix, k entries of its image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.draws import Draws
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.gradients.forms import element_cost
from influence_kit.projections.maps import VectorMap


class SJLT(VectorMap):
    """Each entry of a matrix is added to one of k, with a sign (arXiv 1012.1577).

    The place of an entry is the sum, round about k, of a number of its row and one of its column,
    and its sign the product of two (TensorSketch; Pham and Pagh, KDD 2013). So the image of an
    outer product is the circular convolution of the images of its factors, for which the product
    need not be formed. As many rows as k holds follow one another from a random start, so that
    their entries never meet; so do k columns of a longer row.

    Of matrices X and Y the inner product has variance at most (|X|^2 |Y|^2 + <X, Y>^2
    + 2 |X Y^T|^2 + 2 |X^T Y|^2) / k: the last two are there because places and signs are made of
    two numbers, and count where both matrices are of about rank one.

    Args:
        rows: the letter r; 1 for vectors, of which each entry has a sign of its own.
        columns: the letter c.
        k: entries of an image.
        key: what the map is drawn from.
    """

    def __init__(self, rows: int, columns: int, k: int, key: int) -> None:
        super().__init__(rows * columns, k)
        self.height, self.width = rows, columns
        self.step = max(1, k // columns)  # rows that follow one another
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
        if (left.shape[2], right.shape[2]) != (self.height, self.width):  # drawn for vectors
            return super().of_outer(left, right)
        row_signs, signs = self._signs_at(left)
        # signed before they are multiplied: r + c numbers a position, not r * c
        left, right = left * row_signs, right * signs
        convolved = self._is_convolved(left)
        row = 4 * left.shape[1] * self.k if convolved else self.p
        rows = rows_within(workspace_bytes(left.device), row * left.element_size())
        image = self._convolved if convolved else self._formed
        parts = zip(left.split(rows), right.split(rows), strict=True)
        return torch.cat([image(some, others) for some, others in parts])

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        row_signs, signs = self._signs_at(like)
        row, column = places // self.width, places % self.width
        shifts, offsets = self._shifts.to(places.device), self._offsets.to(places.device)
        target = (shifts[row] + offsets[column // self.k] + column) % self.k
        found = like.new_zeros(len(places), self.k)
        found[torch.arange(len(places)), target] = row_signs[row] * signs[column]
        return found

    @cached_property
    def _shifts(self) -> Tensor:
        """Where each row begins, ``[r]``."""
        row = torch.arange(self.height)
        return (self._starts[row // self.step] + row % self.step * self.width) % self.k

    def _signs_at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The signs of the rows and of the columns, where the values are."""
        if (self._signs.dtype, self._signs.device) != (like.dtype, like.device):
            self._row_signs, self._signs = self._row_signs.to(like), self._signs.to(like)
        return self._row_signs, self._signs

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """The rows that follow one another, and where they begin."""
        for number, start in enumerate(self._starts.tolist()):
            yield slice(number * self.step, (number + 1) * self.step), start

    def _is_convolved(self, left: Tensor) -> bool:
        """Whether transforms of all positions cost less than the matrices written out."""
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
        # there are no transforms of half precision on CPUs
        exact = torch.promote_types(left.dtype, torch.float32)
        rows = left.new_zeros(*left.shape[:2], self.k, dtype=exact)
        rows.index_add_(2, self._shifts.to(left.device), left.to(exact))
        columns = torch.zeros_like(rows)
        self._add(columns.flatten(0, 1), right.flatten(0, 1), 0)
        spectrum = (torch.fft.rfft(rows) * torch.fft.rfft(columns)).sum(1)
        images: Tensor = torch.fft.irfft(spectrum, n=self.k)
        return images.to(left.dtype)

    def _add(self, images: Tensor, run: Tensor, start: int) -> None:
        """Adds a run of entries ``[n, ..]`` to the places ``[n, k]`` from a start, round about."""
        parts = run.flatten(1).split(self.k, 1)
        # several rows are one part
        for part, offset in zip(parts, self._offsets.tolist(), strict=True):
            first = (start + offset) % self.k
            there = min(part.shape[1], self.k - first)
            images[:, first : first + there] += part[:, :there]
            images[:, : part.shape[1] - there] += part[:, there:]
