"""Checks every batch of a model's own loss that is known by its values alone.

A loss with label smoothing, class weights or an added penalty is none of the formulas of
``model_losses``. It may be the mean of single losses in the first examples only because they have
equally many tokens. Only the model can tell, called with each example alone.
"""

import torch
from torch import nn

from influence_kit.data.batches import Batch, call_model, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import NO_EXAMPLE_LOSS, Loss
from influence_kit.preservation.training_flags import evaluating

# relative differences that rounding explains; of half precision, 3e-2
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}


def check_own_loss(model: nn.Module, batch: Batch, loss: Loss) -> None:
    """Compare a model's own loss of a batch with those of its examples, if it is known by values.

    Args:
        model: the model.
        batch: the batch.
        loss: the loss.

    Raises:
        InvalidArgumentError: if it is not the sum or mean, as in earlier batches.
    """
    n = example_count(batch)
    if n == 1 or not loss.is_own_by_values:
        return
    closeness = CLOSE.get(next(model.parameters()).dtype, 3e-2)
    alone = [take(batch, slice(i, i + 1)) for i in range(n)]
    with evaluating(model), torch.no_grad():
        together = call_model(model, batch), batch
        runs = [(call_model(model, one), one) for one in alone]
        if not bool(torch.isfinite(loss.values(*together)).all()):
            return  # the check of scores will name the example
        for i, run in enumerate(runs):
            if not bool(torch.isfinite(loss.values(*run)).all()):
                raise InvalidArgumentError(
                    f"the model's own loss of example {i} of a batch of {n} is not finite alone "
                    "(it may have no labels), and the batch's is, so that it is no "
                    f"{loss.reduction} over examples. {NO_EXAMPLE_LOSS}"
                )
        loss.settle(together, runs, closeness)
