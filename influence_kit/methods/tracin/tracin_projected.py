"""TracIn of all layers through projected gradients: arXiv 2002.08484, section 4."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.tracin.tracin import TracInCPBase
from influence_kit.projections.projected import Dim, Kind, Projected


@documented
class TracInCPRandProj(TracInCPBase):
    r"""score = sum over checkpoints and layers of learning rate * <u_test, u_train>.

    .. math::
        \sum_c \eta_c \sum_l u'_{cl} \cdot u_{cl}, \qquad
        u_{cl} = \operatorname{vec} (P_o^T \, G_{cl} \, P_i)

    ``TracInCP`` of projected gradients: the gradient G of each layer at each checkpoint is
    projected as in ``LoGra``, by the same maps at all checkpoints, without curvature (arXiv
    2002.08484). The scores are unbiased estimates of those of ``TracInCP``, over the seeds. Rows
    are test examples; positive is a proponent. The weight of checkpoints without a learning rate is
    1, and the scores are then estimates of those of ``GradDot``.

    The projected gradients of the training set are computed once and cached in memory if they fit,
    or in ``store``; otherwise they are computed again in every call.

    Args:
        projection_dim: as in ``LoGra``: a pair, the columns of P_o and P_i, or the largest number
            of entries per layer.
        projection: "orthogonal", "gaussian", "rademacher" or "identity" (no projection: the scores
            of ``TracInCP``).
        seed: the seed of the projection; the draw for a layer depends only on its name.

    The other arguments are those of ``InnerProductInfluence``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> train, loss = torch.utils.data.TensorDataset(x, y), torch.nn.CrossEntropyLoss()
        >>> checkpoint = {"state_dict": model.state_dict(), "learning_rate": 0.1}
        >>> tracin = TracInCPRandProj(model, train, [checkpoint], loss_fn=loss, projection_dim=16)
        >>> tracin.influence((x[:4], y[:4]), k=3).indices.shape
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
        projection_dim: Dim = 4096,
        projection: Kind = "orthogonal",
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
            features=Projected(projection_dim, projection, seed),
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
        self.projection_dim, self.projection, self.seed = projection_dim, projection, seed
