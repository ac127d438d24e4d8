"""How much of the curvature an approximation leaves out, against dense matrices."""

import pytest
import torch
from torch import Tensor

from influence_kit.curvature.misfit import misfit
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients

LEFT, RIGHT = torch.Size([2, 2]), torch.Size([3])
P, S, DAMPING = 7, 12, 0.3
# with gradients this large what is measured is above 1, below which 1 is returned
LARGE = 1e3


def of_rows(rows: Tensor) -> Gradients:
    """Gradients of two parameters, written out ``[s, 7]``."""
    forms = {"left": Dense(rows[:, :4], LEFT), "right": Dense(rows[:, 4:], RIGHT)}
    return Gradients(len(rows), forms, {"left": LEFT, "right": RIGHT}, rows)


def diagonal_in(basis: Tensor, g: Tensor) -> Tensor:
    """The eigenvalues of A: the diagonal of C = mean g g^T in a basis."""
    return (g @ basis).square().mean(0)


def inverse_of(basis: Tensor, values: Tensor) -> Tensor:
    return basis @ torch.diag(1 / (values + DAMPING)) @ basis.T


def root_of(basis: Tensor, values: Tensor) -> Tensor:
    return basis @ torch.diag((values + DAMPING) ** -0.5) @ basis.T


def found_by(parts: list[Tensor], basis: Tensor, values: Tensor) -> float:
    root = root_of(basis, values)
    return misfit(
        [of_rows(rows) for rows in parts],
        lambda gradients: of_rows(gradients.flat() @ root),
        [values[:2].reshape(1, 2), values[2:]],
        DAMPING,
    )


def rho(g: Tensor, basis: Tensor, values: Tensor) -> float:
    """The mean over pairs of different examples, one by one."""
    m, total, pairs = inverse_of(basis, values), 0.0, 0
    for i in range(len(g)):
        for j in range(len(g)):
            if i != j:
                total, pairs = total + float(g[i] @ m @ g[j]) ** 2, pairs + 1
    a = basis @ torch.diag(values) @ basis.T
    return total / pairs / float(torch.trace(m @ a @ m @ a)) - 1


def setting() -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that are far from diagonal in a basis, the basis, the diagonal there."""
    torch.manual_seed(0)
    g = torch.randn(S, 2).double() @ torch.randn(2, P).double() + 0.1 * torch.randn(S, P).double()
    basis = torch.linalg.qr(torch.randn(P, P).double())[0]
    return g, basis, diagonal_in(basis, g)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 4, 1, 6], [1] * 12, [0, 12]])
@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_parts_do_not_matter(sizes: list[int], scale: float) -> None:
    """Of gradients that are larger than those of the eigenvalues, too: more is left out."""
    g, basis, values = setting()
    expected = rho(scale * g, basis, values)
    assert expected > 1.2
    found = found_by(list((scale * g).split(sizes)), basis, values)
    assert found == pytest.approx(expected, rel=1e-12)


def over_all_pairs(g: Tensor, basis: Tensor, values: Tensor) -> float:
    """The mean over independent examples of 1 + rho: all pairs, also of one with itself."""
    rows = [g[[i, j]] for i in range(len(g)) for j in range(len(g))]
    found = [found_by([LARGE * own], basis, values) + 1 for own in rows]
    return sum(found) / len(found) / LARGE**4


def test_it_is_the_traces_ratio() -> None:
    """E (g_i^T M g_j)^2 = tr(M C M C), less the part of A: the squared norm of what is left out."""
    g, basis, values = setting()
    m, c = inverse_of(basis, values), g.T @ g / len(g)
    a = basis @ torch.diag(values) @ basis.T
    expected = torch.trace(m @ c @ m @ c) / torch.trace(m @ a @ m @ a)
    # pairs of no product at all, of which 1 is returned, there are none
    assert over_all_pairs(g, basis, values) == pytest.approx(float(expected), rel=1e-6)
    half = torch.linalg.cholesky(m)
    left_out = (half.T @ (c - a) @ half).square().sum() / (half.T @ a @ half).square().sum()
    assert float(expected) - 1 == pytest.approx(float(left_out), rel=1e-9)


def test_nothing_is_left_out_in_the_basis_of_the_curvature() -> None:
    g, _, _ = setting()
    values, basis = torch.linalg.eigh(g.T @ g / S)
    assert over_all_pairs(g, basis, values) == pytest.approx(1.0, rel=1e-6)
    many = torch.randn(300, P).double() @ (basis * values.clamp(min=0).sqrt()).T
    assert found_by([many], basis, values) == 1.0


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_layers_that_curve_as_one(layers: int) -> None:
    """Each by itself is right, and together they are L times as curved: rho is L - 1."""
    torch.manual_seed(0)
    one = torch.randn(9, 1).double()
    g = torch.cat([one.repeat(1, layers), torch.zeros(9, P - layers).double()], dim=1)
    basis = torch.eye(P).double()
    assert over_all_pairs(g, basis, diagonal_in(basis, g)) == pytest.approx(layers, rel=1e-6)


def test_examples_that_are_too_few_show_nothing() -> None:
    g, basis, values = setting()
    for parts in ([g[:1]], [g[:0]], []):
        assert found_by(parts, basis, values) == 1.0
    # nor do eigenvalues that are all zero
    assert found_by([g], basis, torch.zeros(P).double()) == 1.0


def test_half_precision_is_summed_in_float64() -> None:
    g, basis, values = setting()
    expected = rho(g, basis, values)
    root = root_of(basis, values).float()
    found = misfit(
        [of_rows(g.float())],
        lambda gradients: of_rows(gradients.flat() @ root),
        [values.float()],
        DAMPING,
    )
    assert found == pytest.approx(expected, rel=1e-4)
