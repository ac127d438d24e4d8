"""Where a method gets gradients from: a capture that has been checked."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from influence_kit.data import Batch, call_model, example_count, take
from influence_kit.errors import LabelError
from influence_kit.gradients.capture import Capture
from influence_kit.gradients.check import check
from influence_kit.gradients.comparison import EXAMPLES
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses import Loss
from influence_kit.memory import rows_within, workspace_bytes

MOST_ROWS = 2048


class GradientSource:
    """Per-example gradients of the chosen parameters, for any loss.

    The first batch of each loss is checked against autograd, and a later one again where the first
    had too few examples to tell.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.capture = Capture(model, parameters)
        self._checked: dict[int, tuple[Loss, int]] = {}
        self._said: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model is ready for gradients while inside."""
        with self.capture.attached():
            yield

    def __call__(self, batch: Batch, loss: Loss) -> Gradients:
        """The gradients of each example of a batch that is on the model's device."""
        self.prepare(batch, loss)
        return self.capture(batch, loss)

    def prepare(self, batch: Batch, loss: Loss) -> None:
        """Check capture and loss, where that has not been done."""
        distinct = min(example_count(batch), EXAMPLES)
        known, seen = self._checked.get(id(loss), (loss, 0))
        if seen < distinct or not known.settled:
            try:
                check(self.capture, batch, loss)
            except LabelError:  # which counts the few examples that were looked at
                with torch.no_grad():
                    loss.values(call_model(self.capture.model, batch), batch)
                raise
            self._checked[id(loss)] = (loss, distinct)
            self._say_slow()

    def _say_slow(self) -> None:
        names = [name for name in self.capture.without_rule if name not in self._said]
        self._said.update(names)
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
            warnings.warn(
                f"no gradient rule fits the parameters {', '.join(names[:6])}{more}: their "
                "per-example gradients are computed by torch.func, which is exact and slower; "
                "`layers` can leave them out",
                stacklevel=2,
            )


def comfortable_rows(model: nn.Module, batch: Batch, device: torch.device) -> int:
    """How many examples like the batch's first to run at once."""
    # what is kept, the gradients at the same places, and products of the two
    rows = rows_within(4 * workspace_bytes(device), 2 * kept_bytes(model, batch))
    # matrix products like rows in powers of two
    return min(MOST_ROWS, 1 << round(math.log2(rows)))


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """What the model keeps for backward of the batch's first example."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    one = take(batch, slice(0, 1))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        call_model(model, one)
    return sum(kept.values())
