"""Influence functions by Kronecker-factored curvature: K-FAC and EK-FAC."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fitted_pieces import LEFT_OUT
from influence_kit.curvature.kronecker_curvature import (
    EKFAC,
    KFAC,
    FisherName,
    KroneckerCurvature,
    WithoutForm,
    block_forms,
)
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers


class KroneckerInfluence(InfluenceFunction):
    """The arguments and results that K-FAC and EK-FAC share."""

    _part: type[KroneckerCurvature]

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
        curvature: FisherName = "fisher",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        rtol: float = 1e-5,
        layers_without_kronecker: WithoutForm = "diagonal",
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
            inverse=self._part(damping, curvature, seed, rtol, layers_without_kronecker),
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
    def block_forms(self) -> dict[str, str]:
        """The form of the curvature of each block, after the fit; empty before.

        "Kronecker", "diagonal" ("diagonal (zero)" if no example has a gradient) or "left out";
        "Kronecker, diagonal over its 50,257 outputs" if a side of a weight is longer than 8,192;
        by parameter if those of a block differ: "weight: Kronecker; bias: diagonal". If
        checkpoints differ, their forms joined by "or".
        """
        return block_forms(self.model, self.fit_state, self._fitted.partition)

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block that takes part, at each checkpoint that is fitted.

        With "auto" all blocks of a checkpoint have the same damping.
        """
        forms = self.block_forms
        return [
            {block: value for block, value in values.items() if forms[block] != LEFT_OUT}
            for values in super().damping_used
        ]


