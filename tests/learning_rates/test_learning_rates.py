"""The learning rate that was applied, against the rates of a training loop that notes each one.

The files have the form of those that Lightning, accelerate, transformers and plain loops write.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as s

from influence_kit import checkpoint_table, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.errors import InvalidArgumentError

PER_EPOCH, STEPS = 5, 30


def warm(kind, step, warmup=0, total=STEPS, cycles=1, least=0.0):
    """The factors of transformers' schedules, written out."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (total - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        decay = max(0.0, 1 - done)
    else:
        decay = 0.0 if done >= 1 else (1 + math.cos(math.pi * ((cycles * done) % 1))) / 2
    return least + (1 - least) * decay


def of(kind, **options):
    """A schedule whose state has no formula."""
    return lambda o: s.LambdaLR(o, lambda step: warm(kind, step, **options))


CLOSED = {
    "StepLR": lambda o: s.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [2, 4, 4, 11], 0.5),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.3, 5),
    "LinearLR": lambda o: s.LinearLR(o, 0.1, 1, 8),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 40, 2.0),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, STEPS, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 5, 2),
    "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, 40),
    "OneCycleLR, linear": lambda o: s.OneCycleLR(
        o, 0.1, 40, anneal_strategy="linear", three_phase=True
    ),
    "CyclicLR": lambda o: s.CyclicLR(o, 0.01, 0.1, 4, 7, cycle_momentum=False),
    "CyclicLR, halved": lambda o: s.CyclicLR(
        o, 0.01, 0.1, 4, mode="triangular2", cycle_momentum=False
    ),
    "CyclicLR, exp": lambda o: s.CyclicLR(
        o, 0.01, 0.1, 4, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "SequentialLR": lambda o: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, 1, 3), s.CosineAnnealingLR(o, 27)], [3]
    ),
    "ChainedScheduler": lambda o: s.ChainedScheduler(
        [s.LinearLR(o, 0.1, 1, 3), s.ExponentialLR(o, 0.9)]
    ),
}


