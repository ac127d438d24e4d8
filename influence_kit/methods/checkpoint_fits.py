"""What a method fits at each of its checkpoints: in the first call, or read from a folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.caches import Caches
from influence_kit.methods.fit_cache import FitCache


class CheckpointFits:
    """The fits of a method at all of its checkpoints.

    Args:
        method: the method, whose ``prepare`` calls ``at_all``.
        caches: all caches of the method.
        cache: the one that holds the states of the fits.
        fit_at: fits at a checkpoint, by its index, unless it is fitted; the model has its weights.
        description: returns the model, data, loss and settings that a saved fit belongs to.
    """

    def __init__(
        self,
        method: ExampleInfluence,
        caches: Caches,
        cache: FitCache,
        fit_at: Callable[[int, CheckpointLoader], None],
        description: Callable[[CheckpointLoader], Mapping[str, Any]],
    ) -> None:
        self._method, self._caches, self.cache = method, caches, cache
        self._fit_at, self._description = fit_at, description

    def at_all(self, loader: CheckpointLoader, show_progress: bool, indices: Sequence[int]) -> None:
        """Fit at checkpoints, with a bar over them if one is not fitted."""
        show = show_progress and not all(index in self.cache.states for index in indices)
        doing = f"fit {self.cache.what}. Processing checkpoint"
        with self._method.progress(doing, len(indices), show) as bar:
            for index in indices:
                loader.load(index)
                self._fit_at(index, loader)
                bar.update()

    def fit(self, show_progress: bool) -> None:
        """Fit at every checkpoint again."""
        self._method.forget()
        with self._method.session() as loader:
            self._method.prepare(loader, show_progress)

    def save(self, folder: str | Path) -> None:
        """Write the states to a folder; fits at checkpoints without one."""
        with self._method.session() as loader:
            self._method.prepare(loader)
            self.cache.save(folder, self._description(loader))

    def load(self, folder: str | Path) -> None:
        """Read the states that ``save`` has written."""
        with self._caches.beside(), self._method.session() as loader:
            count, device = len(self._method.checkpoints), self._method.device
            description = self._description(loader)
            self.cache.load(folder, description, loader, count, device, self._caches)
