"""Examples as representer points: as outer products with the input of the refitted layer.

Shapes: c outputs, d features f of the last layer.
"""

from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.representer.last_layer import chosen_outputs
from influence_kit.methods.representer.refit import Head, Refit

# the factors of a training and of a test example
VALUE, CHOSEN = "representer value", "chosen output"


def point_gradients(refit: Refit, head: Head, batch: Batch, sample: Tensor) -> Gradients:
    """A batch as training and as test examples: alpha f^T and (chosen output) f^T, ``[c, d]``."""
    seen = refit.seen(batch)
    values = refit.values(seen, head)
    chosen = chosen_outputs(values, seen.batch, refit.loss.shift)
    features, shape = seen.features.to(sample), head.weights.shape
    forms = {
        kind: Factored(deltas.to(sample), features, shape)
        for kind, deltas in ((VALUE, values), (CHOSEN, chosen))
    }
    return Gradients(len(values), forms, dict.fromkeys(forms, shape), sample)


def output_gradients(refit: Refit, head: Head, batch: Batch, sample: Tensor) -> Gradients:
    """A batch as test examples of an output function, given as the loss of the refit: slopes f^T.

    The loss is minus the function, so the slopes change sign.
    """
    seen = refit.seen(batch)
    slopes, shape = -refit.slopes(seen, head), head.weights.shape
    form = Factored(slopes.to(sample), seen.features.to(sample), shape)
    return Gradients(len(slopes), {CHOSEN: form}, {CHOSEN: shape}, sample)
