"""A backward pass over a training run: how leaving an example out of a step moves the end.

A step is theta <- theta - lr * (mean of g_i + weight_decay * theta); without example j its result
differs by lr / B * g_j. Each later step multiplies a difference by A = (1 - lr * weight_decay) I -
lr H, with H the empirical Fisher matrix (1 / B) sum g_i g_i^T of the step's own examples. Going
backwards, the product of all later A is known at every step.

Shapes: n training examples, P parameters, B examples of a step.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from influence_kit.core.memory import GIB, free_bytes
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.training.step import Step


def backward_pass(
    steps: Sequence[Step],
    gradients_of: Callable[[int], Tensor],
    embeddings: Tensor,
    epochs: Collection[int] | None,
    tick: Callable[[], object],
) -> Tensor:
    """Add to ``embeddings`` ``[n, P]`` the effect of each example's visits on the final weights.

    Args:
        steps: the steps, oldest first.
        gradients_of: returns the gradients ``[B, P]`` of a step, given its index.
        embeddings: zeros.
        epochs: the epochs whose visits count; None for all.
        tick: called after each step.
    """
    counted = [epochs is None or step.epoch in epochs for step in steps]
    onward = torch.eye(embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    # steps before the first counted one have no effect
    for number in reversed(range(counted.index(True), len(steps))):
        step, gradients = steps[number], gradients_of(number)
        share = step.lr / (len(step.indices) if step.reduction == "mean" else 1)
        visits = share * (gradients @ onward.T)
        if not torch.isfinite(visits.sum()):
            _refuse_non_finite(number, step, gradients)
        if counted[number]:
            indices = torch.tensor(step.indices, device=embeddings.device)
            embeddings.index_add_(0, indices, visits)
        onward.addmm_(visits.T, gradients, beta=1 - step.lr * step.weight_decay, alpha=-1)
        tick()
    return embeddings


def check_memory(n: int, size: int, steps: Sequence[Step], sample: Tensor) -> None:
    """Refuse sizes that exceed memory: the product of steps, the embeddings, a step's gradients.

    Args:
        n: the number of training examples.
        size: the number of parameters.
        steps: the steps.
        sample: a tensor with the dtype and device of the gradients.
    """
    batch = max(len(step.indices) for step in steps)
    # of a step: its gradients, in pieces and joined, and their effects
    need = sample.element_size() * size * (size + n + 3 * batch)
    free = free_bytes(sample.device)
    if need > free:
        raise InvalidArgumentError(
            f"DVEmb keeps a matrix of {size} x {size} (parameters) and embeddings of {n} x {size} "
            f"in memory, {need / GIB:.1f} GiB with a step's gradients; {free / GIB:.1f} GiB are "
            "free. Choose fewer parameters by `layers`, or project them by `projection_dim`"
        )


def _refuse_non_finite(number: int, step: Step, gradients: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(gradients).all(1))[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            f"the gradient of training example {step.indices[bad[0]]} is NaN or infinite at step "
            f"{number} of the trace; look at that example and at the weights there"
        )
    raise NonFiniteError(
        f"the embeddings overflow at step {number} of the trace: learning rate times curvature is "
        "so large that differences grow from step to step; use float64, or a trace with smaller "
        "learning rates"
    )
