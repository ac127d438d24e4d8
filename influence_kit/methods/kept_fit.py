"""What a method fits once a checkpoint: kept for later calls, saved to a folder and loaded."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.data.batches import Batch
from influence_kit.methods.base import TRAIN
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.origin import Origin
from influence_kit.methods.starting_again import starts_again
from influence_kit.storage.folders import read_folder, write_folder


class KeptFit(InnerProductInfluence):
    """A method of terms that fits something at every checkpoint before it scores."""

    # how errors say that it was fitted
    _verb = "measured"

    # What a method says.

    @property
    @abstractmethod
    def _what_is_fitted(self) -> str:
        """What is fitted, in words."""

    @abstractmethod
    def _fit_at(self, place: int, loader: CheckpointLoader) -> None:
        """Have what is fitted at a checkpoint, which is then in the model."""

    @abstractmethod
    def _found_at(self, place: int) -> dict[str, Tensor]:
        """What was fitted at a checkpoint, as tensors by name."""

    @abstractmethod
    def _take(self, place: int, facts: dict[str, Tensor]) -> None:
        """Have what ``_found_at`` gave when it was saved."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What ``fit`` depends on beside model, data and loss."""

    @property
    @abstractmethod
    def _is_fitted(self) -> bool:
        """Whether something is, at any checkpoint."""

    @abstractmethod
    def _is_fitted_at(self, place: int) -> bool:
        """Whether something is at this checkpoint."""

    @property
    def _fit_data(self) -> Iterable[Batch]:
        """What it is fitted on."""
        return self.train_dataloader

    # What a user calls.

    @starts_again
    def fit(self, show_progress: bool = False) -> Self:
        """Fit at every checkpoint, anew; ``influence`` does so by itself once.

        Args:
            show_progress: a bar over the checkpoints.
        """
        self._forget()
        with self._session() as loader:
            self._fit_everywhere(loader, show_progress)
        return self

    @starts_again
    def save(self, folder: str | Path) -> None:
        """Write what was fitted to a folder; fits where that has not been done.

        What may be set anew without fitting again (a damping, a ridge) is not part of it.
        """
        tensors = {}
        with self._session() as loader:
            self._fit_everywhere(loader)
            for place in range(len(self.checkpoints)):
                for name, value in self._found_at(place).items():
                    tensors[f"{place}/{name}"] = value
            write_folder(folder, tensors, self._description(loader))

    @starts_again
    def load(self, folder: str | Path) -> Self:
        """Take what ``save`` has written, in place of ``fit``.

        Raises:
            InvalidArgumentError: where it was saved for another model, data set, loss or setting.
        """
        with self._beside_what_is_kept(), self._session() as loader:
            tensors = read_folder(folder, self._description(loader))
            self._forget()
            for place in range(len(self.checkpoints)):
                loader.load(place)
                own = {
                    name.partition("/")[2]: value.to(self._device)
                    for name, value in tensors.items()
                    if name.startswith(f"{place}/")
                }
                self._take(place, own)
        return self

    # How it is done.

    def _fit_everywhere(self, loader: CheckpointLoader, show_progress: bool = False) -> None:
        """Have what is fitted at all checkpoints, with a bar over them where something is not."""
        self._keep_rows(loader, show_progress)
        places = range(len(self.checkpoints))
        show = show_progress and not all(self._is_fitted_at(place) for place in places)
        doing = f"fit {self._what_is_fitted}. Processing checkpoint"
        with self._bar(doing, len(places), show) as bar:
            for place in places:
                self._fit_at(place, loader)
                bar.update()

    @property
    def _kept_since(self) -> str | None:
        if self._is_fitted:
            return f"{self._what_is_fitted} was {self._verb}"
        return super()._kept_since

    @property
    def _remedy(self) -> str:
        return "call `fit()` to have it computed again"

    @contextmanager
    def _beside_what_is_kept(self) -> Iterator[None]:
        """Inside, other weights and data are no error; what is kept stays in case of one."""
        known, self._origin = self._origin, Origin()
        try:
            yield
        except BaseException:
            self._origin = known
            raise

    @property
    def _fitted_on(self) -> str:
        """The argument that ``_fit_data`` is."""
        return TRAIN

    def _why_fixed(self, name: str) -> str | None:
        if name == self._fitted_on:
            return f"{self._what_is_fitted} is fitted to it and used with other passes"
        return super()._why_fixed(name)

    def _description(self, loader: CheckpointLoader) -> dict[str, Any]:
        """What is saved belongs to."""
        return {
            "method": self.get_name(),
            **self._settings(),
            **self._identity(loader, self._fit_data),
        }
