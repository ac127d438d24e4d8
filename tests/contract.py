"""What every method must do, on every case: a new method joins by one line in ``METHODS``.

A test builds the method on a case with ``build``, with any argument changed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import oracles
import torch
from cases import CASES, Case, Examples, TinyGPT
from torch import Tensor
from torch.utils.data import default_collate

from influence_kit import (
    LESS,
    MAGIC,
    SOURCE,
    TRAK,
    ArnoldiInfluenceFunction,
    CGInfluenceFunction,
    DataInf,
    DVEmb,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    FactGraSS,
    GradCos,
    GradDot,
    GraSS,
    InnerProductInfluence,
    KFACInfluenceFunction,
    KNNShapley,
    LiSSAInfluenceFunction,
    LoGra,
    NaiveInfluenceFunction,
    NystromInfluenceFunction,
    RepresenterPointSelection,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
    TracInCPRandProj,
    TrackStar,
    TrainingTrace,
)

CLOSE = 1e-10


@dataclass(frozen=True)
class Method:
    """A method under the contract.

    ``make`` builds it from a case, a model, data, checkpoints and keyword arguments; ``oracle`` is
    the same scores from single-example gradients (None where a test file of its own has them).
    ``over_checkpoints``: what scores are over several, a sum, a mean, of the first alone, some
    other thing, or "one" where more than one are refused. ``has_self_influence_of_others``: also
    of examples outside the training set.
    ``quantities``: intermediate quantities are vectors whose dot products are the scores, or a test
    side that ``influence`` takes. ``checkpoints``: those of a case, with what the method needs of
    them. ``close``: what rounding may make of equal scores, in float64 and
    float32, where a matrix is inverted. ``one_label``: an example has one label, not one a token.
    """

    make: Callable[..., Any]
    oracle: Callable[[Case], Tensor] | None
    has_self_influence: bool = True
    has_self_influence_of_others: bool = True
    doubles_with_the_test_loss: bool = True
    over_checkpoints: str = "sum"
    quantities: str | None = "dots"
    has_layers: bool = True
    has_loss: bool = True
    has_test_loss: bool = True
    of_whole_set: bool = False
    one_label: bool = False
    close: tuple[float, float] = (CLOSE, 1e-5)
    checkpoints: Callable[[Case], list[dict[str, Any]]] = Case.checkpoints


def _whole_model(cls: type, **own: Any) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        return cls(model, data, checkpoints, **own | arguments)

    return make


def _last_layer(cls: type, **own: Any) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        return cls(model, case.final, data, checkpoints, **own, **arguments)

    return make


# the curvature is that of the case's training set, also where scores are of other data
def _curved(cls: type, **own: Any) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        return cls(model, data, checkpoints, **_hessian_data(case, model) | own | arguments)

    return make


def _at_one(cls: type, **own: Any) -> Callable[..., Any]:
    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        arguments = _hessian_data(case, model) | own | arguments
        return cls(model, data, checkpoints[0], **arguments)

    return make


def _with_trace(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
    arguments = {"trace": training_steps(case, data)} | arguments
    return DVEmb(model, data, checkpoints[-1:], **arguments)


def _recorded(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
    arguments = {"trace": training_trace(case, model, data)} | arguments
    return MAGIC(model, data, **arguments)


def training_trace(case: Case, model: Any, data: Any) -> TrainingTrace:
    """Three steps of SGD with momentum, over the halves of a data set as ``training_steps``."""
    trained = copy.deepcopy(model).train()
    trained.load_state_dict(case.states[0])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    data = getattr(data, "dataset", data)
    order = order_of_rows([data[i] for i in range(len(data))])
    with TrainingTrace(trained, optimizer) as trace:
        for half in (order[::2], order[1::2] or order, order[::2]):
            batch = default_collate([data[i] for i in half])
            outputs = trained(batch["x"]) if isinstance(batch, dict) else trained(batch[0])
            losses = case.loss(outputs, batch if isinstance(batch, dict) else batch[-1])
            optimizer.zero_grad()
            (losses.sum() / len(half)).backward()
            trace.record(half)
            optimizer.step()
    return trace


def training_steps(case: Case, data: Any) -> list[dict[str, Any]]:
    """Two steps at each checkpoint but the last, over the halves of a data set.

    Its contents tell which example is in which half, so that a permutation changes nothing else.
    """
    data = getattr(data, "dataset", data)
    order = order_of_rows([data[i] for i in range(len(data))])
    return [
        {**checkpoint, "lr": checkpoint["learning_rate"], "epoch": epoch, "indices": half}
        for epoch, checkpoint in enumerate(case.checkpoints()[:-1])
        for half in (order[::2], order[1::2])
        if half
    ]


def order_of_rows(examples: list[Any]) -> list[int]:
    """The indices of examples, in the order of their contents."""
    rows = [list(x.values()) if isinstance(x, dict) else x for x in examples]
    return sorted(range(len(rows)), key=lambda i: [torch.as_tensor(t).tolist() for t in rows[i]])


def _hessian_data(case: Case, model: torch.nn.Module) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {"hessian_dataset": Examples(cast(case.train, dtype))}


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in another precision."""
    change = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
    if isinstance(batch, dict):
        return {key: change(value) for key, value in batch.items()}
    return tuple(change(value) for value in batch)


