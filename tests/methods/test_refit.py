"""The refit of a last layer: its solver, what it keeps, when it is done again, what it refuses."""

import copy
from typing import Any

import pytest
import torch
from cases import CASES, Examples, TanhMLP, cross_entropy
from contract import assert_close, build
from scipy.optimize import minimize
from test_representer import made
from torch import Tensor, nn
from torch.nn import functional as F

import influence_kit.methods.representer.refit
from influence_kit import CurvatureError, RepresenterPointSelection
from influence_kit.errors import InvalidArgumentError, NonFiniteError, UnknownLayerError
from influence_kit.losses.loss import Loss
from influence_kit.methods.representer.last_layer import at_last_layer
from influence_kit.methods.representer.newton import Objective, minimum

MLP = CASES["mlp"]


def random_features(r: int = 40, d: int = 6) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(r, d, dtype=torch.float64) * torch.logspace(1, -2, d, dtype=torch.float64)


def counts(outputs: Tensor) -> Tensor:
    """Poisson regression, in which full Newton steps from zero go much too far."""
    y = torch.tensor([0.0, 50.0]).repeat(len(outputs) // 2).double()
    return (outputs[:, 0].exp() - y * outputs[:, 0]).sum()


def classes(outputs: Tensor) -> Tensor:
    y = torch.arange(len(outputs)) % 3
    return F.cross_entropy(outputs, y, reduction="sum")


def separable(outputs: Tensor) -> Tensor:
    y = (random_features()[:, 0] > 0).double()
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="sum")


def robust(outputs: Tensor) -> Tensor:
    """A loss whose second derivative jumps."""
    return F.huber_loss(outputs[:, 0], torch.linspace(-9, 9, len(outputs)).double(), "sum")


LOSSES = {counts: 1, classes: 3, separable: 1, robust: 1}


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("l2", [1.0, 3e-3, 1e-6])
def test_the_minimum_is_that_of_scipy(losses: Any, l2: float) -> None:
    objective, c = Objective(random_features(), losses, 40, l2), LOSSES[losses]

    def value_and_slope(x: Any) -> tuple[float, Any]:
        weights = torch.tensor(x).view(c, -1).requires_grad_()
        total = losses(objective.features @ weights.T)
        value = total / 40 + l2 * weights.square().sum()
        return float(value.detach()), torch.autograd.grad(value, weights)[0].flatten().numpy()

    found = minimum(objective, c, tol=1e-12, max_iter=100)
    value, slope = value_and_slope(found.flatten().numpy())
    assert abs(slope).max() <= 1e-11 * max(1, 2 * l2 * float(found.norm()))
    start = [0.0] * found.numel()
    options = {"maxiter": 10**5, "maxfun": 10**5, "ftol": 1e-15, "gtol": 1e-9}
    their = minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options=options)
    assert value <= their.fun + 1e-12 * abs(their.fun)
    objective_at_theirs = objective.value(
        losses(objective.features @ torch.tensor(their.x).view(c, -1).T), torch.tensor(their.x)
    )
    # strongly convex: the weights are as near as the value says
    distance = float((found.flatten() - torch.tensor(their.x)).norm())
    assert l2 * distance**2 <= objective_at_theirs - value + 1e-12 * abs(value)


def test_a_loss_of_no_slope_has_its_minimum_at_zero() -> None:
    objective = Objective(random_features(), lambda outputs: outputs.detach().sum(), 40, 1.0)
    assert torch.equal(minimum(objective, 2, 1e-12, 5), torch.zeros(2, 6).double())


def test_a_linear_loss_needs_no_second_derivative() -> None:
    objective = Objective(random_features(), torch.sum, 40, 0.5)
    expected = -random_features().mean(0, keepdim=True)
    assert_close(minimum(objective, 1, 1e-12, 5), expected)


def test_too_few_steps_are_an_error_with_the_gradient_reached() -> None:
    with pytest.raises(CurvatureError, match=r"after 2 Newton steps: the norm of the gradient is"):
        made(MLP.model(), MLP.train, max_iter=2).influence(MLP.test)


