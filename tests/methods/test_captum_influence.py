"""Captum's Naive and Arnoldi are an oracle of ours: scores, vectors, k, layers, losses, R."""

from functools import cache
from typing import Any

import captum.influence
import pytest
import torch
from captum.influence._core.arnoldi_influence_function import (
    ArnoldiInfluenceFunction as CaptumArnoldi,
)
from cases import CASES, Case, Examples, reduced
from contract import assert_close
from test_captum import load, no_inplace
from torch import Tensor
from torch.utils.data import DataLoader

from influence_kit import ArnoldiInfluenceFunction, NaiveInfluenceFunction
from influence_kit.errors import CurvatureError, InvalidArgumentError

MLP, CNN = CASES["mlp"], CASES["cnn"]
CLASSES = {
    "naive": (NaiveInfluenceFunction, captum.influence.NaiveInfluenceFunction),
    "arnoldi": (ArnoldiInfluenceFunction, CaptumArnoldi),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {"projection_dim": 20, "hessian_reg": 0.01}),
    "naive, all": ("naive", {"projection_dim": None, "hessian_reg": 1e-3}),
    "arnoldi": ("arnoldi", {"projection_dim": 5, "arnoldi_dim": 60, "arnoldi_tol": 1e-9}),
}
CLOSE = 1e-8
every_setting = pytest.mark.parametrize("setting", SETTINGS)
both_cases = pytest.mark.parametrize("case", [MLP, CNN], ids=["mlp", "cnn"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:.*is an unresolved.*|.*stores quantities.*"),
]


@pytest.fixture(autouse=True)
def float64() -> Any:
    """Captum's vectors are of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(
    setting: str, case: Case = MLP, reduction: str = "none", **changed: Any
) -> tuple[Any, Any]:
    """Ours and Captum's, alike but for one import."""
    kind, own = SETTINGS[setting]
    built = []
    for cls in CLASSES[kind]:
        arguments = {
            "loss_fn": reduced(case.loss, reduction),
            "batch_size": 4,
            "sample_wise_grads_per_batch": reduction != "none",
            **own,
            **changed,
        }
        built.append(
            cls(no_inplace(case), Examples(case.train), case.checkpoints()[0], load, **arguments)
        )
    return built[0], built[1]


@cache
def plain_pair(setting: str, case: Case = MLP) -> tuple[Any, Any]:
    """Fitted once: questions change nothing."""
    return pair(setting, case)


def captums_scores(setting: str) -> Tensor:
    return plain_pair(setting)[1].influence(MLP.test)


@every_setting
@both_cases
def test_scores(setting: str, case: Case) -> None:
    ours, theirs = plain_pair(setting, case)
    expected = theirs.influence(case.test)
    assert_close(ours.influence(case.test), expected, CLOSE)
    inputs = DataLoader(Examples(case.test), batch_size=3)
    assert_close(ours.influence(inputs), expected, CLOSE)


@pytest.mark.parametrize("setting", ["naive", "arnoldi"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_reduction_gives_the_scores_of_captums_losses_by_example(
    setting: str, reduction: str
) -> None:
    ours, theirs = pair(setting, reduction=reduction)
    assert_close(ours.influence(MLP.test), captums_scores(setting), CLOSE)
    if reduction == "sum":
        # Captum's own sum; its mean makes a Hessian of another scale
        assert_close(ours.influence(MLP.test), theirs.influence(MLP.test), CLOSE)


@pytest.mark.parametrize("setting", ["naive", "arnoldi"])
@pytest.mark.parametrize(("k", "proponents"), [(1, True), (3, False), (11, True)])
def test_the_most_influential(setting: str, proponents: bool, k: int) -> None:
    ours, theirs = plain_pair(setting)
    found = ours.influence(MLP.test, k=k, proponents=proponents)
    expected = theirs.influence(MLP.test, k=k, proponents=proponents)
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.influence_scores, expected.influence_scores, CLOSE)


@pytest.mark.parametrize("setting", ["naive", "arnoldi"])
@pytest.mark.parametrize("layers", [["head"], ["body.2", "head"]])
def test_some_layers(setting: str, layers: list[str]) -> None:
    ours, theirs = pair(setting, layers=layers)
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test), CLOSE)


