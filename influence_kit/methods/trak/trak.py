"""TRAK: Park et al. 2023, arXiv 2303.14186."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.base import BatchSize
from influence_kit.methods.function_fingerprint import function_fingerprint
from influence_kit.methods.identity import first_losses
from influence_kit.methods.influence_functions.damping import TRACE, DampingArgument
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.solved import SolvedInfluence
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.origin import Source
from influence_kit.methods.starting_again import starts_again
from influence_kit.methods.trak.normal_equations import (
    GRAM,
    OF_FEATURES,
    normal_equations,
    trace_of_features,
)
from influence_kit.methods.trak.output_features import (
    FEATURES,
    SLOPE,
    OutputFeatures,
    alone,
    check_features,
    repeated,
)
from influence_kit.operators.solvers import Cholesky
from influence_kit.scoring.reducers import Reducer, Weighted
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform
from influence_kit.storage.folders import LOSSES

# of ridge="auto" with one checkpoint: of their mean eigenvalue
SHARE_OF_ONE = 1.5


class TRAK(SolvedInfluence):
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

    _auto_rule = TRACE
    _wording = OF_FEATURES
    _keeps_rows = True

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
        check_features(projection, projection_dim, shift)
        if output_fn is not None and loss_fn is None:
            raise InvalidArgumentError(
                "`output_fn` needs a `loss_fn` beside it, whose slope along it says how much each "
                "training example still has to say"
            )
        self.projection, self.output_fn, self.shift = projection, output_fn, shift
        self.projection_dim = projection_dim
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_output_fn=test_output_fn,
            damping=ridge,
            seed=seed,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )

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

    # What is kept of an example: its features, and its slope.

    @cached_property
    def _made(self) -> OutputFeatures:
        kind, dim, seed = self.projection, self.projection_dim, self.seed
        differentiated = self._source, self.output_fn, self._train_loss
        measured: Loss | None = None
        if self.test_output_fn is not None:  # as it is: features are of what should rise
            measured = Loss(self.test_output_fn, self.test_reduction_type, "test_output_fn")
        return OutputFeatures(*differentiated, kind, dim, seed, self.shift, measured)

    @property
    def _shapes(self) -> Mapping[str, torch.Size]:
        return self._made.shapes

    @property
    def _kept_shapes(self) -> Mapping[str, torch.Size]:
        return self._made.all_shapes

    def _blocks_of(self, names: list[str]) -> Mapping[str, list[str]]:
        return {FEATURES: [FEATURES]}

    def _features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        return self._made.of_tests(checkpoint, batch)

    def _train_features(self, checkpoint: int, batch: Batch) -> Gradients:
        return self._made.with_slopes(checkpoint, batch)

    # What is measured of them: Phi^T Phi, and the slopes of all training examples.

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._feature_settings()}

    def _feature_settings(self) -> dict[str, Any]:
        return {
            "features": "projected gradients of the output function",
            "projection": self.projection,
            "projection_dim": self._partition.sizes[0],
            "seed": self.seed,
        }

    def _identity(self, loader: CheckpointLoader, batches: Iterable[Batch]) -> dict[str, Any]:
        found = super()._identity(loader, batches)
        if self.output_fn is not None:  # the slopes are those of another function
            data = DataSet(batches, self._device)
            found[LOSSES] += first_losses(self._source, self._train_loss, data)
        return found

    @property
    def _differentiated(self) -> Loss:
        return self._made.output

    @property
    def _sources(self) -> dict[str, Source]:
        output = partial(function_fingerprint, self.output_fn, self.model)
        return {**super()._sources, "output_fn": output}

    @property
    def _fit_batches(self) -> Iterable[Batch]:
        return self._train_batches

    def _measure(self, data: DataSet) -> Facts:
        features = self.train_at(data.checkpoint).features
        return normal_equations(features, data, *self._partition.sizes)

    @property
    def _share(self) -> float:
        # the mean over checkpoints takes away noise, too
        return SHARE_OF_ONE / math.sqrt(len(self.checkpoints))

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        return trace_of_features(facts[GRAM], data.count, f'ridge="{self._damping}"')

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        return self._through(Cholesky([facts[GRAM]], damping, [FEATURES], OF_FEATURES))

    @property
    def _needs_fit_for_quantities(self) -> bool:
        return True  # for the slopes

    # Where they meet.

    def _reducer(self, k: int | None, proponents: bool) -> Reducer:
        return Weighted(super()._reducer(k, proponents), self._mean_slopes)

    def _mean_slopes(self) -> Tensor:
        """The mean over checkpoints of the training examples' slopes, ``[n]``."""
        return torch.stack([facts[SLOPE] for facts in self._facts.values()]).mean(0)

    def _slopes_of(self, inputs: Any) -> Tensor:
        """The mean over checkpoints of the slopes of any examples, ``[n]``."""
        sides = [Side(place, self._made.slopes_alone) for place in range(len(self.checkpoints))]
        with self._session() as loader:
            stream = Stream([], loader, self._sample)
            slopes = [stream.vectors(side, self._batches(inputs)) for side in sides]
        return torch.cat(slopes, dim=1).mean(1)

    def _train_side(self, place: int) -> Side:
        return self.train_at(place, alone)

    def _by_parameter(self, terms: list[Term]) -> tuple[list[Term], Iterable[Batch]]:
        """Each parameter's part of the training features meets the whole test side.

        The parts are made anew: what is kept is their sum.
        """
        names = list(self._parameters)

        def split(term: Term) -> Term:
            place, solved = term.train.checkpoint, term.test.solved
            return replace(
                term,
                test=replace(term.test, solve=lambda features: repeated(solved(features), names)),
                train=Side(place, partial(self._made.by_parameter, place)),
            )

        return [split(term) for term in terms], self.train_dataloader
