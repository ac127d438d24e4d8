"""The parts of methods that users hold themselves: operators, terms, rules, searches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import influence_kit as ik
from fuzz.bad_input import Target
from fuzz.bad_values import BAD, FLAGS, NONE
from fuzz.method_targets import (
    FINE,
    LARGE,
    NUMBERS,
    TWO,
    ZERO,
    batch,
    checkpoints,
    drawn,
    is_,
    made,
    network,
    train,
    with_adam,
)
from fuzz.watch import LetIn
from influence_kit import gradients, operators, scoring

ANYTHING = set(BAD)


def matrix() -> Tensor:
    root = drawn(4, 4).double()
    return root @ root.T + torch.eye(4)


def vectors() -> Tensor:
    return drawn(2, 4).double()


def pairs() -> list[operators.EigenPairs]:
    return [operators.EigenPairs(*torch.linalg.eigh(matrix()))]


def _linear_algebra() -> list[Target]:
    damping = ZERO | NUMBERS | {"0-d tensor", "0-d array"}

    def solved(blocks: Any, damping: Any, names: Any) -> Any:
        return operators.Cholesky(blocks, damping, names)(vectors())

    def low_rank(pairs: Any, damping: Any, complement: Any) -> Any:
        return operators.LowRank(pairs, damping, complement)(vectors())

    def eigenpairs(values: Any, vectors_: Any) -> Any:
        pair = operators.EigenPairs(values, vectors_)
        return operators.LowRank([pair], 0.1, True)(vectors())

    applied: dict[str, Callable[[], Any]] = {
        "Cholesky": lambda: operators.Cholesky([matrix()], 0.1),
        "LowRank": lambda: operators.LowRank(pairs(), 0.1, True),
        "JacobiPreconditioner": lambda: operators.JacobiPreconditioner(operator(), 0.1),
        "NystromPreconditioner": lambda: operators.NystromPreconditioner(operator(), 0.1, 2),
    }
    return [
        Target(
            "Cholesky",
            solved,
            {"blocks": lambda: [matrix()], "damping": is_(0.1), "names": is_(None)},
            {"damping": damping, "names": NONE},
        ),
        Target(
            "LowRank",
            low_rank,
            {"pairs": pairs, "damping": is_(0.1), "complement": is_(True)},
            {"damping": damping - ZERO, "complement": FLAGS},
        ),
        Target(
            "EigenPairs",
            eigenpairs,
            {
                "values": lambda: torch.linalg.eigh(matrix())[0],
                "vectors_": lambda: torch.linalg.eigh(matrix())[1],
            },
        ),
        *(
            Target(
                f"{name}, applied",
                lambda vectors, make=make: make()(vectors),
                {"vectors": vectors},
            )
            for name, make in applied.items()
        ),
        *_operator_methods(),
        *_products(),
    ]


def quadratic(vector: Tensor) -> Tensor:
    return vector @ matrix().to(vector.dtype) @ vector / 2


def operator() -> operators.Operator:
    return operators.hessian(quadratic, torch.zeros(4).double())


class Twice(operators.Operator):
    """A user's own."""

    def product(self, vectors: Tensor) -> Tensor:
        return 2 * vectors


def _operator_methods() -> list[Target]:
    def twice(sizes: Any, sample: Any) -> Any:
        return Twice(sizes, sample).dense()

    def asked(method: str) -> Callable[..., Any]:
        return lambda **given: getattr(operator(), method)(**given)

    seed = {"seed": ZERO | TWO | {"-1"}}
    return [
        Target(
            "Operator",
            twice,
            {"sizes": is_([2, 2]), "sample": lambda: torch.zeros(0)},
            # its dtype and device alone count
            {
                "sample": {"empty tensor", "empty matrix", "0-d tensor", "4-d tensor"}
                | {"long tensor", "tensor of nan", "tensor with inf"}
            },
        ),
        Target("Operator.product", asked("product"), {"vectors": vectors}),
        Target("Operator.diagonal", asked("diagonal"), {"seed": is_(0)}, seed),
        Target("Operator.traces", asked("traces"), {"seed": is_(0)}, {"seed": ANYTHING}),
        *(
            Target(
                f"Operator.{name}",
                asked(name),
                {"count": is_(2), "seed": is_(0)},
                {**seed, "count": TWO},
            )
            for name in ("normal", "signs")
        ),
    ]


