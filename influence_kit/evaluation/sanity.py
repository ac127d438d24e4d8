"""Sanity metrics of plain scores: what any method should pass, without training again.

Shapes: m test examples, n training examples, k the number of top training examples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.arguments import check_flag
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, class_labels, marks, numbers
from influence_kit.evaluation.correlation import RowCorrelation, ranks, row_correlations, spearman
from influence_kit.evaluation.row_mean import RowMean
from influence_kit.evaluation.top_examples import TopExamples, top_examples


@dataclass(frozen=True, eq=False, repr=False)
class Detection:
    """How well scores rank marked training examples first, for each test example.

    Attributes:
        auc: the area under the ROC curve, 0 to 1; random scores reach 0.5. It is 1 minus the mean
            rank of the marked examples, counted from 0 for the best possible to 1 for the worst.
        average_precision: the area under the precision-recall curve, 0 to 1, as
            ``sklearn.metrics.average_precision_score`` gives it; random scores reach about
            ``share``.
        share: the share of the training set that is marked.
    """

    auc: RowMean
    average_precision: RowMean
    share: float

    def __repr__(self) -> str:
        rows = [
            ["AUC", *self.auc.cells(), "0.500"],
            ["average precision", *self.average_precision.cells(), f"{self.share:.3f}"],
        ]
        return text_table(["", "mean", "std. error", "at random"], rows)


def class_detection(
    scores: Values | TopExamples, test_labels: Values, labels: Values, k: int = 1
) -> RowMean:
    r"""The share of each test example's top k that have its label.

    .. math::
        \frac{1}{k} \sum_{i \in \mathrm{top}_k(\tau_t)} [y_i = y_t]

    From 0 to 1; random scores reach the share of the label in the training set. Examples of the
    same class are expected to be proponents. A low value is a sign of an error (a wrong sign, a
    wrong order of the data); a high one is not yet evidence: ``label_cosine`` reaches it, too.

    Args:
        scores: ``[m, n]``, positive is a proponent; or what ``influence(inputs, k=...)`` returns.
        test_labels: the labels (or the predicted classes) of the test examples, ``[m]``.
        labels: the labels of the training examples, ``[n]``.
        k: how many examples with the highest scores count, ties by index.

    Raises:
        InvalidArgumentError: for shapes that do not fit each other, or a ``k`` outside 1 to n.

    Example:
        >>> scores = [[3.0, 2.0, -1.0], [0.5, -2.0, 4.0]]
        >>> class_detection(scores, [0, 1], [0, 1, 1], k=2).per_test.tolist()
        [0.5, 0.5]
    """
    return _same(scores, test_labels, labels, k, "labels")


def subclass_detection(
    scores: Values | TopExamples, test_subclasses: Values, subclasses: Values, k: int = 1
) -> RowMean:
    """The share of each test example's top k that have its subclass, which training did not see.

    Train the model on merged classes (cats and dogs as "animal"), and see whether scores find the
    examples of the original class. The formula, arguments and errors are those of
    ``class_detection``. Random scores within the right merged class reach the share of the subclass
    in that class, which is the value to compare with.

    Args:
        scores: ``[m, n]``, positive is a proponent; or what ``influence(inputs, k=...)`` returns.
        test_subclasses: the subclasses of the test examples, ``[m]``.
        subclasses: the subclasses of the training examples, ``[n]``.
        k: how many examples with the highest scores count, ties by index.

    Raises:
        InvalidArgumentError: for shapes that do not fit each other, or a ``k`` outside 1 to n.

    Example:
        >>> subclass_detection([[3.0, 2.0, -1.0]], [7], [7, 8, 7], k=1).mean
        1.0
    """
    return _same(scores, test_subclasses, subclasses, k, "subclasses")


def shortcut_detection(
    scores: Values, has_shortcut: Values, test_has_shortcut: Values
) -> Detection:
    """Whether training examples with a shortcut rank first for test examples that have it.

    A shortcut is a feature that the model uses in place of the right ones: a watermark on the
    images of one class. Add it to some training examples, make sure that the model relies on it,
    and add it to test examples.

    The same call with the test examples *without* the shortcut (``~test_has_shortcut``) should give
    about 0.5: a method that ranks these training examples first for every test example does not
    explain anything.

    Args:
        scores: ``[m, n]``, positive is a proponent.
        has_shortcut: which training examples have it, bool ``[n]``.
        test_has_shortcut: which test examples have it, bool ``[m]``; the others are left out.

    Returns:
        AUC and average precision over the test examples with the shortcut.

    Raises:
        InvalidArgumentError: for other shapes, where all or no training examples are marked, or no
            test example is.

    Example:
        >>> scores = [[3.0, 2.0, -1.0], [0.5, -2.0, 4.0]]
        >>> shortcut_detection(scores, [True, False, False], [True, False]).auc.mean
        1.0
    """
    return _detection(scores, has_shortcut, test_has_shortcut, "has_shortcut")


def mixed_datasets(
    scores: Values, is_adversarial: Values, test_is_adversarial: Values
) -> Detection:
    """Whether the examples of another data set rank first for test examples of that data set.

    Mix some examples of another source, all with one label, into the training set. For test
    examples of that source which the model gives this label, they should come first.

    Args:
        scores: ``[m, n]``, positive is a proponent.
        is_adversarial: which training examples are of the other source, bool ``[n]``.
        test_is_adversarial: which test examples are, bool ``[m]``; the others are left out.

    Returns:
        AUC and average precision over the test examples of the other source.

    Raises:
        InvalidArgumentError: for other shapes, where all or no training examples are marked, or no
            test example is.

    Example:
        >>> mixed_datasets([[1.0, 3.0, 2.0]], [False, True, True], [True])
                            mean  std. error  at random
        -----------------  -----  ----------  ---------
        AUC                1.000  -               0.500
        average precision  1.000  -               0.667
    """
    return _detection(scores, is_adversarial, test_is_adversarial, "is_adversarial")


def model_randomization(
    scores: Values, random_scores: Values, leave_out_constant: bool = False
) -> RowCorrelation:
    """Spearman correlation of the scores of a model and of the same model with random weights.

    Scores that explain the model change when its weights are replaced by random ones: the
    correlation should be well below 1. A method that keeps the order describes the data, not the
    model. It is not 0 for gradients of a loss, which contain the labels whatever the weights are.

    Args:
        scores: of the trained model, ``[m, n]``.
        random_scores: of the model with random weights, same shape.
        leave_out_constant: leave out the test examples whose scores are all equal in one of the
            two. By default, constant random scores are an error, and constant scores count as 0.

    Raises:
        InvalidArgumentError: for shapes that differ, or a test example whose random scores are all
            equal.

    Example:
        >>> model_randomization([[1.0, 2.0, 3.0]], [[-1.0, -2.0, -9.0]]).mean
        -1.0
    """
    check_flag(leave_out_constant, "leave_out_constant")
    tau = numbers(scores, "scores", "[m, n]")
    of_random = numbers(random_scores, "random_scores", "[m, n]")
    if tau.shape != of_random.shape:
        raise InvalidArgumentError(
            f"`scores` has shape {list(tau.shape)} and `random_scores` {list(of_random.shape)}; "
            "both must be of the same test and training examples"
        )
    (found,) = row_correlations(
        tau, of_random[None], "random_scores", leave_out_constant, [spearman]
    )
    return found


def _same(
    scores: Values | TopExamples, tests: Values, labels: Values, k: int, name: str
) -> RowMean:
    """The share of the top k with the label of the test example."""
    top = top_examples(scores, k)
    of_tests = class_labels(tests, f"test_{name}", len(top.indices))
    given = class_labels(labels, name, top.count_of(labels, name))
    same = given[top.indices] == of_tests[:, None]
    return RowMean(same.double().mean(dim=1))


def _detection(scores: Values, marked: Values, tests: Values, name: str) -> Detection:
    """AUC and average precision of finding the marked examples, for the marked test examples."""
    tau = numbers(scores, "scores", "[m, n]")
    positive = _marks(marked, name, "[n]", tau.shape[1])
    chosen = _marks(tests, f"test_{name}", "[m]", tau.shape[0])
    w = int(positive.sum())
    if w in (0, len(positive)) or not bool(chosen.any()):
        raise InvalidArgumentError(
            f"`{name}` marks {w} of {len(positive)} training examples and `test_{name}` "
            f"{int(chosen.sum())} of {len(chosen)} test examples; mark some but not all of the "
            "training examples, and at least one test example"
        )
    rows = tau[chosen]
    return Detection(
        RowMean(_auc(rows, positive)),
        RowMean(_average_precision(rows, positive)),
        w / len(positive),
    )


def _marks(values: Values, name: str, shape: str, count: int) -> Tensor:
    found = marks(values, name, shape, "True for the marked examples")
    if len(found) != count:
        raise InvalidArgumentError(
            f"`{name}` has {len(found)} items; `scores` has {count} examples along that dimension"
        )
    return found


def _auc(rows: Tensor, positive: Tensor) -> Tensor:
    """P(score of a marked example > of another) + P(equal) / 2, for each row."""
    w, n = int(positive.sum()), len(positive)
    won: Tensor = ranks(rows)[:, positive].sum(dim=1) - w * (w + 1) / 2
    return won / (w * (n - w))


def _average_precision(rows: Tensor, positive: Tensor) -> Tensor:
    """The mean over marked examples of the precision among all that score at least as high."""
    own = rows[:, positive].contiguous()
    # those that score at least as high: among the marked ones, and among all
    found = own.shape[1] - torch.searchsorted(own.sort(dim=1).values, own)
    seen = rows.shape[1] - torch.searchsorted(rows.sort(dim=1).values, own)
    return (found.double() / seen).mean(dim=1)
