"""CIFAR-10 from its Python or its binary batches (https://www.cs.toronto.edu/~kriz/cifar.html).

A Python batch is a pickled dict with ``b"data"``, bytes ``[n, 3072]`` (red, green, blue planes of
32 x 32), and ``b"labels"``. A binary batch has 3,073 bytes an image: the label, then the pixels.
"""

from pathlib import Path

import numpy as np
import torch

from benchmarks.settings.readers.files import check_folder, find_file
from benchmarks.settings.readers.mnist import Images
from benchmarks.settings.readers.pickled import read_pickled_arrays
from influence_kit.errors import InvalidArgumentError

SIDE, PIXELS = 32, 3 * 32 * 32
CLASSES = 10
CAT, DOG = 3, 5
SUBFOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar2")
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """The 50,000 training and 10,000 test images ``[n, 3, 32, 32]``, scaled to -1 .. 1.

    Read are ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``, or the same with ``.bin``, in
    the folder or in ``cifar-10-batches-py``, ``cifar-10-batches-bin`` or ``cifar2`` below it.

    Raises:
        FileNotFoundError: where a file is missing.
        InvalidArgumentError: where a file is something else.
    """
    folder = check_folder(folder)
    train, test = (_read_batches(folder, names) for names in (TRAIN, TEST))
    return train, test


def read_cifar2(folder: Path) -> tuple[Images, Images]:
    """The cats (label 0) and dogs (label 1) of CIFAR-10, as the attribution literature has them.

    10,000 training and 2,000 test images. (CIFAR-2 of the TRAK paper is the same two classes.)
    """
    train, test = (_only_pets(images) for images in read_cifar10(folder))
    return train, test


def _only_pets(images: Images) -> Images:
    chosen = (images.labels == CAT) | (images.labels == DOG)
    return Images(images.images[chosen], (images.labels[chosen] == DOG).long())


def _read_batches(folder: Path, names: tuple[str, ...]) -> Images:
    pixels, labels = [], []
    for name in names:
        path = find_file(folder, [name, f"{name}.bin"], "CIFAR-10", SUBFOLDERS)
        read = _read_binary if path.suffix == ".bin" else _read_pickled
        own_pixels, own_labels = read(path)
        if own_labels.max(initial=0) >= CLASSES:
            raise InvalidArgumentError(
                f"{path} holds the label {own_labels.max()}; CIFAR-10's are 0 to {CLASSES - 1}"
            )
        pixels.append(own_pixels)
        labels.append(own_labels)
    scaled = torch.from_numpy(np.concatenate(pixels).astype(np.float32)).div(127.5).sub(1)
    classes = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return Images(scaled.view(-1, 3, SIDE, SIDE), classes)


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[n, 3072]`` and labels ``[n]`` of a binary batch."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % (1 + PIXELS):
        raise InvalidArgumentError(
            f"{path} has {len(content)} bytes; a binary batch of CIFAR-10 has {1 + PIXELS} an image"
        )
    rows = content.reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _read_pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[n, 3072]`` and labels ``[n]`` of a Python batch."""
    batch = read_pickled_arrays(path)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        keys = list(batch) if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise InvalidArgumentError(
            f"{path} holds {keys}; a Python batch of CIFAR-10 is a dict with 'data' and 'labels'"
        )
    pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise InvalidArgumentError(
            f"{path} holds 'data' of {pixels.dtype} {list(pixels.shape)} and {len(labels)} labels; "
            f"expected bytes [n, {PIXELS}] and n labels"
        )
    return pixels, labels
