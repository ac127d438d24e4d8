"""A record of training: the state before each step, how the step was taken and its examples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from influence_kit.core.arguments import shown
from influence_kit.core.objects import check_model, check_path
from influence_kit.errors import InvalidArgumentError
from influence_kit.training.forward_states import ForwardStates, RandomState
from influence_kit.training.kept_states import Keep, RecordedStep, check_keep, is_kept
from influence_kit.training.optimizers import Slots, slots_of
from influence_kit.training.recipe import Recipe, group_setting
from influence_kit.training.state_tensors import packed, random_in, slots_in, weights_in
from influence_kit.training.step import Reduction, Step, first_of
from influence_kit.training.trace_store import State, TraceInFolder, TraceInMemory


class TrainingTrace(Sequence[Mapping[str, Any]]):
    """The steps of a training run, recorded from an ordinary loop, for ``MAGIC`` and ``DVEmb``.

    A sequence of steps, each a dict of ``state_dict`` (before the step), ``indices`` (of its
    examples in the training set), ``lr``, ``epoch``, ``weight_decay`` and ``reduction``. Recorded,
    too, is what it takes to repeat the run: the optimizer's options and tensors, clipping,
    micro-batches, which modules were in training mode, and, inside a ``with`` block, the random
    state before each forward pass that draws numbers (dropout).

    Each kept state is a copy of the tensors that differ from those of the first step, and of the
    optimizer's: a trace takes kept states x (trained parameters, buffers, momentum or moments), in
    memory, or on disk if there is a ``folder``.

    Args:
        model: the model that is trained; None to read the trace in ``folder``.
        optimizer: the optimizer that trains it, whose options ``record`` reads.
        folder: where to write steps, one safetensors file each, instead of keeping them in memory.
        reduction: whether steps use the "mean" of their examples' losses, the default of torch's
            losses, or their "sum".
        resume_at: continue the trace in ``folder`` after that many steps; later ones are deleted.
            The caller brings the model, the optimizer and the random state to that point.
        keep: the states that are kept: "all"; "sqrt", those before steps 0, 1, 4, 9, ..., between
            which ``MAGIC`` repeats the run; or an int for every such step. ``DVEmb`` needs all.

    Raises:
        InvalidArgumentError: if the folder already holds a trace and ``resume_at`` is not given, or
            if it holds other files.

    Example:
        >>> import torch
        >>> from influence_kit import DVEmb
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> numbered = torch.utils.data.TensorDataset(torch.arange(8), x, y)
        >>> loader = torch.utils.data.DataLoader(numbered, batch_size=4, shuffle=True)
        >>> with TrainingTrace(model, optimizer) as trace:
        ...     for epoch in range(2):
        ...         for indices, inputs, targets in loader:
        ...             optimizer.zero_grad()
        ...             loss(model(inputs), targets).backward()
        ...             trace.record(indices, epoch=epoch)
        ...             optimizer.step()
        >>> len(trace), trace[3]["lr"], trace[3]["epoch"]
        (4, 0.1, 1)
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> DVEmb(model, train, trace=trace, loss_fn=loss).influence((x[:2], y[:2])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        folder: str | Path | None = None,
        reduction: Reduction = "mean",
        resume_at: int | None = None,
        keep: Keep = "all",
    ) -> None:
        if model is not None:
            check_model(model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise InvalidArgumentError(
                f"`optimizer` must be a torch.optim.Optimizer, or None; got {shown(optimizer)}"
            )
        path = None if folder is None else check_path(folder, "folder", "None")
        self._model, self._optimizer, self._reduction = model, optimizer, reduction
        self._keep, self._forwards = check_keep(keep), ForwardStates()
        self._store: TraceInFolder | TraceInMemory
        self._store = TraceInMemory() if path is None else TraceInFolder(path)
        if model is not None and (len(self._store) or resume_at is not None):
            self._resume(resume_at)
        self._first: State = weights_in(self._store.state(0)) if len(self._store) else {}

    def _resume(self, at: int | None) -> None:
        count = len(self._store)
        if at is None:
            raise InvalidArgumentError(
                f"the folder holds a trace of {count} steps: `TrainingTrace(folder=...)` reads it, "
                "`resume_at` continues it, and another folder starts a new one"
            )
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= count:
            raise InvalidArgumentError(
                f"`resume_at` must be an int from 0 to {count}, the number of steps in `folder`; "
                f"got {shown(at)}"
            )
        if at < count and isinstance(self._store, TraceInFolder):
            self._store.shorten(at)

    def record(
        self,
        indices: Any,
        lr: float | None = None,
        epoch: int | None = None,
        weight_decay: float | None = None,
        clip_norm: float | None = None,
        micro_batches: Sequence[int] | None = None,
    ) -> None:
        """Record a step; call it right before ``optimizer.step()``.

        The gradients of the step are assumed to be those of its examples' losses alone, from
        ``zero_grad()`` with its default: a parameter without a gradient is not moved.

        Args:
            indices: indices of the step's examples in the training set (all of them, in order, if
                gradients are accumulated): a tensor, an array or a list of ints.
            lr: the learning rate for ``DVEmb``; None for the optimizer's.
            epoch: the number of the epoch, with which scores can be had of each epoch apart.
            weight_decay: the weight decay for ``DVEmb``; None for the optimizer's (0 without one).
            clip_norm: the norm to which the step clips gradients: the ``max_norm`` that is given to
                ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)``.
            micro_batches: the number of examples of each backward pass, if gradients are
                accumulated. For "mean" the loss of each of the K passes is assumed to be the mean
                over its examples divided by K; for "sum", the sum over its examples.

        Raises:
            InvalidArgumentError: for indices that are not ints of at least 0, numbers that are not
                finite, micro-batches that are not all of the examples; without a learning rate.
        """
        number = len(self)
        lrs, decays = (
            group_setting(self._optimizer, name, value)
            for name, value in (("lr", lr), ("weight_decay", weight_decay))
        )
        facts = {"state_dict": None, "indices": indices, "epoch": epoch}
        facts |= {"lr": lrs if lr is not None else first_of(lrs), "reduction": self._reduction}
        facts["weight_decay"] = decays if weight_decay is not None else first_of(decays)
        step = asdict(Step.of(facts, f"step {number}"))
        if isinstance(lrs, list) or isinstance(decays, list):
            step |= {"lr": lrs, "weight_decay": decays}
        model = self._recorded_model()
        recipe = Recipe.of(model, self._optimizer, clip_norm, micro_batches, len(step["indices"]))
        kept = is_kept(self._keep, number)
        weights = self._changed() if kept else {}
        slots = slots_of(model, self._optimizer) if kept else {}
        random = self._forwards.take(len(recipe.micro_batches or [0]))
        metadata = {**step, "recipe": asdict(recipe), "kept": kept}
        self._store.append(metadata, {**weights, **packed(slots, random)})
        self._first = self._first or weights

    def finish(self) -> None:
        """Record the weights after the last step; leaving the ``with`` block does this."""
        self._store.finish(self._changed())

    @property
    def final(self) -> State:
        """The state dict after the last step."""
        state = self._store.final()
        if state is None:
            raise InvalidArgumentError(
                "the trace has no weights after its last step: leave its `with` block or call "
                "`finish()`, or pass them as `checkpoints`"
            )
        return {**self._first, **state}

    def __enter__(self) -> Self:
        if self._model is not None:
            self._forwards.attach(self._model)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._forwards.remove()
        # after an error it is not known whether the last step was taken
        if kind is None:
            self.finish()

    def __len__(self) -> int:
        return len(self._store)

    @overload
    def __getitem__(self, number: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, number: slice) -> list[Mapping[str, Any]]: ...

    def __getitem__(self, number: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(number, slice):
            return [self[index] for index in range(len(self))[number]]
        place = range(len(self))[number]
        return RecordedStep(self._store.metadata(place), partial(self._state, place))

    # What it takes to repeat the run.

    def recipe(self, number: int) -> Recipe:
        """How a step was taken."""
        return Recipe(**self._store.metadata(number)["recipe"])

    def is_kept(self, number: int) -> bool:
        """Whether the state before a step was kept."""
        return bool(self._store.metadata(number)["kept"])

    def optimizer_state(self, number: int) -> Slots:
        """The optimizer's tensors before a step, by parameter."""
        return slots_in(self._store.state(number))

    def random_states(self, number: int) -> dict[int, RandomState]:
        """The random state before each forward pass of a step that drew numbers, by micro-batch."""
        return random_in(self._store.state(number))

    def _state(self, number: int) -> State:
        if not self.is_kept(number):
            raise InvalidArgumentError(
                f"the trace has not kept the weights before step {number}: record the run with "
                'keep="all"'
            )
        return {**self._first, **weights_in(self._store.state(number))}

    def _recorded_model(self) -> nn.Module:
        if self._model is None:
            raise InvalidArgumentError(
                "the trace was opened for reading; pass the model to TrainingTrace to record steps"
            )
        return self._model

    def _changed(self) -> State:
        """Copies of the model's tensors that differ from those of the first step."""
        state = {}
        for name, value in self._recorded_model().state_dict().items():
            if not isinstance(value, Tensor):
                raise InvalidArgumentError(
                    f"the model's state dict holds a {type(value).__name__} under '{name}'; a "
                    "trace can only keep tensors"
                )
            copy = value.detach().cpu()
            if name not in self._first or not torch.equal(copy, self._first[name]):
                state[name] = copy.clone() if copy.data_ptr() == value.data_ptr() else copy
        return state
