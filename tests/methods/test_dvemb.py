"""DVEmb is the product of all later steps written out, and what leaving an example out changes."""

import copy
from typing import Any

import oracles
import pytest
import torch
from cases import CASES
from contract import assert_close, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from influence_kit import DVEmb, TracInCP, TrainingTrace
from influence_kit.errors import InvalidArgumentError, NonFiniteError

N, M = 9, 4
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64), torch.arange(N) % 2
TEST = (torch.randn(M, 3, generator=GENERATOR, dtype=torch.float64), torch.arange(M) % 2)
DATA = TensorDataset(X, Y)
# example 8 is never seen, 2 comes twice in a batch, 0 and 5 twice in an epoch
BATCHES = [[[3, 0, 5, 1], [2, 7, 2]], [[4, 6], [0, 5, 3], [5, 0]], [[1]]]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def run(
    lr: float = 0.4,
    weight_decay: float = 0.0,
    reduction: Any = "mean",
    without: int | None = None,
    **options: Any,
) -> tuple[nn.Module, TrainingTrace]:
    """Train on ``BATCHES``; ``without`` an example, the others of its batches count as before."""
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    with TrainingTrace(model, optimizer, reduction=reduction, **options) as trace:
        for epoch, batches in enumerate(BATCHES):
            for indices in batches:
                optimizer.zero_grad()
                losses = cross_entropy(model(X[indices]), Y[indices])
                there = torch.tensor([float(i != without) for i in indices])
                share = 1 / len(indices) if reduction == "mean" else 1
                (share * (losses * there).sum()).backward()
                trace.record(indices, epoch=epoch)
                optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    return model, trace


def make(model: nn.Module, trace: Any, **options: Any) -> DVEmb:
    return DVEmb(model, DATA, **{"trace": trace, "loss_fn": nn.CrossEntropyLoss(), **options})


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"reduction": "sum"}])
@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_scores_are_the_product_of_steps_written_out(options, batch_size, unchanged):
    model, trace = run(**options)
    expected = oracles.left_out_of_steps(
        build_model(), (X, Y), TEST, cross_entropy, trace, trace.final
    )
    dvemb = make(model.train(), trace, batch_size=batch_size)
    with unchanged(model):
        scores = dvemb.influence(TEST)
        own = dvemb.self_influence()
    assert_close(scores, expected)
    assert bool((scores[:, 8] == 0).all())
    assert_close(own, dvemb.influence((X, Y)).diagonal())


@pytest.mark.parametrize(("lr", "close"), [(1e-2, 3e-2), (1e-3, 3e-3), (1e-4, 3e-4)])
@pytest.mark.parametrize("weight_decay", [0.0, 5.0])
def test_scores_are_what_training_without_an_example_gives(lr, close, weight_decay):
    """The difference is that of the curvature and of second order: it falls with the steps."""
    model, trace = run(lr, weight_decay)
    losses = []
    for without in (None, *range(N)):
        trained = run(lr, weight_decay, without=without)[0]
        losses.append(cross_entropy(trained(TEST[0]), TEST[1]).detach())
    changes = torch.stack([loss - losses[0] for loss in losses[1:]], dim=1)
    assert_close(make(model, trace).influence(TEST), changes, close)


def test_later_steps_carry_on_what_earlier_ones_did():
    """With lr * weight_decay = 1 the last step's matrix is -lr times its Fisher matrix alone."""
    model, trace = run(lr=0.5, weight_decay=2.0)
    first, last = trace[0], {**trace[5], "lr": 0.5}
    assert (first["indices"], last["indices"]) == ([3, 0, 5, 1], [1])
    scores = make(model, [first, last], checkpoints=[trace.final]).influence(TEST)
    model.load_state_dict(first["state_dict"])
    (before,) = oracles.gradients(model, (X[3:4], Y[3:4]), cross_entropy)
    model.load_state_dict(last["state_dict"])
    (gradient,) = oracles.gradients(model, (X[1:2], Y[1:2]), cross_entropy)
    model.load_state_dict(trace.final)
    tests = oracles.gradients(model, TEST, cross_entropy)
    moved = -0.5 * torch.outer(gradient, gradient) @ (0.5 / 4 * before)
    assert_close(scores[:, 3], tests @ moved)


def test_the_scores_of_epochs_add_up():
    model, trace = run()
    whole = make(model, trace).influence(TEST)
    parts = [make(model, trace, epochs=epochs).influence(TEST) for epochs in ([0], {1, 2})]
    assert_close(parts[0] + parts[1], whole)
    assert_close(make(model, trace, epochs=[0, 1, 2]).influence(TEST), whole)
    last = make(model, trace, epochs=[2]).influence(TEST)
    assert last.abs().sum(0).nonzero().flatten().tolist() == [1]


