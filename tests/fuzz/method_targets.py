"""The public classes: their constructors and their methods, with arguments that they take.

A constructor with a bad argument is followed by a question, so that late errors count, too.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import influence_kit as ik
from fuzz.bad_input import Target
from fuzz.bad_values import BAD, FLAGS, NONE
from fuzz.watch import unchanged
from influence_kit import curvature, operators, projections

N = 6
ZERO, TWO, NEGATIVE, LARGE = {"0"}, {"2"}, {"-1"}, {"10**30"}
NUMBERS = {"2", "1.5"}
SEEDS = ZERO | TWO | NEGATIVE
TEXT = {"text", "empty text"}


def is_(value: Any) -> Callable[[], Any]:
    return lambda: value


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 2))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 2


def train() -> TensorDataset:
    return TensorDataset(drawn(N, 4), labels(N))


def batch() -> tuple[Tensor, Tensor]:
    return drawn(3, 4), labels(3)


def checkpoint(seed: int = 1) -> dict[str, Any]:
    return {"state_dict": network(seed).state_dict(), "learning_rate": 0.1 * seed, "epoch": seed}


def checkpoints() -> list[dict[str, Any]]:
    return [checkpoint(1), checkpoint(2)]


def steps() -> list[dict[str, Any]]:
    state = network(1).state_dict()
    return [{"state_dict": state, "indices": [i, i + 1], "lr": 0.1, "epoch": i} for i in range(3)]


def recorded() -> ik.TrainingTrace:
    model, data = network(), train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ik.TrainingTrace(model, optimizer) as trace:
        for epoch, indices in enumerate(([0, 1], [2, 1])):
            optimizer.zero_grad()
            inputs, targets = data[indices]
            nn.functional.cross_entropy(model(inputs), targets).backward()
            trace.record(indices, epoch=epoch)
            optimizer.step()
    return trace


def with_adam() -> list[dict[str, Any]]:
    model = network(1).eval()
    optimizer = torch.optim.Adam(model.parameters())
    nn.functional.cross_entropy(model(drawn(3, 4)), labels(3)).backward()
    optimizer.step()
    return [checkpoint() | {"optimizer": optimizer.state_dict()}]


# good values of arguments, by name; those of constructors that are not here keep their defaults
GOOD: dict[str, Callable[[], Any]] = {
    "model": network,
    "module": network,
    "train_dataset": train,
    "hessian_dataset": train,
    "influence_src_dataset": train,
    "checkpoints": checkpoints,
    "checkpoint": checkpoint,
    "loss_fn": nn.CrossEntropyLoss,
    "final_fc_layer": is_("3"),
    "layer": is_("3"),
    "batch_size": is_(4),
    "trace": steps,
    "damping": is_(0.1),
    "inverse": lambda: curvature.Explicit(0.1),
    "projection_dim": is_(2),
    "layers": is_(["0", "3"]),
    "n_neighbors": is_(2),
    "activation_dir": is_("activations"),
    "rank": is_(3),
    "recursion_depth": is_(4),
    "max_iter": is_(20),
    "scale": is_(40.0),
}
# the bad values that are good ones for an argument of this name
FINE: dict[str, set[str]] = {
    "loss_fn": NONE,  # the gradients of the outputs
    "layers": {"None", "empty text"},
    "layer": {"None", "empty text"},
    "batch_size": TWO,
    "eval_mode": FLAGS,
    "batch_axes": NONE | ZERO,
    "test_loss_fn": NONE,
    "test_output_fn": NONE,
    "output_fn": NONE,
    "sample_wise_grads_per_batch": NONE | FLAGS,
    "features": NONE,
    "store": NONE | TEXT,
    "store_dtype": NONE,
    "hessian_dataset": NONE,
    "optimizer": NONE,
    "eval_dataset": NONE,
    "mixing": NONE | ZERO,
    "segments": NONE | TWO,
    "relative": NONE,
    "seed": SEEDS,
    "show_progress": FLAGS,
    "proponents": FLAGS,
    "aggregate": FLAGS,
    "vectorize": FLAGS,
    "count_bias": FLAGS,
    "normalize": FLAGS,
    "parameter_names": NONE,
    "projection_on_cpu": FLAGS,
    "outer_loop_by_checkpoints": FLAGS,
    "return_on_cpu": FLAGS,
    "test": FLAGS,
    "load_src_from_disk": FLAGS,
    "k": NONE | ZERO | TWO | LARGE,
    "top_k": ZERO | TWO | LARGE,
    "epochs": NONE,
    "per_token": NONE,
    "doc_ids": NONE,
    "shift": NONE | ZERO,
    "train_indices": NONE,
    "nearest_neighbors": NONE,
    "preconditioner": NONE,
    "projection_dim": TWO | LARGE,
    "n_neighbors": TWO,
    "max_iter": TWO | LARGE,
    "rank": TWO | LARGE,
    "recursion_depth": TWO,
    "num_repeat": TWO,
    "arnoldi_dim": TWO | LARGE,
    "hessian_batch_size": TWO | NONE | LARGE,
    "replace_nan": NONE | {"0", "-1", "2", "1.5", "-0.5"},
    "model_id": TEXT,
    "activation_dir": TEXT,
    "folder": TEXT,
    "additional_forward_args": NONE,
    "damping": ZERO | NUMBERS,
    "ridge": ZERO | NUMBERS,
    "tol": ZERO | NUMBERS,
    "rtol": ZERO | NUMBERS,
    "l2": NUMBERS,
    "hessian_reg": ZERO | NUMBERS,
    "scale": NUMBERS,
    "arnoldi_tol": ZERO | NUMBERS,
    "hessian_inverse_tol": ZERO | NUMBERS,
}


def arguments_of(call: Any, *left_out: str) -> dict[str, Callable[[], Any]]:
    """A good value for each argument: that of ``GOOD``, or the default."""
    found = {}
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name not in ("self", *left_out):
            found[name] = GOOD.get(name, is_(parameter.default))
    return found


def target(name: str, call: Any, good: Any, fine: dict[str, set[str]] | None = None) -> Target:
    known = {key: FINE[key] for key in good if key in FINE}
    return Target(name, call, good, {**known, **(fine or {})})


def question(made: Any) -> Any:
    if isinstance(made, ik.SimilarityInfluence):
        return made.influence(drawn(3, 4))
    return made.influence(batch(), k=2)


def _constructors() -> list[Target]:
    return [
        target(
            cls.__name__,
            lambda cls=cls, **given: question(cls(**given)),
            good_of(cls),
            OF_CLASSES.get(cls.__name__),
        )
        for cls in CLASSES
    ]


CLASSES: list[Any] = [
    ik.GradDot,
    ik.GradCos,
    ik.LESS,
    ik.TracInCP,
    ik.TracInCPFast,
    ik.TracInCPFastRandProj,
    ik.TracInCPRandProj,
    ik.DVEmb,
    ik.MAGIC,
    ik.InfluenceFunction,
    ik.ExplicitInfluenceFunction,
    ik.CGInfluenceFunction,
    ik.LiSSAInfluenceFunction,
    ik.NystromInfluenceFunction,
    ik.DataInf,
    ik.KFACInfluenceFunction,
    ik.EKFACInfluenceFunction,
    ik.SOURCE,
    ik.ArnoldiInfluenceFunction,
    ik.NaiveInfluenceFunction,
    ik.TRAK,
    ik.LoGra,
    ik.GraSS,
    ik.FactGraSS,
    ik.TrackStar,
    ik.KNNShapley,
    ik.RepresenterPointSelection,
    ik.SimilarityInfluence,
]
# other good values than those of ``GOOD``
GOOD_OF: dict[str, dict[str, Callable[[], Any]]] = {
    "DVEmb": {"checkpoints": lambda: checkpoints()[-1:]},
    "LESS": {"checkpoints": with_adam},
    "TrackStar": {"checkpoints": with_adam, "eval_dataset": train},
    "MAGIC": {"trace": recorded},
    "SOURCE": {"rate_sums": is_([0.5, 1.5])},
    "MAGIC.replay": {"weights": lambda: torch.full((len(train()),), 0.5)},
    "KNNShapley": {"layers": is_(None)},
    "DVEmb.self_influence": {"inputs": is_(None)},
    "SimilarityInfluence.influence": {"inputs": lambda: drawn(3, 4)},
}
# methods that a class refuses, whatever the arguments
REFUSED = {
    "TracInCPFastRandProj.self_influence",
    "LESS.compute_intermediate_quantities",
    "MAGIC.self_influence",
    "SOURCE.self_influence",
    "TRAK.perturbation_influence",
    "TrackStar.perturbation_influence",
    "RepresenterPointSelection.compute_intermediate_quantities",
    "DataOOB.influence",
}
# masks keep at most as many entries as a layer has
MASKED = {"projection_dim": TWO | LARGE, "blow_up": TWO | LARGE}
OF_CLASSES: dict[str, dict[str, set[str]]] = {
    "FactGraSS": MASKED,
    "GraSS": MASKED,
    # the margin is used in place of the loss, unless there is an `output_fn`
    "TRAK": {"loss_fn": {"nn.Module", "None"}},
    # it looks at labels of neighbours alone
    "KNNShapley": {name: {"function", "nn.Module", "None"} for name in ("loss_fn", "test_loss_fn")},
    "SimilarityInfluence": {"batch_size": TWO | LARGE},
    "ArnoldiInfluenceFunction": {"projection_dim": NONE | TWO | LARGE},
    "NaiveInfluenceFunction": {"projection_dim": NONE | TWO | LARGE},
    "DVEmb": {"projection_dim": NONE | TWO | LARGE, "checkpoints": NONE},
    "MAGIC": {"last": TWO},
    "TracInCPFastRandProj": {"projection_dim": NONE | TWO | LARGE},
}
ASKED = (
    "influence",
    "self_influence",
    "influence_by_layer",
    "compute_intermediate_quantities",
    "perturbation_influence",
    "fit",
    "save",
    "load",
    "replay",
    "smoothness",
)
OF_METHODS = {"inputs": batch, "inputs_dataset": batch, "k": is_(2), "folder": is_("saved")}


def made(cls: Any) -> Any:
    return cls(**{name: make() for name, make in good_of(cls).items()})


def good_of(cls: Any) -> dict[str, Callable[[], Any]]:
    return arguments_of(cls) | GOOD_OF.get(cls.__name__, {})


def _asked(cls: Any, method: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        one = made(cls)
        if method == "load":
            one.save("saved")
        with unchanged({"model": getattr(one, "model", None)}):
            return getattr(one, method)(**given)

    return call


def _methods() -> list[Target]:
    targets = []
    for cls in CLASSES:
        for method in ASKED:
            if hasattr(cls, method) and f"{cls.__name__}.{method}" not in REFUSED:
                good = arguments_of(getattr(cls, method)) | OF_METHODS
                named = inspect.signature(getattr(cls, method)).parameters
                good |= GOOD_OF.get(f"{cls.__name__}.{method}", {})
                good = {key: value for key, value in good.items() if key in named}
                if "inputs_dataset" in good:
                    del good["inputs"]
                fine = {} if method in NEED_INPUTS else {"inputs": NONE, "inputs_dataset": NONE}
                fine |= FINE_OF_CALLS.get(method, {})
                name = f"{cls.__name__}.{method}"
                targets.append(target(name, _asked(cls, method), good, fine))
    return targets


FINE_OF_CALLS: dict[str, dict[str, set[str]]] = {
    "replay": {"run": ZERO, "weights": {"tensor of 2**62"}},
    "smoothness": {"run": ZERO, "seed": ZERO | TWO | LARGE | NEGATIVE},
}
NEED_INPUTS = ("influence_by_layer", "perturbation_influence")


def _checkpoints() -> list[Target]:
    def held(**changed: Any) -> Any:
        saved = checkpoint() | changed
        if isinstance(saved["state_dict"], dict):
            saved["state_dict"] = {**saved["state_dict"], "0.weight": saved["weight"]}
        del saved["weight"]
        return ik.load_checkpoint(network(), saved)

    def margin(**given: Any) -> Any:
        return ik.classification_margin(**given)

    step = {"step": is_(3), "lr": is_(0.1)}
    # beside a learning rate that is stored, the others are not looked at
    unread = ("epoch", "step", "lr", "optimizer", "lr_scheduler")
    fine_of_a_dict = {
        **{key: set(BAD) for key in unread},
        "learning_rate": {"0", "-1", "2", "1.5", "-0.5", "nan", "inf", "None", "10**30"}
        | {"0-d tensor"},
    }
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    loaded = {
        "state_dict": lambda: network(1).state_dict(),
        "weight": lambda: drawn(3, 4),
        "learning_rate": is_(0.1),
        "epoch": is_(1),
        "optimizer": optimizer.state_dict,
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict,
        **step,
    }
    return [
        Target(
            "load_checkpoint",
            _loads,
            {"model": network, "checkpoint": checkpoint},
            changed=("model",),
        ),
        Target("load_checkpoint of a dict", held, loaded, fine_of_a_dict),
        target("checkpoint_table", ik.checkpoint_table, {"checkpoints": checkpoints}),
        target(
            "select_checkpoints",
            ik.select_checkpoints,
            {"checkpoints": checkpoints, "count": is_(2)},
            # anything may be a checkpoint to a user's load function
            {"count": TWO | LARGE, "checkpoints": set(BAD)},
        ),
        target(
            "dropout_ensemble",
            ik.dropout_ensemble,
            {
                "model": network,
                "n": is_(2),
                "seed": is_(1),
                "checkpoint": checkpoint,
                "p": is_(0.5),
                "axes": is_({"1": 1}),
            },
            {
                "n": TWO,
                "seed": ZERO | TWO | LARGE,
                "checkpoint": NONE,
                "p": NONE | {"{}"},
                "axes": NONE | {"{}"},
            },
        ),
        target(
            "classification_margin",
            margin,
            {"outputs": lambda: drawn(3, 2), "targets": lambda: labels(3), "shift": is_(None)},
        ),
        *(
            target(
                metric.__name__,
                metric,
                {"test": lambda: drawn(3, 4), "train": lambda: drawn(5, 4)},
            )
            for metric in (ik.cosine_similarity, ik.euclidean_distance)
        ),
    ]


def _loads(model: Any, checkpoint: Any) -> Any:
    return ik.load_checkpoint(model, checkpoint)


def _traces() -> list[Target]:
    def recorded(**given: Any) -> Any:
        trace = ik.TrainingTrace(network())
        trace.record(**given)
        return list(trace[0].items())

    def opened(**given: Any) -> Any:
        trace = ik.TrainingTrace(**given)
        trace.record([0, 1])
        trace.finish()
        return len(trace)

    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    return [
        target(
            "TrainingTrace.record",
            recorded,
            {
                "indices": is_([0, 1]),
                "lr": is_(0.1),
                "epoch": is_(1),
                "weight_decay": is_(0.0),
                "clip_norm": is_(1.0),
                "micro_batches": is_([1, 1]),
            },
            {
                "indices": {"tensor of 2**62"},
                "epoch": NONE | ZERO | TWO | NEGATIVE | LARGE,
                "lr": {"0", "-1", "2", "1.5", "-0.5", "10**30", "0-d tensor", "0-d array"},
                "weight_decay": {"0", "-1", "2", "1.5", "-0.5", "10**30", "0-d tensor", "None"},
                "clip_norm": NONE | TWO | LARGE | {"1.5"},
                "micro_batches": NONE,
            },
        ),
        target(
            "TrainingTrace",
            opened,
            {
                "model": network,
                "optimizer": is_(optimizer),
                "folder": is_("trace"),
                "reduction": is_("mean"),
                "resume_at": is_(None),
                "keep": is_("all"),
            },
            {
                "folder": NONE | TEXT,
                "resume_at": NONE | ZERO,
                "model": {"nn.Module"},
                "keep": TWO | LARGE,
            },
        ),
    ]


def _parts() -> list[Target]:
    def solved(part: Any) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            return question(
                ik.InfluenceFunction(
                    network(),
                    train(),
                    checkpoints(),
                    inverse=part(**given),
                    loss_fn=nn.CrossEntropyLoss(),
                )
            )

        return call

    def projected(part: Any) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            dot = ik.GradDot(
                network(),
                train(),
                checkpoints(),
                loss_fn=nn.CrossEntropyLoss(),
                features=part(**given),
            )
            return question(dot)

        return call

    inverses = ("EKFAC", "KFAC", "ConjugateGradients", "Explicit", "LiSSA", "Nystrom")
    maps = ("FactMasked", "Masked", "Projected")
    targets = []
    for name in (*inverses, *maps):
        part = getattr(curvature if name in inverses else projections, name)
        call = solved(part) if name in inverses else projected(part)
        targets.append(target(name, call, arguments_of(part), MASKED if "ask" in name else None))
    return targets


def _operators() -> list[Target]:
    matrix = drawn(4, 4)
    matrix = matrix @ matrix.T + torch.eye(4)

    def operator() -> Any:
        return operators.hessian(quadratic, torch.zeros(4))

    def quadratic(vector: Tensor) -> Tensor:
        return vector @ matrix @ vector / 2

    def output(vector: Tensor) -> Tensor:
        return matrix @ vector

    own = {"operator": operator, "vectors": lambda: drawn(2, 4), "damping": is_(0.1)}
    own |= {"steps": is_(3), "depth": is_(5), "rank": is_(2), "function": is_(quadratic)}
    own |= {"parameters": lambda: torch.zeros(4), "losses": is_(output), "outputs": is_(output)}
    own |= {"loss": is_(torch.sum), "solver": is_("cholesky")}
    fine = {
        "steps": TWO | LARGE | NONE,
        "rank": TWO | LARGE,
        "depth": TWO,
        "repeats": TWO,
        "iterations": TWO,
        "damping": ZERO | NUMBERS | {"0-d tensor", "0-d array"},
        "preconditioner": NONE,
    }

    def used(call: Any, given: dict[str, Any]) -> Any:
        found = call(**given)
        if isinstance(found, operators.Operator):
            return found.product(drawn(2, 4))
        return found(drawn(2, 4)) if callable(found) else found

    targets = []
    for name in (
        "arnoldi",
        "conjugate_gradients",
        "fisher",
        "gauss_newton",
        "hessian",
        "inverse",
        "largest_eigenvalue",
        "lissa",
        "nystrom",
        "JacobiPreconditioner",
        "NystromPreconditioner",
    ):
        call = getattr(operators, name)
        good = arguments_of(call) | {
            k: own[k] for k in inspect.signature(call).parameters if k in own
        }
        if name == "lissa":
            good["steps"] = is_(None)
        targets.append(target(name, lambda call=call, **given: used(call, given), good, fine))
    return targets


def _selection() -> list[Target]:
    def dot(indices: Any = None) -> Any:
        data = train() if indices is None else Subset(train(), indices)
        return ik.GradDot(network(), data, checkpoints(), loss_fn=nn.CrossEntropyLoss())

    asked = {"inputs": batch, "k": is_(2), "proponents": is_(True)}
    return [
        target(
            "contrast",
            ik.contrast,
            {"method": dot, "contrast_inputs": batch, **asked, "show_progress": is_(False)},
            {"k": NONE | ZERO | TWO | LARGE},
        ),
        target(
            "two_stage",
            ik.two_stage,
            {"cheap": dot, "expensive": is_(dot), "candidates": is_(3), **asked},
            {"k": TWO, "candidates": TWO | LARGE},
        ),
        target(
            "max_over_groups",
            ik.max_over_groups,
            {"scores": lambda: drawn(3, N), "groups": is_([0, 1, 1])},
            {"groups": {"negative list"}},
        ),
    ]


def _tokens() -> list[Target]:
    def logits() -> Tensor:
        return drawn(2, 3, 4)

    def ids() -> Tensor:
        return torch.tensor([1, 3])

    def called(kind: Any) -> Callable[..., Any]:
        def call(outputs: Any, targets: Any, **given: Any) -> Any:
            return kind(**given)(outputs, targets)

        return call

    def by_token(**given: Any) -> Any:
        dot = ik.GradDot(network(), train(), checkpoints(), loss_fn=nn.CrossEntropyLoss())
        return dot.influence(batch(), **given)

    given = {"outputs": logits, "targets": ids}
    fine = {
        "token": NONE | ZERO | TWO,
        "other": ZERO | TWO,
        "position": ZERO | TWO | NEGATIVE,
        "shift": ZERO | TWO,
        "mean": FLAGS,
        "targets": set(BAD),  # not read, where there is a token
    }
    named = {"token": is_(1), "position": is_(-1)}
    of_labels = {"outputs": logits, "targets": lambda: torch.ones(2, 3).long()}
    ids_of_few = {"prompts": is_([[1, 2]]), "answers": is_([[3]]), "pad": is_(0)}
    return [
        Target("TokenLogit", called(ik.TokenLogit), given | named, fine),
        Target("TokenLogProbability", called(ik.TokenLogProbability), given | named, fine),
        Target(
            "TokenDifference", called(ik.TokenDifference), given | named | {"other": is_(2)}, fine
        ),
        Target(
            "SequenceLogProbability",
            called(ik.SequenceLogProbability),
            of_labels | {"shift": is_(1), "mean": is_(False)},
            {"shift": ZERO | TWO, "mean": FLAGS},
        ),
        Target(
            "SequenceLogProbability.terms",
            lambda **given: ik.SequenceLogProbability().terms(**given),
            of_labels,
        ),
        Target("prompt_and_answer", ik.prompt_and_answer, ids_of_few, {"pad": ZERO | TWO}),
        target(
            "influence, by token",
            by_token,
            {
                "k": is_(2),
                "per_token": is_("train"),
                "doc_ids": lambda: torch.zeros(N, 1).long(),
                "aggregate": is_(False),
            },
            {"per_token": set(), "doc_ids": NONE},
        ),
    ]


TARGETS = [
    *_constructors(),
    *_selection(),
    *_methods(),
    *_checkpoints(),
    *_traces(),
    *_parts(),
    *_operators(),
    *_tokens(),
]
