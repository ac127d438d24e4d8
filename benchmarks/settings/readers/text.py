"""Texts: Shakespeare, WikiText-2 with a tokenizer of GPT-2, and the paragraphs of Python's help."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.settings.optional import optional
from benchmarks.settings.readers.files import find_file
from influence_kit.errors import InvalidArgumentError

SHAKESPEARE = ("input.txt", "tinyshakespeare.txt", "shakespeare.txt")
SHAKESPEARE_FOLDERS = ("shakespeare",)
WIKITEXT_FOLDERS = ("wikitext-2-raw", "wikitext-2")
GPT2_FOLDERS = ("gpt2",)
WORD = re.compile(r"\w+|[^\w\s]")
# a paragraph with fewer words and marks, or with fewer letters among its visible characters, is a
# heading, a table or an example: such junk has large gradients and is everybody's proponent
FEWEST_WORDS, FEWEST_LETTERS = 8, 0.7


def read_shakespeare(folder: Path) -> str:
    """The text of ``input.txt``, of 1,115,394 characters where it is the one that nanoGPT uses.

    Read in the folder or in ``shakespeare`` below it.

    Raises:
        FileNotFoundError: where there is no such file.
        InvalidArgumentError: where it is empty.
    """
    path = find_file(folder, SHAKESPEARE, "Shakespeare's text", SHAKESPEARE_FOLDERS)
    text = path.read_text(encoding="utf-8")
    if not text:
        raise InvalidArgumentError(f"{path} is empty")
    return text


def read_wikitext(folder: Path, part: str) -> list[str]:
    """The lines of a part ("train", "valid" or "test") of WikiText-2, blank ones left out.

    Read is ``wiki.<part>.raw``, or ``wiki.<part>.tokens`` (in which rare words are ``<unk>``), in
    the folder or in ``wikitext-2-raw`` or ``wikitext-2`` below it. Published figures of GPT-2 are
    of the raw text.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    names = [f"wiki.{part}.{ending}" for ending in ("raw", "tokens")]
    path = find_file(folder, names, f"the part '{part}' of WikiText-2", WIKITEXT_FOLDERS)
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line for line in file if line.strip()]


def read_tokenizer(folder: Path) -> Any:
    """GPT-2's byte-pair tokenizer from ``vocab.json`` and ``merges.txt``, by ``transformers``.

    They are in the folder or in ``gpt2`` below it.

    Raises:
        FileNotFoundError: where a file is missing.
        ModuleNotFoundError: where transformers is not installed.
    """
    words = find_file(folder, ["vocab.json"], "GPT-2's tokenizer", GPT2_FOLDERS)
    find_file(words.parent, ["merges.txt"], "GPT-2's tokenizer")
    tokenizer = optional("transformers").GPT2TokenizerFast
    return tokenizer.from_pretrained(str(words.parent), local_files_only=True)


class Paragraph(NamedTuple):
    """The words and marks of a paragraph, and the topic under which it stands."""

    topic: str
    words: list[str]


def python_help() -> Iterator[Paragraph]:
    """The paragraphs of prose in ``pydoc_data.topics``, which every Python has.

    They differ from version to version of Python. Some stand under several topics.
    """
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            words = WORD.findall(paragraph)
            visible = sum(not character.isspace() for character in paragraph)
            letters = sum(character.isalpha() for character in paragraph)
            if len(words) >= FEWEST_WORDS and letters >= FEWEST_LETTERS * visible:
                yield Paragraph(topic, words)
