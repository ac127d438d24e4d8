"""Scores by token of data of many kinds: lengths, arrangements, documents, stores, precision."""

from typing import Any

import pytest
import torch
from cases import Examples
from contract import assert_close
from token_models import T, adapted, checkpoints, terms, tied, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader

import influence_kit as ik

TRAIN, TEST = tokens(7, 1, ignored=2), tokens(3, 2, ignored=2)
SIDES = ("train", "test_positions", "test_terms")


def pairs(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.take_along_dim(indices[..., None], dim=1)


@pytest.mark.parametrize("side", SIDES)
def test_examples_of_different_lengths(side: str) -> None:
    """The tokens of the longest batch; beyond those of a shorter one scores are 0."""
    model = adapted()
    short = tokens(4, 3, t=3)
    batches = DataLoader([TRAIN, short], batch_size=None)
    method = ik.GradDot(model, batches, [model.state_dict()], loss_fn=terms)
    test = TEST if side == "train" else DataLoader([short, TEST], batch_size=None)
    found = method.influence(test, per_token=side)
    assert_close(found.sum(2), method.influence(test), 1e-10)
    assert found.shape[2] == T
    beyond = found[:, 7:, 3:] if side == "train" else found[:4, :, 3:]
    assert beyond.numel()
    assert not beyond.any()
    best = method.influence(test, k=11, per_token=side)
    assert_close(best.token_scores, pairs(found, best.indices), 1e-10)


def test_ignored_tokens_have_no_term() -> None:
    model = tied()
    method = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    found = method.influence(TEST, per_token="test_terms")
    ignored = TEST[1] == -100
    assert ignored.any()
    assert not found.transpose(1, 2)[ignored].any()
    assert found.transpose(1, 2)[~ignored].all()


def test_preconditioned_test_gradients_as_inputs() -> None:
    model = adapted()
    method = ik.EKFACInfluenceFunction(
        model, Examples(TRAIN), [model.state_dict()], loss_fn=terms, damping=0.1
    )
    known = method.compute_intermediate_quantities(TEST)
    found = method.influence(known, per_token="train")
    assert_close(found, method.influence(TEST, per_token="train"), 1e-10)
    with pytest.raises(ValueError, match="computed before, which do not show the tokens"):
        method.influence(known, per_token="test_positions")


def test_stored_gradients(tmp_path: Any) -> None:
    model = adapted()
    arguments: dict[str, Any] = {"loss_fn": terms, "projection_dim": 4, "damping": 0.1}
    states = [model.state_dict()]
    live = ik.LoGra(model, Examples(TRAIN), states, **arguments)
    stored = ik.LoGra(model, Examples(TRAIN), states, store=tmp_path / "store", **arguments)
    for side in SIDES:
        found = stored.influence(TEST, per_token=side)
        assert_close(found, live.influence(TEST, per_token=side), 1e-10)


def test_time_first_batches_and_one_example() -> None:
    """Ids [t, n]: the tokens are in the first dimension."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.inner.norm(self.inner.tokens(ids))
            return self.inner.head(self.inner.mix(x).transpose(0, 1).cumsum(1))

    class Plain(TimeFirst):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.inner.norm(self.inner.tokens(ids))
            return self.inner.head(self.inner.mix(x).cumsum(1))

    def first(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].T.contiguous(), batch[1]

    plain, model = Plain(), TimeFirst()
    model.load_state_dict(plain.state_dict())
    states = [plain.state_dict()]
    oracle = ik.GradDot(plain, Examples(TRAIN), states, loss_fn=terms)
    alone = TRAIN[0][:1].T, TRAIN[1][:1]
    batches = DataLoader([first(TRAIN), alone], batch_size=None)
    method = ik.GradDot(model, batches, states, loss_fn=terms, batch_axes=(1, 0))
    one = TEST[0][:1].T, TEST[1][:1]
    for side in SIDES:
        wanted = oracle.influence(TEST, per_token=side)
        found = method.influence(first(TEST), per_token=side)
        assert_close(found, torch.cat([wanted, wanted[:, :1]], dim=1), 1e-10)
        assert_close(method.influence(one, per_token=side), found[:1], 1e-10)


def test_scores_by_document() -> None:
    """Packed rows: a document's tokens may be in several rows, and some tokens are of none."""
    model = tied()
    method = ik.TracInCP(model, Examples(TRAIN), checkpoints(model), loss_fn=terms, batch_size=2)
    documents = torch.arange(7 * T).view(7, T) // 3
    documents[2, 4] = documents[5, :2] = -1
    scores = method.influence(TEST, per_token="train").flatten(1)
    oracle = torch.stack([scores[:, documents.flatten() == d].sum(1) for d in range(12)], dim=1)
    found = method.influence(TEST, per_token="train", doc_ids=documents)
    assert_close(found, oracle, 1e-10)
    assert_close(
        method.influence(TEST, per_token="train", doc_ids=[row[:T] for row in documents]), oracle
    )
    best = method.influence(TEST, k=3, per_token="train", doc_ids=documents)
    assert isinstance(best, ik.KMostInfluentialResults)
    assert_close(best.influence_scores, oracle.topk(3).values, 1e-10)
    assert torch.equal(best.indices, oracle.topk(3).indices)


def test_no_neighbours_and_more_than_there_are() -> None:
    model = adapted()
    method = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    assert method.influence(TEST, k=0, per_token="train").token_scores.shape == (3, 0, 0)
    assert method.influence(TEST, k=99, per_token="train").token_scores.shape == (3, 7, T)


def test_float32_and_half_precision() -> None:
    model = adapted()
    exact = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    wanted = {side: exact.influence(TEST, per_token=side) for side in SIDES}
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        other = adapted().to(dtype)
        method = ik.GradDot(other, Examples(TRAIN), [other.state_dict()], loss_fn=terms)
        for side in SIDES:
            found = method.influence(TEST, per_token=side)
            assert found.dtype == torch.float32
            assert_close(found.double(), wanted[side], close)


def test_the_users_model_comes_back() -> None:
    model = adapted().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loader = DataLoader(Examples(TRAIN), batch_size=2)
    method = ik.GradDot(model, loader, [model.state_dict()], loss_fn=terms)
    for side in SIDES:
        method.influence(TEST, k=2, per_token=side, show_progress=True)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters()
    )
