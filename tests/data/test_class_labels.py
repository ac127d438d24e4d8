"""Labels that name no class are refused with the example, wherever they are looked up."""

from typing import Any

import pytest
import torch
from cases import CASES, TanhMLP
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import TRAK, EKFACInfluenceFunction, TracInCP, classification_margin
from influence_kit.data.class_labels import check_labels
from influence_kit.errors import LabelError
from influence_kit.losses.loss import Loss
from influence_kit.losses.margins import one_minus_probability

MLP = CASES["mlp"]
X, Y = MLP.train
LAST = len(Y) - 1


@pytest.mark.parametrize(
    ("labels", "ignored", "which", "told"),
    [
        ([0, 2, 3], None, "example 2 of a batch of 3 has the label 3", "a negative one"),
        ([0, 2, 3], -100, "example 2 of a batch of 3 has the label 3", "the label -100"),
        ([3], None, "an example has the label 3", "a negative one"),
        ([0, -1, -100], -100, "example 1 of a batch of 3 has the label -1", "the label -100"),
        ([0, 255, 254], 255, "example 2 of a batch of 3 has the label 254", "the label 255"),
        ([[0, 1], [-100, 7]], -100, "example 1 of a batch of 2 has the label 7", "the label -100"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_a_label_that_is_no_class(
    labels: Any, ignored: int | None, which: str, told: str, dtype: torch.dtype
) -> None:
    match = f"^{which}, and there are 3 classes: labels are 0 to 2, and {told} is ignored$"
    with pytest.raises(LabelError, match=match):
        check_labels(torch.tensor(labels, dtype=dtype), 3, ignored)


@pytest.mark.parametrize(
    ("labels", "ignored"),
    [([0, 1, 2], None), ([-5, 2], None), ([-100, 2], -100), ([255, 2], 255), ([], None)],
)
def test_labels_that_are_classes(labels: list[int], ignored: int | None) -> None:
    check_labels(torch.tensor(labels, dtype=torch.int64), 3, ignored)


def test_nothing_is_looked_at_under_vmap() -> None:
    def same(label: Tensor) -> Tensor:
        check_labels(label[None], 3)
        return label

    assert torch.equal(vmap(same)(torch.tensor([0, 1])), torch.tensor([0, 1]))


@pytest.mark.parametrize("function", [classification_margin, one_minus_probability])
def test_a_margin_of_no_class(function: Any) -> None:
    with pytest.raises(LabelError, match="example 1 of a batch of 2 has the label 3, and"):
        function(torch.zeros(2, 3), torch.tensor([0, 3]))
    labels = torch.tensor([[0, 1], [2, 0], [1, 9]])
    with pytest.raises(LabelError, match="example 2 of a batch of 3 has the label 9, and"):
        function(torch.zeros(3, 2, 4), labels)


class Anew(nn.CrossEntropyLoss):
    """Of outputs ``[n, t, c]``: a subclass that shapes them anew."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs.movedim(-1, 1), targets)


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (nn.CrossEntropyLoss(), "and there are 3 classes: labels are 0 to 2, and the label -100"),
        (
            nn.CrossEntropyLoss(ignore_index=7),
            "and there are 3 classes: .* and the label 7 is ignored",
        ),
        (
            F.cross_entropy,
            "and there are 3 classes: labels are 0 to 2, and the label -100 is ignored",
        ),
        (lambda o, y: F.cross_entropy(o, y), r"which `loss_fn` cannot look up"),
        (Anew(), "which `loss_fn` cannot look up"),
    ],
)
@pytest.mark.parametrize("label", [12, -3])
def test_torchs_cross_entropy_of_no_class(loss_fn: Any, told: str, label: int) -> None:
    loss, labels = Loss(loss_fn, "mean", "loss_fn"), torch.tensor([0, 1, label, 2])
    with pytest.raises(
        LabelError, match=f"example 2 of a batch of 4 has the label {label}, {told}"
    ):
        loss.values(torch.zeros(4, 3), (labels, labels))


def test_cross_entropy_of_log_probabilities() -> None:
    loss, labels = Loss(nn.NLLLoss(), "mean", "loss_fn"), torch.tensor([0, 5])
    with pytest.raises(LabelError, match="example 1 of a batch of 2 has the label 5"):
        loss.values(torch.zeros(2, 3), (labels, labels))


@pytest.mark.parametrize(
    ("batch", "which"),
    [
        ({"x": torch.zeros(2, 3), "labels": torch.tensor([1, 8])}, "example 1 of a batch of 2"),
        ({"x": torch.zeros(2, 3), "classes": torch.tensor([1, 8])}, "an example"),
    ],
)
def test_cross_entropy_in_a_function_of_dicts(batch: Any, which: str) -> None:
    def loss_fn(outputs: Tensor, given: Any) -> Tensor:
        return F.cross_entropy(outputs, given["labels" if "labels" in given else "classes"])

    loss = Loss(loss_fn, "mean", "loss_fn")
    match = f"^{which} has the label 8, which `loss_fn` cannot look up$"
    with pytest.raises(LabelError, match=match):
        loss.values(torch.zeros(2, 3), batch)


class Bare(nn.Module):
    """A parameter without a rule, whose gradients are taken under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    "loss_fn",
    [nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y, reduction="none")],
)
def test_a_parameter_without_a_rule(loss_fn: Any) -> None:
    model, labels = Bare(), Y.clone()
    labels[LAST] = 5
    data = TensorDataset(X, labels)
    explainer = TracInCP(model, data, [model.state_dict()], loss_fn=loss_fn, batch_size=8)
    with pytest.raises(LabelError, match="example 2 of a batch of 3 has the label 5"):
        explainer.influence((X, Y))


def test_another_error_of_a_loss_is_its_own() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, [9]]

    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        Loss(loss_fn, "none", "loss_fn").values(torch.zeros(2, 3), (Y, Y))


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")])
def test_classes_of_maps_and_weights_of_labels_are_let_through(loss_fn: Any) -> None:
    outputs = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, 1, 2, -100], [2, 2, 1, 0]])
    expected = loss_fn(outputs, labels)
    assert torch.equal(Loss(loss_fn, None, "loss_fn").values(outputs, (labels, labels)), expected)
    soft = torch.rand(2, 3, 4)
    expected = loss_fn(outputs, soft)
    assert torch.equal(Loss(loss_fn, None, "loss_fn").values(outputs, (soft, soft)), expected)


MADE: dict[str, Any] = {
    "TracInCP": (TracInCP, {"loss_fn": nn.CrossEntropyLoss()}),
    "EKFAC": (EKFACInfluenceFunction, {"loss_fn": nn.CrossEntropyLoss()}),
    "TRAK": (TRAK, {"projection_dim": 4}),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("of_test", [True, False])
def test_methods_say_which_example(name: str, of_test: bool, unchanged: Any) -> None:
    cls, own = MADE[name]
    model, wrong = TanhMLP().double(), Y.clone()
    wrong[LAST] = 3
    train = TensorDataset(X, Y if of_test else wrong)
    explainer = cls(model, train, [model.state_dict()], batch_size=len(Y), **own)
    match = f"example {LAST} of a batch of {len(Y)} has the label 3, and there are 3 classes"
    with unchanged(model), pytest.raises(LabelError, match=match):
        explainer.influence((X, wrong if of_test else Y))
