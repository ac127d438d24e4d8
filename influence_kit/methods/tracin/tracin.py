"""TracIn with checkpoints: Pruthi et al. 2020, arXiv 2002.08484."""

from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.scoring.term import Term


class TracInCPBase(InnerProductInfluence):
    """score = sum over checkpoints of learning rate * <grad loss(test), grad loss(train)>."""

    def terms(self) -> list[Term]:
        """One term per checkpoint."""
        indices = range(len(self.checkpoints))
        return [Term(self.test_at(c), self.train_at(c)) for c in indices]


class TracInCP(TracInCPBase):
    r"""score = sum over checkpoints of learning rate * <grad loss(test), grad loss(train)>.

    .. math::
        \sum_c \eta_c \, \nabla \ell(z; \theta_c) \cdot \nabla \ell_{test}(z'; \theta_c)

    The decrease of the test loss by the gradient steps on the training example, summed over the
    checkpoints (arXiv 2002.08484). Rows are test examples; positive is a proponent. Nothing is
    normalized: a score is in units of the test loss for one visit of the example per checkpoint.

    Arguments, results and progress texts are those of Captum's class of this name, and so are the
    numbers, where Captum's are correct. ``batch_size`` defaults to "auto" here: no score depends
    on it. See ``InnerProductInfluence`` for the arguments and ``influence`` for the results.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> checkpoint = {"state_dict": model.state_dict(), "learning_rate": 0.1}
        >>> tracin = TracInCP(model, train, [checkpoint], loss_fn=torch.nn.CrossEntropyLoss())
        >>> tracin.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> tracin.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
        >>> tracin.self_influence().shape
        torch.Size([8])
    """
