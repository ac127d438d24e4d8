"""Texts with heat: what the page holds, read by a parser."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from markupsafe import Markup

from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import token_heat

TOKENS = [["The", " capital", "\n", " of"], ["a"]]
SCORES = torch.tensor([[0.5, -1.0, 0.0, 0.25], [0.125, 0.0, 0.0, 0.0]])


class Spans(HTMLParser):
    """The spans of a page with their attributes and texts, and the paragraphs with names."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.tags: set[str] = set()
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._open = tag if tag == "span" or (tag, ("class", "name")) == (tag, *attrs[:1]) else None
        if tag == "span":
            self.spans.append({**dict(attrs), "text": ""})

    def handle_data(self, data: str) -> None:
        if self._open == "span":
            self.spans[-1]["text"] += data
        elif self._open == "p":
            self.names.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def read(html: str) -> Spans:
    parser = Spans()
    parser.feed(html)
    return parser


def test_tokens_signs_and_heat() -> None:
    found = read(token_heat(TOKENS, SCORES, names=["#3", "#7"]).html)
    assert [span["text"] for span in found.spans] == [token for text in TOKENS for token in text]
    signs = ["positive", "negative", "zero", "positive", "positive"]
    assert [span["class"] for span in found.spans] == [f"token {sign}" for sign in signs]
    heats = [int(re.findall(r"--heat: (\d+)%", span["style"])[0]) for span in found.spans]
    assert heats == [50, 100, 0, 25, 12]
    titles = ["+0.500", "-1.00", "+0.00", "+0.250", "+0.125"]
    assert [span["title"] for span in found.spans] == titles
    assert found.names[1:] == ["#3 | -0.250", "#7 | +0.125"]
    assert "The strongest colour is 1.00" in found.names[0]


def test_default_names_and_lists_of_numbers() -> None:
    found = read(token_heat([["a"], ["b"]], [[1.0], [2]]).html)
    assert found.names[1:] == ["#0 | +1.00", "#1 | +2.00"]


def test_scores_that_are_all_zero() -> None:
    found = read(token_heat([["a", "b"]], torch.zeros(1, 2)).html)
    assert [span["class"] for span in found.spans] == ["token zero"] * 2


@pytest.mark.parametrize("kind", [str, Markup])
def test_texts_are_escaped(kind: Any) -> None:
    script = kind('<script>alert("1")</script>')
    page = token_heat([[script, "\x1b"]], torch.ones(1, 2), names=[script]).html
    assert "<script" not in page
    found = read(page)
    assert found.tags == {"style", "div", "p", "span"}
    assert [span["text"] for span in found.spans] == [str(script), "\N{REPLACEMENT CHARACTER}"]
    assert found.names[1] == f"{script} | +2.00"


def test_a_file(tmp_path: Any) -> None:
    page = token_heat(TOKENS, SCORES)
    path = page.write(tmp_path / "tokens.html")
    text = path.read_text(encoding="utf-8")
    assert page.html in text
    assert text.startswith("<!DOCTYPE html>")
    assert page._repr_html_() == page.html
    with pytest.raises(InvalidArgumentError, match="is a folder"):
        page.write(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "scores", "names", "message"),
    [
        ([], torch.zeros(1, 1), None, "got 0 texts, scores of 1 and 0 names"),
        (TOKENS, SCORES[:1], None, "got 2 texts, scores of 1 and 2 names"),
        (TOKENS, SCORES, ["a"], "got 2 texts, scores of 2 and 1 names"),
        (TOKENS, SCORES[:, :3], None, "has 4 tokens, and 3 scores"),
        (TOKENS, SCORES + 1, None, "has 1 tokens, and 4 scores of which 3 beyond"),
        (["text", "b"], SCORES, None, "`tokens` must be"),
        ([[1], ["b"]], SCORES, None, "tokens"),
        (TOKENS, SCORES[0], None, r"`scores` has shape \[4\]; expected \[k, t\]"),
        (TOKENS, SCORES / 0, None, "in `scores` are not finite"),
        (3, SCORES, None, "`tokens` must be"),
    ],
)
def test_refusals(tokens: Any, scores: Any, names: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        token_heat(tokens, scores, names)
