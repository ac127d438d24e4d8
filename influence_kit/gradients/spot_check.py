"""Compares the gradients of a batch with those of some of its examples by themselves.

Shapes: n examples of a batch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.dtypes import real_shape
from influence_kit.data.batches import Batch, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients import functional
from influence_kit.gradients.autograd_comparison import (
    WIDENED,
    Tolerance,
    differences,
    is_random,
    same_random_state,
)
from influence_kit.gradients.capture import Capture
from influence_kit.gradients.check import MIXES
from influence_kit.gradients.explanation import explanation
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import join
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.precision import in_float64
from influence_kit.losses.loss import Loss

# relative to the norm of all gradients: less than this is rounding
NOISE = 1e-5

Found = tuple[set[str], set[str]]


def compare(
    capture: Capture,
    gradients: Gradients,
    batch: Batch,
    loss: Loss,
    rows: Tensor,
    tolerance: Tolerance | None = None,
) -> Found:
    """The parameters whose gradients differ, and those whose gradients are not zero.

    Args:
        capture: the capture that computed the gradients.
        gradients: the gradients of the batch.
        batch: the batch.
        loss: the loss.
        rows: the examples to compare.
        tolerance: of the differences; None for that of each parameter's precision.
    """
    few = batch if gradients.n == 1 else take(batch, rows)
    with same_random_state(list(capture.parameters.values())):
        if is_random(capture.model):  # another batch gets other dropout masks
            gradients, rows = capture(few, loss), torch.arange(len(rows))
    wrong, moving = _differing(capture, gradients, few, loss, rows, tolerance)
    return wrong - (capture.scaled_by_frequency if len(rows) > 1 else set()), moving


def _differing(
    capture: Capture,
    gradients: Gradients,
    few: Batch,
    loss: Loss,
    rows: Tensor,
    tolerance: Tolerance | None,
) -> Found:
    """``compare`` for some rows, which form the batch ``few``."""
    forms = {name: chosen(form, rows) for name, form in gradients.forms.items()}
    values = list(capture.parameters.values())
    with same_random_state(values):
        expected = functional.single_gradients(capture.model, values, few, loss, len(rows))
    named = dict(zip(capture.parameters, expected, strict=True))
    return differences(forms, named, False, capture.parameters, tolerance)


def compare_widely(capture: Capture, batch: Batch, loss: Loss, rows: Tensor) -> Found | None:
    """``compare`` in float64; None if the model does not run in it."""
    with in_float64(capture.model, loss, batch) as wide:
        if wide is None:
            return None
        return compare(capture, capture(wide, loss), wide, loss, rows, WIDENED)


def chosen(form: Form, rows: Tensor) -> Form:
    """Some examples of a form."""
    return join([form.rows(slice(row, row + 1)) for row in rows.tolist()])


@dataclass(frozen=True)
class Moving:
    """Parameters whose gradient was zero in all comparisons, and examples where it is not."""

    names: Collection[str]
    examples: Tensor


def not_yet_moving(gradients: Gradients, names: Collection[str]) -> Moving | None:
    """Those of the named parameters that now have a non-zero gradient; None if there are none."""
    gradients = gradients.balanced()[0]
    norms: Mapping[str, Tensor] = {
        name: gradients.forms[name].squared_norms() for name in names if name in gradients.forms
    }
    if not any(bool(norm.any()) for norm in norms.values()):
        return None
    whole = gradients.squared_norms()
    moving = {name: norm > NOISE**2 * whole for name, norm in norms.items()}
    moved = [name for name, examples in moving.items() if bool(examples.any())]
    if not moved:
        return None
    examples = torch.stack([moving[name] for name in moved]).any(0).nonzero()[:5, 0]
    others = torch.arange(gradients.n, device=examples.device)
    others = others[~torch.isin(others, examples)][: max(0, 3 - len(examples))]
    return Moving(moved, torch.cat([examples, others]).flip(0))


def added_up(capture: Capture, few: Batch, loss: Loss) -> None:
    """Check that the gradient of some examples together is the sum of those of two parts.

    Raises:
        InvalidArgumentError: if it is not.
    """
    n = min(2 * (example_count(few) // 2), 6)
    if n < 2 or is_random(capture.model):
        return
    half = torch.arange(n).split(n // 2)
    for wide in (False, True):
        if not wide:
            wrong = _not_added(capture, take(few, slice(0, n)), half, loss, None)
        elif wrong:
            with in_float64(capture.model, loss, take(few, slice(0, n))) as batch:
                if batch is not None:
                    wrong = _not_added(capture, batch, half, loss, WIDENED)
    if wrong:
        cause = explanation(capture.model, few, loss) or MIXES
        raise InvalidArgumentError(
            f"{capture.where}: the gradient of {n} examples together is not the sum of those of "
            f"two halves (parameters {sorted(wrong)[:6]}). {cause}"
        )


def _not_added(
    capture: Capture,
    batch: Batch,
    halves: tuple[Tensor, ...],
    loss: Loss,
    tolerance: Tolerance | None,
) -> set[str]:
    values, model = list(capture.parameters.values()), capture.model
    found = functional.single_gradients(model, values, batch, loss, example_count(batch))
    parts = [
        functional.single_gradients(model, values, take(batch, half), loss, len(half))
        for half in halves
    ]
    sums = {
        name: functional.as_dense(torch.stack(several).sum(0)[None], real_shape(parameter))
        for (name, parameter), several in zip(
            capture.parameters.items(), zip(*parts, strict=True), strict=True
        )
    }
    expected = dict(zip(capture.parameters, found, strict=True))
    return differences(sums, expected, False, capture.parameters, tolerance)[0]
