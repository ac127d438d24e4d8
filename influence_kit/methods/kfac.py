"""Influence functions by Kronecker-factored curvature: K-FAC and EK-FAC."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.arguments import check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.fitted import Facts
from influence_kit.methods.influence_function import InfluenceFunction
from influence_kit.operators.eigenbasis import Eigenbasis, KroneckerInverse, Table
from influence_kit.operators.kronecker import Measured, measured_layer
from influence_kit.operators.matrix_layer import MatrixLayer
from influence_kit.operators.passes import DataSet
from influence_kit.operators.solvers import damping_by_block
from influence_kit.scoring.term import Transform

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class KroneckerInfluence(InfluenceFunction):
    """An influence function whose curvature is a Kronecker product a layer.

    Args:
        curvature: "fisher" (at labels drawn from the model) or "empirical_fisher" (at the labels of
            the data).
        rtol: relative error that a cheaper form of a layer's products may have, for layers whose
            examples have one position; it is measured, and 0 has all products exact.
    """

    corrected: bool

    def __init__(
        self,
        *args: Any,
        curvature: Literal["fisher", "empirical_fisher"] = "fisher",
        rtol: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        if curvature not in ("fisher", "empirical_fisher"):
            raise InvalidArgumentError(
                f'`curvature` must be "fisher" or "empirical_fisher"; got {curvature!r}'
            )
        self.curvature = curvature
        self.rtol = check_number(rtol, "rtol", least=0, below=1)
        super().__init__(*args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "curvature": self.curvature}

    def _measure(self, data: DataSet) -> Facts:
        features = self._curvature_features(self.curvature, data)
        layers = self._measured_layers(features(*next(iter(data))))
        for places, batch in data.of_this_rank():
            gradients = features(places, batch)
            for measured in layers.values():
                measured.add_factors(gradients)
        for measured in layers.values():
            measured.decompose(data.count)
        if self.corrected:
            if self.curvature == "fisher":
                # of labels drawn anew: of the same ones the eigenvectors know too much
                features = self._curvature_features(self.curvature, data, draw=1)
            for places, batch in data.of_this_rank():
                gradients = features(places, batch)
                for measured in layers.values():
                    measured.add_squares(gradients)
        facts = {}
        for name, measured in layers.items():
            found = measured.facts(data.count, self.corrected)
            facts.update({f"{name}.{key}": value for key, value in found.items()})
        return facts

    def _measured_layers(self, gradients: Gradients) -> dict[str, Measured]:
        """What measures each layer, of the kind that the first batch's gradients show."""
        layers, without = {}, {}
        modules = dict(self.model.named_modules())
        for name, names in self._partition.blocks.items():
            found = measured_layer(names, gradients)
            if isinstance(modules.get(name, self.model), TRANSPOSED):
                found = "a transposed convolution's bias does not join its weight"
            if isinstance(found, str):
                without[name] = found
            elif found is None:
                without[name] = "the first batch of `hessian_dataset` does not use it"
            else:
                layers[name] = found
        if without:
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in without.items())
            raise InvalidArgumentError(
                f"no Kronecker form for {len(without)} of {len(without) + len(layers)} layers "
                f"({reasons}). "
                + (f"Leave them out: layers={list(layers)}" if layers else "Use `DataInf`")
            )
        return layers

    def _means(self, facts: Facts, data: DataSet) -> Tensor:
        return torch.stack([facts[f"{name}.grid"].mean() for name in self.block_names])

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        values = damping_by_block(damping, len(self.block_names), positive=True).tolist()
        groups = zip(self._partition.blocks.items(), values, strict=True)
        return KroneckerInverse(
            dict(self._basis(name, names, facts, value) for (name, names), value in groups)
        )

    def _basis(
        self, name: str, names: Sequence[str], facts: Facts, damping: float
    ) -> tuple[str, Eigenbasis | Table]:
        """The eigenbasis of a layer, under its weight's name."""
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in facts.items()
            if key.startswith(f"{name}.") and key.count(".") == name.count(".") + 1
        }
        weights = (1 / (own["grid"] + damping)).to(self._sample)
        # the weight is the matrix
        names = sorted(names, key=lambda n: self._parameters[n].dim(), reverse=True)
        right = own["right"].to(self._sample)
        if "left" not in own:
            return names[0], Table(names[0], right, weights)
        layer = MatrixLayer.of(names, own)
        sizes = own["left_values"], own["right_values"]
        left = own["left"].to(self._sample)
        return names[0], Eigenbasis(layer, left, right, weights, sizes, self.rtol)


class KFACInfluenceFunction(KroneckerInfluence):
    r"""score = sum over layers of <G_test, (S (x) A + damping)^-1 G_train>.

    .. math::
        \sum_l \Bigl\langle G',\; Q_S \Bigl[ \frac{Q_S^T G Q_A}{s a^T + \lambda} \Bigr] Q_A^T
        \Bigr\rangle

    K-FAC (arXiv 1503.05671): the Fisher matrix of each layer taken for a Kronecker product of the
    covariance S of its output gradients (eigenvalues s, eigenvectors Q_S; a sum over positions,
    averaged over examples) and that of its inputs A (a, Q_A; averaged over positions), weight and
    bias together; of an embedding, positions with equal ids count as one. Rows are test examples;
    positive is a proponent, and leaving the training example
    out raises the test loss by about score / n. The mean over checkpoints: about five of one run,
    evenly over its steps, are recommended (``select_checkpoints``).

    Linear layers, convolutions and embeddings have this form; others are an error that names them.

    Args:
        damping: added to the products of eigenvalues: a positive number, a dict by layer, or "auto"
            (0.1 times their mean in the layer).
        curvature: "fisher" (labels drawn from the model by ``seed``; the loss must be that of a
            softmax, sigmoid or normal distribution) or "empirical_fisher" (labels of the data).
        hessian_dataset: the data over which the factors are means; the training set where None.
        relative: RelatIF: None, "l" or "theta".
        rtol: see ``EKFACInfluenceFunction``.
        seed: of the drawn labels; the label of an example depends on its place alone.

    The other arguments are those of ``InnerProductInfluence``.

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

    corrected = False


class EKFACInfluenceFunction(KroneckerInfluence):
    r"""score = sum over layers of <G_test, Q_S [(Q_S^T G_train Q_A) / (Lambda + damping)] Q_A^T>.

    .. math::
        \Lambda = \frac{1}{n} \sum_j (Q_S^T G_j Q_A)^2

    EK-FAC (arXiv 1806.03884, 2308.03296): the eigenvectors of K-FAC with the eigenvalues that fit
    the per-example gradients G_j best; where labels are drawn, at others than the eigenvectors saw.
    Two passes over the Hessian data fit it, one over the training set scores all test examples.
    Rows are test examples; positive is a proponent, and leaving the training example out raises the
    test loss by about score / n. The mean over checkpoints: about five of one run, evenly over its
    steps, are recommended (``select_checkpoints``).

    Linear layers, convolutions and embeddings have this form; others are an error that names them.

    Args:
        damping: added to Lambda: a positive number, a dict by layer, or "auto" (0.1 times the mean
            of Lambda in the layer).
        curvature, hessian_dataset, relative, seed: as in ``KFACInfluenceFunction``.
        rtol: the error, relative to a layer's scores, up to which 1 / (Lambda + damping) may be
            replaced by a few outer products, where that is cheaper. It is measured on each batch,
            and exceeding it has the batch multiplied exactly; 0 has everything exact.

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
        >>> sorted(ekfac.damping_used[0])
        ['0', '2']
    """

    corrected = True
