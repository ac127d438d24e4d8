"""The sum of learning rates of a checkpoint, against the rates that optimizers in the test applied.

The files have the form of those that Lightning, accelerate, transformers and plain loops write.
"""

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_learning_rates import (
    CLOSED,
    PER_EPOCH,
    STEPS,
    accelerate,
    factor_of,
    lambda_run,
    lightning,
    of,
    plain,
    plateau,
    run,
    save_plateau,
    trainer,
    weights,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim import lr_scheduler as s

from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate_sum import rate_sum

every_schedule = pytest.mark.parametrize("name", CLOSED)
CALLED_BY_EPOCH = [name for name in CLOSED if "Cyclic" not in name]


class Recorder:
    """Makes SGD that notes how far each of its steps goes along a steady gradient."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.gains: list[float] = []

    def __call__(self, parameters: Any, lr: float) -> SGD:
        optimizer = SGD(parameters, lr=lr, **self.options)
        optimizer.register_step_pre_hook(lambda o, *_: self.gains.append(self._gain(o)))
        return optimizer

    def _gain(self, optimizer: Any) -> float:
        group = optimizer.param_groups[0]
        return group["lr"] * (1 - group["dampening"]) / (1 - group["momentum"])

    def until(self, step: int) -> float:
        return math.fsum(self.gains[:step])


def check(paths, recorder, rel=1e-9):
    """Each checkpoint's own sum, whatever others there are."""
    assert len(paths) > 2
    for place, (step, path) in enumerate(paths.items()):
        for checkpoints, index in (([path], 0), (list(paths.values()), place)):
            found = rate_sum(checkpoints, index)
            assert found.value == pytest.approx(recorder.until(step), rel=rel), (step, found)
            assert found.steps == step


# Exact, by closed forms.


@every_schedule
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.8},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.2},
    ],
    ids=["plain", "momentum", "nesterov", "dampening"],
)
def test_schedulers_of_pytorch_are_summed_exactly(tmp_path, name, options):
    recorder = Recorder(**options)
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(CLOSED[name], save, recorder)
    check(paths, recorder)


def test_a_cycle_of_the_momentum_counts_at_each_step(tmp_path):
    for name, make in (
        ("one", lambda o: s.OneCycleLR(o, 0.1, 40, base_momentum=0.5, max_momentum=0.9)),
        ("saw", lambda o: s.CyclicLR(o, 0.01, 0.1, 4, 7, base_momentum=0.5, max_momentum=0.9)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        recorder = Recorder(momentum=0.9)
        save, paths = plain(folder, step=lambda step: step)
        run(make, save, recorder)
        check(paths, recorder)
        assert len({round(g, 9) for g in recorder.gains}) > 5


@pytest.mark.parametrize("name", CALLED_BY_EPOCH)
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_schedulers_that_are_called_once_an_epoch(tmp_path, name, before):
    recorder = Recorder(momentum=0.9)
    save, paths = plain(
        tmp_path, step=lambda step: step, epoch=lambda step: step // PER_EPOCH - 1 + before
    )
    run(CLOSED[name], save, recorder, each_epoch=True, before=before)
    check(paths, recorder)


def test_in_the_middle_of_an_epoch_the_sum_is_off_by_the_change_of_the_rate_at_most(tmp_path):
    recorder, paths = Recorder(), {}

    def save(step, optimizer, scheduler):
        if step % PER_EPOCH:
            paths[step] = tmp_path / f"{step}.pt"
            held = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save({"model": weights(), **held, "step": step}, paths[step])

    optimizer = recorder([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = s.ExponentialLR(optimizer, 0.8)
    for step in range(1, STEPS + 1):
        optimizer.step()
        if step % PER_EPOCH == 0:
            scheduler.step()
        save(step, optimizer, scheduler)
    for step, path in paths.items():
        change = 0.1 - optimizer.param_groups[0]["lr"]
        found = rate_sum([path], 0).value
        assert abs(found - recorder.until(step)) <= change * PER_EPOCH


@every_schedule
@pytest.mark.parametrize("each_epoch", [True, False], ids=["epoch", "step"])
def test_lightning(tmp_path, name, each_epoch):
    recorder = Recorder(momentum=0.9)
    save, paths = lightning(tmp_path, each_epoch)
    run(CLOSED[name], save, recorder, each_epoch=each_epoch)
    check(paths, recorder)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "SequentialLR", "ExponentialLR"])
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "registered"])
def test_accelerate(tmp_path, name, prepared):
    recorder = Recorder(momentum=0.9)
    save, paths = accelerate(tmp_path, prepared=prepared)
    run(CLOSED[name], save, recorder)
    check(paths, recorder)


