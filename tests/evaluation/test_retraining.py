"""Retraining: every model once; the same numbers from disk, from processes, after a kill."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import GradDot
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation import Retraining, half_subsets

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SUBSETS = half_subsets(12, 4)
SEEDS = [3, 8]


class Trainer:
    """A training function that counts its calls: the mean of its inputs, noise of the seed."""

    def __init__(self, fail_after=None):
        self.calls, self.fail_after = [], fail_after

    def __call__(self, indices, seed):
        if len(self.calls) == self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((indices.tolist(), seed))
        model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).double()
        with torch.no_grad():
            model[0].weight.add_(X[indices].mean(0))
        return model


def measure(model):
    return model(X[:5])[:, 0]


def expected():
    """What is to be measured, written out: ``[S, R, m]``."""
    rows = []
    for mask in SUBSETS:
        for seed in SEEDS:
            torch.manual_seed(seed)
            layer = nn.Linear(3, 1).double()
            rows.append((X[:5] @ (layer.weight + X[mask].mean(0)).T + layer.bias)[:, 0].detach())
    return torch.stack(rows).view(4, 2, 5)


def kept(**arguments):
    """A ``Retraining`` whose models are those of any ``Trainer``."""
    return Retraining(label="mean", **arguments)


def test_outputs_are_those_of_each_model_in_evaluation_mode():
    trainer = Trainer()
    state = torch.get_rng_state()
    found = Retraining(trainer).outputs(SUBSETS, measure, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, expected(), rtol=0, atol=1e-14)
    assert found.dtype == torch.float64
    assert trainer.calls[1] == (torch.nonzero(SUBSETS[0]).flatten().tolist(), 8)
    assert len(trainer.calls) == 8


def test_paired_outputs_take_a_seed_each_and_train_no_model_twice():
    trainer = Trainer()
    subsets = SUBSETS[[0, 1, 0]]
    found = Retraining(trainer).paired_outputs(subsets, measure, [3, 8, 3])
    torch.testing.assert_close(found, expected()[[0, 1, 0], [0, 1, 0]], rtol=0, atol=1e-14)
    assert len(trainer.calls) == 2


def test_finished_models_come_from_disk(tmp_path):
    trainer = Trainer()
    retraining = kept(train_fn=trainer, folder=tmp_path)
    found = retraining.outputs(SUBSETS[:3], measure, SEEDS)
    assert len(trainer.calls) == 6
    again = Trainer()
    # a different measure, and one more subset
    more = kept(train_fn=again, folder=tmp_path).outputs(SUBSETS, lambda m: 2 * measure(m), SEEDS)
    assert torch.equal(more[:3], 2 * found)
    torch.testing.assert_close(more, 2 * expected(), rtol=0, atol=1e-14)
    assert len(again.calls) == 2
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept(train_fn=Trainer(fail_after=3), folder=tmp_path).outputs(SUBSETS, measure, SEEDS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    trainer = Trainer()
    found = kept(train_fn=trainer, folder=tmp_path).outputs(SUBSETS, measure, SEEDS)
    assert len(trainer.calls) == 5
    assert torch.equal(found, Retraining(Trainer()).outputs(SUBSETS, measure, SEEDS))


KILLED = """
import os, signal, torch
from torch import nn
from influence_kit.evaluation import Retraining

calls = []

def train_fn(indices, seed):
    calls.append(seed)
    if len(calls) == {stop}:
        os.kill(os.getpid(), signal.SIGKILL)
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, float(indices.sum()))
    return model

subsets = torch.eye(4).bool()
retraining = Retraining(train_fn, {folder!r}, label="sum")
print(retraining.outputs(subsets, lambda model: model.weight[0]).flatten().tolist(), len(calls))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tmp_path):
    def run(stop):
        code = KILLED.format(stop=stop, folder=str(tmp_path))
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run(stop=3).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert run(stop=9).stdout.split("\n")[0] == "[0.0, 1.0, 2.0, 3.0] 2"


def test_half_written_files_are_not_models(tmp_path):
    (file,) = kept(train_fn=Trainer(), folder=tmp_path).checkpoints(SUBSETS[:1], [3])
    file.rename(tmp_path / f".influence_kit-{'01' * 16}.part")
    trainer = Trainer()
    found = kept(train_fn=trainer, folder=tmp_path).outputs(SUBSETS[:1], measure, [3])
    assert len(trainer.calls) == 1
    torch.testing.assert_close(found, expected()[:1, :1], rtol=0, atol=1e-14)
    assert not list(tmp_path.glob(".*.part"))


