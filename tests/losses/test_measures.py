"""What is measured of test examples: the sign of an output that should rise, and refusals."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import influence_oracles as dense
import oracles
import pytest
import torch
from cases import CASES, Case, Examples
from contract import METHODS, assert_close, build, scores
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import (
    ExplicitInfluenceFunction,
    KNNShapley,
    TracInCP,
    classification_margin,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import linear_datamodeling_score

MLP, DICT, GPT = CASES["mlp"], CASES["dict"], CASES["gpt"]
Measure = Callable[[Any, Any], Tensor]
both_kinds = pytest.mark.parametrize("case", [MLP, DICT], ids=["tuple", "dict"])


def log_odds(outputs: Any, targets: Any) -> Tensor:
    """Log p - log(1 - p) by the probabilities themselves, summed over positions: one example."""
    if isinstance(outputs, dict):
        outputs, targets = outputs["logits"], targets["labels"]
    p = outputs.softmax(-1).flatten(0, -2)[torch.arange(targets.numel()), targets.flatten()]
    return (p.log() - (1 - p).log()).sum()


# Scores of an output.


@pytest.mark.parametrize("name", ["mlp", "dict", "cnn", "gpt"])
@pytest.mark.parametrize("reduce", [lambda v: v, torch.sum, torch.mean])
def test_a_margin_as_single_example_autograd_has_it(name: str, reduce: Any) -> None:
    case = CASES[name]

    def output(outputs: Any, targets: Any) -> Tensor:
        return reduce(classification_margin(outputs, targets))

    found = build("TracInCP", case, test_output_fn=output).influence(case.test)
    states = case.states
    negative = lambda o, t: -log_odds(o, t)  # noqa: E731
    given = case.model(), case.train, case.test, case.loss, states, case.rates
    assert_close(found, oracles.tracin(*given, test_loss=negative), 1e-9)


def test_an_influence_function_of_one_logit() -> None:
    model, state = MLP.model(), MLP.model().state_dict()
    g = oracles.gradients(model, MLP.train, MLP.loss)
    h = oracles.gradients(model, MLP.test, lambda o, t: o[:, 2])
    curvature = dense.gauss_newton(model, MLP.train, MLP.loss)
    inverse = torch.linalg.inv(curvature + 0.1 * torch.eye(len(curvature)).double())
    exact = ExplicitInfluenceFunction(
        model,
        Examples(MLP.train),
        [state],
        loss_fn=MLP.loss,
        damping=0.1,
        test_output_fn=lambda o, t: o[:, 2],
    )
    assert_close(exact.influence(MLP.test), -h @ inverse @ g.T, 1e-9)


def ridge_regression() -> tuple[nn.Module, TensorDataset, Tensor, Callable[[Any], Tensor]]:
    """A model at its minimum, its data, test inputs, and predictions of a fit on some examples."""
    torch.manual_seed(3)
    x, test = torch.randn(40, 4).double(), torch.randn(6, 4).double()
    y = x @ torch.ones(4).double() + torch.randn(40).double()

    def weights(rows: Any) -> Tensor:
        normal = x[rows].T @ x[rows] + 0.2 * 40 * torch.eye(4).double()
        return torch.linalg.solve(normal, x[rows].T @ y[rows])

    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights(slice(None))[None])
    return model, TensorDataset(x, y), test, lambda rows: test @ weights(rows)


def of_predictions(**measure: Any) -> tuple[ExplicitInfluenceFunction, Any, Any]:
    model, data, test, refit = ridge_regression()
    half = lambda o, t: 0.5 * (o[:, 0] - t).square()  # noqa: E731
    states = [model.state_dict()]
    made = ExplicitInfluenceFunction(model, data, states, loss_fn=half, damping=0.2, **measure)
    return made, (test, torch.zeros(len(test)).double()), refit


def test_leaving_a_proponent_out_lowers_the_prediction() -> None:
    influence, test, refit = of_predictions(test_output_fn=lambda o, t: o[:, 0])
    found, whole = influence.influence(test), refit(slice(None))
    falls = [whole - refit([j for j in range(40) if j != i]) for i in range(40)]
    actual = torch.stack(falls, dim=1)
    # to first order: the two agree but for the example's leverage
    assert F.cosine_similarity(found.flatten(), actual.flatten(), dim=0) > 0.98
    assert ((found > 0) == (actual > 0)).double().mean() > 0.95


def test_retrained_outputs_are_predicted_as_margins_are() -> None:
    influence, test, refit = of_predictions(test_output_fn=lambda o, t: o[:, 0])
    subsets = torch.stack([torch.randperm(40) < 20 for _ in range(60)])
    outputs = torch.stack([refit(rows) for rows in subsets])
    scored = influence.influence(test)
    assert linear_datamodeling_score(scored, subsets, outputs, "margin").mean > 0.8


def test_perturbing_an_input_raises_the_output() -> None:
    """The gradient of the score in the training input, by differences."""
    output = lambda o, t: o[:, 0]  # noqa: E731
    influence, test, _ = of_predictions(test_output_fn=output)
    opposite, _, _ = of_predictions(test_loss_fn=lambda o, t: -o[:, 0])
    assert_close(influence.perturbation_influence(test), opposite.perturbation_influence(test))
    found = influence.perturbation_influence(test)[:, 5]
    model, data, _, _ = ridge_regression()
    x, y = data.tensors
    inverse = torch.linalg.inv(x.T @ x / 40 + 0.2 * torch.eye(4).double())

    def score(row: Tensor) -> Tensor:  # -<h, M^-1 g>, h the test input, g the residual times x
        return -test[0] @ inverse @ row * (row @ model.weight[0] - y[5])

    assert_close(found, torch.autograd.functional.jacobian(score, x[5]), 1e-9)


def test_a_store_serves_every_function_of_test_examples(tmp_path: Path) -> None:
    kept = {"store": tmp_path / "store"}
    plain = build("TracInCP", MLP, **kept).influence(MLP.test)
    of_loss = build("TracInCP", MLP, **kept, test_output_fn=MLP.loss)
    assert_close(scores(of_loss, MLP.test), -plain)


def test_what_is_measured_stands_on_the_object() -> None:
    plain = build("TracInCP", MLP)
    assert (plain.test_loss_fn, plain.test_output_fn) == (MLP.loss, None)
    assert not plain.explains_output


# Refusals.


@pytest.mark.parametrize(
    "method", [m for m, v in METHODS.items() if v.has_loss and v.has_test_loss]
)
def test_a_loss_and_an_output_at_once(method: str) -> None:
    both = {"test_loss_fn": MLP.loss, "test_output_fn": classification_margin}
    with pytest.raises(InvalidArgumentError, match="got both `test_loss_fn` and `test_output_fn`"):
        build(method, MLP, **both)


@pytest.mark.parametrize("method", ["TracInCP", "TracInCPFast", "TRAK", "EKFACInfluenceFunction"])
def test_an_output_that_cannot_be_called(method: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"a function, called as .* got 'margin'"):
        build(method, MLP, test_output_fn="margin")


def test_neighbours_have_no_output() -> None:
    data = TensorDataset(*MLP.train)
    with pytest.raises(InvalidArgumentError, match="KNNShapley uses only the labels of neighbours"):
        KNNShapley(nn.Identity(), data, test_output_fn=classification_margin)


@pytest.mark.parametrize("margin", [classification_margin, partial(classification_margin, shift=1)])
@pytest.mark.parametrize(
    "method", [m for m, v in METHODS.items() if v.has_loss and v.has_test_loss]
)
def test_our_margin_as_a_loss(method: str, margin: Measure) -> None:
    match = "is `classification_margin`, which is better when higher.*Pass it as `test_output_fn`"
    with pytest.raises(InvalidArgumentError, match=match):
        build(method, MLP, test_loss_fn=margin)


def on_logits(measure: Measure) -> Measure:
    """The same of batches of both kinds."""

    def of_either(outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, dict):
            return measure(outputs["logits"], targets["labels"])
        return measure(outputs, targets)

    return of_either


def own_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    return p.log() - (1 - p).log()


RISING: dict[str, tuple[Measure, str]] = {
    "the output": (lambda o, t: o, "the model's output, or a part of it"),
    "a column": (lambda o, t: o[:, 1], "the model's output, or a part of it"),
    "the sum of a column": (lambda o, t: o.sum(), "the sum of the model's outputs"),
    "their mean": (lambda o, t: o.mean(1), "the mean of the model's outputs"),
    "margins": (own_margin, "the margin of the label's class"),
    "their sum": (lambda o, t: own_margin(o, t).sum(), "the margin of the label's class"),
    "our margin, wrapped": (lambda o, t: classification_margin(o, t).mean(), "the margin of the"),
    "a margin of logits": (
        lambda o, t: (
            o.gather(1, t[:, None])
            - o.scatter(1, t[:, None], -math.inf).max(1, keepdim=True).values
        ),
        "the label's logit minus the largest other",
    ),
    "a logit": (lambda o, t: o.gather(1, t[:, None]), "the label's logit"),
    "a log-probability": (lambda o, t: -F.cross_entropy(o, t), "the label's log-probability"),
    "a probability": (
        lambda o, t: o.softmax(1)[torch.arange(len(t)), t],
        "the label's probability",
    ),
}


@both_kinds
@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("tests", [1, 4])
def test_a_loss_that_is_known_to_rise(case: Case, name: str, tests: int) -> None:
    measure, words = RISING[name]
    influence = build("TracInCP", case, test_loss_fn=on_logits(measure))
    test = {k: v[:tests] for k, v in case.test.items()} if case is DICT else None
    test = tuple(v[:tests] for v in case.test) if test is None else test
    for _ in range(2):  # it is refused again, when asked again
        with pytest.raises(InvalidArgumentError, match=f"`test_loss_fn` returns {words}"):
            influence.influence(test)
    of_output = build("TracInCP", case, test_output_fn=on_logits(measure))
    negative = build("TracInCP", case, test_loss_fn=on_logits(lambda o, t: -measure(o, t)))
    assert_close(of_output.influence(test), negative.influence(test))


def test_tokens_whose_margins_are_a_loss() -> None:
    tokens = build("TracInCP", GPT, test_loss_fn=lambda o, t: classification_margin(o, t))
    with pytest.raises(InvalidArgumentError, match="returns the margin of the label's class"):
        tokens.influence(GPT.test)


def in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sub_(F.one_hot(targets, 3)).square_()


FALLING: dict[str, Measure] = {
    "squares": lambda o, t: o.square().sum(1),
    "minus a logit": lambda o, t: -o[:, 0],
    "one less the probability": lambda o, t: 1 - o.softmax(1).gather(1, t[:, None]),
    "the same loss": MLP.loss,
    "computed in place": in_place,
    "zero": lambda o, t: 0 * o[:, 0],
}


@pytest.mark.parametrize("name", FALLING)
def test_a_loss_that_is_one_is_taken(name: str) -> None:
    found = build("GradDot", MLP, test_loss_fn=FALLING[name]).influence(MLP.test)
    rates = [1.0] * len(MLP.rates)
    given = MLP.model(), MLP.train, MLP.test, MLP.loss, MLP.states, rates
    expected = oracles.tracin(*given, test_loss=FALLING[name])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_returns_losses() -> None:
    """The loss of training examples is the output there, and so may be that of test examples."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP.model()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.body(x), y, reduction="none")

    model, (x, y) = WithLoss(), MLP.train
    data, states = TensorDataset(x, y, y), [model.state_dict()]
    test = (*MLP.test, MLP.test[1])
    plain = TracInCP(model, data, states).influence(test)
    for train in (None, lambda o, t: o, lambda o, t: o.mean()):
        own = TracInCP(model, data, states, loss_fn=train, test_loss_fn=lambda o, t: o)
        assert_close(own.influence(test), plain)


