"""RepresenterPointSelection against a dense refit, closed forms, scikit-learn, and its theorem."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Examples, TanhMLP, cross_entropy
from contract import assert_close, build
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import RepresenterPointSelection
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.representer.refit import Refit

MLP = CASES["mlp"]
GPT = CASES["gpt"]
Losses = Callable[[Tensor], Tensor]


class Squeezed(TanhMLP):
    """One output, without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


def dense_refit(features: Tensor, losses: Losses, c: int, l2: float) -> tuple[Tensor, Tensor]:
    """The weights by dense second derivatives, and alpha; ``losses`` is the sum over n rows."""
    n, d = features.shape

    def objective(flat: Tensor) -> Tensor:
        weights = flat.view(c, d)
        return losses(features @ weights.T) / n + l2 * weights.square().sum()

    def at(function: Any) -> Any:
        return lambda x: function(torch.tensor(x)).numpy()

    found = minimize(
        at(objective),
        np.zeros(c * d),
        jac=at(lambda x: jacobian(objective, x)),
        hess=at(lambda x: hessian(objective, x)),
        method="trust-exact",
        options={"gtol": 1e-13},
    )
    # one step more than rounding of the objective lets it take
    x = torch.tensor(found.x)
    x = x - torch.linalg.solve(hessian(objective, x), jacobian(objective, x))
    weights = x.view(c, d)
    return weights, -jacobian(losses, features @ weights.T) / (2 * l2 * n)


def made(model: nn.Module, batch: Any, **arguments: Any) -> RepresenterPointSelection:
    arguments = {"loss_fn": cross_entropy, "batch_size": 4} | arguments
    layer = arguments.pop("layer", "head")
    states = [model.state_dict()]
    return RepresenterPointSelection(model, layer, Examples(batch), states, **arguments)


def features_of(model: Any, batch: Any, normalize: bool = False, bias: bool = False) -> Tensor:
    found = model.body(batch[0]).detach()
    found = F.normalize(found, dim=1) if normalize else found
    return torch.cat([found, torch.ones(len(found), 1)], dim=1).double() if bias else found


def sums(y: Tensor) -> Losses:
    return lambda outputs: F.cross_entropy(outputs, y, reduction="sum")


@pytest.mark.parametrize("l2", [1.0, 3e-3, 1e-5])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_those_of_a_dense_refit(l2: float, normalize: bool, bias: bool) -> None:
    model = MLP.model()
    representer = made(model, MLP.train, l2=l2, normalize=normalize, count_bias=bias)
    train, test = (features_of(model, batch, normalize, bias) for batch in (MLP.train, MLP.test))
    weights, alpha = dense_refit(train, sums(MLP.train[1]), 3, l2)
    assert_close(representer.representer_values(), alpha, 1e-8)
    assert_close(representer.refitted_outputs(MLP.test), test @ weights.T, 1e-8)
    expected = alpha.T[MLP.test[1]] * (test @ train.T)
    assert_close(representer.influence(MLP.test), expected, 1e-8)


@pytest.mark.parametrize("l2", [1.0, 3e-3, 1e-6])
@pytest.mark.parametrize("setting", [{}, {"normalize": True}, {"count_bias": True}])
def test_scores_sum_to_the_refitted_outputs(l2: float, setting: dict[str, bool]) -> None:
    representer = made(MLP.model(), MLP.train, l2=l2, **setting)
    outputs = representer.refitted_outputs(MLP.test)
    expected = outputs[torch.arange(MLP.m), MLP.test[1]]
    assert_close(representer.influence(MLP.test).sum(1), expected, 1e-10)
    assert_close(representer.influence_by_layer(MLP.test)["head"].sum(1), expected, 1e-10)


