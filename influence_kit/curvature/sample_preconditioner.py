"""A preconditioner from the gradients of a sample of examples.

C is a mean of outer products of gradients, so that of a sample has most of its large eigenvalues,
and their eigenvectors across layers, which a product of factors per layer cannot have.

Shapes: s gradients of the sample, k vectors, P parameters, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.memory import resident_bytes
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.observed_gradients import ObservedGradients
from influence_kit.data.batches import Batch, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.operators.partition import Partition, spread

# the number of gradients: examples, times independent draws if there are fewer
MOST_GRADIENTS, MOST_DRAWS = 2048, 4


def sample_gradients(data: FitData, seed: int, at_data: bool) -> list[Gradients]:
    """Gradients of examples spread over the data, at sampled slopes.

    Args:
        data: the data of a fit.
        seed: the seed of the slopes.
        at_data: whether to use the labels of the data instead, as they are used for a loss that is
            not a known likelihood.
    """
    if not at_data:
        try:
            return _of_draws(data, seed)
        except InvalidArgumentError:  # an error of the data occurs again below
            pass
    return list(_gradients(data, data.observed(seed, 0, at_data=True), 1))


def _of_draws(data: FitData, seed: int) -> list[Gradients]:
    count = sum(len(indices) for indices, _ in data.examples.sample)
    draws = min(MOST_DRAWS, max(1, MOST_GRADIENTS // count))
    found: list[Gradients] = []
    for draw in range(draws):
        # other draws than those of the curvature itself
        observed = data.observed(seed, 3 + draw, at_data=False)
        found += _gradients(data, observed, draws)
    return found


def _gradients(data: FitData, observed: ObservedGradients, draws: int) -> Iterator[Gradients]:
    """Those of the sample, or of as many of its examples as fit in memory."""
    sample = data.examples.sample
    left = sum(len(indices) for indices, _ in sample)
    every = 1
    for indices, batch in sample:
        rows = torch.arange(0, len(indices), every, device=indices.device)
        if every == 1:
            one = observed(indices[:1], _first(batch))[0].compact()
            within = resident_bytes(data.device) // (2 * draws * max(1, one.nbytes))
            every = -(-left // max(1, within))
            rows = rows[::every]
        yield observed(indices[rows], take(batch, rows))[0].compact()


def _first(batch: Batch) -> Batch:
    return batch if example_count(batch) == 1 else take(batch, slice(0, 1))


@dataclass
class SamplePreconditioner:
    """v -> (1/s sum_j g_j g_j^T + damping)^-1 v, block by block, by Woodbury's identity.

    Args:
        sample: the gradients g, in parts.
        partition: the parameters, in blocks.
        damping: of each block ``[B]``; positive.
    """

    sample: Sequence[Gradients]
    partition: Partition
    damping: Tensor

    def __post_init__(self) -> None:
        self.count = sum(part.n for part in self.sample)
        self.factors = [
            torch.linalg.cholesky(self._gram(names) + damping * self._unit)
            for names, damping in zip(self._blocks, self.damping.tolist(), strict=True)
        ]

    @property
    def _blocks(self) -> list[Sequence[str]]:
        return list(self.partition.blocks.values())

    @property
    def _unit(self) -> Tensor:
        like = self.sample[0].sample
        return torch.eye(self.count, dtype=torch.float64, device=like.device)

    def _gram(self, names: Sequence[str]) -> Tensor:
        """The inner products of all gradients of a block over s, float64 ``[s, s]``."""
        rows = [
            torch.cat([part.inner_of(other, self.count, names) for part in self.sample], dim=1)
            for other in self.sample
        ]
        found = torch.cat(rows).double() / self.count
        return (found + found.T) / 2

    def condition(self) -> float:
        """The largest condition number of a block of the damped sample, from below."""
        pairs = zip(self.factors, self.damping.tolist(), strict=True)
        return max(_largest_of_factor(factor) / float(damping) for factor, damping in pairs)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The inverse times each row of ``[k, P]``."""
        tests = self.partition.gradients(vectors, self.sample[0])
        sums: list[Tensor] = []
        for names, factor in zip(self._blocks, self.factors, strict=True):
            products = [part.inner_of(tests, self.count, names) for part in self.sample]
            weights = torch.cat(products, dim=1).double() / self.count
            weights = torch.cholesky_solve(weights.T, factor).T.to(vectors)
            parts = weights.split([part.n for part in self.sample], dim=1)
            columns = [
                torch.cat(list(part.combined(own, names).values()), dim=1)
                for part, own in zip(self.sample, parts, strict=True)
            ]
            sums.append(torch.stack(columns).sum(0))
        lift = spread(self.damping, self.partition.sizes).to(vectors.device)
        left = vectors.double() - torch.cat(sums, dim=1).double()
        return (left / lift).to(vectors)


def _largest_of_factor(factor: Tensor, iterations: int = 20) -> float:
    """The largest eigenvalue of L L^T by power iteration from the row sums."""
    vector = factor @ factor.sum(0)
    for _ in range(iterations):
        vector = factor @ (factor.T @ (vector / vector.norm()))
    largest: Tensor = vector.norm()
    return float(largest)
