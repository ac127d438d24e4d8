"""Slopes sampled from the model: their covariance, and the losses for which there is one."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import slope_oracle
import torch
from cases import Examples
from contract import assert_close
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from influence_kit import EKFACInfluenceFunction, ExplicitInfluenceFunction
from influence_kit.curvature import sampled_slopes
from influence_kit.curvature.likelihoods import Normal, Sigmoid, Softmax
from influence_kit.curvature.sampled_slopes import SampledSlopes, signs
from influence_kit.data.batches import SLOPES, call_model
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss

MANY = 20_000


# The random signs.


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40, 2**63 - 1])
def test_signs_are_the_bits_of_splitmix64(seed: int) -> None:
    indices = [4, 0, 2**31]
    found = signs(seed, torch.tensor(indices), 3, 130)
    expected = [slope_oracle.signs(seed, index, 3, 130) for index in indices]
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), torch.stack(expected))


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40])
def test_signs_are_balanced_and_unrelated(seed: int) -> None:
    """Means of independent signs: beyond 4 standard errors once in 16,000."""
    found = signs(seed, torch.arange(500), 4, 70)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    means = {
        "all": found,
        "an example": found[7],
        "a position": found[:, 2],
        "a class": found[..., 65],
        "next example": found[1:] * found[:-1],
        "next position": found[:, 1:] * found[:, :-1],
        "next class": found[..., 1:] * found[..., :-1],
        "next byte": found[..., 8:] * found[..., :-8],
        "next word": found[..., 64:] * found[..., :-64],
        "next seed": found * signs(seed + 1, torch.arange(500), 4, 70),
        "next draw": found * signs(slope_oracle.seeds(seed)[1], torch.arange(500), 4, 70),
        "three": found[..., 2:] * found[..., 1:-1] * found[..., :-2],
    }
    for name, products in means.items():
        assert abs(float(products.mean())) < 4 / products.numel() ** 0.5, name


def test_a_sign_depends_on_seed_index_and_position_alone() -> None:
    whole = signs(3, torch.arange(10), 7, 70)
    assert torch.equal(signs(3, torch.tensor([4, 9, 0]), 7, 70), whole[[4, 9, 0]])
    assert torch.equal(signs(3, torch.arange(10), 2, 70), whole[:, :2])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 70
    assert not torch.equal(signs(4, torch.arange(10), 7, 70), whole)


# Their covariance.


class Fixed(nn.Module):
    """A model of the same outputs for every example (and position)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits * torch.ones_like(x, dtype=self.logits.dtype).unsqueeze(-1)


class Outputs(nn.Module):
    """A model whose outputs are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()).double())

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.one.to(logits)


LOGITS = torch.tensor([1.0, -0.5, 0.2, -2.0]).double()
INFINITE = float("inf")


def none(loss: Any) -> Loss:
    return Loss(loss, getattr(loss, "reduction", "none"), "loss_fn")


def patterns(c: int) -> Tensor:
    """All vectors of c signs, ``[2^c, 1, c]``."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=c)))[:, None]


def mean_product(slopes: Tensor) -> Tensor:
    """The mean over examples of s s^T: the covariance, if all signs are there."""
    return slopes.T @ slopes / len(slopes)


def covariance_of(logits: Tensor) -> Tensor:
    """diag(p) - p p^T; the diagonal without the difference that cancels where p is about 1."""
    p = logits.softmax(0)
    others = [torch.cat([p[:c], p[c + 1 :]]).sum() for c in range(len(p))]
    return torch.diag(p * torch.stack(others)) - (torch.outer(p, p) - torch.diag(p * p))


def assert_covariance(found: Tensor, expected: Tensor, close: float) -> None:
    """Each entry by the deviations of its two classes, however small they are."""
    deviations = expected.diagonal().sqrt()
    errors = (found - expected).abs() / torch.outer(deviations, deviations)
    possible = deviations > 0
    assert bool((errors[possible][:, possible] <= close).all())
    assert not found[~possible].any()


