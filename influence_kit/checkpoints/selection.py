"""Selects a few of the many checkpoints of a run, spaced over its steps."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from influence_kit.checkpoints.discovery import find_checkpoints, label_of
from influence_kit.checkpoints.files import STEP_KEYS
from influence_kit.core.arguments import check_count, is_finite_number, shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.trainer_folder import TRAINER_STATE, trainer_state
from influence_kit.storage.torch_files import values_of

# kinds of numbers that order checkpoints, the best first, and patterns of two of them in names
STEP, EPOCH, NUMBER = "step", "epoch", "number in the name"
# a unit after the digits (10k) would change the number
LABELS = {
    STEP: re.compile(
        r"(?<![a-z])(?:global[-_]?)?(?:step|iteration|iter|update)s?[-_=]?(\d+)(?![a-z\d])", re.I
    ),
    EPOCH: re.compile(r"(?<![a-z])epochs?[-_=]?(\d+)(?![a-z\d])", re.I),
}
Numbers = dict[str, float]
Spacing = Literal["even", "geometric"]
# the share of the run after which the first checkpoint of a geometric selection is wanted
FIRST = 0.05


def select_checkpoints(checkpoints: Any, count: int, spacing: Spacing = "even") -> list[Any]:
    r"""Choose ``count`` checkpoints of one run, spaced over its steps, always with the last one.

    .. math::
        t_j = s_0 + (s_C - s_0) \, \frac{j}{\mathrm{count}}, \qquad
        s_0 = \max \Bigl( 0, \; s_1 - \frac{s_C - s_1}{C - 1} \Bigr)

    or, if ``spacing`` is "geometric",

    .. math::
        t_j = s_C \cdot 0.05^{(\mathrm{count} - j) / (\mathrm{count} - 1)}

    for C checkpoints at the steps s_1 <= ... <= s_C: each target t_j, j = 1 ... count, gets a
    different checkpoint, such that the distances have the least sum. s_0 is 0 for a run that was
    saved from its start on, and one spacing before the first checkpoint of a run of which only
    later ones are left. If epochs, or numbers in names, start at 0, they count from 1; step 0 has
    the weights before training, and is chosen last.

    The step is the first of these numbers that all checkpoints have and that differs between them.
    No weights are read for it.

    - "step", "iteration" or "update" in the name of a file or folder (``epoch=3-step=400.ckpt``);
      N of a Trainer's ``checkpoint-N``, or ``global_step`` in its ``trainer_state.json``; for a
      checkpoint in memory ``global_step`` or ``step``;
    - "epoch" in the name or in memory;
    - the one number in which the paths differ (``ck10.pt``).

    For files whose name has none (``last.ckpt``), the ``step`` or ``epoch`` stored with the weights
    is read; the weights stay on disk. If no such number is known for all checkpoints, their
    position is the step: 1 ... C, in the order of ``find_checkpoints``.

    Args:
        checkpoints: a folder, a glob, a list of paths, or any iterable of paths or state dicts, as
            for any method.
        count: how many to choose; all are returned if there are no more.
        spacing: "even", or "geometric": from 5% of the run to its end, each by the same factor
            later than the one before. Early checkpoints are often the better ones for methods that
            take the mean over checkpoints (influence functions, TRAK), and few runs save them:
            save some in the first epochs.

    Returns:
        A list for the ``checkpoints`` of any method, in the order of ``find_checkpoints``.

    Raises:
        InvalidArgumentError: if ``count`` is not a positive int, for another ``spacing``, or if
            there are no checkpoints.

    Warns:
        UserWarning: if only some checkpoints have a step, so that positions are used.

    Example:
        >>> run = [{"state_dict": {}, "step": step} for step in (10, 20, 30, 40, 100, 200, 300)]
        >>> [checkpoint["step"] for checkpoint in select_checkpoints(run, 3)]
        [100, 200, 300]
        >>> [c["step"] for c in select_checkpoints(run, 3, spacing="geometric")]
        [20, 40, 300]
    """
    count = check_count(count, "count")
    if not is_one_of(spacing, ("even", "geometric")):
        raise InvalidArgumentError(f'`spacing` must be "even" or "geometric"; got {shown(spacing)}')
    found = find_checkpoints(checkpoints)
    if count >= len(found):
        return found
    steps = _steps(found)
    order = sorted(range(len(found)), key=steps.__getitem__)
    ordered = [steps[i] for i in order]
    targets = _even(ordered, count) if spacing == "even" else _geometric(ordered, count)
    chosen = _nearest(ordered, targets)
    return [found[i] for i in sorted(order[index] for index in chosen)]


def _even(steps: Sequence[float], count: int) -> list[float]:
    """The targets before the last step, at equal distances."""
    first, last = steps[0], steps[-1]
    start = max(0.0, first - (last - first) / (len(steps) - 1))
    return [start + (last - start) * j / count for j in range(1, count)]


def _geometric(steps: Sequence[float], count: int) -> list[float]:
    """The targets before the last step, at equal ratios."""
    return [steps[-1] * FIRST ** ((count - j) / (count - 1)) for j in range(1, count)]


def _nearest(steps: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Indices of the sorted steps that are nearest to the targets, and of the last step.

    Of two equally near steps the later one is taken.
    """
    # the best choice for the targets so far among the first i checkpoints, and its distance
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * len(steps)
    for target in targets:
        extended: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for i, step in enumerate(steps[:-1]):
            distance, chosen = best[i]
            with_it = (distance + abs(step - target), (*chosen, i))
            extended.append(min(with_it, extended[i], key=lambda choice: choice[0]))
        best = extended
    return [*best[-1][1], len(steps) - 1]


