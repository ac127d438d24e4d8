"""Checks for a damping that is far too small: compares scores with inner products of gradients.

The larger the damping, the closer the scores are to the inner products of the gradients themselves.
Far below the damping that predicts best, the two hardly agree.

Shapes: q sampled test examples, s sampled training examples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from influence_kit.core.distributed import rank_count
from influence_kit.gradients.per_example import Gradients, join_examples

# test examples that are compared; fewer than the second may have low figures by chance
MOST_TESTS, FEWEST_TESTS = 32, 5
# sampled training examples (up to twice as many), spread over the set; and the minimum
SAMPLED, FEWEST_SAMPLED = 64, 20
# one in 16 examples counts as leading, and one in 16 as last
LEADING = 16
# Figures below these are poor: for a curvature of all layers together, whose inverse changes
# gradients more, and for a curvature by layer. Over the settings of `benchmarks.settings` the
# defaults of all classes stay above them; scores that predict half as well as at the best damping
# are mostly below.
LEAST_OF_WHOLE, LEAST_OF_LAYERS = 0.28, 0.38
ERRORS = 2.0  # a mean must be below by this many standard errors


@dataclass(frozen=True)
class Figures:
    """How far scores agree with the plain inner products of the same gradients.

    Attributes:
        correlations: the cosine of centred scores and inner products over the training examples,
            ``[q]``.
        spreads: the mean inner product of the examples with the highest scores less that of those
            with the lowest, divided by the same difference for the highest and lowest inner
            products, ``[q]``.
        opponents: the number of test examples whose highest score is that of a training example
            with a negative inner product.
        sampled: s, the number of training examples.
    """

    correlations: Tensor
    spreads: Tensor
    opponents: int
    sampled: int

    def are_below(self, least: float) -> bool:
        """Whether both means are below, by two standard errors."""
        return all(
            float(values.mean() + ERRORS * values.std() / math.sqrt(len(values))) < least
            for values in (self.correlations, self.spreads)
        )


def figures(scores: Tensor, plain: Tensor) -> Figures | None:
    """How far scores ``[q, s]`` agree with inner products ``[q, s]``; None for too few examples.

    Test examples whose scores or products are all equal do not count.
    """
    centred, others = (x - x.mean(1, keepdim=True) for x in (scores, plain))
    varied = (scores.amax(1) > scores.amin(1)) & (plain.amax(1) > plain.amin(1))
    scores, plain, centred, others = (x[varied] for x in (scores, plain, centred, others))
    q, s = scores.shape
    if q < FEWEST_TESTS or s < FEWEST_SAMPLED:
        return None
    few = max(1, s // LEADING)
    order = scores.argsort(dim=1, descending=True, stable=True)
    by_score, own = plain.gather(1, order), plain.sort(dim=1, descending=True).values
    return Figures(
        cosine_similarity(centred, others, dim=1, eps=0.0),
        _spread(by_score, few) / _spread(own, few),
        int((by_score[:, 0] < 0).sum()),
        s,
    )


def advice(figures: Figures, name: str, damping: str, is_auto: bool) -> str:
    """The text of the warning about poor figures.

    Args:
        figures: the figures.
        name: the name of the method.
        damping: the damping as given, and the values used.
        is_auto: whether the damping is "auto", which is then not suggested.
    """
    q, first = len(figures.correlations), "" if is_auto else 'damping="auto", another rule, or '
    return (
        f"{name}: the damping is probably far too small: {damping}. Its scores have little to do "
        f"with the inner products of the same gradients: over {figures.sampled} training examples, "
        f"{q} test examples have a mean correlation of {float(figures.correlations.mean()):.2f}, "
        f"and for {figures.opponents} of them the highest score is that of a training example "
        f"whose inner product is negative. Such scores predict retraining badly. Try {first}"
        "numbers 10 to 1,000 times as large; `influence_kit.evaluation.tune_damping` chooses among "
        'them ("If the damping is in doubt" on the page "How to choose a method")'
    )


def _spread(products: Tensor, few: int) -> Tensor:
    """The mean of the first few columns minus that of the last few."""
    return products[:, :few].mean(1) - products[:, -few:].mean(1)


class DampingCheck:
    """Observes a pass over the training set, and computes inner products of a sample of gradients.

    Args:
        total: the number of training examples; 0 if unknown: then the first ones are sampled.
        tell: called with the figures at the end of the pass; with None if they are not conclusive.
    """

    def __init__(self, total: int, tell: Callable[[Figures | None], None]) -> None:
        self._every = max(1, total // rank_count() // SAMPLED)
        self._tell = tell
        self._step, self._seen, self._left = 1, 0, 2 * SAMPLED - 1
        self._tests: Gradients | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []

    def see_tests(self, gradients: Gradients) -> None:
        """Get the test gradients, before the inverse curvature is applied."""
        n = gradients.n
        self._step = -(-n // MOST_TESTS)
        if n >= FEWEST_TESTS:
            # copies: views would keep all the others in memory
            some = [gradients.rows(slice(i, i + 1)) for i in range(0, n, self._step)]
            self._tests = join_examples(some)

    def see_scores(self, train: Gradients, scores: Tensor) -> None:
        """Get the training gradients of a batch, and the scores ``[m, n]`` of its examples."""
        first, every = -self._seen % self._every, self._every
        rows = slice(first, min(train.n, first + self._left * every), every)
        count = len(range(train.n)[rows])
        self._seen += train.n
        self._left -= count
        if self._tests is not None and count:
            plain = train.rows(rows).inner(self._tests, SAMPLED)
            self._parts.append((scores[:: self._step, rows].clone(), plain))

    def finish(self) -> None:
        """Report the figures at the end of the pass."""
        found = None
        if self._parts:
            both = (torch.cat(own, dim=1).double() for own in zip(*self._parts, strict=True))
            scores, plain = both
            # a product may overflow although the score did not
            if bool(plain.isfinite().all()):
                found = figures(scores, plain)
        self._tell(found)