def run(make, save, optimizer=SGD, each_epoch=False, before=False, steps=STEPS, calls=1):
    """Train for some steps; ``save(step, optimizer, scheduler)`` each 4 steps, or each epoch.

    Returns the rate that was applied in each step, counted from 1.
    """
    chosen = optimizer([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler, applied = make(chosen), {}
    for step in range(1, steps + 1):
        chosen.param_groups[0]["params"][0].grad = torch.ones(2)
        applied[step] = chosen.param_groups[0]["lr"]
        chosen.step()
        at_end = step % PER_EPOCH == 0
        saves = at_end if each_epoch else step % 4 == 0
        if saves and before:
            save(step, chosen, scheduler)
        if at_end or not each_epoch:
            for _ in range(calls):
                scheduler.step()
        if saves and not before:
            save(step, chosen, scheduler)
    return applied


def weights() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(1, 2), "bias": torch.randn(1)}


def check(paths, applied, kind="applied"):
    """All rates are those applied, to 1e-9."""
    for step, path in paths.items():
        (row,) = checkpoint_table([path])
        assert row.learning_rate == pytest.approx(applied[step], rel=1e-9), (step, row)
        assert row.rate_kind == kind, (step, row)


# Plain files.


def plain(folder: Path, **more):
    """Writes files as PyTorch's tutorials do."""
    paths = {}

    def save(step, optimizer, scheduler):
        paths[step] = folder / f"step{step}.pt"
        saved = {
            "model_state_dict": weights(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            **{key: value(step) for key, value in more.items()},
        }
        torch.save(saved, paths[step])

    return save, paths


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("optimizer", [Adam, SGD])
def test_schedulers_of_pytorch_are_evaluated_one_step_back(tmp_path, name, optimizer):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    check(paths, run(CLOSED[name], save, optimizer))
    assert len(paths) == 7


@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "OneCycleLR", "ChainedScheduler"])
@pytest.mark.parametrize(
    ("before", "first"), [(False, 0), (True, 1)], ids=["from 0, after", "from 1, before"]
)
def test_schedulers_of_epochs_are_read_as_they_were_when_the_file_was_saved(
    tmp_path, name, before, first
):
    save, paths = plain(tmp_path, epoch=lambda step: step // PER_EPOCH - 1 + first)
    check(paths, run(CLOSED[name], save, each_epoch=True, before=before))


def test_in_the_middle_of_an_epoch_the_rate_is_the_current_one(tmp_path):
    save, paths = plain(tmp_path)

    def odd(step, optimizer, scheduler):
        if step == 14:
            save(step, optimizer, scheduler)

    chosen = Adam([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = s.ExponentialLR(chosen, 0.5)
    for step in range(1, 15):
        chosen.param_groups[0]["params"][0].grad = torch.ones(2)
        chosen.step()
        if step % 4 == 0:
            scheduler.step()
        odd(step, chosen, scheduler)
    check(paths, {14: 0.1 / 8})


def test_where_the_order_is_not_known_the_rate_is_an_estimate_with_a_warning(tmp_path):
    save, paths = plain(tmp_path)
    applied = run(CLOSED["ExponentialLR"], save, each_epoch=True)
    check(paths, applied, "estimated")
    match = r"before checkpoint '.*step5.pt' is not known and is estimated as 0.1 \(.*ExponentialLR"
    with pytest.warns(UserWarning, match=match):
        assert load_checkpoint(nn.Linear(2, 1), paths[5]) == 0.1


def test_two_schedulers_of_one_optimizer_multiply(tmp_path):
    paths = {}

    def make(optimizer):
        pair = [s.LinearLR(optimizer, 0.1, 1, 20), s.ExponentialLR(optimizer, 0.9)]
        chained = s.ChainedScheduler(pair)
        chained.pair = pair
        return chained

    def save(step, optimizer, scheduler):
        paths[step] = tmp_path / f"{step}.pt"
        states = [part.state_dict() for part in scheduler.pair]
        saved = {"model": weights(), "optimizer": optimizer.state_dict(), "scheduler": states}
        torch.save({**saved, "step": step}, paths[step])

    check(paths, run(make, save))


def test_an_optimizer_without_a_scheduler_has_its_rate_and_one_with_a_lost_one_an_estimate():
    group = {"lr": 0.1, "params": [0]}
    (row,) = checkpoint_table([{"model": weights(), "optimizer": {"param_groups": [group]}}])
    assert (row.learning_rate, row.rate_kind) == (0.1, "applied")
    group["initial_lr"] = 0.1  # which a scheduler leaves, here perhaps at the end of a warmup
    (row,) = checkpoint_table([{"model": weights(), "optimizer": {"param_groups": [group]}}])
    assert (row.learning_rate, row.rate_kind) == (0.1, "estimated")
    assert row.rate_source == "optimizer state 'optimizer': the rate of the next step"


def test_two_optimizers_with_different_rates_are_refused():
    states = [{"param_groups": [{"lr": rate}]} for rate in (0.1, 0.2)]
    match = r"several learning rates, \[0.1, 0.2\]; store the one to use"
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(nn.Linear(2, 1), {"state_dict": weights(), "optimizer_states": states})


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 6])
def test_a_schedule_without_a_formula_is_recognised_beside_other_checkpoints(
    tmp_path, kind, warmup
):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    applied = run(of(kind, warmup=warmup), save)
    # constant rates each 4 steps might be those of a cycle of 4 steps
    unsure = kind == "constant"
    for step, path in paths.items():
        (row,) = checkpoint_table([path])
        if not unsure or row.rate_kind == "applied":
            assert row.rate_kind == "applied"
            assert row.learning_rate == pytest.approx(applied[step], rel=1e-9)


def test_a_schedule_without_a_formula_alone_is_of_the_next_step(tmp_path):
    save, paths = plain(tmp_path, global_step=lambda step: step)
    run(lambda o: s.LambdaLR(o, lambda step: 1 / (1 + step)), save, steps=4)
    (row,) = checkpoint_table([paths[4]])
    assert (row.rate_kind, row.learning_rate) == ("estimated", pytest.approx(0.1 / 5))
    assert row.rate_source.endswith("the rate of the next step")


def never_silently_wrong(paths, applied):
    """Rates that are called applied are."""
    rows = {step: checkpoint_table([path])[0] for step, path in paths.items()}
    wrong = [
        step for step, row in rows.items() if row.learning_rate != pytest.approx(applied[step])
    ]
    assert [rows[step].rate_kind for step in wrong] == ["estimated"] * len(wrong)
    return wrong


def test_a_scale_function_of_the_users_does_not_show_at_the_lowest_rate(tmp_path):
    save, paths = plain(tmp_path, step=lambda step: step)
    options = {"scale_fn": lambda cycle: 0.5**cycle, "cycle_momentum": False}
    applied = run(lambda o: s.CyclicLR(o, 0.01, 0.1, 2, **options), save)
    assert never_silently_wrong(paths, applied)


@pytest.mark.parametrize("before", [True, False])
def test_an_epoch_of_two_updates_and_the_second_step_look_alike(tmp_path, before):
    save, paths = plain(tmp_path)
    chosen, applied = Adam([nn.Parameter(torch.ones(2))], lr=0.1), {}
    scheduler = s.ExponentialLR(chosen, 0.5)
    for step in (1, 2):
        chosen.param_groups[0]["params"][0].grad = torch.ones(2)
        applied[step] = chosen.param_groups[0]["lr"]
        chosen.step()
        if before and step == 1:
            scheduler.step()
    if not before:
        scheduler.step()
    save(2, chosen, scheduler)
    never_silently_wrong(paths, applied)


def plateau(**options):
    """ReduceLROnPlateau that never sees a better metric."""

    def make(optimizer):
        scheduler = s.ReduceLROnPlateau(optimizer, factor=0.5, threshold=1, **options)
        scheduler.step = partial(scheduler.step, 1.0)
        return scheduler

    return make


def save_plateau(folder):
    paths = {}

    def save(step, optimizer, scheduler):
        state = {key: v for key, v in scheduler.state_dict().items() if key != "step"}
        held = {"model": weights(), "optimizer": optimizer.state_dict(), "scheduler": state}
        paths[step] = folder / f"{step}.pt"
        torch.save({**held, "epoch": step // PER_EPOCH - 1}, paths[step])

    return save, paths


def test_a_plateau_that_reduced_the_rate_is_known_by_the_checkpoint_before(tmp_path):
    save, paths = save_plateau(tmp_path)
    applied = run(plateau(patience=1), save, each_epoch=True)
    first = paths.pop(PER_EPOCH)
    check(paths, applied)
    (row,) = checkpoint_table([first])  # nothing came before it
    assert row.learning_rate == 0.1


# Lightning.


def lightning(folder: Path, each_epoch: bool, loops: bool = True):
    """Writes files as Lightning's ModelCheckpoint does."""
    paths = {}

    def save(step, optimizer, scheduler):
        batch = (step - 1) % PER_EPOCH + 1
        calls = int(batch == PER_EPOCH) if each_epoch else batch
        total = {"ready": step, "completed": step}
        progress = {
            "epoch_loop.scheduler_progress": {"current": {"completed": calls}, "total": total},
            "epoch_loop.batch_progress": {
                "current": {"ready": batch},
                "is_last_batch": batch == PER_EPOCH,
            },
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": {"current": {"completed": batch}, "total": total}}
            },
        }
        paths[step] = folder / f"epoch={(step - 1) // PER_EPOCH}-step={step}.ckpt"
        saved = {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": weights(),
            "epoch": (step - 1) // PER_EPOCH,
            "global_step": step,
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
            **({"loops": {"fit_loop": progress}} if loops else {}),
        }
        torch.save(saved, paths[step])

    return save, paths


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("each_epoch", [True, False], ids=["epoch", "step"])
def test_the_applied_rate_of_lightning_is_not_that_of_the_next_step(tmp_path, name, each_epoch):
    save, paths = lightning(tmp_path, each_epoch)
    check(paths, run(CLOSED[name], save, each_epoch=each_epoch))


def test_lightning_in_the_middle_of_an_epoch_whose_frequency_is_open(tmp_path):
    # after batch 3 one step of the scheduler was taken: every 2 batches, or every 3
    write, paths = lightning(tmp_path, each_epoch=False)
    chosen, applied = Adam([nn.Parameter(torch.ones(2))], lr=0.1), {}
    scheduler = s.CosineAnnealingLR(chosen, 20)
    for step in (1, 2, 3):
        chosen.param_groups[0]["params"][0].grad = torch.ones(2)
        applied[step] = chosen.param_groups[0]["lr"]
        chosen.step()
        if step == 2:
            scheduler.step()
    write(3, chosen, scheduler)
    saved = torch.load(paths[3])
    progress = saved["loops"]["fit_loop"]
    progress["epoch_loop.scheduler_progress"]["current"]["completed"] = 1
    progress["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(saved, paths[3])
    never_silently_wrong(paths, applied)


def test_lightning_in_the_middle_of_an_epoch(tmp_path):
    save, paths = lightning(tmp_path, each_epoch=True)
    chosen = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = s.StepLR(chosen, 1)
    for step in range(1, 13):
        chosen.step()
        if step % PER_EPOCH == 0:
            scheduler.step()
        if step in (2, 5, 8):
            save(step, chosen, scheduler)
    check(paths, {2: 0.1, 5: 0.1, 8: 0.01})


def test_lightning_saves_before_it_steps_a_plateau(tmp_path):
    write, paths = lightning(tmp_path, each_epoch=True)

    def save(step, optimizer, scheduler):
        scheduler.__dict__.pop("step", None)  # the test's own
        write(step, optimizer, scheduler)
        scheduler.step = partial(s.ReduceLROnPlateau.step, scheduler, 1.0)

    check(paths, run(plateau(patience=0), save, each_epoch=True, before=True))


def test_lightning_without_its_loops(tmp_path):
    save, paths = lightning(tmp_path, each_epoch=True, loops=False)
    check(paths, run(CLOSED["ExponentialLR"], save, each_epoch=True))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_of_lightning_without_a_formula(tmp_path, kind):
    save, paths = lightning(tmp_path, each_epoch=False)
    check(paths, run(of(kind, warmup=6), save))


def test_lightning_with_weights_alone_has_a_warning():
    saved = {"pytorch-lightning_version": "2.6.6", "state_dict": weights(), "global_step": 3}
    match = r"checkpoint in memory holds no learning rate and is weighted by 1; scores in which"
    with pytest.warns(UserWarning, match=match):
        assert load_checkpoint(nn.Linear(2, 1), saved) == 1.0


# accelerate.


def accelerate(folder: Path, name="step_{step}", processes=1, prepared=True):
    """Writes folders as accelerate's ``save_state`` does."""
    paths = {}

    def save(step, optimizer, scheduler):
        path = paths[step] = folder / name.format(step=step, epoch=step // PER_EPOCH - 1)
        path.mkdir(parents=True)
        save_file(weights(), path / "model.safetensors")
        torch.save(optimizer.state_dict(), path / "optimizer.bin")
        file = "scheduler.bin" if prepared else "custom_checkpoint_0.pkl"
        torch.save(scheduler.state_dict(), path / file)
        for rank in range(processes):
            (path / f"random_states_{rank}.pkl").touch()

    return save, paths


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "SequentialLR", "ExponentialLR"])
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "registered"])
def test_the_applied_rate_of_accelerate(tmp_path, name, prepared):
    save, paths = accelerate(tmp_path, prepared=prepared)
    check(paths, run(CLOSED[name], save))


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_accelerate_steps_the_scheduler_once_for_each_process(tmp_path, optimizer):
    save, paths = accelerate(tmp_path, processes=3)
    check(paths, run(CLOSED["ExponentialLR"], save, optimizer, calls=3))


