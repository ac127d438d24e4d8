"""Tail patch: one training step on a query's top examples, after Chang et al. 2024, 2410.17413.

Shapes: m test examples, n training examples, k the number of top training examples.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from influence_kit.core.arguments import check_count, check_flag, check_function, shown
from influence_kit.core.objects import check_model
from influence_kit.data.batches import (
    Batch,
    call_model,
    example_count,
    is_batch,
    is_dataset,
    take,
    to_device,
)
from influence_kit.data.input_checks import as_examples, refuse_inputs, refuse_no_data
from influence_kit.data.loaders import as_loader, check_order
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation.arrays import Values
from influence_kit.evaluation.at_checkpoints import ROWS, losses_alone
from influence_kit.evaluation.row_mean import RowMean
from influence_kit.evaluation.top_examples import TopExamples, top_examples
from influence_kit.losses.declared_reduction import declared_reduction
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.preservation.restore import borrowed

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
CALL = "optimizer(parameters) -> torch.optim.Optimizer, as partial(torch.optim.SGD, lr=0.01)"


def tail_patch(
    model: nn.Module,
    train_dataset: Dataset[Any],
    scores: Values | TopExamples,
    inputs: Any,
    loss_fn: LossFunction | None,
    optimizer: MakeOptimizer,
    k: int = 10,
    together: bool = True,
) -> RowMean:
    r"""The fall of each query's loss by one training step on its top k training examples.

    .. math::
        \ell_t(\theta) - \ell_t(\theta'), \qquad
        \theta' = \text{one step from } \theta \text{ on } \frac{1}{k} \sum_{i \in
        \mathrm{top}_k(\tau_t)} \ell_i

    Where the loss is a negative log-likelihood, this is the gain in the query's log-probability.
    Positive: the top examples teach the query. It needs no retraining, and m steps (m * k with
    ``together=False``); it measures what the examples teach the trained model now, not what they
    contributed to its training. Compare with random scores.

    The paper (arXiv 2410.17413) takes a step on each of the k alone, ``together=False``, and the
    gain in probability rather than in its logarithm.

    Every step starts from the model's weights with a new optimizer, in evaluation mode (no
    dropout). The model is restored afterwards, also after an error.

    Args:
        model: the trained model.
        train_dataset: the n training examples, a ``Dataset`` or sequence with indices.
        scores: ``[m, n]``, positive is a proponent; or what ``influence(inputs, k=...)`` returns.
        inputs: the m test examples: one batch (tuple or dict), a Dataset or a DataLoader.
        loss_fn: ``loss_fn(outputs, targets)`` of training and test examples, as a method takes it;
            None for the loss that the model returns.
        optimizer: makes the optimizer: ``partial(torch.optim.SGD, lr=0.01)``. A function of your
            own may load the state of training into it.
        k: the number of top examples.
        together: one step on the mean loss of the k examples; False for one step on each alone,
            each from the model's weights, and the mean of the k gains.

    Returns:
        The gain of each test example, ``[m]``.

    Raises:
        InvalidArgumentError: for a ``k`` outside 1 to n, indices outside the data set, other than m
            test examples, or an optimizer that is not one.
        NonFiniteError: if a loss is NaN or infinite.

    Example:
        >>> from functools import partial
        >>> data = torch.utils.data.TensorDataset(torch.ones(3, 1), torch.tensor([[1.0], [2], [0]]))
        >>> line = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(line.weight)
        >>> query = (torch.ones(1, 1), torch.ones(1, 1))
        >>> step = partial(torch.optim.SGD, lr=0.125)  # to weight 0.5: a loss of 0.25, not 1
        >>> tail_patch(line, data, [[0.5, 1.0, -1.0]], query, nn.MSELoss(), step, k=1)
        0.750 over 1 test examples
    """
    check_model(model)
    check_flag(together, "together")
    check_function(optimizer, "optimizer", CALL)
    if loss_fn is not None:
        check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)")
    top = top_examples(scores, check_count(k, "k"))
    _check_data(train_dataset, top.n or 0, top.highest)
    groups = top.indices.split(k if together else 1, dim=1)
    loss = Loss(loss_fn, declared_reduction(loss_fn, None), "loss_fn")
    patch = _Patch(model, loss, optimizer)
    queries = _batches(inputs)
    gains: list[Tensor] = []
    with borrowed(model, probe=partial(_probe, patch, queries)):
        for query in _each(queries, patch.device):
            if len(gains) == len(top.indices):
                _refuse_count(len(gains), "more")
            rows = [group[len(gains)].tolist() for group in groups]
            batches = [patch.batch(train_dataset, row) for row in rows]
            gains.append(patch.gain(query, batches, len(gains)))
    if len(gains) < len(top.indices):
        _refuse_count(len(top.indices), str(len(gains)))
    return RowMean(torch.stack(gains))


class _Patch:
    """Training steps from the weights of a model, which is borrowed.

    Args:
        model: the model.
        loss: the loss of training and test examples.
        optimizer: makes the optimizer.
    """

    def __init__(self, model: nn.Module, loss: Loss, optimizer: MakeOptimizer) -> None:
        self.model, self._loss, self._make = model, loss, optimizer
        self._weights = [p for p in model.parameters() if p.requires_grad]
        if not self._weights:
            raise InvalidArgumentError(
                "`model` has no parameter that requires a gradient; a step would change nothing"
            )
        self.device = self._weights[0].device

    def batch(self, data: Any, indices: list[int]) -> Batch:
        """Training examples as one batch."""
        loader = as_loader(Subset(data, indices), len(indices), "train_dataset")
        return to_device(next(iter(loader)), self.device)

    def gain(self, query: Batch, batches: list[Batch], number: int) -> Tensor:
        """The fall of the query's loss by a step on each of the batches, the mean over them."""
        before, after = self._value(query), []
        for batch in batches:
            with self._same_weights():
                self._step(batch)
                after.append(self._value(query))
        found = before - torch.stack(after).mean()
        if not bool(torch.isfinite(found)):
            raise NonFiniteError(
                f"the loss of test example {number} is {before.item():.6g} before and "
                f"{after[0].item():.6g} after the step; use a smaller learning rate if the latter "
                "is not finite"
            )
        return found

    def _value(self, query: Batch) -> Tensor:
        with torch.no_grad():
            return losses_alone(self.model, self._loss, query).double().cpu().sum()

    def _step(self, batch: Batch) -> None:
        optimizer = self._make(list(self._weights))
        if not isinstance(optimizer, Optimizer):
            raise InvalidArgumentError(
                f"`optimizer` returned {shown(optimizer)}; it is called as {CALL}"
            )
        optimizer.zero_grad()
        losses_alone(self.model, self._loss, batch).mean().backward()
        optimizer.step()

    @contextmanager
    def _same_weights(self) -> Iterator[None]:
        """After the block, the weights are what they were before it."""
        before = [weight.detach().clone() for weight in self._weights]
        yield
        with torch.no_grad():
            for weight, value in zip(self._weights, before, strict=True):
                weight.copy_(value)


