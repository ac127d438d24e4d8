"""Scores by token: ``influence(..., per_token=...)`` of methods that are sums of inner products.

Shapes: m test examples, n training examples, k training examples per test example, t tokens, D
documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.distributed import is_alone
from influence_kit.core.objects import is_one_of
from influence_kit.data.batches import Batch, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.token_source import TokenSource
from influence_kit.methods.restarts import check_k, given, starts_again
from influence_kit.methods.side_features import SideFeatures
from influence_kit.scoring.features import chosen_rows
from influence_kit.scoring.reducers import KMostInfluentialResults, TopK
from influence_kit.scoring.term import Term
from influence_kit.scoring.token_groups import Numbered, groups_within, numbered, one_group
from influence_kit.scoring.token_results import (
    AllTokens,
    DocumentSums,
    KMostInfluentialTokens,
    PairTokens,
    TokenScores,
)
from influence_kit.scoring.token_side import TokenSide, is_linear, is_scale
from influence_kit.scoring.token_stream import TokenStream, TokenTerm

# the method, an InnerProductInfluence, which imports this module
Method = Any
PerToken = Literal["train", "test_positions", "test_terms"]
TRAIN, POSITIONS, TERMS = "train", "test_positions", "test_terms"


def check_per_token(
    per_token: Any, doc_ids: Any, aggregate: bool, inputs: Any
) -> list[Tensor] | None:
    """Check the arguments of a call for token scores; returns the documents, if given.

    Raises:
        InvalidArgumentError: for arguments that do not go together.
    """
    if not is_one_of(per_token, (TRAIN, POSITIONS, TERMS)):
        raise InvalidArgumentError(
            f'`per_token` must be "{TRAIN}", "{POSITIONS}", "{TERMS}" or None; got '
            f"{shown(per_token)}"
        )
    if per_token != TRAIN and aggregate:
        raise InvalidArgumentError(
            f'aggregate=True sums the test examples, whose tokens per_token="{per_token}" is for; '
            f'pass per_token="{TRAIN}", or aggregate=False'
        )
    if per_token != TRAIN and isinstance(inputs, Tensor):
        raise InvalidArgumentError(
            "`inputs` are test gradients that were computed before, which do not show the tokens "
            f'of test examples; pass the examples, or per_token="{TRAIN}"'
        )
    return None if doc_ids is None else _checked_documents(doc_ids, per_token)


def _checked_documents(doc_ids: Any, per_token: str) -> list[Tensor]:
    if per_token != TRAIN:
        raise InvalidArgumentError(
            f'`doc_ids` are of training tokens; pass per_token="{TRAIN}" with them; got '
            f'"{per_token}"'
        )
    known = isinstance(doc_ids, list | tuple) or (isinstance(doc_ids, Tensor) and doc_ids.dim() > 0)
    rows: list[Any] = list(doc_ids) if known else [None]
    for row in rows:
        whole = isinstance(row, Tensor) and row.dtype in (torch.int64, torch.int32)
        if not whole or row.dim() != 1:
            raise InvalidArgumentError(
                "`doc_ids` must be whole numbers [n, t], one per training token (or a list of n "
                f"tensors [t]), -1 for tokens of no document; got {shown(doc_ids)}"
            )
    if not rows:
        raise InvalidArgumentError("`doc_ids` is empty; there must be one row per training example")
    return [row.detach().cpu().long() for row in rows]


@starts_again
def token_influence(
    method: Method,
    inputs: Any,
    k: int | None,
    proponents: bool,
    show_progress: bool,
    aggregate: bool,
    per_token: PerToken,
    doc_ids: Any,
) -> Tensor | KMostInfluentialResults | KMostInfluentialTokens:
    """What ``InnerProductInfluence.influence`` returns with ``per_token``."""
    check_k(k)
    documents = check_per_token(per_token, doc_ids, aggregate, inputs)
    call = TokenInfluence(method, per_token, inputs, show_progress, aggregate)
    if documents is not None:
        return call.of_documents(documents, k, proponents)
    return call.all() if k is None else call.of_pairs(call.best(k, proponents))


class TokenInfluence:
    """One call of ``influence`` with ``per_token``.

    Args:
        method: the method.
        per_token: the argument.
        inputs: the test examples.
        show_progress: whether to show a bar.
        aggregate: whether test examples are summed.
    """

    def __init__(
        self,
        method: Method,
        per_token: PerToken,
        inputs: Any,
        show_progress: bool,
        aggregate: bool,
    ) -> None:
        self.method, self.per_token = method, per_token
        self.inputs, self.show_progress, self.aggregate = given(inputs), show_progress, aggregate

    def all(self) -> Tensor:
        """All scores, ``[m, n, t]``."""
        sample, n = self.method._sample, self.method._examples.train_count
        return self._run(AllTokens(sample, self._count(), n), None)

    def of_pairs(self, best: KMostInfluentialResults) -> KMostInfluentialTokens:
        """The scores of the tokens of the best pairs."""
        if not best.indices.numel():
            empty = best.influence_scores.new_zeros(*best.indices.shape, 0)
            return KMostInfluentialTokens(*best, empty)
        kept = PairTokens(best.indices, self.method._sample)
        found = self._run(kept, best.indices.unique().cpu())
        return KMostInfluentialTokens(*best, found.to(best.influence_scores))

    def best(self, k: int, proponents: bool) -> KMostInfluentialResults:
        """The k best training examples, by the scores of examples."""
        reducer = self.method.make_reducer(k, proponents)
        doing = "find the training examples for token scores. Processing training batches"
        self.method.stream_scores(self.inputs, reducer, doing, self.show_progress, self.aggregate)
        found = reducer.result()
        assert isinstance(found, KMostInfluentialResults)
        return found

    def of_documents(
        self, documents: Sequence[Tensor], k: int | None, proponents: bool
    ) -> Tensor | KMostInfluentialResults:
        """The scores ``[m, D]``, or the k best documents."""
        sums = self._run(DocumentSums(documents, self.method._sample), None)
        if k is None:
            return sums
        best = TopK(k, proponents)
        best.update(torch.arange(sums.shape[1]), sums)
        return best.local_result()

    def _count(self) -> int:
        """The number of test examples, 0 if they would have to be read."""
        inputs = self.inputs
        if self.aggregate:
            return 1
        if isinstance(inputs, Tensor):
            return len(inputs)
        return example_count(inputs) if isinstance(inputs, tuple | list | dict) else 0

    def _run(self, scores: TokenScores, chosen: Tensor | None) -> Tensor:
        """One pass, over all training examples or the chosen ones."""
        method = self.method
        with method.session() as loader:
            ordered = not self.aggregate
            terms, tests = method._plan(loader, self.inputs, ordered, self.show_progress)
            by_train = self.per_token == TRAIN
            doing = f"compute {self.per_token} token scores for training batches"
            total = len(chosen) if chosen is not None else method._examples.train_count
            with method.progress(doing, None, self.show_progress) as bar:
                stream = TokenStream(
                    [self._by_token(term) for term in terms],
                    loader,
                    method._sample,
                    scores,
                    total,
                    method.train_weights(),
                    bar.update,
                )
                if by_train:
                    stream.of_train(tests, self._train(chosen, cached=False), self.aggregate)
                else:
                    self._of_tests(stream, terms, list(tests), chosen)
            n = stream.n if chosen is None else method._examples.train_count
            return scores.result(stream.m, n).to(method._dtype)

    def _of_tests(
        self, stream: TokenStream, terms: Sequence[Term], tests: list[Batch], chosen: Tensor | None
    ) -> None:
        method = self.method
        solved = any(term.test.solve is not None for term in terms)
        # ranks have different training examples, but solve together
        solves_tests = solved and not (method.is_symmetric and is_alone())
        groups: Iterable[Any] = one_group(tests)
        holds_products = stream.takes_products(solves_tests)
        if not holds_products and (solves_tests or self.per_token == TERMS):
            row_bytes = self._width * method._sample.element_size()
            groups = groups_within(tests, row_bytes, self.per_token == TERMS, method.device)
        train = partial(self._train, chosen, cached=True)
        stream.of_tests(groups, train, solves_tests)

    @property
    def _width(self) -> int:
        """The entries of an example's features."""
        return sum(shape.numel() for shape in self.method._map.shapes.values())

    def _train(self, chosen: Tensor | None, cached: bool) -> Iterator[Numbered]:
        """The training examples, or the chosen ones, in batches with their indices."""
        method = self.method
        if chosen is None:
            yield from numbered(method._train_batches if cached else method.train_dataloader)
            return
        for start, rows, batch in chosen_rows(method.train_dataloader, chosen, lambda: None):
            whole = len(rows) == example_count(batch)
            yield start + rows, batch if whole else take(batch, rows)

    def _by_token(self, term: Term) -> TokenTerm:
        """A term with its side by token."""
        method = self.method
        side = term.train if self.per_token == TRAIN else term.test
        features: Any = side.features
        if not isinstance(features, SideFeatures):
            self._refuse("made in another way than as the gradients of one batch")
        for transform in side.transforms:
            # features are all that is cached of tokens
            if not (
                is_scale(transform) or is_linear(transform) or transform == method._map.of_cached
            ):
                self._refuse(f"transformed by {_name(transform)}, which is not linear in them")
        source = TokenSource(method._source, "term" if self.per_token == TERMS else "position")
        found = method._map.with_source(source)
        whole = sum(shape.numel() for shape in found.gradient_shapes.values())
        # the gradients of terms are made one by one
        is_whole = found.writes_out or (found.is_short and self.per_token == TERMS)
        size = whole if is_whole else self._width if found.is_short else 0
        row_bytes = size * method._sample.element_size()
        side_by_token = TokenSide(
            features.by(found), source, side.transforms, row_bytes, features.loss
        )
        return TokenTerm(term, side_by_token)

    def _refuse(self, why: str) -> None:
        side = "training" if self.per_token == TRAIN else "test"
        raise NotImplementedError(
            f'{self.method.get_name()} has no scores for per_token="{self.per_token}": its '
            f"{side} gradients are {why}, so that they are no sum over tokens. GradDot, GradCos, "
            "TracInCP, influence functions, LoGra and TRAK have them"
        )


def _name(transform: Any) -> str:
    function = getattr(transform, "func", transform)
    return str(getattr(function, "__qualname__", type(function).__name__))
