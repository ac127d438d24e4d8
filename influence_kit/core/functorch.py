"""The transforms of ``torch.func`` (vmap, grad, jvp) that run: whether any, and leaving them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._C import _functorch


def is_transformed() -> bool:
    """Whether a transform runs, in which tensors may be wrappers."""
    return _functorch.peek_interpreter_stack() is not None


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Inside, tensors are plain: a transform refuses writes to those that it has not been given."""
    stack: list[Any] = []
    try:
        while is_transformed():
            stack.append(_functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while stack:
            _functorch.push_dynamic_layer_stack(stack.pop())
