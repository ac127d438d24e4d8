"""Contrast: scores of queries minus the mean scores of other queries.

Shapes: m test examples, c contrast examples, n training examples, k requested examples.
"""

from typing import Any, overload

from torch import Tensor

from influence_kit.core.arguments import check_flag, shown
from influence_kit.data.batches import example_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.restarts import check_k, given, starts_again
from influence_kit.scoring.reducers import AllScores, KMostInfluentialResults, Shifted


@overload
def contrast(
    method: InnerProductInfluence,
    inputs: Any,
    contrast_inputs: Any,
    k: None = None,
    proponents: bool = True,
    show_progress: bool = False,
) -> Tensor: ...


@overload
def contrast(
    method: InnerProductInfluence,
    inputs: Any,
    contrast_inputs: Any,
    k: int,
    proponents: bool = True,
    show_progress: bool = False,
) -> KMostInfluentialResults: ...


def contrast(
    method: InnerProductInfluence,
    inputs: Any,
    contrast_inputs: Any,
    k: int | None = None,
    proponents: bool = True,
    show_progress: bool = False,
) -> Tensor | KMostInfluentialResults:
    r"""What teaches these test examples, and not those: scores minus the mean of other scores.

    .. math::
        \tau_{ti} - \frac{1}{c} \sum_{s} \tau_{si}

    Scores of methods that are sums of inner products are linear in what they take of the test
    examples. So this equals the scores of test gradients from each of which the mean gradient of
    the contrast examples is subtracted (for ``GradCos`` the mean of their unit gradients). What all
    test examples share, such as a format or a language, cancels.

    It costs two passes over the training set (one per call of ``influence``), and memory for n
    numbers beside that of ``influence``.

    Args:
        method: a method that is a sum of inner products (``InnerProductInfluence``).
        inputs: the test examples, as for ``influence``.
        contrast_inputs: the contrast examples, as ``inputs``.
        k: how many proponents or opponents to return; None for all scores.
        proponents: the highest scores; False for the lowest.
        show_progress: a bar over the training set for each pass.

    Returns:
        Scores ``[m, n]``, or ``KMostInfluentialResults`` of ``[m, min(k, n)]``, in the unit of the
        method's scores.

    Raises:
        InvalidArgumentError: for another method, whose scores of a set of test examples need not be
            the sum of theirs; otherwise as ``influence``.

    Example:
        >>> import torch
        >>> from influence_kit import GradDot
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> dot = GradDot(model, train, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss())
        >>> found = contrast(dot, (x[:2], y[:2]), (x[2:6], y[2:6]))
        >>> expected = dot.influence((x[:2], y[:2])) - dot.influence((x[2:6], y[2:6])).mean(dim=0)
        >>> torch.allclose(found, expected, atol=1e-5)
        True
    """
    if not isinstance(method, InnerProductInfluence):
        raise InvalidArgumentError(
            "`method` must be an InnerProductInfluence, whose scores are linear in the test "
            f"examples; got {shown(method)}. For others, subtract "
            "`method.influence(contrast_inputs).mean(dim=0)` from `method.influence(inputs)`"
        )
    check_k(k)
    check_flag(proponents, "proponents")
    check_flag(show_progress, "show_progress")
    shift = _mean_scores(method, given(contrast_inputs), show_progress)
    return _shifted(method, given(inputs), shift, k, proponents, show_progress)


@starts_again
def _mean_scores(method: InnerProductInfluence, inputs: Any, show_progress: bool) -> Tensor:
    """The mean over test examples of the scores that the method passes to its reducer, ``[n]``."""
    reducer = AllScores()
    doing = "compute influence of the contrast for training batches"
    method.stream_scores(inputs, reducer, doing, show_progress, True)
    return reducer.result()[0] / _count(method, inputs)


def _count(method: InnerProductInfluence, inputs: Any) -> int:
    """The number of test examples, as the method reads them."""
    if isinstance(inputs, Tensor):  # test gradients that were computed before
        return len(inputs)
    with method.session():
        return sum(example_count(batch) for batch in method.batches(inputs, ordered=False))


@starts_again
def _shifted(
    method: InnerProductInfluence,
    inputs: Any,
    shift: Tensor,
    k: int | None,
    proponents: bool,
    show_progress: bool,
) -> Tensor | KMostInfluentialResults:
    reducer = Shifted(method.make_reducer(k, proponents), shift)
    doing = "compute contrasted influence for training batches"
    method.stream_scores(inputs, reducer, doing, show_progress, False)
    found = reducer.result()
    return found.to(shift.dtype) if isinstance(found, Tensor) else found
