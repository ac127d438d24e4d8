"""TRAK: Park et al. 2023, arXiv 2303.14186."""

from collections.abc import Callable
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
from influence_kit.scoring.side_gradients import SideGradients
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
    (``select_checkpoints``), or independently trained models, each possibly on another half of the
    training set (arXiv 2303.14186). Rows are test examples; positive is a proponent: leaving the
    training example out lowers the test example's margin by about the score. A layer's part of the
    score (``influence_by_layer``) is that of the training example's gradient in the layer.

    The features of the training set are computed once and cached if they fit in memory; otherwise
    they are computed again in every call.

    Args:
        loss_fn: required by ``output_fn``: its slope along the output replaces 1 - p.
        projection_dim: entries of the features; above n there is a warning.
        projection: "sjlt" (sparse: each entry is added to one of the features), "rademacher" or
            "gaussian" (dense: as many operations per entry as there are features), or "identity"
            (no projection, for small models).
        ridge: added to the eigenvalues of Phi^T Phi, which is a sum over the training set: a
            positive number or "auto" (or "trace"), 1.5 / sqrt(C) times their mean (the trace over
            the smaller of entries and n; with "mean" over all entries). Without a ridge the scores
            are noise if n is near the number of features or below it. Can be set later without
            computing features again.
        output_fn: ``output_fn(outputs, targets)`` (of a dict batch: ``(outputs, batch)``), one
            value per example instead of the margin, higher for better predictions. It is used for
            test and training examples: the model is linearised in it, so that a positive score
            means that training raised it. The slope -dL/df of ``loss_fn`` along it replaces 1 - p.
        test_output_fn: another function f for test examples: ``phi_test`` are then its gradients,
            and leaving the training example out lowers it by about the score. One value per
            example, or their sum or mean. The training features stay those of ``output_fn`` or the
            margin.
        shift: the number of positions by which labels lag behind logits, for the margin: 1 for a
            causal language model whose labels are its inputs; None means 0, and is refused if the
            model returns a loss of its own, so that a shift is possible.
        seed: the seed of the projections, of which each checkpoint has its own.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for invalid arguments; if the margin does not fit the outputs.
        CurvatureError: if Phi^T Phi is singular in spite of the ridge.

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
                "`output_fn` requires `loss_fn`, whose slope along it replaces 1 - p; got "
                "loss_fn=None"
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
        """True: a positive score means that training raised an output, not lowered a loss."""
        return True

    @property
    def ridge(self) -> DampingArgument:
        """The ridge as given; setting it does not compute features again."""
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

    # Slopes.

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        return Weighted(super().make_reducer(k, proponents), self._mean_slopes)

    def train_weights(self) -> Callable[[], Tensor]:
        return self._mean_slopes

    def _mean_slopes(self) -> Tensor:
        """The mean over checkpoints of the training examples' slopes, ``[n]``."""
        return torch.stack([state[SLOPE] for state in self.fit_state.values()]).mean(0)

    def _slopes_of(self, inputs: Any) -> Tensor:
        """The mean over checkpoints of the slopes of given examples, ``[n]``."""
        assert isinstance(self._map, OutputFeatures)
        slopes_of = partial(self._map.slopes_alone, loss=self._train_loss)
        with self.session() as loader:
            gradients, batches = SideGradients(loader, self._sample), self.batches(inputs)
            sides = [Side(index, slopes_of) for index in range(len(self.checkpoints))]
            slopes = [gradients.vectors(side, batches) for side in sides]
        return torch.cat(slopes, dim=1).mean(1)
