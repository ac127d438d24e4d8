"""Checkpoints are found, put in order and loaded, with the learning rate that was applied."""

import copy
import json
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from influence_kit import checkpoint_table, load_checkpoint
from influence_kit.checkpoints.discovery import find_checkpoints
from influence_kit.checkpoints.files import read
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.errors import InvalidArgumentError


class Tied(nn.Module):
    """An embedding whose weight is the head's, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()


def weights(value: float) -> dict[str, torch.Tensor]:
    """A state dict of ``linear`` that is told by its value."""
    return {key: torch.full_like(v, value) for key, v in linear().state_dict().items()}


def value_of(model: nn.Module) -> float:
    """The value that all weights of a model have."""
    (value,) = {float(x) for p in model.parameters() for x in p.detach().flatten()}
    return value


def save(path: Path, saved) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return path


def trainer_folder(path: Path, tensors, step: int, log=(), scheduler=None) -> Path:
    """A ``checkpoint-N`` folder as transformers' Trainer writes it."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")
    state = {"global_step": step, "log_history": [dict(entry) for entry in log]}
    (path / "trainer_state.json").write_text(json.dumps(state))
    if scheduler is not None:
        save(path / "scheduler.pt", {"_last_lr": scheduler, "last_epoch": step})
    return path


# Finding and ordering.


@pytest.fixture
def folder(tmp_path):
    for number in (10, 2, 1):
        save(tmp_path / "run" / f"ck{number}.pt", weights(number))
    (tmp_path / "run" / ".hidden").write_text("not a checkpoint")
    return tmp_path / "run"


NATURAL = ["ck1.pt", "ck2.pt", "ck10.pt"]


@pytest.mark.parametrize(
    "given",
    [
        str,
        Path,
        lambda folder: str(folder / "*.pt"),
        lambda folder: [str(folder / name) for name in ("ck10.pt", "ck2.pt", "ck1.pt")],
        lambda folder: [folder / "ck10.pt", str(folder / "ck1.pt"), folder / "ck2.pt"],
    ],
    ids=["folder", "Path of a folder", "glob", "list of strings", "list of both"],
)
def test_paths_come_in_the_order_of_their_numbers(folder, given):
    found = find_checkpoints(given(folder))
    assert [Path(path).name for path in found] == NATURAL


@pytest.mark.parametrize("kind", [tuple, iter], ids=["tuple", "iterator"])
def test_other_iterables_of_paths_keep_their_order(folder, kind):
    paths = [str(folder / name) for name in ("ck10.pt", "ck1.pt", "ck2.pt")]
    assert find_checkpoints(kind(paths)) == paths


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_state_dicts_in_memory_keep_their_order_and_are_the_same_objects(kind):
    dicts = [weights(value) for value in (3, 1, 2)]
    assert all(a is b for a, b in zip(find_checkpoints(kind(dicts)), dicts, strict=True))


def test_paths_mixed_with_state_dicts_keep_their_order(folder):
    mixed = [str(folder / "ck10.pt"), weights(5), str(folder / "ck1.pt")]
    assert find_checkpoints(mixed) == mixed


def test_numbers_anywhere_in_a_path_count_before_letters(tmp_path):
    names = ["epoch=10-step=5.ckpt", "epoch=2-step=50.ckpt", "last.ckpt", "epoch=2-step=9.ckpt"]
    for name in names:
        save(tmp_path / name, {})
    found = [Path(path).name for path in find_checkpoints(tmp_path)]
    assert found == [names[3], names[1], names[0], names[2]]


def test_a_trainers_output_folder_is_its_checkpoints_in_the_order_of_their_steps(tmp_path):
    for step in (1000, 500):
        trainer_folder(tmp_path / f"checkpoint-{step}", weights(step), step)
    save_file(weights(0), tmp_path / "model.safetensors")  # the final model
    (tmp_path / "README.md").write_text("")
    (tmp_path / "runs").mkdir()
    found = [Path(path).name for path in find_checkpoints(tmp_path)]
    assert found == ["checkpoint-500", "checkpoint-1000"]


def test_a_trainers_checkpoint_folder_is_one_checkpoint(tmp_path):
    path = trainer_folder(tmp_path / "checkpoint-500", weights(1), 500)
    assert find_checkpoints(path) == [str(path)]


