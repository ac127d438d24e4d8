"""The page of results, read back: what stands where, and what is refused."""

import io
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from pages import Page

from influence_kit import TRAK, KMostInfluentialResults, TracInCP
from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import Report
from influence_kit.viz.report import READING, READING_OF_OUTPUT, SUSPICION

TEXTS = ["short", "two\n  lines", "it costs $5", "w" * 30, " ", "the last"]
LABELS = torch.tensor([7, 8, 9, 7, 8, 9])
QUERIES = ["first query", "second query"]
PROPONENTS = KMostInfluentialResults(
    torch.tensor([[0, 3], [5, 1]]), torch.tensor([[2.0, 0.0], [1, 0.5]])
)
OPPONENTS = KMostInfluentialResults(torch.tensor([[2], [4]]), torch.tensor([[-4.0], [-0.25]]))
ROW = torch.tensor([[0]])  # a result for one test example


def explained(report=None, **changes):
    arguments = {"queries": QUERIES, "proponents": PROPONENTS, "opponents": OPPONENTS}
    return (report or Report("Title", TEXTS, LABELS)).explain(**{**arguments, **changes})


def a_figure():
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [0, 1])
    return figure


def test_tables_hold_place_label_score_and_example():
    page = Page(explained(labels=[1, 2], predictions=torch.tensor([1, 3])).html())
    head = ["index", "label", "score"]
    assert page.tables == [
        [head, ["#0", "7", "+2.00"], ["short"], ["#3", "7", "+0.00"], ["w" * 30]],
        [head, ["#2", "9", "-4.00"], ["it costs $5"]],
        [head, ["#5", "9", "+1.00"], ["the last"], ["#1", "8", "+0.500"], ["two lines"]],
        [head, ["#4", "8", "-0.250"], ["(empty)"]],
    ]
    heads = ["proponents: lowered its loss", "opponents: raised its loss"]
    assert page.texts("caption") == 2 * heads
    assert page.texts("h3") == ["Test example #0", "Test example #1"]
    queries = [text.split() for text in page.texts("div", **{"class": "query"})]
    assert queries == [
        ["first", "query", "Label1", "Prediction1"],
        ["second", "query", "Label2", "Prediction3"],
    ]
    assert page.texts("p", **{"class": "text"})[1] == "short"
    assert "two\n  lines" in page.texts("p", **{"class": "text"})


def test_bars_and_signs_are_those_of_the_scores_of_a_test_example():
    page = Page(explained().html())
    bars = [bar["style"] for bar in page.attributes("span")]
    assert bars == [
        f"width: {share}%" for share in ("50.0", "0.0", "100.0", "100.0", "50.0", "25.0")
    ]
    signs = [cell["class"] for cell in page.attributes("td") if "score" in cell.get("class", "")]
    kinds = ["positive", "zero", "negative", "positive", "positive", "negative"]
    assert signs == [f"score {kind}" for kind in kinds]
    nothing = KMostInfluentialResults(ROW, torch.zeros(1, 1))
    page = Page(Report("Title", TEXTS).explain(["query"], nothing).html())
    assert [bar["style"] for bar in page.attributes("span")] == ["width: 0.0%"]


def test_the_header_says_what_was_asked_and_how_to_read_it():
    model = torch.nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(6, 2), LABELS % 2)
    tracin = TracInCP(model, data, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss())
    for method in (tracin, TracInCP):
        page = Page(explained(Report("Six texts", TEXTS, method=method, date="1 May")).html())
        assert page.texts("title") == page.texts("h1") == ["Six texts"]
        facts = page.texts("dl", **{"class": "facts"})[0].split("\n")
        assert [fact for fact in facts if fact] == [
            "MethodTracInCP",
            "Formula" + TracInCP.__doc__.splitlines()[0],
            "Training examples6",
            "Date1 May",
        ]
        assert page.texts("p")[0] == READING
        assert page.tables[0][0] == ["index", "score"]


