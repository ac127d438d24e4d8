"""One flipped bit in any file that the library wrote is noticed before it is used."""

import random
from pathlib import Path

import pytest
import torch
from folders import KINDS, SUBSETS, not_trained, retrain

from influence_kit.checkpoints import files as checkpoint_files
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining
from influence_kit.storage.manifest import MANIFEST, Manifest
from influence_kit.storage.tensor_files import PackedTensors, TensorFile, UnreadableFileError

TRIES = 12


def flipped(data: bytes, bit: int) -> bytes:
    index, place = divmod(bit, 8)
    return data[:index] + bytes([data[index] ^ (1 << place)]) + data[index + 1 :]


def one_of_each_byte(data: bytes) -> range:
    """One bit of each byte, the lowest of the first, the next one of the second, and so on."""
    return range(0, 8 * len(data), 9)


def stem(name: str) -> str:
    """What files of one sort have in common in their names: ``step`` of ``step-3.safetensors``."""
    return "model" if "-seed" in name else name.split("-")[0]


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_noticed_in_every_sort_of_file(name: str, tmp_path: Path) -> None:
    kind, draws = KINDS[name], random.Random(name)
    kind.write(tmp_path, 0)
    whole = kind.read(tmp_path, 0)
    contents = kind.files(tmp_path)
    for sort in sorted({stem(file) for file in contents}):
        for _ in range(TRIES):
            file = draws.choice([one for one in sorted(contents) if stem(one) == sort])
            bit = draws.randrange(8 * len(contents[file]))
            path = tmp_path / kind.holds / file
            path.write_bytes(flipped(contents[file], bit))
            # activations are a cache: damaged ones are computed again, with a warning
            with pytest.raises((InvalidArgumentError, UserWarning)):
                kind.read(tmp_path, 0)
            path.write_bytes(contents[file])
    found = kind.read(tmp_path, 0)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


TENSORS = {
    "a": torch.arange(3, dtype=torch.float16),
    "b": torch.tensor([True, False, True]),
    "c": torch.tensor(1 + 2j),
    "d": torch.ones(0, 4),
}


@pytest.mark.parametrize("algorithm", ["sha256", "crc32"])
def test_every_byte_of_a_file_of_tensors_counts(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    PackedTensors.of(TENSORS, algorithm).write(path, "fit", {"more": "of it"})
    data = path.read_bytes()
    for bit in one_of_each_byte(data):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(UnreadableFileError):
            TensorFile.open(path).tensors()
    path.write_bytes(data)
    found = TensorFile.open(path).tensors()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    Manifest("fit", {"key": 1.5}, {"rows": 3}, {"a": {"size": 1, "checksum": "b"}}).write(tmp_path)
    data = (tmp_path / MANIFEST).read_bytes()
    for bit in one_of_each_byte(data):
        (tmp_path / MANIFEST).write_bytes(flipped(data, bit))
        with pytest.raises(InvalidArgumentError, match=f"{MANIFEST} cannot be read"):
            Manifest.read(tmp_path, "fit", "save it again")


def test_a_damaged_model_is_noticed_where_it_is_a_checkpoint(tmp_path: Path) -> None:
    retrain(tmp_path)
    retraining = Retraining(not_trained, tmp_path, label="sums")
    file = retraining.checkpoints(SUBSETS)[3]
    assert checkpoint_files.read(file).weights["weight"].tolist() == [[3.0, 3.0]]
    data = file.read_bytes()
    # the lowest bit of a number
    file.write_bytes(flipped(data, 8 * (len(data) - 4)))
    with pytest.raises(InvalidArgumentError, match="cannot be read as a checkpoint: is it whole"):
        checkpoint_files.read(file)


def test_a_damaged_activation_is_computed_again(tmp_path: Path) -> None:
    kind = KINDS["activations"]
    kind.write(tmp_path, 0)
    whole, contents = kind.read(tmp_path, 0), kind.files(tmp_path)
    (first,) = (name for name in contents if name.startswith("first"))
    (tmp_path / kind.holds / first).write_bytes(flipped(contents[first], -9))
    kind.write(tmp_path, 0)
    assert kind.files(tmp_path) == contents
    found = kind.read(tmp_path, 0)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
