"""Influence functions: preconditioned test gradients, (C + damping)^-1 times the gradient.

Shapes: m test examples, n training examples, P chosen parameters, C checkpoints (in shapes), B
blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.passes import DataSet, Memory
from influence_kit.data.batches import Batch
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.loaders import HESSIAN_DATA
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.checkpoint_fits import CheckpointFits
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.example_batches import TRAIN, BatchSize
from influence_kit.methods.fit_cache import FitCache
from influence_kit.methods.influence_functions.damping_warning import damping_watch
from influence_kit.methods.influence_functions.fitted_inverse import FittedInverse, check_inverse
from influence_kit.methods.influence_functions.perturbation import (
    Perturbation,
    Perturbed,
    refuse_other_scores,
)
from influence_kit.methods.influence_functions.preconditioned_gradients import (
    check_preconditioned,
    preconditioned_features,
)
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.layer_names import Layers, check_layer
from influence_kit.methods.optimizer_state import Optimizer
from influence_kit.methods.restarts import check_k, given, starts_again
from influence_kit.scoring.features import (
    MostInfluentialFeatures,
    check_train_indices,
    chosen_rows,
    joined,
    most_influential,
)
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Side, Term
from influence_kit.scoring.transforms import unit_influence
from influence_kit.scoring.watch import Watch


class InfluenceFunction(InnerProductInfluence):
    """score = mean over checkpoints of grad loss(test)^T (C + damping I)^-1 grad loss(train).

    The named classes are this class with a fixed inverse curvature; here any inverse curvature can
    be combined with any features that it supports.

    The state of a fit at a checkpoint (``fit``) does not depend on the damping, is kept for later
    calls, and can be saved. About five checkpoints of one run, evenly over its steps, are
    recommended (``select_checkpoints``); each has its own damping if that is "auto".

    Args:
        inverse: the inverse curvature: one of ``influence_kit.curvature``, or a class of your own.
            Its ``damping`` is added to the eigenvalues of the curvature C of the mean loss: a
            number, one per block (a dict), or a rule by name: "mean" (a share of the mean
            eigenvalue of the block, its trace over the number of its parameters), "trace" (a share
            of its trace over the number of examples, if those are fewer), or "auto", the rule of
            the class. Each class has its own share; ``damping_used`` shows the numbers. Classes
            whose C is that of the model's mean loss also have "learning_rates": (1 - momentum) /
            (sum of the learning rates of all steps before the checkpoint), one value for all
            blocks, for models trained by SGD (``early_stopping``).
        hessian_dataset: the data over which C is a mean; the training set if None.
        relative: RelatIF (arXiv 2003.11630): None, "l" (divide by the root of the training
            example's own score g^T (C + damping)^-1 g) or "theta" (by the norm of
            (C + damping)^-1 g).

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: if the inverse cannot be fitted to the features, and for invalid
            arguments.

    Warns:
        DampingWarning: in the first call, if the scores of a sample hardly agree with the inner
            products of the same gradients: the effect of a damping that is far too small.

    Example:
        >>> import torch
        >>> from influence_kit.curvature import MeanOfInverses
        >>> from influence_kit.projections import Projected
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> method = InfluenceFunction(
        ...     model,
        ...     torch.utils.data.TensorDataset(x, y),
        ...     [model.state_dict()],
        ...     loss_fn=torch.nn.CrossEntropyLoss(),
        ...     inverse=MeanOfInverses(damping=0.1),
        ...     features=Projected((2, 4)),
        ... )
        >>> method.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
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
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        inverse: InverseCurvature,
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        features: FeatureMap | None = None,
        optimizer: Optimizer | None = None,
        parameter_names: Sequence[str] | None = None,
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        if not is_one_of(relative, (None, "theta", "l")):
            raise InvalidArgumentError(
                f'`relative` must be None, "theta" or "l"; got {shown(relative)}'
            )
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            features=features,
            optimizer=optimizer,
            parameter_names=parameter_names,
            store=store,
            store_dtype=store_dtype,
        )
        self.relative = relative
        self.inverse = check_inverse(inverse, self.features)
        self._take_hessian_data(hessian_dataset)
        fitted_on = TRAIN if hessian_dataset is None else HESSIAN_DATA
        cache = FitCache(inverse.wording.matrix, "measured", fitted_on)
        self._fitted = FittedInverse(inverse, self._caches.add(cache, first=True))
        self._fits = CheckpointFits(self, self._caches, cache, self._fit_at, self._description)
        self._cache.remedy = self._learnt.remedy = cache.remedy
        self._memory = Memory()
        self._said: set[str] = set()
        # whether preconditioned test gradients that a user passes still need a fit
        self._always_fits = relative is not None
        # whether to warn of a damping that is far too small
        self._warns_of_damping = True
        self._bind(lambda: self._fitted.bind(self.model, self._map.shapes))
        self._show_settings()

    def _take_hessian_data(self, data: Any) -> None:
        self._hessian_data = data
        if data is not None:
            self._examples.add_given(data, HESSIAN_DATA)
            self._caches.sources[HESSIAN_DATA] = partial(data_fingerprint, data)

    def _show_settings(self) -> None:
        """Make the settings of the parts attributes of the method."""
        for part in (self.inverse, self.features):
            for name, value in vars(part).items():
                if not name.startswith("_") and not hasattr(self, name):
                    setattr(self, name, value)

    # The definition of the method.

    def terms(self) -> list[Term]:
        """One term per checkpoint, with preconditioned test gradients."""
        return [
            Term(
                replace(self.test_at(c), solve=self._fitted.at(c)),
                self._train_side(c),
                weight=1 / len(self.checkpoints),
            )
            for c in range(len(self.checkpoints))
        ]

    def fitted_checkpoints(self) -> Sequence[int]:
        """The indices of the checkpoints at which the inverse is fitted: all, unless overridden."""
        return range(len(self.checkpoints))

    def _train_side(self, index: int) -> Side:
        if self.relative is None:
            return self.train_at(index)
        return self.train_at(index, partial(unit_influence, self._fitted.at(index), self.relative))

    @property
    def is_symmetric(self) -> bool:  # type: ignore[override] # a class attribute of the base
        """Whether the inverse is a symmetric linear map (to the tolerance of a solver)."""
        return self.inverse.is_symmetric

    # What a user reads, sets and calls.

    @property
    def block_names(self) -> list[str]:
        """The blocks of the curvature, each with its own damping."""
        self._see_model()
        return self._fitted.blocks

    @property
    def damping(self) -> DampingArgument:
        """The damping as given; setting it does not fit again."""
        return self._fitted.damping

    @damping.setter
    def damping(self, damping: DampingArgument) -> None:
        self._see_model()
        self._fitted.damping = damping

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block, at each checkpoint that is fitted."""
        self._see_model()
        return self._fitted.damping_used

    @property
    def fit_state(self) -> dict[int, State]:
        """The state of the fit at each checkpoint, by its index: tensors by name."""
        return self._fitted.cache.states

    @starts_again
    def fit(self, show_progress: bool = False) -> Self:
        """Fit at every checkpoint again; ``influence`` fits once automatically.

        Args:
            show_progress: a bar over the checkpoints.
        """
        self._fits.fit(show_progress)
        return self

    @starts_again
    def save(self, folder: str | Path) -> None:
        """Write the states of the fit to a folder; fits at checkpoints without one.

        Settings that can change without a new fit (a damping, a ridge) are not saved.
        """
        self._fits.save(folder)

    @starts_again
    def load(self, folder: str | Path) -> Self:
        """Read the states that ``save`` has written, instead of ``fit``.

        Raises:
            InvalidArgumentError: if they were saved for another model, data set, loss or setting.
        """
        self._fits.load(folder)
        self._map.take_state(self.fit_state[0])
        return self

    @starts_again
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """Preconditioned test gradients, which ``influence`` accepts as ``inputs``.

        Computed once, they serve any number of training sets: ``influence`` of another object of
        this class (same model, parameters and checkpoints) accepts them without a fit.

        Returns:
            ``[m, C * P]``, parameters in the model's order (``[1, C * P]`` if ``aggregate``); the
            scores are its dot products with the gradients of the training loss at all checkpoints.
        """
        with self.session() as loader:
            terms, batches = self._plan(loader, given(inputs), ordered=not aggregate)
            gradients = SideGradients(loader, self._sample)
            blocks = [
                gradients.of(term.test, batches, aggregate).flat() * term.weight_at(1.0)
                for term in terms
            ]
        return torch.cat(blocks, dim=1).to(self._dtype)

    @starts_again
    def perturbation_influence(
        self,
        inputs: Any,
        train_indices: Any = None,
        k: int | None = None,
        layer: str | nn.Module | None = None,
        show_progress: bool = False,
    ) -> Tensor | MostInfluentialFeatures:
        r"""The gradient of each score in the training input: which features determine the score.

        .. math::
            \frac{\partial}{\partial x_j} \, \langle M^{-1} \nabla_\theta \ell_{test}(z'_i), \,
            \nabla_\theta \ell(z_j) \rangle, \qquad M = C + \lambda I

        M^-1 and the test gradient held fixed (Koh and Liang 2017, arXiv 1703.04730, section 2.2);
        the mean over checkpoints. Units are those of the score over those of the feature. Positive:
        raising the feature makes the example more helpful; shifting x_j by a small delta and
        training again changes the test loss by about -<result[i, j], delta> / n (the function
        ``test_output_fn`` by <result[i, j], delta> / n).

        The cost is one forward-over-reverse pass per pair and checkpoint, many pairs at a time.
        With several ranks, each computes the whole result.

        Args:
            inputs: test examples: one batch, a DataLoader, or what
                ``compute_intermediate_quantities`` returns.
            train_indices: indices of training examples, in any order; all of them if None.
            k: how many features to return for each test example; None for the whole tensor.
            layer: the layer whose output is x_j, or its name; None for the model's only
                floating-point input (the targets are not perturbed).
            show_progress: a bar over the training set, and over checkpoints that are fitted.

        Returns:
            ``[m, n, *shape]``: shape of one example's x_j, examples in the order of
            ``train_indices``. With ``k`` ``MostInfluentialFeatures``, in memory for m * k.

        Raises:
            InvalidArgumentError: for indices outside the training set; if not exactly one input is
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
        is_linear = self._map.is_linear and not self._is_directed
        refuse_other_scores(self.get_name(), self.relative, is_linear)
        name = None if layer is None else check_layer(self.model, layer)
        indices = check_train_indices(train_indices, self._examples.train_count)
        perturbed = Perturbed(self.model, name)
        with self.session() as loader:
            # refuse inputs that cannot be perturbed before fitting the curvature
            perturbed.value(DataSet(self.train_dataloader, self.device).first())
            terms, batches = self._plan(loader, given(inputs), show_progress=show_progress)
            gradients = SideGradients(loader, self._sample)
            sides = [(gradients.of(term.test, batches), term.weight_at(1.0)) for term in terms]
            vectors = [self._map.transpose(side).flat() * weight for side, weight in sides]
            found = Perturbation(self._source, self._train_loss, perturbed, loader, vectors)
            doing = "compute perturbation influence for training batches"
            with self.progress(doing, self.train_dataloader_len, show_progress) as bar:
                rows = chosen_rows(self.train_dataloader, indices, bar.update)
                if k is not None:
                    return most_influential(found.blocks(rows), k)
                return joined(found.blocks(rows), indices).to(self._dtype)

    # Implementation.

    def notes(self) -> list[str]:
        return [*super().notes(), self._fitted.damping_text]

    def prepare(self, loader: CheckpointLoader, show_progress: bool = False) -> None:
        # before the data is divided: every rank takes part in the fit
        super().prepare(loader, show_progress)
        self._fits.at_all(loader, show_progress, self.fitted_checkpoints())

    def _plan(
        self,
        loader: CheckpointLoader,
        inputs: Any,
        ordered: bool = True,
        show_progress: bool = False,
    ) -> tuple[list[Term], Iterable[Batch]]:
        if not isinstance(inputs, Tensor):
            return super()._plan(loader, inputs, ordered, show_progress)
        prepare = self.prepare if self._always_fits else super().prepare
        prepare(loader, show_progress)
        quantities: Any = self._checked_quantities(inputs)
        count = len(self.checkpoints)
        features = preconditioned_features(self._map.shapes, count, self._sample)
        terms = [Term(Side(c, features(c)), self._train_side(c), weight=1.0) for c in range(count)]
        return terms, [quantities]  # the "batch" that the features of these terms take

    def _checked_quantities(self, quantities: Tensor) -> Tensor:
        """Preconditioned test gradients ``[m, C * P]``."""
        check_preconditioned(quantities, self._fitted.size, len(self.checkpoints))
        return quantities

    def _fit_at(self, index: int, loader: CheckpointLoader) -> None:
        self._fitted.fit(self._fit_data(index, loader))

    def _fit_data(self, index: int, loader: CheckpointLoader) -> FitData:
        """The data that the inverse curvature is fitted to at a checkpoint."""
        inverse, of_training = self.inverse, self._hessian_data is None
        is_cached = of_training and inverse.takes_own_labels and self._map.is_short
        examples = DataSet(
            self._train_batches if is_cached else self._hessian_loader,
            self.device,
            index,
            inverse.wording.data,
            inverse.sample_size(self._fitted.partition),
        )
        return FitData(
            examples,
            self._train_loss,
            self._map,
            self._fitted.partition,
            self._sample,
            self._memory,
            partial(self._cached, index),
            lambda: DataSet(self.train_dataloader, self.device).count,
            self.checkpoints,
            self._hessian_loader,
            of_training,
            f'{inverse.wording.damping}="{self.damping}"',
            self._said,
        )

    @property
    def _hessian_loader(self) -> CheckedBatches:
        if self._hessian_data is None:
            return self.train_dataloader
        return self._examples.of(self._hessian_data, HESSIAN_DATA)

    def _description(self, loader: CheckpointLoader) -> dict[str, Any]:
        """The model, data, loss and settings that a saved fit belongs to."""
        return {
            "method": self.get_name(),
            **self._fitted.description(),
            **({} if type(self.features) is FeatureMap else self._map.settings),
            **self._identity(loader, self._hessian_loader),
        }

    @contextmanager
    def session(self) -> Iterator[CheckpointLoader]:
        with super().session() as loader:
            try:
                yield loader
            finally:
                self._memory.clear()

    def watch(self, terms: Sequence[Term]) -> Watch | None:
        # preconditioned test gradients that a user passes cannot be compared
        is_given = terms[0].test.solve is None
        if is_given or not self._warns_of_damping:
            return None
        return damping_watch(self._fitted, self._examples.train_count, self.get_name())
