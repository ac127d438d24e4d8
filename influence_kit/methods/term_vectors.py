"""Vectors whose dot products are the scores of a method.

Shapes: n examples, P entries of a feature, C checkpoints.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Term


def term_vectors(
    terms: Sequence[Term],
    gradients: SideGradients,
    batches: Iterable[Batch],
    kind: str,
    aggregate: bool,
    method: str,
) -> Tensor:
    """Features of examples at each checkpoint times the root of its weight: ``[n, P * C]``.

    Args:
        terms: the terms of the method.
        gradients: computes the gradients of their sides.
        batches: the examples.
        kind: "test" for test features; "training" or "input" for training features.
        aggregate: return their sum, one row.
        method: the name of the method, for errors.

    Raises:
        NotImplementedError: if test and training features differ.
        InvalidArgumentError: if a weight is negative.
    """
    blocks = []
    for term in terms:
        if not term.is_symmetric:
            raise NotImplementedError(
                f"{method} treats test and training examples differently: scores are asymmetric, "
                "so no single vector per example reproduces them as dot products; use `influence`"
            )
        side = term.test if kind == "test" else term.train
        vectors = gradients.vectors(side, batches, aggregate, kind)
        weight = term.weight_at(gradients.loader.load(term.train.checkpoint))
        if weight < 0:
            raise InvalidArgumentError(
                f"checkpoint {term.train.checkpoint} has the negative learning rate {weight}, for "
                "which no vectors reproduce the scores as dot products; `TracInCP` and "
                "`TracInCPFast` support it in `influence`"
            )
        blocks.append(vectors * weight**0.5)
    return torch.cat(blocks, dim=1)
