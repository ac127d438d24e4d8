"""Fixed masks in place of dropout: one of the thinned networks that dropout draws from.

A mask belongs to a dropout layer and has one entry per feature: 0 or 1 / (1 - rate). It depends on
a seed, a member's number, the layer's name and the number of features, and on nothing else: not on
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

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError

# the key of a checkpoint's masks
MASKS = "dropout_masks"


@dataclass(frozen=True)
class FixedMask:
    """A forward hook of a dropout layer in evaluation mode: its output times a mask.

    Args:
        name: the layer's name.
        rate: the share of features that is dropped.
        seed: the seed of all masks.
        member: the number of the ensemble's member.
        axis: the dimension of the features; None for the layer's default (``feature_axis``).
    """

    name: str
    rate: float
    seed: int
    member: int
    axis: int | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output, with the same features dropped in every example."""
        if module.training:
            raise InvalidArgumentError(
                f"the dropout layer '{self.name}' is in training mode, in which it drops features "
                "at random; the masks of an ensemble are for evaluation mode (eval_mode=True)"
            )
        axis = feature_axis(module, output.dim()) if self.axis is None else self.axis
        if not -output.dim() < axis < output.dim() or axis == 0:
            raise InvalidArgumentError(
                f"the dropout layer '{self.name}' got a tensor of shape {list(output.shape)}, "
                f"whose dimension {axis} is not one of features (0 counts examples); give "
                "another in `axes`, or set the layer's rate to 0 with `p`"
            )
        shape = [1] * output.dim()
        shape[axis] = output.shape[axis]
        mask = self.mask(output.shape[axis]).to(output.device, output.dtype)
        return output * mask.reshape(shape)

    def mask(self, size: int) -> Tensor:
        """The mask of a layer with ``size`` features, float64."""
        text = f"{self.seed} {self.member} {self.name} {size}"
        # from numpy, as torch's numbers depend on the device and, inside vmap, on the example
        drawn = np.random.default_rng(_number(text)).random(size)
        return torch.from_numpy((drawn >= self.rate) / (1 - self.rate))


def feature_axis(module: nn.Module, dimensions: int) -> int:
    """The dimension of a dropout layer's features: channels of maps or heads, or the last."""
    channels = isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
    return 1 if channels or dimensions > 3 else dimensions - 1


def set_masks(model: nn.Module, masks: Mapping[str, Any] | None) -> None:
    """Remove the masks of the previous checkpoint, and set those of a checkpoint, if any.

    Args:
        model: the model.
        masks: a dict with "seed", "member", "rates" (per layer) and "axes" (per layer), or None.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FixedMask):
                del module._forward_hooks[key]
    if masks is None:
        return
    _check_masks(masks)
    layers = dict(model.named_modules())
    for name, rate in masks["rates"].items():
        axis = masks["axes"].get(name)
        hook = FixedMask(name, rate, masks["seed"], masks["member"], axis)
        layers[name].register_forward_hook(hook)


def checked_masks(model: nn.Module, masks: Any) -> Mapping[str, Any] | None:
    """The masks of a checkpoint, if any, which must be those of ``dropout_ensemble`` for the model.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if masks is None:
        return None
    if not _are_masks(masks):
        raise InvalidArgumentError(
            f"the checkpoint's '{MASKS}' is {shown(masks)}; it must be what dropout_ensemble "
            "made: a dict with 'seed', 'member', 'rates' and 'axes'. Make the ensemble again"
        )
    layers = dict(model.named_modules())
    for name in masks["rates"]:
        if name not in layers:
            raise InvalidArgumentError(
                f"the checkpoint has a dropout mask for '{name}', a layer that the model does not "
                "have; use the model that the ensemble was made of"
            )
    return dict(masks)


def _are_masks(masks: Any) -> bool:
    if not isinstance(masks, Mapping) or not {"seed", "member", "rates", "axes"} <= masks.keys():
        return False
    rates, axes = masks["rates"], masks["axes"]
    numbers = isinstance(masks["seed"], int) and isinstance(masks["member"], int)
    dicts = isinstance(rates, Mapping) and isinstance(axes, Mapping)
    return (
        numbers
        and dicts
        and all(isinstance(rate, float | int) and 0 <= rate < 1 for rate in rates.values())
        and all(isinstance(axis, int) for axis in axes.values())
    )


def _check_masks(masks: Any) -> None:
    """Refuse masks that are not as ``dropout_ensemble`` makes them."""
    held = masks if isinstance(masks, Mapping) else {}
    rates, axes = held.get("rates"), held.get("axes")
    if isinstance(rates, Mapping) and isinstance(axes, Mapping):
        whole = (held.get("seed"), held.get("member"), *axes.values())
        shares = (isinstance(rate, float | int) and 0 <= rate < 1 for rate in rates.values())
        if all(type(number) is int for number in whole) and all(shares):
            return
    raise InvalidArgumentError(
        f"the checkpoint's '{MASKS}' must be a dict of seed, member, rates and axes, as "
        f"`dropout_ensemble` makes it; got {shown(masks)}"
    )


def mask_numbers(model: nn.Module) -> list[float]:
    """One number in [0, 1) per mask in the model, which identifies the mask."""
    return [
        _number(json.dumps(asdict(hook))) / 2**256
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, FixedMask)
    ]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
