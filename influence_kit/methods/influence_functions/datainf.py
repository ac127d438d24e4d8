"""DataInf: Kwon et al. 2023, arXiv 2310.00902."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.mean_inverse import MeanOfInverses
from influence_kit.curvature.operator_inverses import BlockArgument
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


@documented
class DataInf(InfluenceFunction):
    r"""score = sum over blocks of grad loss(test)^T R_l grad loss(train).

    .. math::
        R_l = \frac{1}{n} \sum_j (g_{jl} g_{jl}^T + \lambda_l I)^{-1}
            = \frac{1}{n \lambda_l} \sum_j
              \Bigl( I - \frac{g_{jl} g_{jl}^T}{\lambda_l + \|g_{jl}\|^2} \Bigr)

    The mean of the inverses of the examples' damped curvatures, instead of the inverse of their
    mean (arXiv 2310.00902): the error grows with the number of parameters of a layer, and is small
    for the adapters of a fine-tune. One pass over the data for all test examples, in closed form;
    ``self_influence`` and ``relative`` take one pass per batch, and cache the gradients that fit in
    memory. Rows are test examples; positive is a proponent, and leaving the training
    example out raises the test loss by about score / n. The mean over checkpoints: about five of
    one run, evenly over its steps, are recommended (``select_checkpoints``).

    Args:
        damping: lambda: a positive number, a dict by block, or "auto" (or "mean"), the
            paper's 0.1 times the mean of ``|g|^2 / p`` in the block of p parameters; "trace" takes
            the smaller of p and n for p.
        blocks: "layer", "parameter" (weight and bias apart, each with its damping, as the authors'
            code has it), "full", or names of parameters by block. The guide on how to choose a
            method shows what that changes.
        hessian_dataset: the data over which R is a mean; the training set if None.
        relative: RelatIF: None, "l" or "theta".

    The other arguments are those of ``InnerProductInfluence``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> DataInf(model, train, [model.state_dict()], loss_fn=loss).influence((x, y)).shape
        torch.Size([8, 8])
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
            inverse=MeanOfInverses(damping, seed, blocks),
            hessian_dataset=hessian_dataset,
            relative=relative,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
