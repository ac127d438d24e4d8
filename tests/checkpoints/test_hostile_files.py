"""Checkpoints that others made: nothing hangs, fills the memory, or is read outside its folder."""

import io
import json
import os
import pickle
import resource
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from influence_kit import checkpoint_table, dropout_ensemble, load_checkpoint, select_checkpoints
from influence_kit.checkpoints.files import read
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.training_record import record_of
from influence_kit.storage import given_files
from influence_kit.storage.given_files import check_unpacked, read_json
from influence_kit.storage.torch_files import values_of


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Linear(3, 1)).double()


def archive(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """A file of ``torch.save`` with some of its entries replaced."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", kind) as target:
        for name in source.namelist():
            last = name.rpartition("/")[2]
            target.writestr(name, entries.get(last, source.read(name)))
    return path


def sharded(folder: Path, name: object) -> Path:
    """A folder whose index names one file; a file with weights lies in the folder above."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder.parent / "x.safetensors")
    index = {"weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "../../x.safetensors",
        "sub/../../x.safetensors",
        "/etc/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        ".",
        "..",
        "",
        7,
        None,
        ["x.safetensors"],
        "sub/x.safetensors",
    ],
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, name):
    folder = sharded(tmp_path / "a" / "b", name)
    with pytest.raises(InvalidArgumentError, match=r"names the file .* must lie beside it"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("inner", r"inner' is not a checkpoint that can be read: its ending"),
        ("inner.bin", r"inner.bin' is a folder, which is not opened"),
        ("model.safetensors.index.json", r"is not a checkpoint that can be read: its ending"),
        ("..safetensors", r"there is no checkpoint"),
    ],
)
def test_an_index_cannot_name_folders_or_itself(tmp_path, name, match):
    folder = sharded(tmp_path / "a", name)
    if name.startswith("inner"):
        (folder / name).symlink_to(folder)
    with pytest.raises(InvalidArgumentError, match=match):
        read(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "3"])
