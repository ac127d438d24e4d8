"""What an object keeps is of the weights, data, loss and model that it was made of.

The rule, for everything that is kept in memory or read from a ``store``: where one of them has
changed since, the next question is an error that says so and what to do. A model whose structure
has changed is looked at again where nothing is kept.
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
    """Something that an object keeps between calls.

    Attributes:
        of_checkpoints: whether it depends on the checkpoints.
        remedy: what to do where it no longer belongs to what there is.
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
        """Why passes over the data of an argument must agree; None where they need not."""
        return None


C = TypeVar("C", bound=Cache)


class Caches:
    """All caches of an object, with what their content was made of."""

    def __init__(self) -> None:
        # give fingerprints of data and losses, by argument
        self.sources: dict[str, Source] = {}
        self._members: list[Cache] = []
        self._origin = Fingerprints()
        self._used: dict[int, Fingerprint] = {}

    def add(self, cache: C, first: bool = False) -> C:
        """Keep a further one, whose content errors speak of first."""
        self._members.insert(0 if first else len(self._members), cache)
        return cache

    @property
    def filled(self) -> Cache | None:
        """One that holds something; None where nothing is kept."""
        return next((cache for cache in self._members if cache.since is not None), None)

    def clear(self) -> None:
        """Empty all of them."""
        for cache in self._members:
            cache.clear()
        self._origin = Fingerprints()

    def clear_of_checkpoints(self) -> None:
        """Empty those that depend on the checkpoints."""
        for cache in self._members:
            if cache.of_checkpoints:
                cache.clear()
        if self.filled is None:
            self._origin = Fingerprints()

    def why_fixed(self, name: str) -> str | None:
        """Why passes over the data of an argument must agree; None where they need not."""
        reasons = (cache.why_fixed(name) for cache in self._members)
        return next((reason for reason in reasons if reason is not None), None)

    # What was used.

    def note(self, weights: dict[int, Fingerprint] | None = None) -> None:
        """Note what a session has used (None: the last one), where something is kept of it."""
        self._used = self._used if weights is None else weights
        filled = self.filled
        if filled is not None:
            self._origin.record(self._used if filled.of_checkpoints else {}, self.sources)

    def note_given(self, number: int, give: Callable[[Batch | None], Given]) -> None:
        """Note what model and loss give at a checkpoint that is loaded, if something is kept.

        Args:
            number: of the checkpoint.
            give: gives it, of a batch, or of the first training examples.
        """
        is_new = number in self._origin.weights and number not in self._origin.given
        if self.filled is None or not is_new:
            return
        with suppress(Exception):  # of data that cannot be read again, say
            given = give(None)
            again = give(given.batch)
            if _agree(given.outputs, again.outputs) and _agree(given.losses, again.losses):
                self._origin.given[number] = given

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, other weights and data are no error; what is kept stays in case of one."""
        known, self._origin = self._origin, Fingerprints()
        try:
            yield
        except BaseException:
            self._origin = known
            raise

    # Refusals.

    def refuse(self, change: str) -> NoReturn:
        """An error that says what has changed since something was kept."""
        cache = self.filled
        assert cache is not None
        raise ChangedError(f"{change} when {cache.since}; {cache.remedy}")

    def check_sources(self) -> None:
        """Refuse other data or another loss."""
        change = self._origin.other_source(self.sources)
        if change is not None:
            self.refuse(change)

    def check_weights(
        self, number: int, fingerprint: Fingerprint, give: Callable[[Batch | None], Given]
    ) -> None:
        """Refuse other weights than what is kept was made of, and a model or loss that differs."""
        if self._origin.has_other_weights(number, fingerprint):
            self.refuse(f"checkpoint {number} holds other weights than")
        known = self._origin.given.get(number)
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
    """Whether two lists of outputs are the same but for rounding; what is not finite tells none."""
    finite = all(bool(one.isfinite().all()) for one in (*ones, *others))
    return not (ones and others and finite) or close(ones, others)
