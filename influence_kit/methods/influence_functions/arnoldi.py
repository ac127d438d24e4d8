"""Captum's influence function by Arnoldi's iteration: Schioppa et al. 2021, arXiv 2112.03052."""

from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.hessian_eigenpairs import ArnoldiEigenpairs
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.embedding_influence import EmbeddingInfluence
from influence_kit.methods.layer_names import Layers


@documented
class ArnoldiInfluenceFunction(EmbeddingInfluence):
    r"""score = <R^T grad loss(test), R^T grad loss(train)>, R = V / sqrt(D) of the summed Hessian.

    The eigenpairs are those of the Hessian restricted to a Krylov subspace (arXiv 2112.03052): one
    pass over ``hessian_dataset`` per dimension, at most ``arnoldi_dim``. Otherwise as
    ``NaiveInfluenceFunction``, which documents the scale (Captum's: the sum) and the sign.

    Unlike Captum's, the restriction is symmetric, as the Hessian is; ``R`` is one matrix ``[P, d]``
    here, and a list of tuples in Captum.

    Args:
        model, train_dataset, checkpoint, checkpoints_load_func, layers, loss_fn, batch_size: as in
            ``NaiveInfluenceFunction``.
        hessian_dataset, test_loss_fn, test_output_fn, sample_wise_grads_per_batch, projection_dim:
            likewise.
        seed: the seed of the random start.
        arnoldi_dim: the largest dimension of the subspace.
        arnoldi_tol: stop if the next direction is shorter than this, before it is normalized.
        hessian_reg, hessian_inverse_tol, projection_on_cpu, show_progress: likewise.

    Raises:
        CurvatureError: if no eigenvalue counts.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> few = ArnoldiInfluenceFunction(
        ...     model, train, model.state_dict(), loss_fn=loss, projection_dim=2
        ... )
        >>> few.compute_intermediate_quantities((x, y)).shape
        torch.Size([8, 2])
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
        seed: int = 0,
        arnoldi_dim: int = 200,
        arnoldi_tol: float = 1e-1,
        hessian_reg: float = 1e-3,
        hessian_inverse_tol: float = 1e-4,
        projection_on_cpu: bool = True,
        show_progress: bool = False,
        *,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            checkpoint,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            hessian_dataset,
            test_loss_fn,
            sample_wise_grads_per_batch,
            ArnoldiEigenpairs(
                arnoldi_dim,
                arnoldi_tol,
                hessian_reg,
                projection_dim,
                hessian_inverse_tol,
                projection_on_cpu,
                seed,
            ),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            show_progress=show_progress,
        )
