"""Scores by token, against models whose positions have weights of their own (``token_oracle``)."""

from typing import Any

import influence_oracles
import oracles
import pytest
import token_oracle
import torch
from cases import SHORT, Examples
from contract import METHODS, assert_close, build
from token_models import MODELS, T, adapted, checkpoints, terms, tied, tokens, total
from torch import Tensor, nn

import influence_kit as ik
from influence_kit.scoring import term_products, token_groups

TRAIN, TEST = tokens(7, 1, ignored=2), tokens(3, 2, ignored=2)
SIDES = ("train", "test_positions", "test_terms")
DAMPING = 0.5


def rows(model: nn.Module, batch: Any, side: str) -> Tensor:
    """Gradients by token ``[n, t, P]``, or, for examples, with t = 1."""
    if side == "examples":
        return oracles.gradients(model, batch, total)[:, None]
    if side == "test_terms":
        return token_oracle.term_gradients(model, batch, terms)
    return token_oracle.position_gradients(model, batch, total, T)


def expected(model: nn.Module, side: str, inverse: Tensor | None = None) -> Tensor:
    """<h, M^-1 g> by token of one side, ``[m, n, t]``."""
    by_train = side == "train"
    h = rows(model, TEST, "examples" if by_train else side)
    g = rows(model, TRAIN, side if by_train else "examples")
    h = h if inverse is None else h @ inverse
    return torch.einsum("isp,jtp->ijst", h, g).flatten(2)


def pairs(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.take_along_dim(indices[..., None], dim=1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
def test_two_checkpoints(name: str, side: str) -> None:
    model = MODELS[name]()
    states = checkpoints(model)
    method = ik.TracInCP(model, Examples(TRAIN), states, loss_fn=terms, batch_size=3)
    oracle = torch.zeros(())
    for state in states:
        model.load_state_dict(state["state_dict"])
        oracle = oracle + state["learning_rate"] * expected(model, side)
    found = method.influence(TEST, per_token=side)
    assert_close(found, oracle, 1e-10)
    assert_close(found.sum(2), method.influence(TEST), 1e-10)
    best = method.influence(TEST, k=4, proponents=False, per_token=side)
    plain = method.influence(TEST, k=4, proponents=False)
    assert torch.equal(best.indices, plain.indices)
    assert torch.equal(best.influence_scores, plain.influence_scores)
    assert_close(best.token_scores, pairs(oracle, best.indices), 1e-10)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
def test_an_inverse_curvature(name: str, side: str) -> None:
    model = MODELS[name]()
    method = ik.ExplicitInfluenceFunction(
        model,
        Examples(TRAIN),
        [model.state_dict()],
        loss_fn=terms,
        batch_size=3,
        damping=DAMPING,
        curvature="empirical_fisher",
    )
    g = oracles.gradients(model, TRAIN, total)
    inverse = torch.linalg.inv(g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1]).double())
    found = method.influence(TEST, per_token=side)
    assert_close(found, expected(model, side, inverse), 1e-10)
    assert_close(found.sum(2), method.influence(TEST), 1e-10)
    best = method.influence(TEST, k=3, per_token=side)
    assert_close(best.token_scores, pairs(found, best.indices), 1e-10)


@pytest.mark.parametrize("side", SIDES)
def test_cosines(side: str) -> None:
    model = tied()
    method = ik.GradCos(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms, batch_size=3)
    h, g = (oracles.gradients(model, batch, total).norm(dim=1) for batch in (TEST, TRAIN))
    oracle = expected(model, side) / (h[:, None] * g)[..., None]
    assert_close(method.influence(TEST, per_token=side), oracle, 1e-10)


def test_relative_scores() -> None:
    model = adapted()
    method = ik.ExplicitInfluenceFunction(
        model,
        Examples(TRAIN),
        [model.state_dict()],
        loss_fn=terms,
        damping=DAMPING,
        curvature="empirical_fisher",
        relative="l",
    )
    g = oracles.gradients(model, TRAIN, total)
    inverse = torch.linalg.inv(g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1]).double())
    norms = ((g @ inverse) * g).sum(1).sqrt()
    for side in SIDES:
        oracle = expected(model, side, inverse) / norms[:, None]
        assert_close(method.influence(TEST, per_token=side), oracle, 1e-10)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.filterwarnings("ignore:.*only the ridge determines")
