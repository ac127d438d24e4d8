"""The examples of a batch that a check compares, drawn at random.

Shapes: n examples of a batch.
"""

import torch
from torch import Tensor

from influence_kit.data.batches import Batch, example_count, example_lengths, take
from influence_kit.gradients.autograd_comparison import EXAMPLES

# how many examples go through the first check, the best first
COUNTS = (EXAMPLES, 7, 4, 3)
# in smaller batches the first and last example are not added, as they would be most of them
FEW_IN_BATCH = 12


def few_examples(batch: Batch, generator: torch.Generator) -> Batch:
    """Some examples drawn from the whole batch; one example is not cut."""
    n = example_count(batch)
    if n == 1:
        return batch
    lengths = {length for shape in example_lengths(batch) for length in shape if length > 1}
    # a number of which no tensor length is a multiple, if possible
    counts = [c for c in COUNTS if not any(length % c == 0 for length in lengths)]
    return take(batch, drawn(n, (counts or [EXAMPLES])[0], generator))


def drawn(n: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of n indices in random order, not ascending; repeated if n is smaller."""
    order = torch.randperm(n, generator=generator)[:count]
    if n > 1 and bool((order.diff() > 0).all()):
        order = order.flip(0)
    # forwards and backwards, so that the reversed order differs
    found = torch.cat([order, order.flip(0)]).repeat(count)[:count]
    if count > 3:  # a model that sorts its examples puts equal ones side by side
        found[-1] = found[0]
    return found


def drawn_of_batch(n: int, most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` of n indices, in random order, to be compared with the whole batch."""
    rows = torch.randperm(n, generator=generator)[: min(most, max(min(n, 2), n // 8))]
    if n < FEW_IN_BATCH:
        return rows
    # a model that sorts by length, with many equal lengths, moves the first or the last example
    found: Tensor = torch.cat([rows, torch.tensor([0, n - 1])]).unique()
    return found.flip(0)
