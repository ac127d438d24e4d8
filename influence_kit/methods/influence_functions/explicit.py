"""Influence functions by the curvature written out: Koh and Liang 2017, arXiv 1703.04730."""

import torch
from torch import Tensor

from influence_kit.core.memory import free_bytes
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.influence_functions.curvature_influence import CurvatureInfluence
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.operators.block import Block
from influence_kit.operators.solvers import Cholesky
from influence_kit.scoring.term import Transform


class ExplicitInfluenceFunction(CurvatureInfluence):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by Cholesky's factors of C.

    .. math::
        \nabla \ell_{test}(z')^T \, (C + \lambda I)^{-1} \, \nabla \ell(z), \qquad
        C = \frac{1}{n} \sum_j C_j

    The exact inverse (arXiv 1703.04730), block by block: P^2 numbers in float64 and P^3 / 3
    operations for a block of P parameters. "fisher" and "empirical_fisher" of n <= P / 2 examples
    take n * P numbers, their gradients, and n^2 * P operations: C is inverted through their inner
    products (Woodbury) and never written out. Rows are test examples; positive is a proponent, and
    leaving the training example out raises the test loss by about score / n. The mean over
    checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).

    For a model that was trained with weight decay (l2 / 2 times the squared norm added to the mean
    loss) ``damping=l2`` makes C + damping the Hessian of what was minimised.

    Args:
        damping: added to the eigenvalues of C: a number, a dict by block, or "auto" (or "trace"):
            the mean eigenvalue of the block, which is its trace over the number of its parameters,
            or of examples where those are fewer; "mean" is always over the parameters.
        curvature: "ggn", "hessian", "fisher" or "empirical_fisher"; see ``CurvatureInfluence``.
        blocks: "full", "layer", "parameter" or a dict; see ``CurvatureInfluence``.
        hessian_dataset: the data over which C is a mean; the training set where None.
        relative: RelatIF: None, "l" or "theta".
        seed: of the labels that "fisher" draws.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        CurvatureError: where a block is singular or indefinite in spite of the damping.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> exact = ExplicitInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.01
        ... )
        >>> exact.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
        >>> factors = exact.compute_intermediate_quantities((x[:4], y[:4]))
        >>> bool(torch.allclose(exact.influence(factors), exact.influence((x[:4], y[:4]))))
        True
    """

    def _measure(self, data: DataSet) -> Facts:
        curvature = self._curvature(data)
        self._check_memory(curvature)
        facts = {}
        for number, block in enumerate(curvature.blocks()):
            facts[f"curvature.{number}"] = block.core
            if block.rows is not None:
                facts[f"rows.{number}"] = block.rows
        return facts

    def _check_memory(self, curvature: Curvature) -> None:
        sizes, cores = curvature.sizes, curvature.core_sizes
        rows = sum(core * size for core, size in zip(cores, sizes, strict=True) if core < size)
        # what is decomposed, its factors, and one of them while that is done
        need = 8 * (2 * sum(core**2 for core in cores) + max(cores) ** 2 + rows)
        free = free_bytes(self._device)
        if need > free:
            raise InvalidArgumentError(
                f"blocks of up to {max(sizes)} parameters take {need / 2**30:.1f} GiB, written "
                f'out; {free / 2**30:.1f} GiB are free. Use blocks="layer", `layers`, or '
                "`EKFACInfluenceFunction` or `CGInfluenceFunction`, which write nothing out"
            )

    def _blocks(self, facts: Facts) -> list[Block]:
        numbers = range(len(self.block_names))
        return [Block(facts[f"curvature.{i}"], facts.get(f"rows.{i}")) for i in numbers]

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        return torch.stack([block.core.diagonal().sum() for block in self._blocks(facts)])

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        return self._through(Cholesky(self._blocks(facts), damping, self.block_names))
