"""BM25 against a plain loop over words."""

import math
import random

import numpy as np
import pytest
import torch

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import bm25

DRAW = random.Random(0)
TEXTS = [[DRAW.randrange(12) for _ in range(DRAW.randrange(0, 15))] for _ in range(20)]
QUERIES = [[DRAW.randrange(16) for _ in range(DRAW.randrange(1, 8))] for _ in range(7)]


def plain(queries, texts, k1, b):
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for query in queries:
        row = []
        for text in texts:
            score = 0.0
            for word in query:  # a word that stands twice counts twice
                having = sum(word in other for other in texts)
                rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
                often = text.count(word)
                if often:
                    saturated = often + k1 * (1 - b + b * len(text) / mean)
                    score += rarity * often * (k1 + 1) / saturated
            row.append(score)
        scores.append(row)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.0, 0.5), (0.9, 0.0), (2, 1)])
@pytest.mark.parametrize("rows", [3, 1000])
def test_scores_are_those_of_a_loop(monkeypatch, rows, k1, b):
    monkeypatch.setattr("influence_kit.evaluation.lexical.rows_within", lambda *given: rows)
    found = bm25(QUERIES, TEXTS, k1, b)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, plain(QUERIES, TEXTS, k1, b), rtol=1e-12)


def test_tokens_of_all_kinds_are_taken():
    expected = bm25(QUERIES, TEXTS)
    words = [[[str(token) for token in text] for text in texts] for texts in (QUERIES, TEXTS)]
    torch.testing.assert_close(bm25(*words), expected)
    tensors = [torch.tensor(text, dtype=torch.int32) for text in TEXTS]
    arrays = [np.array(text) for text in QUERIES]
    torch.testing.assert_close(bm25(arrays, tensors), expected)
    numbers = [tuple(np.int64(token) for token in text) for text in TEXTS]
    torch.testing.assert_close(bm25(QUERIES, numbers), expected)


def test_unknown_words_and_empty_texts_score_nothing():
    assert bm25([[99], []], TEXTS).tolist() == [[0.0] * 20] * 2
    assert bm25([[1]], [[], [1]])[0, 0] == 0


CASES = [
    (lambda: bm25("a text", TEXTS), "`test_tokens` must be a list, a tensor or another sequence"),
    (
        lambda: bm25(["a text"], TEXTS),
        r"`test_tokens\[0\]` must be .* tokens \(ints or str\); split a text into its tokens first",
    ),
    (lambda: bm25([[1]], [[1, 2.5]]), r"`tokens\[0\]` must hold tokens, .* got 2.5"),
    (lambda: bm25([[True]], TEXTS), "each an int or a str; got True"),
    (lambda: bm25([[1]], []), "`tokens` is empty; pass the tokens of at least one example"),
    (lambda: bm25([[1]], [[], []]), "none of the 2 examples in `tokens` has a token"),
    (lambda: bm25([[1]], TEXTS, k1=-1), "`k1` must be a number that is not negative; got -1"),
    (lambda: bm25([[1]], TEXTS, b=2), "`b` must be .* at most 1; got 2"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_what_is_not_tokenized_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
