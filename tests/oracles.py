"""Slow, obvious and independent: what the package must equal, in float64.

Nothing here uses the package. A batch is a tuple ``(*inputs, targets)`` or a dict; ``rows`` takes
single examples out of it; a loss is called as the user's is, on one example at a time.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def one(batch: Any, i: int) -> Any:
    """Example i of a batch, as a batch of one."""
    if isinstance(batch, Mapping):
        return {key: value[i : i + 1] for key, value in batch.items()}
    return tuple(value[i : i + 1] for value in batch)


def count(batch: Any) -> int:
    return len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch[-1])


def forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(*batch[:-1])


def gradients(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    names: Sequence[str] | None = None,
) -> Tensor:
    """The gradient of every example's loss, by a loop of single-example autograd: ``[n, P]``."""
    chosen = dict(model.named_parameters())
    names = list(chosen) if names is None else names
    rows = []
    for i in range(count(batch)):
        example = one(batch, i)
        targets = example if isinstance(example, Mapping) else example[-1]
        total = loss(forward(model, example), targets).sum()
        parameters = [chosen[name] for name in names]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for g, p in zip(found, parameters, strict=True)
        ]
        rows.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(rows).detach()


def tracin(
    model: nn.Module,
    train: Any,
    test: Any,
    loss: Callable[[Any, Any], Tensor],
    checkpoints: Sequence[Mapping[str, Tensor]],
    rates: Sequence[float],
    names: Sequence[str] | None = None,
    test_loss: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    """sum_c rate_c <test gradient, train gradient>, ``[m, n]``."""
    scores = torch.zeros(count(test), count(train), dtype=torch.float64)
    for state, rate in zip(checkpoints, rates, strict=True):
        model.load_state_dict(state)
        g = gradients(model, train, loss, names)
        h = gradients(model, test, test_loss or loss, names)
        scores += rate * (h @ g.T)
    return scores


def left_out_of_steps(
    model: nn.Module,
    train: Any,
    test: Any,
    loss: Callable[[Any, Any], Tensor],
    steps: Sequence[Mapping[str, Any]],
    final: Mapping[str, Tensor],
) -> Tensor:
    """<what leaving i out of its steps does to the final weights, test gradient there>, ``[m, n]``.

    Each visit's change of the weights is carried through the matrices of all later steps, which
    are written out.
    """
    gs, matrices, shares = [], [], []
    for step in steps:
        model.load_state_dict(step["state_dict"])
        own = [one(train, i) for i in step["indices"]]
        gs.append(torch.cat([gradients(model, example, loss) for example in own]))
        shares.append(step["lr"] / (len(own) if step.get("reduction") != "sum" else 1))
        kept = torch.eye(gs[-1].shape[1], dtype=torch.float64)
        fisher = sum(torch.outer(g, g) for g in gs[-1])
        decay = step["lr"] * step.get("weight_decay", 0.0)
        matrices.append((1 - decay) * kept - shares[-1] * fisher)
    moved = torch.zeros(count(train), gs[0].shape[1], dtype=torch.float64)
    for number, step in enumerate(steps):
        for i, g in zip(step["indices"], gs[number], strict=True):
            change = shares[number] * g
            for matrix in matrices[number + 1 :]:
                change = matrix @ change
            moved[i] += change
    model.load_state_dict(final)
    return gradients(model, test, loss) @ moved.T


def set_gradient(model: nn.Module, gradient: Tensor) -> None:
    """Write a whole gradient ``[P]`` into the parameters' ``grad``."""
    parameters = list(model.parameters())
    pieces = gradient.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()


def adam_directions(model: nn.Module, checkpoint: Mapping[str, Any], gs: Tensor) -> Tensor:
    """How torch's own Adam moves the weights by a step of rate 1 on each gradient, ``[n, P]``."""
    rows = []
    for gradient in gs:
        model.load_state_dict(checkpoint["state_dict"])
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        set_gradient(model, gradient)
        optimizer.step()
        rows.append(before - nn.utils.parameters_to_vector(model.parameters()).detach())
    model.zero_grad()
    return torch.stack(rows)


def adam_scores(
    model: nn.Module,
    train: Any,
    test: Any,
    loss: Callable[[Any, Any], Tensor],
    checkpoints: Sequence[Mapping[str, Any]],
    cosine: bool = True,
) -> Tensor:
    """sum_c rate_c cos(test gradient, Adam's direction of the train gradient), ``[m, n]``."""
    scores = torch.zeros(count(test), count(train), dtype=torch.float64)
    for checkpoint in checkpoints:
        model.load_state_dict(checkpoint["state_dict"])
        h, g = gradients(model, test, loss), gradients(model, train, loss)
        directions = adam_directions(model, checkpoint, g)
        if cosine:
            h, directions = (side / side.norm(dim=1, keepdim=True) for side in (h, directions))
        scores += checkpoint["learning_rate"] * (h @ directions.T)
    return scores


def adam_scales(model: nn.Module, checkpoint: Mapping[str, Any]) -> Tensor:
    """1 / (sqrt(v / (1 - beta2^t)) + eps) of all entries ``[P]``, read from a state dict of Adam.

    Its parameters are all of the model's, in their order; entries with v = 0 are 0.
    """
    held = checkpoint["optimizer"]
    (group,) = held["param_groups"]
    pieces = []
    for number, parameter in enumerate(model.parameters()):
        own = held["state"].get(number)
        if own is None:
            pieces.append(torch.zeros(parameter.numel(), dtype=torch.float64))
            continue
        v = own["exp_avg_sq"].double().flatten() / (1 - group["betas"][1] ** float(own["step"]))
        pieces.append(torch.where(v > 0, 1 / (v.sqrt() + group["eps"]), 0.0))
    return torch.cat(pieces)


def cosines(
    model: nn.Module,
    train: Any,
    test: Any,
    loss: Callable[[Any, Any], Tensor],
    checkpoints: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """sum_c cos(test gradient, train gradient), ``[m, n]``."""
    scores = torch.zeros(count(test), count(train), dtype=torch.float64)
    for state in checkpoints:
        model.load_state_dict(state)
        g, h = gradients(model, train, loss), gradients(model, test, loss)
        scores += torch.nn.functional.cosine_similarity(h[:, None], g[None], dim=2)
    return scores


def last_layer(
    model: nn.Module,
    layer: nn.Module,
    train: Any,
    test: Any,
    loss: Callable[[Any, Any], Tensor],
    checkpoints: Sequence[Mapping[str, Tensor]],
    rates: Sequence[float],
) -> Tensor:
    """sum_c rate_c <d_test, d_train> (<a_test, a_train> + 1) for 2-D outputs, ``[m, n]``."""
    scores = torch.zeros(count(test), count(train), dtype=torch.float64)
    for state, rate in zip(checkpoints, rates, strict=True):
        model.load_state_dict(state)
        sides = [_inputs_and_deltas(model, layer, batch, loss) for batch in (test, train)]
        (a, d), (b, e) = sides
        scores += rate * (d @ e.T) * (a @ b.T + 1)
    return scores


def _inputs_and_deltas(
    model: nn.Module, layer: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]
) -> tuple[Tensor, Tensor]:
    seen = {}

    def keep(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        seen.update(inputs=args[0].detach(), output=output)
        return output

    handle = layer.register_forward_hook(keep)
    try:
        total = loss(forward(model, batch), batch[-1]).sum()
    finally:
        handle.remove()
    (delta,) = torch.autograd.grad(total, seen["output"])
    return seen["inputs"], delta


def top_k(scores: Tensor, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
    """The k best of each row by a stable sort: indices and scores."""
    order = scores.sort(dim=1, descending=proponents, stable=True)
    return order.indices[:, :k], order.values[:, :k]