def test_embeddings_and_quantities_are_the_scores():
    model, trace = run()
    dvemb = make(model, trace)
    quantities, embeddings = dvemb.compute_intermediate_quantities(TEST), dvemb.embeddings()
    scores = dvemb.influence(TEST)
    assert embeddings.shape == (N, 26)
    assert_close(quantities @ embeddings.T, scores)
    assert_close(dvemb.influence(quantities), scores)
    assert torch.equal(dvemb.influence(quantities, k=3).indices, dvemb.influence(TEST, k=3).indices)
    assert dvemb.embeddings() is embeddings


def test_layers_are_a_choice_of_parameters():
    """The rest counts as frozen: its gradients are in no product."""
    model, trace = run()
    dvemb = make(model, trace, layers=["2"])

    class Last(nn.Module):
        def __init__(self, state):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
            self.first.requires_grad_(False)
            self.load_state_dict(state)

        def load_state_dict(self, state):
            renamed = {k.replace("0.", "first.").replace("2.", "last."): state[k] for k in state}
            return super().load_state_dict(renamed)

        def named_parameters(self):
            return ((k, p) for k, p in super().named_parameters() if k.startswith("last"))

        def forward(self, x):
            return self.last(self.first(x).tanh())

    expected = oracles.left_out_of_steps(
        Last(trace.final), (X, Y), TEST, cross_entropy, trace, trace.final
    )
    assert_close(dvemb.influence(TEST), expected)


def test_a_trace_in_a_folder_gives_the_same(tmp_path):
    model, trace = run()
    expected = make(model, trace).influence(TEST)
    run(folder=tmp_path / "trace")
    read = TrainingTrace(folder=tmp_path / "trace")
    assert_close(make(model, read).influence(TEST), expected)
    # steps by hand, with the weights at the end as a file
    torch.save(trace.final, tmp_path / "final.pt")
    by_hand = [{key: step[key] for key in ("state_dict", "indices", "lr")} for step in trace]
    dvemb = make(model, by_hand, checkpoints=[tmp_path / "final.pt"])
    assert_close(dvemb.influence(TEST), expected)


def test_a_single_step_is_tracin():
    model, trace = run()
    step = {**trace[0], "indices": [3], "lr": 0.25}
    expected = TracInCP(
        model,
        TensorDataset(X[3:4], Y[3:4]),
        [{"state_dict": step["state_dict"], "lr": 0.25}],
        loss_fn=nn.CrossEntropyLoss(),
    ).influence(TEST)
    dvemb = make(model, [step], checkpoints=[step["state_dict"]])
    assert_close(dvemb.influence(TEST)[:, 3:4], expected)


def test_a_loader_gives_its_data_set_and_collation():
    model, trace = run()
    examples = [{"x": x, "label": int(y)} for x, y in zip(X, Y, strict=True)]

    def collate(some):
        labels = torch.tensor([example["label"] for example in some])
        return torch.stack([example["x"] for example in some]), labels

    loader = DataLoader(examples, batch_size=4, collate_fn=collate)
    dvemb = DVEmb(model, loader, trace=trace, loss_fn=nn.CrossEntropyLoss())
    assert_close(dvemb.influence(TEST), make(model, trace).influence(TEST))


def test_new_weights_at_the_end_embed_nothing_again():
    model, trace = run()
    dvemb = make(model, trace)
    embeddings = dvemb.embeddings()
    dvemb.checkpoints = [build_model().state_dict()]
    tests = oracles.gradients(build_model(), TEST, cross_entropy)
    assert_close(dvemb.influence(TEST), tests @ embeddings.T)
    dvemb.checkpoints = None
    assert_close(dvemb.influence(TEST), make(model, trace).influence(TEST))


def test_progress_of_the_steps(capsys):
    model, trace = run()
    make(model, trace).embeddings(show_progress=True)
    assert "Using DVEmb to embed the training examples. Processing step" in capsys.readouterr().err


class Endless(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    "data",
    [
        Endless(),
        iter(DATA),
        DataLoader(DATA, batch_size=2, shuffle=True),
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        DataLoader(Endless(), batch_size=2),
    ],
)
def test_data_without_places(data):
    model, trace = run()
    with pytest.raises(InvalidArgumentError, match="must be a Dataset with __getitem__"):
        DVEmb(model, data, trace=trace, loss_fn=cross_entropy)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"trace": []}, "one or more; got a list without any"),
        ({"epochs": [3]}, r"epochs of the trace, which has \[0, 1, 2\]; got \[3\]"),
        ({"epochs": []}, r"`epochs` must be epochs of the trace"),
        ({"checkpoints": ["a.pt", "b.pt"]}, "`checkpoints` must be one .* got 2"),
    ],
)
def test_arguments_that_cannot_be_meant(change, match):
    model, trace = run()
    with pytest.raises(InvalidArgumentError, match=match):
        make(model, **{"trace": trace, **change})


