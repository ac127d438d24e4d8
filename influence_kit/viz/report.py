"""Results as a web page: what helped and hurt predictions, which labels look wrong, and figures.

Shapes: m test examples, n training examples, k of them per test example.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.core.arguments import (
    check_count,
    check_sequence,
    check_text,
    check_texts,
    shown,
)
from influence_kit.core.objects import check_path
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.storage.atomic import write_file
from influence_kit.storage.given_files import check_regular
from influence_kit.viz.captions import (
    Heads,
    explains_output,
    heads_of,
    label_text,
)
from influence_kit.viz.colours import NEGATIVE, POSITIVE
from influence_kit.viz.display import QUERY_SIDE, Display, figure_address
from influence_kit.viz.images import check_cmap
from influence_kit.viz.report_texts import (
    READING,
    READING_OF_OUTPUT,
    SUSPICION,
    name_and_formula,
)
from influence_kit.viz.sections import (
    ExplainedTest,
    Labels,
    Section,
    TrainingSet,
    check_counts,
    plain_contents,
)
from influence_kit.viz.top_results import checked_heads

CSS_PIXELS_PER_INCH = 96


class Report:
    """A web page of results in a single file without dependencies, for screens and for print.

    Sections appear in the order of the calls, and the same inputs give the same bytes. The type of
    an example decides how it is shown: a ``str`` as text, ``[features]`` as numbers with their
    names, ``[height, width]`` and ``[channels, height, width]`` as an image of 1 or 3 channels, as
    in ``proponents_and_opponents``. So that many examples fit on a page, images are embedded with
    at most 96 pixels per side (240 for test examples) and rows with their first 40 numbers; the
    page notes what is left out of a row or a text.

    Args:
        title: of the page.
        train_examples: the training examples ``[n, ...]``, or any sequence of them.
        train_labels: their labels ``[n]``, shown by ``str``, if there are any.
        true_labels: the correct labels, ``[n]``, where known; a label that differs is marked.
        method: the method that gave the scores, for its name, its formula and the meaning of a
            positive score (it lowered the loss, or raised the output that ``test_output_fn``
            measures); a ``str`` is a name alone.
        feature_names: names of the numbers of an example.
        cmap: the matplotlib colormap of images with one channel; "gray_r" draws 0 as white.
        letters: how many characters of a text to show at most.
        reading: how to read a score; None for a text that fits ``method``.
        date: the date to show; None for none.

    Raises:
        InvalidArgumentError: for no training example, another number of labels, true labels without
            labels, an unknown cmap, or ``letters`` below 1.

    Example:
        >>> import torch
        >>> from influence_kit import KMostInfluentialResults
        >>> helpful = KMostInfluentialResults(torch.tensor([[1]]), torch.tensor([[0.5]]))
        >>> report = Report("Reviews", ["dull", "a joy"], ["bad", "good"], method="TracInCP")
        >>> page = report.explain(["what a joy"], helpful, predictions=["good"]).html()
        >>> "what a joy" in page
        True
    """

    def __init__(
        self,
        title: str,
        train_examples: Tensor | Sequence[Any],
        train_labels: Labels | None = None,
        *,
        true_labels: Labels | None = None,
        method: object = None,
        feature_names: Sequence[str] | None = None,
        cmap: str = "gray",
        letters: int = 600,
        reading: str | None = None,
        date: str | None = None,
    ) -> None:
        check_text(title, "title")
        for argument, given in (("reading", reading), ("date", date)):
            if given is not None:
                check_text(given, argument, instead="None")
        check_cmap(cmap)
        check_count(letters, "letters")
        if feature_names is not None:
            feature_names = check_texts(feature_names, "feature_names", "one name per number")
        self._display = Display(feature_names, cmap, letters)
        self._train = TrainingSet(train_examples, train_labels, true_labels, self._display)
        self._method = method
        if reading is None:
            reading = READING_OF_OUTPUT if explains_output(method) else READING
        name, formula = name_and_formula(method)
        facts = {
            "Method": name,
            "Formula": formula,
            "Training examples": str(len(self._train)),
            "Date": date,
        }
        self._head = {"title": title, "head": facts, "reading": reading}
        self._sections: list[Section] = []

    def explain(
        self,
        queries: Tensor | Sequence[Any],
        proponents: KMostInfluentialResults,
        opponents: KMostInfluentialResults | None = None,
        titles: Sequence[str] | None = None,
        labels: Labels | None = None,
        predictions: Labels | None = None,
        heading: str = "What helped, and what hurt",
        heads: Heads | None = None,
    ) -> "Report":
        """Add test examples, each with its proponents and opponents side by side, best first.

        Args:
            queries: the test examples ``[m, ...]``, or any sequence of them.
            proponents: what ``influence(..., k=k)`` returned for them.
            opponents: what ``influence(..., k=k, proponents=False)`` returned, optional.
            titles: of the test examples, ``[m]``; None for their indices.
            labels: their labels ``[m]``, shown by ``str``, where known.
            predictions: of the model, ``[m]``, shown by ``str``.
            heading: of the section.
            heads: what to write above proponents and opponents; None for what the method explains.

        Returns:
            The report itself.

        Raises:
            InvalidArgumentError: for no test example, another number of results, titles or labels,
                indices outside the training set, or an example that cannot be shown.
        """
        m, train = len(check_sequence(queries, "queries", "test examples")), self._train
        check_text(heading, "heading")
        if titles is not None:
            titles = check_texts(titles, "titles", "one title per test example")
        known = {"Label": labels, "Prediction": predictions}
        check_counts(m, "test", titles=titles, labels=labels, predictions=predictions)
        written = heads_of(checked_heads(heads), self._method)
        results = [(written[0], *train.results(proponents, "proponents", m))]
        if opponents is not None:
            results.append((written[1], *train.results(opponents, "opponents", m)))
        explained = []
        for row, query in enumerate(queries):
            title = f"Test example #{row}" if titles is None else titles[row]
            facts = {name: label_text(v[row]) for name, v in known.items() if v is not None}
            largest = max(scores[row].abs().max() for _, _, scores in results)
            tables = [
                train.table(head, indices[row], scores[row], largest)
                for head, indices, scores in results
            ]
            shown = self._display.shown(query, QUERY_SIDE)
            explained.append(ExplainedTest(title, shown, facts, tables))
        return self._with(Section(heading, "", explained))

    def ranking(
        self,
        scores: Values,
        first: int = 20,
        heading: str = "Which labels look wrong",
        text: str = SUSPICION,
    ) -> "Report":
        """Add the training examples with the highest scores; ties by index.

        Args:
            scores: of the training examples, ``[n]``: the result of ``self_influence()``, or any
                other suspicion.
            first: how many to show, at least 1.
            heading: of the section.
            text: what the scores mean.

        Returns:
            The report itself.

        Raises:
            InvalidArgumentError: for scores that are not finite or not one per example, a ``first``
                below 1, or an example that cannot be shown.
        """
        values, n = numbers(scores, "scores", "[n]"), len(self._train)
        check_count(first, "first", least=0)
        check_text(heading, "heading")
        check_text(text, "text")
        if len(values) != n or first < 1:
            raise InvalidArgumentError(
                f"got {len(values)} scores and first={first}; there are {n} training examples, and "
                "there must be a score for each, and at least one to show"
            )
        order = values.argsort(descending=True, stable=True)[:first]
        highest = values[order]
        caption = f"the {len(order)} highest of {n} scores"
        table = self._train.table(caption, order, highest, highest.abs().max())
        if self._train.truth is not None:
            wrong = sum(entry.truth is not None for entry in table.entries)
            text = f"{text} Of these {len(order)}, {wrong} have a wrong label."
        return self._with(Section(heading, text, ranking=table))

    def figure(self, heading: str, figure: Figure, text: str = "") -> "Report":
        """Add a figure in its current state: one of this package, or any matplotlib figure.

        Args:
            heading: of the section, also for screen readers.
            figure: the figure.
            text: the caption.

        Returns:
            The report itself.

        Raises:
            InvalidArgumentError: for what is not a figure, or not a text.
        """
        check_text(heading, "heading")
        check_text(text, "text")
        if not isinstance(figure, Figure):
            raise InvalidArgumentError(
                f"`figure` must be a matplotlib.figure.Figure; got {shown(figure)}"
            )
        width = round(CSS_PIXELS_PER_INCH * float(figure.get_figwidth()))
        return self._with(Section(heading, text, picture=figure_address(figure), width=width))

    def html(self) -> str:
        """The page.

        Raises:
            InvalidArgumentError: for a report without any section.
        """
        if not self._sections:
            raise InvalidArgumentError(
                "the report is empty; call `explain`, `ranking` or `figure` first"
            )
        environment = Environment(
            loader=PackageLoader("influence_kit.viz"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        colours = {"positive": POSITIVE, "negative": NEGATIVE}
        page = environment.get_template("report.html")
        return page.render(
            **plain_contents(self._head), sections=plain_contents(self._sections), colours=colours
        )

    def write(self, path: str | Path) -> Path:
        """Write the page into a file, in UTF-8, and return the file's path.

        What was there before is unchanged until the page is whole.

        Raises:
            InvalidArgumentError: for no path, or a report without any section.
            StorageError: if the system refuses to write it.
        """
        path = check_path(path, "path")
        if path.is_dir():
            raise InvalidArgumentError(f"'{path}' is a folder; pass the path of a file")
        if path.exists():
            check_regular(path)
        # lone surrogates, which texts decoded from bytes may contain, are not valid UTF-8
        write_file(path.resolve(), self.html().encode("utf-8", "xmlcharrefreplace"))
        return path

    def _with(self, section: Section) -> "Report":
        self._sections.append(section)
        return self
