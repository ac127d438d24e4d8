"""Projected methods, given the package's random matrices, on single-example gradients."""

from typing import Any

import projected_oracles as projected
import torch
from torch import Tensor

from fuzz.curvature_questions import solved_scores
from fuzz.draw import Draw
from fuzz.gradient_questions import close_of
from fuzz.nets import logits_of
from fuzz.oracle import flat_gradient
from fuzz.questions import Answers, Question, Void, check_finite, places, total
from fuzz.setups import Setup
from fuzz.subjects import call
from influence_kit import TRAK, LoGra, TracInCPRandProj

KINDS = ["gaussian", "rademacher", "orthogonal", "identity"]


def projected_question(draw: Draw, setup: Setup) -> Question:
    """``TracInCPRandProj`` and ``LoGra``."""
    if "complex" in draw.tags or not setup.oracle.names:
        raise Void("complex")
    cls = draw.one([TracInCPRandProj, LoGra])
    draw.note(cls.__name__)
    dim = draw.one([4, 9, (2, 3)])
    arguments = {**setup.arguments, "layers": setup.layers, "projection_dim": dim}
    arguments |= {"projection": draw.one(KINDS), "seed": draw.randint(0, 3)}
    damping = 0.05
    if cls is LoGra:
        arguments |= {"damping": damping}
    for c in places(setup):
        check_finite(setup.oracle.gradients(c, False), setup.oracle.gradients(c, True))

    def ask(method: Any) -> Answers:
        found = method.influence(setup.test)
        names = setup.oracle.names
        columns = projected.written_out(setup.oracle.pristine, names, method._map.maps.maps)
        maps = torch.cat(list(columns.values()), dim=1)
        if cls is TracInCPRandProj:
            products = [_product(setup, c, maps) for c in places(setup)]
            right = total([r * p for r, p in zip(setup.rates, products, strict=True)])
            return {"influence": (found, right)}
        groups = projected.groups_of(columns, "layer")
        inverses = []
        for c in places(setup):
            u = setup.oracle.gradients(c, False) @ maps
            fisher = projected.curvature(u, list(groups.values()))
            inverses.append(projected.inverse_of(fisher, groups, damping))
        return {"influence": (found, solved_scores(setup, inverses, maps).whole)}

    make = lambda: cls(setup.model, setup.train, setup.checkpoints, **arguments)  # noqa: E731
    return Question(make, ask, max(1e-8, 5 * close_of(setup)) if cls is LoGra else close_of(setup))


def _product(setup: Setup, c: int, maps: Tensor) -> Tensor:
    return (setup.oracle.gradients(c, True) @ maps) @ (setup.oracle.gradients(c, False) @ maps).T


# TRAK.


def trak_question(draw: Draw, setup: Setup) -> Question:
    subject, oracle = setup.subject, setup.oracle
    if subject.kind != "class" or "complex" in draw.tags or subject.dtype is not torch.float64:
        raise Void("not for TRAK")
    if subject.loss is None or isinstance(subject.collate(subject.train[:1]), dict):
        raise Void("TRAK of a dict")
    draw.note("TRAK")
    projection = draw.one(["sjlt", "rademacher", "gaussian", "identity"])
    dim, ridge = draw.randint(2, 6), 0.5
    tests = [_margins(setup, c, subject.test) for c in places(setup)]
    trains = [_margins(setup, c, subject.train) for c in places(setup)]
    check_finite(*[t for pair in tests + trains for t in pair])
    kept = ("batch_size", "checkpoints_load_func", "eval_mode")
    arguments = {k: v for k, v in setup.arguments.items() if k in kept}
    arguments |= {"layers": setup.layers, "projection": projection, "projection_dim": dim}
    arguments |= {"ridge": ridge, "seed": draw.randint(0, 3)}

    def ask(method: Any) -> Answers:
        found = method.influence(setup.test)
        products = []
        for c in places(setup):
            maps = method._map._at(c).maps
            p = torch.cat([maps[name].matrix(projected.LIKE) for name in oracle.names])
            phi, psi = trains[c][0] @ p, tests[c][0] @ p
            normal = phi.T @ phi + ridge * torch.eye(phi.shape[1], dtype=phi.dtype)
            products.append(psi @ torch.linalg.solve(normal, phi.T))
        slopes = total([slope for _, slope in trains]) / len(products)
        return {"influence": (found, total(products) / len(products) * slopes)}

    make = lambda: TRAK(setup.model, setup.train, setup.checkpoints, **arguments)  # noqa: E731
    return Question(make, ask, 1e-7)


def _margins(setup: Setup, c: int, examples: list[Any]) -> tuple[Tensor, Tensor]:
    """The gradients of the margins ``[n, P]``, and 1 - p ``[n]``."""
    rows, slopes = [], []
    for example in examples:
        batch = setup.oracle.example(example)
        model = setup.oracle.model_at(c)
        with torch.enable_grad():
            p = logits_of(call(model, batch)).softmax(-1)[0, batch[-1][0]]
            margin = p.log() - (1 - p).log()
            rows.append(flat_gradient(margin, setup.oracle.parameters(model)).detach())
        slopes.append((1 - p).detach())
    return torch.stack(rows), torch.stack(slopes)
