r"""EK-FAC in place of matrix exponentials over a segment of a training run: arXiv 2405.12186.

Gradient descent over K steps of rate eta in the curvature H carries a change of the weights to
exp(-eta K H) times itself, and turns a constant gradient g into the change
eta K f(eta K H) g with f(x) = (1 - exp(-x)) / x. Both are functions of the eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from influence_kit.checkpoints.discovery import label_of
from influence_kit.core.arguments import check_count, check_number, check_sequence
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import State
from influence_kit.curvature.kronecker_curvature import EKFAC, FisherName, WithoutForm
from influence_kit.curvature.kronecker_fit import OBSERVATIONS
from influence_kit.curvature.kronecker_inverse import KroneckerInverse
from influence_kit.curvature.observations import curvature_factor
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients, from_flat
from influence_kit.learning_rates.rate_sum import rate_sum

SEGMENTS = "segments"
Segments = int | Sequence[int]


@dataclass(frozen=True)
class Segment:
    """Both maps of one segment; calling it turns a gradient into the change of the weights.

    Args:
        response: eta K f(eta K H).
        decay: exp(-eta K H).
    """

    response: KroneckerInverse
    decay: KroneckerInverse

    def __call__(self, gradients: Gradients) -> Gradients:
        return self.response(gradients)

    def carried(self, gradients: Gradients) -> Gradients:
        """Gradients in the weights at the end of the segment, in those at its start; dense."""
        found = self.decay(gradients)
        return from_flat(found.flat(), gradients.parameters, gradients.sample)


class SegmentedEKFAC(EKFAC):
    """EK-FAC of each segment, whose "damping" is 1 / (eta K) of the segment.

    Args:
        rate_sums: eta K, the sum of learning rate / (1 - momentum) over the steps of each segment;
            None reads those between their ends, and before the first, from the checkpoints.
        segments: see ``SOURCE``.
        curvature, seed, rtol, layers_without_kronecker: as in ``KroneckerCurvature``.
    """

    rules = (SEGMENTS,)
    auto_rule = SEGMENTS
    # test gradients are carried through the segments one after the other
    is_symmetric = False

    def __init__(
        self,
        rate_sums: Sequence[float] | None = None,
        segments: Segments | None = None,
        curvature: FisherName = "fisher",
        seed: int = 0,
        rtol: float = 1e-5,
        layers_without_kronecker: WithoutForm = "diagonal",
    ) -> None:
        super().__init__("auto", curvature, seed, rtol, layers_without_kronecker)
        self.rate_sums = _checked(rate_sums)
        self.segments = _checked_segments(segments)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "rate_sums": self.rate_sums, "segments": self.segments}

    def members(self, count: int) -> list[range]:
        """The indices of the checkpoints of each segment, of so many in order; the last ends it.

        Raises:
            InvalidArgumentError: if they cannot be divided into these segments.
        """
        segments = self.segments
        if segments is None or (isinstance(segments, int) and count % segments == 0):
            parts = count if segments is None else segments
            sizes = [count // parts] * parts
        else:
            sizes = [] if isinstance(segments, int) else segments
        if sum(sizes) != count:
            how = "be divided by it" if isinstance(segments, int) else f"be their sum, {sum(sizes)}"
            raise InvalidArgumentError(
                f"`segments` is {segments}, and there are {count} checkpoints, whose number must "
                f"{how}"
            )
        ends = list(accumulate(sizes))
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def auto_damping(self, rule: str, state: State, data: FitData) -> Tensor:
        found = self._rate_sum(data.checkpoints, data.checkpoint) * self._factor(state)
        return torch.full((len(data.partition.blocks),), 1 / found, dtype=torch.float64)

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Segment:
        factor = self._factor(state)

        def respond(grid: Tensor, value: float) -> Tensor:
            # f is 1 at 0, where the curvature leaves the gradient as it is
            x = grid / value
            shares = torch.where(x > 0, -torch.expm1(-x) / x, 1.0)
            return shares / (value * factor)

        def decay(grid: Tensor, value: float) -> Tensor:
            return torch.exp(-grid / value)

        weigh: list[Callable[[Tensor, float], Tensor]] = [respond, decay]
        return Segment(*(self.mapped(state, damping, data, each) for each in weigh))

    def _factor(self, state: State) -> float:
        """The curvature of the mean loss over the eigenvalues."""
        return curvature_factor(state[OBSERVATIONS], self.curvature != "fisher")

    def _rate_sum(self, checkpoints: Sequence[Any], index: int) -> float:
        ends_at = [part[-1] for part in self.members(len(checkpoints))]
        number = ends_at.index(index)
        if self.rate_sums is not None:
            if len(self.rate_sums) != len(ends_at):
                raise InvalidArgumentError(
                    f"`rate_sums` has {len(self.rate_sums)} numbers, one per segment, and there "
                    f"are {len(ends_at)} segments of {len(checkpoints)} checkpoints"
                )
            return self.rate_sums[number]
        try:
            both = ends_at[max(number - 1, 0) : number + 1]
            ends = [rate_sum(checkpoints, i).value for i in both]
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"the learning rates of the segment that ends at checkpoint {index} "
                f"({label_of(checkpoints[index])}) are not known: {error}. Or pass `rate_sums`"
            ) from error
        found = ends[-1] - sum(ends[:-1])
        if not found > 0:
            raise InvalidArgumentError(
                f"the segment that ends at checkpoint {index} has a sum of learning rates of "
                f"{found:g}: checkpoints must be in the order of the run, and the last of a "
                "segment at its end; or pass `rate_sums`"
            )
        return found


def _checked(rate_sums: Any) -> list[float] | None:
    if rate_sums is None:
        return None
    given = check_sequence(rate_sums, "rate_sums", "numbers, one per segment, or None")
    return [
        check_number(value, f"rate_sums[{index}]", above=0) for index, value in enumerate(given)
    ]


def _checked_segments(segments: Any) -> int | list[int] | None:
    if segments is None:
        return None
    what = "a number of segments, a list of their numbers of checkpoints, or None"
    if isinstance(segments, Integral):
        return check_count(segments, "segments", instead="a list of counts, or None")
    given = check_sequence(segments, "segments", what)
    return [check_count(value, f"segments[{index}]") for index, value in enumerate(given)]


class SegmentBatches:
    """The batches of a data set at each checkpoint of a segment, which is then in the model.

    Args:
        batches: the batches.
        members: the indices of the checkpoints.
        load: puts a checkpoint into the model.
    """

    def __init__(
        self, batches: Iterable[Batch], members: Sequence[int], load: Callable[[int], object]
    ) -> None:
        self.batches, self.members, self.load = batches, members, load

    def __iter__(self) -> Iterator[Batch]:
        for index in self.members:
            self.load(index)
            yield from self.batches
