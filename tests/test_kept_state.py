"""What a forward pass leaves: on modules, in hooks, in the data; nothing of it stays or counts."""

import copy
import functools
import random
import types
from collections import deque
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import (
    CGInfluenceFunction,
    GradDot,
    KNNShapley,
    LoGra,
    RepresenterPointSelection,
    SimilarityInfluence,
)
from influence_kit.checkpoints.discovery import load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.restore import borrowed

torch.manual_seed(0)
TRAIN = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
TEST = torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 2


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


class Net(nn.Module):
    """A layer, its head, and whatever ``forward`` does beside them."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.layer(x).tanh())


class Caching(Net):
    """Keeps a product of its weights in evaluation mode, for the next call."""

    def __init__(self, detach):
        super().__init__()
        self.detach, self.cache, self.tables = detach, None, {}

    def forward(self, x):
        if self.training:
            self.cache = None
            self.tables.clear()
        if self.cache is None:
            gain = self.layer.weight.square().sum()
            self.cache = gain.detach() if self.detach else gain
            self.tables["shift"] = self.cache * 2
        return super().forward(x) * self.cache.sqrt() + self.tables["shift"] * x[:, :2]


class Remembering(Net):
    """Keeps outputs, with their graphs, in every way there is."""

    def __init__(self):
        super().__init__()
        self.calls, self.all, self.last_few = 0, [torch.zeros(1)], deque(maxlen=2)
        self.notes = types.SimpleNamespace(shapes=[], seen={"none"})
        self.sum, self.counts = torch.zeros(2), np.zeros(2)
        self.nested = {"a": [{"b": []}]}

    def forward(self, x):
        outputs = super().forward(x)
        self.calls += 1
        self.last = outputs
        self.layer.h = outputs
        self.all.append(outputs)
        self.last_few.append(outputs)
        self.notes.shapes.append(x.shape)
        self.notes.seen.add(self.calls)
        self.notes.extra = outputs
        self.sum += 1
        self.counts += 1
        self.nested["a"][0]["b"].append(outputs)
        return outputs


def states(model, count=2):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append({k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()})
    return found


def grad_dot(make, checkpoints):
    """Each gradient in a model of its own, in evaluation mode."""
    scores = 0
    for state in checkpoints:
        rows = []
        for batch in (TRAIN, TEST):
            found = []
            for i in range(len(batch[0])):
                model = make()
                model.load_state_dict(state)
                found.append(oracles.gradients(model.eval(), oracles.one(batch, i), loss))
            rows.append(torch.cat(found))
        scores = scores + rows[1] @ rows[0].T
    return scores


def made(kind, *arguments):
    torch.manual_seed(3)
    return kind(*arguments).double()


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_cache_of_weights_serves_no_other_call(unchanged, detach, training):
    model = made(Caching, detach).train(training)
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss, batch_size=4)
    with unchanged(model):
        scores = method.influence(TEST)
    torch.testing.assert_close(scores, grad_dot(lambda: made(Caching, detach), checkpoints))
    assert model.cache is None
    assert model.tables == {}


class Named(Net):
    """Keeps a cache that is there or is not."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = self.layer.weight.sum(0)
        return super().forward(x * self.kept)


class Lazy(Net):
    @functools.cached_property
    def gain(self):
        return self.layer.weight.detach().norm()

    def forward(self, x):
        return super().forward(x) * self.gain


@pytest.mark.parametrize("make", [lambda: Caching(True), lambda: Caching(False), Named, Lazy])
def test_a_cache_that_is_full_of_the_users_weights_serves_no_checkpoint(unchanged, make):
    model = made(make).eval()
    checkpoints = states(model)
    model(TRAIN[0])
    before = [*map(str, vars(model).items())]
    for method in (GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss),) * 2:
        with unchanged(model):
            scores = method.influence(TEST)
        torch.testing.assert_close(scores, grad_dot(lambda: made(make), checkpoints))
        assert [*map(str, vars(model).items())] == before


class Scaled(Net):
    """Has constants; one of them has a default."""

    def __init__(self):
        super().__init__()
        self.by, self.scale = torch.full((3,), 2.0, dtype=torch.float64), torch.tensor(3.0).double()
        self.steps = [torch.tensor(0.5), torch.tensor(0.25)]

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.tensor(1.0)
        if self.steps:
            x = x + sum(self.steps)
        return super().forward(x * self.by) * self.scale


def test_constants_count(unchanged):
    model = made(Scaled)
    checkpoints = states(model)
    with unchanged(model):
        scores = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, grad_dot(lambda: made(Scaled), checkpoints))


