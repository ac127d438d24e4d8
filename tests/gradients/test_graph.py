"""A loss without a graph is an error; a parameter without a part in the loss has gradient zero."""

import copy

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import influence_kit as ik

torch.manual_seed(0)
TRAIN = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
TEST = torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 2
DATA = TensorDataset(*TRAIN)


def right(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def under_no_grad(outputs, targets):
    with torch.no_grad():
        return right(outputs, targets)


def under_inference_mode(outputs, targets):
    with torch.inference_mode():
        return right(outputs, targets)


WITHOUT_GRAPH = {
    "detached": lambda o, t: right(o, t).detach(),
    "mean detached": lambda o, t: right(o, t).mean().detach(),
    "wrong": lambda o, t: o.argmax(1) != t,
    "wrong as integers": lambda o, t: (o.argmax(1) != t).long(),
    "wrong as numbers": lambda o, t: (o.argmax(1) != t).double(),
    "errors in all": lambda o, t: (o.argmax(1) != t).sum(),
    "items": lambda o, t: torch.tensor([value.item() for value in right(o, t)]),
    "numpy": lambda o, t: torch.from_numpy(right(o, t).detach().numpy()),
    "made anew": lambda o, t: torch.tensor(right(o, t).tolist(), requires_grad=True),
    "a constant": lambda o, t: torch.zeros(len(o), dtype=o.dtype, requires_grad=True),
    "no_grad": under_no_grad,
    "inference mode": under_inference_mode,
    "rounded": lambda o, t: o.round().long().sum(1),
}
STEPS = [{"lr": 0.1, "indices": list(range(9)), "epoch": 0}]
METHODS = {
    "TracInCP": lambda m, c, **k: ik.TracInCP(m, DATA, c, **k),
    "GradCos": lambda m, c, **k: ik.GradCos(m, DATA, c, **k),
    "Explicit": lambda m, c, **k: ik.ExplicitInfluenceFunction(m, DATA, c, damping=0.1, **k),
    "CG": lambda m, c, **k: ik.CGInfluenceFunction(
        m, DATA, c, damping=9.0, curvature="hessian", **k
    ),
    "EKFAC": lambda m, c, **k: ik.EKFACInfluenceFunction(m, DATA, c, damping=0.1, **k),
    "DataInf": lambda m, c, **k: ik.DataInf(m, DATA, c, **k),
    "LoGra": lambda m, c, **k: ik.LoGra(m, DATA, c, projection_dim=3, **k),
    "RandProj": lambda m, c, **k: ik.TracInCPRandProj(m, DATA, c, projection_dim=3, **k),
    "Fast": lambda m, c, **k: ik.TracInCPFast(m, m[2], DATA, c, **k),
    "Arnoldi": lambda m, c, **k: ik.ArnoldiInfluenceFunction(m, DATA, c[0], projection_dim=3, **k),
    "RPS": lambda m, c, **k: ik.RepresenterPointSelection(m, "2", DATA, c, **k),
    "DVEmb": lambda m, c, **k: ik.DVEmb(m, DATA, c, trace=[{**STEPS[0], "state_dict": c[0]}], **k),
    "TRAK": lambda m, c, **k: ik.TRAK(m, DATA, c, projection_dim=4, **trak(k)),
}


def trak(keywords):
    """TRAK differentiates an output function, by which its loss is then differentiated."""
    if "test_loss_fn" in keywords:
        return {"output_fn": ik.classification_margin, "loss_fn": keywords["test_loss_fn"]}
    return {"output_fn": keywords["loss_fn"], "loss_fn": right}


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def states(model):
    torch.manual_seed(2)
    return [{k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()}]


# these differentiate a loss each in its own way, the rest as the first
OF_THEIR_OWN = ("TracInCP", "RPS", "TRAK")
MET = [
    (method, loss)
    for method in METHODS
    for loss in (WITHOUT_GRAPH if method in OF_THEIR_OWN else ("detached", "made anew"))
]
MESSAGE = (
    "returned a value without a graph|is not a function of the model's output"
    "|`output_fn` was declared to return one loss per example"
)


@pytest.mark.parametrize(("method", "loss"), MET)
def test_a_loss_without_a_graph_is_refused(unchanged, method, loss):
    model = net()
    made = METHODS[method](model, states(model), loss_fn=WITHOUT_GRAPH[loss])
    with unchanged(model), pytest.raises(ValueError, match=MESSAGE):
        made.influence(TEST)


@pytest.mark.parametrize(("method", "loss"), [met for met in MET if met[0] != "RPS"])
def test_a_loss_of_tests_without_a_graph_is_refused(method, loss):
    model = net()
    keywords = {"loss_fn": right, "test_loss_fn": WITHOUT_GRAPH[loss]}
    with pytest.raises(ValueError, match=MESSAGE):
        METHODS[method](model, states(model), **keywords).influence(TEST)


def test_perturbations_of_a_loss_without_a_graph_are_refused():
    model = net()
    keywords = {"loss_fn": WITHOUT_GRAPH["detached"], "test_loss_fn": right, "damping": 0.1}
    method = ik.CGInfluenceFunction(model, DATA, states(model), **keywords)
    with pytest.raises(ValueError, match=MESSAGE):
        method.perturbation_influence(TEST)


def test_a_loss_by_item_alone_is_refused():
    model = net()
    method = ik.GradDot(
        model, DATA, states(model), loss_fn=lambda o, t: F.cross_entropy(o, t).item()
    )
    with pytest.raises(ValueError, match="must return a tensor; got a float"):
        method.influence(TEST)


class Frozen(nn.Sequential):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Labelling(nn.Sequential):
    def forward(self, x):
        return super().forward(x).argmax(1)


@pytest.mark.parametrize("kind", [Frozen, Labelling])
def test_a_model_whose_output_has_no_graph_is_refused(unchanged, kind):
    model = kind(*net())
    loss = right if kind is Frozen else (lambda o, t: (o - t).double())
    method = ik.GradDot(model, DATA, states(model), loss_fn=loss)
    with unchanged(model), pytest.raises(ValueError, match="an output without a graph to any"):
        method.influence(TEST)


def test_a_later_batch_without_a_graph_is_refused():
    def loss(outputs, targets):
        value = right(outputs, targets)
        return value.detach() if len(value) < 4 else value

    model = net()
    method = ik.GradDot(model, DATA, states(model), loss_fn=loss, batch_size=4)
    with pytest.raises(ValueError, match=MESSAGE):
        method.self_influence()


class Scaling(nn.Module):
    """Without a rule: its parameter goes through ``torch.func``."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x * self.scale)


def test_a_later_batch_without_a_graph_is_refused_where_there_is_no_rule():
    def loss(outputs, targets):
        return right(outputs, targets).detach() if later else right(outputs, targets)

    later, model = [], Scaling().double()
    model.head.requires_grad_(False)
    method = ik.GradDot(model, DATA, [model.state_dict()], loss_fn=loss)
    assert method.self_influence().min() > 0
    later.append(True)
    with pytest.raises(ValueError, match=MESSAGE):
        method.self_influence()


class Routed(nn.Module):
    """Asks an expert by the sign of an input; a third one never."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        outputs = x.new_zeros(len(x), 2)
        for number, rows in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
            if rows.any():
                outputs = outputs.index_put((rows,), self.experts[number](x[rows]))
        return outputs


@pytest.mark.parametrize("layer", ["experts.0", "experts.1", "experts.2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_expert_that_is_not_asked_has_gradient_zero(unchanged, layer, batch_size):
    torch.manual_seed(3)
    model = Routed().double()
    state = {k: v + 0.1 for k, v in model.state_dict().items()}
    method = ik.GradDot(model, DATA, [state], layers=[layer], loss_fn=right, batch_size=batch_size)
    names = [f"{layer}.weight", f"{layer}.bias"]
    expected = oracles.tracin(copy.deepcopy(model), TRAIN, TEST, right, [state], [1], names)
    with unchanged(model):
        torch.testing.assert_close(method.influence(TEST), expected)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize(
    ("method", "mode"),
    [("TracInCP", "set_grad_enabled")]
    + [(method, mode) for method in METHODS for mode in ("no_grad", "inference_mode")],
)
def test_scores_are_the_same_inside_other_modes(unchanged, method, mode):
    model = net()
    made = METHODS[method]
    keywords = {} if method in ("RPS",) else {"test_loss_fn": right}
    given = model, states(model)
    expected = made(*given, loss_fn=right, **keywords).influence(TEST)
    with unchanged(model), MODES[mode]():
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inputs = tuple(t.clone() for t in TEST)
        inside = made(*given, loss_fn=right, **keywords)
        for _ in range(2):
            torch.testing.assert_close(inside.influence(inputs), expected)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == enabled
    torch.testing.assert_close(inside.influence(TEST), expected)


def test_training_data_and_checkpoints_of_inference_mode(unchanged):
    model = net()
    expected = ik.GradDot(model, DATA, states(model), loss_fn=right).influence(TEST)
    with torch.inference_mode():
        data, state = TensorDataset(*(t.clone() for t in TRAIN)), states(model)
        rows = [(x.clone(), y.clone()) for x, y in DATA]
    for given in (data, rows):
        with unchanged(model):
            method = ik.GradDot(model, given, state, loss_fn=right)
            torch.testing.assert_close(method.influence(TEST), expected)


def test_a_model_of_inference_mode_is_refused_and_its_copy_is_not():
    with torch.inference_mode():
        model = net()
    with pytest.raises(
        ValueError, match=r"'0.weight' of the model was made inside torch.inference"
    ):
        ik.GradDot(model, DATA, states(net()), loss_fn=right).influence(TEST)
    copied = copy.deepcopy(model)
    expected = ik.GradDot(net(), DATA, states(net()), loss_fn=right).influence(TEST)
    found = ik.GradDot(copied, DATA, states(net()), loss_fn=right).influence(TEST)
    torch.testing.assert_close(found, expected)
