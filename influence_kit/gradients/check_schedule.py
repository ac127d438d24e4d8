"""Which batches are compared with autograd again: at each checkpoint the batches 1, 2, 4, 8, ...

Also compared are batches in which layers are called in a new way, or whose tensor lengths lie
outside those compared before.
"""

from collections.abc import Collection, Hashable, Sequence

from influence_kit.losses.loss import Loss

# the first shapes are all compared; later ones only if longer or shorter than all before
FIRST_SHAPES = 8


class Schedule:
    """Counts the batches of a call, and decides which to compare again."""

    def __init__(self) -> None:
        self.begin()
        self._paths: set[Hashable] = set()
        self._shapes: dict[Hashable, list[Sequence[int]]] = {}
        self._waits: dict[str, int] = {}
        # whether the last batch was unlike earlier ones
        self.is_surprised = False

    def begin(self) -> None:
        """Start a new call: batches are counted from 1 at each checkpoint."""
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
        """Count a batch; returns whether it must be compared.

        Args:
            checkpoint: the index of the checkpoint in the model.
            loss: the loss of the batch (training or test loss).
            several: whether it has more than one example: a single one shows no mixing.
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
        """Whether a key is new in this call."""
        found = key not in self._keys
        self._keys.add(key)
        return found

    def may_look(self, names: Collection[str]) -> bool:
        """Whether to check parameters with their first non-zero gradients: less and less often."""
        look = False
        for name in names:
            wait = self._waits[name] = self._waits.get(name, 0) + 1
            look |= wait & (wait - 1) == 0
        return look