def held(model):
    return {
        "names": set(vars(model)) | set(vars(model.layer)),
        "list": list(map(id, model.all)),
        "deque": list(map(id, model.last_few)),
        "notes": (vars(model.notes).keys(), list(model.notes.shapes), set(model.notes.seen)),
        "ids": [id(v) for v in (model.all, model.last_few, model.notes, model.sum, model.counts)],
        "values": (model.calls, model.sum.tolist(), model.counts.tolist()),
        "nested": (id(model.nested["a"][0]["b"]), list(map(id, model.nested["a"][0]["b"]))),
    }


@pytest.mark.filterwarnings("ignore:.*two reverse passes")
@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_what_modules_keep_comes_back(unchanged, eval_mode, used):
    model = made(Remembering)
    if used:
        model(TRAIN[0])
    before, given = held(model), (model, TensorDataset(*TRAIN), states(model))
    with unchanged(model):
        GradDot(*given, loss_fn=loss, eval_mode=eval_mode).influence(TEST)
        CGInfluenceFunction(*given, loss_fn=loss, eval_mode=eval_mode).influence(TEST)
    assert str(held(model)) == str(before)


def test_what_modules_keep_comes_back_after_an_error():
    def failing(outputs, targets):
        raise KeyError("mine")

    model = made(Remembering)
    before = str(held(model))
    with pytest.raises(KeyError, match="mine"):
        GradDot(model, TensorDataset(*TRAIN), states(model), loss_fn=failing).influence(TEST)
    assert str(held(model)) == before


class WithPenalty(Net):
    """Leaves a part of the loss on the module."""

    def forward(self, x):
        hidden = self.layer(x).tanh()
        self.penalty = hidden.square().sum(1)
        return self.head(hidden)


def test_a_loss_may_read_what_forward_has_left():
    model, reference = made(WithPenalty), made(WithPenalty)
    checkpoints = states(model)

    def own(outputs, targets):
        return loss(outputs, targets) + model.penalty

    def expected(outputs, targets):
        return loss(outputs, targets) + reference.penalty

    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=own)
    right = oracles.tracin(reference, TRAIN, TEST, expected, checkpoints, [1, 1])
    torch.testing.assert_close(method.influence(TEST), right)
    assert not hasattr(model, "penalty")


# Hooks.


class Hooking(Net):
    """Installs a hook when it is first called, and keeps a note of it; or none of its own."""

    noted: ClassVar = WeakSet()

    def __init__(self, note):
        super().__init__()
        self.note, self.seen, self.installed, self.handle = note, [], False, None

    def forward(self, x):
        ready = {
            "flag": self.installed,
            "handle": self.handle is not None,
            "new": hasattr(self, "handles"),
            "elsewhere": self in self.noted,
        }
        if not ready[self.note]:
            handle = self.layer.register_forward_hook(lambda m, a, o: self.seen.append(o))
            self.noted.add(self)
            if self.note == "flag":
                self.installed = True
            elif self.note == "handle":
                self.handle = handle
            elif self.note == "new":
                self.handles = [handle]
        self.seen.clear()
        outputs = super().forward(x)
        return outputs + 0 * sum(self.seen).sum()


@pytest.mark.parametrize("note", ["flag", "handle", "new", "elsewhere"])
def test_hooks_that_forward_installs_stay_with_its_note_of_them(note):
    model = made(Hooking, note)
    Hooking.noted.clear()
    checkpoints = states(model)
    method = GradDot(model, TensorDataset(*TRAIN), checkpoints, loss_fn=loss, batch_size=4)
    expected = grad_dot(lambda: made(Hooking, note), checkpoints)
    Hooking.noted.clear()
    torch.testing.assert_close(method.influence(TEST), expected)
    for _ in range(2):
        model(TRAIN[0])
        assert len(model.seen) == 1
        assert len(model.layer._forward_hooks) == 1
    torch.testing.assert_close(method.influence(TEST), expected)
    assert len(model.layer._forward_hooks) == 1


def test_hooks_of_the_users_stay_and_those_of_a_load_function_go(unchanged):
    model, calls = made(Net), []
    model.layer.register_forward_hook(lambda *_: calls.append("own"))
    checkpoints = states(model, 3)

    def load(model, checkpoint):
        model.load_state_dict(checkpoints[checkpoint])
        model.head.register_forward_hook(lambda m, a, o: o * (checkpoint + 1))
        return 1.0

    data, expected = TensorDataset(*TRAIN), 0
    for number, state in enumerate(checkpoints):
        own = made(Net)
        own.load_state_dict(state)
        own.head.register_forward_hook(lambda m, a, o, by=number + 1: o * by)
        expected = expected + oracles.tracin(own, TRAIN, TEST, loss, [state], [1])
    with unchanged(model):
        scores = GradDot(model, data, range(3), load, loss_fn=loss).influence(TEST)
    torch.testing.assert_close(scores, expected)
    assert calls


