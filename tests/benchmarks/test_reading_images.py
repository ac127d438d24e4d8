"""MNIST and CIFAR-10 from small files of their own formats."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from small_files import (
    CIFAR_NAMES,
    cifar_part,
    write_cifar_binary,
    write_cifar_pickles,
    write_idx,
    write_mnist,
)

from benchmarks.settings.data import Sizes
from benchmarks.settings.images import cifar2, cifar10, mnist
from benchmarks.settings.readers.cifar import read_cifar10
from benchmarks.settings.readers.idx import read_idx
from benchmarks.settings.readers.mnist import read_mnist
from benchmarks.settings.readers.pickled import read_pickled_arrays
from influence_kit.errors import InvalidArgumentError


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_is_read_byte_by_byte(tmp_path, ending):
    values = np.arange(24).reshape(2, 3, 4) * 10
    write_idx(tmp_path / f"file{ending}", values)
    assert read_idx(tmp_path / f"file{ending}", 3).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack(">2I", 2051, 1), "magic number 2051.* starts with 2049"),
        (struct.pack(">2I", 2049, 5) + b"abc", r"says that it holds \[5\] bytes and holds 3"),
        (b"\x00\x00", "2 bytes, less than an IDX header"),
        (b"\x1f\x8bnonsense", "cannot be decompressed"),
    ],
    ids=["magic", "length", "header", "gzip"],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, message):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_idx(tmp_path / "labels", 1)


def test_mnist_is_standardised(tmp_path):
    write_mnist(tmp_path)
    (images, labels), test = read_mnist(tmp_path)
    raw = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    expected = (raw.reshape(12, 1, 28, 28) / 255 - 0.1307) / 0.3081
    assert np.allclose(images, expected, atol=1e-6)
    assert labels.tolist() == [*range(10), 0, 1]
    assert test.images.shape == (5, 1, 28, 28)
    assert test.labels.dtype == torch.int64


def test_mnist_is_found_in_the_folder_that_torchvision_makes(tmp_path):
    inside = tmp_path / "MNIST" / "raw"
    inside.mkdir(parents=True)
    write_mnist(inside)
    assert len(read_mnist(tmp_path)[0].labels) == 12


def test_a_missing_file_is_named_and_where_it_was_looked_for(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    message = (
        r"MNIST t10k-labels: .* has no t10k-labels-idx1-ubyte or .*\(or in MNIST/raw/ or .*mnist/\)"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_mnist(tmp_path)


def test_images_without_labels_are_refused(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(3))
    with pytest.raises(InvalidArgumentError, match="12 images and 3 labels of the part 'train'"):
        read_mnist(tmp_path)


@pytest.mark.parametrize("write", [write_cifar_pickles, write_cifar_binary])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py", "cifar-10-batches-bin"])
def test_cifar_is_read_from_either_format(tmp_path, write, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    write(tmp_path / inside)
    train, test = read_cifar10(tmp_path)
    parts = [cifar_part(name) for name in CIFAR_NAMES]
    pixels = np.concatenate([p for p, _ in parts[:5]]).reshape(20, 3, 32, 32)
    assert np.allclose(train.images, pixels / 127.5 - 1, atol=1e-6)
    assert train.labels.tolist() == [label for _, labels in parts[:5] for label in labels]
    assert test.labels.tolist() == parts[5][1]


def test_cifar2_is_cats_and_dogs(tmp_path):
    write_cifar_binary(tmp_path, count=10)
    (all_images, labels), _ = read_cifar10(tmp_path)
    data = cifar2(tmp_path, Sizes())
    images, pets = data.train.tensors
    chosen = [i for i, label in enumerate(labels.tolist()) if label in (3, 5)]
    assert torch.equal(images, all_images[chosen])
    assert pets.tolist() == [int(labels[i] == 5) for i in chosen]
    assert data.outputs == 2


def test_the_first_examples_are_taken(tmp_path):
    write_mnist(tmp_path)
    data = mnist(tmp_path, Sizes(7, 3))
    assert (len(data.train), len(data.test), data.outputs, data.inputs) == (7, 3, 10, 784)
    assert data.train.tensors[1].tolist() == list(range(7))
    assert data.folder == tmp_path


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(13, 1), "13 training examples were asked for; there are 12"),
        (Sizes(1, 6), "6 test examples were asked for; there are 5"),
        (Sizes(0, 1), "0 training examples were asked for"),
    ],
)
def test_more_examples_than_there_are_are_refused(tmp_path, sizes, message):
    write_mnist(tmp_path)
    with pytest.raises(InvalidArgumentError, match=message):
        mnist(tmp_path, sizes)


def test_a_folder_must_be_named_and_exist(tmp_path):
    with pytest.raises(InvalidArgumentError, match="name the folder"):
        mnist(None, Sizes())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        cifar10(tmp_path / "nowhere", Sizes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, r"holds \[b'data'\]; a Python batch"),
        ([1, 2], "holds a list; a Python batch"),
        ({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]}, r"uint8 \[2, 7\] and 2 labels"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "float64"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "and 1 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "holds the label 10"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, content, message):
    write_cifar_pickles(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(InvalidArgumentError, match=message):
        read_cifar10(tmp_path)


def test_a_binary_batch_of_another_size_is_refused(tmp_path):
    write_cifar_binary(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x00" * 3072)
    with pytest.raises(InvalidArgumentError, match=r"has 3072 bytes; .* has 3073 an image"):
        read_cifar10(tmp_path)


class Evil:
    """What would write a file, were its pickle loaded as usual."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_cannot_run_code(tmp_path, protocol):
    target = tmp_path / "written"
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": Evil(str(target))}, protocol))
    with pytest.raises(InvalidArgumentError, match=r"it asks for .*open, which no array needs"):
        read_pickled_arrays(tmp_path / "batch")
    assert not target.exists()


def test_bytes_may_be_encoded_as_latin_1_only(tmp_path):
    assert pickle.dumps(b"\xff", 2).count(b"latin1") == 1
    (tmp_path / "good").write_bytes(pickle.dumps(b"\xff", 2))
    assert read_pickled_arrays(tmp_path / "good") == b"\xff"
    (tmp_path / "bad").write_bytes(pickle.dumps(b"\xff", 2).replace(b"latin1", b"rot_13"))
    with pytest.raises(InvalidArgumentError, match="bytes encoded as rot_13"):
        read_pickled_arrays(tmp_path / "bad")


def test_the_names_of_numpy_1_are_known(tmp_path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    file = io.BytesIO()
    pickle.Pickler(file, 2).dump(array)
    old = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old").write_bytes(old)
    assert read_pickled_arrays(tmp_path / "old").tolist() == array.tolist()


def test_a_damaged_pickle_is_refused(tmp_path):
    (tmp_path / "batch").write_bytes(pickle.dumps([1, 2, 3])[:-3])
    with pytest.raises(InvalidArgumentError, match="cannot be read as pickled arrays"):
        read_pickled_arrays(tmp_path / "batch")
