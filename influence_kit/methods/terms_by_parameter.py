"""Terms split by parameter: what each layer adds to a score, where features mix parameters."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.losses.loss import Loss
from influence_kit.scoring.term import Side, Term


def terms_by_parameter(
    terms: Sequence[Term], features: FeatureMap, loss: Loss, names: Sequence[str]
) -> list[Term]:
    """The terms with each parameter's part of the training features, and whole test features.

    The parts are computed again: only their sum is cached.

    Args:
        terms: the terms.
        features: the feature map of the method.
        loss: the loss of training examples.
        names: the names of the parameters.
    """

    def split(term: Term) -> Term:
        index, solved = term.train.checkpoint, term.test.solved
        parts = partial(features.by_parameter, index)
        return replace(
            term,
            test=replace(term.test, solve=lambda f: features.repeated(solved(f), names)),
            train=Side(index, lambda batch: parts(batch, loss)),
        )

    return [split(term) for term in terms]
