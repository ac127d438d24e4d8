"""Dot products of gradients: Charpiat et al. 2019, arXiv 2102.05262."""

from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.scoring.term import Term


class GradDot(InnerProductInfluence):
    r"""score = sum over checkpoints of <grad loss(test), grad loss(train)>.

    TracInCP with every weight 1 (arXiv 2102.05262). Rows are test examples; positive is a
    proponent; in units of loss squared by parameter squared. See ``InnerProductInfluence`` for the
    arguments and ``influence`` for the results.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> dot = GradDot(model, train, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss())
        >>> dot.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    def terms(self) -> list[Term]:
        """One term per checkpoint."""
        indices = range(len(self.checkpoints))
        return [Term(self.test_at(c), self.train_at(c), weight=1.0) for c in indices]
