"""A record of training: the weights before each step, and the examples that the step used."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import Self

from influence_kit.core.arguments import shown
from influence_kit.core.objects import check_model, check_path
from influence_kit.errors import InvalidArgumentError
from influence_kit.training.step import Reduction, Step
from influence_kit.training.trace_store import State, TraceInFolder, TraceInMemory


class _RecordedStep(Mapping[str, Any]):
    """A step as a dict, whose ``state_dict`` is read when it is accessed."""

    def __init__(self, trace: "TrainingTrace", number: int) -> None:
        self._trace, self._number = trace, number
        self._metadata = trace._store.metadata(number)

    def __getitem__(self, key: str) -> Any:
        return self._trace._state(self._number) if key == "state_dict" else self._metadata[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("state_dict", *self._metadata))

    def __len__(self) -> int:
        return 1 + len(self._metadata)


class TrainingTrace(Sequence[Mapping[str, Any]]):
    """The steps of a training run, recorded from an ordinary loop, for ``DVEmb``.

    A sequence of steps, each a dict of ``state_dict`` (before the step), ``indices`` (of its
    examples in the training set), ``lr``, ``epoch``, ``weight_decay`` and ``reduction``. Steps are
    assumed to be plain SGD steps, with weight decay if there is some: clipping or scaling of
    gradients is not recorded.

    Each step keeps a copy of the tensors that differ from those of the first step: a trace takes
    steps x (trained parameters and buffers), in memory, or on disk if there is a ``folder``.

    Args:
        model: the model that is trained; None to read the trace in ``folder``.
        optimizer: the optimizer whose learning rate and weight decay ``record`` reads.
        folder: where to write steps, one safetensors file each, instead of keeping them in memory.
        reduction: whether steps use the "mean" of their examples' losses, the default of torch's
            losses, or their "sum".
        resume_at: continue the trace in ``folder`` after that many steps; later ones are deleted.

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
    ) -> None:
        if model is not None:
            check_model(model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise InvalidArgumentError(
                f"`optimizer` must be a torch.optim.Optimizer, or None; got {shown(optimizer)}"
            )
        path = None if folder is None else check_path(folder, "folder", "None")
        self._model, self._optimizer, self._reduction = model, optimizer, reduction
        self._store: TraceInFolder | TraceInMemory
        self._store = TraceInMemory() if path is None else TraceInFolder(path)
        if model is not None and (len(self._store) or resume_at is not None):
            self._resume(resume_at)
        self._first: State = self._store.state(0) if len(self._store) else {}
        if optimizer is not None:
            _warn_unless_plain(optimizer)

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
    ) -> None:
        """Record a step; call it before ``optimizer.step()``.

        Args:
            indices: indices of the step's examples in the training set (all of them, if gradients
                are accumulated): a tensor, an array or a list of ints.
            lr: the learning rate; None for the optimizer's.
            epoch: the number of the epoch, with which ``DVEmb`` can score each epoch apart.
            weight_decay: the weight decay; None for the optimizer's (0 without an optimizer).

        Raises:
            InvalidArgumentError: if the optimizer has several learning rates, or there is none.
        """
        state = self._changed()
        step = {
            "state_dict": state,
            "indices": indices,
            "lr": self._setting("lr", lr),
            "epoch": epoch,
            "weight_decay": self._setting("weight_decay", weight_decay),
            "reduction": self._reduction,
        }
        self._store.append(asdict(Step.of(step, f"step {len(self)}")), state)
        self._first = self._first or state

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
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
        return _RecordedStep(self, range(len(self))[number])

    def _state(self, number: int) -> State:
        return {**self._first, **self._store.state(number)}

    def _changed(self) -> State:
        """Copies of the model's tensors that differ from those of the first step."""
        if self._model is None:
            raise InvalidArgumentError(
                "the trace was opened for reading; pass the model to TrainingTrace to record steps"
            )
        state = {}
        for name, value in self._model.state_dict().items():
            if not isinstance(value, Tensor):
                raise InvalidArgumentError(
                    f"the model's state dict holds a {type(value).__name__} under '{name}'; a "
                    "trace can only keep tensors"
                )
            copy = value.detach().cpu()
            if name not in self._first or not torch.equal(copy, self._first[name]):
                state[name] = copy.clone() if copy.data_ptr() == value.data_ptr() else copy
        return state

    def _setting(self, name: str, given: float | None) -> float:
        """A setting of the step: the given value, or the optimizer's."""
        if given is not None:
            return given
        if self._optimizer is None:
            if name == "lr":
                raise InvalidArgumentError(
                    "no learning rate: pass `lr`, or the optimizer to TrainingTrace"
                )
            return 0.0
        found = sorted({float(group.get(name, 0.0)) for group in self._optimizer.param_groups})
        if len(found) > 1:
            raise InvalidArgumentError(
                f"the optimizer's parameter groups have {name} {found}, but a trace has one per "
                f"step: pass `{name}`"
            )
        return found[0]


def _warn_unless_plain(optimizer: Optimizer) -> None:
    """Warn if the steps of an optimizer are not those of plain SGD."""
    other = None if isinstance(optimizer, SGD) else f"is {type(optimizer).__name__}"
    for group in optimizer.param_groups if other is None else ():
        for option in ("momentum", "maximize"):
            if group.get(option):
                other = f"has {option}={group[option]}"
    if other is not None:
        warnings.warn(
            f"the optimizer {other}: the trace treats its steps as plain SGD steps with its "
            "learning rate, and scores will be those of a training run with such steps",
            stacklevel=3,
        )
