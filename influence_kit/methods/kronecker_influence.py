"""What K-FAC and EK-FAC share: the curvature of a whole model in pieces, measured and inverted.

A piece is a weight with its bias (a Kronecker product) or one other parameter (a diagonal).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.arguments import check_number
from influence_kit.distributed import is_first_rank
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.fitted import Facts
from influence_kit.methods.influence_function import InfluenceFunction
from influence_kit.operators.fitted_pieces import (
    LEFT_OUT,
    FittedPiece,
    fitted_pieces,
    form_of_block,
    is_idle,
    mean_of,
)
from influence_kit.operators.kronecker import Measured
from influence_kit.operators.kronecker_inverse import KroneckerInverse
from influence_kit.operators.layer_forms import ObservedForms, Piece, named, refuse_parameters
from influence_kit.operators.measured_pieces import MeasuredDiagonal, measured_piece
from influence_kit.operators.passes import DataSet, Features
from influence_kit.operators.solvers import damping_by_block
from influence_kit.scoring.term import Transform

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITHOUT = ("diagonal", "leave_out", "error")

# by block; what measures its pieces by their keys
Pieces = dict[str, list[Piece]]
MeasuredBlocks = dict[str, dict[str, Measured]]


def _all(measured: MeasuredBlocks) -> list[Measured]:
    return [one for own in measured.values() for one in own.values()]


class KroneckerInfluence(InfluenceFunction):
    """An influence function whose curvature is a Kronecker product for each layer.

    Args:
        curvature: "fisher" (at labels drawn from the model) or "empirical_fisher" (at the labels of
            the data).
        rtol: relative error that a cheaper form of a layer's products may have, for layers whose
            examples have one position; it is measured, and 0 has all products exact.
        layers_without_kronecker: what becomes of parameters without a Kronecker form: "diagonal",
            "leave_out" or "error".
    """

    corrected: bool

    def __init__(
        self,
        *args: Any,
        curvature: Literal["fisher", "empirical_fisher"] = "fisher",
        rtol: float = 1e-5,
        layers_without_kronecker: Literal["diagonal", "leave_out", "error"] = "diagonal",
        **kwargs: Any,
    ) -> None:
        if curvature not in ("fisher", "empirical_fisher"):
            raise InvalidArgumentError(
                f'`curvature` must be "fisher" or "empirical_fisher"; got {curvature!r}'
            )
        if layers_without_kronecker not in WITHOUT:
            raise InvalidArgumentError(
                '`layers_without_kronecker` must be "diagonal", "leave_out" or "error"; got '
                f"{layers_without_kronecker!r}"
            )
        self.curvature = curvature
        self.rtol = check_number(rtol, "rtol", least=0, below=1)
        self.layers_without_kronecker = layers_without_kronecker
        self._said_left_out: set[str] = set()
        super().__init__(*args, **kwargs)

    # What a user reads.

    @property
    def block_forms(self) -> dict[str, str]:
        """The form of the curvature of each block, once it is fitted; empty before.

        "Kronecker", "diagonal" ("diagonal (zero)" where no example has a gradient) or "left out";
        "Kronecker, diagonal over its 50,257 outputs" where a side of a weight is longer than 8,192;
        by parameter where those of a block differ: "weight: Kronecker; bias: diagonal". Where
        checkpoints differ, their forms with "or" between.
        """
        found: dict[str, list[str]] = {}
        for _, facts in sorted(self._facts.items()):
            fitted = self._fitted(facts)
            for block, names in self._partition.blocks.items():
                text = form_of_block(names, fitted[block], self._is_swapped(block))
                found.setdefault(block, []).append(text)
        return {block: " or ".join(dict.fromkeys(texts)) for block, texts in found.items()}

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block that takes part, at each checkpoint that is fitted."""
        forms = self.block_forms
        return [
            {block: value for block, value in values.items() if forms[block] != LEFT_OUT}
            for values in super().damping_used
        ]

    # What is measured.

    def _settings(self) -> dict[str, Any]:
        settings = {**super()._settings(), "curvature": self.curvature}
        if self.layers_without_kronecker != "diagonal":  # as fits of earlier versions
            settings["layers_without_kronecker"] = self.layers_without_kronecker
        return settings

    def _measure(self, data: DataSet) -> Facts:
        features = self._curvature_features(self.curvature, data)
        observed = ObservedForms(self._partition.blocks)
        pieces, measured = self._factors(features, data, observed)
        self._settle(observed)
        if self.corrected:
            if self.curvature == "fisher":
                # of labels drawn anew: of the same ones the eigenvectors know too much
                features = self._curvature_features(self.curvature, data, draw=1)
            for places, batch in data.of_this_rank():
                gradients = features(places, batch)
                for one in _all(measured):
                    one.add_squares(gradients)
        facts = {}
        for block, names in self._partition.blocks.items():
            for piece in pieces[block]:
                found = measured[block][piece.key].facts(data.count, self.corrected)
                found["members"] = torch.tensor([names.index(name) for name in piece.names])
                facts.update({f"{piece.key}.{field}": value for field, value in found.items()})
        return facts

    def _factors(
        self, features: Features, data: DataSet, observed: ObservedForms
    ) -> tuple[Pieces, MeasuredBlocks]:
        """The pieces of all blocks and what was measured of them in one pass over the data.

        In one more, of some blocks, where a later batch shows another form than the first.
        """
        observed.add(features(*next(iter(data))))
        pieces: Pieces = {}
        measured: MeasuredBlocks = {}
        while changed := self._changed(observed, pieces):
            fresh = {block: self._measured(block, some) for block, some in changed.items()}
            self._add_factors(features, data, observed, fresh)
            pieces |= changed
            measured |= fresh
        return pieces, measured

    def _changed(self, observed: ObservedForms, known: Pieces) -> Pieces:
        """The pieces of blocks that are others than is known."""
        now = observed.pieces()
        if self.layers_without_kronecker == "error":
            # those that are not used yet may be later
            refuse_parameters(observed.without(used=True), observed.count)
        if self.layers_without_kronecker == "leave_out":
            now = {block: [p for p in some if p.kind] for block, some in now.items()}
        return {block: some for block, some in now.items() if known.get(block) != some}

    def _measured(self, block: str, pieces: Sequence[Piece]) -> dict[str, Measured]:
        # a transposed convolution's gradients arrive at the windows, not at its positions
        every = self._is_swapped(block)
        return {p.key: measured_piece(p, self._shapes, self._sample, every) for p in pieces}

    def _is_swapped(self, block: str) -> bool:
        """Whether it is a transposed convolution, the rows of whose matrix are inputs."""
        module = dict(self.model.named_modules()).get(block, self.model)
        return isinstance(module, TRANSPOSED)

    def _add_factors(
        self,
        features: Features,
        data: DataSet,
        observed: ObservedForms,
        measured: MeasuredBlocks,
    ) -> None:
        """A pass over the data, for these blocks."""
        every = _all(measured)
        for places, batch in data.of_this_rank():
            gradients = features(places, batch)
            observed.add(gradients)
            for one in every:
                one.add_factors(gradients)
                if isinstance(one, MeasuredDiagonal) and not self.corrected:
                    one.add_squares(gradients)
        observed.join_ranks(self._sample)
        for one in every:
            one.decompose(data.count)

    def _settle(self, observed: ObservedForms) -> None:
        """Refuse the parameters without a Kronecker form, or leave them out, as is asked."""
        without, count = observed.without(), observed.count
        if not without or self.layers_without_kronecker == "diagonal":
            return
        if self.layers_without_kronecker == "error":
            refuse_parameters(without, count)
        if len(without) == count:
            raise InvalidArgumentError(
                f"no parameter has a Kronecker form: {named(without)}; "
                'layers_without_kronecker="leave_out" leaves none. Use "diagonal"'
            )
        if is_first_rank() and self._said_left_out != set(without):
            self._said_left_out = set(without)
            warnings.warn(
                f"{len(without)} of {count} parameters have no Kronecker form and are left out, "
                f"as if they were frozen: {named(without)}",
                stacklevel=2,
            )

    # How it is used.

    def _fitted(self, facts: Facts) -> dict[str, list[FittedPiece]]:
        """What was measured, by block; a block that is left out has no pieces."""
        return fitted_pieces(facts, self._partition.blocks, self._shapes)

    def _eigenvalues(self, facts: Facts) -> dict[str, list[Tensor]]:
        """All eigenvalues of each block, diagonals included; none of blocks that are left out."""
        return {
            block: [piece.grid for piece in pieces]
            for block, pieces in self._fitted(facts).items()
            if pieces
        }

    def _means(self, facts: Facts, data: DataSet) -> Tensor:
        values = self._eigenvalues(facts)
        means = {block: mean_of(own) for block, own in values.items()}
        # no training example has a gradient there: any damping serves
        idle = {block for block in self.block_names if block not in means}
        if self._hessian_data is None:
            idle |= {b for b, own in values.items() if all(is_idle(grid) for grid in own)}
        others = [mean for block, mean in means.items() if block not in idle]
        if others:
            means |= dict.fromkeys(idle, torch.stack(others).mean())
        return torch.stack([means[block] for block in self.block_names])

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        values = damping_by_block(damping, len(self.block_names), positive=True).tolist()
        bases = {}
        for pieces, value in zip(self._fitted(facts).values(), values, strict=True):
            for piece in pieces:
                bases[piece.names[0]] = piece.basis(value, self._sample, self.rtol)
        return KroneckerInverse(bases)
