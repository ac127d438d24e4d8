"""What the demo computes: explained test images, and scores that find wrong labels.

Shapes: m test images, n training images, k of them per test image, C checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from influence_kit.evaluation import mislabel_auc, recall_at
from influence_kit.methods.tracin.tracin import TracInCP
from influence_kit.scoring.reducers import KMostInfluentialResults

INSPECTED = 0.1  # the share of the training set that is inspected
SELF_INFLUENCE = "TracInCP self-influence"
MEAN_LOSS = "loss averaged over checkpoints"
LAST_LOSS = "loss at the last checkpoint"


class Explained(NamedTuple):
    """Some test images, with the training images that helped and hurt them most.

    Attributes:
        places: indices in the test set, ``[m]``, by the reason why they were chosen.
        titles: label and prediction of each, ``[m]``.
        proponents: the k highest scores of each.
        opponents: the k lowest scores of each.
        predictions: the predicted class of each, and its probability, ``[m]``.
    """

    places: dict[str, int]
    titles: list[str]
    proponents: KMostInfluentialResults
    opponents: KMostInfluentialResults
    predictions: list[str]


class Detection(NamedTuple):
    """One score of all training images ``[n]``, and how well it finds the wrong labels.

    Attributes:
        scores: the suspicion of each training image, ``[n]``.
        auc: the area under its ROC curve.
        recall: the share of wrong labels among the first ``INSPECTED`` of the images.
    """

    scores: Tensor
    auc: float
    recall: float


def choose_tests(probabilities: Tensor, labels: Tensor) -> dict[str, int]:
    """Indices of three test images: the surest right one, the surest wrong one, the least sure one.

    If all are classified correctly, there are two.

    Args:
        probabilities: of each class, ``[m, classes]``.
        labels: the true classes ``[m]``.
    """
    confidence, predicted = probabilities.max(dim=1)
    two = probabilities.topk(2, dim=1).values
    doubt = 1 - (two[:, 0] - two[:, 1])
    right = predicted == labels
    candidates = {
        "surest right one": confidence.where(right, -1.0),
        "surest wrong one": confidence.where(~right, -1.0),
        "least sure one": doubt,
    }
    chosen: dict[str, int] = {}
    for reason, key in candidates.items():
        key[list(chosen.values())] = -1.0
        if float(key.max()) >= 0:
            chosen[reason] = int(key.argmax())
    return chosen


@torch.no_grad()
def explain(
    tracin: TracInCP,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    k: int,
    show_progress: bool = False,
) -> Explained:
    """Proponents and opponents of three of the test images ``[m, ...]`` with labels ``[m]``."""
    probabilities = model(images).softmax(dim=1)
    chosen = choose_tests(probabilities, labels)
    indices = list(chosen.values())
    batch = images[indices], labels[indices]
    confidence, predicted = probabilities[indices].max(dim=1)
    guesses = list(zip(predicted.tolist(), confidence.tolist(), strict=True))
    predictions = [f"{guess}, {sure:.0%} sure" for guess, sure in guesses]
    titles = [
        f"true {label}\npredicted {guess}\n{sure:.0%} sure"
        for label, (guess, sure) in zip(batch[1].tolist(), guesses, strict=True)
    ]
    proponents, opponents = (
        tracin.influence(batch, k, highest, show_progress) for highest in (True, False)
    )
    return Explained(chosen, titles, proponents, opponents, predictions)


def detect(self_influence: Tensor, losses: Tensor, is_wrong: Tensor) -> dict[str, Detection]:
    """How well self-influence ``[n]`` and the losses ``[C, n]`` find the wrong labels ``[n]``."""
    scores = {
        SELF_INFLUENCE: self_influence,
        MEAN_LOSS: losses.mean(dim=0),
        LAST_LOSS: losses[-1],
    }
    return {
        name: Detection(s, mislabel_auc(s, is_wrong), recall_at(s, is_wrong, INSPECTED))
        for name, s in scores.items()
    }


def winners(values: Mapping[str, float]) -> Sequence[str]:
    """The names with the highest value; several in case of ties."""
    best = max(values.values())
    return [name for name, value in values.items() if value == best]
