"""Loaders are taken in a fixed order, and refused where they have none."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from influence_kit.data import example_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.loaders import as_loader, check_order, loader_length

N = 5
X = torch.arange(N * 3, dtype=torch.float64).reshape(N, 3)
Y = torch.arange(N)
DATA = TensorDataset(X, Y)


SHUFFLING = {
    "shuffle=True": (lambda: DataLoader(DATA, 2, shuffle=True), "RandomSampler"),
    "RandomSampler": (lambda: DataLoader(DATA, 2, sampler=RandomSampler(DATA)), "RandomSampler"),
    "its subclass": (
        lambda: DataLoader(DATA, 2, sampler=type("Seeded", (RandomSampler,), {})(DATA)),
        "Seeded",
    ),
    "SubsetRandomSampler": (
        lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler([0, 1])),
        "SubsetRandomSampler",
    ),
    "WeightedRandomSampler": (
        lambda: DataLoader(DATA, 2, sampler=WeightedRandomSampler([1.0] * N, N)),
        "WeightedRandomSampler",
    ),
    "DistributedSampler": (
        lambda: DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 1, 0, shuffle=True)),
        "DistributedSampler",
    ),
    "in a batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
        "RandomSampler",
    ),
    "in a batch sampler as sampler": (
        lambda: DataLoader(
            DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 2, False)
        ),
        "RandomSampler",
    ),
}


@pytest.mark.parametrize("kind", SHUFFLING)
def test_a_loader_that_shuffles_is_refused(kind):
    make, sampler = SHUFFLING[kind]
    with pytest.raises(
        InvalidArgumentError, match=rf"`train_dataset` is a DataLoader that shuffles \({sampler}\)"
    ):
        as_loader(make(), None, "train_dataset")


def test_a_loader_of_one_ranks_share_is_refused():
    loader = DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 2, 0, shuffle=False))
    with pytest.raises(InvalidArgumentError, match="`inputs` is a DataLoader of one rank's share"):
        check_order(loader, "inputs")


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 2),
        DataLoader(DATA, 2, sampler=SequentialSampler(DATA)),
        DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 1, 0, shuffle=False)),
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        {"a": (X, Y), "b": (X, Y)}.values(),
    ],
    ids=["plain", "sequential", "all on one rank", "fixed batches", "iterable of batches"],
)
def test_a_loader_in_order_is_taken_as_it_is(loader):
    assert as_loader(loader, None, "train_dataset") is loader


def test_a_loader_that_drops_its_last_batch_is_taken_with_a_warning():
    loader = DataLoader(DATA, 2, drop_last=True)
    with pytest.warns(UserWarning, match="`train_dataset` is a DataLoader with drop_last=True"):
        assert as_loader(loader, None, "train_dataset") is loader


@pytest.mark.parametrize(("size", "counts"), [(2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_a_data_set_is_read_in_order_and_to_its_end(size, counts):
    batches = list(as_loader(DATA, size, "train_dataset"))
    assert [example_count(batch) for batch in batches] == counts
    assert torch.equal(torch.cat([batch[1] for batch in batches]), Y)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


def test_an_iterable_data_set_is_read_to_its_end():
    batches = list(as_loader(Stream(), 3, "train_dataset"))
    assert torch.equal(torch.cat([batch[0] for batch in batches]), X)


def test_a_data_set_without_a_batch_size_is_refused():
    match = "since the `train_dataset` argument was a `Dataset`, `batch_size` must be an int"
    with pytest.raises(InvalidArgumentError, match=match):
        as_loader(DATA, None, "train_dataset")


@pytest.mark.parametrize(
    ("loader", "length"),
    [(DataLoader(DATA, 2), 3), (DataLoader(Stream(), 2), None), (iter([]), None), ([1, 2], 2)],
    ids=["loader", "iterable data set", "iterator", "list"],
)
def test_a_loader_that_does_not_tell_its_length_has_none(loader, length):
    assert loader_length(loader) == length
