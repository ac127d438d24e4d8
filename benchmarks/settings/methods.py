"""The methods of a run, by their names in ``influence_kit``, and what they are called with.

A name may end in a number: ``TRAK-10`` is TRAK over ten models, each trained on another random half
of the training set.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

import influence_kit
from benchmarks.settings.data import Data
from benchmarks.settings.recipes import MiniBatches, Minimum
from benchmarks.settings.setting import Setting, Trained
from influence_kit.errors import InvalidArgumentError


class Question(NamedTuple):
    """What a method is made for.

    Attributes:
        setting: the setting.
        data: its data.
        target: the model whose predictions are attributed.
        members: checkpoints of other models, for a method over several.
        over_run: whether a method that looks at trained models takes the checkpoints of the whole
            run, not the last alone.
    """

    setting: Setting
    data: Data
    target: Trained
    members: Sequence[Any] = ()
    over_run: bool = False

    @property
    def final(self) -> list[Any]:
        """The checkpoints of a method that looks at trained models."""
        run = self.target.checkpoints
        return list(self.members) or (run if self.over_run else run[-1:])

    @property
    def has_values(self) -> bool:
        """Whether targets are numbers, not classes or tokens."""
        return self.data.train.tensors[1].is_floating_point()


Keywords = dict[str, Any]
NEIGHBORS = 10


def _shared(question: Question) -> Keywords:
    return {
        "checkpoints": question.final,
        "layers": question.setting.layer_names(question.target.model),
        "loss_fn": question.setting.loss_fn,
    }


def _of_training(question: Question) -> Keywords:
    return {**_shared(question), "checkpoints": question.target.checkpoints}


def _of_segments(question: Question) -> Keywords:
    """SOURCE takes the sum of the learning rates between checkpoints, which the recipe tells."""
    recipe = question.setting.recipe
    if not isinstance(recipe, MiniBatches) or not recipe.is_plain_sgd:
        raise InvalidArgumentError(
            f"SOURCE follows SGD; {question.setting.name} is trained by {recipe}"
        )
    steps = math.ceil(len(question.data.train) / recipe.batch_size)
    ends = [0, *(checkpoint["epoch"] for checkpoint in question.target.checkpoints)]
    an_epoch = steps * recipe.learning_rate / (1 - recipe.momentum)
    sums = [(end - start) * an_epoch for start, end in pairwise(ends)]
    return {**_of_training(question), "rate_sums": sums}


def _of_adam(question: Question) -> Keywords:
    """LESS takes the moments of Adam."""
    if "optimizer" not in question.target.checkpoints[-1]:
        raise InvalidArgumentError(
            f"LESS follows Adam; {question.setting.name} is trained by {question.setting.recipe}"
        )
    return _of_training(question)


def _of_last_layer(question: Question) -> Keywords:
    keywords = {**_of_training(question), "final_fc_layer": last_linear(question.target.model)[0]}
    del keywords["layers"]
    return keywords


def _refitted(question: Question) -> Keywords:
    return {**_of_last_layer(question), "checkpoints": question.final}


def _of_one_model(question: Question) -> Keywords:
    keywords = {**_shared(question), "checkpoint": question.final[0]}
    del keywords["checkpoints"]
    return keywords


def _with_curvature(question: Question) -> Keywords:
    """The damping of a minimum is known: the recipe's weight decay makes the Hessian exact."""
    recipe = question.setting.recipe
    known = {"damping": recipe.weight_decay} if isinstance(recipe, Minimum) else {}
    return {**_shared(question), **known}


def _trak(question: Question) -> Keywords:
    keywords = _shared(question)
    if question.has_values:  # there is no margin of a class
        keywords["output_fn"] = question.setting.measurement
    # a projection of few parameters only adds noise
    parameters = sum(p.numel() for p in question.target.model.parameters())
    if parameters <= len(question.data.train) // 2:
        return {**keywords, "projection": "identity"}
    return keywords


def _neighbors(question: Question) -> Keywords:
    keywords = {**_shared(question), "n_neighbors": NEIGHBORS}
    keywords["layer"] = last_linear(question.target.model)[1]
    if question.has_values:
        keywords["utility"] = "squared_error"
    del keywords["layers"]
    return keywords


METHODS: Mapping[str, Callable[[Question], Keywords]] = {
    "GradDot": _shared,
    "GradCos": _shared,
    "TracInCP": _of_training,
    "TracInCPFast": _of_last_layer,
    "ExplicitInfluenceFunction": _with_curvature,
    "CGInfluenceFunction": _with_curvature,
    "LiSSAInfluenceFunction": _with_curvature,
    "NystromInfluenceFunction": _with_curvature,
    "ArnoldiInfluenceFunction": _of_one_model,
    "DataInf": _shared,
    "KFACInfluenceFunction": _shared,
    "EKFACInfluenceFunction": _shared,
    "LoGra": _shared,
    "GraSS": _shared,
    "FactGraSS": _shared,
    "TRAK": _trak,
    "RepresenterPointSelection": _refitted,
    "KNNShapley": _neighbors,
    "SOURCE": _of_segments,
    "LESS": _of_adam,
}
# they take all checkpoints of one run
FOLLOWING = {"TracInCP", "TracInCPFast", "SOURCE", "LESS"}


def split_name(name: str) -> tuple[str, int]:
    """The class that a name means, and over how many models on halves; 0 for the target itself.

    Raises:
        InvalidArgumentError: for a method that is not known, or cannot be over several models.
    """
    kind, _, count = name.partition("-")
    if count and kind in FOLLOWING:
        raise InvalidArgumentError(
            f"{kind} follows one training run, not several models; ask for '{kind}'"
        )
    if kind not in METHODS or (count and not re.fullmatch("[1-9][0-9]*", count)):
        raise InvalidArgumentError(
            f"no method is called '{name}'; there are {', '.join(METHODS)}, and NAME-10, say, is a "
            "method over ten models on halves of the training set"
        )
    return kind, int(count or 0)


def make_method(name: str, question: Question, **own: Any) -> Any:
    """The method of a name, for a question, with other keywords where they are given."""
    kind, _ = split_name(name)
    model, keywords = question.target.model, METHODS[kind](question) | own
    return getattr(influence_kit, kind)(model, train_dataset=question.data.train, **keywords)


def last_linear(model: nn.Module) -> tuple[str, str]:
    """The names of the last linear layer, and of the layer before it.

    Raises:
        InvalidArgumentError: where there are none.
    """
    leaves = [
        (name, module) for name, module in model.named_modules() if not list(module.children())
    ]
    for place in range(len(leaves) - 1, 0, -1):
        if isinstance(leaves[place][1], nn.Linear):
            return leaves[place][0], leaves[place - 1][0]
    raise InvalidArgumentError(f"a {type(model).__name__} has no linear layer after another layer")
