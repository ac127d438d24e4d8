"""The gradients of one side of a term for given examples; errors name the example and layer.

Shapes: n examples, P parameters.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.data.batches import Batch, to_device
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients, join_examples
from influence_kit.scoring.term import Side
from influence_kit.scoring.watch import Watch


@dataclass(frozen=True)
class SideGradients:
    """Computes the gradients of sides, at their checkpoints.

    Args:
        loader: loads checkpoints into the model.
        sample: a tensor with the dtype and device of the scores.
    """

    loader: CheckpointLoader
    sample: Tensor

    def batch(self, side: Side, batch: Batch, start: int, kind: str) -> Gradients:
        """The gradients of a side for a batch whose first example has the index ``start``."""
        batch = to_device(batch, self.sample.device)
        with errors_named(side, batch, start, kind):
            return side(batch)

    def of(
        self,
        side: Side,
        inputs: Iterable[Batch],
        aggregate: bool = False,
        watch: Watch | None = None,
    ) -> Gradients:
        """The gradients of a side for all inputs, or their sum.

        Args:
            side: the side.
            inputs: the examples.
            aggregate: return the sum, as one example.
            watch: observes the gradients before ``side.solve`` is applied.
        """
        self.loader.load(side.checkpoint)
        parts: list[Gradients] = []
        start = 0
        for batch in inputs:
            part = self.batch(side, batch, start, "test")
            # a sum does not show whose gradient it was, and a solver may treat NaN as solved
            if (aggregate or side.solve is not None) and not part.has_finite_factors:
                refuse_non_finite_examples(part, start, "test", side.checkpoint)
            start += part.n
            if aggregate:
                part = part.summed()
                parts = [parts[0].plus(part).compact() if parts else part]
            else:
                parts.append(part)
        if not parts:
            raise InvalidArgumentError("`inputs` holds no examples")
        joined = join_examples(parts)
        if watch is not None:
            watch.see_tests(joined)
        return side.solved(joined)

    def vectors(
        self, side: Side, inputs: Iterable[Batch], aggregate: bool = False, kind: str = "test"
    ) -> Tensor:
        """The gradients of a side for all inputs, written out ``[n, P]``, or their sum ``[1, P]``.

        ``kind`` is the word for the examples in errors.
        """
        if aggregate or side.solve is not None:
            return self.of(side, inputs, aggregate).flat()
        self.loader.load(side.checkpoint)
        parts: list[Tensor] = []
        start = 0
        for batch in inputs:
            part = self.batch(side, batch, start, kind)
            parts.append(part.flat())
            if not part.has_finite_factors:
                refuse_non_finite_examples(part, start, kind, side.checkpoint)
            start += part.n
        if not parts:
            raise InvalidArgumentError("`inputs` holds no examples")
        return torch.cat(parts)


@contextmanager
def errors_named(side: Side, batch: Batch, start: int, kind: str) -> Iterator[None]:
    """Inside, a solver's error about non-finite rows becomes one that names example and layer."""
    try:
        yield
    except NonFiniteError:
        refuse_non_finite_examples(side.features(batch), start, kind, side.checkpoint)
        raise


def refuse_non_finite_examples(side: Gradients, start: int, kind: str, checkpoint: int) -> None:
    """Raise an error that names the first example, and its layer, with a NaN or infinite gradient.

    Args:
        side: the gradients.
        start: the index of the first of their examples.
        kind: "training" or "test", the word for the examples.
        checkpoint: the index of the checkpoint in the model.
    """
    found = side.non_finite()
    if found is not None:
        example, parameter = found
        layer = parameter.rpartition(".")[0] or parameter
        raise NonFiniteError(
            f"the gradient of {kind} example {start + example} at '{parameter}' (layer '{layer}') "
            f"is NaN or infinite at checkpoint {checkpoint}; check that example and its loss"
        )
