"""What can be read only once is kept where it is short, and refused where it is read again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import influence_kit
from influence_kit import GradDot, KNNShapley, SimilarityInfluence
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import checkpoint_losses, compare, tune_damping
from influence_kit.iterables import KeptBatches, reads_once

N = 9
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 2
DATA = TensorDataset(X, Y)
LOSS = nn.CrossEntropyLoss()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, N, 2):
        yield X[start : start + 2], Y[start : start + 2]


class Again:
    """Begins anew for each pass."""

    def __iter__(self) -> Iterator[Any]:
        return batches()


class BeginsAgain(Again):
    """An iterator that ``iter`` sets back, also in the middle of another pass."""

    def __iter__(self) -> Iterator[Any]:
        self.left = batches()
        return self

    def __next__(self) -> Any:
        return next(self.left)


class Same:
    """Gives the same iterator to each pass."""

    def __init__(self) -> None:
        self.left = batches()

    def __iter__(self) -> Iterator[Any]:
        return self.left


class Examples(IterableDataset):
    def __init__(self) -> None:
        self.left = iter(zip(X, Y, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return self.left


ONCE = [
    batches,
    lambda: iter(DataLoader(DATA, batch_size=2)),
    lambda: map(tuple, batches()),
    lambda: iter([(X, Y)]),
    BeginsAgain,
    Examples,
    lambda: DataLoader(Examples(), batch_size=2),
]
OFTEN = [Again, lambda: DataLoader(DATA, batch_size=2), lambda: DATA, lambda: None]


@pytest.mark.parametrize("make", ONCE)
def test_what_can_be_read_once(make: Any) -> None:
    assert reads_once(make())


@pytest.mark.parametrize("make", OFTEN)
def test_what_can_be_read_again(make: Any) -> None:
    state = torch.get_rng_state()
    assert not reads_once(make())
    assert torch.equal(torch.get_rng_state(), state)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def built(name: str, data: Any = DATA, **kwargs: Any) -> Any:
    method, own = getattr(influence_kit, name), model()
    if name == "TRAK":
        kwargs["projection_dim"] = 4
    elif name != "KNNShapley":
        kwargs["loss_fn"] = LOSS
    states: Any = [own.state_dict()]
    if name == "NaiveInfluenceFunction":
        states = own.state_dict()
    return method(own, data, states, **kwargs)


METHODS = [
    "GradDot",
    "CGInfluenceFunction",
    "LoGra",
    "TRAK",
    "NaiveInfluenceFunction",
    "KNNShapley",
]


@pytest.mark.parametrize("name", METHODS)
def test_test_examples_of_a_generator_are_all_scored(name: str) -> None:
    method = built(name)
    assert torch.allclose(method.influence(batches()), method.influence((X, Y)))
    assert torch.allclose(method.self_influence(batches()), method.self_influence((X, Y)))
    assert torch.equal(
        method.influence(batches(), k=3).indices, method.influence((X, Y), k=3).indices
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_generator_that_has_been_read(name: str) -> None:
    method, once = built(name), batches()
    method.influence(once)
    with pytest.raises(InvalidArgumentError, match="a generator can be read only once, and this"):
        method.influence(once)


@pytest.mark.parametrize("make", [batches, BeginsAgain, lambda: DataLoader(Examples())])
@pytest.mark.parametrize("name", METHODS)
def test_training_data_that_can_be_read_once_is_refused(name: str, make: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`train_dataset` is read again and again"):
        built(name, make())


def test_other_data_that_can_be_read_once_is_refused(tmp_path: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`hessian_dataset` is read again and again"):
        built("CGInfluenceFunction", hessian_dataset=batches())
    with pytest.raises(InvalidArgumentError, match="`influence_src_dataset` is read again"):
        SimilarityInfluence(nn.Sequential(model()), "0", batches(), tmp_path)
    with pytest.raises(InvalidArgumentError, match="`dataset` is read again and again"):
        checkpoint_losses(model(), batches(), [model().state_dict()], LOSS)


def test_an_iterable_dataset_is_refused_at_the_first_question() -> None:
    knn = KNNShapley(nn.Identity(), Examples())
    with pytest.raises(InvalidArgumentError, match="`train_dataset` is read again and again"):
        knn.influence((X, Y))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "GradDot"])
def test_one_iterator_for_two_passes(name: str) -> None:
    method = built(name, Same())
    with pytest.raises(InvalidArgumentError, match="a Same gave the same iterator to two passes"):
        method.influence((X, Y))


def test_an_object_with_a_new_iterator_for_each_pass() -> None:
    own = model()
    dot = GradDot(own, Again(), [own.state_dict()], loss_fn=LOSS)
    expected = GradDot(own, DATA, [own.state_dict()], loss_fn=LOSS).influence((X, Y))
    assert torch.allclose(dot.influence((X, Y)), expected)


def test_several_methods_are_asked_about_the_same_examples() -> None:
    methods = {"dot": built("GradDot"), "cg": built("CGInfluenceFunction")}
    both = compare(methods, batches())
    assert torch.allclose(both.agreement, compare(methods, (X, Y)).agreement)
    subsets = torch.rand(6, N, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = torch.randn(6, N, generator=torch.Generator().manual_seed(1))
    tuned = [
        tune_damping(built("CGInfluenceFunction"), [0.1, 1.0], subsets, outputs, asked, "margin")
        for asked in (batches(), (X, Y))
    ]
    assert tuned[0].value == tuned[1].value


def test_kept_batches_have_a_length() -> None:
    assert len(KeptBatches(batches(), "inputs")) == 5