def _products() -> list[Target]:
    def function(tree: Any) -> Tensor:
        return quadratic(tree["x"])

    def outputs(tree: Any) -> tuple[Tensor]:
        return (matrix() @ tree["x"],)

    def loss(values: Any) -> Tensor:
        return values[0].square().sum()

    given = {
        "parameters": lambda: {"x": torch.zeros(4).double()},
        "vectors": lambda: {"x": vectors()},
        "mode": is_("forward"),
    }
    return [
        Target("hessian_product", operators.hessian_product, {"function": is_(function), **given}),
        Target(
            "gauss_newton_product",
            operators.gauss_newton_product,
            {"outputs": is_(outputs), "loss": is_(loss), **given},
        ),
    ]


# Terms and rules.


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def rule(layer: nn.Module, inputs: Any, delta: Tensor, n: int) -> dict[str, gradients.Form]:
    values = (delta * inputs[0]).reshape(n, -1, 4).sum(1)
    return {"factor": gradients.Dense(values, torch.Size([4]))}


def scored(layer_type: Any, rule: Any) -> str:
    """A user's layer with a rule of its own: the scores are right, whatever the rule says."""
    own = type("Own", (Scale,), {})
    gradients.gradient_rule(own if layer_type is None else layer_type)(rule)
    last = network()[0]
    loss = nn.CrossEntropyLoss()
    found, expected = (
        ik.GradDot(
            nn.Sequential(scale, last), train(), [{**last_state(last), **first}], loss_fn=loss
        ).influence(batch())
        for scale, first in ((own(), FACTOR), (Scale(), FACTOR))
    )
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
        raise LetIn("other scores")
    return "right scores"


FACTOR = {"0.factor": torch.ones(4)}


def last_state(last: nn.Module) -> dict[str, Tensor]:
    return {f"1.{name}": value for name, value in last.state_dict().items()}


def returned(value: Any) -> Any:
    return scored(None, lambda *_: value)


def returned_form(form: Any) -> Any:
    return scored(None, lambda *_: {"factor": form})


def dense(values: Any, shape: Any) -> Any:
    return returned_form(gradients.Dense(values, shape))


def summed(test: Any, train: Any, weight: Any) -> Any:
    """A user's method."""

    class Own(ik.InnerProductInfluence):
        def terms(self) -> list[scoring.Term]:
            given = [self.test_at(0) if test is KEPT else test]
            given.append(self.train_at(0) if train is KEPT else train)
            return [scoring.Term(*given, weight)]

    one = made(ik.GradDot)
    own = Own(one.model, train_set(), checkpoints(), loss_fn=nn.CrossEntropyLoss())
    return own.influence(batch())


def train_set() -> Any:
    return train()


def sided(checkpoint: Any, features: Any, transforms: Any, solve: Any) -> Any:
    return scoring.Side(checkpoint, features, transforms, solve)


KEPT = object()


