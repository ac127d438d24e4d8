"""Per-example gradients of a batch, from one forward and one backward pass.

A forward hook on each layer that has a rule stores the layer's input and the edge of the graph at
its output (``get_gradient_edge``, which is also right if the output is changed in place
afterwards). One backward pass from the summed loss then computes the gradients at these edges only,
so that the weights' own gradients are never computed. Parameters without a rule go to
``functional``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from influence_kit.core.dtypes import exact, exact_dtype, has_complex, real_shape
from influence_kit.core.scaling import scaled_by_powers
from influence_kit.data.batches import Batch, call_model, example_count, example_lengths
from influence_kit.gradients import functional
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense, add_forms
from influence_kit.gradients.graph import refuse_without_graph, uses_in_graph
from influence_kit.gradients.layouts import ROWS, SHARED, arrange, shared
from influence_kit.gradients.loss_scaling import summed_loss
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rule_results import checked_result
from influence_kit.gradients.rules import Rule, rule_for
from influence_kit.gradients.torch_errors import clear_errors
from influence_kit.losses.loss import Loss

FunctionalGradients = Callable[..., dict[str, Dense]]


@dataclass
class Layer:
    """A module that has a rule and owns chosen parameters.

    ``names`` maps its attribute to the parameter's name in the model (a tied parameter has one
    name and several layers); ``layout`` is the arrangement of examples in its tensors
    (``layouts``); ``leads`` is whether tensors that all examples share have a first dimension of
    length 1.
    """

    module: nn.Module
    rule: Rule
    names: dict[str, str]
    layout: str = ROWS
    leads: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a layer: its tensor inputs and the edge of the graph at its output."""

    layer: Layer
    inputs: tuple[Tensor, ...]
    edge: GradientEdge


@dataclass(frozen=True)
class Use:
    """One call of a layer with the gradient of the loss at its output.

    In float16, each example's gradient must still be multiplied by two to its power ``[n]``.
    """

    layer: Layer
    inputs: tuple[Tensor, ...]
    delta: Tensor
    powers: Tensor | None = None