def test_a_model_to_load_into_saves_a_training(tmp_path):
    kept(train_fn=Trainer(), folder=tmp_path).outputs(SUBSETS, measure, SEEDS)
    without, given = Trainer(), Trainer()
    found = kept(train_fn=without, folder=tmp_path).outputs(SUBSETS, measure, SEEDS)
    assert len(without.calls) == 1
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).double()
    weight = model[0].weight.clone()
    own = kept(train_fn=given, folder=tmp_path, model=model).outputs(SUBSETS, measure, SEEDS)
    assert given.calls == []
    assert torch.equal(own, found)
    assert torch.equal(model[0].weight, weight)
    assert model.training


def test_a_function_may_return_one_model_again_and_again(tmp_path):
    model = nn.Linear(1, 1, bias=False)

    def train_fn(indices, seed):
        nn.init.constant_(model.weight, float(indices.sum()))
        return model

    def weights(model):
        return model.weight[0]

    whole = Retraining(train_fn).outputs(SUBSETS, weights)
    Retraining(train_fn, tmp_path).outputs(SUBSETS[:2], weights)
    assert torch.equal(Retraining(train_fn, tmp_path).outputs(SUBSETS, weights), whole)
    assert torch.equal(whole.flatten(), torch.stack([m.nonzero().sum() for m in SUBSETS]).double())


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_processes_give_the_same(tmp_path, keep):
    data = X.clone()

    def train_fn(indices, seed):
        model = nn.Linear(3, 1).double()
        with torch.no_grad():
            model.weight.add_(data[indices].mean(0))
        return model

    def outputs(model):
        return model(data[:5])[:, 0]

    folder = tmp_path if keep else None
    retraining = Retraining(train_fn, folder, n_jobs=2)
    if keep:
        retraining.outputs(SUBSETS[1:2], outputs, SEEDS)
    found = retraining.outputs(SUBSETS, outputs, SEEDS)
    torch.testing.assert_close(found, expected(), rtol=0, atol=1e-14)
    assert len(list(tmp_path.glob("*.safetensors"))) == 8 * keep


def test_files_are_checkpoints_of_methods(tmp_path):
    retraining = kept(train_fn=Trainer(), folder=tmp_path)
    files = retraining.checkpoints(SUBSETS, SEEDS)
    assert len(files) == 8
    model = Trainer()(torch.arange(3), 0)
    method = GradDot(model, TensorDataset(X, X[:, :1]), files, loss_fn=nn.MSELoss())
    assert method.influence((X, X[:, :1])).shape == (12, 12)
    trainer = Trainer()
    assert kept(train_fn=trainer, folder=tmp_path).checkpoints(SUBSETS, SEEDS) == files
    assert trainer.calls == []


def test_a_folder_says_what_it_holds(tmp_path):
    (file,) = kept(train_fn=Trainer(), folder=tmp_path).checkpoints(SUBSETS[:1], [3])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["holds"], manifest["format"]) == ("models", 2)
    assert manifest["description"] == {"examples": 12, "label": "mean"}
    assert sorted(load_file(file)) == ["0.bias", "0.weight"]
    assert file.name.endswith("-seed3.safetensors")


def test_tied_weights_are_kept(tmp_path):
    def train_fn(indices, seed):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        return model

    def both(model):
        return torch.cat([model[0].weight.flatten(), model[1].weight.flatten()])

    first = Retraining(train_fn, tmp_path).outputs(SUBSETS, both)
    assert torch.equal(Retraining(train_fn, tmp_path).outputs(SUBSETS, both), first)


def one(rate, indices, seed):
    return nn.Linear(3, 1)


def other(rate, indices, seed):
    return nn.Linear(3, 1, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_fn": partial(other, 0.1)}, r"train_fn: .*\"one\".* there, .*\"other\".* here"),
        ({"train_fn": partial(one, 0.2)}, r"\"argument 0\": 0.1.* there, .*\"argument 0\": 0.2"),
        ({"label": "mine"}, r"label: null there, \"mine\" here; train_fn: .* there, null here"),
        (
            {"subsets": half_subsets(9, 2)},
            r"examples: 12 there, 9 here. Use another folder; or, wh",
        ),
    ],
    ids=["function", "setting", "label", "examples"],
)
def test_a_folder_of_something_else_is_refused(tmp_path, change, message):
    Retraining(partial(one, 0.1), tmp_path).checkpoints(SUBSETS)
    given = {"train_fn": partial(one, 0.1), "subsets": SUBSETS, **change}
    subsets = given.pop("subsets")
    with pytest.raises(InvalidArgumentError, match=f"were trained otherwise: .*{message}"):
        Retraining(folder=tmp_path, **given).checkpoints(subsets)


