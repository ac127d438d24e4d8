"""The examples of a training set, by index."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError


class ExamplesByIndex:
    """Batches of the data set of a loader, by the indices of their examples.

    Args:
        loader: the loader of a method, which gives batches of the data set.
    """

    def __init__(self, loader: Any) -> None:
        self._loader, self._data, self._collate = loader, loader.dataset, loader.collate_fn
        self.rows: int = loader.batch_size

    def __call__(self, indices: Sequence[int]) -> Batch:
        """A batch of the examples at these indices."""
        batch: Batch = self._loader.marked(self._collate([self._data[index] for index in indices]))
        return batch


def count_by_index(data: Any) -> int:
    """The number of examples of ``train_dataset``, which must support indexing."""
    dataset, in_order = data, True
    if isinstance(data, DataLoader):
        dataset = data.dataset
        in_order = isinstance(data.sampler, SequentialSampler) and data.batch_size is not None
    by_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not by_index or isinstance(dataset, IterableDataset) or not in_order:
        raise InvalidArgumentError(
            "examples are read by index: `train_dataset` must be a Dataset with __getitem__ and "
            "__len__ (or a DataLoader of one, in order and in batches); got a "
            f"{type(data).__name__}"
        )
    return len(dataset)
