"""How a training step was taken: options of the optimizer, clipping, micro-batches, modes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from influence_kit.core.arguments import check_number, shown
from influence_kit.errors import InvalidArgumentError


@dataclass(frozen=True)
class Recipe:
    """How a step was taken, beside its examples.

    Args:
        optimizer: the name of the optimizer's class; None if the trace had no optimizer.
        groups: the options of each parameter group, with the names of its trained parameters
            (None for a tensor outside the model) under "params".
        clip_norm: the norm to which gradients were clipped; None for no clipping.
        micro_batches: the number of examples of each backward pass; None for one pass.
        evaluated: the names of the modules that were in evaluation mode.
    """

    optimizer: str | None
    groups: list[dict[str, Any]]
    clip_norm: float | None
    micro_batches: list[int] | None
    evaluated: list[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Optimizer | None,
        clip_norm: Any,
        micro_batches: Any,
        count: int,
    ) -> Self:
        """The recipe of the step that is about to be taken, over ``count`` examples."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        return cls(
            None if optimizer is None else type(optimizer).__name__,
            [] if optimizer is None else [_options(g, names) for g in optimizer.param_groups],
            None if clip_norm is None else check_number(clip_norm, "clip_norm", above=0),
            _checked_sizes(micro_batches, count),
            [name for name, module in model.named_modules() if not module.training],
        )

    @property
    def trained(self) -> list[str]:
        """The names of the parameters that the step changed."""
        return [name for group in self.groups for name in group["params"] if name is not None]

    def parts(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The examples of each micro-batch."""
        sizes, start, parts = self.micro_batches or [len(indices)], 0, []
        for size in sizes:
            parts.append(indices[start : start + size])
            start += size
        return parts

    @property
    def unlike_plain_sgd(self) -> str | None:
        """What makes the step another one than plain SGD's, in words; None if nothing does."""
        if self.optimizer not in (None, "SGD"):
            return f"the optimizer is {self.optimizer}"
        for group in self.groups:
            for option in ("momentum", "maximize"):
                if group.get(option):
                    return f"the optimizer has {option}={group[option]}"
        return None if self.clip_norm is None else f"gradients were clipped to {self.clip_norm}"


def group_setting(optimizer: Optimizer | None, name: str, given: Any) -> Any:
    """A setting of a step: the given value, or the optimizer's; a list if its groups differ."""
    if given is not None:
        return given
    if optimizer is None:
        if name == "lr":
            raise InvalidArgumentError(
                "no learning rate: pass `lr`, or the optimizer to TrainingTrace"
            )
        return 0.0
    values = [float(group.get(name, 0.0)) for group in optimizer.param_groups]
    return values[0] if len(set(values)) == 1 else values


def _options(group: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """The options of a parameter group, as JSON has them."""
    trained = [names.get(p) for p in group["params"] if p.requires_grad]
    options: dict[str, Any] = {"params": trained}
    for key, value in group.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            options[key] = float(value)
        elif isinstance(value, tuple | list) and key != "params":
            options[key] = [float(item) for item in value if isinstance(item, int | float | Tensor)]
        elif value is None or isinstance(value, bool | int | float | str):
            options[key] = value
    return options


def _checked_sizes(sizes: Any, count: int) -> list[int] | None:
    if sizes is None:
        return None
    listed = isinstance(sizes, list | tuple)
    if not listed or not all(type(s) is int and s > 0 for s in sizes) or sum(sizes) != count:
        raise InvalidArgumentError(
            "`micro_batches` must be the number of examples of each backward pass of the step, "
            f"ints of at least 1 whose sum is that of the indices, {count}; got {shown(sizes)}"
        )
    return list(sizes)
