"""What trainers save beside the weights, with one value of another type: refused, by its key."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from influence_kit import checkpoint_table, dropout_ensemble, load_checkpoint
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


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read as a checkpoint: is it whole"),
        ("[]", "the file must be a dict"),
        ('{"global_step": "3"}', "global_step must be an int; got '3'"),
        ('{"log_history": {}}', "log_history must be a list of dicts"),
        ('{"log_history": [{"step": null}]}', "step in log_history must be a finite number"),
    ],
)
def test_the_state_of_a_trainer(tmp_path, text, match):
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"weight": "../model.safetensors"}}, "names '../model.safetensors'"),
        ({"weight_map": {"weight": "."}}, "names '.'; an index lists files in its own folder"),
        ({"weight_map": {"weight": "model.safetensors.index.json"}}, "which end in .pt"),
        ({"weight_map": {"weight": 3}}, "names 3"),
        ({"weight_map": []}, "has no `weight_map`"),
        ([], "has no `weight_map`"),
    ],
)
def test_an_index_lists_files_of_its_folder_alone(tmp_path, index, match):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(nn.Linear(3, 2), tmp_path)


def test_an_epoch_that_is_no_finite_number_is_not_known(tmp_path):
    run = [{"state_dict": {}, "epoch": float("nan")}, {"state_dict": {}, "epoch": 2.0}]
    assert [row.step for row in checkpoint_table(run)] == [None, 2]
    save_file({"a": torch.zeros(2)}, tmp_path / "last.safetensors", {"epoch": "first"})
    assert checkpoint_table([tmp_path / "last.safetensors"])[0].step is None


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weight": [1.0]}, r"weight: a list where the model has \[2, 3\]"),
        ({"weight": torch.zeros(2, 3, device="meta")}, r"weight: meta \[2, 3\] where"),
        ({"weight": torch.zeros(2, 3).to_sparse()}, r"weight: sparse \[2, 3\] where"),
        ({3: torch.zeros(2)}, "has the key 3 among its weights; keys must be str"),
    ],
)
def test_weights_that_cannot_be_copied_leave_the_model_as_it_is(changed, match):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    before = model.bias.tolist()
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, {**other.state_dict(), **changed})
    assert model.bias.tolist() == before


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


@pytest.mark.parametrize("masks", [3, {"rates": {}}, {"rates": {"1": 2.0}, "axes": {}}])
def test_masks_of_another_form(masks):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    member = dropout_ensemble(model, 1)[0]
    with pytest.raises(InvalidArgumentError, match="must be a dict of seed, member, rates and"):
        load_checkpoint(model, {**member, "dropout_masks": masks})
