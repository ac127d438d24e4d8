"""The interface of forms: how the gradients of n examples for one parameter are stored.

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
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.memory import resident_bytes, rows_within, workspace_bytes
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

    def plus(self, other: Form) -> Form | None:
        """The sum with the same examples' gradients from another use of the parameter.

        None if the sum is not a form of this kind.
        """
        return None

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