def _terms() -> list[Target]:
    size = torch.Size
    return [
        Target(
            "gradient_rule",
            scored,
            {"layer_type": is_(None), "rule": is_(rule)},
            {"layer_type": ANYTHING, "rule": {"function"}},
        ),
        Target(
            "gradient_rule, what it returns",
            returned,
            {"value": lambda: rule(None, [drawn(3, 4)], drawn(3, 4), 3)},
            {"value": ANYTHING},
        ),
        Target(
            "Form",
            returned_form,
            {"form": lambda: gradients.Dense(drawn(3, 4), size([4]))},
            {"form": ANYTHING},  # what is wrong is computed otherwise, with a warning
        ),
        Target("Dense", dense, {"values": lambda: drawn(3, 4), "shape": is_(size([4]))}),
        Target(
            "Factored",
            lambda deltas, inputs: gradients.Factored(deltas, inputs, size([3, 4])).dense(),
            {"deltas": lambda: drawn(2, 1, 3), "inputs": lambda: drawn(2, 1, 4)},
        ),
        Target(
            "Term",
            summed,
            {"test": is_(KEPT), "train": is_(KEPT), "weight": is_(1.0)},
            {"weight": ZERO | NUMBERS | {"-1", "-0.5"}},
        ),
        Target(
            "Side",
            sided,
            {
                "checkpoint": is_(0),
                "features": is_(rule),
                "transforms": is_(()),
                "solve": is_(None),
            },
            {
                "checkpoint": ZERO | TWO | LARGE,
                # what can be called may be a function
                "features": {"function", "class", "nn.Module"},
                "solve": NONE | {"function", "class", "nn.Module"},
            },
        ),
        Target(
            "AdamDirections",
            directed,
            {
                "model": network,
                "checkpoints": with_adam,
                "parameter_names": is_(None),
            },
            {"parameter_names": NONE},
        ),
        Target("AdamDirections.at", directed, {"checkpoint": is_(0)}, {"checkpoint": ZERO}),
        Target("unit_norm", scoring.unit_norm, {"gradients": some_gradients}),
    ]


def directed(
    model: Any = KEPT, checkpoints: Any = KEPT, parameter_names: Any = None, checkpoint: Any = 0
) -> Any:
    model = network() if model is KEPT else model
    checkpoints = with_adam() if checkpoints is KEPT else checkpoints
    shapes = {name: p.shape for name, p in network().named_parameters()}
    zeros = gradients.Gradients(2, {}, shapes, torch.zeros(0))
    one = scoring.AdamDirections(model, checkpoints, parameter_names)
    return one.at(checkpoint)(zeros).flat()


def some_gradients() -> gradients.Gradients:
    shapes = {"a": torch.Size([4])}
    forms = {"a": gradients.Dense(drawn(3, 4), shapes["a"])}
    return gradients.Gradients(3, forms, shapes, torch.zeros(0))


# Searches, and the methods of single classes.


def _searches() -> list[Target]:
    def searched(cls: Any, data: Any, query: Any, k: Any) -> Any:
        index = cls()
        index.setup(data)
        return index.get_nearest_neighbors(query, k)

    return [
        Target(
            "ExactNearestNeighbors",
            lambda **given: searched(ik.ExactNearestNeighbors, **given),
            {"data": lambda: drawn(5, 3), "query": lambda: drawn(2, 3), "k": is_(2)},
            {"k": TWO | LARGE | {"0"}},
        )
    ]


def _single_methods() -> list[Target]:
    def asked(cls: Any, method: str) -> Callable[..., Any]:
        return lambda **given: getattr(made(cls), method)(**given)

    at = {"checkpoint": is_(0)}
    return [
        Target(
            "DVEmb.embeddings",
            asked(ik.DVEmb, "embeddings"),
            {"show_progress": is_(False)},
            {"show_progress": FLAGS},
        ),
        Target(
            "RepresenterPointSelection.representer_values",
            asked(ik.RepresenterPointSelection, "representer_values"),
            at,
            {"checkpoint": ZERO},
        ),
        Target(
            "RepresenterPointSelection.refitted_outputs",
            asked(ik.RepresenterPointSelection, "refitted_outputs"),
            {"inputs": batch, **at},
            {"checkpoint": ZERO},
        ),
        *_base_classes(),
    ]


def _base_classes() -> list[Target]:
    """Methods of a user's own, on the classes that they stand on."""

    class Own(ik.InnerProductInfluence):
        def terms(self) -> list[scoring.Term]:
            return [scoring.Term(self.test_at(0), self.train_at(0), 1.0)]

    good = {
        "model": lambda: made(ik.GradDot).model,
        "train_dataset": train,
        "checkpoints": checkpoints,
        "loss_fn": nn.CrossEntropyLoss,
        "batch_size": is_(4),
    }
    return [
        Target(
            "InnerProductInfluence",
            lambda **given: Own(**given).influence(batch()),
            good,
            {name: FINE[name] for name in good if name in FINE},
        )
    ]


TARGETS = [*_linear_algebra(), *_terms(), *_searches(), *_single_methods()]
