"""Scores, labels and column heads as text."""

import re
from typing import Any

from torch import Tensor

# all but tab, line feed and carriage return; pages and fonts have nothing for them
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
Heads = tuple[str, str]

# the defaults: what proponents and opponents did
HEADS = ("proponents: lowered its loss", "opponents: raised its loss")
HEADS_OF_OUTPUT = ("proponents: raised its output", "opponents: lowered its output")


def explains_output(method: object) -> bool:
    """Whether the scores of a method explain an output rather than a loss."""
    return getattr(method, "explains_output", False) is True


def heads_of(heads: Heads | None, method: object) -> Heads:
    """The heads of proponents and opponents: as given, else by what the method explains."""
    if heads is not None:
        return heads
    return HEADS_OF_OUTPUT if explains_output(method) else HEADS


def score_text(score: float) -> str:
    """A score with its sign and three significant digits: ``+0.0312``, ``-1.20e+04``."""
    return f"{float(score):+#.3g}".rstrip(".")


def label_text(label: Any) -> str:
    """A label as ``str`` shows its value, in its own precision."""
    return plain_text(label.numpy(force=True) if isinstance(label, Tensor) else label)


def plain_text(value: Any) -> str:
    """A text of the type ``str`` itself, with control characters shown as U+FFFD.

    A subclass may claim, by ``__html__``, to be HTML that is safe.
    """
    # `str` of a subclass of it may return that subclass
    text = str.__str__(value if isinstance(value, str) else str(value))
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
