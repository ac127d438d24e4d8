"""TrackStar against its formula, written out with a symmetric R^(-1/2) in float64."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import oracles
import projected_oracles as projected
import pytest
import torch
from cases import CASES, SHORT, Case, Examples
from contract import assert_close, with_adam
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from influence_kit import GradCos, LoGra, TrackStar
from influence_kit.errors import ChangedError, InvalidArgumentError

NAMES = ["mlp", "cnn", "gpt"]
every_case = pytest.mark.parametrize("name", NAMES)


def make(case: Case, **changed: Any) -> TrackStar:
    arguments = {"loss_fn": case.loss, "batch_size": 4, "projection_dim": (2, 3)} | changed
    checkpoints = arguments.pop("checkpoints", None) or with_adam(case)
    model = arguments.pop("model", None) or case.model()
    return TrackStar(model, Examples(case.train), checkpoints, **arguments)


def root_of_inverse(matrix: Tensor, groups: Sequence[Tensor], damping: Sequence[float]) -> Tensor:
    """(R + damping)^(-1/2), block by block."""
    found = torch.zeros_like(matrix)
    for group, value in zip(groups, damping, strict=True):
        values, vectors = torch.linalg.eigh(matrix[group[:, None], group])
        found[group[:, None], group] = vectors @ ((values + value) ** -0.5).diag() @ vectors.T
    return found


def formula(
    star: TrackStar,
    case: Case,
    checkpoints: Sequence[Mapping[str, Any]],
    scales: Sequence[Tensor],
    evaluation: Any = None,
    mixing: float = 0.0,
    blocks: Any = "layer",
) -> Tensor:
    """The scores, given the random matrices, the damping and 1 / (sqrt(V) + eps)."""
    model, total = case.model(), 0.0
    names = [n for n, _ in model.named_parameters()]
    columns = projected.written_out(model, names, star._map.maps.maps)
    matrix = torch.cat(list(columns.values()), dim=1)
    groups = projected.groups_of(columns, blocks)
    for number, checkpoint in enumerate(checkpoints):
        model.load_state_dict(checkpoint["state_dict"])

        def features(batch: Any, scale: Tensor = scales[number]) -> Tensor:
            return (oracles.gradients(model, batch, case.loss) * scale) @ matrix

        h, g = features(case.test), features(case.train)
        r = projected.curvature(g, list(groups.values()))
        if evaluation is not None:
            e = features(evaluation)
            r = mixing * projected.curvature(e, list(groups.values())) + (1 - mixing) * r
        used = star.damping_used[number]
        root = root_of_inverse(r, list(groups.values()), [used[block] for block in groups])
        h, g = (side / side.norm(dim=1, keepdim=True) for side in (h @ root, g @ root))
        total = total + h @ g.T
    return total / len(checkpoints)


def adams(case: Case, checkpoints: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [oracles.adam_scales(case.model(), checkpoint) for checkpoint in checkpoints]


@every_case
@pytest.mark.parametrize("damping", ["auto", 1e-3])
def test_scores_are_the_formula(name: str, damping: Any) -> None:
    case = SHORT[name]
    star, saved = make(case, damping=damping), with_adam(case)
    found = star.influence(case.test)
    assert_close(found, formula(star, case, saved, adams(case, saved)), 1e-8)
    assert (found.abs() <= 1 + 1e-9).all()


@every_case
@pytest.mark.parametrize("blocks", ["layer", "full"])
def test_evaluation_examples_have_their_share(name: str, blocks: str) -> None:
    """Their gradients have the share `mixing`; 0.9 unless given."""
    case = SHORT[name]
    saved = with_adam(case)
    queries = Examples(case.test)
    for share, given in ((0.9, {}), (0.3, {"mixing": 0.3}), (0.0, {"mixing": 0.0})):
        star = make(case, eval_dataset=queries, blocks=blocks, **given)
        found = star.influence(case.test)
        expected = formula(star, case, saved, adams(case, saved), case.test, share, blocks)
        assert_close(found, expected, 1e-8)


def test_more_entries_than_examples() -> None:
    """With more than twice as many entries as examples, no R is formed."""
    case = SHORT["cnn"]
    saved = with_adam(case)
    one = tuple(x[:2] for x in case.train)
    given = {"projection_dim": 50, "blocks": "full", "mixing": 0.7}
    star = make(case, eval_dataset=Examples(one), **given)
    found = star.influence(case.test)
    assert "rows.0" in star.fit_state[0]
    assert_close(found, formula(star, case, saved, adams(case, saved), one, 0.7, "full"), 1e-8)


def test_evaluation_gradients_are_those_of_the_test_loss() -> None:
    case = SHORT["mlp"]
    doubled = lambda outputs, targets: 2 * case.loss(outputs, targets)  # noqa: E731
    queries = {"eval_dataset": Examples(case.test), "mixing": 0.5, "damping": 1e-3}
    found = make(case, test_loss_fn=doubled, **queries).influence(case.test)
    # R_eval is four times as large: of shares .5 and .5, 4/5 and 1/5
    shared = queries | {"mixing": 0.8, "damping": 1e-3 / 2.5}
    assert_close(found, make(case, **shared).influence(case.test), 1e-8)


@every_case
def test_without_second_moments(name: str) -> None:
    """Plain gradients on request: any checkpoint will do."""
    case = SHORT[name]
    plain = case.checkpoints()
    star = make(case, checkpoints=plain, optimizer=None)
    ones = [torch.ones(1, dtype=torch.float64)] * len(plain)
    assert_close(star.influence(case.test), formula(star, case, plain, ones), 1e-8)
    whole = make(case, checkpoints=plain[:1], optimizer=None, projection="identity", damping=1e9)
    cosines = GradCos(case.model(), Examples(case.train), plain[:1], loss_fn=case.loss)
    assert_close(whole.influence(case.test), cosines.influence(case.test), 1e-6)


class Factored(nn.Module):
    """Matrices, vectors and a tensor of three dimensions, as Adafactor tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def adafactor_scales(kind: str, held: Mapping[str, Any], shapes: Sequence[torch.Size]) -> Tensor:
    """1 / sqrt(v), v the outer product of the means of rows and columns over their common mean."""
    row, column, whole = {
        "torch": ("row_var", "col_var", "variance"),
        "transformers": ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
    }[kind]
    pieces = []
    for number, shape in enumerate(shapes):
        own = held["state"][number]
        if len(shape) == 1:
            pieces.append(own[whole].double() ** -0.5)
            continue
        rows = own[row].double().reshape(-1, shape[-2])
        columns = own[column].double().reshape(-1, shape[-1])
        v = [torch.outer(a, b) / a.mean() for a, b in zip(rows, columns, strict=True)]
        pieces.append(torch.stack(v).flatten() ** -0.5)
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_adafactor(kind: str) -> None:
    from transformers.optimization import Adafactor

    torch.manual_seed(0)
    model = Factored().double()
    x, y = torch.randn(9, 2, 3, dtype=torch.float64), torch.arange(9) % 2
    if kind == "torch":
        optimizer: Any = torch.optim.Adafactor(model.parameters())
    else:
        optimizer = Adafactor(model.parameters(), lr=0.01, relative_step=False)
    loss = nn.CrossEntropyLoss(reduction="none")
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).mean().backward()
        optimizer.step()
    saved = copy.deepcopy({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()})
    given = {"loss_fn": loss, "projection": "identity", "damping": 1e-3}
    star = TrackStar(model, TensorDataset(x, y), [saved], optimizer="adafactor", **given)
    found = star.influence((x[:4], y[:4]))
    shapes = [p.shape for p in model.parameters()]
    g = oracles.gradients(model, (x, y), loss)
    u = g * adafactor_scales(kind, saved["optimizer"], shapes)
    # conv: 12 weights and 3 biases; head: 12 and 2
    r = projected.curvature(u, [torch.arange(15), torch.arange(15, 29)])
    root = root_of_inverse(r, [torch.arange(29)], [1e-3])
    w = u @ root
    w = w / w.norm(dim=1, keepdim=True)
    assert_close(found, w[:4] @ w.T, 1e-8)
    with pytest.raises(InvalidArgumentError, match=r"is not torch\.optim\.Adam or AdamW"):
        TrackStar(model, TensorDataset(x, y), [saved], **given).influence((x[:4], y[:4]))


