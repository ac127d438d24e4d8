"""DataInf: Kwon et al. 2023, arXiv 2310.00902."""

from torch import Tensor

from influence_kit.curvature.mean_inverse import MeanInverse, mean_squared_norms
from influence_kit.curvature.passes import DataSet
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.scoring.term import Transform


class DataInf(InfluenceFunction):
    r"""score = sum over layers of grad loss(test)^T R_l grad loss(train).

    .. math::
        R_l = \frac{1}{n} \sum_j (g_{jl} g_{jl}^T + \lambda_l I)^{-1}
            = \frac{1}{n \lambda_l} \sum_j
              \Bigl( I - \frac{g_{jl} g_{jl}^T}{\lambda_l + \|g_{jl}\|^2} \Bigr)

    The mean of the inverses of the examples' damped curvatures, in place of the inverse of their
    mean (arXiv 2310.00902): the error grows with the number of parameters of a layer, and is small
    for the adapters of a fine-tune. One pass over the data for all test examples, in closed form;
    ``self_influence`` and ``relative`` take a pass for each batch, of which gradients that fit into
    memory are kept. Rows are test examples; positive is a proponent, and leaving the training
    example out raises the test loss by about score / n. The mean over checkpoints: about five of
    one run, evenly over its steps, are recommended (``select_checkpoints``).

    Args:
        damping: the letter lambda: a positive number, a dict by layer, or "auto" (or "mean"), the
            paper's 0.1 times the mean of ``|g|^2 / p`` in the layer of p parameters; "trace" takes
            the lesser of p and n for p.
        hessian_dataset: the data over which R is a mean; the training set where None.
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

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        features = self._curvature_features("empirical_fisher", data)
        return mean_squared_norms(features, data, self._partition)

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        features = self._curvature_features("empirical_fisher", data)
        return self._through(MeanInverse(features, data, self._partition, damping))