def test_schedulers_of_epochs_in_accelerate(tmp_path):
    save, paths = accelerate(tmp_path, "epoch_{epoch}")
    check(paths, run(lambda o: s.StepLR(o, 1), save, each_epoch=True))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_of_accelerate_without_a_formula(tmp_path, kind):
    save, paths = accelerate(tmp_path)
    check(paths, run(of(kind, warmup=6), save))


def test_a_training_folder_of_accelerate_is_its_checkpoints(tmp_path):
    save, paths = accelerate(tmp_path)
    applied = run(CLOSED["ExponentialLR"], save)
    save_file(weights(), tmp_path / "model.safetensors")  # the final model
    (tmp_path / "config.json").write_text("{}")
    rows = checkpoint_table(tmp_path)
    assert [row.step for row in rows] == list(paths)
    assert [row.learning_rate for row in rows] == pytest.approx([applied[s] for s in paths])


def test_a_folder_of_accelerate_without_an_optimizer_has_a_warning(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "random_states_0.pkl").touch()
    with pytest.warns(UserWarning, match=r"holds no learning rate and is weighted by 1"):
        load_checkpoint(nn.Linear(2, 1), tmp_path)


def test_nothing_of_a_file_beside_the_weights_is_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    folder = tmp_path / "step_1"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    for name in ("scheduler.bin", "optimizer.bin", "custom_checkpoint_0.pkl"):
        torch.save({"last_epoch": Touch(), "param_groups": []}, folder / name)
    load_checkpoint(nn.Linear(2, 1), folder)
    assert not (tmp_path / "touched").exists()


