"""MNIST from its four IDX files: 60,000 training and 10,000 test images of 28 x 28 pixels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings.readers.files import find_file
from benchmarks.settings.readers.idx import read_idx
from influence_kit.errors import InvalidArgumentError

# mean and standard deviation of a training pixel between 0 and 1
MEAN, DEVIATION = 0.1307, 0.3081
SUBFOLDERS = ("MNIST/raw", "raw", "mnist")


class Images(NamedTuple):
    """Images ``[n, channels, height, width]`` and their labels ``[n]``."""

    images: Tensor
    labels: Tensor


def read_mnist(folder: Path) -> tuple[Images, Images]:
    """The training and the test images, standardised.

    Read are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``
    and ``t10k-labels-idx1-ubyte``, also with a dot for the last hyphen, each plain or as ``.gz``,
    in the folder or in ``MNIST/raw``, ``raw`` or ``mnist`` below it.

    Raises:
        FileNotFoundError: where a file is missing.
        InvalidArgumentError: where a file is something else, or images and labels do not match.
    """
    train, test = (_read_part(folder, part) for part in ("train", "t10k"))
    return train, test


def _read_part(folder: Path, part: str) -> Images:
    images = read_idx(_find(folder, f"{part}-images", "idx3"), dimensions=3)
    labels = read_idx(_find(folder, f"{part}-labels", "idx1"), dimensions=1)
    if len(images) != len(labels):
        raise InvalidArgumentError(
            f"{folder} holds {len(images)} images and {len(labels)} labels of the part '{part}'"
        )
    pixels = torch.from_numpy(images.astype(np.float32)).div(255).unsqueeze(1)
    return Images((pixels - MEAN) / DEVIATION, torch.from_numpy(labels.astype(np.int64)))


def _find(folder: Path, stem: str, kind: str) -> Path:
    plain = [f"{stem}-{kind}-ubyte", f"{stem}.{kind}-ubyte"]
    names = [*plain, *(f"{name}.gz" for name in plain)]
    return find_file(folder, names, f"MNIST {stem}", inside=SUBFOLDERS)
