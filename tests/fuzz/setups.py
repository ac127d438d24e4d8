"""How a user hands a subject over: data sets and loaders, checkpoints, batch sizes, layers."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fuzz.draw import Draw
from fuzz.nets import Bags, MaskedInput
from fuzz.oracle import Oracle
from fuzz.state import State
from fuzz.subjects import Subject


class Examples(Dataset):
    """A user's data set, which may draw random numbers that change nothing."""

    def __init__(self, items: list[Any], draws: bool) -> None:
        self.items, self.draws = items, draws

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if self.draws:
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.items[i]


class Batches:
    """Batches that were made once, to be iterated again and again."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass
class Setup:
    """A subject as handed over; ``data`` is all that must stay as it is."""

    subject: Subject
    oracle: Oracle
    train: Any
    test: Any
    arguments: dict[str, Any]
    checkpoints: Any
    rates: list[float]
    layers: list[str] | None
    data: list[Any]
    changes: list[str] = field(default_factory=list)
    state: State | None = None

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    def watch(self) -> None:
        """Note all that must stay as it is from here on."""
        self.state = State(self.model, self.data)

    def look(self) -> None:
        """Note what is not as it was."""
        assert self.state is not None
        self.changes += self.state.changes()

    def event(self, happen: Callable[[], None]) -> None:
        """The user's own doing, which is not held against the package."""
        self.look()
        happen()
        self.watch()


def draw_setup(draw: Draw, subject: Subject, folder: Path) -> Setup:
    layers = _layers(draw, subject)
    evaluates = not _may_train(draw) or draw.chance(0.7)
    arguments: dict[str, Any] = {} if evaluates else {"eval_mode": False}
    if not evaluates:
        draw.note("eval_mode False")
    oracle = Oracle(subject, names_of(subject.model, layers), evaluates)
    checkpoints, rates, load = _checkpoints(draw, subject, folder)
    if load is not None:
        arguments["checkpoints_load_func"] = load
    train, size = _train(draw, subject)
    arguments["batch_size"] = size
    test = _test(draw, subject)
    arguments["loss_fn"] = subject.loss
    if subject.test_loss is not None:
        draw.note("test_loss_fn")
        arguments["test_loss_fn"] = subject.test_loss
    data = [train, test, subject.train, subject.test, checkpoints, subject.loss]
    return Setup(subject, oracle, train, test, arguments, checkpoints, rates, layers, data)


def _may_train(draw: Draw) -> bool:
    kinds = ("dropout", "batch norm", "transformer layer", "instance norm", "merging", "caching")
    return not any(kind in draw.tags for kind in kinds)


