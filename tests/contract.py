"""What every method must do, on every case: a new method joins by one line in ``METHODS``.

A test takes ``make``: it builds the method on a case, with any argument changed.
"""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Examples
from torch import Tensor

from influence_kit import GradCos, GradDot, TracInCP, TracInCPFast, TracInCPFastRandProj

CLOSE = 1e-10


def _whole_model(cls: type) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        return cls(model, data, checkpoints, **arguments)

    return make


def _last_layer(cls: type, **own: Any) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        return cls(model, case.final, data, checkpoints, **own, **arguments)

    return make


METHODS = {
    "TracInCP": _whole_model(TracInCP),
    "GradDot": _whole_model(GradDot),
    "GradCos": _whole_model(GradCos),
    "TracInCPFast": _last_layer(TracInCPFast),
    "TracInCPFastRandProj": _last_layer(TracInCPFastRandProj),
    "TracInCPFastRandProj, projected": _last_layer(TracInCPFastRandProj, projection_dim=4),
}


def build(method: str, case: Case, **changed: Any) -> Any:
    """A method on a case; ``changed`` replaces model, data, checkpoints or keyword arguments."""
    model = changed.pop("model", None) or case.model()
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or case.checkpoints()
    arguments = {"loss_fn": case.loss, "batch_size": 4} | changed
    return METHODS[method](case, model, data, checkpoints, **arguments)


def scores(influence: Any, inputs: Any) -> Tensor:
    """The whole matrix."""
    return influence.influence(inputs, k=None)


def assert_close(found: Tensor, expected: Tensor, relative: float = CLOSE) -> None:
    """Equal up to ``relative`` times the largest expected entry."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 0, "an oracle that is all zeros tests nothing"
    difference = (found - expected).abs().max()
    assert difference <= relative * expected.abs().max(), float(difference / expected.abs().max())


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """All of a model that a method might change, and the global random state."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "objects": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Nothing changed between two snapshots."""
    for key in ("objects", "training", "requires_grad", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    for old, new in zip(before["grad"], after["grad"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or (old[0] == new[0] and torch.equal(old[1], new[1]))
