"""The face that all methods share: Captum's ``DataInfluence``, over a list of terms.

Letters: m test and n training examples, k examples asked for, P chosen parameters, C checkpoints.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from captum.influence import DataInfluence
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.checkpoints import LoadFunction, find_checkpoints, load_checkpoint
from influence_kit.data import (
    Batch,
    as_loader,
    check_order,
    is_batch,
    is_dataset,
    loader_length,
    split,
    to_device,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.check import refuse_mixing_layers
from influence_kit.gradients.functional import exact
from influence_kit.gradients.source import GradientSource, comfortable_rows
from influence_kit.losses import Loss, LossFunction, declared_reduction
from influence_kit.methods.chosen import check_layers, choose_parameters, group_by_layer
from influence_kit.restore import borrowed
from influence_kit.scoring.reducers import AllScores, KMostInfluentialResults, TopK
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform

BatchSize = int | Literal["auto"] | None
# where the examples of a data set cannot be looked at beforehand
ROWS_OF_ITERABLE = 64


class InnerProductInfluence(DataInfluence):
    """A method that is a list of ``terms``: score = sum of weight * <test side, train side>.

    Args:
        model: the model. It comes back from every call as it went in.
        train_dataset: a ``Dataset`` or sequence of examples, or a ``DataLoader`` (or other
            re-iterable of batches) that does not shuffle; ``(*model_inputs, targets)`` or dicts.
        checkpoints: a folder, a glob, a list of paths, or any iterable of paths or state dicts.
        checkpoints_load_func: ``load(model, checkpoint) -> learning rate``, in place.
        layers: names of modules whose parameters count; None for all that require a gradient.
        loss_fn: ``loss_fn(outputs, targets)`` (of a dict batch: ``loss_fn(outputs, batch)``), one
            value an example, or their sum or mean: the scores are the same. None differentiates the
            model's output (of a dict batch: the loss that the model returns).
        batch_size: training examples at a time, where ``train_dataset`` is a ``Dataset``. "auto"
            finds a number from what one example takes in memory. The scores do not depend on it.
        test_loss_fn: the loss of test examples; ``loss_fn`` where None.
        eval_mode: put the model into evaluation mode while scores are computed.
        sample_wise_grads_per_batch: None takes a loss of any reduction. True wants "sum" or "mean",
            False wants "none", as in Captum; the speed is the same.

    Raises:
        InvalidArgumentError: (a ``ValueError``) for arguments that cannot be meant.
        UnknownLayerError: for layers that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: list[str] | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        *,
        eval_mode: bool = True,
        sample_wise_grads_per_batch: bool | None = None,
    ) -> None:
        self.model = model
        self.checkpoints_load_func = checkpoints_load_func
        self.checkpoints = checkpoints
        self.loss_fn = loss_fn
        self.test_loss_fn = loss_fn if test_loss_fn is None else test_loss_fn
        self.batch_size = _check_batch_size(batch_size, train_dataset)
        self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        self.reduction_type = declared_reduction(loss_fn, sample_wise_grads_per_batch)
        self.test_reduction_type = self.reduction_type
        self._train_loss = self._test_loss = Loss(loss_fn, self.reduction_type, "loss_fn")
        if test_loss_fn is not None:
            self.test_reduction_type = declared_reduction(
                test_loss_fn, sample_wise_grads_per_batch, "test_loss_fn"
            )
            self._test_loss = Loss(test_loss_fn, self.test_reduction_type, "test_loss_fn")
        self._eval_mode = eval_mode
        self._look_at(layers)
        self._train_data: Any = train_dataset
        self._train_loader: Iterable[Batch] | None = None
        if not is_dataset(train_dataset):
            self._train_loader = as_loader(train_dataset, None, "train_dataset")

    def _look_at(self, layers: Sequence[str] | None) -> None:
        """Choose the parameters whose gradients count."""
        self.layers = check_layers(self.model, layers)
        self._parameters = choose_parameters(self.model, self.layers)
        self._source = GradientSource(self.model, self._parameters)

    # What a method says.

    @abstractmethod
    def terms(self) -> list[Term]:
        """The method, as data."""

    def train_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Gradients of the training loss at a checkpoint, transformed."""
        return Side(checkpoint, lambda batch: self._source(batch, self._train_loss), transforms)

    def test_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Gradients of the test loss at a checkpoint, transformed."""
        return Side(checkpoint, lambda batch: self._source(batch, self._test_loss), transforms)

    # What a user reads and sets.

    @property
    def checkpoints(self) -> list[Any]:
        """The checkpoints, in order; may be set to anything that the constructor takes."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        any_file = self.checkpoints_load_func is not load_checkpoint
        self._checkpoints = find_checkpoints(checkpoints, any_file)

    @property
    def train_dataloader(self) -> Iterable[Batch]:
        """The batches of the training set, in their order."""
        if self._train_loader is None:
            size = self.batch_size
            if size == "auto":
                size = self._auto_batch_size()
            self._train_loader = as_loader(self._train_data, size, "train_dataset")
        return self._train_loader

    @property
    def train_dataloader_len(self) -> int | None:
        """The number of training batches; None where the loader does not tell."""
        return loader_length(self.train_dataloader)

    @property
    def layer_modules(self) -> list[nn.Module] | None:
        """The modules named by ``layers``."""
        if self.layers is None:
            return None
        return [self.model.get_submodule(name) for name in self.layers]

    # What a user calls.

    @overload
    def influence(
        self,
        inputs: Any = None,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> KMostInfluentialResults: ...

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The scores of all training examples for each test example, or the k best.

        Args:
            inputs: test examples: one batch (tuple, list or dict) or a DataLoader.
            k: how many proponents or opponents to return; None for all scores.
            proponents: the highest scores; False for the lowest.
            show_progress: a bar over the training set.
            aggregate: the influence on the sum of the test examples' losses: one row.

        Returns:
            Scores ``[m, n]`` (``[1, n]`` if ``aggregate``) in the order of the training set, or
            ``KMostInfluentialResults`` of ``[m, min(k, n)]``. Positive: a proponent, training on it
            lowered the test loss.
        """
        check_k(k)
        doing = "compute influence for training batches"
        if k is not None:
            kind = "proponents" if proponents else "opponents"
            doing = f"perform computation for getting {kind}. Processing training batches"
        reducer = AllScores() if k is None else TopK(k, proponents)
        self._stream_scores(inputs, reducer, doing, show_progress, aggregate)
        if isinstance(reducer, AllScores):
            return reducer.result().to(self._dtype)
        return reducer.result()

    def influence_by_layer(
        self, inputs: Any, show_progress: bool = False, aggregate: bool = False
    ) -> dict[str, Tensor]:
        """The scores by layer: ``{layer: [m, n]}``, which sum to ``influence``.

        Layers are those named by ``layers``, else the modules that own parameters.
        """
        groups = group_by_layer(self.model, list(self._parameters), self.layers)
        reducer = AllScores()
        doing = "compute influence by layer for training batches"
        self._stream_scores(inputs, reducer, doing, show_progress, aggregate, groups)
        return dict(zip(groups, reducer.result().to(self._dtype), strict=True))

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """The score of each example with itself, ``[n]``: large for what is hard to fit.

        Args:
            inputs: one batch or a DataLoader; None for the training set.
            show_progress: a bar over the examples.
            outer_loop_by_checkpoints: read the data once a checkpoint instead of holding a slab of
                it in memory; the scores are the same.
        """
        doing = "compute self influence. Processing"
        with self._session() as loader:
            batches = self._batches(inputs)
            terms = self.terms()
            rounds = [[term] for term in terms] if outer_loop_by_checkpoints else [terms]
            outer = self._bar(f"{doing} checkpoint", len(rounds), show_progress and len(rounds) > 1)
            total = torch.zeros(())
            with outer:
                for some in rounds:
                    reducer = AllScores()
                    with self._bar(f"{doing} batch", _times(batches, some), show_progress) as bar:
                        Stream(some, loader, self._sample, tick=bar.update).self_scores(
                            batches, reducer
                        )
                    total = reducer.result() + total.to(self._device)
                    outer.update()
        return total.to(self._dtype)

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The training side of examples, written out: vectors whose dot products are the scores.

        Returns:
            ``[m, P * C]``, the block of each checkpoint scaled by the square root of its weight;
            ``[1, P * C]`` if ``aggregate``.

        Raises:
            InvalidArgumentError: where a weight is negative.
        """
        return self._vectors(given(inputs), of_tests=False, aggregate=aggregate)

    # How it is done.

    def _stream_scores(
        self,
        inputs: Any,
        reducer: AllScores | TopK,
        doing: str,
        show_progress: bool,
        aggregate: bool,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        with self._session() as loader:
            test = self._batches(given(inputs), ordered=not aggregate)
            train, terms = self.train_dataloader, self.terms()
            with self._bar(doing, _times(train, terms), show_progress) as bar:
                stream = Stream(
                    terms, loader, self._sample, self._train_count(), groups, bar.update
                )
                stream.scores(test, train, reducer, aggregate)

    def _vectors(self, inputs: Any, of_tests: bool, aggregate: bool = False) -> Tensor:
        """A side of the inputs at each checkpoint, times the root of its weight, side by side."""
        with self._session() as loader:
            batches = self._batches(inputs, ordered=not aggregate)
            stream = Stream(self.terms(), loader, self._sample)
            blocks = []
            for term in stream.terms:
                side = term.test if of_tests else term.train
                vectors = stream.vectors(side, batches, aggregate)
                weight = term.weight_at(loader.load(term.train.checkpoint))
                if weight < 0:
                    raise InvalidArgumentError(
                        f"checkpoint {term.train.checkpoint} has the negative rate {weight}, for "
                        "which no vectors have the scores as dot products; use `influence`"
                    )
                blocks.append(vectors * weight**0.5)
        return torch.cat(blocks, dim=1).to(self._dtype)

    @contextmanager
    def _session(self) -> Iterator[CheckpointLoader]:
        """The model with hooks on, borrowed from the user; a loader for its checkpoints."""
        with borrowed(self.model, self._eval_mode), self._source.attached():
            refuse_mixing_layers(self.model)
            yield CheckpointLoader(self.model, self.checkpoints, self.checkpoints_load_func)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def _sample(self) -> Tensor:
        """An empty tensor as scores are computed: where the model is, not in half precision."""
        return exact(next(iter(self._parameters.values())).detach()).new_empty(0)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self._parameters.values())).dtype

    def _train_count(self) -> int:
        data = getattr(self.train_dataloader, "dataset", None)
        return loader_length(data) or 0

    def _batches(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        """The training set (None), the batch in pieces that fit memory, or the user's loader."""
        if inputs is None:
            return self.train_dataloader
        if is_batch(inputs):
            one = to_device(inputs, self._device)
            return list(split(inputs, comfortable_rows(self.model, one, self._device)))
        if isinstance(inputs, Tensor) or not isinstance(inputs, Iterable):
            raise InvalidArgumentError(
                "`inputs` must be a batch (tuple, list or dict of tensors) or a DataLoader; got a "
                f"{type(inputs).__name__}"
            )
        if ordered:
            check_order(inputs, "inputs")
        return inputs

    def _auto_batch_size(self) -> int:
        if isinstance(self._train_data, IterableDataset):
            return ROWS_OF_ITERABLE
        with borrowed(self.model, self._eval_mode):
            refuse_mixing_layers(self.model)
            for batch in DataLoader(self._train_data, batch_size=1):
                return comfortable_rows(self.model, to_device(batch, self._device), self._device)
        return 1

    def _bar(self, doing: str, total: int | None, show: bool) -> "tqdm[Any]":
        text = f"Using {self.get_name()} to {doing}"
        return tqdm(desc=text, total=total, disable=not show)


def _times(batches: Iterable[Batch], terms: Sequence[Term]) -> int | None:
    """How many ticks a pass over the batches will give."""
    length = loader_length(batches)
    return None if length is None else length * len(terms)


def given(inputs: Any) -> Any:
    """The inputs, which must be there."""
    if inputs is None:
        raise InvalidArgumentError("`inputs` argument is required.")
    return inputs


def check_k(k: object) -> None:
    """Refuse a k that is no count."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k must be an int or None; got {k!r} of type {type(k).__name__}")
    if k is not None and k < 0:
        raise InvalidArgumentError(f"k must not be negative; got {k}")


def _check_batch_size(batch_size: BatchSize, train_dataset: Any) -> BatchSize:
    if not is_dataset(train_dataset):
        return batch_size
    if batch_size is None:
        raise InvalidArgumentError(
            "since the `train_dataset` argument was a `Dataset`, `batch_size` must be an int."
        )
    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
        raise InvalidArgumentError(f'`batch_size` must be an int or "auto"; got {batch_size!r}')
    if batch_size != "auto" and batch_size < 1:
        raise InvalidArgumentError(f"`batch_size` must be at least 1; got {batch_size}")
    return batch_size
