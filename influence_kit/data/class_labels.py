"""Where the labels of a batch and the logits of a model's output are, and labels of no class."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from influence_kit.data.axis_search import LABEL_KEYS
from influence_kit.data.batches import Batch, map_tensors
from influence_kit.errors import InvalidArgumentError, LabelError

IGNORED_LABEL = -100  # of torch's and Hugging Face's cross-entropy


def label_key(batch: Batch) -> Any:
    """Where a batch keeps its labels: the last place of a tuple or list, a known key of a dict.

    Raises:
        InvalidArgumentError: where a dict has none of the known keys.
    """
    if not isinstance(batch, Mapping):
        return len(batch) - 1
    found = [key for key in LABEL_KEYS if key in batch]
    if not found:
        raise InvalidArgumentError(
            f"none of the keys {list(batch)} is known to hold the labels ({', '.join(LABEL_KEYS)})"
        )
    return found[0]


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        InvalidArgumentError: where there are none, or they are no tensor.
    """
    labels = batch[label_key(batch)]
    if not isinstance(labels, Tensor):
        raise InvalidArgumentError(f"the labels are a {type(labels).__name__}, not a tensor")
    return labels


def logits_of(outputs: Any) -> Tensor:
    """The model's output, or the ``logits`` in it.

    Raises:
        InvalidArgumentError: where the output is no tensor and holds no ``logits``.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        found = getattr(outputs, "logits", None) if found is None else found
    if not isinstance(found, Tensor):
        raise InvalidArgumentError(f"the model returns a {type(outputs).__name__} without `logits`")
    return found


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """A model's output with other logits in the place of its own."""
    known = logits_of(outputs)
    shown = map_tensors(outputs, lambda tensor: logits if tensor is known else tensor)
    if logits_of(shown) is not logits:  # an object with an attribute
        shown = copy.copy(outputs)
        shown.logits = logits
    return shown


def check_labels(labels: Tensor, classes: int, ignored: int | None = None) -> None:
    """Refuse labels that name no class: on a GPU an index by one stops the whole process.

    Args:
        labels: integers, ``[n]`` or ``[n, *]``.
        classes: how many there are.
        ignored: the one label that may be none; None where any negative one is.

    Raises:
        LabelError: with the example, its label and the classes.
    """
    labels = labels.long()
    try:
        least, most = torch.stack(torch.aminmax(labels)).tolist()
    except RuntimeError:  # of no labels, and under vmap, which shows no values
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
            f"{classes - 1}, and {also} counts nothing"
        )


def label_in(error: IndexError, targets: Any) -> str | None:
    """The label that torch's cross-entropy stumbled over, in words; None for another error."""
    found = re.match(r"Target (-?\d+) is out of bounds", str(error))
    if found is None:
        return None
    labels = targets
    if isinstance(targets, Mapping):
        labels = next((targets[key] for key in LABEL_KEYS if key in targets), None)
    if isinstance(labels, Tensor):
        try:
            return _first(labels == int(found[1]), labels)
        except (IndexError, RuntimeError):  # it is not there, or under vmap
            pass
    return f"an example has the label {found[1]}"


def _first(wrong: Tensor, labels: Tensor) -> str:
    """The first example with a wrong label, in words."""
    place, n = wrong.nonzero()[0].tolist(), len(labels)
    which = f"example {place[0]} of a batch of {n}" if n > 1 else "an example"
    return f"{which} has the label {int(labels[tuple(place)])}"
