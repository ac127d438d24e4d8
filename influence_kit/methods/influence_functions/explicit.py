"""Influence functions by the exact inverse curvature: Koh and Liang 2017, arXiv 1703.04730."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.operator_inverses import BlockArgument, CurvatureName, Explicit
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


@documented
class ExplicitInfluenceFunction(InfluenceFunction):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by Cholesky factors of C.

    .. math::
        \nabla \ell_{test}(z')^T \, (C + \lambda I)^{-1} \, \nabla \ell(z), \qquad
        C = \frac{1}{n} \sum_j C_j

    The exact inverse (arXiv 1703.04730), block by block: P^2 numbers in float64 and P^3 / 3
    operations for a block of P parameters. "fisher" and "empirical_fisher" of n <= P / 2 examples
    take n * P numbers, their gradients, and n^2 * P operations: C is inverted through their inner
    products (Woodbury) and never formed. Rows are test examples; positive is a proponent, and
    leaving the training example out raises the test loss by about score / n. The mean over
    checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).

    For a model that was trained with weight decay (l2 / 2 times the squared norm added to the mean
    loss) ``damping=l2`` makes C + damping the Hessian of the minimised objective.

    Args:
        damping: added to the eigenvalues of C: a number, a dict by block, or "auto" (or "trace"):
            the mean eigenvalue of the block, which is its trace over the number of its parameters,
            or of examples if those are fewer; "mean" always divides by the parameters.
        curvature: "ggn" (Gauss-Newton, J^T H J: the Hessian for models that are linear in their
            parameters, and never negative for a loss that is convex in the outputs), "hessian" (may
            be indefinite away from a minimum), "fisher" (J^T H J again, estimated by outer products
            of gradients at sampled slopes; see ``KFACInfluenceFunction``) or "empirical_fisher"
            (outer products of gradients at the labels of the data).
        blocks: "full", "layer", "parameter", or names of parameters by block: entries of C between
            blocks are taken as zero, and parameters in no block as frozen.
        hessian_dataset: the data over which C is a mean; the training set if None.
        relative: RelatIF: None, "l" or "theta".
        seed: the seed of the slopes that "fisher" samples.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        CurvatureError: if a block is singular or indefinite in spite of the damping.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> exact = ExplicitInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.01
        ... )
        >>> exact.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> factors = exact.compute_intermediate_quantities((x[:4], y[:4]))
        >>> bool(torch.allclose(exact.influence(factors), exact.influence((x[:4], y[:4]))))
        True
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
            inverse=Explicit(damping, curvature, blocks, seed),
            hessian_dataset=hessian_dataset,
            relative=relative,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