# Trainer.


def trainer(
    folder: Path,
    applied,
    following,
    every=10,
    logs=7,
    total=60,
    only=False,
    late=False,
    version="5",
):
    """Writes the folders of a run as transformers' Trainer does.

    ``applied`` are the rates by step, ``following`` the scheduler's states after each step;
    ``only`` is ``save_only_model``, and ``late`` logs the rate of the next step, as old versions.
    """
    paths = {}
    for step in range(every, total + 1, every):
        path = paths[step] = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        save_file(weights(), path / "model.safetensors")
        log = [
            {"step": at, "learning_rate": applied[at + late], "loss": 1.0}
            for at in range(logs, step + 1, logs)
        ]
        state = {"global_step": step, "max_steps": total, "log_history": log}
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / "config.json").write_text(json.dumps({"transformers_version": version}))
        if not only:
            torch.save(following[step], path / "scheduler.pt")
    return paths


def lambda_run(factor, total=60):
    """Applied rates, and the states of a ``LambdaLR``, by step."""
    states = {}
    applied = {step: 0.1 * factor(step - 1) for step in range(1, total + 2)}
    for step in range(1, total + 1):
        rate = 0.1 * factor(step)
        states[step] = {
            "base_lrs": [0.1],
            "last_epoch": step,
            "_step_count": step + 1,
            "_last_lr": [rate],
            "lr_lambdas": [None],
        }
    return applied, states


