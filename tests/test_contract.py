"""Every method x every property x every case."""

import copy
import warnings
from collections.abc import Iterable
from inspect import signature
from itertools import product
from pathlib import Path

import oracles
import pytest
import torch
from captum.influence import DataInfluence
from cases import SHORT, Case, Examples, reduced
from contract import (
    METHODS,
    applies,
    assert_close,
    assert_same,
    build,
    cast,
    plain_scores,
    scores,
    snapshot,
    stores,
)
from torch import nn
from torch.utils.data import DataLoader

from influence_kit import KMostInfluentialResults
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.gradient_cache import CacheBuild

every_method = pytest.mark.parametrize("method", METHODS)
every_case = pytest.mark.parametrize("case", SHORT.values(), ids=SHORT.keys())
# "dict" is "mlp" with other batches, which is nothing to many a property
MODELS = {name: case for name, case in SHORT.items() if name != "dict"}
every_model = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())


def in_turn(methods: Iterable[str], cases: dict[str, Case], start: int = 0) -> pytest.MarkDecorator:
    """Each method with one case, the cases in turn.

    For what is computed alike for every method or alike for every model: an error there shows for
    a method on every case, or for a case with every method. ``start`` is another one for each
    property, so that a method meets every case.
    """
    pairs = []
    for place, method in enumerate(methods, start):
        fitting = [name for name in cases if applies(method, name)]
        name = fitting[place % len(fitting)]
        pairs.append(pytest.param(method, cases[name], id=f"{method}-{name}"))
    return pytest.mark.parametrize(("method", "case"), pairs)


with_oracle = pytest.mark.parametrize("method", [m for m, v in METHODS.items() if v.oracle])
OF_LOSSES = [m for m, v in METHODS.items() if v.has_loss]
OF_TEST_LOSSES = [m for m in OF_LOSSES if METHODS[m].has_test_loss]
of_layers = pytest.mark.parametrize("method", [m for m, v in METHODS.items() if v.has_layers])
of_vectors = pytest.mark.parametrize("method", [m for m, v in METHODS.items() if v.quantities])
of_several = pytest.mark.parametrize(
    "method", [m for m, v in METHODS.items() if v.over_checkpoints != "one"]
)
self_methods = pytest.mark.parametrize(
    "method", [m for m, v in METHODS.items() if v.has_self_influence]
)


@with_oracle
@every_case
def test_scores_equal_single_example_autograd(method: str, case: Case) -> None:
    oracle = METHODS[method].oracle
    assert oracle is not None
    assert_close(plain_scores(method, case), oracle(case))


@every_method
@every_case
def test_batch_size_does_not_matter(method: str, case: Case) -> None:
    expected = plain_scores(method, case)
    for size in (1, 7, "auto"):
        assert_close(scores(build(method, case, batch_size=size), case.test), expected)


