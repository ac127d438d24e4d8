"""What influence functions measure of the curvature: once a checkpoint, kept, saved and loaded.

Letters: B blocks.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.draws import check_seed
from influence_kit.curvature.drawn_labels import ModelLabels
from influence_kit.curvature.passes import DataSet, Features, Memory, Remembered
from influence_kit.data.batches import Batch, is_dataset
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.loaders import HESSIAN_DATA, as_loader
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.influence_functions.damping import (
    AUTO,
    LEARNING_RATES,
    MEAN,
    SHARE,
    TRACE,
    DampingArgument,
    as_text,
    check_damping,
    early_stopping,
    share_of,
)
from influence_kit.methods.kept_fit import KeptFit
from influence_kit.methods.origin import Source
from influence_kit.methods.parameter_selection import group_by_layer
from influence_kit.operators.partition import Partition
from influence_kit.operators.wording import OF_CURVATURE
from influence_kit.scoring.term import Transform

Facts = dict[str, Tensor]
TRACES = "traces"
# what seeds of a user's are unlikely to differ by
OTHER_DRAW = 0x5851F42D4C957F2D


class FittedInfluence(KeptFit):
    """A method that measures the curvature of the loss at every checkpoint, once.

    What is measured (``fit``) does not depend on the damping, is kept for later calls, and can be
    saved. See ``InfluenceFunction`` for the arguments.
    """

    # rules that ``damping`` may name, the one that "auto" is, and the share of those of traces
    _rules: Sequence[str] = (MEAN, TRACE)
    _auto_rule = MEAN
    _auto_share = SHARE
    # what errors call the curvature and the damping
    _wording = OF_CURVATURE

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
        self.seed = check_seed(seed)
        self._hessian_data = hessian_dataset
        if hessian_dataset is not None and not is_dataset(hessian_dataset):
            self._check(as_loader(hessian_dataset, None, HESSIAN_DATA), HESSIAN_DATA)
        self.damping = damping

    # What a method says.

    def _blocks_of(self, names: list[str]) -> Mapping[str, list[str]]:
        """The names of parameters by block of the curvature: by layer, unless a method says."""
        return group_by_layer(self.model, names, None)

    def _measure(self, data: DataSet) -> Facts:
        """What is to be known of the curvature at the checkpoint that is in the model."""
        return {}

    @abstractmethod
    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        """The trace of each block of the curvature ``[B]``, float64."""

    @abstractmethod
    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        """Gradients through (C + damping)^-1, given the damping of each block ``[B]``."""

    # What a user reads, sets and calls.

    @property
    def block_names(self) -> list[str]:
        """The blocks of the curvature, each with a damping of its own."""
        self._see_model()
        return list(self._partition.blocks)

    @property
    def damping(self) -> DampingArgument:
        """As given; setting it anew fits nothing again."""
        return self._damping

    @damping.setter
    def damping(self, damping: DampingArgument) -> None:
        self._damping = check_damping(damping, self.block_names, self._wording.damping, self._rules)
        self._drop_inverses()

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block, at each checkpoint that is fitted."""
        return [
            dict(zip(self.block_names, self._damping_at(c).tolist(), strict=True))
            for c in sorted(self._facts)
            if self._rule is None or f"{self._rule}_damping" in self._facts[c]
        ]

    # How it is done.

    def _notes(self) -> list[str]:
        return [*super()._notes(), self._damping_text]

    @property
    def _damping_text(self) -> str:
        """The damping as it was given, and what was used."""
        return as_text(self._wording.damping, self._damping, self._rule, self._known_damping)

    def _settings(self) -> dict[str, Any]:
        """What ``fit`` depends on beside model, data and loss."""
        # a list: the order counts
        return {"seed": self.seed, "blocks": [list(b) for b in self._partition.blocks.items()]}

    @property
    def _what_is_fitted(self) -> str:
        return self._wording.matrix

    @property
    def _fit_data(self) -> Iterable[Batch]:
        return self._hessian_loader

    def _found_at(self, place: int) -> Facts:
        return self._facts[place]

    def _take(self, place: int, facts: Facts) -> None:
        self._facts[place] = facts

    @property
    def _is_fitted(self) -> bool:
        return bool(self._facts)

    @property
    def _sources(self) -> dict[str, Source]:
        found = super()._sources
        if self._hessian_data is not None:
            found["hessian_dataset"] = partial(data_fingerprint, self._hessian_data)
        return found

    def _look_again(self) -> None:
        super()._look_again()
        self.damping = self._damping  # which may name blocks that there are no more

    @cached_property
    def _partition(self) -> Partition:
        return Partition(self._blocks_of(list(self._shapes)), self._shapes)

    def _through(self, solve: Callable[[Tensor], Tensor]) -> Transform:
        """A map of vectors ``[k, P]`` as a map of gradients."""

        def transform(gradients: Gradients) -> Gradients:
            return self._partition.gradients(solve(self._partition.flat(gradients)), gradients)

        return transform

    def _forget(self) -> None:
        super()._forget()
        self._facts: dict[int, Facts] = {}
        self._drop_inverses()
        self._memory = Memory()

    def _drop_inverses(self) -> None:
        self._inverses: dict[int, Transform] = {}
        # whether scores by these inverses have been compared with plain products
        self._compared = False

    def _fit_at(self, place: int, loader: CheckpointLoader) -> None:
        """Have the inverse at a checkpoint, measuring what is not known yet."""
        self._keep_rows(loader)
        loader.load(place)
        data = self._data_at(place)
        if place not in self._facts:
            self._facts[place] = self._measure(data)
        if place not in self._inverses:
            if self._rule is not None and f"{self._rule}_damping" not in self._facts[place]:
                found = self._damping_by(self._rule, self._facts[place], data)
                self._facts[place][f"{self._rule}_damping"] = found
            damping = self._damping_at(place)
            self._inverses[place] = self._make_inverse(self._facts[place], damping, data)

    def _data_at(self, place: int) -> DataSet:
        """What is fitted to at a checkpoint."""
        return DataSet(self._fit_batches, self._device, place, self._wording.data)

    @property
    def _hessian_loader(self) -> CheckedBatches:
        if self._hessian_data is None:
            return self.train_dataloader
        return self._checked_batches(self._hessian_data, HESSIAN_DATA)

    @property
    def _fitted_on(self) -> str:
        return super()._fitted_on if self._hessian_data is None else HESSIAN_DATA

    @property
    def _fit_batches(self) -> Iterable[Batch]:
        """The Hessian data, or what is kept of it."""
        return self._hessian_loader

    @property
    def _rule(self) -> str | None:
        """The rule of the damping; None of numbers."""
        if not isinstance(self._damping, str):
            return None
        return self._auto_rule if self._damping == AUTO else self._damping

    @property
    def _share(self) -> float:
        """Of the rules of traces."""
        return self._auto_share

    def _damping_by(self, rule: str, facts: Facts, data: DataSet) -> Tensor:
        """The damping of each block ``[B]`` by a rule, for the checkpoint that is in the model."""
        if rule == LEARNING_RATES:
            found = early_stopping(self.checkpoints, data.checkpoint, self._rules)
            return torch.full((len(self.block_names),), found, dtype=torch.float64)
        if TRACES not in facts:
            facts[TRACES] = self._traces(facts, data)
        blocks = dict(zip(self.block_names, self._partition.sizes, strict=True))
        argument = f'{self._wording.damping}="{self._damping}"'
        return share_of(facts[TRACES], blocks, data.count, rule, self._share, argument)

    def _damping_at(self, place: int) -> Tensor:
        """The damping of each block ``[B]``, float64."""
        if self._rule is not None:
            values = self._facts[place][f"{self._rule}_damping"].tolist()
        elif isinstance(self._damping, Mapping):
            values = [self._damping[name] for name in self.block_names]
        else:
            values = [self._damping] * len(self.block_names)
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    @property
    def _known_damping(self) -> list[float]:
        """Every damping that is used, of all checkpoints that are fitted; none of others."""
        if self._rule is None:
            own = self._damping.values() if isinstance(self._damping, Mapping) else [self._damping]
            return [float(value) for value in own] if self._facts else []
        known = (facts.get(f"{self._rule}_damping") for facts in self._facts.values())
        return [value for values in known if values is not None for value in values.tolist()]

    def _curvature_features(self, curvature: str, data: DataSet, draw: int = 0) -> Features:
        """The gradients whose outer products are the empirical Fisher, or the Fisher.

        Args:
            curvature: which of the two.
            data: over which it is a mean.
            draw: which labels are drawn for the Fisher: those of another draw are independent.
        """
        labels, of_data = self._labels(draw), self.train_at(data.checkpoint).features

        def features(places: Tensor, batch: Batch) -> Gradients:
            if curvature == "empirical_fisher":
                return of_data(batch)
            self._source.prepare(batch, self._train_loss, int(places[0]))
            return self._features(data.checkpoint, labels(places, batch), self._train_loss)

        return Remembered(features, self._memory)

    def _labels(self, draw: int) -> ModelLabels:
        """Draws labels from the model."""
        seed = (self.seed + draw * OTHER_DRAW) % 2**63
        return ModelLabels(self.model, self._train_loss, seed)

    @contextmanager
    def _session(self) -> Iterator[CheckpointLoader]:
        with super()._session() as loader:
            try:
                yield loader
            finally:
                self._memory.clear()
