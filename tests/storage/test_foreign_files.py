"""Files of the user's are neither replaced nor removed, wherever they stand."""

import json
import re
from pathlib import Path

import pytest
import torch
from folders import (
    KINDS,
    SUBSETS,
    Kind,
    method,
    not_trained,
    read_fit,
    record_trace,
    retrain,
    save_fit,
    store,
)
from safetensors.torch import save_file

from influence_kit import TrainingTrace
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining
from influence_kit.gradients.store import GradientStore
from influence_kit.storage.folders import claim, read_folder, replace_contents, write_folder
from influence_kit.storage.manifest import KINDS as NAMES
from influence_kit.storage.manifest import MANIFEST, Manifest

THESIS = b"the only copy"
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(params=["thesis.part", "final.safetensors", "manifest.json.part", ".hidden"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@each_kind
def test_a_folder_with_other_files_is_refused(kind: Kind, name: str, tmp_path: Path) -> None:
    there = tmp_path / kind.holds
    there.mkdir(parents=True, exist_ok=True)
    (there / name).write_bytes(THESIS)
    match = f"holds files .'{re.escape(name)}'. and no {MANIFEST}.* name a new or empty folder"
    with pytest.raises(InvalidArgumentError, match=match):
        kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == {name: THESIS}


@each_kind
def test_files_that_came_later_are_left_alone(kind: Kind, name: str, tmp_path: Path) -> None:
    kind.write(tmp_path, 0)
    there = tmp_path / kind.holds
    if kind is KINDS["trace"] and name.startswith("final"):
        return  # is the trace's own
    (there / name).write_bytes(THESIS)
    save_file({"a": torch.ones(2)}, there / "tensors-theirs.safetensors")
    theirs = (there / "tensors-theirs.safetensors").read_bytes()
    kind.write(tmp_path, 1 if kind.replaces else 0)
    kind.read(tmp_path, 1 if kind.replaces else 0)
    contents = kind.files(tmp_path)
    assert contents[name] == THESIS
    assert contents["tensors-theirs.safetensors"] == theirs


@each_kind
def test_a_manifest_of_something_else_is_refused(kind: Kind, tmp_path: Path) -> None:
    there = tmp_path / kind.holds
    there.mkdir(parents=True, exist_ok=True)
    (there / MANIFEST).write_text('{"name": "my app"}')
    with pytest.raises(InvalidArgumentError, match="influence_kit has not written it"):
        kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == {MANIFEST: b'{"name": "my app"}'}


@each_kind
@pytest.mark.parametrize("other", KINDS)
def test_a_folder_of_another_kind_is_refused(kind: Kind, other: str, tmp_path: Path) -> None:
    if KINDS[other] is kind:
        return
    there = tmp_path / kind.holds
    there.mkdir(parents=True, exist_ok=True)
    Manifest(other, {}).write(there)
    before = kind.files(tmp_path)
    match = f"holds {NAMES[other]}; expected .*: name another folder"
    with pytest.raises(InvalidArgumentError, match=match):
        kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == before


OLD_MANIFESTS = {
    "gradients": {"format": 1, "holds": "gradients", "rows": 3},
    "fit": {"format": 1, "method": "EKFACInfluenceFunction"},
    "models": {"format": 1, "examples": 6, "label": "sums"},
    "activations": {"format": 1, "layer": "0"},
}


@pytest.mark.parametrize("name", OLD_MANIFESTS)
def test_a_folder_of_version_0_1_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    there = tmp_path / kind.holds
    there.mkdir(parents=True, exist_ok=True)
    (there / MANIFEST).write_text(json.dumps(OLD_MANIFESTS[name], indent=2))
    match = r"was written by influence_kit 0\.1 \(format 1\), .* this version reads format 2: del"
    with pytest.raises(InvalidArgumentError, match=match):
        kind.write(tmp_path, 0)
    if name in ("gradients", "fit"):
        with pytest.raises(InvalidArgumentError, match=r"0\.1 .*again, in a new or empty folder"):
            kind.read(tmp_path, 0)


def test_a_trace_of_version_0_1_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "step-0.safetensors", {"facts": "{}"})
    match = r"holds files \('step-0.safetensors'\) and no manifest.json: it is not the trace of a"
    with pytest.raises(InvalidArgumentError, match=match):
        TrainingTrace(folder=tmp_path)


def test_a_save_over_a_store_is_refused(tmp_path: Path) -> None:
    KINDS["gradients"].write(tmp_path)
    before = KINDS["gradients"].files(tmp_path)
    with pytest.raises(InvalidArgumentError, match="holds a store of gradients; expected a saved"):
        method(0).save(tmp_path)
    assert KINDS["gradients"].files(tmp_path) == before


def test_a_trace_leaves_a_final_that_is_not_its_own(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    trace = TrainingTrace(model, folder=tmp_path)
    trace.record([0], lr=0.1)
    save_file({"a": torch.ones(2)}, tmp_path / "final.safetensors")
    theirs = (tmp_path / "final.safetensors").read_bytes()
    for act in (lambda: trace.record([1], lr=0.1), trace.finish, lambda: trace.final):
        with pytest.raises(InvalidArgumentError, match=r"final.safetensors' .*influence_kit"):
            act()
    with pytest.raises(InvalidArgumentError, match="did not write it, and is not removed: move"):
        TrainingTrace(model, folder=tmp_path, resume_at=0)
    assert (tmp_path / "final.safetensors").read_bytes() == theirs


def test_a_model_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    retrain(tmp_path)
    file = Retraining(not_trained, tmp_path, label="sums").checkpoints(SUBSETS)[0]
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="did not write it, and is not replaced: move"):
        retrain(tmp_path)
    assert file.is_symlink()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Those names were predictable in version 0.1."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(THESIS)
    save_fit(folder, 0)
    for name in (f"{MANIFEST}.part", "tensors.safetensors.part", "tensors.safetensors"):
        (folder / name).symlink_to(victim)
    save_fit(folder, 1)
    read_fit(folder, 1)
    assert victim.read_bytes() == THESIS
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(victim)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        save_fit(folder, 1)
    assert victim.read_bytes() == THESIS


def test_a_manifest_reaches_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder, thesis = tmp_path / "folder", tmp_path / "thesis.safetensors"
    write_folder(folder, {"a": torch.ones(2)}, {})
    thesis.write_bytes(THESIS)
    for name in ("../thesis.safetensors", str(thesis), ".hidden", ".."):
        Manifest("fit", {}, files={name: {"size": 1, "checksum": ""}}).write(folder)
        with pytest.raises(InvalidArgumentError, match="parts of it are missing"):
            write_folder(folder, {}, {})
        with pytest.raises(InvalidArgumentError, match="parts of it are missing"):
            read_folder(folder, {})
    assert thesis.read_bytes() == THESIS


@pytest.mark.parametrize(
    "files",
    [
        *([], {"a": 1}, {"a": {"size": "1", "checksum": ""}}, {"a": {"size": 1}}),
        *(
            {name: {"size": 1, "checksum": ""}}
            for name in ("", ".", "..", "a/b", "/a", "a\0", "\ud800")
        ),
    ],
)
def test_a_manifest_whose_list_makes_no_sense_is_refused(files: object, tmp_path: Path) -> None:
    Manifest("fit", {}, files=files).write(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="parts of it are missing"):
        claim(tmp_path, "fit")


def test_another_file_in_place_of_a_listed_one_is_refused(tmp_path: Path) -> None:
    """Each is as it was written; they belong to two saves."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        write_folder(tmp_path / name, {"x": torch.tensor(value)}, {})
    (a,), (b,) = (list((tmp_path / name).glob("tensors-*")) for name in "ab")
    a.write_bytes(b.read_bytes())
    with pytest.raises(InvalidArgumentError, match=r"it is not the file that manifest.json lists"):
        read_folder(tmp_path / "a", {})
    a.unlink()
    with pytest.raises(InvalidArgumentError, match=r"is not there, and manifest.json lists it; s"):
        read_folder(tmp_path / "a", {})


def test_a_manifest_takes_no_memory_beyond_bounds(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(InvalidArgumentError, match=r"\(it is larger than 64 MiB\); save it again"):
        Manifest.read(tmp_path, "fit", "save it again")


def test_a_forged_store_takes_no_memory_beyond_its_files(tmp_path: Path) -> None:
    """A manifest of an absurd size is refused before memory is taken for what it says."""
    KINDS["gradients"].write(tmp_path)
    found = Manifest.read(tmp_path, "gradients", "")
    huge = {"rows": 2**50, "chunk_rows": 2**50, "checkpoints": 1}
    for layout, files in (
        ({**huge, "chunk_rows": 1}, None),
        ({**huge, "columns": {"a": [0, 1, [2**40]]}}, {"0000-000000.safetensors": 0}),
        (huge, {"0000-000000.safetensors": 0}),
    ):
        listed = files and {name: {"size": size, "checksum": ""} for name, size in files.items()}
        Manifest("gradients", {}, {**found.layout, **layout}, listed).write(tmp_path)
        with pytest.raises(InvalidArgumentError, match=r"not complete|of another store|cut off"):
            GradientStore.open(tmp_path).read(0, 0, 2**50)
    Manifest("gradients", {"model": "a hash"}, {**found.layout, "chunk_rows": 12}).write(tmp_path)
    assert store(tmp_path).layout.chunk_rows == 12
    wide = {"rows": 2**33, "columns": {"a": [0, 1, [1]]}, "chunk_rows": 2**33}
    Manifest("gradients", {}, {**found.layout, **wide}).write(tmp_path)
    with pytest.raises(InvalidArgumentError, match="chunks of 65536 MiB there, at most 1024 MiB"):
        GradientStore.create_or_open(
            tmp_path, {}, {"a": torch.Size([1])}, 2**33, 2, torch.float64, chunk_rows=8
        )


def test_what_is_replaced_is_what_the_manifest_listed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": torch.ones(2)}, {})
    (old,) = tmp_path.glob("tensors-*")
    old.with_name("copy.safetensors").write_bytes(old.read_bytes())
    replace_contents(tmp_path, Manifest("fit", {}, files={}), [old.name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.safetensors", MANIFEST]


def test_a_step_that_another_run_recorded_is_not_replaced(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    first, second = (TrainingTrace(model, folder=tmp_path) for _ in range(2))
    first.record([0], lr=0.1)
    with pytest.raises(InvalidArgumentError, match=r"step-0.safetensors' is there already: ano"):
        second.record([1], lr=0.1)
    assert TrainingTrace(folder=tmp_path)[0]["indices"] == [0]


def test_a_trace_that_lost_its_last_step_is_refused(tmp_path: Path) -> None:
    record_trace(tmp_path)
    (tmp_path / "step-5.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="lacks step 5: it was finished after 6 steps"):
        _ = TrainingTrace(folder=tmp_path).final