@pytest.mark.parametrize("setting", [{}, {"normalize": True, "count_bias": True}])
@pytest.mark.parametrize("linear", [True, False])
def test_another_output_of_test_examples(setting: dict[str, bool], linear: bool) -> None:
    """<d g / d output, alpha> <f, f'>: the parts of g where it is linear."""
    model = MLP.model()
    known = {"normalize": setting.get("normalize", False), "bias": setting.get("count_bias", False)}
    train, test = (features_of(model, batch, **known) for batch in (MLP.train, MLP.test))
    weights, alpha = dense_refit(train, sums(MLP.train[1]), 3, 3e-3)
    outputs = test @ weights.T

    def g(outputs: Tensor) -> Tensor:
        return outputs[:, 0] - 2 * outputs[:, 2] if linear else outputs.square().sum(1)

    slopes = jacobian(lambda z: g(z).sum(), outputs)
    expected = (slopes @ alpha.T) * (test @ train.T)
    for reduce in (lambda v: v, torch.sum, torch.mean):
        arguments = {"test_output_fn": lambda o, t, r=reduce: r(g(o)), **setting}
        representer = made(model, MLP.train, **arguments)
        assert_close(representer.influence(MLP.test), expected, 1e-8)
    assert_close(representer.influence_by_layer(MLP.test)["head"], expected, 1e-8)
    assert_close(representer.influence(MLP.test, aggregate=True), expected.sum(0)[None], 1e-8)
    if linear:
        assert_close(expected.sum(1), g(outputs), 1e-8)
    # of the output of the label, whatever is measured of test examples
    plain = made(model, MLP.train, **setting)
    assert_close(representer.self_influence(), plain.self_influence(), 1e-10)


def test_the_output_of_the_label_as_an_output_of_the_users_own() -> None:
    plain = made(MLP.model(), MLP.train).influence(MLP.test)
    chosen = lambda o, t: o.gather(1, t[:, None])  # noqa: E731
    asked = made(MLP.model(), MLP.train, test_output_fn=chosen)
    assert_close(asked.influence(MLP.test), plain, 1e-10)
    # targets that are no labels are for the user's function to look at
    targets = torch.full((MLP.m,), 7)
    first = made(MLP.model(), MLP.train, test_output_fn=lambda o, t: o[:, 0])
    scores = first.influence((MLP.test[0], targets))
    assert_close(scores.sum(1), first.refitted_outputs(MLP.test)[:, 0], 1e-10)


def test_the_prediction_of_a_regression() -> None:
    """The paper's score: positive where the prediction is raised, whether that is good or not."""
    model, x = Squeezed().double(), MLP.train[0]
    y, squared = x.sum(1), lambda o, t: (o - t).square()
    representer = made(model, (x, y), loss_fn=squared, test_output_fn=lambda o, t: o)
    plain = made(model, (x, y), loss_fn=squared)
    test = (MLP.test[0], MLP.test[0].sum(1))
    predicted = plain.refitted_outputs(test)[:, 0]
    found = representer.influence(test)
    assert_close(found.sum(1), predicted, 1e-10)
    lowers_the_loss = (test[1] - predicted).sign()[:, None]
    assert_close(found * lowers_the_loss, plain.influence(test), 1e-10)
    assert representer.explains_output
    assert not plain.explains_output