def test_the_words_are_those_of_what_is_measured():
    model = torch.nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(6, 2), LABELS % 2)
    given = (model, data, [model.state_dict()])
    loss = torch.nn.CrossEntropyLoss()
    of_output = TracInCP(*given, loss_fn=loss, test_output_fn=lambda o, t: o[:, 0])
    of_loss = TracInCP(*given, loss_fn=loss, test_loss_fn=lambda o, t: -o[:, 0])
    one = {"loss_fn": torch.nn.MSELoss(), "test_output_fn": lambda o, t: o[:, 0]}
    cases = [(of_output, True), (TRAK(*given), True), (of_loss, False), (TracInCP, False)]
    cases.append((TracInCP(*given, **one), True))
    for method, rises in cases:
        page = Page(explained(Report("Six texts", TEXTS, method=method)).html())
        assert page.texts("p")[0] == (READING_OF_OUTPUT if rises else READING)
        heads = ["proponents: raised its output", "opponents: lowered its output"]
        lost = ["proponents: lowered its loss", "opponents: raised its loss"]
        assert page.texts("caption")[:2] == (heads if rises else lost)
    own = explained(Report("T", TEXTS, method=of_output, reading="Read."), heads=("up", "down"))
    assert Page(own.html()).texts("caption")[:2] == ["up", "down"]
    assert Page(own.html()).texts("p")[0] == "Read."


@pytest.mark.parametrize(
    ("method", "names"),
    [("TRAK", ["Method", "Training examples"]), (None, ["Training examples"])],
)
def test_the_header_leaves_out_what_is_not_known(method, names):
    page = Page(explained(Report("Title", TEXTS, method=method, reading="Read on.")).html())
    assert page.texts("dt") == names
    assert page.texts("p")[0] == "Read on."


def test_a_method_without_documentation_has_no_formula():
    class Own:
        pass

    assert Page(explained(Report("Title", TEXTS, method=Own())).html()).texts("dt") == [
        "Method",
        "Training examples",
    ]


