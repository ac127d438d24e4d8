"""Loaders are taken in a fixed order, and refused where they have none."""

import copy
import random

import numpy as np
import pytest
import torch
from global_states import NUMPY, random_states
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from influence_kit.data.batches import example_count
from influence_kit.data.index_order import index_sampler
from influence_kit.data.loaders import Slices, as_loader, check_order, loader_length, promised_rows
from influence_kit.errors import InvalidArgumentError

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


def test_workers_that_may_overtake_each_other_are_refused():
    with pytest.raises(
        InvalidArgumentError, match="in_order=False and 2 workers: batches come in the order"
    ):
        as_loader(DataLoader(DATA, 2, num_workers=2, in_order=False), None, "train_dataset")
    as_loader(DataLoader(DATA, 2, num_workers=1, in_order=False), None, "train_dataset")


class Shuffled(Sampler):
    """A sampler of a user's, whose draw is of any kind."""

    def __init__(self, draw, sizes=None):
        self.draw, self.sizes = draw, sizes

    def __iter__(self):
        order = self.draw()
        return iter(order if self.sizes is None else [order[:2], order[2:]])

    def __len__(self):
        return 2 if self.sizes else N


def by_torch():
    return torch.randperm(N).tolist()


def by_numpy():
    return NUMPY.permutation(N)


def by_python():
    return random.sample(range(N), N)


class ByEpoch:
    """Counts its passes, and has another order in each."""

    epoch = 0

    def __call__(self):
        self.epoch += 1
        return torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Epochs(SequentialSampler):
    """Shuffles by an epoch that is set."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Holding(Shuffled):
    """Draws from a generator of its own."""

    def __init__(self, generator):
        super().__init__(None)
        self.generator = generator

    def __iter__(self):
        if isinstance(self.generator, torch.Generator):
            return iter(torch.randperm(N, generator=self.generator).tolist())
        order = list(range(N))
        self.generator.shuffle(order)
        return iter(order)


OWN = {
    "torch": lambda: DataLoader(DATA, 2, sampler=Shuffled(by_torch)),
    "numpy": lambda: DataLoader(DATA, 2, sampler=Shuffled(by_numpy)),
    "python": lambda: DataLoader(DATA, 2, sampler=Shuffled(by_python)),
    "epochs": lambda: DataLoader(DATA, 2, sampler=Shuffled(ByEpoch())),
    "set_epoch": lambda: DataLoader(DATA, 2, sampler=Epochs(DATA)),
    "own torch generator": lambda: DataLoader(
        DATA, 2, sampler=Holding(torch.Generator().manual_seed(0))
    ),
    "own numpy generator": lambda: DataLoader(DATA, 2, sampler=Holding(np.random.default_rng(0))),
    "own python generator": lambda: DataLoader(DATA, 2, sampler=Holding(random.Random(0))),
    "batches": lambda: DataLoader(DATA, batch_sampler=Shuffled(by_torch, True)),
    "no batches": lambda: DataLoader(DATA, batch_size=None, sampler=Shuffled(by_python)),
    "inside": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(Shuffled(by_numpy), 2, drop_last=True)
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_sampler_of_a_users_that_shuffles_is_refused_and_left_as_it_was(kind):
    loader = OWN[kind]()
    sampler = index_sampler(loader)
    before = copy.deepcopy(sampler)
    states = random_states()
    with pytest.raises(
        InvalidArgumentError, match=r"`inputs` is a DataLoader that shuffles \((Shuf|Hold|Epochs)"
    ):
        check_order(loader, "inputs")
    assert random_states() == states
    torch.manual_seed(0)
    if "own" in kind:
        assert list(sampler) == list(before)


class Fixed(Shuffled):
    """An order of a user's that is the same in each pass."""


PLACES = {
    "reversed": (lambda: DataLoader(DATA, 2, sampler=Fixed(lambda: [4, 3, 2, 1, 0])), "sampler"),
    "a part": (lambda: DataLoader(DATA, 2, sampler=[0, 1, 2]), "batch_sampler"),
    "repeated": (lambda: DataLoader(DATA, batch_sampler=[[0, 1, 2, 3, 4], [0]]), "batch_sampler"),
    "no batches": (lambda: DataLoader(DATA, batch_size=None, sampler=[1, 0]), "list"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_fixed_order_that_is_not_the_data_sets_is_taken_with_a_warning(kind):
    loader = PLACES[kind][0]()
    match = "does not give each of the 5 examples of its Dataset once and in order: indices in res"
    with pytest.warns(UserWarning, match=match) as caught:
        assert as_loader(loader, None, "train_dataset") is loader
    # what the warning proposes has the data set's indices
    proposed = str(caught[0].message).split("`")[3]
    rows = torch.cat([torch.atleast_1d(batch[1]) for batch in loader])
    assert eval(proposed) == rows.tolist()


@pytest.mark.parametrize("name", ["inputs", "hessian_dataset"])
@pytest.mark.parametrize("kind", PLACES)
def test_where_no_result_has_indices_of_a_loader_its_order_may_be_any(kind, name, recwarn):
    check_order(PLACES[kind][0](), name)
    assert not recwarn


ONCE = {
    "generator": (lambda: (batch for batch in [(X, Y)]), "is a generator, which can be read only"),
    "zip": (lambda: zip(X, Y, strict=True), "is a zip, which can be read only once"),
    "sampler": (
        lambda: DataLoader(DATA, 2, sampler=iter(range(N))),
        "whose sampler is a range_iterator, which can be read only once",
    ),
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_only_once_is_refused(kind):
    make, match = ONCE[kind]
    with pytest.raises(InvalidArgumentError, match=match):
        as_loader(make(), None, "train_dataset")


NO_DATA = {
    "text": ("data.csv", "`train_dataset` is a str; it must be a Dataset or sequence"),
    "table": (
        type("Frame", (), {"iloc": None, "__len__": len, "__getitem__": None})(),
        "`train_dataset` is a Frame, whose columns cannot be assigned to inputs and targets; it",
    ),
    "columns": ({"x": X, "y": Y}, r"`train_dataset` is a dict of \['x', 'y'\]; it must be"),
    "tuple of tensors": ((X, Y), "`train_dataset` is a tuple of 2 tensors; it must be"),
    "list of tensors": ([X, Y], "`train_dataset` is a list of 2 tensors; it must be"),
    "tensor": (X, "`train_dataset` is a Tensor, whose rows have no targets"),
    "array": (X.numpy(), "`train_dataset` is a ndarray, whose rows have no targets"),
    "number": (3, "`train_dataset` must be a Dataset, a sequence of examples, or a DataL.* a int"),
}


@pytest.mark.parametrize("kind", NO_DATA)
def test_what_holds_no_examples_is_refused(kind):
    data, match = NO_DATA[kind]
    with pytest.raises(InvalidArgumentError, match=match):
        as_loader(data, 2, "train_dataset")


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        (DataLoader(DATA, 2), 5),
        (DataLoader(DATA, 2, drop_last=True), 4),
        (DataLoader(DATA, 2, sampler=[0, 1, 2]), 3),
        (DataLoader(DATA, batch_sampler=[[0, 1, 2, 3, 4], [0]]), 6),
        (DataLoader(DATA, batch_size=None), None),
        (Slices(DATA, 2), 5),
        ({"a": (X, Y)}.values(), None),
    ],
)
def test_the_examples_that_a_loader_promises_are_known_where_it_tells(loader, rows):
    assert promised_rows(loader) == rows


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
        DataLoader(DATA, batch_sampler=[[0, 1], [2], [3, 4]]),
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
