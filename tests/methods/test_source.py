"""SOURCE: matrix exponentials of dense curvatures are the oracle, segment by segment."""

from pathlib import Path

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


def seen_at(case: Case, states: list[dict[str, Tensor]], layer: str) -> dense.LayerRecord:
    """What a layer sees of all examples at some checkpoints, one after the other."""
    joined = dense.LayerRecord([], [], [], [])
    for state in states:
        model = case.model()
        model.load_state_dict(state)
        seen = dense.record(model, model.get_submodule(layer), case.train, case.loss)
        for name, values in vars(seen).items():
            getattr(joined, name).extend(values)
    return joined


def curvature_of(case: Case, states: list[dict[str, Tensor]], layers: list[str]) -> Tensor:
    """Dense EK-FAC at the labels; the diagonal for parameters without a Kronecker form."""
    model = case.model()
    found = torch.zeros(2 * [sum(p.numel() for p in model.parameters())], dtype=torch.float64)
    for name in layers:
        layer, seen = model.get_submodule(name), seen_at(case, states, name)
        order = dense.parameter_order(layer, seen.joined[0].shape)
        index = dense.places(model, [f"{name}.{own}" for own, _ in layer.named_parameters()])
        found[index[:, None], index] = dense.ekfac_matrix(seen)[order][:, order]
    begins = tuple(f"{layer}." for layer in layers)
    others = [name for name, _ in model.named_parameters() if not name.startswith(begins)]
    if others:
        index = dense.places(model, others)
        gs = torch.stack([gradients_at(case, state) for state in states])
        found[index, index] = gs[..., index].square().mean((0, 1))
    return found


def gradients_at(case: Case, state: dict[str, Tensor]) -> Tensor:
    """Of the training examples, ``[n, P]``."""
    model = case.model()
    model.load_state_dict(state)
    return oracles.gradients(model, case.train, case.loss)


def expected(
    case: Case, name: str, rates: list[float], sizes: tuple[int, ...] | None = None
) -> Tensor:
    """sum_l <r_l S_(l+1) ... S_L g', g_l>, with matrices [P, P]: means of a segment's states."""
    parts, left = [], list(case.states)
    for size in sizes or [1] * len(rates):
        parts.append(left[:size])
        left = left[size:]
    responses, decays, gs = [], [], []
    for states, rate in zip(parts, rates, strict=True):
        gs.append(torch.stack([gradients_at(case, state) for state in states]).mean(0))
        exponent = -rate * curvature_of(case, states, LAYERS[name])
        values, vectors = torch.linalg.eigh(-exponent)
        shares = torch.where(values > 1e-12, (1 - (-values).exp()) / values.clamp(min=1e-12), 1.0)
        responses.append(rate * vectors @ torch.diag(shares) @ vectors.T)
        decays.append(torch.linalg.matrix_exp(exponent))
    model = case.model()
    model.load_state_dict(case.states[-1])
    carried = oracles.gradients(model, case.test, case.loss)
    scores = torch.zeros(case.m, case.n, dtype=torch.float64)
    for response, decay, g in zip(*(reversed(x) for x in (responses, decays, gs)), strict=True):
        scores += carried @ response @ g.T
        carried = carried @ decay
    return scores


def three_states(name: str) -> Case:
    return Case(*(getattr(SHORT[name], f) for f in ("build", "batch", "loss", "final")))


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
    case = three_states("mlp")
    rates = [30.0, 80.0, 20.0]
    found = made(case, rate_sums=rates).influence(case.test)
    assert_close(found, expected(case, "mlp", rates), 1e-8)
    plain = expected(case, "mlp", [1e-9] * 3)
    cosine = nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0)
    assert float(cosine) < 0.9


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3,)])
def test_segments_of_several_checkpoints(name: str, sizes: tuple[int, ...]) -> None:
    """The mean of factors, then of squares along their eigenvectors, and of training gradients."""
    case, rates = three_states(name), [8.0, 5.0][: len(sizes)]
    source = made(case, segments=list(sizes), rate_sums=rates)
    found = source.influence(case.test)
    assert_close(found, expected(case, name, rates, sizes), 1e-8)
    assert sorted(source.fit_state) == [sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]
    assert len(source.damping_used) == len(sizes)
    quantities = source.compute_intermediate_quantities(case.test)
    assert_close(source.influence(quantities), found)
    if sizes == (3,):
        assert_close(made(case, segments=1, rate_sums=rates).influence(case.test), found)


