"""Data that are not the same in every pass are refused or warned of; the others score as ever."""

import random

import pytest
import torch
from global_states import NUMPY, random_states
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
)

from influence_kit import (
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    KNNShapley,
    SimilarityInfluence,
    TracInCP,
)
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import checkpoint_losses

N = 40
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 2
DATA = TensorDataset(X, Y)
TEST = (X[:4] + 1, Y[:4])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def tracin(model, data, checkpoints=1, **options):
    states = [{k: v + 0.1 * c for k, v in model.state_dict().items()} for c in range(checkpoints)]
    return TracInCP(model, data, states, loss_fn=nn.CrossEntropyLoss(), **options)


class Drawn(Dataset):
    """A data set of a user's, whose examples may be drawn."""

    def __init__(self, change=lambda x, y: (x, y), n=N):
        self.change, self.n, self.reads = change, n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads.append(i)
        return self.change(X[i], Y[i])


def noise(x, y):
    return x + 0.1 * torch.randn(3).double(), y


def flip(x, y):
    return x.flip(0) if random.random() < 0.5 else x, y


def jitter(x, y):
    return x * NUMPY.uniform(0.9, 1.1), y


def steady(x, y):
    return x * 1.0, y


TRANSFORMS = [noise, flip, jitter]
OTHER_INPUTS = "has other inputs each time it is read: a transform in its Dataset or `collate_fn`"


# Inputs that are drawn.


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["data set", "loader", "workers", "test inputs"])
def test_a_random_transform_is_warned_of_and_moves_no_random_state(model, transform, kind):
    data = Drawn(transform)
    if kind == "workers":
        data = DataLoader(data, 8, num_workers=2)
    elif kind != "data set":
        data = DataLoader(data, 8)
    train, inputs = (DATA, data) if kind == "test inputs" else (data, TEST)
    name = "inputs" if kind == "test inputs" else "train_dataset"
    explainer = tracin(model, train, checkpoints=2)
    states = random_states()
    with pytest.warns(UserWarning, match=f"`{name}` {OTHER_INPUTS}") as caught:
        explainer.influence(inputs)
    assert len(caught) == 1
    assert random_states()[0] == states[0]
    if kind == "workers":  # in this process nothing was drawn
        assert random_states() == states


def masked(examples):
    x, y = default_collate(examples)
    return torch.where(torch.rand_like(x) < 0.15, 0.0, x), y


def test_a_collator_that_draws_inputs_is_warned_of(model):
    with pytest.warns(UserWarning, match=f"`train_dataset` {OTHER_INPUTS}"):
        tracin(model, DataLoader(DATA, 8, collate_fn=masked)).self_influence()


@pytest.mark.parametrize("method", [ExplicitInfluenceFunction, EKFACInfluenceFunction])
@pytest.mark.parametrize("name", ["train_dataset", "hessian_dataset"])
def test_a_random_transform_is_refused_where_something_is_fitted(model, unchanged, method, name):
    options = {"hessian_dataset": Drawn(noise)} if name == "hessian_dataset" else {}
    data = DATA if options else Drawn(noise)
    explainer = method(model, data, [model.state_dict()], loss_fn=nn.CrossEntropyLoss(), **options)
    match = (
        f"`{name}` {OTHER_INPUTS}.*; but the curvature .*so every pass over it must give the same"
    )
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        explainer.influence(TEST)


def test_a_random_transform_is_refused_where_gradients_are_stored(model, tmp_path):
    explainer = tracin(model, Drawn(noise), store=tmp_path / "store")
    match = (
        "but `store` keeps the gradients of its examples, so every pass over it must give the same"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        explainer.influence(TEST)


def test_a_random_transform_is_refused_where_activations_are_saved(model, tmp_path):
    similarity = SimilarityInfluence(model, "0", Drawn(noise), tmp_path, batch_size=8)
    with pytest.raises(InvalidArgumentError, match="but activations are saved"):
        similarity.influence(X[:2])


def test_a_curvature_of_other_data_than_the_random_training_set_is_fitted(model):
    options = {"loss_fn": nn.CrossEntropyLoss(), "hessian_dataset": DATA, "damping": 0.1}
    explainer = ExplicitInfluenceFunction(model, Drawn(noise), [model.state_dict()], **options)
    with pytest.warns(UserWarning, match=f"`train_dataset` {OTHER_INPUTS}"):
        assert explainer.influence(TEST).shape == (4, N)


# Targets and orders that are drawn.


def mask_labels(examples):
    """As a language model's collator: what is masked is to be predicted."""
    x, y = default_collate(examples)
    mask = torch.rand(len(x)) < 0.5
    return {"x": torch.where(mask[:, None], 0.0, x), "labels": torch.where(mask, y, -100)}


def mixup(examples):
    x, y = default_collate(examples)
    share = torch.rand(())
    return share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)