def test_a_module_that_a_load_function_swaps_comes_back(unchanged):
    model = made(Net)
    head = model.head
    with unchanged(model), borrowed(model):
        loader = CheckpointLoader(model, [0], lambda m, c: setattr(m, "head", nn.Tanh()) or 1.0)
        with pytest.raises(InvalidArgumentError, match="it replaced the module 'head'"):
            loader.load(0)
        assert model.head is head
        model.extra = nn.Linear(1, 1)
    assert model.head is head
    assert not hasattr(model, "extra")


# Data.


class InPlace(Net):
    """Changes its input in place."""

    def forward(self, x):
        x[:, 0] = 0
        x.mul_(2)
        return super().forward(x)


def plain(x):
    x = x.clone()
    x[:, 0] = 0
    return x * 2


@pytest.mark.parametrize("kind", ["dataset", "loader", "dict"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_inputs_that_forward_changes_are_copies(unchanged, kind, batch_size):
    model = made(InPlace)
    checkpoints = states(model)
    train, test = [tuple(t.clone() for t in batch) for batch in (TRAIN, TEST)]
    data = TensorDataset(*train)
    if kind == "loader":
        data = [tuple(t[i : i + batch_size] for t in train) for i in range(0, 9, batch_size)]
        data = DataLoader(data, batch_size=None)
    own_loss = loss
    if kind == "dict":
        data = [{"x": x, "y": y} for x, y in zip(*train, strict=True)]
        test = {"x": test[0], "y": test[1]}

        def own_loss(outputs, targets):
            return loss(outputs, targets["y"])

    inputs = (plain(TRAIN[0]), TRAIN[1]), (plain(TEST[0]), TEST[1])
    expected = oracles.tracin(made(Net), *inputs, loss, checkpoints, [1, 1])
    method = GradDot(model, data, checkpoints, loss_fn=own_loss, batch_size=batch_size)
    with unchanged(model):
        for _ in range(2):
            torch.testing.assert_close(method.influence(test), expected)
    assert torch.equal(train[0], TRAIN[0])
    assert torch.equal(test["x"] if kind == "dict" else test[0], TEST[0])


@pytest.mark.parametrize("method", [CGInfluenceFunction, LoGra])
def test_other_methods_hand_over_copies_too(method):
    keywords = {"loss_fn": loss, "damping": 0.1}
    if method is LoGra:
        keywords["projection_dim"] = 3
    model, train = made(InPlace), tuple(t.clone() for t in TRAIN)
    checkpoints = states(model)
    scores = method(model, TensorDataset(*train), checkpoints, **keywords).influence(TEST)
    data = TensorDataset(plain(TRAIN[0]), TRAIN[1])
    expected = method(made(Net), data, checkpoints, **keywords).influence((plain(TEST[0]), TEST[1]))
    torch.testing.assert_close(scores, expected)
    assert torch.equal(train[0], TRAIN[0])


def test_activations_come_from_copies_too(tmp_path):
    model, train = made(InPlace), tuple(t.clone() for t in TRAIN)
    test = tuple(t.clone() for t in TEST)
    data = TensorDataset(*train)
    KNNShapley(model, data, states(model), layer="layer").influence(test)
    SimilarityInfluence(model, "layer", data, tmp_path).influence(test[0])
    assert torch.equal(train[0], TRAIN[0])
    assert torch.equal(test[0], TEST[0])


class SometimesInPlace(Net):
    def forward(self, x):
        if bool((x > 1e3).any()):
            x.clamp_(max=1e3)
        return super().forward(x)


def test_a_model_that_changes_some_inputs_alone_leaves_them_too():
    x = torch.cat([TRAIN[0], torch.full((1, 3), 1e4, dtype=torch.float64)])
    train = x.clone(), torch.arange(10) % 2
    model = made(SometimesInPlace)
    method = GradDot(model, TensorDataset(*train), [model.state_dict()], loss_fn=loss, batch_size=1)
    scores = method.influence(TEST)
    assert torch.equal(train[0], x)
    rows = oracles.gradients(model.eval(), (x.clone(), train[1]), loss)
    tests = oracles.gradients(model, TEST, loss)
    torch.testing.assert_close(scores, tests @ rows.T)


class WithGenerators(Net):
    """Draws from generators of its own, and uses nothing of it."""

    def __init__(self):
        super().__init__()
        self.kinds = {
            "torch": torch.Generator().manual_seed(3),
            "numpy": np.random.default_rng(0),
            "old numpy": np.random.RandomState(0),
            "python": random.Random(0),
        }

    def forward(self, x):
        torch.rand(1, generator=self.kinds["torch"])
        self.kinds["numpy"].random(), self.kinds["old numpy"].rand(), self.kinds["python"].random()
        return super().forward(x)


def test_generators_of_the_models_own_come_back():
    def next_numbers(model):
        own = copy.deepcopy(model.kinds)
        drawn = [own["numpy"].random(), own["old numpy"].rand(), own["python"].random()]
        return [*drawn, float(torch.rand(1, generator=own["torch"]))]

    model = made(WithGenerators)
    expected = next_numbers(model)
    GradDot(model, TensorDataset(*TRAIN), states(model), loss_fn=loss).influence(TEST)
    assert next_numbers(model) == expected


# losses that write into what they are given


def cooled(outputs, targets):
    outputs.div_(2.0)
    return loss(outputs, targets)


def from_one(outputs, targets):
    targets -= 1
    return loss(outputs, targets)


IN_PLACE = {
    "outputs": (cooled, lambda o, t: loss(o / 2, t), 0),
    "their mean": (lambda o, t: cooled(o, t).mean(), lambda o, t: loss(o / 2, t), 0),
    "targets": (from_one, lambda o, t: loss(o, t - 1), 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (GradDot, {}),
        (CGInfluenceFunction, {"damping": 0.1, "tol": 1e-13}),
        (LoGra, {"damping": 0.1, "projection_dim": 16}),
    ],
)
def test_a_loss_may_write_into_what_it_gets(unchanged, method, arguments, name):
    writing, plain, more = IN_PLACE[name]
    train, test = (TRAIN[0], TRAIN[1] + more), (TEST[0], TEST[1] + more)
    scores = []
    for formula in (plain, writing):
        model, data = made(Net), TensorDataset(train[0], train[1].clone())
        given = test[0], test[1].clone()
        found = method(model, data, states(model), loss_fn=formula, batch_size=4, **arguments)
        with unchanged(model):
            scores.append(found.influence(given))
        assert torch.equal(data.tensors[1], train[1])
        assert torch.equal(given[1], test[1])
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-9, atol=1e-12)


def test_the_last_layer_is_refitted_to_a_loss_that_writes():
    model, data = made(Net), TensorDataset(*TRAIN)
    scores = [
        RepresenterPointSelection(
            model, "head", data, [model.state_dict()], loss_fn=formula
        ).influence(TEST)
        for formula in (cooled, lambda o, t: loss(o / 2, t))
    ]
    torch.testing.assert_close(scores[0], scores[1])


# transformers, which installs hooks when a model is first called.


def small(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    more = {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    if name == "gpt2":
        own = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 11, "n_positions": 16}
        config = transformers.GPT2Config(**own)
        return transformers.GPT2LMHeadModel(config).double()
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **more)).double()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = transformers.MixtralConfig(**size, **more, **experts, experts_implementation="eager")
    return transformers.MixtralForCausalLM(config).double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_transformers_model_gives_what_it_gave(unchanged, name):
    model, ids = small(name), torch.arange(24).reshape(4, 6) % 11
    untouched = copy.deepcopy(model)
    model.config.output_router_logits = untouched.config.output_router_logits = False
    batch = {"input_ids": ids, "labels": ids}
    data = [{"input_ids": row, "labels": row} for row in ids]

    def own(outputs, batch):
        wrong = F.cross_entropy(outputs.logits.movedim(-1, 1), batch["labels"], reduction="none")
        return wrong + 0 * outputs.logits.sum(-1)

    GradDot(model, data, [model.state_dict()], loss_fn=own).influence(batch)
    for one in (model, untouched):
        one.eval()
        one.config.output_hidden_states = True
        one.config.output_router_logits = name == "mixtral"
    expected = untouched(**batch)
    for _ in range(2):
        found = model(**batch)
        assert len(found.hidden_states) == len(expected.hidden_states) == 3
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other)
        if name == "mixtral":
            assert len(found.router_logits) == 2


def test_masks_come_off_and_a_users_own_stay(unchanged):
    from influence_kit import dropout_ensemble

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double().eval()
    members = dropout_ensemble(model, 3)
    load_checkpoint(model, members[0])
    with unchanged(model):
        GradDot(model, TensorDataset(*TRAIN), members, loss_fn=loss).influence(TEST)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, TRAIN[0])])
def test_scripted_models_have_the_scores_of_the_model(script):
    model = made(Net)
    checkpoints = states(model)
    scores = GradDot(script(made(Net)), TensorDataset(*TRAIN), checkpoints, loss_fn=loss).influence(
        TEST
    )
    torch.testing.assert_close(scores, grad_dot(lambda: made(Net), checkpoints))
