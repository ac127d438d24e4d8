"""How the gradients of n examples for one parameter are held, and their cheapest exact products.

Letters: n training and m test examples, t and s positions (of a sequence or a feature map) of a
training and a test example, o and i outputs and inputs of a layer, p = o * i elements.

A form is immutable. ``train.inner(test)`` is the matrix of inner products ``[m, n]``; each form
chooses among its exact plans by estimated cost, which counts a product of two matrices in FLOP and
a touched element of memory as ``ELEMENT_COST`` FLOP.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.memory import resident_bytes, rows_within, workspace_bytes

# FLOP of a matrix product done in the time it takes to read or write one element
ELEMENT_COST = {"cpu": 32, "cuda": 256}


def element_cost(tensor: Tensor) -> int:
    """What touching one element costs, in FLOP of a matrix product on that device."""
    return ELEMENT_COST.get(tensor.device.type, 128)


class Form(ABC):
    """Gradients of n examples for a parameter of the given shape."""

    shape: torch.Size

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of examples."""

    @property
    @abstractmethod
    def sample(self) -> Tensor:
        """A tensor with the form's dtype and device."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients written out, ``[n, p]``."""

    @abstractmethod
    def rows(self, rows: slice) -> Form:
        """Some of the examples."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> Form:
        """Each example's gradient times its factor ``[n]``."""

    @abstractmethod
    def summed(self) -> Form:
        """The sum over examples, as a form of one example."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """The squared norm of each gradient, ``[n]``."""

    @abstractmethod
    def inner(self, test: Form, total: int) -> Tensor:
        """Inner products with the test gradients, ``[m, n]``; ``total`` training rows come."""

    @abstractmethod
    def joined(self, others: Sequence[Form]) -> Form | None:
        """The examples of all forms, in turn; None where they are of another kind."""

    def plus(self, other: Form) -> Form:
        """The sum with the same examples' gradients from another use of the parameter."""
        return Sum((self, other))

    def compact(self) -> Form:
        """The same gradients in the form that takes the least memory."""
        return self

    @property
    def p(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)

    @cached_property
    def formed(self) -> Tensor:
        """``dense()``, kept: for the test side, which meets every training batch."""
        return self.dense()

    def rows_that_fit(self) -> int:
        """How many gradients may be written out and kept."""
        budget = resident_bytes(self.sample.device)
        return rows_within(budget, self.p * self.sample.element_size())

    def fits(self) -> bool:
        """Whether all gradients may be written out and kept."""
        return "formed" in self.__dict__ or self.n <= self.rows_that_fit()

    def example_slices(self, row_elements: int) -> Iterator[slice]:
        """Slices of examples such that ``row_elements`` an example fit the workspace."""
        budget = workspace_bytes(self.sample.device)
        step = rows_within(budget, row_elements * self.sample.element_size())
        return (slice(start, start + step) for start in range(0, self.n, step))


