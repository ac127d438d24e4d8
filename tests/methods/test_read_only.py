"""What may be assigned takes effect; all else is an error that says to make a new object."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Examples
from contract import METHODS, assert_close, build
from torch import nn

from influence_kit import GradDot, SimilarityInfluence, TracInCP, TracInCPRandProj
from influence_kit.errors import FixedAttributeError, InvalidArgumentError
from influence_kit.methods.base import ExampleInfluence
from influence_kit.scoring import Term

MLP = CASES["mlp"]
# what takes effect when it is assigned, with a value that is not the one of the contract
CAN = {
    "checkpoints": MLP.checkpoints()[1:2],
    "damping": 0.7,
    "ridge": 0.7,
    "final_fc_layer": "body.2",
}


def public(method: Any) -> set[str]:
    """The attributes of an object, and the arguments of its class."""
    names = {*vars(method), *inspect.signature(type(method)).parameters, *dir(type(method))}
    functions = {name for name in names if callable(getattr(type(method), name, None))}
    return {name for name in names - functions if not name.startswith("_")}


def similarity(folder: Path) -> SimilarityInfluence:
    return SimilarityInfluence(MLP.model(), "head", Examples(MLP.train), folder)


@pytest.mark.parametrize("method", [*METHODS, "SimilarityInfluence"])
def test_each_public_attribute_takes_effect_or_is_read_only(method: str, tmp_path: Path) -> None:
    made = similarity(tmp_path) if method == "SimilarityInfluence" else build(method, MLP)
    refused = 0
    for name in sorted(public(made)):
        found = inspect.getattr_static(type(made), name, None)
        if isinstance(found, property) and found.fset is not None:
            assert name in CAN
            continue
        before = getattr(made, name, None) if name not in ("R", "embeddings") else None
        own = re.escape(type(made).__name__)
        with pytest.raises(FixedAttributeError, match=rf"`{name}` cannot be .*make a new {own}\("):
            setattr(made, name, 3)
        if name in vars(made):
            with pytest.raises(FixedAttributeError, match=f"`{name}` cannot be assigned"):
                delattr(made, name)
            assert getattr(made, name) is before
        refused += 1
    assert refused > 8


# methods without checkpoints that could be others
NO_STATES = ("KNNShapley", "MAGIC")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_assigned_takes_effect(method: str) -> None:
    states = {"checkpoints": MLP.checkpoints()[-1:]} if method == "DVEmb" else {}
    for name, value in CAN.items():
        made = build(method, MLP, **states)
        found = inspect.getattr_static(type(made), name, None)
        if not isinstance(found, property) or found.fset is None or method in NO_STATES:
            continue
        if name == "damping" and "damping" not in inspect.signature(type(made)).parameters:
            continue  # of Captum's two it is `hessian_reg`, and of TRAK `ridge`
        # with more than weights
        if name == "checkpoints" and METHODS[method].checkpoints is not Case.checkpoints:
            value = METHODS[method].checkpoints(MLP)[:1]
        before = made.influence(MLP.test, k=None)
        setattr(made, name, value)
        after = made.influence(MLP.test, k=None)
        if name == "final_fc_layer":
            arguments = {"loss_fn": MLP.loss, "batch_size": 4}
            own = {} if made.__class__.__name__ == "TracInCPFast" else {"projection_dim": None}
            if method.endswith("projected"):
                own = {"projection_dim": 4}
            cls, data = type(made), Examples(MLP.train)
            fresh = cls(MLP.model(), value, data, MLP.checkpoints(), **own, **arguments)
        else:
            fresh = build(method, MLP, **states | {name: value})
        assert_close(after, fresh.influence(MLP.test, k=None), 1e-7)
        assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("dampning", r"LoGra has no attribute `dampning` to assign; did you mean `damping`\?"),
        ("checkpoint", r"did you mean `checkpoints`\?"),
        ("whatever", r"LoGra has no attribute `whatever` to assign \(what can be assigned: check"),
        ("loss_fn", r"`loss_fn` cannot be assigned.*; make a new LoGra\(\.\.\., loss_fn=\.\.\.\)"),
        ("layer_modules", r"`layer_modules` cannot be assigned; make a new LoGra\(\.\.\.\)"),
    ],
)
def test_names_that_cannot_be_assigned(name: str, match: str) -> None:
    made = build("LoGra", MLP)
    for error in (FixedAttributeError, AttributeError, ValueError, InvalidArgumentError):
        with pytest.raises(error, match=match):
            setattr(made, name, 1)
    assert name not in vars(made) or name == "loss_fn"


class Weighted(TracInCP):
    """A subclass with attributes of its own, set before and after those of the package."""

    power = 1.0

    def __init__(self, *args: Any, factor: float = 1.0, **kwargs: Any) -> None:
        self.before = []
        super().__init__(*args, **kwargs)
        self.factor = factor

    def terms(self) -> list[Term]:
        self.before.append(self.factor)
        self._asked = True
        places = range(len(self.checkpoints))
        weight = self.factor**self.power
        return [Term(self.test_at(c), self.train_at(c), weight=weight) for c in places]


class Deeper(Weighted):
    def __init__(self, *args: Any, shift: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = shift
        self.factor += 1


def test_subclasses_assign_what_is_theirs() -> None:
    arguments = (MLP.model(), Examples(MLP.train), MLP.checkpoints())
    plain = GradDot(*arguments, loss_fn=MLP.loss).influence(MLP.test)
    own = Deeper(*arguments, loss_fn=MLP.loss, factor=2.0, shift=1)
    assert_close(own.influence(MLP.test), 3 * plain)
    own.factor, own.shift, own.before = 5.0, 2, []
    assert_close(own.influence(MLP.test), 5 * plain)
    own.power = 2.0
    assert_close(own.influence(MLP.test), 25 * plain)
    own.terms = lambda: Weighted.terms(own)[:1]  # type: ignore[method-assign]
    one = GradDot(*arguments[:2], MLP.checkpoints()[:1], loss_fn=MLP.loss).influence(MLP.test)
    assert_close(own.influence(MLP.test), 25 * one)
    for name in ("loss_fn", "layers", "model", "store", "batch_size"):
        with pytest.raises(FixedAttributeError, match=rf"`{name}` cannot .* make a new Deeper\("):
            setattr(own, name, None)
    with pytest.raises(FixedAttributeError, match="no attribute `factr` to assign; did you mean `"):
        own.factr = 1.0
    assert "factor" in inspect.signature(Weighted).parameters


class Bare(ExampleInfluence):
    """A method without terms, whose constructor is inherited."""

    def stream_scores(
        self, inputs: Any, reducer: Any, doing: str, show_progress: bool, aggregate: bool
    ) -> None:
        raise NotImplementedError

    def self_influence(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_signatures_are_those_of_the_constructors() -> None:
    assert list(inspect.signature(Bare).parameters)[:3] == ["model", "train_dataset", "checkpoints"]
    assert list(inspect.signature(SimilarityInfluence).parameters)[:2] == ["module", "layers"]
    names = list(inspect.signature(TracInCPRandProj).parameters)
    assert names[:3] == ["model", "train_dataset", "checkpoints"]
    assert {"projection_dim", "loss_fn", "store"} <= set(names)


def test_copies_are_read_only_too() -> None:
    model = nn.Linear(4, 3).double()
    made = TracInCP(model, Examples(MLP.train), [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_close(other.influence(MLP.test), made.influence(MLP.test))
        with pytest.raises(FixedAttributeError, match="make a new TracInCP"):
            other.loss_fn = None
