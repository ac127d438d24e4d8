"""TracInCPFastRandProj against its matrices written out, and against what it estimates."""

import oracles
import pytest
import torch
from cases import CASES, RATES, Examples, TanhMLP
from contract import assert_close, build

from influence_kit import ExactNearestNeighbors, FaissNearestNeighbors, TracInCPFastRandProj
from influence_kit.errors import InvalidArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:.*stores quantities related to the entire.*")
MLP = CASES["mlp"]


def test_scores_are_those_of_the_projected_matrices() -> None:
    influence = build("TracInCPFastRandProj, projected", MLP)
    j, a = influence.projection_quantities
    assert j.shape == (3, 2)
    assert a.shape == (6, 2)
    expected = torch.zeros(MLP.m, MLP.n, dtype=torch.float64)
    for state, rate in zip(MLP.states, RATES, strict=True):
        model = MLP.model()
        model.load_state_dict(state)
        sides = []
        for batch in (MLP.test, MLP.train):
            flat = oracles.gradients(model, batch, MLP.loss, ["head.weight", "head.bias"])
            g = torch.cat([flat[:, :15].view(-1, 3, 5), flat[:, 15:, None]], dim=2)
            sides.append((j.T @ g @ a).flatten(1))
        expected += rate * sides[0] @ sides[1].T
    assert_close(influence.influence(MLP.test, k=None), expected)


def test_the_projection_is_unbiased() -> None:
    exact = build("TracInCPFast", MLP).influence(MLP.test)
    seeds = 200
    total = torch.zeros_like(exact)
    squares = torch.zeros_like(exact)
    for seed in range(seeds):
        found = TracInCPFastRandProj(
            MLP.model(),
            "head",
            Examples(MLP.train),
            MLP.checkpoints(),
            loss_fn=MLP.loss,
            batch_size=11,
            projection_dim=9,
            seed=seed,
        ).influence(MLP.test, k=None)
        total += found
        squares += found.square()
    mean = total / seeds
    error = ((squares / seeds - mean.square()) / seeds).sqrt()
    # 44 means of 200 draws each: a z of 4.5 or more has a chance of 3e-4 in all
    assert ((mean - exact).abs() / error).max() < 4.5


def test_a_seed_gives_the_same_bits_and_moves_no_global_state() -> None:
    influence = build("TracInCPFastRandProj, projected", MLP)
    state = torch.get_rng_state()
    first = influence.projection_quantities
    torch.manual_seed(99)
    again = influence.projection_quantities
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    torch.set_rng_state(state)


@pytest.mark.parametrize("index", [ExactNearestNeighbors, FaissNearestNeighbors])
def test_exact_indices_agree_with_scores(index: type) -> None:
    influence = TracInCPFastRandProj(
        MLP.model(),
        "head",
        Examples(MLP.train),
        MLP.checkpoints(),
        loss_fn=MLP.loss,
        nearest_neighbors=index(),
    )
    whole = influence.influence(MLP.test, k=None)
    for proponents in (True, False):
        found = influence.influence(MLP.test, k=4, proponents=proponents)
        indices, values = oracles.top_k(whole, 4, proponents)
        assert torch.equal(found.indices, indices)
        assert torch.allclose(found.influence_scores, values, rtol=1e-5)


def test_an_index_must_be_set_up_first() -> None:
    for index in (ExactNearestNeighbors(), FaissNearestNeighbors()):
        with pytest.raises(InvalidArgumentError, match="call setup"):
            index.get_nearest_neighbors(torch.zeros(1, 2), 1)


def test_a_new_last_layer_forgets_the_stored_vectors() -> None:
    influence = build("TracInCPFastRandProj", MLP)
    influence.influence(MLP.test)
    influence.final_fc_layer = "body.2"
    expected = build("TracInCP", MLP, layers=["body.2"]).influence(MLP.test)
    assert_close(influence.influence(MLP.test, k=None), expected)
    with pytest.raises(InvalidArgumentError, match="have no parameters"):
        influence.final_fc_layer = "body.1"
    assert influence.layers == ["body.2"]
    assert_close(influence.influence(MLP.test, k=None), expected)


def test_a_last_layer_without_factors_is_projected_alike() -> None:
    """A layer whose weight is also used outside its forward: its gradients come written out."""

    class Penalized(TanhMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.1 * x.sum(1, keepdim=True) * self.head.weight.sum(1)

    arguments = (Examples(MLP.train), MLP.checkpoints())
    plain = TracInCPFastRandProj(Penalized().double(), "head", *arguments, loss_fn=MLP.loss)
    exact = oracles.tracin(
        Penalized().double(),
        MLP.train,
        MLP.test,
        MLP.loss,
        MLP.states,
        RATES,
        ["head.weight", "head.bias"],
    )
    with pytest.warns(UserWarning, match="no gradient rule fits the parameters head.weight"):
        assert_close(plain.influence(MLP.test, k=None), exact)
    projected = TracInCPFastRandProj(
        Penalized().double(), "head", *arguments, loss_fn=MLP.loss, projection_dim=9
    )
    j, a = projected.projection_quantities
    vectors = plain.compute_intermediate_quantities(MLP.test).view(MLP.m, len(RATES), 3, 6)
    expected = (j.T @ vectors @ a).flatten(1)
    with pytest.warns(UserWarning, match="no gradient rule fits"):
        assert_close(projected.compute_intermediate_quantities(MLP.test), expected)
