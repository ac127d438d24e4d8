"""Whether a transform of ``torch.func`` (vmap, grad, jvp) is running, and how to leave it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._C import _functorch


def is_transformed() -> bool:
    """Whether a transform is running, inside which tensors may be wrappers."""
    return _functorch.peek_interpreter_stack() is not None


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Inside, tensors are plain: a transform refuses writes to tensors that are not its inputs."""
    stack: list[Any] = []
    try:
        while is_transformed():
            stack.append(_functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while stack:
            _functorch.push_dynamic_layer_stack(stack.pop())
