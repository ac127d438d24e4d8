"""What K-FAC and EK-FAC share: the curvature of a whole model in pieces, measured and inverted.

A piece is a weight with its bias (a Kronecker product) or one other parameter (a diagonal).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.arguments import check_number
from influence_kit.data import Batch, take
from influence_kit.distributed import is_first_rank
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.memory import resident_bytes, rows_within, workspace_bytes
from influence_kit.methods.damping import EVIDENCE, MEAN, TRACE
from influence_kit.methods.fitted import Facts
from influence_kit.methods.influence_function import InfluenceFunction
from influence_kit.operators.alignment import misfit
from influence_kit.operators.evidence import evidence_damping
from influence_kit.operators.fitted_pieces import (
    LEFT_OUT,
    FittedPiece,
    fitted_pieces,
    form_of_block,
    is_idle,
    mean_of,
)
from influence_kit.operators.kronecker import Measured, MeasuredDiagonal, measured_piece
from influence_kit.operators.kronecker_inverse import KroneckerInverse
from influence_kit.operators.layer_forms import ObservedForms, Piece, named, refuse_parameters
from influence_kit.operators.observations import LabelFacts, Observations, Tally
from influence_kit.operators.passes import DataSet, Features, Remembered, Spread
from influence_kit.operators.solvers import damping_by_block
from influence_kit.scoring.term import Transform

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITHOUT = ("diagonal", "leave_out", "error")
OBSERVATIONS = "observations"
# examples whose gradients show how well the factors fit
SAMPLE = 128

Pieces = dict[str, list[Piece]]
Observed = Callable[[Tensor, Batch], tuple[Gradients, LabelFacts | None]]


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

    _rules = (EVIDENCE, MEAN, TRACE)
    _auto_rule = EVIDENCE
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
        modules = dict(self.model.named_modules())
        for _, facts in sorted(self._facts.items()):
            fitted = self._fitted(facts)
            for block, names in self._partition.blocks.items():
                swapped = isinstance(modules.get(block, self.model), TRANSPOSED)
                text = form_of_block(names, fitted[block], swapped)
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
        tally = Tally(of_data=self.curvature != "fisher")
        features = self._tallied(data, 0, tally)
        observed = ObservedForms(self._partition.blocks)
        observed.add(features(*next(iter(data))))
        pieces: Pieces = {}
        measured: dict[str, dict[str, Measured]] = {}
        # again, for some blocks, where a later batch shows another form than the first
        while changed := self._changed(observed, pieces):
            pieces |= changed
            fresh = {block: self._measured(block, some) for block, some in changed.items()}
            self._add_factors(features, data, observed, fresh)
            measured |= fresh
        without = observed.without()
        if without and self.layers_without_kronecker == "error":
            refuse_parameters(without, observed.count)
        if without and self.layers_without_kronecker == "leave_out":
            self._leave_out(without, observed.count)
        every = [one for own in measured.values() for one in own.values()]
        if self.corrected:
            if self.curvature == "fisher":
                # of labels drawn anew: of the same ones the eigenvectors know too much
                tally = Tally(of_data=False)
                features = self._tallied(data, 1, tally)
            for places, batch in data.of_this_rank():
                gradients = features(places, batch)
                for one in every:
                    one.add_squares(gradients)
        facts = {OBSERVATIONS: tally.result(self._sample)}
        for block, names in self._partition.blocks.items():
            for piece in pieces[block]:
                found = measured[block][piece.key].facts(data.count, self.corrected)
                found["members"] = torch.tensor([names.index(name) for name in piece.names])
                found["squared_weights"] = self._squared_weights(piece.names)
                facts.update({f"{piece.key}.{field}": value for field, value in found.items()})
        return facts

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
        module = dict(self.model.named_modules()).get(block)
        every_position = isinstance(module or self.model, TRANSPOSED)
        return {
            p.key: measured_piece(p, self._shapes, self._sample, every_position) for p in pieces
        }

    def _add_factors(
        self,
        features: Features,
        data: DataSet,
        observed: ObservedForms,
        measured: Mapping[str, Mapping[str, Measured]],
    ) -> None:
        """A pass over the data, for these blocks."""
        every = [one for own in measured.values() for one in own.values()]
        spread = self._spread[data.checkpoint] = Spread(SAMPLE)
        for places, batch in data.of_this_rank():
            spread.add(places, batch)
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
        squares = [self._parameters[name].detach().double().square().sum() for name in names]
        return torch.stack(squares).sum()

    def _leave_out(self, without: Mapping[str, str], count: int) -> None:
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

    def _forget(self) -> None:
        super()._forget()
        self._spread: dict[int, Spread] = {}

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

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        values = self._eigenvalues(facts)
        means = {block: mean_of(own) for block, own in values.items()}
        # no training example has a gradient there: any damping serves
        idle = {block for block in self.block_names if block not in means}
        if self._hessian_data is None:
            idle |= {b for b, own in values.items() if all(is_idle(grid) for grid in own)}
        others = [mean for block, mean in means.items() if block not in idle]
        if others:
            means |= dict.fromkeys(idle, torch.stack(others).mean())
        means_of_blocks = torch.stack([means[block] for block in self.block_names])
        return means_of_blocks * means_of_blocks.new_tensor(self._partition.sizes)

    def _damping_by(self, rule: str, facts: Facts, data: DataSet) -> Tensor:
        if rule != EVIDENCE:
            return super()._damping_by(rule, facts, data)
        self._refuse_old(facts)
        pieces = [piece for own in self._fitted(facts).values() for piece in own]
        # weights of norms lie about 1 and rows of tables are drawn large: a prior about 0 is none
        # of theirs
        chosen = [piece for piece in pieces if piece.is_matrix] or pieces
        found = evidence_damping(
            [piece.grid for piece in chosen],
            sum(piece.squared_weights for piece in chosen),
            Observations.of(facts[OBSERVATIONS], self._examples(data)),
        )
        every = torch.full((len(self.block_names),), found, dtype=torch.float64)
        left_out = misfit(
            self._sample_of(data),
            self._make_inverse(facts, every, data),
            [piece.grid for piece in pieces],
            found,
            float(facts[OBSERVATIONS][2]),
        )
        return every / left_out

    def _sample_of(self, data: DataSet) -> list[Gradients]:
        """Gradients of a few examples from all over the data, at labels of their own."""
        spread = self._spread.pop(data.checkpoint, None)
        if spread is None:  # the fit was loaded
            spread = Spread(SAMPLE)
            for places, batch in data.of_this_rank():
                spread.add(places, batch)
        observed, memory = self._observed(data, draw=2), resident_bytes(self._device)
        size = sum(self._partition.sizes) * self._sample.element_size()
        rows = rows_within(4 * workspace_bytes(self._device), 2 * size)
        found: list[Gradients] = []
        for places, batch in spread.examples():
            for some in torch.arange(len(places)).split(rows):
                gradients, facts = observed(places[some], take(batch, some))
                if facts is not None:
                    gradients = gradients.scaled(facts.weights.sqrt().to(self._sample))
                memory -= gradients.nbytes
                if memory < 0 and len(found) > 1:
                    return found
                found.append(gradients)
        return found

    def _observed(self, data: DataSet, draw: int) -> Observed:
        """Gradients at labels of a draw (or of the data), with what the labels say."""
        labels, of_data = self._labels(draw), self.train_at(data.checkpoint).features

        def observed(places: Tensor, batch: Batch) -> tuple[Gradients, LabelFacts | None]:
            if self.curvature == "empirical_fisher":
                return of_data(batch), labels.given(places, batch)
            self._source.prepare(batch, self._train_loss, int(places[0]))
            drawn, facts = labels.drawn(places, batch)
            return self._features(data.checkpoint, drawn, self._train_loss), facts

        return observed

    def _tallied(self, data: DataSet, draw: int, tally: Tally) -> Features:
        """The gradients alone; ``tally`` takes note of the labels."""
        observed = self._observed(data, draw)

        def features(places: Tensor, batch: Batch) -> Gradients:
            gradients, facts = observed(places, batch)
            tally.add(int(places[0]), facts, gradients)
            return gradients

        return Remembered(features, self._memory)

    def _refuse_old(self, facts: Facts) -> None:
        if OBSERVATIONS not in facts:
            raise InvalidArgumentError(
                f'damping="{self._damping}" takes the evidence of the fit, and this fit was saved '
                "by a version that had no part of it: call `fit()` again, give a number, or "
                'damping="mean", which "auto" was'
            )

    def _examples(self, data: DataSet) -> int:
        """The number of training examples."""
        if self._hessian_data is None:
            return data.count
        return DataSet(self.train_dataloader, self._device).count

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        values = damping_by_block(damping, len(self.block_names), positive=True).tolist()
        bases = {}
        for pieces, value in zip(self._fitted(facts).values(), values, strict=True):
            for piece in pieces:
                bases[piece.names[0]] = piece.basis(value, self._sample, self.rtol)
        return KroneckerInverse(bases)
