"""What an object keeps is of the weights, data, loss and model that it was made of.

The rule, of everything that is kept in memory or read from a ``store``: where one of them has
changed since, the next question is an error that says so and what to do. A model whose structure
has changed is looked at again where nothing is kept.
"""

from abc import abstractmethod
from functools import cached_property, partial
from typing import Any, NoReturn

from torch import nn

from influence_kit.checkpoints.loader import Fingerprint
from influence_kit.errors import ChangedError
from influence_kit.losses.loss import LossFunction
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.function_fingerprint import function_fingerprint
from influence_kit.methods.origin import Origin, Source
from influence_kit.methods.read_only import ReadOnly
from influence_kit.methods.structure import Structure


class KeptOf(ReadOnly):
    """Checks, at the beginning of each call, that what is kept is of what there is now."""

    model: nn.Module
    layers: list[str] | None
    loss_fn: LossFunction | None
    _train_data: Any
    _structure: Structure
    # whether what is kept depends on the checkpoints
    _keeps_of_checkpoints = True

    @abstractmethod
    def _look_at(self, layers: Any) -> None:
        """Choose the parameters whose gradients count."""

    def _forget(self) -> None:
        """Drop what is kept."""
        self._origin = Origin()

    @property
    def _kept_since(self) -> str | None:
        """What was done when what is kept was made, as a clause; None where nothing is kept."""
        return None

    @property
    def _remedy(self) -> str:
        return "call `forget()` to have it computed again"

    def _refuse_kept(self, change: str) -> NoReturn:
        raise ChangedError(f"{change} when {self._kept_since}; {self._remedy}")

    @property
    def _sources(self) -> dict[str, Source]:
        """Gives fingerprints of the data and the loss that what is kept is made of."""
        return {
            "train_dataset": partial(data_fingerprint, self._train_data),
            "loss_fn": partial(function_fingerprint, self.loss_fn, self.model),
        }

    def _note(self, weights: dict[int, Fingerprint]) -> None:
        """Note what a session has used, where something is kept of it."""
        self._used = weights
        if self._kept_since is not None:
            own = weights if self._keeps_of_checkpoints else {}
            self._origin.record(own, self._sources)

    def _check_weights(self, number: int, fingerprint: Fingerprint) -> None:
        if self._origin.has_other_weights(number, fingerprint):
            self._refuse_kept(f"checkpoint {number} holds other weights than")

    def _check_sources(self) -> None:
        change = self._origin.other_source(self._sources)
        if change is not None:
            self._refuse_kept(change)

    def _see_model(self) -> None:
        """Look again at a model that was changed, or refuse it where something is kept."""
        change = self._structure.change(self.model)
        if change is None:
            return
        if self._kept_since is not None:
            self._refuse_kept(f"the model is not what it was ({change})")
        self._look_again()

    def _look_again(self) -> None:
        """Look at the model as it is now; what was learnt of it is learnt again."""
        self._look_whole(self.layers)
        for cls in type(self).__mro__:
            for name, value in vars(cls).items():
                if isinstance(value, cached_property):
                    self.__dict__.pop(name, None)
        self._structure = Structure(self.model)

    def _look_whole(self, layers: Any) -> None:
        """``_look_at``, of which an error leaves nothing behind."""
        before = dict(vars(self))
        try:
            self._look_at(layers)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
