"""Influence functions by conjugate gradients: Koh and Liang 2017, arXiv 1703.04730.

Shapes: m right-hand sides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.curvature.conjugate_gradients import ConjugateGradients, Solved
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.operator_inverses import BlockArgument, CurvatureName
from influence_kit.curvature.preconditioners import PreconditionerArgument
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.fitted_elsewhere import as_preconditioner
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


@documented
class CGInfluenceFunction(InfluenceFunction):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by conjugate gradients.

    All test examples are solved together: one pass over the Hessian data per iteration, for any
    number of test examples (arXiv 1703.04730). Rows are test examples; positive is a proponent, and
    leaving the training example out raises the test loss by about score / n. The mean over
    checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).
    ``self_influence`` and ``relative`` solve for every training example, a batch at a time.

    A preconditioner M approximates (C + damping)^-1; the first iterate is M v times the best
    factor. It does not change what the iteration converges to, only how many passes it takes.
    "sample" is the inverse for the mean outer product of up to 2,048 gradients (examples spread
    over the data, at slopes sampled from the model as for "fisher", with up to 4 draws each). K-FAC
    and EK-FAC (ASTRA, arXiv 2507.14740) need no gradients in memory and treat layers separately:
    where layers are coupled they help in the first iterations and take more of them to a small
    residual than no preconditioner.

    Args:
        damping, curvature, blocks, hessian_dataset, relative, seed: as in
            ``ExplicitInfluenceFunction``; C is not formed here, and "auto" computes its trace
            exactly for blocks of up to 256 parameters, and from 32 random probes for larger ones.
        max_iter: the largest number of iterations; a warning shows if they did not suffice.
        tol: an example is done when the norm of its residual, relative to that of its right-hand
            side, is at most this.
        preconditioner: "sample"; "jacobi" (the diagonal of C); "nystrom" (50 eigenpairs of C, one
            pass with 50 vectors); "kfac" or "ekfac", fitted with ``seed``; an inverse curvature,
            such as ``EKFAC(layers_without_kronecker="leave_out")``; another influence function of
            the same model, parameters and checkpoints, whose fit is used if it is fitted; or None.
            "auto" is "sample", and None if the damping is 0 or above 1/24 of the largest eigenvalue
            of the sample: then few iterations are needed.

    Raises:
        CurvatureError: if C + damping is not positive definite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2).double()
        >>> x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> cg = CGInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.01
        ... )
        >>> cg.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
        >>> bool((cg.residuals[0] <= 1e-6).all())
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
        max_iter: int = 100,
        tol: float = 1e-6,
        preconditioner: PreconditionerArgument | InfluenceFunction = "auto",
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
            inverse=ConjugateGradients(
                damping,
                curvature,
                blocks,
                seed,
                max_iter,
                tol,
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

    @property
    def iterations(self) -> list[Tensor]:
        """The number of iterations for each right-hand side of the latest call, by checkpoint."""
        return [iterations for iterations, _ in self._reports]

    @property
    def residuals(self) -> list[Tensor]:
        """The relative residuals reached in the latest call, by checkpoint: float64, ``[m]``."""
        return [residuals for _, residuals in self._reports]

    @property
    def _reports(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.cat([own for own, _ in parts]), torch.cat([own for _, own in parts]))
            for parts in (solver.reports for solver in self._solvers)
            if parts
        ]

    @property
    def _solvers(self) -> list[Solved]:
        inverses = sorted(self._fitted.cache.inverses.items())
        return [inverse for _, inverse in inverses if isinstance(inverse, Solved)]

    @contextmanager
    def session(self) -> Iterator[CheckpointLoader]:
        for solver in self._solvers:
            solver.reports.clear()
        with super().session() as loader:
            yield loader
