"""Refuses token scores, and the gradients that they are made of, that are NaN or infinite."""

import torch
from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.errors import NonFiniteError
from influence_kit.gradients.per_example import Gradients
from influence_kit.scoring.side_gradients import refuse_non_finite_examples
from influence_kit.scoring.term import Term


def require_finite_features(
    gradients: Gradients, indices: Tensor, checkpoint: int, kind: str = "test"
) -> None:
    """Refuse features that are NaN or infinite.

    Args:
        gradients: the features.
        indices: the index of the example of each row.
        checkpoint: the index of the checkpoint in the model.
        kind: "training" or "test", the word for the examples.

    Raises:
        NonFiniteError: names the example and the layer.
    """
    found = None if gradients.has_finite_factors else gradients.non_finite()
    if found is not None:
        row = found[0]
        one = gradients.rows(slice(row, row + 1))
        refuse_non_finite_examples(one, int(indices[row]), kind, checkpoint)


def require_finite_scores(
    found: Tensor, term: Term, batch: Batch, indices: Tensor, test: Gradients | None = None
) -> None:
    """Refuse token scores that are NaN or infinite.

    Args:
        found: the scores.
        term: the term that they belong to.
        batch: the training examples, whose checkpoint is in the model.
        indices: the indices of the training examples.
        test: the test gradients, if they have not been checked.

    Raises:
        NonFiniteError: names the example and the layer, or, if only products overflow, the training
            examples.
    """
    if bool(torch.isfinite(found.sum())) or bool(torch.isfinite(found).all()):
        return
    checkpoint = term.train.checkpoint
    require_finite_features(term.train.features(batch), indices, checkpoint, "training")
    if test is not None:
        require_finite_features(test, torch.arange(test.n), checkpoint)
    raise NonFiniteError(
        f"a token score with the training examples {int(indices.min())} to {int(indices.max())} "
        f"overflows at checkpoint {checkpoint}; use float64"
    )
