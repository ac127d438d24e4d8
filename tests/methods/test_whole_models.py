"""K-FAC and EK-FAC of whole models, against dense blocks of their own layers."""

import warnings
from pathlib import Path
from typing import Any

import oracles
import pytest
import slope_oracle
import torch
from cases import Examples, cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from whole_model_oracle import Oracle, look
from whole_models import ROUTED, WHOLE, Bare, Whole, routed

import influence_kit
from influence_kit.curvature import factor_sums
from influence_kit.curvature.kronecker_curvature import eigenvalues
from influence_kit.errors import InvalidArgumentError

pytest.importorskip("transformers")
# of what torch.func computes
pytestmark = pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")

N, M, DAMPING = 26, 4, 1e-4
METHODS = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
both = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", WHOLE)


def make(method: str, case: Whole, model: nn.Module, train: Any, **arguments: Any) -> Any:
    own = {"loss_fn": case.loss, "batch_size": 7} | arguments
    return getattr(influence_kit, method)(model, Examples(train), [model.state_dict()], **own)


def oracle(method: str, case: Whole, model: nn.Module, damping: Any, **own: Any) -> Oracle:
    return Oracle(model, case.loss, case.layers, method == METHODS[1], damping, **own)


def setting(name: str) -> tuple[Whole, nn.Module, Any, Any]:
    case = (WHOLE | ROUTED)[name]
    return case, case.model(), case.data(N, 1), case.data(M, 2)


EMPIRICAL: dict[str, Any] = {"curvature": "empirical_fisher", "damping": DAMPING}


@both
@every_model
def test_the_empirical_fisher_of_a_whole_model(method: str, name: str) -> None:
    case, model, train, test = setting(name)
    explainer = make(method, case, model, train, **EMPIRICAL)
    expected = oracle(method, case, model, DAMPING).scores(test, train)
    assert_close(explainer.influence(test), expected, 1e-8)
    forms = explainer.block_forms
    assert list(forms) == explainer.block_names
    assert {block: forms[block] for block in case.forms} == case.forms
    assert {block for block, form in forms.items() if "Kronecker" in form} == set(case.layers)


@both
@every_model
def test_no_argument_is_needed(method: str, name: str) -> None:
    """The Fisher matrix at sampled slopes, the damping of every block as it is reported."""
    case, model, train, test = setting(name)
    explainer = make(method, case, model, train)
    found = explainer.influence(test)
    seeds = slope_oracle.seeds(0)[:2]
    first, second = (slope_oracle.with_slopes(model, train, seed) for seed in seeds)
    expected = oracle(method, case, model, explainer.damping_used[0])
    assert_close(found, expected.scores(test, train, first, second), 1e-8)


@both
def test_a_model_that_computes_its_own_loss(method: str) -> None:
    """A dict batch of GPT-2, which is called as a trainer calls it."""
    case, wrapped, (ids, targets), (others, labels) = setting("gpt2")
    model = wrapped.inner

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="none")

    explainer = getattr(influence_kit, method)(
        model,
        Examples({"input_ids": ids, "labels": targets}),
        [model.state_dict()],
        loss_fn=loss,
        **EMPIRICAL,
    )
    expected = oracle(method, case, wrapped, DAMPING).scores((others, labels), (ids, targets))
    assert_close(explainer.influence({"input_ids": others, "labels": labels}), expected, 1e-8)


# Long sides.


@both
@pytest.mark.parametrize("limit", [1, 6, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "decoder"])
def test_long_sides_have_the_diagonal(
    method: str, name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_sums, "LARGEST_SIDE", limit)
    case, model, train, test = setting(name)
    explainer = make(method, case, model, train, **EMPIRICAL)
    expected = oracle(method, case, model, DAMPING, limit=limit)
    assert_close(explainer.influence(test), expected.scores(test, train), 1e-8)
    assert_close(explainer.self_influence(), expected.scores(train, train).diagonal(), 1e-8)
    assert all(
        max(value.shape[-2:]) <= max(limit + 1, 2)
        for key, value in explainer.fit_state[0].items()
        if key.endswith((".left", ".right"))
    )


