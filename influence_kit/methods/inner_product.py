"""Methods whose scores are sums of inner products, as a list of terms.

Shapes: m test examples, n training examples, P chosen parameters, C checkpoints.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.objects import check_dtype, check_path
from influence_kit.data.batches import Batch, example_count, take, to_device
from influence_kit.data.loaders import loader_length
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap, check_feature_map
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.parameter_selection import group_by_layer
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import describes_arguments
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.gradient_cache import (
    CacheBuild,
    CachedBatch,
    CachedGradients,
    GradientCache,
    LearntFeatures,
    fits_memory,
)
from influence_kit.methods.identity import identity
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.optimizer_state import (
    Optimizer,
    check_optimizer,
    optimizer_fingerprint,
)
from influence_kit.methods.restarts import given, starts_again
from influence_kit.methods.side_features import SideFeatures
from influence_kit.methods.term_vectors import term_vectors
from influence_kit.methods.terms_by_parameter import terms_by_parameter
from influence_kit.methods.token_influence import PerToken, token_influence
from influence_kit.scoring.adam_directions import AdamDirections, check_names
from influence_kit.scoring.features import chosen_rows
from influence_kit.scoring.reducers import AllScores, KMostInfluentialResults, Reducer
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term
from influence_kit.scoring.token_results import KMostInfluentialTokens
from influence_kit.scoring.watch import Watch


@describes_arguments
class InnerProductInfluence(ExampleInfluence):
    """A method given by its ``terms``: score = sum of weight * <test features, train features>.

    Args:
        model: the model. Every call leaves it unchanged.
        train_dataset: a ``Dataset`` or sequence of examples, or a ``DataLoader`` (or other
            re-iterable of batches) that does not shuffle; ``(*model_inputs, targets)`` or dicts.
        checkpoints: a folder, a glob, a list of paths, or any iterable of paths or state dicts;
            ``select_checkpoints`` chooses a few of many.
        checkpoints_load_func: ``load(model, checkpoint) -> learning rate``, which loads into
            the model in place.
        layers: the modules whose parameters count: a name, a pattern of names
            (``"transformer.h.*.mlp"``; ``*`` is any characters, ``?`` one, ``[ab]`` one of these),
            a module of the model, or a list of these; all parameters inside count, each once. None
            for all parameters that require a gradient. The attribute ``layers`` is a list of names.
        loss_fn: ``loss_fn(outputs, targets)`` (of a dict batch: ``loss_fn(outputs, batch)``), one
            value per example, or their sum or mean: the scores are the same. None differentiates
            the model's output (of a dict batch: the loss that the model returns).
        batch_size: training examples per batch, if ``train_dataset`` is a ``Dataset``. "auto"
            derives it from the memory that one example takes. The scores do not depend on it.
        test_loss_fn: the loss of test examples, lower is better; ``loss_fn`` if None. A positive
            score means that training lowered it. A function where higher is better is passed as
            ``test_output_fn``.
        test_output_fn: used instead of it: ``test_output_fn(outputs, targets)`` (of a dict batch:
            ``(outputs, batch)``), higher is better: a margin, a log-probability, a prediction. One
            value per example, or their sum or mean. Scores are those of ``test_loss_fn`` =
            -``test_output_fn``: positive if training raised it.
        sample_wise_grads_per_batch: None accepts a loss of any reduction. True requires "sum" or
            "mean", False requires "none", as in Captum; the speed is the same.
        eval_mode: put the model into evaluation mode while scores are computed.
        batch_axes: the dimension that counts examples, for each tensor of a batch, in the structure
            of the batch: ``(1, 0)`` for time-first inputs and targets, ``{"weights": None}`` for a
            tensor that belongs to the whole batch. Found from the batches if None.
        verify: "repeated" compares some batches of every call with autograd (listed on the page
            "What is checked, and when"), "once" trusts the check of the first batch.
        features: the map that is applied to gradients before their inner products are taken, the
            same for test and training examples (``influence_kit.projections.Projected``); None
            takes the gradients themselves.
        optimizer: "adam": training examples have the direction of Adam's next step on them in place
            of their gradient, as in ``LESS``, before ``features`` and everything else; test
            gradients stay. The moments are read from the ``torch.optim.Adam`` or ``AdamW`` that
            each checkpoint holds beside the weights (see ``LESS``). None for the gradient, the
            direction of SGD.
        parameter_names: the names of the optimizer's parameters in its order. None takes the
            model's order (all its parameters, or those that require a gradient) within each
            parameter group, where the shapes allow only one such order.
        store: a folder for the training set's gradients (projected, if the method projects): the
            first call builds it, later calls and other processes read it. A build that was
            interrupted is continued; a folder that was made for another model, data set, loss or
            projection is refused. None writes no files.
        store_dtype: the dtype of the stored numbers: float16 and bfloat16 halve the size; the
            model's precision if None.

    Raises:
        InvalidArgumentError: (a ``ValueError``) for invalid arguments; in a call, for an
            ``optimizer`` whose state a checkpoint does not hold.
        UnknownLayerError: for layers that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        features: FeatureMap | None = None,
        optimizer: Optimizer | None = None,
        parameter_names: Sequence[str] | None = None,
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        if store is not None:
            check_path(store, "store", "None")
        if store_dtype is not None:
            check_dtype(store_dtype, "store_dtype")
        check_optimizer(optimizer, parameter_names)
        self.features = check_feature_map(features, optimizer)
        self.optimizer: str | None = optimizer
        self.parameter_names = check_names(parameter_names)
        self._is_directed = optimizer is not None
        self._directions: AdamDirections | None = None
        self.store, self.store_dtype = store, store_dtype
        self._cache = self._caches.add(GradientCache(store))
        self._learnt = self._caches.add(LearntFeatures())
        self._bind(self._bind_features)

    def _bind_features(self) -> None:
        direction = self._direction if self._is_directed else None
        self._map = self._learnt.map = self.features.bound_to(self._source, direction)
        if self._is_directed and self._map.cached_shapes != self._map.shapes:
            self._caches.sources["checkpoints"] = self._optimizer_fingerprint

    # The definition of a method.

    @abstractmethod
    def terms(self) -> list[Term]:
        """The terms of the score."""

    def train_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Features of the training loss at a checkpoint, transformed."""

        def features(batch: Batch) -> Gradients:
            return self._map.of_cached(self._cached(checkpoint, batch))

        if self._is_directed:
            directed = (self._map.directed(checkpoint), *transforms)
            return Side(checkpoint, partial(self._cached, checkpoint), directed)
        found = SideFeatures(checkpoint, features, self._train_loss, of_tests=False)
        return Side(checkpoint, found, transforms)

    def test_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Features of the test loss at a checkpoint, transformed."""

        def features(batch: Batch) -> Gradients:
            return self._map.features(checkpoint, batch, self._test_loss)

        if self._is_directed:  # also of training examples that are scored with themselves
            transforms = (self._map.of_cached, *transforms)
        found = SideFeatures(checkpoint, features, self._test_loss, of_tests=True)
        return Side(checkpoint, found, transforms)

    def prepare(self, loader: CheckpointLoader, show_progress: bool = False) -> None:
        """Compute what the terms need: the gradients of the training set, if they are cached."""
        if not self._map.is_learnt:
            loader.load(0)
            n = sum(example_count(batch) for batch in self.train_dataloader)
            self._map.learn(self._examples_at, n, self._train_loss)
        if self._cache.rows is None:
            self._cache.rows = self._cached_gradients(loader, show_progress)

    @contextmanager
    def session(self) -> Iterator[CheckpointLoader]:
        with super().session() as loader:
            if self._is_directed:
                self._directions = AdamDirections(
                    self.model, self.checkpoints, self.parameter_names
                )
            try:
                yield loader
            finally:
                self._directions = None

    # whether the inverse of ``solve`` is a symmetric linear map
    is_symmetric = False

    def train_weights(self) -> Callable[[], Tensor] | None:
        """A function for numbers ``[n]`` that the scores of training examples are multiplied by."""
        return None

    # What a user calls.

    @overload
    def influence(
        self,
        inputs: Any = None,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: PerToken | None = None,
        doc_ids: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: None = None,
        doc_ids: None = None,
    ) -> KMostInfluentialResults: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: PerToken,
        doc_ids: None = None,
    ) -> KMostInfluentialTokens: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: PerToken,
        doc_ids: Tensor | Sequence[Tensor],
    ) -> KMostInfluentialResults: ...

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: PerToken | None = None,
        doc_ids: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | KMostInfluentialResults | KMostInfluentialTokens:
        r"""The scores of all training examples for each test example, or the k best.

        .. math::
            \text{score}_{ij} = \sum_s \text{score}_{ijs}

        With ``per_token`` also their parts by token, which sum to the scores. Gradients are sums
        over the positions s at which layers act, :math:`\sum_s \delta_s a_s^T` of a linear layer,
        so that a score is the sum of :math:`\delta_s^T V a_s`, with V the gradient of the other
        example (preconditioned, if the method does that).

        Args:
            inputs: test examples: one batch (tuple, list or dict), a DataLoader, or a Dataset,
                which is batched like the training set.
            k: how many proponents or opponents to return; None for all scores.
            proponents: the highest scores; False for the lowest.
            show_progress: a bar over the training set, and before it one over the checkpoints if
                something is fitted or cached at each.
            aggregate: the influence on the sum of the test examples' losses (or outputs): one row.
            per_token: None for scores of examples. "train": by token of the training example, the
                part of its gradient that passes through the position. "test_positions": the same
                by token of the test example. "test_terms": by the token's own term of the test
                example's loss, the effect on the prediction of that token; the terms that the loss
                ignores (padding, a prompt) are 0. It takes a forward-mode pass over the test
                examples per training example (with projected gradients, a backward pass per
                token); the others take no other pass.
            doc_ids: with "train": the document of each training token, whole numbers ``[n, t]`` (or
                n tensors ``[t]``), -1 for none: scores are summed by document.

        Returns:
            Scores ``[m, n]`` (``[1, n]`` if ``aggregate``) in the order of the training set, or
            ``KMostInfluentialResults`` of ``[m, min(k, n)]``. Positive: a proponent, training on it
            lowered the test loss (raised ``test_output_fn``, if that is given). Scores have the
            model's precision, and float32 for a model in half precision. Complex parameters count
            as pairs of real numbers: an inner product of gradients is Re(conj(g) . g').

            With ``per_token`` ``[m, n, t]``, t the number of tokens of the longest example (beyond
            the tokens of a shorter batch scores are 0); with ``k`` ``KMostInfluentialTokens``, in
            memory for m * k * t. With ``doc_ids`` ``[m, D]``, D the largest document plus 1; with
            ``k`` the k best documents as ``KMostInfluentialResults``. If the inverse curvature is
            found by iterations (conjugate gradients), sums over test tokens equal the scores to its
            tolerance.

        Raises:
            InvalidArgumentError: with ``per_token``, for parameters without a gradient per position
                (those without a rule of a layer, of convolutions, of layers that act at another
                number of positions: ``layers`` can leave them out); for "test_terms", if the loss
                does not show the term of each token; if all token scores do not fit the memory.
            NotImplementedError: with ``per_token``, for methods whose gradients are no sum over
                tokens (``DVEmb``, ``RepresenterPointSelection``, the training side of ``LESS``).
        """
        if per_token is None:
            if doc_ids is not None:
                raise InvalidArgumentError('`doc_ids` needs per_token="train"; got None')
            return super().influence(inputs, k, proponents, show_progress, aggregate)
        return token_influence(
            self, inputs, k, proponents, show_progress, aggregate, per_token, doc_ids
        )

    @starts_again
    def influence_by_layer(
        self, inputs: Any, show_progress: bool = False, aggregate: bool = False
    ) -> dict[str, Tensor]:
        """The scores by layer: ``{layer: [m, n]}``, which sum to ``influence``.

        Layers are those named by ``layers``, else the modules that own parameters.
        """
        self._see_model()
        groups = group_by_layer(self.model, list(self._parameters), self.layers)
        reducer = self.make_reducer(None, proponents=True)
        doing = "compute influence by layer for training batches"
        self.stream_scores(inputs, reducer, doing, show_progress, aggregate, groups)
        found = reducer.result()
        assert isinstance(found, Tensor)
        return dict(zip(groups, found.to(self._dtype), strict=True))

    @starts_again
    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """The score of each example with itself, ``[n]``: large for examples that are hard to fit.

        Both gradients are of the training loss, also if test examples have another function.

        Args:
            inputs: one batch, a DataLoader or a Dataset; None for the training set.
            show_progress: a bar over the examples.
            outer_loop_by_checkpoints: read the data once per checkpoint instead of holding a chunk
                of it in memory; the scores are the same.
        """
        doing = "compute self influence. Processing"
        with self.session() as loader:
            terms, batches = self._plan(loader, inputs, show_progress=show_progress)
            rounds = [[term] for term in terms] if outer_loop_by_checkpoints else [terms]
            shows_rounds = show_progress and len(rounds) > 1
            total = torch.zeros((), device=self.device)
            with self.progress(f"{doing} checkpoint", len(rounds), shows_rounds) as outer:
                for some in rounds:
                    reducer, steps = AllScores(), _times(batches, some)
                    with self.progress(f"{doing} batch", steps, show_progress) as bar:
                        stream = Stream(some, loader, self._sample, tick=bar.update)
                        stream.self_scores(batches, reducer)
                    total = reducer.result() + total
                    outer.update()
        return total.to(self._dtype)

    @starts_again
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The training features of examples as vectors, whose dot products are the scores.

        They are gradients of ``loss_fn``, also if test examples have another function: the dot
        products are then the scores for the training loss.

        Returns:
            ``[m, P * C]``, the block of each checkpoint scaled by the square root of its weight;
            ``[1, P * C]`` if ``aggregate``.

        Raises:
            InvalidArgumentError: if a weight is negative.
        """
        return self._vectors(given(inputs), of_tests=False, aggregate=aggregate)

    # Implementation.

    @property
    def _train_batches(self) -> Iterable[Batch]:
        """The batches for the training features of the terms, in the order of the training set."""
        rows = self._cache.rows
        return self.train_dataloader if rows is None else rows.batches()

    def _direction(self, checkpoint: int) -> Transform:
        """The transform of gradients to directions of the optimizer, in a session."""
        assert self._directions is not None
        return self._directions.at(checkpoint)

    def _optimizer_fingerprint(self) -> dict[str, Any]:
        return optimizer_fingerprint(self.checkpoints)

    def _examples_at(self, indices: Tensor) -> Iterable[Batch]:
        chosen = chosen_rows(self.train_dataloader, indices, lambda: None)
        return (to_device(take(batch, rows), self.device) for _, rows, batch in chosen)

    def _cached_gradients(
        self, loader: CheckpointLoader, show_progress: bool
    ) -> CachedGradients | None:
        """The training features of all examples; None if they are computed in each call."""
        if self.store is None:
            rows = self._examples.train_count * len(self.checkpoints)
            shapes = self._map.cached_shapes
            if not (self._map.is_short and fits_memory(rows, shapes, self._sample)):
                return None
        indices = range(len(self.checkpoints))
        sides = [Side(index, partial(self._cached, index)) for index in indices]
        doing = "compute the gradients of the training set. Processing checkpoint"
        bar = partial(self.progress, doing, len(sides), show_progress)
        build = CacheBuild(sides, self.train_dataloader, loader, self._sample, bar)
        if self.store is None:
            return build.in_memory()
        description = {
            **self._map.cached_settings,
            **self._identity(loader, self.train_dataloader),
        }
        return build.on_disk(self.store, description, self._map.cached_shapes, self.store_dtype)

    def _cached(self, checkpoint: int, batch: Batch) -> Gradients:
        """The cached features of training examples: from the cache, or computed."""
        if isinstance(batch, CachedBatch):
            assert self._cache.rows is not None
            return self._cache.rows.gradients(checkpoint, batch)
        return self._map.cached(checkpoint, batch, self._train_loss)

    def _identity(self, loader: CheckpointLoader, batches: Iterable[Batch]) -> dict[str, Any]:
        """The model, data and losses that stored numbers belong to."""
        features = self._map.identifying
        return identity(loader, len(self.checkpoints), features, self._train_loss, batches)

    def _plan(
        self,
        loader: CheckpointLoader,
        inputs: Any,
        ordered: bool = True,
        show_progress: bool = False,
    ) -> tuple[list[Term], Iterable[Batch]]:
        """The terms, and the inputs in batches."""
        self.prepare(loader, show_progress)
        batches = self._train_batches if inputs is None else self.batches(inputs, ordered)
        return self.terms(), batches

    def stream_scores(
        self,
        inputs: Any,
        reducer: Reducer,
        doing: str,
        show_progress: bool,
        aggregate: bool,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        with self.session() as loader:
            terms, test = self._plan(loader, given(inputs), not aggregate, show_progress)
            train = self._train_batches
            if groups is not None and self._map.has_parts:
                names = list(self._parameters)
                terms = terms_by_parameter(terms, self._map, self._train_loss, names)
                train = self.train_dataloader
            with self.progress(doing, _times(train, terms), show_progress) as bar:
                stream = Stream(
                    terms,
                    loader,
                    self._sample,
                    self._examples.train_count,
                    groups,
                    bar.update,
                    self.watch(terms),
                )
                stream.scores(test, train, reducer, aggregate)

    def watch(self, terms: Sequence[Term]) -> Watch | None:
        """The observer of a pass that computes scores."""
        return None

    def _vectors(self, inputs: Any, of_tests: bool, aggregate: bool = False) -> Tensor:
        """Features of the inputs at each checkpoint times the root of its weight, concatenated."""
        with self.session() as loader:
            terms, batches = self._plan(loader, inputs, ordered=not aggregate)
            gradients = SideGradients(loader, self._sample)
            kind = "test" if of_tests else "training" if inputs is None else "input"
            found = term_vectors(terms, gradients, batches, kind, aggregate, self.get_name())
        return found.to(self._dtype)


def _times(batches: Iterable[Batch], terms: Sequence[Term]) -> int | None:
    """The number of steps of the progress bar in a pass over the batches."""
    length = loader_length(batches)
    return None if length is None else length * len(terms)
