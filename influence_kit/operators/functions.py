"""The curvature of any function of parameters, as an operator, and its inverse by any solver.

``parameters`` is a tensor, or a tuple, list or dict of tensors; functions take the same structure.
Vectors ``[k, P]`` hold the parameters one after the other, in their order.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from influence_kit.core.arguments import check_function, shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.operators.checks import check_mode
from influence_kit.operators.damping_by_block import Damping, damping_by_block
from influence_kit.operators.low_rank import LowRank, arnoldi, nystrom
from influence_kit.operators.operator import Operator, check_operator, check_vectors
from influence_kit.operators.partition import Partition
from influence_kit.operators.products import (
    Mode,
    Tree,
    gauss_newton_product,
    hessian_product,
)
from influence_kit.operators.solvers import Cholesky, Solve, conjugate_gradients, lissa
from influence_kit.operators.twice_differentiable import twice_differentiable

Parameters = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
SOLVERS = ("cholesky", "cg", "lissa", "arnoldi", "nystrom")
Solver = Literal["cholesky", "cg", "lissa", "arnoldi", "nystrom"]


class FunctionOperator(Operator):
    """A symmetric matrix over the parameters of a function.

    Args:
        parameters: the point at which the curvature is taken.
        tree_product: maps parameters and vectors by name to products by name.
    """

    def __init__(
        self, parameters: Parameters, tree_product: Callable[[Tree, Tree], dict[str, Tensor]]
    ) -> None:
        self.tree = {name: value.detach() for name, value in named(parameters).items()}
        self.tree_product = tree_product
        shapes = {name: value.shape for name, value in self.tree.items()}
        self.partition = Partition({"full": list(shapes)}, shapes)
        super().__init__(self.partition.sizes, next(iter(self.tree.values())))

    def product(self, vectors: Tensor) -> Tensor:
        check_vectors(vectors, self.size)
        found = self.tree_product(self.tree, self.partition.split(vectors))
        return torch.cat([found[name].reshape(len(vectors), -1) for name in self.tree], dim=1)


def named(parameters: Parameters) -> dict[str, Tensor]:
    """The tensors by name; by index if they have no names."""
    if isinstance(parameters, Tensor):
        tree: Mapping[str, Any] = {"0": parameters}
    elif isinstance(parameters, Mapping):
        tree = parameters
    else:
        values = parameters if isinstance(parameters, list | tuple) else ()
        tree = {str(index): value for index, value in enumerate(values)}
    if not tree or not all(isinstance(k, str) and _is_point(v) for k, v in tree.items()):
        raise InvalidArgumentError(
            "`parameters` must be a tensor of floats, or a tuple, list or dict by name of such "
            f"tensors; got {shown(parameters)}"
        )
    return dict(tree)


def _is_point(value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return dense and value.is_floating_point() and value.numel() > 0


def _as_given(parameters: Parameters, tree: Tree) -> Any:
    """Tensors by name, in the structure of ``parameters``."""
    if isinstance(parameters, Tensor):
        return tree["0"]
    if isinstance(parameters, Mapping):
        return dict(tree)
    return tuple(tree.values())


def hessian(
    function: Callable[[Any], Tensor], parameters: Parameters, mode: Mode = "forward"
) -> Operator:
    """The Hessian of a scalar function.

    Args:
        function: maps parameters to a scalar.
        parameters: the point at which to take the Hessian.
        mode: "forward" or "reverse" over reverse.

    Example:
        >>> import torch
        >>> operator = hessian(lambda x: x.sin().sum(), torch.tensor([0.5, 1.0]))
        >>> operator.product(torch.eye(2)).diagonal()
        tensor([-0.4794, -0.8415])
    """
    check_mode(mode)
    check_function(function, "function", "function(parameters)")

    def product(tree: Tree, vectors: Tree) -> dict[str, Tensor]:
        return hessian_product(
            lambda values: function(_as_given(parameters, values)), tree, vectors, mode
        )

    return FunctionOperator(parameters, product)


def gauss_newton(
    outputs: Callable[[Any], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: Parameters,
    mode: Mode = "forward",
) -> Operator:
    """J^T H J: J the Jacobian of the outputs, H the Hessian of the loss in the outputs.

    Args:
        outputs: maps parameters to a tensor.
        loss: maps that tensor to a scalar.
        parameters: the point at which to take the matrix.
        mode: "forward" or "reverse" over reverse.
    """
    check_mode(mode)
    check_function(outputs, "outputs", "outputs(parameters)")
    check_function(loss, "loss", "loss(outputs)")

    def product(tree: Tree, vectors: Tree) -> dict[str, Tensor]:
        return gauss_newton_product(
            lambda values: (outputs(_as_given(parameters, values)),),
            lambda values: loss(values[0]),
            tree,
            vectors,
            mode,
        )

    return FunctionOperator(parameters, product)


def fisher(losses: Callable[[Any], Tensor], parameters: Parameters) -> Operator:
    """The mean over examples of g g^T, g the gradient of an example's loss.

    It is the empirical Fisher for losses at the labels of the data, and an estimate of the Fisher
    for losses at labels sampled from the model.

    Args:
        losses: maps parameters to the losses of the examples, ``[n]``.
        parameters: the point at which to take the matrix.

    Example:
        >>> import torch
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> operator = fisher(lambda w: inputs @ w, torch.zeros(2))
        >>> operator.product(torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    check_function(losses, "losses", "losses(parameters)")

    def product(tree: Tree, vectors: Tree) -> dict[str, Tensor]:
        def function(values: Tree) -> Tensor:
            return losses(_as_given(parameters, values))

        with twice_differentiable(), torch.no_grad():
            found, pull_back = vjp(function, dict(tree))  # type: ignore[misc]
            along = vmap(lambda v: jvp(function, (dict(tree),), (v,))[1])(dict(vectors))
            result: dict[str, Tensor] = vmap(pull_back)(along / len(found))[0]
            return result

    return FunctionOperator(parameters, product)


def inverse(
    operator: Operator, solver: Solver = "cholesky", damping: Damping = 0.0, **options: Any
) -> Solve:
    """A function that multiplies vectors ``[k, P]`` by (C + damping)^-1, for an operator C.

    Args:
        operator: C.
        solver: "cholesky" (C written out), "cg" (options ``max_iter``, ``tol``,
            ``preconditioner``), "lissa" (``depth``, ``repeats``, ``scale``, ``tol``), "arnoldi"
            (``steps``, ``tol``, ``seed``, and ``complement``: whether directions outside the
            subspace count with eigenvalue 0) or "nystrom" (``rank``, ``seed``).
        damping: added to the eigenvalues: one number, or one per block.
        options: the options of the solver.

    Raises:
        CurvatureError: if C + damping is singular or indefinite, or the solver fails.

    Example:
        >>> import torch
        >>> operator = hessian(lambda x: (x**2).sum(), torch.ones(3))
        >>> inverse(operator, "cg", damping=2.0)(torch.ones(1, 3))
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    check_operator(operator)
    if not is_one_of(solver, SOLVERS):
        raise InvalidArgumentError(
            f'`solver` must be "cholesky", "cg", "lissa", "arnoldi" or "nystrom"; got '
            f"{shown(solver)}"
        )
    damping_by_block(damping, len(operator.sizes))
    if solver == "cholesky":
        return Cholesky(operator.dense(), damping, **options)
    if solver == "cg":
        return partial(conjugate_gradients, operator, damping=damping, **options)
    if solver == "lissa":
        return partial(lissa, operator, damping=damping, **options)
    if solver == "arnoldi":
        complement = options.pop("complement", False)
        return LowRank(arnoldi(operator, **options), damping, complement)
    return LowRank(nystrom(operator, **options), damping, complement=True)
