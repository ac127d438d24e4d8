"""The gradients of n examples for all chosen parameters: one form per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense, add_forms, aligned, join


@dataclass(frozen=True)
class Gradients:
    """Gradients of ``n`` examples; a parameter without a form has gradient zero.

    Args:
        n: the number of examples.
        forms: the forms by parameter name.
        parameters: the shape of every chosen parameter, in the model's order.
        sample: a tensor with the dtype and device of the gradients.
    """

    n: int
    forms: Mapping[str, Form]
    parameters: Mapping[str, torch.Size]
    sample: Tensor = field(repr=False)

    def _with(self, n: int, forms: Mapping[str, Form]) -> Gradients:
        return Gradients(n, forms, self.parameters, self.sample)

    def _map(self, n: int, change: Callable[[Form], Form]) -> Gradients:
        return self._with(n, {name: change(form) for name, form in self.forms.items()})

    def rows(self, rows: slice) -> Gradients:
        """Some of the examples."""
        return self._map(len(range(self.n)[rows]), lambda form: form.rows(rows))

    def scaled(self, factors: Tensor) -> Gradients:
        """Each example's gradient times its factor ``[n]``."""
        return self._map(self.n, lambda form: form.scaled(factors))

    def summed(self) -> Gradients:
        """The sum over the examples, as one example."""
        return self._map(1, lambda form: form.summed())

    def compact(self) -> Gradients:
        """The same gradients in the forms that take the least memory."""
        return self._map(self.n, lambda form: form.compact())

    def plus(self, other: Gradients) -> Gradients:
        """The sum, example by example."""
        forms = dict(self.forms)
        add_forms(forms, other.forms)
        return self._with(self.n, forms)

    def of(self, names: Sequence[str]) -> Gradients:
        """The gradients of the named parameters; those of the others are zero."""
        return self._with(self.n, {n: form for n, form in self.forms.items() if n in names})

    def squared_norms(self) -> Tensor:
        """The squared norm of each example's whole gradient, ``[n]``."""
        return self.squared_norms_of(list(self.forms))

    def squared_norms_of(self, names: Sequence[str]) -> Tensor:
        """The squared norms over the named parameters, ``[n]``."""
        norms = self.sample.new_zeros(self.n)
        for name in names:
            if name in self.forms:
                norms += self.forms[name].squared_norms()
        return norms

    def balanced(self) -> tuple[Gradients, Tensor, Tensor]:
        """Gradients whose squares exist, their squared norms and powers of two, both ``[n]``.

        These gradients times two to the power are the original ones, however small or large.
        """
        if not self.forms:
            return self, self.squared_norms(), self.sample.new_zeros(self.n)
        forms, squares, powers = aligned(list(self.forms.values()))
        return self._with(self.n, dict(zip(self.forms, forms, strict=True))), squares, powers

    def paired(self, other: Gradients) -> Tensor:
        """The inner product of each example with the same example of ``other``, ``[n]``."""
        products = self.sample.new_zeros(self.n)
        for name, form in self.forms.items():
            found = form.meet_own(other.forms, name)
            if found is not None:
                products += found
        return products

    def inner(self, test: Gradients, total: int) -> Tensor:
        """Inner products with the test gradients, ``[m, n]``.

        Args:
            test: the test gradients, which cache what they prepare for the next training batch.
            total: the number of training examples in all (it decides what is worth preparing).
        """
        return self.inner_of(test, total, list(self.parameters))

    def inner_by_group(
        self, test: Gradients, total: int, groups: Mapping[str, Sequence[str]]
    ) -> Tensor:
        """Inner products per group of parameters, ``[groups, m, n]``."""
        return torch.stack([self.inner_of(test, total, names) for names in groups.values()])

    def inner_of(self, test: Gradients, total: int, names: Sequence[str]) -> Tensor:
        """Inner products over the named parameters, ``[m, n]``."""
        scores = self.sample.new_zeros(test.n, self.n)
        for name in names:
            form = test.forms.get(name)
            found = None if form is None else form.meet(self.forms, name, total)
            if found is not None:
                scores += found
        return scores

    def combined(self, weights: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Weighted sums over the examples, weights ``[k, n]``: ``[k, p]`` by parameter."""
        sums = {}
        for name in names:
            form = self.forms.get(name)
            zeros = self.sample.new_zeros(len(weights), math.prod(self.parameters[name]))
            sums[name] = zeros if form is None else form.combined(weights)
        return sums

    def flat(self) -> Tensor:
        """All gradients written out next to each other, ``[n, P]``."""
        columns = {
            name: self.sample.new_zeros(self.n, math.prod(shape))
            for name, shape in self.parameters.items()
            if name not in self.forms
        }
        for name, form in self.forms.items():
            columns.update(form.by_parameter(name))
        return torch.cat([columns[name] for name in self.parameters], dim=1)

    @property
    def nbytes(self) -> int:
        """The memory of the forms in bytes."""
        return sum(form.nbytes for form in self.forms.values())

    @property
    def has_finite_factors(self) -> bool:
        """Whether the tensors of the forms, and their sums, are finite: a quick check.

        Products of finite tensors may still overflow.
        """
        return all(form.has_finite_factors for form in self.forms.values())

    def non_finite(self) -> tuple[int, str] | None:
        """An example and a parameter whose gradient is NaN or infinite; None if all are finite."""
        for name, form in self.forms.items():
            for example in torch.nonzero(~torch.isfinite(form.squared_norms()))[:, 0].tolist():
                # squares overflow before gradients do
                if not torch.isfinite(form.rows(slice(example, example + 1)).dense()).all():
                    return example, name
        return None


Transform = Callable[[Gradients], Gradients]


def from_flat(vectors: Tensor, parameters: Mapping[str, torch.Size], sample: Tensor) -> Gradients:
    """Gradients from the output of ``flat``, ``[n, P]``; views of it."""
    columns = vectors.split([math.prod(shape) for shape in parameters.values()], dim=1)
    forms = {
        name: Dense(values, shape)
        for (name, shape), values in zip(parameters.items(), columns, strict=True)
    }
    return Gradients(len(vectors), forms, parameters, sample)


def join_examples(parts: Sequence[Gradients]) -> Gradients:
    """The examples of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    forms = {}
    for name in first.parameters:
        present = [part.forms.get(name) for part in parts]
        # write out zeros for a parameter that some batch did not use
        known = next((form for form in present if form is not None), None)
        if known is not None:
            zeros = (known.rows(slice(0, 1)).scaled(first.sample.new_zeros(1)) for _ in present)
            forms[name] = join(
                [
                    form if form is not None else join([zero] * part.n)
                    for form, zero, part in zip(present, zeros, parts, strict=True)
                ]
            )
    return Gradients(sum(part.n for part in parts), forms, first.parameters, first.sample)