def _given(case: Case) -> tuple[Any, ...]:
    return case.model(), case.train, case.test, case.loss, case.states


def _tracin(case: Case) -> Tensor:
    return oracles.tracin(*_given(case), case.rates)


def _dots(case: Case) -> Tensor:
    return oracles.tracin(*_given(case), [1.0] * len(case.rates))


def _cosines(case: Case) -> Tensor:
    return oracles.cosines(*_given(case))


def _left_out(case: Case) -> Tensor:
    steps = training_steps(case, Examples(case.train))
    *given, states = _given(case)
    return oracles.left_out_of_steps(*given, steps, states[-1])


def _tracin_of_last(case: Case) -> Tensor:
    names = [n for n, _ in case.model().named_parameters() if n.startswith(case.final + ".")]
    return oracles.tracin(*_given(case), case.rates, names)


_rand_proj = _last_layer(TracInCPFastRandProj)
_projected = _last_layer(TracInCPFastRandProj, projection_dim=4)


def _inverted(make: Callable[..., Any], of_whole_set: bool = False) -> Method:
    """Influence functions; their dense oracles are in ``test_influence_functions``."""
    return Method(
        make,
        None,
        over_checkpoints="mean",
        quantities="test side",
        of_whole_set=of_whole_set,
        close=(1e-8, 2e-3),
    )


def _of_captum(make: Callable[..., Any]) -> Method:
    """Captum's two; their oracle is Captum."""
    return Method(make, None, over_checkpoints="first", close=(1e-8, 2e-3))


def _knn_of_final(case: Case, *given: Any, **arguments: Any) -> Any:
    return KNNShapley(*given, layer=case.final, n_neighbors=2, **arguments)


def _of_neighbors(make: Callable[..., Any], over_checkpoints: str) -> Method:
    """Values without a gradient; their oracle, over all coalitions, is in ``test_knn_shapley``."""
    return Method(
        make,
        None,
        over_checkpoints=over_checkpoints,
        quantities=None,
        has_layers=False,
        has_loss=False,
        of_whole_set=True,
        one_label=True,
    )


def _refitted(**own: Any) -> Method:
    """Representer points, of the layer that gives the output; oracles in ``test_representer``."""

    def make(case: Case, model: Any, data: Any, checkpoints: Any, **arguments: Any) -> Any:
        final = "head" if case.build is TinyGPT else case.final
        arguments = own | arguments
        return RepresenterPointSelection(model, final, data, checkpoints, **arguments)

    return Method(
        make,
        None,
        over_checkpoints="mean",
        quantities=None,
        has_test_loss=False,
        of_whole_set=True,
    )


def with_adam(case: Case) -> list[dict[str, Any]]:
    """The checkpoints of a case, each with an Adam that took a step on the training set."""
    saved = []
    for checkpoint in case.checkpoints():
        model = case.model()
        model.load_state_dict(checkpoint["state_dict"])
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.6, 0.9), eps=1e-3)
        oracles.set_gradient(model, oracles.gradients(model, case.train, case.loss).mean(0))
        optimizer.step()
        saved.append({**checkpoint, "optimizer": copy.deepcopy(optimizer.state_dict())})
    return saved