def surest(c: int, gap: float) -> Tensor:
    """The last class is likelier than each other one by a factor of about exp(gap)."""
    return torch.cat([0.1 * torch.arange(c - 1), torch.tensor([gap])]).double()


CERTAIN = 27.6  # the others have a probability of 1e-12
SOFTMAX = {
    **{f"{c} classes": LOGITS[:c] for c in (2, 3, 4)},
    **{f"{c} equal": torch.zeros(c).double() for c in (2, 3, 4)},
    **{f"{c} certain": surest(c, CERTAIN) for c in (2, 3, 4)},
    "beyond rounding": surest(3, 80.0),
    "one impossible": torch.tensor([0.3, -INFINITE, 0.0]).double(),
    "two impossible": torch.tensor([-INFINITE, 1.0, -INFINITE, 0.5]).double(),
    "one possible": torch.tensor([-INFINITE, 1.0]).double(),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_covariance_of_all_signs_is_that_of_the_softmax(name: str) -> None:
    logits = SOFTMAX[name]
    every = patterns(len(logits))
    labels = torch.zeros(len(every), dtype=torch.long)
    found = Softmax(-1, 0).sample(logits.repeat(len(every), 1), labels, lambda *_: every)
    expected = covariance_of(logits)
    assert_covariance(mean_product(found), expected, 1e-12)
    size = expected.diagonal().sum().sqrt()
    assert found.sum(1).abs().max() <= 1e-15 * size, "slopes add up to 0"
    if len(logits) == 2:  # no sampling error
        products = found[:, :, None] * found[:, None, :]
        torch.testing.assert_close(products, expected.expand_as(products), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_model_has_small_slopes_not_none(dtype: torch.dtype) -> None:
    """1 - p rounds to 0, and every sampled label would be the likeliest one."""
    logits = surest(3, 50.0).to(dtype).repeat(8, 1)
    assert bool((1 - logits.softmax(1)).amin() == 0)
    labels = torch.zeros(8, dtype=torch.long)
    found = Softmax(-1, 0).sample(logits, labels, lambda *_: patterns(3))
    close = 1e-5 if dtype == torch.float32 else 1e-12
    expected = covariance_of(logits[0].double())
    assert_covariance(mean_product(found.double()), expected, close)


LIKELIHOODS: dict[str, tuple[Any, Tensor]] = {
    **{
        f"softmax, {how}": (nn.CrossEntropyLoss(reduction=how), torch.zeros(16).long())
        for how in ("none", "sum", "mean")
    },
    **{
        f"sigmoid, {how}": (nn.BCEWithLogitsLoss(reduction=how), torch.zeros(16, 4).double())
        for how in ("none", "sum", "mean")
    },
    **{
        f"normal, {how}": (nn.MSELoss(reduction=how), torch.zeros(16, 4).double())
        for how in ("none", "sum", "mean")
    },
    "softmax, times 10": (
        lambda o, t: 10 * F.cross_entropy(o, t, reduction="none"),
        torch.zeros(16).long(),
    ),
    "normal, times 10": (lambda o, t: 10 * (o - t).square().sum(1), torch.zeros(16, 4).double()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_covariance_of_all_signs_is_the_hessian_of_the_loss(
    name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the outputs, in its units: the Fisher matrix has the square of a factor of a softmax."""
    made, targets = LIKELIHOODS[name]
    loss, logits = none(made), scale * LOGITS
    monkeypatch.setattr(sampled_slopes, "signs", lambda _, indices, *__: patterns(4)[indices])
    batch = (torch.zeros(16), targets)
    found = SampledSlopes(Fixed(logits), loss, 0)(torch.arange(16), batch)
    assert found[0] is batch[0]
    expected = hessian(lambda z: loss.total(z[None], (None, targets[:1]), 1), logits)
    if name.startswith(("softmax, times", "sigmoid, mean")):
        # outer products of the loss's slopes: the units of the loss twice
        expected = expected * (10 if "times" in name else 1 / 4)
    assert_close(mean_product(found[-1]), expected, 1e-12)


# Where they are.


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def of_tokens(n: int, t: int, c: int) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths, the first of them without any label that counts."""
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(n, t, c).double(), torch.randint(0, c, (n, t))
    labels[torch.arange(t) >= (torch.arange(n) % (t + 1))[:, None]] = -100
    return logits, labels


@pytest.mark.parametrize("classes_first", [False, True])
@pytest.mark.parametrize("c", [2, 5, 70])
def test_slopes_of_tokens(c: int, classes_first: bool) -> None:
    """By position; 0 where a label is ignored; the same in other batches of other widths."""
    n, t = 9, 6
    logits, labels = of_tokens(n, t, c)
    expected = slope_oracle.slopes(logits, labels, 3, range(n))

    def sampled(indices: Tensor, width: int) -> Tensor:
        z = logits[indices, :width]
        z = z.transpose(1, 2) if classes_first else z
        loss = nn.CrossEntropyLoss(reduction="none") if classes_first else token_losses
        batch = (z, labels[indices, :width])
        found = SampledSlopes(Outputs(), none(loss), 3)(indices, batch)[-1]
        return found.transpose(1, 2) if classes_first else found

    whole = sampled(torch.arange(n), t)
    assert_close(whole, expected, 1e-12)
    assert not whole[labels < 0].any()
    assert whole[labels >= 0].abs().amax(1).min() > 0
    assert whole.sum(2).abs().max() < 1e-14
    for size in (1, 4):
        parts = [sampled(rows, t) for rows in torch.arange(n).split(size)]
        assert_close(torch.cat(parts), expected, 1e-12)
    some = torch.tensor([8, 2, 3])
    assert_close(sampled(some, 3), expected[some, :3], 1e-12)


def test_slopes_of_pictures_have_the_classes_in_dimension_1() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 2, 5).double(), torch.randint(-1, 4, (3, 2, 5))
    loss = nn.CrossEntropyLoss(reduction="none", ignore_index=-1)
    found = SampledSlopes(Outputs(), none(loss), 0)(torch.arange(3), (logits, labels))[-1]
    expected = slope_oracle.slopes(logits.permute(0, 2, 3, 1), labels, 0, range(3))
    assert_close(found, expected.permute(0, 3, 1, 2), 1e-12)


def test_labels_of_bytes_have_slopes() -> None:
    batch = (torch.zeros(5), torch.zeros(5, dtype=torch.uint8))
    loss = none(lambda o, t: F.cross_entropy(o, t.long(), reduction="none"))
    found = SampledSlopes(Fixed(LOGITS), loss, 0)(torch.arange(5), batch)[-1]
    expected = slope_oracle.slopes(LOGITS.repeat(5, 1), torch.zeros(5), 0, range(5))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_slopes_of_numbers(reduction: str) -> None:
    """A random sign times the root of the curvature: of bits times the units of the loss."""
    random = torch.cat([slope_oracle.signs(0, i, 1, 4) for i in range(5)])
    targets = torch.rand(5, 4).double().round()
    batch, units = (torch.zeros(5), targets), 1 / 4 if reduction == "mean" else 1.0
    squares = SampledSlopes(Fixed(LOGITS), none(nn.MSELoss(reduction=reduction)), 0)
    found = squares(torch.arange(5), batch)[-1]
    assert_close(found, random * (2 * units) ** 0.5, 1e-12)
    bits = SampledSlopes(Fixed(LOGITS), none(nn.BCEWithLogitsLoss(reduction=reduction)), 0)
    p = LOGITS.sigmoid()
    assert_close(bits(torch.arange(5), batch)[-1], units * random * (p * (1 - p)).sqrt(), 1e-12)


def test_certain_bits_have_small_slopes_not_none() -> None:
    logits = torch.tensor([[50.0, -50.0, 3.0]])
    found = Sigmoid().sample(logits, torch.ones(1, 3), lambda *_: torch.ones(1, 1, 3))
    expected = torch.tensor([[-25.0, -25.0, 0.0]]).double().exp()
    expected[0, 2] = 1 / (1 + torch.tensor(3.0).exp()) * torch.tensor(3.0).exp().sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_large_outputs_in_half_precision_have_slopes() -> None:
    """1 added to them, by which the factor of the loss would be seen, is rounded away."""
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.tensor([[5000.0, -9000.0], [0.0, 300.0]]).to(dtype)
        far = Normal().unlikely(logits, torch.zeros(2, 2, dtype=dtype))
        assert bool((far != logits).all())
        factors = Normal().factors((logits.double() - far) * 3, logits.double(), far)
        assert_close(factors, torch.full((2, 2), 3.0).double(), 1e-12)


def test_rounding_does_not_choose_among_classes_that_are_as_likely() -> None:
    labels = torch.zeros(50, dtype=torch.long)
    sampled = SampledSlopes(Outputs(), none(nn.CrossEntropyLoss(reduction="none")), 0)

    def slopes(logits: Tensor) -> Tensor:
        return sampled(torch.arange(50), (logits, labels))[-1]

    torch.manual_seed(0)
    equal = torch.zeros(50, 5).double()
    equal[:, 2] = -1
    expected = slopes(equal)
    assert_close(expected, slope_oracle.slopes(equal, labels, 0, range(50)), 1e-12)
    noise = 1e-7 * torch.randn(50, 5).double()
    assert len((equal + noise).argmax(1).unique()) == 4
    assert_close(slopes(equal + noise), expected, 1e-6)
    assert_close(slopes((equal + noise).float()).double(), expected, 1e-6)


# Which losses have them.


class Focal(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return (1 - (-losses).exp()).square() * losses


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.huber_loss(outputs, targets, reduction="none", delta=0.3).sum(1)


def weighted_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets).square() * torch.tensor([1.0, 2.0, 1.0]).double()).sum(1)


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(outputs, targets, reduction="none")


WEIGHTS = torch.tensor([1.0, 3.0, 1.0]).double()
LABELS, NUMBERS = torch.arange(8) % 3, torch.linspace(0, 1, 24).double().view(8, 3)
REFUSED: dict[str, tuple[Any, Tensor, str]] = {
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="none"),
        LABELS,
        "it weighs labels differently",
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
        LABELS,
        "its slope differs",
    ),
    "focal": (Focal(), LABELS, "it weighs labels differently"),
    "hinge": (hinge, LABELS, "its slope differs"),
    "weights of positive labels": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="none"),
        (LABELS[:, None] > 0).repeat(1, 3).double(),
        "it weighs labels differently",
    ),
    "cross-entropy of probabilities": (
        nn.CrossEntropyLoss(reduction="none"),
        torch.full((8, 3), 1 / 3).double(),
        "it weighs labels differently|its slope differs",
    ),
    "huber": (huber, NUMBERS, "it weighs labels differently|its slope differs"),
    "absolute values": (
        nn.L1Loss(reduction="none"),
        NUMBERS,
        "it weighs labels differently|its slope differs",
    ),
    "weighted squares": (weighted_squares, NUMBERS, "it weighs outputs differently"),
    "shapes of classes": (
        lambda o, t: F.cross_entropy(o, t[:, 0], reduction="none"),
        LABELS[:, None],
        r"logits of shape \[8, 3\] do not fit integer labels of shape \[8, 1\]",
    ),
    "shapes of numbers": (
        lambda o, t: (o.sum(1) - t).square(),
        NUMBERS[:, 0],
        r"outputs of shape \[8, 3\] do not fit targets of shape \[8\]",
    ),
}