def test_accelerate_calls_the_scheduler_once_for_each_process(tmp_path):
    recorder = Recorder()
    save, paths = accelerate(tmp_path, processes=3)
    run(CLOSED["ExponentialLR"], save, recorder, calls=3)
    check(paths, recorder)


@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "OneCycleLR", "SequentialLR"])
def test_a_trainer_with_a_scheduler_of_pytorch(tmp_path, name):
    recorder, paths = Recorder(momentum=0.9), {}

    def save(step, optimizer, scheduler):
        path = paths[step] = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        save_file(weights(), path / "model.safetensors")
        state = {"global_step": step, "max_steps": STEPS, "log_history": []}
        (path / "trainer_state.json").write_text(json.dumps(state))
        torch.save(scheduler.state_dict(), path / "scheduler.pt")
        torch.save(optimizer.state_dict(), path / "optimizer.pt")

    run(CLOSED[name], save, recorder)
    check(paths, recorder)


# From the rates that are known at some steps.


def with_sgd(paths, **options):
    """The folders, with the state of an optimizer."""
    state = SGD([nn.Parameter(torch.ones(1))], lr=0.1, **options).state_dict()
    for path in paths.values():
        torch.save(state, path / "optimizer.pt")
    return paths


@pytest.mark.parametrize(
    "name",
    ["linear", "linear with warmup", "cosine", "cosine with warmup", "constant with warmup"],
)
@pytest.mark.parametrize("logs", [1, 7])
def test_the_schedules_of_transformers_are_recognised(tmp_path, name, logs):
    applied, states = lambda_run(factor_of(name))
    paths = with_sgd(trainer(tmp_path, applied, states, logs=logs), momentum=0.75)
    for step, path in paths.items():
        found = rate_sum([path], 0)
        expected = math.fsum(applied[t] for t in range(1, step + 1)) * 4
        # a folder alone may not show the warmup
        assert found.value == pytest.approx(expected, rel=1e-9 if step > 20 else 0.2), step
        assert found.steps == step


def test_a_schedule_that_is_not_recognised_is_a_line_between_its_logs(tmp_path):
    applied, states = lambda_run(lambda step: 1 / math.sqrt(1 + step / 10))
    path = with_sgd(trainer(tmp_path, applied, states, every=60, logs=5))[60]
    found = rate_sum([path], 0)
    # update 1 to 5 constant; then lines, of which each takes its later end
    lines = [
        applied[a] + (applied[a + 5] - applied[a]) * k / 5
        for a in range(5, 60, 5)
        for k in range(1, 6)
    ]
    assert found.value == pytest.approx(5 * applied[5] + math.fsum(lines), rel=1e-9)
    assert found.value == pytest.approx(math.fsum(applied[t] for t in range(1, 61)), rel=0.03)
    assert found.source == "interpolated between the rates known at 12 of 60 steps"


def test_logs_of_the_next_step_are_near(tmp_path):
    applied, states = lambda_run(factor_of("linear"))
    paths = with_sgd(trainer(tmp_path, applied, states, logs=5, late=True, version="4.40.1"))
    for place, step in enumerate(paths):
        expected = math.fsum(applied[t] for t in range(1, step + 1))
        found = rate_sum(list(paths.values()), place).value
        assert found == pytest.approx(expected, rel=0.05)


def test_a_long_run_is_summed_by_lines_alone(tmp_path):
    total = 6000
    applied, states = lambda_run(factor_of("cosine with warmup", total), total)
    path = with_sgd(trainer(tmp_path, applied, states, every=total, logs=50, total=total))[total]
    expected = math.fsum(applied[t] for t in range(1, total + 1))
    assert rate_sum([path], 0).value == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_functions_of_the_users_are_recognised_beside_other_checkpoints(tmp_path, kind):
    recorder = Recorder(momentum=0.5)
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(of(kind, warmup=6), save, recorder)
    for place, step in enumerate(paths):
        found = rate_sum(list(paths.values()), place)
        assert found.value == pytest.approx(recorder.until(step), rel=1e-9), step


