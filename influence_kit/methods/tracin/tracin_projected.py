"""TracIn of all layers through projected gradients: arXiv 2002.08484, section 4."""

from typing import Any, Literal

from influence_kit.core.draws import check_seed
from influence_kit.methods.projected.projected import Dim, ProjectedGradients, check_dim, check_kind
from influence_kit.methods.tracin.tracin import TracInCPBase


class TracInCPRandProj(TracInCPBase, ProjectedGradients):
    r"""score = sum over checkpoints and layers of learning rate * <u_test, u_train>.

    .. math::
        \sum_c \eta_c \sum_l u'_{cl} \cdot u_{cl}, \qquad
        u_{cl} = \operatorname{vec} (P_o^T \, G_{cl} \, P_i)

    ``TracInCP`` of short vectors: the gradient G of each layer at each checkpoint projected as
    ``LoGra`` does, by the same maps at all checkpoints, and no curvature (arXiv 2002.08484). The
    scores are unbiased estimates of those of ``TracInCP``, over the seeds. Rows are test examples;
    positive is a proponent. Checkpoints without a learning rate count 1, and the scores are
    estimates of those of ``GradDot``.

    The projected gradients of the training set are computed once and kept in memory where they
    fit, or in ``store``; otherwise they are computed anew for every question.

    Args:
        projection_dim: as in ``LoGra``: a pair, the columns of P_o and P_i, or the most entries of
            a layer.
        projection: "orthogonal", "gaussian", "rademacher" or "identity" (nothing is projected: the
            scores of ``TracInCP``).
        seed: of the projection; that of a layer depends on its name alone.

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
        *args: Any,
        projection_dim: Dim = 4096,
        projection: Literal["gaussian", "rademacher", "orthogonal", "identity"] = "orthogonal",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.projection_dim = check_dim(projection_dim)
        self.projection = check_kind(projection)
        self.seed = check_seed(seed)
        super().__init__(*args, **kwargs)
