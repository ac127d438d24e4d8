"""The contents of the report's template: explained test examples, rankings and figures.

Shapes: m test examples, n training examples, k of them per test example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from influence_kit.core.arguments import check_sequence
from influence_kit.errors import InvalidArgumentError
from influence_kit.viz.captions import label_text, plain_text, score_text
from influence_kit.viz.display import Display, Shown
from influence_kit.viz.top_results import checked_results

Labels = Sequence[Any] | Tensor


class Entry(NamedTuple):
    """A training example in a table.

    Attributes:
        number: its index in the training set.
        shown: the example itself.
        label: its label, where known.
        truth: the correct label, if it is known and differs.
        score: its score, as text.
        sign: of the score: "positive", "negative" or "zero".
        share: the length of its bar, in percent of the longest.
    """

    number: int
    shown: Shown
    label: str | None
    truth: str | None
    score: str
    sign: str
    share: str


class ExampleTable(NamedTuple):
    """The proponents or the opponents of a test example, or a ranking, best first."""

    caption: str
    entries: Sequence[Entry]


class ExplainedTest(NamedTuple):
    """A test example with its label and prediction, and its tables side by side."""

    title: str
    shown: Shown
    facts: Mapping[str, str]
    tables: Sequence[ExampleTable]


class Section(NamedTuple):
    """A heading and a text, followed by explained test examples, a ranking or a figure.

    Attributes:
        width: of the figure on a wide page, in CSS pixels.
    """

    heading: str
    text: str
    explained: Sequence[ExplainedTest] = ()
    ranking: ExampleTable | None = None
    picture: str | None = None
    width: int = 0


@dataclass(frozen=True)
class TrainingSet:
    """The training examples, ``[n]``, and how they are shown.

    Attributes:
        examples: the examples.
        labels: their labels, if there are any.
        truth: the correct labels, where known.
        display: how an example is shown.
    """

    examples: Tensor | Sequence[Any]
    labels: Labels | None
    truth: Labels | None
    display: Display

    def __post_init__(self) -> None:
        check_sequence(self.examples, "train_examples", "training examples")
        check_counts(len(self), "training", train_labels=self.labels, true_labels=self.truth)
        if self.labels is None and self.truth is not None:
            raise InvalidArgumentError(
                "got true_labels without the train_labels to compare them with; pass both"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def results(self, results: Any, name: str, m: int) -> tuple[Tensor, Tensor]:
        """Indices and scores ``[m, k]`` on the CPU, checked to be of m test examples."""
        indices, scores = checked_results(results, name, len(self))
        if len(scores) != m or scores.numel() == 0:
            raise InvalidArgumentError(
                f"`{name}` has shape {list(scores.shape)}; it must be [m, k], with one row for "
                f"each of the {m} test examples"
            )
        return indices, scores

    def table(self, caption: str, indices: Tensor, scores: Tensor, largest: Tensor) -> ExampleTable:
        """The training examples at indices ``[k]``; the largest score has a bar of full length."""
        shares = (100 * scores.abs() / largest).nan_to_num()
        rows = zip(indices.tolist(), scores.tolist(), shares.tolist(), strict=True)
        return ExampleTable(caption, [self._entry(*row) for row in rows])

    def _entry(self, index: int, score: float, share: float) -> Entry:
        label = None if self.labels is None else label_text(self.labels[index])
        truth = None if self.truth is None else label_text(self.truth[index])
        return Entry(
            index,
            self.display.shown(self.examples[index]),
            label,
            None if truth == label else truth,
            score_text(score),
            "positive" if score > 0 else "negative" if score < 0 else "zero",
            f"{share:.1f}%",
        )


def check_counts(count: int, kind: str, **given: Any) -> None:
    """Refuse zero examples, and anything without one item per example."""
    counts = {
        name: len(check_sequence(items, name, f"one item per {kind} example"))
        for name, items in given.items()
        if items is not None
    }
    if count == 0 or any(other != count for other in counts.values()):
        raise InvalidArgumentError(
            f"got {count} {kind} examples, and {counts}; there must be at least one, and one of "
            "each per example"
        )


def plain_contents(item: Any) -> Any:
    """The contents of the page with every text as a plain one, which the template escapes."""
    if item is None or isinstance(item, bool | int | float):
        return item
    if isinstance(item, Mapping):
        return {plain_text(key): plain_contents(value) for key, value in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*map(plain_contents, item))
    return (
        [plain_contents(part) for part in item]
        if isinstance(item, list | tuple)
        else plain_text(item)
    )
