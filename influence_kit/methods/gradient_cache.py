"""The cached training gradients of a method: in memory while the object lives, or in a folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.distributed import from_first_rank, is_alone, is_first_rank, wait_for_all
from influence_kit.core.memory import resident_bytes
from influence_kit.data.batches import Batch, example_count, to_device
from influence_kit.errors import PassAgain
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.store import GradientStore
from influence_kit.gradients.store_manifest import default_chunk_rows
from influence_kit.methods.caches import Cache
from influence_kit.methods.example_batches import TRAIN
from influence_kit.scoring.term import Side
from influence_kit.storage.locks import ranks_alone_in


class CachedBatch(tuple[Any, ...]):
    """Stands for a batch of training examples whose gradients are cached: ``(indices [n],)``."""

    @property
    def ends(self) -> tuple[int, int]:
        """The first index, and the last plus 1."""
        return int(self[0][0]), int(self[0][-1]) + 1


class CachedGradients(ABC):
    """Gradients of the whole training set at every checkpoint."""

    @abstractmethod
    def batches(self) -> Sequence[Batch]:
        """The training set in pieces: ``CachedBatch``."""

    @abstractmethod
    def gradients(self, checkpoint: int, batch: CachedBatch) -> Gradients:
        """The gradients of one of the pieces."""


class GradientsInMemory(CachedGradients):
    """Gradients in memory, in the batches in which they were computed."""

    def __init__(self, parts: Sequence[Sequence[Gradients]]) -> None:
        self._parts: dict[tuple[int, int], Gradients] = {}
        self._batches: dict[int, CachedBatch] = {}
        for checkpoint, batches in enumerate(parts):
            start = 0
            for gradients in batches:
                stop = start + gradients.n
                self._batches[start] = CachedBatch((torch.arange(start, stop),))
                self._parts[checkpoint, start] = gradients
                start = stop

    def batches(self) -> Sequence[Batch]:
        return list(self._batches.values())

    def gradients(self, checkpoint: int, batch: CachedBatch) -> Gradients:
        return self._parts[checkpoint, batch.ends[0]]


@dataclass(frozen=True)
class StoredGradients(CachedGradients):
    """Gradients in a store, in pieces that fit the workspace."""

    store: GradientStore
    sample: Tensor

    def batches(self) -> Sequence[Batch]:
        tiles = self.store.tiles(self.sample)
        return [CachedBatch((torch.arange(tile.start, tile.stop),)) for tile in tiles]

    def gradients(self, checkpoint: int, batch: CachedBatch) -> Gradients:
        return self.store.gradients(checkpoint, *batch.ends, self.sample)


class GradientCache(Cache):
    """The gradients of the training set, cached in memory or in a store.

    Args:
        store: the folder; None writes no files.
    """

    def __init__(self, store: str | Path | None) -> None:
        self.store = store
        self.rows: CachedGradients | None = None

    @property
    def since(self) -> str | None:
        """What was done when it was filled."""
        return None if self.rows is None else "the gradients of the training set were computed"

    def clear(self) -> None:
        """Drop them; a store stays."""
        self.rows = None

    def why_fixed(self, name: str) -> str | None:
        """The training set of a store must not change."""
        if name == TRAIN and self.store is not None:
            return "`store` keeps the gradients of its examples"
        return None


class LearntFeatures(Cache):
    """What a feature map has learnt of the training set."""

    def __init__(self) -> None:
        self.map = FeatureMap()

    @property
    def since(self) -> str | None:
        """What was done when it was learnt."""
        return "the mask was learnt" if self.map.is_learnt and self.map.state else None

    def clear(self) -> None:
        """Drop it."""
        self.map.forget()


@dataclass(frozen=True)
class CacheBuild:
    """One pass over the training set at each checkpoint, whose gradients are cached.

    Args:
        sides: the gradients to cache, by checkpoint.
        batches: the training set.
        loader: loads checkpoints into the model.
        sample: a tensor with the dtype and device of scores.
        bar: makes a bar over the checkpoints.
    """

    sides: Sequence[Side]
    batches: Iterable[Batch]
    loader: CheckpointLoader
    sample: Tensor
    bar: Callable[[], "tqdm[Any]"]

    def in_memory(self) -> GradientsInMemory:
        """Cache them in memory."""
        parts = []
        with self.bar() as bar:
            for side in self.sides:
                self.loader.load(side.checkpoint)
                on_device = (to_device(batch, self.sample.device) for batch in self.batches)
                parts.append([side(batch) for batch in on_device])
                bar.update()
        return GradientsInMemory(parts)

    def on_disk(
        self,
        folder: str | Path,
        description: Mapping[str, Any],
        columns: Mapping[str, torch.Size],
        dtype: torch.dtype | None,
    ) -> StoredGradients:
        """Write the rows that are missing in a folder; of several ranks each writes its share.

        A second run that builds the same store waits for the first, and then reads it.
        """
        rows, dtype = description["examples"], dtype or self.sample.dtype
        width = sum(shape.numel() for shape in columns.values())
        # whole batches, so that none is computed for two chunks
        batch_size = getattr(self.batches, "batch_size", None) or 1
        chunk_rows = default_chunk_rows(rows, width * dtype.itemsize, batch_size)

        def opened() -> GradientStore:
            return GradientStore.create_or_open(
                folder, description, columns, rows, len(self.sides), dtype, chunk_rows
            )

        store = opened()
        # as the first rank sees it: another run may finish it between two ranks' looks
        done = torch.tensor(float(store.is_complete), device=self.sample.device)
        if not from_first_rank(done):
            with ranks_alone_in(store.folder, self.sample.device):
                store = opened()  # by now another run may have built it
                if not store.is_complete:
                    self._fill(store, rows)
                    wait_for_all()
                    if is_first_rank():
                        store.finish()
                    wait_for_all()
        return StoredGradients(store, self.sample)

    def _fill(self, store: GradientStore, rows: int) -> None:
        """Write the missing rows, of ``rows`` per checkpoint."""
        with self.bar() as bar:
            for side in self.sides:
                if store.wanted(side.checkpoint, 0, rows):
                    self.loader.load(side.checkpoint)
                    try:
                        store.fill(side.checkpoint, self._wanted(store, side))
                    except PassAgain:  # the rows that were written may be wrong, too
                        store.empty()
                        raise
                bar.update()

    def _wanted(self, store: GradientStore, side: Side) -> Iterator[tuple[int, Tensor]]:
        """The missing rows, by batch, each with the index of its first example."""
        start = 0
        for batch in self.batches:
            stop = start + example_count(batch)
            if store.wanted(side.checkpoint, start, stop):
                yield start, side(to_device(batch, self.sample.device)).flat()
            start = stop


def fits_memory(rows: int, shapes: Mapping[str, torch.Size], sample: Tensor) -> bool:
    """Whether rows of these shapes, with the dtype of the sample, may be cached in memory."""
    size = rows * sum(shape.numel() for shape in shapes.values()) * sample.element_size()
    # ranks divide the training set: no rank would cache all of it
    return is_alone() and 0 < size <= resident_bytes(sample.device)