def test_a_load_function_of_the_users_reads_any_file_of_a_folder(folder):
    (folder / "ck3.mine").write_text("7")
    found = [Path(path).name for path in find_checkpoints(folder, any_file=True)]
    assert found == ["ck1.pt", "ck2.pt", "ck3.mine", "ck10.pt"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: folder / "ck1.pt", r"TracIn class: .*ck1.pt! It is a file: pass a list"),
        (lambda folder: folder / "none", r"TracIn class: .*none! There is no such folder or file"),
        (lambda folder: str(folder / "*.ckpt"), r"ckpt! There is no such folder or file"),
        (lambda folder: folder.parent / "empty", r"TracIn class: .*empty! The folder is empty"),
        (lambda folder: [], r"Invalid checkpoints provided for TracIn class: an empty list"),
        (lambda folder: iter(()), r"TracIn class: an empty list"),
        (lambda folder: None, r"TracIn class: .* got a NoneType; put a single one into a list"),
        (lambda folder: 3, r"TracIn class: .* got a int"),
        (lambda folder: weights(1), r"TracIn class: .* got a dict; put a single one into a list"),
    ],
    ids=["file", "missing", "glob", "empty", "[]", "iterator", "None", "int", "dict"],
)
def test_what_names_no_checkpoints_is_refused(folder, make, match):
    (folder.parent / "empty").mkdir()
    with pytest.raises(InvalidArgumentError, match=match):
        find_checkpoints(make(folder))


def test_a_folder_with_a_foreign_file_is_refused_with_its_name(folder):
    (folder / "notes.txt").write_text("")
    (folder / "logs").mkdir()
    match = r"files that are not checkpoints: \['logs', 'notes.txt'\]; checkpoints end in .pt, .pth"
    with pytest.raises(InvalidArgumentError, match=match):
        find_checkpoints(folder)


# Reading.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
def test_a_file_of_any_known_kind_is_loaded(tmp_path, suffix):
    path, model = tmp_path / f"model{suffix}", linear()
    (save_file if suffix == ".safetensors" else torch.save)(weights(0.5), path)
    assert load_checkpoint(model, path) == 1.0
    assert load_checkpoint(model, str(path)) == 1.0
    assert value_of(model) == 0.5


SGD = {"param_groups": [{"lr": 0.25, "momentum": 0.9}, {"lr": 0.25}], "state": {}}

# what is saved around the weights, and the learning rate, where it was found, and the step
RATES = {
    "plain": (lambda w: w, 1.0, "none found: 1", None),
    "model_state_dict": (lambda w: {"model_state_dict": w}, 1.0, "none found: 1", None),
    "state_dict": (lambda w: {"state_dict": w, "epoch": 4}, 1.0, "none found: 1", 4),
    "model": (lambda w: {"model": w, "step": 7, "best": "x"}, 1.0, "none found: 1", 7),
    "learning_rate": (
        lambda w: {"state_dict": w, "learning_rate": 0.1},
        0.1,
        "stored as 'learning_rate'",
        None,
    ),
    "beside the weights": (
        lambda w: {**w, "learning_rate": 0.1, "epoch": 2},
        0.1,
        "stored as 'learning_rate'",
        2,
    ),
    "a tensor beside the weights": (
        lambda w: {**w, "lr": torch.tensor(0.5), "step": torch.tensor(3)},
        0.5,
        "stored as 'lr'",
        None,
    ),
    "before the optimizer's": (
        lambda w: {"state_dict": w, "lr": 2, "optimizer": SGD},
        2.0,
        "stored as 'lr'",
        None,
    ),
    "optimizer": (
        lambda w: {"state_dict": w, "optimizer": SGD},
        0.25,
        "optimizer state 'optimizer'",
        None,
    ),
    "optimizer_state_dict": (
        lambda w: {"model_state_dict": w, "optimizer_state_dict": SGD, "epoch": 1},
        0.25,
        "optimizer state 'optimizer_state_dict'",
        1,
    ),
    "Lightning": (
        lambda w: {
            "state_dict": w,
            "optimizer_states": [SGD],
            "epoch": 1,
            "global_step": 20,
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.9},
        },
        0.25,
        "optimizer state 'optimizer_states'",
        20,
    ),
    "no optimizer": (
        lambda w: {"state_dict": w, "optimizer_states": [], "learning_rate": None},
        1.0,
        "none found: 1",
        None,
    ),
}


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "file"])
@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_is_read_from_where_it_is_stored(tmp_path, name, in_memory):
    wrap, rate, source, step = RATES[name]
    item = wrap(weights(0.5)) if in_memory else save(tmp_path / "model.pt", wrap(weights(0.5)))
    model = linear()
    assert load_checkpoint(model, item) == rate
    assert value_of(model) == 0.5
    (row,) = checkpoint_table([item])
    assert (row.learning_rate, row.rate_source, row.step) == (rate, source, step)


