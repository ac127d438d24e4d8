"""What is kept of blocks of scores is what a stable sort of all scores gives, however they come."""

import pytest
import torch

from influence_kit.scoring import reducers
from influence_kit.scoring.reducers import (
    AllScores,
    KMostInfluentialResults,
    TopK,
    Weighted,
    WholeRows,
)

M, N = 4, 37


def scores_of(kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "distinct":
        return torch.randn(M, N, generator=generator, dtype=dtype)
    if kind == "many ties":
        return torch.randint(-1, 2, (M, N), generator=generator).to(dtype)
    if kind == "all equal":
        return torch.full((M, N), 0.5, dtype=dtype)
    # zeros of both signs are equal
    return torch.zeros(M, N, dtype=dtype) * torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)


KINDS = ["distinct", "many ties", "all equal", "signed zeros"]


def chunk_sizes(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while sum(sizes) < N:
        drawn = int(torch.randint(1, 12, (), generator=generator))
        sizes.append(min(drawn, N - sum(sizes)))
    return sizes


CHUNKS = {
    "one block": [N],
    "one by one": [1] * N,
    "an empty block": [0, N],
    **{f"random {seed}": chunk_sizes(seed) for seed in range(4)},
}


def fed(reducer, scores: torch.Tensor, sizes: list[int]):
    places = torch.arange(N)
    for some, block in zip(places.split(sizes), scores.split(sizes, dim=-1), strict=True):
        reducer.update(some, block)
    return reducer


@pytest.mark.parametrize("proponents", [True, False], ids=["proponents", "opponents"])
@pytest.mark.parametrize("k", [0, 1, 5, N - 1, N, N + 5])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_best_of_any_chunks_are_those_of_a_stable_sort(kind, chunks, k, proponents):
    scores = scores_of(kind)
    found = fed(TopK(k, proponents), scores, CHUNKS[chunks]).result()
    expected = scores.sort(dim=1, descending=proponents, stable=True)
    assert isinstance(found, KMostInfluentialResults)
    assert found.indices.dtype == torch.int64
    assert torch.equal(found.indices, expected.indices[:, :k])
    assert torch.equal(found.influence_scores, expected.values[:, :k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_best_scores_have_the_dtype_they_came_in(dtype):
    scores = scores_of("many ties", dtype)
    found = fed(TopK(3, True), scores, CHUNKS["random 0"]).result()
    assert found.influence_scores.dtype == dtype
    assert torch.equal(found.indices, scores.sort(dim=1, descending=True, stable=True)[1][:, :3])


def test_places_are_the_training_sets_not_the_blocks():
    reducer = TopK(2, True)
    reducer.update(torch.tensor([10, 11, 12]), torch.tensor([[1.0, 3.0, 2.0]]))
    reducer.update(torch.tensor([30, 31]), torch.tensor([[3.0, 9.0]]))
    assert reducer.result().indices.tolist() == [[31, 11]]


@pytest.mark.parametrize("k", [0, 3, 10])
def test_no_more_than_k_scores_of_a_test_example_are_kept_between_blocks(k):
    reducer = TopK(k, True)
    seen = 0
    for places in torch.arange(N).split(6):
        reducer.update(places, scores_of("many ties")[:, places])
        seen += len(places)
        for kept in (reducer._scores, reducer._indices):
            assert kept.shape == (M, min(k, seen))
            assert kept.untyped_storage().nbytes() == kept.numel() * 8


def test_blocks_are_not_changed():
    scores = scores_of("distinct")
    before = scores.clone()
    fed(TopK(3, False), scores, CHUNKS["random 1"]).result()
    assert torch.equal(scores, before)


def test_without_examples_nothing_is_best():
    reducer = TopK(3, True)
    reducer.update(torch.arange(0), torch.zeros(M, 0))
    found = reducer.result()
    assert found.indices.shape == found.influence_scores.shape == (M, 0)


@pytest.mark.parametrize("leading", [(), (2,), (2, M)], ids=["[n]", "[m, n]", "[*, m, n]"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_all_scores_of_any_chunks_are_all_scores(chunks, leading):
    scores = torch.randn(*leading, N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fed(AllScores(), scores, CHUNKS[chunks]).result(), scores)


def test_what_the_reducers_keep_tells_the_loop_whether_to_make_small_blocks():
    assert (AllScores.keeps_all, TopK.keeps_all) == (True, False)
    assert (WholeRows(None, True).keeps_all, WholeRows(2, True).keeps_all) == (True, False)


@pytest.mark.parametrize("proponents", [True, False], ids=["proponents", "opponents"])
@pytest.mark.parametrize("k", [None, 0, 1, 5, N + 5])
@pytest.mark.parametrize("sizes", [[M], [1] * M, [3, 0, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows_are_kept_as_blocks_of_columns_are(kind, sizes, k, proponents):
    scores = scores_of(kind)
    reducer = WholeRows(k, proponents)
    for rows in torch.arange(M).split(sizes):
        reducer.update(rows, scores[rows])
    found = reducer.result()
    if k is None:
        assert torch.equal(found, scores)
        return
    expected = fed(TopK(k, proponents), scores, CHUNKS["one block"]).result()
    assert isinstance(found, KMostInfluentialResults)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.influence_scores, expected.influence_scores)


# Ranks: each keeps its own, which are gathered at the end.


@pytest.fixture
def merged(monkeypatch):
    """The result of this rank's reducer when another rank contributes the given tensors."""

    def result(mine, *theirs):
        others = iter(theirs)
        monkeypatch.setattr(reducers, "is_alone", lambda: False)
        monkeypatch.setattr(
            reducers, "gather_columns", lambda tensor: torch.cat([tensor, next(others)], dim=-1)
        )
        return mine.result()

    return result


def every_other(make, scores):
    """What two ranks keep of the blocks that each computes."""
    ranks = make(), make()
    for number, places in enumerate(torch.arange(N).split(5)):
        ranks[number % 2].update(places, scores[:, places])
    return ranks


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_two_ranks_are_the_best_of_all(merged, kind, proponents):
    scores = scores_of(kind)
    mine, other = every_other(lambda: TopK(6, proponents), scores)
    found = merged(mine, other._scores, other._indices)
    expected = scores.sort(dim=1, descending=proponents, stable=True)
    assert torch.equal(found.indices, expected.indices[:, :6])
    assert torch.equal(found.influence_scores, expected.values[:, :6])


def test_all_scores_of_two_ranks_are_in_the_order_of_the_training_set(merged):
    scores = scores_of("distinct")
    mine, other = every_other(AllScores, scores)
    # places are gathered before scores
    found = merged(mine, torch.cat(other._indices), torch.cat(other._blocks, dim=1))
    assert torch.equal(found, scores)


@pytest.mark.parametrize("k", [None, 3])
def test_whole_rows_of_two_ranks_are_in_the_order_of_the_test_examples(merged, k):
    scores = scores_of("many ties")
    mine, other = WholeRows(k, True), WholeRows(k, True)
    mine.update(torch.tensor([0, 2]), scores[[0, 2]])
    other.update(torch.tensor([1, 3]), scores[[1, 3]])
    # of each tensor that is kept, places are gathered before it
    theirs = [part for kept in other._kept for part in (kept._indices[0], kept._blocks[0].T)]
    found = merged(mine, *theirs)
    if k is None:
        assert torch.equal(found, scores)
    else:
        expected = fed(TopK(k, True), scores, [N]).local_result()
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.influence_scores, expected.influence_scores)


# Weights of the training examples.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_scores(kind: str, sizes: list[int], dtype: torch.dtype) -> None:
    """Each column times its weight, which may be negative, zero, or not known at first."""
    scores = scores_of(kind, dtype)
    known: dict[str, torch.Tensor] = {}
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    weights[5] = 0
    expected = scores * weights.to(dtype)
    every = Weighted(AllScores(), lambda: known["weights"])
    best = [Weighted(TopK(5, proponents), lambda: known["weights"]) for proponents in (True, False)]
    assert every.keeps_all
    assert not best[0].keeps_all
    known["weights"] = weights
    assert torch.equal(fed(every, scores, sizes).result(), expected)
    for reducer, highest in zip(best, (True, False), strict=True):
        found = fed(reducer, scores, sizes).result()
        order = expected.sort(dim=1, descending=highest, stable=True)
        assert torch.equal(found.influence_scores, order.values[:, :5])
        assert torch.equal(found.indices, order.indices[:, :5])


def test_weighted_blocks_are_not_changed() -> None:
    scores = scores_of("distinct")
    before = scores.clone()
    fed(Weighted(AllScores(), lambda: torch.zeros(N)), scores, [N])
    assert torch.equal(scores, before)
