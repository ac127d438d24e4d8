"""Which batches are compared with autograd again: at each checkpoint the batches 1, 2, 4, 8, ...

And a batch whose layers are called in another way than seen before, or whose lengths lie beyond
those that were compared.
"""

from collections.abc import Collection, Hashable, Sequence

from influence_kit.losses.loss import Loss

# so many different shapes are all compared; later ones where they are longer or shorter than all
FIRST_SHAPES = 8


class Schedule:
    """Counts the batches of a question, and says which to compare again."""

    def __init__(self) -> None:
        self.begin()
        self._paths: set[Hashable] = set()
        self._shapes: dict[Hashable, list[Sequence[int]]] = {}
        self._waits: dict[str, int] = {}
        # whether the last batch was unlike those before
        self.is_surprised = False

    def begin(self) -> None:
        """A new question: batches are counted from 1 at each checkpoint."""
        self._counts: dict[tuple[int | None, int, bool], int] = {}
        self._keys: set[Hashable] = set()
        self.seen = 1

    def due(
        self,
        checkpoint: int | None,
        loss: Loss,
        several: bool,
        path: Hashable,
        shapes: Sequence[Sequence[int]],
    ) -> bool:
        """Count a batch; whether it is to be compared.

        Args:
            checkpoint: the number of the checkpoint in the model.
            loss: the loss of the batch (its training or test loss).
            several: whether it has more than one example: one alone shows nothing of others.
            path: how the layers were called.
            shapes: the lengths of the batch's tensors, without the number of examples.
        """
        key = checkpoint, id(loss), several
        count = self._counts[key] = self._counts.get(key, 0) + 1
        self.seen = count
        way = (id(loss), several, path)
        is_new = way not in self._paths
        self._paths.add(way)
        self.is_surprised = self._is_beyond(shapes, several) or is_new
        return self.is_surprised or count & (count - 1) == 0

    def _is_beyond(self, shapes: Sequence[Sequence[int]], several: bool) -> bool:
        lengths = [length for shape in shapes for length in shape]
        known = self._shapes.setdefault((several, *(len(shape) for shape in shapes)), [])
        if lengths in known:
            return False
        beyond = len(known) < FIRST_SHAPES or any(
            not min(column) <= length <= max(column)
            for length, column in zip(lengths, zip(*known, strict=True), strict=True)
        )
        if beyond:
            known.append(lengths)
        return beyond

    def is_new(self, key: Hashable) -> bool:
        """Whether a key was not seen in this question."""
        found = key not in self._keys
        self._keys.add(key)
        return found

    def may_look(self, names: Collection[str]) -> bool:
        """Whether to look at parameters that moved for the first time: less and less often."""
        look = False
        for name in names:
            wait = self._waits[name] = self._waits.get(name, 0) + 1
            look |= wait & (wait - 1) == 0
        return look