def test_an_index_without_its_dict_is_refused(tmp_path, text):
    folder = sharded(tmp_path / "a", "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"holds no 'weight_map'; it must be a dict"):
        read(folder)


@pytest.mark.parametrize("content", ["index", "state", "config"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 200_000, "is nested too deeply to be read"),
        (b'{"a":' * 200_000, "is nested too deeply to be read"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\xfd", "cannot be read as JSON"),
        (b"9" * 10_000, "cannot be read as JSON"),
    ],
    ids=["lists", "dicts", "cut", "bytes", "digits"],
)
def test_json_that_cannot_be_read_is_refused(tmp_path, content, text, match):
    folder = sharded(tmp_path / "a", "x.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "x.safetensors")
    if content == "index":
        (folder / "model.safetensors.index.json").write_bytes(text)
    elif content == "state":
        (folder / "trainer_state.json").write_bytes(text)
    else:  # a version is looked up in it, and guessed if it cannot be
        log = [{"step": 1, "learning_rate": 0.5}, {"step": 2, "learning_rate": 0.25}]
        state = {"global_step": 2, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        (folder / "config.json").write_bytes(text)
        assert read(folder).rate.value == 0.25
        return
    with pytest.raises(InvalidArgumentError, match=match):
        read(folder)


def test_json_files_beyond_a_limit_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "trainer_state.json"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(InvalidArgumentError, match=r"has 1,000,000.0 MB; JSON files of at most"):
        read_json(path)


def test_json_of_the_largest_size_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    monkeypatch.setattr(given_files, "MOST_JSON_BYTES", 6)
    assert read_json(path) == [1, 2]
    monkeypatch.setattr(given_files, "MOST_JSON_BYTES", 5)
    with pytest.raises(InvalidArgumentError, match="JSON files of at most"):
        read_json(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def own_link(path: Path) -> None:
    path.symlink_to(path)


def listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (fifo, r"is a FIFO \(named pipe\), which is not opened; only ordinary files"),
        (device, "is a device, which is not opened"),
        (listen, "is a socket, which is not opened"),
        (own_link, r"cannot be opened \(Too many levels of symbolic links\); pass the path"),
    ],
)
def test_what_is_no_ordinary_file_is_refused_without_waiting(tmp_path, model, make, match, suffix):
    path = tmp_path / f"x{suffix}"
    make(path)
    for use in (read, lambda p: load_checkpoint(model, p), lambda p: checkpoint_table([p])):
        with pytest.raises(InvalidArgumentError, match=match):
            use(path)
    # where a learning rate or a step is only looked up, there is none
    assert values_of(path) == {}
    assert record_of(path).steps is None
    torch.save({"step": 1}, tmp_path / "y.pt")
    assert len(select_checkpoints([path, tmp_path / "y.pt"], 1)) == 1


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.pt", "optimizer.pt", "config.json"])
def test_a_fifo_beside_the_weights_is_not_waited_for(tmp_path, name):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    log = [{"step": 1, "learning_rate": 0.5}, {"step": 2, "learning_rate": 0.25}]
    state = {"global_step": 2, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    os.mkfifo(tmp_path / name)
    assert read(tmp_path).rate.value == 0.25


def test_an_archive_that_would_fill_the_memory_is_refused_before(tmp_path, model):
    # 2 GiB of zeros, compressed to 2 MiB
    path = tmp_path / "x.pt"
    with (
        zipfile.ZipFile(archive(path, {}), "a", zipfile.ZIP_DEFLATED) as target,
        target.open("archive/data/1", "w", force_zip64=True) as entry,
    ):
        for _ in range(2**7):
            entry.write(bytes(2**24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    match = r"has 2\.\d MB and would unpack to 2,147.5 MB; torch.save does not compress"
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, path)
    assert values_of(path) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_small_archives_are_read_compressed_or_not(tmp_path, kind):
    assert torch.equal(read(archive(tmp_path / "x.pt", {}, kind)).weights["weight"], torch.ones(2))


def test_a_damaged_directory_of_an_archive_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", {})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02")
    data[start : start + 4] = b"XXXX"
    path.write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=r"the directory of its archive is damaged"):
        check_unpacked(path)


class Zeros:
    """Unpickled as a bytearray of three gigabytes, which torch allows."""

    def __reduce__(self):
        return bytearray, (3 * 10**9,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bytearray_is_not_made(tmp_path, legacy):
    path = tmp_path / "x.pt"
    if legacy:
        torch.save({"weight": Zeros()}, path, _use_new_zipfile_serialization=False)
    else:
        archive(path, {"data.pkl": pickle.dumps({"weight": Zeros()}, protocol=2)})
    with pytest.raises(InvalidArgumentError, match=r"holds a bytearray, which may take any amount"):
        read(path)
    assert values_of(path) == {}


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.touch()
    with pytest.raises(InvalidArgumentError, match=r"cannot be read as a checkpoint: is it whole"):
        read(path)


def test_a_learning_rate_of_nested_lists_is_shown_in_a_line():
    value: list = []
    for _ in range(60):
        value = [value] * 9
    with pytest.raises(InvalidArgumentError, match=r"'lr' is \[\[") as caught:
        read({"state_dict": {}, "lr": value})
    assert len(str(caught.value)) < 10**6


def sparse(tensor):
    return tensor.to_sparse()


BAD_WEIGHTS = {
    "text": (lambda t: "none", r"2.weight: a str where the model has torch.float64"),
    "none": (lambda t: None, r"2.weight: a NoneType where the model has"),
    "list": (lambda t: t.tolist(), r"2.weight: a list where the model has"),
    "meta": (lambda t: t.to("meta"), r"2.weight: torch.float64 without values \(meta\) where"),
    "sparse": (sparse, r"2.weight: torch.float64 \(torch.sparse_coo\) where the model has"),
    "shape": (lambda t: t[None], r"2.weight: \[1, 1, 3\] where the model has \[1, 3\]"),
    "complex": (lambda t: t.to(torch.complex128), r"2.weight: torch.complex128 where"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        r"2.weight: torch.qint8 \(torch.strided\) where",
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_one_bad_weight_is_found_before_any_is_copied(model, unchanged, kind):
    change, match = BAD_WEIGHTS[kind]
    weights = {key: value + 1 for key, value in model.state_dict().items()}
    weights["2.weight"] = change(weights["2.weight"])
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, weights)


def test_the_keys_of_a_state_dict_must_be_names(model, unchanged):
    weights = {**model.state_dict(), 3: torch.ones(2)}
    match = r"has the key 3; the keys of a state dict are names of parameters, such as '0.weight'"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, weights)


class Failing(nn.Linear):
    """A layer that cannot load its weights."""

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        raise OSError("not these")


def test_a_layer_that_fails_while_it_loads_leaves_the_weights_before(model, unchanged):
    model.append(Failing(1, 1).double())
    weights = {key: value + 1 for key, value in model.state_dict().items()}
    match = r"did not load the checkpoint, and has the weights it had before \(not these\)"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, weights)


@pytest.mark.parametrize(
    "change",
    [
        {"rates": None},
        {"rates": {"1": "much"}},
        {"rates": {"1": 1.5}},
        {"axes": {"1": None}},
        {"axes": 3},
        {"seed": "a"},
        {"member": None},
    ],
)
def test_masks_that_no_ensemble_made_are_refused(model, unchanged, change):
    (member,) = dropout_ensemble(model, 1)
    member["dropout_masks"] = {**member["dropout_masks"], **change}
    match = r"'dropout_masks' is .* it must be what dropout_ensemble made"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(model, member)


@pytest.mark.parametrize("masks", [3, [], {}, "masks"])
def test_masks_that_are_no_dict_of_masks_are_refused(model, unchanged, masks):
    checkpoint = {"state_dict": model.state_dict(), "dropout_masks": masks}
    with (
        unchanged(model),
        pytest.raises(InvalidArgumentError, match=r"must be what dropout_ensemble made"),
    ):
        load_checkpoint(model, checkpoint)


@pytest.mark.parametrize("value", ["nan", "inf", "last"])
def test_a_step_that_is_no_number_is_refused(tmp_path, value):
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"epoch": value})
    with pytest.raises(InvalidArgumentError, match=r"'epoch' is .*; it must be a finite number"):
        read(tmp_path / "x.safetensors")
    if value != "last":
        with pytest.raises(InvalidArgumentError, match=r"'step' is (nan|inf); it must be a finite"):
            read({"state_dict": {}, "step": float(value)})
        assert record_of({"state_dict": {}, "step": float(value)}).steps is None


