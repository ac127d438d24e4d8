"""The damping that is added to the eigenvalues of each block of an operator.

Shapes: B blocks.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError

Damping = float | Tensor | Sequence[float]
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


def damping_by_block(damping: Damping, blocks: int, positive: bool = False) -> Tensor:
    """The damping of each block, float64 ``[B]``, checked."""
    values = _as_numbers(damping)
    values = values.expand(blocks) if values.dim() == 0 else values
    if values.shape != (blocks,):
        raise InvalidArgumentError(
            f"got {list(values.shape)} values of damping for {blocks} blocks"
        )
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise InvalidArgumentError(f"damping must be finite and not negative; got {damping}")
    if positive and bool((values <= 0).any()):
        raise InvalidArgumentError(
            "damping must be positive here, because directions without curvature are divided by "
            f"it; got {values.tolist()}"
        )
    return values


def _as_numbers(damping: Any) -> Tensor:
    """The damping in float64: of a number, a tensor or array of real numbers, or a sequence."""
    if isinstance(damping, Tensor | np.ndarray):
        usable = _is_real(damping)
    else:
        values = damping if isinstance(damping, list | tuple) else [damping]
        usable = all(_is_number(value) for value in values)
    if not usable:
        raise InvalidArgumentError(
            f"damping must be a number, or one per block; got {shown(damping)}"
        )
    return torch.as_tensor(damping, dtype=torch.float64)


def _is_number(value: Any) -> bool:
    fits = not isinstance(value, Integral) or abs(int(value)) < 2**63
    return isinstance(value, Real) and not isinstance(value, bool) and fits


def _is_real(values: Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "iuf"
    return values.dtype in REAL and values.layout == torch.strided and not values.is_meta
