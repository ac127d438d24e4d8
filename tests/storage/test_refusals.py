"""Folders that are in order as files, and not as what they claim to hold."""

from pathlib import Path
from typing import IO

import pytest
import torch
from folders import KINDS, read_models, record_trace, retrain
from torch import nn

from influence_kit import TrainingTrace
from influence_kit.errors import InvalidArgumentError
from influence_kit.storage import folders
from influence_kit.storage.folders import read_folder, write_folder
from influence_kit.storage.manifest import MANIFEST, Manifest
from influence_kit.storage.tensor_files import PackedTensors

EMPTY = PackedTensors.of({"a": torch.ones(2)})


def test_a_manifest_that_the_system_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match=r"cannot be read .*Not a directory.*; save it"):
        Manifest.read(tmp_path / "file", "fit", "save it again")

    def refuse(path: Path) -> IO[bytes]:
        raise PermissionError("no permission")

    Manifest("fit", {}).write(tmp_path)
    monkeypatch.setattr("influence_kit.storage.manifest.opened", refuse)
    with pytest.raises(InvalidArgumentError, match=r"cannot be read \(no permission\); save it ag"):
        Manifest.read(tmp_path, "fit", "save it again")


def test_reading_goes_on_where_another_process_saves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"a": torch.zeros(2)}, {})
    read = folders.read_listed

    def late(*given: object) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(folders, "read_listed", read)
        write_folder(tmp_path, {"a": torch.ones(2)}, {})
        return read(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(folders, "read_listed", late)
    assert torch.equal(read_folder(tmp_path, {})["a"], torch.ones(2))


@pytest.mark.parametrize("facts", [{}, {"facts": "{", "steps": "many"}])
def test_a_step_without_its_facts_is_refused(facts: dict[str, str], tmp_path: Path) -> None:
    record_trace(tmp_path)
    EMPTY.write(tmp_path / "step-1.safetensors", "trace", facts)
    EMPTY.write(tmp_path / "final.safetensors", "trace", facts)
    trace = TrainingTrace(folder=tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"step-1.safetensors' cannot be read as a step"):
        trace[1]
    with pytest.raises(InvalidArgumentError, match=r"final.safetensors' cannot be read as a step"):
        _ = trace.final


def test_a_file_under_another_name_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    record_trace(tmp_path / "trace")
    step = tmp_path / "trace" / "step-1.safetensors"
    step.write_bytes((tmp_path / "trace" / "step-2.safetensors").read_bytes())
    with pytest.raises(InvalidArgumentError, match=r"step-1.* \(it is another file\); record the"):
        TrainingTrace(folder=tmp_path / "trace")[1]
    retrain(tmp_path / "models")
    one, other, *_ = sorted((tmp_path / "models").glob("*.safetensors"))
    one.write_bytes(other.read_bytes())
    match = r"the model of .* cannot be read .* \(it is another file\); remove the file to train"
    with pytest.raises(InvalidArgumentError, match=match):
        read_models(tmp_path / "models")


def test_activations_without_their_files_are_computed_again(tmp_path: Path) -> None:
    kind = KINDS["activations"]
    kind.write(tmp_path, 0)
    whole, there = kind.files(tmp_path), tmp_path / kind.holds
    found = Manifest.read(there, "activations", "")
    Manifest("activations", found.description, files={}).write(there)
    with pytest.raises(UserWarning, match=r"are computed again, because .* lists no outputs"):
        kind.read(tmp_path, 0)
    kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == whole
    next(there.glob("outputs-*")).unlink()
    with pytest.raises(InvalidArgumentError, match=r"is not there, and manifest.json lists it; `l"):
        kind.read(tmp_path, 0)
    next(there.glob("first-*")).unlink()
    with pytest.raises(UserWarning, match=r"are computed again, because .* is not there, and mani"):
        kind.read(tmp_path, 0)
    kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == whole


def test_a_trace_that_is_finished_again_is_the_same(tmp_path: Path) -> None:
    record_trace(tmp_path)
    before = KINDS["trace"].files(tmp_path)
    record_trace(tmp_path)
    assert KINDS["trace"].files(tmp_path) == before
    model = nn.Linear(2, 2)
    assert len(TrainingTrace(model, folder=tmp_path, resume_at=0)) == 0
    assert list(KINDS["trace"].files(tmp_path)) == [MANIFEST]


def test_a_trace_goes_on_before_a_damaged_step(tmp_path: Path) -> None:
    record_trace(tmp_path)
    step = tmp_path / "step-4.safetensors"
    data = bytearray(step.read_bytes())
    data[-1] ^= 1
    step.write_bytes(data)
    assert len(TrainingTrace(nn.Linear(2, 2), folder=tmp_path, resume_at=4)) == 4
    record_trace(tmp_path)
    step.write_bytes(b"nothing")
    with pytest.raises(InvalidArgumentError, match=r"step-4.safetensors' is damaged, .* delete it"):
        TrainingTrace(nn.Linear(2, 2), folder=tmp_path, resume_at=3)
    step.unlink()
    assert len(TrainingTrace(nn.Linear(2, 2), folder=tmp_path, resume_at=3)) == 3