def test_long_sides_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_sums, "LARGEST_SIDE", 7)
    case, model, train, _ = setting("llama")
    forms = make(METHODS[1], case, model, train, **EMPIRICAL).fit().block_forms
    mlp, attention = "inner.model.layers.0.mlp", "inner.model.layers.0.self_attn"
    assert forms["inner.lm_head"] == "Kronecker, diagonal over its 9 outputs and 8 inputs"
    assert forms[f"{mlp}.gate_proj"] == "Kronecker, diagonal over its 8 inputs"
    assert forms[f"{mlp}.down_proj"] == "Kronecker, diagonal over its 8 outputs"
    assert forms["inner.model.embed_tokens"] == "Kronecker, diagonal over its 8 entries"
    assert forms[f"{attention}.k_proj"] == "Kronecker, diagonal over its 8 inputs"
    case, model, train, _ = setting("decoder")
    forms = make(METHODS[1], case, model, train, **EMPIRICAL).fit().block_forms
    assert forms["up"] == "weight: Kronecker, diagonal over its 12 outputs; bias: diagonal"


def test_examples_of_one_position_with_long_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cheaper form of the grid is looked for, whose cost would be that of the long side."""
    monkeypatch.setattr(factor_sums, "LARGEST_SIDE", 3)
    case, model, train, test = setting("bare")
    explainer = make(METHODS[1], case, model, train, **EMPIRICAL, rtol=0.5)
    expected = oracle(METHODS[1], case, model, DAMPING, limit=3)
    assert_close(explainer.influence(test), expected.scores(test, train), 1e-8)


# What else a question is made of.


@both
@every_model
def test_the_batch_size_does_not_matter(method: str, name: str) -> None:
    case, model, train, test = setting(name)
    whole = make(method, case, model, train, **EMPIRICAL, batch_size=N).influence(test)
    for size in (1, 4):
        found = make(method, case, model, train, **EMPIRICAL, batch_size=size)
        assert_close(found.influence(test), whole, 1e-9)


@both
@every_model
def test_self_influence_is_the_diagonal(method: str, name: str) -> None:
    case, model, train, _ = setting(name)
    explainer = make(method, case, model, train, **EMPIRICAL)
    assert_close(explainer.self_influence(), explainer.influence(train).diagonal(), 1e-9)


@both
@pytest.mark.parametrize("name", ["gpt2", "decoder", "bare"])
def test_quantities_layers_and_sums(method: str, name: str) -> None:
    case, model, train, test = setting(name)
    explainer = make(method, case, model, train, **EMPIRICAL)
    scores = explainer.influence(test)
    quantities = explainer.compute_intermediate_quantities(test)
    assert_close(explainer.influence(quantities), scores)
    g = look(model, train, case.loss).gradients.values()
    assert_close(quantities @ torch.cat([x.flatten(1) for x in g], 1).T, scores, 1e-9)
    assert_close(sum(explainer.influence_by_layer(test).values()), scores)
    total = explainer.influence(test, aggregate=True)
    assert_close(total, scores.sum(0, keepdim=True))
    found = explainer.influence(test, k=3)
    assert_close(found.influence_scores, scores.topk(3).values)


@both
@pytest.mark.parametrize("relative", ["l", "theta"])
@pytest.mark.parametrize("name", ["gpt2", "bare"])
def test_relative_scores(method: str, name: str, relative: str) -> None:
    case, model, train, test = setting(name)
    plain = make(method, case, model, train, **EMPIRICAL)
    found = make(method, case, model, train, **EMPIRICAL, relative=relative).influence(test)
    size = plain.self_influence().sqrt()
    if relative == "theta":
        size = plain.compute_intermediate_quantities(train).norm(dim=1)
    assert_close(found, plain.influence(test) / size, 1e-9)


@both
def test_the_gradient_of_scores_in_inputs(method: str) -> None:
    case, model, train, test = setting("resnet")
    explainer = make(method, case, model, train, **EMPIRICAL)
    found = explainer.perturbation_influence(test, train_indices=[2])
    x, y, step = *oracles.one(train, 2), 1e-5
    vectors = explainer.compute_intermediate_quantities(test)
    scores = []
    for sign in (1, -1):
        moved = x.clone()
        moved[0, 1, 3, 3] += sign * step
        g = look(model, (moved, y), case.loss).gradients.values()
        scores.append(vectors @ torch.cat([part.flatten() for part in g]))
    assert_close(found[:, 0, 1, 3, 3], (scores[0] - scores[1]) / (2 * step), 1e-6)


@both
def test_a_damping_for_each_block(method: str) -> None:
    case, model, train, test = setting("bare")
    explainer = make(method, case, model, train, **EMPIRICAL)
    damping = {b: 1e-4 * (k + 1) for k, b in enumerate(explainer.block_names)}
    explainer.damping = damping
    expected = oracle(method, case, model, damping).scores(test, train)
    assert_close(explainer.influence(test), expected, 1e-8)
    assert explainer.damping_used == [damping]


@both
def test_several_checkpoints(method: str) -> None:
    case, model, train, test = setting("encoder")
    other = WHOLE["encoder"].build().double()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, other)]
    explainer = getattr(influence_kit, method)(
        model, Examples(train), states, loss_fn=case.loss, **EMPIRICAL
    )
    found, total = explainer.influence(test), torch.zeros(())
    for state in states:
        model.load_state_dict(state)
        total = total + oracle(method, case, model, DAMPING).scores(test, train) / 2
    assert_close(found, total, 1e-8)
    assert len(explainer.block_forms) == len(explainer.block_names)


@both
def test_a_fit_is_saved_and_loaded(method: str, tmp_path: Path) -> None:
    case, model, train, test = setting("bare")
    first = make(method, case, model, train, **EMPIRICAL)
    first.save(tmp_path)
    second = make(method, case, model, train, **EMPIRICAL).load(tmp_path)
    assert second.block_forms == first.block_forms
    assert torch.equal(second.influence(test), first.influence(test))
    third = make(method, case, model, train, **EMPIRICAL, layers_without_kronecker="leave_out")
    with pytest.raises(InvalidArgumentError, match=r"saved for something else: .*leave_out"):
        third.load(tmp_path)


# What is asked of the parameters without such a form.

LEFT = "2 of 6 parameters have no Kronecker form and are left out, as if they were frozen: 'norm.w"


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


def normed() -> tuple[Whole, nn.Module, Any, Any]:
    torch.manual_seed(0)
    case = Whole(Normed, WHOLE["bare"].batch, {"first": True, "head": True})
    return case, Normed().double(), case.data(N, 1), case.data(M, 2)


@both
def test_parameters_may_be_left_out(method: str) -> None:
    case, model, train, test = normed()
    explainer = make(method, case, model, train, layers_without_kronecker="leave_out", **EMPIRICAL)
    with pytest.warns(UserWarning, match=LEFT) as caught:
        explainer.fit()
    assert len(caught) == 1
    expected = oracle(method, case, model, DAMPING, left_out=True)
    assert_close(explainer.influence(test), expected.scores(test, train), 1e-8)
    assert explainer.block_forms["norm"] == "left out"
    assert list(explainer.damping_used[0]) == ["first", "head"]
    quantities = explainer.compute_intermediate_quantities(test)
    assert torch.equal(quantities[:, 20:28], torch.zeros(M, 8).double())
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert_close(explainer.self_influence(), expected.scores(train, train).diagonal(), 1e-8)
        explainer.fit()
    explainer.damping = "mean"
    explainer.influence(test)
    whole = make(method, case, model, train, curvature="empirical_fisher", damping="mean").fit()
    assert explainer.damping_used[0] == {
        block: value for block, value in whole.damping_used[0].items() if block != "norm"
    }


@both
def test_leaving_everything_out_is_refused(method: str) -> None:
    case, model, train, _ = normed()
    with pytest.raises(InvalidArgumentError, match=r"no parameter has a Kronecker form: 'norm\.w"):
        make(
            method, case, model, train, layers=["norm"], layers_without_kronecker="leave_out"
        ).fit()


@both
def test_parameters_may_be_refused(method: str, unchanged: Any) -> None:
    case, model, train, test = setting("gpt2")
    explainer = make(method, case, model, train, layers_without_kronecker="error", **EMPIRICAL)
    match = (
        r"no Kronecker form for 11 of 28 parameters: 'inner.transformer.wte.weight' \(layers of "
        r"several kinds use it\), .* \(its gradient is not a sum of outer products\), .* and 7 more"
    )
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match) as caught:
        explainer.fit()
    assert len(str(caught.value)) < 700
    layers = list(case.layers)
    some = make(
        method, case, model, train, layers=layers, layers_without_kronecker="error", **EMPIRICAL
    )
    expected = oracle(method, case, model, DAMPING, left_out=True).scores(test, train)
    assert_close(some.influence(test), expected, 1e-8)


@both
@pytest.mark.parametrize("value", ["dense", None, True])
def test_an_option_that_there_is_not(method: str, value: Any) -> None:
    case, model, train, _ = normed()
    match = '`layers_without_kronecker` must be "diagonal", "leave_out" or "error"; got'
    with pytest.raises(InvalidArgumentError, match=match):
        make(method, case, model, train, layers_without_kronecker=value)


# Layers that not every batch uses.


@both
@pytest.mark.parametrize("first", [6, 12])
def test_a_layer_that_the_first_batch_does_not_use(method: str, first: int) -> None:
    case, model, train, test = setting("routed")
    train = routed(N, first)
    explainer = make(method, case, model, train, batch_size=6, **EMPIRICAL)
    expected = oracle(method, case, model, DAMPING).scores(test, train)
    assert_close(explainer.influence(test), expected, 1e-8)
    assert explainer.block_forms["other"] == "Kronecker"
    assert case.forms.items() <= explainer.block_forms.items()


@both
def test_a_layer_that_no_example_uses(method: str) -> None:
    """Any damping serves where the training set has no gradients."""
    case, model, train, test = setting("routed")
    explainer = make(method, case, model, train, curvature="empirical_fisher", batch_size=6)
    found, used = explainer.influence(test), explainer.damping_used[0]
    assert used["spare"] > 0
    assert_close(found, oracle(method, case, model, used).scores(test, train), 1e-8)
    some = make(
        method,
        case,
        model,
        train,
        layers=["one", "other", "head", "spare"],
        layers_without_kronecker="error",
        batch_size=6,
        **EMPIRICAL,
    )
    match = r"for 2 of 8 parameters: 'spare.weight' \(no example of the data uses it\), 'spare.bia"
    with pytest.raises(InvalidArgumentError, match=match):
        some.fit()


@both
def test_a_form_that_a_later_batch_takes_back(method: str) -> None:
    """What looked like a bias, and like an embedding, is measured again as a diagonal."""
    case, model, train, test = setting("lent")
    explainer = make(method, case, model, train, batch_size=6, **EMPIRICAL)
    expected = oracle(method, case, model, DAMPING).scores(test, train)
    assert_close(explainer.influence(test), expected, 1e-8)
    assert case.forms.items() <= explainer.block_forms.items()


@both
def test_frozen_parameters_take_no_part(method: str) -> None:
    case, model, train, test = normed()
    model.norm.weight.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    explainer = make(method, case, model, train, **EMPIRICAL)
    scores = explainer.influence(test)
    assert explainer.block_forms["norm"] == "diagonal"
    model.norm.weight.requires_grad_(True)
    model.first.bias.requires_grad_(True)
    own = Whole(Normed, case.batch, {"first": False, "head": True})
    whole = oracle(method, own, model, DAMPING).scores(test, train)
    g, h = (look(model, batch, cross_entropy).gradients for batch in (train, test))
    for name in ("norm.weight", "first.bias"):
        weights = 1 / (g[name].square().mean(0) + DAMPING)
        whole = whole - (h[name] * weights) @ g[name].T
    assert_close(scores, whole, 1e-8)


def test_all_eigenvalues_of_all_blocks_can_be_read() -> None:
    torch.manual_seed(0)
    case, model, train, _ = setting("bare")
    explainer = make("EKFACInfluenceFunction", case, model, train, **EMPIRICAL).fit()
    values = eigenvalues(explainer.fit_state[0], explainer._fitted.partition)
    assert list(values) == explainer.block_names
    assert sum(v.numel() for own in values.values() for v in own) == sum(
        p.numel() for p in Bare().parameters()
    )
    g = look(model, train, case.loss).gradients
    # the eigenvectors are orthogonal: the trace is that of the empirical Fisher matrix
    for block, own in values.items():
        names = [n for n in g if (n.rpartition(".")[0] or n) == block]
        trace = sum(g[n].flatten(1).square().sum(1).mean() for n in names)
        assert_close(torch.stack([v.sum() for v in own]).sum(), trace, 1e-10)
