"""Models that share the batches of the whole training set, and checkpoints along a run."""

from dataclasses import replace

import pytest
import torch
from test_batched_sgd import RECIPES, N, alone, started, weights
from torch import Tensor, nn

from influence_kit import TracInCP
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import BatchedSGD, Retraining, half_subsets, leave_one_out

EVERYTHING = torch.arange(N)


def with_gaps(recipe: BatchedSGD, indices: Tensor, seed: int) -> nn.Module:
    """The loop that ``same_batches`` promises, with torch's own optimizer."""
    model, generator, optimizer = started(recipe, seed)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(N, generator=generator).split(recipe.batch_size):
            optimizer.zero_grad()
            for row in rows.tolist():  # one example after the other
                if row in indices.tolist():
                    one = slice(row, row + 1)
                    loss = recipe.loss_fn(model(recipe.inputs[one]), recipe.targets[one])
                    (loss / len(rows)).backward()
                else:  # counts nothing; but parameters that are used have a gradient
                    (0 * recipe.loss_fn(model(recipe.inputs[:1]), recipe.targets[:1])).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [4, 1])
def test_an_example_that_is_lacking_counts_nothing_and_the_others_as_ever(name, size):
    shared = {"same_batches": True, "batch_size": size, "learning_rate": 0.02}
    recipe = replace(RECIPES[name], **shared)
    subsets = [EVERYTHING[place != EVERYTHING] for place in (0, 7, 16)]
    subsets.append(EVERYTHING[torch.randperm(N)][1:])
    seeds = [5, 5, 6, 5]
    for model, indices, seed in zip(recipe.train_many(subsets, seeds), subsets, seeds, strict=True):
        expected = weights(with_gaps(recipe, indices, seed))
        torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-12)
        single = weights(recipe(indices, seed))
        torch.testing.assert_close(single, expected, rtol=0, atol=1e-12)


def test_batches_of_any_size_may_be_left():
    recipe = replace(RECIPES["mlp"], same_batches=True)
    subsets = [mask.nonzero().flatten() for mask in half_subsets(N, 6, fraction=0.3)]
    found = recipe.train_many(subsets, range(6))
    for model, indices, seed in zip(found, subsets, range(6), strict=True):
        expected = weights(with_gaps(recipe, indices, seed))
        torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-12)


def test_the_model_of_all_examples_is_the_usual_one():
    recipe = RECIPES["mlp"]
    shared = replace(recipe, same_batches=True)(EVERYTHING, 3)
    torch.testing.assert_close(weights(shared), weights(recipe(EVERYTHING, 3)), rtol=0, atol=1e-14)


def test_leaving_one_out_of_the_same_batches_is_less_noisy():
    """What the seeds change in a difference, beside its size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(80, generator=generator) > 0).long()

    def losses(model):
        return nn.functional.cross_entropy(model(x[:9]), y[:9], reduction="none")

    spreads = []
    for same in (False, True):
        train = BatchedSGD(
            lambda: nn.Linear(4, 2).double(), x, y, nn.CrossEntropyLoss(), 3, 0.1, 10,
            same_batches=same,
        )  # fmt: skip
        found = leave_one_out(train, 80, losses, "loss", range(10), seeds=range(4), by_seed=True)
        spreads.append(float((found.std(dim=0) / found.mean(dim=0).abs()).median()))
    assert spreads[1] < spreads[0] / 2


def test_the_same_batches_are_another_training(tmp_path):
    recipe = RECIPES["mlp"]
    Retraining(recipe, tmp_path).checkpoints(half_subsets(N, 2))
    other = Retraining(replace(recipe, same_batches=True), tmp_path)
    with pytest.raises(InvalidArgumentError, match="same_batches: false there, true here"):
        other.checkpoints(half_subsets(N, 2))


def test_an_example_is_in_a_subset_or_not():
    recipe = replace(RECIPES["mlp"], same_batches=True)
    with pytest.raises(InvalidArgumentError, match="a subset of 3 indices has 2 different ones; "):
        recipe(torch.tensor([1, 4, 1]), 0)


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoints_are_the_models_of_shorter_runs(name):
    recipe = replace(RECIPES[name], epochs=4)
    state = torch.get_rng_state()
    found = recipe.checkpoints(EVERYTHING[3:], 5, epochs=(1, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [item["epoch"] for item in found] == [1, 3, 4]
    for item in found:
        assert item["learning_rate"] == recipe.learning_rate
        shorter = alone(replace(recipe, epochs=item["epoch"]), EVERYTHING[3:], 5)
        model = recipe.make_model()
        model.load_state_dict(item["state_dict"])
        torch.testing.assert_close(weights(model), weights(shorter), rtol=0, atol=1e-12)


def test_methods_take_the_checkpoints():
    recipe = RECIPES["plain"]
    model, x, y = recipe(EVERYTHING, 0), recipe.inputs, recipe.targets
    run = recipe.checkpoints(EVERYTHING, 0, epochs=(1, 2))
    train_set = torch.utils.data.TensorDataset(x, y)
    found = TracInCP(model, train_set, run, loss_fn=nn.CrossEntropyLoss()).influence((x, y))
    each = [
        TracInCP(model, train_set, [item], loss_fn=nn.CrossEntropyLoss()).influence((x, y))
        for item in run
    ]
    torch.testing.assert_close(found, each[0] + each[1])


@pytest.mark.parametrize("epochs", [(), (0,), (4,), (2, 1), (1, 1)])
def test_other_epochs_are_refused(epochs):
    with pytest.raises(
        InvalidArgumentError, match=r"`epochs` is .*; it must be one or more of 1 t"
    ):
        RECIPES["mlp"].checkpoints(EVERYTHING, 0, epochs)
