"""Layers that act in ``eval()``: right scores, and weights, flags and attributes as they were."""

import copy
from contextlib import nullcontext

import oracles
import pytest
import torch
from acting_layers import Averaged, FrozenNorm, Merging, Prepared, Rounding, flagged, in_training
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import (
    DataInf,
    ExplicitInfluenceFunction,
    GradDot,
    KNNShapley,
    SimilarityInfluence,
)
from influence_kit.evaluation import checkpoint_losses
from influence_kit.preservation.restore import borrowed
from influence_kit.preservation.training_flags import evaluating

torch.manual_seed(0)
TRAIN = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
TEST = torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 2


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def net(layer, **arguments):
    torch.manual_seed(1)
    return nn.Sequential(
        layer(3, 5, **arguments), nn.Tanh(), nn.Dropout(), nn.Linear(5, 2)
    ).double()


def states(model, of_all=False, count=3):
    """Checkpoints of a run in training mode: what is trained moves."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        other = in_training(model)
        with torch.no_grad():
            for parameter in other.parameters():
                if of_all or parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        found.append(copy.deepcopy(other.state_dict()))
    return found


def grad_dot(model, checkpoints, finish):
    """The sum of the gradients' dot products, at each checkpoint in a model of its own."""
    scores = 0
    for state in checkpoints:
        own = finish(in_training(model, state))
        names = [name for name, p in own.named_parameters() if p.requires_grad]
        g, h = (oracles.gradients(own, batch, loss, names) for batch in (TRAIN, TEST))
        scores = scores + h @ g.T
    return scores


def start(model, mode):
    """The model as a user may have it."""
    if mode == "mixed":
        model.train()[0].eval()
        return model
    return model.train(mode == "training")


def maybe_ambiguous(mode, layer):
    """Weights that were trained, and that ``eval()`` changes: when were they saved?"""
    if mode == "training" or layer is not Rounding:
        return nullcontext()
    return pytest.warns(UserWarning, match="assumed to be saved in training mode")


MODES = ["training", "evaluation", "mixed"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eval_mode", [True, False])
def test_an_adapter_that_is_merged_in_eval_has_its_gradients(unchanged, mode, eval_mode):
    model = start(net(Merging), mode)
    model[2].eval()
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss, eval_mode=eval_mode)
    with unchanged(model):
        scores = method.influence(TEST)
    assert model[0].merged is not model[0].training
    torch.testing.assert_close(scores, grad_dot(net(Merging), checkpoints, flagged))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eval_mode", [True, False])
def test_after_a_call_train_gives_the_weights_of_training(mode, eval_mode):
    model = start(net(Merging), mode)
    model[2].p = 0
    expected = in_training(model)
    given = model, TensorDataset(*TRAIN), states(model)
    GradDot(*given, loss_fn=loss, eval_mode=eval_mode).influence(TEST)
    torch.testing.assert_close(model.train().state_dict(), expected.state_dict())


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_models_own_weights_count_as_they_are_in_training(mode, live):
    model = start(net(Merging), mode)
    state = model.state_dict() if live else copy.deepcopy(model.state_dict())
    scores = GradDot(model, TensorDataset(*TRAIN), [state], loss_fn=loss).influence(TEST)
    own = in_training(net(Merging)).state_dict()
    torch.testing.assert_close(scores, grad_dot(net(Merging), [own], flagged))


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_saved_after_eval_over_frozen_weights_is_seen_to_be_one(mode):
    model = start(net(Merging), mode)
    trained = states(model)
    merged = [copy.deepcopy(in_training(model, s).eval().state_dict()) for s in trained]
    mixed = [trained[0], merged[1], merged[2]]
    scores = GradDot(model, TensorDataset(*TRAIN), mixed, loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, grad_dot(net(Merging), trained, flagged))


def test_weights_under_an_adapter_that_were_trained_too_are_as_saved_in_the_models_mode(unchanged):
    model = net(Merging, frozen=False)
    checkpoints = states(model, of_all=True)
    expected = grad_dot(model, checkpoints, flagged)
    data = TensorDataset(*TRAIN)
    scores = GradDot(model, data, checkpoints, loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, expected)
    merged = [copy.deepcopy(in_training(model, s).eval().state_dict()) for s in checkpoints]
    model.eval()
    with unchanged(model), pytest.warns(UserWarning, match="to be saved in evaluation mode"):
        scores = GradDot(model, data, merged, loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [Rounding, Prepared])
