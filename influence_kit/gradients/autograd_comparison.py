"""Gradients of a few examples against autograd's own: which parameters are right."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from influence_kit.core.dtypes import exact
from influence_kit.core.memory import MIB
from influence_kit.data.batches import Batch, example_count, take
from influence_kit.gradients import functional
from influence_kit.gradients.forms import Form
from influence_kit.losses.loss import Loss

# of a batch: how many go through the model together (few lengths of tensors are a multiple of it),
# and how many of these alone, with the last
EXAMPLES, ALONE = 5, 2
# norms between these come from squares that float32 holds
SQUARES = 1e-15, 1e15
# of autograd's gradients that are kept from one layout that is tried to the next
KEPT_BYTES = 256 * MIB


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding explains, relative to a parameter's gradient and to the whole.

    ``sums`` where both sides ran the same batch; ``alone`` where batch sizes differ, so that a unit
    near a kink may fall on its other side; ``whole`` for gradients that are zero but for rounding.
    """

    sums: float
    alone: float
    whole: float


_TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-6, 1e-12),
    torch.complex128: Tolerance(1e-9, 1e-6, 1e-12),
    torch.float32: Tolerance(1e-4, 5e-2, 3e-6),
    torch.complex64: Tolerance(1e-4, 5e-2, 3e-6),
}
_HALF = Tolerance(1e-1, 3e-1, 1e-2)
# of a model of less than float64 that runs in float64: parts of it may still compute in float32
WIDENED = Tolerance(1e-5, 1e-3, 1e-7)


def tolerance_of(parameter: Tensor) -> Tolerance:
    """The tolerance for a tensor's precision."""
    return _TOLERANCES.get(parameter.dtype, _HALF)


def spread(n: int, count: int) -> Tensor:
    """``count`` places from first to last of n, repeated where n is smaller."""
    if n < count:
        return torch.arange(count) % n
    return torch.linspace(0, n - 1, count).round().long()


class Comparison:
    """A few examples, together and each alone, in a model with chosen parameters.

    Args:
        model: the model.
        parameters: the chosen parameters, by name.
        batch: the few examples.
        loss: the loss.
        tolerance: of their differences; None for that of each parameter's precision.
        only_alone: parameters whose gradients autograd does not add up over examples.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        loss: Loss,
        tolerance: Tolerance | None = None,
        only_alone: Collection[str] = (),
    ) -> None:
        self.model, self.parameters, self.loss = model, parameters, loss
        self._only_alone = set(only_alone)
        self.together, self.n = batch, example_count(batch)
        self._tolerance = tolerance
        self.random = is_random(model)
        self._kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        # the parameters whose gradient was not zero
        self.moving: set[str] = set()

    def wrong(self, forms: Mapping[str, Form], names: Sequence[str]) -> set[str]:
        """The names whose forms are not what autograd gives; each reference is made in turn."""
        wrong: set[str] = set()
        if not names:
            return wrong
        for rows, batch, n in self._references():
            expected = self._expected((rows.start, n), batch, names)
            chosen = {name: form.rows(rows) for name, form in forms.items() if name in names}
            precisions = {name: self.parameters[name] for name in expected}
            differing, moving = differences(chosen, expected, n > 1, precisions, self._tolerance)
            wrong |= differing - (self._only_alone if n > 1 else set())
            self.moving |= moving
        return wrong

    def _expected(
        self, key: tuple[int, int], batch: Batch, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Autograd's own gradient of some examples, by name."""
        kept = self._kept.get(key, {})
        if not set(names) <= set(kept):
            with same_random_state(self.parameters.values()):
                values = [self.parameters[name] for name in names]
                found = functional.single_gradients(
                    self.model, values, batch, self.loss, example_count(batch)
                )
            kept = dict(zip(names, found, strict=True))
            if (2 + ALONE) * sum(g.numel() * g.element_size() for g in found) <= KEPT_BYTES:
                self._kept[key] = kept
        return {name: kept[name] for name in names}

    def _references(self) -> Iterator[tuple[slice, Batch, int]]:
        """Which of the examples, as which batch."""
        yield slice(0, self.n), self.together, self.n
        # with dropout on, the same example alone meets another mask
        if not self.random and self.n > 1:
            # the last, too: what looks at the examples before one leaves the first alone
            for i in sorted({*range(min(ALONE, self.n)), self.n - 1}):
                yield slice(i, i + 1), take(self.together, slice(i, i + 1)), 1


def is_random(model: nn.Module) -> bool:
    """Whether dropout is on."""
    return any(
        module.training and (isinstance(module, _DropoutNd) or getattr(module, "dropout", 0))
        for module in model.modules()
    )


def differences(
    forms: Mapping[str, Form],
    expected: Mapping[str, Tensor],
    same_batch: bool,
    precisions: Mapping[str, Tensor],
    tolerance: Tolerance | None = None,
) -> tuple[set[str], set[str]]:
    """The names whose forms do not sum to the expected gradients, and those that are not zero.

    Args:
        forms: gradients of some examples, by name; none where a gradient is zero.
        expected: autograd's own gradient of the sum of their losses, by name.
        same_batch: whether both ran the same batch.
        precisions: a tensor of the precision in which each was computed, by name.
        tolerance: that of each precision where None.
    """
    wrong: set[str] = set()
    moving: set[str] = set()
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    whole = torch.stack(list(norms.values())).norm()
    if not torch.isfinite(whole):
        return wrong, moving  # the scores will say which example it was
    for name, gradient in expected.items():
        close = tolerance or tolerance_of(precisions[name])
        form = forms.get(name)
        difference = gradient.flatten().to(exact(gradient).dtype)
        if form is not None:
            try:
                difference = difference - form.summed().dense()[0]
            except RuntimeError:  # of a layout that does not fit
                wrong.add(name)
        norm, noise = norms[name], close.whole * whole
        relative = close.sums if same_batch else close.alone
        if not _norm(difference) <= relative * norm + noise:
            wrong.add(name)
        if norm > noise:
            moving.add(name)
    return wrong, moving


@contextmanager
def same_random_state(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Each pass inside draws the same numbers, and none is drawn for good."""
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _norm(values: Tensor) -> Tensor:
    """In float64 where the squares of these numbers do not exist in their own precision."""
    norm = values.norm()
    if not SQUARES[0] < float(norm) < SQUARES[1]:
        norm = values.double().norm()
    found: Tensor = norm.double()
    return found