@in_turn(METHODS, MODELS)
def test_chunks_do_not_matter(method: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    indices, values = oracles.top_k(plain_scores(method, case), 3, True)
    monkeypatch.setattr("influence_kit.scoring.stream.CHUNK_BYTES", 1)
    monkeypatch.setattr("influence_kit.scoring.stream.FEWEST_CHUNK_ROWS", 1)
    monkeypatch.setattr("influence_kit.scoring.stream.BLOCK_BYTES", 1)
    found = build(method, case).influence(case.test, k=3)
    assert torch.equal(found.indices, indices)
    assert_close(found.influence_scores, values)


@every_method
@every_model
def test_a_small_workspace_does_not_matter(
    method: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain_scores(method, case)
    for name in ("form", "rows", "functional", "batch_memory"):
        monkeypatch.setattr(f"influence_kit.gradients.{name}.workspace_bytes", lambda device: 300)
    monkeypatch.setattr("influence_kit.gradients.form.resident_bytes", lambda device: 300)
    assert_close(plain_scores(method, case), expected)


@in_turn(METHODS, SHORT)
def test_more_tests_than_train_and_one_of_each(method: str, case: Case) -> None:
    whole = scores(build(method, case, data=Examples(case.test)), case.train)
    assert whole.shape == (case.n, case.m)
    if METHODS[method].of_whole_set:
        return
    few = Examples(oracles.one(case.test, 2))
    single = scores(build(method, case, data=few), oracles.one(case.train, 5))
    assert_close(single, whole[5:6, 2:3], relative=1e-9)


@in_turn(METHODS, MODELS, 1)
def test_k_is_the_sorted_scores(method: str, case: Case) -> None:
    influence = build(method, case)
    for k, proponents in product((0, 1, 4, 50), (True, False)):
        indices, values = oracles.top_k(plain_scores(method, case), k, proponents)
        found = influence.influence(case.test, k=k, proponents=proponents)
        assert isinstance(found, KMostInfluentialResults)
        assert found.indices.dtype == torch.int64
        assert torch.equal(found.indices, indices)
        assert torch.allclose(found.influence_scores, values, rtol=1e-10, atol=0)


@in_turn(METHODS, MODELS, 2)
def test_aggregate_is_the_sum_of_rows(method: str, case: Case) -> None:
    influence = build(method, case)
    whole = plain_scores(method, case).sum(0, keepdim=True)
    assert_close(influence.influence(case.test, k=None, aggregate=True), whole)
    best = influence.influence(case.test, k=2, aggregate=True)
    assert torch.equal(best.indices, oracles.top_k(whole, 2, True)[0])


@self_methods
@every_case
def test_self_influence_is_the_diagonal(method: str, case: Case) -> None:
    influence = build(method, case)
    diagonal = scores(influence, case.train).diagonal()
    assert_close(influence.self_influence(), diagonal)
    assert_close(influence.self_influence(outer_loop_by_checkpoints=True), diagonal)
    if not METHODS[method].has_self_influence_of_others:
        return
    loader = DataLoader(Examples(case.test), batch_size=3)
    assert_close(influence.self_influence(loader), influence.self_influence(case.test))
    if METHODS[method].of_whole_set:
        return
    on_test = build(method, case, data=Examples(case.test))
    assert_close(influence.self_influence(case.test), on_test.self_influence())
    assert_close(influence.self_influence(loader), on_test.self_influence())


@in_turn(OF_LOSSES, SHORT, 1)
def test_reductions_agree(method: str, case: Case) -> None:
    expected = plain_scores(method, case)
    for reduction, declared in (("sum", True), ("mean", False)):
        loss = reduced(case.loss, reduction)
        if not declared:
            del loss.reduction  # type: ignore[attr-defined]
        assert_close(scores(build(method, case, loss_fn=loss), case.test), expected)


@in_turn(OF_TEST_LOSSES, MODELS)
def test_test_loss(method: str, case: Case) -> None:
    def doubled(outputs: object, targets: object) -> torch.Tensor:
        return 2 * case.loss(outputs, targets)

    factor = 2 if METHODS[method].doubles_with_the_test_loss else 1
    expected = factor * plain_scores(method, case)
    assert_close(scores(build(method, case, test_loss_fn=doubled), case.test), expected)

    def constant(outputs: object, targets: object) -> torch.Tensor:
        return 0 * case.loss(outputs, targets)

    zero = scores(build(method, case, test_loss_fn=constant), case.test)
    assert torch.equal(zero, torch.zeros(case.m, case.n, dtype=torch.float64))

    def detached(outputs: object, targets: object) -> torch.Tensor:
        return case.loss(outputs, targets).detach()

    with pytest.raises(ValueError, match="without a graph"):
        scores(build(method, case, test_loss_fn=detached), case.test)


@in_turn(OF_TEST_LOSSES, MODELS, 1)
def test_test_output(method: str, case: Case) -> None:
    """What should rise has the scores of minus the same loss, in every answer."""

    def doubled(outputs: object, targets: object) -> torch.Tensor:
        return 2 * case.loss(outputs, targets)

    factor = -2 if METHODS[method].doubles_with_the_test_loss else -1
    expected = factor * plain_scores(method, case)
    influence = build(method, case, test_output_fn=doubled)
    assert influence.test_output_fn is doubled
    assert influence.explains_output
    assert influence.test_loss_fn is None
    assert_close(scores(influence, case.test), expected)
    indices, values = oracles.top_k(expected, 3, True)
    best = influence.influence(case.test, k=3)
    assert torch.equal(best.indices, indices)
    assert_close(best.influence_scores, values)
    summed = influence.influence(case.test, k=None, aggregate=True)
    assert_close(summed, expected.sum(0, keepdim=True))
    if METHODS[method].has_layers:
        assert_close(sum(influence.influence_by_layer(case.test).values()), expected)
    if METHODS[method].quantities == "test side":
        quantities = influence.compute_intermediate_quantities(case.test)
        assert_close(scores(influence, quantities), expected, METHODS[method].close[0])
    if METHODS[method].has_self_influence:  # of an example's own training loss
        assert_close(influence.self_influence(), build(method, case).self_influence())


@of_layers
@every_model
def test_layers_sum_to_the_score(method: str, case: Case) -> None:
    influence = build(method, case)
    by_layer = influence.influence_by_layer(case.test)
    names = {name.rpartition(".")[0] for name in influence._parameters}
    assert set(by_layer) == set(influence.layers or names)
    assert_close(sum(by_layer.values()), plain_scores(method, case))


@of_vectors
@every_model
def test_intermediate_quantities_multiply_to_the_scores(method: str, case: Case) -> None:
    influence = build(method, case)
    test = influence.compute_intermediate_quantities(case.test)
    if METHODS[method].quantities == "dots":
        train = influence.compute_intermediate_quantities(case.train)
        found = test @ train.T
    else:
        found = scores(influence, test)
    assert_close(found, plain_scores(method, case), METHODS[method].close[0])
    aggregated = influence.compute_intermediate_quantities(case.test, aggregate=True)
    assert_close(aggregated, test.sum(0, keepdim=True), METHODS[method].close[0])


@every_method
@every_model
def test_the_users_objects_come_back(method: str, case: Case) -> None:
    has = METHODS[method]
    model = case.model().train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = snapshot(model)
    test, data = case.test, Examples(case.train)
    influence = build(method, case, model=model, data=data)
    calls = [lambda: influence.influence(test, k=None), lambda: influence.influence(test, k=2)]
    if has.has_self_influence:
        calls.append(influence.self_influence)
    if has.has_layers:
        calls.append(lambda: influence.influence_by_layer(test))
    if has.quantities:
        calls.append(lambda: influence.compute_intermediate_quantities(test))
    for call in calls:
        torch.set_rng_state(before["random"])  # making the data above moved it
        call()
        assert_same(before, snapshot(model))


@in_turn(METHODS, SHORT, 2)
def test_kinds_of_data_and_inputs_agree(method: str, case: Case) -> None:
    expected = plain_scores(method, case)
    loader = DataLoader(Examples(case.train), batch_size=3)
    influence = build(method, case, data=loader)
    assert_close(scores(influence, case.test), expected)
    inputs = DataLoader(Examples(case.test), batch_size=3)
    assert_close(scores(influence, inputs), expected)
    examples = [Examples(case.train)[i] for i in range(case.n)]
    influence = build(method, case, data=examples)
    assert_close(scores(influence, case.test), expected)
    if isinstance(case.test, tuple):
        assert_close(scores(influence, list(case.test)), expected)


@in_turn(METHODS, SHORT, 3)
def test_permuting_the_training_set_permutes_columns(method: str, case: Case) -> None:
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(3))
    train = case.train
    shuffled = (
        {k: v[order] for k, v in train.items()}
        if isinstance(train, dict)
        else tuple(v[order] for v in train)
    )
    expected = plain_scores(method, case)[:, order]
    assert_close(scores(build(method, case, data=Examples(shuffled)), case.test), expected)


@every_method
def test_tuple_and_dict_agree(method: str) -> None:
    assert_close(plain_scores(method, SHORT["dict"]), plain_scores(method, SHORT["mlp"]))


@every_method
@every_model
def test_precision_is_the_models(method: str, case: Case) -> None:
    expected = plain_scores(method, case)

    data = Examples(cast(case.train, torch.float32))
    model = case.model().float()
    found = scores(build(method, case, model=model, data=data), cast(case.test, torch.float32))
    assert expected.dtype == torch.float64
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, METHODS[method].close[1])


