"""An index gives the largest inner products, best first, or says why it cannot."""

import sys

import pytest
import torch

from influence_kit import ExactNearestNeighbors, FaissNearestNeighbors
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.tracin import nearest_neighbors

N, DIM = 60, 5
DATA = torch.randn(N, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
QUERY = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def faiss(factory: str = "Flat") -> FaissNearestNeighbors:
    pytest.importorskip("faiss")
    return FaissNearestNeighbors(factory)


@pytest.mark.parametrize("k", [1, 7, N, N + 3])
@pytest.mark.parametrize(("make", "rtol"), [(ExactNearestNeighbors, 1e-12), (faiss, 1e-5)])
def test_an_exact_index_gives_what_sorting_all_products_gives(make, rtol, k):
    index = make()
    index.setup(DATA)
    places, scores = index.get_nearest_neighbors(QUERY, k)
    expected = (QUERY @ DATA.T).sort(dim=1, descending=True, stable=True)
    assert places.dtype == torch.int64
    assert torch.equal(places, expected.indices[:, :k])
    torch.testing.assert_close(scores, expected.values[:, :k], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("rows", [1, 7, 59, 60, 1000])
def test_the_exact_index_gives_the_same_in_chunks_of_any_size(monkeypatch, rows):
    monkeypatch.setattr(nearest_neighbors, "rows_within", lambda budget, row_bytes: rows)
    index = ExactNearestNeighbors()
    index.setup(DATA.round())
    places, scores = index.get_nearest_neighbors(QUERY.round(), 9)
    expected = (QUERY.round() @ DATA.round().T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, expected.indices[:, :9])
    assert torch.equal(scores, expected.values[:, :9])


@pytest.mark.parametrize("make", [ExactNearestNeighbors, faiss])
def test_an_index_without_vectors_is_refused(make):
    index = make()
    with pytest.raises(InvalidArgumentError, match=r"nothing to search: call setup\(data\) first"):
        index.get_nearest_neighbors(QUERY, 1)


def test_places_that_an_approximate_index_did_not_find_are_refused():
    index = faiss("IVF4,Flat")  # searches one of four lists
    index.setup(DATA)
    with pytest.raises(InvalidArgumentError, match="'IVF4,Flat' found fewer than 60 neighbours"):
        index.get_nearest_neighbors(QUERY, N)


def test_without_faiss_its_index_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    match = r"requires installing faiss: pip install 'influence_kit\[ann\]'; `ExactNear"
    with pytest.raises(InvalidArgumentError, match=match):
        FaissNearestNeighbors()
