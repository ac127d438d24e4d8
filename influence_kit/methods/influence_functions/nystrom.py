"""Influence functions by the randomized Nystroem approximation, arXiv 2110.02820."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.operator_inverses import BlockArgument, CurvatureName, Nystrom
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


@documented
class NystromInfluenceFunction(InfluenceFunction):
    r"""score = grad loss(test)^T (C_nys + damping I)^-1 grad loss(train), C_nys of a given rank.

    .. math::
        C_{nys} = (C \Omega)(\Omega^T C \Omega)^{+}(C \Omega)^T, \qquad
        (C_{nys} + \lambda I)^{-1} = U (S + \lambda)^{-1} U^T + (I - U U^T) / \lambda

    One pass over the Hessian data for all random directions together (arXiv 2110.02820); exact if
    the rank of C is at most ``rank``. Requires a curvature that is not negative: "ggn", "fisher" or
    "empirical_fisher", or a Hessian at a minimum. Rows are test examples; positive is a
    proponent, and leaving the training example out raises the test loss by about score / n. The
    mean over checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).

    Args:
        damping, curvature, blocks, hessian_dataset, relative: as in ``ExplicitInfluenceFunction``;
            the damping must be positive.
        rank: the number of directions per block (all directions of a smaller block).
        seed: the seed of the directions.

    Raises:
        CurvatureError: if the curvature is indefinite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> low = NystromInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, rank=4
        ... )
        >>> low.influence((x[:4], y[:4])).shape
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
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
        rank: int = 100,
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
            inverse=Nystrom(damping, curvature, blocks, seed, rank),
            hessian_dataset=hessian_dataset,
            relative=relative,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
