"""What several test files use: the proof that a model came back as it was."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from contract import METHODS, QUICK, applies
from torch import nn


def _objects(model: nn.Module) -> dict[str, Any]:
    """What must be the same objects, and the flags, of a model."""
    modules = dict(model.named_modules())
    own = {
        f"{path}/{kind}/{name}": tensor
        for path, module in modules.items()
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers))
        for name, tensor in tensors.items()
    }
    return {
        "tensors": {name: id(tensor) for name, tensor in own.items()},
        "requires_grad": {name: t is not None and t.requires_grad for name, t in own.items()},
        "grad": {name: id(t.grad) if t is not None else None for name, t in own.items()},
        "training": {path: module.training for path, module in modules.items()},
        "hooks": {
            path: [*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks]
            for path, m in modules.items()
        },
        "grad mode": torch.is_grad_enabled(),
    }


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    values = {name: tensor.detach().clone() for name, tensor in tensors}
    gradients = {f"{name}.grad": t.grad.clone() for name, t in tensors if t.grad is not None}
    return {**values, **gradients, "random state": torch.get_rng_state()}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    objects, values = _objects(model), _values(model)
    yield
    assert _objects(model) == objects
    after = _values(model)
    assert after.keys() == values.keys()
    assert [name for name in values if not torch.equal(values[name], after[name])] == []


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A context manager of a model, which must leave the block exactly as it entered it.

    Compared are values (bitwise), objects, flags, gradients, hooks and the random state.
    """
    return _unchanged


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out pairs of a method and a case without meaning for it; mark the quick ones."""
    foreign = []
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        method, case = given.get("method"), given.get("case", given.get("name"))
        if method in QUICK:
            item.add_marker("quick")
        if method in METHODS and case is not None and not applies(method, case):
            foreign.append(item)
    config.hook.pytest_deselected(items=foreign)
    items[:] = [item for item in items if item not in foreign]
