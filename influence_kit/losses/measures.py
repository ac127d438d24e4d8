"""The function of test examples that scores explain: a loss to lower, or an output to raise.

Shapes: n examples, c classes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.data.batches import Batch
from influence_kit.data.class_labels import labels_of, logits_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.declared_reduction import declared_reduction
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.losses.margins import OutputFunction, classification_margin
from influence_kit.losses.targets import Target

# relative tolerance, for float32 and a label's probability computed in another way
SAME = 1e-5
REMEDY = (
    "`test_loss_fn` is a loss, lower is better; with a function that should rise, proponents "
    "would be reported as opponents. Pass it as `test_output_fn`, whose scores are positive where "
    "training raised it; if it should fall, pass its negative as `test_output_fn`"
)


class RaisedOutput(Loss):
    """Minus an output that should rise, as a loss: training lowers it where it raises the output.

    The arguments are those of ``Loss``.
    """

    def summed(self, value: Tensor, batch: Batch, n: int) -> Tensor:
        """Minus the sum over the examples of their outputs, a scalar."""
        return -super().summed(value, batch, n)


class LossOfTests(Loss):
    """A loss of test examples, refused if it returns a known measure that is better when higher.

    Args:
        loss_fn: as in ``Loss``.
        reduction: as in ``Loss``.
        train: the loss of training examples. If it returns the same measure, this is a loss after
            all (some models return losses).
    """

    def __init__(self, loss_fn: LossFunction, reduction: str | None, train: Loss) -> None:
        function = _unwrapped(loss_fn)
        if function is classification_margin or isinstance(function, Target):
            name = getattr(function, "__name__", type(function).__name__)
            raise InvalidArgumentError(
                f"`test_loss_fn` is `{name}`, which is better when higher. {REMEDY}"
            )
        super().__init__(loss_fn, reduction, "test_loss_fn")
        self._train = train
        self._is_known = False

    def returned(self, outputs: Any, targets: Any) -> Tensor:
        """What the loss returns, checked, and once compared with measures that should rise."""
        before = _version(outputs)
        value = super().returned(outputs, targets)
        if not self._is_known and before == _version(outputs):
            try:
                self._refuse_what_rises(value, outputs, targets)
                self._is_known = True
            except RuntimeError:  # under vmap, which hides values
                pass
        return value

    def _refuse_what_rises(self, value: Tensor, outputs: Any, targets: Any) -> None:
        found = known_to_rise(value, outputs, targets)
        if found is None:
            return
        try:
            trained_on = known_to_rise(self._train.returned(outputs, targets), outputs, targets)
        except Exception:  # the training loss may fail on test examples in any way
            trained_on = None
        if trained_on is None:
            raise InvalidArgumentError(f"`test_loss_fn` returns {found}. {REMEDY}")


def losses_of(
    loss_fn: LossFunction | None,
    test_loss_fn: LossFunction | None,
    test_output_fn: OutputFunction | None,
    sample_wise: bool | None,
) -> tuple[Loss, Loss]:
    """The losses of training and of test examples, given the arguments of a method.

    Args:
        loss_fn: the loss of training examples; also of test examples if the others are None.
        test_loss_fn: a loss of test examples.
        test_output_fn: or an output of theirs that should rise.
        sample_wise: the argument ``sample_wise_grads_per_batch``.

    Raises:
        InvalidArgumentError: if ``test_loss_fn`` is ``classification_margin``.
    """
    train = Loss(loss_fn, declared_reduction(loss_fn, sample_wise), "loss_fn")
    if test_output_fn is not None:
        name = "test_output_fn"
        declared = declared_reduction(test_output_fn, sample_wise, name)
        return train, RaisedOutput(test_output_fn, declared, name)
    if test_loss_fn is None:
        return train, train
    declared = declared_reduction(test_loss_fn, sample_wise, "test_loss_fn")
    return train, LossOfTests(test_loss_fn, declared, train)


def refuse_both(loss_fn: object, output_fn: object) -> None:
    """Refuse two functions of the same test examples."""
    if loss_fn is not None and output_fn is not None:
        raise InvalidArgumentError(
            "got both `test_loss_fn` and `test_output_fn`: scores are of one function of the test "
            "examples. Pass the loss that should fall, or the output that should rise"
        )


def known_to_rise(value: Tensor, outputs: Any, targets: Any) -> str | None:
    """The name of a measure that is better when higher, if that is what a loss returned; or None.

    Args:
        value: one value per example ``[n]``, several per example ``[n, ...]``, or their sum or
            mean.
        outputs: what the model returned.
        targets: the second argument of the loss; for a dict batch, the dict.
    """
    try:
        logits = logits_of(outputs)
    except InvalidArgumentError:
        return None
    if logits.dim() == 0 or not value.is_floating_point() or not len(logits):
        return None
    if value.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        return "the model's output, or a part of it"
    with torch.no_grad():
        measures = [*_of_outputs(logits.detach()), *_of_labels(logits.detach(), targets)]
        for name, measure in measures:
            if _is_the_same(value.detach(), measure):
                return name
    return None


def _of_outputs(outputs: Tensor) -> Iterator[tuple[str, Tensor]]:
    rows = outputs.reshape(len(outputs), -1)
    yield "the sum of the model's outputs", rows.sum(1)
    yield "the mean of the model's outputs", rows.mean(1)


def _of_labels(logits: Tensor, targets: Any) -> Iterator[tuple[str, Tensor]]:
    """Measures ``[n]`` of the labels ``[n]`` in a classifier's logits ``[n, c]``, with names."""
    try:
        labels = targets if isinstance(targets, Tensor) else labels_of(targets)
        margins = classification_margin(logits, labels)
    except (InvalidArgumentError, IndexError, KeyError, TypeError):
        return
    yield "the margin of the label's class", margins
    if logits.dim() == 2:
        column = labels.long().clamp(min=0)[:, None]
        right = logits.gather(1, column)[:, 0]
        yield "the label's logit", right
        others = logits.scatter(1, column, float("-inf")).max(1).values
        yield "the label's logit minus the largest other", right - others
        yield "the label's log-probability", F.log_softmax(logits, 1).gather(1, column)[:, 0]
        yield "the label's probability", F.softmax(logits, 1).gather(1, column)[:, 0]


def _is_the_same(value: Tensor, measure: Tensor) -> bool:
    """Whether a loss returned this measure ``[n]``, or its sum or mean."""
    if value.dim() == 0:
        return any(_close(value, one) for one in (measure.sum(), measure.mean()))
    if len(value) != len(measure):
        return False
    return _close(value.reshape(len(value), -1).sum(1), measure)


def _close(value: Tensor, measure: Tensor) -> bool:
    # whole numbers may agree by chance: 0 from an untrained layer, 1 from a rounded probability
    is_informative = bool((measure != measure.round()).any())
    return is_informative and torch.allclose(value.double(), measure.double(), rtol=SAME, atol=0)


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, partial):
        function = function.func
    return function


def _version(outputs: Any) -> int:
    """How often the model's output was changed in place, as by a loss that returns its argument."""
    try:
        return logits_of(outputs)._version
    except (InvalidArgumentError, RuntimeError):  # not one tensor, or made in inference mode
        return 0
