"""LoGra: Choe et al. 2024, arXiv 2405.13954."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.kronecker_curvature import FisherName
from influence_kit.curvature.operator_inverses import BlockArgument
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.optimizer_state import Optimizer
from influence_kit.methods.projected.projected_inverse import ProjectedInverse
from influence_kit.projections.projected import Dim, Kind, Projected


@documented
class LoGra(InfluenceFunction):
    r"""score = sum over layers of u_test^T (F + damping I)^-1 u_train, u = vec(P_o^T G P_i).

    .. math::
        u_l = \operatorname{vec} \Bigl( \sum_t (P_o^T d_t) (P_i^T [a_t, 1])^T \Bigr), \qquad
        F_l = \frac{1}{n} \sum_j u_{jl} u_{jl}^T

    The gradient G of each layer is projected from both sides while it is still factored into
    inputs a and output gradients d, so that it is never formed (arXiv 2405.13954). Convolutions
    and embeddings are matrices, too; a parameter that is not a matrix (of a norm) is projected as a
    vector. Rows are test examples; positive is a proponent, and leaving the training example out
    raises the test loss by about score / n, up to the error of the projection. The mean over
    checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).

    The projected gradients of the training set are computed once and cached if they fit in memory;
    otherwise they are computed again in every call. F is inverted through the inner products of the
    u if there are at most half as many examples as entries of u.

    Args:
        projection_dim: a pair, the columns of P_o and P_i, or the largest number of entries of u:
            then its square root for each side, and more for one side if the other is shorter. A
            side that has no more entries than that is not projected.
        projection: "orthogonal", "gaussian", "rademacher" or "identity" (no projection); inner
            products of projected gradients are unbiased estimates of those of the gradients.
        damping: added to the eigenvalues of F: a number, a dict by layer, or "auto" (or "trace"):
            the mean eigenvalue in the layer, its trace over min(entries of u, examples); "mean"
            always divides by the entries of u.
        curvature: "empirical_fisher" (gradients at the labels of the data) or "fisher" (at sampled
            slopes; see ``KFACInfluenceFunction``).
        blocks: "layer", "full" (F couples the layers), or a dict of blocks.
        hessian_dataset: the data over which F is a mean; the training set if None.
        relative: RelatIF: None, "l" or "theta".
        seed: the seed of the projection; the draw for a layer depends only on its name.

    The other arguments are those of ``InnerProductInfluence``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2)
        ... )
        >>> x, y = torch.randn(8, 20), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> logra = LoGra(
        ...     model,
        ...     train,
        ...     [model.state_dict()],
        ...     loss_fn=torch.nn.CrossEntropyLoss(),
        ...     projection_dim=(4, 4),
        ... )
        >>> logra.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> logra.compute_intermediate_quantities((x[:4], y[:4])).shape  # 4 x 4 and 2 x 4
        torch.Size([4, 24])
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
        projection_dim: Dim = 4096,
        projection: Kind = "orthogonal",
        damping: DampingArgument = "auto",
        curvature: FisherName = "empirical_fisher",
        blocks: BlockArgument = "layer",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
        optimizer: Optimizer | None = None,
        parameter_names: Sequence[str] | None = None,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
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
            inverse=ProjectedInverse(damping, curvature, blocks, seed),
            hessian_dataset=hessian_dataset,
            relative=relative,
            features=Projected(projection_dim, projection, seed),
            optimizer=optimizer,
            parameter_names=parameter_names,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
