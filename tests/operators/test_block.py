"""Blocks by their rows, against the matrix that these are the mean of, written out."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contract import assert_close
from matrices import normal, symmetric
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from influence_kit.curvature.outer_products import OuterProducts
from influence_kit.curvature.passes import DataSet
from influence_kit.data.loaders import as_loader
from influence_kit.errors import CurvatureError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.operators import Cholesky
from influence_kit.operators.block import Block
from influence_kit.operators.partition import Partition

CPU, P = torch.device("cpu"), 40
COUNTS = [1, 2, 7, 20, 39, 40, 60]


def graded(n: int, p: int = P, seed: int = 0) -> Tensor:
    """Rows whose matrix has eigenvalues of many sizes."""
    return normal(n, p, seed=seed) * torch.logspace(0, -2, p, dtype=torch.float64)


def written_out(rows: Tensor) -> Tensor:
    return torch.stack([torch.outer(row, row) for row in rows.double()]).mean(0)


def expected(matrix: Tensor, damping: float, vectors: Tensor) -> Tensor:
    return vectors @ torch.linalg.inv(matrix + damping * torch.eye(len(matrix)).double())


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_ways_are_the_formula(n: int, share: float, dtype: torch.dtype) -> None:
    """With damping as small as a millionth of the largest eigenvalue; rows of either precision."""
    rows = graded(n).to(dtype)
    matrix, vectors = written_out(rows), graded(5, seed=1)
    damping = share * float(torch.linalg.eigvalsh(matrix)[-1])
    solved = expected(matrix, damping, vectors)
    scores = solved @ rows.double().T
    for block in (Block(matrix), Block.of_rows(rows)):
        assert block.size == P
        found = block.inverse(damping)(vectors)
        assert found.dtype == torch.float64
        assert_close(found, solved, 1e-8)
        assert_close(found @ rows.double().T, scores, 1e-8)


@pytest.mark.parametrize("n", COUNTS)
def test_the_core_has_the_eigenvalues_and_the_trace(n: int) -> None:
    rows = graded(n)
    core, whole = Block.of_rows(rows).core, torch.linalg.eigvalsh(written_out(rows))
    assert core.shape == (n, n)
    assert core.dtype == torch.float64
    count = min(n, P)
    assert_close(torch.linalg.eigvalsh(core)[-count:], whole[-count:])
    assert core.trace().item() == pytest.approx(whole.sum().item(), rel=1e-12)


@pytest.mark.parametrize("n", [3, 20])
def test_a_small_workspace_changes_nothing(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vectors = graded(n), normal(4, P)
    whole = Block.of_rows(rows)
    monkeypatch.setattr("influence_kit.operators.block.workspace_bytes", lambda device: 60)
    pieces = Block.of_rows(rows)
    assert_close(pieces.core, whole.core, 1e-14)
    assert_close(pieces.inverse(0.1)(vectors), whole.inverse(0.1)(vectors), 1e-13)
    assert torch.equal(rows, graded(n)), "the rows came back changed"


def test_a_matrix_that_could_not_be_written_out() -> None:
    """Of 3 million rows, 72 TB. A multiple of a row is an eigenvector."""
    rows = torch.zeros(2, 3_000_000, dtype=torch.float64)
    rows[0, :4], rows[1, -4:] = 3.0, 1.0
    found = Block.of_rows(rows).inverse(0.5)(rows)
    assert_close(found, rows / torch.tensor([[36 / 2 + 0.5], [4 / 2 + 0.5]]).double(), 1e-14)


def test_blocks_of_both_kinds_side_by_side() -> None:
    rows, matrix, vectors = graded(5, 12), symmetric([3.0, 1.0, 0.5]), normal(4, 15)
    solve = Cholesky([Block.of_rows(rows), matrix], [0.2, 0.7])
    parts = [
        expected(written_out(rows), 0.2, vectors[:, :12]),
        expected(matrix, 0.7, vectors[:, 12:]),
    ]
    assert_close(solve(vectors), torch.cat(parts, dim=1), 1e-10)
    assert solve(vectors.float()).dtype == torch.float32


# What cannot be inverted.


@pytest.mark.parametrize("damping", [0.0, 1e-30])
def test_fewer_rows_than_entries_want_damping(damping: float) -> None:
    rows = graded(5)
    most = float(torch.linalg.eigvalsh(written_out(rows))[-1])
    match = f"block 'x' is singular: its 40 eigenvalues go from .* to {most:.4g}, and damping"
    with pytest.raises(CurvatureError, match=match):
        Cholesky([Block.of_rows(rows)], damping, ["x"])


def test_rows_that_repeat_want_damping_alike() -> None:
    rows = graded(3).repeat(2, 1)
    vectors = normal(2, P)
    found = Block.of_rows(rows).inverse(1e-4)(vectors)
    assert_close(found, expected(written_out(rows), 1e-4, vectors), 1e-8)
    with pytest.raises(CurvatureError, match="is singular: its 40 eigenvalues go from"):
        Block.of_rows(rows).inverse(0.0)


def test_enough_rows_want_no_damping() -> None:
    rows, vectors = normal(60, P), normal(3, P, seed=1)
    # more rows than entries: the Gram matrix is singular, and the matrix itself is not
    solve = Block(written_out(rows)).inverse(0.0)
    assert_close(solve(vectors), expected(written_out(rows), 0.0, vectors), 1e-9)


# Which of the two a data set's outer products are.


class Streamed(IterableDataset):
    """Examples that come without a length."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter([(row,) for row in self.rows])


def outer_products(data: Any, sizes: Sequence[int], size: int = 4) -> OuterProducts:
    """Of rows that are their own gradients."""
    shapes = {str(number): torch.Size([p]) for number, p in enumerate(sizes)}

    def features(places: Tensor, batch: Any) -> Gradients:
        parts = zip(shapes.items(), batch[0].split(list(sizes), dim=1), strict=True)
        forms = {name: Dense(values, shape) for (name, shape), values in parts}
        return Gradients(len(places), forms, shapes, batch[0])

    sample = torch.zeros((), dtype=torch.float64)
    partition = Partition({name: [name] for name in shapes}, shapes)
    return OuterProducts(features, DataSet(as_loader(data, size, "data"), CPU), partition, sample)


@pytest.mark.parametrize("kind", ["sized", "streamed"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_few_examples_are_kept_and_many_are_summed(kind: str, size: int) -> None:
    rows, sizes = normal(10, 3 + 19 + 20 + 21 + 50), [3, 19, 20, 21, 50]
    data = TensorDataset(rows) if kind == "sized" else Streamed(rows)
    curvature = outer_products(data, sizes, size)
    assert curvature.core_sizes == [3, 19, 10, 10, 10]
    blocks = curvature.blocks()
    assert [len(block.core) for block in blocks] == [3, 19, 10, 10, 10]
    for block, own, dense in zip(blocks, rows.split(sizes, 1), curvature.dense(), strict=True):
        assert_close(dense, written_out(own), 1e-13)
        if len(block.core) < block.size:
            assert block.rows is not None
            assert torch.equal(block.rows, own), "in the order of the data"
        vectors = normal(3, block.size, seed=2)
        assert_close(block.inverse(0.3)(vectors), expected(dense, 0.3, vectors), 1e-10)
