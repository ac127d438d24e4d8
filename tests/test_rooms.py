"""Rooms import downwards only, and no optional package is imported unasked."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import influence_kit

PACKAGE = "influence_kit"
ROOT = Path(influence_kit.__file__).parent
FLOORS = [
    {"errors"},
    {"core"},
    {"data"},
    {"losses", "preservation", "storage"},
    {"checkpoints", "learning_rates", "training"},
    {"gradients", "evaluation"},
    {"operators"},
    {"curvature", "projections"},
    {"scoring"},
    {"methods", "valuation"},
    {"viz"},
    {"demo"},
    {""},  # the package itself, which exports the public names
    {"__main__"},  # Python imports the package before it
]


def module_name(path: Path) -> str:
    """A file's name as a module, without the package's: ``methods.tracin``, ``""``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The package's modules that a module imports, anywhere in its text."""
    inside = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = f"{PACKAGE}.{inside}".rstrip(".").split(".")
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # what is imported from a package may be a module of it
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == PACKAGE:
                yield rest if rest in SOURCES else rest.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    trees = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
    return {module: set(imports(module, tree)) - {module} for module, tree in trees.items()}


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """The nodes of a directed graph that lie on a circle or lead to one."""
    left = {node: set(after) for node, after in edges.items()}
    while ends := [node for node, after in left.items() if not after & left.keys()]:
        for node in ends:
            del left[node]
    return sorted(left)


def by_room(edges: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room_of(module): set() for module in edges}
    for module, after in edges.items():
        rooms[room_of(module)] |= {room_of(other) for other in after} - {room_of(module)}
    return rooms


def test_the_root_holds_rooms_and_four_files():
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "errors.py", "py.typed"}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in SOURCES} - set().union(*FLOORS) == set()


def test_no_room_imports_a_higher_one():
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if floor_of(room_of(other)) > floor_of(room_of(module))
    ]
    assert upward == []


def test_no_rooms_import_each_other_in_a_circle():
    assert circle(by_room(graph())) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(graph()) == []


def test_imports_are_found_wherever_and_however_they_are_written(monkeypatch):
    here = "methods.base"
    text = """
import influence_kit.data
import torch.nn
from influence_kit import operators, __version__

from influence_kit.errors import InvalidArgumentError
from ..scoring.term import Term
from . import structure
def late():
    from influence_kit.viz import table
"""
    monkeypatch.setitem(SOURCES, "viz", ROOT / "viz" / "__init__.py")
    found = set(imports(here, ast.parse(text)))
    assert found == {"data", "operators", "", "errors", "scoring.term", "methods.structure", "viz"}


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, ["a", "b", "c"]),
        ({"a": {"b"}, "b": {"a"}, "c": set()}, ["a", "b"]),
    ],
    ids=["chain", "three", "two"],
)
def test_a_circle_is_found(edges, found):
    assert circle(edges) == found


def test_importing_the_package_imports_no_optional_package():
    optional = ["transformers", "sklearn", "faiss", "joblib", "pandas", "scipy"]
    code = f"import sys, {PACKAGE}.evaluation; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
