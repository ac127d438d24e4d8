"""Cosines of gradients: Charpiat et al. 2019, arXiv 2102.05262."""

from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.scoring.term import Term
from influence_kit.scoring.transforms import unit_norm


class GradCos(InnerProductInfluence):
    r"""score = sum over checkpoints of cos(grad loss(test), grad loss(train)).

    The norm is over all chosen parameters together (arXiv 2102.05262). Rows are test examples;
    positive is a proponent; each checkpoint adds a number between -1 and 1. An example whose
    gradient is zero has no direction: its scores are 0. Self-influence is the number of checkpoints
    for every other example, and so not informative. See ``InnerProductInfluence`` for the
    arguments.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> cos = GradCos(model, train, [model.state_dict()], loss_fn=torch.nn.CrossEntropyLoss())
        >>> bool((cos.influence((x[:4], y[:4])).abs() <= 1 + 1e-6).all())
        True
    """

    def terms(self) -> list[Term]:
        """One term per checkpoint, test and training gradients scaled to norm 1."""
        indices = range(len(self.checkpoints))
        return [
            Term(self.test_at(c, unit_norm), self.train_at(c, unit_norm), weight=1.0)
            for c in indices
        ]
