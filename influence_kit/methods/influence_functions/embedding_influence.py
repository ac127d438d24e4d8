"""The base of Captum's two influence functions: embeddings whose dot products are the scores."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction
from influence_kit.core.objects import check_flags
from influence_kit.curvature.hessian_eigenpairs import HessianEigenpairs
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.restarts import given, starts_again
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Side


class EmbeddingInfluence(InfluenceFunction):
    """score = <R^T grad loss(test), R^T grad loss(train)>, R = V / sqrt(D) of the summed Hessian.

    V and D are eigenvectors and eigenvalues of the Hessian of the loss, summed over
    ``hessian_dataset``, with ``hessian_reg`` added; the ``projection_dim`` largest of those above
    ``hessian_inverse_tol`` count.
    """

    inverse: HessianEigenpairs

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoint: Any,
        checkpoints_load_func: LoadFunction,
        layers: Layers | None,
        loss_fn: LossFunction | None,
        batch_size: BatchSize,
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None,
        test_loss_fn: LossFunction | None,
        sample_wise_grads_per_batch: bool | None,
        inverse: HessianEigenpairs,
        *,
        test_output_fn: OutputFunction | None,
        eval_mode: bool,
        batch_axes: Any,
        verify: Verify,
        show_progress: bool,
    ) -> None:
        check_flags({"show_progress": show_progress})
        self.checkpoint = checkpoint
        super().__init__(
            model,
            train_dataset,
            [checkpoint],
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
            inverse=inverse,
            hessian_dataset=hessian_dataset,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        # as Captum's, which drop small eigenvalues instead of damping them
        self._warns_of_damping = False
        self._always_fits = True  # embeddings are mapped back by the eigenvectors
        if show_progress:
            self.fit(show_progress=True)

    # What a user reads and calls.

    @property
    def hessian_reg(self) -> float:
        """The number added to the eigenvalues of the summed Hessian."""
        assert isinstance(self.damping, float | int)
        return self.damping

    @property
    def R(self) -> Tensor:  # noqa: N802 - Captum's name
        """The matrix ``[P, d]`` by which gradients are multiplied."""
        self._check_kept()
        if 0 not in self.fit_state:
            self.fit()
        return self._projection()

    @starts_again
    def self_influence(  # type: ignore[override] # Captum's names
        self,
        inputs_dataset: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
        inputs: Any = None,
    ) -> Tensor:
        """The score of each example with itself, ``[n]``; for the training set if None."""
        chosen = inputs_dataset if inputs is None else inputs
        return super().self_influence(chosen, show_progress, outer_loop_by_checkpoints)

    @starts_again
    def compute_intermediate_quantities(  # type: ignore[override] # Captum's names
        self,
        inputs_dataset: Any = None,
        aggregate: bool = False,
        show_progress: bool = False,
        return_on_cpu: bool = True,
        test: bool = False,
        inputs: Any = None,
    ) -> Tensor:
        """Embeddings whose dot products are the scores, ``[n, d]``.

        Args:
            inputs_dataset: one batch or a DataLoader (also as ``inputs``).
            aggregate: their sum, ``[1, d]``.
            show_progress: a bar over the checkpoint.
            return_on_cpu: return the result on the CPU.
            test: take the gradients of ``test_loss_fn`` (of minus ``test_output_fn``).
            inputs: the same as ``inputs_dataset``.
        """
        chosen = given(inputs_dataset if inputs is None else inputs)
        with self.session() as loader:
            _, batches = self._plan(loader, chosen, not aggregate, show_progress)
            features = (self.test_at if test else self.train_at)(0).features
            side = Side(0, features, (self._embed,))
            with self.progress("embed examples. Processing checkpoint", 1, show_progress) as bar:
                vectors = SideGradients(loader, self._sample).vectors(side, batches, aggregate)
                bar.update()
        vectors = vectors.to(self._dtype)
        return vectors.cpu() if return_on_cpu else vectors

    # Implementation.

    def notes(self) -> list[str]:
        return [*ExampleInfluence.notes(self), f"hessian_reg={self.hessian_reg:g}"]

    def _projection(self) -> Tensor:
        return self.inverse.projection(self.fit_state[0], self.hessian_reg, self._sample)

    def _embed(self, gradients: Gradients) -> Gradients:
        values = self._fitted.partition.flat(gradients) @ self._projection()
        shape = torch.Size([values.shape[1]])
        return Gradients(
            gradients.n, {"embedding": Dense(values, shape)}, {"embedding": shape}, gradients.sample
        )

    def _checked_quantities(self, quantities: Tensor) -> Tensor:
        projection = self._projection()
        if quantities.dim() != 2 or quantities.shape[1] != projection.shape[1]:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(quantities.shape)}; embeddings made by "
                f"`compute_intermediate_quantities` have shape [m, {projection.shape[1]}] here"
            )
        return quantities.to(projection) @ projection.T
