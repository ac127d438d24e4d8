"""Search for the stored vectors with the largest dot products with a query."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.errors import InvalidArgumentError
from influence_kit.operators.checks import check_matrix
from influence_kit.scoring.reducers import TopK


class NearestNeighbors(ABC):
    """The search that ``TracInCPFastRandProj`` uses; subclass it to use another index."""

    @abstractmethod
    def setup(self, data: Tensor) -> None:
        """Store vectors ``[n, d]``."""

    @abstractmethod
    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices ``[m, k]`` (int64) and dot products ``[m, k]``, largest first, for ``[m, d]``."""


class ExactNearestNeighbors(NearestNeighbors):
    """All dot products, by chunks of the stored vectors; of equal ones the first indices.

    Example:
        >>> index = ExactNearestNeighbors()
        >>> index.setup(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> index.get_nearest_neighbors(torch.tensor([[1.0, 1.0]]), k=2)[0].tolist()
        [[1, 2]]
    """

    def __init__(self) -> None:
        self._data: Tensor | None = None

    def setup(self, data: Tensor) -> None:
        """Store vectors ``[n, d]``."""
        self._data = check_matrix(data, "data", "[n, d]")

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices and dot products of the k largest."""
        if self._data is None:
            raise InvalidArgumentError("there is nothing to search: call setup(data) first")
        reducer = TopK(check_count(k, "k", least=0), proponents=True)
        width = self._data.shape[1]
        data = self._data.to(check_matrix(query, "query", f"[m, {width}]", width))
        step = rows_within(workspace_bytes(query.device), len(query) * query.element_size())
        for start in range(0, len(data), step):
            block = query @ data[start : start + step].T
            reducer.update(torch.arange(start, start + block.shape[1]), block)
        found = reducer.local_result()
        return found.indices, found.influence_scores


class FaissNearestNeighbors(NearestNeighbors):
    """A faiss index of inner products (``pip install influence_kit[ann]``).

    Args:
        factory: faiss's index_factory string. "Flat" is exact; others are approximate: measure
            their recall against ``ExactNearestNeighbors`` on your data.
    """

    def __init__(self, factory: str = "Flat") -> None:
        try:
            import faiss
        except ImportError as error:
            raise InvalidArgumentError(
                "Using `FaissNearestNeighbors` requires installing faiss: "
                "pip install 'influence_kit[ann]'; `ExactNearestNeighbors` needs nothing"
            ) from error
        self._faiss = faiss
        self._factory = factory
        self._index: Any = None

    def setup(self, data: Tensor) -> None:
        """Store vectors ``[n, d]`` (as float32, the only precision of faiss)."""
        vectors = check_matrix(data, "data", "[n, d]").detach().float().cpu().numpy()
        metric = self._faiss.METRIC_INNER_PRODUCT
        self._index = self._faiss.index_factory(vectors.shape[1], self._factory, metric)
        self._index.train(vectors)
        self._index.add(vectors)

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices and dot products of the k largest, as the index finds them."""
        if self._index is None:
            raise InvalidArgumentError("there is nothing to search: call setup(data) first")
        k = min(check_count(k, "k", least=0), self._index.ntotal)
        check_matrix(query, "query", f"[m, {self._index.d}]", self._index.d)
        scores, indices = self._index.search(query.detach().float().cpu().numpy(), k)
        if (indices < 0).any():
            raise InvalidArgumentError(
                f"the index '{self._factory}' found fewer than {k} neighbours of a query; search "
                "more of it (faiss's nprobe), or use `ExactNearestNeighbors`"
            )
        return torch.from_numpy(indices).to(query.device), torch.from_numpy(scores).to(query)
