"""Captum is an oracle where it is right.

With what its own tests leave out: rates, several checkpoints, float64, biases, opponents, both
reductions.
"""

from collections.abc import Callable
from typing import Any

import captum.influence
import pytest
import torch
from cases import CASES, Case, Examples, reduced
from contract import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader

from influence_kit import TracInCP, TracInCPFast, TracInCPFastRandProj

CNN, MLP = CASES["cnn"], CASES["mlp"]
both = pytest.mark.parametrize("case", [MLP, CNN], ids=["mlp", "cnn"])


class OneLayerLast(nn.Module):
    """A model whose last operation is a linear layer, in place of nothing and with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def load(model: nn.Module, checkpoint: dict[str, Any]) -> float:
    """What Captum's own loader cannot: a stored learning rate."""
    model.load_state_dict(checkpoint["state_dict"])
    return checkpoint["learning_rate"]


def no_inplace(case: Case) -> nn.Module:
    """Captum's hooks do not take activations that work in place."""
    model = case.model()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def pair(case: Case, reduction: str = "none", **arguments: Any) -> tuple[Any, Any]:
    """influence_kit's TracInCP and Captum's, alike but for one import."""
    built = []
    for cls in (TracInCP, captum.influence.TracInCP):
        built.append(
            cls(
                no_inplace(case),
                Examples(case.train),
                case.checkpoints(),
                load,
                loss_fn=reduced(case.loss, reduction),
                batch_size=4,
                sample_wise_grads_per_batch=reduction != "none",
                **arguments,
            )
        )
    return built[0], built[1]


@both
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_tracin_scores(case: Case, reduction: str) -> None:
    ours, theirs = pair(case, reduction)
    assert_close(ours.influence(case.test), theirs.influence(case.test))
    assert_close(
        ours.influence(case.test, aggregate=True), theirs.influence(case.test, aggregate=True)
    )
    inputs = DataLoader(Examples(case.test), batch_size=3)
    assert_close(ours.influence(inputs), theirs.influence(inputs))


@both
@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_tracin_top_k(case: Case, proponents: bool, k: int) -> None:
    ours, theirs = pair(case)
    found = ours.influence(case.test, k=k, proponents=proponents)
    expected = theirs.influence(case.test, k=k, proponents=proponents)
    assert found._fields == expected._fields
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.influence_scores, expected.influence_scores)


@both
@pytest.mark.parametrize("outer", [True, False])
def test_tracin_self_influence(case: Case, outer: bool) -> None:
    ours, theirs = pair(case)
    assert_close(
        ours.self_influence(outer_loop_by_checkpoints=outer),
        theirs.self_influence(outer_loop_by_checkpoints=outer),
    )
    loader = DataLoader(Examples(case.test), batch_size=3)
    assert_close(ours.self_influence(loader), theirs.self_influence(loader))


@both
def test_tracin_layers(case: Case) -> None:
    names = {"mlp": ["body.2", "head"], "cnn": ["0", "6"]}["mlp" if case is MLP else "cnn"]
    ours, theirs = pair(case, layers=names)
    assert_close(ours.influence(case.test), theirs.influence(case.test))


def test_tracin_without_a_loss_differentiates_the_output() -> None:
    ours, theirs = (
        cls(MLP.model(), Examples(MLP.train), MLP.checkpoints(), load, batch_size=4)
        for cls in (TracInCP, captum.influence.TracInCP)
    )
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test))


def test_tracin_test_loss() -> None:
    def other(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum(1)

    other.reduction = "none"  # type: ignore[attr-defined]
    ours, theirs = pair(MLP, test_loss_fn=other)
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test))


def test_intermediate_quantities_have_captums_layout_and_the_root_of_the_rate() -> None:
    ours, theirs = pair(MLP)
    found, expected = (x.compute_intermediate_quantities(MLP.test) for x in (ours, theirs))
    # Captum scales each block by the rate, so that dot products carry its square
    rates = torch.tensor([c["learning_rate"] for c in MLP.checkpoints()], dtype=torch.float64)
    width = expected.shape[1] // len(rates)
    assert_close(found, expected / rates.sqrt().repeat_interleave(width))


