"""A model with its data, loss and checkpoints: all that a user holds, drawn from one seed."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.draw import Draw
from fuzz.losses import Loss, draw_loss
from fuzz.nets import (
    FAMILIES,
    VOCABULARY,
    Bags,
    Keywords,
    MaskedInput,
    Net,
    OneInput,
    Pair,
    TwoInputs,
    draw_net,
    logits_of,
)

IGNORED = -100


@dataclass
class Subject:
    """What a question is about.

    ``train`` and ``test`` are examples without a batch dimension; ``collate`` makes a batch of a
    list of them. ``loss`` is the user's, None for the model's own.
    """

    model: nn.Module
    train: list[Any]
    test: list[Any]
    collate: Callable[[list[Any]], Any]
    loss: Loss | None
    test_loss: Loss | None
    final: str
    kind: str
    classes: int
    dtype: torch.dtype = torch.float64
    plain: bool = False
    bags: bool = False
    time_first: int = 0
    loss_tags: list[str] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch, the oracle's way."""
    if isinstance(batch, Mapping):
        known = inspect.signature(model.forward).parameters
        return model(**{key: value for key, value in batch.items() if key in known})
    return model(*batch[:-1])


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch of one example, a scalar."""
    outputs = call(model, batch)
    if loss is None:
        found = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
        return found.sum()
    return loss(outputs, batch if isinstance(batch, Mapping) else batch[-1]).sum()


def draw_subject(draw: Draw) -> Subject:
    family = draw.one(list(FAMILIES), list(FAMILIES.values()))
    draw.note(family)
    dtype = torch.float32 if draw.chance(0.1) else torch.float64
    if dtype is torch.float32:
        draw.note("float32")
    net, given = draw_net(draw, family)
    kinds = ["class", "regress", "many"]
    if family in ("series", "tokens") and draw.chance(0.4):
        kind = "tokens"
        net.pool = None
    else:
        kind = draw.one(kinds, [4, 2, 1])
    draw.note(kind)
    ragged = family in ("series", "tokens") and draw.chance(0.5)
    two = kind != "tokens" and not ragged and family != "bag" and draw.chance(0.25)
    data = _Data(draw, given, kind, dtype, ragged, two)
    classes = _finish(draw, net, data)
    return _assemble(draw, net, data, kind, classes, dtype)


class _Data:
    """The examples' tensors, by name, without labels."""

    def __init__(
        self,
        draw: Draw,
        given: dict[str, Any],
        kind: str,
        dtype: torch.dtype,
        ragged: bool,
        two: bool,
    ) -> None:
        self.draw, self.given, self.kind, self.dtype = draw, given, kind, dtype
        self.ragged, self.masks, self.pad = ragged, "", None
        self.how, self.bags = "", False
        if ragged:
            choices = ["mask", "lengths"] + (["ids"] if "tokens" in given else [])
            self.masks = draw.one(choices)
            draw.note(f"ragged by {self.masks}")
        if two:
            self.how = draw.one(["beside", "siamese", "stacked halves"], [1, 1, 2])
            draw.note(self.how)

    def x(self) -> Tensor:
        if "tokens" in self.given:
            t = self.given["tokens"]
            t = self.draw.randint(1, t) if self.ragged else t
            return torch.randint(1, VOCABULARY, (t,))
        shape = self.given["shape"]
        if self.ragged:
            shape = (self.draw.randint(1, shape[0]), *shape[1:])
        return torch.randn(shape, dtype=self.dtype)

    def example(self, classes: int, numbers: tuple[int, ...]) -> dict[str, Any]:
        x = self.x()
        found: dict[str, Any] = {"x": x}
        if self.how == "beside":
            found["other"] = torch.randn(2, dtype=self.dtype)
        elif self.how:
            found["other"] = self.x()
        if self.kind == "tokens":
            labels = torch.randint(0, classes, (len(x),))
            if len(x) > 1 and self.draw.chance(0.3):
                labels[0] = IGNORED
            found["labels"] = labels
        elif self.kind == "class":
            found["labels"] = torch.randint(0, classes, ())
        elif self.kind == "many":
            found["labels"] = torch.randint(0, 2, (classes,)).to(self.dtype)
        else:
            found["labels"] = torch.randn(numbers, dtype=self.dtype)
        return found


