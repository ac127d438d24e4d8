"""Labels drawn from the model: their distribution, and the losses for which there is one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Examples
from contract import assert_close
from influence_kit.curvature.model_labels import ModelLabels, uniform
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from influence_kit import ExplicitInfluenceFunction
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss

MANY = 20_000


# The numbers behind them.


def distance_to_uniform(numbers: Tensor) -> float:
    """Kolmogorov and Smirnov's distance, times the root of the count: above 1.95 once in 1000."""
    ordered = numbers.flatten().sort()[0]
    count = len(ordered)
    steps = torch.arange(count + 1).double() / count
    largest = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    return largest * count**0.5


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40])
def test_numbers_are_uniform_and_unrelated(seed: int) -> None:
    places = torch.arange(MANY // 4)
    found = uniform(seed, places, 4)
    assert found.dtype == torch.float64
    assert 0 < float(found.min()) < float(found.max()) < 1
    assert distance_to_uniform(found) < 1.95
    # of a place alone, of a position alone
    assert distance_to_uniform(found[:, 2]) < 1.95
    assert distance_to_uniform(uniform(seed, places[5:6], MANY)) < 1.95
    centred = (found - 0.5) * 12**0.5
    pairs = {
        "next place": (centred[1:], centred[:-1]),
        "next position": (centred[:, 1:], centred[:, :-1]),
        "next seed": (centred, (uniform(seed + 1, places, 4) - 0.5) * 12**0.5),
    }
    for name, (one, other) in pairs.items():
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5, name


def test_a_number_depends_on_seed_place_and_position_alone() -> None:
    whole = uniform(3, torch.arange(10), 7)
    assert torch.equal(uniform(3, torch.tensor([4, 9, 0]), 7), whole[[4, 9, 0]])
    assert torch.equal(uniform(3, torch.arange(10), 2), whole[:, :2])
    assert len(whole.unique()) == whole.numel()
    assert not torch.equal(uniform(4, torch.arange(10), 7), whole)


# Distributions.


class Fixed(nn.Module):
    """A model of the same outputs for every example (and position)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits * torch.ones_like(x, dtype=self.logits.dtype).unsqueeze(-1)


class ClassesFirst(Fixed):
    """The same with the classes in dimension 1, as torch's losses of sequences have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


LOGITS = torch.tensor([1.0, -0.5, 0.2, -2.0]).double()


def none(loss: Any) -> Loss:
    return Loss(loss, getattr(loss, "reduction", "none"), "loss_fn")


def assert_frequencies(labels: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi squared with 3 degrees of freedom: above 16.3 once in 1000."""
    counts = torch.bincount(labels.flatten(), minlength=len(probabilities)).double()
    expected = probabilities * labels.numel()
    assert float(((counts - expected).square() / expected).sum()) < 16.3


def test_classes_are_as_frequent_as_their_probabilities() -> None:
    batch = (torch.zeros(MANY), torch.zeros(MANY, dtype=torch.uint8))
    labels = ModelLabels(Fixed(LOGITS), none(nn.CrossEntropyLoss(reduction="none")), 0)
    inputs, found = labels(torch.arange(MANY), batch)
    assert inputs is batch[0]
    assert found.dtype == torch.uint8
    assert_frequencies(found.long(), LOGITS.softmax(0))


@pytest.mark.parametrize("model", [Fixed, ClassesFirst])
def test_tokens_are_drawn_by_position_and_ignored_ones_stay(model: type[Fixed]) -> None:
    n, t = MANY // 8, 10
    given = torch.zeros(n, t, dtype=torch.long)
    given[:, 8:] = -100

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        classes_first = outputs if model is ClassesFirst else outputs.transpose(1, 2)
        return F.cross_entropy(classes_first, targets, reduction="none")

    def draw(places: Tensor, batch: Any) -> Tensor:
        return ModelLabels(model(LOGITS), none(loss), 0)(places, batch)[-1]

    found = draw(torch.arange(n), (torch.zeros(n, t), given))
    assert torch.equal(found[:, 8:], given[:, 8:])
    assert_frequencies(found[:, :8], LOGITS.softmax(0))
    assert_frequencies(found[:, 7], LOGITS.softmax(0))
    # other batches of other widths have the same labels in the same places
    narrow = draw(torch.arange(100, 150), (torch.zeros(50, 5), given[100:150, :5]))
    assert torch.equal(narrow, found[100:150, :5])


def test_the_classes_of_impossible_labels_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -float("inf"), 0.0, -float("inf")]).double()
    likelihood = ModelLabels(Fixed(LOGITS), none(nn.CrossEntropyLoss(reduction="none")), 0)
    batch = (torch.zeros(MANY), torch.zeros(MANY, dtype=torch.long))
    likelihood(torch.arange(MANY), batch)
    likelihood.model = Fixed(logits)
    found = likelihood(torch.arange(MANY), batch)[-1]
    assert set(found.tolist()) == {0, 2}


LIKELIHOODS = {
    "softmax": (nn.CrossEntropyLoss, "none", torch.zeros(MANY, dtype=torch.long)),
    "softmax, sum": (nn.CrossEntropyLoss, "sum", torch.zeros(MANY, dtype=torch.long)),
    "softmax, mean": (nn.CrossEntropyLoss, "mean", torch.zeros(MANY, dtype=torch.long)),
    "sigmoid": (nn.BCEWithLogitsLoss, "none", torch.zeros(MANY, 4)),
    "sigmoid, sum": (nn.BCEWithLogitsLoss, "sum", torch.zeros(MANY, 4)),
    "normal": (nn.MSELoss, "none", torch.zeros(MANY, 4)),
    "normal, sum": (nn.MSELoss, "sum", torch.zeros(MANY, 4)),
    "normal, mean": (nn.MSELoss, "mean", torch.zeros(MANY, 4)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_slopes_at_drawn_labels_have_the_hessian_of_the_loss_as_covariance(name: str) -> None:
    """In the outputs: so the Fisher matrix is the Gauss-Newton matrix, whatever the reduction."""
    cls, reduction, targets = LIKELIHOODS[name]
    targets = targets if targets.dim() == 1 else targets.double()
    loss, places = none(cls(reduction=reduction)), torch.arange(MANY)
    drawn = ModelLabels(Fixed(LOGITS), loss, 0)(places, (torch.zeros(MANY), targets))
    outputs = LOGITS.repeat(MANY, 1).requires_grad_()
    (slopes,) = torch.autograd.grad(loss.total(outputs, drawn, MANY), outputs)
    products = slopes[:, :, None] * slopes[:, None, :]
    expected = hessian(lambda z: loss.total(z[None], (None, targets[:1]), 1), LOGITS)
    # the mean of MANY independent draws: 16 entries within 4 standard errors
    errors = 4 * products.std(0) / MANY**0.5
    assert bool(((products.mean(0) - expected).abs() <= errors + 1e-15).all())
    assert errors.max() < 0.1 * expected.abs().max(), "the bound says nothing"


def test_the_precision_is_that_of_the_loss() -> None:
    batch = (torch.zeros(5), torch.zeros(5, 4).double())
    for reduction, precision in (("none", 2.0), ("sum", 2.0), ("mean", 0.5)):
        labels = ModelLabels(Fixed(LOGITS), none(nn.MSELoss(reduction=reduction)), 0)
        noise = labels(torch.arange(5), batch)[-1] - LOGITS
        expected = torch.special.ndtri(uniform(0, torch.arange(5), 4)) / precision**0.5
        assert_close(noise, expected)


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
    model = ModelLabels(Fixed(LOGITS), none(nn.CrossEntropyLoss(reduction="none")), 0)
    with pytest.raises(InvalidArgumentError, match="the labels are a list, not a tensor"):
        model(torch.arange(2), (torch.zeros(2), [0, 1]))


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_dict_batches_and_outputs(key: str) -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs["logits"], batch[key], reduction="none")

    model = Fixed(LOGITS)
    inner = model.forward
    model.forward = lambda x: {"logits": inner(x), "hidden": inner(x)}  # type: ignore[method-assign]
    batch = {"x": torch.zeros(6), key: torch.zeros(6, dtype=torch.long), "other": torch.ones(6)}
    plain = ModelLabels(Fixed(LOGITS), none(nn.CrossEntropyLoss(reduction="none")), 0)
    expected = plain(torch.arange(6), (batch["x"], batch[key]))[-1]

    class OfInputs(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> Any:
            return model.forward(x)

    found = ModelLabels(OfInputs(), none(loss), 0)(torch.arange(6), batch)
    assert torch.equal(found[key], expected)
    assert found["x"] is batch["x"]
    assert found.keys() == batch.keys()


def test_outputs_that_are_objects_with_logits() -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, reduction="none")

    torch.manual_seed(0)
    model, (x, y) = (
        Line(lambda logits: SimpleNamespace(logits=logits)),
        (torch.randn(8, 3), torch.arange(8) % 3),
    )
    x, plain = x.double(), Line()
    plain.load_state_dict(model.state_dict())
    plain_loss = nn.CrossEntropyLoss(reduction="none")
    found = ModelLabels(model, none(loss), 0)(torch.arange(8), (x, y))[-1]
    assert torch.equal(found, ModelLabels(plain, none(plain_loss), 0)(torch.arange(8), (x, y))[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_precision_have_labels(dtype: torch.dtype) -> None:
    """Rounding is not taken for another loss."""
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(32, 3, dtype=dtype)
        for loss, targets in (
            (nn.CrossEntropyLoss(reduction="none"), torch.arange(32) % 2),
            (nn.MSELoss(reduction="none"), torch.zeros(32, 2, dtype=dtype)),
            (nn.BCEWithLogitsLoss(reduction="none"), torch.zeros(32, 2, dtype=dtype)),
        ):
            drawn = ModelLabels(nn.Linear(3, 2).to(dtype), none(loss), 0)(
                torch.arange(32), (x, targets)
            )[-1]
            assert drawn.dtype == targets.dtype
            assert not torch.equal(drawn, targets)


# Hugging Face models' own losses.


def drawn_by(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch with drawn labels, and the model's logits."""
    model.eval()
    explainer = fisher(model, batch, batch_size=4, damping=1.0)
    with explainer.session():
        some = {key: value[:4] for key, value in batch.items()}
        explainer._source.prepare(some, explainer._train_loss)
        count = len(batch["labels"])
        labels = ModelLabels(model, explainer._train_loss, 0)
        with torch.no_grad():
            return labels(torch.arange(count), batch), model(**batch).logits


def test_a_language_models_labels_are_drawn_one_position_back() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=4, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double()
    for parameter in model.parameters():
        parameter.data.mul_(20)
    ids = torch.tensor([[0, 3, 1, 2, 0, 1]]).repeat(4000, 1)
    given = ids.clone()
    given[:, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": given}
    found, logits = drawn_by(model, batch)
    assert torch.equal(found["input_ids"], ids), "the inputs are the data's"
    assert torch.equal(found["labels"][:, 0], given[:, 0]), "nothing predicts the first"
    assert torch.equal(found["labels"][:, 4:], given[:, 4:])
    for place in range(3):
        assert_frequencies(found["labels"][:, place + 1], logits[0, place].softmax(0))
    distances = (logits[0, :-1].softmax(1) - logits[0, 1:].softmax(1)).abs().sum(1)
    assert distances.max() > 0.3, "positions that are alike tell nothing"


def test_a_classifiers_labels() -> None:
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
    ids = torch.tensor([[0, 3, 1]]).repeat(4000, 1)
    batch = {"input_ids": ids, "labels": torch.arange(4000) % 4}
    found, logits = drawn_by(model, batch)
    assert_frequencies(found["labels"], logits[0].softmax(0))
    assert logits[0].softmax(0).std() > 0.02