def with_steps(case: Case) -> list[dict[str, Any]]:
    """The checkpoints of a case, five steps apart."""
    return [{**held, "step": 5 * number + 5} for number, held in enumerate(case.checkpoints())]


def _adam_cosines(case: Case) -> Tensor:
    return oracles.adam_scores(*_given(case)[:4], with_adam(case))


def _adam_dots(case: Case) -> Tensor:
    saved = [{**held, "learning_rate": 1.0} for held in with_adam(case)]
    return oracles.adam_scores(*_given(case)[:4], saved, cosine=False)


FEW_PASSES = {"curvature": "empirical_fisher"}

METHODS = {
    "TracInCP": Method(_whole_model(TracInCP), _tracin),
    "GradDot": Method(_whole_model(GradDot), _dots),
    "GradCos": Method(_whole_model(GradCos), _cosines, doubles_with_the_test_loss=False),
    "LESS": Method(
        _whole_model(LESS),
        _adam_cosines,
        doubles_with_the_test_loss=False,
        quantities=None,
        checkpoints=with_adam,
    ),
    "GradDot, adam": Method(
        _whole_model(GradDot, optimizer="adam"), _adam_dots, quantities=None, checkpoints=with_adam
    ),
    "TracInCPFast": Method(_last_layer(TracInCPFast), _tracin_of_last),
    "TracInCPFastRandProj": Method(_rand_proj, _tracin_of_last, has_self_influence=False),
    "TracInCPFastRandProj, projected": Method(_projected, None, has_self_influence=False),
    "TracInCPRandProj": Method(_whole_model(TracInCPRandProj, projection_dim=(2, 3)), None),
    # examples outside the training set have no embedding
    "DVEmb": Method(
        _with_trace,
        _left_out,
        has_self_influence_of_others=False,
        over_checkpoints="one",
        quantities="test side",
        of_whole_set=True,
    ),
    # its oracle, central differences of training, is in ``test_magic``
    "MAGIC": Method(
        _recorded,
        None,
        has_self_influence=False,
        over_checkpoints="one",
        quantities=None,
        has_layers=False,
        of_whole_set=True,
    ),
    "ExplicitInfluenceFunction": _inverted(_curved(ExplicitInfluenceFunction)),
    "ExplicitInfluenceFunction, relative": _inverted(
        _curved(ExplicitInfluenceFunction, relative="l", blocks="layer")
    ),
    # settings with few iterations: what they converge to is tested elsewhere
    "CGInfluenceFunction": _inverted(
        _curved(CGInfluenceFunction, **FEW_PASSES, tol=1e-12, preconditioner="nystrom")
    ),
    "LiSSAInfluenceFunction": _inverted(
        _curved(
            LiSSAInfluenceFunction,
            **FEW_PASSES,
            hessian_batch_size=None,
            recursion_depth=9,
            scale=40.0,
        )
    ),
    "NystromInfluenceFunction": _inverted(_curved(NystromInfluenceFunction, rank=20)),
    "DataInf": _inverted(_curved(DataInf)),
    # their damping takes the number of training examples
    "KFACInfluenceFunction": _inverted(
        _curved(KFACInfluenceFunction, **FEW_PASSES), of_whole_set=True
    ),
    "EKFACInfluenceFunction": _inverted(
        _curved(EKFACInfluenceFunction, **FEW_PASSES), of_whole_set=True
    ),
    # its oracle, matrix exponentials, is in ``test_source``
    "SOURCE": Method(
        _curved(SOURCE, **FEW_PASSES),
        None,
        has_self_influence=False,
        over_checkpoints="other",
        quantities="test side",
        checkpoints=with_steps,
        close=(1e-8, 2e-3),
    ),
    "LoGra": _inverted(_curved(LoGra, projection_dim=(2, 3), relative="theta")),
    # its oracle is in ``test_optimizer_argument``
    "LoGra, adam": replace(
        _inverted(_curved(LoGra, projection_dim=(2, 3), optimizer="adam")), checkpoints=with_adam
    ),
    # with more than twice as many entries in the block as examples
    "LoGra, kept": replace(
        _inverted(_whole_model(LoGra, projection_dim=9, blocks="full")), of_whole_set=True
    ),
    "GraSS": _inverted(_curved(GraSS, projection_dim=5, blow_up=2)),
    # the mask is that of the first checkpoint
    "GraSS, learnt": replace(
        _inverted(_whole_model(GraSS, projection_dim=4, mask="learnt")),
        over_checkpoints="other",
        of_whole_set=True,
    ),
    "FactGraSS": _inverted(_curved(FactGraSS, projection_dim=5, blow_up=2)),
    # its oracle, with a symmetric root of R, is in ``test_trackstar``
    "TrackStar": replace(
        _inverted(_curved(TrackStar, projection_dim=(2, 3))),
        doubles_with_the_test_loss=False,
        checkpoints=with_adam,
    ),
    "TRAK": Method(
        _whole_model(TRAK, projection_dim=4, projection="sjlt"),
        None,
        over_checkpoints="other",
        quantities="test side",
        has_loss=False,
        of_whole_set=True,
        close=(1e-8, 2e-3),
    ),
    "KNNShapley": _of_neighbors(_whole_model(KNNShapley, n_neighbors=2), "other"),
    "KNNShapley, of a layer": _of_neighbors(_knn_of_final, "mean"),
    "RepresenterPointSelection": _refitted(),
    "RepresenterPointSelection, normalized": _refitted(normalize=True, count_bias=True),
    "NaiveInfluenceFunction": _of_captum(_at_one(NaiveInfluenceFunction, hessian_reg=1.0)),
    "ArnoldiInfluenceFunction": _of_captum(
        _at_one(ArnoldiInfluenceFunction, projection_dim=3, arnoldi_dim=6, hessian_reg=1.0)
    ),
}

