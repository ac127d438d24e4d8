"""The moments of Adam in checkpoints of all kinds: the same ones, or an error that says why not."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from influence_kit.checkpoints.adam_moments import adam_moments
from influence_kit.errors import InvalidArgumentError


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    return model.double()


def stepped(model, parameters=None, kind=torch.optim.AdamW, **options):
    optimizer = kind(model.parameters() if parameters is None else parameters, lr=0.1, **options)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def saved(model, optimizer, **more):
    held = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(held | more)


def check(model, optimizer, found):
    """What is found is what the optimizer holds, parameter by parameter."""
    expected = {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(expected)
    for name, own in expected.items():
        assert torch.equal(found[name].first, own["exp_avg"]), name
        assert torch.equal(found[name].second, own["exp_avg_sq"]), name
        assert found[name].step == int(own["step"]) == 2


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_of_a_dict(kind):
    model = net()
    optimizer = stepped(model, kind=kind, betas=(0.8, 0.95), eps=1e-6)
    found = adam_moments(model, saved(model, optimizer))
    check(model, optimizer, found)
    assert (found["0.weight"].betas, found["0.weight"].eps) == ((0.8, 0.95), 1e-6)


def test_of_files_and_folders(tmp_path):
    model = net()
    optimizer = stepped(model)
    held = saved(model, optimizer)
    torch.save(held, tmp_path / "plain.pt")
    lightning = {
        **held,
        "pytorch-lightning_version": "2.0",
        "optimizer_states": [held["optimizer"]],
    }
    torch.save({k: v for k, v in lightning.items() if k != "optimizer"}, tmp_path / "run.ckpt")
    for name, file in (("checkpoint-2", "optimizer.pt"), ("step_2", "optimizer.bin")):
        (tmp_path / name).mkdir()
        torch.save(held["optimizer"], tmp_path / name / file)
    state = {"global_step": 2, "log_history": []}
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    for name in ("plain.pt", "run.ckpt", "checkpoint-2", "step_2"):
        check(model, optimizer, adam_moments(model, str(tmp_path / name)))


def test_groups_are_in_the_models_order_where_shapes_say_so():
    """As the Trainer has them: matrices that decay, then all other parameters."""
    model = net()
    groups = [
        [p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)
    ]
    optimizer = stepped(model, [{"params": own} for own in groups])
    check(model, optimizer, adam_moments(model, saved(model, optimizer)))


def test_frozen_parameters_are_not_counted():
    model = net()
    model[0].requires_grad_(False)
    optimizer = stepped(model, [p for p in model.parameters() if p.requires_grad])
    check(model, optimizer, adam_moments(model, saved(model, optimizer)))


def test_names_given_or_saved_by_torch():
    model = net()
    named = dict(model.named_parameters())
    order = [*reversed(named)]
    optimizer = stepped(model, [named[name] for name in order])
    held = saved(model, optimizer)
    with pytest.raises(InvalidArgumentError, match="does not have the shapes of the model's"):
        adam_moments(model, held)
    found = adam_moments(model, held, order)
    check(model, optimizer, {name: found[name] for name in named})
    held["optimizer"]["param_groups"][0]["param_names"] = order
    found = adam_moments(model, held)
    check(model, optimizer, {name: found[name] for name in named})
    with pytest.raises(InvalidArgumentError, match=r"the shape \[2\] for '0.weight'"):
        adam_moments(model, held, list(named))
    with pytest.raises(InvalidArgumentError, match="no parameter 'x'; the model has"):
        adam_moments(model, held, [*order[:-1], "x"])
    with pytest.raises(InvalidArgumentError, match=r"8 parameters, and .* 1 names: one name for"):
        adam_moments(model, held, order[:1])


def test_a_parameter_without_a_gradient_starts_with_zeros():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model[3].bias.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    found = adam_moments(model, saved(model, optimizer))
    assert (found["0.weight"].first, found["0.weight"].step) == (None, 0)
    assert found["3.bias"].step == 1


def test_several_orders_are_refused():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    groups = [{"params": [model[1].weight]}, {"params": [model[0].weight, model[2].weight]}]
    optimizer = torch.optim.Adam(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(InvalidArgumentError, match="2 groups, and fits them in many orders; pass"):
        adam_moments(model, saved(model, optimizer))
    many = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(24))
    groups = [{"params": [*many[i : i + 2].parameters()]} for i in range(0, 24, 2)]
    unused = torch.optim.Adam(groups)
    many[0].weight.grad = torch.ones(1, 1)
    unused.step()
    with pytest.raises(InvalidArgumentError, match="12 groups, and fits them in many orders; pass"):
        adam_moments(many, saved(many, unused))


def changed(group=None, state=None):
    def change(held):
        held["optimizer"]["param_groups"][0].update(group or {})
        held["optimizer"]["state"][0].update(state or {})

    return change


REFUSED = {
    "no optimizer": (lambda held: held.pop("optimizer"), "it holds the states of 0 optimizers"),
    "several": (
        lambda held: held.update(optimizer=[held["optimizer"]] * 2),
        "it holds the states of 2 optimizers, and one is needed; save {",
    ),
    "SGD": (
        lambda held: held.update(optimizer=stepped(net(), kind=torch.optim.SGD).state_dict()),
        r"not torch.optim.Adam or AdamW, .* its settings are \['dampening'",
    ),
    "no steps": (lambda held: held["optimizer"]["state"].clear(), "took no steps, and has no"),
    "amsgrad": (changed({"amsgrad": True}), "has `amsgrad` or `maximize`, whose steps"),
    "betas": (changed({"betas": (0.9, 1.0)}), "betas must be two numbers from 0 to below 1"),
    "eps": (changed({"eps": -1.0}), "eps must be a number of at least 0; got -1.0"),
    "other moments": (
        changed(state={"exp_avg": None}),
        "must have the tensors exp_avg and exp_avg_",
    ),
    "NaN": (
        changed(state={"exp_avg_sq": torch.full((4, 3), torch.nan)}),
        "must have one shape, exp_avg finite entries, exp_avg_sq",
    ),
    "negative squares": (
        changed(state={"exp_avg_sq": torch.full((4, 3), -1.0)}),
        "floating-point ones of at least 0",
    ),
    "integer squares": (
        changed(state={"exp_avg_sq": torch.ones(4, 3, dtype=torch.int)}),
        "floating-point ones of at least 0.* torch.int32",
    ),
    "NaN first": (
        changed(state={"exp_avg": torch.full((4, 3), torch.nan)}),
        "exp_avg finite entries",
    ),
    "negative step": (changed(state={"step": -3}), "a step of at least 0; .* step -3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model = net()
    change, words = REFUSED[name]
    held = saved(model, stepped(model))
    change(held)
    begin = re.escape("the moments of Adam cannot be read from checkpoint in memory: ")
    with pytest.raises(InvalidArgumentError, match=f"{begin}.*{words}"):
        adam_moments(model, held)


def test_another_number_of_parameters_and_another_kind_of_checkpoint():
    model = net()
    held = saved(model, stepped(model, [*model.parameters()][:-1]))
    with pytest.raises(
        InvalidArgumentError, match=r"has 7 parameters, and the model has 8, of whi"
    ):
        adam_moments(model, held)
    with pytest.raises(InvalidArgumentError, match="it holds the states of 0 optimizers"):
        adam_moments(model, 3)
