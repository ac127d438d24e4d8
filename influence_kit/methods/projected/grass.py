"""GraSS and FactGraSS: Hu et al. 2025, arXiv 2505.18976."""

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
from influence_kit.methods.projected.projected_inverse import ProjectedInverse
from influence_kit.projections.projected import FactMasked, Masked


@documented
class GraSS(InfluenceFunction):
    """score = sum over layers of u_test^T (F + damping I)^-1 u_train, u = S M g.

    ``LoGra`` with another projection: the mask M selects ``blow_up`` times k entries of a layer's
    whole gradient g, and the sparse Johnson-Lindenstrauss transform S sums them with random signs
    into k entries (arXiv 2505.18976). F, sign, scale and the gradient cache are those of ``LoGra``.
    Gradients are formed, one batch at a time; ``FactGraSS`` forms only the selected entries.

    Args:
        projection_dim: k, for each layer; a layer with fewer entries is not projected.
        mask: "random", or "learnt" from the gradients of 64 training examples, spread over the
            training set, at the first checkpoint: the entries that preserve inner products best.
        blow_up: the mask selects this many times k entries.
        seed: the seed of mask and projection; the draw for a layer depends only on its name.

    The other arguments are those of ``LoGra``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> train, loss = torch.utils.data.TensorDataset(x, y), torch.nn.CrossEntropyLoss()
        >>> grass = GraSS(model, train, [model.state_dict()], loss_fn=loss, projection_dim=16)
        >>> grass.influence((x[:4], y[:4]), k=3).indices.shape
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
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        projection_dim: int = 4096,
        mask: Literal["random", "learnt"] = "random",
        blow_up: int = 4,
        damping: DampingArgument = "auto",
        curvature: FisherName = "empirical_fisher",
        blocks: BlockArgument = "layer",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
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
            features=Masked(projection_dim, mask, blow_up, seed),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )


@documented
class FactGraSS(InfluenceFunction):
    """score = sum over layers of u_test^T (F + damping I)^-1 u_train, u = S vec(M_o^T G M_i).

    ``GraSS`` for gradients G = sum_t d_t [a_t, 1]^T that are never formed: random masks select some
    entries of the output gradients d and of the inputs a of each layer, ``blow_up`` times k
    products in all; only those are formed, and S sums them with random signs into k entries (arXiv
    2505.18976). F, sign, scale and the gradient cache are those of ``LoGra``.

    Args:
        projection_dim: k, for each layer; a layer with fewer entries is not projected.
        blow_up: the masks select this many times k products.
        seed: the seed of masks and projection; the draws for a layer depend only on its name.

    The other arguments are those of ``LoGra``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> train, loss = torch.utils.data.TensorDataset(x, y), torch.nn.CrossEntropyLoss()
        >>> fact = FactGraSS(model, train, [model.state_dict()], loss_fn=loss, projection_dim=16)
        >>> fact.influence((x[:4], y[:4]), k=3).indices.shape
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
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        projection_dim: int = 4096,
        blow_up: int = 4,
        damping: DampingArgument = "auto",
        curvature: FisherName = "empirical_fisher",
        blocks: BlockArgument = "layer",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
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
            features=FactMasked(projection_dim, blow_up, seed),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
