"""The results of the demo as texts, figures and a page; printed by its caller."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit import viz
from influence_kit.core.tables import text_table
from influence_kit.demo.digits import BATCH, Digits
from influence_kit.demo.findings import INSPECTED, SELF_INFLUENCE, Detection, Explained, winners
from influence_kit.evaluation import detection_curve
from influence_kit.methods.tracin.tracin import TracInCP
from influence_kit.viz.captions import score_text

SUSPECTS = 24
SCORE_MEANING = f"""\
A score is the sum over the checkpoints of
  learning rate * <gradient of the test image's loss, gradient of the training image's loss>:
to first order, how much the test image's loss decreases by one gradient step on that training
image alone at each checkpoint.
  positive: a proponent; training on it lowered the loss of this test image
  negative: an opponent; training on it raised that loss
  near 0:   it hardly mattered
The unit is that of the test loss (cross-entropy, in nats), without rescaling. Training averaged the
loss over batches of {BATCH}, so one step changed the loss by about 1/{BATCH} of that. The loss is
not linear over such long steps: read a large score as a rank, not as an amount."""


def data_text(digits: Digits, is_wrong: Tensor) -> str:
    """A description of the training data."""
    n, wrong = len(is_wrong), int(is_wrong.sum())
    return (
        f"{n} training and {len(digits.test_labels)} test images of handwritten digits, 8 x 8 "
        f"pixels.\n{wrong} of the training labels ({wrong / n:.0%}) were changed to a wrong class "
        "at random."
    )


def explained_text(explained: Explained, given: Tensor, true: Tensor) -> str:
    """A table of proponents and opponents for each test image, and how many labels are flipped."""
    header = ["", "training image", "given label", "score", "label flipped"]
    parts = []
    chosen = zip(explained.places.items(), explained.titles, strict=True)
    for row, ((reason, index), title) in enumerate(chosen):
        heading = f"Test image #{index} ({reason}): {', '.join(title.splitlines())}"
        table = text_table(header, _listed(explained, row, given, true))
        parts.append(f"{heading}\n\n{table}")
    listed = torch.cat([explained.proponents.indices, explained.opponents.indices], dim=1)
    flipped = int((given != true)[listed].sum())
    parts.append(
        f"{flipped} of these {listed.numel()} have a flipped label. The network fits such images "
        "badly, so their\ngradients are large, and so are their scores."
    )
    return "\n\n".join(parts)


def _listed(explained: Explained, row: int, given: Tensor, true: Tensor) -> list[list[object]]:
    """The cells of the proponents and opponents of one test image."""
    table: list[list[object]] = []
    for role in ("proponent", "opponent"):
        results = explained.proponents if role == "proponent" else explained.opponents
        indices = results.indices[row].tolist()
        scores = results.influence_scores[row].tolist()
        for index, score in zip(indices, scores, strict=True):
            label, truth = int(given[index]), int(true[index])
            flipped = "no" if label == truth else f"yes (true: {truth})"
            table.append([role, f"#{index}", label, score_text(score), flipped])
    return table


def detection_text(detections: Mapping[str, Detection]) -> str:
    """A table of the scores that find wrong labels, and which of them did best."""
    rows = [[name, f"{d.auc:.4f}", f"{d.recall:.1%}"] for name, d in detections.items()]
    table = text_table(["score", "AUC", f"found in the first {INSPECTED:.0%}"], rows)
    return f"{table}\n\n{verdict(detections)}"


def verdict(detections: Mapping[str, Detection]) -> str:
    """Which scores found the wrong labels best."""
    by_auc = winners({name: d.auc for name, d in detections.items()})
    by_recall = winners({name: d.recall for name, d in detections.items()})
    if by_auc == by_recall == [SELF_INFLUENCE]:
        judged = "Self-influence is best here; the losses are cheaper, and close."
    elif SELF_INFLUENCE in (*by_auc, *by_recall):
        judged = "Self-influence is among the best here; the losses are cheaper."
    else:
        judged = (
            "Self-influence is not the best here: a loss, which is cheaper to compute, does better."
        )
    return (
        f"Highest AUC: {' and '.join(by_auc)}.\n"
        f"Most found in the first {INSPECTED:.0%}: {' and '.join(by_recall)}.\n{judged}"
    )


def figures(
    digits: Digits,
    given: Tensor,
    is_wrong: Tensor,
    explained: Explained,
    detections: Mapping[str, Detection],
) -> dict[str, Figure]:
    """The figures, by file name."""
    shown = list(explained.places.values())
    suspicion = detections[SELF_INFLUENCE].scores
    top = suspicion.argsort(descending=True, stable=True)[:SUSPECTS]
    titles = [f"{i + 1}. #{n}" for i, n in enumerate(top.tolist())]
    curves = {name: detection_curve(d.scores, is_wrong) for name, d in detections.items()}
    return {
        "proponents_and_opponents.png": viz.proponents_and_opponents(
            digits.test_images[shown],
            explained.titles,
            explained.proponents,
            explained.opponents,
            digits.train_images,
            given,
            is_wrong,
            cmap="gray_r",
        ),
        "suspects.png": viz.suspects(
            digits.train_images[top], titles, given[top], digits.train_labels[top], cmap="gray_r"
        ),
        "detection_curves.png": viz.detection_curves(curves, until=3 * INSPECTED),
    }


def page(
    tracin: TracInCP,
    digits: Digits,
    given: Tensor,
    explained: Explained,
    detections: Mapping[str, Detection],
    curves: Figure,
) -> viz.Report:
    """All results as a web page, with the images beside their scores."""
    chosen, wrong = (
        list(explained.places.values()),
        float((given != digits.train_labels).float().mean()),
    )
    made = viz.Report(
        f"Handwritten digits, {wrong:.0%} of them with a wrong label",
        digits.train_images,
        given,
        true_labels=digits.train_labels,
        method=tracin,
        cmap="gray_r",
    )
    made.explain(
        digits.test_images[chosen],
        explained.proponents,
        explained.opponents,
        titles=[f"Test image #{index}, the {reason}" for reason, index in explained.places.items()],
        labels=digits.test_labels[chosen],
        predictions=explained.predictions,
    )
    made.ranking(detections[SELF_INFLUENCE].scores, first=SUSPECTS)
    return made.figure("How fast the wrong labels are found", curves, verdict(detections))


def save(pictures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write the figures into the folder, and return their files."""
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=130)
    return [folder / name for name in pictures]