SCHEDULES = {
    "linear": {"kind": "linear"},
    "linear with warmup": {"kind": "linear", "warmup": 13},
    "warmup to the end": {"kind": "linear", "warmup": 59},
    "linear to a least rate": {"kind": "linear", "warmup": 3, "least": 0.2},
    "cosine": {"kind": "cosine"},
    "cosine with warmup": {"kind": "cosine", "warmup": 13},
    "cosine to a least rate": {"kind": "cosine", "warmup": 13, "least": 0.1},
    "cosine with restarts": {"kind": "cosine", "warmup": 5, "cycles": 2},
    "constant": {"kind": "constant"},
    "constant with warmup": {"kind": "constant", "warmup": 13},
}


def factor_of(name, total=60):
    options = {"total": total, **SCHEDULES[name]}
    kind = options.pop("kind")
    return lambda step: warm(kind, step, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_logs_that_do_not_fall_on_the_saved_steps(tmp_path, name):
    applied, states = lambda_run(factor_of(name))
    check(trainer(tmp_path, applied, states), applied)


@pytest.mark.parametrize("name", SCHEDULES)
def test_logs_of_each_step_and_of_each_saved_step(tmp_path, name):
    applied, states = lambda_run(factor_of(name))
    for logs in (1, 5):
        check(trainer(tmp_path / str(logs), applied, states, logs=logs), applied)


@pytest.mark.parametrize(
    "name",
    ["linear", "linear with warmup", "warmup to the end", "cosine", "cosine with warmup"],
)
def test_without_a_log_before_the_save_other_checkpoints_tell(tmp_path, name):
    applied, states = lambda_run(factor_of(name))
    check(trainer(tmp_path, applied, states, logs=1000), applied)


@pytest.mark.parametrize("name", ["linear", "linear with warmup", "cosine with warmup", "constant"])
def test_with_the_model_alone_later_logs_count(tmp_path, name):
    applied, states = lambda_run(factor_of(name))
    paths = trainer(tmp_path, applied, states, only=True)
    check(paths, applied)


def test_the_logs_of_another_run_do_not_count(tmp_path):
    applied, states = lambda_run(factor_of("linear"))
    paths = trainer(tmp_path, applied, states, every=10, logs=4, only=True)
    later = paths[60] / "trainer_state.json"
    state = json.loads(later.read_text())
    for entry in state["log_history"]:
        entry["learning_rate"] *= 3
    later.write_text(json.dumps(state))
    (row,) = checkpoint_table([paths[10]])
    assert row.rate_kind == "estimated"
    assert row.learning_rate == applied[8]
    assert row.rate_source == "the rate of step 8, the nearest known"


@pytest.mark.parametrize("name", ["linear", "cosine with warmup", "linear with warmup"])
@pytest.mark.parametrize("version", ["4.40.1", ""], ids=["by version", "by its values"])
@pytest.mark.parametrize("logs", [1, 5, 7])
def test_old_logs_hold_the_rate_of_the_next_step(tmp_path, name, version, logs):
    applied, states = lambda_run(factor_of(name))
    check(trainer(tmp_path, applied, states, logs=logs, late=True, version=version), applied)


@pytest.mark.parametrize("only", [True, False])
def test_a_log_of_the_step_before_is_not_taken_for_one_of_this_step(tmp_path, only):
    # without a version nothing tells which rate a log holds
    applied, states = lambda_run(lambda step: 1 / math.sqrt(1 + step))
    paths = trainer(tmp_path, applied, states, every=6, logs=5, only=only, version="")
    assert 6 in never_silently_wrong(paths, applied)


def test_a_schedule_that_is_not_recognised_is_interpolated_with_one_warning(tmp_path):
    applied, states = lambda_run(lambda step: 1 / math.sqrt(1 + step))
    path = trainer(tmp_path, applied, states)[10]
    (row,) = checkpoint_table([path])
    expected = applied[7] + (applied[11] - applied[7]) * 3 / 4
    assert (row.rate_kind, row.learning_rate) == ("estimated", pytest.approx(expected))
    assert row.rate_source == "interpolated between the rates of steps 7 and 11"
    loader = CheckpointLoader(nn.Linear(2, 1), [str(path), weights()], load_checkpoint)
    match = r"'.*checkpoint-10' is not known and is estimated as 0.0\d+ \(interpolated between"
    with pytest.warns(UserWarning, match=match) as caught:
        rates = [loader.load(place) for place in (0, 1, 0, 1)]
    assert len(caught) == 1
    assert rates == [row.learning_rate, 1.0] * 2


def test_a_cycle_that_ends_with_each_checkpoint_is_not_taken_for_a_constant_rate(tmp_path):
    applied, states = lambda_run(lambda step: 1 - step % 10 / 10)
    paths = trainer(tmp_path, applied, states, logs=1000)
    assert {row.rate_kind for row in checkpoint_table(list(map(str, paths.values())))} == {
        "estimated"
    }


def test_three_rates_symmetric_on_a_curve_are_not_taken_for_a_line(tmp_path):
    # unlike any schedule that is recognised, but odd around step 31
    applied, states = lambda_run(lambda step: 0.5 - math.sin((step - 30) / 25) ** 3 / 2)
    paths = trainer(tmp_path, applied, states, logs=1000)
    for step in (10, 50, 60):
        paths[step].joinpath("scheduler.pt").unlink()
    rows = checkpoint_table([str(paths[30]), str(paths[40])])
    assert [row.rate_kind for row in rows] == ["estimated", "estimated"]


def test_a_model_saved_alone_without_a_log_counts_with_rate_1_and_a_warning(tmp_path):
    applied, states = lambda_run(factor_of("linear"))
    path = trainer(tmp_path, applied, states, only=True, logs=1000)[10]
    match = r"checkpoint '.*checkpoint-10' holds no learning rate and is weighted by 1; scores"
    with pytest.warns(UserWarning, match=match):
        assert load_checkpoint(nn.Linear(2, 1), path) == 1.0
    (row,) = checkpoint_table([path])
    assert (row.rate_kind, row.rate_source) == ("none", "none found: 1")


def test_a_log_of_the_saved_step_counts_before_an_optimizer_without_a_scheduler(tmp_path):
    applied, states = lambda_run(factor_of("linear"))
    path = trainer(tmp_path, applied, states, only=True, logs=10)[10]
    torch.save({"param_groups": [{"lr": applied[11]}], "state": {}}, path / "optimizer.pt")
    check({10: path}, applied)


@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "OneCycleLR", "SequentialLR"])
def test_a_trainer_with_a_scheduler_of_pytorch(tmp_path, name):
    paths = {}

    def save(step, optimizer, scheduler):
        path = paths[step] = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        save_file(weights(), path / "model.safetensors")
        state = {"global_step": step, "max_steps": STEPS, "log_history": []}
        (path / "trainer_state.json").write_text(json.dumps(state))
        torch.save(scheduler.state_dict(), path / "scheduler.pt")
        torch.save(optimizer.state_dict(), path / "optimizer.pt")

    check(paths, run(CLOSED[name], save))


def test_a_trainer_with_a_plateau_is_known_by_its_logs_and_evaluations(tmp_path):
    state = plateau(patience=0)(SGD([nn.Parameter(torch.ones(1))], lr=0.1)).state_dict()
    held = {key: value for key, value in state.items() if key != "step"}
    held |= {"last_epoch": 2, "_last_lr": [0.025], "num_bad_epochs": 0}
    log = [
        {"step": 7, "learning_rate": 0.1},
        {"step": 10, "eval_loss": 1.0},
        {"step": 14, "learning_rate": 0.05},
        {"step": 20, "eval_loss": 1.0},
    ]
    path = tmp_path / "checkpoint-20"
    path.mkdir()
    save_file(weights(), path / "model.safetensors")
    history = {"global_step": 20, "max_steps": 60, "log_history": log}
    (path / "trainer_state.json").write_text(json.dumps(history))
    torch.save(held, path / "scheduler.pt")
    check({20: path}, {20: 0.05})