@every_method
def test_is_a_captum_class(method: str) -> None:
    influence = build(method, SHORT["mlp"])
    assert isinstance(influence, DataInfluence)
    assert influence.get_name() == type(influence).__name__


@every_method
def test_progress_is_shown_when_asked(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    influence = build(method, SHORT["mlp"])
    influence.influence(SHORT["mlp"].test, k=2, show_progress=True)
    # stored vectors are searched without a pass over the training set
    if METHODS[method].has_self_influence or method in ("MAGIC", "SOURCE"):
        name = influence.get_name()
        shown = capsys.readouterr().err
        assert f"Using {name} to perform computation for getting proponents. " in shown
        influence.influence(SHORT["mlp"].test, show_progress=True)
        assert f"Using {name} to compute influence for training batches" in capsys.readouterr().err
    influence.influence(SHORT["mlp"].test, k=2)
    assert capsys.readouterr().err == ""


@of_several
def test_checkpoints_may_be_set_anew(method: str) -> None:
    case = SHORT["mlp"]
    influence = build(method, case)
    whole = plain_scores(method, case)
    influence.checkpoints = METHODS[method].checkpoints(case)[:1]
    first = scores(influence, case.test)
    influence.checkpoints = METHODS[method].checkpoints(case)[1:]
    rest = scores(influence, case.test)
    if METHODS[method].over_checkpoints == "mean":
        assert_close((first + rest) / 2, whole, METHODS[method].close[0])
    elif METHODS[method].over_checkpoints == "sum":
        assert_close(first + rest, whole)


@pytest.mark.parametrize(
    "method", [m for m, v in METHODS.items() if v.over_checkpoints in ("sum", "mean")]
)
def test_duplicated_checkpoints_count_twice_and_warn(method: str) -> None:
    case = SHORT["mlp"]
    first = METHODS[method].checkpoints(case)[:1]
    once = scores(build(method, case, checkpoints=first), case.test)
    twice = build(method, case, checkpoints=[*first, copy.deepcopy(first[0])])
    with pytest.warns(UserWarning, match="hold the same weights"):
        found = scores(twice, case.test)
    times = 2 if METHODS[method].over_checkpoints == "sum" else 1
    assert_close(found, times * once, METHODS[method].close[0])


@every_method
def test_no_warning_in_ordinary_use(method: str) -> None:
    case = SHORT["mlp"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*stores quantities related.*")
        scores(build(method, case, loss_fn=nn.CrossEntropyLoss()), case.test)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("method", [m for m in METHODS if stores(m)])
def test_a_store_is_asked_in_place_of_the_data(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, kept = SHORT[name], {"store": tmp_path / "store"}
    live = build(method, case)
    expected = scores(live, case.test)
    close = METHODS[method].close[0]
    built = build(method, case, **kept)
    assert_close(scores(built, case.test), expected, close)

    asked = build(method, case, **kept)
    with monkeypatch.context() as patched:
        if "hessian_dataset" not in signature(type(asked)).parameters:
            patched.setattr(CacheBuild, "_fill", None)  # nothing is written again ...
        assert_close(scores(asked, case.test), expected, close)
        if "hessian_dataset" not in signature(type(asked)).parameters:
            patched.setattr(asked._map, "cached", None)  # ... nor computed, once it is open
        best = asked.influence(case.test, k=3)
        assert torch.equal(best.indices, oracles.top_k(expected, 3, True)[0])
        if METHODS[method].has_self_influence:
            assert_close(asked.self_influence(), live.self_influence(), close)
        aggregated = asked.influence(case.test, k=None, aggregate=True)
        assert_close(aggregated, expected.sum(0, keepdim=True), close)
    others = {**METHODS[method].checkpoints(case)[0], "state_dict": case.model(9).state_dict()}
    other = build(method, case, model=case.model(7), checkpoints=[others], **kept)
    with pytest.raises(InvalidArgumentError, match="was built for something else"):
        scores(other, case.test)
