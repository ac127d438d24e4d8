"""Where the labels of a batch and the logits of a model's output are, for what looks at them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from influence_kit.data import Batch
from influence_kit.errors import InvalidArgumentError

# of a dict batch, in this order
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


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