def test_a_loss_in_float32_cannot_be_fitted_so_closely() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.float(), targets)

    with pytest.raises(CurvatureError, match=r"tol=1e-12\).*computes in float32"):
        made(MLP.model(), MLP.train, loss_fn=loss).influence(MLP.test)
    found = made(MLP.model(), MLP.train, loss_fn=loss, tol=1e-3).influence(MLP.test)
    assert_close(found, made(MLP.model(), MLP.train).influence(MLP.test), 1e-1)


def test_a_loss_that_is_not_convex_is_refused() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - 1).square().sum(1)

    with pytest.raises(CurvatureError, match=r"l2=0\.003: the objective is not convex"):
        made(MLP.model(), MLP.train, loss_fn=loss).influence(MLP.test)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) / (outputs.sum(1) != 0)

    with pytest.raises(NonFiniteError, match="while the last layer is refitted"):
        made(MLP.model(), MLP.train, loss_fn=loss).influence(MLP.test)


def test_features_that_are_not_finite_name_the_example() -> None:
    x, y = MLP.train
    x[6, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="'head' is NaN or infinite for training example 6"):
        made(MLP.model(), (x, y)).influence(MLP.test)


def test_a_layer_is_refitted_once_and_by_fit_for_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        fitted.append(1)
        return minimum(*arguments)

    monkeypatch.setattr(influence_kit.methods.representer.refit, "minimum", counted)
    checkpoints = copy.deepcopy(MLP.checkpoints())
    representer = build("RepresenterPointSelection", MLP, checkpoints=checkpoints)
    before = representer.influence(MLP.test)
    representer.self_influence()
    representer.representer_values(2)
    assert len(fitted) == 3
    with torch.no_grad():
        checkpoints[1]["state_dict"]["body.0.weight"] *= 2
    match = "checkpoint 1 holds other weights than when the last layer was fitted; call `fit"
    with pytest.raises(InvalidArgumentError, match=match):
        representer.influence(MLP.test)
    assert len(fitted) == 3
    after = representer.fit().influence(MLP.test)
    assert len(fitted) == 6
    assert not torch.allclose(before, after)
    fresh = build("RepresenterPointSelection", MLP, checkpoints=checkpoints)
    assert_close(after, fresh.influence(MLP.test))


