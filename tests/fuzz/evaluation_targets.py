"""The public functions of ``evaluation``, ``valuation`` and ``viz``, with arguments they take."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fuzz.bad_input import Target
from fuzz.bad_values import BAD, FLAGS, NONE
from fuzz.watch import LetIn
from influence_kit import KMostInfluentialResults, valuation, viz
from influence_kit import evaluation as ev

M, N, S, K = 3, 6, 8, 2
ANYTHING = set(BAD)
LARGE = {"tensor of 2**62"}
# labels are shown by `str`, whatever they are
LABELS = {
    "list of nan",
    "list of 10**400",
    "list of bools",
    "tensor with inf",
    "tensor of 2**62",
    "array of objects",
    "array of text",
    "array of dates",
}
ROWS_OF_LABELS = {"tensor of nan", "complex tensor", "bool tensor", "masked array", "list of text"}


def drawn(*shape: int) -> Callable[[], Tensor]:
    """Numbers between 0 and 1, the same each time."""
    return lambda: torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def is_(value: Any) -> Callable[[], Any]:
    return lambda: value


def train(indices: Tensor, seed: int) -> nn.Module:
    """A user's training: the mean of the places, and a little of the seed."""
    model = nn.Linear(1, M)
    nn.init.constant_(model.weight, float(indices.double().mean()))
    with torch.no_grad():
        model.bias.copy_(torch.arange(M) * (1.0 + float(indices.double().var(correction=0))) + seed)
    return model


def measure(model: nn.Module) -> Tensor:
    return model(torch.ones(1, 1))[0]


def predict(model: nn.Module) -> Tensor:
    return model(torch.ones(1, 1))[0].round()


def fit(places: np.ndarray) -> float:
    return float(places.sum())


def score(model: float, inputs: Any) -> float:
    return model


def score_all(model: float, inputs: Any) -> np.ndarray:
    return np.full(N, model)


def self_scored(valuation: Any) -> Any:
    """The same, with a score for each training example."""
    return replace(valuation, score=score_all)


def score_each(model: float, places: Any) -> np.ndarray:
    return np.full(len(places), model)


def results() -> KMostInfluentialResults:
    return KMostInfluentialResults(torch.tensor([[0, 5]] * M), torch.tensor([[0.5, -0.25]] * M))


class Tunable:
    """A user's method with a damping."""

    damping = 1.0

    def influence(self, inputs: Any) -> Tensor:
        return drawn(M, N)()


class Fixed:
    """A user's method."""

    def influence(self, inputs: Any) -> Tensor:
        return drawn(M, N)()


def tunable() -> Tunable:
    return Tunable()


def mask() -> Tensor:
    return ev.half_subsets(N, S)


def labels() -> Tensor:
    return torch.tensor([0, 0, 1, 1, 0, 1])


def wrong() -> Tensor:
    return torch.tensor([True, False, False, True, False, False])


def data() -> TensorDataset:
    return TensorDataset(drawn(N, 4)(), labels())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def run() -> list[dict[str, Tensor]]:
    return [network().state_dict()]


def sgd(**changed: Any) -> ev.BatchedSGD:
    given = {
        "make_model": network,
        "inputs": drawn(N, 4)(),
        "targets": labels(),
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 2,
        "learning_rate": 0.1,
        "batch_size": 2,
    }
    return ev.BatchedSGD(**{**given, **changed})


def of(make: Callable[[], Any], method: str) -> Callable[..., Any]:
    """A method of a new object."""
    return lambda **given: safe(getattr(make(), method)(**given))