class Weighted(nn.Module):
    """A function of outputs that holds numbers of its own, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs @ self.weights


def test_a_module_as_output() -> None:
    function = lambda o, t: o @ torch.tensor([1.0, 2.0, -1.0]).to(o)  # noqa: E731
    expected = made(MLP.model(), MLP.train, test_output_fn=function).influence(MLP.test)
    module = made(MLP.model(), MLP.train, test_output_fn=Weighted().double())
    assert_close(module.influence(MLP.test), expected, 1e-10)
    data, test = (MLP.train[0].float(), MLP.train[1]), (MLP.test[0].float(), MLP.test[1])
    single = made(MLP.model().float(), data, test_output_fn=Weighted())
    assert_close(single.influence(test).double(), expected, 1e-4)


@pytest.mark.parametrize("l2", [1e-1, 3e-3, 1e-5])
def test_the_refit_is_that_of_scikit_learn(l2: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 5)).double()
    x = torch.randn(200, 4, dtype=torch.float64)
    y = (x @ torch.randn(4, 5, dtype=torch.float64) + torch.randn(200, 5)).argmax(1)
    features = model[:2](x).detach().numpy()
    their = LogisticRegression(C=1 / (2 * l2 * 200), fit_intercept=False, tol=1e-10, max_iter=10**5)
    their.fit(features, y.numpy())
    expected = torch.tensor(their.decision_function(features))
    representer = made(model, (x, y), layer="2", l2=l2, batch_size=64)
    assert_close(representer.refitted_outputs((x, y)), expected, 1e-5)


@pytest.mark.parametrize("model", [Squeezed(), TanhMLP()])
@pytest.mark.parametrize("bias", [False, True])
def test_ridge_regression_has_its_closed_form(model: Any, bias: bool) -> None:
    l2 = 0.05
    model = model.double()
    if isinstance(model, Squeezed):
        shape: tuple[int, ...] = (1,)
    else:
        model.head = nn.Linear(5, 1).double()
        shape = (1, 1)
    torch.manual_seed(4)
    train, test = ((x, torch.randn(len(x), *shape[1:]).double()) for x, _ in (MLP.train, MLP.test))
    representer = made(model, train, loss_fn=nn.MSELoss(), l2=l2, count_bias=bias)
    f, g = (features_of(model, batch, bias=bias) for batch in (train, test))
    n, y = len(f), train[1].reshape(-1)
    inverse = torch.linalg.inv(f.T @ f / n + l2 * torch.eye(f.shape[1]).double())
    weights = inverse @ f.T @ y / n
    assert_close(weights, torch.tensor(Ridge(n * l2, fit_intercept=False).fit(f, y).coef_), 1e-9)
    alpha = (y - f @ weights) / (l2 * n)
    assert_close(representer.representer_values(), alpha[:, None], 1e-10)
    assert_close(representer.refitted_outputs(test), (g @ weights)[:, None], 1e-10)
    # towards the test example's own target
    signs = (test[1].reshape(-1) - g @ weights).sign()
    scores = representer.influence(test)
    assert_close(scores, signs[:, None] * alpha * (g @ f.T), 1e-10)
    assert_close(scores.sum(1), signs * (g @ weights), 1e-10)
    assert_close(representer.self_influence(), alpha.abs() * f.square().sum(1), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_single_logit_is_raised_for_ones_and_lowered_for_zeros(dtype: torch.dtype) -> None:
    model = Squeezed().to(dtype)
    (x, y), (u, v) = ((x.to(dtype), (y % 2).to(dtype)) for x, y in (MLP.train, MLP.test))
    weight = torch.tensor(1.5)
    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    representer = made(model, (x, y), loss_fn=loss, l2=1e-2)
    f, g = (features_of(model, batch).double() for batch in ((x, y), (u, v)))

    def losses(outputs: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            outputs[:, 0], y.double(), pos_weight=weight.double(), reduction="sum"
        )

    _, alpha = dense_refit(f, losses, 1, 1e-2)
    expected = (2 * v.double() - 1)[:, None] * alpha[:, 0] * (g @ f.T)
    found = representer.influence((u, v))
    assert found.dtype == dtype
    assert_close(found.double(), expected, 1e-10 if dtype == torch.float64 else 1e-5)
    assert loss.pos_weight.dtype == torch.float32


@pytest.mark.parametrize("case", ["classes", "targets"])
def test_a_proponent_lowers_the_test_loss(case: str) -> None:
    if case == "classes":
        model, train, test, loss = MLP.model(), MLP.train, MLP.test, cross_entropy
    else:
        model = Squeezed().double()
        train, test = ((x, x.sum(1)) for x, _ in (MLP.train, MLP.test))
        loss = lambda o, y: (o.reshape(-1) - y).square()  # noqa: E731
    representer = made(model, train, loss_fn=loss)
    scores, outputs = representer.influence(test), representer.refitted_outputs(test)
    alpha, f, g = representer.representer_values(), *(features_of(model, b) for b in (train, test))
    for t in range(MLP.m):
        own = torch.zeros_like(outputs[0])
        own[test[1][t] if case == "classes" else 0] = 1
        for i in range(MLP.n):
            part = own * alpha[i] * (f[i] @ g[t])
            before, after = (
                loss((outputs[t] + step * part)[None], test[1][t : t + 1]) for step in (0, 1e-6)
            )
            assert (scores[t, i] > 0) == (after < before)


def test_positions_add_up_and_ignored_ones_do_not_count() -> None:
    model = GPT.model()
    ids, labels = (x.clone() for x in GPT.train)
    labels[:, 0] = 6  # the number that the loss ignores
    labels[3] = 6

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=6)

    representer = made(model, (ids, labels), loss_fn=loss, l2=1e-2)
    seen: list[Tensor] = []
    with model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())):
        model(ids)
    f, n = seen[0], len(ids)

    def losses(outputs: Tensor) -> Tensor:
        rows = F.cross_entropy(outputs, labels.flatten(), reduction="sum", ignore_index=6)
        return rows * f.shape[1]  # the oracle divides by the number of rows

    weights, alpha = dense_refit(f.flatten(0, 1), losses, 7, 1e-2)
    alpha = alpha.view(n, -1, 7)
    assert_close(representer.representer_values(), alpha, 1e-8)
    assert_close(representer.refitted_outputs((ids, labels)), f @ weights.T, 1e-8)
    chosen = F.one_hot(labels, 7) * (labels != 6)[..., None]
    expected = torch.einsum("msc,ntc,msd,ntd->mn", chosen.double(), alpha, f, f)
    assert_close(representer.influence((ids, labels)), expected, 1e-8)
    assert float(representer.influence((ids, labels))[3].abs().max()) == 0


def test_a_label_that_the_loss_ignores_may_be_any_number() -> None:
    """Such an example is no part of any output, and none is a part of its own."""
    x, y = MLP.train
    labels = y.clone()
    labels[[2, 5]] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255, reduction="none")
    representer = made(MLP.model(), (x, labels), loss_fn=loss)
    scores = representer.influence((x, labels))
    assert not scores[[2, 5]].any()
    assert not scores[:, [2, 5]].any()
    outputs = representer.refitted_outputs((x, labels))
    for place in (0, 1, 3, 4):
        assert_close(scores[place].sum(), outputs[place, y[place]], 1e-10)


def test_a_models_own_loss_and_sequences_of_two_lengths() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = GPT.model()

        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            logits = self.net(ids)
            shifted = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
            return SimpleNamespace(loss=shifted, logits=logits)

    model, ids = Own(), GPT.train[0]
    batches = [{"ids": x, "labels": x} for x in (ids[:6], ids[6:, :4])]
    representer = RepresenterPointSelection(model, "net.head", batches_of(batches), [{}], load)
    values = representer.representer_values()
    assert values.shape == (11, 5, 7)
    assert not values[6:, 4].any()
    outputs = representer.refitted_outputs(batches[0])
    # the label of a position is the next token
    expected = outputs[:, :-1].gather(2, ids[:6, 1:, None]).sum((1, 2))
    assert_close(representer.influence(batches[0]).sum(1), expected)


def batches_of(batches: list[Any]) -> Any:
    class Batches:
        def __iter__(self) -> Any:
            return iter(batches)

    return Batches()


def load(model: nn.Module, checkpoint: Any) -> float:
    return 1.0


def test_scores_of_several_checkpoints_are_their_mean() -> None:
    representer = build("RepresenterPointSelection", MLP)
    total = torch.zeros(MLP.m, MLP.n).double()
    for place, checkpoint in enumerate(MLP.checkpoints()):
        one = build("RepresenterPointSelection", MLP, checkpoints=[checkpoint])
        total += one.influence(MLP.test) / 3
        assert_close(representer.representer_values(place), one.representer_values())
        outputs = representer.refitted_outputs(MLP.test, place)
        assert_close(outputs, one.refitted_outputs(MLP.test))
    assert_close(representer.influence(MLP.test), total)


@pytest.mark.parametrize("setting", [{}, {"normalize": True, "count_bias": True, "l2": 1}])
def test_a_refit_is_saved_and_loaded(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MLP.model()
    saved = made(model, MLP.train, **setting)
    saved.save(tmp_path)
    loaded = made(MLP.model(), MLP.train, max_iter=1, **setting).load(tmp_path)
    monkeypatch.setattr(Refit, "head", None)  # nothing is refitted
    assert torch.equal(loaded.influence(MLP.test), saved.influence(MLP.test))
    assert torch.equal(loaded.representer_values(), saved.representer_values())
    assert torch.equal(loaded.refitted_outputs(MLP.test), saved.refitted_outputs(MLP.test))
    assert torch.equal(loaded.self_influence(), saved.self_influence())


class TwoHeads(nn.Module):
    """The last layer's output is that of either."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net = MLP.model()
        self.second = nn.Linear(3, 3).double()
        nn.init.constant_(self.second.bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.net(x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"l2": 4e-3}, "l2: 0.003 there, 0.004 here"),
        ({"normalize": True}, "normalize: false there, true here"),
        ({"count_bias": True}, "count_bias: false there, true here"),
        ({"tol": 1e-6}, "tol: 1e-12 there, 1e-06 here"),
        (
            {"loss_fn": lambda o, y: 2 * cross_entropy(o, y)},
            r"losses of some examples: (\d+) of \1",
        ),
        ({"layer": "net.head"}, 'layer: "second" there, "net.head" here'),
        ({"batch": tuple(t.flip(0) for t in MLP.train)}, "hash of the examples"),
        (
            {"model": TwoHeads(2.0)},
            r"weights of the checkpoints: 1 of 1 entries differ \(num",
        ),
    ],
)
def test_a_refit_of_something_else_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    own = {"model": TwoHeads(), "batch": MLP.train, "layer": "second"}
    made(**own).save(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"was saved for something else: .*{told}"):
        made(**own | change).load(tmp_path)