def test_the_loss_keeps_no_images() -> None:
    case = CASES["dict"]
    loss = Loss(case.loss, "none", "loss_fn")
    seen = at_last_layer(case.model(), "head", case.train, loss)
    assert list(seen.batch) == ["labels"]
    assert_close(seen.features[:, 0], case.model().body(case.train["x"]).detach())
    model, (x, y) = MLP.model(), MLP.train
    assert len(at_last_layer(model, "head", (x, y), Loss(cross_entropy, "none", "")).batch) == 1


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2": 0.0}, "`l2` must be a positive number; got 0.0"),
        ({"l2": float("nan")}, "`l2` must be a positive number; got nan"),
        ({"l2": True}, "`l2` must be a positive number; got True"),
        ({"tol": 1}, "`tol` must be a positive number and below 1; got 1"),
        ({"max_iter": 0}, "`max_iter` must be a positive int; got 0"),
        ({"max_iter": 2.0}, "`max_iter` must be a positive int; got 2.0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        made(MLP.model(), MLP.train, **arguments)


def test_the_layer_must_be_linear() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    with pytest.raises(InvalidArgumentError, match="must be a linear layer; '1' is LayerNorm"):
        made(model, MLP.train, layer="1")


def test_layers_must_be_of_the_model() -> None:
    with pytest.raises(UnknownLayerError, match=r"the model has no layers \['tail'\]; it has"):
        made(MLP.model(), MLP.train, layer="tail")
    with pytest.raises(UnknownLayerError, match=r"modules that are not in the model: \['Linear'\]"):
        made(MLP.model(), MLP.train, layer=nn.Linear(5, 3))
    with pytest.raises(InvalidArgumentError, match=r"one layer; 'body.\*' matches 4: \['b"):
        made(MLP.model(), MLP.train, layer="body.*")


class Changed(nn.Module):
    """A model whose output goes through something more."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net, self.change = MLP.model(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    "change", [lambda o: o.softmax(1), nn.ReLU(inplace=True), lambda o: o[:, :2], lambda o: 2 * o]
)
def test_what_follows_the_layer_is_not_ignored(change: Any) -> None:
    train = MLP.train[0], MLP.train[1] % 2
    with pytest.raises(InvalidArgumentError, match="is not the output of `final_fc_layer`"):
        made(Changed(change), train, layer="net.head").influence(MLP.test)


def test_a_layer_that_is_not_the_last_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"of shape \[4, 6\]: name the layer that gives"):
        made(MLP.model(), MLP.train, layer="body.0").influence(MLP.test)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    class Twice(TanhMLP):
        def forward(self, x: Tensor) -> Tensor:
            self.head(self.body(-x))
            return super().forward(x)

    with pytest.raises(InvalidArgumentError, match="'head' is called 2 times"):
        made(Twice().double(), MLP.train).influence(MLP.test)


def test_a_model_with_time_first_is_refused_also_where_lengths_agree() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.transpose(0, 1)))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.permute(1, 2, 0), targets, reduction="none")

    batch = torch.randn(4, 4, 2).double(), torch.arange(16).view(4, 4) % 3
    with pytest.raises(InvalidArgumentError, match="the first dimension must be the examples"):
        made(TimeFirst().double(), batch, loss_fn=loss).influence(batch)


def test_a_loss_is_needed() -> None:
    with pytest.raises(InvalidArgumentError, match="pass `loss_fn`"):
        made(MLP.model(), MLP.train, loss_fn=None).influence(MLP.test)


def test_a_loss_that_holds_float32_says_what_to_do() -> None:
    weight = torch.ones(3)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=weight, reduction="none")

    train = MLP.train[0].float(), MLP.train[1]
    with pytest.raises(InvalidArgumentError, match=r"not of torch.float64.*weight.to\(outputs\)"):
        made(MLP.model().float(), train, loss_fn=loss).influence(train)


def test_an_error_of_the_loss_in_its_own_precision_is_left_as_it_is() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) > 4:
            raise RuntimeError("no more than four")
        return cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match=r"^no more than four$"):
        made(MLP.model(), MLP.train, loss_fn=loss).influence(MLP.test)


def test_labels_must_name_an_output() -> None:
    def soft(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1)

    targets = torch.rand(MLP.n, 3).double()
    message = r"labels must be integers of shape \[4\]; got torch.float64 of shape \[4, 3\]"
    with pytest.raises(InvalidArgumentError, match=message):
        made(MLP.model(), (MLP.train[0], targets), loss_fn=soft).influence(
            (MLP.train[0][:4], targets[:4])
        )

    def lenient(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets.clamp(max=2))

    labels = MLP.test[1] + 2
    with pytest.raises(InvalidArgumentError, match=r"has the label [34], and there are 3 classes"):
        made(MLP.model(), MLP.train, loss_fn=lenient).influence((MLP.test[0], labels))


def test_checkpoints_have_numbers() -> None:
    for number in (1, -1, "0"):
        match = f"`checkpoint` must be an int of at least 0.*; got {number!r}"
        with pytest.raises(InvalidArgumentError, match=match):
            made(MLP.model(), MLP.train).representer_values(number)  # type: ignore[arg-type]


def test_there_must_be_examples() -> None:
    empty = MLP.train[0][:0], MLP.train[1][:0]
    representer = RepresenterPointSelection(
        MLP.model(), "head", Examples(empty), MLP.checkpoints()[:1], loss_fn=cross_entropy
    )
    with pytest.raises(InvalidArgumentError, match="there are no examples"):
        representer.influence(MLP.test)


def test_one_vector_an_example_does_not_do() -> None:
    with pytest.raises(NotImplementedError, match="treats test and training examples differently"):
        made(MLP.model(), MLP.train).compute_intermediate_quantities(MLP.test)
