"""ResNet-9, which the attribution literature trains on CIFAR (TRAK, arXiv 2303.14186).

Eight convolutions with BatchNorm and ReLU, two pairs of them inside residual connections, and a
linear layer without bias. 2.3 M parameters for ten classes.
"""

from torch import Tensor, nn

LOGIT_SCALE = 0.2


def resnet9(classes: int, width: int = 64) -> nn.Sequential:
    """The network for images ``[n, 3, 32, 32]``.

    Args:
        classes: its outputs.
        width: the channels of the first convolution; the others have two and four times as many.
    """
    return nn.Sequential(
        _convolution(3, width),
        _convolution(width, 2 * width, size=5, stride=2, padding=2),
        Residual(_convolution(2 * width, 2 * width), _convolution(2 * width, 2 * width)),
        _convolution(2 * width, 4 * width),
        nn.MaxPool2d(2),
        Residual(_convolution(4 * width, 4 * width), _convolution(4 * width, 4 * width)),
        _convolution(4 * width, 2 * width, padding=0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        # elsewhere the logits are scaled: the same function with the same gradients, but here the
        # last layer is linear
        Scale(LOGIT_SCALE),
        nn.Linear(2 * width, classes, bias=False),
    )


def _convolution(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scale(nn.Module):
    """factor * x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
