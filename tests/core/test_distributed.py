"""Two ranks give the scores of one."""

from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SHORT, Examples, token_cross_entropy
from contract import METHODS, build
from whole_models import ROUTED, WHOLE

import influence_kit
from influence_kit.curvature.kronecker_fit import OBSERVATIONS

# of batches, by the number of ranks: an uneven share, none for the last rank, and one each
SIZES = {2: (2, 20), 3: (4,)}
# models whose layers have several forms, of which no rank sees all; sums in another order turn
# eigenvectors a little
OF_WHOLE, FORMS = ("KFACInfluenceFunction", "EKFACInfluenceFunction"), ("bare", "routed", "lent")
# of which damping="auto" counts observations: the first batch, that every rank sees, once
COUNTED = ("squares", "tokens")


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
    found |= {(m, name): _dampings(m, name) for m in OF_WHOLE for name in COUNTED}
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


@cache
def _dampings(method: str, name: str) -> dict[str, torch.Tensor]:
    """The damping by evidence and what is counted for it, at labels and at sampled slopes."""
    case, found = SHORT["gpt" if name == "tokens" else "mlp"], {}
    loss = _token_means if name == "tokens" else _squares
    (inputs, targets), model = case.train, case.model()
    if name == "tokens":  # of which the first batch has the shortest sequences
        lengths = 1 + torch.arange(11) // 3
        targets = targets.masked_fill(torch.arange(5) >= lengths[:, None], -100)
    else:
        targets = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)).double()
    for curvature in ("fisher", "empirical_fisher"):
        influence = getattr(influence_kit, method)(
            model,
            Examples((inputs, targets)),
            [model.state_dict()],
            loss_fn=loss,
            curvature=curvature,
            batch_size=2,
        )
        influence.fit()
        found[f"{curvature}, damping"] = torch.tensor(
            list(influence.damping_used[0].values()), dtype=torch.float64
        )
        found[f"{curvature}, counted"] = influence.fit_state[0][OBSERVATIONS]
    return found


def _token_means(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_cross_entropy(outputs, targets).sum(1) / (targets >= 0).sum(1)


def _squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_ranks_give_the_scores_of_one_process(tmp_path: Path, world: int) -> None:
    mp.spawn(_work, args=(world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        for (method, size), found in torch.load(tmp_path / f"rank{rank}.pt").items():
            close = 1e-8 if size in (*FORMS, *COUNTED) else 1e-12
            results = _results_of_whole if size in FORMS else _results
            results = _dampings if size in COUNTED else results
            for key, expected in results(method, size).items():
                assert torch.allclose(found[key], expected, rtol=close, atol=1e-14), (
                    method,
                    size,
                    key,
                )