def test_trak(side: str, given: bool) -> None:
    """Without a projection: phi^T (Phi^T Phi + ridge)^-1 phi' by token, times mean(1 - p)."""
    model, train, test = adapted(), tokens(7, 1), tokens(3, 2)

    def margins(outputs: Tensor, labels: Tensor) -> Tensor:
        others = outputs.scatter(2, labels[..., None], -torch.inf).logsumexp(2)
        return outputs.gather(2, labels[..., None])[..., 0] - others

    def margin(outputs: Tensor, labels: Tensor) -> Tensor:
        return margins(outputs, labels).sum(1)

    method = ik.TRAK(
        model,
        Examples(train),
        [model.state_dict()],
        projection="identity",
        ridge=2.0,
        test_output_fn=margins if given else None,
        batch_size=3,
    )
    phi, psi = (oracles.gradients(model, batch, margin)[:, None] for batch in (train, test))
    gram = phi[:, 0].T @ phi[:, 0]
    if side == "train":
        split = token_oracle.position_gradients(model, train, margin, T)
    elif side == "test_terms":
        psi = token_oracle.term_gradients(model, test, margins)
    else:
        psi = token_oracle.position_gradients(model, test, margin, T)
    inverse = torch.linalg.inv(gram + 2 * torch.eye(len(gram)).double())
    phi = split if side == "train" else phi
    oracle = torch.einsum("isp,jtp->ijst", psi @ inverse, phi).flatten(2)
    slopes = torch.sigmoid(-margins(model(train[0]), train[1])).mean(1).detach()
    found = method.influence(test, per_token=side)
    assert_close(found, oracle * slopes[:, None], 1e-8)
    assert_close(found.sum(2), method.influence(test), 1e-8)


REFUSED = {
    "DVEmb": SIDES,
    "RepresenterPointSelection": SIDES,
    **dict.fromkeys(("LESS", "GradDot, adam", "LoGra, adam"), ("train",)),
    **dict.fromkeys(("TracInCPFastRandProj", "KNNShapley", "MAGIC"), SIDES),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_has_token_scores_or_refuses(name: str) -> None:
    if METHODS[name].one_label:
        return
    case = SHORT["gpt"]
    method = build(name, case)
    close = max(METHODS[name].close[0], 1e-10)
    for side in SIDES:
        if side in REFUSED.get(name, REFUSED.get(name.partition(",")[0], ())):
            with pytest.raises(NotImplementedError, match="no scores"):
                method.influence(case.test, per_token=side)
            continue
        found = method.influence(case.test, per_token=side)
        assert_close(found.sum(2), method.influence(case.test), close)
        best = method.influence(case.test, k=2, per_token=side)
        assert_close(best.token_scores.sum(2), best.influence_scores, close)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["LiSSA", "LoGra", "Explicit"])
def test_groups_of_test_tokens(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory for few rows: several passes, each with some tokens of some examples."""
    model = adapted()
    made = {
        "LiSSA": lambda: ik.LiSSAInfluenceFunction(
            model,
            Examples(TRAIN),
            [model.state_dict()],
            loss_fn=terms,
            damping=5.0,
            recursion_depth=9,
            hessian_batch_size=2,
        ),
        "LoGra": lambda: ik.LoGra(
            model, Examples(TRAIN), [model.state_dict()], loss_fn=terms, projection_dim=4
        ),
        "Explicit": lambda: ik.ExplicitInfluenceFunction(
            model, Examples(TRAIN), [model.state_dict()], loss_fn=terms, damping=DAMPING
        ),
    }
    whole = made[name]().influence(TEST, per_token=side)
    size = sum(p.numel() for p in model.parameters()) * 8
    for rows in (2, 7):
        monkeypatch.setattr(token_groups, "resident_bytes", lambda device, r=rows: r * size)
        assert_close(made[name]().influence(TEST, per_token=side), whole, 1e-9)


def test_aggregated_test_examples() -> None:
    model = adapted()
    method = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    found = method.influence(TEST, aggregate=True, per_token="train")
    assert_close(found, expected(model, "train").sum(0, keepdim=True), 1e-10)


def test_damped_inverses_are_the_oracles() -> None:
    """The dense inverse of this file is that of the other oracles."""
    model = adapted()
    matrix = influence_oracles.empirical_fisher(model, TRAIN, total)
    g = oracles.gradients(model, TRAIN, total)
    assert_close(matrix, g.T @ g / len(g))


class NoForwardMode(torch.autograd.Function):
    """Tanh without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradients[0] * (1 - y.square())


class Reverse(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.function = adapted(), function

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner.norm(self.inner.tokens(ids))
        return self.inner.head(self.function(self.inner.mix(x)).cumsum(1))


def test_terms_of_a_model_without_forward_mode() -> None:
    model, plain = Reverse(NoForwardMode.apply), Reverse(torch.tanh)
    states = [plain.state_dict()]
    method = ik.GradDot(model, Examples(TRAIN), states, loss_fn=terms)
    with pytest.warns(UserWarning, match="scores of terms are computed by two reverse passes"):
        found = method.influence(TEST, per_token="test_terms")
    oracle = ik.GradDot(plain, Examples(TRAIN), states, loss_fn=terms)
    assert_close(found, oracle.influence(TEST, per_token="test_terms"), 1e-10)
    assert_close(found, expected(plain, "test_terms"), 1e-10)


def test_terms_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one training gradient at a time."""
    monkeypatch.setattr(term_products, "workspace_bytes", lambda device: 1)
    model = adapted()
    method = ik.GradCos(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    found = method.influence(TEST, per_token="test_terms")
    assert_close(found.sum(2), method.influence(TEST), 1e-10)
