"""SOURCE: matrix exponentials of dense curvatures are the oracle, segment by segment."""

import influence_oracles as dense
import oracles
import pytest
import torch
from cases import SHORT, Case, Examples
from contract import assert_close
from torch import Tensor, nn

from influence_kit import SOURCE, GradDot
from influence_kit.errors import InvalidArgumentError

LAYERS = {
    "mlp": ["body.0", "body.2", "head"],
    "cnn": ["0", "3", "6"],
    "gpt": ["positions", "qkv", "out"],
}
RATES = [0.7, 1.9, 0.4]


def curvature_of(case: Case, model: nn.Module, layers: list[str], g: Tensor) -> Tensor:
    """Dense EK-FAC at the labels; the diagonal for parameters without a Kronecker form."""
    found = dense.kronecker_curvature(model, case.train, case.loss, layers, dense.ekfac_matrix)
    begins = tuple(f"{layer}." for layer in layers)
    others = [name for name, _ in model.named_parameters() if not name.startswith(begins)]
    if others:
        index = dense.places(model, others)
        found[index, index] = g[:, index].square().mean(0)
    return found


def expected(case: Case, name: str, rates: list[float]) -> Tensor:
    """sum_l <r_l S_(l+1) ... S_L g', g_l>, with matrices [P, P]."""
    model, responses, decays, gs = case.model(), [], [], []
    for state, rate in zip(case.states, rates, strict=True):
        model.load_state_dict(state)
        gs.append(oracles.gradients(model, case.train, case.loss))
        exponent = -rate * curvature_of(case, model, LAYERS[name], gs[-1])
        values, vectors = torch.linalg.eigh(-exponent)
        shares = torch.where(values > 1e-12, (1 - (-values).exp()) / values.clamp(min=1e-12), 1.0)
        responses.append(rate * vectors @ torch.diag(shares) @ vectors.T)
        decays.append(torch.linalg.matrix_exp(exponent))
    carried = oracles.gradients(model, case.test, case.loss)
    scores = torch.zeros(case.m, case.n, dtype=torch.float64)
    for response, decay, g in zip(*(reversed(x) for x in (responses, decays, gs)), strict=True):
        scores += carried @ response @ g.T
        carried = carried @ decay
    return scores


def made(case: Case, checkpoints: object = None, **own: object) -> SOURCE:
    checkpoints = case.states if checkpoints is None else checkpoints
    own = {"curvature": "empirical_fisher", "loss_fn": case.loss, "batch_size": 4, **own}
    return SOURCE(case.model(), Examples(case.train), checkpoints, **own)


@pytest.mark.parametrize("name", LAYERS)
def test_segments_by_matrix_exponentials(name: str) -> None:
    case = SHORT[name]
    source = made(case, rate_sums=RATES[:2])
    assert_close(source.influence(case.test), expected(case, name, RATES[:2]), 1e-8)


def test_three_segments_where_the_exponentials_matter() -> None:
    case = Case(*(getattr(SHORT["mlp"], f) for f in ("build", "batch", "loss", "final")))
    rates = [30.0, 80.0, 20.0]
    found = made(case, rate_sums=rates).influence(case.test)
    assert_close(found, expected(case, "mlp", rates), 1e-8)
    plain = expected(case, "mlp", [1e-9] * 3)
    cosine = nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0)
    assert float(cosine) < 0.9


def test_one_short_segment_is_grad_dot_times_the_sum_of_rates() -> None:
    case = SHORT["mlp"]
    state = case.states[:1]
    plain = GradDot(case.model(), Examples(case.train), state, loss_fn=case.loss)
    source = made(case, state, rate_sums=[1e-7])
    assert_close(source.influence(case.test), 1e-7 * plain.influence(case.test), 1e-6)


@pytest.mark.parametrize("rate", [0.3, 1e6])
def test_the_curvature_of_least_squares_is_exact(rate: float) -> None:
    """The Fisher matrix of one output is the Hessian H: a long segment is its inverse."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    data, loss = torch.utils.data.TensorDataset(x, y), nn.MSELoss()
    source = SOURCE(model, data, [model.state_dict()], rate_sums=[rate], loss_fn=loss)
    g = 2 * (model(x) - y).detach() * x
    hessian = 2 * x.T @ x / 20
    done = torch.eye(3).double() - torch.linalg.matrix_exp(-rate * hessian)
    assert_close(source.influence((x, y)), g @ done @ hessian.inverse() @ g.T, 1e-8)


def test_rates_are_read_from_the_checkpoints() -> None:
    """Constant rates with momentum: steps times rate / (1 - momentum), between checkpoints."""
    case = SHORT["mlp"]
    run = [
        {"state_dict": state, "learning_rate": 0.1, "momentum": 0.5, "step": step}
        for state, step in zip(case.states, (5, 12), strict=True)
    ]
    read = made(case, run)
    given = made(case, rate_sums=[5 * 0.2, 7 * 0.2])
    assert_close(read.influence(case.test), given.influence(case.test))
    for found, rate in zip(read.damping_used, (1.0, 1.4), strict=True):
        assert all(value == pytest.approx(1 / rate) for value in found.values())
    with pytest.raises(InvalidArgumentError, match="checkpoint 1 has a sum of learning rates of -"):
        made(case, run[::-1]).influence(case.test)


def test_errors() -> None:
    case = SHORT["mlp"]
    with pytest.raises(InvalidArgumentError, match="has 3 numbers, one per segment"):
        made(case, rate_sums=[1.0, 1.0, 1.0]).influence(case.test)
    with pytest.raises(InvalidArgumentError, match=r"`rate_sums\[1\]` must be a positive number"):
        made(case, rate_sums=[1.0, 0.0])
    with pytest.raises(InvalidArgumentError, match=r"of checkpoint 0 \(in memory\) are not known"):
        made(case).influence(case.test)
    with pytest.raises(NotImplementedError, match="the diagonal of `influence`"):
        made(case, rate_sums=[1.0, 1.0]).self_influence()
