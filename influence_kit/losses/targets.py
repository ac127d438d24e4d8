"""Outputs of language models to explain: logits and log-probabilities of single tokens.

Each is a ``test_output_fn``: higher is better, so that a positive score means that training on the
example raised it. The model returns logits ``[m, t, v]``, or an object or dict that has ``logits``.

Shapes: m test examples, t positions, v tokens of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import exact
from influence_kit.data.class_labels import logits_of
from influence_kit.errors import InvalidArgumentError

LAST = "last"
# what torch holds in an int
MOST = 2**63


class Target(ABC):
    """An output that should rise: one value per test example, ``[m]``, from outputs and targets."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The output of each example."""


class _OfPosition(Target):
    """An output at one position of each example."""

    def __init__(self, position: int | str) -> None:
        is_int = isinstance(position, int) and not isinstance(position, bool)
        is_known = isinstance(position, str) or (is_int and abs(int(position)) < MOST)
        if not is_known:
            raise InvalidArgumentError(
                '`position` must be an int, "last" (the last position that the attention mask '
                f"counts), or the key of a dict batch that holds them [m]; got {shown(position)}"
            )
        self.position = position

    def _rows(self, outputs: Any, targets: Any) -> Tensor:
        """The logits at each example's position, ``[m, v]``."""
        logits = token_logits(outputs)
        m, t, _ = logits.shape
        if isinstance(self.position, str):
            positions = _last(targets) if self.position == LAST else _of_key(self.position, targets)
            if positions.shape != (m,):
                raise InvalidArgumentError(
                    f"`position` {self.position!r} holds {list(positions.shape)} positions for {m} "
                    "examples; there must be one per example"
                )
        else:
            positions = torch.full((m,), self.position, device=logits.device)
        _check_range(positions, -t, t, "position", f"the model returns logits of {t} positions")
        positions = torch.where(positions < 0, positions + t, positions)
        chosen = positions.to(logits.device)[:, None, None].expand(-1, 1, logits.shape[2])
        return logits.gather(1, chosen)[:, 0]


class TokenLogit(_OfPosition):
    """The logit of a token at a position: z_token, ``[m]``.

    Args:
        token: the token's id; or the key of a dict batch that holds one per test example ``[m]``;
            None if the targets (the last item of a tuple batch) are these ids.
        position: the index of the position, of the logits: a causal language model predicts token s
            at position s - 1. A negative one counts from the end; "last" is the last position that
            ``attention_mask`` of a dict batch counts; any other text is the key of a dict batch
            that holds one per test example.

    Raises:
        InvalidArgumentError: for another type; in a call, for a token outside the vocabulary, a
            position outside the sequence, a key that the batch lacks, outputs without logits.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 5.0]]])
        >>> TokenLogit(token=1)(logits, None)
        tensor([5.])
        >>> TokenLogit(position=0)(logits, torch.tensor([1]))
        tensor([1.])
    """

    def __init__(self, token: int | str | None = None, position: int | str = -1) -> None:
        super().__init__(position)
        self.token = _check_token(token, "token", "None (the targets)")

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The value of each example, ``[m]``."""
        return _values(self._rows(outputs, targets), self.token, targets, "token")


class TokenLogProbability(TokenLogit):
    """The log-probability of a token at a position: z_token - log sum_j exp z_j, ``[m]``.

    The arguments are those of ``TokenLogit``. In nats.

    Args:
        token: the token's id; or the key of a dict batch that holds one per test example ``[m]``;
            None if the targets (the last item of a tuple batch) are these ids.
        position: as in ``TokenLogit``.

    Raises:
        InvalidArgumentError: as ``TokenLogit``.

    Example:
        >>> import torch
        >>> TokenLogProbability(token=1)(torch.zeros(1, 3, 4), None).exp()
        tensor([0.2500])
    """

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The value of each example, ``[m]``."""
        rows = F.log_softmax(self._rows(outputs, targets), dim=-1)
        return _values(rows, self.token, targets, "token")


class TokenDifference(_OfPosition):
    """The log-odds of a token against another: z_token - z_other at a position, ``[m]``.

    It is also the difference of their log-probabilities. What raises both tokens alike cancels.

    Args:
        token: the id of the token that should rise; or the key of a dict batch that holds one per
            test example ``[m]``; None if the targets (the last item of a tuple batch) are these
            ids.
        other: the id of the token that should fall, or a key.
        position: as in ``TokenLogit``.

    Raises:
        InvalidArgumentError: as ``TokenLogit``.

    Example:
        >>> import torch
        >>> TokenDifference(token=1, other=0)(torch.tensor([[[2.0, 5.0]]]), None)
        tensor([3.])
    """

    def __init__(self, token: int | str | None, other: int | str, position: int | str = -1) -> None:
        super().__init__(position)
        self.token = _check_token(token, "token", "None (the targets)")
        self.other = _check_token(other, "other")

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The value of each example, ``[m]``."""
        rows = self._rows(outputs, targets)
        return _values(rows, self.token, targets, "token") - _values(
            rows, self.other, targets, "other"
        )


def token_logits(outputs: Any) -> Tensor:
    """The logits ``[m, t, v]`` of a language model's output."""
    logits = exact(logits_of(outputs))
    if logits.dim() != 3 or not logits.is_floating_point():
        raise InvalidArgumentError(
            "targets of language models need logits [m, t, v]; the model returns "
            f"{list(logits.shape)} of {logits.dtype}"
        )
    return logits


def _check_token(token: Any, name: str, also: str = "") -> int | str | None:
    is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < MOST
    if is_id or (isinstance(token, str) and token) or (token is None and also):
        found: int | str | None = token
        return found
    more = f", or {also}" if also else ""
    raise InvalidArgumentError(
        f"`{name}` must be the id of a token, or the key of a dict batch that holds one per "
        f"example{more}; got {shown(token)}"
    )


def _values(rows: Tensor, token: int | str | None, targets: Any, name: str) -> Tensor:
    """The entries of rows ``[m, v]`` at each example's token, ``[m]``."""
    m, v = rows.shape
    if isinstance(token, int):
        ids = torch.full((m,), token, device=rows.device)
    else:
        ids = targets if token is None else _of_key(token, targets)
    if not isinstance(ids, Tensor) or ids.shape != (m,) or ids.is_floating_point():
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidArgumentError(
            f"`{name}`={token!r} must give one id per example, [{m}]; got {got}. Pass an id, or "
            "the key of a dict batch"
        )
    _check_range(ids, 0, v, name, f"the vocabulary has {v} tokens")
    return rows.gather(1, ids.to(rows.device).long()[:, None])[:, 0]


def _of_key(key: str, targets: Any) -> Tensor:
    found = targets.get(key) if isinstance(targets, Mapping) else None
    if not isinstance(found, Tensor):
        known = list(targets) if isinstance(targets, Mapping) else f"a {type(targets).__name__}"
        raise InvalidArgumentError(
            f"the batch has no tensor {key!r}, which the output function reads; it is {known}"
        )
    return found


def _last(targets: Any) -> Tensor:
    """The last position that the attention mask counts, ``[m]``."""
    mask = _of_key("attention_mask", targets)
    order = torch.arange(mask.shape[-1], device=mask.device)
    return (order * (mask != 0)).amax(-1)


def _check_range(values: Tensor, least: int, end: int, name: str, why: str) -> None:
    try:
        low, high = int(values.min()), int(values.max())
    except RuntimeError:  # under vmap, which hides the values
        return
    if low < least or high >= end:
        wrong = high if high >= end else low
        raise InvalidArgumentError(f"`{name}` is {wrong}, and {why}")
