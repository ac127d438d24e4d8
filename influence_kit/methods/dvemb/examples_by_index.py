"""The examples of a training set, looked up by their indices."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError


class ExamplesByIndex:
    """The data set of a loader.

    Args:
        loader: batches of the data set, as a method has them.
    """

    def __init__(self, loader: Any) -> None:
        self._loader, self._data, self._collate = loader, loader.dataset, loader.collate_fn
        self.rows: int = loader.batch_size

    def __call__(self, indices: Sequence[int]) -> Batch:
        """A batch of the examples at those indices."""
        batch: Batch = self._loader.marked(self._collate([self._data[index] for index in indices]))
        return batch


def count_by_index(data: Any) -> int:
    """The number of examples of the argument ``train_dataset``, whose examples have indices."""
    dataset, in_order = data, True
    if isinstance(data, DataLoader):
        dataset = data.dataset
        in_order = isinstance(data.sampler, SequentialSampler) and data.batch_size is not None
    by_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not by_index or isinstance(dataset, IterableDataset) or not in_order:
        raise InvalidArgumentError(
            "examples are looked up by their indices: `train_dataset` must be a Dataset with "
            "__getitem__ and __len__ (or a DataLoader of one, in order and in batches); got a "
            f"{type(data).__name__}"
        )
    return len(dataset)
