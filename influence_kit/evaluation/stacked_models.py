"""Models of one kind with stacked parameters, and checks of which models can be stacked.

Shapes: B models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import stack_module_state
from torch.nn.modules.dropout import _DropoutNd

from influence_kit.errors import InvalidArgumentError

Stacked = dict[str, Tensor]
INSTEAD = "Give `Retraining` a function that trains one model"


class ModelStack(NamedTuple):
    """The first of the models, and the parameters and buffers of all, ``[B, ...]``."""

    base: nn.Module
    parameters: Stacked
    buffers: Stacked

    @classmethod
    def of(cls, models: Sequence[nn.Module]) -> "ModelStack":
        """The models, in training mode."""
        return cls(models[0].train(), *stack_module_state(list(models)))

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [tensor for tensor in self.parameters.values() if tensor.requires_grad]

    def some(self, models: Tensor | None) -> tuple[Stacked, Stacked]:
        """The parameters and the buffers of the models at these indices; None for all."""
        if models is None:
            return self.parameters, self.buffers
        sides = (self.parameters, self.buffers)
        first, second = ({name: t[models.to(t.device)] for name, t in s.items()} for s in sides)
        return first, second

    def tensors(self) -> Stacked:
        """All of them by name, ``[B, ...]``."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}


def put_into(model: nn.Module, stacked: Stacked, index: int) -> nn.Module:
    """The model, with the tensors of the stacked one at that index."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(stacked[name][index])
    return model


def check_model(model: nn.Module, few: Tensor) -> None:
    """Refuse a model that draws random numbers or changes its buffers in training."""
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise InvalidArgumentError(
                f"layer '{name}' is {module}, which draws other random numbers for models trained "
                f"together than for each alone. {INSTEAD}"
            )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            model(few)
    except (RuntimeError, TypeError, IndexError) as error:
        raise InvalidArgumentError(
            f"the model fails on the first of `inputs`, {few.dtype} of shape {list(few.shape)}: "
            f"{error}"
        ) from error
    changed = [n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])]
    if changed:
        raise InvalidArgumentError(
            f"training changes the buffer '{changed[0]}' (as BatchNorm layers do), which stacked "
            f"models do not support. {INSTEAD}"
        )