def damage(folder: Path, kind: str) -> None:
    (file,) = folder.glob("*.safetensors")
    if kind == "file":
        file.write_bytes(b"nothing")
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "file",
            r"the model of 6 examples and seed 0 \('\w+-seed0'\) cannot be read from .*remove",
        ),
        ("manifest", r"manifest.json cannot be read .*; delete the folder if nothing in"),
    ],
)
def test_a_damaged_folder_is_an_error(tmp_path, kind, message):
    retraining = kept(train_fn=Trainer(), folder=tmp_path)
    retraining.checkpoints(SUBSETS[:1])
    damage(tmp_path, kind)
    with pytest.raises(InvalidArgumentError, match=message):
        retraining.outputs(SUBSETS[:1], measure)


def test_a_model_that_does_not_fit_is_an_error(tmp_path):
    kept(train_fn=Trainer(), folder=tmp_path).checkpoints(SUBSETS)
    retraining = kept(train_fn=Trainer(), folder=tmp_path, model=nn.Linear(3, 1))
    with pytest.raises(
        InvalidArgumentError, match=r"does not fit the `model` it is loaded into, a Linear:"
    ):
        retraining.outputs(SUBSETS, measure)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return "a string"

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    retraining = Retraining(lambda indices, seed: Stateful(1, 1), tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"holds '_extra_state', which is no tensor; onl"
    ):
        retraining.checkpoints(SUBSETS)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidArgumentError, match="is a file; pass a folder to keep models in"):
        kept(train_fn=Trainer(), folder=file).outputs(SUBSETS, measure)


def test_checkpoints_need_a_folder():
    with pytest.raises(InvalidArgumentError, match="checkpoints are files; give `Retraining` a"):
        Retraining(Trainer()).checkpoints(SUBSETS)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (lambda model: 1.0, r"`measure` returned a float; it must return a tensor \[m\]"),
        (lambda model: torch.ones(2, 2), r"returned a Tensor of shape \[2, 2\]; it must return"),
        (lambda model: torch.ones(0), r"returned a Tensor of shape \[0\]; it must return a tensor"),
        (
            lambda model: torch.ones(1 + int(model[0].bias > 0)),
            "`measure` returned 1 values for one model and 2 for another",
        ),
    ],
)
def test_what_is_no_measured_output_is_refused(measured, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Retraining(Trainer()).outputs(SUBSETS, measured, range(5))


def test_an_output_that_is_not_finite_is_an_error():
    with pytest.raises(
        NonFiniteError,
        match=r"output 1 of the model of 6 examples and seed 0 \('\w+-seed0'\) is na",
    ):
        Retraining(Trainer()).outputs(SUBSETS, lambda model: torch.tensor([1.0, torch.nan]))


def test_what_is_no_model_is_refused():
    with pytest.raises(
        InvalidArgumentError, match="`train_fn` returned a dict; it must return the"
    ):
        Retraining(lambda indices, seed: {}).outputs(SUBSETS, measure)


def test_seeds_must_be_there():
    with pytest.raises(InvalidArgumentError, match="got 1 seeds for 4 models; there must be one"):
        Retraining(Trainer()).paired_outputs(SUBSETS, measure, [0])
    with pytest.raises(InvalidArgumentError, match="`seeds` is empty; at least one seed"):
        Retraining(Trainer()).outputs(SUBSETS, measure, [])
    with pytest.raises(
        InvalidArgumentError, match=r"got the seeds \[3, 3\], which must be distinct"
    ):
        Retraining(Trainer()).outputs(SUBSETS, measure, [3, 3])


def test_no_processes_are_refused(monkeypatch):
    with pytest.raises(InvalidArgumentError, match="`n_jobs` is 0; it must be a number of process"):
        Retraining(Trainer(), n_jobs=0)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(
        InvalidArgumentError,
        match=r"n_jobs=2 runs in processes of joblib.*influence_kit\[parallel\]",
    ):
        Retraining(Trainer(), n_jobs=2)
    assert Retraining(Trainer()).outputs(SUBSETS, measure).shape == (4, 1, 5)


def test_progress_is_shown(capsys, tmp_path):
    for _ in range(2):
        kept(train_fn=Trainer(), folder=tmp_path, show_progress=True).outputs(SUBSETS, measure)
        assert "Retraining: 100%" in capsys.readouterr().err
