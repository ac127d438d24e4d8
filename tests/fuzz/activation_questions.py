"""Methods that read activations, against those of single examples."""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz.draw import Draw
from fuzz.questions import Answers, Question, Scores, Void, check_finite, places, total
from fuzz.setups import Setup
from fuzz.wrappers import Around, Routed
from influence_kit import (
    KNNShapley,
    RepresenterPointSelection,
    SimilarityInfluence,
    cosine_similarity,
    euclidean_distance,
)

CONVEX = ("CrossEntropyLoss", "F.cross_entropy", "label smoothing", "nll", "weighted")


def activation_question(draw: Draw, setup: Setup) -> Question:
    if setup.subject.dtype is not torch.float64:
        raise Void("rounding decides who is near")
    makers = [knn_question, similarity_question, representer_question]
    return draw.one(makers, [2, 1, 1])(draw, setup)


def _layer(draw: Draw, setup: Setup) -> str:
    """A module, the outermost ones more often; one within a wrapper may see other rows."""
    model = setup.model
    outer = [f"net.parts.{i}" for i in range(len(model.net.parts))]
    inner = [
        f"{name}.{other}"
        for name, module in model.named_modules()
        if isinstance(module, Around | Routed)
        for other, _ in module.named_children()
        if other != "experts"
    ]
    if model.net.how in ("siamese", "stacked halves"):
        outer, inner = [setup.subject.final], [*inner, "net.parts.0"]
    outer.append(setup.subject.final)
    if inner and draw.chance(0.4):
        draw.note("inner layer")
        draw.excuse("a layer that sees other rows")
        return draw.one(inner)
    return draw.one(outer)


def _distances(far: Tensor) -> Tensor:
    """Distances, unless some are too near each other to be ordered."""
    gaps = far.sort(dim=1).values.diff(dim=1)
    if gaps.numel() and float(gaps.min()) < 1e-9:
        raise Void("equal distances")
    return far


def knn_question(draw: Draw, setup: Setup) -> Question:
    subject, oracle = setup.subject, setup.oracle
    if subject.kind != "class":
        raise Void("not for KNN")
    draw.note("KNNShapley")
    layer = _layer(draw, setup)
    if any(tag.startswith("ragged") for tag in draw.tags) and layer != subject.final:
        raise Void("features of different lengths")
    k = draw.randint(1, 6)
    labels = [torch.stack([e["labels"] for e in s]) for s in (subject.train, subject.test)]
    values = []
    for c in places(setup):
        known = oracle.hooked(c, layer, False, inputs=False)
        asked = oracle.hooked(c, layer, True, inputs=False)
        check_finite(known, asked)
        order = _distances(torch.cdist(asked, known)).argsort(dim=1)
        values.append(_shapley(order, labels[0], labels[1], k))
    whole = total(values) / len(values)
    if not bool(whole.abs().max() > 0):
        raise Void("all zero")
    kept = ("batch_size", "checkpoints_load_func", "eval_mode")
    arguments = {key: v for key, v in setup.arguments.items() if key in kept}
    arguments |= {"layer": layer, "n_neighbors": k}
    make = lambda: KNNShapley(setup.model, setup.train, setup.checkpoints, **arguments)  # noqa: E731
    return Question(make, Scores(setup, whole).draw(draw))


def _shapley(order: Tensor, known: Tensor, asked: Tensor, k: int) -> Tensor:
    """The recursion of the paper, from the farthest to the nearest."""
    m, n = order.shape
    found = torch.zeros(m, n, dtype=torch.float64)
    for row in range(m):
        hit = [float(known[i] == asked[row]) for i in order[row]] + [0.0]
        value = 0.0
        for j in reversed(range(n)):
            value += (hit[j] - hit[j + 1]) / max(k, j + 1)
            found[row, order[row, j]] = value
    return found


