"""Vectors whose dot products are the scores of a method.

Shapes: n examples, P entries of a feature, C checkpoints.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring.stream import Stream


def term_vectors(
    stream: Stream, batches: Iterable[Batch], kind: str, aggregate: bool, method: str
) -> Tensor:
    """Features of examples at each checkpoint times the root of its weight: ``[n, P * C]``.

    Args:
        stream: the terms of the method.
        batches: the examples.
        kind: "test" for test features; "training" or "input" for training features.
        aggregate: return their sum, one row.
        method: the name of the method, for errors.

    Raises:
        NotImplementedError: if test and training features differ.
        InvalidArgumentError: if a weight is negative.
    """
    blocks = []
    for term in stream.terms:
        if not term.is_symmetric:
            raise NotImplementedError(
                f"{method} treats test and training examples differently: scores are asymmetric, "
                "so no single vector per example reproduces them as dot products; use `influence`"
            )
        side = term.test if kind == "test" else term.train
        vectors = stream.vectors(side, batches, aggregate, kind)
        weight = term.weight_at(stream.loader.load(term.train.checkpoint))
        if weight < 0:
            raise InvalidArgumentError(
                f"checkpoint {term.train.checkpoint} has the negative learning rate {weight}, for "
                "which no vectors reproduce the scores as dot products; `TracInCP` and "
                "`TracInCPFast` support it in `influence`"
            )
        blocks.append(vectors * weight**0.5)
    return torch.cat(blocks, dim=1)
