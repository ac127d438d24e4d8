"""Forms: how the gradients of n examples for one parameter are stored, and their exact products.

Shapes: m test examples, n training examples, s and t positions (of a sequence or a feature map) of
a test and a training example, o outputs and i inputs of a layer, p = o * i elements.

A form is immutable. ``train.inner(test)`` is the matrix of inner products ``[m, n]``; each form
chooses the cheapest of its exact plans by estimated cost, which counts matrix products in FLOP and
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

from influence_kit.core.arguments import shown
from influence_kit.core.memory import resident_bytes, rows_within, workspace_bytes
from influence_kit.core.scaling import balanced
from influence_kit.errors import InvalidArgumentError

# FLOP of a matrix product in the time it takes to read or write one element
ELEMENT_COST = {"cpu": 32, "cuda": 256}


def element_cost(tensor: Tensor) -> int:
    """The cost of reading or writing one element, in FLOP of a matrix product on that device."""
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
        """Gradients whose squares exist, and the powers of two ``[n]`` to multiply them by.

        Where the numbers are not very small or very large, powers are 0 and gradients unchanged.
        """

    @abstractmethod
    def inner(self, test: Form, total: int) -> Tensor:
        """Inner products with the test gradients, ``[m, n]``; ``total`` training rows in all."""

    @abstractmethod
    def joined(self, others: Sequence[Form]) -> Form | None:
        """The examples of all forms, one after the other; None if the forms differ in kind."""

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
        """Products ``[m, n]`` of these test gradients, the form ``name``, with training gradients.

        A form that stands for several parameters uses several training forms. None if there is
        nothing to multiply.
        """
        form = train.get(name)
        return None if form is None else form.inner(self, total)

    def meet_own(self, others: Mapping[str, Form], name: str) -> Tensor | None:
        """Products of each example with the same example of the other forms, ``[n]``."""
        form = others.get(name)
        return None if form is None else self.paired(form)

    def by_parameter(self, name: str) -> dict[str, Tensor]:
        """The gradients of the form ``name`` written out ``[n, p]``, by parameter."""
        return {name: self.dense()}

    def compact(self) -> Form:
        """The same gradients in the form that takes the least memory."""
        return self

    @property
    def nbytes(self) -> int:
        """The memory of its tensors in bytes."""
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
        """``dense()``, cached for test gradients, which are multiplied by every training batch."""
        return self.dense()

    def rows_that_fit(self) -> int:
        """How many gradients may be written out and cached."""
        budget = resident_bytes(self.sample.device)
        return rows_within(budget, self.p * self.sample.element_size())

    def fits(self) -> bool:
        """Whether all gradients may be written out and cached."""
        return "formed" in self.__dict__ or self.n <= self.rows_that_fit()

    def rows_of_workspace(self, row_elements: int) -> int:
        """How many examples fit the workspace, at ``row_elements`` elements per example."""
        budget = workspace_bytes(self.sample.device)
        return rows_within(budget, row_elements * self.sample.element_size())

    def example_slices(self, row_elements: int) -> Iterator[slice]:
        """Slices of examples that fit the workspace, at ``row_elements`` elements per example."""
        step = self.rows_of_workspace(row_elements)
        return (slice(start, start + step) for start in range(0, self.n, step))


def require_tensors(form: Form, **dimensions: int) -> None:
    """Refuse a form whose shape is not one, or whose fields are not tensors of these dimensions."""
    kind = type(form).__name__
    if not isinstance(form.shape, torch.Size):
        raise InvalidArgumentError(
            f"`shape` of a {kind} must be a torch.Size, that of the parameter; got "
            f"{shown(form.shape)}"
        )
    for name, count in dimensions.items():
        value = getattr(form, name)
        if not isinstance(value, Tensor) or value.dim() != count:
            raise InvalidArgumentError(
                f"`{name}` of a {kind} must be a tensor of {count} dimensions; got {shown(value)}"
            )


def with_formed(test: Form, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of the test gradients written out ``[m, p]``, in tiles if they are too many."""
    if test.fits():
        return product(test.formed)
    tile = test.rows_that_fit()
    tiles = (slice(start, start + tile) for start in range(0, test.n, tile))
    return torch.cat([product(test.rows(rows).dense()) for rows in tiles])


def products(formed: Tensor, values: Tensor) -> Tensor:
    """Inner products of rows ``[m, p]`` and ``[n, p]``: ``[m, n]``.

    On a CPU, a product of few long rows is up to twice as fast with the training rows on the left.
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
    # a form that is zero does not count
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

    def __post_init__(self) -> None:
        require_tensors(self, values=2)
        if self.values.shape[1] != self.p:
            raise InvalidArgumentError(
                f"a Dense of shape {list(self.shape)} has {self.p} values per example; got "
                f"{list(self.values.shape)}"
            )

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
    """Gradients that are a sum of different forms: a parameter used by layers of two kinds."""

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
        for index, part in enumerate(self.parts):
            together = part.plus(other)
            if not isinstance(together, Sum):
                return Sum((*self.parts[:index], together, *self.parts[index + 1 :]))
        return Sum((*self.parts, other))
