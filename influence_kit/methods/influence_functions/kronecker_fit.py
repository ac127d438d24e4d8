"""What K-FAC and EK-FAC measure of a whole model: Kronecker factors in pieces, and observations.

A piece is a weight with its bias (a Kronecker product) or one other parameter (a diagonal).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.core.distributed import is_first_rank
from influence_kit.core.dtypes import real
from influence_kit.curvature.kronecker import Measured
from influence_kit.curvature.layer_forms import ObservedForms, Piece, named, refuse_parameters
from influence_kit.curvature.measured_pieces import MeasuredDiagonal, measured_piece
from influence_kit.curvature.observations import Tally
from influence_kit.curvature.passes import DataSet, Features, Remembered
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.influence_functions.observed_gradients import ObservedGradients

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITHOUT = ("diagonal", "leave_out", "error")
OBSERVATIONS = "observations"

# by block; what measures its pieces by their keys
Pieces = dict[str, list[Piece]]
MeasuredBlocks = dict[str, dict[str, Measured]]


def _all(measured: MeasuredBlocks) -> list[Measured]:
    return [one for own in measured.values() for one in own.values()]


class KroneckerFit(InfluenceFunction):
    """The fit of an influence function whose curvature is a Kronecker product for each layer.

    Args:
        curvature: "fisher" (at labels drawn from the model) or "empirical_fisher" (at the labels of
            the data).
        layers_without_kronecker: what becomes of parameters without a Kronecker form: "diagonal",
            "leave_out" or "error".
    """

    # whether the eigenvalues are those of EK-FAC
    corrected: bool

    def __init__(
        self,
        *args: Any,
        curvature: Literal["fisher", "empirical_fisher"] = "fisher",
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
        self.layers_without_kronecker = layers_without_kronecker
        self._said_left_out: set[str] = set()
        super().__init__(*args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        settings = {**super()._settings(), "curvature": self.curvature}
        if self.layers_without_kronecker != "diagonal":  # as fits of earlier versions
            settings["layers_without_kronecker"] = self.layers_without_kronecker
        return settings

    def _measure(self, data: DataSet) -> Facts:
        tally = Tally(of_data=self.curvature != "fisher")
        # of labels drawn again: of the same ones the eigenvectors know too much
        again = self.corrected and self.curvature == "fisher"
        features = self._tallied(data, tally, draw=1 if again else 0)
        first = self._curvature_features(self.curvature, data) if again else features
        observed = ObservedForms(self._partition.blocks)
        pieces, measured = self._factors(first, data, observed)
        self._settle(observed)
        if self.corrected:
            for places, batch in data.of_this_rank():
                gradients = features(places, batch)
                for one in _all(measured):
                    one.add_squares(gradients)
        facts = {OBSERVATIONS: tally.result(self._sample)}
        for block, names in self._partition.blocks.items():
            for piece in pieces[block]:
                found = measured[block][piece.key].facts(data.count, self.corrected)
                found["members"] = torch.tensor([names.index(name) for name in piece.names])
                found["squared_weights"] = self._squared_weights(piece.names)
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

    def _squared_weights(self, names: Sequence[str]) -> Tensor:
        own = (real(self._parameters[name].detach()) for name in names)
        squares = [values.double().square().sum() for values in own]
        return torch.stack(squares).sum()

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

    def _tallied(self, data: DataSet, tally: Tally, draw: int) -> Features:
        """The gradients at labels of a draw, of which ``tally`` takes note."""
        return Remembered(self._observed(data, draw).tallied(tally), self._memory)

    def _observed(self, data: DataSet, draw: int) -> ObservedGradients:
        """Gradients at labels of a draw, or of the data."""

        def prepare(places: Tensor, batch: Batch) -> None:
            self._source.prepare(batch, self._train_loss, int(places[0]))

        def features(places: Tensor, batch: Batch) -> Gradients:
            return self._features(data.checkpoint, batch, self._train_loss)

        return ObservedGradients(prepare, features, self._labels(draw), self.curvature != "fisher")
