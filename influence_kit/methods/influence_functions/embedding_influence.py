"""What Captum's two influence functions share: embeddings whose dot products are the scores."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.core.arguments import check_count, check_number
from influence_kit.curvature.curvature import HessianOfLoss
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.base import BatchSize
from influence_kit.methods.example_influence import given
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.starting_again import starts_again
from influence_kit.operators.low_rank import EigenPairs, LowRank, as_tensors, from_tensors
from influence_kit.operators.operator import Operator, Scaled
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Transform


class EmbeddingInfluence(InfluenceFunction):
    """score = <R^T grad loss(test), R^T grad loss(train)>, R = V / sqrt(D) of the summed Hessian.

    V and D are eigenvectors and eigenvalues of the Hessian of the loss, summed over
    ``hessian_dataset``, with ``hessian_reg`` added; those above ``hessian_inverse_tol`` count, of
    them the ``projection_dim`` largest.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoint: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        projection_dim: int | None = 50,
        seed: int = 42,
        hessian_reg: float = 1e-6,
        hessian_inverse_tol: float = 1e-5,
        projection_on_cpu: bool = True,
        show_progress: bool = False,
        *,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        if projection_dim is not None:
            projection_dim = check_count(projection_dim, "projection_dim", instead="None")
        self.projection_dim = projection_dim
        self.hessian_inverse_tol = check_number(hessian_inverse_tol, "hessian_inverse_tol", least=0)
        self.projection_on_cpu = projection_on_cpu
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
            damping=check_number(hessian_reg, "hessian_reg", least=0),
            hessian_dataset=hessian_dataset,
            seed=seed,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        if show_progress:
            self.fit(show_progress=True)

    # What a method says.

    @abstractmethod
    def _pairs(self, hessian: Operator) -> EigenPairs:
        """Eigenpairs of the summed Hessian."""

    # What a user reads and calls.

    @property
    def hessian_reg(self) -> float:
        """What is added to the eigenvalues of the summed Hessian."""
        assert isinstance(self.damping, float | int)
        return self.damping

    @property
    def R(self) -> Tensor:  # noqa: N802 - Captum's name
        """The matrix ``[P, d]`` that gradients are multiplied with."""
        self._check_kept()
        if 0 not in self._facts:
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
        """The score of each example with itself, ``[n]``; of the training set where None."""
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
            return_on_cpu: have the result on the CPU.
            test: take the gradients of ``test_loss_fn`` (of minus ``test_output_fn``).
            inputs: the same as ``inputs_dataset``.
        """
        chosen = given(inputs_dataset if inputs is None else inputs)
        with self._session() as loader:
            _, batches = self._plan(loader, chosen, not aggregate, show_progress)
            features = (self.test_at if test else self.train_at)(0).features
            side = Side(0, features, (self._embed,))
            with self._bar("embed examples. Processing checkpoint", 1, show_progress) as bar:
                vectors = Stream([], loader, self._sample).vectors(side, batches, aggregate)
                bar.update()
        vectors = vectors.to(self._dtype)
        return vectors.cpu() if return_on_cpu else vectors

    # How it is done.

    # as Captum's, which leave eigenvalues out in place of damping them
    _warns_of_damping = False

    @property
    def _damping_text(self) -> str:
        return f"hessian_reg={self.hessian_reg:g}"

    def _blocks_of(self, names: list[str]) -> dict[str, list[str]]:
        return {"full": names}

    def _measure(self, data: DataSet) -> Facts:
        mean = HessianOfLoss(self._source, self._train_loss, data, self._partition, self._sample)
        facts = as_tensors([self._pairs(Scaled(mean, data.count))])
        return {
            name: value.cpu() if self.projection_on_cpu else value for name, value in facts.items()
        }

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        return facts["values.0"].sum()[None]

    def _chosen(self, facts: Facts) -> EigenPairs:
        """The eigenpairs that count, the reg added, the largest first."""
        (pair,) = from_tensors(facts, 1)
        values = pair.values + self.hessian_reg
        order = torch.argsort(values, descending=True)[: self.projection_dim]
        order = order[values[order] > self.hessian_inverse_tol]
        if not len(order):
            raise CurvatureError(
                "Hessian has no positive eigenvalues: with `hessian_reg` added the largest is "
                f"{float(values.max()):.4g}, which is not above `hessian_inverse_tol` "
                f"({self.hessian_inverse_tol}); train the model to a minimum, raise `hessian_reg`, "
                "or use `ExplicitInfluenceFunction`, whose default curvature is never negative"
            )
        return EigenPairs(values[order], pair.vectors[:, order])

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        return self._through(LowRank([self._chosen(facts)], 0.0, complement=False))

    def _projection(self) -> Tensor:
        pair = self._chosen(self._facts[0])
        return (pair.vectors / pair.values.sqrt()).to(self._sample)

    def _embed(self, gradients: Gradients) -> Gradients:
        values = self._partition.flat(gradients) @ self._projection()
        shape = torch.Size([values.shape[1]])
        return Gradients(
            gradients.n, {"embedding": Dense(values, shape)}, {"embedding": shape}, gradients.sample
        )

    _needs_fit_for_quantities = True

    def _checked_quantities(self, quantities: Tensor) -> Tensor:
        projection = self._projection()
        if quantities.dim() != 2 or quantities.shape[1] != projection.shape[1]:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(quantities.shape)}; embeddings made by "
                f"`compute_intermediate_quantities` have shape [m, {projection.shape[1]}] here"
            )
        return quantities.to(projection) @ projection.T
