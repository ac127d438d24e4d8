"""Gradients of a few examples against autograd's own: which parameters are right."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from influence_kit.data import Batch, example_count, take
from influence_kit.gradients import functional
from influence_kit.gradients.forms import Form
from influence_kit.losses import Loss
from influence_kit.precision import exact, real

EXAMPLES = 3


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
    torch.float32: Tolerance(1e-4, 5e-2, 3e-6),
}
_HALF = Tolerance(1e-1, 3e-1, 1e-2)


def tolerance_of(parameter: Tensor) -> Tolerance:
    """The tolerance for a tensor's precision."""
    return _TOLERANCES.get(real(parameter).dtype, _HALF)


def spread(n: int, count: int) -> Tensor:
    """``count`` places from first to last of n, repeated where n is smaller."""
    if n < count:
        return torch.arange(count) % n
    return torch.linspace(0, n - 1, count).round().long()


class Comparison:
    """Three examples of a batch, together and each alone, in a model with chosen parameters."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, loss: Loss
    ) -> None:
        places = spread(example_count(batch), EXAMPLES)
        self.model, self.parameters, self.loss = model, parameters, loss
        self.together = take(batch, places)
        self._alone = [take(batch, slice(int(i), int(i) + 1)) for i in places]
        # with dropout on, the same example alone meets another mask
        self.random = any(
            module.training and (isinstance(module, _DropoutNd) or getattr(module, "dropout", 0))
            for module in model.modules()
        )

    def wrong(self, forms: Mapping[str, Form], names: Sequence[str]) -> set[str]:
        """The names whose forms are not what autograd gives; each reference is made in turn."""
        wrong: set[str] = set()
        if not names:
            return wrong
        for rows, batch, n in self._references():
            with self.same_random_state():
                values = [self.parameters[name] for name in names]
                expected = functional.single_gradients(self.model, values, batch, self.loss, n)
            whole = torch.stack([_norm(g) for g in expected]).norm()
            if not torch.isfinite(whole):
                continue  # the scores will say which example it was
            for name, gradient in zip(names, expected, strict=True):
                tolerance = tolerance_of(self.parameters[name])
                form = forms.get(name)
                difference = gradient.flatten().to(exact(gradient).dtype)
                if form is not None:
                    difference = difference - form.rows(rows).dense().sum(0)
                relative = tolerance.sums if n > 1 else tolerance.alone
                if not _norm(difference) <= relative * _norm(gradient) + tolerance.whole * whole:
                    wrong.add(name)
        return wrong

    def _references(self) -> Iterator[tuple[slice, Batch, int]]:
        """Which of the three examples, as which batch."""
        yield slice(0, EXAMPLES), self.together, EXAMPLES
        if not self.random:
            for i, batch in enumerate(self._alone):
                yield slice(i, i + 1), batch, 1

    @contextmanager
    def same_random_state(self) -> Iterator[None]:
        """Each pass inside draws the same numbers, and none is drawn for good."""
        devices = {p.device for p in self.parameters.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            yield


def _norm(values: Tensor) -> Tensor:
    """In float64, where the squares of all numbers of float32 exist."""
    norm: Tensor = values.double().norm()
    return norm