def any_example(x, y):
    i = random.randrange(N)
    return X[i], Y[i]


def shuffled(examples):
    return default_collate(random.sample(examples, len(examples)))


ORDER = "`train_dataset` has its examples in another order each time it is read: its indices would"
TARGETS = "`train_dataset` has other targets each time it is read: it shuffles, or its Dataset or"
UNCLEAR = "other inputs .* or a stream shuffles: the targets do not show which"


class Stream(IterableDataset):
    """A stream that shuffles, or does not."""

    def __init__(self, order, told=None):
        self.order, self.told = order, told

    def __iter__(self):
        return iter([(X[i], Y[i]) for i in self.order()])


class Told(Stream):
    def __len__(self):
        return self.told


class Batches:
    """A re-iterable of a user's."""

    def __init__(self, order, length=None):
        self.order, self.length = order, length

    def __iter__(self):
        for rows in torch.tensor(self.order()).split(8):
            yield X[rows], Y[rows]


class Loader(DataLoader):
    """Shuffles its batches by itself."""

    def __iter__(self):
        batches = list(super().__iter__())
        return iter(random.sample(batches, len(batches)))


def in_order():
    return list(range(N))


def any_order():
    return torch.randperm(N).tolist()


CHANGES = {
    "masks": (lambda: DataLoader(DATA, 8, collate_fn=mask_labels), TARGETS),
    "mixup": (lambda: DataLoader(DATA, 8, collate_fn=mixup), TARGETS),
    "any example": (lambda: Drawn(any_example), TARGETS),
    "collator": (lambda: DataLoader(DATA, 8, collate_fn=shuffled), ORDER),
    "stream": (lambda: Stream(any_order), TARGETS),
    "loader of a stream": (lambda: DataLoader(Stream(any_order), 8), TARGETS),
    "whole stream": (lambda: DataLoader(Stream(any_order), N), ORDER),
    "batches": (lambda: Batches(any_order), TARGETS),
    "loader": (lambda: Loader(TensorDataset(X, torch.zeros(N).long()), 8), UNCLEAR),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_examples_or_targets_that_are_drawn_are_refused(model, unchanged, kind):
    make, match = CHANGES[kind]
    explainer = tracin(model, make(), batch_size=8)
    for _ in range(2):
        with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
            explainer.influence(TEST)


@pytest.mark.parametrize("order", [in_order, lambda: in_order()[::-1]])
def test_what_does_not_change_scores_as_the_data_set_does(model, order, recwarn):
    rows = order()
    expected = tracin(model, TensorDataset(X[rows], Y[rows]), 2).influence(TEST)
    for data in (Stream(order), DataLoader(Stream(order), 7), Batches(order), Told(order, N)):
        found = tracin(model, data, 2).influence(TEST)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not [w for w in recwarn if "is read" in str(w.message)]


def test_few_examples_are_drawn_and_none_of_plain_tensors(model):
    data = Drawn(steady)
    expected = tracin(model, DATA, batch_size=8).influence(TEST)
    found = tracin(model, data, batch_size=8).influence(TEST)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(data.reads) - N <= 20
    assert set(data.reads[: len(data.reads) - N]) == {0, 13, 26, 39}


def test_missing_values_equal_missing_values():
    x = X.clone()
    x[3, 1] = torch.nan
    checked = CheckedBatches(DataLoader(Pairs(x), 8, collate_fn=steady_collate), "data")
    for _ in range(2):
        assert sum(len(batch[0]) for batch in checked) == N


class Pairs(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], Y[i]


def steady_collate(examples):
    return default_collate(examples)


# How many there are.


def dropping(examples):
    return default_collate([example for example in examples if example[0][0] > -1])


COUNTS = {
    "collator": (
        lambda: DataLoader(DATA, 8, collate_fn=dropping),
        rf"`train_dataset` promises {N} examples .* and gave {int((X[:, 0] > -1).sum())}",
    ),
    "stream": (
        lambda: Told(in_order, N + 2),
        rf"`train_dataset` promises {N + 2} examples .* and gave {N}",
    ),
    "workers": (
        lambda: DataLoader(Told(in_order, N), 8, num_workers=2),
        rf"`train_dataset` promises {N} examples .* and gave {2 * N}",
    ),
    "batches": (
        lambda: type("Lying", (Batches,), {"__len__": lambda self: 7})(in_order),
        "`train_dataset` promises 7 batches by its `len` and gave 5",
    ),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("kind", COUNTS)
def test_more_or_fewer_examples_than_promised_are_refused(model, unchanged, kind):
    make, match = COUNTS[kind]
    explainer = tracin(model, make(), batch_size=8)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        explainer.influence(TEST)


class Endless(Batches):
    """Begins again and again, as loaders for a number of steps do."""

    def __iter__(self):
        while True:
            yield from super().__iter__()

    def __len__(self):
        return 5


class EndlessIndices(Sampler):
    def __iter__(self):
        while True:
            yield from range(N)


class CountedIndices(EndlessIndices):
    def __len__(self):
        return N


ENDLESS = {
    "batches": (lambda: Endless(in_order), "has 5 batches and gave more than 2 times"),
    "a sampler": (
        lambda: DataLoader(DATA, 8, sampler=CountedIndices()),
        f"has {N} examples and gave more than 2 times",
    ),
    "a sampler without a length": (
        lambda: DataLoader(DATA, 8, sampler=EndlessIndices()),
        f"has {N} examples and gave more than 10 times",
    ),
}


@pytest.mark.filterwarnings("ignore:.*does not give each of the")
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_pass_without_end_is_refused(model, unchanged, kind):
    make, match = ENDLESS[kind]
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        tracin(model, make()).influence(TEST)


class Shrinking:
    """Gives less in each pass."""

    left = N + 24

    def __iter__(self):
        self.left -= 8
        for start in range(0, self.left, 8):
            rows = slice(start, min(start + 8, self.left))
            yield X[rows], Y[rows]


def test_passes_of_different_length_are_refused(model):
    explainer = tracin(model, Shrinking(), checkpoints=2)
    with pytest.raises(InvalidArgumentError, match=r"in one pass and \d+ in another; it must give"):
        explainer.self_influence(outer_loop_by_checkpoints=True)


OTHER_ORDER = [*range(8), *range(32, N), *range(8, 32)]


def test_an_order_that_changes_between_checkpoints_is_refused(model):
    orders = iter([in_order(), in_order(), in_order(), OTHER_ORDER])
    explainer = tracin(model, Batches(lambda: next(orders)), checkpoints=2)
    match = "batch 1 of `train_dataset` has other inputs than in an earlier pass: it was changed s"
    with pytest.raises(InvalidArgumentError, match=match):
        explainer.self_influence(outer_loop_by_checkpoints=True)


class Augmented(Batches):
    """Changes its inputs in each pass, and its targets are ever the same."""

    def __init__(self, change):
        self.change = change

    def __iter__(self):
        return iter([(self.change(X), torch.arange(N) % 2)])


def test_inputs_of_batches_that_are_drawn_are_warned_of_where_targets_tell_the_order(model):
    with pytest.warns(UserWarning, match=f"`train_dataset` {OTHER_INPUTS}"):
        tracin(model, Augmented(lambda x: x + torch.randn(N, 3))).self_influence()


class Resets:
    """Is its own iterator, and begins again."""

    def __iter__(self):
        self.batches = iter(DataLoader(DATA, 8))
        return self

    def __next__(self):
        return next(self.batches)


def test_an_iterator_that_begins_again_is_taken(model, recwarn):
    expected = tracin(model, DATA, 2).influence(TEST)
    torch.testing.assert_close(tracin(model, Resets(), 2).influence(TEST), expected)
    assert not recwarn


ONCE = "`train_dataset` gives its examples only once, but it is read several times: its `__iter__`"


class Once:
    """Gives what one iterator has left."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    "batches",
    [
        [(X, Y)],
        [(X[:20], Y[:20]), (X[20:], Y[20:])],
        [(X[:20], Y[:20] * 0), (X[20:], Y[20:])],
    ],
)
def test_what_does_not_begin_again_is_refused(model, batches):
    explainer = tracin(model, Once(batches))
    with pytest.raises(InvalidArgumentError, match=ONCE):
        explainer.influence(TEST)


def test_data_that_a_fit_has_seen_may_not_change_without_another_fit(model):
    x, y = X.clone(), Y.clone()
    options = {"loss_fn": nn.CrossEntropyLoss(), "damping": 0.1}
    data = TensorDataset(x, y)
    explainer = ExplicitInfluenceFunction(model, data, [model.state_dict()], **options)
    explainer.influence(TEST)
    y[0] = 1 - y[0]
    match = "`train_dataset` is not what it was .* when the curvature was measured; call `fit"
    with pytest.raises(InvalidArgumentError, match=match):
        explainer.influence(TEST)
    again = ExplicitInfluenceFunction(model, data, [model.state_dict()], **options)
    expected = again.influence(TEST)
    torch.testing.assert_close(explainer.fit().influence(TEST), expected)


def test_data_that_only_a_score_has_seen_may_change_between_calls(model):
    x, y = X.clone(), Y.clone()
    explainer = tracin(model, TensorDataset(x, y))
    explainer.influence(TEST)
    y[0] = 1 - y[0]
    expected = tracin(model, TensorDataset(x, y)).influence(TEST)
    assert torch.equal(explainer.influence(TEST), expected)


# What else is told.


def test_a_checked_loader_has_the_attributes_of_its_own(model):
    loader = DataLoader(DATA, 8)
    explainer = tracin(model, loader)
    assert explainer.train_dataloader.batches is loader
    assert explainer.train_dataloader.dataset is DATA
    assert len(explainer.train_dataloader) == explainer.train_dataloader_len == 5
    with pytest.raises(TypeError, match="a Batches has no length"):
        len(CheckedBatches(Batches(in_order), "data"))
    with pytest.raises(AttributeError, match="no_such"):
        _ = explainer.train_dataloader.no_such


INPUTS = {
    "data set": lambda: TensorDataset(*TEST),
    "own data set": lambda: Drawn(steady, n=4),
    "examples": lambda: [(X[i], int(Y[i])) for i in range(4)],
    "examples of tensors": lambda: [(X[i], Y[i]) for i in range(4)],
    "stream": lambda: Stream(lambda: range(4)),
}


@pytest.mark.parametrize("batch_size", [3, "auto"])
@pytest.mark.parametrize("train", [DATA, DataLoader(DATA, 8)], ids=["data", "loader"])
@pytest.mark.parametrize("kind", INPUTS)
def test_test_examples_are_taken_as_training_examples_are(model, kind, train, batch_size):
    size = {"batch_size": batch_size} if train is DATA else {"batch_size": None}
    explainer = tracin(model, train, 2, **size)
    batch = TEST if kind == "data set" else (X[:4], Y[:4])
    expected = explainer.influence(batch)
    found = explainer.influence(INPUTS[kind]())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Tokens(Dataset):
    """Token lists, as tokenizers give them."""

    def __init__(self, lengths, make=list):
        self.lengths, self.make = lengths, make

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"x": self.make(torch.arange(self.lengths[i]).tolist()), "labels": i % 2}


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(9, 2)

    def forward(self, x):
        return self.embedding(x)


def summed(outputs, batch):
    return outputs.sum(1)


LISTS = "item 'x' of an example of `train_dataset` is a list of 3 numbers, which torch's default"
LENGTHS = "the examples of `train_dataset` have tensors or lists of different lengths, which torch"
ODD = "torch's default collation cannot make a batch of the examples of `train_dataset`"
BARE = "an example of `train_dataset` must be a tuple or list .* got a Tensor"


def bare(n):
    return Drawn(lambda x, y: x, n=n)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Tokens([3, 3, 3]), LISTS),
        (Tokens([3, 5, 3]), LISTS),
        (DataLoader(Tokens([3, 5, 3]), 3), LISTS),
        (Tokens([3, 5, 3], torch.tensor), LENGTHS),
        (DataLoader(Tokens([3, 5, 3], torch.tensor), 3), LENGTHS),
        (Tokens([3, 3], set), ODD),
        (bare(6), BARE),
        (DataLoader(bare(6), 3), BARE),
    ],
    ids=["lists", "uneven", "loader", "tensors", "tensors in loader", "odd", "bare", "bare loader"],
)
def test_examples_that_make_no_batch_are_named_with_the_remedy(data, match):
    model = Bag()
    explainer = TracInCP(model, data, [model.state_dict()], loss_fn=summed, batch_size=3)
    with pytest.raises(InvalidArgumentError, match=match):
        explainer.self_influence()


def test_one_example_is_told_from_a_batch_by_the_training_set(model):
    explainer = tracin(model, DataLoader(Stream(in_order), 8))
    with pytest.raises(InvalidArgumentError, match="`inputs` is one example, not a batch"):
        explainer.influence((X[0], 1))
    # of several outputs for each example: a batch of as many dimensions as those of training
    assert explainer.influence((X[:1], Y[:1])).shape == (1, N)


def test_values_that_are_no_gradients_refuse_the_same(model):
    knn = KNNShapley(nn.Identity(), Drawn(any_example), n_neighbors=3)
    with pytest.raises(InvalidArgumentError, match=TARGETS):
        knn.influence(TEST)


def test_measures_over_checkpoints_refuse_the_same(model):
    with pytest.raises(InvalidArgumentError, match="`dataset` has other targets each time it is"):
        checkpoint_losses(
            model, Drawn(any_example), [model.state_dict()], loss_fn=nn.CrossEntropyLoss()
        )
