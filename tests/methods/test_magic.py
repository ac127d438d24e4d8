"""MAGIC is the derivative of training in an example's weight, as plain loops have it."""

import copy

import pytest
import torch
from contract import assert_close
from recorded_runs import (
    BATCHES,
    DATA,
    EPOCHS,
    LOOPS,
    STEPS,
    TEST,
    Loop,
    N,
    X,
    Y,
    central_differences,
    cross_entropy,
    measured,
    record,
    trainable,
    weighted,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import MAGIC, DVEmb, TrainingTrace
from influence_kit.methods.magic import repeated_runs

CLOSE = 1e-6
each_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
MOMENTUM = LOOPS["nesterov"]


def make(model, trace, **options):
    return MAGIC(model, DATA, **{"trace": trace, "loss_fn": nn.CrossEntropyLoss(), **options})


@each_loop
def test_scores_are_central_differences_of_training(loop, unchanged):
    model, trace = record(loop)
    magic = make(model, trace)
    with unchanged(model):
        scores = magic.influence(TEST)
    assert scores.dtype == torch.float64
    assert_close(scores, central_differences(loop), CLOSE)
    assert bool((scores[:, 8] == 0).all())


@each_loop
def test_kept_states_do_not_matter(loop, tmp_path):
    """All states, some with replay in between, in memory or in a folder: the same bits."""
    model, trace = record(loop)
    expected = make(model, trace).influence(TEST)
    for number, keep in enumerate(("sqrt", 3, 100)):
        other = record(loop, keep=keep)[1]
        assert [n for n in range(STEPS) if other.is_kept(n)] == [[0, 1, 4], [0, 3], [0]][number]
        assert torch.equal(make(model, other).influence(TEST), expected)
    record(loop, folder=tmp_path / "trace", keep="sqrt")
    read = TrainingTrace(folder=tmp_path / "trace")
    assert torch.equal(make(model, read).influence(TEST), expected)


@each_loop
def test_a_replay_is_the_run_with_other_weights(loop, unchanged):
    model, trace = record(loop, keep="sqrt")
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[3] = 0.0
    expected = weighted(loop, weights)[0]
    magic = make(model, trace)
    with unchanged(model):
        found = magic.replay(weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, 1e-12)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "dropout, accumulation"])
def test_the_measurement_may_be_averaged_over_the_last_states(name):
    loop = LOOPS[name]
    model, trace = record(loop)
    found = make(model, trace, last=3).influence(TEST)
    assert_close(found, central_differences(loop, last=3), CLOSE)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_the_scores_of_epochs_add_up(name):
    loop = LOOPS[name]
    model, trace = record(loop, keep="sqrt")
    whole = make(model, trace).influence(TEST)
    parts = [make(model, trace, epochs=epochs) for epochs in ([0], {1, 2})]
    scores = [part.influence(TEST) for part in parts]
    for found, epochs in zip(scores, ([0], [1, 2]), strict=True):
        assert_close(found, central_differences(loop, epochs=epochs), CLOSE)
    assert_close(scores[0] + scores[1], whole)
    expected = weighted(loop, torch.zeros(N), epochs=[0])[0]
    for state, value in parts[0].replay(torch.zeros(N)).items():
        assert_close(value, expected[state], 1e-12)


def test_one_step_of_plain_sgd_is_dvemb():
    """Where there is no later step, DVEmb has no approximation."""
    model, trace = record(Loop(options={"lr": 0.4, "weight_decay": 0.1}))
    first = TrainingTrace(model, SGD(model.parameters(), lr=0.3))
    model.load_state_dict(trace[0]["state_dict"])
    model.zero_grad()
    nn.CrossEntropyLoss()(model(X[:5]), Y[:5]).backward()
    with first:
        first.record(range(5))
        first._optimizer.step()
    expected = DVEmb(model, DATA, trace=first, loss_fn=nn.CrossEntropyLoss()).influence(TEST)
    assert_close(make(model, first).influence(TEST), expected, 1e-10)
    # and the last steps of a longer run, by epoch
    last = {"epochs": [EPOCHS[-1]]}
    expected = DVEmb(model, DATA, trace=trace, loss_fn=nn.CrossEntropyLoss(), **last)
    assert_close(make(model, trace, **last).influence(TEST), expected.influence(TEST), 1e-10)


