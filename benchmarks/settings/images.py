"""The data of the image settings: the first examples of the data sets, in their own order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.settings.data import Data, Sizes, first
from benchmarks.settings.readers.cifar import read_cifar2, read_cifar10
from benchmarks.settings.readers.files import check_folder
from benchmarks.settings.readers.mnist import DEVIATION, MEAN, Images, read_mnist

# of a pixel between 0 and 1, roughly: those of all three channels
CIFAR_MEAN, CIFAR_DEVIATION = 0.47, 0.25


def mnist(folder: Path | None, sizes: Sizes) -> Data:
    """MNIST; see ``read_mnist`` for the files."""
    return _data(read_mnist, folder, sizes, classes=10)


def cifar10(folder: Path | None, sizes: Sizes) -> Data:
    """CIFAR-10; see ``read_cifar10`` for the files."""
    return _data(read_cifar10, folder, sizes, classes=10)


def cifar2(folder: Path | None, sizes: Sizes) -> Data:
    """The cats and dogs of CIFAR-10."""
    return _data(read_cifar2, folder, sizes, classes=2)


def mnist_pixels(folder: Path | None, sizes: Sizes) -> Data:
    """MNIST with pixels from 0 to 1."""
    return _changed(mnist(folder, sizes), lambda images: images * DEVIATION + MEAN)


def small_cifar2(folder: Path | None, sizes: Sizes) -> Data:
    """The cats and dogs, of 16 x 16 pixels that are means of four, standardised."""

    def halved(images: Tensor) -> Tensor:
        return F.avg_pool2d(((images + 1) / 2 - CIFAR_MEAN) / CIFAR_DEVIATION, 2)

    return _changed(cifar2(folder, sizes), halved)


def _changed(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    """The data with other images."""
    train, test = (
        TensorDataset(change(part.tensors[0]), part.tensors[1]) for part in (data.train, data.test)
    )
    return replace(data, train=train, test=test)


def _data(
    read: Callable[[Path], tuple[Images, Images]], folder: Path | None, sizes: Sizes, classes: int
) -> Data:
    folder = check_folder(folder)
    train, test = read(folder)
    return Data(
        first(train, sizes.train, "training"),
        first(test, sizes.test, "test"),
        outputs=classes,
        folder=folder,
    )