def test_a_layer_whose_outputs_differ_after_eval_gets_its_eval(unchanged, layer, mode):
    model = start(net(layer), mode)
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss)
    with unchanged(model), maybe_ambiguous(mode, layer):
        scores = method.influence(TEST)
    expected = grad_dot(net(layer), checkpoints, lambda own: own.eval())
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("method", [ExplicitInfluenceFunction, DataInf])
@pytest.mark.parametrize("mode", MODES)
def test_curvature_of_a_merging_adapter_is_that_of_a_plain_one(unchanged, method, mode):
    model, data = start(net(Merging), mode), TensorDataset(*TRAIN)
    checkpoints = states(model, count=2)
    plain = in_training(model)
    plain[0].merged = None  # no mode of it: neither merges nor takes apart
    expected = method(plain, data, checkpoints, loss_fn=loss, damping=0.1).influence(TEST)
    with unchanged(model):
        scores = method(model, data, checkpoints, loss_fn=loss, damping=0.1).influence(TEST)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [Merging, Rounding, Prepared])
def test_outputs_of_layers_are_those_after_eval(unchanged, tmp_path, layer, mode):
    model, data = start(net(layer), mode), TensorDataset(*TRAIN)
    own = in_training(net(layer)).eval()
    features = own[:2](TRAIN[0]).detach(), own[:2](TEST[0]).detach()
    with unchanged(model):
        found = SimilarityInfluence(model, "1", data, tmp_path).influence(TEST[0], top_k=9)["1"]
    cosines = F.cosine_similarity(features[1][:, None], features[0][None], dim=2)
    torch.testing.assert_close(found[1], cosines.sort(descending=True).values)
    state = states(net(layer))[0]
    with unchanged(model), maybe_ambiguous(mode, layer):
        values = KNNShapley(model, data, [state], layer="1").influence(TEST)
    other = in_training(net(layer), state).eval()
    inputs = [(other[:2](x).detach(), y) for x, y in (TRAIN, TEST)]
    expected = KNNShapley(nn.Identity(), TensorDataset(*inputs[0])).influence(inputs[1])
    torch.testing.assert_close(values, expected.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layer", [Merging, Rounding])
def test_losses_at_checkpoints_are_those_after_eval(unchanged, layer):
    model = net(layer).eval()
    checkpoints = states(model)
    with unchanged(model), maybe_ambiguous("evaluation", layer):
        losses = checkpoint_losses(model, TensorDataset(*TRAIN), checkpoints, loss)
    own = [in_training(net(layer), state).eval() for state in checkpoints]
    torch.testing.assert_close(losses, torch.stack([loss(m(TRAIN[0]), TRAIN[1]) for m in own]))


def frozen_norm():
    torch.manual_seed(2)
    model = FrozenNorm(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    model[1].running_mean.normal_()
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_a_backbone_that_keeps_batch_norm_in_evaluation_mode(unchanged, mode):
    model = frozen_norm().train(mode)
    model[2].train(not mode)
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss)
    with unchanged(model):
        scores = method.influence(TEST)
    torch.testing.assert_close(scores, grad_dot(frozen_norm(), checkpoints, flagged))


def test_averages_that_take_the_place_of_parameters_in_eval(unchanged):
    model = net(Averaged)
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss)
    with unchanged(model):
        scores = method.influence(TEST)
    assert model[0].backup is None
    torch.testing.assert_close(scores, grad_dot(net(Averaged), checkpoints, lambda own: own.eval()))


class AverageBeside(nn.Module):
    """Works with an average of its weights, which is not trained, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.net = net(nn.Linear)
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        return (self.net if self.training else self.average)(x)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", [GradDot, ExplicitInfluenceFunction, DataInf])
def test_weights_that_count_in_training_mode_alone_are_no_zeros(unchanged, method, batch_size):
    model = AverageBeside()
    model.net[2].p = 0
    given = model, TensorDataset(*TRAIN), [model.state_dict()]
    with unchanged(model), pytest.raises(ValueError, match="uses other weights"):
        method(*given, loss_fn=loss, batch_size=batch_size).influence(TEST)
    scores = GradDot(*given, loss_fn=loss, eval_mode=False).influence(TEST)
    plain = model.net
    alone = GradDot(plain, given[1], [plain.state_dict()], loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, alone)


def test_nothing_is_called_where_flags_are_all():
    model = net(nn.Linear)
    model.train()
    model[3].eval()
    with borrowed(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, True, True, False]


def test_an_exported_model_without_modes_has_flags_alone(unchanged):
    def refuse(mode=True):
        raise NotImplementedError("has one mode alone")

    model = net(nn.Linear)
    model.train = model.eval = refuse
    with unchanged(model), borrowed(model):
        assert not model.training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [Merging, Rounding, Prepared, nn.Linear])
def test_evaluating_gives_the_outputs_after_eval(unchanged, layer, mode):
    model = start(net(layer), mode)
    expected = in_training(net(layer)).eval()(TRAIN[0])
    with unchanged(model), evaluating(model):
        torch.testing.assert_close(model(TRAIN[0]), expected)
        assert not any(module.training for module in model.modules())
