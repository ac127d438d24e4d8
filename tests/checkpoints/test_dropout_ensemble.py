"""The members of a dropout ensemble are networks with fixed masks, and leave no trace."""

import copy
from collections.abc import Callable

import oracles
import pytest
import torch
from cases import Examples
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit import (
    ExplicitInfluenceFunction,
    GradDot,
    TracInCP,
    checkpoint_table,
    dropout_ensemble,
    load_checkpoint,
)
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.dropout_masks import FixedMask, mask_numbers

MEMBERS = 3


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


class Bare(nn.Module):
    """A linear layer whose parameters no rule knows: they go through ``torch.func``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Positions(nn.Module):
    """Positions share their masks; one dropout layer stands in two places of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.second(self.drop(self.first(x).tanh()))).mean(1)


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))


def bare() -> nn.Module:
    return nn.Sequential(Bare(3, 8), nn.Tanh(), nn.Dropout(0.5), Bare(8, 2))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Dropout2d(0.3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2, inplace=True),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Dropout(0.5),
        nn.Linear(8, 2),
    )


# the model, the shape of an example, and for each dropout layer the dimension of its features
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "vectors": (vectors, (3,), {"2": 1}),
    "functional": (bare, (3,), {"2": 1}),
    "images": (images, (3, 4, 4), {"1": 1, "3": 1, "6": 1}),
    "positions": (Positions, (5, 3), {"drop": 2}),
}
every_case = pytest.mark.parametrize(("build", "shape", "axes"), CASES.values(), ids=CASES.keys())


class Multiply(nn.Module):
    """The oracle's dropout: a product with a mask that stands in the model."""

    def __init__(self, masks: dict[int, Tensor], axis: int) -> None:
        super().__init__()
        self.masks, self.axis = masks, axis

    def forward(self, x: Tensor) -> Tensor:
        mask = self.masks[x.shape[self.axis]]
        return x * mask.reshape([-1 if i == self.axis else 1 for i in range(x.dim())])


