"""Files of tensors: the same bytes for the same tensors, readable by others, refused if others'."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining
from influence_kit.storage.tensor_files import (
    DTYPES,
    PackedTensors,
    TensorFile,
    UnreadableFileError,
    check_if_own,
    is_own_file,
)


def write(path: Path, **tensors: torch.Tensor) -> bytes:
    PackedTensors.of(tensors).write(path, "fit", {"more": "of it"})
    return path.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_here_and_elsewhere(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    value = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    write(path, odd=torch.ones(3, dtype=torch.uint8), value=value.T)
    for found in (TensorFile.open(path).tensors(), load_file(path)):
        assert found["value"].dtype == dtype
        assert torch.equal(found["value"].to(torch.complex128), value.T.to(torch.complex128))


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = write(path, a=torch.ones(2))
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    assert (facts["kind"], facts["file"], facts["more"]) == ("fit", "a.safetensors", "of it")
    assert facts["data"].startswith("sha256:")
    assert int.from_bytes(data[:8], "little") % 64 == 56, "numbers begin at a cache line"
    assert is_own_file(path, "fit")
    assert not is_own_file(path, "trace")
    path.rename(tmp_path / "b.safetensors")
    assert not is_own_file(tmp_path / "b.safetensors", "fit")


def test_the_bytes_depend_on_the_tensors_alone(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.int8)
    first = write(tmp_path / "a.safetensors", a=a, b=b)
    assert write(tmp_path / "a.safetensors", b=b, a=a.T.contiguous().T) == first
    assert write(tmp_path / "a.safetensors", a=-a, b=b) != first


def test_retrained_files_are_the_same_bytes(tmp_path: Path) -> None:
    def train_fn(indices: torch.Tensor, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        files = Retraining(train_fn, folder, label="x").checkpoints(torch.eye(3).bool())
        contents.append(
            {path.name: path.read_bytes() for path in (*files, folder / "manifest.json")}
        )
    assert contents[0] == contents[1]


def test_a_dtype_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    match = r"tensor 'z' has dtype torch.complex128, .* it holds float64, .*: convert it first"
    with pytest.raises(InvalidArgumentError, match=match):
        write(tmp_path / "a.safetensors", z=torch.ones(2, dtype=torch.complex128))
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_no_files_of_the_library(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"\xff\xff\xff")
    (tmp_path / "huge").write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)
    os.mkfifo(tmp_path / "pipe")
    for name in ("theirs.safetensors", "empty", "short", "huge", "pipe", ""):
        with pytest.raises(UnreadableFileError, match="damaged, or influence_kit has not written"):
            TensorFile.open(tmp_path / name)
        assert not is_own_file(tmp_path / name, "fit")
    check_if_own(tmp_path / "theirs.safetensors", {})
    with pytest.raises(UnreadableFileError, match="No such file"):
        TensorFile.open(tmp_path / "nothing")


def test_a_file_that_is_cut_off_or_longer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = write(path, a=torch.ones(2))
    for other in (data[:-1], data + b" "):
        path.write_bytes(other)
        with pytest.raises(UnreadableFileError, match=f"{len(other)} bytes, {len(data)} were"):
            TensorFile.open(path)


def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path: Path) -> None:
    """Its checksum is right, so that it is forged."""
    packed = PackedTensors.of({"a": torch.ones(2)})
    entry = {**packed.entries["a"], "shape": [2**40]}
    path = tmp_path / "a.safetensors"
    PackedTensors({"a": entry}, packed.parts, packed.checksum).write(path, "fit", {})
    assert json.loads(path.read_bytes()[8:].rpartition(b"}")[0] + b"}")["a"]["shape"] == [2**40]
    with pytest.raises(UnreadableFileError, match=r"8 bytes do not hold \[1099511627776\] of"):
        TensorFile.open(path).tensors()
    for lie in ({"shape": [-1, -2]}, {"data_offsets": [-8, 8]}, {"dtype": "F7"}, {"shape": [2.0]}):
        other = PackedTensors({"a": {**packed.entries["a"], **lie}}, packed.parts, packed.checksum)
        other.write(path, "fit", {})
        with pytest.raises(UnreadableFileError):
            TensorFile.open(path).tensors()
    other = PackedTensors({"a": {}}, packed.parts, packed.checksum)
    other.write(path, "fit", {})
    with pytest.raises(UnreadableFileError, match="its header makes no sense"):
        TensorFile.open(path)
