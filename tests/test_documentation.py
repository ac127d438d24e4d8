"""The code of the documentation runs, and prints what the pages say; so of README, CONTRIBUTING.

A page's ``python`` blocks run in order in one namespace, in an empty folder. A ``text`` block that
follows one directly is what it prints; numbers may differ in the last digits.
"""

import contextlib
import io
import re
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SPHINX = ROOT / "sphinx"
# the pages that must have code; one that has none any more has lost it by mistake
WITH_CODE = [
    "index",
    "start",
    "concepts",
    "checks",
    "choosing",
    "influence_functions",
    "projections",
    "tokens",
    "evaluation",
    "valuation",
    "from_captum",
    "from_others",
    "extending",
]

FENCED = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
# an indented block; the lines that are empty belong to it
INDENTED = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", re.MULTILINE)
# with the spaces before it, which fill a column up
NUMBER = re.compile(r" *[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A piece of code, its line in the page, and what it prints, where the page says so."""

    line: int
    code: str
    printed: str | None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a Markdown or a reStructuredText page."""
    text = page.read_text()
    blocks = []
    for match in (FENCED if page.suffix == ".md" else INDENTED).finditer(text):
        code, printed = (*match.groups(), None)[:2]
        if page.suffix == ".rst":
            code = "\n".join(line[4:] for line in code.splitlines())
        blocks.append(Block(text[: match.start(1)].count("\n"), code, printed))
    return blocks


def assert_prints(found: str, expected: str) -> None:
    """The same words and whole numbers; other numbers differ by no more than rounding does."""
    assert NUMBER.sub(" 0", found.strip()) == NUMBER.sub(" 0", expected.strip()), found
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        whole = "." not in one and "." not in other
        assert float(one) == pytest.approx(float(other), rel=0 if whole else 0.02), found


PAGES = [*sorted(SPHINX.glob("*.md")), ROOT / "README.rst", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")  # Captum's
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # a module, so that classes defined on the page have one
    module = types.ModuleType(f"page_{page.stem}")
    for block in blocks_of(page):
        # as many empty lines before the code as the page has, so that an error names its line
        source = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, module.__dict__)
        if block.printed is not None:
            assert_prints(printed.getvalue(), block.printed)


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_page_has_code(name: str) -> None:
    assert blocks_of(SPHINX / f"{name}.md")


def test_the_readme_has_code() -> None:
    assert blocks_of(ROOT / "README.rst")


def test_every_page_is_in_the_map() -> None:
    map_of_pages = "".join((SPHINX / name).read_text() for name in ("index.md", "api.md"))
    pages = {page.stem for page in SPHINX.glob("*.md")} - {"index"}
    assert {page for page in pages if f"\n{page}\n" not in map_of_pages} == set()


def test_every_public_name_is_in_the_reference() -> None:
    import influence_kit
    from influence_kit import evaluation, operators, valuation, viz

    reference = "".join(page.read_text() for page in SPHINX.glob("api*.md"))
    for package in (influence_kit, evaluation, operators, valuation, viz):
        missing = [name for name in package.__all__ if not re.search(rf"\.{name}\b", reference)]
        assert missing == []
