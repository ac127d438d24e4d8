"""Texts that claim to be HTML, and control characters: they are shown, and never run."""

import pytest
import torch
from markupsafe import Markup

from influence_kit import KMostInfluentialResults
from influence_kit.viz import Report, influential_texts
from influence_kit.viz.captions import label_text, plain_text

SCRIPT = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"
RESULTS = KMostInfluentialResults(torch.tensor([[1, 0]]), torch.tensor([[0.5, -0.5]]))


class Safe(str):
    """A text that claims to be safe HTML."""

    def __html__(self):
        return str.__str__(self)

    def __str__(self):
        return self

    def __getitem__(self, index):
        return Safe(super().__getitem__(index))

    def strip(self, *args):
        return Safe(super().strip(*args))


class Label:
    """A label whose text is one."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


def page(text, label=None) -> str:
    label = text if label is None else label
    report = Report(
        text,
        [text, "b"],
        [label, label],
        true_labels=["x", label],
        method=text,
        reading=text,
        date=text,
        letters=1000,
    )
    report.explain(
        [text], RESULTS, RESULTS, [text], [label], [label], heading=text, heads=(text, text)
    )
    return report.ranking(torch.tensor([1.0, 2.0]), heading=text, text=text).html()


@pytest.mark.parametrize("kind", [Safe, Markup])
def test_a_text_that_claims_to_be_html_is_escaped(kind):
    written = page(kind(SCRIPT))
    assert "<script" not in written
    assert written == page(SCRIPT)
    assert written.count(ESCAPED) > 15


@pytest.mark.parametrize("kind", [Safe, Markup])
def test_a_label_whose_text_claims_to_be_html_is_escaped(kind):
    assert page("a", Label(kind(SCRIPT))) == page("a", SCRIPT)


@pytest.mark.parametrize("kind", [Safe, Markup])
def test_a_cut_text_and_names_of_features_are_escaped(kind):
    report = Report("a", torch.ones(2, 1), feature_names=[kind(SCRIPT)])
    written = report.explain(torch.ones(1, 1), RESULTS).html()
    cut = Report("a", [kind(SCRIPT), "b"], letters=10).explain([kind(SCRIPT)], RESULTS).html()
    assert "<script" not in written + cut
    assert ESCAPED in written
    assert "&lt;script&gt;al" in cut


def test_the_documentation_of_a_method_is_escaped():
    class Method:
        __doc__ = Safe(SCRIPT)

    report = Report("a", ["a", "b"], method=Method()).explain(["a"], RESULTS)
    assert "<script" not in report.html()


@pytest.mark.parametrize("number", [*range(0x20), *range(0x7F, 0xA0)])
def test_control_characters_are_shown_as_replaced(number):
    character = chr(number)
    written = page(f"a{character}b")
    kept = character in "\t\n\r"
    assert ("a\ufffdb" in written) != kept
    assert kept or character not in written


def test_a_plain_text_is_a_str_itself():
    assert type(plain_text(Safe("a"))) is str
    assert type(label_text(Label(Safe("a")))) is str
    assert plain_text("a\x00b\x1bc\td\u00e9") == "a\ufffdb\ufffdc\td\u00e9"


@pytest.mark.filterwarnings("error")
def test_figures_of_texts_draw_control_characters_as_replaced():
    figure = influential_texts(["a\x00b"], RESULTS, RESULTS, ["c\x1b", "d"], ["l\x07", "m"])
    figure.canvas.draw()
    drawn = "".join(text.get_text() for text in figure.axes[0].texts)
    assert "a\ufffdb" in drawn
    assert "c\ufffd" in drawn
    assert "l\ufffd" in drawn
