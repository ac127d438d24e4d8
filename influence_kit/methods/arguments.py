"""Arguments that several classes share: their documentation, written once, and checks."""

from __future__ import annotations

import inspect
import re
from typing import Any, TypeVar

from influence_kit.core.arguments import check_function
from influence_kit.core.objects import check_functions

Class = TypeVar("Class", bound=type)
REFERENCES = re.compile(r"\n    The other arguments are those of ``InnerProductInfluence``\.\n")
# by argument, from the class that describes them
_described: dict[str, str] = {}


def describes_arguments(cls: Class) -> Class:
    """The class whose docstring describes the arguments that others share."""
    _described.update(_arguments_of(inspect.cleandoc(cls.__doc__ or "")))
    return cls


def documented(cls: Class) -> Class:
    """Add to a class's docstring the arguments of its constructor that it does not describe.

    The descriptions come from the class decorated with ``describes_arguments``, in the order of the
    signature; they replace the sentence that refers to it.
    """
    doc = inspect.cleandoc(REFERENCES.sub("\n", cls.__doc__ or ""))
    own = _arguments_of(doc)
    named = {name for names in own for name in re.split(r",\s*", names)}
    missing = [name for name in inspect.signature(cls).parameters if name not in named]
    texts = [*own.values(), *(_described[name] for name in missing if name in _described)]
    section = "Args:\n" + "\n".join(texts) + "\n"
    if own:
        start = doc.index("Args:\n")
        doc = doc[:start] + section + doc[start:].partition(list(own.values())[-1] + "\n")[2]
    else:
        before, mark, after = doc.partition("\nRaises:" if "\nRaises:" in doc else "\nExample:")
        doc = f"{before}\n{section}{mark}{after}"
    cls.__doc__ = doc
    return cls


def _arguments_of(doc: str) -> dict[str, str]:
    """The entries of the section "Args", by the names before their colons."""
    _, _, section = doc.partition("Args:\n")
    entries: dict[str, str] = {}
    name = ""
    for line in section.split("\n"):
        if not line.startswith("    "):
            break
        if not line.startswith("     "):  # a new entry; its further lines are indented more
            name, colon, _ = line.strip().partition(":")
            if not colon:
                break
        entries[name] = entries.get(name, "") + ("\n" if name in entries else "") + line
    return entries


def check_passed_functions(load: Any, loss: Any, test_loss: Any, test_output: Any) -> None:
    """Refuse arguments that must be functions and are not."""
    if load is None:
        check_function(load, "checkpoints_load_func", "checkpoints_load_func(model, checkpoint)")
    check_functions({"checkpoints_load_func": load}, "checkpoints_load_func(model, checkpoint)")
    losses = {"loss_fn": loss, "test_loss_fn": test_loss, "test_output_fn": test_output}
    check_functions(losses, "fn(outputs, targets)")