def batch(n: int, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    return x, torch.arange(n) % 2


def by_hand(model: nn.Module, axes: dict[str, int], seed: int, member: int) -> nn.Module:
    """The model with every dropout layer replaced by a fixed mask."""
    thinned = copy.deepcopy(model)
    for name, axis in axes.items():
        hook = FixedMask(name, model.get_submodule(name).p, seed, member)
        masks = {size: hook.mask(size) for size in range(1, 20)}
        owner, _, attribute = name.rpartition(".")
        setattr(thinned.get_submodule(owner), attribute, Multiply(masks, axis))
    return thinned


def build_model(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().train()


@every_case
@pytest.mark.parametrize("seed", [0, 5])
def test_scores_are_those_of_networks_with_masks(build, shape, axes, seed, unchanged):
    model, train, test = build_model(build), batch(11, shape, 1), batch(4, shape, 2)
    weights, expected = model.state_dict(), torch.zeros(4, 11, dtype=torch.float64)
    for member in range(MEMBERS):
        thinned = by_hand(model, axes, seed, member).eval()
        expected += oracles.tracin(thinned, train, test, cross_entropy, [weights], [1.0])
    members = dropout_ensemble(model, MEMBERS, seed)
    for size in (1, 4, 11, "auto"):
        dot = GradDot(model, Examples(train), members, loss_fn=cross_entropy, batch_size=size)
        with unchanged(model):
            assert_close(dot.influence(test), expected)


@every_case
def test_the_output_of_a_loaded_member(build, shape, axes):
    model, (x, _) = build_model(build).eval(), batch(5, shape, 1)
    whole = model(x.clone())
    for member, checkpoint in enumerate(dropout_ensemble(model, 2)):
        load_checkpoint(model, checkpoint)
        assert torch.equal(model(x.clone()), by_hand(model, axes, 0, member)(x.clone()))
    # an ordinary checkpoint has no masks
    load_checkpoint(model, model.state_dict())
    assert torch.equal(model(x.clone()), whole)


def test_a_mask_keeps_its_share_and_its_mean():
    mask = FixedMask("drop", 0.3, seed=1, member=2).mask(20_000)
    assert set(mask.tolist()) == {0.0, 1 / 0.7}
    assert float(mask.mean()) == pytest.approx(1, abs=0.02)
    first = [FixedMask("drop", 0.3, 0, 0).mask(50), FixedMask("drop", 0.3, 0, 0).mask(50)]
    assert torch.equal(*first)
    others = [FixedMask("a", 0.3, 0, 0), FixedMask("drop", 0.3, 1, 0), FixedMask("drop", 0.3, 0, 1)]
    assert not any(torch.equal(first[0], other.mask(50)) for other in others)


def test_members_do_not_depend_on_how_many_there_are():
    model = build_model(vectors)
    few, many = dropout_ensemble(model, 2), dropout_ensemble(model, 5)
    assert few[1]["dropout_masks"] == many[1]["dropout_masks"]
    assert len({str(member["dropout_masks"]) for member in many}) == 5


def test_rates_and_axes_may_be_given():
    model = build_model(images)
    (member,) = dropout_ensemble(model, 1, p=0.25)
    assert member["dropout_masks"]["rates"] == {"1": 0.25, "3": 0.25, "6": 0.25}
    (member,) = dropout_ensemble(model, 1, p={"1": 0, "6": 0.75}, axes={"3": 3})
    assert member["dropout_masks"]["rates"] == {"3": 0.2, "6": 0.75}
    load_checkpoint(model.eval(), member)
    x = torch.ones(2, 3, 5, 7, dtype=torch.float64)
    dropped = model[3](x)
    assert torch.equal(dropped, x * FixedMask("3", 0.2, 0, 0).mask(7))
    assert torch.equal(model[1](x), x)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Dropout, (2, 5), 1),
        (nn.Dropout, (2, 4, 5), 2),
        (nn.Dropout, (2, 5, 4, 3), 1),
        (nn.Dropout1d, (2, 5, 4), 1),
        (nn.Dropout2d, (2, 5, 4, 3), 1),
        (nn.Dropout3d, (2, 5, 4, 3, 2), 1),
    ],
)
def test_the_dimension_of_the_features(layer, shape, axis):
    model = nn.Sequential(layer(0.5)).eval()
    load_checkpoint(model, dropout_ensemble(model, 1)[0])
    kept = model(torch.ones(shape)).movedim(axis, 0).flatten(1)
    assert torch.equal(kept, FixedMask("0", 0.5, 0, 0).mask(5).float()[:, None].expand_as(kept))