class _NotAView(torch.autograd.Function):
    """The same tensor with its own edge in the graph, which in-place changes do not move."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Capture:
    """Per-example gradients of the chosen parameters of a model.

    Args:
        model: the model; its weights may change between calls, its structure may not.
        parameters: the chosen parameters by name, each once.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.layers = _layers(model, self.parameters)
        ruled = {name for layer in self.layers for name in layer.names.values()}
        # the parameters without a rule, and the function that computes their gradients
        self.without_rule = [name for name in self.parameters if name not in ruled]
        self.functional: FunctionalGradients = functional.vmapped
        # for the last batch: how the layers were called, the lengths of its tensors without the
        # number of examples, and the parameters of a layer whose examples were arranged differently
        self.path: Hashable = ()
        self.shapes: list[list[int]] = []
        self.misplaced: list[str] = []
        # the parameters with a rule that the last batch also used outside their layers, if only
        # with gradient zero
        self.used_outside: set[str] = set()
        # the name of the batch in errors
        self.where = "the batch"
        self._calls: list[Call] | None = None
        self._examples = 0
        # a batch whose uses are wanted, and the list for them
        self._recorded: tuple[Batch, list[Use]] | None = None

    def go_without(self, names: Collection[str]) -> None:
        """Use the slower way for these parameters, as for those already without a rule."""
        without = {*self.without_rule, *names}
        self.without_rule = [name for name in self.parameters if name in without]
        for layer in self.layers:
            if without.issuperset(layer.names.values()):
                layer.layout = ROWS  # so that its outputs are not changed

    @property
    def settings(self) -> Hashable:
        """How gradients are captured: everything that a check may change."""
        layouts = tuple(layer.layout for layer in self.layers)
        return layouts, tuple(self.without_rule), self.functional

    def take_settings(self, settings: Any) -> None:
        """Capture gradients as ``settings`` was at another time."""
        layouts, without_rule, self.functional = settings
        self.without_rule = list(without_rule)
        for layer, layout in zip(self.layers, layouts, strict=True):
            layer.layout = layout

    @property
    def scaled_by_frequency(self) -> set[str]:
        """The embedding tables whose gradients autograd divides by how often a batch holds an id.

        An example's own gradient is divided by how often that example holds it.
        """
        modules = [m for m in self.model.modules() if getattr(m, "scale_grad_by_freq", False)]
        tables = {id(parameter) for m in modules for parameter in m.parameters(recurse=False)}
        return {name for name, parameter in self.parameters.items() if id(parameter) in tables}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the layers have hooks, and only the chosen parameters require gradients."""
        wanted = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        chosen = set(self.parameters.values())
        handles = []
        try:
            for parameter in wanted:
                parameter.requires_grad_(parameter in chosen)
            for layer in self.layers:
                handles.append(
                    layer.module.register_forward_hook(
                        self._hook(layer), prepend=True, with_kwargs=True
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, value in wanted.items():
                parameter.requires_grad_(value)

    def _hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if self._calls is None or not isinstance(output, Tensor):
                return None
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            replaced = None
            if layer.layout == SHARED and self._examples > 1:
                output = replaced = shared(output, self._examples, layer.leads)
            if output.requires_grad and output._is_view():
                # an in-place change would give a view another edge in the graph
                output = replaced = _NotAView.apply(output)
            if output.requires_grad:
                detached = tuple(x.detach() for x in inputs)
                self._calls.append(Call(layer, detached, get_gradient_edge(output)))
            return replaced

        return record

    @contextmanager
    def recording(self, batch: Batch) -> Iterator[list[Use]]:
        """Inside, the uses of this batch (this object) are put into the list when it is called."""
        found: list[Use] = []
        self._recorded = (batch, found)
        try:
            yield found
        finally:
            self._recorded = None

    def uses(self, batch: Batch, loss: Loss, n: int) -> list[Use]:
        """Run the model forward and backward; returns every layer call that the loss depends on."""
        self._calls, self._examples = [], n
        shared_layers = [layer for layer in self.layers if layer.layout == SHARED and n > 1]
        self.misplaced = [name for layer in shared_layers for name in layer.names.values()]
        try:
            with torch.enable_grad(), clear_errors(self.model, batch):
                outputs = call_model(self.model, batch)
                total = summed_loss(outputs, batch, loss, n, self.where)
            calls = self._calls
        finally:
            self._calls = None
        self.misplaced = []
        self._note(calls, batch, n)
        if not total.value.requires_grad:
            refuse_without_graph(self.model, self.parameters.values(), batch, loss, n)
        if not calls or not total.value.requires_grad:
            return []
        self._look_outside(calls, total.value)
        edges = [call.edge for call in calls]
        with clear_errors(self.model, batch):
            deltas, powers = total.gradients_by_example(edges, self.parameters.values(), n)
        if all(delta is None for delta in deltas):
            refuse_without_graph(self.model, self.parameters.values(), batch, loss, n)
        return [
            Use(call.layer, call.inputs, delta, powers)
            for call, delta in zip(calls, deltas, strict=True)
            if delta is not None
        ]

    def _look_outside(self, calls: Sequence[Call], total: Tensor) -> None:
        mine = Counter(name for call in calls for name in call.layer.names.values())
        uses = uses_in_graph(total)
        self.used_outside = {name for name in mine if uses[self.parameters[name]] > mine[name]}

    def _note(self, calls: Sequence[Call], batch: Batch, n: int) -> None:
        """Record the layer calls and tensor lengths of this batch."""
        self.path = tuple(
            (id(call.layer), *(tuple(length == n for length in x.shape) for x in call.inputs))
            for call in calls
        )
        self.shapes = example_lengths(batch)

    def forms(self, uses: Sequence[Use], n: int) -> dict[str, Form]:
        """The forms of all parameters that have a rule; an unused parameter has none."""
        forms: dict[str, Form] = {}
        dropped = set(self.without_rule)
        with torch.no_grad():
            for use in uses:
                if dropped.issuperset(use.layer.names.values()):
                    continue
                self.misplaced = list(use.layer.names.values())
                add_forms(forms, use_forms(use, use.layer.layout, n))
        self.misplaced = []
        return {name: form for name, form in forms.items() if name not in dropped}

    def __call__(self, batch: Batch, loss: Loss) -> Gradients:
        """The gradients of each example's loss. Only inside ``attached``, after ``check``."""
        n = example_count(batch)
        forms = {}
        if len(self.without_rule) < len(self.parameters):
            uses = self.uses(batch, loss, n)
            forms = self.forms(uses, n)
            if self._recorded is not None and self._recorded[0] is batch:
                self._recorded[1][:] = uses
        if self.without_rule:
            chosen = {name: self.parameters[name] for name in self.without_rule}
            # a single example needs no vmap
            function = functional.one_by_one if n == 1 else self.functional
            forms.update(function(self.model, chosen, batch, loss, n))
        shapes = {name: real_shape(parameter) for name, parameter in self.parameters.items()}
        first = next(iter(self.parameters.values())).detach()
        return Gradients(n, forms, shapes, first.new_empty(0, dtype=exact_dtype(first.dtype)))


def use_forms(use: Use, layout: str, n: int) -> dict[str, Form]:
    """The forms of one use of a layer, by parameter name."""
    inputs = [exact(arrange(x, layout, n, use.layer.leads)) for x in use.inputs]
    # the hook expanded the output of a layer with shared inputs: examples come first
    delta = arrange(use.delta, ROWS if layout == SHARED else layout, n)
    found = use.layer.rule(use.layer.module, inputs, exact(delta), n)
    forms = checked_result(found, use.layer.module, use.layer.names, n)
    if use.powers is None:
        return forms
    return {name: scaled_by_powers(form, use.powers) for name, form in forms.items()}


def _layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Layer]:
    names = {parameter: name for name, parameter in parameters.items()}
    layers = []
    for module in model.modules():
        own = {
            attribute: names[parameter]
            for attribute, parameter in module.named_parameters(recurse=False)
            if parameter in names
        }
        # rules are for real numbers: complex parameters go to ``functional``
        rule = rule_for(module) if own and not has_complex(module) else None
        if rule is not None:
            layers.append(Layer(module, rule, own))
    return layers
