"""TracIn of the last layer through stored, projected vectors: arXiv 2002.08484, section 4."""

import math
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.core.arguments import check_count, shown
from influence_kit.core.draws import check_seed
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.caches import Cache
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.restarts import check_k, given, refuse_tokens, starts_again
from influence_kit.methods.tracin.nearest_neighbors import ExactNearestNeighbors, NearestNeighbors
from influence_kit.methods.tracin.tracin_fast import TracInCPFast
from influence_kit.projections.maps import Identity
from influence_kit.projections.projection import Projection, whole
from influence_kit.projections.random_maps import random_map
from influence_kit.projections.unit_maps import TwoSided
from influence_kit.projections.units import units_of
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.scoring.term import Term

# the vectors that an index was last set up with
OWNERS: WeakKeyDictionary[NearestNeighbors, Tensor] = WeakKeyDictionary()


class StoredVectors(Cache):
    """The cached vectors of the training set."""

    vectors: Tensor | None = None

    @property
    def since(self) -> str | None:
        """What was done when they were computed."""
        return None if self.vectors is None else "the vectors of the training set were stored"

    def clear(self) -> None:
        """Drop them."""
        self.vectors = None


@documented
class TracInCPFastRandProj(TracInCPFast):
    r"""score = <v(test), v(train)>, v = sqrt(learning rate) * (J^T d) (A^T [a, 1])^T.

    v has such a block for each checkpoint; d is the gradient of the loss at the layer's
    output, a its input.

    The vectors of the whole training set are computed once, cached in memory and searched. Without
    ``projection_dim``, J and A are left out and the scores are those of ``TracInCPFast``; with it
    J and A are Gaussian with independent entries of variance 1 / columns, and the scores unbiased
    estimates of those (arXiv 2002.08484).

    Args:
        nearest_neighbors: the index that finds the ``k`` best; an exact one if None.
        projection_dim: the largest number of entries of a vector per checkpoint: both sides are
            projected to ``int(sqrt(projection_dim))`` columns if the layer's gradient has more
            entries.
        seed: the seed of the projection. The other arguments are those of ``TracInCPFast``.

    Raises:
        InvalidArgumentError: as ``TracInCPFast``; for a negative learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: str | nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        vectorize: bool = False,
        nearest_neighbors: NearestNeighbors | None = None,
        projection_dim: int | None = None,
        seed: int = 0,
        *,
        count_bias: bool = True,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        warnings.warn(
            "WARNING: Using this implementation stores quantities related to the entire "
            "`train_dataset` in memory, one vector per example and checkpoint; TracInCPFast does "
            "not",
            stacklevel=3,
        )
        if projection_dim is not None:
            projection_dim = check_count(projection_dim, "projection_dim", instead="None")
        self.nearest_neighbors = _checked(nearest_neighbors)
        self.projection_dim = projection_dim
        self.seed = check_seed(seed)
        super().__init__(
            model,
            final_fc_layer,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            loss_fn,
            batch_size,
            test_loss_fn,
            vectorize,
            count_bias=count_bias,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        self._stored = self._caches.add(StoredVectors(), first=True)

    def terms(self) -> list[Term]:
        """One term per checkpoint, with the same projection for test and training gradients."""
        layer = self._layer
        projection = Projection({layer.unit.names[0]: layer})
        indices = range(len(self.checkpoints))
        return [Term(self.test_at(c, projection), self.train_at(c, projection)) for c in indices]

    @property
    def _layer(self) -> TwoSided:
        """The layer's matrix, projected if that is requested and makes it shorter."""
        (unit,) = units_of(self.model, self._parameters)
        dim, sizes = self.projection_dim, (unit.outputs, unit.inputs)
        if dim is None or unit.outputs * unit.inputs <= dim:
            return whole(unit)
        # Captum's widths: a short side does not make the other one wider
        left, right = (
            random_map("gaussian", size, min(math.isqrt(dim), size), self.seed, side)
            for size, side in zip(sizes, ("deltas", "inputs"), strict=True)
        )
        return TwoSided(unit, left, right)

    @property
    def projection_quantities(self) -> tuple[Tensor, Tensor] | None:
        """The matrices J and A, or None without a projection."""
        self._see_model()
        layer, sample = self._layer, next(iter(self._parameters.values())).detach()
        if isinstance(layer.left, Identity):
            return None
        return layer.left.matrix(sample), layer.right.matrix(sample)

    @property
    @starts_again
    def src_intermediate_quantities(self) -> Tensor:
        """The stored vectors of the training set, ``[n, C * D]``, computed in the first call."""
        self._check_kept()
        return self._vectors_stored()

    def _vectors_stored(self) -> Tensor:
        """The same, without checking the cache again."""
        stored = self._stored.vectors
        if stored is None:
            stored = self._finite(self._vectors(None, of_tests=False), "training")
            self._stored.vectors = stored
            self._caches.note()
        # another object may have set up the index with its own vectors since
        if OWNERS.get(self.nearest_neighbors) is not stored:
            self.nearest_neighbors.setup(stored)
            OWNERS[self.nearest_neighbors] = stored
        return stored

    def _finite(self, vectors: Tensor, kind: str) -> Tensor:
        bad = torch.nonzero(~torch.isfinite(vectors).all(1))[:, 0].tolist()
        if bad and self.layers:
            raise NonFiniteError(
                f"the gradients of layer '{self.layers[0]}' are NaN or infinite for the {kind} "
                f"examples {bad[:10]}; look at those examples and at the loss there"
            )
        return vectors

    @starts_again
    def influence(  # type: ignore[override] # k has Captum's default here, 5
        self,
        inputs: Any = None,
        k: int | None = 5,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: str | None = None,
        doc_ids: Any = None,
    ) -> Tensor | KMostInfluentialResults:
        """The k best training examples for each test example; all scores if ``k`` is None."""
        refuse_tokens(self.get_name(), per_token, doc_ids)
        check_k(k)
        query = self._vectors(given(inputs), of_tests=True, aggregate=aggregate)
        query = self._finite(query, "test")
        stored = self._vectors_stored()
        if k is None:
            step = rows_within(workspace_bytes(stored.device), stored[0].nbytes)
            chunks = (stored[start : start + step] for start in range(0, len(stored), step))
            return torch.cat([query @ chunk.T for chunk in chunks], dim=1)
        sign = 1 if proponents else -1
        indices, scores = self.nearest_neighbors.get_nearest_neighbors(sign * query, k)
        return KMostInfluentialResults(indices, sign * scores)

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """Refused: ``TracInCPFast`` computes it exactly, without stored vectors."""
        message = (
            "self influence is not computed from projected vectors: "
            "`TracInCPFast.self_influence` is exact and takes less memory"
        )
        warnings.warn(message, stacklevel=2)
        raise NotImplementedError(message)


def _checked(index: NearestNeighbors | None) -> NearestNeighbors:
    if index is None:
        return ExactNearestNeighbors()
    # also Captum's, which are not subclasses
    methods = (getattr(index, name, None) for name in ("setup", "get_nearest_neighbors"))
    if not all(map(callable, methods)):
        raise InvalidArgumentError(
            "`nearest_neighbors` must be a NearestNeighbors, such as `ExactNearestNeighbors()`, or "
            f"None; got {shown(index)}"
        )
    return index
