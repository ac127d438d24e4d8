"""The adjoint of a training run: from the derivative at its end to that in each example's weight.

Shapes: m test examples, n training examples, B examples of a step.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.methods.magic.step_gradient import Batched, StepGradient
from influence_kit.training.clipping import Clipping
from influence_kit.training.replay import Moment, Replay
from influence_kit.training.updates import GRADIENT, WEIGHT, Transition, transition

# how far the gradient of weighted losses, and a step by formula, may be from what was taken
CLOSE = {torch.float64: 1e-6}
CLOSE_IN_LESS, ROUNDINGS = 1e-2, 16


@dataclass
class Adjoint:
    """The derivatives of m measurements in the state of a run.

    Args:
        weights: by parameter, ``[m, *shape]``.
        slots: of the optimizer's tensors, by parameter and name.
    """

    weights: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Add the derivatives of a measurement that is taken at this state."""
        for name, value in weights.items():
            self.weights[name] = self.weights[name] + value


@dataclass(frozen=True)
class ReversePass:
    """Carries an adjoint back through a run.

    Args:
        replay: the run.
        batched: the products with many vectors.
        epochs: the epochs whose steps count; None for all.
        tick: called after each step.
    """

    replay: Replay
    batched: Batched
    epochs: Collection[int | None] | None
    tick: Callable[[], object]

    def __call__(self, measured: Mapping[int, Mapping[str, Tensor]], scores: Tensor) -> None:
        """Add the derivatives in the examples' weights to ``scores`` ``[m, n]``.

        Args:
            measured: the derivatives ``[m, *shape]`` of the measurement by parameter, by the number
                of steps after which it is taken; one of them at the end.
            scores: zeros.
        """
        steps = self.replay.steps
        first = next(n for n, step in enumerate(steps) if self._counts(step.epoch))
        adjoint = Adjoint(dict(measured[len(steps)]))
        for start, stop in reversed(self.replay.segments()):
            if stop <= first:
                break
            moments = list(self.replay.run(start, stop))
            self.replay.check(stop)
            for number in reversed(range(max(start, first), stop)):
                if number + 1 < len(steps):
                    adjoint.add(measured.get(number + 1, {}))
                visits = self._step(number, moments[number - start : number - start + 2], adjoint)
                if not bool(torch.isfinite(visits.sum())):
                    raise _overflow(number)
                if self._counts(steps[number].epoch):
                    indices = torch.tensor(steps[number].indices, device=scores.device)
                    scores.index_add_(1, indices, visits.to(scores))
                self.tick()

    def _counts(self, epoch: int | None) -> bool:
        return self.epochs is None or epoch in self.epochs

    def _step(self, number: int, moments: list[Moment], adjoint: Adjoint) -> Tensor:
        """Carry the adjoint back through a step; returns the derivatives ``[m, B]``."""
        before, after = moments
        gradient = StepGradient(self.replay, number, before)
        clipping = Clipping(gradient.by_parameter, self.replay.recipes[number].clip_norm)
        _check_gradient(number, clipping.clipped(), before.gradients)
        updates = self._updates(number, before)
        _check_update(number, updates, before, after)
        of_gradient: dict[str, Tensor] = {}
        for name, update in updates.items():
            later = {WEIGHT: adjoint.weights[name], **adjoint.slots.pop(name, {})}
            earlier = update.pull(later)
            of_gradient[name] = earlier.pop(GRADIENT)
            adjoint.weights[name] = earlier.pop(WEIGHT)
            adjoint.slots[name] = earlier
        if not updates:  # the loss did not depend on what is trained
            m = len(next(iter(adjoint.weights.values())))
            first = next(iter(before.weights.values()))
            return first.new_zeros(m, len(self.replay.steps[number].indices))
        visits, products = gradient.pull(clipping.pull(of_gradient), self.batched)
        adjoint.add({n: product for n, product in products.items() if n in adjoint.weights})
        return visits

    def _updates(self, number: int, before: Moment) -> dict[str, Transition]:
        """The updates of a step by parameter; a parameter without a gradient stays as it is."""
        recipe = self.replay.recipes[number]
        assert recipe.optimizer is not None
        updates = {}
        for group in recipe.groups:
            for name in group["params"]:
                if name in before.gradients:
                    values = {WEIGHT: before.weights[name], GRADIENT: before.gradients[name]}
                    values |= before.slots.get(name, {})
                    updates[name] = transition(recipe.optimizer, group, values)
        return updates


def _check_gradient(number: int, found: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
    """Refuse a step whose weighted losses do not add up to the loss that was trained on."""
    off, size = _distance(found, taken), _norm(list(taken.values()))
    if off > _close(taken) * size:
        raise InvalidArgumentError(
            f"at step {number}, the losses of the single examples do not give the gradient of the "
            f"step: it is off by {off / max(size, 1e-300):.2g} of its norm. The loss of the run "
            "must be the mean (or sum, by the trace's `reduction`) of a loss of each example, and "
            "attention must draw the same dropout with torch's math kernel"
        )


def _check_update(
    number: int, updates: Mapping[str, Transition], before: Moment, after: Moment
) -> None:
    """Refuse a step of the optimizer that is not the one whose derivative is known."""
    found = {name: update.after[WEIGHT] for name, update in updates.items()}
    taken = {name: after.weights[name] for name in updates}
    off, way = _distance(found, taken), _distance(before.weights, taken)
    rounding = ROUNDINGS * _eps(taken) * _norm(list(taken.values()))
    if off > _close(taken) * way + rounding:
        raise InvalidArgumentError(
            f"at step {number}, the optimizer moved the weights otherwise than its formula says, "
            f"by {off / max(way, 1e-300):.2g} of the way: it has an option that is not known here, "
            "or torch has changed it"
        )


def _distance(found: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> float:
    return _norm([found[name] - value if name in found else value for name, value in taken.items()])


def _close(tensors: Mapping[str, Tensor]) -> float:
    first = next(iter(tensors.values()), None)
    return CLOSE_IN_LESS if first is None else CLOSE.get(first.dtype, CLOSE_IN_LESS)


def _eps(tensors: Mapping[str, Tensor]) -> float:
    first = next(iter(tensors.values()), None)
    return 0.0 if first is None else torch.finfo(first.dtype).eps


def _norm(tensors: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _overflow(number: int) -> NonFiniteError:
    return NonFiniteError(
        f"the derivatives are NaN or infinite at step {number} of the trace: the run is so little "
        "smooth that differences grow from step to step; use float64, smaller learning rates, or a "
        "larger `eps` of Adam"
    )
