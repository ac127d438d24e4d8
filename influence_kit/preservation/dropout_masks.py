"""Fixed masks in place of dropout: one thinned network of all those that dropout draws from.

A mask belongs to a dropout layer and has one entry a feature: 0 or 1 / (1 - rate). It depends on a
seed, a member's number, the layer's name and the number of features, and on nothing else: not on
the batch, the length of a sequence or the device.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError

# where a checkpoint says which masks it goes with
MASKS = "dropout_masks"


@dataclass(frozen=True)
class FixedMask:
    """A forward hook of a dropout layer in evaluation mode: its output times a mask.

    Args:
        name: the layer's name.
        rate: the share of features that is dropped.
        seed: of all masks.
        member: which of the masks.
        axis: the dimension of the features; None for the layer's own (see ``dropout_ensemble``).
    """

    name: str
    rate: float
    seed: int
    member: int
    axis: int | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output with the same features dropped of every example."""
        if module.training:
            raise InvalidArgumentError(
                f"the dropout layer '{self.name}' is in training mode, in which it drops at "
                "random; the masks of an ensemble are for evaluation mode (eval_mode=True)"
            )
        axis = feature_axis(module, output.dim()) if self.axis is None else self.axis
        if not -output.dim() < axis < output.dim() or axis == 0:
            raise InvalidArgumentError(
                f"the dropout layer '{self.name}' saw a tensor of shape {list(output.shape)}, "
                f"whose dimension {axis} is not one of features (0 are the examples); name "
                "another in `axes`, or set the layer's rate to 0 by `p`"
            )
        shape = [1] * output.dim()
        shape[axis] = output.shape[axis]
        mask = self.mask(output.shape[axis]).to(output.device, output.dtype)
        return output * mask.reshape(shape)

    def mask(self, size: int) -> Tensor:
        """The mask of a layer of that many features, float64."""
        text = f"{self.seed} {self.member} {self.name} {size}"
        # numpy's numbers, since torch's change with the device, and inside vmap with the example
        drawn = np.random.default_rng(_number(text)).random(size)
        return torch.from_numpy((drawn >= self.rate) / (1 - self.rate))


def feature_axis(module: nn.Module, dimensions: int) -> int:
    """The dimension of a dropout layer's features: channels of maps and heads, else the last."""
    channels = isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
    return 1 if channels or dimensions > 3 else dimensions - 1


def set_masks(model: nn.Module, masks: Mapping[str, Any] | None) -> None:
    """Take off the masks of the checkpoint before, and put on those of a checkpoint, if any.

    Args:
        model: the model.
        masks: "seed", "member", the "rates" by layer and the "axes" by layer.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FixedMask):
                del module._forward_hooks[key]
    if masks is None:
        return
    layers = dict(model.named_modules())
    for name, rate in masks["rates"].items():
        if name not in layers:
            raise InvalidArgumentError(
                f"the checkpoint has a dropout mask for '{name}', a layer that the model does not "
                "have; is the ensemble of this model?"
            )
        axis = masks["axes"].get(name)
        hook = FixedMask(name, rate, masks["seed"], masks["member"], axis)
        layers[name].register_forward_hook(hook)


def mask_numbers(model: nn.Module) -> list[float]:
    """A number in [0, 1) a mask in the model, by which masks are told."""
    return [
        _number(json.dumps(asdict(hook))) / 2**256
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, FixedMask)
    ]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
