"""The first check of a capture: it is compared with autograd on a few examples of a batch.

A few examples, drawn from the whole batch, go through the model together, in another order than in
the batch, and each alone. The gradients from the rules must sum to autograd's gradient of all of
them, and each must equal the gradient of its example alone. A parameter that fails (used outside
its layer's forward, or in a way that its rule does not cover) goes to ``functional``; a model that
mixes the examples of a batch has no gradient per example and is refused. The comparison is made in
float64 if the model runs in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_kit.data.batches import Batch, call_model, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients import functional
from influence_kit.gradients.autograd_comparison import (
    ALONE,
    WIDENED,
    Comparison,
    same_random_state,
    tolerance_of,
)
from influence_kit.gradients.capture import Capture, Layer, Use, use_forms
from influence_kit.gradients.explanation import explanation
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import add_forms
from influence_kit.gradients.layouts import ROWS, SHARED, candidates
from influence_kit.gradients.precision import in_float64
from influence_kit.losses.loss import Loss
from influence_kit.preservation.training_flags import evaluating


def check(capture: Capture, batch: Batch, loss: Loss) -> set[str]:
    """Determine the layouts of a capture, the parameters without a rule, and the loss's reduction.

    Args:
        capture: the capture of the model, attached.
        batch: the few examples.
        loss: the loss.

    Returns:
        The names of the parameters whose gradient was not zero: only these are verified.

    Raises:
        InvalidArgumentError: if the model or the loss has no gradient per example.
    """
    refuse_mixing_layers(capture.model)
    with in_float64(capture.model, loss, batch) as wide:
        few = batch if wide is None else wide
        tolerance = None if wide is None else WIDENED
        if example_count(few) > 1:
            _settle_loss(capture.model, take(few, slice(0, ALONE + 1)), loss, wide is not None)
        elif not loss.settled and loss.reduction is None:
            with suppress(Exception):  # a single example twice distinguishes a sum from a mean
                _settle_loss(capture.model, take(few, torch.tensor([0, 0])), loss, wide is not None)
        comparison = Comparison(
            capture.model, capture.parameters, few, loss, tolerance, capture.scaled_by_frequency
        )
        failed = _LayoutSearch(capture, comparison).run()
        capture.go_without(failed | capture.used_outside)
        if capture.without_rule:
            settle_functional(capture, comparison)
    return comparison.moving


def refuse_meta(model: nn.Module) -> None:
    """Refuse parameters without values (an empty or offloaded model)."""
    meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if meta:
        raise InvalidArgumentError(
            f"the parameters {meta[:3]} of the model are on the device 'meta', without values "
            "(an empty or offloaded model): load the weights onto one device first"
        )


def refuse_mixing_layers(model: nn.Module) -> None:
    """Refuse a BatchNorm layer that uses the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise InvalidArgumentError(
                f"layer '{name}' ({type(module).__name__}) normalizes by the statistics of the "
                "batch, so the gradient of one example depends on the others; put the model in "
                "evaluation mode (eval_mode=True), with running statistics, or replace the layer "
                "by GroupNorm"
            )


def _settle_loss(model: nn.Module, batch: Batch, loss: Loss, is_wide: bool) -> None:
    """Compare a reduced loss with the losses of single examples, in evaluation mode."""
    n = example_count(batch)
    with evaluating(model), torch.no_grad():
        # a model's own loss is identified by its gradient at the logits
        with torch.set_grad_enabled(not loss.is_of_outputs):
            together = call_model(model, batch)
        if loss.values(together, batch).dim() > 0:
            loss.settled = True
            return
        loss.check_not_reduced(n)
        alone = [take(batch, slice(i, i + 1)) for i in range(n)]
        runs = [(call_model(model, one), one) for one in alone]
        # an example whose loss is NaN (without any label, say) shows nothing
        usable = [bool(torch.isfinite(loss.values(*run).sum())) for run in runs]
        if any(usable):
            small = batch
            if not all(usable):
                small = take(batch, torch.arange(n)[torch.tensor(usable)])
            singles = [run for run, finite in zip(runs, usable, strict=True) if finite]
            close = WIDENED.alone if is_wide else tolerance_of(next(model.parameters())).alone
            outputs = together
            if small is not batch:
                with torch.set_grad_enabled(not loss.is_of_outputs):
                    outputs = call_model(model, small)
            try:
                loss.settle((outputs, small), singles, close / 50)
            except InvalidArgumentError as error:
                cause = explanation(model, batch, loss, of_outputs_only=True)
                raise InvalidArgumentError(cause or str(error)) from None