def test_a_refit_anew_is_the_same() -> None:
    representer = made(MLP.model(), MLP.train)
    expected = representer.influence(MLP.test)
    assert representer.fit() is representer
    assert torch.equal(representer.influence(MLP.test), expected)


def test_nested_layers_are_found_by_name_and_as_modules() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"net": MLP.model()})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["net"](x)

    model = Nested()
    expected = made(model.inner["net"], MLP.train).influence(MLP.test)
    assert_close(made(model, MLP.train, layer="inner.net.head").influence(MLP.test), expected)
    representer = made(model, MLP.train, layer=model.inner["net"].head)
    assert_close(representer.influence(MLP.test), expected)
    assert representer.final_fc_layer is model.inner["net"].head


def test_float32_models_are_refitted_in_float64() -> None:
    model, exact = MLP.model().float(), MLP.model().float().double()
    train, test = ((x.float(), y) for x, y in (MLP.train, MLP.test))
    weights = torch.tensor([1.0, 2.0, 0.5])
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=weights, reduction="none")):
        own = None if loss.weight is None else weights.double()
        precise = nn.CrossEntropyLoss(weight=own, reduction=loss.reduction)
        expected = made(exact, MLP.train, loss_fn=precise).influence(MLP.test)
        representer = made(model, train, loss_fn=loss)
        found = representer.influence(test)
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, 1e-5)
        outputs = representer.refitted_outputs(test)[torch.arange(MLP.m), test[1]]
        assert_close(found.sum(1), outputs, 1e-5)


