"""The second moments of gradients that Adam or Adafactor has saved with a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.adam_moments import adam_moments, optimizer_of
from influence_kit.checkpoints.discovery import label_of
from influence_kit.checkpoints.optimizer_order import indices_by_name
from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import real
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.state_checks import DamagedState

SecondMomentsOf = Literal["adam", "adafactor"]
# settings that the groups of torch's and transformers' Adafactor have
SETTINGS = ("beta2_decay", "decay_rate")
# the names under which they save the means of squares: of rows and of columns of a matrix, or of
# all entries of a vector
NAMES = (("row_var", "col_var", "variance"), ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"))
State = Mapping[str, Any]


@dataclass(frozen=True)
class SecondMoment:
    """The running mean of the squares of a parameter's gradients, without bias.

    Args:
        value: in the parameter's shape; None for a parameter that had no gradient in the run.
        eps: what the optimizer adds to the root of it.
    """

    value: Tensor | None
    eps: float

    def scales(self, sample: Tensor) -> Tensor | None:
        """1 / (root of the mean + eps) of each entry ``[p]``, in the dtype of ``sample``.

        It is 0 where the mean is: there the run has seen no gradient, and no step.
        """
        if self.value is None:
            return None
        squares = real(self.value).flatten().to(sample)
        roots = squares.sqrt() + self.eps
        return torch.where(squares > 0, roots.reciprocal(), torch.zeros_like(roots))


def second_moments(
    model: nn.Module,
    checkpoint: Any,
    optimizer: SecondMomentsOf = "adam",
    parameter_names: Sequence[str] | None = None,
) -> dict[str, SecondMoment]:
    """The second moment of each parameter that the optimizer of a checkpoint has, by name.

    Adam's is divided by 1 - beta_2^t after t steps. Adafactor's of a matrix is the outer product of
    the means of rows and columns, over the mean of all.

    Args:
        model: the model.
        checkpoint: as for ``adam_moments``.
        optimizer: "adam" for ``torch.optim.Adam`` and ``AdamW``, or "adafactor" for
            ``torch.optim.Adafactor`` and that of transformers.
        parameter_names: the names of the optimizer's parameters in its order; see
            ``AdamDirections``.

    Raises:
        InvalidArgumentError: if the checkpoint holds no optimizer or several, another one, one
            without steps, or one whose parameters are not those of the model.
    """
    if optimizer == "adafactor":
        return _of_adafactor(model, checkpoint, parameter_names)
    found = {}
    for name, own in adam_moments(model, checkpoint, parameter_names).items():
        second = own.second
        if second is not None:
            second = second / (1 - own.betas[1] ** own.step)
        found[name] = SecondMoment(second, own.eps)
    return found


def _of_adafactor(
    model: nn.Module, checkpoint: Any, parameter_names: Sequence[str] | None
) -> dict[str, SecondMoment]:
    try:
        values = _factored_of(optimizer_of(checkpoint))
        groups = optimizer_of(checkpoint)["param_groups"]
        shapes = {index: value.shape for index, value in values.items()}
        indices = indices_by_name(model, groups, shapes, parameter_names)
    except (InvalidArgumentError, DamagedState) as error:
        raise InvalidArgumentError(
            "the second moments of Adafactor cannot be read from checkpoint "
            f"{label_of(checkpoint)}: {error}"
        ) from error
    return {name: SecondMoment(values.get(index), 0.0) for name, index in indices.items()}


def _factored_of(optimizer: State) -> dict[Any, Tensor]:
    """The second moments of Adafactor, by the index of the parameter."""
    for group in optimizer["param_groups"]:
        if not {*SETTINGS} & {*group}:
            raise InvalidArgumentError(
                "its optimizer is not torch.optim.Adafactor or that of transformers, whose groups "
                f"have {' or '.join(SETTINGS)}: its settings are {sorted(group)}"
            )
    state = optimizer.get("state", {})
    if not state:
        raise InvalidArgumentError(
            "its optimizer took no steps, and has no moments; use a later checkpoint"
        )
    return {index: _second_moment(own) for index, own in state.items()}


def _second_moment(own: Any) -> Tensor:
    """The second moments of a parameter from its state."""
    held = own if isinstance(own, Mapping) else {}
    for row, column, whole in NAMES:
        rows, columns, found = (held.get(name) for name in (row, column, whole))
        if isinstance(rows, Tensor) and isinstance(columns, Tensor):
            if row == NAMES[1][0]:  # transformers' means have one dimension less
                rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
            found = _outer(rows, columns)
        # a negative mean of squares would leave its entry out in silence
        if isinstance(found, Tensor) and bool(torch.isfinite(found).all() and (found >= 0).all()):
            return found
    raise DamagedState(
        f"the state of a parameter must have finite tensors {' or '.join(map(str, NAMES))}: means "
        "of squares, none below 0, over rows and columns that fit, or of all entries; got "
        f"{shown(own)}"
    )


def _outer(rows: Tensor, columns: Tensor) -> Tensor | None:
    """The product of the means ``[..., r, 1]`` and ``[..., 1, c]``, over the mean of all."""
    fits = rows.dim() == columns.dim() > 1 and rows.shape[:-2] == columns.shape[:-2]
    if not fits or rows.shape[-1] != 1 or columns.shape[-2] != 1:
        return None
    mean = rows.mean(dim=-2, keepdim=True)
    # gradients that were all zero have means of zero
    return rows * columns / torch.where(mean > 0, mean, torch.ones_like(mean))
