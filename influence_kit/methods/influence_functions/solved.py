"""What methods share whose test side goes through the damped inverse of a curvature.

Letters: m test and n training examples, P entries of a gradient, C checkpoints.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.example_influence import given
from influence_kit.methods.influence_functions.fitted import FittedInfluence
from influence_kit.methods.starting_again import starts_again
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform

TakeGiven = Callable[[Any], Gradients]


class SolvedInfluence(FittedInfluence):
    """score = mean over checkpoints of <(C + damping I)^-1 test side, train side>."""

    # What a method says.

    def terms(self) -> list[Term]:
        """One term a checkpoint, the test side through the inverse."""
        places = range(len(self.checkpoints))
        return [
            Term(
                replace(self.test_at(c), solve=self._inverse_at(c)),
                self._train_side(c),
                weight=1 / len(self.checkpoints),
            )
            for c in places
        ]

    # What a user calls.

    @starts_again
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The test side through the inverse: what ``influence`` takes in place of ``inputs``.

        Computed once, it serves any number of training sets: ``influence`` of another object of
        this class (same model, parameters and checkpoints) takes it and fits nothing.

        Returns:
            ``[m, C * P]``, parameters in the model's order (``[1, C * P]`` if ``aggregate``); the
            scores are its dot products with the gradients of the training loss at all checkpoints.
        """
        return self._vectors(inputs, aggregate=aggregate)

    # How it is done.

    def _is_fitted_at(self, place: int) -> bool:
        return place in self._facts

    def _plan(
        self,
        loader: CheckpointLoader,
        inputs: Any,
        ordered: bool = True,
        show_progress: bool = False,
    ) -> tuple[list[Term], Iterable[Batch]]:
        ready = isinstance(inputs, Tensor)
        if not ready or self._needs_fit_for_quantities:
            # before the data is shared out: every rank takes part in measuring
            self._fit_everywhere(loader, show_progress)
        self._keep_rows(loader, show_progress)
        if ready:
            # the "batch" that the features of these terms take
            quantities: Any = self._checked_quantities(inputs)
            return self._given_terms(), [quantities]
        return super()._plan(loader, inputs, ordered)

    @property
    def _needs_fit_for_quantities(self) -> bool:
        """Whether a test side that has been through the inverse still wants the inverse."""
        return False

    def _checked_quantities(self, quantities: Tensor) -> Tensor:
        """A test side ``[m, C * P]`` that has been through the inverse."""
        each, count = sum(self._partition.sizes), len(self.checkpoints)
        if quantities.dim() != 2 or quantities.shape[1] != each * count:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(quantities.shape)}; a test side made by "
                f"`compute_intermediate_quantities` has shape [m, {each * count}] here ({count} "
                f"checkpoints x {each} parameters). Examples are a tuple, list or dict"
            )
        return quantities

    def _given_terms(self) -> list[Term]:
        """The terms for a test side that has been through the inverse."""
        shapes = self._shapes
        sizes = [math.prod(shape) for shape in shapes.values()]
        count = len(self.checkpoints)

        def features(place: int) -> TakeGiven:
            def take(block: Tensor) -> Gradients:
                own = block.to(self._sample).split([sum(sizes)] * count, dim=1)[place]
                columns = zip(shapes.items(), own.split(sizes, dim=1), strict=True)
                forms = {name: Dense(values, shape) for (name, shape), values in columns}
                return Gradients(len(block), forms, shapes, self._sample)

            return take

        return [Term(Side(c, features(c)), self._train_side(c), weight=1.0) for c in range(count)]

    def _train_side(self, place: int) -> Side:
        return self.train_at(place)

    def _inverse_at(self, place: int) -> Transform:
        """Gradients through the inverse at a checkpoint, to be called when the model has it."""

        def apply(gradients: Gradients) -> Gradients:
            return self._inverses[place](gradients)

        return apply

    def _vectors(self, inputs: Any, of_tests: bool = True, aggregate: bool = False) -> Tensor:
        with self._session() as loader:
            terms, batches = self._plan(loader, given(inputs), ordered=not aggregate)
            stream = Stream(terms, loader, self._sample)
            blocks = [
                stream.test_side(term.test, batches, aggregate).flat() * term.weight_at(1.0)
                for term in terms
            ]
        return torch.cat(blocks, dim=1).to(self._dtype)
