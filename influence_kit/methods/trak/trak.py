"""TRAK: Park et al. 2023, arXiv 2303.14186."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.function_fingerprint import function_fingerprint
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.restarts import starts_again
from influence_kit.methods.trak.normal_equations import NormalEquations
from influence_kit.methods.trak.output_features import FEATURES, SLOPE, OutputFeatures
from influence_kit.scoring.reducers import Reducer, Weighted
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side


@documented
class TRAK(InfluenceFunction):
    r"""score = mean of phi_test^T (Phi^T Phi + ridge I)^-1 phi_train, times mean of 1 - p_train.

    .. math::
        \frac{1}{C} \sum_c \phi'_c{}^T (\Phi_c^T \Phi_c + \lambda_c I)^{-1} \phi_c
        \;\cdot\; \frac{1}{C} \sum_c (1 - p_c), \qquad \phi = P^T \nabla_\theta f

    f is the margin log p - log(1 - p) of the label's probability p, P a random projection of all
    parameters together, Phi the features of all n training examples, and the means are over C
    checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``), or independently trained models, of which each may have seen another
    half of the training set (arXiv 2303.14186). Rows are test examples; positive is a proponent:
    leaving the training example out lowers the test example's margin by about the score. A layer's
    part of it (``influence_by_layer``) is what the training example's gradient there adds to its
    features.

    The features of the training set are computed once and kept in memory where they fit; otherwise
    they are computed anew for every question.

    Args:
        loss_fn: only for an ``output_fn``, whose slope takes the place of 1 - p.
        projection_dim: entries of the features; at most n, for which there is a warning.
        projection: "sjlt" (sparse: each entry is added to one of the features), "rademacher" or
            "gaussian" (dense: as many operations an entry as there are features), or "identity"
            (nothing is projected, for small models).
        ridge: added to the eigenvalues of Phi^T Phi, which is a sum over the training set: a
            positive number or "auto" (or "trace"), 1.5 / sqrt(C) times their mean (the trace over
            the lesser of entries and n; with "mean" over all entries). Without one the scores are
            noise where n is near the number of features or below it. May be set again; nothing is
            computed again for that.
        output_fn: ``output_fn(outputs, targets)`` (of a dict batch: ``(outputs, batch)``), one
            value per example in place of the margin, higher for better predictions. It is used on
            both sides: in it the model is taken for linear, so that it is what training raises.
            1 - p is then the slope -dL/df of ``loss_fn`` along it.
        test_output_fn: what is asked of test examples, where that is another function than f, of
            the same kind: ``phi_test`` are then its gradients, and leaving the training example out
            lowers it by about the score. One value per example, or their sum or mean. The training
            side stays that of ``output_fn`` or the margin.
        shift: by how many positions labels are behind logits, for the margin: 1 for a causal
            language model whose labels are its inputs; None is 0, and refused where a model with a
            loss of its own leaves it in doubt.
        seed: of the projection; each checkpoint has one of its own.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for arguments that cannot be meant; where the margin does not fit.
        CurvatureError: where Phi^T Phi is singular in spite of the ridge.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> trak = TRAK(model, train, [model.state_dict()], projection_dim=4)
        >>> trak.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> trak.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        *,
        projection_dim: int = 512,
        projection: Literal["sjlt", "rademacher", "gaussian", "identity"] = "sjlt",
        ridge: float | Literal["auto"] = "auto",
        output_fn: OutputFunction | None = None,
        test_output_fn: OutputFunction | None = None,
        shift: int | None = None,
        seed: int = 0,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        if output_fn is not None and loss_fn is None:
            raise InvalidArgumentError(
                "`output_fn` needs a `loss_fn` beside it, whose slope along it says how much each "
                "training example still has to say"
            )
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            inverse=NormalEquations(ridge, seed),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            features=OutputFeatures(
                projection, projection_dim, seed, shift, output_fn, test_output_fn
            ),
            store=store,
            store_dtype=store_dtype,
        )
        self._caches.sources["output_fn"] = partial(function_fingerprint, output_fn, model)
        self._always_fits = True  # for the slopes

    # What a user reads and sets.

    @property
    def explains_output(self) -> bool:
        """True: a positive score says that training raised an output, not lowered a loss."""
        return True

    @property
    def ridge(self) -> DampingArgument:
        """As given; setting it anew computes no features again."""
        return self.damping

    @ridge.setter
    def ridge(self, ridge: DampingArgument) -> None:
        self.damping = ridge

    @property
    def ridge_used(self) -> list[float]:
        """The ridge of each checkpoint that is fitted."""
        return [used[FEATURES] for used in self.damping_used]

    @starts_again
    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """The score of each example with itself, ``[n]``; see ``TracInCP.self_influence``."""
        scores = super().self_influence(inputs, show_progress, outer_loop_by_checkpoints)
        slopes = self._mean_slopes() if inputs is None else self._slopes_of(inputs)
        return scores * slopes.to(scores)

    # Where they meet.

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        return Weighted(super().make_reducer(k, proponents), self._mean_slopes)

    def _mean_slopes(self) -> Tensor:
        """The mean over checkpoints of the training examples' slopes, ``[n]``."""
        return torch.stack([state[SLOPE] for state in self.fit_state.values()]).mean(0)

    def _slopes_of(self, inputs: Any) -> Tensor:
        """The mean over checkpoints of the slopes of any examples, ``[n]``."""
        assert isinstance(self._map, OutputFeatures)
        slopes_of = partial(self._map.slopes_alone, loss=self._train_loss)
        with self.session() as loader:
            stream, batches = Stream([], loader, self._sample), self.batches(inputs)
            sides = [Side(index, slopes_of) for index in range(len(self.checkpoints))]
            slopes = [stream.vectors(side, batches) for side in sides]
        return torch.cat(slopes, dim=1).mean(1)
