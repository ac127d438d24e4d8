"""A trace records what it takes to repeat a run, and resumes after an interruption."""

import copy
import math

import pytest
import torch
from recorded_runs import BATCHES, DATA, LOOPS, STEPS, TEST, Loop, X, Y, record, with_dropout
from torch import nn
from torch.nn import functional as F

from influence_kit import MAGIC, DVEmb, TrainingTrace
from influence_kit.errors import InvalidArgumentError

ALL = [indices for batches in BATCHES for indices in batches]


def scores(model, trace):
    return MAGIC(model, DATA, trace=trace, loss_fn=nn.CrossEntropyLoss()).influence(TEST)


@pytest.mark.parametrize("name", ["nesterov", "adam, amsgrad", "groups, adamw"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_the_state_of_the_optimizer_and_its_options(name, in_folder, tmp_path):
    loop, seen = LOOPS[name], []

    def look(number, model, optimizer):
        names = {parameter: name for name, parameter in model.named_parameters()}
        held = {names[p]: copy.deepcopy(slots) for p, slots in optimizer.state.items()}
        groups = [{**group, "params": 0} for group in optimizer.param_groups]
        seen.append((held, groups, list(names.values())))

    options = {"folder": tmp_path / "trace"} if in_folder else {}
    trace = record(loop, look, **options)[1]
    for some in [trace, TrainingTrace(folder=tmp_path / "trace")] if in_folder else [trace]:
        assert some.optimizer_state(0) == {}
        for number, (held, groups, names) in enumerate(seen):
            recipe, slots = some.recipe(number), some.optimizer_state(number)
            assert slots.keys() == held.keys()
            for name, expected in held.items():
                assert slots[name].keys() == expected.keys()
                assert all(torch.equal(slots[name][slot], v) for slot, v in expected.items())
            assert recipe.optimizer == loop.optimizer.__name__
            assert recipe.trained == names
            for found, group in zip(recipe.groups, groups, strict=True):
                for option in group.keys() - {"params"}:
                    value = group[option]
                    assert found[option] == (list(value) if option == "betas" else value)


def test_random_states_are_those_before_passes_that_draw():
    before = []

    def look(number, model, optimizer):
        with torch.no_grad():
            model(X)  # an evaluation in between
        before.append(torch.get_rng_state())

    model, trace = record(LOOPS["dropout"], look, keep="sqrt")
    for number in range(STEPS):
        (found,) = trace.random_states(number).values()
        assert torch.equal(found["cpu"], before[number])
    assert record(LOOPS["momentum"])[1].random_states(0) == {}
    assert set(record(LOOPS["dropout, accumulation"])[1].random_states(0)) == {0, 1}
    assert scores(model, trace).isfinite().all()


def test_hooks_are_there_only_inside_the_block():
    model, optimizer = Loop(build=with_dropout).start()
    plain = copy.deepcopy(model)

    def hooks(some):
        return len(some._forward_hooks) + len(some._forward_pre_hooks)

    with TrainingTrace(model, optimizer) as trace:
        assert hooks(model) == 2
        model(X[:2]).sum().backward()
        trace.record([0, 1])
        average = copy.deepcopy(model)  # of the weights, say; nothing of it is recorded
        average(X)
        trace.record([0, 1])
    assert [len(trace.random_states(number)) for number in (0, 1)] == [1, 0]
    assert hooks(model) == hooks(plain) == 0
    with pytest.raises(RuntimeError, match="broken"), TrainingTrace(model, optimizer):
        raise RuntimeError("broken")
    assert hooks(model) == 0
    with TrainingTrace(model) as trace, TrainingTrace(model):
        pass
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_model_takes_no_hooks():
    """Its steps are recorded; only its dropout could not be repeated."""
    model = torch.jit.script(nn.Linear(3, 2).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingTrace(model, optimizer) as trace:
        F.cross_entropy(model(X), Y).backward()
        trace.record(range(9))
        optimizer.step()
    plain = nn.Linear(3, 2).double()
    assert scores(plain, trace).abs().max() > 0


def test_a_model_can_be_saved_while_it_is_recorded(tmp_path):
    model, optimizer = Loop(build=with_dropout).start()
    with TrainingTrace(model, optimizer) as trace:
        model(X[:2]).sum().backward()
        torch.save(model, tmp_path / "model.pt")
        trace.record([0, 1])
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded.eval()(X), model.eval()(X))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("all", range(12)), ("sqrt", [0, 1, 4, 9]), (5, [0, 5, 10]), (1, range(12))],
)
def test_which_states_are_kept(keep, kept, tmp_path):
    model, optimizer = LOOPS["adam"].start()
    with TrainingTrace(model, optimizer, keep=keep, folder=tmp_path) as trace:
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            trace.record(range(9))
            optimizer.step()
    assert [number for number in range(12) if trace.is_kept(number)] == list(kept)
    sizes = [(tmp_path / f"step-{n}.safetensors").stat().st_size for n in range(12)]
    if keep == "sqrt":
        assert max(sizes[n] for n in range(12) if n not in kept) < min(sizes[n] for n in kept)
        assert trace[5]["indices"] == list(range(9))
        with pytest.raises(InvalidArgumentError, match=r"before step 5: .* keep=\"all\""):
            trace[5]["state_dict"]
        with pytest.raises(InvalidArgumentError, match="before step 2, and DVEmb needs those of"):
            DVEmb(model, DATA, trace=trace, loss_fn=nn.CrossEntropyLoss())