def _finish(draw: Draw, net: Net, data: _Data) -> int:
    """Give the net its head; the number of its outputs."""
    net.how = data.how
    net.pad = 0 if data.masks == "ids" else None
    example = data.example(2, (1,))
    was = net.train(False)
    with torch.no_grad():
        other = example.get("other")
        x = example["x"][None].clone()
        x = x.float() if x.is_floating_point() else x
        other = None if other is None else other[None].clone()
        other = other.float() if other is not None and other.is_floating_point() else other
        width = was.features(x, other).shape[-1]
    net.train(True)
    classes = draw.randint(2, 4)
    if data.kind == "regress":
        classes = draw.one([1, 1, 2])
        net.squeezes = classes == 1 and draw.chance(0.5)
    tied = data.kind == "tokens" and "tokens" in data.given and draw.chance(0.5)
    if tied and isinstance(net.stem, nn.Embedding) and width == net.stem.embedding_dim:
        draw.note("tied head")
        net.head = nn.Linear(width, VOCABULARY, bias=False)
        net.head.weight = net.stem.weight
        return VOCABULARY
    net.head = nn.Linear(width, classes, bias=draw.chance(0.8))
    return classes


def _assemble(
    draw: Draw, net: Net, data: _Data, kind: str, classes: int, dtype: torch.dtype
) -> Subject:
    numbers = () if net.squeezes else (classes,)
    train = [data.example(classes, numbers) for _ in range(draw.randint(5, 13))]
    test = [data.example(classes, numbers) for _ in range(draw.randint(1, 5))]
    train = _ordered(draw, train)
    ragged_labels = kind == "tokens"
    before = len(draw.tags)
    loss = draw_loss(draw, kind, classes, ragged_labels, dtype)
    loss_tags = draw.tags[before:]
    test_loss = draw_loss(draw, kind, classes, ragged_labels, dtype) if draw.chance(0.1) else None
    container = draw.one(["tuple", "dict"], [3, 2])
    bags = "bag" in draw.tags and not data.how and draw.chance(0.25)
    if bags:
        draw.note("bags by offsets")
        container = "tuple"
    data.bags = bags
    draw.note(container)
    make = _as_tuple if container == "tuple" else _as_dict
    model, collate, loss, test_loss = make(draw, net, data, classes, loss, test_loss)
    _liven(draw, model)
    cast_model(model, dtype)
    _flags(draw, model)
    plain = (
        container == "tuple"
        and not data.ragged
        and not data.how
        and not bags
        and not net.time_first
        and len(set(data.given)) == 1
    )
    subject = Subject(
        model, train, test, collate, loss, test_loss, "net.head", kind, classes, dtype, plain
    )
    subject.bags = bags
    subject.loss_tags = loss_tags
    subject.time_first = data.given["shape"][0] if net.time_first else 0
    _checkpoints(draw, subject)
    return subject


