"""Sampled slopes by dense formulas in float64: what the package must equal.

Only the random signs are hashed as the package hashes them, by plain integers. A batch of slopes
has them in the place of its targets; ``products`` is its loss, for any oracle that takes one.

Shapes: n examples, c classes (or outputs) of a position.
"""

from collections.abc import Sequence
from typing import Any

import oracles
import torch
from torch import Tensor, nn

MASK = (1 << 64) - 1
# seeds of the factors, of EK-FAC's eigenvalues and of the sample for the misfit are so far apart
NEXT = 0x5851F42D4C957F2D


def seeds(seed: int) -> list[int]:
    return [(seed + number * NEXT) % 2**63 for number in range(3)]


def splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def signs(seed: int, index: int, positions: int, each: int) -> Tensor:
    """The signs ``[positions, each]`` of an example: bit b of its word w is number 64 w + b."""
    words, rows = -(-each // 64), []
    for position in range(positions):
        bits: list[int] = []
        for word in range(words):
            counter = (index << 32) + position * words + word
            # splitmix64's own state before it is advanced by one step
            state = (counter + seed * 0xD1B54A32D192ED03) * 0x9E3779B97F4A7C15
            hashed = splitmix64(state & MASK)
            bits += [hashed >> b & 1 for b in range(64)]
        rows.append([2.0 * bit - 1 for bit in bits[:each]])
    return torch.tensor(rows, dtype=torch.float64)


def root(p: Tensor, pivot: int) -> Tensor:
    """A root ``[c, c - 1]`` of diag(p) - p p^T, from the reflection that turns e_pivot into -u."""
    u = p.sqrt()
    along = u.clone()
    along[pivot] += 1
    reflection = torch.eye(len(p), dtype=p.dtype) - 2 * torch.outer(along, along) / (along @ along)
    others = [c for c in range(len(p)) if c != pivot]
    return torch.diag(u) @ reflection[:, others]


def pivot_of(p: Tensor) -> int:
    """The first class whose root of a probability is within 1% of the largest."""
    u = p.sqrt().tolist()
    return next(c for c, value in enumerate(u) if value >= 0.99 * max(u))


def of_softmax(logits: Tensor, random: Tensor) -> Tensor:
    """The slopes at one position, of signs ``[c]``: that of the likeliest class is not used."""
    p = logits.double().softmax(0)
    pivot = pivot_of(p)
    others = [c for c in range(len(p)) if c != pivot]
    return root(p, pivot) @ random[others]


def slopes(logits: Tensor, labels: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
    """Of integer labels, for logits ``[n, ..., c]``; 0 at positions with a negative label."""
    found = torch.zeros_like(logits, dtype=torch.float64)
    classes = logits.shape[-1]
    for row, index in enumerate(indices):
        z, y = logits[row].reshape(-1, classes), labels[row].reshape(-1)
        random = signs(seed, index, len(z), classes)
        for position in range(len(z)):
            if y[position] >= 0:
                own = of_softmax(z[position], random[position])
                found[row].view(-1, classes)[position] = own
    return found


def with_slopes(model: nn.Module, batch: Any, seed: int) -> Any:
    """The batch ``(*inputs, labels)`` with slopes in the place of labels."""
    with torch.no_grad():
        logits = oracles.forward(model, batch)
    return (*batch[:-1], slopes(logits, batch[-1], seed, range(len(batch[-1]))))


def products(outputs: Tensor, of_outputs: Tensor) -> Tensor:
    """The loss of a batch of slopes, whose gradient in the outputs they are."""
    return (outputs * of_outputs).sum()
