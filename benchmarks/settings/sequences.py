"""The data of the language models: examples are pieces of tokens, each predicting the next.

Shapes: n examples, t positions.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.settings.data import Data, Sizes, first
from benchmarks.settings.readers.files import check_folder
from benchmarks.settings.readers.music import PADDING, TOKENS, read_maestro
from benchmarks.settings.readers.text import (
    WORD,
    Paragraph,
    python_help,
    read_shakespeare,
    read_tokenizer,
    read_wikitext,
)
from influence_kit.data.class_labels import IGNORED_LABEL

MUSIC_CONTEXT, SHAKESPEARE_CONTEXT, GPT2_BLOCK, HELP_CONTEXT = 256, 256, 512, 64
# of Shakespeare by words: the first windows of the text
WORDS_CONTEXT, WORDS_PIECES = 32, 1100
TRAIN_SHARE = 0.9
UNKNOWN, RAREST = "<unknown>", 3  # a word that occurs less often is unknown
SPLIT_SEED = 0
Pieces = Sequence[Sequence[int]]


def windows(tokens: Sequence[int], length: int, step: int) -> list[Sequence[int]]:
    """Pieces of ``length`` tokens that start ``step`` apart; a rest shorter than that is dropped.

    Example:
        >>> windows([1, 2, 3, 4, 5, 6], length=3, step=2)
        [[1, 2, 3], [3, 4, 5]]
    """
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, step)]


def even_pieces(tokens: Sequence[int], context: int) -> list[Sequence[int]]:
    """All tokens in pieces of about one length, at most context + 1, the next from the last's end.

    Example:
        >>> even_pieces([1, 2, 3, 4, 5, 6], context=3)
        [[1, 2, 3, 4], [4, 5, 6]]
    """
    steps = len(tokens) - 1
    count = -(-steps // context)
    borders = [-(-steps * k // count) for k in range(count + 1)]
    return [tokens[i : j + 1] for i, j in pairwise(borders)]


def next_tokens(pieces: Pieces, context: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[n, context]`` of pieces of up to context + 1 tokens.

    Where a piece has no more tokens, inputs are ``padding`` and targets are ignored by losses.
    """
    inputs = torch.full((len(pieces), context), padding)
    targets = torch.full((len(pieces), context), IGNORED_LABEL)
    for row, piece in enumerate(pieces):
        tokens = torch.tensor(piece)
        inputs[row, : len(piece) - 1] = tokens[:-1]
        targets[row, : len(piece) - 1] = tokens[1:]
    return inputs, targets


def maestro(folder: Path | None, sizes: Sizes) -> Data:
    """Piano pieces of MAESTRO as events, by the names of their files.

    Training examples are all windows of 256 events of the first pieces (as many pieces as are
    needed); a test example is the first window of a test piece.
    """
    folder = check_folder(folder)
    train, groups = _music(folder, "train", sizes.train, whole=True)
    test, test_groups = _music(folder, "test", sizes.test, whole=False)
    return Data(train, test, TOKENS, groups, test_groups, folder=folder)


def _music(
    folder: Path, split: str, count: int | None, whole: bool
) -> tuple[TensorDataset, tuple[str, ...]]:
    """Windows of the pieces of a split (all, or the first of each), and the piece of each."""
    pieces: list[Sequence[int]] = []
    names: list[str] = []
    for name, events in read_maestro(folder, split):
        own = windows(events, MUSIC_CONTEXT + 1, MUSIC_CONTEXT) or [events]
        own = own if whole else own[:1]
        pieces += own
        names += [name] * len(own)
        if count is not None and len(pieces) >= count:
            break
    what = "training" if whole else "test"
    examples = first(next_tokens(pieces, MUSIC_CONTEXT, PADDING), count, what)
    return examples, tuple(names[: len(examples)])


