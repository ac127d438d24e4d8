"""The labels of a batch, the logits of a model's output, and a check of labels."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from influence_kit.data.axis_search import LABEL_KEYS
from influence_kit.data.batches import Batch, map_tensors
from influence_kit.errors import InvalidArgumentError, LabelError

IGNORED_LABEL = -100  # in torch's and Hugging Face's cross-entropy


def label_key(batch: Batch) -> Any:
    """Where a batch keeps its labels: the last index of a tuple or list, a known key of a dict.

    Raises:
        InvalidArgumentError: if a dict has none of the known keys.
    """
    if not isinstance(batch, Mapping):
        return len(batch) - 1
    found = [key for key in LABEL_KEYS if key in batch]
    if not found:
        raise InvalidArgumentError(
            f"none of the keys {list(batch)} is a known key of labels ({', '.join(LABEL_KEYS)})"
        )
    return found[0]


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        InvalidArgumentError: if there are none, or they are not a tensor.
    """
    labels = batch[label_key(batch)]
    if not isinstance(labels, Tensor):
        raise InvalidArgumentError(f"the labels are a {type(labels).__name__}, not a tensor")
    return labels


def logits_of(outputs: Any) -> Tensor:
    """The model's output, or the ``logits`` in it.

    Raises:
        InvalidArgumentError: if the output is not a tensor and does not hold ``logits``.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        found = getattr(outputs, "logits", None) if found is None else found
    if not isinstance(found, Tensor):
        raise InvalidArgumentError(f"the model returns a {type(outputs).__name__} without `logits`")
    return found


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """A model's output with its logits replaced."""
    known = logits_of(outputs)
    replaced = map_tensors(outputs, lambda tensor: logits if tensor is known else tensor)
    if logits_of(replaced) is not logits:  # an object with an attribute
        replaced = copy.copy(outputs)
        replaced.logits = logits
    return replaced


def check_labels(labels: Tensor, classes: int, ignored: int | None = None) -> None:
    """Refuse labels that are not the index of a class: on a GPU one would abort the process.

    Args:
        labels: integers, ``[n]`` or ``[n, *]``.
        classes: the number of classes.
        ignored: the one label outside the classes that is allowed and ignored; with None, every
            negative label is.

    Raises:
        LabelError: names the example, its label and the classes.
    """
    labels = labels.long()
    try:
        least, most = torch.stack(torch.aminmax(labels)).tolist()
    except RuntimeError:  # there are no labels, or vmap hides their values
        return
    if most < classes and (least >= 0 or ignored is None):
        return
    wrong = labels >= classes
    if ignored is not None:
        wrong = (wrong | (labels < 0)) & (labels != ignored)
    if bool(wrong.any()):
        also = "a negative one" if ignored is None else f"the label {ignored}"
        raise LabelError(
            f"{_first(wrong, labels)}, and there are {classes} classes: labels are 0 to "
            f"{classes - 1}, and {also} is ignored"
        )


def label_in(error: IndexError, targets: Any) -> str | None:
    """The label that torch's cross-entropy refused, in words; None for another error."""
    found = re.match(r"Target (-?\d+) is out of bounds", str(error))
    if found is None:
        return None
    labels = targets
    if isinstance(targets, Mapping):
        labels = next((targets[key] for key in LABEL_KEYS if key in targets), None)
    if isinstance(labels, Tensor):
        try:
            return _first(labels == int(found[1]), labels)
        except (IndexError, RuntimeError):  # it is not among these, or vmap hides the values
            pass
    return f"an example has the label {found[1]}"


def _first(wrong: Tensor, labels: Tensor) -> str:
    """The first example with a wrong label, in words."""
    index, n = wrong.nonzero()[0].tolist(), len(labels)
    which = f"example {index[0]} of a batch of {n}" if n > 1 else "an example"
    return f"{which} has the label {int(labels[tuple(index)])}"
