"""The digits, some wrong labels, and a small network trained on them.

The data are the 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn (UCI Machine
Learning Repository, CC BY 4.0). Shapes: n training images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from influence_kit.errors import InvalidArgumentError

CLASSES = 10
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """The settings of the demo; the seed fixes the split, the wrong labels, the weights, the order.

    Attributes:
        epochs: passes over the training images.
        checkpoints: how many are saved, evenly spaced, the last at the end.
        learning_rate: of the first epoch; it decreases linearly towards 0.
        wrong_share: the share of the training labels that is changed.
        k: proponents and opponents shown per test image.
        seed: of all random draws.
    """

    epochs: int = 15
    checkpoints: int = 5
    learning_rate: float = 0.3
    wrong_share: float = 0.1
    k: int = 4
    seed: int = 0


class Digits(NamedTuple):
    """Images ``[n, 1, 8, 8]`` from 0 (paper) to 1 (ink), and labels ``[n]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread: with images this small, more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_digits_split(test_share: float = 0.2, seed: int = 0) -> Digits:
    """The digits of scikit-learn, split at random.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install "
            "'scikit-learn>=1.3', or in a clone of influence_kit pip install '.[demo]'"
        ) from error
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(test_share * len(labels))])
    return Digits(images[train], labels[train], images[test], labels[test])


def flip_labels(labels: Tensor, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The labels ``[n]`` with a share changed to a random other class, and which: bool ``[n]``."""
    if not 0 <= share <= 1:
        raise InvalidArgumentError(f"`share` of labels to flip is {share}; it must be from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    is_wrong = torch.zeros(len(labels), dtype=torch.bool)
    is_wrong[chosen] = True
    shift = torch.randint(1, CLASSES, labels.shape, generator=generator)
    return torch.where(is_wrong, (labels + shift) % CLASSES, labels), is_wrong


def make_network(seed: int = 0) -> nn.Sequential:
    """Two convolutions and a linear layer, with weights drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        )


def train_network(
    images: Tensor,
    labels: Tensor,
    folder: Path | None = None,
    settings: Settings | None = None,
    show_progress: bool = False,
) -> tuple[nn.Sequential, list[Path]]:
    """A network trained by plain SGD, and the files of its checkpoints.

    Args:
        images: the training images ``[n, 1, 8, 8]``.
        labels: the labels to learn, ``[n]``.
        folder: where to save the checkpoints; None saves none.
        settings: epochs, checkpoints, learning rate and seed.
        show_progress: a progress bar over the epochs.

    Raises:
        InvalidArgumentError: for no checkpoint, or more checkpoints than epochs.
    """
    settings = settings or Settings()
    if not 1 <= settings.checkpoints <= settings.epochs:
        raise InvalidArgumentError(
            f"got {settings.checkpoints} checkpoints in {settings.epochs} epochs; there must be at "
            "least one checkpoint, and at most one per epoch"
        )
    saved = [settings.epochs * (c + 1) // settings.checkpoints for c in range(settings.checkpoints)]
    model = make_network(settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    files = []
    for epoch in tqdm(range(1, settings.epochs + 1), "training", disable=not show_progress):
        rate = settings.learning_rate * (1 - (epoch - 1) / settings.epochs)
        optimizer.param_groups[0]["lr"] = rate
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        if folder is not None and epoch in saved:
            files.append(folder / f"epoch-{epoch:02d}.pt")
            state = {"state_dict": model.state_dict(), "learning_rate": rate, "epoch": epoch}
            torch.save(state, files[-1])
    return model.eval(), files


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose predicted class is the label."""
    return float((model(images).argmax(1) == labels).float().mean())
