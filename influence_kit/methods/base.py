"""What every method is given, whatever it computes: model, data, checkpoints, losses, layers."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from captum.influence import DataInfluence
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from influence_kit.checkpoints.discovery import LoadFunction, find_checkpoints, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader, Fingerprint
from influence_kit.core.arguments import check_count
from influence_kit.core.dtypes import exact_dtype
from influence_kit.core.locks import alone_with
from influence_kit.data.batch_axes import BatchAxes
from influence_kit.data.batches import (
    Batch,
    call_model,
    example_count,
    is_batch,
    is_dataset,
    split,
    take,
    to_device,
)
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.determinism import first_example
from influence_kit.data.input_checks import (
    as_examples,
    refuse_inputs,
    refuse_no_data,
    refuse_one_example,
    refuse_uncollatable,
)
from influence_kit.data.loaders import as_loader, check_order, loader_length
from influence_kit.errors import InvalidArgumentError, PassAgain
from influence_kit.gradients.check import refuse_meta, refuse_mixing_layers
from influence_kit.gradients.gradient_source import (
    GradientSource,
    Verify,
    check_verify,
    comfortable_rows,
)
from influence_kit.losses.loss import Loss, LossFunction, declared_reduction
from influence_kit.losses.margins import OutputFunction
from influence_kit.losses.measures import measure_of_tests, refuse_both
from influence_kit.methods.kept_of import KeptOf
from influence_kit.methods.layer_names import Layers, check_layers
from influence_kit.methods.origin import Given
from influence_kit.methods.parameter_selection import choose_parameters
from influence_kit.methods.structure import Structure
from influence_kit.preservation.restore import borrowed
from influence_kit.preservation.training_flags import close, outputs_of

BatchSize = int | Literal["auto"] | None
TRAIN = "train_dataset"
# where the examples of a data set cannot be looked at beforehand
ROWS_OF_ITERABLE = 64
# examples whose outputs and losses tell that a model or loss has changed
FEW = 8


class InfluenceBase(KeptOf, DataInfluence):
    """The arguments of a method, checked, and a session with the model.

    See ``InnerProductInfluence`` for the arguments.
    """

    __signature__: inspect.Signature

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
    ) -> None:
        refuse_both(test_loss_fn, test_output_fn)
        self.model = model
        self.verify = check_verify(verify)
        self.batch_axes = batch_axes
        self._axes = BatchAxes(batch_axes)
        self.checkpoints_load_func = checkpoints_load_func
        self._checked: dict[str, CheckedBatches] = {}
        self.checkpoints = checkpoints
        self.loss_fn = loss_fn
        self.test_output_fn = test_output_fn
        self.test_loss_fn = test_loss_fn
        if test_loss_fn is None and test_output_fn is None:
            self.test_loss_fn = loss_fn
        self.batch_size = _check_batch_size(batch_size, train_dataset)
        self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        self.reduction_type = declared_reduction(loss_fn, sample_wise_grads_per_batch)
        self.test_reduction_type = self.reduction_type
        self._train_loss = self._test_loss = Loss(loss_fn, self.reduction_type, "loss_fn")
        name = "test_loss_fn" if test_output_fn is None else "test_output_fn"
        measure = test_loss_fn if test_output_fn is None else test_output_fn
        if measure is not None:
            declared = declared_reduction(measure, sample_wise_grads_per_batch, name)
            self.test_reduction_type = declared
            self._test_loss = measure_of_tests(
                test_loss_fn, test_output_fn, declared, self._train_loss
            )
        self._eval_mode = eval_mode
        with alone_with(model):  # another thread may have its flags and weights in the model
            self._look_at(layers)
            self._structure = Structure(model)
        self._train_data: Any = train_dataset
        if not is_dataset(train_dataset):
            self._check(as_loader(train_dataset, None, TRAIN), TRAIN)

    def _look_at(self, layers: Layers | None) -> None:
        """Choose the parameters whose gradients count."""
        self.__dict__["layers"] = check_layers(self.model, layers)
        self._parameters = choose_parameters(self.model, self.layers)
        self._source = GradientSource(self.model, self._parameters, self.verify)

    def __init_subclass__(cls) -> None:
        """Show the common arguments in the signature of a class that passes them on."""
        super().__init_subclass__()
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own):
            named = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
            common = inspect.signature(cls.__mro__[1]).parameters.values()
            known = {parameter.name for parameter in named}
            changed = {parameter.name: parameter for parameter in own}
            kept = [changed.get(p.name, p) for p in common if p.name not in known]
            rank = {parameter: parameter.kind for parameter in (*kept, *named)}
            cls.__signature__ = inspect.Signature(sorted(rank, key=rank.__getitem__))
        elif "__init__" in vars(cls):
            cls.__signature__ = inspect.Signature(own)

    # What a user reads and sets.

    @property
    def checkpoints(self) -> list[Any]:
        """The checkpoints, in order; may be set to anything that the constructor takes."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        self._checkpoints = self._find(checkpoints)
        self._forget()

    def _find(self, checkpoints: Any) -> list[Any]:
        any_file = self.checkpoints_load_func is not load_checkpoint
        return find_checkpoints(checkpoints, any_file)

    def _forget(self) -> None:
        """Drop what was made at other checkpoints."""
        super()._forget()
        for checked in self._checked.values():
            checked.forget()

    def read_otherwise(self) -> bool:
        """Take another axis for that of the examples; False where shapes leave no other."""
        return self._axes.try_another()

    def forget(self) -> None:
        """Drop all that is kept of earlier questions: gradients, fits, embeddings."""
        self._forget()

    @property
    def train_dataloader(self) -> CheckedBatches:
        """The batches of the training set, in their order; with the attributes of its loader."""
        return self._checked_batches(self._train_data, TRAIN)

    @property
    def train_dataloader_len(self) -> int | None:
        """The number of training batches; None where the loader does not tell."""
        return loader_length(self.train_dataloader)

    @property
    def explains_output(self) -> bool:
        """Whether a positive score says that training raised an output, not lowered a loss."""
        return self.test_output_fn is not None

    @property
    def layer_modules(self) -> list[nn.Module] | None:
        """The modules named by ``layers``."""
        if self.layers is None:
            return None
        return [self.model.get_submodule(name) for name in self.layers]

    # What a method works with.

    @contextmanager
    def _session(self) -> Iterator[CheckpointLoader]:
        """The model with hooks on, borrowed from the user; a loader for its checkpoints."""
        refuse_meta(self.model)
        with alone_with(self.model):  # also while the model is looked at
            self._see_model()
            for name, checked in self._checked.items():
                if self._why_fixed(name) is None:  # a user may change data between two calls
                    checked.forget()
            with borrowed(self.model, self._eval_mode, self._probe), self._source.attached():
                refuse_mixing_layers(self.model)
                self._check_sources()
                loader = CheckpointLoader(
                    self.model, self.checkpoints, self.checkpoints_load_func, self._check_weights
                )
                self._source.begin(loader)
                try:
                    yield loader
                finally:
                    self._note(loader.fingerprints)
                    if loader.current in loader.fingerprints:  # not of one that was refused
                        self._note_given(loader.current)

    def _check_kept(self) -> None:
        """Refuse to hand out what is kept of something else than there is now."""
        if self._kept_since is not None:
            with self._session() as loader:
                for number in range(len(self.checkpoints) if self._keeps_of_checkpoints else 0):
                    loader.load(number)

    def _probe(self) -> Any:
        """The model's outputs on a few examples, which show what ``eval()`` and caches do."""
        return call_model(self.model, self._few(2))

    def _few(self, count: int) -> Batch:
        """The first examples of the training set."""
        batch = next(iter(self.train_dataloader))
        few = take(batch, slice(0, count)) if example_count(batch) > count else batch
        return to_device(few, self._device)

    def _note_given(self, number: int) -> None:
        """Note what model and loss give at a checkpoint that is loaded, if something is kept."""
        is_new = number in self._origin.weights and number not in self._origin.given
        if self._kept_since is None or not is_new:
            return
        with suppress(Exception):  # of data that cannot be read again, say
            batch = self._few(FEW)
            given, again = self._given(batch), self._given(batch)
            if _agree(given.outputs, again.outputs) and _agree(given.losses, again.losses):
                self._origin.given[number] = given

    def _given(self, batch: Batch) -> Given:
        outputs = outputs_of(partial(call_model, self.model, batch))
        losses = outputs_of(lambda: self._train_loss.values(call_model(self.model, batch), batch))
        return Given(batch, outputs or [], losses or [])

    def _check_weights(self, number: int, fingerprint: Fingerprint) -> None:
        """Refuse other weights than what is kept was made of, and a model or loss that differs."""
        super()._check_weights(number, fingerprint)
        known = self._origin.given.get(number)
        if known is None or self._kept_since is None:
            return
        now = self._given(known.batch)
        with_same = "for the same weights and examples"
        if not _agree(now.outputs, known.outputs):
            self._refuse_kept(
                f"the model gives other outputs {with_same} (a hook, a setting or a method of it "
                "has changed) than"
            )
        if not _agree(now.losses, known.losses):
            self._refuse_kept(
                f"`loss_fn` gives other losses {with_same} (something that it uses has changed) "
                "than"
            )

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def _sample(self) -> Tensor:
        """An empty tensor as scores are computed: where the model is, not in half precision."""
        return torch.empty(0, dtype=self._dtype, device=self._device)

    @property
    def _dtype(self) -> torch.dtype:
        """Of scores: the model's, real, and float32 for half precision."""
        return exact_dtype(next(iter(self._parameters.values())).dtype)

    def _train_count(self) -> int:
        data = getattr(self.train_dataloader, "dataset", None)
        return loader_length(data) or 0

    def _batches(self, inputs: Any, ordered: bool = True) -> Iterable[Batch]:
        """The training set (None), the batch in pieces that fit memory, or the user's loader."""
        if inputs is None:
            return self.train_dataloader
        refuse_inputs(inputs)
        if as_examples(inputs):
            loader = self._loader_of(inputs, "inputs")
            return CheckedBatches(loader, "inputs", ordered=ordered, axes=self._axes)
        if is_batch(inputs):
            refuse_one_example(inputs, self.train_dataloader.dimensions())
            inputs = self._marked_batch(inputs)
            one = to_device(take(inputs, slice(0, 1)), self._device)
            return list(split(inputs, comfortable_rows(self.model, one, self._device)))
        if ordered:
            check_order(inputs, "inputs")
        return CheckedBatches(inputs, "inputs", ordered=ordered, axes=self._axes)

    def _marked_batch(self, batch: Batch) -> Batch:
        """A batch marked with where its examples stand: as in the training set, if it looks so."""
        if getattr(self.train_dataloader, "batch_size", None) == 1:
            self.train_dataloader.look_at()  # which shows what has no dimension of examples
        marked = self._axes.mark(batch)
        if not self._axes.is_clear(batch):
            self.train_dataloader.look_at()
            # nothing was computed yet of what may have been read otherwise
            with suppress(PassAgain):
                return self._axes.mark(batch)
            marked = self._axes.mark(batch)
        return marked

    def _checked_batches(self, data: Any, name: str) -> CheckedBatches:
        """The batches of an argument, made once."""
        if name not in self._checked:
            self._check(self._loader_of(data, name), name)
        return self._checked[name]

    def _check(self, loader: Iterable[Batch], name: str) -> None:
        self._checked[name] = CheckedBatches(
            loader,
            name,
            partial(self._why_fixed, name),
            axes=self._axes,
            examine=partial(refuse_uncollatable, self.model, name=name),
        )

    def _why_fixed(self, name: str) -> str | None:
        """Why passes over the data of an argument must agree; None where they need not."""
        return None

    def _loader_of(self, data: Any, name: str) -> Iterable[Batch]:
        """Batches of a data set, of the size asked for."""
        refuse_no_data(data, name)
        size: Any = self.batch_size
        if size == "auto" or (size is None and name == "inputs"):
            size = self._auto_batch_size(data, name)
        return as_loader(data, size, name)

    def _auto_batch_size(self, data: Any, name: str) -> int:
        if isinstance(data, IterableDataset):
            return ROWS_OF_ITERABLE
        example = first_example(data)
        if example is not None:
            refuse_uncollatable(self.model, example, name)
        with borrowed(self.model, self._eval_mode):
            refuse_mixing_layers(self.model)
            for batch in DataLoader(data, batch_size=1):
                return comfortable_rows(self.model, to_device(batch, self._device), self._device)
        return 1

    def _bar(self, doing: str, total: int | None, show: bool) -> "tqdm[Any]":
        text = f"Using {self.get_name()} to {doing}"
        return tqdm(desc=text, total=total, disable=not show)


def _agree(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of outputs are the same but for rounding; what is not finite tells none."""
    finite = all(bool(one.isfinite().all()) for one in (*ones, *others))
    return not (ones and others and finite) or close(ones, others)


def _check_batch_size(batch_size: BatchSize, train_dataset: Any) -> BatchSize:
    if not is_dataset(train_dataset):
        return batch_size
    if batch_size is None:
        raise InvalidArgumentError(
            "since the `train_dataset` argument was a `Dataset`, `batch_size` must be an int."
        )
    return "auto" if batch_size == "auto" else check_count(batch_size, "batch_size", 1, '"auto"')
