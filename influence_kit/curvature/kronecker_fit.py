"""The fit of K-FAC and EK-FAC to a whole model: Kronecker factors in pieces, and observations.

A piece is a weight with its bias (a Kronecker product) or one other parameter (a diagonal).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from influence_kit.core.dtypes import real
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.kronecker import Measured
from influence_kit.curvature.layer_forms import ObservedForms, Piece, named, refuse_parameters
from influence_kit.curvature.measured_pieces import MeasuredDiagonal, measured_piece
from influence_kit.curvature.observations import Tally
from influence_kit.curvature.passes import Features
from influence_kit.errors import InvalidArgumentError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OBSERVATIONS = "observations"

# by block: its pieces, and their accumulators by key
Pieces = dict[str, list[Piece]]
MeasuredBlocks = dict[str, dict[str, Measured]]


@dataclass
class KroneckerFit:
    """One fit, at the checkpoint that is in the model.

    Args:
        data: the data of the fit.
        curvature: "fisher" or "empirical_fisher".
        corrected: whether eigenvalues are measured in the factors' eigenbasis (EK-FAC).
        seed: the seed of the sampled slopes.
        without_form: how to treat parameters without a Kronecker form.

    Attributes:
        left_out: the parameters that are left out, after the fit.
        count: the number of parameters.
    """

    data: FitData
    curvature: str
    corrected: bool
    seed: int
    without_form: str
    left_out: Mapping[str, str] = field(default_factory=dict, init=False)
    count: int = field(default=0, init=False)

    def __call__(self) -> dict[str, Tensor]:
        """The factors' eigenpairs, by the names of ``fitted_pieces``, and the observations."""
        data, at_data = self.data, self.curvature != "fisher"
        tally = Tally(of_data=at_data)
        # eigenvalues at independent slopes: at those of the eigenvectors they would be biased
        again = self.corrected and not at_data
        eigenvalues_at = data.observed(self.seed, draw=1 if again else 0, at_data=at_data)
        features = data.remembered(eigenvalues_at.tallied(tally))
        first = data.features(self.curvature, self.seed) if again else features
        observed = ObservedForms(data.partition.blocks)
        pieces, measured = self._factors(first, observed)
        self._settle(observed)
        if self.corrected:
            for indices, batch in data.examples.of_this_rank():
                gradients = features(indices, batch)
                for one in _all(measured):
                    one.add_squares(gradients)
        state = {OBSERVATIONS: tally.result(data.sample)}
        for block, names in data.partition.blocks.items():
            for piece in pieces[block]:
                found = measured[block][piece.key].state(data.count, self.corrected)
                found["members"] = torch.tensor([names.index(name) for name in piece.names])
                found["squared_weights"] = self._squared_weights(piece.names)
                state.update({f"{piece.key}.{name}": value for name, value in found.items()})
        return state

    def _factors(
        self, features: Features, observed: ObservedForms
    ) -> tuple[Pieces, MeasuredBlocks]:
        """The pieces of all blocks and their accumulators, in one pass over the data.

        One more pass, for some blocks, if a later batch shows another form than the first batch.
        """
        observed.add(features(*next(iter(self.data.examples))))
        pieces: Pieces = {}
        measured: MeasuredBlocks = {}
        while changed := self._changed(observed, pieces):
            fresh = {block: self._measured(block, some) for block, some in changed.items()}
            self._add_factors(features, observed, fresh)
            pieces |= changed
            measured |= fresh
        return pieces, measured

    def _changed(self, observed: ObservedForms, known: Pieces) -> Pieces:
        """The pieces of blocks whose pieces differ from the known ones."""
        now = observed.pieces()
        if self.without_form == "error":
            # parameters that no batch has used yet may be used later
            refuse_parameters(observed.without(used=True), observed.count)
        if self.without_form == "leave_out":
            now = {block: [p for p in some if p.kind] for block, some in now.items()}
        return {block: some for block, some in now.items() if known.get(block) != some}

    def _measured(self, block: str, pieces: Sequence[Piece]) -> dict[str, Measured]:
        data = self.data
        # the gradients of a transposed convolution are at its windows, not at its positions
        every = is_swapped(data.model, block)
        shapes = data.partition.shapes
        return {p.key: measured_piece(p, shapes, data.sample, every) for p in pieces}

    def _add_factors(
        self, features: Features, observed: ObservedForms, measured: MeasuredBlocks
    ) -> None:
        """A pass over the data, for these blocks."""
        every, data = _all(measured), self.data
        for indices, batch in data.examples.of_this_rank():
            gradients = features(indices, batch)
            observed.add(gradients)
            for one in every:
                one.add_factors(gradients)
                if isinstance(one, MeasuredDiagonal) and not self.corrected:
                    one.add_squares(gradients)
        observed.join_ranks(data.sample)
        for one in every:
            one.decompose(data.count)

    def _squared_weights(self, names: Iterable[str]) -> Tensor:
        own = (real(self.data.parameters[name].detach()) for name in names)
        squares = [values.double().square().sum() for values in own]
        return torch.stack(squares).sum()

    def _settle(self, observed: ObservedForms) -> None:
        """Refuse the parameters without a Kronecker form, or leave them out, as requested."""
        without, self.count = observed.without(), observed.count
        if not without or self.without_form == "diagonal":
            return
        if self.without_form == "error":
            refuse_parameters(without, self.count)
        if len(without) == self.count:
            raise InvalidArgumentError(
                f"no parameter has a Kronecker form: {named(without)}; "
                'layers_without_kronecker="leave_out" leaves none. Use "diagonal"'
            )
        self.left_out = without


def is_swapped(model: nn.Module, block: str) -> bool:
    """Whether a block is a transposed convolution, the rows of whose matrix are inputs."""
    return isinstance(dict(model.named_modules()).get(block, model), TRANSPOSED)


def _all(measured: MeasuredBlocks) -> list[Measured]:
    return [one for own in measured.values() for one in own.values()]
