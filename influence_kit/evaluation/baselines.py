"""Simple scores that a method should beat, computed from plain arrays, without gradients.

Scores ``[n]`` of training examples alone are suspicions: higher means that the label is more likely
wrong. Shapes: m test examples, n training examples, C checkpoints, c classes, d features.
"""

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, shown
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.scaling import unit_rows
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, class_labels, numbers


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds log p - log(1 - p) of each label under the softmax of the logits, ``[m]``.

    The margin that linear datamodeling scores usually measure (arXiv 2303.14186): it does not
    saturate as probabilities and losses do. Logits that are NaN give NaN.

    Args:
        logits: ``[m, c]``, two classes or more.
        labels: the class of each, int64 ``[m]``.

    Raises:
        InvalidArgumentError: for other shapes or types, or a label without a logit.

    Example:
        >>> log_odds(torch.tensor([[2.0, 0.5]]), torch.tensor([0])).tolist()
        [1.5]
    """
    for name, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_complex():
            raise InvalidArgumentError(
                f"`{name}` must be a dense tensor of real numbers; got {shown(given)}"
            )
    whole = not (
        labels.is_meta or logits.is_meta or labels.is_floating_point() or labels.dtype == torch.bool
    )
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels) or not whole:
        raise InvalidArgumentError(
            f"`logits` has shape {list(logits.shape)} and `labels` {list(labels.shape)}, of "
            f"{labels.dtype}; expected [m, c] and the class of each, integers [m]"
        )
    own, others = _own_and_others(logits, labels.long())
    return own - others.logsumexp(dim=-1)


def mean_loss(losses: Values) -> Tensor:
    """The loss of each training example, averaged over checkpoints.

    Args:
        losses: ``[C, n]``, of ``checkpoint_losses``.

    Returns:
        Suspicions ``[n]``.

    Example:
        >>> mean_loss([[1.0, 3.0], [0.0, 5.0]]).tolist()
        [0.5, 4.0]
    """
    return numbers(losses, "losses", "[C, n]").mean(dim=0)


def last_loss(losses: Values) -> Tensor:
    """The loss of each training example at the last checkpoint.

    Args:
        losses: ``[C, n]``, of ``checkpoint_losses``, in the order of training.

    Returns:
        Suspicions ``[n]``.

    Example:
        >>> last_loss([[1.0, 3.0], [0.0, 5.0]]).tolist()
        [0.0, 5.0]
    """
    return numbers(losses, "losses", "[C, n]")[-1]


def low_margin(logits: Values, labels: Values) -> Tensor:
    """The largest other logit minus that of the label, averaged over checkpoints.

    The area under the margin with its sign reversed (arXiv 2001.10528), with checkpoints in place
    of epochs.

    Args:
        logits: ``[C, n, c]``, of ``checkpoint_logits``.
        labels: the labels that are given, ``[n]``.

    Returns:
        Suspicions ``[n]``.

    Example:
        >>> low_margin([[[2.0, 0.5], [1.0, 4.0]]], [0, 0]).tolist()
        [-1.5, 3.0]
    """
    values = numbers(logits, "logits", "[C, n, c]")
    given = class_labels(labels, "labels", values.shape[1])
    own, others = _own_and_others(values, given.expand(values.shape[:2]))
    return (others.amax(dim=-1) - own).mean(dim=0)


def neighbor_disagreement(features: Values, labels: Values, k: int = 10) -> Tensor:
    """The share of an example's k nearest neighbours that have another label.

    Nearest by Euclidean distance, ties by index; an example is not a neighbour of itself.

    Args:
        features: of the training examples, ``[n, d]``.
        labels: the labels that are given, ``[n]``.
        k: how many neighbours, 1 to n - 1.

    Returns:
        Suspicions ``[n]``, from 0 to 1.

    Example:
        >>> neighbor_disagreement([[0.0], [0.1], [0.2], [5.0]], [0, 1, 0, 1], k=2).tolist()
        [0.5, 1.0, 0.5, 0.5]
    """
    points = numbers(features, "features", "[n, d]")
    n = len(points)
    given = class_labels(labels, "labels", n)
    if not 1 <= check_count(k, "k", least=0) < n:
        raise InvalidArgumentError(f"`k` is {k}; {n} examples have 1 to {n - 1} neighbours each")
    shares = []
    for rows in torch.arange(n).split(_rows_of(n)):
        distances = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), rows] = torch.inf
        nearest = distances.argsort(dim=1, stable=True)[:, :k]
        shares.append((given[nearest] != given[rows, None]).double().mean(dim=1))
    return torch.cat(shares)


def same_label_cosine(features: Values, labels: Values) -> Tensor:
    """Minus the mean cosine between an example's features and those of the others of its label.

    Args:
        features: of the training examples, ``[n, d]``.
        labels: the labels that are given, ``[n]``; each at least twice.

    Returns:
        Suspicions ``[n]``, from -1 to 1.

    Example:
        >>> same_label_cosine([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [0, 0, 0]).tolist()
        [-0.5, -0.0, -0.5]
    """
    units = _units(numbers(features, "features", "[n, d]"), "features")
    given = class_labels(labels, "labels", len(units))
    _, group, sizes = torch.unique(given, return_inverse=True, return_counts=True)
    alone = torch.nonzero(sizes[group] == 1).flatten()
    if len(alone):
        raise InvalidArgumentError(
            f"example {int(alone[0])} is the only one of label {int(given[alone[0]])}; a label "
            "needs two examples to compare"
        )
    sums = torch.zeros(len(sizes), units.shape[1], dtype=torch.float64).index_add_(0, group, units)
    # without its cosine with itself, 1
    with_others: Tensor = (units * sums[group]).sum(dim=1) - 1
    means: Tensor = with_others / (sizes[group] - 1)
    return -means


def embedding_cosine(test_features: Values, features: Values) -> Tensor:
    """Scores: the cosine of the features, such as embeddings by another model.

    A baseline that attribution methods should beat; for classes, ``label_cosine`` is a stronger
    one. ``SimilarityInfluence`` computes the same from the outputs of a layer.

    Args:
        test_features: ``[m, d]``.
        features: of the training examples, ``[n, d]``.

    Returns:
        Scores ``[m, n]``, from -1 to 1.

    Raises:
        InvalidArgumentError: for other shapes, or a row of zeros.

    Example:
        >>> embedding_cosine([[1.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]).tolist()
        [[1.0, 0.0]]
    """
    tests = _units(numbers(test_features, "test_features", "[m, d]"), "test_features")
    points = _units(numbers(features, "features", "[n, d]"), "features")
    if tests.shape[1] != points.shape[1]:
        raise InvalidArgumentError(
            f"test examples have {tests.shape[1]} features and training examples "
            f"{points.shape[1]}; both must have the same features"
        )
    return tests @ points.T


def label_cosine(
    test_features: Values, test_labels: Values, features: Values, labels: Values
) -> Tensor:
    """Scores: the cosine of the features, with a minus sign where the labels differ.

    A baseline that attribution methods should beat.

    Args:
        test_features: ``[m, d]``.
        test_labels: ``[m]``.
        features: of the training examples, ``[n, d]``.
        labels: of the training examples, ``[n]``.

    Returns:
        Scores ``[m, n]``; positive marks a proponent.

    Example:
        >>> label_cosine([[1.0, 0.0]], [0], [[2.0, 0.0], [3.0, 0.0]], [0, 1]).tolist()
        [[1.0, -1.0]]
    """
    cosines = embedding_cosine(test_features, features)
    of_tests = class_labels(test_labels, "test_labels", len(cosines))
    same = of_tests[:, None] == class_labels(labels, "labels", cosines.shape[1])
    return torch.where(same, cosines, -cosines)


def _own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of each label, and all logits with that one at minus infinity."""
    classes = logits.shape[-1]
    if classes < 2 or labels.min() < 0 or labels.max() >= classes:
        raise InvalidArgumentError(
            f"the logits are of {classes} classes and the labels from {int(labels.min())} to "
            f"{int(labels.max())}; there must be at least two classes, and a logit for each label"
        )
    columns = labels[..., None]
    own = logits.gather(-1, columns)[..., 0]
    return own, logits.scatter(-1, columns, -torch.inf)


def _units(rows: Tensor, name: str) -> Tensor:
    zero = torch.nonzero(rows.abs().amax(dim=1) == 0).flatten()
    if len(zero):
        raise InvalidArgumentError(
            f"row {int(zero[0])} of `{name}` is zero, which has no cosine with anything"
        )
    return unit_rows(rows)


def _rows_of(n: int) -> int:
    """How many rows of distances to n examples fit into memory at once."""
    return rows_within(workspace_bytes(torch.device("cpu")), 3 * 8 * n)
