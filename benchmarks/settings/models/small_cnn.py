"""A small convolutional network for small images."""

from torch import nn

SIDE, CHANNELS, HIDDEN = 16, (16, 32), 32


def small_cnn(outputs: int) -> nn.Sequential:
    """Two convolutions 3 x 3, each halved by max pooling, then 512-32-outputs; 16 x 16 images."""
    first, second = CHANNELS
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (SIDE // 4) ** 2, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, outputs),
    )
