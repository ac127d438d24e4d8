"""Torch's own optimizers, made again from what a trace has recorded of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from influence_kit.errors import InvalidArgumentError
from influence_kit.training.recipe import Recipe

KINDS: Mapping[str, Any] = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}
# options that hold two numbers, as a tuple
PAIRS = ("betas",)
# tensors of the optimizer, by parameter and by the optimizer's name for them
Slots = dict[str, dict[str, Tensor]]


def slots_of(model: nn.Module, optimizer: Optimizer | None) -> Slots:
    """The tensors that an optimizer holds for the parameters of a model; not copies."""
    if optimizer is None:
        return {}
    return dict(_held(model, optimizer))


def _held(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, parameter in model.named_parameters():
        held = optimizer.state.get(parameter, {})
        tensors = {slot: value for slot, value in held.items() if isinstance(value, Tensor)}
        if tensors:
            yield name, tensors


class RecordedOptimizer:
    """An optimizer of torch over the parameters of a model, with recorded options and state.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._names: list[list[str]] = []
        self._optimizer: Optimizer | None = None

    def load(self, recipe: Recipe, slots: Slots) -> None:
        """Begin before a step, with the state that the optimizer had there."""
        self._make(recipe)
        assert self._optimizer is not None
        for name, held in slots.items():
            self._optimizer.state[self._parameters[name]] = {
                slot: self._placed(name, slot, value) for slot, value in held.items()
            }

    def step(self, recipe: Recipe) -> None:
        """Take a step with the gradients that are in the model."""
        if [group["params"] for group in recipe.groups] != self._names:
            slots = self.slots()
            self.load(recipe, slots)
        assert self._optimizer is not None
        for own, recorded in zip(self._optimizer.param_groups, recipe.groups, strict=True):
            own.update(_as_options(recorded))
        self._optimizer.step()

    def slots(self) -> Slots:
        """Copies of the optimizer's tensors."""
        return {
            name: {slot: value.clone() for slot, value in held.items()}
            for name, held in slots_of(self._model, self._optimizer).items()
        }

    def _make(self, recipe: Recipe) -> None:
        kind = known_kind(recipe)
        self._names = [list(group["params"]) for group in recipe.groups]
        # a group may have no trained parameter
        groups = [{"params": [self._parameters[n] for n in names]} for names in self._names]
        self._optimizer = kind(groups, lr=0.0)
        for own, recorded in zip(self._optimizer.param_groups, recipe.groups, strict=True):
            own.update(_as_options(recorded))

    def _placed(self, name: str, slot: str, value: Tensor) -> Tensor:
        """A copy of a tensor where the optimizer wants it: counts of steps mostly on the CPU."""
        assert self._optimizer is not None
        parameter = self._parameters[name]
        groups = self._optimizer.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        on_device = slot != "step" or group.get("capturable") or group.get("fused")
        return value.to(parameter.device if on_device else torch.device("cpu"), copy=True)


def known_kind(recipe: Recipe) -> Any:
    """The optimizer's class.

    Raises:
        InvalidArgumentError: for one whose steps cannot be taken again.
    """
    if recipe.optimizer is None:
        raise InvalidArgumentError(
            "the trace has no optimizer: record the run with TrainingTrace(model, optimizer)"
        )
    if recipe.optimizer not in KINDS:
        raise InvalidArgumentError(
            f"the trace is of the optimizer {recipe.optimizer}, whose steps are not known; known "
            f"are torch's {', '.join(KINDS)}"
        )
    if any(name is None for group in recipe.groups for name in group["params"]):
        raise InvalidArgumentError(
            "the optimizer of the trace trained tensors that are not parameters of the model (of "
            "the loss, say); make them parameters of the model"
        )
    return KINDS[recipe.optimizer]


def _as_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in recorded.items() if key != "params"}
    pairs = {key: tuple(options[key]) for key in PAIRS if key in options}
    # the graph of a step is not needed
    return {**options, **pairs, "differentiable": False}