# one method per family: what `make quick` runs of the contract
QUICK = {
    "TracInCP",
    "GradCos",
    "DVEmb",
    "MAGIC",
    "EKFACInfluenceFunction",
    "LoGra",
    "TRAK",
    "KNNShapley",
    "RepresenterPointSelection",
}


def stores(method: str) -> bool:
    """Whether it can keep the training set's gradients in a folder."""
    made = build(method, CASES["mlp"])
    has_argument = "store" in signature(type(made)).parameters
    return isinstance(made, InnerProductInfluence) and has_argument and method != "DVEmb"


def applies(method: str, case: Case | str) -> bool:
    """Whether the method knows such labels: those of the GPT are one a token."""
    of_tokens = case == "gpt" if isinstance(case, str) else case.build is TinyGPT
    return not (METHODS[method].one_label and of_tokens)


def build(method: str, case: Case, **changed: Any) -> Any:
    """A method on a case; ``changed`` replaces model, data, checkpoints or keyword arguments."""
    model = changed.pop("model", None) or case.model()
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or METHODS[method].checkpoints(case)
    arguments = {"loss_fn": case.loss, "batch_size": 4} | changed
    return METHODS[method].make(case, model, data, checkpoints, **arguments)


def scores(influence: Any, inputs: Any) -> Tensor:
    """The whole matrix."""
    return influence.influence(inputs, k=None)


@cache
def plain_scores(method: str, case: Case) -> Tensor:
    """Of the case as it is: what most properties compare with. Not to be changed in place."""
    return scores(build(method, case), case.test)


def assert_close(found: Tensor, expected: Tensor, relative: float = CLOSE) -> None:
    """Equal up to ``relative`` times the largest expected entry."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 0, "an oracle that is all zeros tests nothing"
    difference = (found - expected).abs().max()
    assert difference <= relative * expected.abs().max(), float(difference / expected.abs().max())


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """All of a model that a method might change, and the global random state."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "objects": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Nothing changed between two snapshots."""
    for key in ("objects", "training", "requires_grad", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    for old, new in zip(before["grad"], after["grad"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or (old[0] == new[0] and torch.equal(old[1], new[1]))
