"""What trainers save beside the weights, with one value of another type: refused, by its key."""

import pytest
import torch
from torch import nn

from influence_kit import dropout_ensemble, load_checkpoint
from influence_kit.errors import InvalidArgumentError


def states():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return model, optimizer.state_dict(), scheduler.state_dict()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("_last_lr", 0.1, "_last_lr must be a list of finite numbers; got 0.1"),
        ("_last_lr", None, "_last_lr must be a list of finite numbers; got None"),
        ("base_lrs", ["a"], "base_lrs must be a list of finite numbers"),
        ("last_epoch", float("nan"), "last_epoch must be a finite number; got nan"),
        ("gamma", torch.zeros(3), "gamma must be a number; got tensor"),
        ("_schedulers", [], "_schedulers must be a list of one or more states of schedulers"),
        ("_schedulers", [3], "_schedulers must be a list of one or more states of schedulers"),
        ("_milestones", [2], "_milestones must be a list of 0 numbers"),
    ],
)
def test_states_of_schedulers(key, value, match):
    model, optimizer, scheduler = states()
    saved = {"model": model.state_dict(), "optimizer": optimizer}
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, {**saved, "scheduler": {**scheduler, key: value}})


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("param_groups", [1], "param_groups must be a list of dicts"),
        ("param_groups", [{"lr": "a"}], "lr must be a finite number; got 'a'"),
        ("state", [1], "state must be a dict"),
        ("state", {0: {"step": float("inf")}}, "step must be a finite number; got inf"),
    ],
)
def test_states_of_optimizers(key, value, match):
    model, optimizer, _ = states()
    saved = {"model": model.state_dict(), "optimizer": {**optimizer, key: value}}
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, saved)


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_whose_periods_never_grow_ends():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2).state_dict()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    for changed in ({"last_epoch": 2**60}, {"T_mult": 0, "last_epoch": 5}, {"T_0": 0}):
        rate = load_checkpoint(model, {**saved, "scheduler": {**scheduler, **changed}})
        assert 0 <= rate <= 0.1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"axes": "text"}, "`axes` must be a dict"),
        ({"axes": {"1": 1.5}}, r"`axes\['1'\]` must be an int; got 1.5"),
        ({"n": 10**30}, "`n` must be .* at most 1000000"),
    ],
)
def test_arguments_of_dropout_ensembles(given, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(InvalidArgumentError, match=match):
        dropout_ensemble(model, **{"n": 2, **given})
