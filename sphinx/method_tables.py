"""Makes the tables of methods on the pages from influence_kit/methods/catalog.py.

Run ``python sphinx/method_tables.py`` after a change of the catalog. A table stands between two
marks, the first of which has its name; ``tests/test_pages.py`` compares the pages with the catalog.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from influence_kit.methods.catalog import METHODS, Method  # noqa: E402

MARKED = re.compile(
    r"(?P<first>(?:<!--|\.\.) methods table: (?P<name>\w+)(?: -->)?\n)"
    r".*?(?P<last>(?:<!--|\.\.) end of methods table)",
    re.DOTALL,
)
PAGES = [
    ROOT / "README.rst",
    *(ROOT / "sphinx" / name for name in ("index.md", "concepts.md", "choosing.md", "api.md")),
]


def with_tables(text: str) -> str:
    """A page with its tables made again.

    Raises:
        KeyError: for a mark with a name that no table has.
    """
    return MARKED.sub(
        lambda found: f"{found['first']}\n{TABLES[found['name']]()}\n\n{found['last']}", text
    )


def rows_of(columns: Sequence[str], name_of: str) -> list[list[str]]:
    """A row per method; consecutive methods that differ in their names alone share one."""
    rows: list[list[str]] = []
    for method in METHODS:
        cells = [getattr(method, column) for column in columns]
        name = NAMES[name_of](method)
        if rows and rows[-1][1:] == cells:
            rows[-1][0] += f", {name}"
        else:
            rows.append([name, *cells])
    return rows


def _link(method: Method) -> str:
    package = "influence_kit.valuation" if method.family == "valuation" else "influence_kit"
    return f"{{py:class}}`~{package}.{method.name}`"


NAMES = {"code": lambda method: f"`{method.name}`", "link": _link}


def _paper(number: str) -> str:
    return number and f"[{number}](https://arxiv.org/abs/{number})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def restructured(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A list-table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [head, *rows]:
        for mark, cell in zip(["*", *" " * (len(row) - 1)], row, strict=True):
            lines.append(f"   {mark} - {cell.replace('`', '``')}".rstrip())
    return "\n".join(lines)


TABLES = {
    "readme": lambda: restructured(
        ["class", "needs", "cost, once", "cost per call", "arXiv"],
        rows_of(["needs", "fit_cost", "call_cost", "reference"], "code"),
    ),
    "index": lambda: markdown(["class", "score", "needs"], rows_of(["summary", "needs"], "link")),
    "concepts": lambda: markdown(
        ["method", "formula", "unit"], rows_of(["formula", "unit"], "code")
    ),
    "choosing": lambda: markdown(
        ["method", "once", "per call", "held in memory"],
        rows_of(["fit_cost", "call_cost", "memory"], "code"),
    ),
    "reference": lambda: markdown(
        ["class", "score", "paper"],
        [
            [name, summary, _paper(number)]
            for name, summary, number in rows_of(["summary", "reference"], "link")
        ],
    ),
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
