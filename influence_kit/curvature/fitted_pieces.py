"""The fitted blocks of a Kronecker-factored curvature, read from the tensors of a state.

The tensors of a piece are named ``key.left``, ``key.grid`` and so on; the key is the name of the
block for its first matrix or table, and that of a parameter for its other pieces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.curvature.diagonal import Diagonal
from influence_kit.curvature.eigenbasis import Eigenbasis
from influence_kit.curvature.kronecker_inverse import Table
from influence_kit.curvature.layer_forms import own_key
from influence_kit.curvature.matrix_layer import MatrixLayer

LEFT_OUT = "left out"


@dataclass(frozen=True)
class FittedPiece:
    """One weight with its bias, or one other parameter.

    Args:
        names: the names of its parameters; the weight comes first.
        own: its tensors: the eigenvalues "grid", ``[g, o, i]`` of a matrix, ``[v, e]`` of a table,
            ``[p]`` of a diagonal, and the eigenvectors.
    """

    names: tuple[str, ...]
    own: Mapping[str, Tensor]

    @property
    def grid(self) -> Tensor:
        """The eigenvalues."""
        return self.own["grid"]

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer or convolution, with its bias."""
        return self.grid.dim() == 3

    @property
    def squared_weights(self) -> float:
        """The sum of the squares of its parameters at the fit."""
        return float(self.own["squared_weights"])

    def basis(self, weights: Tensor, sample: Tensor, rtol: float) -> Eigenbasis | Table | Diagonal:
        """The eigenvectors with a weight per eigenvalue, such as 1 / (eigenvalue + damping)."""
        weights = weights.to(sample)
        left, right = (
            None if (side := self.own.get(name)) is None else side.to(sample)
            for name in ("left", "right")
        )
        if weights.dim() == 1:
            return Diagonal(self.names[0], weights)
        if weights.dim() == 2:
            return Table(self.names[0], right, weights)
        layer = MatrixLayer.of(self.names, self.own)
        sizes = self.own["left_values"], self.own["right_values"]
        return Eigenbasis(layer, left, right, weights, sizes, rtol)

    def form(self, swapped: bool) -> str:
        """The form in words; ``swapped`` if the rows of the matrix are inputs."""
        if self.grid.dim() == 1:
            return "diagonal (zero)" if is_idle(self.grid) else "diagonal"
        if self.grid.dim() == 2:
            sides = {"right": (self.grid.shape[1], "entries")}
        else:
            words = ("inputs", "outputs") if swapped else ("outputs", "inputs")
            width = self.grid.shape[2] - (len(self.names) - 1)
            sides = {"left": (self.grid.shape[1], words[0]), "right": (width, words[1])}
        long = [f"{n:,} {word}" for side, (n, word) in sides.items() if side not in self.own]
        return "Kronecker" + (f", diagonal over its {' and '.join(long)}" if long else "")


def fitted_pieces(
    tensors: Mapping[str, Tensor],
    blocks: Mapping[str, Sequence[str]],
) -> dict[str, list[FittedPiece]]:
    """The pieces of each block; an empty list for a block that is left out.

    Args:
        tensors: the state of the fit, by name.
        blocks: names of parameters by block.
    """
    by_key: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        key, _, field = name.rpartition(".")
        by_key[key][field] = value
    found: dict[str, list[FittedPiece]] = {}
    for block, names in blocks.items():
        keys = [block, *(own_key(block, name) for name in names)]
        owns = [by_key[key] for key in keys if "grid" in by_key.get(key, {})]
        found[block] = [
            FittedPiece(tuple(names[i] for i in own["members"].tolist()), own) for own in owns
        ]
    return found


def form_of_block(names: Sequence[str], pieces: Sequence[FittedPiece], swapped: bool) -> str:
    """The form of a block in words: one, or one for each of its parameters.

    Args:
        names: the names of all parameters of the block.
        pieces: the pieces of the block.
        swapped: see ``FittedPiece.form``.
    """
    forms = dict.fromkeys(names, LEFT_OUT)
    for piece in pieces:
        forms |= dict.fromkeys(piece.names, piece.form(swapped))
    if len(set(forms.values())) == 1:
        return next(iter(forms.values()))
    together: dict[str, list[str]] = defaultdict(list)
    for name, form in forms.items():
        together[form].append(name.rpartition(".")[2])
    return "; ".join(f"{', '.join(own)}: {form}" for form, own in together.items())


def is_idle(grid: Tensor) -> bool:
    """Whether a piece is a diagonal, and no example had a gradient."""
    return grid.dim() == 1 and not bool(grid.any())


def mean_of(grids: Sequence[Tensor]) -> Tensor:
    """The mean of all eigenvalues of a block."""
    if len(grids) == 1:
        return grids[0].mean()
    count = sum(grid.numel() for grid in grids)
    return torch.stack([grid.sum() for grid in grids]).sum() / count
