"""What a user does between two questions to one object: training on, other data in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fuzz.draw import Draw
from fuzz.gradient_questions import close_of, gradient_scores
from fuzz.questions import Answers, Question, Void
from fuzz.setups import Setup
from fuzz.state import same_random_states
from influence_kit import GradDot, TracInCPRandProj


def event_question(draw: Draw, setup: Setup) -> Question:
    """The second question must be answered for what is there then, or refused."""
    cls = draw.one([GradDot, TracInCPRandProj])
    if setup.subject.dtype is not torch.float64 or "complex" in draw.tags:
        raise Void("not for events")
    draw.note(cls.__name__)
    arguments = {**setup.arguments, "layers": setup.layers}
    arguments.pop("checkpoints_load_func", None)
    if cls is TracInCPRandProj:
        arguments["projection"] = "identity"
    happen = draw.call({"trained on": (1, _train_on), "data changed": (1, _change_data)}, setup)
    draw.excuse(draw.tags[-1])
    # the live weights, as ``[model.state_dict()]`` has them
    setup.subject.states = [setup.model.state_dict()]
    setup.rates = [1.0]

    def make() -> Any:
        return cls(setup.model, setup.train, setup.subject.states, **arguments)

    def ask(method: Any) -> Answers:
        first = method.influence(setup.test)
        right = _right(draw, setup)
        setup.event(happen)
        second = method.influence(setup.test)
        return {"first": (first, right), "second": (second, _right(draw, setup))}

    return Question(make, ask, close_of(setup))


def _right(draw: Draw, setup: Setup) -> Tensor:
    setup.oracle.forget()
    with torch.inference_mode(False), same_random_states():
        return gradient_scores(setup, [1.0], False, draw).whole


def _train_on(draw: Draw, setup: Setup) -> Callable[[], None]:
    def happen() -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in setup.model.parameters():
                parameter += torch.randn(
                    parameter.shape, generator=generator, dtype=parameter.dtype
                )

    return happen


def _change_data(draw: Draw, setup: Setup) -> Callable[[], None]:
    if (
        isinstance(setup.train, TensorDataset)
        or not setup.subject.train[0]["x"].is_floating_point()
    ):
        raise Void("examples are copies")
    if not hasattr(setup.train, "dataset") and type(setup.train).__name__ == "Batches":
        raise Void("examples are copies")

    def happen() -> None:
        for example in setup.subject.train:
            example["x"].mul_(-1.5).add_(0.3)

    return happen
