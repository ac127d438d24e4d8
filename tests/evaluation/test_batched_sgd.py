"""Models that are trained at once, against ``torch.optim.SGD`` on one model at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import BatchedSGD, Retraining, half_subsets
from influence_kit.evaluation.model_folder import Job

N = 17
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(N, 2, 5, 5, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(0, 9, (N, 4), generator=GENERATOR)
Y = torch.arange(N) % 3


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).double()


class Tied(nn.Module):
    """An embedding whose weights are also those of the output, a buffer, and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.rand(4))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).mean(1) * self.scale
        return self.head(torch.tanh(self.frozen(hidden)))


RECIPES = {
    "mlp": BatchedSGD(mlp, X, Y, nn.CrossEntropyLoss(), 3, 0.2, 4, 0.9, 1e-2),
    "plain": BatchedSGD(mlp, X, Y, nn.CrossEntropyLoss(), 3, 0.2, 4),
    "cnn": BatchedSGD(cnn, IMAGES, Y, nn.CrossEntropyLoss(), 2, 0.1, 3, 0.5, 1e-2),
    "tied": BatchedSGD(Tied, TOKENS, Y, nn.CrossEntropyLoss(), 3, 0.2, 4, 0.9, 1e-2),
    "squares": BatchedSGD(mlp, X, X[:, :3], nn.MSELoss(), 3, 0.1, 4, 0.9),
}


def started(
    recipe: BatchedSGD, seed: int
) -> tuple[nn.Module, torch.Generator, torch.optim.Optimizer]:
    """The model, the generator of its batches, and torch's own optimizer."""
    torch.manual_seed(seed)
    model = recipe.make_model().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    return model, generator, optimizer