def retrained(method: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        with TemporaryDirectory() as folder:
            return getattr(ev.Retraining(train, folder), method)(**given)

    return call


def in_folder(**given: Any) -> Any:
    """A ``Retraining`` that is used, so that its folder is made."""
    with TemporaryDirectory() as folder:
        given = {"folder": Path(folder) / "models", **given}
        if isinstance(given["folder"], str):
            given["folder"] = str(Path(folder) / given["folder"])
        return ev.Retraining(**given).outputs(mask()[:1], measure)


def images() -> Tensor:
    return drawn(N, 5, 5)()


def texts() -> list[str]:
    return [f"example {i}" for i in range(N)]


def reported(**given: Any) -> viz.Report:
    return viz.Report("Title", texts(), **given)


def written(**given: Any) -> viz.Report:
    report = viz.Report(**given)
    return safe(report.ranking(drawn(N)()))


def safe(report: Any) -> Any:
    """A report into which no text has brought a script."""
    if isinstance(report, viz.Report) and "<script>run()" in report.html():
        raise LetIn("a script")
    return report


def report_in(folder: str | None, path: Any) -> Any:
    made = viz.Report("Title", texts()).ranking(drawn(N)())
    with TemporaryDirectory() as new:
        return made.write(Path(new) / path if isinstance(path, str) else path)


SEEDS = {"seeds": is_([0, 1])}
TRAIN = {"train": is_(train)}
FLAG = {"leave_out_constant": is_(False)}
FINE_FLAG = {"leave_out_constant": FLAGS}
LOGITS = {"logits": drawn(N, 2), "labels": labels}
SUSPICION = {"scores": drawn(N), "is_wrong": wrong}
OF_WRONG = {"is_wrong": {"list of bools"}, "scores": LARGE}
CHECKPOINTS = {
    "model": network,
    "dataset": data,
    "checkpoints": run,
    "batch_size": is_(2),
    "show_progress": is_(False),
}
FINE_CHECKPOINTS = {"show_progress": FLAGS, "batch_size": {"2", "10**30"}, "loss_fn": NONE}
PANELS = {"heads": is_(("a", "b")), "method": is_(None)}
FINE_PANELS = {"heads": NONE, "method": ANYTHING}
VALUATION = {"seed": is_(0), "keep_models": is_(True)}
FINE_VALUATION = {"seed": {"0", "2"}, "keep_models": FLAGS, "train_count": {"2"}}
SEMIVALUE = {"fit": is_(fit), "score": is_(score), "train_count": is_(N), "empty_utility": is_(0.0)}
ASK = {"inputs": is_(None), "aggregate": is_(False), "show_progress": is_(False)}
FINE_ASK = {"inputs": ANYTHING, "aggregate": FLAGS, "show_progress": FLAGS}


def valued(kind: Callable[..., Any], **own: Any) -> Callable[..., Any]:
    """A valuation that is made and asked."""

    def call(**given: Any) -> Any:
        return kind(**{**own, **given}).values()

    return call


def _valuations() -> list[Target]:
    semi = {**SEMIVALUE, **VALUATION}
    fine = {
        **FINE_VALUATION,
        "empty_utility": FLAGS | {"0", "-1", "2", "1.5", "-0.5", "0-d tensor", "0-d array"},
    }
    order = {"permutations": is_(2), "tolerance": is_(0.1), **semi}
    ordered = {**fine, "permutations": {"2"}, "tolerance": {"0", "2", "1.5"}}
    positive = {"2", "1.5"}
    v = valuation
    made: dict[str, Callable[[], Any]] = {
        "TMCShapley": lambda: v.TMCShapley(fit, score, N, 2),
        "BetaShapley": lambda: v.BetaShapley(fit, score, N, 2, alpha=4.0, beta=1.0),
        "DataBanzhaf": lambda: v.DataBanzhaf(fit, score, N, 20),
    }
    asked = [
        Target(f"{name}.values", of(make, "values"), ASK, FINE_ASK) for name, make in made.items()
    ]
    asked += [
        Target(
            f"{name}.influence",
            of(make, "influence"),
            {**ASK, "k": is_(2), "proponents": is_(True)},
            {**FINE_ASK, "k": {"None", "0", "2", "10**30"}, "proponents": FLAGS},
        )
        for name, make in made.items()
    ]
    asked += [
        Target(
            f"{name}.self_influence",
            of(lambda make=make: self_scored(make()), "self_influence"),
            {"inputs": is_(None), "show_progress": is_(False)},
            FINE_ASK,
        )
        for name, make in made.items()
    ]
    bags = lambda: v.DataOOB(fit, score_each, N, 30)  # noqa: E731
    return [
        *asked,
        Target("TMCShapley", valued(v.TMCShapley), order, ordered),
        Target(
            "BetaShapley",
            valued(v.BetaShapley),
            {**order, "alpha": is_(1.0), "beta": is_(1.0)},
            {**ordered, "alpha": positive, "beta": positive},
        ),
        Target("DataBanzhaf", valued(v.DataBanzhaf), {"subsets": is_(20), **semi}, fine),
        Target(
            "DataOOB",
            valued(v.DataOOB),
            {
                "fit": is_(fit),
                "score": is_(score_each),
                "train_count": is_(N),
                "bags": is_(30),
                "bag_size": is_(3),
                **VALUATION,
            },
            {**FINE_VALUATION, "bag_size": {"None", "2"}, "bags": {"2"}},
        ),
        Target("DataOOB.values", of(bags, "values"), {"show_progress": is_(False)}, FINE_ASK),
        Target(
            "DataOOB.self_influence",
            of(bags, "self_influence"),
            {"show_progress": is_(False)},
            FINE_ASK,
        ),
    ]


def _metrics() -> list[Target]:
    detected = {"curves": lambda: {"loss": ev.detection_curve(drawn(N)(), wrong())}}
    return [
        Target("mislabel_auc", ev.mislabel_auc, SUSPICION, OF_WRONG),
        Target(
            "recall_at",
            ev.recall_at,
            {**SUSPICION, "fraction": is_(0.5)},
            {**OF_WRONG, "fraction": {"1"}},
        ),
        Target("precision_at", ev.precision_at, {**SUSPICION, "fraction": is_(0.5)}, OF_WRONG),
        Target("detection_curve", ev.detection_curve, SUSPICION, OF_WRONG),
        Target(
            "mislabel_report",
            ev.mislabel_report,
            {"scores": lambda: {"a": drawn(N)()}, "is_wrong": wrong, "fractions": is_([0.5])},
            {"is_wrong": {"list of bools"}, "fractions": {"[]", "empty tensor", "empty matrix"}},
        ),
        Target(
            "mislabel_report, of one",
            lambda one, name="a", fraction=0.5: ev.mislabel_report(
                {name: one}, wrong(), [fraction]
            ),
            {"one": drawn(N), "fraction": is_(0.5)},
            {"one": LARGE},
        ),
        Target("mean_loss", ev.mean_loss, {"losses": drawn(2, N)}),
        Target("last_loss", ev.last_loss, {"losses": drawn(2, N)}),
        Target(
            "low_margin",
            ev.low_margin,
            {"logits": drawn(2, N, 2), "labels": labels},
            {"labels": {"list of bools"}},
        ),
        Target("log_odds", ev.log_odds, LOGITS, {"labels": {"list of bools"}}),
        Target(
            "neighbor_disagreement",
            ev.neighbor_disagreement,
            {"features": drawn(N, 2), "labels": labels, "k": is_(2)},
            {"k": {"2"}, "labels": {"list of bools", "tensor of 2**62"}},
        ),
        Target(
            "same_label_cosine",
            ev.same_label_cosine,
            {"features": drawn(N, 2), "labels": labels},
            {"labels": {"list of bools", "tensor of 2**62"}},
        ),
        Target(
            "embedding_cosine",
            ev.embedding_cosine,
            {"test_features": drawn(M, 2), "features": drawn(N, 2)},
        ),
        Target(
            "label_cosine",
            ev.label_cosine,
            {
                "test_features": drawn(M, 2),
                "test_labels": is_([0, 1, 1]),
                "features": drawn(N, 2),
                "labels": labels,
            },
            {"labels": {"list of bools", "tensor of 2**62"}, "test_labels": {"negative list"}},
        ),
        Target(
            "bm25",
            ev.bm25,
            {
                "test_tokens": is_([[1, 2], [3]]),
                "tokens": lambda: [text.split() for text in texts()],
                "k1": is_(1.5),
                "b": is_(0.75),
            },
            {"k1": {"0", "2", "1.5"}, "b": {"0"}},
        ),
        Target(
            "half_subsets",
            ev.half_subsets,
            {"n": is_(N), "count": is_(S), "fraction": is_(0.5), "seed": is_(0)},
            {"n": {"2"}, "count": {"2"}, "seed": {"0", "2", "-1"}},
        ),
        Target(
            "linear_datamodeling_score",
            ev.linear_datamodeling_score,
            {
                "scores": drawn(M, N),
                "subsets": mask,
                "outputs": drawn(S, 2, M),
                "outputs_are": is_("margin"),
                **FLAG,
            },
            FINE_FLAG,
        ),
        Target(
            "loo_correlation",
            ev.loo_correlation,
            {"scores": drawn(M, N), "differences": drawn(2, M, N), **FLAG},
            FINE_FLAG,
        ),
        Target(
            "ridge_leave_one_out",
            ev.ridge_leave_one_out,
            {
                "inputs": drawn(N, 2),
                "targets": drawn(N),
                "test_inputs": drawn(M, 2),
                "ridge": is_(0.1),
                "bias": is_(True),
            },
            {"bias": FLAGS, "ridge": {"2", "1.5", "0"}, "targets": LARGE},
        ),
        Target(
            "RidgeLeaveOneOut.loss_differences",
            of(
                lambda: ev.ridge_leave_one_out(drawn(N, 2)(), drawn(N)(), drawn(M, 2)(), 0.1),
                "loss_differences",
            ),
            {"test_targets": drawn(M)},
            {"test_targets": {"negative list"}},
        ),
        Target("detection_curves", viz.detection_curves, {**detected, "until": is_(1.0)}),
        Target(
            "detection_curves, of one",
            lambda inspected, found: viz.detection_curves({"a": (inspected, found)}),
            {"inspected": is_([0.0, 0.5, 1.0]), "found": is_([0.0, 1.0, 1.0])},
        ),
    ]


def _retraining() -> list[Target]:
    ask = {"scores": drawn(M, N), **TRAIN}
    return [
        Target(
            "leave_one_out",
            ev.leave_one_out,
            {
                **TRAIN,
                "n": is_(N),
                "measure": is_(measure),
                "outputs_are": is_("loss"),
                "indices": is_([0, 2]),
                **SEEDS,
                "by_seed": is_(False),
            },
            {"indices": NONE, "by_seed": FLAGS, "seeds": {"negative list"}},
        ),
        Target(
            "brittleness",
            ev.brittleness,
            {**ask, "predict": is_(predict), "counts": is_([1, 2]), **SEEDS},
            {"seeds": {"negative list"}},
        ),
        Target(
            "removal_quality",
            ev.removal_quality,
            {
                **ask,
                "measure": is_(measure),
                "outputs_are": is_("loss"),
                "fractions": is_([0.2, 0.5]),
                **SEEDS,
                "draws": is_(1),
            },
            {"seeds": {"negative list"}, "draws": {"0", "2"}},
        ),
        Target(
            "tail_patch",
            ev.tail_patch,
            {
                "model": network,
                "train_dataset": data,
                "scores": drawn(M, N),
                "inputs": lambda: (drawn(M, 4)(), torch.tensor([0, 1, 1])),
                "loss_fn": lambda: nn.CrossEntropyLoss(),
                "optimizer": is_(partial(torch.optim.SGD, lr=0.1)),
                "k": is_(2),
                "together": is_(True),
            },
            {"k": {"2"}, "together": FLAGS, "loss_fn": NONE},
        ),
        Target(
            "removal_curve",
            ev.removal_curve,
            {
                "scores": drawn(N),
                **TRAIN,
                "measure": is_(measure),
                "fractions": is_([0.5]),
                "keep": is_(False),
                "repeats": is_(1),
                "seed": is_(0),
            },
            {
                "keep": FLAGS,
                "repeats": {"2"},
                "seed": {"0", "2", "-1"},
                "scores": LARGE | {"negative list", "long tensor"},
            },
        ),
        Target(
            "Retraining",
            in_folder,
            {
                "train_fn": is_(train),
                "folder": is_("models"),
                "model": is_(None),
                "label": is_(None),
                "show_progress": is_(False),
            },
            {
                "folder": {"None", "text", "empty text"},
                "model": {"None", "nn.Module"},
                "label": {"None", "text", "empty text"},
                "show_progress": FLAGS,
            },
        ),
        Target(
            "Retraining.outputs",
            retrained("outputs"),
            {"subsets": lambda: mask()[:2], "measure": is_(measure), **SEEDS},
            {"seeds": {"negative list"}, "subsets": {"bool tensor"}},
        ),
        Target(
            "Retraining.paired_outputs",
            retrained("paired_outputs"),
            {"subsets": lambda: mask()[:2], "measure": is_(measure), **SEEDS},
        ),
        Target(
            "Retraining.checkpoints",
            retrained("checkpoints"),
            {"subsets": lambda: mask()[:2], **SEEDS},
            {"seeds": {"negative list"}, "subsets": {"bool tensor"}},
        ),
        Target(
            "BatchedSGD",
            lambda **given: sgd(**given)(torch.arange(4), 0),
            {
                "make_model": is_(network),
                "inputs": drawn(N, 4),
                "targets": labels,
                "loss_fn": lambda: nn.CrossEntropyLoss(),
                "epochs": is_(1),
                "learning_rate": is_(0.1),
                "batch_size": is_(2),
                "momentum": is_(0.5),
                "weight_decay": is_(0.1),
                "at_once": is_("auto"),
                "same_batches": is_(False),
            },
            {
                "epochs": {"2"},
                "batch_size": {"2"},
                "learning_rate": {"2", "1.5"},
                "momentum": {"0"},
                "weight_decay": {"0", "2", "1.5"},
                "at_once": {"2"},
                "same_batches": FLAGS,
            },
        ),
        Target(
            "BatchedSGD.stacked",
            of(sgd, "stacked"),
            {"subsets": lambda: [torch.arange(3), torch.arange(3, 6)], **SEEDS},
            {"seeds": {"iterator"}},
        ),
        Target(
            "BatchedSGD.train_many",
            lambda **given: list(sgd().train_many(**given)),
            {"subsets": lambda: [torch.arange(3), torch.arange(3, 6)], **SEEDS},
            {"seeds": {"iterator"}},
        ),
        Target(
            "BatchedSGD.checkpoints",
            of(sgd, "checkpoints"),
            {"indices": lambda: torch.arange(4), "seed": is_(0), "epochs": is_([1, 2])},
            {"seed": {"0", "2", "-1"}},
        ),
        Target(
            "BatchedSGD.at_once_of",
            of(sgd, "at_once_of"),
            {"size": is_(3)},
            {"size": {"2", "10**30"}},
        ),
        Target(
            "checkpoint_losses",
            ev.checkpoint_losses,
            {**CHECKPOINTS, "loss_fn": lambda: nn.CrossEntropyLoss(reduction="none")},
            FINE_CHECKPOINTS,
        ),
        Target("checkpoint_logits", ev.checkpoint_logits, CHECKPOINTS, FINE_CHECKPOINTS),
        Target(
            "compare",
            ev.compare,
            {
                "methods": lambda: {"a": Fixed(), "b": drawn(M, N)()},
                "inputs": is_(None),
                "truth": lambda: ev.SubsetTruth(mask(), drawn(S, M)(), "margin"),
                "show_progress": is_(False),
            },
            {"inputs": ANYTHING, "truth": NONE, "show_progress": FLAGS},
        ),
        Target(
            "compare, of one",
            lambda one, subsets, outputs: ev.compare({"a": one}, None, (subsets, outputs, "loss")),
            {"one": drawn(M, N), "subsets": mask, "outputs": drawn(S, M)},
        ),
        Target(
            "tune_damping",
            ev.tune_damping,
            {
                "method": tunable,
                "values": is_([0.1, 1.0]),
                "subsets": mask,
                "outputs": drawn(S, M),
                "inputs": is_(None),
                "outputs_are": is_("margin"),
                "attribute": is_("damping"),
            },
            {"inputs": ANYTHING, "attribute": NONE, "values": ANYTHING},
        ),
    ]


def _figures() -> list[Target]:
    best = {"proponents": results, "opponents": results}
    pixels = {"queries": lambda: images()[:M], "query_titles": is_(["a", "b", "c"]), **best}
    named = {"train_images": images, "train_labels": labels}
    text = {"text", "empty text"}
    first = {"first": {"2", "10**30"}}
    return [
        Target(
            "proponents_and_opponents",
            viz.proponents_and_opponents,
            {**pixels, **named, "is_wrong": wrong, "cmap": is_("gray"), **PANELS},
            {
                **FINE_PANELS,
                "is_wrong": {"None", "list of bools"},
                "train_labels": LABELS,
                "query_titles": {"list of text"},
            },
        ),
        Target(
            "suspects",
            viz.suspects,
            {
                "images": images,
                "titles": texts,
                "given_labels": labels,
                "true_labels": labels,
                "columns": is_(3),
                "cmap": is_("gray"),
            },
            {
                "true_labels": NONE | LABELS,
                "given_labels": LABELS,
                "titles": {"array of text"},
                "columns": {"2", "10**30"},
            },
        ),
        Target(
            "influential_texts",
            viz.influential_texts,
            {
                "queries": is_(["a", "b", "c"]),
                **best,
                "train_texts": texts,
                "train_labels": labels,
                "lines": is_(2),
                **PANELS,
            },
            {
                **FINE_PANELS,
                "queries": {"list of text"},
                "train_labels": NONE | LABELS,
                "train_texts": {"array of text"},
                "lines": {"2", "10**30"},
            },
        ),
        Target(
            "token_heat",
            viz.token_heat,
            {
                "tokens": is_([["a", "b"], ["c", "d"]]),
                "scores": drawn(2, 2),
                "names": is_(["x", "y"]),
            },
            {"names": NONE},
        ),
        Target(
            "layer_bars",
            viz.layer_bars,
            {"by_layer": lambda: {"a": drawn(2)(), "b": drawn(2)()}, "titles": is_(["x", "y"])},
        ),
        Target(
            "feature_matrix",
            viz.feature_matrix,
            {
                "values": drawn(2, 3),
                "rows": is_(["a", "b"]),
                "columns": is_(["c", "d", "e"]),
                "title": is_("t"),
            },
            {"columns": {"list of text"}, "title": text},
        ),
        Target(
            "self_influence_ranking",
            viz.self_influence_ranking,
            {"scores": drawn(N), "names": texts, "is_wrong": wrong, "first": is_(2)},
            {
                "names": NONE | {"array of text"},
                "is_wrong": {"None", "list of bools"},
                "scores": LARGE,
                **first,
            },
        ),
        Target(
            "predicted_and_actual",
            viz.predicted_and_actual,
            {
                "pairs": lambda: {"a": (drawn(M, K)(), drawn(M, K)())},
                "predicted_is": is_("p"),
                "actual_is": is_("q"),
            },
            {"predicted_is": text, "actual_is": text},
        ),
        Target(
            "predicted_and_actual, of one",
            lambda predicted, actual: viz.predicted_and_actual({"a": (predicted, actual)}),
            {"predicted": drawn(M, K), "actual": drawn(M, K)},
        ),
        Target(
            "comparison",
            viz.comparison,
            {"result": lambda: ev.compare({"a": drawn(M, N)(), "b": drawn(M, N)()}, None)},
        ),
        Target(
            "text_table",
            viz.text_table,
            {"header": is_(["a", "b", "c"]), "rows": is_([[1, 2, 3]])},
            {"header": {"list of text"}, "rows": {"[]", "empty tensor", "empty matrix"}},
        ),
    ]


def _reports() -> list[Target]:
    empty = lambda: viz.Report("Title", texts(), labels())  # noqa: E731
    text = {"text", "empty text"}
    return [
        Target(
            "Report",
            written,
            {
                "title": is_("t"),
                "train_examples": texts,
                "train_labels": labels,
                "true_labels": labels,
                "method": is_("m"),
                "feature_names": is_(None),
                "cmap": is_("gray"),
                "letters": is_(100),
                "reading": is_(None),
                "date": is_(None),
            },
            {
                "title": text,
                "train_examples": LABELS
                - {"list of 10**400", "array of objects", "array of dates"},
                "feature_names": ANYTHING,
                "train_labels": LABELS,
                "true_labels": NONE | LABELS,
                "method": ANYTHING,
                "letters": {"2", "10**30"},
                "reading": NONE | text,
                "date": NONE | text,
            },
        ),
        Target(
            "Report.explain",
            of(empty, "explain"),
            {
                "queries": is_(["a", "b", "c"]),
                "proponents": results,
                "opponents": results,
                "titles": is_(["x", "y", "z"]),
                "labels": is_([1, 2, 3]),
                "predictions": is_([1, 2, 3]),
                "heading": is_("h"),
                "heads": is_(("a", "b")),
            },
            {
                "queries": {"list of text", "negative list", "tensor of nan", "bool tensor"},
                "opponents": NONE,
                "titles": {"None", "list of text"},
                "labels": NONE | ROWS_OF_LABELS | {"negative list"},
                "predictions": NONE | ROWS_OF_LABELS | {"negative list"},
                "heading": text,
                "heads": NONE,
            },
        ),
        Target(
            "Report.ranking",
            of(empty, "ranking"),
            {"scores": drawn(N), "first": is_(3), "heading": is_("h"), "text": is_("t")},
            {"first": {"2", "10**30"}, "heading": text, "text": text, "scores": LARGE},
        ),
        Target(
            "Report.figure",
            of(empty, "figure"),
            {
                "heading": is_("h"),
                "figure": lambda: viz.detection_curves({"a": ([0.0, 1.0], [0.0, 1.0])}),
                "text": is_("t"),
            },
            {"heading": text, "text": text},
        ),
        Target(
            "Report.write",
            lambda path: report_in(None, path),
            {"path": is_("page.html")},
            {"path": {"text"}},
        ),
    ]


def _sanity() -> list[Target]:
    marked = {"scores": drawn(M, N)}
    some = is_([True, False, True])
    same = {"k": is_(2), **marked}
    few = {"k": {"2"}}
    classes = {"list of bools"}
    of_train = {"labels": classes | {"tensor of 2**62"}, "subclasses": classes | LARGE}
    of_tests = {"test_labels": {"negative list"}, "test_subclasses": {"negative list"}}
    return [
        Target(
            "class_detection",
            ev.class_detection,
            {"test_labels": is_([0, 1, 1]), "labels": labels, **same},
            {**few, **of_train, **of_tests},
        ),
        Target(
            "subclass_detection",
            ev.subclass_detection,
            {"test_subclasses": is_([0, 1, 1]), "subclasses": labels, **same},
            {**few, **of_train, **of_tests},
        ),
        Target("top_k_cardinality", ev.top_k_cardinality, same, few),
        Target("outlier_share", ev.outlier_share, same, few),
        Target(
            "outlier_share, of indices",
            lambda indices: ev.outlier_share(KMostInfluentialResults(indices, drawn(M, K)()), 1),
            {"indices": lambda: results().indices},
        ),
        Target(
            "shortcut_detection",
            ev.shortcut_detection,
            {**marked, "has_shortcut": wrong, "test_has_shortcut": some},
            {"has_shortcut": {"list of bools"}},
        ),
        Target(
            "mixed_datasets",
            ev.mixed_datasets,
            {**marked, "is_adversarial": wrong, "test_is_adversarial": some},
            {"is_adversarial": {"list of bools"}},
        ),
        Target(
            "fact_tracing",
            ev.fact_tracing,
            {"relevant": lambda: drawn(M, N)() > 0.3, **same},
            {**few, "relevant": {"bool tensor"}},
        ),
        Target(
            "model_randomization",
            ev.model_randomization,
            {**marked, "random_scores": drawn(M, N), **FLAG},
            FINE_FLAG,
        ),
    ]


TARGETS = [*_metrics(), *_sanity(), *_retraining(), *_valuations(), *_figures(), *_reports()]
