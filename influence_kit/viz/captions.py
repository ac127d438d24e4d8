"""How scores and labels are written."""

from typing import Any

from torch import Tensor

Heads = tuple[str, str]

# what proponents and opponents did, where nothing else is said
HEADS = ("proponents: lowered its loss", "opponents: raised its loss")
HEADS_OF_OUTPUT = ("proponents: raised its output", "opponents: lowered its output")


def explains_output(method: object) -> bool:
    """Whether scores of a method say what raised an output, and not what lowered a loss."""
    return getattr(method, "explains_output", False) is True


def heads_of(heads: Heads | None, method: object) -> Heads:
    """What to write above proponents and opponents: as given, else by what the method scores."""
    if heads is not None:
        return heads
    return HEADS_OF_OUTPUT if explains_output(method) else HEADS


def score_text(score: float) -> str:
    """A score with its sign and three significant digits: ``+0.0312``, ``-1.20e+04``."""
    return f"{float(score):+#.3g}".rstrip(".")


def label_text(label: Any) -> str:
    """A label as ``str`` writes its value, in its own precision."""
    return str(label.numpy(force=True) if isinstance(label, Tensor) else label)
