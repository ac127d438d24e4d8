"""Influence functions, against dense matrices of single-example derivatives."""

from typing import Any

import torch
from torch import Tensor, nn

from fuzz.draw import Draw
from fuzz.questions import Question, Scores, Void, by_layer, check_finite, places, total
from fuzz.setups import Batches, Setup
from fuzz.wrappers import KEEPING, WRAPPERS
from influence_kit import (
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    KFACInfluenceFunction,
)

MOST_PARAMETERS = 260
SIMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def solved_question(draw: Draw, setup: Setup) -> Question:
    """``ExplicitInfluenceFunction`` and ``CGInfluenceFunction``."""
    subject, oracle = setup.subject, setup.oracle
    size = sum(p.numel() for p in oracle.parameters(setup.model))
    if size > MOST_PARAMETERS or subject.dtype is not torch.float64 or "complex" in draw.tags:
        raise Void("not for dense curvature")
    kinds = {"empirical_fisher": 2.0, "hessian": 1.0, "ggn": 1.0 if subject.loss else 0.0}
    kind = draw.one(list(kinds), list(kinds.values()))
    cls = draw.one([ExplicitInfluenceFunction, CGInfluenceFunction])
    draw.note(cls.__name__)
    draw.note(f"curvature {kind}")
    if kind == "ggn" and getattr(setup.model, "form", "") == "object":
        draw.excuse("outputs in an object of the user's")
    if "bag" in draw.tags:
        draw.excuse("torch has no second derivative of EmbeddingBag")
    blocks = draw.one(["full", "layer"])
    groups = {"all": torch.arange(size)} if blocks == "full" else by_layer(setup)
    curvatures = [_dense(setup, kind, c) for c in places(setup)]
    check_finite(*curvatures)
    damping = _damping(curvatures, groups)
    inverses = [_inverse(curvature, groups, damping) for curvature in curvatures]
    scores = solved_scores(setup, inverses)
    arguments = {**setup.arguments, "layers": setup.layers, "damping": damping}
    arguments |= {"curvature": kind, "blocks": blocks}
    if cls is CGInfluenceFunction:
        arguments |= {"tol": 1e-13, "max_iter": 3000}
    make = lambda: cls(setup.model, setup.train, setup.checkpoints, **arguments)  # noqa: E731
    return Question(make, scores.draw(draw, 1), 1e-6)


def _dense(setup: Setup, kind: str, c: int) -> Tensor:
    oracle = setup.oracle
    try:
        return {
            "empirical_fisher": oracle.empirical_fisher,
            "hessian": oracle.hessian,
            "ggn": oracle.gauss_newton,
        }[kind](c)
    except (RuntimeError, NotImplementedError) as error:
        raise Void(f"no second derivative: {error}") from error


def _damping(curvatures: list[Tensor], groups: dict[str, Tensor]) -> float:
    """So that all are well conditioned, and C still counts."""
    lowest, scale = 0.0, 0.0
    for c in curvatures:
        for index in groups.values():
            own = c[index][:, index]
            values = torch.linalg.eigvalsh((own + own.T) / 2)
            lowest = min(lowest, float(values.min()))
            scale = max(scale, float(values.abs().max()))
    if scale == 0:
        raise Void("no curvature")
    return round(0.05 * scale - 1.5 * lowest, 8) or 1e-3


def _inverse(curvature: Tensor, groups: dict[str, Tensor], damping: float) -> Tensor:
    found = torch.zeros_like(curvature)
    for index in groups.values():
        own = curvature[index][:, index]
        eye = torch.eye(len(index), dtype=own.dtype)
        found[index[:, None], index] = torch.linalg.inv((own + own.T) / 2 + damping * eye)
    return found


def solved_scores(setup: Setup, inverses: list[Tensor], maps: Tensor | None = None) -> Scores:
    """Means over checkpoints of h M^-1 g, the gradients projected by ``maps`` where given."""
    h = [setup.oracle.gradients(c, True) for c in places(setup)]
    g = [setup.oracle.gradients(c, False) for c in places(setup)]
    if maps is not None:
        h, g = [x @ maps for x in h], [x @ maps for x in g]
    check_finite(*h, *g)
    count = len(inverses)
    whole = total([a @ i @ b.T for a, i, b in zip(h, inverses, g, strict=True)]) / count
    own = total([(b @ i * b).sum(1) for i, b in zip(inverses, g, strict=True)]) / count
    return Scores(setup, whole, own if setup.subject.test_loss is None else None)


# K-FAC and EK-FAC.


def kronecker_question(draw: Draw, setup: Setup) -> Question:
    """Of the layers with such a form; against dense factors, or single-example batches."""
    if "complex" in draw.tags:
        raise Void("complex")
    cls = draw.one([KFACInfluenceFunction, EKFACInfluenceFunction])
    draw.note(cls.__name__)
    layers = [
        name
        for name, module in setup.model.named_modules()
        if type(module) in SIMPLE and any(p.requires_grad for p in module.parameters())
    ]
    if not layers:
        raise Void("no Kronecker layers")
    wrappers = set(WRAPPERS) | set(KEEPING) | {"shared weight", "tied back", "outside its layer"}
    simple = not wrappers & set(draw.tags) and setup.subject.loss is not None
    if not simple or len(layers) > 0:
        draw.excuse("no Kronecker form")
    arguments = {**setup.arguments, "layers": layers, "damping": 0.1}
    arguments |= {"curvature": "empirical_fisher", "layers_without_kronecker": "error"}
    if "eval_mode" not in arguments and draw.chance(0.5):
        arguments["relative"] = "l"
    singles = Batches([setup.subject.collate([e]) for e in setup.subject.train])

    def make() -> Any:
        return cls(setup.model, setup.train, setup.checkpoints, **arguments)

    def ask(method: Any) -> Any:
        found = method.influence(setup.test)
        other = cls(setup.model, singles, setup.checkpoints, **arguments | {"batch_size": "auto"})
        return {"influence": (found, other.influence(setup.test))}

    return Question(make, ask, 1e-6 if setup.subject.dtype is torch.float64 else 5e-2)