def alone(recipe: BatchedSGD, indices: Tensor, seed: int) -> nn.Module:
    """The loop that the class promises, with torch's own optimizer."""
    model, generator, optimizer = started(recipe, seed)
    for _ in range(recipe.epochs):
        order = indices[torch.randperm(len(indices), generator=generator)]
        for rows in order.split(recipe.batch_size):
            optimizer.zero_grad()
            recipe.loss_fn(model(recipe.inputs[rows]), recipe.targets[rows]).backward()
            optimizer.step()
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_models_are_those_of_the_optimizer(recipe):
    subsets = [mask.nonzero().flatten() for mask in half_subsets(N, 4, fraction=0.6)]
    seeds = [5, 5, 6, 7]
    state = torch.get_rng_state()
    found = list(recipe.train_many(subsets, seeds))
    assert torch.equal(torch.get_rng_state(), state)
    for model, indices, seed in zip(found, subsets, seeds, strict=True):
        expected = alone(recipe, indices, seed)
        torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-12)
        single = recipe(indices, seed)
        torch.testing.assert_close(weights(single), weights(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", ["auto", 1, 3])
def test_retraining_takes_subsets_of_any_sizes(at_once, tmp_path):
    recipe = replace(RECIPES["mlp"], at_once=at_once)
    subsets = torch.cat([half_subsets(N, 5), half_subsets(N, 4, 0.7), torch.ones(1, N).bool()])

    def logits(model):
        return model(X[:4])[:, 0]

    found = Retraining(recipe, tmp_path).outputs(subsets, logits, [3, 4])
    expected = Retraining(lambda *job: alone(recipe, *job)).outputs(subsets, logits, [3, 4])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(list(tmp_path.glob("*.safetensors"))) == 20
    assert torch.equal(Retraining(recipe, tmp_path).outputs(subsets, logits, [3, 4]), found)


@pytest.mark.slow
def test_processes_share_the_models(tmp_path):
    subsets = half_subsets(N, 5)
    x, y = X.clone(), Y.clone()
    recipe = BatchedSGD(lambda: nn.Linear(6, 3).double(), x, y, nn.CrossEntropyLoss(), 2, 0.1, 4)

    def logits(model):
        return model(x[:4])[:, 0]

    found = Retraining(recipe, n_jobs=2).outputs(subsets, logits)
    torch.testing.assert_close(found, Retraining(recipe).outputs(subsets, logits))


def test_groups_are_of_one_size_and_leave_no_process_idle():

    subsets = torch.cat([half_subsets(N, 5), half_subsets(N, 4, 0.7)])
    jobs = [Job.of(mask, 0) for mask in subsets]
    sizes = {}
    for processes in (1, 2):
        retraining = Retraining(replace(RECIPES["mlp"], at_once=3), n_jobs=processes)
        groups = list(retraining._groups(jobs))
        sizes[processes] = [[len(job.indices) for job in group] for group in groups]
    assert sizes[1] == [[9, 9, 9], [9, 9], [12, 12, 12], [12]]
    assert sizes[2] == [[9, 9, 9], [9, 9], [12, 12], [12, 12]]


def test_stacked_weights_have_a_row_a_model():
    subsets = [torch.arange(5), torch.arange(5, 10)]
    stacked = RECIPES["tied"].stacked(subsets, [1, 2])
    assert {name: tensor.shape[0] for name, tensor in stacked.items()} == dict.fromkeys(stacked, 2)
    assert "scale" in stacked
    assert not any(tensor.requires_grad for tensor in stacked.values())


def test_as_many_as_fit_into_memory_are_trained_at_once(monkeypatch):
    recipe = RECIPES["mlp"]
    assert recipe.at_once_of(10) == 128
    assert replace(recipe, at_once=7).at_once_of(10) == 7
    where = "influence_kit.evaluation.batched_sgd.resident_bytes"
    # a batch of 4 keeps its hidden units (and more) and their gradients; 4 times the weights
    monkeypatch.setattr(where, lambda device: 3 * (2 * 4 * 5 + 4 * 53) * 8)
    assert 1 <= recipe.at_once_of(10) < 3
    monkeypatch.setattr(where, lambda device: 1)
    assert recipe.at_once_of(10) == 1


def test_what_a_recipe_is_made_of_tells_it_from_others(tmp_path):
    recipe = RECIPES["mlp"]
    Retraining(recipe, tmp_path).checkpoints(half_subsets(N, 2))
    changes = {
        "learning_rate": 0.1,
        "targets": (Y + 1) % 3,
        "make_model": lambda: mlp(),
        "loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1),
    }
    for name, value in changes.items():
        other = replace(recipe, **{name: value})
        key = "data" if name == "targets" else name
        with pytest.raises(InvalidArgumentError, match=f"were trained otherwise: {key}: "):
            Retraining(other, tmp_path).checkpoints(half_subsets(N, 2))
    # how many are trained at once changes no model
    Retraining(replace(recipe, at_once=1), tmp_path).checkpoints(half_subsets(N, 2))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x[:, :1])


class Counting(nn.Linear):
    """A model that replaces a buffer in its forward."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
            r"training changes the buffer '1.running_mean' .as BatchNorm layers do.*Give",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1)),
            r"layer '1' is Dropout\(p=0.1, inplace=False\), which draws other .*Give",
        ),
        (Counting, "training changes the buffer 'calls'"),
        (lambda: Noisy(6, 3), r"torch.func.vmap cannot train this model: .*random.*Give `Retrain"),
        (lambda: Dropping(6, 3), r"torch.func.vmap cannot train this model: .*random"),
    ],
    ids=["batch norm", "dropout", "buffer", "noise", "dropout function"],
)
def test_models_that_cannot_be_stacked_are_refused(make_model, message):
    recipe = RECIPES["mlp"]
    with pytest.raises(InvalidArgumentError, match=f"(?s){message}"):
        replace(recipe, make_model=lambda: make_model().double())


def test_dropout_of_nothing_is_none():
    replace(RECIPES["mlp"], make_model=lambda: nn.Sequential(mlp(), nn.Dropout(0.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a positive int; got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number; got 0.0"),
        ({"batch_size": 0}, "`batch_size` must be a positive int; got 0"),
        ({"momentum": 1.0}, "`momentum` must be .* not negative and below 1; got 1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be a number that is not negative; got -1"),
        ({"at_once": 0}, '`at_once` must be a positive int or "auto"; got 0'),
        ({"targets": Y[:3]}, "got 17 inputs and 3 targets; there must be one target per input"),
        (
            {"loss_fn": nn.CrossEntropyLoss(reduction="none")},
            r"`loss_fn` returned shape \[2\] for one batch; it must return a scalar",
        ),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        replace(RECIPES["mlp"], **changes)


def test_subsets_of_different_sizes_are_not_trained_at_once():
    with pytest.raises(InvalidArgumentError, match=r"2 subsets of sizes \[2, 3\] and 2 seeds; mod"):
        RECIPES["mlp"].stacked([torch.arange(2), torch.arange(3)], [0, 1])
    with pytest.raises(InvalidArgumentError, match=r"1 subsets of sizes \[2\] and 2 seeds"):
        RECIPES["mlp"].stacked([torch.arange(2)], [0, 1])
