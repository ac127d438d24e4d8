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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.memory import resident_bytes, rows_within, workspace_bytes
from influence_kit.core.scaling import balanced

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
    def balanced(self) -> tuple[Form, Tensor]:
        """The gradients with squares that exist, and the powers of two ``[n]`` they are to have.

        Powers are 0, and the numbers the same, where they are not very small or very large.
        """

    @abstractmethod
    def inner(self, test: Form, total: int) -> Tensor:
        """Inner products with the test gradients, ``[m, n]``; ``total`` training rows come."""

    @abstractmethod
    def joined(self, others: Sequence[Form]) -> Form | None:
        """The examples of all forms, in turn; None where they are of another kind."""

    def plus(self, other: Form) -> Form:
        """The sum with the same examples' gradients from another use of the parameter."""
        return Sum((self, other))

    def paired(self, other: Form) -> Tensor:
        """The inner product of each gradient with the other form's of the same example, ``[n]``."""
        parts = [
            (self.rows(rows).dense() * other.rows(rows).dense()).sum(1)
            for rows in self.example_slices(2 * self.p)
        ]
        return torch.cat(parts)

    def combined(self, weights: Tensor) -> Tensor:
        """Weighted sums over the examples, weights ``[k, n]``: ``[k, p]``."""
        total = weights.new_zeros(len(weights), self.p)
        for rows in self.example_slices(self.p):
            total.addmm_(weights[:, rows], self.rows(rows).dense())
        return total

    def meet(self, train: Mapping[str, Form], name: str, total: int) -> Tensor | None:
        """Products ``[m, n]`` of these test gradients, the form ``name``, with the train side's.

        A form that stands for several parameters at once takes more than one of the others. None
        where there is nothing to multiply.
        """
        form = train.get(name)
        return None if form is None else form.inner(self, total)

    def meet_own(self, others: Mapping[str, Form], name: str) -> Tensor | None:
        """The same, of each example with the same example of the other side, ``[n]``."""
        form = others.get(name)
        return None if form is None else self.paired(form)

    def by_parameter(self, name: str) -> dict[str, Tensor]:
        """The gradients written out ``[n, p]``, by parameter, of the form ``name``."""
        return {name: self.dense()}

    def compact(self) -> Form:
        """The same gradients in the form that takes the least memory."""
        return self

    @property
    def nbytes(self) -> int:
        """What its tensors take in memory."""
        return sum(
            value.numel() * value.element_size()
            for value in vars(self).values()
            if isinstance(value, Tensor)
        )

    @property
    def has_finite_factors(self) -> bool:
        """Whether the sum of each of its tensors is finite."""
        values = [v for v in vars(self).values() if isinstance(v, Tensor) and v.is_floating_point()]
        return bool(torch.stack([torch.isfinite(value.sum()) for value in values]).all())

    @property
    def p(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)

    @cached_property
    def formed(self) -> Tensor:
        """``dense()``, kept for the test side, which meets every training batch."""
        return self.dense()

    def rows_that_fit(self) -> int:
        """How many gradients may be written out and kept."""
        budget = resident_bytes(self.sample.device)
        return rows_within(budget, self.p * self.sample.element_size())

    def fits(self) -> bool:
        """Whether all gradients may be written out and kept."""
        return "formed" in self.__dict__ or self.n <= self.rows_that_fit()

    def rows_of_workspace(self, row_elements: int) -> int:
        """How many examples fit the workspace, at ``row_elements`` an example."""
        budget = workspace_bytes(self.sample.device)
        return rows_within(budget, row_elements * self.sample.element_size())

    def example_slices(self, row_elements: int) -> Iterator[slice]:
        """Slices of examples such that ``row_elements`` an example fit the workspace."""
        step = self.rows_of_workspace(row_elements)
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


def aligned(forms: Sequence[Form]) -> tuple[list[Form], Tensor, Tensor]:
    """Balanced forms of the same examples, with the same powers of two for all.

    Returns:
        The forms, the sum of their squared norms ``[n]``, and the powers ``[n]``.
    """
    parts = [form.balanced() for form in forms]
    squares = torch.stack([form.squared_norms() for form, _ in parts])
    own = torch.stack([powers for _, powers in parts])
    # a form that is zero has no say
    powers = own.masked_fill(squares == 0, -torch.inf).amax(0)
    powers = powers.masked_fill(powers.isinf(), 0)
    shifts = (own - powers).masked_fill(squares == 0, 0)
    found = [
        form.scaled(torch.exp2(shift)) if bool(shift.any()) else form
        for (form, _), shift in zip(parts, shifts, strict=True)
    ]
    return found, (squares * torch.exp2(2 * shifts)).sum(0), powers


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

    def balanced(self) -> tuple[Form, Tensor]:
        values, powers = balanced(self.values)
        return replace(self, values=values), powers

    def inner(self, test: Form, total: int) -> Tensor:
        return with_formed(test, lambda formed: products(formed, self.values))

    def joined(self, others: Sequence[Form]) -> Form:
        return Dense(torch.cat([self.values, *(form.dense() for form in others)]), self.shape)

    def plus(self, other: Form) -> Form:
        if isinstance(other, Dense):
            return replace(self, values=self.values + other.values)
        return super().plus(other)


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

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def has_finite_factors(self) -> bool:
        return all(part.has_finite_factors for part in self.parts)

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

    def balanced(self) -> tuple[Form, Tensor]:
        parts, _, powers = aligned(self.parts)
        return Sum(tuple(parts)), powers

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