class Answers(nn.Module):
    """A model with a loss of its own, as those of the transformers package are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = DICT.model()

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.body(x)["logits"]
        loss = F.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("train", [None, lambda o, b: F.cross_entropy(o.logits, b["labels"])])
def test_logits_and_the_loss_of_a_model_with_both(train: Any) -> None:
    model = Answers()
    made = partial(TracInCP, model, Examples(DICT.train), [model.state_dict()], loss_fn=train)
    with pytest.raises(InvalidArgumentError, match="returns the model's output, or a part of it"):
        made(test_loss_fn=lambda o, b: o.logits[:, 1]).influence(DICT.test)
    own = made(test_loss_fn=lambda o, b: o.loss)
    assert_close(own.influence(DICT.test), made().influence(DICT.test))
    raised = made(test_output_fn=lambda o, b: o.logits[:, 1]).influence(DICT.test)
    lowered = made(test_loss_fn=lambda o, b: -o.logits[:, 1]).influence(DICT.test)
    assert_close(raised, lowered)


def test_outputs_of_an_untrained_layer_tell_nothing() -> None:
    """All of them are zero, and so is the squared distance from a label of zero."""
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x, y = torch.randn(5, 4).double(), torch.zeros(5).double()
    squared = lambda o, t: (o[:, 0] - t).square()  # noqa: E731
    shown = lambda o, t: (o[:, 0] - t).square() + 0.0  # noqa: E731
    data, states = TensorDataset(x, torch.ones(5).double()), [model.state_dict()]
    made = TracInCP(model, data, states, loss_fn=squared, test_loss_fn=shown)
    assert torch.equal(made.influence((x, y)), torch.zeros(5, 5).double())


def test_an_output_that_is_a_mean_over_tokens_is_named() -> None:
    def over_some(outputs: Tensor, targets: Tensor) -> Tensor:
        right = outputs.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return right[targets > 2].mean()

    influence = build("TracInCP", GPT, test_output_fn=over_some)
    with pytest.raises(InvalidArgumentError, match="`test_output_fn` is not a sum or mean over"):
        influence.influence(GPT.test)


def test_captums_flag_names_the_output() -> None:
    class Summed:
        reduction = "sum"

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.gather(1, targets[:, None]).sum()

    match = 'reduction for `test_output_fn` must be "none"'
    flag = {"sample_wise_grads_per_batch": False, "loss_fn": nn.CrossEntropyLoss(reduction="none")}
    with pytest.raises(InvalidArgumentError, match=match):
        build("TracInCP", MLP, test_output_fn=Summed(), **flag)
