"""Caches of an object, valid only for the weights, data, loss and model they were computed from.

The rule for everything that is cached in memory or read from a ``store``: if one of these has
changed since, the next call raises an error with the change and the remedy. If nothing is cached, a
model whose structure has changed is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from torch import Tensor

from influence_kit.checkpoints.loader import Fingerprint
from influence_kit.data.batches import Batch
from influence_kit.errors import ChangedError
from influence_kit.methods.fingerprints import Fingerprints, Given, Source
from influence_kit.preservation.training_flags import close


class Cache:
    """Results that an object caches between calls.

    Attributes:
        of_checkpoints: whether it depends on the checkpoints.
        remedy: what to do when its content is out of date, for errors.
    """

    of_checkpoints = True
    remedy = "call `forget()` to have it computed again"

    @property
    def since(self) -> str | None:
        """What was done when it was filled, as a clause; None while it is empty."""
        raise NotImplementedError

    def clear(self) -> None:
        """Empty it."""
        raise NotImplementedError

    def why_fixed(self, name: str) -> str | None:
        """Why passes over the data of an argument must agree; None if they need not."""
        return None


C = TypeVar("C", bound=Cache)


class Caches:
    """All caches of an object, with fingerprints of what they were computed from."""

    def __init__(self) -> None:
        # functions that return fingerprints of data and losses, by argument
        self.sources: dict[str, Source] = {}
        self._members: list[Cache] = []
        self._recorded = Fingerprints()
        self._used: dict[int, Fingerprint] = {}

    def add(self, cache: C, first: bool = False) -> C:
        """Add a cache; errors name the content of the first one that is filled."""
        self._members.insert(0 if first else len(self._members), cache)
        return cache

    @property
    def filled(self) -> Cache | None:
        """The first cache that is filled; None if all are empty."""
        return next((cache for cache in self._members if cache.since is not None), None)

    def clear(self) -> None:
        """Empty all caches."""
        for cache in self._members:
            cache.clear()
        self._recorded = Fingerprints()

    def clear_of_checkpoints(self) -> None:
        """Empty the caches that depend on the checkpoints."""
        for cache in self._members:
            if cache.of_checkpoints:
                cache.clear()
        if self.filled is None:
            self._recorded = Fingerprints()

    def why_fixed(self, name: str) -> str | None:
        """Why passes over the data of an argument must agree; None if they need not."""
        reasons = (cache.why_fixed(name) for cache in self._members)
        return next((reason for reason in reasons if reason is not None), None)

    # What was used.

    def note(self, weights: dict[int, Fingerprint] | None = None) -> None:
        """Record what a session has used (None: the last session), if some cache is filled."""
        self._used = self._used if weights is None else weights
        filled = self.filled
        if filled is not None:
            self._recorded.record(self._used if filled.of_checkpoints else {}, self.sources)

    def note_given(self, number: int, give: Callable[[Batch | None], Given]) -> None:
        """Record what model and loss return at the loaded checkpoint, if some cache is filled.

        Args:
            number: the index of the checkpoint.
            give: returns it for a batch, or for the first training examples (None).
        """
        is_new = number in self._recorded.weights and number not in self._recorded.given
        if self.filled is None or not is_new:
            return
        with suppress(Exception):  # for example, data that cannot be read again
            given = give(None)
            again = give(given.batch)
            if _agree(given.outputs, again.outputs) and _agree(given.losses, again.losses):
                self._recorded.given[number] = given

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A context without checks against recorded fingerprints; an error restores these."""
        known, self._recorded = self._recorded, Fingerprints()
        try:
            yield
        except BaseException:
            self._recorded = known
            raise

    # Refusals.

    def refuse(self, change: str) -> NoReturn:
        """Raise the error that names the change and the cache that it makes invalid."""
        cache = self.filled
        assert cache is not None
        raise ChangedError(f"{change} when {cache.since}; {cache.remedy}")

    def check_sources(self) -> None:
        """Refuse a data set or loss that has changed."""
        change = self._recorded.other_source(self.sources)
        if change is not None:
            self.refuse(change)

    def check_weights(
        self, number: int, fingerprint: Fingerprint, give: Callable[[Batch | None], Given]
    ) -> None:
        """Refuse weights, a model or a loss other than those the caches were computed from."""
        if self._recorded.has_other_weights(number, fingerprint):
            self.refuse(f"checkpoint {number} holds other weights than")
        known = self._recorded.given.get(number)
        if known is None or self.filled is None:
            return
        now = give(known.batch)
        with_same = "for the same weights and examples"
        if not _agree(now.outputs, known.outputs):
            self.refuse(
                f"the model gives other outputs {with_same} (a hook, a setting or a method of it "
                "has changed) than"
            )
        if not _agree(now.losses, known.losses):
            self.refuse(
                f"`loss_fn` gives other losses {with_same} (something that it uses has changed) "
                "than"
            )


def _agree(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of outputs agree up to rounding; true if any of them is not finite."""
    finite = all(bool(one.isfinite().all()) for one in (*ones, *others))
    return not (ones and others and finite) or close(ones, others)
