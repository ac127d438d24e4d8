"""Every public name is tried with bad values, or stands here with the reason why not."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import influence_kit
from fuzz.method_targets import REFUSED
from fuzz.tables import TABLES

ROOMS = (
    *("curvature", "evaluation", "gradients", "operators", "projections", "scoring", "valuation"),
    "viz",
)
MODULES = ["influence_kit", *(f"influence_kit.{room}" for room in ROOMS)]
RESULT = "what a function returns; nobody makes one to pass it on"
EXTENSION = "made by the library for the code of extensions, or the base of their own classes"
NOT_TRIED = {
    "CurvatureError": "an error",
    **dict.fromkeys(("KMostInfluentialResults", "MostInfluentialFeatures"), RESULT),
    "KMostInfluentialTokens": RESULT,
    **dict.fromkeys(("Brittleness", "Comparison", "Cost", "LeaveOneOutCorrelation"), RESULT),
    **dict.fromkeys(("MislabelReport", "MislabelRow", "RemovalCurve", "RidgeLeaveOneOut"), RESULT),
    **dict.fromkeys(("RowCorrelation", "Tuned", "Values"), RESULT),
    **dict.fromkeys(("Detection", "FactTracing", "Outliers", "RemovalQuality"), RESULT),
    "RowMean": RESULT,
    "SubsetTruth": "tried as the `truth` of `compare`, 'compare, of one'",
    **dict.fromkeys(("NearestNeighbors", "TracInCPBase", "FitData", "InverseCurvature"), EXTENSION),
    **dict.fromkeys(("State", "FeatureMap", "Gradients", "Convolved", "Rows"), EXTENSION),
    "MeanOfInverses": "has the arguments of `Explicit`, of which `DataInf` passes them on",
    "FaissNearestNeighbors": "needs a package that is not installed with the tests",
}
# methods that the library calls, on objects that extensions may make
CALLED_BY_THE_LIBRARY = {
    *("batches", "forget", "make_reducer", "notes", "prepare", "progress", "read_otherwise"),
    *("session", "stream_scores", "terms", "test_at", "train_at", "watch"),
    *("auto_damping", "blocks_of", "check_features", "inverse", "operator", "sample_size", "share"),
    *("traces", "bind", "bound_to", "by_parameter", "cached", "features", "identifying_losses"),
    *("learn", "map_of", "of_cached", "repeated", "sparse", "take_state", "transpose", "describe"),
    *("is_kept", "recipe", "optimizer_state", "random_states"),
    *("self_products", "solved", "transformed", "weight_at", "setup", "get_nearest_neighbors"),
}
WHOLLY_EXTENSION = ("curvature", "gradients", "projections")


def tried() -> set[str]:
    """What targets are called, without what they say of it."""
    return {
        target.name.split(",")[0].split(" ")[0] for table in TABLES.values() for target in table
    }


def public() -> Iterator[tuple[str, Any]]:
    for name in MODULES:
        module = importlib.import_module(name)
        yield from ((each, getattr(module, each)) for each in module.__all__)


def methods_of(cls: type) -> Iterator[str]:
    """The public methods with arguments that are defined in this package."""
    for name in dir(cls):
        found = getattr(cls, name)
        own = str(getattr(found, "__module__", "")).startswith("influence_kit")
        asked = not name.startswith("_") and own and inspect.isfunction(found)
        if asked and len(inspect.signature(found).parameters) > 1:
            yield name


def test_every_room_with_public_names_is_looked_at() -> None:
    folder = influence_kit.__path__[0]
    with_names = {
        path.parent.name
        for path in importlib.import_module("pathlib").Path(folder).glob("*/__init__.py")
        if "__all__" in path.read_text()
    }
    assert with_names == {*ROOMS, "demo"}


def test_every_public_name_is_tried() -> None:
    names = {name for name, _ in public()}
    assert sorted(names - tried() - NOT_TRIED.keys()) == []
    assert sorted(NOT_TRIED.keys() - names) == []


@pytest.mark.parametrize("cls", [cls for _, cls in public() if inspect.isclass(cls)])
def test_every_public_method_is_tried(cls: type) -> None:
    if cls.__name__ in NOT_TRIED or cls.__module__.split(".")[1] in WHOLLY_EXTENSION:
        return
    names = {f"{cls.__name__}.{name}" for name in methods_of(cls)}
    called = {f"{cls.__name__}.{name}" for name in CALLED_BY_THE_LIBRARY}
    bases = {f"{cls.__name__}.{name}" for name in methods_of(influence_kit.InnerProductInfluence)}
    given = bases if cls is influence_kit.InnerProductInfluence else set()
    assert sorted(names - tried() - REFUSED - called - given) == []
