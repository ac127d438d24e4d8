"""Operations of torch whose fused form cannot be differentiated twice, or is wrong if it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from influence_kit.core.locks import FORWARD_MODE


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by plain operations.

    torch's fused one has no forward mode, and its second derivative is wrong (torch 2.13): the
    Hessian is not symmetric, and differs from central differences.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """V times g over its norm along all dimensions but ``dim``; -1: along all."""
    others = tuple(range(v.dim())) if dim == -1 else tuple(i for i in range(v.dim()) if i != dim)
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=True).reshape(g.shape)
    found: Tensor = v * (g / norm)
    return found


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention and weight norm can be differentiated twice, in any mode.

    One thread at a time: the levels of forward mode and the choice of kernels are global in torch.
    """
    with FORWARD_MODE, sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        yield