class Line(nn.Module):
    """A linear model; ``wrap`` says what it returns."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(3, 3).double(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


def fisher(model: nn.Module, train: Any, **arguments: Any) -> ExplicitInfluenceFunction:
    arguments = {"curvature": "fisher", "damping": 0.1, "batch_size": 8, **arguments}
    return ExplicitInfluenceFunction(model, Examples(train), [model.state_dict()], **arguments)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_is_no_likelihood_is_refused(name: str, batch_size: int, unchanged) -> None:
    """Whatever the size of the first batch, by which it is told."""
    loss, targets, match = REFUSED[name]
    torch.manual_seed(3)
    model = Line()
    explainer = fisher(
        model, (torch.randn(8, 3).double(), targets), loss_fn=loss, batch_size=batch_size
    )
    match = match.replace("[8", "[[18]")
    with (
        unchanged(model),
        pytest.raises(InvalidArgumentError, match=rf"no labels can be sampled .* \(({match})\)"),
    ):
        explainer.fit()


@pytest.mark.parametrize(
    ("wrap", "batch", "match"),
    [
        (
            lambda logits: (logits,),
            lambda x, y: (x, y),
            "the model returns a tuple without `logits`",
        ),
        (
            lambda logits: {"scores": logits},
            lambda x, y: (x, y),
            "the model returns a dict without `logits`",
        ),
        (
            lambda logits: {"logits": logits},
            lambda x, y: {"x": x, "class": y},
            r"none of the keys \['x', 'class'\] is a known key of labels",
        ),
    ],
)
def test_outputs_and_batches_without_known_labels_are_refused(
    wrap: Any, batch: Any, match: str
) -> None:
    def loss(outputs: Any, targets: Any) -> Tensor:
        found = outputs[0] if isinstance(outputs, tuple) else next(iter(outputs.values()))
        labels = targets["class"] if isinstance(targets, dict) else targets
        return F.cross_entropy(found, labels, reduction="none")

    class Model(Line):
        def forward(self, x: Tensor, **_: Any) -> Any:
            return super().forward(x)

    data = batch(torch.randn(8, 3).double(), LABELS)
    with pytest.raises(InvalidArgumentError, match=match):
        fisher(Model(wrap), data, loss_fn=loss).fit()


def test_labels_that_are_no_tensor_are_refused() -> None:
    model = SampledSlopes(Fixed(LOGITS), none(nn.CrossEntropyLoss(reduction="none")), 0)
    with pytest.raises(InvalidArgumentError, match="the labels are a list, not a tensor"):
        model(torch.arange(2), (torch.zeros(2), [0, 1]))


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_dict_batches_and_outputs(key: str) -> None:
    """The slopes are beside the labels; a forward that takes anything is not given them."""

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs["logits"], batch[key], reduction="none")

    seen = []

    class OfInputs(Fixed):
        def forward(self, x: Tensor, **others: Any) -> Any:
            seen.append(set(others))
            return {"logits": super().forward(x), "hidden": super().forward(x)}

    batch = {"x": torch.zeros(6), key: torch.zeros(6, dtype=torch.long), "other": torch.ones(6)}
    given, model = dict(batch), OfInputs(LOGITS)
    found = SampledSlopes(model, none(loss), 0)(torch.arange(6), batch)
    expected = slope_oracle.slopes(LOGITS.repeat(6, 1), batch[key], 0, range(6))
    assert_close(found[SLOPES], expected, 1e-12)
    assert found.keys() == batch.keys() | {SLOPES}
    assert batch.keys() == given.keys()
    assert all(found[name] is batch[name] is given[name] for name in batch)
    call_model(model, found)
    assert len(seen) > 1
    assert all(names == {key, "other"} for names in seen)


@pytest.mark.parametrize("method", [ExplicitInfluenceFunction, EKFACInfluenceFunction])
def test_scores_of_dict_batches_are_those_of_tuples(method: Any) -> None:
    """A user's forward and loss see no key that is not theirs, and the batches stay as they are."""

    class Taking(Line):
        def forward(self, x: Tensor, **others: Any) -> Any:
            assert set(others) == {"labels", "weights"}
            return super().forward(x)

    def loss(outputs: Any, batch: Any) -> Tensor:
        assert set(batch) == {"x", "labels", "weights"}
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    torch.manual_seed(0)
    x, plain = torch.randn(8, 3).double(), Line()
    model = Taking(lambda logits: SimpleNamespace(logits=logits))
    model.load_state_dict(plain.state_dict())
    data = {"x": x, "labels": LABELS, "weights": torch.ones(8)}
    own = {"curvature": "fisher", "damping": 0.1, "batch_size": 3}
    found = method(model, Examples(data), [model.state_dict()], loss_fn=loss, **own)
    wanted = method(
        plain,
        Examples((x, LABELS)),
        [plain.state_dict()],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        **own,
    )
    batch = {name: value[:4] for name, value in data.items()}
    assert_close(found.influence(batch), wanted.influence((x[:4], LABELS[:4])), 1e-10)
    assert batch.keys() == data.keys()