def test_entries_that_the_run_left_alone_are_left_out() -> None:
    """A parameter without a state and an entry with V = 0: as if they were frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    silent = x * torch.tensor([1.0, 1.0, 0.0])
    nn.functional.cross_entropy(model(silent), y).backward()
    model[2].bias.grad = None
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    given = {"loss_fn": nn.CrossEntropyLoss(), "projection": "identity", "damping": 1e-3}
    star = TrackStar(model, TensorDataset(x, y), [saved], **given)
    found = star.influence((x, y))
    g = oracles.gradients(model, (x, y), nn.CrossEntropyLoss(reduction="none"))
    u = g * oracles.adam_scales(model, saved)
    kept = torch.tensor([i % 3 != 2 for i in range(12)] + [True] * 12 + [False] * 2)
    assert bool((u[:, ~kept] == 0).all())
    assert bool((u[:, kept] != 0).all())
    r = projected.curvature(u, [torch.arange(16), torch.arange(16, 26)])
    w = u @ root_of_inverse(r, [torch.arange(26)], [1e-3])
    w = w / w.norm(dim=1, keepdim=True)
    assert_close(found, w @ w.T, 1e-8)


def test_another_optimizer_state_is_noticed() -> None:
    case = SHORT["mlp"]
    saved = with_adam(case)
    star = make(case, checkpoints=saved)
    before = star.influence(case.test)
    saved[0]["optimizer"]["state"][0]["exp_avg_sq"].mul_(4)
    with pytest.raises(ChangedError, match=r"`checkpoints` is not what it was .*optimizer of ch"):
        star.influence(case.test)
    star.forget()
    after = star.influence(case.test)
    assert_close(after, make(case, checkpoints=saved).influence(case.test))
    assert not torch.allclose(before, after)


def test_another_file_is_noticed(tmp_path: Any) -> None:
    case = SHORT["mlp"]
    saved = with_adam(case)
    paths = [str(tmp_path / f"{number}.pt") for number in range(len(saved))]
    for path, held in zip(paths, saved, strict=True):
        torch.save(held, path)
    star = make(case, checkpoints=paths)
    assert_close(star.influence(case.test), make(case).influence(case.test))
    saved[0]["optimizer"]["state"][0]["exp_avg_sq"] = torch.rand(6, 4, dtype=torch.float64)
    torch.save(saved[0], paths[0])
    with pytest.raises(ChangedError, match="the optimizer of checkpoint 0"):
        star.influence(case.test)


def test_other_evaluation_examples_are_noticed(tmp_path: Any) -> None:
    case = SHORT["mlp"]
    x, y = case.test[0].clone(), case.test[1]
    star = make(case, eval_dataset=TensorDataset(x, y))
    expected = star.influence(case.test)
    star.save(tmp_path)
    same = make(case, eval_dataset=TensorDataset(x.clone(), y)).load(tmp_path)
    assert_close(same.influence(case.test), expected)
    x[0] += 1
    with pytest.raises(ChangedError, match="`eval_dataset` is not what it was"):
        star.influence(case.test)
    other = make(case, eval_dataset=TensorDataset(x, y))
    with pytest.raises(InvalidArgumentError, match="evaluation examples: "):
        other.load(tmp_path)
    with pytest.raises(InvalidArgumentError, match="mixing: "):
        make(case, eval_dataset=TensorDataset(x, y), mixing=0.5).load(tmp_path)


def test_errors() -> None:
    case = CASES["mlp"]
    refused = [
        ({"optimizer": "sgd"}, '`optimizer` must be "adam", "adafactor" or None; got .sgd'),
        ({"mixing": 0.5}, "`mixing` is the share of `eval_dataset`, which is None; got 0.5"),
        ({"mixing": 2, "eval_dataset": Examples(case.test)}, "`mixing` must be"),
        ({"parameter_names": 3}, "`parameter_names` must be a list"),
    ]
    for given, match in refused:
        with pytest.raises(InvalidArgumentError, match=match):
            make(case, **given)
    plain = make(case, checkpoints=case.checkpoints())
    with pytest.raises(InvalidArgumentError, match="holds the states of 0 optimizers, and one is"):
        plain.influence(case.test)
    wrong = make(case, optimizer="adafactor")
    with pytest.raises(InvalidArgumentError, match=r"not torch\.optim\.Adafactor or that of"):
        wrong.influence(case.test)
    with pytest.raises(NotImplementedError, match="TrackStar divides scores by the norm of the tr"):
        make(case).perturbation_influence(case.test)


def test_a_parameter_that_the_optimizer_does_not_have() -> None:
    case = SHORT["mlp"]
    model = case.model()
    model.head.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    case.loss(model(case.train[0]), case.train[1]).sum().backward()
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(True)
    given = {"model": model, "checkpoints": [saved], "parameter_names": names}
    with pytest.raises(InvalidArgumentError, match=r"does not have the parameter 'head.weight': i"):
        make(case, **given).influence(case.test)
    found = make(case, **given, layers=["body"]).influence(case.test)
    assert found.shape == (case.m, case.n)


def test_the_projection_is_that_of_logra() -> None:
    """One random matrix per layer, by its name and the seed."""
    case = SHORT["mlp"]
    logra = LoGra(
        case.model(), Examples(case.train), case.states, loss_fn=case.loss, projection_dim=(2, 3)
    )
    ours, theirs = make(case)._map.maps.maps, logra._map.maps.maps
    like = torch.zeros((), dtype=torch.float64)
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name].left.matrix(like), theirs[name].left.matrix(like))