def shakespeare(folder: Path | None, sizes: Sizes) -> Data:
    """Windows of 256 characters: the first 90 % of the text for training, the rest for testing."""
    folder = check_folder(folder)
    text = read_shakespeare(folder)
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = [numbers[character] for character in text]
    border = int(TRAIN_SHARE * len(tokens))
    context = SHAKESPEARE_CONTEXT
    train, test = (
        next_tokens(windows(part, context + 1, context), context)
        for part in (tokens[:border], tokens[border:])
    )
    return Data(
        first(train, sizes.train, "training"),
        first(test, sizes.test, "test"),
        outputs=len(characters),
        vocabulary=tuple(characters),
        folder=folder,
    )


def shakespeare_words(folder: Path | None, sizes: Sizes) -> Data:
    """The first 1,100 windows of 32 words and marks; a tenth of them, drawn at random, for testing.

    Words that occur once or twice in these windows are unknown. Names and phrases of a scene are in
    training and test windows, so that training examples matter for test examples.
    """
    folder = check_folder(folder)
    words = WORD.findall(read_shakespeare(folder))[: WORDS_PIECES * WORDS_CONTEXT + 1]
    vocabulary = _known(Counter(words))
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokens = [numbers.get(word, numbers[UNKNOWN]) for word in words]
    inputs, targets = next_tokens(windows(tokens, WORDS_CONTEXT + 1, WORDS_CONTEXT), WORDS_CONTEXT)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    border = int(TRAIN_SHARE * len(inputs))
    train, test = ((inputs[half], targets[half]) for half in (order[:border], order[border:]))
    return Data(
        first(train, sizes.train, "training"),
        first(test, sizes.test, "test"),
        outputs=len(vocabulary),
        vocabulary=vocabulary,
        folder=folder,
    )


def _known(counts: Counter[str]) -> tuple[str, ...]:
    """The vocabulary: "<unknown>", and the words that are not rare."""
    return (UNKNOWN, *sorted(word for word, count in counts.items() if count >= RAREST))


def wikitext2(folder: Path | None, sizes: Sizes) -> Data:
    """Blocks of 512 tokens of GPT-2's tokenizer; test examples are of the validation part.

    Lines are tokenised one by one and joined, as the field's scripts do.
    """
    folder = check_folder(folder)
    tokenizer = read_tokenizer(folder)
    parts = []
    for part in ("train", "valid"):
        lines = tokenizer(read_wikitext(folder, part))["input_ids"]
        tokens = [token for line in lines for token in line]
        parts.append(next_tokens(windows(tokens, GPT2_BLOCK, GPT2_BLOCK), GPT2_BLOCK - 1))
    return Data(
        first(parts[0], sizes.train, "training"),
        first(parts[1], sizes.test, "test"),
        outputs=len(tokenizer),
        folder=folder,
    )


def help_topics(folder: Path | None, sizes: Sizes) -> Data:
    """Paragraphs of Python's help as words; a tenth of them, drawn at random, for testing.

    The topic is an example's group. A paragraph of more than 65 words is several examples. Words
    that occur once or twice are unknown.
    """
    paragraphs = list(python_help())
    vocabulary = _known(Counter(word for paragraph in paragraphs for word in paragraph.words))
    numbers = {word: number for number, word in enumerate(vocabulary)}
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(paragraphs), generator=generator).tolist()
    border = int(TRAIN_SHARE * len(paragraphs))
    halves = []
    for places, count, what in (
        (order[:border], sizes.train, "training"),
        (order[border:], sizes.test, "test"),
    ):
        own = [piece for i in places for piece in _pieces(paragraphs[i], numbers)]
        examples = first(next_tokens([p for _, p in own], HELP_CONTEXT), count, what)
        halves.append((examples, tuple(topic for topic, _ in own[: len(examples)])))
    (train, groups), (test, test_groups) = halves
    return Data(train, test, len(vocabulary), groups, test_groups, vocabulary)


def _pieces(paragraph: Paragraph, numbers: dict[str, int]) -> Iterator[tuple[str, Sequence[int]]]:
    tokens = [numbers.get(word, numbers[UNKNOWN]) for word in paragraph.words]
    for piece in even_pieces(tokens, HELP_CONTEXT):
        yield paragraph.topic, piece