def stored(rate, step, **more):
    return {"state_dict": weights(), "learning_rate": rate, "step": step, **more}


def test_stored_rates_are_integrated_by_the_trapezoid_rule():
    run = [stored(0.4, 100), stored(0.2, 300), stored(0.0, 700)]
    # constant until the first, then lines; steps are whole, so that each line takes its later end
    first, second, third = 0.4 * 100, 0.3 * 200 - 0.1, 0.1 * 400 - 0.1
    sums = [rate_sum(run, place).value for place in range(3)]
    assert sums == pytest.approx([first, first + second, first + second + third], rel=1e-12)
    # the order is that of the steps
    assert rate_sum(run[::-1], 0).value == pytest.approx(sums[2], rel=1e-12)


def test_one_stored_rate_counts_for_all_steps():
    assert rate_sum([stored(0.1, 50)], 0).value == pytest.approx(5.0, rel=1e-12)
    assert rate_sum([stored(0.1, 1)], 0).value == pytest.approx(0.1, rel=1e-12)
    assert rate_sum([stored(0.1, 50, momentum=0.9)], 0).value == pytest.approx(50.0, rel=1e-12)
    bare = {**weights(), "lr": torch.tensor(0.5, dtype=torch.float64), "global_step": 8}
    assert rate_sum([bare], 0).value == pytest.approx(4.0, rel=1e-12)


def test_weights_of_these_names_are_weights():
    one = {"state_dict": weights(), "learning_rate": 0.1, "step": 10, "momentum": torch.ones(3)}
    assert rate_sum([one], 0).value == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_with_a_stored_rate(tmp_path, suffix):
    paths = []
    for step, rate in ((10, 0.3), (20, 0.1)):
        path = tmp_path / f"{step}.{suffix}"
        if suffix == "pt":
            torch.save(stored(rate, step, momentum=0.5), path)
        else:
            named = {"learning_rate": str(rate), "step": str(step), "momentum": "0.5", "by": "me"}
            save_file(weights(), path, metadata=named)
        paths.append(str(path))
    assert rate_sum(paths, 0).value == pytest.approx(6.0, rel=1e-9)
    assert rate_sum(paths, 1).value == pytest.approx(6.0 + (0.2 * 10 - 0.1) * 2, rel=1e-9)


def test_an_optimizer_without_a_scheduler_has_one_rate_and_its_momentum():
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.2, momentum=0.75)
    one = {"model": weights(), "optimizer": optimizer.state_dict(), "step": 10}
    assert rate_sum([one], 0).value == pytest.approx(8.0, rel=1e-12)
    # a stored momentum counts first, and a rate that the loop has changed is known at both steps
    other = {**one, "step": 20, "learning_rate": 0.1, "momentum": 0.5}
    assert rate_sum([one, other], 1).value == pytest.approx((2 + 0.15 * 10 - 0.05) * 2, rel=1e-12)


def test_a_plateau_is_a_line_between_the_checkpoints(tmp_path):
    recorder = Recorder()
    write, paths = save_plateau(tmp_path)
    run(plateau(patience=1), write, recorder, each_epoch=True)
    items = []
    for step, path in paths.items():
        items.append({**torch.load(path), "step": step})
    for place, step in enumerate(paths):
        if place:
            found = rate_sum(items, place).value
            assert found == pytest.approx(recorder.until(step), rel=0.2)


# What is refused.


def refuses(match, checkpoints, index=0):
    with pytest.raises(InvalidArgumentError, match=match):
        rate_sum(checkpoints, index)


STEPS_LACK = r"lacks the number of optimizer steps \(epochs are not enough: .*\)"
BOTH_LACK = r"lacks a learning rate and the number of optimizer steps"


