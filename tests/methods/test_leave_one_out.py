"""Influence against the truth: models that are retrained without each training example.

The models are convex and small enough to train to the optimum, where influence functions should
predict what a removal does. The l2 coefficient of the training objective is the damping. An
influence estimate leaves out how much an example bends the loss near itself, so that real changes
are larger than predicted ones, by a factor of 1 / (1 - leverage).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import sklearn.datasets
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import grad, hessian, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import ExplicitInfluenceFunction

# the norm of the objective's gradient at which a model counts as trained
TRAINED = 1e-11


def softmax_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none")


def logistic_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[..., 0], y.to(outputs), reduction="none")


def squared_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs[..., 0] - y) ** 2


@dataclass(frozen=True)
class Problem:
    """A linear model of one of scikit-learn's data sets: mean loss + l2/2 norm(parameters)^2."""

    data: str
    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    n: int
    rank_correlation: float
    m: int = 40
    l2: float = 1e-2

    @property
    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The training and the test set, in features that the training set standardises."""
        x, y = getattr(sklearn.datasets, f"load_{self.data}")(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(x)[order], torch.tensor(y)[order]
        # pixels that are always blank have no deviation
        x = x / 16 if self.data == "digits" else (x - x[: self.n].mean(0)) / x[: self.n].std(0)
        if y.is_floating_point():
            y = (y - y[: self.n].mean()) / y[: self.n].std()
        rest = slice(self.n, self.n + self.m)
        return (x[: self.n], y[: self.n]), (x[rest], y[rest])


PROBLEMS = {
    "breast_cancer": Problem(
        "breast_cancer", logistic_loss, outputs=1, n=400, rank_correlation=0.99
    ),
    "wine": Problem("wine", softmax_loss, outputs=3, n=130, rank_correlation=0.99),
    "digits": Problem("digits", softmax_loss, outputs=10, n=300, rank_correlation=0.99),
    "diabetes": Problem("diabetes", squared_loss, outputs=1, n=400, rank_correlation=0.999),
}


def predict(theta: Tensor, x: Tensor, outputs: int) -> Tensor:
    """The outputs of a linear model with parameters (weight, bias) in one vector."""
    size = outputs * x.shape[1]
    return F.linear(x, theta[:size].view(outputs, -1), theta[size:])


@cache
def trained(name: str) -> tuple[Tensor, Tensor]:
    """The optimum ``[P]`` on all examples, and those without each of them ``[n, P]``."""
    problem = PROBLEMS[name]
    (x, y), _ = problem.sides

    def objective(theta: Tensor, weights: Tensor) -> Tensor:
        losses = problem.loss(predict(theta, x, problem.outputs), y)
        return weights @ losses + problem.l2 / 2 * theta.square().sum()

    everyone = x.new_full((problem.n,), 1 / problem.n)
    optimum = x.new_zeros(problem.outputs * (x.shape[1] + 1))
    for _ in range(15):
        curvature = hessian(objective)(optimum, everyone)
        optimum = optimum - torch.linalg.solve(curvature, grad(objective)(optimum, everyone))
    inverse = torch.linalg.inv(hessian(objective)(optimum, everyone))
    without = (1 - torch.eye(problem.n, dtype=x.dtype)) / (problem.n - 1)
    return optimum, _minima(vmap(grad(objective)), without, optimum, inverse)


def _minima(
    gradient: Callable[[Tensor, Tensor], Tensor], weights: Tensor, start: Tensor, inverse: Tensor
) -> Tensor:
    """The optimum for each row of example weights, by Newton steps with the start's Hessian.

    They converge more slowly than with Hessians of their own, and cost a gradient each. The
    objectives are strongly convex: where the gradient is zero, the model is trained.
    """
    thetas = start.expand(len(weights), -1)
    for _ in range(200):
        now = gradient(thetas, weights)
        if now.norm(dim=1).max() < TRAINED:
            return thetas
        thetas = thetas - now @ inverse
    raise AssertionError(f"not trained: gradient norm {float(now.norm(dim=1).max())}")


def real_changes(name: str) -> Tensor:
    """How much each test loss rises when an example is left out in training, ``[m, n]``."""
    problem, (optimum, without) = PROBLEMS[name], trained(name)
    _, (x, y) = problem.sides

    def losses(theta: Tensor) -> Tensor:
        return problem.loss(predict(theta, x, problem.outputs), y)

    return (vmap(losses)(without) - losses(optimum)).T


def predicted_changes(name: str, curvature: str) -> Tensor:
    problem, (optimum, _) = PROBLEMS[name], trained(name)
    train, test = problem.sides
    model = nn.Linear(train[0].shape[1], problem.outputs).double()
    nn.utils.vector_to_parameters(optimum, model.parameters())
    influence = ExplicitInfluenceFunction(
        model,
        TensorDataset(*train),
        [model.state_dict()],
        loss_fn=problem.loss,
        curvature=curvature,
        damping=problem.l2,
    )
    return influence.influence(test) / problem.n


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_scores_rank_examples_as_retraining_without_them_does(name: str, curvature: str) -> None:
    predicted, real = predicted_changes(name, curvature), real_changes(name)
    correlations = [spearmanr(p, r).statistic for p, r in zip(predicted, real, strict=True)]
    assert sum(correlations) / len(correlations) >= PROBLEMS[name].rank_correlation


@pytest.mark.parametrize("name", PROBLEMS)
def test_scores_over_n_have_the_size_of_real_changes(name: str) -> None:
    predicted, real = predicted_changes(name, "ggn"), real_changes(name)
    # leaving out any example also weakens the l2 term by 1/n, which shifts a row
    predicted, real = (side - side.mean(1, keepdim=True) for side in (predicted, real))
    slopes = (predicted * real).sum(1) / predicted.square().sum(1)
    assert 1 <= slopes.median() <= 2