def test_everything_given_is_escaped():
    evil = "</p><script>alert(1)</script>\"' onload=x &amp;"
    named = Report(
        evil,
        [torch.zeros(1), torch.zeros(2, 2), evil],
        [evil] * 3,
        true_labels=["a", evil, "b"],
        method=evil,
        feature_names=[evil],
        reading=evil,
        date=evil,
    )
    three = KMostInfluentialResults(torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    named.explain([evil], three, None, [evil], [evil], [evil], heading=evil, heads=(evil, evil))
    named.explain(torch.zeros(1, 2, 2), three, titles=[evil], heading=evil)
    named.ranking([1.0, 2, 3], heading=evil, text=evil)
    html = named.figure(evil, a_figure(), evil).html()
    page = Page(html)
    assert "<script" not in html
    assert {tag for tag, _, _ in page.elements} & {"script", "link", "iframe"} == set()
    assert page.texts("h1") == page.texts("figcaption") == [evil]
    assert page.texts("h2") == [evil] * 4
    assert page.texts("h3") == [evil] * 2
    assert page.attributes("img")[-1]["alt"] == evil
    assert page.texts("dl", **{"class": "numbers"})[0].split("\n")[1] == f"{evil}0"
    assert f"{evil} wrong: it should be a" in page.tables[0][1]


def test_the_page_needs_nothing_else():
    html = explained().ranking(range(6)).figure("Figure", a_figure()).html()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//|url\(|@import|\bon\w+=", re.sub(r"base64,[^\"]+", "", html))
    policy = page.attributes("meta")[1]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(image["src"].startswith("data:") for image in page.attributes("img"))


def test_the_page_can_be_read_aloud_and_walked_through():
    report = explained(Report("Title", torch.rand(6, 2, 2), LABELS), queries=torch.rand(2, 2, 2))
    page = Page(report.ranking(range(6)).figure("Figure", a_figure()).html())
    assert page.attributes("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.attributes("img"))
    assert len(page.texts("caption")) == len(page.tables) == 5
    assert {head["scope"] for head in page.attributes("th")} == {"row", "col"}
    levels = [tag for tag, _, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels == ["h1", "h2", "h3", "h3", "h2", "h2"]
    links = [link["href"] for link in page.attributes("a")]
    assert links == [f"#{section['id']}" for section in page.attributes("section")]
    assert page.texts("a") == page.texts("h2")
    assert "nav" not in {tag for tag, _, _ in Page(explained().html()).elements}


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    def written(name):
        report = Report("Title", torch.arange(24.0).view(6, 2, 2), LABELS)
        explained(report).ranking(range(6), first=2).figure("Figure", a_figure())
        return report.write(tmp_path / name)

    first, second = written("a.html"), written(str(tmp_path / "b.html"))
    assert (first, second) == (tmp_path / "a.html", tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    path = explained(queries=["\ud800", "é"]).write(tmp_path / "page.html")
    assert "é" in Page(path.read_text(encoding="utf-8")).texts("p", **{"class": "text"})
    assert b"&#55296;" in path.read_bytes()


def test_wrong_labels_are_marked():
    truth = torch.tensor([7, 8, 1, 2, 8, 9])
    page = Page(explained(Report("Title", TEXTS, LABELS, true_labels=truth)).html())
    assert page.tables[0][1] == ["#0", "7", "+2.00"]
    assert page.tables[0][3] == ["#3", "7 wrong: it should be 2", "+0.00"]
    assert page.tables[1][1] == ["#2", "9 wrong: it should be 1", "-4.00"]
    marked = page.texts("strong", **{"class": "wrong"})
    assert marked == ["wrong: it should be 2", "wrong: it should be 1"]


def test_labels_are_written_in_their_own_precision():
    labels = torch.tensor([25.3, 0.1], requires_grad=True)
    report = Report("Title", ["a", "b"], labels)
    page = Page(report.ranking([2, 1]).html())
    assert [row[2] for row in page.tables[0][1::2]] == ["25.3", "0.1"]


def test_a_ranking_has_the_highest_scores_first_equal_ones_by_place():
    scores = torch.tensor([0.5, 8.0, -2.0, 8.0, 1.0, -16.0])
    page = Page(Report("Title", TEXTS, LABELS).ranking(scores, first=3).html())
    assert page.tables == [
        [
            ["rank", "index", "label", "score"],
            ["1.", "#1", "8", "+8.00"],
            ["two lines"],
            ["2.", "#3", "7", "+8.00"],
            ["w" * 30],
            ["3.", "#4", "8", "+1.00"],
            ["(empty)"],
        ]
    ]
    assert page.texts("caption") == ["the 3 highest of 6 scores"]
    assert page.texts("h2") == ["Which labels look wrong"]
    assert page.texts("p")[1] == SUSPICION
    bars = [bar["style"] for bar in page.attributes("span")]
    assert bars == ["width: 100.0%", "width: 100.0%", "width: 12.5%"]


def test_a_ranking_counts_the_wrong_labels_among_its_own():
    report = Report("Title", TEXTS, LABELS, true_labels=[7, 0, 0, 0, 8, 9])
    page = Page(report.ranking([6, 5, 4, 3, 2, 1], first=2, text="Suspects.").html())
    assert page.texts("p")[1] == "Suspects. Of these 2, 1 have a wrong label."
    page = Page(Report("Title", torch.rand(6, 2, 2)).ranking(range(6), first=99).html())
    assert page.texts("caption") == ["the 6 highest of 6 scores"]
    assert page.tables[0][0] == ["rank", "image", "index", "score"]
    assert page.tables[0][1] == ["1.", "", "#5", "+5.00"]


def test_a_figure_is_embedded_as_it_is():
    figure = a_figure()
    report = explained().figure("Curve", figure, "It rises.")
    figure.axes[0].set_title("too late")
    page = Page(report.figure("Again", a_figure()).html())
    file = io.BytesIO()
    a_figure().savefig(file, format="png", dpi=130)
    file.seek(0)
    expected = np.rint(imread(file)[..., :3] * 255)
    for found in page.pixels():
        np.testing.assert_array_equal(found, expected)
    curve, again = page.attributes("img")
    assert (curve["alt"], curve["width"], again["alt"]) == ("Curve", "288", "Again")
    assert page.texts("figcaption") == ["It rises."]
    assert page.texts("h2")[1:] == ["Curve", "Again"]


def test_opponents_may_be_left_out_and_heads_be_others():
    page = Page(explained(opponents=None, titles=["a", "b"], heads=("near", "far")).html())
    assert page.texts("caption") == ["near", "near"]
    assert page.texts("h3") == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_examples": []}, r"got 0 training examples, and \{\}; there must be at least one"),
        ({"train_labels": [1]}, r"got 6 training examples, and \{'train_labels': 1\}"),
        (
            {"train_labels": LABELS, "true_labels": [1]},
            r"got 6 training examples, and \{'train_labels': 6, 'true_labels': 1\}; .* one of each",
        ),
        ({"true_labels": LABELS}, r"got true_labels without the train_labels .* pass both"),
        ({"cmap": "grey?"}, r"`cmap` must be a name in matplotlib\.colormaps, .*; got 'grey\?'"),
        ({"letters": 0}, r"`letters` must be a positive int; got 0"),
    ],
)
def test_what_is_no_training_set_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Report(**{"title": "Title", "train_examples": TEXTS, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": []}, r"got 0 test examples, and \{\}"),
        ({"labels": [1]}, r"got 2 test examples, and \{'labels': 1\}; there must be at least one"),
        ({"titles": ["a"], "predictions": [1, 2, 3]}, r"\{'titles': 1, 'predictions': 3\}"),
        (
            {"queries": ["one"]},
            r"`proponents` has shape \[2, 2\]; .* one row for each of the 1 test",
        ),
        (
            {"opponents": KMostInfluentialResults(ROW, torch.zeros(2, 1))},
            r"indices of shape \[1, 1\] and influence_scores of \[2, 1\]; both must be \[m, k\]",
        ),
        (
            {"opponents": KMostInfluentialResults(ROW, torch.zeros(1, 0))},
            r"of shape \[1, 1\] and influence_scores of \[1, 0\]; both must be \[m, k\]",
        ),
        (
            {"opponents": (torch.tensor([[6], [0]]), torch.zeros(2, 1))},
            r"`opponents.indices` holds 6; the training set has 6 examples, 0 to 5",
        ),
        (
            {"opponents": (torch.zeros(2, 1, dtype=int), [[1.0], [float("nan")]])},
            r"1 of the 2 values in `opponents.influence_scores` are not finite; .* index \[1, 0\]",
        ),
        (
            {"queries": [("a text", 3), "b"]},
            r"an example is \('a text', 3\), which is not a tensor; expected a text, num",
        ),
        ({"queries": torch.zeros(2, 2, 4, 5)}, r"an image has shape \[2, 4, 5\]; expected"),
    ],
)
def test_what_cannot_be_explained_is_refused(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explained(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [1.0]}, r"got 1 scores and first=20; there are 6 training examples, and there"),
        ({"scores": range(6), "first": 0}, r"got 6 scores and first=0; .* at least one to show"),
        ({"scores": [float("inf")] * 6}, r"6 of the 6 values in `scores` are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Report("Title", TEXTS).ranking(**arguments)


def test_an_empty_report_is_refused(tmp_path):
    report = Report("Title", TEXTS)
    for make in (report.html, lambda: report.write(tmp_path / "page.html")):
        with pytest.raises(InvalidArgumentError, match="the report is empty; call `explain`, `ran"):
            make()
    assert list(tmp_path.iterdir()) == []
