"""Projections written out: one matrix ``[P, K]`` with which flat gradients are multiplied.

Which parameters make one matrix, and where their entries are, is said here anew; of the package
only the random matrices themselves are taken. Letters: P chosen parameters, K entries of all
projected gradients, o outputs and i inputs (with the bias) of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIKE = torch.zeros((), dtype=torch.float64)
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Piece:
    """Parameters that are projected together."""

    names: list[str]
    shape: torch.Size
    transposed: bool

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    @property
    def sizes(self) -> tuple[int, int]:
        """The letters o and i."""
        rows, columns = self.shape[0], self.shape[1:].numel()
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return outputs, inputs + len(self.names) - 1


def pieces(model: nn.Module, names: Sequence[str]) -> list[Piece]:
    """A layer's weight with its bias; any other parameter alone."""
    biases = {}
    transposed = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        is_conv1d = "Conv1D" in [base.__qualname__ for base in type(module).__mro__]
        if is_conv1d:
            transposed.add(f"{prefix}weight")
        if is_conv1d or isinstance(module, MATRICES):
            biases[f"{prefix}weight"] = f"{prefix}bias"
    joined = {weight: bias for weight, bias in biases.items() if {weight, bias} <= set(names)}
    return [
        Piece(
            [name, joined[name]] if name in joined else [name],
            model.get_parameter(name).shape,
            name in transposed,
        )
        for name in names
        if name not in joined.values()
    ]


def places(model: nn.Module, names: Sequence[str], some: Sequence[str]) -> Tensor:
    """Where some parameters are in the flat gradient of the named ones."""
    starts, start = {}, 0
    for name in names:
        count = model.get_parameter(name).numel()
        starts[name] = torch.arange(start, start + count)
        start += count
    return torch.cat([starts[name] for name in some])


def two_sided(piece: Piece, left: Tensor, right: Tensor) -> Tensor:
    """``[p, k_o k_i]``: a flat weight (then bias) times it is vec(P_o^T G P_i)."""
    o, i = piece.sizes
    assert (len(left), len(right)) == (o, i)
    entry = torch.arange(o * i).view(o, i)
    has_bias = len(piece.names) > 1
    weights = entry[:, :-1] if has_bias else entry
    order = (weights.T if piece.transposed else weights).flatten()
    if has_bias:
        order = torch.cat([order, entry[:, -1]])
    kronecker = torch.einsum("oa,ib->oiab", left, right).reshape(o * i, -1)
    return kronecker[order]


def own_matrix(piece: Piece, found: Any) -> Tensor:
    """The matrix of a piece, of the random matrices that the package has drawn for it."""
    if not hasattr(found, "left"):
        return found.map.matrix(LIKE)
    matrix = two_sided(piece, found.left.matrix(LIKE), found.right.matrix(LIKE))
    return matrix if found.then is None else matrix @ found.then.matrix(LIKE)


def written_out(
    model: nn.Module, names: Sequence[str], maps: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The columns ``[P, k]`` of each piece, under the name of its first parameter."""
    total = sum(model.get_parameter(name).numel() for name in names)
    expected = pieces(model, names)
    assert [piece.names[0] for piece in expected] == list(maps)
    found = {}
    for piece in expected:
        own = own_matrix(piece, maps[piece.names[0]])
        columns = torch.zeros(total, own.shape[1], dtype=torch.float64)
        columns[places(model, names, piece.names)] = own
        found[piece.names[0]] = columns
    return found


# Scores.


def curvature(u: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Mean of u u^T, zero between groups of columns."""
    whole = u.T @ u / len(u)
    kept = torch.zeros_like(whole)
    for group in groups:
        kept[group[:, None], group] = whole[group[:, None], group]
    return kept


def groups_of(columns: Mapping[str, Tensor], blocks: Any) -> dict[str, Tensor]:
    """Which of the K columns are in each block."""
    ends = torch.tensor([own.shape[1] for own in columns.values()]).cumsum(0).tolist()
    own = {
        name: torch.arange(end - columns[name].shape[1], end)
        for name, end in zip(columns, ends, strict=True)
    }
    if blocks == "layer":
        blocks = {}
        for name in columns:
            blocks.setdefault(name.rpartition(".")[0] or name, []).append(name)
    elif blocks == "full":
        blocks = {"full": list(columns)}
    return {block: torch.cat([own[name] for name in names]) for block, names in blocks.items()}


def automatic(fisher: Tensor, group: Tensor, n: int) -> float:
    """The mean of the eigenvalues that n examples can make other than zero."""
    own = fisher[group[:, None], group]
    return torch.linalg.eigvalsh(own).sort(descending=True).values[:n].mean().item()


def inverse_of(
    fisher: Tensor, groups: Mapping[str, Tensor], damping: float | Mapping[str, float]
) -> Tensor:
    """(F + damping)^-1 of each group of columns, ``[K, K]``."""
    inverse = torch.zeros_like(fisher)
    for block, group in groups.items():
        own = fisher[group[:, None], group]
        value = damping[block] if isinstance(damping, Mapping) else damping
        damped = own + value * torch.eye(len(group), dtype=own.dtype)
        inverse[group[:, None], group] = torch.linalg.inv(damped)
    return inverse
