"""Every family on tuple, list and dict data, and with one loss that a user wrote."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cases import SHORT, Case, DictMLP, Examples, TanhMLP
from contract import METHODS, assert_close, build, plain_scores
from torch import Tensor
from torch.nn import functional as F

# the rows of the table: a method's name here, and its entry in the contract
TABLE = {
    "Explicit": "ExplicitInfluenceFunction",
    "CG": "CGInfluenceFunction",
    "LiSSA": "LiSSAInfluenceFunction",
    "Arnoldi": "ArnoldiInfluenceFunction",
    "Nystroem": "NystromInfluenceFunction",
    "DataInf": "DataInf",
    "K-FAC": "KFACInfluenceFunction",
    "EK-FAC": "EKFACInfluenceFunction",
    "RelatIF": "ExplicitInfluenceFunction, relative",
    "LoGra": "LoGra",
    "GraSS": "GraSS",
    "FactGraSS": "FactGraSS",
    "TracInCP": "TracInCP",
    "TracInCPFast": "TracInCPFast",
    "TracInCPFastRandProj": "TracInCPFastRandProj",
    "TracInCPRandProj": "TracInCPRandProj",
    "Grad-Dot": "GradDot",
    "Grad-Cos": "GradCos",
    "RPS-L2": "RepresenterPointSelection",
    "TRAK": "TRAK",
    "KNN-Shapley": "KNNShapley",
    "DVEmb": "DVEmb",
    "MAGIC": "MAGIC",
    "LESS": "LESS",
    "SOURCE": "SOURCE",
    "TrackStar": "TrackStar",
}
MLP = SHORT["mlp"]
KINDS: dict[str, Callable[[tuple[Tensor, Tensor]], Any]] = {
    "tuple": lambda batch: batch,
    "list": list,
    "dict": lambda batch: {"x": batch[0], "labels": batch[1]},
}


class Rows(Examples):
    """Examples of the kind that the batch is."""

    def __getitem__(self, i: int) -> Any:
        example = super().__getitem__(i)
        return list(example) if isinstance(self.batch, list) else example


def one_loss(outputs: Any, targets: Any) -> Tensor:
    """What a user writes once; it is only ever called with whole batches."""
    if isinstance(targets, dict):
        outputs, targets = outputs["logits"], targets["labels"]
    assert outputs.dim() == 2
    assert targets.shape == outputs.shape[:1]
    return F.cross_entropy(outputs, targets, reduction="none")


def case_of(kind: str) -> Case:
    def batch(n: int) -> Any:
        return KINDS[kind](MLP.batch(n))

    return replace(MLP, build=DictMLP if kind == "dict" else TanhMLP, batch=batch, loss=one_loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", TABLE)
def test_data_of_every_kind_give_the_same_scores(row: str, kind: str) -> None:
    method = TABLE[row]
    expected = plain_scores(method, MLP)
    case = case_of(kind)
    found = build(method, case, data=Rows(case.train)).influence(case.test, k=None)
    assert_close(found, expected, METHODS[method].close[0])


# the contract's trace for DVEmb sorts examples by their tensors
@pytest.mark.parametrize("row", [row for row in TABLE if row != "DVEmb"])
def test_a_plain_list_of_examples_with_numbers_for_labels(row: str) -> None:
    method = TABLE[row]
    expected = build(method, MLP).influence(MLP.test, k=None)
    examples = [(x, int(y)) for x, y in zip(*MLP.train, strict=True)]
    assert_close(
        build(method, MLP, data=examples).influence(MLP.test, k=None),
        expected,
        METHODS[method].close[0],
    )


def test_the_table_has_every_family() -> None:
    families = {name.partition(",")[0] for name in METHODS} - {"NaiveInfluenceFunction"}
    assert families == {method.partition(",")[0] for method in TABLE.values()}