def test_a_learning_rate_of_numpy_counts():
    assert load_checkpoint(linear(), {**weights(1), "learning_rate": np.float32(0.5)}) == 0.5


@pytest.mark.parametrize(
    "stored",
    [
        [0.1],
        "0.1",
        {"a": 1},
        True,
        torch.tensor([0.1, 0.2]),
        torch.tensor(1j),
        torch.tensor(True),
        np.array([0.1, 0.2]),
    ],
    ids=str,
)
def test_a_stored_learning_rate_that_is_not_one_number_is_refused(unchanged, stored):
    model, saved = linear(), {"state_dict": weights(1), "learning_rate": stored}
    match = r"'learning_rate' is .*; it must be the learning rate, one number"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, saved)


def test_a_learning_rate_in_metadata_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights(1), path, metadata={"learning_rate": "fast"})
    with pytest.raises(InvalidArgumentError, match=r"'learning_rate' is 'fast'; it must be the"):
        load_checkpoint(linear(), path)


def test_a_weight_named_lr_is_no_learning_rate():
    model = nn.ParameterDict({"lr": nn.Parameter(torch.zeros(3))})
    assert load_checkpoint(model, {"lr": torch.ones(3)}) == 1.0
    assert model["lr"].tolist() == [1.0, 1.0, 1.0]


def test_several_learning_rates_of_an_optimizer_are_refused_unless_one_is_named():
    groups = {"param_groups": [{"lr": 0.1}, {"lr": 0.01}]}
    saved = {"state_dict": weights(1), "optimizer": groups}
    with pytest.raises(
        InvalidArgumentError, match=r"several learning rates, \[0.01, 0.1\]; store the one"
    ):
        load_checkpoint(linear(), saved)
    assert load_checkpoint(linear(), {**saved, "learning_rate": 0.3}) == 0.3


def test_rate_and_step_of_a_safetensors_file_are_in_its_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights(1), path, metadata={"learning_rate": "0.125", "step": "30"})
    (row,) = checkpoint_table([path])
    assert (row.learning_rate, row.step) == (0.125, 30)


def test_the_step_of_a_file_that_does_not_tell_is_the_last_number_of_its_name(tmp_path):
    paths = [save(tmp_path / name, weights(1)) for name in ("v2-epoch3.pt", "best.pt")]
    assert [row.step for row in checkpoint_table(tuple(paths))] == [3, None]


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "net.", "_orig_mod.", "module.model.", "_orig_mod.module.net."],
)
def test_prefixes_of_wrappers_are_stripped(prefix):
    model = linear()
    load_checkpoint(model, {prefix + key: value for key, value in weights(0.5).items()})
    assert value_of(model) == 0.5


