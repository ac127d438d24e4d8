"""Before a capture is trusted: it is compared with autograd on a few examples of the first batch.

Three examples go through the model together and each alone. What the rules give must sum to
autograd's gradient of the three, and be, row by row, the gradient of each alone. A parameter that
fails (used outside its layer's forward, or in a way that its rule does not know) goes to
``functional``; a model that mixes the examples of a batch has no gradient per example and is
refused.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_kit.data import Batch, call_model, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients import functional
from influence_kit.gradients.capture import Capture, Layer, Use, use_forms
from influence_kit.gradients.comparison import EXAMPLES, Comparison, spread, tolerance_of
from influence_kit.gradients.forms import Form
from influence_kit.gradients.layouts import ROWS, SHARED, candidates
from influence_kit.losses import Loss
from influence_kit.training_flags import evaluating

LOSS_EXAMPLES = 8


def check(capture: Capture, batch: Batch, loss: Loss) -> None:
    """Settle the layouts of a capture, which parameters go without a rule, and the loss.

    Raises:
        InvalidArgumentError: where the model or the loss has no gradient per example.
    """
    refuse_mixing_layers(capture.model)
    _settle_loss(capture.model, batch, loss)
    comparison = Comparison(capture.model, capture.parameters, batch, loss)
    failed = _LayoutSearch(capture, comparison).run() | set(capture.without_rule)
    capture.without_rule = [name for name in capture.parameters if name in failed]
    if failed:
        _settle_functional(capture, comparison)


def refuse_mixing_layers(model: nn.Module) -> None:
    """An error where a BatchNorm layer uses the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise InvalidArgumentError(
                f"layer '{name}' ({type(module).__name__}) normalizes by the statistics of the "
                "batch, so that the gradient of one example depends on the others; put the model "
                "in evaluation mode (eval_mode=True), with running statistics, or replace the "
                "layer by GroupNorm"
            )


def _settle_loss(model: nn.Module, batch: Batch, loss: Loss) -> None:
    """Let a reduced loss be compared with the losses of single examples, in evaluation mode."""
    n = example_count(batch)
    # a single example twice tells a sum from a mean
    places = spread(n, max(2, min(n, LOSS_EXAMPLES)))
    with evaluating(model), torch.no_grad():
        small = take(batch, places)
        if loss.values(call_model(model, small), small).dim() > 0:
            loss.settled = True
            return
        alone = [take(batch, slice(int(i), int(i) + 1)) for i in places]
        runs = [(call_model(model, one), one) for one in alone]
        # an example whose loss is NaN (nothing labelled in it, say) tells nothing
        tells = [bool(torch.isfinite(loss.values(*run).sum())) for run in runs]
        if any(tells):
            small = take(batch, places[torch.tensor(tells)])
            singles = [run for run, finite in zip(runs, tells, strict=True) if finite]
            closeness = tolerance_of(next(model.parameters())).alone / 50
            loss.settle((call_model(model, small), small), singles, closeness)


class _LayoutSearch:
    """Finds where the examples stand in the tensors of each layer, by trying."""

    def __init__(self, capture: Capture, comparison: Comparison) -> None:
        self.capture, self.comparison = capture, comparison
        # by layer: the shapes it saw, the likeliest layout for them, and the names that were wrong
        # in all layouts so far with the layouts that are still to be tried
        self.shapes: dict[int, list[torch.Size]] = {}
        self.first: dict[int, str] = {}
        self.tried: dict[int, tuple[set[str], Iterator[str]]] = {}
        # the layers whose outputs were given a batch dimension, in order
        self.shared: list[Layer] = []

    def run(self) -> set[str]:
        """Find the layout of each layer; the names of the parameters for which none is right."""
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
        """Give a layer its next layout; the names wrong in all of them, when all were tried."""
        always, untried = self.tried.get(id(layer), (wrong, iter(())))
        following = next(untried, None)
        if following is not None:
            self.tried[id(layer)] = (always & wrong, untried)
            self._set(layer, following)
            return set()
        # back to the likeliest, which may be right for another parameter of the layer
        self._set(layer, self.first.get(id(layer), ROWS))
        self.tried[id(layer)] = (set(layer.names.values()), iter(()))
        return (always & wrong) or wrong

    def _propose(self, uses: Sequence[Use]) -> bool:
        """Give each layer the likeliest layout for the shapes it saw.

        True as soon as one is SHARED: its output will have the examples in front, and the layers
        behind it will see other shapes.
        """
        for use in uses:
            layer, mine = use.layer, [u for u in uses if u.layer is use.layer]
            shapes = [x.shape for u in mine for x in u.inputs]
            if self.shapes.get(id(layer)) != shapes:
                self.shapes[id(layer)] = shapes
                tensors = [t for u in mine for t in (*u.inputs, u.delta)]
                first, *others = candidates(tensors, EXAMPLES)
                self.tried[id(layer)] = (set(layer.names.values()), iter(others))
                self.first[id(layer)] = first
                self._set(layer, first)
                if layer.layout == SHARED:
                    return True
        return False

    def _set(self, layer: Layer, layout: str) -> None:
        layer.layout = layout
        if layout == SHARED:
            self.shared.append(layer)

    def _run(self) -> list[Use]:
        comparison = self.comparison
        with comparison.same_random_state():
            try:
                return self.capture.uses(comparison.together, comparison.loss, EXAMPLES)
            except Exception:  # the model's, or the loss's word on a changed shape
                if not self.shared:
                    raise
        # the model does not take an output with a batch dimension there
        self.shared.pop().layout = ROWS
        return self._run()

    def _forms(self, uses: Sequence[Use]) -> dict[str, Form]:
        forms: dict[str, Form] = {}
        unfit: set[str] = set()
        for use in uses:
            try:
                with torch.no_grad():
                    found = use_forms(use, use.layer.layout, EXAMPLES)
            except (ValueError, RuntimeError):
                unfit |= set(use.layer.names.values())
                continue
            for name, form in found.items():
                forms[name] = forms[name].plus(form) if name in forms else form
        return {name: form for name, form in forms.items() if name not in unfit}


def _settle_functional(capture: Capture, comparison: Comparison) -> None:
    """Use ``vmap`` where it runs and is right, else one example at a time."""
    parameters = {name: capture.parameters[name] for name in capture.without_rule}
    together, loss = comparison.together, comparison.loss
    reasons = ""
    for way in (functional.vmapped, functional.one_by_one):
        capture.functional = way
        try:
            with comparison.same_random_state():
                forms = way(capture.model, parameters, together, loss, EXAMPLES)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if way is functional.one_by_one:
                raise
            reasons = f" ({error})"
            continue
        wrong = comparison.wrong(forms, list(parameters))
        if not wrong or (comparison.random and way is functional.one_by_one):
            return
    raise InvalidArgumentError(
        f"the gradient of {sorted(wrong)} for {EXAMPLES} examples together is not the sum of "
        "those of each alone: the model or the loss mixes the examples of a batch, which "
        f"leaves nothing to attribute to one of them{reasons}"
    )