@pytest.mark.parametrize(
    ("checkpoint", "match"),
    [
        ({"learning_rate": 0.1, "epoch": 3}, STEPS_LACK + "; it holds learning_rate, epoch. Store"),
        ({"state_dict": {}, "step": 3}, r"it lacks a learning rate; it holds step\. Store 'learn"),
        (
            weights(),
            BOTH_LACK + r" .*; it holds nothing of the kind\. Store 'learning_rate' \(that",
        ),
        (object(), BOTH_LACK),
        ("no such file.pt", BOTH_LACK),
        ("no such file.safetensors", BOTH_LACK),
        (stored(0.1, 0), "saved after 0 steps"),
        (
            stored(0.0, 5),
            r"rates of its 5 steps add up to 0 \(interpolated between the rates",
        ),
        (
            stored(0.1, 5, momentum=1.0),
            "`momentum` must be a number that is not negative and below 1",
        ),
        (stored("fast", 5), "'learning_rate' is 'fast'; it must be the learning rate, one number"),
    ],
)
def test_what_is_missing_is_said(checkpoint, match):
    refuses(match, [checkpoint])


@pytest.mark.parametrize("optimizer", [Adam, AdamW])
def test_adam_is_refused_with_its_reason(tmp_path, optimizer):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(CLOSED["StepLR"], save, optimizer)
    refuses(r"Adam, AdamW or similar .* divides each entry of the gradient", [paths[8]])
    # what is stored beside it makes no other optimizer of it
    saved = torch.load(paths[8], weights_only=False)
    refuses("is Adam", [{**saved, "learning_rate": 0.1}])


def test_other_optimizers_are_refused(tmp_path):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(CLOSED["StepLR"], save, partial(RMSprop, momentum=0.5))
    refuses(r"is not torch.optim.SGD, .* \(its settings are \['alpha'", [paths[8]])


def test_an_optimizer_that_was_not_saved_may_be_any(tmp_path):
    applied, states = lambda_run(factor_of("linear"))
    path = trainer(tmp_path, applied, states)[10]
    refuses(r"lacks the state of its optimizer, .* it holds trainer_state.json, scheduler", [path])


def test_several_optimizers_are_refused():
    state = SGD([nn.Parameter(torch.ones(1))], lr=0.2).state_dict()
    one = {"state_dict": weights(), "optimizer_states": [state, state], "global_step": 4}
    refuses("holds 2 optimizers", [one])


def test_groups_of_several_rates_need_one_that_is_stored():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], lr=0.1)
    scheduler = s.StepLR(optimizer, 3)
    held = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "step": 1}
    refuses("several learning rates", [{"model": weights(), **held}])
    held = {"optimizer": optimizer.state_dict(), "step": 4}
    del held["optimizer"]["param_groups"][0]["initial_lr"]
    del held["optimizer"]["param_groups"][1]["initial_lr"]
    one = {"model": weights(), **held, "learning_rate": 0.3}
    assert rate_sum([one], 0).value == pytest.approx(1.2)


def test_groups_of_several_momenta_need_one_that_is_stored():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "momentum": 0.5}, {"params": parameters[1:]}]
    state = SGD(groups, lr=0.1).state_dict()
    one = {"model": weights(), "optimizer": state, "step": 10}
    refuses(r"have momentum \[0.0, 0.5\] and dampening \[0.0\]; store one 'momentum'", [one])
    assert rate_sum([{**one, "momentum": 0.5}], 0).value == pytest.approx(2.0)


def test_a_schedule_that_cannot_be_told_from_one_rate_is_refused(tmp_path):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(lambda o: s.LambdaLR(o, lambda step: 1 / (1 + step)), save, steps=4)
    refuses(r"a scheduler \(LambdaLR\) changed its learning rate, .* Pass several", [paths[4]])
    saved = torch.load(paths[4])
    del saved["scheduler_state_dict"]
    refuses(r"a scheduler \(which was not saved\) changed its learning rate", [saved])


def test_a_momentum_that_a_function_scales_is_refused(tmp_path):
    options = {"scale_fn": lambda cycle: 0.5**cycle, "base_momentum": 0.5}
    save, paths = plain(tmp_path, step=lambda step: step)
    run(lambda o: s.CyclicLR(o, 0.01, 0.1, 2, **options), save)
    refuses(r"\(CyclicLR\) changed its learning rate and momentum", list(paths.values()), 3)


def test_checkpoints_of_several_runs_are_refused():
    runs = [stored(0.1, 10), stored(0.2, 10)]
    refuses("rates 0.1 and 0.2 in the same step 10, so they are not of one run", runs)
