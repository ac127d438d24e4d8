"""The question that every method answers: which training examples score highest for a test example.

Letters: m test and n training examples, k examples asked for.
"""

from abc import abstractmethod
from typing import Any, overload

from captum.influence import DataInfluence
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.base import InfluenceBase
from influence_kit.methods.starting_again import starts_again
from influence_kit.methods.summary import counted, summary
from influence_kit.scoring.reducers import AllScores, KMostInfluentialResults, Reducer, TopK


class Question(DataInfluence):
    """What scores training examples for test examples: a method, or a valuation."""

    @overload
    def influence(
        self,
        inputs: Any = None,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> KMostInfluentialResults: ...

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The scores of all training examples for each test example, or the k best.

        Args:
            inputs: test examples: one batch (tuple, list or dict), a DataLoader, or a Dataset,
                which is read as the training set is. Of a valuation what its ``score`` takes,
                handed on as it is.
            k: how many proponents or opponents to return; None for all scores.
            proponents: the highest scores; False for the lowest.
            show_progress: a bar over the training set; before it one over the checkpoints, where
                something is fitted or kept at each (of a valuation: over the models fitted).
            aggregate: the influence on the sum of the test examples' losses (or outputs; of a
                valuation: of their scores): one row.

        Returns:
            Scores ``[m, n]`` (``[1, n]`` if ``aggregate``) in the order of the training set, or
            ``KMostInfluentialResults`` of ``[m, min(k, n)]``. Positive: a proponent, training on it
            lowered the test loss (raised ``test_output_fn``, where that is given; the score). In
            the model's precision; of one in half precision in float32. Complex parameters count as
            pairs of real numbers: an inner product of gradients is Re(conj(g) . g').
        """
        check_k(k)
        return self._answer(inputs, k, proponents, show_progress, aggregate)

    @abstractmethod
    def _answer(
        self, inputs: Any, k: int | None, proponents: bool, show_progress: bool, aggregate: bool
    ) -> Tensor | KMostInfluentialResults:
        """The answer to ``influence``, whose k is none or a count."""


class ExampleInfluence(Question, InfluenceBase):
    """A method that scores training examples for test examples, however it does so."""

    @starts_again
    def _answer(
        self, inputs: Any, k: int | None, proponents: bool, show_progress: bool, aggregate: bool
    ) -> Tensor | KMostInfluentialResults:
        doing = "compute influence for training batches"
        if k is not None:
            kind = "proponents" if proponents else "opponents"
            doing = f"perform computation for getting {kind}. Processing training batches"
        reducer = self._reducer(k, proponents)
        self._stream_scores(inputs, reducer, doing, show_progress, aggregate)
        found = reducer.result()
        return found.to(self._dtype) if isinstance(found, Tensor) else found

    def __repr__(self) -> str:
        if "_is_made" not in vars(self):  # seen by a debugger, say
            return object.__repr__(self)
        return summary(self, self._notes())

    def _notes(self) -> list[str]:
        """What ``repr`` says beside the arguments, a line each."""
        parameters = self._source.capture.parameters
        layers = {name.rpartition(".")[0] for name in parameters}
        size = counted(sum(p.numel() for p in parameters.values()), "parameter")
        found = [counted(len(self.checkpoints), "checkpoint")] if self.checkpoints else []
        found += [f"{size} in {counted(len(layers), 'layer')}"] if parameters else []
        return [", ".join(found)] if found else []

    def _reducer(self, k: int | None, proponents: bool) -> Reducer:
        """What takes the blocks of scores, of some training examples each."""
        return AllScores() if k is None else TopK(k, proponents)

    @abstractmethod
    def _stream_scores(
        self,
        inputs: Any,
        reducer: Reducer,
        doing: str,
        show_progress: bool,
        aggregate: bool,
    ) -> None:
        """Hand the scores of all test and training examples to the reducer, block by block.

        Args:
            inputs: test examples, as a user gave them.
            reducer: what ``_reducer`` has made; takes blocks of scores with their places.
            doing: what to say beside a bar.
            show_progress: whether to show one.
            aggregate: one row, the sum over the test examples.
        """


def given(inputs: Any) -> Any:
    """The inputs, which must be there."""
    if inputs is None:
        raise InvalidArgumentError("`inputs` argument is required.")
    return inputs


def check_k(k: object) -> None:
    """Refuse a k that is no count."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k must be an int or None; got {k!r} of type {type(k).__name__}")
    if k is not None and k < 0:
        raise InvalidArgumentError(f"k must not be negative; got {k}")
