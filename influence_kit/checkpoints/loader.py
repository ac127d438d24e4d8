"""Loads checkpoints into the model one at a time, without changing the user's state dicts."""

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
from influence_kit.core.arguments import is_finite_number, shown
from influence_kit.core.dtypes import real
from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.dropout_masks import mask_numbers, set_masks
from influence_kit.preservation.restore import load_into

FINGERPRINT_CHUNK = 2**20
Fingerprint = tuple[float, ...]


class CheckpointLoader:
    """Loads checkpoints into the model, one at a time, unless the checkpoint is loaded already.

    Args:
        model: the model with the user's weights.
        checkpoints: the checkpoints, each an argument of ``load``, in order.
        load: ``load(model, checkpoint) -> learning rate``.
        check: called with the index and the fingerprint of each checkpoint at its first load.
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
        # a state dict that shares the model's memory would change with the next load
        self._items = [_copied(item, own) for item in checkpoints]
        self._current: int | None = None
        self._rates: dict[int, float] = {}
        self._prints: dict[int, Fingerprint] = {}

    def load(self, index: int) -> float:
        """Load checkpoint ``index`` into the model; returns its learning rate."""
        if self._current != index:
            self._current = None
            rate, caution = load_into(self._model, partial(self._put, index))
            if not is_finite_number(rate):
                raise InvalidArgumentError(
                    f"`checkpoints_load_func` returned {shown(rate)} for checkpoint {index}; it "
                    "must return the learning rate, a finite number"
                )
            self._current = index
            if index not in self._rates:
                self._rates[index] = float(rate)
                if caution is not None:
                    warnings.warn(caution, stacklevel=2)
                self._warn(index)
        return self._rates[index]

    @property
    def current(self) -> int | None:
        """The index of the checkpoint that is in the model; None before the first load."""
        return self._current

    def _put(self, index: int) -> tuple[Any, str | None]:
        """Load a checkpoint; returns its learning rate and a warning about it, if any."""
        item = self._items[index]
        set_masks(self._model, None)
        with SameObjects(self._model, index):
            if self._load is not load_checkpoint:
                return self._load(self._model, item), None
            # ``load_checkpoint`` itself would warn at each load
            rate = load_with_rate(self._model, item)
        return rate.value, rate.warning(label_of(item))

    def fingerprint(self, index: int) -> Fingerprint:
        """Numbers that identify the weights and masks of a checkpoint that has been loaded."""
        return self._prints[index]

    @property
    def fingerprints(self) -> dict[int, Fingerprint]:
        """The fingerprints of the checkpoints that have been loaded, by index."""
        return dict(self._prints)

    def _warn(self, index: int) -> None:
        label = label_of(self._items[index])
        if self._rates[index] == 0:
            warnings.warn(
                f"checkpoint {index} ({label}) has learning rate 0 and adds nothing to scores that "
                "are weighted by it; checkpoint_table shows where it was found",
                stacklevel=2,
            )
        fingerprint = _fingerprint(self._model)
        self._check(index, fingerprint)
        for other, known in self._prints.items():
            if known == fingerprint:
                warnings.warn(
                    f"checkpoints {other} and {index} ({label}) hold the same weights, which "
                    "therefore count twice; a state dict that is kept while training goes on needs "
                    "copy.deepcopy",
                    stacklevel=2,
                )
                break
        self._prints[index] = fingerprint


def _fingerprint(model: nn.Module) -> Fingerprint:
    """Numbers that differ if weights or buffers (by value or order of entries) or masks differ."""
    sums = mask_numbers(model)
    for value in (*model.parameters(), *model.buffers()):
        for chunk in real(value.detach()).flatten().split(FINGERPRINT_CHUNK):
            factors = torch.linspace(1, 2, len(chunk), dtype=torch.float64, device=chunk.device)
            sums.append(float(chunk.double() @ factors))
    return tuple(sums)


def memory_of(model: nn.Module) -> set[int]:
    """The memory addresses of the tensors of a model's state dict."""
    return {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


def is_live(item: Any, own: set[int]) -> bool:
    """Whether a tensor, or one in nested dicts, lists and tuples, has its memory in ``own``."""
    if isinstance(item, Mapping | list | tuple):
        parts = item.values() if isinstance(item, Mapping) else item
        return any(is_live(part, own) for part in parts)
    return isinstance(item, Tensor) and item.layout == torch.strided and item.data_ptr() in own


def _copied(item: Any, own: set[int]) -> Any:
    """The item, or a copy of a dict, list or tuple with tensors whose memory is in ``own``."""
    if not is_live(item, own):
        return item
    if isinstance(item, Mapping):
        return {key: _copied(value, own) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_copied(value, own) for value in item)
    return item.clone()