def _ordered(draw: Draw, train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As drawn, by class, or by length."""
    how = draw.one(["as drawn", "by label", "by length"], [2, 2, 1])
    draw.note(how)
    if how == "by label":
        return sorted(train, key=lambda e: float(e["labels"].sum()))
    return sorted(train, key=lambda e: len(e["x"])) if how == "by length" else train


def _padded(tensors: list[Tensor], value: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _columns(data: _Data, examples: list[dict[str, Any]], time_first: bool) -> dict[str, Any]:
    """The tensors of a batch, by name."""
    columns = {key: [e[key] for e in examples] for key in examples[0]}
    if data.bags:
        lengths = torch.tensor([0] + [len(x) for x in columns["x"][:-1]])
        found = {"ids": torch.cat(columns["x"]), "offsets": lengths.cumsum(0)}
        return {**found, "labels": torch.stack(columns["labels"])}
    if not data.ragged:
        found = {key: torch.stack(values) for key, values in columns.items()}
        if time_first:
            found["x"] = found["x"].transpose(0, 1).contiguous()
        return found
    found = {"x": _padded(columns["x"], 0)}
    lengths = torch.tensor([len(x) for x in columns["x"]])
    if data.masks == "lengths":
        found["mask"] = lengths
    elif data.masks == "mask":
        found["mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    labels = columns["labels"]
    tokens = data.kind == "tokens"
    found["labels"] = _padded(labels, IGNORED) if tokens else torch.stack(labels)
    return found


def _as_tuple(
    draw: Draw, net: Net, data: _Data, classes: int, loss: Loss, test_loss: Loss | None
) -> Any:
    nested = bool(data.how) and draw.chance(0.4)
    if nested:
        draw.note("nested tuple")
    series = "shape" in data.given and len(data.given["shape"]) == 2 and not data.how
    is_series = series and not data.ragged and data.kind != "tokens" and "series" in draw.tags
    net.time_first = is_series and draw.chance(0.35)
    if net.time_first:
        draw.note("time-first data")
    masked = data.ragged and data.masks != "ids"
    shell = (
        Bags
        if data.bags
        else MaskedInput
        if masked
        else Pair
        if nested
        else TwoInputs
        if data.how
        else OneInput
    )

    def collate(examples: list[dict[str, Any]]) -> Any:
        found = _columns(data, examples, net.time_first)
        labels = found.pop("labels")
        inputs = tuple(found.values())
        return ((inputs,) if nested else inputs) + (labels,)

    return shell(net), collate, loss, test_loss


def _as_dict(
    draw: Draw, net: Net, data: _Data, classes: int, loss: Loss, test_loss: Loss | None
) -> Any:
    form = draw.one(["tensor", "dict", "object"])
    own = draw.chance(0.35)
    if own:
        draw.note("own loss")
        form = "dict" if form == "tensor" else form
    extras = draw.one(["", "weights", "epoch", "ids", "names", "flag"], [5, 2, 1, 1, 1, 1])
    if data.kind != "class" and extras == "weights":
        extras = "epoch"
    first = draw.chance(0.5)
    if extras:
        draw.note(f"dict with {extras}" + (" first" if first else ""))
    weights = torch.rand(classes, dtype=data.dtype) + 0.3
    extra = {
        "weights": lambda n: weights.clone(),
        "epoch": lambda n: torch.tensor([3.0]),
        "ids": lambda n: torch.arange(n) + 100,
        "names": lambda n: [f"example {i}" for i in range(n)],
        "flag": lambda n: True,
    }

    def collate(examples: list[dict[str, Any]]) -> Any:
        found = _columns(data, examples, False)
        if not extras:
            return found
        more = {extras: extra[extras](len(examples))}
        return {**more, **found} if first else {**found, **more}

    def weighed(base: Loss) -> Loss:
        if extras != "weights" or own:
            return lambda outputs, batch: base(logits_of(outputs), batch["labels"])
        draw.note("weights in the loss")
        return lambda outputs, batch: nn.functional.cross_entropy(
            logits_of(outputs), batch["labels"], weight=batch["weights"], reduction="none"
        )

    model = Keywords(net, form, loss if own else None)
    if own:
        return model, collate, None, None
    return model, collate, weighed(loss), None if test_loss is None else weighed(test_loss)


def _liven(draw: Draw, model: nn.Module) -> None:
    """Biases, norms' weights and the like away from where they start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("gain"):
                parameter += 0.3 * torch.randn_like(parameter)


def _flags(draw: Draw, model: nn.Module) -> None:
    """Modes, frozen parameters, gradients and hooks, as a user's model has them."""
    # a checkpoint that is loaded into a merged adapter may have been saved either way
    merging = "merging" in draw.tags
    model.train(draw.chance(0.6) or merging)
    if draw.chance(0.2) and not merging:
        draw.note("mixed modes")
        for module in model.modules():
            if not list(module.children()):
                module.training = draw.chance(0.5)
    if draw.chance(0.15):
        draw.note("frozen parameters")
        parameters = [p for p in model.net.parts.parameters() if p.requires_grad]
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad_(False)
    if draw.chance(0.3):
        draw.note("has gradients")
        for parameter in list(model.parameters())[::2]:
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    if draw.chance(0.15):
        draw.note("has hooks")
        model.net.register_forward_hook(lambda module, args, output: None)
        model.net.head.register_forward_pre_hook(lambda module, args: None)
        model.net.head.register_full_backward_hook(lambda module, got, gave: None)
    if draw.chance(0.05):
        draw.note("a hook changes outputs")
        model.net.parts[0].register_forward_hook(lambda module, args, output: 1.5 * output)


def _checkpoints(draw: Draw, subject: Subject) -> None:
    """States around the model's own; one may have a head of zeros."""
    count = draw.one([1, 2, 3], [3, 2, 1])
    zero = draw.randrange(count) if draw.chance(0.15) else None
    if zero is not None:
        draw.note("zero head first" if zero == 0 else "zero head later")
    for number in range(count):
        other = copy.deepcopy(subject.model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            if number == zero:
                head = other.net.head
                # a tied head would be the embedding
                for own in (head.weight, head.bias) if "tied head" not in draw.tags else ():
                    if own is not None:
                        own.zero_()
        state = {k: v.detach().clone() for k, v in other.state_dict().items()}
        subject.states.append(state)
        subject.rates.append(round(draw.uniform(0.05, 2), 3))


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """All real numbers of a model in a precision (``model.to`` would take imaginary parts)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def single(subject: Subject, example: Any) -> Any:
    """A batch of one, on its own memory."""
    return copy.deepcopy(subject.collate([copy.deepcopy(example)]))
