"""A few checkpoints of many: evenly over the steps of a run, the last among them."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import GradDot, checkpoint_table, select_checkpoints
from influence_kit.errors import InvalidArgumentError

EVERY_TEN_THEN_EVERY_THOUSAND = [*range(10, 101, 10), *range(1000, 10001, 1000)]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def in_memory(steps, key="step"):
    return [{"state_dict": {}, key: step} for step in steps]


def chosen(steps, count, key="step"):
    return [checkpoint[key] for checkpoint in select_checkpoints(in_memory(steps, key), count)]


def files(folder: Path, *names: str, **held) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}, **held}, path)
    return folder


def names(found) -> list[str]:
    return [Path(path).name for path in found]


def trainer_folder(path: Path, state=None, weights: str = "model.safetensors") -> Path:
    """A checkpoint folder whose weights are not looked at."""
    path.mkdir(parents=True)
    (path / weights).write_bytes(b"no weights")
    if state is not None:
        (path / "trainer_state.json").write_text(json.dumps(state))
    return path


# Which steps.


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        (range(10, 1001, 10), 5, [200, 400, 600, 800, 1000]),
        (range(10, 1001, 10), 3, [330, 670, 1000]),
        (range(10, 1001, 10), 1, [1000]),
        (EVERY_TEN_THEN_EVERY_THOUSAND, 5, [2000, 4000, 6000, 8000, 10000]),
        # few late ones: the nearest of those that are there, none twice
        ([*range(10, 101, 10), 1000, 2000], 5, [80, 90, 100, 1000, 2000]),
        # what is left of a run whose early checkpoints were deleted
        (range(9600, 10001, 20), 5, [9660, 9740, 9840, 9920, 10000]),
        # the first one after a long warm-up
        ([1000, 1100, 1200, 1300, 1400, 1500], 3, [1100, 1300, 1500]),
        # step 0 has the weights before training
        ([0, 100, 200, 300, 400], 4, [100, 200, 300, 400]),
        # targets 2.5, 5: the later of two that are as near
        ([1, 2, 3, 4, 5], 2, [3, 5]),
        ([1, 40, 90, 98, 99, 100], 4, [1, 40, 90, 100]),
        ([1.5, 3.0, 4.5, 6.0], 2, [3.0, 6.0]),
    ],
)
def test_the_nearest_to_even_steps_are_chosen(steps, count, expected):
    assert chosen(steps, count) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_with_the_last_is_nearer_to_the_targets(seed):
    random = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 40, (9,), generator=random).cumsum(0).tolist()
    start = max(0, steps[0] - (steps[-1] - steps[0]) / 8)
    for count in range(1, 9):
        targets = [start + (steps[-1] - start) * j / count for j in range(1, count + 1)]

        def distance(choice, targets=targets):
            return sum(abs(s - t) for s, t in zip(choice, targets, strict=True))

        found = chosen(steps, count)
        assert found == sorted(set(found))
        assert found[-1] == steps[-1]
        least = min(
            distance((*c, steps[-1])) for c in itertools.combinations(steps[:-1], count - 1)
        )
        assert distance(found) == pytest.approx(least)


@pytest.mark.parametrize("count", [5, 6, 100])
def test_where_there_are_no_more_all_are_taken(count):
    run = in_memory([10, 20, 30, 40, 1000])
    found = select_checkpoints(iter(run), count)
    assert all(one is other for one, other in zip(found, run, strict=True))


def test_the_last_is_that_of_the_highest_step_and_the_order_given_stays():
    assert chosen([50, 10, 40, 30, 20, 60], 3) == [40, 20, 60]


# Where the step is found.


def test_a_global_step_counts_before_an_epoch_and_epochs_from_zero_count_from_one():
    run = [{"state_dict": {}, "epoch": e, "global_step": s} for e, s in ((1, 1), (2, 2), (3, 100))]
    assert [c["epoch"] for c in select_checkpoints([*run, {**run[0], "global_step": 50}], 2)] == [
        3,
        1,
    ]
    assert chosen(range(10), 5, key="epoch") == [1, 3, 5, 7, 9]
    assert chosen(range(1, 11), 5, key="epoch") == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("value", [True, float("nan"), "7", torch.tensor(7)])
def test_what_is_no_number_is_no_step(value):
    run = [{"state_dict": {}, "step": value} for _ in range(4)]
    assert select_checkpoints(run, 2) == [run[1], run[3]]


@pytest.mark.parametrize(
    "pattern",
    [
        "step-{}.pt",
        "epoch=3-step={}.ckpt",
        "epoch=3-step={}-v1.ckpt",
        "global_step{}.bin",
        "iter_{:07d}.pt",
        "model_iteration{}.pt",
        "Update_{}.pth",
        "epoch-{}.pt",
        "ck{}.pt",
        "resnet18-{}.safetensors",
        "{}.pt",
    ],
)
@pytest.mark.parametrize("given", [str, Path, lambda f: str(f / "*"), lambda f: list(f.iterdir())])
def test_steps_in_the_names_of_files_count_and_nothing_is_opened(
    tmp_path, pattern, given, monkeypatch
):
    monkeypatch.setattr("influence_kit.checkpoints.selection.values_of", None)
    for step in EVERY_TEN_THEN_EVERY_THOUSAND:
        (tmp_path / pattern.format(step)).write_bytes(b"no weights")
    found = names(select_checkpoints(given(tmp_path), 5))
    assert found == [pattern.format(step) for step in (2000, 4000, 6000, 8000, 10000)]


def test_metrics_in_names_are_no_steps(tmp_path):
    files(tmp_path, *(f"loss=0.{100 - e}-epoch={e}-step={e * e}.ckpt" for e in range(1, 11)))
    found = select_checkpoints(tmp_path, 4)  # targets 25, 50, 75, 100; in the order of the names
    assert names(found) == [f"loss=0.{100 - e}-epoch={e}-step={e * e}.ckpt" for e in (10, 9, 7, 5)]
    files(tmp_path / "two", *(f"ck{e}-acc0.{a}.pt" for e, a in enumerate((91, 50, 92, 99), 1)))
    found = select_checkpoints(tmp_path / "two", 2)  # two numbers differ: by position
    assert names(found) == ["ck2-acc0.50.pt", "ck4-acc0.99.pt"]


def test_a_number_with_a_unit_is_not_taken_for_steps(tmp_path):
    files(tmp_path, *(f"step-{n}k.pt" for n in (1, 2, 3, 10, 20)))
    assert names(select_checkpoints(tmp_path, 2)) == ["step-10k.pt", "step-20k.pt"]


def test_names_without_numbers_and_weights_alone_are_taken_by_their_order(tmp_path):
    files(tmp_path, "a.pt", "b.pt", "c.pt", "d.pt")
    assert names(select_checkpoints(tmp_path, 2)) == ["b.pt", "d.pt"]
    run = [nn.Linear(1, 1).state_dict() for _ in range(6)]
    found = select_checkpoints(tuple(run), 3)
    assert all(one is run[place] for one, place in zip(found, (1, 3, 5), strict=True))
    assert select_checkpoints(iter(range(6)), 2) == [2, 5]  # for a load function of the user's


def test_a_trainers_folders_are_told_by_their_name_or_their_state(tmp_path):
    for step in EVERY_TEN_THEN_EVERY_THOUSAND:
        # the weights and the state of these are never read
        path = trainer_folder(tmp_path / "run" / f"checkpoint-{step}", {})
        (path / "trainer_state.json").write_text("not read")
    found = names(select_checkpoints(tmp_path / "run", 5))
    assert found == [f"checkpoint-{step}" for step in (2000, 4000, 6000, 8000, 10000)]
    kept = {"first": 10, "second": 20, "third": 500, "fourth": 1000}
    paths = [trainer_folder(tmp_path / name, {"global_step": s}) for name, s in kept.items()]
    assert names(select_checkpoints(paths, 2)) == ["fourth", "third"]


def test_folders_of_accelerate_and_of_sharded_models(tmp_path):
    for number in range(10):
        trainer_folder(tmp_path / "run" / f"checkpoint_{number}")
        name = f"step_{number**2}"
        trainer_folder(tmp_path / "sharded" / name, weights="model.safetensors.index.json")
    found = names(select_checkpoints(tmp_path / "run", 5))
    assert found == [f"checkpoint_{number}" for number in (1, 3, 5, 7, 9)]
    assert names(select_checkpoints(tmp_path / "sharded", 3)) == ["step_25", "step_49", "step_81"]
    inside = str(tmp_path / "sharded" / "*" / "*.json")
    assert [Path(p).parent.name for p in select_checkpoints(inside, 3)] == [
        "step_25",
        "step_49",
        "step_81",
    ]


def test_a_file_without_a_number_shows_the_step_that_it_holds(tmp_path):
    for step in (1, 2, 3, 100):
        files(tmp_path, f"epoch=0-step={step}.ckpt", global_step=step)
    files(tmp_path, "best.ckpt", global_step=50)
    files(tmp_path, "last.ckpt", global_step=150)
    found = names(select_checkpoints(tmp_path, 3))  # targets 50, 100, 150
    assert found == ["best.ckpt", "epoch=0-step=100.ckpt", "last.ckpt"]


@pytest.mark.parametrize("kind", ["step-{}.pt", "ck{}.pt"])
@pytest.mark.parametrize("new", [True, False], ids=["no step inside", "an old format"])
def test_where_only_some_show_a_step_the_order_counts_and_a_warning_says_so(tmp_path, kind, new):
    files(tmp_path, *(kind.format(step) for step in (1, 2, 3, 4, 1000)))
    torch.save({"weight": torch.ones(1)}, tmp_path / "z.pt", _use_new_zipfile_serialization=new)
    match = r"1 of 6 checkpoints have no (step|number in the name) \(the first is '.*z.pt'\)"
    with pytest.warns(UserWarning, match=match):
        found = select_checkpoints(tmp_path, 3)
    assert names(found) == [kind.format(2), kind.format(4), "z.pt"]


def test_some_in_memory_without_a_step():
    run = [*in_memory([1, 100, 101]), {"state_dict": {}}]
    with pytest.warns(UserWarning, match=r"1 of 4 checkpoints have no step \(.* in memory\)"):
        found = select_checkpoints(run, 2)
    assert found == [run[1], run[3]]


# What comes out, and what is refused.


def test_the_result_goes_into_a_method_and_into_the_table(tmp_path):
    for step in range(1, 11):
        weights = {"weight": torch.full((1, 2), float(step)), "bias": torch.zeros(1)}
        torch.save({"state_dict": weights, "learning_rate": 0.1}, tmp_path / f"ck{step}.pt")
    few = select_checkpoints(tmp_path, 2)
    assert [row.step for row in checkpoint_table(few)] == [5, 10]
    data = TensorDataset(torch.ones(3, 2), torch.zeros(3, 1))
    dot = GradDot(nn.Linear(2, 1), data, few, loss_fn=nn.MSELoss())
    # (2 * 2w)^2 * 3 with the weights 5 and 10
    expected = torch.full((3, 3), (20.0**2 + 40.0**2) * 3)
    assert torch.equal(dot.influence((torch.ones(3, 2), torch.zeros(3, 1))), expected)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", None])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(InvalidArgumentError, match=r"`count` must be a positive int; got"):
        select_checkpoints(in_memory([1, 2]), count)


def test_where_there_is_nothing_the_error_is_that_of_methods(tmp_path):
    with pytest.raises(InvalidArgumentError, match="The folder is empty"):
        select_checkpoints(tmp_path, 2)
    with pytest.raises(InvalidArgumentError, match="an empty list"):
        select_checkpoints([], 2)
    with pytest.raises(InvalidArgumentError, match="There is no such folder or file"):
        select_checkpoints(tmp_path / "*.pt", 2)


# Geometric spacing.


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        (range(1, 21), 5, [1, 2, 4, 9, 20]),  # near 1, 2.1, 4.5, 9.5
        (range(100, 2001, 100), 5, [100, 200, 400, 900, 2000]),
        (range(1, 7), 5, [1, 2, 3, 4, 6]),  # all different, as near as possible
        (range(1, 21), 2, [1, 20]),
        (range(1, 21), 1, [20]),
        (range(1000), 3, [50, 223, 999]),  # the first steps of a long run are not wanted
        (range(800, 1001, 50), 2, [800, 1000]),  # of a run of which only the end is left
    ],
)
def test_geometric_spacing(steps, count, expected):
    found = select_checkpoints(in_memory(steps), count, spacing="geometric")
    assert [checkpoint["step"] for checkpoint in found] == expected


@pytest.mark.parametrize("spacing", ["log", None, 1])
def test_another_spacing_is_refused(spacing):
    with pytest.raises(InvalidArgumentError, match=r'`spacing` must be "even" or "geometric"; got'):
        select_checkpoints(in_memory([1, 2]), 1, spacing=spacing)