def _layers(draw: Draw, subject: Subject) -> list[str] | None:
    """None, or some modules that own parameters, the head among them."""
    if not draw.chance(0.2):
        return None
    owners = [
        name
        for name, module in subject.model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    chosen = [name for name in owners if name == subject.final or draw.chance(0.5)]
    draw.note("some layers")
    return chosen


def names_of(model: nn.Module, layers: list[str] | None) -> list[str]:
    """What requires a gradient, or all of the layers named: those that are frozen, too."""
    if layers is None:
        return [name for name, p in model.named_parameters() if p.requires_grad]
    modules = [model.get_submodule(layer) for layer in layers]
    owned = {id(p) for module in modules for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in owned]


def _checkpoints(draw: Draw, subject: Subject, folder: Path) -> tuple[Any, list[float], Any]:
    states, rates = copy.deepcopy(subject.states), subject.rates
    ones = [1.0] * len(states)
    how = draw.one(["states", "with rates", "folder", "load function"], [2, 3, 1, 1])
    draw.note(f"checkpoints: {how}")
    if how == "states":
        return states, ones, None
    if how == "with rates":
        pairs = zip(states, rates, strict=True)
        return [{"state_dict": s, "learning_rate": r} for s, r in pairs], rates, None
    if how == "folder":
        for number, state in enumerate(states):
            torch.save(state, folder / f"checkpoint_{number}.pt")
        return str(folder), ones, None

    def load(model: nn.Module, number: int) -> float:
        model.load_state_dict(states[number])
        return rates[number]

    return list(range(len(states))), rates, load


def _items(subject: Subject, examples: list[Any]) -> list[Any] | None:
    """Examples that torch's own collate can batch; None where it cannot."""
    one, two = (subject.collate([e]) for e in examples[:1] * 2)
    same_shape = len({tuple(e["x"].shape) for e in examples}) == 1
    if not same_shape or subject.time_first or isinstance(subject.model, MaskedInput | Bags):
        return None
    if isinstance(one, dict):
        known = {"x", "other", "labels"}
        return [dict(e) for e in examples] if set(two) <= known else None
    if isinstance(one[0], tuple):
        return [((e["x"], e["other"]), e["labels"]) for e in examples]
    return [tuple(e.values()) for e in examples]


def _groups(draw: Draw, examples: list[Any]) -> list[list[int]]:
    """Places in order, in batches of different sizes."""
    found, start = [], 0
    while start < len(examples):
        size = draw.one([1, 2, 3, 3, 5])
        found.append(list(range(start, min(start + size, len(examples)))))
        start += size
    return found


def _train(draw: Draw, subject: Subject) -> tuple[Any, Any]:
    examples = subject.train
    n = len(examples)
    items = _items(subject, examples)
    size: Any = draw.one([1, 2, 3, 7, n, "auto"])
    kinds = {"loader": 2, "uneven": 2, "batches": 2}
    if items is not None:
        kinds |= {"data set": 2, "list": 1}
        if isinstance(items[0], tuple) and isinstance(items[0][0], torch.Tensor):
            kinds["tensors"] = 3
    how = draw.one(list(kinds), list(kinds.values()))
    draw.note(f"train: {how}")
    draws = draw.chance(0.1)
    if how == "tensors":
        draw.note(f"batch size {size if size != n else 'n'}")
        return TensorDataset(*map(torch.stack, zip(*items, strict=True))), size
    if how in ("data set", "list"):
        draw.note(f"batch size {size if size != n else 'n'}")
        if how == "data set" and draws:
            draw.note("data draws numbers")
        return (items if how == "list" else Examples(items, draws)), size
    if draws and how != "batches":
        draw.note("data draws numbers")
    given = Examples(examples, draws)
    if subject.bags:  # only a batch of one need not be cut
        how, size = "loader", draw.one([1, 1, size])
    if how == "loader":
        size = size if isinstance(size, int) else 4
        if subject.bags and size > 1:
            draw.excuse("a batch that cannot be cut")
        draw.note(f"batch size {size if size != n else 'n'}")
        loader = DataLoader(given, batch_size=size, collate_fn=subject.collate)
        _excuse_axis(draw, subject, [size] * (n // size) + [n % size] * (n % size > 0))
        return loader, "auto"
    groups = _groups(draw, examples)
    _excuse_axis(draw, subject, [len(g) for g in groups])
    if how == "uneven":
        return DataLoader(given, batch_sampler=groups, collate_fn=subject.collate), "auto"
    return Batches([subject.collate([examples[i] for i in g]) for g in groups]), "auto"


def _excuse_axis(draw: Draw, subject: Subject, sizes: list[int]) -> None:
    """Time-first batches that all have as many examples as steps tell nothing."""
    if subject.time_first and all(size == subject.time_first for size in sizes):
        draw.excuse("as many examples as steps")


def _test(draw: Draw, subject: Subject) -> Any:
    if draw.chance(0.6):
        if subject.bags and len(subject.test) > 1:
            draw.excuse("a batch that cannot be cut")
        return subject.collate(subject.test)
    draw.note("test loader")
    size = 1 if subject.bags else draw.one([1, 2, 4])
    return DataLoader(Examples(subject.test, False), batch_size=size, collate_fn=subject.collate)
