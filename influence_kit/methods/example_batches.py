"""The batches of a method's data: training examples, inputs, and further data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from influence_kit.core.arguments import check_count
from influence_kit.core.objects import is_one_of
from influence_kit.data.batch_axes import BatchAxes
from influence_kit.data.batches import (
    Batch,
    example_count,
    is_batch,
    is_dataset,
    split,
    take,
    to_device,
)
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.determinism import first_example
from influence_kit.data.input_checks import (
    as_examples,
    refuse_inputs,
    refuse_no_data,
    refuse_one_example,
    refuse_uncollatable,
)
from influence_kit.data.loaders import as_loader, check_order, loader_length
from influence_kit.errors import InvalidArgumentError, PassAgain
from influence_kit.gradients.batch_memory import comfortable_rows
from influence_kit.gradients.check import refuse_mixing_layers
from influence_kit.preservation.restore import borrowed

BatchSize = int | Literal["auto"] | None
TRAIN = "train_dataset"
# what torch takes for a length
MOST_ROWS = 2**63 - 1
# the batch size of data sets whose examples cannot be read in advance
ROWS_OF_ITERABLE = 64


class ExampleBatches:
    """The data sets of a method, by the name of their argument, in checked batches.

    Args:
        model: the model.
        train_dataset: the training set.
        batch_size: of a data set; "auto" derives it from the memory that one example takes.
        batch_axes: the argument of that name.
        eval_mode: whether the model is in evaluation mode.
        device: returns the device of the model.
        why_fixed: returns why passes over the data of an argument must agree, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        batch_size: BatchSize,
        batch_axes: Any,
        eval_mode: bool,
        device: Callable[[], torch.device],
        why_fixed: Callable[[str], str | None],
    ) -> None:
        self.model, self.train_dataset = model, train_dataset
        self.batch_size = _check_batch_size(batch_size, train_dataset)
        self.axes = BatchAxes(batch_axes)
        self.eval_mode, self.device, self.why_fixed = eval_mode, device, why_fixed
        self._checked: dict[str, CheckedBatches] = {}

    def __getitem__(self, name: str) -> CheckedBatches:
        """The batches of a data set that has been added."""
        return self._checked[name]

    @property
    def train(self) -> CheckedBatches:
        """The batches of the training set."""
        return self.of(self.train_dataset, TRAIN)

    @property
    def train_count(self) -> int:
        """The number of training examples; 0 if it is not known."""
        data = getattr(self.train, "dataset", None)
        return loader_length(data) or 0

    def of(self, data: Any, name: str) -> CheckedBatches:
        """The batches of the data of an argument; the loader is made once."""
        if name not in self._checked:
            self.add(self.loader_of(data, name), name)
        return self._checked[name]

    def add(self, loader: Iterable[Batch], name: str) -> None:
        """Check the batches of a loader, under the name of its argument."""
        self._checked[name] = CheckedBatches(
            loader,
            name,
            partial(self.why_fixed, name),
            axes=self.axes,
            examine=partial(refuse_uncollatable, self.model, name=name),
        )

    def add_given(self, data: Any, name: str) -> None:
        """Check the data of an argument immediately if it is already in batches."""
        refuse_no_data(data, name)
        if not is_dataset(data):
            self.add(as_loader(data, None, name), name)

    def forget_changeable(self) -> None:
        """Drop what was recorded about data that a user may change between two calls."""
        for name, checked in self._checked.items():
            if self.why_fixed(name) is None:
                checked.forget()

    def forget(self) -> None:
        """Drop what was recorded about all data."""
        for checked in self._checked.values():
            checked.forget()

    def first(self, count: int) -> Batch:
        """The first training examples."""
        batch = next(iter(self.train))
        few = take(batch, slice(0, count)) if example_count(batch) > count else batch
        return to_device(few, self.device())

    def of_inputs(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        """The batch in chunks that fit in memory, or the user's loader or data set."""
        refuse_inputs(inputs)
        if as_examples(inputs):
            loader = self.loader_of(inputs, "inputs")
            return CheckedBatches(loader, "inputs", ordered=ordered, axes=self.axes)
        if is_batch(inputs):
            refuse_one_example(inputs, self.train.dimensions())
            inputs = self.marked(inputs)
            one = to_device(take(inputs, slice(0, 1)), self.device())
            return list(split(inputs, comfortable_rows(self.model, one, self.device())))
        if ordered:
            check_order(inputs, "inputs")
        return CheckedBatches(inputs, "inputs", ordered=ordered, axes=self.axes)

    def marked(self, batch: Batch) -> Batch:
        """A batch with its dimension of examples marked, as in the training set if it fits."""
        if getattr(self.train, "batch_size", None) == 1:
            self.train.look_at()  # shows which tensors have no dimension of examples
        marked = self.axes.mark(batch)
        if not self.axes.is_clear(batch):
            self.train.look_at()
            # nothing has been computed with the earlier dimension yet
            with suppress(PassAgain):
                return self.axes.mark(batch)
            marked = self.axes.mark(batch)
        return marked

    def loader_of(self, data: Any, name: str) -> Iterable[Batch]:
        """Batches of a data set, of the requested size."""
        refuse_no_data(data, name)
        size: Any = self.batch_size
        if size == "auto" or (size is None and name == "inputs"):
            size = self._auto_batch_size(data, name)
        return as_loader(data, size, name)

    def _auto_batch_size(self, data: Any, name: str) -> int:
        if isinstance(data, IterableDataset):
            return ROWS_OF_ITERABLE
        example = first_example(data)
        if example is not None:
            refuse_uncollatable(self.model, example, name)
        with borrowed(self.model, self.eval_mode):
            refuse_mixing_layers(self.model)
            for batch in DataLoader(data, batch_size=1):
                return comfortable_rows(self.model, to_device(batch, self.device()), self.device())
        return 1


def _check_batch_size(batch_size: BatchSize, train_dataset: Any) -> BatchSize:
    if not is_dataset(train_dataset):
        return batch_size
    if batch_size is None:
        raise InvalidArgumentError(
            "since the `train_dataset` argument was a `Dataset`, `batch_size` must be an int."
        )
    if is_one_of(batch_size, ("auto",)):
        return "auto"
    return check_count(batch_size, "batch_size", 1, '"auto"', most=MOST_ROWS)
