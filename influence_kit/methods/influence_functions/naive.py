"""Captum's influence function from the whole Hessian: Koh and Liang 2017, arXiv 1703.04730."""

from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.hessian_eigenpairs import ExactEigenpairs
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.embedding_influence import EmbeddingInfluence
from influence_kit.methods.layer_names import Layers


@documented
class NaiveInfluenceFunction(EmbeddingInfluence):
    r"""score = <R^T grad loss(test), R^T grad loss(train)>, R = V / sqrt(D) of the summed Hessian.

    .. math::
        \nabla \ell_{test}(z')^T \, V D^{-1} V^T \, \nabla \ell(z), \qquad
        \sum_j \nabla^2 \ell(z_j) + \text{reg} \, I \approx V D V^T

    Captum's class of this name, its arguments and its scale: the Hessian is the *sum* over
    ``hessian_dataset``, so that n times a score with ``hessian_reg`` n * damping is the score of
    ``ExplicitInfluenceFunction`` with curvature "hessian" (if all eigenvalues count). Rows are
    test examples; positive is a proponent.

    Unlike Captum's, the eigenvectors are orthogonal for repeated eigenvalues too (``eigh``), the
    checkpoint is loaded for each call, ``batch_size`` defaults to "auto", and the Hessian is
    decomposed in the first call.

    Args:
        model, train_dataset, checkpoints_load_func, layers, loss_fn, batch_size: as in
            ``InnerProductInfluence``.
        test_loss_fn, test_output_fn: likewise: a loss of test examples, or a function where higher
            is better.
        checkpoint: a path, or anything that the load function accepts.
        hessian_dataset: the data over which the Hessian is a sum; the training set if None.
        sample_wise_grads_per_batch: as in ``InnerProductInfluence``.
        projection_dim: how many of the largest eigenvalues count; None for all.
        seed: not used; in Captum's signature.
        hessian_reg: added to the eigenvalues of the summed Hessian.
        hessian_inverse_tol: eigenvalues must be above it to count.
        projection_on_cpu: keep the eigenvectors on the CPU.
        show_progress: decompose the Hessian immediately, and show a bar.

    Raises:
        CurvatureError: if no eigenvalue counts.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> naive = NaiveInfluenceFunction(model, train, model.state_dict(), loss_fn=loss)
        >>> naive.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> naive.compute_intermediate_quantities((x, y)).shape
        torch.Size([8, 4])
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
            ExactEigenpairs(
                hessian_reg, projection_dim, hessian_inverse_tol, projection_on_cpu, seed
            ),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            show_progress=show_progress,
        )
