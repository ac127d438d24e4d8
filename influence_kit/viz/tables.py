"""How scores and labels are written."""

from typing import Any

from torch import Tensor

# what proponents and opponents did, where nothing else is said
HEADS = ("proponents: lowered its loss", "opponents: raised its loss")


def score_text(score: float) -> str:
    """A score with its sign and three significant digits: ``+0.0312``, ``-1.20e+04``."""
    return f"{float(score):+#.3g}".rstrip(".")


def label_text(label: Any) -> str:
    """A label as ``str`` writes its value, in its own precision."""
    return str(label.numpy(force=True) if isinstance(label, Tensor) else label)
