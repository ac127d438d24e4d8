"""The base class of all methods: their arguments, ``influence``, and sessions with the model.

Shapes: m test examples, n training examples, k requested examples.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, overload

import torch
from captum.influence import DataInfluence
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from influence_kit.checkpoints.discovery import LoadFunction, find_checkpoints, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader, Fingerprint
from influence_kit.core.dtypes import exact_dtype
from influence_kit.core.locks import alone_with
from influence_kit.core.objects import check_flags, check_model
from influence_kit.core.summary import size_notes, summary
from influence_kit.data.batches import Batch, call_model
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.loaders import loader_length
from influence_kit.gradients.check import refuse_meta, refuse_mixing_layers
from influence_kit.gradients.gradient_source import GradientSource, Verify, check_verify
from influence_kit.gradients.parameter_selection import choose_parameters
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.losses.measures import losses_of, refuse_both
from influence_kit.methods.arguments import check_passed_functions
from influence_kit.methods.caches import Caches
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.example_batches import TRAIN, BatchSize, ExampleBatches
from influence_kit.methods.fingerprints import Given
from influence_kit.methods.function_fingerprint import function_fingerprint
from influence_kit.methods.layer_names import Layers, check_layers
from influence_kit.methods.read_only import Made, read_only
from influence_kit.methods.restarts import check_k, refuse_tokens, starts_again
from influence_kit.methods.structure import Structure, unchanged_by_errors
from influence_kit.preservation.restore import borrowed
from influence_kit.scoring.reducers import AllScores, KMostInfluentialResults, Reducer, TopK

Selection = Callable[[nn.Module, Sequence[str] | None], Mapping[str, nn.Parameter]]
Finding = Callable[[Any, bool], list[Any]]
# examples whose outputs and losses show whether a model or loss has changed
FEW = 8


@read_only
class ExampleInfluence(DataInfluence, metaclass=Made):
    """A method that scores training examples for test examples.

    Args:
        select: returns the parameters whose gradients count, given the model and names of layers.
        differentiates: whether gradients are computed; if not, the parameters only determine device
            and precision.
        find: gives the checkpoints in order, from the argument and whether any file may be one.

    See ``InnerProductInfluence`` for the other arguments.
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
        select: Selection = choose_parameters,
        differentiates: bool = True,
        find: Finding = find_checkpoints,
    ) -> None:
        self.model = check_model(model)
        check_flags({"eval_mode": eval_mode})
        check_passed_functions(checkpoints_load_func, loss_fn, test_loss_fn, test_output_fn)
        refuse_both(test_loss_fn, test_output_fn)
        self.verify = check_verify(verify)
        self.batch_axes = batch_axes
        self.checkpoints_load_func = checkpoints_load_func
        self._caches = Caches()
        self._find = find
        self._checkpoints = self._found_checkpoints(checkpoints)
        self.loss_fn = loss_fn
        self.test_output_fn = test_output_fn
        self.test_loss_fn = test_loss_fn
        if test_loss_fn is None and test_output_fn is None:
            self.test_loss_fn = loss_fn
        self._eval_mode = eval_mode
        self._examples = ExampleBatches(
            model,
            train_dataset,
            batch_size,
            batch_axes,
            eval_mode,
            self._get_device,
            self._caches.why_fixed,
        )
        self.batch_size = self._examples.batch_size
        self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        self._train_loss, self._test_loss = losses_of(
            loss_fn, test_loss_fn, test_output_fn, sample_wise_grads_per_batch
        )
        self.reduction_type = self._train_loss.reduction
        self.test_reduction_type = self._test_loss.reduction
        self._caches.sources = {
            TRAIN: partial(data_fingerprint, train_dataset),
            "loss_fn": partial(function_fingerprint, loss_fn, model),
        }
        self._select, self._differentiates = select, differentiates
        # functions that set up what depends on the chosen parameters, called again if these change
        self._bindings: list[Callable[[], None]] = []
        with alone_with(model):  # another thread may have its flags and weights in the model
            self._look_at(layers)
            self._structure = Structure(model)
        self._examples.add_given(train_dataset, TRAIN)

    # Scores.

    @overload
    def influence(
        self,
        inputs: Any = None,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: None = None,
        doc_ids: None = None,
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

    @starts_again
    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        per_token: str | None = None,
        doc_ids: Any = None,
    ) -> Tensor | KMostInfluentialResults:
        """The scores of all training examples for each test example, or the k best.

        Args:
            inputs: test examples: one batch (tuple, list or dict), a DataLoader, or a Dataset,
                which is batched like the training set.
            k: how many proponents or opponents to return; None for all scores.
            proponents: the highest scores; False for the lowest.
            show_progress: a bar over the training set, and before it one over the checkpoints if
                something is fitted or cached at each.
            aggregate: the influence on the sum of the test examples' losses (or outputs): one row.
            per_token: None; scores by token are those of ``InnerProductInfluence``.
            doc_ids: None, as ``per_token``.

        Returns:
            Scores ``[m, n]`` (``[1, n]`` if ``aggregate``) in the order of the training set, or
            ``KMostInfluentialResults`` of ``[m, min(k, n)]``. Positive: a proponent, training on it
            lowered the test loss (raised ``test_output_fn``, if that is given). Scores have the
            model's precision, and float32 for a model in half precision. Complex parameters count
            as pairs of real numbers: an inner product of gradients is Re(conj(g) . g').
        """
        refuse_tokens(self.get_name(), per_token, doc_ids)
        check_k(k)
        doing = "compute influence for training batches"
        if k is not None:
            kind = "proponents" if proponents else "opponents"
            doing = f"perform computation for getting {kind}. Processing training batches"
        reducer = self.make_reducer(k, proponents)
        self.stream_scores(inputs, reducer, doing, show_progress, aggregate)
        found = reducer.result()
        return found.to(self._dtype) if isinstance(found, Tensor) else found

    @abstractmethod
    def stream_scores(
        self,
        inputs: Any,
        reducer: Reducer,
        doing: str,
        show_progress: bool,
        aggregate: bool,
    ) -> None:
        """Pass the scores of all test and training examples to the reducer, block by block.

        Args:
            inputs: test examples, as the user passed them.
            reducer: the result of ``make_reducer``; takes blocks of scores with their indices.
            doing: the text of the progress bar.
            show_progress: whether to show a bar.
            aggregate: one row, the sum over the test examples.
        """

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        """The reducer that takes the blocks of scores, each of some training examples."""
        return AllScores() if k is None else TopK(k, proponents)

    # What a user reads and sets.

    @property
    def checkpoints(self) -> list[Any]:
        """The checkpoints, in order; may be set to anything that the constructor takes."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        self._checkpoints = self._found_checkpoints(checkpoints)
        self._caches.clear_of_checkpoints()
        self._examples.forget()

    def _found_checkpoints(self, checkpoints: Any) -> list[Any]:
        any_file = self.checkpoints_load_func is not load_checkpoint
        return self._find(checkpoints, any_file)

    def forget(self) -> None:
        """Drop everything that is cached from earlier calls: gradients, fits, embeddings."""
        self._caches.clear()
        self._examples.forget()

    def read_otherwise(self) -> bool:
        """Take another dimension as that of the examples; False if the shapes allow no other."""
        axes = self._examples.axes
        if axes.are_likeliest:
            self._of_likeliest = self._source.state()
        if axes.try_another():
            return True
        # all readings failed: what the others seemed to show of the model does not hold
        self._source.take_state(self._of_likeliest)
        return False

    @property
    def train_dataloader(self) -> CheckedBatches:
        """The batches of the training set, in their order; with the attributes of its loader."""
        return self._examples.train

    @property
    def train_dataloader_len(self) -> int | None:
        """The number of training batches; None if the loader has no length."""
        return loader_length(self.train_dataloader)

    @property
    def explains_output(self) -> bool:
        """Whether a positive score means that training raised an output, not lowered a loss."""
        return self.test_output_fn is not None

    @property
    def layer_modules(self) -> list[nn.Module] | None:
        """The modules named by ``layers``."""
        if self.layers is None:
            return None
        return [self.model.get_submodule(name) for name in self.layers]

    def __repr__(self) -> str:
        if "_is_made" not in vars(self):  # shown by a debugger, for example
            return object.__repr__(self)
        return summary(self, self.notes())

    def notes(self) -> list[str]:
        """What ``repr`` shows beside the arguments, one line per entry."""
        return size_notes(len(self.checkpoints), self._source.capture.parameters)

    # The model.

    def _look_at(self, layers: Any) -> None:
        """Choose the parameters whose gradients count."""
        self.__dict__["layers"] = check_layers(self.model, layers)
        self._parameters = dict(self._select(self.model, self.layers))
        differentiated = self._parameters if self._differentiates else {}
        self._source = GradientSource(self.model, differentiated, self.verify)
        self._of_likeliest = self._source.state()
        for bind in self._bindings:
            bind()

    def _bind(self, bind: Callable[[], None]) -> None:
        """Call a function that depends on the chosen parameters, now and whenever these change."""
        bind()
        self._bindings.append(bind)

    def _see_model(self) -> None:
        """Read a changed model again, or refuse it if some cache is filled."""
        change = self._structure.change(self.model)
        if change is None:
            return
        if self._caches.filled is not None:
            self._caches.refuse(f"the model is not what it was ({change})")
        self._look_whole(self.layers)
        self._structure = Structure(self.model)

    def _look_whole(self, layers: Any) -> None:
        """``_look_at``; an error leaves the object as it was."""
        with unchanged_by_errors(self):
            self._look_at(layers)

    @contextmanager
    def session(self) -> Iterator[CheckpointLoader]:
        """The model with hooks on, borrowed from the user; a loader for its checkpoints."""
        refuse_meta(self.model)
        with alone_with(self.model):  # also while the model is read
            self._see_model()
            self._examples.forget_changeable()
            with borrowed(self.model, self._eval_mode, self._probe), self._source.attached():
                refuse_mixing_layers(self.model)
                self._caches.check_sources()
                loader = CheckpointLoader(
                    self.model, self.checkpoints, self.checkpoints_load_func, self._check_weights
                )
                self._source.begin(loader)
                try:
                    yield loader
                finally:
                    self._caches.note(loader.fingerprints)
                    if loader.current in loader.fingerprints:  # else it was refused
                        self._caches.note_given(loader.current, self._give)

    def _check_kept(self) -> None:
        """Refuse to return cached results if what they were computed from has changed."""
        filled = self._caches.filled
        if filled is not None:
            with self.session() as loader:
                for number in range(len(self.checkpoints) if filled.of_checkpoints else 0):
                    loader.load(number)

    def _check_weights(self, number: int, fingerprint: Fingerprint) -> None:
        self._caches.check_weights(number, fingerprint, self._give)

    def _probe(self) -> Any:
        """The model's outputs on a few examples, which show the effect of ``eval()`` and caches."""
        return call_model(self.model, self._examples.first(2))

    def _give(self, batch: Batch | None) -> Given:
        """What model and loss return for a batch; None means the first training examples."""
        if batch is None:
            batch = self._examples.first(FEW)
        return Given.of(self.model, self._train_loss, batch)

    def _get_device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._get_device()

    @property
    def _sample(self) -> Tensor:
        """An empty tensor with the dtype and device of scores (not in half precision)."""
        return torch.empty(0, dtype=self._dtype, device=self.device)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of scores: the model's, real, and float32 for half precision."""
        return exact_dtype(next(iter(self._parameters.values())).dtype)

    def batches(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        """The training set (None), the batch in pieces that fit memory, or the user's loader."""
        return (
            self.train_dataloader if inputs is None else self._examples.of_inputs(inputs, ordered)
        )

    def progress(self, doing: str, total: int | None, show: bool) -> "tqdm[Any]":
        text = f"Using {self.get_name()} to {doing}"
        return tqdm(desc=text, total=total, disable=not show)
