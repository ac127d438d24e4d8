"""Data value embeddings, computed along a training run: arXiv 2412.09538.

Shapes: m test examples, n training examples, P chosen parameters, B examples of a step.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.core.draws import check_seed
from influence_kit.data.batches import Batch, to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients, from_flat
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.dvemb.backward_pass import backward_pass, check_memory
from influence_kit.methods.dvemb.embedding_term import EmbeddingTerm, index_batches
from influence_kit.methods.dvemb.embeddings import Embeddings
from influence_kit.methods.dvemb.final_weights import check_one_checkpoint, weights_after_training
from influence_kit.methods.dvemb.plain_steps import check_plain
from influence_kit.methods.dvemb.step_gradients import StepGradients
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.examples_by_index import ExamplesByIndex, count_by_index
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.restarts import given, starts_again
from influence_kit.projections.projected import Dim, Projected, check_dim
from influence_kit.scoring.reducers import Reducer
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Side, Term
from influence_kit.training.step import check_epochs, steps_of
from influence_kit.training.trace import TrainingTrace


@documented
class DVEmb(InnerProductInfluence):
    r"""score = <e_train, grad loss(test) after training>, e = the effect of leaving it out.

    .. math::
        e_j = \sum_{s:\, j \in B_s} \; \prod_{k > s} \Bigl( I - \frac{\eta_k}{|B_k|}
        \sum_{i \in B_k} g_i^k {g_i^k}^T \Bigr) \, \frac{\eta_s}{|B_s|} \, g_j^s, \qquad
        g_i^k = \nabla \ell(z_i; \theta_k)

    The data value embedding (arXiv 2412.09538): leaving example j out of the steps that took it
    moves the final weights of this training run by e_j, to first order, with the empirical Fisher
    matrix as the curvature of each step (later steps stand left in the product). Unlike with
    influence functions, the time at which an example was seen counts, and training need not have
    converged. Rows are test examples; positive is a proponent, and leaving the training example out
    raises the test loss by about the score. An example that no step took scores 0.

    One backward pass over the steps, each at its own weights, computes the embeddings. It holds a
    P x P matrix and the embeddings, n x P, in memory: choose few parameters by ``layers``, or
    project the gradients of each layer, so that P is the number of projected entries. Gradients are
    taken in evaluation mode. With several ranks, each computes all embeddings; they divide the
    scores.

    Args:
        checkpoints: the weights after training, one checkpoint; if None, those at the end of
            ``trace``.
        trace: the steps, oldest first: a ``TrainingTrace``, or dicts of "state_dict" (before the
            step), "indices" (in ``train_dataset``) and "lr", and "epoch", "weight_decay" and
            "reduction" if they have them. Steps are taken for plain SGD steps down the mean of the
            examples' losses (their sum if reduction is "sum"), with weight decay; a recorded
            momentum, clipping or other optimizer is a warning (``MAGIC`` follows it). A
            ``TrainingTrace`` must have kept all states.
        epochs: the epochs whose visits count; None for all. Scores are additive over epochs.
        projection_dim: entries of each layer's gradient, or a pair, as in ``LoGra``: Gaussian, the
            same at every step; None projects nothing.
        seed: the seed of the projection.
        train_dataset: a ``Dataset`` that supports indexing, or a ``DataLoader`` that reads one in
            order.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for a trace that does not fit the data, is not finished or lacks
            states, and for more than one checkpoint; from ``influence`` if the matrix and the
            embeddings exceed memory.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with TrainingTrace(model, optimizer) as trace:
        ...     for indices in torch.arange(8).split(4):
        ...         optimizer.zero_grad()
        ...         loss(model(x[indices]), y[indices]).backward()
        ...         trace.record(indices)
        ...         optimizer.step()
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> dvemb = DVEmb(model, train, trace=trace, loss_fn=loss)
        >>> dvemb.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
        >>> dvemb.embeddings().shape
        torch.Size([8, 8])
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
        trace: Sequence[Mapping[str, Any]],
        epochs: Collection[int] | None = None,
        projection_dim: Dim | None = None,
        seed: int = 0,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        self.projection_dim = None if projection_dim is None else check_dim(projection_dim)
        self.seed = check_seed(seed)
        self._steps = steps_of(trace, count_by_index(train_dataset))
        check_epochs(epochs, self._steps)
        if isinstance(trace, TrainingTrace):
            check_plain(trace)
        self.trace = trace
        self.epochs = epochs
        super().__init__(
            model,
            train_dataset,
            weights_after_training(checkpoints, trace),
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
            features=None
            if projection_dim is None
            else Projected(projection_dim, "gaussian", seed),
        )
        check_one_checkpoint(self.checkpoints)
        self._embedded = self._caches.add(Embeddings(), first=True)
        if not isinstance(trace, TrainingTrace):  # which may only grow
            self._caches.sources["trace"] = partial(data_fingerprint, trace)

    # The definition of the method.

    def terms(self) -> list[Term]:
        """One term: gradients after training, and embeddings."""
        test, train = Side(0, self._test_gradients), Side(0, self._embeddings_of)
        return [EmbeddingTerm(test, train, weight=1.0, own=self._own_gradients)]

    # What a user calls.

    @starts_again
    def embeddings(self, show_progress: bool = False) -> Tensor:
        """The embedding of each training example, ``[n, P]``, parameters in the model's order.

        Computed once and cached; the result is the cached tensor, not a copy. The scores are
        ``compute_intermediate_quantities(inputs) @ embeddings().T``.

        Args:
            show_progress: a bar over the steps.
        """
        self._check_kept()
        return self._embed(show_progress)

    def _embed(self, show_progress: bool) -> Tensor:
        """The same, without the check of the cache, which the next session makes."""
        if self._embedded.rows is None:
            check_memory(self._examples.train_count, self._size, self._steps, self._sample)
            doing, of_examples = "embed the training examples. Processing step", self._own_gradients
            with self.session(), self.progress(doing, len(self._steps), show_progress) as bar:
                read = StepGradients(
                    self.model, self.trace, self._steps, of_examples, self._by_index.rows
                )
                empty = self._sample.new_zeros(self._examples.train_count, self._size)
                rows = backward_pass(self._steps, read, empty, self.epochs, bar.update)
                self._embedded.rows = rows
        return self._embedded.rows

    @starts_again
    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """The score of each training example with itself, ``[n]``.

        The amount by which its own loss would be higher if the example had been left out.

        Args:
            inputs: None; only training examples have embeddings.
            show_progress: bars over the steps and the examples.
            outer_loop_by_checkpoints: has no effect: there is one checkpoint.
        """
        if inputs is not None:
            raise InvalidArgumentError(
                "`inputs` must be None: DVEmb has embeddings of the examples of `train_dataset` "
                "only; call `self_influence()`, which returns their scores"
            )
        self._embed(show_progress)
        return super().self_influence(None, show_progress, outer_loop_by_checkpoints)

    @starts_again
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The gradients of the test loss after training, which ``influence`` accepts as ``inputs``.

        Returns:
            ``[m, P]`` (``[1, P]`` if ``aggregate``); the scores are its dot products with
            ``embeddings()``.
        """
        with self.session() as loader:
            batches = self.batches(given(inputs), ordered=not aggregate)
            vectors = SideGradients(loader, self._sample).vectors(
                self.test_at(0), batches, aggregate
            )
        return vectors.to(self._dtype)

    # Implementation.

    @property
    def checkpoints(self) -> list[Any]:
        """The weights after training; can be set."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        found = self._found_checkpoints(weights_after_training(checkpoints, self.trace))
        check_one_checkpoint(found)
        self._checkpoints = found
        self._examples.forget()

    def stream_scores(
        self,
        inputs: Any,
        reducer: Reducer,
        doing: str,
        show_progress: bool,
        aggregate: bool,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        given(inputs)
        self._embed(show_progress)
        super().stream_scores(inputs, reducer, doing, show_progress, aggregate, groups)

    @property
    def _train_batches(self) -> Iterable[Batch]:
        return index_batches(self._examples.train_count, self._by_index.rows)

    def batches(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        if not isinstance(inputs, Tensor):
            return super().batches(inputs, ordered)
        if inputs.dim() != 2 or inputs.shape[1] != self._size:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(inputs.shape)}; test gradients made by "
                f"`compute_intermediate_quantities` have shape [m, {self._size}] here. Pass "
                "examples as a tuple, list or dict"
            )
        # the "batch" that ``_test_gradients`` takes
        quantities: Any = inputs
        return [quantities]

    def _test_gradients(self, batch: Any) -> Gradients:
        if isinstance(batch, Tensor):  # the result of ``compute_intermediate_quantities``
            return from_flat(batch.to(self._sample), self._map.shapes, self._sample)
        return self.test_at(0)(batch)

    def _embeddings_of(self, batch: Any) -> Gradients:
        """The embeddings of the training examples of a batch ``(indices [n],)``."""
        assert self._embedded.rows is not None
        rows = self._embedded.rows[slice(*batch.ends)]
        return from_flat(rows, self._map.shapes, self._sample)

    def _own_gradients(self, batch: Any) -> Gradients:
        """The gradients of the same examples, at the weights that are in the model."""
        (indices,) = batch
        examples = self._by_index(indices.tolist())
        return self.train_at(0)(to_device(examples, self.device))

    @property
    def _by_index(self) -> ExamplesByIndex:
        self.train_dataloader.check_draws()
        return ExamplesByIndex(self.train_dataloader)

    @property
    def _size(self) -> int:
        """P, the number of entries of a gradient."""
        return sum(shape.numel() for shape in self._map.shapes.values())
