"""All of a user's that a question might change: model, data, random states, torch's modes."""

import random
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# what torch keeps of hooks, parameters and modules is looked at by itself
TABLES = ("_parameters", "_buffers", "_modules")
# recurrent layers gather their parameters here, and again at the next call where they were swapped
GATHERED = ("_flat_weights", "_flat_weight_refs")


class State:
    """A snapshot; ``changes`` names what is different now."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model, self.data = model, data
        self.known = self._now()

    def changes(self) -> list[str]:
        now = self._now()
        missing = [f"{key} is gone" for key in self.known.keys() - now.keys()]
        new = [f"{key} is new" for key in now.keys() - self.known.keys()]
        both = self.known.keys() & now.keys()
        return sorted(missing + new + [key for key in both if not same(self.known[key], now[key])])

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "random state of torch": torch.get_rng_state(),
            "random state of numpy": repr(np.random.get_state()),  # noqa: NPY002
            "random state of python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "default dtype": torch.get_default_dtype(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        }
        for path, module in self.model.named_modules():
            name = f"model.{path}" if path else "model"
            found[f"{name} type"] = type(module)
            for key, value in vars(module).items():
                if key in GATHERED:
                    continue
                if key in TABLES:
                    found[f"{name}.{key} names"] = list(value)
                    for own, item in value.items():
                        found[f"{name}.{own}"] = frozen(item, 0)
                else:
                    found[f"{name}.{key}"] = frozen(value, 0)
        found["data"] = frozen(self.data, 0)
        return found


@contextmanager
def same_random_states() -> Iterator[None]:
    """The random states of torch, numpy and Python come back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def frozen(item: Any, depth: int) -> Any:
    """A copy that a later change does not reach."""
    if isinstance(item, Tensor):
        grad = None if not item.is_leaf or item.grad is None else frozen(item.grad, depth + 1)
        try:
            dense = (item.detach().to_dense() if item.is_sparse else item.detach()).clone()
        except RuntimeError as error:  # one that has escaped from ``vmap``
            return ("dead tensor", str(error))
        return ("tensor", id(item), item.requires_grad, item.dtype, dense, grad)
    if isinstance(item, weakref.ref):
        return ("reference", id(item()))
    if isinstance(item, nn.Module):
        return id(item)
    if isinstance(item, Mapping):
        return (id(item), {key: frozen(value, depth + 1) for key, value in item.items()})
    if isinstance(item, list | tuple | set):
        return (type(item), [frozen(value, depth + 1) for value in item])
    if isinstance(item, int | float | str | bool | bytes | type(None) | types.FunctionType):
        return item
    if hasattr(item, "__dict__") and depth < 4:
        inner = {key: frozen(value, depth + 1) for key, value in vars(item).items()}
        return (id(item), inner)
    return id(item)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(a.eq(b).logical_or(a.ne(a)).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
