"""Losses and logits of a training set at all checkpoints of a run: the inputs of baselines.

Shapes: C checkpoints, n examples, c classes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from influence_kit.checkpoints.discovery import (
    LoadFunction,
    find_checkpoints,
    label_of,
    load_checkpoint,
)
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.arguments import check_count, check_flag, check_function, shown
from influence_kit.core.objects import check_model
from influence_kit.data.batches import Batch, call_model, example_count, take, to_device
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.class_labels import logits_of
from influence_kit.data.determinism import first_example
from influence_kit.data.input_checks import refuse_uncollatable
from influence_kit.data.loaders import as_loader
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.losses.declared_reduction import declared_reduction
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.preservation.restore import borrowed

ROWS = 256  # per batch of a data set


def checkpoint_losses(
    model: nn.Module,
    dataset: Dataset[Any] | DataLoader[Any],
    checkpoints: Any,
    loss_fn: LossFunction | None = None,
    *,
    checkpoints_load_func: LoadFunction = load_checkpoint,
    batch_size: int = ROWS,
    show_progress: bool = False,
) -> Tensor:
    """The loss of each example at each checkpoint, float64 ``[C, n]``, as ``mean_loss`` takes them.

    The losses are those whose gradients the methods take, in evaluation mode. A ``loss_fn`` that
    returns the sum or the mean over a batch is called for each example alone, which takes longer
    than one with ``reduction="none"``. The model is left unchanged.

    Args:
        model: the model, as for a method.
        dataset: the examples, as a method's ``train_dataset``.
        checkpoints: as a method takes them.
        loss_fn: as a method takes it: one loss per example, their sum or their mean.
        checkpoints_load_func: ``load(model, checkpoint) -> learning rate``.
        batch_size: examples per batch, where ``dataset`` is not a loader.
        show_progress: a progress bar over the checkpoints.

    Raises:
        InvalidArgumentError: for no checkpoints or examples, a loader that shuffles, or a loss that
            is not made of the losses of single examples.
        NonFiniteError: if a loss is NaN or infinite.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
        >>> model = nn.Linear(1, 1, bias=False)
        >>> run = [{"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[0.5]])}]
        >>> checkpoint_losses(model, data, run, nn.MSELoss()).tolist()
        [[1.0, 4.0], [0.25, 1.0]]
    """
    check_count(batch_size, "batch_size")
    if loss_fn is not None:
        check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)")
    loss = Loss(loss_fn, declared_reduction(loss_fn, None), "loss_fn")
    loader = _loader(model, dataset, batch_size)
    run = _Run(model, checkpoints, checkpoints_load_func, show_progress)
    return run.measured(loader, "loss", lambda batch: losses_alone(model, loss, batch))


def checkpoint_logits(
    model: nn.Module,
    dataset: Dataset[Any] | DataLoader[Any],
    checkpoints: Any,
    *,
    checkpoints_load_func: LoadFunction = load_checkpoint,
    batch_size: int = ROWS,
    show_progress: bool = False,
) -> Tensor:
    """The logits of each example at each checkpoint, float64 ``[C, n, c]``: for ``low_margin``.

    If the model returns more than logits, its ``logits`` are taken. The model is called in
    evaluation mode, and left unchanged.

    Args:
        model: the model, as for a method.
        dataset: the examples, as a method's ``train_dataset``.
        checkpoints: as a method takes them.
        checkpoints_load_func: ``load(model, checkpoint) -> learning rate``.
        batch_size: examples per batch, where ``dataset`` is not a loader.
        show_progress: a progress bar over the checkpoints.

    Raises:
        InvalidArgumentError: for no checkpoints or examples, a loader that shuffles, or a model
            without logits ``[n, c]``.
        NonFiniteError: if a logit is NaN or infinite.
    """
    check_count(batch_size, "batch_size")
    loader = _loader(model, dataset, batch_size)
    run = _Run(model, checkpoints, checkpoints_load_func, show_progress)
    return run.measured(loader, "logits", lambda batch: _logits(model, batch))


def _loader(model: nn.Module, dataset: Any, batch_size: int) -> Iterable[Batch]:
    loader = as_loader(dataset, batch_size, "dataset")
    example = first_example(dataset)
    if example is not None:
        refuse_uncollatable(check_model(model), example, "dataset")
    return loader


class _Run(NamedTuple):
    """A model and the checkpoints of its training."""

    model: nn.Module
    checkpoints: Any
    load: LoadFunction
    show_progress: bool

    def measured(
        self, loader: Iterable[Batch], what: str, measure: Callable[[Batch], Tensor]
    ) -> Tensor:
        """The measurements of all batches at each checkpoint, float64 ``[C, n, ...]``."""
        self._check()
        batches = CheckedBatches(loader, "dataset")
        device = next(self.model.parameters()).device
        found = find_checkpoints(self.checkpoints, self.load is not load_checkpoint)
        rows = []

        def probe() -> Any:
            return call_model(self.model, to_device(next(iter(loader)), device))

        with borrowed(self.model, probe=probe), torch.no_grad():
            states = CheckpointLoader(self.model, found, self.load)
            for index in tqdm(range(len(found)), what, disable=not self.show_progress):
                states.load(index)
                parts = [measure(to_device(batch, device)).cpu().double() for batch in batches]
                if not parts:
                    raise InvalidArgumentError(
                        f"`dataset` gave no examples at checkpoint {index}; it must give the same "
                        "examples in every pass"
                    )
                rows.append(torch.cat(parts))
                _refuse_not_finite(rows[-1], what, f"checkpoint {index} ({label_of(found[index])})")
        return torch.stack(rows)

    def _check(self) -> None:
        if not isinstance(self.model, nn.Module) or next(self.model.parameters(), None) is None:
            raise InvalidArgumentError(
                f"`model` must be a torch.nn.Module with parameters; got {shown(self.model)}"
            )
        check_function(self.load, "checkpoints_load_func", "load(model, checkpoint) -> number")
        check_flag(self.show_progress, "show_progress")


def _refuse_not_finite(values: Tensor, what: str, where: str) -> None:
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        value = values[tuple(bad[0].tolist())].item()
        raise NonFiniteError(f"the {what} of example {int(bad[0, 0])} at {where} is {value}")


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = logits_of(call_model(model, batch))
    if logits.dim() != 2:
        raise InvalidArgumentError(
            f"the model returned logits of shape {list(logits.shape)} for {example_count(batch)} "
            "examples; expected [n, c], one row per example"
        )
    return logits


def losses_alone(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """The loss of each example, ``[n]``; of a loss of several positions the sum over them."""
    n, outputs = example_count(batch), call_model(model, batch)
    if loss.values(outputs, batch).dim() == 0:
        alone = list(_alone(model, loss, outputs, batch))
        # on every batch: one alone may not settle it; a formula may replace a model's own loss
        loss.settle((outputs, batch), alone, closeness=0.0)
        loss.total(outputs, batch, n)
        if loss.reduction != "none":
            return torch.stack([loss.values(*one).sum() for one in alone])
    loss.total(outputs, batch, n)  # refuses what is not one loss per example
    return loss.values(outputs, batch).reshape(n, -1).sum(dim=1)


def _alone(model: nn.Module, loss: Loss, outputs: Any, batch: Batch) -> Iterator[tuple[Any, Batch]]:
    """Outputs and batch of each example by itself."""
    n = example_count(batch)
    has_rows = loss.is_of_outputs and isinstance(outputs, Tensor) and outputs.shape[:1] == (n,)
    for index in range(n):
        row = slice(index, index + 1)
        one = take(batch, row)
        yield (outputs[row] if has_rows else call_model(model, one)), one
