"""Forms of any gradients: written out, or as the sum of other forms; and operations on several.

Shapes: n examples, p elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from influence_kit.core.scaling import balanced
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.form import Form, products, require_tensors, with_formed


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


def add_forms(total: dict[str, Form], forms: Mapping[str, Form]) -> None:
    """Add gradients of the same examples to those in ``total``, parameter by parameter."""
    for name, form in forms.items():
        if name in total:
            total[name] = total[name].plus(form) or Sum((total[name], form))
        else:
            total[name] = form


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

    def plus(self, other: Form) -> Form | None:
        if not isinstance(other, Dense):
            return None
        return replace(self, values=self.values + other.values)


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
            if together is not None:
                return Sum((*self.parts[:index], together, *self.parts[index + 1 :]))
        return Sum((*self.parts, other))