def test_the_learning_rate_and_the_weights_are_the_checkpoints(tmp_path):
    model = build_model(vectors)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "learning_rate": 0.25}, tmp_path / "ck.pt")
    before = copy.deepcopy(model.state_dict())
    members = dropout_ensemble(model, 2, checkpoint=tmp_path / "ck.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in members[1]["state_dict"].items())
    assert [row.learning_rate for row in checkpoint_table(members)] == [0.25, 0.25]
    # the weights are a copy: training on changes no member
    own = dropout_ensemble(model, 1)[0]["state_dict"]
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(own["0.weight"], before["0.weight"])


def test_a_member_may_be_saved_and_loaded(tmp_path):
    model, train, test = build_model(vectors), batch(6, (3,), 1), batch(3, (3,), 2)
    members = dropout_ensemble(model, 2, seed=3)
    for number, member in enumerate(members):
        torch.save(member, tmp_path / f"member{number}.pt")

    def scores(checkpoints):
        data = Examples(train)
        return TracInCP(model, data, checkpoints, loss_fn=cross_entropy).influence(test)

    assert torch.equal(scores(tmp_path), scores(members))


def test_masks_do_not_stay_for_the_next_checkpoint():
    model, train, test = build_model(vectors), batch(6, (3,), 1), batch(3, (3,), 2)
    other = {key: value + 1 for key, value in model.state_dict().items()}
    (member,) = dropout_ensemble(model, 1)

    def load(model, checkpoint):
        if "dropout_masks" in checkpoint:
            return load_checkpoint(model, checkpoint)
        model.load_state_dict(checkpoint)
        return 1.0

    for function in (load, load_checkpoint):
        dot = [
            GradDot(model, Examples(train), some, function, loss_fn=cross_entropy).influence(test)
            for some in ([member, other], [member], [other])
        ]
        assert_close(dot[0], dot[1] + dot[2])


def test_masks_that_a_user_put_on_are_there_afterwards(unchanged):
    model, train, test = build_model(vectors), batch(6, (3,), 1), batch(3, (3,), 2)
    members = dropout_ensemble(model, 2)
    load_checkpoint(model, members[0])
    dot = GradDot(model, Examples(train), members[1:], loss_fn=cross_entropy)
    with unchanged(model):
        dot.influence(test)
    assert len(mask_numbers(model)) == 1


def test_the_model_comes_back_after_an_error(unchanged):
    model, train = build_model(vectors), batch(6, (3,), 1)
    members = dropout_ensemble(model, 2)

    def broken(outputs, targets):
        raise RuntimeError("on purpose")

    dot = GradDot(model, Examples(train), members, loss_fn=broken)
    with unchanged(model), pytest.raises(RuntimeError, match="on purpose"):
        dot.influence(train)


def test_members_are_not_taken_for_the_same_weights():
    model = build_model(vectors)
    members = dropout_ensemble(model, 3)
    loader = CheckpointLoader(model, members, load_checkpoint)
    prints = []
    for place in range(3):  # a warning is an error
        loader.load(place)
        prints.append(loader.fingerprint(place))
    assert len(set(prints)) == 3
    twice = CheckpointLoader(model, [members[0], copy.deepcopy(members[0])], load_checkpoint)
    twice.load(0)
    with pytest.warns(UserWarning, match="hold the same weights"):
        twice.load(1)


def test_a_curvature_is_measured_for_each_member():
    model, train, test = build_model(vectors), batch(9, (3,), 1), batch(3, (3,), 2)
    members = dropout_ensemble(model, 2)

    def scores(some):
        exact = ExplicitInfluenceFunction(
            model, Examples(train), some, loss_fn=cross_entropy, damping=0.1, curvature="ggn"
        )
        return exact.influence(test)

    assert_close(scores(members), (scores(members[:1]) + scores(members[1:])) / 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": 0}, "`n` must be a positive int; got 0"),
        ({"n": True}, "`n` must be a positive int"),
        ({"seed": -1}, "`seed` must be an int of at least 0; got -1"),
        ({"p": 1.0}, "the rate of dropout layer '2' is 1.0; it must be at least 0 and below 1"),
        ({"p": "half"}, "the rate of dropout layer '2' is 'half'"),
        ({"p": 0}, r"the dropout layers \['2'\] have rate 0"),
        ({"p": {"3": 0.5}}, r"the keys \['3'\], which are not dropout layers .* has \['2'\]"),
        ({"axes": {"x": 1}}, r"`axes` has the keys \['x'\]"),
    ],
)
def test_arguments_that_cannot_be_meant(change, match):
    arguments = {"n": 2, **change}
    with pytest.raises(InvalidArgumentError, match=match):
        dropout_ensemble(build_model(vectors), **arguments)


def test_models_without_masks_to_draw():
    with pytest.raises(InvalidArgumentError, match="the Linear has no dropout layers"):
        dropout_ensemble(nn.Linear(2, 2), 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(0.5), nn.Dropout(0.1))
    with pytest.raises(InvalidArgumentError, match="'1' is an AlphaDropout, which does more"):
        dropout_ensemble(model, 2)
    assert list(dropout_ensemble(model, 1, p={"1": 0})[0]["dropout_masks"]["rates"]) == ["2"]


def test_a_mask_must_find_its_layer_and_its_features():
    model = build_model(vectors)
    (member,) = dropout_ensemble(model, 1)
    with pytest.raises(InvalidArgumentError, match="for '2', a layer that the model does not have"):
        load_checkpoint(nn.Sequential(), {**member, "state_dict": {}})
    load_checkpoint(model, member)
    with pytest.raises(InvalidArgumentError, match="layer '2' is in training mode"):
        model(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match=r"shape \[4\], whose dimension 0 is not one"):
        model.eval()[2](torch.zeros(4))
    for axis in (2, -2):
        load_checkpoint(model, dropout_ensemble(model, 1, axes={"2": axis})[0])
        with pytest.raises(InvalidArgumentError, match=f"whose dimension {axis} is not one"):
            model[2](torch.zeros(4, 5))
