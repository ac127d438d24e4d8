"""Shakespeare, WikiText-2 with GPT-2's tokenizer, and Python's help, as examples of tokens."""

import sys
from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch
from small_files import write_tokenizer

from benchmarks.settings.data import Sizes
from benchmarks.settings.readers.text import (
    python_help,
    read_shakespeare,
    read_tokenizer,
    read_wikitext,
)
from benchmarks.settings.sequences import (
    even_pieces,
    help_topics,
    next_tokens,
    shakespeare,
    wikitext2,
    windows,
)
from influence_kit.errors import InvalidArgumentError

LINES = " = Title = \n\n The cat saw the other cat . \n \n the end \n"


@pytest.mark.parametrize("name", ["input.txt", "tinyshakespeare.txt", "shakespeare.txt"])
def test_shakespeare_is_one_text_file(tmp_path, name):
    (tmp_path / name).write_text("To be, or not to bé", encoding="utf-8")
    assert read_shakespeare(tmp_path) == "To be, or not to bé"


def test_an_empty_or_missing_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Shakespeare's text: .* has no input.txt or"):
        read_shakespeare(tmp_path)
    (tmp_path / "input.txt").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"input.txt is empty"):
        read_shakespeare(tmp_path)


def test_examples_of_shakespeare_are_windows_of_characters(tmp_path):
    text = "".join(chr(97 + i * i % 23) for i in range(6000))
    (tmp_path / "input.txt").write_text(text)
    data = shakespeare(tmp_path, Sizes(20, 2))
    characters = sorted(set(text))
    assert data.vocabulary == tuple(characters)
    assert data.outputs == len(characters)
    for place, start in ((0, 0), (1, 256), (19, 19 * 256)):
        inputs, targets = (tensor.tolist() for tensor in data.train[place])
        assert "".join(characters[i] for i in inputs) == text[start : start + 256]
        assert "".join(characters[i] for i in targets) == text[start + 1 : start + 257]
    assert "".join(characters[i] for i in data.test[0][0]) == text[5400 : 5400 + 256]


def test_the_sizes_of_the_field_are_those_of_nanogpts_text():
    # its 1,115,394 characters make the published 3,921 and 435 examples
    characters = range(1_115_394)
    border = int(0.9 * len(characters))
    parts = characters[:border], characters[border:]
    assert [len(windows(part, 257, 256)) for part in parts] == [3921, 435]


@pytest.mark.parametrize("inside", ["", "wikitext-2-raw", "wikitext-2"])
@pytest.mark.parametrize("ending", ["raw", "tokens"])
def test_wikitext_is_read_line_by_line(tmp_path, inside, ending):
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / f"wiki.train.{ending}").write_text(LINES)
    expected = [" = Title = \n", " The cat saw the other cat . \n", " the end \n"]
    assert read_wikitext(tmp_path, "train") == expected
    with pytest.raises(FileNotFoundError, match=r"'valid' of WikiText-2: .* no wiki.valid.raw or"):
        read_wikitext(tmp_path, "valid")


@pytest.mark.parametrize("inside", ["", "gpt2"])
def test_the_tokenizer_is_that_of_the_files(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    size = write_tokenizer(tmp_path / inside)
    tokenizer = read_tokenizer(tmp_path)
    assert len(tokenizer) == size
    ids = tokenizer("cat the the.\n")["input_ids"]
    assert tokenizer.decode(ids) == "cat the the.\n"
    assert ids[3:5] == [size - 2, size - 2]  # " the" is one token


def test_a_missing_tokenizer_file_is_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"GPT-2's tokenizer: .* has no merges.txt"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("module", "extra"), [("transformers", "hf"), ("sklearn", "demo")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, extra):
    from benchmarks.settings.optional import optional

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{module} is not.*"\.\[{extra}\]"'):
        optional(module)


def test_examples_of_wikitext_are_blocks_of_tokens(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "wiki.train.raw").write_text(LINES * 30)
    (tmp_path / "wiki.valid.raw").write_text(LINES * 20)
    data = wikitext2(tmp_path, Sizes(2, 1))
    tokenizer = read_tokenizer(tmp_path)
    tokens = []
    for line in LINES.splitlines(keepends=True) * 30:
        tokens += tokenizer(line)["input_ids"] if line.strip() else []
    inputs, targets = data.train.tensors
    assert inputs.shape == targets.shape == (2, 511)
    assert inputs[1].tolist() == tokens[512:1023]
    assert targets[1].tolist() == tokens[513:1024]
    assert data.outputs == len(tokenizer)
    assert data.folder == tmp_path


def test_pieces_of_a_paragraph_hold_all_its_tokens():
    for length in range(2, 40):
        for context in (1, 3, 8):
            pieces = even_pieces(list(range(length)), context)
            assert [pair for piece in pieces for pair in pairwise(piece)] == [
                (i, i + 1) for i in range(length - 1)
            ]
            sizes = [len(piece) - 1 for piece in pieces]
            assert max(sizes) <= context
            assert max(sizes) - min(sizes) <= 1


def test_what_follows_a_piece_is_ignored():
    inputs, targets = next_tokens([[5, 6, 7], [8, 9]], context=3, padding=1)
    assert inputs.tolist() == [[5, 6, 1], [8, 1, 1]]
    assert targets.tolist() == [[6, 7, -100], [9, -100, -100]]


def test_the_help_is_prose():
    paragraphs = list(python_help())
    assert {paragraph.topic for paragraph in paragraphs} <= set(topics)
    assert len(paragraphs) > 500
    assert all(len(p.words) >= 8 for p in paragraphs)
    # neither tables nor examples
    for paragraph in paragraphs:
        visible = "".join(paragraph.words)
        assert sum(map(str.isalpha, visible)) >= 0.7 * len(visible)
    assert {"import", "try", "compound"} <= {p.topic for p in paragraphs}


def test_paragraphs_of_the_help_are_examples_with_their_topics():
    data = help_topics(None, Sizes(300, 40))
    inputs, targets = data.train.tensors
    assert inputs.shape == targets.shape == (300, 64)
    assert (len(data.groups), len(data.test_groups)) == (300, 40)
    assert data.outputs == len(data.vocabulary) > 500
    assert torch.equal(inputs[:, 1:][targets[:, 1:] >= 0], targets[:, :-1][targets[:, 1:] >= 0])
    # a whole short paragraph, written out again, is in the text of its topic
    place = int(((targets >= 0).sum(1) < 30).nonzero()[0])
    words = [data.vocabulary[i] for i in targets[place].tolist() if i >= 0]
    known = [word for word in words if word != "<unknown>"]
    assert all(word in topics[data.groups[place]] for word in known)