def _steps(found: Sequence[Any]) -> Sequence[float]:
    """The step of each checkpoint, or its position if the steps of some are not known."""
    known = _numbers(found)
    for kind in (STEP, EPOCH, NUMBER):
        values = [numbers[kind] for numbers in known if kind in numbers]
        if len(values) == len(known) and len(set(values)) > 1:
            # the checkpoint of epoch 0 has trained weights
            from_zero = kind != STEP and min(values) == 0
            return [value + 1 for value in values] if from_zero else values
    shown = Counter(kind for numbers in known for kind in numbers)
    kind, most = shown.most_common(1)[0] if shown else (STEP, 0)
    if 0 < most < len(found):
        without = [item for item, numbers in zip(found, known, strict=True) if kind not in numbers]
        warnings.warn(
            f"{len(without)} of {len(found)} checkpoints have no {kind} (the first is "
            f"{label_of(without[0])}), so checkpoints are selected evenly over their order, not "
            "over steps; to leave them out, pass a glob such as 'folder/step-*.pt', or a list",
            stacklevel=3,
        )
    return range(1, len(found) + 1)


def _numbers(found: Sequence[Any]) -> list[Numbers]:
    """The numbers that show when each checkpoint was saved, by kind."""
    known = [_in_name(item) for item in found]
    for index, number in _differing(found).items():
        known[index][NUMBER] = number
    return [numbers or _in_file(item) for item, numbers in zip(found, known, strict=True)]


def _in_name(item: Any) -> Numbers:
    """The numbers in a checkpoint's name, or in a dict in memory."""
    if isinstance(item, Mapping):
        return _held(item)
    if not isinstance(item, str | Path):
        return {}
    path = Path(item)
    matches = {kind: label.search(path.name) for kind, label in LABELS.items()}
    numbers: Numbers = {kind: int(match[1]) for kind, match in matches.items() if match}
    if STEP in numbers or not (path / TRAINER_STATE).is_file():
        return numbers
    # the state's file grows with the run, and the folder's name has the same step
    trainers = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return numbers | ({STEP: int(trainers[1])} if trainers else _held(trainer_state(path) or {}))


def _in_file(item: Any) -> Numbers:
    """The numbers in a file of ``torch.save``, without reading its weights."""
    return _held(values_of(Path(item), mapped=True)) if isinstance(item, str | Path) else {}


def _held(values: Mapping[str, Any]) -> Numbers:
    """The step and the epoch in a dict."""
    numbers: Numbers = {}
    for key in STEP_KEYS:
        value = values.get(key)
        if isinstance(value, int | float) and is_finite_number(value):
            numbers.setdefault(EPOCH if key == "epoch" else STEP, value)
    return numbers


def _differing(found: Sequence[Any]) -> dict[int, float]:
    """The one number that differs between paths, in the largest group alike but for numbers.

    By the index of the path; empty if they differ in several numbers.
    """
    alike: dict[tuple[str, ...], dict[int, list[str]]] = {}
    for index, item in enumerate(found):
        if isinstance(item, str | Path):
            parts = re.split(r"(\d+)", str(item))
            alike.setdefault(tuple(parts[::2]), {})[index] = parts[1::2]
    numbers = max(alike.values(), key=len, default={})
    columns = [column for column in zip(*numbers.values(), strict=True) if len(set(column)) > 1]
    if len(columns) != 1:
        return {}
    return dict(zip(numbers, map(int, columns[0]), strict=True))
