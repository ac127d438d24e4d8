"""Lines of Shakespeare against sentences of WikiText-2, as the words that they have."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.settings.data import Data, Sizes, first
from benchmarks.settings.readers.files import check_folder
from benchmarks.settings.readers.text import read_shakespeare, read_wikitext

WORD = re.compile(r"[a-z']+")
SHORTEST, EVERY, WORDS = 30, 5, 800
# texts of both kinds before every fifth is taken, and training examples after that
READ, TRAIN = 3000, 520
SPLIT_SEED = 0


def texts(folder: Path | None, sizes: Sizes) -> Data:
    """520 + 60 texts: 1 where one has a word, of the 800 that most training texts have.

    Class 0 are lines of Shakespeare of more than 30 letters, class 1 sentences of WikiText-2's
    validation and test parts: every fifth of the first 1,500 of each.
    """
    folder = check_folder(folder)
    kinds = [_lines(folder), _sentences(folder)]
    some = [kind[: READ // 2 : EVERY] for kind in kinds]
    chosen = [text for kind in some for text in kind]
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(kind) for kind in some]))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SPLIT_SEED))
    words = [set(WORD.findall(chosen[place].lower())) for place in order.tolist()]
    border = TRAIN
    rows = _bags(words, Counter(word for own in words[:border] for word in own))
    labels = labels[order]
    train = first((rows[:border], labels[:border]), sizes.train, "training")
    test = first((rows[border:], labels[border:]), sizes.test, "test")
    return Data(train, test, outputs=2, folder=folder)


def _lines(folder: Path) -> list[str]:
    lines = read_shakespeare(folder).splitlines()
    return [line for line in lines if sum(map(str.isalpha, line)) > SHORTEST]


def _sentences(folder: Path) -> list[str]:
    text = " ".join(
        line
        for part in ("valid", "test")
        for line in read_wikitext(folder, part)
        if not line.lstrip().startswith("=")
    )
    sentences = [sentence.strip() for sentence in text.split(" . ")]
    return [one for one in sentences if sum(map(str.isalpha, one)) > SHORTEST]


def _bags(words: Sequence[set[str]], counts: Counter[str]) -> Tensor:
    """0 and 1, ``[n, 800]``."""
    commonest = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    numbers = {word: number for number, word in enumerate(commonest)}
    rows = torch.zeros(len(words), WORDS)
    for row, own in zip(rows, words, strict=True):
        row[[numbers[word] for word in own if word in numbers]] = 1
    return rows