def test_a_trace_that_does_not_fit():
    model, trace = run()
    with pytest.raises(InvalidArgumentError, match="used example 7, but `train_dataset` has 6"):
        DVEmb(model, TensorDataset(X[:6], Y[:6]), trace=trace, loss_fn=cross_entropy)
    with pytest.raises(InvalidArgumentError, match=r"the weights after training, \[state_dict\]"):
        make(model, list(trace))
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with pytest.raises(InvalidArgumentError, match="does not fit the model"):
        make(other, trace).embeddings()


def test_a_state_that_is_the_models_own(unchanged):
    model, trace = run()
    steps = [dict(trace[0]), {**trace[1], "state_dict": model.state_dict()}]
    final = [copy.deepcopy(trace.final)]
    with (
        unchanged(model),
        pytest.raises(InvalidArgumentError, match="of step 1 is the model's own memory"),
    ):
        make(model, steps, checkpoints=final).influence(TEST)


def test_questions_that_have_no_answer():
    model, trace = run()
    dvemb = make(model, trace)
    with pytest.raises(InvalidArgumentError, match="has embeddings of the examples of `train"):
        dvemb.self_influence(TEST)
    with pytest.raises(InvalidArgumentError, match=r"shape \[4, 3\]; .* have shape \[m, 26\]"):
        dvemb.influence(TEST[0])
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        dvemb.influence()


def test_what_does_not_fit_in_memory(monkeypatch):
    model, trace = run()
    dvemb = make(model, trace)
    need = 8 * 26 * (26 + N + 3 * 4)
    monkeypatch.setattr(
        "influence_kit.methods.dvemb.backward_pass.free_bytes", lambda device: need - 1
    )
    with pytest.raises(InvalidArgumentError, match=r"26 x 26 .* 9 x 26 .* by `layers`"):
        dvemb.influence(TEST)
    monkeypatch.setattr("influence_kit.methods.dvemb.backward_pass.free_bytes", lambda device: need)
    dvemb.influence(TEST)


def test_gradients_and_products_that_are_not_finite():
    model, trace = run()
    spoilt = X.clone()
    spoilt[7] = torch.nan
    data = TensorDataset(spoilt, Y)
    dvemb = DVEmb(model, data, trace=trace, loss_fn=cross_entropy)
    with pytest.raises(NonFiniteError, match="of training example 7 is NaN or infinite at step 1"):
        dvemb.influence(TEST)
    steps = [{**step, "lr": 1e60} for step in trace]
    dvemb = make(model, steps, checkpoints=[trace.final])
    with pytest.raises(NonFiniteError, match="the embeddings overflow at step 0"):
        dvemb.influence(TEST)


def test_projected_embeddings_follow_the_projected_gradients() -> None:
    """The recursion of the projected gradients, each written out by its own map's matrices."""
    case = CASES["mlp"]
    dvemb = build("DVEmb", case, projection_dim=(2, 3), seed=3)
    shapes = {name: list(shape) for name, shape in dvemb._map.shapes.items()}
    assert shapes == {"body.0.weight": [6], "body.2.weight": [6], "head.weight": [6]}

    def projected(state: dict[str, Tensor], batch: Any) -> Tensor:
        model = case.model()
        model.load_state_dict(state)
        parts = []
        for name, unit in dvemb._map.maps.maps.items():
            bias = name.replace("weight", "bias")
            weight = oracles.gradients(model, batch, case.loss, [name])
            matrix = weight.view(len(weight), unit.unit.outputs, -1)
            last = oracles.gradients(model, batch, case.loss, [bias]).unsqueeze(-1)
            left, right = unit.left.matrix(weight), unit.right.matrix(weight)
            parts.append((left.T @ torch.cat([matrix, last], dim=2) @ right).flatten(1))
        return torch.cat(parts, dim=1)

    expected = torch.zeros(case.n, 18, dtype=torch.float64)
    onward = torch.eye(18, dtype=torch.float64)
    for step in reversed(list(dvemb.trace)):
        places = list(step["indices"])
        own = projected(step["state_dict"], tuple(part[places] for part in case.train))
        rate = step["lr"]
        moved = rate / len(places) * own @ onward.T
        for place, row in zip(places, moved, strict=True):
            expected[place] += row
        fisher = own.T @ own / len(places)
        decay = rate * step.get("weight_decay", 0.0)
        onward = onward @ ((1 - decay) * torch.eye(18, dtype=torch.float64) - rate * fisher)
    assert_close(dvemb.embeddings(), expected)
    test = dvemb.compute_intermediate_quantities(case.test)
    assert_close(dvemb.influence(case.test), test @ expected.T)


def test_a_store_is_refused() -> None:
    with pytest.raises(TypeError, match=r"DVEmb.*unexpected keyword argument 'store'"):
        build("DVEmb", CASES["mlp"], store="folder")
