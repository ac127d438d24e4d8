"""Compares the gradients of a few examples with autograd's own: which parameters are right."""

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
from influence_kit.gradients.form import Form
from influence_kit.losses.loss import Loss

# how many examples go through the model together (few tensor lengths are a multiple of this), and
# how many of these, besides the last, alone
EXAMPLES, ALONE = 5, 2
# the range of norms whose squares float32 can hold
SQUARES = 1e-15, 1e15
# the most bytes of autograd's gradients that are kept between the layouts that are tried
KEPT_BYTES = 256 * MIB


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding explains, relative to a parameter's gradient and to the whole.

    ``sums`` if both gradients are of the same batch; ``alone`` if batch sizes differ, so that an
    activation near a kink may fall on its other side; ``whole``, relative to the whole gradient,
    for gradients that are zero up to rounding.
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
# for a narrower model that runs in float64: parts of it may still compute in float32
WIDENED = Tolerance(1e-5, 1e-3, 1e-7)


def tolerance_of(parameter: Tensor) -> Tolerance:
    """The tolerance for a tensor's precision."""
    return _TOLERANCES.get(parameter.dtype, _HALF)


def spread(n: int, count: int) -> Tensor:
    """``count`` indices from the first to the last of n, repeated if n is smaller."""
    if n < count:
        return torch.arange(count) % n
    return torch.linspace(0, n - 1, count).round().long()


class Comparison:
    """Autograd's gradients of a few examples, together and each alone, to compare forms with.

    Args:
        model: the model.
        parameters: the chosen parameters, by name.
        batch: the few examples.
        loss: the loss.
        tolerance: of the differences; None for that of each parameter's precision.
        only_alone: parameters whose gradients autograd does not sum over examples.
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
        """The names whose forms differ from autograd's gradients."""
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
        """The batches to compare: the slice of examples, the batch, and its number of examples."""
        yield slice(0, self.n), self.together, self.n
        # with dropout on, an example alone gets another mask
        if not self.random and self.n > 1:
            # also the last one: a dependence on earlier examples does not change the first
            for i in sorted({*range(min(ALONE, self.n)), self.n - 1}):
                yield slice(i, i + 1), take(self.together, slice(i, i + 1)), 1


def is_random(model: nn.Module) -> bool:
    """Whether dropout is active in the model."""
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
        forms: gradients of some examples, by name; a zero gradient has no form.
        expected: autograd's own gradient of the sum of their losses, by name.
        same_batch: whether both are of the same batch.
        precisions: a tensor with the precision in which each was computed, by name.
        tolerance: of the differences; None for that of each precision.
    """
    wrong: set[str] = set()
    moving: set[str] = set()
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    whole = torch.stack(list(norms.values())).norm()
    if not torch.isfinite(whole):
        return wrong, moving  # the check of scores will name the example
    for name, gradient in expected.items():
        close = tolerance or tolerance_of(precisions[name])
        form = forms.get(name)
        difference = gradient.flatten().to(exact(gradient).dtype)
        if form is not None:
            try:
                difference = difference - form.summed().dense()[0]
            except RuntimeError:  # the layout does not fit
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
    """Inside, each pass draws the same random numbers; the random state is restored."""
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _norm(values: Tensor) -> Tensor:
    """The norm, computed in float64 if squares overflow or vanish in the tensor's precision."""
    norm = values.norm()
    if not SQUARES[0] < float(norm) < SQUARES[1]:
        norm = values.double().norm()
    found: Tensor = norm.double()
    return found
