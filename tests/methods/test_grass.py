"""What is GraSS's and FactGraSS's own: masks, random and learnt, and how many entries they keep.

The formula that they share with LoGra is in ``test_logra``.
"""

import math
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import oracles
import projected_oracles as projected
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES, Examples, cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import FactGraSS, GraSS
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.projected import grass
from influence_kit.projections.learnt_mask import learnt_mask

NAMES = ["mlp", "cnn", "gpt"]
METHODS = {"GraSS": GraSS, "FactGraSS": FactGraSS}
every_case = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("method", METHODS)


def make(method: str, name: str = "mlp", **changed: Any) -> Any:
    case = CASES[name]
    model = changed.pop("model", None) or case.model()
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or case.states[:1]
    arguments = {"loss_fn": case.loss, "batch_size": 4, "projection_dim": 5}
    return METHODS[method](model, data, checkpoints, **arguments | changed)


def matrices(influence: Any, name: str) -> dict[str, Tensor]:
    """By what each piece's gradient is multiplied."""
    model = CASES[name].model()
    names = [n for n, _ in model.named_parameters()]
    pieces = projected.pieces(model, names)
    maps = influence._map.maps.maps
    return {p.names[0]: projected.own_matrix(p, maps[p.names[0]]) for p in pieces}


def entries(name: str) -> dict[str, int]:
    """How many a piece has."""
    model = CASES[name].model()
    pieces = projected.pieces(model, [n for n, _ in model.named_parameters()])
    return {
        piece.names[0]: sum(model.get_parameter(own).numel() for own in piece.names)
        for piece in pieces
    }


# What a matrix of theirs is.


@both
@every_case
@pytest.mark.parametrize(("dim", "blow_up"), [(1, 1), (3, 2), (5, 4), (8, 1), (20, 3), (999, 4)])
def test_a_mask_and_then_a_sparse_projection(
    method: str, name: str, dim: int, blow_up: int
) -> None:
    """Each entry that is kept comes to one place, with a sign, times what masking costs."""
    influence = make(method, name, projection_dim=dim, blow_up=blow_up)
    sizes, found = entries(name), matrices(influence, name)
    for piece, matrix in found.items():
        p = sizes[piece]
        if p <= dim:
            assert torch.equal(matrix @ matrix.T, torch.eye(p, dtype=torch.float64)), "as it is"
            continue
        assert matrix.shape[1] == min(dim, matrix.shape[1])
        assert bool(((matrix != 0).sum(1) <= 1).all())
        kept = matrix[matrix.any(dim=1)]
        # a vector has no sides to mask
        assert len(kept) <= blow_up * dim or (method == "FactGraSS" and len(kept) == p)
        scales = kept.abs().max(dim=1).values
        assert torch.allclose(scales, scales[0].expand_as(scales), rtol=1e-12)
        # a layer that is only masked on one side, or not at all, keeps all of it
        assert math.isclose(scales[0].item(), math.sqrt(p / len(kept)), rel_tol=1e-12)
        # no place stays empty while another takes several times as many
        counts = (kept != 0).sum(0)
        assert int(counts.max() - counts.min()) <= 1


@every_case
@pytest.mark.parametrize(("dim", "blow_up"), [(3, 1), (3, 4), (6, 2)])
def test_grass_keeps_as_many_entries_as_asked_for(name: str, dim: int, blow_up: int) -> None:
    influence = make("GraSS", name, projection_dim=dim, blow_up=blow_up)
    sizes = entries(name)
    for piece, matrix in matrices(influence, name).items():
        kept = int(matrix.any(dim=1).sum())
        assert kept == (sizes[piece] if sizes[piece] <= dim else min(sizes[piece], blow_up * dim))
        assert matrix.shape[1] == min(sizes[piece], dim)


@every_case
@pytest.mark.parametrize(("dim", "blow_up"), [(3, 1), (3, 4), (6, 2)])
def test_factgrass_keeps_rows_and_columns(name: str, dim: int, blow_up: int) -> None:
    """What it keeps of a matrix is a product of some outputs with some inputs."""
    model = CASES[name].model()
    found = matrices(make("FactGraSS", name, projection_dim=dim, blow_up=blow_up), name)
    for piece in projected.pieces(model, [n for n, _ in model.named_parameters()]):
        matrix = found[piece.names[0]]
        if not piece.is_matrix:
            assert int(matrix.any(dim=1).sum()) == len(matrix), "a vector has no sides"
            continue
        o, i = piece.sizes
        kept = matrix.any(dim=1).double()
        weights = kept[: o * i - (o if len(piece.names) > 1 else 0)]
        grid = weights.view(i, o).T if piece.transposed else weights.view(o, -1)
        if len(piece.names) > 1:
            grid = torch.cat([grid, kept[-o:, None]], dim=1)
        rows, columns = grid.any(dim=1).double(), grid.any(dim=0).double()
        assert torch.equal(grid, torch.outer(rows, columns))
        if o * i > dim:
            assert rows.sum() * columns.sum() <= blow_up * dim
            assert rows.sum() >= min(o, math.isqrt(blow_up * dim))
            assert columns.sum() >= min(i, math.isqrt(blow_up * dim))