@pytest.mark.parametrize("setting", ["naive", "arnoldi"])
@pytest.mark.parametrize("as_loader", [False, True])
def test_another_data_set_for_the_hessian(setting: str, as_loader: bool) -> None:
    torch.manual_seed(30)
    data: Any = Examples(MLP.batch(7))
    data = DataLoader(data, batch_size=3) if as_loader else data
    ours, theirs = pair(setting, hessian_dataset=data)
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test), CLOSE)
    assert not torch.allclose(ours.influence(MLP.test), captums_scores(setting))


@every_setting
def test_a_test_loss_of_its_own(setting: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 3 * outputs.square().sum(1)

    loss.reduction = "none"  # type: ignore[attr-defined]
    ours, theirs = pair(setting, test_loss_fn=loss)
    assert_close(ours.influence(MLP.test), theirs.influence(MLP.test), CLOSE)


@every_setting
@both_cases
def test_self_influence(setting: str, case: Case) -> None:
    ours, theirs = plain_pair(setting, case)
    found = ours.self_influence()
    assert_close(found, theirs.self_influence(), CLOSE)
    assert_close(found, ours.influence(case.train).diagonal(), CLOSE)
    inputs = DataLoader(Examples(case.test), batch_size=3)
    # of other examples not where a repeated eigenvalue counts, whose eigenvectors Captum leaves as
    # they are, not orthogonal
    if setting != "naive, all":
        assert_close(ours.self_influence(inputs), theirs.self_influence(inputs), CLOSE)
    assert_close(ours.self_influence(inputs=case.test), ours.self_influence(case.test))


@every_setting
def test_vectors(setting: str) -> None:
    """Eigenvectors may have other signs and another order, which their products do not show."""
    ours, theirs = plain_pair(setting)
    (ours_test, ours_train), (their_test, their_train) = (
        [
            explainer.compute_intermediate_quantities(
                DataLoader(Examples(MLP.test), batch_size=3), test=True
            ),
            explainer.compute_intermediate_quantities(
                DataLoader(Examples(MLP.train), batch_size=3)
            ),
        ]
        for explainer in (ours, theirs)
    )
    assert ours_test.shape == their_test.shape
    assert ours_train.shape == their_train.shape
    assert_close(ours_test @ ours_train.T, their_test @ their_train.T, CLOSE)
    assert_close(ours_test @ ours_train.T, ours.influence(MLP.test), CLOSE)


@every_setting
@pytest.mark.parametrize("test", [False, True])
def test_aggregated_vectors(setting: str, test: bool) -> None:
    ours, _ = plain_pair(setting)
    each = ours.compute_intermediate_quantities(MLP.test, test=test)
    found = ours.compute_intermediate_quantities(MLP.test, aggregate=True, test=test)
    assert_close(found, each.sum(0, keepdim=True))


@every_setting
def test_vectors_of_tests_may_be_given_for_inputs(setting: str) -> None:
    ours, _ = plain_pair(setting)
    vectors = ours.compute_intermediate_quantities(MLP.test, test=True)
    assert_close(ours.influence(vectors), ours.influence(MLP.test))
    best = ours.influence(vectors, k=2)
    assert torch.equal(best.indices, ours.influence(MLP.test, k=2).indices)


@every_setting
def test_the_projection(setting: str) -> None:
    """R^T R is D^-1, and R R^T Captum's."""
    ours, theirs = plain_pair(setting)
    found = ours.R
    kept = ours.compute_intermediate_quantities(MLP.test).shape[1]
    assert found.shape == (sum(p.numel() for p in ours.model.parameters()), kept)
    square = found.T @ found
    assert_close(square, square.diagonal().diag(), 1e-8)
    # the largest eigenvalues first, as Captum has them
    assert bool((square.diagonal().diff() >= 0).all())
    captums = theirs.R
    # Captum's eigenvectors of a repeated eigenvalue (0 + reg) are not orthogonal
    if isinstance(captums, Tensor) and setting == "naive":
        assert_close(found @ found.T, captums @ captums.T, CLOSE)


@pytest.mark.parametrize("projection_dim", [1, 4, None])
def test_the_scores_are_those_of_the_largest_eigenvalues(projection_dim: int | None) -> None:
    """Against the Hessian written out, which is a sum and not a mean."""
    import influence_oracles as dense
    import oracles

    model = no_inplace(MLP)
    model.load_state_dict(MLP.states[0])
    hessian = MLP.n * dense.full_hessian(model, MLP.train, MLP.loss)
    values, vectors = torch.linalg.eigh(hessian)
    values = values + 0.01
    kept = values.argsort(descending=True)[:projection_dim]
    kept = kept[values[kept] > 1e-5]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    h, g = (oracles.gradients(model, batch, MLP.loss) for batch in (MLP.test, MLP.train))
    ours = pair("naive", projection_dim=projection_dim)[0]
    assert ours.hessian_reg == 0.01
    assert_close(ours.influence(MLP.test), h @ inverse @ g.T, 1e-8)


def test_naive_and_arnoldi_of_all_dimensions_agree() -> None:
    naive = pair("naive", hessian_inverse_tol=1e-4)[0]
    arnoldi = pair(
        "arnoldi", projection_dim=20, arnoldi_dim=200, hessian_reg=0.01, arnoldi_tol=1e-10
    )[0]
    assert_close(arnoldi.influence(MLP.test), naive.influence(MLP.test), 1e-6)


def test_arnoldi_draws_its_start_by_the_seed() -> None:
    few = {"arnoldi_dim": 8}
    one, same, other = (
        pair("arnoldi", seed=seed, **few)[0].influence(MLP.test) for seed in (0, 0, 3)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_where_no_eigenvalue_counts(unchanged: Any) -> None:
    ours = NaiveInfluenceFunction(
        no_inplace(MLP),
        Examples(MLP.train),
        MLP.states[0],
        loss_fn=MLP.loss,
        hessian_inverse_tol=1e9,
    )
    test = MLP.test
    match = r"Hessian has no positive eigenvalues: .* is not above `hessian_inverse_tol` \(1000000"
    with unchanged(ours.model), pytest.raises(CurvatureError, match=match):
        ours.influence(test)


def test_vectors_of_another_length_are_refused(unchanged: Any) -> None:
    ours = pair("naive")[0]
    match = r"`inputs` is a tensor of shape \[2, 3\]; embeddings .* have shape \[m, 20\] here"
    with unchanged(ours.model), pytest.raises(InvalidArgumentError, match=match):
        ours.influence(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("setting", "arguments", "match"),
    [
        ("naive", {"projection_dim": 0}, "`projection_dim` must be a positive int or None; got 0"),
        (
            "naive",
            {"projection_dim": -2},
            "`projection_dim` must be a positive int or None; got -2",
        ),
        (
            "arnoldi",
            {"projection_dim": 0},
            "`projection_dim` must be a positive int or None; got 0",
        ),
        ("arnoldi", {"arnoldi_dim": 0}, "`arnoldi_dim` must be a positive int; got 0"),
        ("arnoldi", {"arnoldi_dim": 2.5}, r"`arnoldi_dim` must be a positive int; got 2\.5"),
        ("arnoldi", {"arnoldi_dim": True}, "`arnoldi_dim` must be a positive int; got True"),
        (
            "naive",
            {"hessian_reg": -1.0},
            r"`hessian_reg` must be a number that is not negative; got -1",
        ),
    ],
)
def test_arguments_that_cannot_be_meant(
    setting: str, arguments: dict[str, Any], match: str
) -> None:
    kind, own = SETTINGS[setting]
    with pytest.raises(InvalidArgumentError, match=match):
        CLASSES[kind][0](no_inplace(MLP), Examples(MLP.train), MLP.states[0], **own | arguments)


def test_the_bar_decomposes_the_hessian_at_once(capsys: Any) -> None:
    ours = pair("naive", show_progress=True)[0]
    assert "fit the curvature" in capsys.readouterr().err
    assert len(ours.damping_used) == 1