class _LayoutSearch:
    """Finds the layout of the examples in the tensors of each layer, by trying."""

    def __init__(self, capture: Capture, comparison: Comparison) -> None:
        self.capture, self.comparison = capture, comparison
        # per layer: the shapes of its tensors, the likeliest layout for them, and the names that
        # were wrong in all layouts so far with the layouts still to be tried
        self.shapes: dict[int, list[torch.Size]] = {}
        self.first: dict[int, str] = {}
        self.tried: dict[int, tuple[set[str], Iterator[str]]] = {}
        # the layers whose outputs got a batch dimension, in order
        self.shared: list[Layer] = []
        for layer in capture.layers if comparison.n > 1 else ():
            layer.layout = ROWS

    def run(self) -> set[str]:
        """Find the layout of each layer; returns the parameters for which no layout is right."""
        known = set(self.capture.without_rule)
        failed: set[str] = set()
        while True:
            uses = self._run()
            if self._propose(uses):
                continue
            names = [name for name in self.capture.parameters if name not in known | failed]
            wrong = self.comparison.wrong(self._forms(uses), names)
            if not wrong:
                return failed
            for layer in self.capture.layers:
                mine = wrong & set(layer.names.values())
                if mine:
                    failed |= self._advance(layer, mine)

    def _advance(self, layer: Layer, wrong: set[str]) -> set[str]:
        """Give a layer its next layout; once all were tried, returns the names wrong in all."""
        always, untried = self.tried.get(id(layer), (wrong, iter(())))
        following = next(untried, None)
        if following is not None:
            self.tried[id(layer)] = (always & wrong, untried)
            self._set(layer, following)
            return set()
        # return to the likeliest, which may be right for another parameter of the layer
        self._set(layer, self.first.get(id(layer), ROWS))
        self.tried[id(layer)] = (set(layer.names.values()), iter(()))
        return (always & wrong) or wrong

    def _propose(self, uses: Sequence[Use]) -> bool:
        """Give each layer the likeliest layout for the shapes of its tensors.

        True as soon as one is SHARED: its output will get a first dimension of examples, and later
        layers will have other shapes.
        """
        n, without = self.comparison.n, set(self.capture.without_rule)
        for use in uses if n > 1 else ():  # a single example owns all that its layers see
            if without.issuperset(use.layer.names.values()):
                continue
            layer, mine = use.layer, [u for u in uses if u.layer is use.layer]
            shapes = [x.shape for u in mine for x in u.inputs]
            if self.shapes.get(id(layer)) != shapes:
                self.shapes[id(layer)] = shapes
                tensors = [t for u in mine for t in (*u.inputs, u.delta)]
                first, *others = candidates(tensors, n)
                self.tried[id(layer)] = (set(layer.names.values()), iter(others))
                self.first[id(layer)] = first
                self._set(layer, first)
                if layer.layout == SHARED:
                    return True
        return False

    def _set(self, layer: Layer, layout: str) -> None:
        layer.layout = layout
        if layout == SHARED:
            layer.leads = all(shape[:1] == (1,) for shape in self.shapes[id(layer)])
            self.shared.append(layer)

    def _run(self) -> list[Use]:
        comparison = self.comparison
        with same_random_state(list(comparison.parameters.values())):
            try:
                return self.capture.uses(comparison.together, comparison.loss, comparison.n)
            except Exception:  # the model's own error, or the loss's about a changed shape
                if not self.shared:
                    raise
        # the model does not accept an output with a batch dimension there
        self.shared.pop().layout = ROWS
        return self._run()

    def _forms(self, uses: Sequence[Use]) -> dict[str, Form]:
        forms: dict[str, Form] = {}
        unfit: set[str] = set()
        for use in uses:
            try:
                with torch.no_grad():
                    found = use_forms(use, use.layer.layout, self.comparison.n)
            except (ValueError, RuntimeError):
                unfit |= set(use.layer.names.values())
                continue
            add_forms(forms, found)
        return {name: form for name, form in forms.items() if name not in unfit}


def settle_functional(capture: Capture, comparison: Comparison) -> None:
    """Use ``vmap`` if it runs and is right, else one example at a time.

    Raises:
        InvalidArgumentError: if examples together have other gradients than each alone.
    """
    parameters = {name: capture.parameters[name] for name in capture.without_rule}
    together, loss, n = comparison.together, comparison.loss, comparison.n
    reason = ""
    # ``vmap`` is not tried again once it was wrong
    ways = (functional.vmapped, functional.one_by_one)
    wrong: set[str] = set()
    for way in ways[ways.index(capture.functional) :] if n > 1 else ways[1:]:
        try:
            with same_random_state(list(parameters.values())):
                forms = way(capture.model, parameters, together, loss, n)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if way is functional.one_by_one:
                cause = explanation(capture.model, together, loss)
                if cause is None:
                    raise
                raise InvalidArgumentError(cause) from error
            reason = f" ({error})"
            continue
        wrong = comparison.wrong(forms, list(parameters))
        if not wrong or (comparison.random and way is functional.one_by_one):
            if n > 1:
                capture.functional = way
            return
    cause = explanation(capture.model, together, loss) or ""
    raise InvalidArgumentError(
        f"the gradient of {sorted(wrong)} for {n} examples together is not the sum of those of "
        f"each alone{reason}. {cause or MIXES}"
    )


MIXES = (
    "The model or the loss mixes the examples of a batch, so no part of the loss belongs to one of "
    "them; batches of one example (batch_size=1) always work"
)
