"""A trace holds what training was, in memory or in a folder, and says what it cannot take."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import DVEmb, TracInCP, TrainingTrace
from influence_kit.errors import InvalidArgumentError
from influence_kit.training.step import Step, steps_of

N = 8
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 2
BATCHES = [torch.tensor([3, 1, 0]), torch.tensor([5, 2]), torch.tensor([7, 6, 4])]


@pytest.fixture
def model() -> nn.Module:
    """A model with a frozen layer, tied weights and buffers that training changes."""
    torch.manual_seed(0)
    tied = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), tied, nn.Tanh(), tied, nn.Linear(4, 2)
    ).double()
    model[0].requires_grad_(False)
    return model


def step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(X[batch]), Y[batch]).backward()


def sgd(model, **options):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **options)


def train(model, trace, optimizer):
    """Two epochs; the states before each step and after the last, copied by hand."""
    states = []
    for epoch in range(2):
        for batch in BATCHES:
            step(model, optimizer, batch)
            states.append(copy.deepcopy(model.state_dict()))
            trace.record(batch, epoch=epoch)
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] /= 2
    return [*states, copy.deepcopy(model.state_dict())]


def assert_states_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("in_folder", [False, True])
def test_steps_are_what_training_was(model, tmp_path, in_folder):
    optimizer = sgd(model, lr=0.5, weight_decay=0.01)
    with TrainingTrace(model, optimizer, folder=tmp_path / "t" if in_folder else None) as trace:
        *states, last = train(model, trace, optimizer)
    traces = [trace, TrainingTrace(folder=tmp_path / "t")] if in_folder else [trace]
    for some in traces:
        assert len(some) == 6
        for number, (recorded, state) in enumerate(zip(some, states, strict=True)):
            assert set(recorded) == set(dict(recorded))
            assert len(recorded) == 6
            assert_states_equal(recorded["state_dict"], state)
            assert recorded["indices"] == BATCHES[number % 3].tolist()
            assert recorded["lr"] == (0.5 if number < 3 else 0.25)
            assert recorded["epoch"] == number // 3
            assert recorded["weight_decay"] == 0.01
            assert recorded["reduction"] == "mean"
        assert_states_equal(some.final, last)


def test_it_is_a_sequence(model):
    trace = TrainingTrace(model)
    for number in range(4):
        trace.record([number], lr=0.1 * number)
    assert trace[-1]["indices"] == [3]
    assert [found["indices"] for found in trace[1:3]] == [[1], [2]]
    with pytest.raises(IndexError):
        trace[4]
    assert "state_dict" in trace[0]
    with pytest.raises(KeyError):
        trace[0]["loss"]


@pytest.mark.parametrize("indices", [[4, 2], (4, 2), np.array([4, 2]), torch.tensor([4, 2])])
def test_kinds_of_indices(model, indices):
    trace = TrainingTrace(model, reduction="sum")
    trace.record(indices, lr=torch.tensor(0.5), epoch=3, weight_decay=0.1)
    assert Step.of(trace[0], "step 0") == Step([4, 2], 0.5, 3, 0.1, "sum")


def test_tensors_that_do_not_change_are_kept_once(model, tmp_path):
    optimizer = sgd(model, lr=0.5)
    trace = TrainingTrace(model, optimizer, folder=tmp_path)
    train(model, trace, optimizer)
    in_memory = TrainingTrace(model, optimizer)
    train(model, in_memory, optimizer)
    first, other = in_memory[0]["state_dict"], in_memory[4]["state_dict"]
    assert first["0.weight"] is other["0.weight"]
    assert first["2.weight"] is not other["2.weight"]
    sizes = [(tmp_path / f"step-{number}.safetensors").stat().st_size for number in range(6)]
    assert sizes[0] > max(sizes[1:])
    # a tensor that changes back is that of the first step
    with torch.no_grad():
        model.load_state_dict(first)
    in_memory.record([0])
    assert_states_equal(in_memory[6]["state_dict"], first)


def test_the_trace_does_not_change_with_the_model(model):
    trace = TrainingTrace(model)
    trace.record([0], lr=0.1)
    trace.finish()
    before = copy.deepcopy(trace.final)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_states_equal(trace.final, before)
    assert_states_equal(trace[0]["state_dict"], before)


def test_the_steps_are_checkpoints(model):
    optimizer = sgd(model, lr=0.5)
    with TrainingTrace(model, optimizer) as trace:
        train(model, trace, optimizer)
    by_hand = [{"state_dict": s["state_dict"], "learning_rate": s["lr"]} for s in trace]
    scores = [
        TracInCP(model, TensorDataset(X, Y), some, loss_fn=nn.CrossEntropyLoss()).influence((X, Y))
        for some in (trace, by_hand)
    ]
    assert_close(scores[0], scores[1])


def test_a_folder_may_be_gone_on_with(model, tmp_path):
    model[1].eval()
    optimizer = sgd(model, lr=0.5)
    start = copy.deepcopy(model.state_dict())
    whole = TrainingTrace(model, optimizer)
    states = train(model, whole, optimizer)
    whole.finish()
    # the same run, broken off after five steps, and taken up again at its fourth
    model.load_state_dict(start)
    optimizer = sgd(model, lr=0.5)
    trace = TrainingTrace(model, optimizer, folder=tmp_path)
    train(model, trace, optimizer)
    trace.finish()
    (tmp_path / "step-5.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"holds a trace of 5 steps: .* `resume_at`"):
        TrainingTrace(model, optimizer, folder=tmp_path)
    model.load_state_dict(states[3])
    optimizer = sgd(model, lr=0.25)
    with TrainingTrace(model, optimizer, folder=tmp_path, resume_at=3) as trace:
        assert len(trace) == 3
        with pytest.raises(InvalidArgumentError, match="no weights after its last step"):
            _ = trace.final
        for batch in BATCHES:
            step(model, optimizer, batch)
            trace.record(batch, epoch=1)
            optimizer.step()
    for found, expected in zip(TrainingTrace(folder=tmp_path), whole, strict=True):
        assert_states_equal(found["state_dict"], expected["state_dict"])
        facts = [{k: v for k, v in one.items() if k != "state_dict"} for one in (found, expected)]
        assert facts[0] == facts[1]
    assert_states_equal(trace.final, whole.final)
    # from the start
    assert len(TrainingTrace(model, folder=tmp_path, resume_at=0)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_is_final(model, tmp_path):
    for folder in (None, tmp_path):
        trace = TrainingTrace(model, folder=folder)
        trace.record([0], lr=0.1)
        with pytest.raises(InvalidArgumentError, match=r"leave its `with` block or call `finish"):
            _ = trace.final
        with pytest.raises(RuntimeError, match="broken"), trace:
            raise RuntimeError("broken")
        with pytest.raises(InvalidArgumentError, match="no weights after its last step"):
            _ = trace.final
        trace.finish()
        assert_states_equal(trace.final, model.state_dict())
        # a step more, and they are final no longer
        trace.record([0], lr=0.1)
        with pytest.raises(InvalidArgumentError, match="no weights after its last step"):
            _ = trace.final


def test_the_given_numbers_come_first(model):
    groups = [{"params": model[2].parameters()}, {"params": model[5].parameters(), "lr": 0.5}]
    trace = TrainingTrace(model, torch.optim.SGD(groups, lr=0.1, weight_decay=0.2))
    trace.record([0], lr=0.3, weight_decay=0)
    assert (trace[0]["lr"], trace[0]["weight_decay"]) == (0.3, 0)


def test_parameter_groups_that_differ(model):
    """A list has the setting of each; DVEmb takes one number."""
    groups = [{"params": model[2].parameters()}, {"params": model[5].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.2)
    with TrainingTrace(model, optimizer) as trace:
        trace.record([0])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        trace.record([0], lr=0.3)
    assert trace[0]["lr"] == [0.1, 0.5]
    assert trace[1]["weight_decay"] == [0.0, 0.2]
    assert steps_of(trace, N, of_groups=True)[0] == Step([0], 0.1, None, 0.2)
    data, loss = TensorDataset(X, Y), nn.CrossEntropyLoss()
    with pytest.raises(InvalidArgumentError, match=r"have \[0.1, 0.5\]: pass `lr` to `record`"):
        DVEmb(model, data, trace=trace, loss_fn=loss)
    with pytest.raises(InvalidArgumentError, match=r"\[0.0, 0.2\]: pass `weight_decay` to `record"):
        steps_of(trace[1:], N)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), "the optimizer is AdamW"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "has momentum=0.9"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "has maximize=True"),
        (None, "gradients were clipped to 0.5"),
    ],
)
def test_steps_that_dvemb_takes_for_others(model, make, words):
    """What was recorded is exact; only DVEmb has a recursion of plain SGD."""
    make, clip = (make, None) if make else (lambda p: torch.optim.SGD(p, lr=0.1), 0.5)
    with TrainingTrace(model, make(list(model.parameters()))) as trace:
        trace.record([0], clip_norm=clip)
    assert trace[0]["lr"] == 0.1
    with pytest.warns(UserWarning, match=f"{words}: DVEmb treats the steps as plain SGD"):
        DVEmb(model, TensorDataset(X, Y), trace=trace, loss_fn=nn.CrossEntropyLoss())


def test_what_cannot_be_recorded(model, tmp_path):
    trace = TrainingTrace(model)
    with pytest.raises(InvalidArgumentError, match="no learning rate: pass `lr`, or the optimizer"):
        trace.record([0])
    for indices in ([], [-1], [0.5], [True], [[0]], "first", 3, None):
        with pytest.raises(InvalidArgumentError, match="the indices of step 0 must be one or more"):
            trace.record(indices, lr=0.1)
    for lr, words in ((float("inf"), "finite"), ("much", "a number"), (True, "a number")):
        with pytest.raises(InvalidArgumentError, match=f"the lr of step 0 must be {words}"):
            trace.record([0], lr=lr)
    with pytest.raises(
        InvalidArgumentError, match="weight_decay of step 0 must be finite; got nan"
    ):
        trace.record([0], lr=0.1, weight_decay=float("nan"))
    with pytest.raises(InvalidArgumentError, match="the epoch of step 0 must be an int; got 'one'"):
        trace.record([0], lr=0.1, epoch="one")
    with pytest.raises(InvalidArgumentError, match='must be "mean" or "sum"; got \'max\''):
        TrainingTrace(model, reduction="max").record([0], lr=0.1)
    assert len(trace) == 0
    with pytest.raises(InvalidArgumentError, match="was opened for reading; pass the model"):
        TrainingTrace(folder=tmp_path).record([0], lr=0.1)


class Extra(nn.Linear):
    """A layer whose state is not all tensors."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_not_of_tensors():
    with pytest.raises(InvalidArgumentError, match="holds a dict under '_extra_state'"):
        TrainingTrace(Extra(2, 2)).record([0], lr=0.1)


