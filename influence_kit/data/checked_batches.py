"""Batches of a loader, checked in every pass: as many as it promises, and the same each time."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from influence_kit.core.random_states import kept_random_state, same_random_states
from influence_kit.data.batch_axes import BatchAxes, Marker
from influence_kit.data.batches import Batch, example_count
from influence_kit.data.determinism import (
    SEED,
    drawn_by_index,
    first_example,
    is_constant,
    reads_by_index,
)
from influence_kit.data.fingerprints import Fingerprint, fingerprint, same_rows, targets_repeat
from influence_kit.data.input_checks import dimensions
from influence_kit.data.loaders import Slices, loader_length, promised_rows
from influence_kit.errors import InvalidArgumentError

UNSTACKABLE = (
    "each element in list of batch should be",
    "stack expects each tensor to be equal",
)
# a pass is endless if it has 2 times the promised length; without one, 10 times the data set
SURELY_MORE, ENDLESS = 2, 10


def no_reason() -> str | None:
    """No reason: for data whose passes need not agree."""
    return None


class CheckedBatches:
    """A loader that is read several times, and refused if it does not give the same each time.

    Before the first pass a few examples are drawn several times (for a loader without indices its
    first batch: once or twice more; with fewer than 32 batches, 3 or 4 times). In each pass
    examples are counted, and batches 0, 1, 2, 4, 8, ... and the last are compared with those of an
    earlier pass. All other attributes are the loader's own.

    Args:
        batches: batches, or a loader of them.
        name: the name of the argument, for errors.
        reason: returns why passes must agree (results of one pass are used in others), or None if
            random inputs make scores noisy but not wrong.
        ordered: whether the index of an example matters.
        rows: the number of examples of a batch.
        examine: refuses an example that the default collation cannot put into batches.
        axes: finds the dimension of each tensor that counts examples; batches are marked with it.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        name: str,
        reason: Callable[[], str | None] = no_reason,
        ordered: bool = True,
        rows: Callable[[Any], int] = example_count,
        examine: Callable[[Any], None] | None = None,
        axes: BatchAxes | None = None,
    ) -> None:
        self.batches, self.name = batches, name
        self._reason, self._ordered, self._rows = reason, ordered, rows
        self._examine, self._marker = examine, Marker(batches, axes or BatchAxes())
        self._is_drawn = self._has_warned = False
        self._first: Any = None
        self._was_reading: Any = None
        self._goes_on = False
        self._dimensions: Mapping[tuple[Any, ...], int] = {}
        self.forget()

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") or attribute == "batches":
            raise AttributeError(attribute)
        return getattr(self.batches, attribute)

    def __len__(self) -> int:
        length = loader_length(self.batches)
        if length is None:
            raise TypeError(f"a {type(self.batches).__name__} has no length")
        return length

    def __iter__(self) -> Iterator[Batch]:
        self.check_draws()
        length, number, rows = loader_length(self.batches), 0, 0
        for batch in self._marker.read(self._read(self._begin())):
            if number & (number - 1) == 0 or number + 1 == length:
                self._compare(number, batch)
            rows += self._rows(batch)
            number += 1
            self._check_end(number, rows)
            yield batch
        self._check_counts(number, rows)

    def marked(self, batch: Any) -> Any:
        """A batch that was collated as the loader does it, marked."""
        return self._marker.marked(batch)

    def look_at(self) -> None:
        """Read the first batches, until they show which dimensions count examples."""
        with same_random_states():
            next(self._marker.read(self._read(iter(self.batches))), None)

    def forget(self) -> None:
        """Stop comparing with the passes so far: data may change between two calls."""
        self._seen: dict[int, Fingerprint] = {}
        self._counts: tuple[int, int] | None = None

    def dimensions(self) -> Mapping[tuple[Any, ...], int]:
        """The number of dimensions of each tensor of a batch; empty if no batch was drawn yet."""
        if isinstance(self.batches, Slices):
            return dimensions(list(self.batches.dataset.tensors))
        self.check_draws()
        if not self._dimensions and reads_by_index(self.batches):
            self._dimensions = dimensions(next(iter(drawn_by_index(self.batches)), None))
        return self._dimensions

    def check_draws(self) -> None:
        """Draw a few examples several times, unless that has been done.

        Raises:
            InvalidArgumentError: if their order or their targets change, or if their inputs change
                and passes must agree. If passes need not agree, changing inputs only cause a
                warning.
        """
        if self._is_drawn:
            return
        example = None if self._examine is None else first_example(self.batches)
        if example is not None and self._examine is not None:
            self._examine(example)
        self._is_drawn = True
        if is_constant(self.batches):
            return
        if reads_by_index(self.batches):
            first, *others = drawn_by_index(self.batches) or (None,)
            self._dimensions = dimensions(first)
            for other in others:
                self._judge(fingerprint(first), other, first)
        elif self._ordered:
            for draw in range(_extra_draws(loader_length(self.batches))):
                with kept_random_state(SEED + draw):
                    self._draw_first()
            self._dimensions = dimensions(self._first)

    def _draw_first(self) -> None:
        """Draw the first batch once more."""
        reading = self._begin()
        first, self._first = self._first, next(self._read(reading), None)
        if first is not None:
            if self._first is None:
                self._refuse_once()
            self._judge(fingerprint(first), self._first, first)
        # a DataLoader's iterator is dropped, so that its workers are not kept alive
        self._was_reading = None if isinstance(self.batches, DataLoader) else reading

    def _begin(self) -> Iterator[Any]:
        reading = iter(self.batches)
        self._goes_on, self._was_reading = reading is self._was_reading, None
        return reading

    def _read(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except RuntimeError as error:
            if not any(text in str(error) for text in UNSTACKABLE):
                raise
            raise InvalidArgumentError(
                f"the examples of `{self.name}` have tensors or lists of different lengths, which "
                "torch's default collation cannot put into one batch; pass a DataLoader with a "
                "`collate_fn` that pads them (a tokenizer's `pad`, `pad_sequence`)"
            ) from error

    # What is compared.

    def _compare(self, number: int, batch: Any) -> None:
        """Refuse a batch that differs from the one of that number in an earlier pass."""
        first, self._first = self._first, None
        if number == 0 and first is not None:
            self._seen.setdefault(0, fingerprint(first))
        known = self._seen.get(number)
        if known is None:
            self._seen[number] = fingerprint(batch)
        elif self._ordered:
            self._judge(known, batch, first, number)

    def _judge(self, known: Fingerprint, batch: Any, first: Any, number: int | None = None) -> None:
        """Refuse, or warn of, a batch that has changed."""
        found = fingerprint(batch)
        if found == known:
            return
        self._is_drawn = False  # so that the next pass refuses it, too
        what, when = f"`{self.name}`", "each time it is read"
        if number is not None and first is None:
            what, when = f"batch {number} of {what}", "than in an earlier pass"
        if self._ordered and first is not None and same_rows(first, batch):
            raise InvalidArgumentError(
                f"{what} has its examples in another order {when}: its indices would mean nothing. "
                "Pass a loader that does not shuffle (nor its sampler, its `collate_fn` or its "
                "Dataset), or the Dataset itself"
            )
        if first is not None and self._goes_on:
            self._refuse_once()
        changed = " it was changed since, or" if number is not None and first is None else ""
        if found.targets != known.targets:
            raise InvalidArgumentError(
                f"{what} has other targets {when}:{changed} it shuffles, or its Dataset or "
                "`collate_fn` is random (masks of a language model, mixup). Each score would be of "
                "one random draw, and an index would not identify an example. Pass it in a fixed "
                "order, with masks and mixtures drawn once, beforehand"
            )
        random = (
            f"{what} has other inputs {when}:{changed} a transform in its Dataset or `collate_fn` "
            "is random, or a stream shuffles"
        )
        remedy = "Pass the data without the random transform, as in evaluation"
        if self._ordered and not reads_by_index(self.batches) and targets_repeat(batch):
            raise InvalidArgumentError(
                f"{random}: the targets do not show which. {remedy}, and in a fixed order"
            )
        reason = self._reason()
        if reason is not None:
            raise InvalidArgumentError(
                f"{random}; but {reason}, so every pass over it must give the same. {remedy}"
            )
        self._is_drawn = True
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{random}. Scores then change from call to call, and rank less well. {remedy}",
                stacklevel=2,
            )

    def _check_counts(self, batches: int, rows: int) -> None:
        """Refuse a pass that gave fewer or more examples than promised, or than an earlier pass."""
        length, promised = loader_length(self.batches), promised_rows(self.batches)
        if not rows and self._first is not None:
            self._refuse_once()
        remedy = "indices would not be those of the data. "
        if promised is not None and rows != promised:
            raise InvalidArgumentError(
                f"`{self.name}` promises {promised} examples (by the `len` of its Dataset or "
                f"sampler) and gave {rows}: {remedy}Its `collate_fn`, its Dataset or its workers "
                "leave examples out or repeat them; give one row per example, each once"
            )
        if length is not None and batches != length:
            raise InvalidArgumentError(
                f"`{self.name}` promises {length} batches by its `len` and gave {batches}: "
                f"{remedy}Correct its `__len__` or its `__iter__`"
            )
        if self._counts is not None and self._counts[1] != rows:
            raise InvalidArgumentError(
                f"`{self.name}` gave {self._counts[1]} examples in one pass and {rows} in another; "
                "it must give the same ones each time it is read. A generator can be read only "
                "once: pass a DataLoader, a Dataset, or an object whose `__iter__` starts again"
            )
        self._counts = batches, rows

    def _check_end(self, batches: int, rows: int) -> None:
        """Refuse a pass that goes on long after it should have ended."""
        length, promised = loader_length(self.batches), promised_rows(self.batches)
        often = SURELY_MORE
        if length is None and promised is None and reads_by_index(self.batches):
            promised, often = loader_length(self.dataset), ENDLESS
        more = promised is not None and rows > often * promised
        if more or (length is not None and batches > often * length):
            size = f"{promised} examples" if more else f"{length} batches"
            raise InvalidArgumentError(
                f"`{self.name}` has {size} and gave more than {often} times as many: it seems to "
                "repeat without end, as loaders for a fixed number of steps do. A pass must give "
                "each example once and stop"
            )

    def _refuse_once(self) -> NoReturn:
        raise InvalidArgumentError(
            f"`{self.name}` gives its examples only once, but it is read several times: its "
            "`__iter__` must start again; pass a DataLoader, a Dataset or a list of examples"
        )


def _extra_draws(batches: int | None) -> int:
    """How often the first batch is drawn again: of few batches, the same may be first by chance."""
    if batches is None:
        return 2
    return next(
        draws for draws, most in ((4, 9), (3, 31), (2, 999), (1, batches)) if batches <= most
    )
