"""Influence functions by LiSSA: Agarwal et al. 2017, arXiv 1602.03943."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.operator_inverses import BlockArgument, CurvatureName
from influence_kit.curvature.preconditioners import PreconditionerArgument
from influence_kit.curvature.stochastic_series import LiSSA
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.fitted_elsewhere import as_preconditioner
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


@documented
class LiSSAInfluenceFunction(InfluenceFunction):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by a stochastic series.

    .. math::
        h \leftarrow v + h - (C_s h + \lambda h) / s, \qquad (C + \lambda I)^{-1} v \approx h / s

    All test examples are solved together (arXiv 1602.03943). The fixed point is
    (C + damping I)^-1 v for any scale s; the series converges to it if s is above the largest
    eigenvalue of C + damping. The error shrinks by the factor 1 - damping / s per iteration, so
    that a small damping requires a large depth.

    With a preconditioner M, an approximation of (C + damping)^-1, the iteration is

    .. math::
        h \leftarrow h + M \, (v - C_s h - \lambda h) / s, \qquad h \approx (C + \lambda I)^{-1} v

    from h = M v, whose number of iterations depends less on the damping; where examples are
    sampled, the result is the mean over the last half of them. ``preconditioner="ekfac"`` is ASTRA
    (arXiv 2507.14740): where a whole pass per iteration is too dear, take it in place of
    ``CGInfluenceFunction``, with a ``recursion_depth`` of 50 to 200.

    Rows are test
    examples; positive is a proponent, and leaving the training example out raises the test loss by
    about score / n. The mean over checkpoints: about five of one run, evenly over its steps, are
    recommended (``select_checkpoints``).

    Args:
        damping, curvature, blocks, hessian_dataset, relative: as in ``ExplicitInfluenceFunction``.
        recursion_depth: the number of iterations.
        num_repeat: how many series to average, each with its own samples.
        scale: s, or "auto": 1.1 times the largest eigenvalue of C + damping by power iteration (20
            passes over the Hessian data); with a preconditioner, of M (C_s + damping), by 100
            products with samples.
        hessian_batch_size: examples sampled in each iteration; None for all of them, which makes
            the result exact and each iteration one pass.
        preconditioner: M, as in ``CGInfluenceFunction``; None for the plain series.
        seed: the seed of the samples.

    Raises:
        CurvatureError: if the series diverges.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> series = LiSSAInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.1, recursion_depth=50
        ... )
        >>> series.influence((x[:4], y[:4])).shape
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
        recursion_depth: int = 1000,
        num_repeat: int = 1,
        scale: float | Literal["auto"] = "auto",
        hessian_batch_size: int | None = 64,
        preconditioner: PreconditionerArgument | InfluenceFunction = None,
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
            inverse=LiSSA(
                damping,
                curvature,
                blocks,
                seed,
                recursion_depth,
                num_repeat,
                scale,
                hessian_batch_size,
                as_preconditioner(preconditioner),
            ),
            hessian_dataset=hessian_dataset,
            relative=relative,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
