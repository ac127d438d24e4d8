"""What MAGIC refuses, and that the user's objects come back also then."""

import copy
import warnings

import pytest
import torch
from recorded_runs import DATA, LOOPS, TEST, Loop, N, X, Y, cross_entropy, mlp, record, with_dropout
from torch import nn
from torch.optim import SGD, Adam, RMSprop
from torch.utils.data import TensorDataset

from influence_kit import MAGIC, TrainingTrace
from influence_kit.errors import FixedAttributeError, InvalidArgumentError, NonFiniteError
from influence_kit.training import updates

LOSS = nn.CrossEntropyLoss()
MOMENTUM = LOOPS["momentum"]


def make(model, trace, data=DATA, **options):
    return MAGIC(model, data, **{"trace": trace, "loss_fn": LOSS, **options})


def swapped():
    order = torch.arange(N)
    order[[3, 4]] = order[[4, 3]]
    return TensorDataset(X[order], Y[order])


@pytest.mark.parametrize("keep", ["all", "sqrt"])
@pytest.mark.parametrize(
    ("data", "loss"),
    [
        (swapped(), LOSS),
        (TensorDataset(X * (1 + 1e-15), Y), LOSS),
        (DATA, nn.CrossEntropyLoss(label_smoothing=0.1)),
        (DATA, lambda outputs, targets: 2 * cross_entropy(outputs, targets)),
    ],
    ids=["order", "data", "loss", "scale"],
)
def test_a_run_that_cannot_be_repeated(keep, data, loss, unchanged):
    model, trace = record(MOMENTUM, keep=keep)
    magic = make(model, trace, data, loss_fn=loss)
    model.train()
    words = (
        r"step \d, taken again, does not give what was recorded: .* differs by up to .*"
        r"another order, changed or augmented data\), another loss .* not deterministic"
    )
    with unchanged(model), pytest.raises(InvalidArgumentError, match=words):
        magic.influence(TEST)
    with unchanged(model), pytest.raises(InvalidArgumentError, match=words):
        magic.replay(torch.ones(N)) and magic.influence(TEST)


def test_what_record_was_not_told():
    """Clipping, micro-batches, and a reduction that the step did not take."""
    for loop, untold in (
        (LOOPS["clipping"], {"clip_norm": None}),
        (LOOPS["accumulation"], {"micro_batches": None}),
    ):
        model, trace = record(loop)
        for metadata, _ in trace._store._steps:
            metadata["recipe"].update(untold)
        with pytest.raises(InvalidArgumentError, match="clipping or micro-batches that `record`"):
            make(model, trace).influence(TEST)
    model, trace = record(MOMENTUM)
    trace = record(Loop(options={"lr": 0.1}, reduction="sum"))[1]
    for metadata, _ in trace._store._steps:
        metadata["reduction"] = "mean"
    with pytest.raises(InvalidArgumentError, match="another loss or reduction"):
        make(model, trace).influence(TEST)


def test_an_optimizer_that_did_not_hold_what_was_recorded():
    """Its tensors are compared, too: equal weights may hide another momentum."""
    # after its first step, the weights stay as they are
    model, trace = record(Loop(options={"lr": 0.3, "momentum": 0.9}, decay=0.0))
    tensors = trace._store._steps[3][1]
    name = next(name for name in tensors if name.startswith(".optimizer."))
    tensors[name] = tensors[name] + 1
    with pytest.raises(InvalidArgumentError, match=r"step 3, .* momentum_buffer of 0.weight diff"):
        make(model, trace).influence(TEST)


def test_dropout_outside_of_the_with_block():
    model, optimizer = Loop(build=with_dropout).start()
    trace = TrainingTrace(model, optimizer)
    for indices in ([0, 1, 2], [3, 4, 5]):
        optimizer.zero_grad()
        LOSS(model(X[indices]), Y[indices]).backward()
        trace.record(indices)
        optimizer.step()
    trace.finish()
    with pytest.raises(InvalidArgumentError, match="dropout outside of the trace's `with` block"):
        make(model, trace).influence(TEST)


def test_buffers_that_training_changes():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, optimizer = Loop(build=build).start()
    with TrainingTrace(model, optimizer) as trace:
        LOSS(model(X), Y).backward()
        trace.record(range(N))
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match=r"buffers of '1' \(running statistics of Ba"):
        make(model, trace)
    # in evaluation mode while the rest trains
    model, optimizer = Loop(build=build).start()
    model[1].eval()
    with TrainingTrace(model, optimizer) as trace:
        LOSS(model(X), Y).backward()
        trace.record(range(N))
        optimizer.step()
    assert make(model.train(), trace).influence(TEST).abs().max() > 0


