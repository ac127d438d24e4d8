"""Whether a damping is far too small, seen at a question: its scores beside plain products.

The larger the damping, the nearer the scores are to the inner products of the gradients themselves.
Far below the damping that predicts best they have little to do with them.

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

# test examples that are looked at; fewer than the second may have low figures by chance
MOST_TESTS, FEWEST_TESTS = 32, 5
# training examples, and fewer than twice as many, from all over the set; and those that must be
SAMPLED, FEWEST_SAMPLED = 64, 20
# one example of so many counts as leading, and as last
LEADING = 16
# Below these the figures are poor, for a curvature of all layers together, which takes more out of
# gradients, and for one of each layer by itself. Over the settings of `benchmarks.settings` the
# defaults of all classes stay above them; scores that predict half as well as at the best damping
# are mostly below.
LEAST_OF_WHOLE, LEAST_OF_LAYERS = 0.28, 0.38
ERRORS = 2.0  # standard errors that a mean must be below by


@dataclass(frozen=True)
class Figures:
    """How far scores agree with the plain inner products of the same gradients.

    Attributes:
        correlations: of the two over the training examples, ``[q]``.
        spreads: by how much the examples with the highest scores exceed those with the lowest in
            the plain product, over the same of the plain product's own highest and lowest, ``[q]``.
        opponents: of how many test examples the highest score is that of a training example whose
            plain product is negative.
        sampled: s.
    """

    correlations: Tensor
    spreads: Tensor
    opponents: int
    sampled: int

    def are_below(self, least: float) -> bool:
        """Whether both means are, by two standard errors."""
        return all(
            float(values.mean() + ERRORS * values.std() / math.sqrt(len(values))) < least
            for values in (self.correlations, self.spreads)
        )


def figures(scores: Tensor, plain: Tensor) -> Figures | None:
    """How far scores ``[q, s]`` agree with plain products ``[q, s]``; None of too few to tell.

    Test examples whose scores or products are all the same do not count.
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
    """What a warning says of poor figures.

    Args:
        figures: the figures.
        name: of the method.
        damping: what was given, and what was used.
        is_auto: whether the damping is "auto", so that it cannot be what to try.
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
    """The mean of the first few columns less that of the last few."""
    return products[:, :few].mean(1) - products[:, -few:].mean(1)


class DampingCheck:
    """Takes plain products of a sample beside a pass's scores, of gradients that are there.

    Args:
        total: the number of training examples; 0 where unknown: then the first ones are taken.
        tell: is given the figures when the pass is done; None where they tell nothing.
    """

    def __init__(self, total: int, tell: Callable[[Figures | None], None]) -> None:
        self._every = max(1, total // rank_count() // SAMPLED)
        self._tell = tell
        self._step, self._seen, self._left = 1, 0, 2 * SAMPLED - 1
        self._tests: Gradients | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []

    def see_tests(self, gradients: Gradients) -> None:
        """The test gradients, before they are solved for."""
        n = gradients.n
        self._step = -(-n // MOST_TESTS)
        if n >= FEWEST_TESTS:
            # copies: views would keep all the others in memory
            some = [gradients.rows(slice(i, i + 1)) for i in range(0, n, self._step)]
            self._tests = join_examples(some)

    def see_scores(self, train: Gradients, scores: Tensor) -> None:
        """The training side of a batch, and the scores ``[m, n]`` of its examples."""
        first, every = -self._seen % self._every, self._every
        rows = slice(first, min(train.n, first + self._left * every), every)
        count = len(range(train.n)[rows])
        self._seen += train.n
        self._left -= count
        if self._tests is not None and count:
            plain = train.rows(rows).inner(self._tests, SAMPLED)
            self._parts.append((scores[:: self._step, rows].clone(), plain))

    def finish(self) -> None:
        """The pass is done."""
        found = None
        if self._parts:
            both = (torch.cat(own, dim=1).double() for own in zip(*self._parts, strict=True))
            scores, plain = both
            # a product may overflow where a score did not
            if bool(plain.isfinite().all()):
                found = figures(scores, plain)
        self._tell(found)