def test_segments_with_the_same_checkpoint_twice_are_those_with_one() -> None:
    case, rates = SHORT["mlp"], [8.0, 5.0]
    twice = [state for state in case.states for _ in range(2)]
    with pytest.warns(UserWarning, match="hold the same weights"):
        found = made(case, twice, segments=2, rate_sums=rates).influence(case.test)
    assert_close(found, made(case, rate_sums=rates).influence(case.test), 1e-8)


def test_a_fit_of_segments_is_saved(tmp_path: Path) -> None:
    case, own = three_states("mlp"), {"rate_sums": [8.0, 5.0], "segments": [2, 1]}
    source = made(case, **own)
    found = source.influence(case.test)
    source.save(tmp_path)
    loaded = made(case, **own).load(tmp_path)
    assert_close(loaded.influence(case.test), found)
    assert loaded.damping_used == source.damping_used
    with pytest.raises(InvalidArgumentError, match="segments: "):
        made(case, rate_sums=[8.0, 5.0], segments=[1, 2]).load(tmp_path)


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


def test_sampled_slopes_at_each_checkpoint_of_a_segment() -> None:
    """Of least squares H is the same at both; the training gradient is the mean."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    states = [{"weight": torch.randn(1, 3).double()} for _ in range(2)]
    data, loss = torch.utils.data.TensorDataset(x, y), nn.MSELoss()
    source = SOURCE(model, data, states, segments=1, rate_sums=[0.3], loss_fn=loss)
    gs = [2 * (x @ state["weight"].T - y) * x for state in states]
    hessian = 2 * x.T @ x / 20
    done = torch.eye(3).double() - torch.linalg.matrix_exp(-0.3 * hessian)
    expected = gs[1] @ done @ hessian.inverse() @ torch.stack(gs).mean(0).T
    assert_close(source.influence((x, y)), expected, 1e-8)


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
    one = made(case, run, segments=1)
    assert_close(
        one.influence(case.test),
        made(case, segments=1, rate_sums=[12 * 0.2]).influence(case.test),
    )
    with pytest.raises(InvalidArgumentError, match="checkpoint 1 has a sum of learning rates of -"):
        made(case, run[::-1]).influence(case.test)


def test_errors() -> None:
    case = SHORT["mlp"]
    with pytest.raises(InvalidArgumentError, match="has 3 numbers, one per segment, and"):
        made(case, rate_sums=[1.0, 1.0, 1.0]).influence(case.test)
    with pytest.raises(InvalidArgumentError, match=r"`rate_sums\[1\]` must be a positive number"):
        made(case, rate_sums=[1.0, 0.0])
    with pytest.raises(InvalidArgumentError, match=r"at checkpoint 0 \(in memory\) are not known"):
        made(case).influence(case.test)
    for segments, match in (
        (0, "`segments` must be a positive int or a list of counts, or None"),
        ([1, 0], r"`segments\[1\]` must be a positive int"),
        ("two", "`segments` must be a"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            made(case, segments=segments)
    with pytest.raises(InvalidArgumentError, match="`segments` is 3, and there are 2 checkpoints"):
        made(case, segments=3, rate_sums=[1.0]).influence(case.test)
    with pytest.raises(InvalidArgumentError, match=r"whose number must be their sum, 3"):
        made(case, segments=[1, 2], rate_sums=[1.0]).influence(case.test)
    with pytest.raises(NotImplementedError, match="the diagonal of `influence`"):
        made(case, rate_sums=[1.0, 1.0]).self_influence()