@pytest.mark.parametrize("at", [-1, 3, True, "2"])
def test_where_to_resume(model, tmp_path, at):
    trace = TrainingTrace(model, folder=tmp_path)
    trace.record([0], lr=0.1)
    trace.record([1], lr=0.1)
    with pytest.raises(InvalidArgumentError, match=r"`resume_at` must be an int from 0 to 2"):
        TrainingTrace(model, folder=tmp_path, resume_at=at)
    with pytest.raises(InvalidArgumentError, match=r"`resume_at` must be an int from 0 to 0"):
        TrainingTrace(model, resume_at=1)


def test_a_damaged_folder(model, tmp_path: Path):
    with TrainingTrace(model, folder=tmp_path) as trace:
        for number in range(3):
            trace.record([number], lr=0.1)
    (tmp_path / "step-2.safetensors").write_bytes(b"nothing")
    found = TrainingTrace(folder=tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"step-2\.safetensors' cannot be read as a step"
    ):
        found[2]
    with pytest.raises(
        InvalidArgumentError, match=r"step-2\.safetensors' cannot be read as a step"
    ):
        trace._state(2)
    (tmp_path / "step-1.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"lacks step 1; it has 2 steps, .* them 2"):
        TrainingTrace(folder=tmp_path)


def test_steps_given_by_hand():
    assert steps_of([{"state_dict": {}, "indices": [1], "lr": 1}], 2) == [Step([1], 1.0)]
    for trace, words in (
        ([], "got a list without any"),
        ({"lr": 1}, "got a dict"),
        ("trace", "got a str"),
        ([7], "step 0 of the trace must be a dict with state_dict .* got a int"),
        ([{"indices": [0], "lr": 1}], r"got \['indices', 'lr'\]"),
        ([{"state_dict": {}, "indices": [1, 5], "lr": 1}], "used example 5, but .* has 2"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            steps_of(trace, 2)
