"""TrackStar: Chang et al. 2024, arXiv 2410.17413."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.checkpoints.second_moments import SecondMomentsOf
from influence_kit.core.arguments import check_number, shown
from influence_kit.curvature.autocorrelation import Autocorrelation
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.operator_inverses import BlockArgument
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import Batch
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.loaders import EVAL_DATA
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.data_fingerprint import data_fingerprint
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.identity import identity
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.methods.optimizer_state import check_optimizer, optimizer_fingerprint
from influence_kit.projections.normalized import NormalizedProjected
from influence_kit.projections.projected import Dim, Kind, Projected
from influence_kit.scoring.adam_directions import check_names
from influence_kit.scoring.term import Term
from influence_kit.scoring.transforms import unit_influence
from influence_kit.storage.folders import LOSSES, NORMS

MOMENTS = ("adam", "adafactor")
# the share of evaluation gradients in R, where there are any
MIXING = 0.9


@documented
class TrackStar(InfluenceFunction):
    r"""score = mean over checkpoints of cos(R^(-1/2) u_test, R^(-1/2) u_train).

    .. math::
        u_l = \operatorname{vec} \Bigl( P_o^T \, \frac{G_l}{\sqrt{V_l} + \epsilon} \, P_i \Bigr),
        \qquad R = \lambda R_{eval} + (1 - \lambda) R_{train}

    The gradient G of each layer is divided, entry by entry, by the root of the second moments V of
    the optimizer, and projected from both sides (arXiv 2410.17413). R_train and R_eval are the
    means of u u^T over the training and the evaluation examples, by layer; the norm is over all
    layers. R takes out directions that all gradients share, and with R_eval those that all queries
    share, such as a prompt's template. Rows are test examples; positive is a proponent; scores are
    between -1 and 1, and that of an example with itself is 1.

    V is read from the optimizer that the checkpoint holds beside the weights: a dict or file
    {"state_dict": ..., "optimizer": optimizer.state_dict()}, a file of Lightning, or a folder of
    Hugging Face's Trainer or of accelerate; Adam's is divided by 1 - beta_2^t after t steps.
    Entries without a second moment, whose gradients were zero throughout the run, are left out.

    The projected gradients of the training set are computed once and cached if they fit in memory;
    otherwise they are computed again in every call. Their gradients are written out, one layer at a
    time.

    Args:
        optimizer: "adam" (``torch.optim.Adam``, ``AdamW``), "adafactor" (that of torch or of
            transformers), or None: the gradients are not divided, for models trained by SGD.
        parameter_names: the names of the optimizer's parameters in its order. None takes the
            model's order (all its parameters, or those that require a gradient) within each
            parameter group, where the shapes allow only one such order.
        eval_dataset: the examples of R_eval, of the task that test examples are from; their
            gradients are those of ``test_loss_fn`` or ``test_output_fn``. None for R = R_train.
        mixing: lambda, from 0 to 1: the share of the evaluation examples in R. The larger, the
            more of what all queries have in common is weighed down. 0.9 by default.
        projection_dim, projection, seed: as in ``LoGra``.
        damping: added to the eigenvalues of R: a number, a dict by layer, or "auto" (or "trace"):
            the mean eigenvalue in the layer, its trace over min(entries of u, examples); "mean"
            always divides by the entries of u.
        blocks: "layer", "full" (R couples the layers), or a dict of blocks.
        hessian_dataset: the examples of R_train; the training set if None.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for ``mixing`` without ``eval_dataset``; in a call, if a checkpoint
            holds no optimizer's state, that of another optimizer, or one whose parameters are not
            the model's.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
        >>> loss(model(x), y).backward()
        >>> optimizer.step()
        >>> saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        >>> train, queries = (torch.utils.data.TensorDataset(x[i:], y[i:]) for i in (0, 4))
        >>> star = TrackStar(model, train, [saved], loss_fn=loss, eval_dataset=queries)
        >>> star.influence(queries, k=3).indices.shape
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
        optimizer: SecondMomentsOf | None = "adam",
        parameter_names: Sequence[str] | None = None,
        eval_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        mixing: float | None = None,
        projection_dim: Dim = 4096,
        projection: Kind = "orthogonal",
        damping: DampingArgument = "auto",
        blocks: BlockArgument = "layer",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        seed: int = 0,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        share = _checked_mixing(mixing, eval_dataset is not None)
        moments = check_optimizer(optimizer, parameter_names, MOMENTS)
        names = check_names(parameter_names)
        features = Projected(projection_dim, projection, seed)
        if moments is not None:
            features = NormalizedProjected(
                projection_dim, projection, seed, moments, names, lambda: self.checkpoints
            )
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
            inverse=Autocorrelation(damping, share, blocks, seed),
            hessian_dataset=hessian_dataset,
            relative="l",
            features=features,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
        self._warns_of_damping = False  # the scores have another unit than inner products
        self.optimizer, self.parameter_names, self.eval_dataset = optimizer, names, eval_dataset
        if eval_dataset is not None:
            self._examples.add_given(eval_dataset, EVAL_DATA)
            self._caches.sources[EVAL_DATA] = partial(data_fingerprint, eval_dataset)
        if moments is not None:
            self._caches.sources["checkpoints"] = lambda: optimizer_fingerprint(self.checkpoints)

    def terms(self) -> list[Term]:
        """One term per checkpoint, test and training gradients scaled to norm 1 under R^-1."""
        terms = []
        for c in range(len(self.checkpoints)):
            inverse = self._fitted.at(c)
            test = self.test_at(c, partial(unit_influence, inverse, "l"))
            share = 1 / len(self.checkpoints)
            terms.append(Term(replace(test, solve=inverse), self._train_side(c), weight=share))
        return terms

    def perturbation_influence(
        self,
        inputs: Any,
        train_indices: Any = None,
        k: int | None = None,
        layer: str | nn.Module | None = None,
        show_progress: bool = False,
    ) -> NoReturn:
        """Refused: the norm of the training gradient depends on the training input, too."""
        raise NotImplementedError(
            "TrackStar divides scores by the norm of the training gradient, which depends on the "
            "training input, too: `perturbation_influence` needs an influence function without "
            "norms, such as `LoGra`"
        )

    # Implementation.

    @property
    def _evaluation_loader(self) -> CheckedBatches:
        return self._examples.of(self.eval_dataset, EVAL_DATA)

    def _fit_data(self, index: int, loader: CheckpointLoader) -> FitData:
        data = super()._fit_data(index, loader)
        if self.eval_dataset is None:
            return data

        def features(indices: Tensor, batch: Batch) -> Gradients:
            return self._map.features(index, batch, self._test_loss)

        examples = DataSet(self._evaluation_loader, self.device, index, f"`{EVAL_DATA}`")
        return replace(data, evaluation=(examples, features))

    def _description(self, loader: CheckpointLoader) -> dict[str, Any]:
        described = super()._description(loader)
        if self.eval_dataset is None:
            return described
        count, features = len(self.checkpoints), self._map.identifying
        own = identity(loader, count, features, self._test_loss, self._evaluation_loader)
        return {
            **described,
            "evaluation examples": own["hash of the examples"],
            # with those of evaluation examples, which have another loss
            **{key: described[key] + own[key] for key in (LOSSES, NORMS)},
        }


def _checked_mixing(mixing: Any, has_queries: bool) -> float:
    """The share of evaluation examples in R."""
    if mixing is None:
        return MIXING if has_queries else 0.0
    if not has_queries:
        raise InvalidArgumentError(
            f"`mixing` is the share of `eval_dataset`, which is None; got {shown(mixing)}. Pass "
            "the evaluation examples, or leave `mixing` out"
        )
    return check_number(mixing, "mixing", least=0, most=1, instead="None")