def test_a_loss_may_look_at_the_inputs_of_a_dict() -> None:
    class Keyed(TanhMLP):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    torch.manual_seed(3)
    x, y = MLP.train
    batch = {"x": x, "scale": torch.rand(MLP.n).double(), "labels": y}
    model = Keyed().double()

    def loss(outputs: Tensor, given: Any) -> Tensor:
        return cross_entropy(outputs, given["labels"]) * given["scale"]

    representer = made(model, batch, loss_fn=loss)

    def losses(outputs: Tensor) -> Tensor:
        return (cross_entropy(outputs, y) * batch["scale"]).sum()

    _, alpha = dense_refit(features_of(model, (x,)), losses, 3, 3e-3)
    assert_close(representer.representer_values(), alpha, 1e-8)


def test_the_users_model_and_loss_are_unchanged(
    unchanged: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    model = MLP.model().train()
    loss = nn.CrossEntropyLoss(weight=torch.ones(3).double())
    representer, test = made(model, MLP.train, loss_fn=loss), MLP.test
    with unchanged(model), unchanged(loss):
        representer.representer_values()
        representer.refitted_outputs(test)
        representer.self_influence()


def test_a_mean_that_turns_uneven_in_a_later_batch_is_refused_there() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(12, 3)
    y = torch.arange(12) % 2
    y[9] = 2

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, ignore_index=2)

    train = DataLoader(TensorDataset(x, y), 4)
    representer = RepresenterPointSelection(model, "2", train, [model.state_dict()], loss_fn=loss)
    with pytest.raises(InvalidArgumentError, match=r"begins with example 8: .*not a mean"):
        representer.influence((x[:2], y[:2]))
