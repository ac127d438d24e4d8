"""The gradient of a training step with a graph, and its products with many adjoints at once.

The gradient of a step is g = sum_i w_i grad l_i. For a vector u, the derivatives of <u, g> are the
product of the step's Hessian with u (in the weights of the model), and <u, grad l_i> (in w_i): both
come from one backward pass through the backward pass.

Shapes: m test examples, B examples of a step.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.operators.twice_differentiable import twice_differentiable
from influence_kit.training.replay import Moment, Replay

Vectors = Mapping[str, Tensor]


class StepGradient:
    """The gradient of one step at the state before it.

    Args:
        replay: the run; its model gets the weights of the state.
        number: the step.
        moment: the state.
    """

    def __init__(self, replay: Replay, number: int, moment: Moment) -> None:
        self._replay, self._number = replay, number
        with torch.no_grad():
            for name, value in moment.weights.items():
                replay.parameters[name].copy_(value)
        self._parts = replay.ready(number)
        self._leaves = {n: p for n, p in replay.parameters.items() if p.requires_grad}
        # with one micro-batch, the graph is made once
        self._only = self._linearised(0) if len(self._parts) == 1 else None
        self.by_parameter: dict[str, Tensor] = {}
        for part in range(len(self._parts)):
            for name, gradient in self._part(part)[1].items():
                before = self.by_parameter.get(name)
                detached = gradient.detach()
                self.by_parameter[name] = detached if before is None else before + detached

    def _part(self, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._linearised(part) if self._only is None else self._only

    def _linearised(self, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights of a micro-batch's examples, and its gradient as a function of them."""
        indices = self._parts[part]
        first = next(iter(self._leaves.values()))
        weights = torch.ones(len(indices), dtype=first.dtype, device=first.device)
        weights.requires_grad_()
        with torch.enable_grad(), twice_differentiable():
            loss = self._replay.part_loss(self._number, part, indices, weights)
            found = torch.autograd.grad(
                loss, list(self._leaves.values()), create_graph=True, allow_unused=True
            )
        return weights, {n: g for n, g in zip(self._leaves, found, strict=True) if g is not None}

    def pull(self, vectors: Vectors, batched: "Batched") -> tuple[Tensor, dict[str, Tensor]]:
        """The derivatives of <u, g> for m vectors u ``[m, *shape]``.

        Returns:
            Those in the examples' weights ``[m, B]``, and those in the parameters.
        """
        columns, products = [], dict[str, Tensor]()
        for part in range(len(self._parts)):
            weights, gradients = self._part(part)
            used = [name for name in gradients if name in vectors]
            if not used:  # the loss of this micro-batch does not depend on what is trained
                m = len(next(iter(vectors.values())))
                columns.append(weights.new_zeros(m, len(weights)))
                continue
            in_weights, *in_leaves = batched(
                [gradients[name] for name in used],
                [weights, *self._leaves.values()],
                [vectors[name] for name in used],
            )
            columns.append(in_weights)
            for name, product in zip(self._leaves, in_leaves, strict=True):
                products[name] = products[name] + product if name in products else product
        return torch.cat(columns, dim=1), products


class Batched:
    """Vector-Jacobian products for many vectors: by ``vmap``, or one after the other if it fails.

    Args:
        row_bytes: the memory that one vector takes in a backward pass.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._one_by_one = False

    def __call__(
        self, values: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The products of m vectors with the Jacobian in each input, ``[m, *shape]``."""
        m = len(vectors[0])
        rows = rows_within(4 * workspace_bytes(values[0].device), self._row_bytes)
        pieces = [
            self._piece(values, inputs, [vector[i : i + rows] for vector in vectors])
            for i in range(0, m, rows)
        ]
        return pieces[0] if len(pieces) == 1 else [torch.cat(c) for c in zip(*pieces, strict=True)]

    def _piece(
        self, values: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        if not self._one_by_one:
            try:
                return _products(values, inputs, vectors, batched=True)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                cause = str(error).splitlines()[0]
        rows = [_products(values, inputs, row) for row in zip(*vectors, strict=True)]
        if not self._one_by_one:
            # an error of the model itself has been raised again by now
            self._one_by_one = True
            warnings.warn(
                f"the model has an operation without batching rule ({cause}): the test examples "
                "are carried through the run one after the other, which is exact and slower",
                stacklevel=2,
            )
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def _products(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    batched: bool = False,
) -> list[Tensor]:
    with warnings.catch_warnings():
        # torch's warning that vmap runs an operation in a loop, which is right but slow
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.autograd.grad(
            list(values),
            list(inputs),
            grad_outputs=list(vectors),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    leading = (len(vectors[0]),) if batched else ()
    return [
        given.new_zeros(*leading, *given.shape) if item is None else item
        for given, item in zip(inputs, found, strict=True)
    ]
