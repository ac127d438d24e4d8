"""The house of parts: short chains of classes, explicit constructors, few private hooks."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import influence_kit
from influence_kit import curvature, evaluation, projections, valuation, viz

MOST_CLASSES, MOST_HOOKS = 5, 15
MODULES = (influence_kit, curvature, evaluation, projections, valuation, viz)
CLASSES = {
    name: found
    for module in MODULES
    for name in module.__all__
    if isinstance(found := getattr(module, name), type)
}
# Captum's signature has keywords there
CAPTUMS = {"SimilarityInfluence"}


def chain(cls: type) -> list[type]:
    """The classes of this package that a class is made of."""
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] == "influence_kit"]


def hooks() -> Iterator[tuple[str, str]]:
    """Private methods that a class overrides, with the class."""
    for cls in {one for public in CLASSES.values() for one in chain(public)}:
        above = {name for base in chain(cls)[1:] for name in vars(base)}
        for name in vars(cls):
            if name.startswith("_") and not name.startswith(("__", "_abc_")) and name in above:
                yield name, cls.__name__


@pytest.mark.parametrize("name", CLASSES)
def test_no_class_stands_on_many(name: str) -> None:
    found = [cls.__name__ for cls in chain(CLASSES[name])]
    assert len(found) <= MOST_CLASSES, found


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - CAPTUMS))
def test_every_argument_of_a_constructor_is_named(name: str) -> None:
    cls = CLASSES[name]
    if issubclass(cls, tuple | BaseException):
        return
    function: Any = cls.__init__
    parameters = () if function is object.__init__ else inspect.signature(function).parameters
    kinds = {parameters[own].kind for own in parameters}
    open_ended = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert not kinds & open_ended, f"{name}{inspect.signature(function)}"


def test_few_private_functions_are_overridden() -> None:
    found = sorted(set(hooks()))
    assert len({name for name, _ in found}) <= MOST_HOOKS, found
