"""KNN-Shapley: Jia et al. 2019, arXiv 1908.08619.

Shapes: m test examples, n training examples, b test examples of a block, d features of an example,
K neighbours.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, find_checkpoints, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.arguments import check_count, shown
from influence_kit.core.distributed import is_mine, sum_over_ranks
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.objects import is_one_of
from influence_kit.data.batches import Batch
from influence_kit.data.loaders import loader_length
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.activations import Features
from influence_kit.methods.arguments import documented
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.knn_shapley.knn_points import Points, Reader
from influence_kit.methods.knn_shapley.knn_values import (
    far_to_near,
    values_of_matches,
    values_of_targets,
)
from influence_kit.methods.layer_names import Layers, check_layer
from influence_kit.methods.restarts import given, starts_again
from influence_kit.methods.similarity.distances import euclidean_distance
from influence_kit.scoring.reducers import AllScores, Reducer, WholeRows

Metric = Literal["euclidean", "cosine"]
Utility = Literal["accuracy", "squared_error"]
# memory per pair of examples for distances, orders, labels and values of a block
BYTES_PER_PAIR = 96


@documented
class KNNShapley(ExampleInfluence):
    r"""score = sum over ranks j >= r of (c_j - c_{j+1}) / max(K, j), c_j = [label j = test label].

    The exact Shapley value of a training example for a K-nearest-neighbour classifier (arXiv
    1908.08619, theorem 1). Training examples are ranked by their distance from the test example,
    the nearest first, equal distances by index in the training set; r is the rank of the scored
    example, and c_{n+1} = 0. The value of a set S of training examples is

    .. math::
        u(S) = \frac{1}{K} \sum_{j=1}^{\min(K, |S|)} c_j(S)

    the share of right labels among its K nearest; a row of scores sums to u(all) - u(none). Rows
    are test examples; positive is a proponent: its label helps to predict the test label. With
    ``layer``, scores are the mean over checkpoints; without it, the inputs are compared and no
    checkpoint is loaded. No gradient is computed, and the features of all training examples,
    ``[n, d]`` per checkpoint, are in memory during a call.

    Args:
        model: without a ``layer`` its weights are not used: ``torch.nn.Identity()`` is enough.
        checkpoints: required with ``layer``, and not used without it.
        n_neighbors: K. With K > n each set has fewer neighbours, and sums are still divided by K.
        layer: the layer whose flattened output is the features, or its name; the model's
            floating-point inputs if None. The last output of a layer that runs several times.
        metric: "euclidean" or "cosine" distance of features.
        utility: "accuracy", as above, for integer labels; or "squared_error", for real labels:
            u(S) = -(sum of the labels of the K nearest / K - test label)^2, as in regression.

    The other arguments are those of ``InnerProductInfluence``; the losses have no effect;
    ``layers`` and ``test_output_fn`` are refused.

    Raises:
        InvalidArgumentError: for labels that are not integers (with "squared_error", not one number
            per example), and without ``layer`` for inputs that are not floating-point tensors.
        NonFiniteError: for features, distances or labels that are NaN or infinite.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 1, 0])
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> knn = KNNShapley(torch.nn.Identity(), train, n_neighbors=1)
        >>> knn.influence((torch.tensor([[0.2]]), torch.tensor([0])))
        tensor([[ 0.8333, -0.1667,  0.3333]])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any = None,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        n_neighbors: int = 5,
        layer: str | nn.Module | None = None,
        metric: Metric = "euclidean",
        utility: Utility = "accuracy",
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        if not is_one_of(metric, ("euclidean", "cosine")):
            raise InvalidArgumentError(
                f'`metric` must be "euclidean" or "cosine"; got {shown(metric)}'
            )
        if not is_one_of(utility, ("accuracy", "squared_error")):
            raise InvalidArgumentError(
                f'`utility` must be "accuracy" or "squared_error"; got {shown(utility)}'
            )
        if test_output_fn is not None:
            raise InvalidArgumentError(
                f"`test_output_fn` is a function of outputs, and {self.get_name()} uses only the "
                "labels of neighbours: leave it out, or use a method of gradients (`TracInCP`, say)"
            )
        self.n_neighbors = check_count(n_neighbors, "n_neighbors")
        self.layer = check_layer(model, layer) if isinstance(layer, nn.Module) else layer
        self.metric, self.utility = metric, utility
        if layers is not None:
            raise InvalidArgumentError(
                f"`layers` names parameters, which {self.get_name()} does not use; name one "
                "`layer`, whose output is then compared"
            )
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
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            select=partial(_all_parameters, layer=self.layer),
            differentiates=False,
            find=partial(_found, layer=self.layer),
        )

    # What a user calls.

    @starts_again
    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """The score of each example for itself among these examples, ``[n]``.

        Each example is its own nearest neighbour. Large if few others near it have its label.

        Args:
            inputs: the examples, one batch or a DataLoader; None for the training set.
            show_progress: bars over the batches and the examples.
            outer_loop_by_checkpoints: has no effect: checkpoints are always the outer loop.
        """
        doing = "compute self influence. Processing batch"
        reducer = AllScores()
        with self.session() as loader:
            points, _ = self._points(loader, self.batches(inputs), None, doing, show_progress)
            for rows, block in self._blocks(points, points, show_progress):
                reducer.update(rows, block.gather(1, rows.to(block.device)[:, None]).squeeze(1))
        return reducer.result().to(self._dtype)

    # Implementation.

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        return WholeRows(k, proponents)

    def stream_scores(
        self, inputs: Any, reducer: Reducer, doing: str, show_progress: bool, aggregate: bool
    ) -> None:
        with self.session() as loader:
            tests = self.batches(given(inputs), ordered=not aggregate)
            train, test = self._points(loader, self.train_dataloader, tests, doing, show_progress)
            blocks = self._blocks(train, test, show_progress)
            if aggregate:
                total = torch.zeros(1, train[0].n, dtype=torch.float64, device=self.device)
                for _, block in blocks:
                    total += block.sum(0)
                mine = _of_this_rank(1)
                blocks = iter([(mine, sum_over_ranks(total)[mine])])
            for rows, block in blocks:
                reducer.update(rows, block.to(self._sample))

    def _points(
        self,
        loader: CheckpointLoader,
        train: Iterable[Batch],
        test: Iterable[Batch] | None,
        doing: str,
        show_progress: bool,
    ) -> tuple[list[Points], list[Points]]:
        """Training and test points at each checkpoint; training points if there are no tests."""
        every = range(len(self.checkpoints))
        indices: Sequence[int | None] = [None] if self.layer is None else every
        length = loader_length(train)
        total = None if length is None else length * len(indices)
        features = Features(self.model, self.layer)
        any_number = self.utility == "squared_error"
        read = Reader(features, self.metric == "cosine", any_number, self.device)
        read.refuse_unfit_labels(train, "training")
        if test is not None:
            read.refuse_unfit_labels(test, "test")
        found: tuple[list[Points], list[Points]] = ([], [])
        with self.progress(doing, total, show_progress) as bar:
            for index in indices:
                if index is not None:
                    loader.load(index)
                found[0].append(read(train, "training", bar.update))
                if test is not None:
                    found[1].append(read(test, "test"))
        return found if test is not None else (found[0], found[0])

    def _blocks(
        self, train: list[Points], test: list[Points], show_progress: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's test examples in blocks, with their scores ``[b, n]``, float64."""
        n, mine = train[0].n, _of_this_rank(test[0].n)
        size = rows_within(4 * workspace_bytes(self.device), BYTES_PER_PAIR * n)
        doing = "value training examples. Processing test example"
        with self.progress(doing, len(mine), show_progress) as bar:
            for rows in mine.split(size):
                total = torch.zeros(len(rows), n, dtype=torch.float64, device=self.device)
                for known, tests in zip(train, test, strict=True):
                    total += self._values(known, tests.features[rows], tests.labels[rows])
                yield rows, total.div_(len(train))
                bar.update(len(rows))

    def _values(self, train: Points, features: Tensor, labels: Tensor) -> Tensor:
        """Shapley values ``[b, n]`` for test examples at one checkpoint, float64."""
        order = far_to_near(euclidean_distance(features, train.features))
        if self.utility == "accuracy":
            matches = (train.labels[order] == labels[:, None]).double()
            values = values_of_matches(matches, self.n_neighbors)
        else:
            targets = train.labels.double()[order]
            values = values_of_targets(targets, labels.double()[:, None], self.n_neighbors)
        return torch.empty_like(values).scatter_(1, order, values)


def _found(checkpoints: Any, any_file: bool, layer: str | None) -> list[Any]:
    """The checkpoints, which only a layer needs."""
    if checkpoints is not None:
        return find_checkpoints(checkpoints, any_file)
    if layer is not None:
        raise InvalidArgumentError(
            f"`checkpoints` is None: the output of layer '{layer}' is compared at each checkpoint; "
            "[model.state_dict()] is the model as it is now"
        )
    return []


def _all_parameters(model: nn.Module, layers: Any, layer: str | None) -> Mapping[str, nn.Parameter]:
    """All parameters, for device and precision only; an empty one for a model without any."""
    if layer is not None:
        check_layer(model, layer)
    return dict(model.named_parameters()) or {"": nn.Parameter(torch.empty(0))}


def _of_this_rank(count: int) -> Tensor:
    """The indices below ``count`` that this rank computes."""
    return torch.tensor([index for index in range(count) if is_mine(index)], dtype=torch.int64)
