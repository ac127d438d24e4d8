"""Products of curvature matrices with many vectors at once, for functions of parameters.

Forward-over-reverse, batched by ``torch.func.vmap``; reverse-over-reverse if a function has an
operation without forward mode. Both are exact.

Shapes: k vectors. ``Tree``: tensors by name.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from influence_kit.errors import CurvatureError
from influence_kit.operators.checks import check_products
from influence_kit.operators.twice_differentiable import twice_differentiable

Mode = Literal["forward", "reverse"]
Tree = Mapping[str, Tensor]
Result = TypeVar("Result")


def hessian_product(
    function: Callable[[Tree], Tensor], parameters: Tree, vectors: Tree, mode: Mode = "forward"
) -> dict[str, Tensor]:
    """H v for each vector, H the Hessian of a scalar function of parameters.

    Args:
        function: maps parameters by name to a scalar.
        parameters: the point at which to take the Hessian.
        vectors: ``[k, *shape]`` by name.
        mode: "forward" or "reverse" over reverse.

    Raises:
        InvalidArgumentError: if the arguments do not fit together.
    """
    check_products({"function": function}, parameters, vectors, mode)
    with twice_differentiable():
        if mode == "reverse":
            return _hessian_reverse(function, parameters, vectors)
        slope = grad(function)
        return _vmapped(lambda vector: jvp(slope, (parameters,), (vector,))[1], vectors)


def gauss_newton_product(
    outputs: Callable[[Tree], Sequence[Tensor]],
    loss: Callable[[Sequence[Tensor]], Tensor],
    parameters: Tree,
    vectors: Tree,
    mode: Mode = "forward",
) -> dict[str, Tensor]:
    """J^T H J v for each vector, J the Jacobian of the outputs, H the Hessian of the loss there.

    Args:
        outputs: maps parameters by name to a tuple of tensors.
        loss: maps these tensors to a scalar.
        parameters: the point at which to take the matrix.
        vectors: ``[k, *shape]`` by name.
        mode: "forward" or "reverse" over reverse.

    Raises:
        InvalidArgumentError: if the arguments do not fit together.
    """
    check_products({"outputs": outputs, "loss": loss}, parameters, vectors, mode)
    with twice_differentiable():
        if mode == "reverse":
            return _gauss_newton_reverse(outputs, loss, parameters, vectors)
        slope = grad(loss)
        _, pull_back = vjp(outputs, parameters)  # type: ignore[misc]

        def product(vector: Tree) -> dict[str, Tensor]:
            values, along = jvp(outputs, (parameters,), (vector,))  # type: ignore[misc]
            found: dict[str, Tensor] = pull_back(jvp(slope, (values,), (along,))[1])[0]
            return found

        return _vmapped(product, vectors)


def mixed_product(
    function: Callable[[Tree, Tensor], Tensor],
    parameters: Tree,
    shift: Tensor,
    vectors: Tree,
    mode: Mode = "forward",
) -> Tensor:
    """d/ds <v, df/dp> for each vector v, of a scalar function f of parameters p and a shift s.

    Args:
        function: maps parameters by name and a shift to a scalar.
        parameters: the parameters at which to take the derivative.
        shift: the shift at which to take the derivative.
        vectors: ``[v, *shape]`` by name.
        mode: "forward" or "reverse" over reverse.

    Returns:
        ``[v, *shape of the shift]``.
    """
    with twice_differentiable():
        if mode == "reverse":
            leaves, point = _leaves(parameters), shift.detach().requires_grad_()
            with torch.enable_grad():
                value = function(leaves, point)
                slopes = _pull([value], list(leaves.values()), [torch.ones_like(value)], keep=True)
            rows = zip(*vectors.values(), strict=True)
            return torch.stack([_pull(slopes, [point], row, keep=False)[0] for row in rows])

        def slope(values: Tree) -> Any:
            return grad(function, argnums=1)(values, shift)

        return _vmapped(lambda v: {"": jvp(slope, (parameters,), (v,))[1]}, vectors)[""]


def forward_product(
    function: Callable[[Tree], Tensor], parameters: Tree, vectors: Tree, mode: Mode = "forward"
) -> Tensor:
    """J v for each vector, J the Jacobian of a function of parameters.

    Args:
        function: maps parameters by name to a tensor.
        parameters: the point at which to take the Jacobian.
        vectors: ``[k, *shape]`` by name.
        mode: "forward", or "reverse" for two reverse passes.

    Returns:
        ``[k, *shape of the tensor]``.
    """
    with twice_differentiable():
        if mode == "reverse":
            return _forward_by_reverse(function, parameters, vectors)
        return _vmapped(lambda v: {"": jvp(function, (parameters,), (v,))[1]}, vectors)[""]


class EitherMode:
    """Uses forward mode until a function fails in it, and reverse mode from then on.

    Args:
        what: what is computed, for the warning: "curvature is".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.mode: Mode = "forward"

    def __call__(self, product: Callable[[Mode], Result]) -> Result:
        """Call the product with the mode that works."""
        if self.mode == "reverse":
            return _reversed(product)
        try:
            return product("forward")
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # an error of the user's own code is raised again here
            found = _reversed(product)
            self.mode = "reverse"
            warnings.warn(
                "the model has an operation without forward-mode derivative or batching rule "
                f"({str(error).splitlines()[0]}): {self.what} computed by two reverse passes, "
                "which is exact and slower",
                stacklevel=2,
            )
            return found