class Compiled(nn.Module):
    """What torch.compile makes of a module."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_weights_fit_with_a_wrapper_and_without(wrap):
    model, wrapped = linear(), wrap(linear())
    load_checkpoint(wrapped, weights(0.5))
    assert value_of(wrapped) == 0.5
    load_checkpoint(model, wrapped.state_dict())
    assert value_of(model) == 0.5


def test_a_prefix_that_the_model_has_itself_is_kept():
    model = nn.ModuleDict({"model": linear()})
    load_checkpoint(model, {f"model.{key}": value for key, value in weights(0.5).items()})
    assert value_of(model) == 0.5


@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "Trainer folder"])
def test_weights_that_are_tied_to_others_may_be_missing(tmp_path, in_folder):
    torch.manual_seed(0)
    model, source = Tied(), Tied()
    saved = {key: v for key, v in source.state_dict().items() if key != "head.weight"}
    if in_folder:
        item = trainer_folder(
            tmp_path / "checkpoint-5", saved, 5, [{"step": 5, "learning_rate": 1}]
        )
    else:
        save_file(saved, item := tmp_path / "model.safetensors")
    load_checkpoint(model, item)
    assert torch.equal(model.head.weight, source.embedding.weight)
    assert model.head.weight is model.embedding.weight


def test_weights_that_could_be_tied_but_are_not_must_be_there(unchanged):
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    saved = {key: v for key, v in Tied().state_dict().items() if key != "head.weight"}
    match = r"missing keys \['head.weight'\]"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, saved)


def test_buffers_are_loaded():
    model, source = Tied(), Tied()
    source.norm.running_mean.fill_(7.0)
    load_checkpoint(model, source.state_dict())
    assert model.norm.running_mean.tolist() == [7.0, 7.0, 7.0]


# Folders of Hugging Face's Trainer.


def test_the_applied_rate_of_a_trainer_is_the_logged_one_not_the_next_steps(tmp_path):
    log = [
        {"step": 250, "learning_rate": 2e-4, "loss": 1.0},
        {"step": 500, "learning_rate": 1e-4, "loss": 0.5},
        {"step": 500, "train_runtime": 3.0},
        {"step": 750, "learning_rate": 9e-9},
    ]
    path = trainer_folder(tmp_path / "checkpoint-500", weights(0.5), 500, log, scheduler=[0.0])
    save(path / "optimizer.pt", {"param_groups": [{"lr": 0.0}]})
    model = linear()
    assert load_checkpoint(model, path) == 1e-4
    assert value_of(model) == 0.5
    (row,) = checkpoint_table(path)
    assert (row.step, row.rate_source) == (500, "trainer_state.json, log of step 500")


def test_without_a_log_the_rate_of_a_trainer_is_the_schedulers(tmp_path):
    path = trainer_folder(tmp_path / "checkpoint-500", weights(1), 500, scheduler=[0.25, 0.25])
    (row,) = checkpoint_table(path)
    assert row.learning_rate == 0.25
    assert (row.rate_kind, row.rate_source) == ("estimated", "the rate of the next step")


def test_several_rates_of_a_scheduler_are_refused(tmp_path):
    path = trainer_folder(tmp_path / "checkpoint-500", weights(1), 500, scheduler=[0.25, 0.5])
    with pytest.raises(InvalidArgumentError, match=r"several learning rates, \[0.25, 0.5\]"):
        checkpoint_table(path)


def test_a_folder_without_a_trainers_state_has_its_step_in_its_name_and_rate_1(tmp_path):
    path = trainer_folder(tmp_path / "checkpoint-500", weights(1), 0)
    (path / "trainer_state.json").unlink()
    (row,) = checkpoint_table([path])
    assert (row.step, row.learning_rate, row.rate_source) == (500, 1.0, "none found: 1")


def test_the_weights_of_a_folder_may_be_a_pickle(tmp_path):
    save(tmp_path / "checkpoint-5" / "pytorch_model.bin", weights(0.5))
    model = linear()
    load_checkpoint(model, tmp_path / "checkpoint-5")
    assert value_of(model) == 0.5


@pytest.fixture
def sharded(tmp_path):
    path, names = tmp_path / "checkpoint-5", list(weights(1))
    path.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": names[:1],
        "model-00002-of-00002.safetensors": names[1:],
    }
    for file, keys in shards.items():
        save_file({key: weights(0.5)[key] for key in keys}, path / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_the_shards_of_a_model_are_put_together(sharded):
    model = linear()
    load_checkpoint(model, sharded)
    assert value_of(model) == 0.5


def test_a_shard_that_is_missing_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"there is no checkpoint '.*model-00002-of"):
        load_checkpoint(linear(), sharded)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, named as peft names it."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.base_layer = nn.Linear(3, 2)
        layer.lora_A = nn.ModuleDict({"default": nn.Linear(3, 1, bias=False)})
        layer.lora_B = nn.ModuleDict({"default": nn.Linear(1, 2, bias=False)})
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"proj": layer})})


LORA = "base_model.model.proj.lora_"


def adapter_folder(path: Path, keys: str) -> Path:
    path.mkdir()
    shapes = {"A": (1, 3), "B": (2, 1)}
    save_file(
        {f"{LORA}{key}.weight": torch.full(shapes[key], 0.5) for key in keys},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text("{}")
    return path


def test_an_adapter_is_loaded_and_the_frozen_model_left_alone(tmp_path):
    model = Adapted()
    layer = model.base_model["model"]["proj"]
    before = layer.base_layer.weight.detach().clone()
    load_checkpoint(model, adapter_folder(tmp_path / "checkpoint-5", "AB"))
    assert value_of(layer.lora_A) == value_of(layer.lora_B) == 0.5
    assert torch.equal(layer.base_layer.weight, before)


def test_an_adapter_that_misses_a_part_is_refused(tmp_path, unchanged):
    model, path = Adapted(), adapter_folder(tmp_path / "checkpoint-5", "A")
    match = r"missing keys \['base_model.model.proj.lora_B.default.weight'\], unexpected keys \[\]"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, path)


# What does not fit, or is no checkpoint.


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(9).items() if name != key}


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        (without("1.bias"), r"missing keys \['1.bias'\], unexpected keys \[\], other shapes \[\]"),
        (
            {**weights(9), "2.bias": torch.ones(1)},
            r"missing keys \[\], unexpected keys \['2.bias'\]",
        ),
        (
            {**weights(9), "1.bias": torch.ones(4)},
            r"other shapes \['1.bias: \[4\] where the model has \[1\]'\]; pass checkpoints of this",
        ),
        ({**weights(9), "extra": "text"}, r"unexpected keys \['extra'\]"),
        ({}, r"missing keys \['0.weight', '0.bias', '1.weight', '1.bias'\]"),
        (
            {f"layer{i}.weight": torch.ones(1) for i in range(7)},
            r"unexpected keys \['layer0.weight', .*'layer4.weight'\] and 2 more",
        ),
    ],
    ids=["missing", "unexpected", "shape", "no tensor", "empty", "many"],
)
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "file"])
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(
    tmp_path, unchanged, saved, match, in_memory
):
    model = linear()
    item = saved if in_memory else save(tmp_path / "ck.pt", saved)
    label = "in memory" if in_memory else f"'{item}'"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match) as caught:
        load_checkpoint(model, item)
    assert str(caught.value).startswith(f"checkpoint {label} does not fit the model: ")


@pytest.mark.parametrize("own", [torch.float32, torch.complex64])
def test_complex_weights_are_not_loaded_into_real_ones_nor_real_ones_into_complex(unchanged, own):
    other = torch.complex64 if own == torch.float32 else torch.float32
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=own))})
    match = rf"other kinds of numbers \['w: {other} where the model has {own}'\]"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, {"w": torch.ones(3, dtype=other)})


def test_complex_weights_keep_their_imaginary_part():
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex128))})
    load_checkpoint(model, {"w": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)})
    assert model["w"].tolist() == [1 + 2j, 3 - 4j]


def _whole(path: Path) -> None:
    torch.save({"state_dict": weights(1), "model_class": linear()}, path)


def _cut(path: Path) -> None:
    torch.save(weights(1), path)
    path.write_bytes(path.read_bytes()[:-100])


def _text(path: Path) -> None:
    path.write_text("hello world\n")


@pytest.mark.parametrize(
    ("name", "write", "match"),
    [
        (
            "a.pt",
            _whole,
            r"a.pt' holds a torch.nn.modules.container.Sequential beside tensors and is",
        ),
        (
            "a.ckpt",
            _cut,
            r"a.ckpt' cannot be read as a checkpoint: is it whole\? \(the directory of its archive",
        ),
        ("a.pt", _text, r"a.pt' cannot be read as a checkpoint"),
        ("a.pt", Path.touch, r"a.pt' cannot be read as a checkpoint"),
        ("a.safetensors", _text, r"a.safetensors' cannot be read as a checkpoint: is it whole"),
        ("a.txt", _text, r"a.txt' is not a checkpoint .*: its ending is not one of .pt"),
        (
            "a",
            Path.mkdir,
            r"the folder '.*a' is not a checkpoint: it holds none of model.safe",
        ),
        ("b/c.pt", lambda path: None, r"there is no checkpoint '.*b/c.pt'"),
        ("a.pt", lambda path: torch.save([1, 2], path), r"holds a list; expected a state dict"),
    ],
    ids=["object", "cut", "text", "empty", "safetensors", "ending", "folder", "missing", "list"],
)
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path, unchanged, name, write, match):
    model, path = linear(), tmp_path / name
    write(path)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, path)


def test_an_object_that_is_no_path_and_no_dict_is_refused():
    match = r"a checkpoint must be a path or a state dict; got a int: pass a `checkpoints_load_func"
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(linear(), 3)


def test_nothing_of_a_refused_pickle_is_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    path = save(tmp_path / "a.pt", {"0.weight": Touch()})
    with pytest.raises(InvalidArgumentError, match=r"is not unpickled by default|cannot be read"):
        read(path)
    assert not (tmp_path / "touched").exists()


# The table.


def test_the_table_prints_steps_rates_and_where_they_were_found(tmp_path):
    log = [{"step": 500, "learning_rate": 1.5e-4}]
    path = trainer_folder(tmp_path / "checkpoint-500", weights(1), 500, log)
    dicts = [{"state_dict": weights(1), "learning_rate": 0.1, "epoch": 3}, weights(2)]
    lines = [line.split() for line in str(checkpoint_table([str(path), *dicts])).splitlines()]
    assert lines[0] == ["checkpoint", "step", "learning", "rate", "kind", "found"]
    assert lines[1] == f"{path} 500 0.00015 applied trainer_state.json, log of step 500".split()
    assert lines[2][:6] == ["in", "memory", "1", "3", "0.1", "stored"]
    assert lines[3][:6] == ["in", "memory", "2", "-", "1", "none"]


def test_the_columns_of_the_table_are_aligned():
    text = str(checkpoint_table([{"a": torch.ones(1), "lr": 0.125}, {"epoch": 12}]))
    assert text == (
        "checkpoint   step  learning rate  kind    found\n"
        "in memory 0  -     0.125          stored  stored as 'lr'\n"
        "in memory 1  12    1              none    none found: 1"
    )


# The loader.


def loader_of(model, items, load=load_checkpoint) -> CheckpointLoader:
    return CheckpointLoader(model, items, load)


def load_all(loader: CheckpointLoader, *places: int) -> None:
    for place in places:
        loader.load(place)


def test_the_loader_loads_the_checkpoint_that_is_asked_for():
    model = linear()
    items = [{"state_dict": weights(value), "lr": value / 2} for value in (1.0, 2.0, 3.0)]
    loader = loader_of(model, items)
    for place in (2, 0, 1, 0):
        assert loader.load(place) == (place + 1) / 2
        assert value_of(model) == place + 1


def test_the_checkpoint_in_the_model_is_never_loaded_again():
    calls = []

    def load(model, checkpoint):
        calls.append(checkpoint)
        return load_checkpoint(model, weights(checkpoint))

    loader = loader_of(linear(), [1.0, 2.0], load)
    load_all(loader, 0, 0, 0, 1, 1, 0)
    assert calls == [1.0, 2.0, 1.0]


def test_a_load_that_failed_is_tried_again():
    model, calls = linear(), []

    def load(model, checkpoint):
        calls.append(checkpoint)
        if len(calls) == 2:
            raise OSError("disk")
        return load_checkpoint(model, weights(checkpoint))

    loader = loader_of(model, [1.0, 2.0], load)
    loader.load(0)
    with pytest.raises(OSError, match="disk"):
        loader.load(1)
    loader.load(0)
    assert calls == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "rate", [0.5, torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5)], ids=repr
)
def test_a_load_function_may_return_any_number(rate):
    found = loader_of(linear(), [1], lambda model, item: rate).load(0)
    assert found == 0.5
    assert isinstance(found, float)


@pytest.mark.parametrize(
    "rate",
    [None, True, "0.1", float("nan"), float("inf"), torch.ones(2), [0.1], torch.tensor(1j)],
    ids=repr,
)
def test_a_load_function_that_returns_no_number_is_refused(rate):
    loader = loader_of(linear(), [1, 2], lambda model, item: rate)
    match = (
        r"`checkpoints_load_func` returned .* for checkpoint 1; it must return the learning rate"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        loader.load(1)


def _live(model):
    return model.state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        _live,
        lambda model: {"state_dict": _live(model), "learning_rate": 1.0},
        lambda model: OrderedDict(_live(model)),
        lambda model: (_live(model), 1.0),
        lambda model: [_live(model), 1.0],
        lambda model: list(model.parameters()),
    ],
    ids=["state dict", "in a dict", "ordered", "in a tuple", "in a list", "list of tensors"],
)
def test_a_state_dict_that_is_the_live_models_is_protected_from_the_next_load(wrap):
    model = linear()
    load_checkpoint(model, weights(0.5))

    def load(model, item):
        if isinstance(item, list) and isinstance(item[0], torch.Tensor):
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), item, strict=True):
                    parameter.copy_(value)
            return 1.0
        return load_checkpoint(model, item[0] if isinstance(item, list | tuple) else item)

    loader = loader_of(model, [wrap(model), weights(3.0)], load)
    loader.load(1)
    assert value_of(model) == 3.0
    loader.load(0)
    assert value_of(model) == 0.5


def test_checkpoints_that_are_copies_are_not_copied_again():
    model = linear()
    item, seen = copy.deepcopy(model.state_dict()), []

    def load(model, given):
        seen.append(given)
        return 1.0

    loader_of(model, [item], load).load(0)
    assert seen[0] is item


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
def test_parameters_that_a_load_function_replaces_stay_the_same_objects(tied):
    torch.manual_seed(0)
    build = Tied if tied else linear
    model, other = build(), build()
    objects = dict(model.named_parameters())

    def load(model, item):
        model.load_state_dict(item, assign=True)
        return 1.0

    loader = loader_of(model, [copy.deepcopy(other.state_dict())], load)
    loader.load(0)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in objects.items()
    }
    for name, parameter in other.named_parameters():
        assert torch.equal(objects[name], parameter)


def test_complex_parameters_that_a_load_function_replaces_keep_their_imaginary_part():
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    parameter, value = model["w"], torch.tensor([1 + 2j, 3 - 4j])

    def load(model, item):
        model.load_state_dict({"w": item}, assign=True)
        return 1.0

    loader_of(model, [value], load).load(0)
    assert model["w"] is parameter
    assert parameter.tolist() == value.tolist()


@pytest.mark.parametrize(
    ("value", "text"),
    [(torch.ones(2) * 1j, "complex64 parameter of shape"), (torch.ones(1), r"of shape \[1\]")],
    ids=["complex", "shape"],
)
def test_parameters_of_another_kind_that_a_load_function_puts_there_are_refused(value, text):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})

    def load(model, item):
        model["w"] = nn.Parameter(item)
        return 1.0

    match = rf"replaced 'w', which is torch.float32 of shape \[2\], by a torch.*{text}"
    with pytest.raises(InvalidArgumentError, match=match):
        loader_of(model, [value], load).load(0)


def test_complex_checkpoints_that_differ_in_an_imaginary_part_are_not_the_same():
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    loader = loader_of(model, [{"w": torch.ones(2) + 1j}, {"w": torch.ones(2) + 2j}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_all(loader, 0, 1)


def test_a_learning_rate_of_0_is_said_once():
    loader = loader_of(linear(), [{**weights(1), "lr": 0.0}, weights(2)])
    match = r"checkpoint 0 \(in memory\) has learning rate 0 and adds nothing"
    with pytest.warns(UserWarning, match=match) as caught:
        load_all(loader, 0, 1, 0)
    assert len(caught) == 1


def test_two_checkpoints_with_the_same_weights_are_said_once(tmp_path):
    path = save(tmp_path / "a.pt", weights(1))
    loader = loader_of(linear(), [weights(1), weights(2), str(path)])
    match = r"checkpoints 0 and 2 \('.*a.pt'\) hold the same weights, .*deepcopy"
    with pytest.warns(UserWarning, match=match) as caught:
        load_all(loader, 0, 1, 2, 0, 2)
    assert len(caught) == 1


def _swapped(saved):
    saved["0.weight"] = saved["0.weight"].flip(0)


def _exchanged(saved):
    saved["0.weight"][0, 0], saved["1.bias"][0] = 3.0, 1.0


@pytest.mark.parametrize("change", [_swapped, _exchanged], ids=["in a weight", "between weights"])
def test_checkpoints_with_the_same_values_at_other_places_are_not_the_same(change):
    one = weights(1)
    one["0.weight"][0, 0], one["1.bias"][0] = 1.0, 3.0
    one["0.weight"][2, 0] = 2.0
    other = copy.deepcopy(one)
    change(other)
    loader = loader_of(linear(), [one, other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_all(loader, 0, 1)


def test_checkpoints_that_differ_in_a_buffer_are_not_the_same():
    one = Tied().state_dict()
    other = copy.deepcopy(one)
    other["norm.running_mean"].fill_(1.0)
    loader = loader_of(Tied(), [one, other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_all(loader, 0, 1)