def _probe(patch: _Patch, queries: Iterable[Batch]) -> Any:
    return call_model(patch.model, next(_each(queries, patch.device)))


def _batches(inputs: Any) -> Iterable[Batch]:
    """The test examples in batches."""
    refuse_inputs(inputs)
    if as_examples(inputs):
        return as_loader(inputs, ROWS, "inputs")
    if is_batch(inputs):
        return [inputs]
    check_order(inputs, "inputs")
    batches: Iterable[Batch] = inputs
    return batches


def _each(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The examples one at a time."""
    for batch in batches:
        on_device = to_device(batch, device)
        for index in range(example_count(on_device)):
            yield take(on_device, slice(index, index + 1))


def _check_data(data: Any, n: int, highest: int) -> None:
    refuse_no_data(data, "train_dataset")
    if isinstance(data, DataLoader) or not is_dataset(data) or not hasattr(data, "__len__"):
        raise InvalidArgumentError(
            "`train_dataset` must be a Dataset or sequence of examples, whose indices are those of "
            f"the scores; got {shown(data)}: pass the data set of a DataLoader"
        )
    if highest >= len(data) or (n and n != len(data)):
        raise InvalidArgumentError(
            f"`train_dataset` has {len(data)} examples and the scores are of {n or highest + 1}; "
            "pass the data set that was scored"
        )


def _refuse_count(m: int, got: str) -> None:
    raise InvalidArgumentError(
        f"`inputs` holds {got} test examples, and there are scores of {m}; pass the ones scored"
    )
