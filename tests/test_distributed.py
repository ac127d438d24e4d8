"""Two ranks give the scores of one."""

from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SHORT, Examples
from contract import METHODS, build
from whole_models import ROUTED, WHOLE

import influence_kit

# of batches, by the number of ranks: an uneven share, none for the last rank, and one each
SIZES = {2: (2, 20), 3: (4,)}
# models whose layers have several forms, of which no rank sees all; sums in another order turn
# eigenvectors a little
OF_WHOLE, FORMS = ("KFACInfluenceFunction", "EKFACInfluenceFunction"), ("bare", "routed", "lent")


@cache
def _results(method: str, size: int) -> dict[str, torch.Tensor]:
    case = SHORT["mlp"]
    influence = build(method, case, batch_size=size)
    best = influence.influence(case.test, k=3, proponents=False)
    found = {
        "scores": influence.influence(case.test, k=None),
        "indices": best.indices,
        "best": best.influence_scores,
    }
    if METHODS[method].has_self_influence:
        found["self"] = influence.self_influence()
        found["outer"] = influence.self_influence(outer_loop_by_checkpoints=True)
    if METHODS[method].has_self_influence and METHODS[method].has_layers:
        found["layers"] = torch.stack(list(influence.influence_by_layer(case.test).values()))
    return found


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    found = {(m, size): _results(m, size) for m in METHODS for size in SIZES[world]}
    found |= {(m, name): _results_of_whole(m, name) for m in OF_WHOLE for name in FORMS}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@cache
def _results_of_whole(method: str, name: str) -> dict[str, torch.Tensor]:
    case = (WHOLE | ROUTED)[name]
    model, train, test = case.model(), case.data(23, 1), case.data(4, 2)
    influence = getattr(influence_kit, method)(
        model,
        Examples(train),
        [model.state_dict()],
        loss_fn=case.loss,
        curvature="empirical_fisher",
        damping=1e-3,
        batch_size=6,
    )
    found = {"scores": influence.influence(test), "self": influence.self_influence()}
    assert case.forms.items() <= influence.block_forms.items()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_ranks_give_the_scores_of_one_process(tmp_path: Path, world: int) -> None:
    mp.spawn(_work, args=(world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        for (method, size), found in torch.load(tmp_path / f"rank{rank}.pt").items():
            is_whole = size in FORMS
            close = 1e-8 if is_whole else 1e-12
            results = _results_of_whole if is_whole else _results
            for key, expected in results(method, size).items():
                assert torch.allclose(found[key], expected, rtol=close, atol=1e-14), (method, key)
