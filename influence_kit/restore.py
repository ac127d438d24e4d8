"""The user's objects come back as they were: weights, flags, gradients, random state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Use the model inside, in evaluation mode if asked, and give it back unchanged.

    So also after an error.

    Restored are parameters and buffers (their values, and which objects they are), ``training`` and
    ``requires_grad`` flags, ``.grad``, forward hooks (those of the masks of a dropout ensemble come
    off) and the global random state, which iterating a DataLoader moves.
    """
    modules = list(model.modules())
    parameters = [(module, name, p) for module in modules for name, p in module._parameters.items()]
    buffers = [(module, name, b) for module in modules for name, b in module._buffers.items()]
    values = {
        id(t): (t, t.detach().clone()) for _, _, t in (*parameters, *buffers) if t is not None
    }
    flags = [(p, p.requires_grad, p.grad) for _, _, p in parameters if p is not None]
    training = [(module, module.training) for module in modules]
    hooks = [(table, dict(table)) for module in modules for table in _hook_tables(module)]
    cuda = torch.cuda.is_initialized()
    random_state = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        for module, name, parameter in parameters:
            module._parameters[name] = parameter
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, value in values.values():
                tensor.copy_(value)
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in training:
            module.training = mode
        for table, own in hooks:
            table.clear()
            table.update(own)
        torch.set_rng_state(random_state[0])
        if cuda:
            torch.cuda.set_rng_state_all(random_state[1])


def _hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What a module knows of its forward hooks, by their numbers."""
    return (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
