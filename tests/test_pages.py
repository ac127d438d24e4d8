"""Pages and notebooks: their tables of methods are the catalog's, and what they install exists."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import influence_kit
from influence_kit import valuation
from influence_kit.methods.catalog import METHODS

ROOT = Path(__file__).parents[1]
MARKDOWN = [*sorted((ROOT / "sphinx").glob("*.md")), *sorted(ROOT.glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [*MARKDOWN, ROOT / "README.rst", *NOTEBOOKS]
AGAIN = "run `python sphinx/method_tables.py`"


def extras() -> set[str]:
    """The names of the extras, from setup.py or pyproject.toml, whichever has the metadata."""
    metadata = "".join((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
    start = r"^(?:EXTRAS = \{|\[project\.optional-dependencies\])\n"
    (table,) = re.findall(start + r"(.*?)^(?:\}|\[|\Z)", metadata + "\n[", re.M | re.S)
    return set(re.findall(r'^ *"?(\w+)"?(?::| =) \[', table, re.M))


def text_of(page: Path) -> str:
    """What a reader sees of a page; of a notebook, all sources of its cells."""
    text = page.read_text()
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def uninstallable(text: str) -> list[str]:
    """Commands that install influence_kit from an index, which does not have it."""
    return re.findall(r"pip3? install[^\n]*?[\s'\"`]influence[_-]kit\b[^\n]*", text)


def named_extras(text: str) -> Iterator[str]:
    """The extras that a page names: ``.[demo,test]``, "the extra `demo`", "extras `a`, `b`"."""
    for names in re.findall(r"(?:\.|influence[_-]kit)\[([\w, -]+)\]", text):
        yield from re.split(r", *", names)
    for names in re.findall(r"\bextras?\s+(``?\w+``?(?:,? (?:and )?``?\w+``?)*)", text):
        yield from re.findall(r"\w+", names.replace(" and ", " "))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_installs_from_the_clone(page: Path) -> None:
    assert uninstallable(text_of(page)) == [], 'from the clone: pip install ".[extra]"'


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_extras_that_exist(page: Path) -> None:
    assert set(named_extras(text_of(page))) <= extras()


def test_the_start_page_lists_all_extras() -> None:
    table = (ROOT / "sphinx" / "start.md").read_text().partition("| extra | for |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == extras()


def test_notebooks_name_an_extra() -> None:
    assert all(list(named_extras(text_of(page))) == ["tutorials"] for page in NOTEBOOKS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('pip install "influence_kit[demo]"', 1),
        ("pip install influence-kit", 1),
        ("pip install -U 'influence_kit[ann]'", 1),
        ('pip install ".[demo]"', 0),
        ("pip install . installs influence_kitchen", 0),
    ],
)
def test_an_install_from_an_index_is_found(text: str, found: int) -> None:
    assert len(uninstallable(text)) == found


def test_names_of_extras_are_found() -> None:
    text = 'pip install ".[a,b]", the extra `c` and the extras `d`, `e` and `f`; the extra\n``g``'
    assert list(named_extras(text)) == list("abcdefg")


def tables() -> object:
    """The module that makes the tables; its folder is no package."""
    spec = importlib.util.spec_from_file_location(
        "method_tables", ROOT / "sphinx" / "method_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = tables()


@pytest.mark.parametrize("page", TABLES.PAGES, ids=lambda page: page.name)
def test_the_tables_of_methods_are_those_of_the_catalog(page: Path) -> None:
    text = page.read_text()
    assert len(TABLES.MARKED.findall(text)) == 1
    assert text == TABLES.with_tables(text), AGAIN


def test_every_table_is_on_a_page() -> None:
    names = [TABLES.MARKED.search(page.read_text())["name"] for page in TABLES.PAGES]
    assert sorted(names) == sorted(TABLES.TABLES)


def test_the_catalog_has_every_public_method() -> None:
    public = {
        name
        for package in (influence_kit, valuation)
        for name in package.__all__
        if hasattr(getattr(package, name), "influence")
    }
    bases = {"InfluenceFunction", "InnerProductInfluence", "TracInCPBase"}
    assert {method.name for method in METHODS} == public - bases
    assert len(METHODS) == len(public - bases)


def test_a_family_has_a_page_that_documents_its_methods() -> None:
    for method in METHODS:
        page = ROOT / "sphinx" / f"api_{method.family}.md"
        assert re.search(rf"autoclass:: \S+\.{method.name}\n", page.read_text()), method.name


def test_papers_of_the_catalog_are_those_of_the_docstrings() -> None:
    for method in METHODS:
        package = valuation if method.family == "valuation" else influence_kit
        module = importlib.import_module(getattr(package, method.name).__module__)
        documented = f"{module.__doc__}\n{getattr(package, method.name).__doc__}"
        assert method.reference in documented, method.name
