"""Methods of dot products of gradients."""

from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Draw
from fuzz.questions import Question, Scores, Void, by_layer, check_finite, places, total
from fuzz.setups import Setup, names_of
from influence_kit import GradCos, GradDot, TracInCP, TracInCPFast


def gradient_question(draw: Draw, setup: Setup) -> Question:
    cls = draw.one([TracInCP, GradDot, GradCos, TracInCPFast], [4, 2, 2, 1])
    if cls is TracInCPFast:
        return _fast(draw, setup)
    draw.note(cls.__name__)
    weights = setup.rates if cls is TracInCP else [1.0] * len(setup.rates)
    scores = gradient_scores(setup, weights, cls is GradCos, draw)
    arguments = {**setup.arguments, "layers": setup.layers}
    make = lambda: cls(setup.model, setup.train, setup.checkpoints, **arguments)  # noqa: E731
    return Question(make, scores.draw(draw), close_of(setup))


def close_of(setup: Setup) -> float:
    return 1e-9 if str(setup.subject.dtype) == "torch.float64" else 2e-3


def gradient_scores(setup: Setup, weights: list[float], cosine: bool, draw: Draw) -> Scores:
    def product(h: Tensor, g: Tensor, index: Any = slice(None)) -> Tensor:
        if cosine:
            norms = h.norm(dim=1)[:, None] * g.norm(dim=1)[None]
            if not bool((norms > 0).all()):
                draw.excuse("a gradient of zero has no direction")
            if setup.subject.dtype is torch.float32 and float(norms.min()) < 1e-3:
                raise Void("a direction that float32 cannot tell")
            return (h[:, index] @ g[:, index].T) / norms.clamp(min=1e-300)
        return h[:, index] @ g[:, index].T

    oracle = setup.oracle
    h = [oracle.gradients(c, True) for c in places(setup)]
    g = [oracle.gradients(c, False) for c in places(setup)]
    check_finite(*h, *g)

    def over(one: Any, other: Any, index: Any = slice(None)) -> Tensor:
        return total(
            [w * product(a, b, index) for w, a, b in zip(weights, one, other, strict=True)]
        )

    layers = {name: over(h, g, index) for name, index in by_layer(setup).items()}
    own = over(g, g).diagonal()
    same_loss = setup.subject.test_loss is None
    scores = Scores(
        setup,
        over(h, g),
        own,
        over(h, h).diagonal() if same_loss else None,
        layers if setup.layers is None else None,
        same_loss,
    )
    scores.between_tests = over(h, h)
    return scores


def _fast(draw: Draw, setup: Setup) -> Question:
    """TracIn of the last layer."""
    draw.note("TracInCPFast")
    subject = setup.subject
    setup.oracle.names = names_of(setup.model, [subject.final])
    if "tied head" in draw.tags:
        draw.excuse("the last layer is shared")
    if subject.loss is None:
        draw.excuse("the last layer's gradient needs a loss_fn")
    scores = gradient_scores(setup, setup.rates, False, draw)
    scores.layers, scores.vectors = None, False
    make = lambda: TracInCPFast(  # noqa: E731
        setup.model, subject.final, setup.train, setup.checkpoints, **setup.arguments
    )
    return Question(make, scores.draw(draw), close_of(setup))
