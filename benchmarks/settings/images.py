"""The data of the image settings: the first examples of the data sets, in their own order."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.settings.data import Data, Sizes, first
from benchmarks.settings.readers.cifar import read_cifar2, read_cifar10
from benchmarks.settings.readers.files import check_folder
from benchmarks.settings.readers.mnist import Images, read_mnist


def mnist(folder: Path | None, sizes: Sizes) -> Data:
    """MNIST; see ``read_mnist`` for the files."""
    return _data(read_mnist, folder, sizes, classes=10)


def cifar10(folder: Path | None, sizes: Sizes) -> Data:
    """CIFAR-10; see ``read_cifar10`` for the files."""
    return _data(read_cifar10, folder, sizes, classes=10)


def cifar2(folder: Path | None, sizes: Sizes) -> Data:
    """The cats and dogs of CIFAR-10."""
    return _data(read_cifar2, folder, sizes, classes=2)


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
