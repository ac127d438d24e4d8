"""Compares rows of activations in a batch with those of a smaller batch of the same examples.

A model may reorder the examples of a batch before a layer (sort them by length, say), or mix them.
Neither shows in the shape of the layer's output.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from influence_kit.data.batches import Batch, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.autograd_comparison import is_random
from influence_kit.gradients.drawn_examples import drawn_of_batch

# tolerances relative to the largest entry: another batch size changes the order of summation
CLOSE, CLOSE_OF_HALF = 1e-3, 5e-2
MOST_COMPARED = 8

# the rows ``[n, *]`` of a batch, in one or more tensors
Rows = Callable[[Batch], Sequence[Tensor]]


class RowCheck:
    """Reads the rows of batches, and checks those of batches 1, 2, 4, 8, ... on some examples.

    If the first batch fails the check, all batches are read one example at a time.

    Args:
        model: the model.
        what: what the rows are, in words for errors.
        can_be_slow: whether reading one example at a time is allowed.
    """

    def __init__(self, model: nn.Module, what: str, can_be_slow: bool = True) -> None:
        self._model, self._what, self._can_be_slow = model, what, can_be_slow
        self._seen = 0
        self._one_by_one = False
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, batch: Batch, rows: Rows) -> list[Tensor]:
        """The rows of each example of a batch.

        Raises:
            InvalidArgumentError: if they depend on the other examples of the batch.
        """
        n = example_count(batch)
        if self._one_by_one and n > 1:
            return _one_by_one(batch, rows, n)
        found = list(rows(batch))
        self._seen += 1
        if n == 1 or self._seen & (self._seen - 1) or self._agree(batch, rows, found, n):
            return found
        if self._seen > 1 or not self._can_be_slow:
            raise InvalidArgumentError(
                f"batch {self._seen}: {self._what} of some examples differ between this batch and "
                "a smaller one: the model reorders or mixes the examples of a batch. Batches of "
                "one example (batch_size=1) always work"
            )
        warnings.warn(
            f"{self._what} of some examples differ between their batch and a smaller one (the "
            "model reorders or mixes examples): they are read one example at a time",
            stacklevel=2,
        )
        self._one_by_one = True
        return _one_by_one(batch, rows, n)

    def _agree(self, batch: Batch, rows: Rows, found: Sequence[Tensor], n: int) -> bool:
        if is_random(self._model):  # dropout masks differ from batch to batch
            return True
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self._model.parameters())
        close = CLOSE_OF_HALF if half else CLOSE
        some = drawn_of_batch(n, MOST_COMPARED, self._generator)
        again = rows(take(batch, some))
        pairs = zip(found, again, strict=True)
        return all(_near(a[some.to(a.device)], b, close) for a, b in pairs)


def _one_by_one(batch: Batch, rows: Rows, n: int) -> list[Tensor]:
    parts = [rows(take(batch, slice(i, i + 1))) for i in range(n)]
    return [torch.cat(list(column)) for column in zip(*parts, strict=True)]


def _near(a: Tensor, b: Tensor, close: float) -> bool:
    if a.shape != b.shape:
        return False
    known = torch.isfinite(a) & torch.isfinite(b)
    scale = a[known].abs().max() if bool(known.any()) else a.new_zeros(())
    return not bool(known.any()) or bool((a - b)[known].abs().max() <= close * scale)
