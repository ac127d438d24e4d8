"""Token scores of several processes are those of one."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Examples
from token_models import T, adapted, checkpoints, terms, tokens
from torch import Tensor
from torch.utils.data import DataLoader

import influence_kit as ik

TEST = tokens(3, 2, ignored=2)
SIDES = ("train", "test_positions", "test_terms")


def train() -> DataLoader[Any]:
    """Batches of several lengths: no rank sees all of them."""
    return DataLoader([tokens(3, 1), tokens(2, 4, t=3), tokens(1, 5, t=4)], batch_size=None)


def _made(cls: Any, **own: Any) -> Any:
    model = adapted()
    data = train() if "batch_size" not in own else Examples(tokens(5, 1))
    return cls(model, data, checkpoints(model), loss_fn=terms, **own)


METHODS: dict[str, Callable[[], Any]] = {
    "TracInCP": partial(_made, ik.TracInCP),
    # one batch, so that the second rank has none
    "one batch": partial(_made, ik.EKFACInfluenceFunction, damping=0.1, batch_size=5),
    "CG": partial(_made, ik.CGInfluenceFunction, damping=50.0, tol=1e-9, batch_size=3),
    "LoGra": partial(_made, ik.LoGra, projection_dim=4, damping=0.1),
}


@cache
def _results(name: str) -> dict[str, Tensor]:
    method, found = METHODS[name](), {}
    for side in SIDES:
        found[side] = method.influence(TEST, per_token=side)
    found["best"] = method.influence(TEST, k=2, per_token="train").token_scores
    if name in ("TracInCP", "LoGra"):
        lengths = [T, T, T, 3, 3, 4]
        documents = [(T * j + torch.arange(t)) // 4 for j, t in enumerate(lengths)]
        found["documents"] = method.influence(TEST, per_token="train", doc_ids=documents)
    return found


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save({name: _results(name) for name in METHODS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_token_scores_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"rank{rank}.pt").items():
            for key, expected in _results(name).items():
                scale = expected.abs().max()
                assert found[key].shape == expected.shape, (name, key)
                close = 1e-7 if name == "CG" else 1e-10
                assert (found[key] - expected).abs().max() <= close * scale, (name, key)