@pytest.mark.parametrize("keep", [0, -1, "some", 1.5, True, None])
def test_what_keep_may_be(keep):
    with pytest.raises(InvalidArgumentError, match='`keep` must be a positive int or "all" or'):
        TrainingTrace(nn.Linear(2, 2), keep=keep)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "dropout, accumulation"])
@pytest.mark.parametrize("keep", ["all", "sqrt"])
@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_recording_goes_on(name, keep, at, tmp_path):
    """From the user's own checkpoint; the scores are those of the run in one go."""
    loop, saved = LOOPS[name], {}

    def breaks(number, model, optimizer):
        if number == at:
            saved.update(
                model=copy.deepcopy(model.state_dict()),
                optimizer=copy.deepcopy(optimizer.state_dict()),
                random=torch.get_rng_state(),
            )
        if number == 5:
            raise KeyboardInterrupt

    model, whole = record(loop)
    with pytest.raises(KeyboardInterrupt):
        record(loop, breaks, folder=tmp_path, keep=keep)
    model, optimizer = loop.start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    with TrainingTrace(model, optimizer, folder=tmp_path, resume_at=at, keep=keep) as trace:
        for number in range(at, STEPS):
            optimizer.zero_grad()
            parts = loop.parts(ALL[number])
            for part in parts:
                (F.cross_entropy(model(X[part]), Y[part]) / len(parts)).backward()
            micro = None if loop.micro is None else list(map(len, parts))
            trace.record(ALL[number], epoch=0, micro_batches=micro)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= loop.decay
    expected = scores(model, whole)
    assert torch.equal(scores(model, trace), expected)
    assert torch.equal(scores(model, TrainingTrace(folder=tmp_path)), expected)


def test_what_record_takes():
    model, optimizer = LOOPS["sgd"].start()
    trace = TrainingTrace(model, optimizer)
    trace.record([0, 1, 2], clip_norm=1, micro_batches=(2, 1))
    recipe = trace.recipe(0)
    assert (recipe.clip_norm, recipe.micro_batches) == (1, [2, 1])
    assert recipe.parts([5, 6, 7]) == [[5, 6], [7]]
    assert recipe.evaluated == []
    model.eval()
    trace.record([0])
    assert trace.recipe(1).evaluated == [name for name, _ in model.named_modules()]
    for norm in (0, -1.0, math.nan, "1", True):
        with pytest.raises(InvalidArgumentError, match="`clip_norm` must be a positive number"):
            trace.record([0], clip_norm=norm)
    for sizes in ([], [1], [1, 1, 1], [0, 2], [2.0], 2, "11", [True, True]):
        words = "`micro_batches` must be the number of examples of each backward pass .* sum"
        with pytest.raises(InvalidArgumentError, match=words):
            trace.record([0, 1], micro_batches=sizes)
    assert len(trace) == 2


def test_a_learning_rate_that_is_a_tensor():
    model, _ = LOOPS["sgd"].start()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))
    with TrainingTrace(model, optimizer) as trace:
        F.cross_entropy(model(X), Y).backward()
        trace.record(range(9))
        optimizer.step()
    assert trace.recipe(0).groups[0]["lr"] == 0.25
    assert scores(model, trace).abs().max() > 0
