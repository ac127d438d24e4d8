"""The face that methods of one kind share: scores that are inner products, over a list of terms.

Letters: m test and n training examples, P chosen parameters, C checkpoints.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.distributed import is_alone
from influence_kit.core.dtypes import real_shape
from influence_kit.core.memory import resident_bytes
from influence_kit.data.batches import Batch
from influence_kit.data.loaders import loader_length
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss
from influence_kit.methods.base import TRAIN
from influence_kit.methods.example_influence import ExampleInfluence, given
from influence_kit.methods.gradient_cache import Build, KeptRows, Places
from influence_kit.methods.identity import identity
from influence_kit.methods.parameter_selection import group_by_layer
from influence_kit.methods.starting_again import starts_again
from influence_kit.scoring.progress import Watch
from influence_kit.scoring.reducers import AllScores, Reducer
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform


class InnerProductInfluence(ExampleInfluence):
    """A method that is a list of ``terms``: score = sum of weight * <test side, train side>.

    Args:
        model: the model. It comes back from every call as it went in.
        train_dataset: a ``Dataset`` or sequence of examples, or a ``DataLoader`` (or other
            re-iterable of batches) that does not shuffle; ``(*model_inputs, targets)`` or dicts.
        checkpoints: a folder, a glob, a list of paths, or any iterable of paths or state dicts;
            ``select_checkpoints`` chooses a few of many.
        checkpoints_load_func: ``load(model, checkpoint) -> learning rate``, in place.
        layers: the modules whose parameters count: a name, a pattern of names
            (``"transformer.h.*.mlp"``; ``*`` is any characters, ``?`` one, ``[ab]`` one of these),
            a module of the model, or a list of such; all parameters inside count, each once. None
            for all parameters that require a gradient. The attribute ``layers`` is a list of names.
        loss_fn: ``loss_fn(outputs, targets)`` (of a dict batch: ``loss_fn(outputs, batch)``), one
            value an example, or their sum or mean: the scores are the same. None differentiates the
            model's output (of a dict batch: the loss that the model returns).
        batch_size: training examples at a time, where ``train_dataset`` is a ``Dataset``. "auto"
            finds a number from what one example takes in memory. The scores do not depend on it.
        test_loss_fn: the loss of test examples, lower is better; ``loss_fn`` where None. A positive
            score says that training lowered it. What should rise goes to ``test_output_fn``.
        test_output_fn: in place of it: ``test_output_fn(outputs, targets)`` (of a dict batch:
            ``(outputs, batch)``), higher is better: a margin, a log-probability, a prediction. One
            value per example, or their sum or mean. Scores are those of ``test_loss_fn`` =
            -``test_output_fn``: positive where training raised it.
        sample_wise_grads_per_batch: None takes a loss of any reduction. True wants "sum" or "mean",
            False wants "none", as in Captum; the speed is the same.
        eval_mode: put the model into evaluation mode while scores are computed.
        batch_axes: the dimension that counts examples, for each tensor of a batch, in the structure
            of the batch: ``(1, 0)`` for time-first inputs and targets, ``{"weights": None}`` for a
            tensor that belongs to the whole batch. Found from the batches where None.
        verify: "repeated" compares some batches of every question with autograd (the page "What is
            checked, and when" says which), "once" trusts the check of the first batch.
        store: a folder for the training set's gradients (projected, where the method projects):
            the first question builds it, later ones and other processes read it. A build that was
            killed goes on where it was; a folder that was made for another model, data set, loss or
            projection is refused. None keeps no files.
        store_dtype: of the numbers there: float16 and bfloat16 halve the size; the model's
            precision where None.

    Raises:
        InvalidArgumentError: (a ``ValueError``) for arguments that cannot be meant.
        UnknownLayerError: for layers that the model does not have.
    """

    _kept: KeptRows | None
    # whether the training side is short, so that it is kept in memory where it fits
    _keeps_rows = False

    def __init__(
        self,
        *args: Any,
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        self.store, self.store_dtype = store, store_dtype
        super().__init__(*args, **kwargs)

    # What a method says.

    @abstractmethod
    def terms(self) -> list[Term]:
        """The method, as data."""

    def train_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Gradients of the training loss at a checkpoint, transformed."""

        def features(batch: Batch) -> Gradients:
            if isinstance(batch, Places):
                assert self._kept is not None
                return self._kept.gradients(checkpoint, batch)
            return self._train_features(checkpoint, batch)

        return Side(checkpoint, features, transforms)

    def test_at(self, checkpoint: int, *transforms: Transform) -> Side:
        """Gradients of the test loss at a checkpoint, transformed."""

        def features(batch: Batch) -> Gradients:
            return self._features(checkpoint, batch, self._test_loss)

        return Side(checkpoint, features, transforms)

    # What a projection changes.

    def _features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """The gradients of a batch at a checkpoint, which is in the model."""
        return self._source(batch, loss)

    def _train_features(self, checkpoint: int, batch: Batch) -> Gradients:
        """The same of training examples: what is kept of them."""
        return self._features(checkpoint, batch, self._train_loss)

    @property
    def _shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of what ``_features`` gives, by name."""
        return {name: real_shape(parameter) for name, parameter in self._parameters.items()}

    @property
    def _kept_shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of what is kept of training examples."""
        return self._shapes

    # What a user calls.

    @starts_again
    def influence_by_layer(
        self, inputs: Any, show_progress: bool = False, aggregate: bool = False
    ) -> dict[str, Tensor]:
        """The scores by layer: ``{layer: [m, n]}``, which sum to ``influence``.

        Layers are those named by ``layers``, else the modules that own parameters.
        """
        self._see_model()
        groups = group_by_layer(self.model, list(self._parameters), self.layers)
        reducer = self._reducer(None, proponents=True)
        doing = "compute influence by layer for training batches"
        self._stream_scores(inputs, reducer, doing, show_progress, aggregate, groups)
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
        """The score of each example with itself, ``[n]``: large for what is hard to fit.

        Of its training loss, whatever is measured of test examples.

        Args:
            inputs: one batch, a DataLoader or a Dataset; None for the training set.
            show_progress: a bar over the examples.
            outer_loop_by_checkpoints: read the data once a checkpoint instead of holding a slab of
                it in memory; the scores are the same.
        """
        doing = "compute self influence. Processing"
        with self._session() as loader:
            terms, batches = self._plan(loader, inputs, show_progress=show_progress)
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

    @starts_again
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The training side of examples, written out: vectors whose dot products are the scores.

        They are gradients of ``loss_fn``, also where test examples have a function of their own:
        the dot products are then the scores for the training loss.

        Returns:
            ``[m, P * C]``, the block of each checkpoint scaled by the square root of its weight;
            ``[1, P * C]`` if ``aggregate``.

        Raises:
            InvalidArgumentError: where a weight is negative.
        """
        return self._vectors(given(inputs), of_tests=False, aggregate=aggregate)

    # How it is done.

    @property
    def _train_batches(self) -> Iterable[Batch]:
        """What the train sides of the terms take, in the order of the training set."""
        return self.train_dataloader if self._kept is None else self._kept.batches()

    def _by_parameter(self, terms: list[Term]) -> tuple[list[Term], Iterable[Batch]]:
        """The terms with sides that tell parameters apart, and what their train sides take."""
        return terms, self._train_batches

    def _plan(
        self,
        loader: CheckpointLoader,
        inputs: Any,
        ordered: bool = True,
        show_progress: bool = False,
    ) -> tuple[list[Term], Iterable[Batch]]:
        """The terms, and the inputs in batches."""
        self._keep_rows(loader, show_progress)
        return self.terms(), self._batches(inputs, ordered)

    def _keep_rows(self, loader: CheckpointLoader, show_progress: bool = False) -> None:
        """Have the training side of all examples, where it is to be kept."""
        if self._kept is None:
            self._kept = self._made_rows(loader, show_progress)

    def _made_rows(self, loader: CheckpointLoader, show_progress: bool) -> KeptRows | None:
        """The training side of all examples; None where it is made anew for every question."""
        if self.store is None and not (self._keeps_rows and self._fits()):
            return None
        sides = [self.train_at(place) for place in range(len(self.checkpoints))]
        doing = "compute the gradients of the training set. Processing checkpoint"
        bar = partial(self._bar, doing, len(sides), show_progress)
        build = Build(sides, self.train_dataloader, loader, self._sample, bar)
        if self.store is None:
            return build.in_memory()
        description = {
            **self._feature_settings(),
            **self._identity(loader, self.train_dataloader),
        }
        return build.on_disk(self.store, description, self._kept_shapes, self.store_dtype)

    def _fits(self) -> bool:
        """Whether the training side of all examples may be kept in memory."""
        rows = self._train_count() * len(self.checkpoints)
        each = sum(shape.numel() for shape in self._kept_shapes.values())
        size = rows * each * self._sample.element_size()
        # ranks share the training set out: what each would keep is not all of it
        return is_alone() and 0 < size <= resident_bytes(self._device)

    def _feature_settings(self) -> dict[str, Any]:
        """What kept gradients depend on beside model, data and loss."""
        return {"features": "gradients"}

    def _identity(self, loader: CheckpointLoader, batches: Iterable[Batch]) -> dict[str, Any]:
        return identity(loader, len(self.checkpoints), self._source, self._differentiated, batches)

    @property
    def _differentiated(self) -> Loss:
        """What the training side is the gradient of."""
        return self._train_loss

    def _forget(self) -> None:
        super()._forget()
        self._kept = None

    @property
    def _kept_since(self) -> str | None:
        return None if self._kept is None else "the gradients of the training set were computed"

    def _why_fixed(self, name: str) -> str | None:
        if name == TRAIN and self.store is not None:
            return "`store` keeps the gradients of its examples"
        return super()._why_fixed(name)

    def _batches(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        return self._train_batches if inputs is None else super()._batches(inputs, ordered)

    def _stream_scores(
        self,
        inputs: Any,
        reducer: Reducer,
        doing: str,
        show_progress: bool,
        aggregate: bool,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        with self._session() as loader:
            terms, test = self._plan(loader, given(inputs), not aggregate, show_progress)
            train = self._train_batches
            if groups is not None:
                terms, train = self._by_parameter(terms)
            with self._bar(doing, _times(train, terms), show_progress) as bar:
                stream = Stream(
                    terms,
                    loader,
                    self._sample,
                    self._train_count(),
                    groups,
                    bar.update,
                    self._watch(terms),
                )
                stream.scores(test, train, reducer, aggregate)

    def _watch(self, terms: Sequence[Term]) -> Watch | None:
        """What looks on while scores are computed."""
        return None

    def _vectors(self, inputs: Any, of_tests: bool, aggregate: bool = False) -> Tensor:
        """A side of the inputs at each checkpoint, times the root of its weight, side by side."""
        with self._session() as loader:
            terms, batches = self._plan(loader, inputs, ordered=not aggregate)
            stream = Stream(terms, loader, self._sample)
            blocks = []
            for term in stream.terms:
                if not term.is_symmetric:
                    raise NotImplementedError(
                        f"{self.get_name()} treats test and training examples differently, so that "
                        "no one vector an example has the scores as dot products; use `influence`"
                    )
                side = term.test if of_tests else term.train
                kind = "test" if of_tests else "training" if inputs is None else "input"
                vectors = stream.vectors(side, batches, aggregate, kind)
                weight = term.weight_at(loader.load(term.train.checkpoint))
                if weight < 0:
                    raise InvalidArgumentError(
                        f"checkpoint {term.train.checkpoint} has the negative rate {weight}, for "
                        "which no vectors have the scores as dot products; `TracInCP` and "
                        "`TracInCPFast` take it in `influence`"
                    )
                blocks.append(vectors * weight**0.5)
        return torch.cat(blocks, dim=1).to(self._dtype)


def _times(batches: Iterable[Batch], terms: Sequence[Term]) -> int | None:
    """How many ticks a pass over the batches will give."""
    length = loader_length(batches)
    return None if length is None else length * len(terms)
