"""Ctrl-C at any moment leaves the model as it was, and is never lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import TracInCP
from influence_kit.preservation.interrupts import to_its_end, uninterrupted
from influence_kit.preservation.restore import borrowed

POINTS = 60  # moments per case
torch.manual_seed(1)
X, Y = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])


@pytest.fixture(autouse=True)
def _usual_handler():
    """A shell ignores SIGINT in jobs in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


class Merging(nn.Linear):
    """A layer whose ``eval()`` changes its weight."""

    def train(self, mode=True):
        if mode != self.training:
            with torch.no_grad():
                self.weight.mul_(2.0 if mode else 0.5)
        return super().train(mode)


def changed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in model.state_dict().items()}


def borrow(model: nn.Module) -> None:
    with borrowed(model, probe=partial(model, X)) as inside:
        inside.load(partial(model.load_state_dict, changed(model)))
        model(X)


def score(model: nn.Module) -> None:
    one, loss = changed(model), nn.CrossEntropyLoss(reduction="none")
    TracInCP(model, TensorDataset(X, Y), [one], loss_fn=loss, batch_size=2).influence((X, Y))


class Moments:
    """Sends SIGINT at the i-th moment at which Python looks for signals."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self._at = 0, at

    def __call__(self, frame, event, argument) -> None:
        if event in ("call", "c_return"):
            self.count += 1
            if self.count == self._at:
                signal.raise_signal(signal.SIGINT)

    def during(self, action, model) -> bool:
        """Whether an action was interrupted, or the code after it."""
        sys.setprofile(self)
        try:
            action(model)
            sys.setprofile(None)
            if self._at is not None:
                time.sleep(0.2)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False


def plain(last: type[nn.Linear] = nn.Linear) -> nn.Module:
    """A model in both modes, with a frozen parameter and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), last(4, 2)).double()
    model(X).sum().backward()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


@pytest.fixture(params=[nn.Linear, Merging], ids=["plain", "merging"])
def model(request) -> nn.Module:
    return plain(request.param)


@pytest.mark.parametrize("action", [borrow, score])
@pytest.mark.filterwarnings("ignore:layers of the model change weights in eval")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(model, action, unchanged):
    action(model)
    whole, before = Moments(), signal.getsignal(signal.SIGINT)
    whole.during(action, model)
    spread = torch.linspace(1, whole.count - 50, POINTS).long().tolist()
    arrived = []
    for place in [*spread, *range(whole.count - 50, whole.count - 5)]:
        with unchanged(model):
            arrived.append(Moments(place).during(action, model))
        assert signal.getsignal(signal.SIGINT) is before
    # Python itself drops what is raised while it collects a generator
    assert sum(arrived) >= 0.95 * len(arrived)


def test_hooks_of_the_package_that_an_interrupt_left_are_removed(model, unchanged):
    def own(*args):
        return None

    with unchanged(model), borrowed(model):
        model[0].register_forward_hook(partial(to_its_end))
        model[3].register_forward_pre_hook(to_its_end, with_kwargs=True)
    with borrowed(model):
        handle = model[0].register_forward_hook(own)  # as the forward of a model may
    assert list(model[0]._forward_hooks.values()) == [own]
    handle.remove()


@pytest.mark.parametrize("at", range(1, 8))
def test_an_interrupt_raised_without_a_signal_does_not_stop_the_restoration(
    model, unchanged, monkeypatch, at
):
    original, calls = torch.Tensor.copy_, []

    def copy_(tensor, *args, **kwargs):
        calls.append(tensor)
        if len(calls) == at:
            raise KeyboardInterrupt("at once")
        return original(tensor, *args, **kwargs)

    def use():
        with borrowed(model), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
            monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    with unchanged(model), pytest.raises(KeyboardInterrupt, match="at once"):
        use()
    assert len(calls) >= at


class Impatient(nn.Dropout):
    """Ctrl-C is pressed three times while the layer is brought back into its mode."""

    armed = False

    def train(self, mode=True):
        for _ in range(3 * self.armed):
            signal.raise_signal(signal.SIGINT)
        return super().train(mode)


def test_every_interrupt_during_a_restoration_is_delivered_after_it(model):
    model[3] = Merging(4, 2).double()
    model.append(Impatient())
    start, seen = model[3].weight.detach().clone(), []

    def handler(number, frame):
        seen.append(torch.equal(model[3].weight, start))

    old = signal.signal(signal.SIGINT, handler)
    try:
        with borrowed(model):
            model[4].armed = True
            model[3].weight.data.add_(1)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen
    assert all(seen)
    assert len(seen) % 3 == 0


def test_the_last_of_several_errors_of_a_handler_is_raised_with_the_others_behind_it():
    raised = iter("ab")

    def handler(number, frame):
        raise KeyboardInterrupt(next(raised))

    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    old = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="b") as caught:
            uninterrupted(press_twice)()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, old)
    assert str(caught.value.__context__) == "a"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_that_is_no_function_is_left_alone(model, unchanged, handler):
    old = signal.signal(signal.SIGINT, handler)
    try:
        with unchanged(model), borrowed(model):
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_handler_that_was_set_inside_stays(model):
    def own(number, frame):
        pass

    old = signal.getsignal(signal.SIGINT)
    try:
        with borrowed(model):
            signal.signal(signal.SIGINT, own)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, old)


def test_other_threads_install_no_handler(model, unchanged):
    before, seen = signal.getsignal(signal.SIGINT), []

    def use():
        with borrowed(model):
            seen.append(signal.getsignal(signal.SIGINT))

    with unchanged(model):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert seen == [before]


def test_a_function_that_is_interrupted_too_often_ends():
    calls = []

    def never():
        calls.append(1)
        raise KeyboardInterrupt("again")

    with pytest.raises(KeyboardInterrupt, match="again"):
        to_its_end(never)
    assert len(calls) == 100


LOOP = """
import os, random, signal, sys, threading, time
import test_interrupts as t
signal.signal(signal.SIGINT, signal.default_int_handler)
t.torch.set_num_threads(1)
model, draw, arrived = t.plain(), random.Random(0), 0
t.score(model)
start = {key: value.clone() for key, value in model.state_dict().items()}
for number in range(int(sys.argv[1])):
    press = threading.Timer(draw.uniform(0, 0.04), os.kill, (os.getpid(), signal.SIGINT))
    try:
        press.start()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            t.score(model)
    except KeyboardInterrupt:
        arrived += 1
    for key, value in model.state_dict().items():
        assert t.torch.equal(value, start[key]), (number, key)
print(arrived)
"""


def test_real_signals_at_random_moments_leave_the_model_as_it_was():
    done = subprocess.run(
        [sys.executable, "-c", LOOP, "20"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert int(done.stdout) >= 18