def fast_pair(cls: Callable[..., Any], other: Callable[..., Any], **own: Any) -> tuple[Any, Any]:
    built = []
    for maker, extra in ((cls, {"count_bias": False}), (other, {})):
        torch.manual_seed(0)
        model = OneLayerLast().double()
        states = []
        for rate in (0.3, 0.05, 1.7):
            torch.manual_seed(int(100 * rate))
            state = OneLayerLast().double().state_dict()
            states.append({"state_dict": state, "learning_rate": rate})
        loss = reduced(MLP.loss, "sum")
        data = Examples(MLP.train)
        built.append(maker(model, model.head, data, states, load, loss, 4, **own, **extra))
    return built[0], built[1]


def test_fast_without_the_bias() -> None:
    ours, theirs = fast_pair(TracInCPFast, captum.influence.TracInCPFast)
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test))
    assert_close(ours.self_influence(), theirs.self_influence())
    for proponents in (True, False):
        found = ours.influence(MLP.test, 3, proponents)
        expected = theirs.influence(MLP.test, 3, proponents)
        assert torch.equal(found.indices, expected.indices)
        assert_close(found.influence_scores, expected.influence_scores)


def test_fast_with_the_bias_is_captums_tracin_on_that_layer() -> None:
    ours = TracInCPFast(
        MLP.model(), "head", Examples(MLP.train), MLP.checkpoints(), load, loss_fn=MLP.loss
    )
    theirs = pair(MLP, layers=["head"])[1]
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test))


class AnyIndex(captum.influence._utils.nearest_neighbors.NearestNeighbors):  # type: ignore[name-defined]
    """Captum's own abstract class, filled in by a user."""

    def setup(self, data: Tensor) -> None:
        self.data = data

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = (query @ self.data.T).topk(k)
        return found.indices, found.values


@pytest.mark.filterwarnings("ignore:.*stores quantities related to the entire.*")
def test_rand_proj_with_a_users_index() -> None:
    classes = TracInCPFastRandProj, captum.influence.TracInCPFastRandProj
    ours, theirs = fast_pair(*classes, nearest_neighbors=AnyIndex())
    assert_close(ours.influence(MLP.test, k=None), theirs.influence(MLP.test, k=None))
    assert_close(ours.src_intermediate_quantities, theirs.src_intermediate_quantities)
    for proponents in (True, False):
        found = ours.influence(MLP.test, proponents=proponents)
        expected = theirs.influence(MLP.test, proponents=proponents)
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert torch.allclose(found.influence_scores.float(), expected.influence_scores.float())


@pytest.mark.filterwarnings("ignore:.*stores quantities related to the entire.*")
@pytest.mark.parametrize(("dim", "width"), [(None, 54), (2, 3), (9, 27), (17, 36), (18, 54)])
def test_rand_proj_widths(dim: int | None, width: int) -> None:
    """As in Captum: int(sqrt(dim)) columns a side where the layer has more entries than dim."""
    classes = TracInCPFastRandProj, captum.influence.TracInCPFastRandProj
    pair = fast_pair(*classes, nearest_neighbors=AnyIndex(), projection_dim=dim)
    for influence in pair:
        assert influence.compute_intermediate_quantities(MLP.test).shape == (MLP.m, width)


@pytest.mark.parametrize("name", ["TracInCP", "TracInCPFast", "TracInCPFastRandProj"])
def test_positional_order(name: str) -> None:
    import inspect

    import influence_kit

    ours, theirs = (
        list(inspect.signature(getattr(module, name)).parameters.values())
        for module in (influence_kit, captum.influence)
    )
    names = [parameter.name for parameter in theirs]
    assert [parameter.name for parameter in ours][: len(names)] == names
    for method in ("influence", "self_influence", "compute_intermediate_quantities"):
        if hasattr(getattr(captum.influence, name), method):
            mine, other = (
                list(inspect.signature(getattr(getattr(module, name), method)).parameters)
                for module in (influence_kit, captum.influence)
            )
            assert mine[: len(other)] == other