WRONG_STATES = [
    {"global_step": "many"},
    {"global_step": -1},
    {"global_step": float("inf")},
    {"global_step": True},
    {"max_steps": "x"},
    {"max_steps": [1]},
    {"log_history": {}},
    {"log_history": 3},
    {"log_history": [3]},
    {"log_history": [{"step": "a", "learning_rate": 0.1}]},
    {"log_history": [{"step": None, "learning_rate": 0.1}]},
    {"log_history": [{"step": 1, "learning_rate": "x"}]},
    {"log_history": [{"step": 1, "learning_rate": [0.1]}]},
    {"log_history": [{"step": 1, "learning_rate": float("nan")}]},
    {"log_history": [{"step": [1], "eval_loss": 0.1}]},
]


@pytest.mark.parametrize("change", WRONG_STATES, ids=str)
def test_a_trainers_state_of_another_kind_is_refused(tmp_path, change):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    state = {"global_step": 2, "log_history": [], **change}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    match = r"trainer_state.json' has .* where a Trainer writes .*; copy the folder again, or"
    for use in (read, record_of, lambda path: select_checkpoints([path, path / "a"], 1)):
        with pytest.raises(InvalidArgumentError, match=match):
            use(tmp_path)


WRONG_GROUPS = [[3], [{"lr": "x", "params": [0]}], [{"lr": [0.1], "params": [0]}]]


@pytest.mark.parametrize("groups", WRONG_GROUPS, ids=str)
@pytest.mark.parametrize("kind", ["file", "accelerate", "trainer"])
def test_the_file_of_an_optimizers_state_of_another_kind_is_named(tmp_path, kind, groups):
    optimizer, weights = {"state": {}, "param_groups": groups}, nn.Linear(2, 1).state_dict()
    checkpoint = tmp_path
    if kind == "file":
        checkpoint = tmp_path / "x.pt"
        torch.save({"state_dict": weights, "optimizer": optimizer}, checkpoint)
    else:
        save_file(weights, tmp_path / "model.safetensors")
        torch.save(optimizer, tmp_path / ("optimizer.bin" if kind[0] == "a" else "optimizer.pt"))
    if kind == "trainer":
        (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(InvalidArgumentError, match=r"is not as torch saves it") as caught:
        read(checkpoint)
    assert tmp_path.name in str(caught.value) or kind == "file"


def test_an_optimizers_state_of_another_kind_is_refused(unchanged):
    model = nn.Linear(2, 1)
    saved = {"state_dict": model.state_dict(), "optimizer": {"param_groups": 3}}
    match = r"of a checkpoint in memory is not as torch saves it \(.*\), so its"
    for use in (lambda: load_checkpoint(model, saved), lambda: record_of(saved)):
        with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
            use()


def test_a_damaged_pickle_in_an_archive_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", {})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"collections", b"collectionz", 1))
    with pytest.raises(InvalidArgumentError, match=r"cannot be read as a checkpoint.*Bad CRC"):
        read(path)


def test_what_torch_reads_as_a_pickle_is_looked_at_as_one(tmp_path):
    # an archive after a pickle: `zipfile` would look at the archive
    path, harmless = tmp_path / "x.pt", archive(tmp_path / "y.pt", {})
    torch.save({"weight": Zeros()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + harmless.read_bytes())
    with pytest.raises(InvalidArgumentError, match=r"holds a bytearray"):
        read(path)


def test_an_archive_that_is_cut_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InvalidArgumentError, match=r"the directory of its archive is damaged"):
        read(path)