def with_formed(test: Form, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of the test gradients written out ``[m, p]``, in tiles if they are too many."""
    if test.fits():
        return product(test.formed)
    tile = test.rows_that_fit()
    tiles = (slice(start, start + tile) for start in range(0, test.n, tile))
    return torch.cat([product(test.rows(rows).dense()) for rows in tiles])


def products(formed: Tensor, values: Tensor) -> Tensor:
    """Inner products of rows ``[m, p]`` and ``[n, p]``: ``[m, n]``.

    A CPU's product of few long rows is up to twice as fast with the training rows on the left.
    """
    return (values @ formed.T).T


def join(forms: Sequence[Form]) -> Form:
    """The examples of several forms of one parameter, one after the other."""
    if len(forms) == 1:
        return forms[0]
    joined = forms[0].joined(forms[1:])
    if joined is None:
        joined = Dense(torch.cat([form.dense() for form in forms]), forms[0].shape)
    return joined


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """Gradients written out: values ``[n, p]``."""

    values: Tensor
    shape: torch.Size

    @property
    def n(self) -> int:
        return self.values.shape[0]

    @property
    def sample(self) -> Tensor:
        return self.values

    def dense(self) -> Tensor:
        return self.values

    def rows(self, rows: slice) -> Dense:
        return replace(self, values=self.values[rows])

    def scaled(self, factors: Tensor) -> Dense:
        return replace(self, values=self.values * factors[:, None])

    def summed(self) -> Dense:
        return replace(self, values=self.values.sum(0, keepdim=True))

    def squared_norms(self) -> Tensor:
        return self.values.square().sum(1)

    def inner(self, test: Form, total: int) -> Tensor:
        return with_formed(test, lambda formed: products(formed, self.values))

    def joined(self, others: Sequence[Form]) -> Form:
        return Dense(torch.cat([self.values, *(form.dense() for form in others)]), self.shape)

    def plus(self, other: Form) -> Form:
        if isinstance(other, Dense):
            return replace(self, values=self.values + other.values)
        return super().plus(other)


@dataclass(frozen=True, eq=False)
class Factored(Form):
    """Gradients ``sum_t deltas[:, t] inputs[:, t]^T`` of a matrix (o, i).

    deltas: ``[n, t, o]``, inputs: ``[n, t, i]``. ``transposed`` where the parameter is stored as
    (i, o).
    """

    deltas: Tensor
    inputs: Tensor
    shape: torch.Size
    transposed: bool = False

    @property
    def n(self) -> int:
        return self.deltas.shape[0]

    @property
    def sample(self) -> Tensor:
        return self.deltas

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The letters t, o, i."""
        return self.deltas.shape[1], self.deltas.shape[2], self.inputs.shape[2]

    def matrices(self) -> Tensor:
        """The gradients as ``[n, o, i]``, or ``[n, i, o]`` where transposed."""
        left, right = self.deltas, self.inputs
        if self.transposed:
            left, right = right, left
        return torch.bmm(left.transpose(1, 2), right)

    def dense(self) -> Tensor:
        return self.matrices().flatten(1)

    def rows(self, rows: slice) -> Factored:
        return replace(self, deltas=self.deltas[rows], inputs=self.inputs[rows])

    def scaled(self, factors: Tensor) -> Factored:
        return replace(self, deltas=self.deltas * factors[:, None, None])

    def summed(self) -> Form:
        # all positions of all examples become the positions of one
        deltas, inputs = self.deltas.flatten(0, 1)[None], self.inputs.flatten(0, 1)[None]
        return replace(self, deltas=deltas, inputs=inputs).compact()

    def compact(self) -> Form:
        t, o, i = self.sizes
        return self if t * (o + i) <= o * i else Dense(self.dense(), self.shape)

    def squared_norms(self) -> Tensor:
        t, o, i = self.sizes
        if t == 1:
            return (self.deltas.square().sum(2) * self.inputs.square().sum(2)).squeeze(1)
        if t * (o + i) + element_cost(self.deltas) * t < o * i:
            parts = []
            for rows in self.example_slices(2 * t * t):
                d, a = self.deltas[rows], self.inputs[rows]
                gram = torch.bmm(d, d.transpose(1, 2))
                parts.append(gram.mul_(torch.bmm(a, a.transpose(1, 2))).sum((1, 2)))
            return torch.cat(parts)
        return torch.cat(
            [self.rows(r).matrices().square().sum((1, 2)) for r in self.example_slices(o * i)]
        )

    def inner(self, test: Form, total: int) -> Tensor:
        t, o, i = self.sizes
        touch, m = element_cost(self.deltas), test.n
        # each cost: for one training example
        forming: float = 2 * t * o * i + 2 * touch * o * i + 2 * m * o * i
        along: float = 2 * m * t * o * i + 2 * touch * m * t * min(o, i)
        plans = {self._inner_forming: forming, self._inner_along: along}
        if isinstance(test, Factored) and test.transposed == self.transposed:
            s = test.sizes[0]
            plans[self._inner_gram] = 2 * m * t * s * (o + i) + 3 * touch * m * t * s
            if "formed" not in test.__dict__:
                to_form = m * (2 * s + 2 * touch) * o * i / max(total, self.n)
                plans[self._inner_forming] += to_form
                plans[self._inner_along] += to_form
        return min(plans, key=plans.__getitem__)(test)

    def _inner_gram(self, test: Form) -> Tensor:
        """Sum over positions of (inputs . inputs) (deltas . deltas); no gradient is formed."""
        assert isinstance(test, Factored)
        t, s, m = self.sizes[0], test.sizes[0], test.n
        if t == s == 1:
            product = test.deltas[:, 0] @ self.deltas[:, 0].T
            return product.mul_(test.inputs[:, 0] @ self.inputs[:, 0].T)
        test_deltas, test_inputs = test.deltas.flatten(0, 1), test.inputs.flatten(0, 1)
        parts = []
        for rows in self.example_slices(2 * m * t * s):
            product = test_deltas @ self.deltas[rows].flatten(0, 1).T
            product.mul_(test_inputs @ self.inputs[rows].flatten(0, 1).T)
            parts.append(product.view(m, s, -1, t).sum((1, 3)))
        return torch.cat(parts, dim=1)

    def _inner_forming(self, test: Form) -> Tensor:
        """Write the training gradients out, a chunk at a time; one matrix product each."""

        def product(formed: Tensor) -> Tensor:
            chunks = self.example_slices(self.p)
            parts = [products(formed, self.rows(rows).dense()) for rows in chunks]
            return torch.cat(parts, dim=1)

        return with_formed(test, product)

    def _inner_along(self, test: Form) -> Tensor:
        """Deltas . (V inputs) for each test gradient V: no training gradient is formed."""
        t, o, i = self.sizes

        def product(formed: Tensor) -> Tensor:
            v = formed.view(-1, i, o) if self.transposed else formed.view(-1, o, i).transpose(1, 2)
            parts = []
            for rows in self.example_slices(len(v) * t * min(o, i)):
                d, a = self.deltas[rows].flatten(0, 1), self.inputs[rows].flatten(0, 1)
                if o <= i:
                    along = torch.matmul(a, v).mul_(d)
                else:
                    along = torch.matmul(d, v.transpose(1, 2)).mul_(a)
                parts.append(along.sum(2).view(len(v), -1, t).sum(2))
            return torch.cat(parts, dim=1)

        return with_formed(test, product)

    def joined(self, others: Sequence[Form]) -> Form | None:
        alike = [f for f in (self, *others) if self._is_like(f)]
        if len(alike) <= len(others):
            return None
        # shorter sequences are filled up with zeros, which add nothing
        t = max(f.deltas.shape[1] for f in alike)
        deltas = [pad(f.deltas, (0, 0, 0, t - f.deltas.shape[1])) for f in alike]
        inputs = [pad(f.inputs, (0, 0, 0, t - f.inputs.shape[1])) for f in alike]
        return replace(self, deltas=torch.cat(deltas), inputs=torch.cat(inputs))

    def plus(self, other: Form) -> Form:
        if not self._is_like(other):
            return super().plus(other)
        deltas = torch.cat([self.deltas, other.deltas], dim=1)
        return replace(self, deltas=deltas, inputs=torch.cat([self.inputs, other.inputs], dim=1))

    def _is_like(self, other: Form) -> TypeGuard[Factored]:
        return isinstance(other, Factored) and other.transposed == self.transposed


@dataclass(frozen=True, eq=False)
class Sum(Form):
    """Gradients that are the sum of unlike parts: a parameter used by layers of two kinds."""

    parts: tuple[Form, ...]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parts[0].shape

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def sample(self) -> Tensor:
        return self.parts[0].sample

    def _map(self, change: Callable[[Form], Form]) -> Sum:
        return Sum(tuple(change(part) for part in self.parts))

    def dense(self) -> Tensor:
        return sum((part.dense() for part in self.parts[1:]), self.parts[0].dense())

    def rows(self, rows: slice) -> Sum:
        return self._map(lambda part: part.rows(rows))

    def scaled(self, factors: Tensor) -> Sum:
        return self._map(lambda part: part.scaled(factors))

    def summed(self) -> Sum:
        return self._map(lambda part: part.summed())

    def squared_norms(self) -> Tensor:
        chunks = self.example_slices(self.p)
        return torch.cat([self.rows(rows).dense().square().sum(1) for rows in chunks])

    def inner(self, test: Form, total: int) -> Tensor:
        products = [part.inner(test, total) for part in self.parts]
        return sum(products[1:], products[0])

    def joined(self, others: Sequence[Form]) -> Form | None:
        if not all(isinstance(f, Sum) and len(f.parts) == len(self.parts) for f in others):
            return None
        columns = zip(self.parts, *(f.parts for f in others), strict=True)  # type: ignore[attr-defined]
        return Sum(tuple(join(column) for column in columns))

    def plus(self, other: Form) -> Form:
        for place, part in enumerate(self.parts):
            together = part.plus(other)
            if not isinstance(together, Sum):
                return Sum((*self.parts[:place], together, *self.parts[place + 1 :]))
        return Sum((*self.parts, other))
