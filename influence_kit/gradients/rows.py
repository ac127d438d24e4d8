"""The gradients of an embedding: only the rows that each example looked up.

Shapes: as in ``forms``; v rows of the table (the vocabulary), e entries per row, u stored rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.scaling import powers_of, times_powers
from influence_kit.gradients.form import Form, element_cost, with_formed


@dataclass(frozen=True, eq=False)
class Rows(Form):
    """Gradients of a table (v, e) that are zero except in a few rows.

    Row ``ids[u]`` of example ``examples[u]`` is ``values[u]``; each pair occurs once, and
    ``examples`` is sorted.
    """

    examples: Tensor
    ids: Tensor
    values: Tensor
    count: int
    shape: torch.Size

    @staticmethod
    def from_lookups(ids: Tensor, deltas: Tensor, shape: torch.Size) -> Rows:
        """From the ids ``[n, t]`` and the gradients at the looked-up rows ``[n, t, e]``."""
        n, t = ids.shape
        keys = ids + torch.arange(n, device=ids.device)[:, None] * shape[0]
        unique, inverse = keys.flatten().unique(return_inverse=True)
        values = deltas.new_zeros(len(unique), shape[1])
        values.index_add_(0, inverse, deltas.reshape(n * t, -1))
        return Rows(unique // shape[0], unique % shape[0], values, n, shape)

    @property
    def n(self) -> int:
        return self.count

    @property
    def sample(self) -> Tensor:
        return self.values

    def dense(self) -> Tensor:
        formed = self.values.new_zeros(self.n, *self.shape)
        formed[self.examples, self.ids] = self.values
        return formed.flatten(1)

    def rows(self, rows: slice) -> Rows:
        start, stop, step = rows.indices(self.n)
        bounds = torch.tensor([start, stop], device=self.examples.device)
        first, last = torch.searchsorted(self.examples, bounds).tolist()
        part = slice(first, last)
        examples, ids, values = self.examples[part] - start, self.ids[part], self.values[part]
        if step != 1:
            chosen = (examples % step == 0).nonzero()[:, 0]
            examples, ids, values = examples[chosen] // step, ids[chosen], values[chosen]
        return Rows(examples, ids, values, len(range(start, stop, step)), self.shape)

    def scaled(self, factors: Tensor) -> Rows:
        return replace(self, values=self.values * factors[self.examples, None])

    def summed(self) -> Rows:
        return self.from_lookups(self.ids[None], self.values[None], self.shape)

    def squared_norms(self) -> Tensor:
        norms = self.values.new_zeros(self.n)
        return norms.index_add_(0, self.examples, self.values.square().sum(1))

    def balanced(self) -> tuple[Form, Tensor]:
        largest = self.values.new_zeros(self.n)
        largest.scatter_reduce_(0, self.examples, self.values.abs().amax(1), "amax")
        powers = powers_of(largest)
        return replace(self, values=times_powers(self.values, -powers[self.examples])), powers

    def combined(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(len(weights), *self.shape)
        row = len(weights) * self.shape[1] * self.values.element_size()
        for part in self._stored_slices(row):
            scaled = weights[:, self.examples[part], None] * self.values[part]
            total.index_add_(1, self.ids[part], scaled)
        return total.flatten(1)

    def inner(self, test: Form, total: int) -> Tensor:
        if not isinstance(test, Rows):
            return with_formed(test, self._inner_gathered)
        pairs = int(test.id_counts[self.ids].sum())
        seen, entries = len(test.seen_ids), self.shape[1]
        touch = element_cost(self.values)
        joining = 5 * touch * entries * pairs
        writing = self.n * seen * entries * (touch + 2 * test.n)
        return self._inner_joined(test) if joining < writing else self._inner_written(test)

    def _inner_gathered(self, formed: Tensor) -> Tensor:
        """Products with test gradients written out: read their rows that are stored here."""
        scores = self.values.new_zeros(len(formed), self.n)
        tables = formed.view(-1, *self.shape)
        row = len(formed) * self.shape[1] * self.values.element_size()
        for part in self._stored_slices(row):
            products = torch.einsum("mue,ue->mu", tables[:, self.ids[part]], self.values[part])
            scores.index_add_(1, self.examples[part], products)
        return scores

    def _inner_joined(self, test: Rows) -> Tensor:
        """Multiply the pairs of stored rows with equal ids."""
        scores = self.values.new_zeros(test.n * self.n)
        order, starts, counts = test.id_order, test.id_starts, test.id_counts
        # a stored row has at most this many partners, so chunks of stored rows bound the pairs
        most = int(counts.max()) if len(counts) else 1
        for part in self._stored_slices(2 * most * self.shape[1] * self.values.element_size()):
            ids = self.ids[part]
            repeats = counts[ids]
            mine = torch.repeat_interleave(repeats)
            first = torch.cumsum(repeats, 0) - repeats
            theirs = order[
                torch.arange(len(mine), device=ids.device) - first[mine] + starts[ids][mine]
            ]
            products = (self.values[part][mine] * test.values[theirs]).sum(1)
            index = test.examples[theirs] * self.n + self.examples[part][mine]
            scores.index_add_(0, index, products)
        return scores.view(test.n, self.n)

    def _inner_written(self, test: Rows) -> Tensor:
        """Write both gradients out for the ids of the test examples; one matrix product."""
        seen, formed = test.written
        column = torch.searchsorted(seen, self.ids).clamp_(max=len(seen) - 1)
        known = seen[column] == self.ids
        parts = []
        for rows in self.example_slices(len(seen) * self.shape[1]):
            here = (self.examples >= rows.start) & (self.examples < rows.stop) & known
            count = min(rows.stop, self.n) - rows.start
            mine = self.values.new_zeros(count, len(seen), self.shape[1])
            mine[self.examples[here] - rows.start, column[here]] = self.values[here]
            parts.append(formed @ mine.flatten(1).T)
        return torch.cat(parts, dim=1)

    def _stored_slices(self, row_bytes: int) -> list[slice]:
        step = rows_within(workspace_bytes(self.values.device), row_bytes)
        return [slice(start, start + step) for start in range(0, len(self.ids), step)]

    # Cached for test gradients: their stored rows by id.

    @cached_property
    def id_order(self) -> Tensor:
        """The stored rows in the order of their ids."""
        return torch.argsort(self.ids, stable=True)

    @cached_property
    def id_counts(self) -> Tensor:
        """How many stored rows each id has, ``[v]``."""
        return torch.bincount(self.ids, minlength=self.shape[0])

    @cached_property
    def id_starts(self) -> Tensor:
        """The index in ``id_order`` at which each id begins, ``[v]``."""
        return torch.cumsum(self.id_counts, 0) - self.id_counts

    @cached_property
    def seen_ids(self) -> Tensor:
        """The ids that occur, ascending."""
        return torch.nonzero(self.id_counts)[:, 0]

    @cached_property
    def written(self) -> tuple[Tensor, Tensor]:
        """The ids that occur, and the gradients written out for these only, ``[n, seen * e]``."""
        seen = self.seen_ids
        formed = self.values.new_zeros(self.n, len(seen), self.shape[1])
        formed[self.examples, torch.searchsorted(seen, self.ids)] = self.values
        return seen, formed.flatten(1)

    def joined(self, others: Sequence[Form]) -> Form | None:
        alike = [f for f in (self, *others) if isinstance(f, Rows)]
        if len(alike) <= len(others):
            return None
        examples, count = [], 0
        for form in alike:
            examples.append(form.examples + count)
            count += form.n
        ids, values = torch.cat([f.ids for f in alike]), torch.cat([f.values for f in alike])
        return Rows(torch.cat(examples), ids, values, count, self.shape)

    def plus(self, other: Form) -> Form | None:
        if not isinstance(other, Rows):
            return None
        keys = torch.cat([f.examples * self.shape[0] + f.ids for f in (self, other)])
        unique, inverse = keys.unique(return_inverse=True)
        values = self.values.new_zeros(len(unique), self.shape[1])
        values.index_add_(0, inverse, torch.cat([self.values, other.values]))
        return Rows(unique // self.shape[0], unique % self.shape[0], values, self.n, self.shape)