@documented
class KFACInfluenceFunction(KroneckerInfluence):
    r"""score = sum over layers of <G_test, (S (x) A + damping)^-1 G_train>.

    .. math::
        \sum_l \Bigl\langle G',\; Q_S \Bigl[ \frac{Q_S^T G Q_A}{s a^T + \lambda} \Bigr] Q_A^T
        \Bigr\rangle

    K-FAC (arXiv 1503.05671): the Fisher matrix of each layer is approximated by a Kronecker product
    of the covariance S of its output gradients (eigenvalues s, eigenvectors Q_S; a sum over
    positions, averaged over examples) and that of its inputs A (a, Q_A; averaged over positions),
    weight and bias together; in an embedding, positions with equal ids count as one. Rows are test
    examples; positive is a proponent, and leaving the training example out raises the test loss by
    about score / n. The mean over checkpoints: about five of one run, evenly over its steps, are
    recommended (``select_checkpoints``).

    Linear layers, convolutions and embeddings have this form. Parameters without it (of norms, of
    attention, of the model itself, a bias or table that other layers use) have the exact diagonal
    of their curvature: element p of the gradient is divided by mean_j g_jp^2 + damping. A side of a
    weight longer than 8,192 has a diagonal on that side. ``block_forms`` shows the form of each
    block.

    "fisher" is the mean of J^T H J: J is the Jacobian of the outputs, H the covariance of the
    loss's slope in them over labels distributed as the model predicts (diag(p) - p p^T for a
    softmax). It is estimated by outer products of g = J^T s, where the slopes s of an example are
    random signs times a root of H: their mean is the Fisher matrix, and they vary less than those
    of gradients at sampled labels, of which only the unlikely ones show a confident model's
    curvature.

    With ``damping="auto"`` all layers have one lambda:

    .. math::
        \lambda = \frac{\lambda_0}{\max(1, \rho)}, \qquad
        N \lambda_0 \|\theta\|^2 = \sum_p \frac{l_p}{l_p + \lambda_0}, \qquad
        \rho = \frac{\operatorname{E}_{i \ne j} \bigl( g_i^T (F + \lambda_0)^{-1} g_j \bigr)^2}
            {\sum_p \bigl( l_p / (l_p + \lambda_0) \bigr)^2} - 1

    N lambda_0 is the precision of a normal prior of the weights at which the evidence of a Laplace
    approximation is largest (MacKay 1992; arXiv 2104.04975): theta are the weights and l the
    eigenvalues of linear layers and convolutions, N the labels of the training set in the units of
    the loss: n for cross-entropy, n T^2 for its mean over T tokens, n over the estimated variance
    for half the squared error (with "fisher"), n for a loss that is not a likelihood. rho is
    the part of the curvature that the Kronecker products F of all layers leave out, between layers
    and within, relative to F: measured on the gradients g of 256 to 512 examples, or all if there
    are fewer (fewer for models with over 33,000 parameters: 64 to 128 for half a million, at least
    8).

    Args:
        damping: added to the eigenvalues of the curvature of the mean loss, so in the units of the
            squared gradient: a positive number, a dict by layer, or a rule by name: "auto", which
            is "evidence"; "mean", 0.1 times the mean of the products s a in the layer; "trace", 0.1
            times their sum over their number, or over n if that is less; "learning_rates", see
            ``InfluenceFunction``. ``damping_used`` shows the numbers. Setting it does not fit
            again.
        curvature: "fisher" (gradients J^T s at slopes s sampled by ``seed``; the loss must be that
            of a softmax, sigmoid or normal distribution) or "empirical_fisher" (gradients at the
            labels of the data).
        hessian_dataset: the data over which the factors are means; the training set if None.
        relative: RelatIF: None, "l" or "theta".
        rtol: see ``EKFACInfluenceFunction``.
        seed: the seed of the sampled slopes; those of an example depend on its index only.
        layers_without_kronecker: how to treat parameters without this form: "diagonal" (the exact
            diagonal), "leave_out" (as if frozen; a warning names them) or "error".

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for ``damping="auto"`` if the evidence has no maximum (all weights,
            gradients or squared errors are zero).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        ... )
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> kfac = KFACInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss()
        ... )
        >>> kfac.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    _part = KFAC


@documented
class EKFACInfluenceFunction(KroneckerInfluence):
    r"""score = sum over layers of <G_test, Q_S [(Q_S^T G_train Q_A) / (Lambda + damping)] Q_A^T>.

    .. math::
        \Lambda = \frac{1}{n} \sum_j (Q_S^T G_j Q_A)^2

    EK-FAC (arXiv 1806.03884, 2308.03296): the eigenvectors of K-FAC with the eigenvalues that fit
    the per-example gradients G_j best, with "fisher" at slopes sampled independently of those that
    fixed the eigenvectors. The fit takes two passes over the Hessian data; one pass over the
    training set scores all test examples.
    Rows are test examples; positive is a proponent, and leaving the training example out raises the
    test loss by about score / n. The mean over checkpoints: about five of one run, evenly over its
    steps, are recommended (``select_checkpoints``).

    Linear layers, convolutions and embeddings have this form. Parameters without it (of norms, of
    attention, of the model itself, a bias or table that other layers use) have the exact diagonal
    of their curvature: element p of the gradient is divided by mean_j g_jp^2 + damping. A side of a
    weight longer than 8,192 has a diagonal on that side. ``block_forms`` shows the form of each
    block.

    Args:
        damping: added to Lambda: a positive number, a dict by layer, or a rule by name, "auto"
            ("evidence"), "mean", "trace" or "learning_rates", with the formulas of
            ``KFACInfluenceFunction`` for the eigenvalues Lambda.
        curvature, hessian_dataset, relative, seed, layers_without_kronecker: as in
            ``KFACInfluenceFunction``.
        rtol: the error, relative to a layer's scores, up to which 1 / (Lambda + damping) may be
            replaced by a few outer products, where that is cheaper. The error is measured on each
            batch, and a batch that exceeds it is multiplied exactly; 0 makes all products exact.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        ... )
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> ekfac = EKFACInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss()
        ... )
        >>> ekfac.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
        >>> {layer: round(value, 3) for layer, value in ekfac.damping_used[0].items()}
        {'0': 0.17, '2': 0.17}
        >>> ekfac.block_forms
        {'0': 'Kronecker', '2': 'Kronecker'}
    """

    _part = EKFAC
