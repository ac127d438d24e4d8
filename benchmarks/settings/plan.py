"""How much a run does, and what it finds. Shapes: T target models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.settings.methods import split_name
from benchmarks.settings.setting import Metric, Setting
from influence_kit.errors import InvalidArgumentError


@dataclass(frozen=True)
class Plan:
    """How much a run does.

    Attributes:
        methods: names in ``benchmarks.settings.methods``.
        subsets: random halves of the training set, for the linear datamodeling score; 0 for none.
        repeats: models trained on each half.
        targets: models whose predictions are attributed (T).
        left_out: training examples left out in turn, for leave-one-out; 0 for none.
        wrong_share: share of labels changed, to be found by self-influence; 0 for none.
        checkpoints: of a target's training, for methods that follow it.
        seed: of the halves, the examples left out and the labels changed.
        processes: in which models are trained.
        device: where models are trained and attributed.
        show_progress: a bar over the models that are trained on subsets.
    """

    methods: Sequence[str]
    subsets: int = 0
    repeats: int = 1
    targets: int = 1
    left_out: int = 0
    wrong_share: float = 0.0
    checkpoints: int = 5
    seed: int = 0
    processes: int = 1
    device: str = "cpu"
    show_progress: bool = False

    def check(self, setting: Setting) -> None:
        """Refuse what the setting does not have, before anything is trained.

        Raises:
            InvalidArgumentError: for unknown methods, metrics that make no sense here, or numbers
                that are too small.
        """
        for name in self.methods:
            split_name(name)
        least = {"subsets": 0, "left_out": 0, "targets": 1, "repeats": 1, "checkpoints": 1}
        for number, smallest in least.items():
            if getattr(self, number) < smallest:
                raise InvalidArgumentError(
                    f"`{number}` is {getattr(self, number)}; it must be at least {smallest}"
                )
        asked: dict[Metric, float] = {
            "LDS": self.subsets,
            "LOO": self.left_out,
            "AUC": self.wrong_share,
        }
        wanted = [metric for metric, amount in asked.items() if amount]
        foreign = [metric for metric in wanted if metric not in setting.metrics]
        if foreign or not wanted:
            raise InvalidArgumentError(
                f"{setting.name} is judged by {', '.join(setting.metrics)}; asked for was "
                f"{', '.join(wanted) or 'nothing'}: give subsets (LDS), left-out examples (LOO) or "
                "a share of wrong labels (AUC)"
            )


class Result(NamedTuple):
    """How good a method is, by one metric.

    Attributes:
        metric: its name.
        method: the method's name.
        values: one a target model, ``[T]``.
        error: the standard error of their mean: over target models, or over test examples where
            there is one model; None where there is only one value.
        seconds: of the scores, fitting included, the mean over target models; None of what is no
            method.
    """

    metric: str
    method: str
    values: tuple[float, ...]
    error: float | None
    seconds: float | None

    @property
    def mean(self) -> float:
        """The mean over target models."""
        return float(np.mean(self.values))
