"""Checkpoints go into the model one at a time, and the user's state dicts are safe from it."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.discovery import (
    LoadFunction,
    label_of,
    load_checkpoint,
    load_with_rate,
)
from influence_kit.checkpoints.same_objects import SameObjects
from influence_kit.core.dtypes import real
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate import is_one_number
from influence_kit.preservation.dropout_masks import mask_numbers, set_masks
from influence_kit.preservation.restore import load_into

FINGERPRINT_CHUNK = 2**20
Fingerprint = tuple[float, ...]


class CheckpointLoader:
    """Puts checkpoints into the model, one at a time, and never the one that is there already.

    Args:
        model: the model, still as the user has it.
        checkpoints: what ``load`` takes, in order.
        load: ``load(model, checkpoint) -> learning rate``.
        check: is given the number and the fingerprint of each checkpoint when it is loaded first.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Any],
        load: LoadFunction,
        check: Callable[[int, Fingerprint], None] = lambda number, fingerprint: None,
    ) -> None:
        own = memory_of(model)
        self._model, self._load, self._check = model, load, check
        # a state dict that is the live model's would change with the next load
        self._items = [_copied(item, own) for item in checkpoints]
        self._current: int | None = None
        self._rates: dict[int, float] = {}
        self._prints: dict[int, Fingerprint] = {}

    def load(self, place: int) -> float:
        """Have checkpoint number ``place`` in the model; returns its learning rate."""
        if self._current != place:
            self._current = None
            rate, caution = load_into(self._model, partial(self._put, place))
            if not _is_number(rate):
                raise InvalidArgumentError(
                    f"`checkpoints_load_func` returned {rate!r} for checkpoint {place}; it must "
                    "return the learning rate, a finite number"
                )
            self._current = place
            if place not in self._rates:
                self._rates[place] = float(rate)
                if caution is not None:
                    warnings.warn(caution, stacklevel=2)
                self._warn(place)
        return self._rates[place]

    @property
    def current(self) -> int | None:
        """The number of the checkpoint that is in the model; None before the first load."""
        return self._current

    def _put(self, place: int) -> tuple[Any, str | None]:
        """Load a checkpoint; its rate, and what is doubtful about it."""
        item = self._items[place]
        set_masks(self._model, None)
        with SameObjects(self._model, place):
            if self._load is not load_checkpoint:
                return self._load(self._model, item), None
            # which would warn at each load
            rate = load_with_rate(self._model, item)
        return rate.value, rate.warning(label_of(item))

    def fingerprint(self, place: int) -> Fingerprint:
        """Numbers that tell the weights and masks of a checkpoint, which has been loaded."""
        return self._prints[place]

    @property
    def fingerprints(self) -> dict[int, Fingerprint]:
        """Those of the checkpoints that have been loaded, by number."""
        return dict(self._prints)

    def _warn(self, place: int) -> None:
        label = label_of(self._items[place])
        if self._rates[place] == 0:
            warnings.warn(
                f"checkpoint {place} ({label}) has learning rate 0 and adds nothing to scores that "
                "weigh checkpoints by it; see checkpoint_table for where it was found",
                stacklevel=2,
            )
        fingerprint = _fingerprint(self._model)
        self._check(place, fingerprint)
        for other, known in self._prints.items():
            if known == fingerprint:
                warnings.warn(
                    f"checkpoints {other} and {place} ({label}) hold the same weights, which so "
                    "count twice; state dicts kept while training go on need copy.deepcopy",
                    stacklevel=2,
                )
                break
        self._prints[place] = fingerprint


def _is_number(rate: Any) -> bool:
    return is_one_number(rate) and math.isfinite(float(rate))


def _fingerprint(model: nn.Module) -> Fingerprint:
    """Numbers that differ where weights, buffers (by value or by place) or masks do."""
    sums = mask_numbers(model)
    for value in (*model.parameters(), *model.buffers()):
        for chunk in real(value.detach()).flatten().split(FINGERPRINT_CHUNK):
            places = torch.linspace(1, 2, len(chunk), dtype=torch.float64, device=chunk.device)
            sums.append(float(chunk.double() @ places))
    return tuple(sums)


def memory_of(model: nn.Module) -> set[int]:
    """Where the tensors of a model's state dict are."""
    return {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


def is_live(item: Any, own: set[int]) -> bool:
    """Whether a tensor, or one in nested dicts, lists and tuples, has its memory in ``own``."""
    if isinstance(item, Mapping | list | tuple):
        parts = item.values() if isinstance(item, Mapping) else item
        return any(is_live(part, own) for part in parts)
    return isinstance(item, Tensor) and item.data_ptr() in own


def _copied(item: Any, own: set[int]) -> Any:
    """The item, or a copy of a dict, list or tuple with tensors whose memory is in ``own``."""
    if not is_live(item, own):
        return item
    if isinstance(item, Mapping):
        return {key: _copied(value, own) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_copied(value, own) for value in item)
    return item.clone()