def test_statistics_of_a_batch():
    """Without running statistics no buffer changes, but examples have no outputs of their own."""

    def build():
        norm = nn.BatchNorm1d(4, track_running_stats=False)
        return nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))

    model, optimizer = Loop(build=build).start()
    with TrainingTrace(model, optimizer) as trace:
        LOSS(model(X), Y).backward()
        trace.record(range(N))
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match="normalizes by the statistics of the batch"):
        make(model, trace).influence(TEST)


def test_a_loss_that_is_not_of_single_examples():
    """A weighted mean: the losses of the examples do not add up to it."""
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    model, optimizer = MOMENTUM.start()
    with TrainingTrace(model, optimizer) as trace:
        for indices in ([0, 1, 2, 4], [3, 5, 6, 8]):
            optimizer.zero_grad()
            loss(model(X[indices]), Y[indices]).backward()
            trace.record(indices)
            optimizer.step()
    with pytest.raises(InvalidArgumentError, match="is not a mean over examples"):
        make(model, trace, loss_fn=loss).influence(TEST)


class SlyLoss(nn.Module):
    """A mean over examples in evaluation mode, and another one during training."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, outputs, targets):
        losses = cross_entropy(outputs, targets)
        if len(losses) == 1 or not self.model[0].training:
            return losses.mean()
        return (losses * torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)).mean()


def test_losses_of_single_examples_that_do_not_give_the_step():
    model, optimizer = MOMENTUM.start()
    with TrainingTrace(model, optimizer) as trace:
        SlyLoss(model)(model(X[:4]), Y[:4]).backward()
        trace.record(range(4))
        optimizer.step()
    magic = make(model, trace, loss_fn=SlyLoss(model), test_loss_fn=LOSS)
    with pytest.raises(InvalidArgumentError, match=r"at step 0, the losses of the single examples"):
        magic.influence(TEST)


def test_an_update_that_is_not_the_optimizers(monkeypatch):
    """As if torch had changed it: the derivative would be that of another formula."""
    model, trace = record(MOMENTUM)
    wrong = {**updates._UPDATES, "SGD": lambda o, b: updates._sgd({**o, "lr": 0.5 * o["lr"]}, b)}
    monkeypatch.setattr(updates, "_UPDATES", wrong)
    with pytest.raises(InvalidArgumentError, match=r"moved the weights otherwise than its formula"):
        make(model, trace).influence(TEST)


def test_traces_that_cannot_be_meant():
    model, trace = record(MOMENTUM)
    words = "must be a TrainingTrace, which records what it takes to repeat a run, or a list"
    for given in ([], list(trace), "trace", None):
        with pytest.raises(InvalidArgumentError, match=words):
            make(model, given)
    with pytest.raises(InvalidArgumentError, match="used example 7, but `train_dataset` has 6"):
        make(model, trace, TensorDataset(X[:6], Y[:6]))
    with pytest.raises(InvalidArgumentError, match="`train_dataset` must be a Dataset with"):
        make(model, trace, iter(DATA))
    with pytest.raises(InvalidArgumentError, match=r"epochs of the trace, which has \[0, 1, 2\]"):
        make(model, trace, epochs=[7])
    with pytest.raises(InvalidArgumentError, match="`last` must be at most 6, the number of steps"):
        make(model, trace, last=7)
    with pytest.raises(InvalidArgumentError, match="`last` must be a positive int; got 0"):
        make(model, trace, last=0)
    unfinished = TrainingTrace(model, SGD(model.parameters(), lr=0.1))
    unfinished.record([0])
    with pytest.raises(InvalidArgumentError, match="no weights after its last step"):
        make(model, unfinished)
    other = nn.Linear(3, 2).double()
    with pytest.raises(InvalidArgumentError, match=r"trained \['0.bias', .* the parameters \["):
        make(other, trace)
    sparse = record(MOMENTUM, keep="sqrt")[1]
    with pytest.raises(InvalidArgumentError, match="has not kept the weights before step 5"):
        make(model, sparse, last=2)


def test_optimizers_whose_steps_are_not_known():
    model = mlp().double()
    extra = nn.Parameter(torch.ones(1, dtype=torch.float64))
    for optimizer, words in (
        (None, "the trace has no optimizer: record the run with"),
        (
            RMSprop(model.parameters(), lr=0.1),
            "of the optimizer RMSprop, whose steps are not known",
        ),
        (Adam([*model.parameters(), extra]), "trained tensors that are not parameters of the mod"),
    ):
        with TrainingTrace(model, optimizer) as trace:
            trace.record([0], lr=0.1)
        with pytest.raises(InvalidArgumentError, match=words):
            make(model, trace)


class Turning(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(3, dtype=torch.complex128))

    def forward(self, x):
        return torch.view_as_real(x * self.turn).sum(1)


def test_complex_parameters():
    model = Turning()
    optimizer = SGD(model.parameters(), lr=0.1)
    with TrainingTrace(model, optimizer) as trace:
        LOSS(model(X), Y).backward()
        trace.record(range(N))
        optimizer.step()
    with pytest.raises(InvalidArgumentError, match=r"parameters \['turn'\] are complex, and MAGIC"):
        make(model, trace)


def test_derivatives_that_overflow():
    """Each step multiplies differences by -1e30."""
    loop = Loop(options={"lr": 1.0, "weight_decay": 1e30}, build=lambda: nn.Linear(3, 2))
    model, trace = record(loop)
    magic = make(model, trace, test_output_fn=lambda outputs, targets: 1e200 * outputs.sum(1))
    with pytest.raises(NonFiniteError, match=r"are NaN or infinite at step \d of the trace"):
        magic.influence(TEST)


def test_questions_that_have_no_answer():
    model, trace = record(MOMENTUM)
    magic = make(model, trace)
    with pytest.raises(NotImplementedError, match="one adjoint through the whole run per training"):
        magic.self_influence()
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        magic.influence()
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        magic.smoothness(None)
    for weights in (torch.ones(3), [1.0] * 9 + ["a"], torch.full((N,), torch.nan), "all", None):
        with pytest.raises(InvalidArgumentError, match="`weights` must be 9 finite numbers"):
            magic.replay(weights)
    for run in (1, -1, True):
        with pytest.raises(InvalidArgumentError, match="`run` must be an int of at least 0"):
            magic.replay(torch.ones(N), run=run)
    for name in ("change", "share"):
        for value in (0, 1.5, "much"):
            with pytest.raises(InvalidArgumentError, match=f"`{name}` must be a positive number"):
                magic.smoothness(TEST, **{name: value})
    with pytest.raises(FixedAttributeError, match="`checkpoints` cannot be assigned"):
        magic.checkpoints = [model.state_dict()]


class OwnLoss(nn.Module):
    """A model that returns one loss for the whole batch, of a formula of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 1))

    def forward(self, x, labels):
        return {"loss": (self.body(x)[:, 0] - labels).square().mean()}


