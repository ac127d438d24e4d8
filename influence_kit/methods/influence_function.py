"""The face that influence functions share: the test side through (C + damping)^-1.

Letters: m test and n training examples, P chosen parameters, C checkpoints (in shapes), B blocks.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.data import Batch, as_loader, is_dataset
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.memory import resident_bytes
from influence_kit.methods.chosen import group_by_layer
from influence_kit.methods.inner_product import InnerProductInfluence, given
from influence_kit.operators.curvature import DataSet, Remembered
from influence_kit.operators.curvature import Features as PlacedFeatures
from influence_kit.operators.labels import ModelLabels
from influence_kit.operators.partition import Partition
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform
from influence_kit.scoring.transforms import unit_influence

DampingArgument = float | Literal["auto"] | Mapping[str, float]
# of "auto": the damping as a part of the mean eigenvalue of a block
AUTO_SHARE = 0.1
Facts = dict[str, Tensor]
Features = Callable[[Any], Gradients]
MEANS = "mean_eigenvalues"


class InfluenceFunction(InnerProductInfluence):
    """score = mean over checkpoints of grad loss(test)^T (C + damping I)^-1 grad loss(train).

    What is measured of the curvature at a checkpoint (``fit``) does not depend on the damping, is
    kept for later calls, and can be saved.

    Args:
        damping: what is added to the eigenvalues of the curvature C of the mean loss: a number, one
            a block (a dict), or "auto": 0.1 times the mean eigenvalue of the block.
        hessian_dataset: the data over which C is a mean; the training set where None.
        relative: RelatIF (arXiv 2003.11630): None, "l" (divide by the root of the training
            example's own score g^T (C + damping)^-1 g) or "theta" (by the norm of
            (C + damping)^-1 g).
        seed: of everything that is drawn at random.
    """

    def __init__(
        self,
        *args: Any,
        damping: DampingArgument = "auto",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if relative not in (None, "theta", "l"):
            raise InvalidArgumentError(f'`relative` must be None, "theta" or "l"; got {relative!r}')
        self.relative = relative
        self.seed = seed
        self._hessian_data = hessian_dataset
        self._hessian_batches: Iterable[Batch] | None = None
        if hessian_dataset is not None and not is_dataset(hessian_dataset):
            self._hessian_batches = as_loader(hessian_dataset, None, "hessian_dataset")
        self.damping = damping

    # What a method says.

    def _blocks_of(self, names: list[str]) -> Mapping[str, list[str]]:
        """The names of parameters by block of the curvature: by layer, unless a method says."""
        return group_by_layer(self.model, names, None)

    def _measure(self, data: DataSet) -> Facts:
        """What is to be known of the curvature at the checkpoint that is in the model."""
        return {}

    @abstractmethod
    def _means(self, facts: Facts, data: DataSet) -> Tensor:
        """The mean eigenvalue of each block ``[B]``."""

    @abstractmethod
    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        """Gradients through (C + damping)^-1, given the damping of each block ``[B]``."""

    def terms(self) -> list[Term]:
        """One term a checkpoint, the test side through the inverse."""
        places = range(len(self.checkpoints))
        return [
            Term(
                Side(c, self.test_at(c).features, solve=self._inverse_at(c)),
                self._train_side(c),
                weight=1 / len(self.checkpoints),
            )
            for c in places
        ]

    # What a user reads, sets and calls.

    @property
    def block_names(self) -> list[str]:
        """The blocks of the curvature, each with a damping of its own."""
        return list(self._partition.blocks)

    @property
    def damping(self) -> DampingArgument:
        """As given; setting it anew fits nothing again."""
        return self._damping

    @damping.setter
    def damping(self, damping: DampingArgument) -> None:
        self._damping = _check_damping(damping, self.block_names)
        self._inverses.clear()

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block, at each checkpoint that is fitted."""
        return [
            dict(zip(self.block_names, self._damping_at(c).tolist(), strict=True))
            for c in sorted(self._facts)
            if self._damping != "auto" or MEANS in self._facts[c]
        ]

    def fit(self, show_progress: bool = False) -> Self:
        """Measure the curvature at every checkpoint, anew; ``influence`` does so by itself once.

        Args:
            show_progress: a bar over the checkpoints.
        """
        self._forget()
        with (
            self._session() as loader,
            self._bar(
                "fit the curvature. Processing checkpoint", len(self.checkpoints), show_progress
            ) as bar,
        ):
            for place in range(len(self.checkpoints)):
                self._fit_at(place, loader)
                bar.update()
        return self

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

    @cached_property
    def _partition(self) -> Partition:
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        return Partition(self._blocks_of(list(shapes)), shapes)

    def _through(self, solve: Callable[[Tensor], Tensor]) -> Transform:
        """A map of vectors ``[k, P]`` as a map of gradients."""

        def transform(gradients: Gradients) -> Gradients:
            return self._partition.gradients(solve(self._partition.flat(gradients)), gradients)

        return transform

    def _forget(self) -> None:
        self._facts: dict[int, Facts] = {}
        self._prints: dict[int, tuple[float, ...]] = {}
        self._inverses: dict[int, Transform] = {}
        self._remembered: list[Remembered] = []

    def _plan(
        self, loader: CheckpointLoader, inputs: Any, ordered: bool = True
    ) -> tuple[list[Term], Iterable[Batch]]:
        ready = isinstance(inputs, Tensor)
        if not ready or self.relative:
            # before the data is shared out: every rank takes part in measuring
            for place in range(len(self.checkpoints)):
                self._fit_at(place, loader)
        if ready:
            return self._given_terms(inputs), [inputs]
        return super()._plan(loader, inputs, ordered)

    def _given_terms(self, quantities: Tensor) -> list[Term]:
        """The terms for a test side that has been through the inverse."""
        shapes = {name: p.shape for name, p in self._parameters.items()}
        sizes = [math.prod(shape) for shape in shapes.values()]
        count = len(self.checkpoints)
        expected = sum(sizes) * count
        if quantities.dim() != 2 or quantities.shape[1] != expected:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(quantities.shape)}; a test side made by "
                f"`compute_intermediate_quantities` has shape [m, {expected}] here ({count} "
                f"checkpoints x {sum(sizes)} parameters). Examples are a tuple, list or dict"
            )

        def features(place: int) -> Features:
            def take(block: Tensor) -> Gradients:
                own = block.to(self._sample).split([sum(sizes)] * count, dim=1)[place]
                columns = zip(shapes.items(), own.split(sizes, dim=1), strict=True)
                forms = {name: Dense(values, shape) for (name, shape), values in columns}
                return Gradients(len(block), forms, shapes, self._sample)

            return take

        return [Term(Side(c, features(c)), self._train_side(c), weight=1.0) for c in range(count)]

    def _train_side(self, place: int) -> Side:
        if self.relative is None:
            return self.train_at(place)
        return self.train_at(place, partial(unit_influence, self._inverse_at(place), self.relative))

    def _inverse_at(self, place: int) -> Transform:
        """Gradients through the inverse at a checkpoint, which is in the model when it is called."""

        def apply(gradients: Gradients) -> Gradients:
            return self._inverses[place](gradients)

        return apply

    def _fit_at(self, place: int, loader: CheckpointLoader) -> None:
        """Have the inverse at a checkpoint, measuring what is not known yet."""
        loader.load(place)
        known = self._prints.get(place)
        if known is not None and known != loader.fingerprint(place):
            raise InvalidArgumentError(
                f"checkpoint {place} holds other weights than when its curvature was measured; "
                "call `fit()` to measure it anew"
            )
        data = DataSet(self._hessian_loader, self._device)
        if place not in self._facts:
            self._source.prepare(data.first(), self._train_loss)
            self._facts[place] = self._measure(data)
            self._prints[place] = loader.fingerprint(place)
        if place not in self._inverses:
            if self.damping == "auto" and MEANS not in self._facts[place]:
                self._facts[place][MEANS] = self._means(self._facts[place], data)
            damping = self._damping_at(place)
            self._inverses[place] = self._make_inverse(self._facts[place], damping, data)

    @property
    def _hessian_loader(self) -> Iterable[Batch]:
        if self._hessian_data is None:
            return self.train_dataloader
        if self._hessian_batches is None:
            self._hessian_batches = self._loader_of(self._hessian_data, "hessian_dataset")
        return self._hessian_batches

    def _damping_at(self, place: int) -> Tensor:
        """The damping of each block ``[B]``, float64."""
        if self._damping == "auto":
            values = (AUTO_SHARE * self._facts[place][MEANS]).tolist()
            _check_means(values, self.block_names)
        elif isinstance(self._damping, Mapping):
            values = [self._damping[name] for name in self.block_names]
        else:
            values = [self._damping] * len(self.block_names)
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def _curvature_features(self, curvature: str) -> PlacedFeatures:
        """The gradients whose outer products are the empirical Fisher, or the Fisher."""
        labels = ModelLabels(self.model, self._train_loss, self.seed)

        def features(places: Tensor, batch: Batch) -> Gradients:
            if curvature == "fisher":
                self._source.prepare(batch, self._train_loss)
                batch = labels(places, batch)
            return self._source(batch, self._train_loss)

        self._remembered.append(Remembered(features, resident_bytes(self._device)))
        return self._remembered[-1]

    @contextmanager
    def _session(self) -> Iterator[CheckpointLoader]:
        with super()._session() as loader:
            try:
                yield loader
            finally:
                for remembered in self._remembered:
                    remembered.forget()

    def _vectors(self, inputs: Any, of_tests: bool = True, aggregate: bool = False) -> Tensor:
        with self._session() as loader:
            terms, batches = self._plan(loader, given(inputs), ordered=not aggregate)
            stream = Stream(terms, loader, self._sample)
            blocks = [
                stream.test_side(term.test, batches, aggregate).flat() * term.weight_at(1.0)
                for term in terms
            ]
        return torch.cat(blocks, dim=1).to(self._dtype)


def _check_damping(damping: DampingArgument, blocks: Sequence[str]) -> DampingArgument:
    if isinstance(damping, str):
        if damping != "auto":
            raise InvalidArgumentError(f'`damping` must be a number or "auto"; got {damping!r}')
        return damping
    if isinstance(damping, Mapping):
        if set(damping) != set(blocks):
            raise InvalidArgumentError(
                f"`damping` names the blocks {list(damping)}; there are {list(blocks)}, and each "
                "needs one"
            )
        for name, value in damping.items():
            _check_number(value, f"`damping` of block '{name}'")
        return dict(damping)
    _check_number(damping, "`damping`")
    return damping


def _check_number(value: object, name: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise InvalidArgumentError(f"{name} must be a number that is not negative; got {value!r}")


def _check_means(values: Sequence[float], blocks: Sequence[str]) -> None:
    for value, name in zip(values, blocks, strict=True):
        if not value > 0:
            raise InvalidArgumentError(
                f'damping="auto" is a share of the mean eigenvalue of the curvature, which is '
                f"{value / AUTO_SHARE:.4g} in block '{name}': the gradients there are zero or the "
                "curvature is negative. Give a number, leave that block out by `layers`, or use "
                'another curvature ("ggn" is never negative)'
            )