def test_outputs_that_are_objects_with_logits() -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, reduction="none")

    torch.manual_seed(0)
    model, x = Line(lambda logits: SimpleNamespace(logits=logits)), torch.randn(8, 3).double()
    found = SampledSlopes(model, none(loss), 0)(torch.arange(8), (x, LABELS))[-1]
    logits = model(x).logits.detach()
    assert_close(found, slope_oracle.slopes(logits, LABELS, 0, range(8)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_precision_have_slopes(dtype: torch.dtype) -> None:
    """Rounding is not taken for another loss; slopes are those of the rounded outputs."""
    close = 4 * torch.finfo(dtype).eps
    random = torch.cat([slope_oracle.signs(0, i, 1, 3) for i in range(32)])
    for seed in range(5):
        torch.manual_seed(seed)
        x, model = torch.randn(32, 3).to(dtype), nn.Linear(3, 3).to(dtype)
        z, labels = model(x).detach().double(), torch.arange(32) % 3
        p = z.sigmoid()
        for loss, targets, expected in (
            (nn.CrossEntropyLoss, labels, slope_oracle.slopes(z, labels, 0, range(32))),
            (nn.MSELoss, torch.zeros(32, 3, dtype=dtype), random * 2**0.5),
            (nn.BCEWithLogitsLoss, torch.zeros(32, 3, dtype=dtype), random * (p * (1 - p)).sqrt()),
        ):
            sampled = SampledSlopes(model, none(loss(reduction="none")), 0)
            found = sampled(torch.arange(32), (x, targets))[-1]
            assert found.dtype == torch.float32
            assert_close(found.double(), expected, close)


# Hugging Face models' own losses.


def sampled_by(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The slopes of a dict batch, and the model's logits."""
    model.eval()
    explainer = fisher(model, batch, batch_size=4, damping=1.0)
    with explainer.session():
        some = {key: value[:4] for key, value in batch.items()}
        explainer._source.prepare(some, explainer._train_loss)
        count = len(batch["labels"])
        sampled = SampledSlopes(model, explainer._train_loss, 0)
        with torch.no_grad():
            found = sampled(torch.arange(count), batch)
            logits = model(**batch).logits
    assert found.keys() == batch.keys() | {SLOPES}
    assert all(found[key] is batch[key] for key in batch)
    return found[SLOPES], logits


def test_a_language_models_slopes_are_one_position_before_the_labels() -> None:
    """Of the mean over the tokens that are predicted; the last position predicts none."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=4, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double()
    for parameter in model.parameters():
        parameter.data.mul_(20)
    ids = torch.randint(0, 4, (8, 6))
    given = ids.clone()
    for row in range(8):  # of 1 to 5 labels that count, and any first one
        given[row, 2 + row % 5 :] = -100
    given[3, 0] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": given}
    found, logits = sampled_by(model, batch)
    next_labels = torch.cat([given[:, 1:], torch.full((8, 1), -100)], dim=1)
    counts = (next_labels >= 0).sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4, 5}
    expected = slope_oracle.slopes(logits, next_labels, 0, range(8)) / counts[:, None, None]
    assert_close(found, expected, 1e-10)
    assert not found[next_labels < 0].any()
    assert not found[:, -1].any()


def test_a_classifiers_slopes() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=9,
        num_labels=4,
    )
    model = transformers.BertForSequenceClassification(config).double()
    model.classifier.weight.data.mul_(30)
    batch = {"input_ids": torch.randint(0, 4, (12, 3)), "labels": torch.arange(12) % 4}
    found, logits = sampled_by(model, batch)
    assert_close(found, slope_oracle.slopes(logits, batch["labels"], 0, range(12)), 1e-10)
    assert logits[0].softmax(0).std() > 0.02
