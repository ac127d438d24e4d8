"""The face that influence functions share: the test side through (C + damping)^-1.

Letters: m test and n training examples, P chosen parameters, C checkpoints (in shapes), B blocks.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from influence_kit.core.distributed import is_first_rank
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import DampingWarning
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.example_influence import check_k, given
from influence_kit.methods.influence_functions.damping import AUTO
from influence_kit.methods.influence_functions.perturbation import Perturbation, Perturbed
from influence_kit.methods.influence_functions.plain_check import (
    LEAST_OF_LAYERS,
    Figures,
    PlainCheck,
    advice,
)
from influence_kit.methods.influence_functions.solved import SolvedInfluence
from influence_kit.methods.layer_names import check_layer
from influence_kit.methods.starting_again import starts_again
from influence_kit.scoring.features import (
    MostInfluentialFeatures,
    check_places,
    chosen_rows,
    joined,
    most_influential,
)
from influence_kit.scoring.progress import Watch
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term
from influence_kit.scoring.transforms import unit_influence

TakeGiven = Callable[[Any], Gradients]


class InfluenceFunction(SolvedInfluence):
    """score = mean over checkpoints of grad loss(test)^T (C + damping I)^-1 grad loss(train).

    What is measured of the curvature at a checkpoint (``fit``) does not depend on the damping, is
    kept for later calls, and can be saved. About five checkpoints of one run, evenly over its
    steps, are recommended (``select_checkpoints``); each has its own damping where that is "auto".

    Args:
        damping: what is added to the eigenvalues of the curvature C of the mean loss: a number, one
            per block (a dict), or a rule by name: "mean" (a share of the mean eigenvalue of the
            block, its trace over its parameters), "trace" (of its trace over the examples, where
            those are fewer), or "auto", the rule of the class. Each class has its own share;
            ``damping_used`` shows the numbers. Classes whose C is that of the model's mean loss
            know "learning_rates", too: (1 - momentum) / (sum of the learning rates of all steps
            before the checkpoint), one value for all blocks, for models trained by SGD
            (``early_stopping``).
        hessian_dataset: the data over which C is a mean; the training set where None.
        relative: RelatIF (arXiv 2003.11630): None, "l" (divide by the root of the training
            example's own score g^T (C + damping)^-1 g) or "theta" (by the norm of
            (C + damping)^-1 g).
        seed: of everything that is drawn at random.
    """

    # What a user calls.

    @starts_again
    def perturbation_influence(
        self,
        inputs: Any,
        train_indices: Any = None,
        k: int | None = None,
        layer: str | nn.Module | None = None,
        show_progress: bool = False,
    ) -> Tensor | MostInfluentialFeatures:
        r"""The gradient of each score in the training input: which features make it what it is.

        .. math::
            \frac{\partial}{\partial x_j} \, \langle M^{-1} \nabla_\theta \ell_{test}(z'_i), \,
            \nabla_\theta \ell(z_j) \rangle, \qquad M = C + \lambda I

        M^-1 and the test gradient held fixed (Koh and Liang 2017, arXiv 1703.04730, section 2.2);
        the mean over checkpoints. Units are those of the score over those of the feature. Positive:
        raising the feature makes the example more helpful; shifting x_j by a small delta and
        training again changes the test loss by about -<result[i, j], delta> / n (the function
        ``test_output_fn`` by <result[i, j], delta> / n).

        The cost is one forward-over-reverse pass a pair and checkpoint, many pairs at a time. Of
        several ranks each computes all of it.

        Args:
            inputs: test examples: one batch, a DataLoader, or what
                ``compute_intermediate_quantities`` returns.
            train_indices: places of training examples, in any order; all of them where None.
            k: how many features to return for each test example; None for the whole tensor.
            layer: the layer whose output x_j is, or its name; None for the model's only
                floating-point input (the targets stay as they are).
            show_progress: a bar over the training set, and over checkpoints that are fitted.

        Returns:
            ``[m, n, *shape]``: shape of one example's x_j, examples in the order of
            ``train_indices``. With ``k`` ``MostInfluentialFeatures``, in memory for m * k.

        Raises:
            InvalidArgumentError: for places outside the training set; where not just one input is
                floating-point (tokens: name the embedding as ``layer``); for the whole tensor of
                inputs of different shapes.
            UnknownLayerError: for a layer that the model does not have.
            NotImplementedError: with ``relative``, whose norm depends on x_j, too.

        Example:
            >>> import torch
            >>> from influence_kit import ExplicitInfluenceFunction
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(3, 2)
            >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
            >>> train = torch.utils.data.TensorDataset(x, y)
            >>> loss = torch.nn.CrossEntropyLoss()
            >>> exact = ExplicitInfluenceFunction(model, train, [model.state_dict()], loss_fn=loss)
            >>> exact.perturbation_influence((x[:4], y[:4])).shape
            torch.Size([4, 8, 3])
            >>> exact.perturbation_influence((x[:4], y[:4]), k=5).indices.shape
            torch.Size([4, 5, 2])
        """
        check_k(k)
        if self.relative is not None:
            raise NotImplementedError(
                f'with relative="{self.relative}" scores are divided by a norm that depends on the '
                "training input, too; `perturbation_influence` needs relative=None"
            )
        name = None if layer is None else check_layer(self.model, layer)
        places = check_places(train_indices, self._train_count())
        perturbed = Perturbed(self.model, name)
        with self._session() as loader:
            # what cannot be perturbed is refused before the curvature is measured
            perturbed.value(DataSet(self.train_dataloader, self._device).first())
            terms, batches = self._plan(loader, given(inputs), show_progress=show_progress)
            stream = Stream(terms, loader, self._sample)
            sides = [(stream.test_side(term.test, batches), term.weight_at(1.0)) for term in terms]
            vectors = [self._lifted(side).flat() * weight for side, weight in sides]
            found = Perturbation(self._source, self._train_loss, perturbed, loader, vectors)
            doing = "compute perturbation influence for training batches"
            with self._bar(doing, self.train_dataloader_len, show_progress) as bar:
                rows = chosen_rows(self.train_dataloader, places, bar.update)
                if k is not None:
                    return most_influential(found.blocks(rows), k)
                return joined(found.blocks(rows), places).to(self._dtype)

    # How it is done.

    # whether a damping that is far too small is told of
    _warns_of_damping = True

    def _watch(self, terms: Sequence[Term]) -> Watch | None:
        # test gradients that were solved for before are not there to be compared
        is_solved = terms[0].test.solve is None
        if self._compared or is_solved or not (self._warns_of_damping and is_first_rank()):
            return None
        return PlainCheck(self._train_count(), self._tell)

    @property
    def _least_agreement(self) -> float:
        """What figures of scores at a damping that serves are above."""
        return LEAST_OF_LAYERS

    def _tell(self, figures: Figures | None) -> None:
        """Warn of the damping where its scores look poor."""
        if figures is None:
            return
        self._compared = True
        if figures.are_below(self._least_agreement):
            damping, is_auto = self._damping_text, self._damping == AUTO
            text = advice(figures, self.get_name(), damping, is_auto)
            warnings.warn(text, DampingWarning, stacklevel=2)

    def _lifted(self, solved: Gradients) -> Gradients:
        """A test side through the inverse, as gradients of the parameters."""
        return solved

    @property
    def _needs_fit_for_quantities(self) -> bool:
        return self.relative is not None

    def _train_side(self, place: int) -> Side:
        if self.relative is None:
            return self.train_at(place)
        return self.train_at(place, partial(unit_influence, self._inverse_at(place), self.relative))
