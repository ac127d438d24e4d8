"""Terms whose two sides do different things to the gradients."""

import pytest
import torch
from cases import CASES, Examples
from contract import assert_close

from influence_kit import GradCos, InnerProductInfluence
from influence_kit.scoring import Term, unit_norm

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class TrainNormed(InnerProductInfluence):
    """score = sum over checkpoints of <g', g / |g|>: only the training side is normalized."""

    def terms(self) -> list[Term]:
        places = range(len(self.checkpoints))
        return [Term(self.test_at(c), self.train_at(c, unit_norm), weight=1.0) for c in places]


@every_case
def test_self_influence_is_the_diagonal_where_the_sides_differ(case) -> None:
    arguments = (Examples(case.train), case.checkpoints())
    influence = TrainNormed(case.model(), *arguments, loss_fn=case.loss, batch_size=4)
    diagonal = influence.influence(case.train).diagonal()
    assert_close(influence.self_influence(), diagonal)
    assert_close(influence.self_influence(outer_loop_by_checkpoints=True), diagonal)


def test_vectors_are_refused_where_the_sides_differ() -> None:
    case = CASES["mlp"]
    arguments = (Examples(case.train), case.checkpoints())
    influence = TrainNormed(case.model(), *arguments, loss_fn=case.loss)
    with pytest.raises(NotImplementedError, match="TrainNormed treats test and training examples"):
        influence.compute_intermediate_quantities(case.test)


def test_a_zero_gradient_has_no_direction() -> None:
    case = CASES["mlp"]
    x, y = case.train

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return case.loss(outputs, targets) * (targets != 0)

    influence = GradCos(case.model(), Examples((x, y)), case.checkpoints(), loss_fn=loss)
    expected = torch.where(y != 0, 3.0, 0.0).double()
    assert_close(influence.self_influence(), expected)
    assert torch.equal(influence.influence((x, y))[:, y == 0], torch.zeros(11, 4).double())