def _own_loss(dropout):
    examples = [{"x": x, "labels": y.double()} for x, y in zip(X, Y, strict=True)]
    torch.manual_seed(0)
    model = OwnLoss(dropout).double()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.5)
    with TrainingTrace(model, optimizer) as trace:
        for indices in ([0, 1, 2, 4], [3, 5, 6, 8]):
            optimizer.zero_grad()
            model(X[indices], Y[indices].double())["loss"].backward()
            trace.record(indices)
            optimizer.step()
    return model, trace, examples


def test_a_model_with_a_loss_of_its_own():
    model, trace, examples = _own_loss(0.0)
    test = {"x": TEST[0], "labels": TEST[1].double()}
    scores = MAGIC(model, examples, trace=trace).influence(test)

    def outside(outputs, batch):
        raise AssertionError

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = copy.deepcopy(model.body)

        def forward(self, x):
            return self.body(x)[:, 0]

    data = TensorDataset(X, Y.double())
    plain = MAGIC(Plain(), data, trace=trace, loss_fn=nn.MSELoss())
    assert torch.allclose(scores, plain.influence((TEST[0], TEST[1].double())), rtol=1e-9, atol=0)


def test_a_model_with_a_loss_of_its_own_and_dropout():
    model, trace, examples = _own_loss(0.5)
    test = {"x": TEST[0], "labels": TEST[1].double()}
    with pytest.raises(InvalidArgumentError, match=r"one loss for a whole batch and draws random"):
        MAGIC(model, examples, trace=trace).influence(test)


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, trace = record(LOOPS["adamw"])
        make(model, trace).influence(TEST)
