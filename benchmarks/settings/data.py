"""The data of a setting, as tensors: training and test examples.

Shapes: n training and m test examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from influence_kit.errors import InvalidArgumentError


class Sizes(NamedTuple):
    """How many training and test examples; None for all there are."""

    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Data:
    """Training and test examples ``(inputs, targets)``.

    Attributes:
        train: n examples.
        test: m examples.
        outputs: of the model: classes, tokens, or target values.
        groups: where each training example comes from (a topic, a piece), ``[n]``; or nothing.
        test_groups: the same of the test examples, ``[m]``.
        vocabulary: the text of each token, where examples are texts.
        folder: the folder that the data set was read from, where there is one.
    """

    train: TensorDataset
    test: TensorDataset
    outputs: int
    groups: tuple[str, ...] = ()
    test_groups: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def inputs(self) -> int:
        """The numbers that an example's input has."""
        return int(self.train.tensors[0][0].numel())

    def with_wrong_labels(self, share: float, seed: int) -> tuple["Data", Tensor]:
        """The data with a share of the training labels changed to a random other class.

        Returns:
            The changed data, and which labels are wrong: bool ``[n]``.

        Raises:
            InvalidArgumentError: where the targets are not one class an example, or for a share
                outside (0, 1).
        """
        inputs, labels = self.train.tensors
        if labels.is_floating_point() or labels.dim() != 1:
            raise InvalidArgumentError(
                f"targets of shape {list(labels.shape)} and type {labels.dtype} are not one class "
                "an example: there are no labels to change"
            )
        if not 0 < share < 1:
            raise InvalidArgumentError(f"the share of labels to change is {share}, not in (0, 1)")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
        is_wrong = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, chosen, True)
        shift = torch.randint(1, self.outputs, labels.shape, generator=generator)
        changed = torch.where(is_wrong, (labels + shift) % self.outputs, labels)
        return replace(self, train=TensorDataset(inputs, changed)), is_wrong


def first(examples: Sequence[Tensor], count: int | None, what: str) -> TensorDataset:
    """The first ``count`` examples of some tensors.

    Raises:
        InvalidArgumentError: where there are fewer, or ``count`` is not positive.
    """
    there = len(examples[0])
    if count is not None and not 0 < count <= there:
        raise InvalidArgumentError(f"{count} {what} examples were asked for; there are {there}")
    return TensorDataset(*(tensor[:count] for tensor in examples))
