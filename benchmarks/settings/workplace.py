"""The models of a run, each trained once, and the scores of methods for them.

Shapes: n training and m test examples, C checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.settings.data import Data
from benchmarks.settings.kept_scores import Scored, ScoreFolder, Variant, scored
from benchmarks.settings.methods import Question, make_method, split_name
from benchmarks.settings.plan import Plan
from benchmarks.settings.recipes import Minimum
from benchmarks.settings.setting import Setting, Trained
from influence_kit.evaluation import Retraining, checkpoint_losses, half_subsets
from influence_kit.storage.folders import hash_of

# of the models over which a method averages: other seeds than those of targets and of the truth
MEMBER_SEEDS = 2000


@dataclass(frozen=True)
class Workplace:
    """The trained models of a setting with some data, each trained once.

    Attributes:
        setting: the setting.
        data: its data, or the same with wrong labels.
        plan: how much is done.
        folder: where models on subsets and scores are kept.
    """

    setting: Setting
    data: Data
    plan: Plan
    folder: Path
    _targets: dict[int, Trained] = field(default_factory=dict)
    # one method at most
    _latest: dict[tuple[str, int, bool], Any] = field(default_factory=dict)
    _members: dict[int, list[Path]] = field(default_factory=dict)

    @property
    def target_seeds(self) -> range:
        """The seeds of the target models: one alone where all seeds give the same model."""
        is_one = isinstance(self.setting.recipe, Minimum)
        return range(1 if is_one else self.plan.targets)

    def target(self, seed: int) -> Trained:
        """The model of a seed, trained on all examples."""
        if seed not in self._targets:
            self._targets[seed] = self.setting.train_with_checkpoints(
                self.data, self.plan.checkpoints, seed=seed, device=self.plan.device
            )
        return self._targets[seed]

    @cached_property
    def retraining(self) -> Retraining:
        """Trains on subsets, and keeps the models in the folder."""
        return Retraining(
            self.setting.trainer(self.data, self.plan.device),
            self.folder / "models",
            model=self.setting.new_model(self.data).to(self.plan.device),
            label=self._label,
            n_jobs=self.plan.processes,
            show_progress=self.plan.show_progress,
        )

    @property
    def measure(self) -> Callable[[nn.Module], Tensor]:
        """Measures a model's test examples, ``[m]``; it can be pickled."""
        return partial(self.setting.measure, test=self.data.test)

    def members(self, count: int) -> list[Path]:
        """Checkpoints of models with seeds of their own, each trained on another random half."""
        if count not in self._members:
            halves = half_subsets(len(self.data.train), count, seed=self.plan.seed + MEMBER_SEEDS)
            seeds = [MEMBER_SEEDS + place for place in range(count)]
            # trains all of them at once, where the setting can
            self.retraining.paired_outputs(halves, self.measure, seeds)
            self._members[count] = [
                self.retraining.checkpoints(halves[place : place + 1], [seed])[0]
                for place, seed in enumerate(seeds)
            ]
        return self._members[count]

    def method(self, name: str, seed: int, over_run: bool = False, **own: Any) -> Any:
        """A method for the target model of a seed, with other keywords where they are given."""
        _, count = split_name(name)
        members = self.members(count) if count else ()
        question = Question(self.setting, self.data, self.target(seed), members, over_run)
        return make_method(name, question, **own)

    def scores_by_target(self, name: str) -> list[Tensor]:
        """All scores of a method ``[m, n]`` for each target model."""
        return [self.scored(Variant(name), seed).scores for seed in self.target_seeds]

    def seconds(self, name: str) -> float:
        """What the scores of a method took, fitting included: the mean over target models."""
        seeds = self.target_seeds
        return float(np.mean([self.scored(Variant(name), seed).seconds for seed in seeds]))

    def scored(self, variant: Variant, seed: int) -> Scored:
        """The scores of a variant for the target model of a seed; the folder keeps them."""

        def make() -> Scored:
            ask, model = partial(self._asked, variant, seed), self.target(seed).model
            return scored(ask, model, self.data.train, self.data.test)

        return self._folder.get(variant.file(seed), make)

    def _asked(self, variant: Variant, seed: int) -> Any:
        """The method; one that is there already is asked again with another damping."""
        key = variant.name, seed, variant.over_run
        if variant.damping is None or key not in self._latest:
            self._latest.clear()
            self._latest[key] = self.method(*key)
        method = self._latest[key]
        if variant.damping is not None:
            # what TRAK adds it to is a sum over the training set, not a mean
            factor = len(self.data.train) if split_name(variant.name)[0] == "TRAK" else 1
            method.damping = factor * variant.damping
        return method

    @cached_property
    def _folder(self) -> ScoreFolder:
        plan, test = self.plan, hash_of([self.data.test.tensors])
        made_by = f"{self._label}, {test}, {plan.checkpoints} checkpoints, seed {plan.seed}"
        return ScoreFolder(self.folder / "scores", made_by)

    @cached_property
    def _label(self) -> str:
        """What models are trained on, and how."""
        return f"{self.setting.name}: {self.setting.recipe}, {hash_of([self.data.train.tensors])}"

    def losses(self, seed: int) -> Tensor:
        """The loss of each training example at each checkpoint of a target model, ``[C, n]``."""
        target = self.target(seed)
        return checkpoint_losses(
            target.model, self.data.train, target.checkpoints, self.setting.loss_fn
        )
