"""BM25: lexical scores of token sequences, the baseline for text.

Shapes: m test examples, n training examples, V distinct tokens of the test examples.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_number, check_sequence, shown
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.errors import InvalidArgumentError

# the counts of the tokens of each example
Counts = list[Counter[Hashable]]


def bm25(
    test_tokens: Sequence[Any], tokens: Sequence[Any], k1: float = 1.5, b: float = 0.75
) -> Tensor:
    r"""BM25 scores of training texts for test texts, from tokens alone.

    .. math::
        \tau_{ti} = \sum_w q_{tw} \, \ln\Bigl(1 + \frac{n - n_w + 1/2}{n_w + 1/2}\Bigr) \,
        \frac{(k_1 + 1) f_{iw}}{f_{iw} + k_1 (1 - b + b \, L_i / \bar L)}

    q and f count the token w in the test and in the training example, n_w counts the training
    examples that have it, L_i is the length of training example i and L-bar the mean length. The
    logarithm (with 1 +, as Lucene has it) is never negative, and neither are the scores.

    A baseline that attribution methods of language models should beat. It finds the passages that
    state a fact, which need not be those that taught it (arXiv 2410.17413).

    Args:
        test_tokens: the tokens of each test example, m sequences of ints or str, without padding.
        tokens: the tokens of each training example, n sequences. An example without any scores 0.
        k1: how slowly repetitions of a token saturate, at least 0; 0 counts each token once.
        b: how much long examples are held back, 0 (not at all) to 1.

    Returns:
        Scores float64 ``[m, n]``.

    Raises:
        InvalidArgumentError: for texts that are not tokenized, tokens of another type, no examples,
            training examples without any token, or arguments outside their range.

    Example:
        >>> texts = [["a", "cat", "sat"], ["a", "dog", "ran"], ["a", "cat"]]
        >>> bm25([["cat"]], texts).argsort(descending=True).tolist()
        [[2, 0, 1]]
    """
    check_number(k1, "k1", least=0)
    check_number(b, "b", least=0, most=1)
    queries, examples = _counted(test_tokens, "test_tokens"), _counted(tokens, "tokens")
    vocabulary = {
        word: row for row, word in enumerate(dict.fromkeys(w for q in queries for w in q))
    }
    lengths = torch.tensor([sum(count.values()) for count in examples], dtype=torch.float64)
    if not bool(lengths.any()):
        raise InvalidArgumentError(
            f"none of the {len(examples)} examples in `tokens` has a token; pass tokenized texts"
        )
    held_back = k1 * (1 - b + b * lengths / lengths.mean())
    weights = _weights(_matrix(examples, vocabulary), held_back, k1)
    asked = _matrix(queries, vocabulary)
    rows = rows_within(workspace_bytes(torch.device("cpu")), 8 * (len(vocabulary) + len(examples)))
    parts = [
        torch.sparse.mm(weights, asked.index_select(0, some).to_dense().T).T
        for some in torch.arange(len(queries)).split(rows)
    ]
    return torch.cat(parts).contiguous()


def _counted(texts: Any, name: str) -> Counts:
    """The tokens of each example, counted; numbers in tensors and arrays become ints."""
    found: Counts = []
    for index, text in enumerate(check_sequence(texts, name, "token sequences, one per example")):
        words = text.tolist() if isinstance(text, torch.Tensor | np.ndarray) else text
        where = f"{name}[{index}]"
        check_sequence(words, where, "tokens (ints or str); split a text into its tokens first")
        kinds = {type(word) for word in words}
        wrong = [kind for kind in kinds if kind is bool or not issubclass(kind, str | Integral)]
        if wrong:
            other = next(word for word in words if type(word) in wrong)
            raise InvalidArgumentError(
                f"`{where}` must hold tokens, each an int or a str; got {shown(other)}"
            )
        found.append(Counter(words))
    if not found:
        raise InvalidArgumentError(f"`{name}` is empty; pass the tokens of at least one example")
    return found


def _matrix(examples: Counts, vocabulary: dict[Hashable, int]) -> Tensor:
    """How often each example has each token of the vocabulary, sparse float64 ``[n, V]``."""
    entries = [
        (row, vocabulary[word], count)
        for row, words in enumerate(examples)
        for word, count in words.items()
        if word in vocabulary
    ]
    table = torch.tensor(entries, dtype=torch.int64).reshape(-1, 3)
    shape = (len(examples), len(vocabulary))
    return torch.sparse_coo_tensor(
        table[:, :2].T, table[:, 2].double(), shape, check_invariants=True
    ).coalesce()


def _weights(counts: Tensor, held_back: Tensor, k1: float) -> Tensor:
    """What each token of a training example adds to a score, sparse ``[n, V]``."""
    (rows, columns), often = counts.indices(), counts.values()
    having = torch.bincount(columns, minlength=counts.shape[1]).double()
    rarity = torch.log1p((counts.shape[0] - having + 0.5) / (having + 0.5))
    values = rarity[columns] * (k1 + 1) * often / (often + held_back[rows])
    return torch.sparse_coo_tensor(
        counts.indices(), values, counts.shape, check_invariants=True, is_coalesced=True
    )
