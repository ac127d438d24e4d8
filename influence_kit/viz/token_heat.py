"""Texts whose tokens are coloured by their scores, as HTML.

Shapes: k texts, t tokens (of the longest text).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from influence_kit.core.arguments import check_sequence, check_texts, shown
from influence_kit.core.objects import check_path
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.storage.atomic import write_file
from influence_kit.storage.given_files import check_regular
from influence_kit.viz.captions import plain_text, score_text
from influence_kit.viz.colours import GREY, NEGATIVE, POSITIVE

LEGEND = (
    "Blue: positive, training on it lowered the loss (or raised the output). Orange, underlined: "
    "negative. The strongest colour is {}. Point at a token for its score."
)
HEAD = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
    'http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
    "'unsafe-inline'\">\n<title>Scores of tokens</title>\n</head>\n<body>\n"
)


class _Token(NamedTuple):
    text: str
    sign: str
    heat: int
    score: str


class _Row(NamedTuple):
    name: str
    tokens: list[_Token]


@dataclass(frozen=True)
class TokenHeat:
    """Texts with heat; a notebook shows them.

    Attributes:
        html: a fragment of a page, without scripts.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def write(self, path: str | Path) -> Path:
        """Write a whole page into a file, in UTF-8, and return the file's path.

        Raises:
            InvalidArgumentError: for no path of a file.
            StorageError: where the system does not let it be written.
        """
        path = check_path(path, "path")
        if path.is_dir():
            raise InvalidArgumentError(f"'{path}' is a folder; pass the path of a file")
        if path.exists():
            check_regular(path)
        page = f"{HEAD}{self.html}\n</body>\n</html>\n"
        write_file(path.resolve(), page.encode("utf-8", "xmlcharrefreplace"))
        return path


def token_heat(
    tokens: Sequence[Sequence[str]], scores: Values, names: Sequence[str] | None = None
) -> TokenHeat:
    """Texts whose tokens are coloured by their scores, which sum to the score of the text.

    The heat of a token is its score over the largest absolute score of all texts, so that colours
    can be compared between texts.

    Args:
        tokens: the tokens of each text, as strings.
        scores: their scores ``[k, t]``: for one test example the rows of ``influence(...,
            per_token=...)``, or of ``KMostInfluentialTokens.token_scores``. Those beyond the tokens
            of a shorter text must be 0.
        names: what to write above each text beside its score; the index in ``tokens`` if None.

    Raises:
        InvalidArgumentError: for no texts, tokens that are not strings, scores that are not finite
            or not one per token, and another number of names.

    Example:
        >>> import torch
        >>> from influence_kit.viz import token_heat
        >>> page = token_heat([["the", " cat"], ["a"]], torch.tensor([[0.5, -1.0], [0.25, 0.0]]))
        >>> "underline" in page.html
        True
    """
    texts = check_sequence(tokens, "tokens", "lists of strings")
    rows = [check_texts(text, "tokens", "strings, the tokens of a text") for text in texts]
    values = numbers(scores, "scores", "[k, t]")
    labels = [f"#{index}" for index in range(len(rows))] if names is None else names
    check_texts(labels, "names", "one text per text")
    if not rows or len(values) != len(rows) or len(labels) != len(rows):
        raise InvalidArgumentError(
            f"got {len(rows)} texts, scores of {len(values)} and {len(labels)} names; there must "
            "be as many of each, and at least one"
        )
    largest = float(values.abs().max())
    legend = LEGEND.format(score_text(largest).lstrip("+"))
    found = [_row(*one, largest) for one in zip(labels, rows, values, strict=True)]
    return TokenHeat(_rendered(found, legend))


def _row(name: str, tokens: Sequence[str], scores: Tensor, largest: float) -> _Row:
    shown_scores, rest = scores[: len(tokens)], scores[len(tokens) :]
    if len(shown_scores) < len(tokens) or bool(rest.any()):
        raise InvalidArgumentError(
            f"the text {shown(name)} has {len(tokens)} tokens, and {len(scores)} scores of which "
            f"{int((rest != 0).sum())} beyond its tokens are not 0; there must be one per token, "
            "and zeros beyond them"
        )
    head = f"{plain_text(name)} | {score_text(float(scores.sum()))}"
    pairs = zip(tokens, shown_scores.tolist(), strict=True)
    return _Row(head, [_token(text, score, largest) for text, score in pairs])


def _token(text: str, score: float, largest: float) -> _Token:
    sign = "positive" if score > 0 else "negative" if score < 0 else "zero"
    heat = round(100 * abs(score) / largest) if largest else 0
    return _Token(plain_text(text), sign, heat, score_text(score))


def _rendered(rows: list[_Row], legend: str) -> str:
    environment = Environment(
        loader=PackageLoader("influence_kit.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = {"positive": POSITIVE, "negative": NEGATIVE, "quiet": GREY}
    page = environment.get_template("tokens.html")
    return page.render(rows=rows, legend=legend, colours=colours)