def test_several_runs_are_averaged():
    loops = [MOMENTUM, LOOPS["adam"]]
    runs = [record(loop) for loop in loops]
    model, traces = runs[0][0], [trace for _, trace in runs]
    single = [make(model, trace).influence(TEST) for trace in traces]
    magic = make(model, traces)
    assert_close(magic.influence(TEST), sum(single) / 2, 1e-12)
    assert_close(magic.influence(TEST, aggregate=True), sum(single).sum(0, keepdim=True) / 2, 1e-12)
    weights = torch.full((N,), 0.5)
    expected = weighted(loops[1], weights)[0]
    assert_close(magic.replay(weights, run=1)["0.weight"], expected["0.weight"], 1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_loss_may_have_any_reduction(reduction):
    loop = LOOPS["momentum"]
    model, trace = record(loop)
    expected = make(model, trace).influence(TEST)
    losses = (
        nn.CrossEntropyLoss(reduction=reduction),
        lambda o, t: nn.functional.cross_entropy(o, t, reduction=reduction),
    )
    for loss in losses:
        assert_close(make(model, trace, loss_fn=loss).influence(TEST), expected, 1e-12)


def squares(outputs, targets):
    return (outputs - targets[:, None]).square().sum(1)


def test_a_test_output_is_what_training_raised():
    model, trace = record(MOMENTUM)
    expected = -make(model, trace, test_loss_fn=squares).influence(TEST)
    magic = make(model, trace, test_output_fn=squares)
    assert_close(magic.influence(TEST), expected, 1e-12)
    predicted = magic.smoothness(TEST, change=1e-3, share=0.4)
    other = make(model, trace, test_loss_fn=squares).smoothness(TEST, change=1e-3, share=0.4)
    assert_close(predicted.real, other.real, 1e-12)
    assert_close(predicted.predicted, other.predicted, 1e-10)


def test_queries_that_exceed_memory_are_carried_back_in_turn(monkeypatch):
    model, trace = record(MOMENTUM)
    expected = make(model, trace).influence(TEST)
    monkeypatch.setattr(repeated_runs, "resident_bytes", lambda device: 1)
    assert_close(make(model, trace).influence(TEST), expected, 1e-12)
    best = make(model, trace).influence(TEST, k=3)
    assert torch.equal(best.indices, expected.topk(3).indices)
    monkeypatch.setattr(
        "influence_kit.methods.magic.step_gradient.workspace_bytes", lambda device: 1
    )
    assert_close(make(model, trace).influence(TEST), expected, 1e-12)


class WithoutRule(nn.Module):
    def forward(self, x):
        return _NoBatching.apply(x)


class _NoBatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _Slope.apply(grad, x)


class _Slope(torch.autograd.Function):
    """A product whose own backward asks for numbers, which vmap does not give."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return grad * x.cos()

    @staticmethod
    def backward(ctx, later):
        grad, x = ctx.saved_tensors
        float(later.sum())
        return later * x.cos(), -later * grad * x.sin()


def test_an_operation_without_batching_rule_is_taken_one_query_at_a_time():
    def build():
        return nn.Sequential(nn.Linear(3, 4), WithoutRule(), nn.Linear(4, 2))

    loop = Loop(options={"lr": 0.3, "momentum": 0.9}, build=build)
    model, trace = record(loop)
    with pytest.warns(UserWarning, match="an operation without batching rule"):
        scores = make(model, trace).influence(TEST)
    assert_close(scores, central_differences(loop), CLOSE)


class Attention(nn.Module):
    """Attention, whose fused kernel cannot be differentiated twice."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 6), nn.Linear(2, 2)

    def forward(self, x):
        q, k, v = self.qkv(x[:, None, :].expand(-1, 2, -1)).chunk(3, dim=-1)
        found = nn.functional.scaled_dot_product_attention(q, k * 2, v)
        return self.head(found.mean(1))


def test_attention():
    loop = Loop(build=Attention, options={"lr": 0.5, "momentum": 0.5})
    model, trace = record(loop)
    assert_close(make(model, trace).influence(TEST), central_differences(loop), CLOSE)


def test_weight_norm():
    """Torch's own second derivative of it is wrong."""

    def build():
        return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    loop = Loop(build=build, options={"lr": 0.5, "momentum": 0.5})
    model, trace = record(loop)
    assert_close(make(model, trace).influence(TEST), central_differences(loop), CLOSE)


def test_parameters_without_a_gradient_stay_as_they_are():
    """Torch's optimizers leave them out: no weight decay, no state."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.body(x)

    loop = Loop(build=Unused, options={"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1})
    model, trace = record(loop)
    assert_close(make(model, trace).influence(TEST), central_differences(loop), CLOSE)


def test_a_loader_gives_its_data_set_and_collation():
    model, trace = record(MOMENTUM)
    examples = [{"x": x, "label": int(y)} for x, y in zip(X, Y, strict=True)]

    def collate(some):
        labels = torch.tensor([example["label"] for example in some])
        return torch.stack([example["x"] for example in some]), labels

    loader = DataLoader(examples, batch_size=4, collate_fn=collate)
    magic = MAGIC(model, loader, trace=trace, loss_fn=nn.CrossEntropyLoss())
    assert torch.equal(magic.influence(TEST), make(model, trace).influence(TEST))


def test_a_run_that_went_on_from_a_trained_optimizer():
    """The state at the start is part of the record."""
    loop = LOOPS["adamw"]
    model, optimizer = loop.start()
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(X), Y).mean().backward()
        optimizer.step()
    start = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())

    def run(weights, trace=None):
        model, optimizer = loop.start()
        model.load_state_dict(start)
        optimizer.load_state_dict(copy.deepcopy(moments))
        for indices in BATCHES[0]:
            optimizer.zero_grad()
            (weights[indices] * cross_entropy(model(X[indices]), Y[indices])).mean().backward()
            if trace is not None:
                trace._model, trace._optimizer = model, optimizer
                trace.record(indices)
            optimizer.step()
        if trace is not None:
            trace.finish()
        return model.state_dict()

    trace, ones = TrainingTrace(), torch.ones(N, dtype=torch.float64)
    run(ones, trace)
    step = torch.zeros(N, dtype=torch.float64)
    step[5] = 1e-4
    ends = [measured(loop, [run(ones + sign * step)]) for sign in (1, -1)]
    found = make(model, trace).influence(TEST)[:, 5]
    assert_close(found, (ends[1] - ends[0]) / 2e-4, CLOSE)


def test_frozen_and_trained_again():
    """What a run has trained counts, also where the user has frozen it since."""
    model, trace = record(MOMENTUM)
    expected = make(model, trace).influence(TEST)
    model.requires_grad_(False)
    assert torch.equal(make(model, trace).influence(TEST), expected)
    assert trainable(model) == []


def test_the_users_optimizer_stays_as_it_is():
    model, trace = record(LOOPS["adamw"])
    before = copy.deepcopy(trace._optimizer.state_dict())
    magic = make(model, trace)
    magic.influence(TEST)
    magic.replay(torch.zeros(N))
    after = trace._optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for held, known in zip(after["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(held[slot], known[slot]) for slot in known)


def test_how_smooth_a_run_is(unchanged):
    model, trace = record(MOMENTUM)
    magic = make(model, trace, last=2)
    with unchanged(model):
        found = magic.smoothness(TEST, change=0.01, share=0.4, seed=1)
    weights = torch.ones(N, dtype=torch.float64)
    weights[found.indices] -= 0.01
    assert len(found.indices) == 4
    ones = torch.ones_like(weights)
    changed, base = (
        measured(MOMENTUM, weighted(MOMENTUM, some, last=2)) for some in (weights, ones)
    )
    assert_close(found.real, changed - base, 1e-9)
    scores = magic.influence(TEST)
    assert_close(found.predicted, 0.01 * scores[:, found.indices].sum(1), 1e-12)
    assert found.error < 0.05
    assert found.correlation > 0.999
    assert "4, weights lowered by 0.01" in str(found)
    assert float((found.predicted - found.real).norm() / found.real.norm()) == found.error


def test_a_mean_squared_error():
    """Torch's own squared error cannot be differentiated often enough."""
    targets = torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    data, test = TensorDataset(X, targets), (TEST[0], targets[:4])
    torch.manual_seed(0)
    start = nn.Linear(3, 2).double()

    def run(weights, trace=None):
        model = copy.deepcopy(start)
        optimizer = SGD(model.parameters(), lr=0.2, momentum=0.5)
        for indices in BATCHES[1]:
            optimizer.zero_grad()
            if trace is None:
                losses = (model(X[indices]) - targets[indices]).square().mean(1)
                (weights[indices] * losses).mean().backward()
            else:
                nn.MSELoss()(model(X[indices]), targets[indices]).backward()
                trace._model, trace._optimizer = model, optimizer
                trace.record(indices)
            optimizer.step()
        if trace is not None:
            trace.finish()
        return (model(test[0]) - test[1]).square().mean(1).detach()

    trace, ones = TrainingTrace(), torch.ones(N, dtype=torch.float64)
    run(ones, trace)
    columns = []
    for example in range(N):
        step = torch.zeros(N, dtype=torch.float64)
        step[example] = 1e-4
        columns.append((run(ones - step) - run(ones + step)) / 2e-4)
    magic = MAGIC(start, data, trace=trace, loss_fn=nn.MSELoss())
    assert_close(magic.influence(test), torch.stack(columns, 1), CLOSE)
