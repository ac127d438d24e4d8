"""Attributes that cannot be assigned after construction: cached results depend on them.

A name can be assigned if the class has a property with a setter. Subclasses outside this package
can assign their own attributes: those that their ``__init__`` sets or their body defines.
"""

import inspect
from abc import ABCMeta
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from influence_kit.errors import FixedAttributeError

PACKAGE = __name__.partition(".")[0]
# set by constructors from arguments of other names
DERIVED = {"reduction_type", "test_reduction_type", "influence_src_dataloader"}


class Made(ABCMeta):
    """Marks an object as made once the whole ``__init__`` has run, including a subclass's."""

    def __init__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "__init__" in vars(cls):
            # without it, ``inspect`` shows the signature of ``__call__``
            cls.__signature__ = inspect.Signature(_parameters(cls))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object."""
        made = super().__call__(*args, **kwargs)
        vars(made)["_is_made"] = True
        return made


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The parameters of a class's constructor, with those of its base if it passes them on."""
    own = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own):
        return own
    named = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    common = inspect.signature(cls.__mro__[1]).parameters.values()
    known = {parameter.name for parameter in named}
    changed = {parameter.name: parameter for parameter in own}
    kept = [changed.get(p.name, p) for p in common if p.name not in known]
    return sorted((*kept, *named), key=lambda parameter: parameter.kind)


Class = TypeVar("Class", bound=Made)


def read_only(cls: Class) -> Class:
    """Make the public attributes of a class's objects read-only, except properties with a setter.

    Assigning a read-only attribute raises a FixedAttributeError (a ``ValueError`` and an
    ``AttributeError``).
    """

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if not name.startswith("_") and "_is_made" in vars(self) and not _may_assign(self, name):
            _refuse(self, name)
        object.__setattr__(self, name, value)

    def delete_attribute(self: Any, name: str) -> None:
        if name in vars(self) and not name.startswith("_") and not _may_assign(self, name):
            _refuse(self, name)
        object.__delattr__(self, name)

    cls.__setattr__ = set_attribute  # type: ignore[assignment]
    cls.__delattr__ = delete_attribute  # type: ignore[assignment]
    return cls


def _may_assign(owner: Any, name: str) -> bool:
    for cls in type(owner).__mro__:
        if name in vars(cls):
            found = vars(cls)[name]
            if isinstance(found, property):
                return found.fset is not None
            return callable(found) or not _is_ours(cls)
    return name in vars(owner) and name not in _names_of_ours(owner)


def _refuse(owner: Any, name: str) -> NoReturn:
    own = type(owner).__name__
    can = sorted(
        {
            key
            for cls in type(owner).__mro__
            for key, value in vars(cls).items()
            if isinstance(value, property) and value.fset is not None and not key.startswith("_")
        }
    )
    may = f"what can be assigned: {', '.join(can) or 'nothing'}"
    arguments = inspect.signature(type(owner)).parameters
    if name in arguments:
        raise FixedAttributeError(
            f"`{name}` cannot be assigned, since an object keeps what it has computed with it; "
            f"make a new {own}(..., {name}=...) ({may})"
        )
    if hasattr(type(owner), name) or name in vars(owner):
        raise FixedAttributeError(f"`{name}` cannot be assigned; make a new {own}(...) ({may})")
    meant = [f"; did you mean `{near}`?" for near in get_close_matches(name, [*can, *arguments], 1)]
    raise FixedAttributeError(
        f"{own} has no attribute `{name}` to assign{''.join(meant)} ({may}; a subclass may "
        "assign what its own `__init__` has set, and names that begin with _)"
    )


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE


def _names_of_ours(owner: Any) -> set[str]:
    """The public attributes that constructors of this package have set."""
    if _is_ours(type(owner)):
        return set(vars(owner))
    ours = [cls for cls in type(owner).__mro__ if _is_ours(cls)]
    return DERIVED.union(*(inspect.signature(cls).parameters for cls in ours))