def _reversed(product: Callable[[Mode], Result]) -> Result:
    """The product in reverse mode; an error that says what to do if torch has no derivative."""
    try:
        return product("reverse")
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not ("derivative for" in said and "not implemented" in said):
            raise
        raise CurvatureError(
            f"an operation of the model or loss cannot be differentiated twice in torch ({said}): "
            "write it with plain operations (an influence function's curvature='empirical_fisher' "
            "needs first derivatives only)"
        ) from error


def _vmapped(product: Callable[[Tree], dict[str, Tensor]], vectors: Tree) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # torch's warning that vmap runs an operation in a loop, which is right but slow
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # torch's warning from its table of forward derivatives
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        with torch.no_grad():
            return vmap(product, randomness="same")(vectors)


def _leaves(parameters: Tree) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def _pull(
    results: Sequence[Tensor], leaves: Sequence[Tensor], back: Sequence[Tensor], keep: bool
) -> Sequence[Tensor]:
    """Gradients of the results along ``back``; zeros for unused leaves."""
    pairs = [(r, b) for r, b in zip(results, back, strict=True) if r.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        [r for r, _ in pairs],
        leaves,
        [b for _, b in pairs],
        retain_graph=True,
        create_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )


def _forward_by_reverse(
    function: Callable[[Tree], Tensor], parameters: Tree, vectors: Tree
) -> Tensor:
    """J v as the derivative of u -> J^T u, which is linear in u."""
    leaves = _leaves(parameters)
    with torch.enable_grad():
        value = function(leaves)
        dual = torch.zeros_like(value).requires_grad_()
        pulled = _pull([value], list(leaves.values()), [dual], keep=True)
    rows = zip(*vectors.values(), strict=True)
    return torch.stack([_pull(pulled, [dual], row, keep=False)[0] for row in rows])


def _hessian_reverse(
    function: Callable[[Tree], Tensor], parameters: Tree, vectors: Tree
) -> dict[str, Tensor]:
    leaves = _leaves(parameters)
    points = list(leaves.values())
    with torch.enable_grad():
        value = function(leaves)
        slopes = _pull([value], points, [torch.ones_like(value)], keep=True)
    rows = [_pull(slopes, points, row, keep=False) for row in zip(*vectors.values(), strict=True)]
    return {
        name: torch.stack(column)
        for name, column in zip(leaves, zip(*rows, strict=True), strict=True)
    }


def _gauss_newton_reverse(
    outputs: Callable[[Tree], Sequence[Tensor]],
    loss: Callable[[Sequence[Tensor]], Tensor],
    parameters: Tree,
    vectors: Tree,
) -> dict[str, Tensor]:
    """J v as the derivative of u -> J^T u, which is linear in u."""
    leaves = _leaves(parameters)
    points = list(leaves.values())
    with torch.enable_grad():
        values = outputs(leaves)
        duals = [torch.zeros_like(value).requires_grad_() for value in values]
        pulled = _pull(values, points, duals, keep=True)
        heads = [value.detach().requires_grad_() for value in values]
        slopes = _pull([loss(heads)], heads, [torch.ones((), device=heads[0].device)], keep=True)
    rows = []
    for row in zip(*vectors.values(), strict=True):
        along = _pull(pulled, duals, row, keep=False)
        rows.append(_pull(values, points, _pull(slopes, heads, along, keep=False), keep=False))
    return {
        name: torch.stack(column)
        for name, column in zip(leaves, zip(*rows, strict=True), strict=True)
    }