# The learnt mask.


def sample_of(n: int, most: int = 64) -> list[int]:
    """Places spread over a training set, from the first to the last."""
    return [round(k * (n - 1) / (min(n, most) - 1)) for k in range(min(n, most))]


def learnt(influence: Any) -> dict[str, Tensor]:
    return {name: unit.map.first.chosen for name, unit in influence._map.maps.maps.items()}


@every_case
def test_the_mask_is_learnt_from_gradients_at_the_first_checkpoint(name: str) -> None:
    case = CASES[name]
    own = {"projection_dim": 2, "blow_up": 2, "mask": "learnt", "checkpoints": case.checkpoints()}
    influence = make("GraSS", name, **own).fit()
    model = case.model()
    model.load_state_dict(case.states[0])
    for piece in projected.pieces(model, [n for n, _ in model.named_parameters()]):
        if sum(model.get_parameter(own).numel() for own in piece.names) <= 2:
            continue
        gradients = oracles.gradients(model, case.train, case.loss, piece.names)
        mask = influence._map.maps.maps[piece.names[0]].map.first
        assert mask.scale == 1
        assert torch.equal(mask.chosen, learnt_mask(gradients, min(4, gradients.shape[1])))


def many(n: int) -> tuple[nn.Module, TensorDataset]:
    """Data in the order of its classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    y = torch.arange(n) * 4 // n
    x = torch.randn(n, 6, dtype=torch.float64) + y[:, None]
    return model, TensorDataset(x, y)


@pytest.mark.parametrize(
    ("n", "batch_size"),
    [*product([3, 64, 65, 130], [7, 100]), (3, 1), (65, 1), (1000, 100), (1000, 2000)],
)
def test_the_mask_is_learnt_from_examples_all_over_the_data(n: int, batch_size: int) -> None:
    """Not from the first ones, which may be of one class."""
    model, data = many(n)
    own = {"projection_dim": 3, "mask": "learnt", "batch_size": batch_size}
    weights = [model.state_dict()]
    influence = make("GraSS", model=model, data=data, checkpoints=weights, **own).fit()
    chosen = sample_of(n)
    assert len(set(chosen)) == min(n, 64)
    assert chosen[-1] == n - 1
    x, y = data.tensors
    for name, mask in learnt(influence).items():
        names = [name, name.replace("weight", "bias")]
        gradients = oracles.gradients(model, (x[chosen], y[chosen]), cross_entropy, names)
        assert torch.equal(mask, learnt_mask(gradients, min(12, gradients.shape[1])))


def test_a_loader_that_drops_examples_is_sampled_where_it_reads() -> None:
    model, data = many(11)
    loader = DataLoader(data, batch_size=4, drop_last=True)
    weights = [model.state_dict()]
    own = {"projection_dim": 3, "mask": "learnt", "model": model, "checkpoints": weights}
    with pytest.warns(UserWarning, match="drop_last=True"):
        influence = make("GraSS", data=loader, **own).fit()
    first_eight = TensorDataset(*(t[:8] for t in data.tensors))
    expected = learnt(make("GraSS", data=first_eight, **own).fit())
    for name, mask in learnt(influence).items():
        assert torch.equal(mask, expected[name])


def test_the_mask_is_learnt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where gradients are not kept; anew where checkpoints are set anew, or on ``fit``."""
    calls: list[int] = []

    def counted(gradients: Tensor, k: int) -> Tensor:
        calls.append(k)
        return learnt_mask(gradients, k)

    monkeypatch.setattr("influence_kit.projections.projected.learnt_mask", counted)
    monkeypatch.setattr("influence_kit.methods.gradient_cache.resident_bytes", lambda device: 0)
    case = CASES["mlp"]
    influence = make("GraSS", mask="learnt", checkpoints=case.checkpoints())
    layers = len(influence._map.maps.maps)
    first = influence.influence(case.test)
    influence.self_influence()
    influence.damping = 0.1
    influence.influence(case.test, k=2)
    assert len(calls) == layers
    influence.checkpoints = case.checkpoints()[1:]
    influence.influence(case.test)
    assert len(calls) == 2 * layers
    influence.checkpoints = case.checkpoints()
    influence.damping = "auto"
    assert_close(influence.fit().influence(case.test), first, 1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_mask_may_be_learnt_with_gradients_off(mode: Any) -> None:
    expected = make("GraSS", mask="learnt").influence(CASES["mlp"].test)
    with mode():
        found = make("GraSS", mask="learnt").influence(CASES["mlp"].test)
    assert torch.equal(found, expected)


def test_a_learnt_mask_leaves_the_users_objects(unchanged: Any) -> None:
    model = CASES["mlp"].model()
    influence = make("GraSS", model=model, mask="learnt")
    with unchanged(model):
        influence.fit()


def test_a_loaded_mask_is_not_learnt_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"]
    own = {"mask": "learnt", "checkpoints": case.checkpoints()}
    influence = make("GraSS", **own)
    expected = influence.influence(case.test), influence.influence_by_layer(case.test)
    influence.save(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("learnt again")

    monkeypatch.setattr("influence_kit.projections.projected.learnt_mask", refuse)
    loaded = make("GraSS", **own).load(tmp_path)
    for name, mask in learnt(influence).items():
        assert torch.equal(learnt(loaded)[name], mask)
    assert_close(loaded.influence(case.test), expected[0], 1e-12)
    for layer, scores in loaded.influence_by_layer(case.test).items():
        assert_close(scores, expected[1][layer], 1e-12)


def _learn(rank: int, folder: str) -> None:
    """Learn on one of two ranks of which the second would choose other entries."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=limit)
    if rank == 1:
        grass.learnt_mask = lambda gradients, k: torch.arange(k)
    influence = make("GraSS", mask="learnt", blow_up=1)
    scores = influence.influence(CASES["mlp"].test)
    torch.save((learnt(influence), scores), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_the_mask_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_learn, args=(str(tmp_path),), nprocs=2)
    alone = make("GraSS", mask="learnt", blow_up=1)
    expected = alone.influence(CASES["mlp"].test)
    for rank in range(2):
        masks, scores = torch.load(tmp_path / f"{rank}.pt")
        assert masks.keys() == learnt(alone).keys()
        for name, mask in learnt(alone).items():
            assert not torch.equal(mask, torch.arange(len(mask))), "or it would tell nothing"
            assert torch.equal(masks[name], mask)
        assert_close(scores, expected, 1e-12)


def test_a_learnt_mask_keeps_more_than_a_random_one() -> None:
    """Of inner products of gradients that it has not seen."""
    model, data = many(300)
    x, y = data.tensors
    others = torch.arange(300)[2::5]
    own = {"projection_dim": 2, "blow_up": 2, "model": model, "data": data}
    checkpoints = [model.state_dict()]
    unseen = {
        name: oracles.gradients(
            model, (x[others], y[others]), cross_entropy, [name, name.replace("weight", "bias")]
        )
        for name in ("0.weight", "2.weight")
    }

    def kept(influence: Any) -> float:
        found = []
        for name, chosen in learnt(influence).items():
            g = unseen[name]
            pairs = torch.triu_indices(len(g), len(g), 1)
            both = [(v @ v.T)[pairs[0], pairs[1]] for v in (g, g[:, chosen])]
            found.append(float(torch.corrcoef(torch.stack(both))[0, 1]))
        return sum(found) / len(found)

    best = kept(make("GraSS", mask="learnt", checkpoints=checkpoints, **own).fit())
    random = [kept(make("GraSS", seed=seed, checkpoints=checkpoints, **own)) for seed in range(20)]
    assert best > max(random)


# Mistakes.


@both
@pytest.mark.parametrize("argument", ["projection_dim", "blow_up"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, None, "4", (2, 3)])
def test_a_number_that_cannot_be_meant(method: str, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{argument}` must be a positive int; got "):
        make(method, **{argument: value})


@pytest.mark.parametrize("value", ["learned", None, True])
def test_a_mask_that_there_is_not(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f'must be "random" or "learnt"; got {value!r}'):
        make("GraSS", mask=value)


@pytest.mark.parametrize("n", [1, 2])
def test_a_mask_of_too_few_examples(n: int) -> None:
    x, y = CASES["mlp"].train
    influence = make("GraSS", data=TensorDataset(x[:n], y[:n]), mask="learnt")
    match = f'from correlations, which {n} training examples do not have; use mask="random"'
    with pytest.raises(InvalidArgumentError, match=match):
        influence.influence(CASES["mlp"].test)


@both
def test_the_projection_is_not_a_choice(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'projection'"):
        make(method, projection="gaussian")