def similarity_question(draw: Draw, setup: Setup) -> Question:
    subject, oracle = setup.subject, setup.oracle
    if not subject.plain:
        raise Void("not for similarity")
    draw.note("SimilarityInfluence")
    layer = _layer(draw, setup)
    cosine = draw.chance(0.5)
    known = oracle.hooked(None, layer, False, inputs=False)
    asked = oracle.hooked(None, layer, True, inputs=False)
    check_finite(known, asked)
    if cosine:
        if not bool((known.norm(dim=1).min() > 0) & (asked.norm(dim=1).min() > 0)):
            raise Void("zero vectors")
        right = F.cosine_similarity(asked[:, None], known[None], dim=2)
    else:
        right = torch.cdist(asked, known, compute_mode="donot_use_mm_for_euclid_dist")
    _distances(right)
    inputs = subject.collate(subject.test)[0]
    setup.data.append(inputs)
    metric = cosine_similarity if cosine else euclidean_distance
    folder = tempfile.TemporaryDirectory()
    size = setup.arguments["batch_size"]
    arguments: dict[str, Any] = {"similarity_metric": metric}
    arguments["similarity_direction"] = "max" if cosine else "min"
    arguments["batch_size"] = size if isinstance(size, int) else 3
    if "eval_mode" in setup.arguments:
        arguments["eval_mode"] = setup.arguments["eval_mode"]

    def make() -> Any:
        return SimilarityInfluence(
            setup.model, layer, setup.train, folder.name, "model", **arguments
        )

    def ask(method: Any) -> Answers:
        index, values = method.influence(inputs, top_k=len(subject.train))[layer]
        folder.cleanup()
        best = right.sort(dim=1, descending=cosine).values
        return {"values": (values, best), "indices": (right.gather(1, index), best)}

    return Question(make, ask, 1e-7)


def representer_question(draw: Draw, setup: Setup) -> Question:
    subject = setup.subject
    convex = any(tag in CONVEX for tag in subject.loss_tags)
    if subject.kind != "class" or not convex or subject.loss is None:
        raise Void("not for representers")
    draw.note("RepresenterPointSelection")
    l2 = draw.one([1e-1, 1e-2])
    whole = total([_representer(setup, c, l2) for c in places(setup)]) / len(setup.rates)
    kept = ("batch_size", "checkpoints_load_func", "eval_mode", "loss_fn")
    arguments = {key: v for key, v in setup.arguments.items() if key in kept} | {"l2": l2}

    def make() -> Any:
        return RepresenterPointSelection(
            setup.model, subject.final, setup.train, setup.checkpoints, **arguments
        )

    return Question(make, Scores(setup, whole).draw(draw), 1e-6)


def _representer(setup: Setup, c: int, l2: float) -> Tensor:
    """alpha_i[y_t] <f_i, f_t> of a head refitted by Newton's method."""
    subject, oracle = setup.subject, setup.oracle
    f = oracle.hooked(c, subject.final, False, inputs=True)
    f_test = oracle.hooked(c, subject.final, True, inputs=True)
    check_finite(f, f_test)
    batches = [oracle.example(e) for e in subject.train]
    loss = oracle.loss(False)

    def losses(outputs: Tensor) -> Tensor:
        rows = zip(outputs, batches, strict=True)
        return total([_one(loss, o[None], b) for o, b in rows])

    def objective(weights: Tensor) -> Tensor:
        return losses(f @ weights.T) / len(f) + l2 * weights.square().sum()

    weights = torch.zeros(subject.classes, f.shape[1], dtype=torch.float64)
    for _ in range(30):
        slope = torch.autograd.functional.jacobian(objective, weights).flatten()
        matrix = torch.autograd.functional.hessian(objective, weights)
        step = torch.linalg.solve(matrix.reshape(len(slope), -1), slope).view_as(weights)
        scale = 1.0
        while objective(weights - scale * step) > objective(weights) + 1e-12 and scale > 1e-4:
            scale /= 2
        weights = weights - scale * step
        if float(step.abs().max()) < 1e-12:
            break
    alpha = -torch.autograd.functional.jacobian(losses, f @ weights.T) / (2 * l2 * len(f))
    labels = torch.stack([e["labels"] for e in subject.test])
    return alpha.T[labels] * (f_test @ f.T)


def _one(loss: Any, outputs: Tensor, batch: Any) -> Tensor:
    return loss(outputs, batch if isinstance(batch, dict) else batch[-1]).sum()
