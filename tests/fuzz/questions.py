"""Random questions: a method on a setup, what is asked of it, and the right answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Draw
from fuzz.setups import Setup

# pairs of what was found and what is right, by name
Answers = dict[str, tuple[Tensor, Tensor]]


class Void(Exception):  # noqa: N818
    """A question without a right answer."""


@dataclass
class Question:
    """``make`` builds the method, ``ask`` questions it; both are the package's work.

    ``close`` is what rounding may make of equal scores, relative to the largest.
    """

    make: Callable[[], Any]
    ask: Callable[[Any], Answers]
    close: float = 1e-9


class Scores:
    """The questions that every method of scores answers, given the right ones ``[m, n]``.

    ``own`` and ``own_test`` are self-influences of the training and the test examples, None where
    they are not asked for; ``layers`` the scores by layer.
    """

    def __init__(
        self,
        setup: Setup,
        whole: Tensor,
        own: Tensor | None = None,
        own_test: Tensor | None = None,
        layers: dict[str, Tensor] | None = None,
        vectors: bool = False,
    ) -> None:
        self.setup, self.whole = setup, whole
        self.own, self.own_test, self.layers, self.vectors = own, own_test, layers, vectors

    def draw(self, draw: Draw, most: int = 2) -> Callable[[Any], Answers]:
        """One or two of the questions, one after the other, on one object."""
        kinds: dict[str, Callable[[Draw], Callable[[Any], Answers]]] = {
            "influence": self._all,
            "k": self._k,
            "aggregate": self._aggregate,
        }
        if self.own is not None:
            kinds["self_influence"] = self._self
        if self.own_test is not None:
            kinds["self_influence of others"] = self._self_of_others
        if self.layers is not None:
            kinds["influence_by_layer"] = self._by_layer
        if self.vectors:
            kinds["compute_intermediate_quantities"] = self._vectors
        asked = []
        for _ in range(draw.randint(1, most)):
            name = draw.one(list(kinds), [3, *[1] * (len(kinds) - 1)])
            draw.note(name)
            asked.append((name, kinds[name](draw)))

        def ask(method: Any) -> Answers:
            found: Answers = {}
            for number, (name, question) in enumerate(asked):
                own = question(method)
                found.update({f"{number}: {name} {key}": pair for key, pair in own.items()})
            return found

        return ask

    def _all(self, draw: Draw) -> Callable[[Any], Answers]:
        return lambda method: {"": (method.influence(self.setup.test), self.whole)}

    def _k(self, draw: Draw) -> Callable[[Any], Answers]:
        k, up = draw.randint(1, self.whole.shape[1] + 2), draw.chance(0.5)
        aggregate = draw.chance(0.3)
        whole = self.whole.sum(0, keepdim=True) if aggregate else self.whole

        def ask(method: Any) -> Answers:
            found = method.influence(self.setup.test, k=k, proponents=up, aggregate=aggregate)
            best = whole.sort(dim=1, descending=up).values[:, :k]
            there = whole.gather(1, found.indices)
            return {"scores": (found.influence_scores, best), "indices": (there, best)}

        return ask

    def _aggregate(self, draw: Draw) -> Callable[[Any], Answers]:
        right = self.whole.sum(0, keepdim=True)
        return lambda method: {"": (method.influence(self.setup.test, aggregate=True), right)}

    def _self(self, draw: Draw) -> Callable[[Any], Answers]:
        outer = draw.chance(0.3)
        return lambda method: {
            "": (method.self_influence(outer_loop_by_checkpoints=outer), self.own)
        }

    def _self_of_others(self, draw: Draw) -> Callable[[Any], Answers]:
        return lambda method: {"": (method.self_influence(self.setup.test), self.own_test)}

    def _by_layer(self, draw: Draw) -> Callable[[Any], Answers]:
        def ask(method: Any) -> Answers:
            found = method.influence_by_layer(self.setup.test)
            if set(found) == set(self.layers):
                return {name: (found[name], right) for name, right in self.layers.items()}
            # a parameter of two layers may count with either
            return {"sum": (sum(found.values()), self.whole)}

        return ask

    def _vectors(self, draw: Draw) -> Callable[[Any], Answers]:
        def ask(method: Any) -> Answers:
            h = method.compute_intermediate_quantities(self.setup.test)
            return {"": (h @ h.T, self._of_tests)}

        return ask

    @property
    def _of_tests(self) -> Tensor:
        return self.between_tests

    between_tests: Tensor


def by_layer(setup: Setup) -> dict[str, Tensor]:
    """Where the parameters of each layer stand among the chosen ones, flat."""
    found: dict[str, list[Tensor]] = {}
    start, owned = 0, dict(setup.model.named_parameters())
    for name in setup.oracle.names:
        size = owned[name].numel() * (2 if owned[name].is_complex() else 1)
        found.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, start + size))
        start += size
    return {layer: torch.cat(index) for layer, index in found.items()}


def places(setup: Setup) -> range:
    return range(len(setup.subject.states))


def sides(setup: Setup, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at a checkpoint: of tests by their loss, of training examples, of tests by it."""
    h, g = setup.oracle.gradients(c, True), setup.oracle.gradients(c, False)
    return h, g, h


def check_finite(*tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise Void("not finite")


def total(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)
