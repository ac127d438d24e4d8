"""What the contract does not ask of TracInCP: kinds of outputs, modes, frozen parameters."""

from typing import Any

import oracles
import pytest
import torch
from cases import CASES, RATES, DictMLP, Examples, TanhMLP, cross_entropy
from contract import assert_close, build, scores
from torch import Tensor, nn

from influence_kit import TracInCP
from influence_kit.errors import InvalidArgumentError

MLP = CASES["mlp"]


class TupleMLP(TanhMLP):
    """An output that is a tuple, in another order than one would guess."""

    def forward(self, x: Tensor) -> Any:
        return x.sum(), super().forward(x)


class OwnLossMLP(TanhMLP):
    """A model that returns its loss per example, in a dict."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        loss = None if labels is None else cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def states() -> Any:
    return MLP.checkpoints()


def test_a_tuple_output_goes_to_the_loss_as_it_is() -> None:
    influence = TracInCP(
        TupleMLP().double(),
        Examples(MLP.train),
        states(),
        loss_fn=lambda outputs, targets: cross_entropy(outputs[1], targets),
    )
    assert_close(influence.influence(MLP.test), scores(build("TracInCP", MLP), MLP.test))


def test_a_models_own_loss_per_example() -> None:
    batch = CASES["dict"]
    influence = TracInCP(OwnLossMLP().double(), Examples(batch.train), states())
    assert_close(influence.influence(batch.test), scores(build("TracInCP", MLP), MLP.test))


def test_a_dict_output_without_a_loss_is_refused() -> None:
    batch = CASES["dict"]
    influence = TracInCP(DictMLP().double(), Examples(batch.train), states())
    with pytest.raises(InvalidArgumentError, match="without a loss"):
        influence.influence(batch.test)


def test_frozen_parameters_do_not_count_without_layers() -> None:
    model = MLP.model()
    model.body[0].weight.requires_grad_(False)
    found = scores(build("TracInCP", MLP, model=model), MLP.test)
    names = [name for name, _ in model.named_parameters() if name != "body.0.weight"]
    expected = oracles.tracin(MLP.model(), MLP.train, MLP.test, MLP.loss, MLP.states, RATES, names)
    assert_close(found, expected)


def test_frozen_parameters_count_in_layers_and_are_frozen_again() -> None:
    model = MLP.model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="grads for layer: head, name: head.(weight|bias)"):
        influence = build("TracInCP", MLP, model=model, layers=["head"])
    expected = build("TracInCP", MLP, layers=["head"])
    assert_close(scores(influence, MLP.test), scores(expected, MLP.test))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def test_dropout_is_off_whatever_the_models_mode() -> None:
    model = with_dropout()
    arguments = (Examples(MLP.train), [model.state_dict()])
    on = TracInCP(model.train(), *arguments, loss_fn=cross_entropy).influence(MLP.test)
    off = TracInCP(with_dropout().eval(), *arguments, loss_fn=cross_entropy).influence(MLP.test)
    assert torch.equal(on, off)
    assert model.training


def test_dropout_can_be_kept_on_and_repeats_with_the_random_state() -> None:
    model = with_dropout().train()
    arguments = (model, Examples(MLP.train), [model.state_dict()])
    kept = TracInCP(*arguments, loss_fn=cross_entropy, eval_mode=False)
    test = MLP.test
    torch.manual_seed(1)
    first = kept.influence(test)
    assert torch.equal(kept.influence(test), first)  # the state came back
    torch.manual_seed(2)
    assert not torch.allclose(kept.influence(test), first)
    off = TracInCP(*arguments, loss_fn=cross_entropy).influence(test)
    assert not torch.allclose(off, first)


def test_a_batch_larger_than_memory_wants_is_taken_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = scores(build("TracInCP", MLP), MLP.test)
    sizes: list[int] = []
    original = TanhMLP.forward

    def counting(self: TanhMLP, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return original(self, x)

    monkeypatch.setattr(TanhMLP, "forward", counting)
    budget = "influence_kit.gradients.batch_memory.workspace_bytes"
    monkeypatch.setattr(budget, lambda device: 300)
    assert_close(scores(build("TracInCP", MLP, batch_size="auto"), MLP.test), expected)
    assert max(sizes) < MLP.n
