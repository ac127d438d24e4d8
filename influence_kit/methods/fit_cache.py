"""The states of fits at each checkpoint: cached, saved to a folder and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.objects import check_path
from influence_kit.gradients.per_example import Transform
from influence_kit.methods.caches import Cache, Caches
from influence_kit.storage.folders import read_folder, write_folder

State = dict[str, Tensor]


class FitCache(Cache):
    """The state of a fit at each checkpoint, tensors by name.

    Args:
        what: what is fitted, in words for errors.
        verb: the participle for it, in errors: "fitted", "measured".
        data: the name of the argument that it is fitted to.
    """

    remedy = "call `fit()` to have it computed again"

    def __init__(self, what: str, verb: str, data: str) -> None:
        self.what, self.verb, self.data = what, verb, data
        self.clear()

    @property
    def since(self) -> str | None:
        """What was done when it was filled."""
        return f"{self.what} was {self.verb}" if self.states else None

    def clear(self) -> None:
        """Drop the states, and the inverses computed from them."""
        self.states: dict[int, State] = {}
        self.drop_inverses()

    def drop_inverses(self) -> None:
        """Drop the inverses computed from the states."""
        self.inverses: dict[int, Transform] = {}
        # whether scores by these inverses have been compared with plain products
        self.is_compared = False

    def why_fixed(self, name: str) -> str | None:
        """The data that is fitted to must not change."""
        if name == self.data:
            return f"{self.what} is fitted to it and used with other passes"
        return None

    def save(self, folder: str | Path, description: Mapping[str, Any]) -> None:
        """Write the states of all checkpoints, with their description."""
        tensors = {
            f"{index}/{name}": value
            for index, state in self.states.items()
            for name, value in state.items()
        }
        write_folder(check_path(folder, "folder"), tensors, description)

    def load(
        self,
        folder: str | Path,
        description: Mapping[str, Any],
        loader: CheckpointLoader,
        count: int,
        device: torch.device,
        caches: Caches,
    ) -> None:
        """Read the states that ``save`` has written; they replace everything that is cached.

        Args:
            folder: the folder.
            description: the description that the saved states must have.
            loader: loads the checkpoints, whose fingerprints are recorded.
            count: the number of checkpoints.
            device: the device of the states.
            caches: all caches of the object; emptied once the states have been read.

        Raises:
            InvalidArgumentError: if the saved states have another description.
        """
        tensors = read_folder(check_path(folder, "folder"), description)
        caches.clear()
        for index in range(count):
            loader.load(index)
            self.states[index] = {
                name.partition("/")[2]: value.to(device)
                for name, value in tensors.items()
                if name.startswith(f"{index}/")
            }
