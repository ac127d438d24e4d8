"""Why a batch has no gradient per example: one message per cause, with its remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data.batches import (
    Batch,
    call_model,
    example_axis,
    example_count,
    map_outputs,
    take,
    targets_of,
)
from influence_kit.data.marked_batch import describe
from influence_kit.losses.loss import Loss

# relative to the largest entry: smaller differences come from the order of summation
CLOSE = 0.02


def explanation(
    model: nn.Module, batch: Batch, loss: Loss, of_outputs_only: bool = False
) -> str | None:
    """The message of the first known cause that is found, or None.

    Args:
        model: the model.
        batch: the batch without a gradient per example.
        loss: the loss.
        of_outputs_only: do not test whether the loss mixes examples, for which the caller has a
            better message.
    """
    causes = [_noise, _whole, _broadcast, _mixing_layer, _mixing_loss]
    with torch.no_grad():
        for cause in causes[:-1] if of_outputs_only else causes:
            try:
                message = cause(model, batch, loss)
            except Exception:  # another cause, which fails before this one shows
                continue
            if message is not None:
                return message
    return None


def _noise(model: nn.Module, batch: Batch, loss: Loss) -> str | None:
    first, second = _floating(call_model(model, batch)), _floating(call_model(model, batch))
    if all(torch.equal(a, b) or _near(a, b, 1e-6) for a, b in zip(first, second, strict=True)):
        one, other = (loss.values(call_model(model, batch), batch) for _ in range(2))
        if _near(one, other, 1e-6):
            return None
        return (
            f"`{loss.name}` returns other numbers each time for the same outputs: remove its "
            "randomness"
        )
    return (
        "The model's forward returns other outputs each time for the same batch (it draws random "
        "numbers, or keeps state from one call to the next), so two passes cannot be compared: "
        "turn that off for the attribution (noise, masking, sampling, `training` flags)"
    )


def _whole(model: nn.Module, batch: Batch, loss: Loss) -> str | None:
    call_model(model, batch)
    last = example_count(batch) - 1
    try:
        for one in (0, last):
            call_model(model, take(batch, slice(one, one + 1)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"the model runs on the whole batch but not on one of its examples ({reason}): the "
            f"batch, {describe(batch)}, cannot be cut into examples. Use batches of one example "
            "(batch_size=1, or a loader of them), or give the dimension that counts examples in "
            "each tensor as `batch_axes`"
        )
    return None


def _broadcast(model: nn.Module, batch: Batch, loss: Loss) -> str | None:
    outputs, targets = call_model(model, batch), targets_of(batch)
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.shape == targets.shape or not targets.is_floating_point():
        return None
    try:
        joint = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:
        return None
    if joint.numel() <= max(outputs.numel(), targets.numel()):
        return None
    return (
        f"outputs of shape {list(outputs.shape)} and targets of shape {list(targets.shape)} are "
        f"broadcast to {list(joint)}, so each output is compared with the targets of all examples: "
        "give both the same shape (outputs.squeeze(-1), or targets.unsqueeze(-1))"
    )


def _mixing_layer(model: nn.Module, batch: Batch, loss: Loss) -> str | None:
    """A message with the first module whose output for an example depends on the others."""
    n = example_count(batch)
    messages = (_mixed(model, batch, n, index) for index in sorted({0, n - 1}))
    return next((message for message in messages if message is not None), None)


def _mixed(model: nn.Module, batch: Batch, n: int, index: int) -> str | None:
    """``_mixing_layer`` for one of the n examples."""
    one = take(batch, slice(index, index + 1))
    with _outputs_of_modules(model) as together:
        outputs = call_model(model, batch)
    with _outputs_of_modules(model) as alone:
        single = call_model(model, one)
    ours, theirs = _floating(outputs), _floating(single)
    if len(ours) == len(theirs) and all(
        _same(a, b, n, index) for a, b in zip(ours, theirs, strict=True)
    ):
        return None
    found = "the model's forward"
    for (name, kind, a), (other, _, b) in zip(together, alone, strict=False):
        if name != other:
            break
        if not _same(a, b, n, index):
            found = f"layer '{name}' ({kind})" if name else f"the model's forward ({kind})"
            break
    return (
        "the outputs of an example change with the other examples of its batch, first at "
        f"{found}: the model mixes the examples of a batch, so no part of the loss belongs to one "
        "of them. Batches of one example (batch_size=1) always work"
    )


def _mixing_loss(model: nn.Module, batch: Batch, loss: Loss) -> str | None:
    n = example_count(batch)
    outputs = call_model(model, batch)
    total = loss.total(outputs, batch, n)
    singles = [take(batch, slice(i, i + 1)) for i in range(n)]
    alone = sum(loss.total(call_model(model, one), one, 1) for one in singles)
    assert isinstance(alone, Tensor)
    if _near(total, alone, CLOSE):
        return None
    return (
        f"`{loss.name}` of {n} examples together is {total.item():.6g}, but the sum of their "
        f"losses alone is {alone.item():.6g}, with the same outputs: the loss mixes the examples "
        "of a batch (in-batch negatives, a ranking, a term of the whole batch); batches of one "
        "example (batch_size=1) always work"
    )


@contextmanager
def _outputs_of_modules(model: nn.Module) -> Iterator[list[tuple[str, str, Tensor]]]:
    """Name, type and output of each module call, in the order in which the calls end."""
    seen: list[tuple[str, str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen.append((name, type(module).__name__, output.detach().clone()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _floating(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_outputs(outputs, lambda t: found.append(t) if t.is_floating_point() else None)
    return found


def _same(together: Tensor, alone: Tensor, n: int, index: int) -> bool:
    """Whether one of n examples has the values that it has alone; True if unclear."""
    axis = example_axis(together, n)
    if axis is None or alone.dim() != together.dim() or alone.shape[axis] != 1:
        return True
    mine, single = together.select(axis, index), alone.select(axis, 0)
    return mine.shape != single.shape or _near(mine, single, CLOSE)


def _near(a: Tensor, b: Tensor, close: float) -> bool:
    if a.shape != b.shape:
        return False
    scale = torch.maximum(a.abs().max(), b.abs().max()) if a.numel() else a.new_zeros(())
    return bool(((a - b).abs() <= close * scale + 1e-12).all())
