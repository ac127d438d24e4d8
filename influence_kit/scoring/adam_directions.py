"""The direction of Adam's next step on an example, in place of its gradient: arXiv 2402.04333.

Shapes: n examples, p entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.adam_moments import Moments, adam_moments
from influence_kit.core.arguments import check_count, check_sequence, check_texts, shown
from influence_kit.core.dtypes import real
from influence_kit.core.objects import check_model
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients, Transform


@dataclass(frozen=True)
class Direction:
    """Adam's direction for one parameter.

    Args:
        first, second: the part of both means that the checkpoint holds, times its decay, ``[p]``.
        shares: the share of the new gradient, and of its square.
        corrections: both bias corrections of the next step.
        eps: added to the root.
    """

    first: Tensor
    second: Tensor
    shares: tuple[float, float]
    corrections: tuple[float, float]
    eps: float

    @classmethod
    def of(cls, moments: Moments, size: int, sample: Tensor) -> Direction:
        """From the moments of a parameter of ``size`` entries, in the dtype of ``sample``."""
        first, second = (
            sample.new_zeros(size) if mean is None else real(mean).flatten().to(sample) * beta
            for mean, beta in zip((moments.first, moments.second), moments.betas, strict=True)
        )
        one, two = moments.betas
        after = moments.step + 1
        return cls(first, second, (1 - one, 1 - two), (1 - one**after, 1 - two**after), moments.eps)

    def __call__(self, gradients: Tensor) -> Tensor:
        """Of gradients ``[n, p]``."""
        first = gradients * self.shares[0] + self.first
        second = gradients.square().mul_(self.shares[1]).add_(self.second)
        root = second.div_(self.corrections[1]).sqrt_().add_(self.eps)
        return first.div_(self.corrections[0]).div_(root)


class AdamDirections:
    r"""Gamma(g) = m / (sqrt(v) + eps), the direction of Adam's next step on an example.

    .. math::
        \Gamma = \frac{m / (1 - \beta_1^{t + 1})}{\sqrt{v / (1 - \beta_2^{t + 1})} + \epsilon},
        \qquad m = \beta_1 m_t + (1 - \beta_1) \, g, \quad v = \beta_2 v_t + (1 - \beta_2) \, g^2

    entry by entry, with the moments m_t, v_t, the number of steps t, the betas and eps of the
    ``torch.optim.Adam`` or ``AdamW`` that is saved in a checkpoint (arXiv 2402.04333). Weight decay
    is not part of it. The units are those of the learning rate: a step is -learning rate * Gamma.

    A parameter without a state, which had no gradient yet, starts with zeros, as in torch. The
    moments of one checkpoint are held at a time.

    Args:
        model: the model.
        checkpoints: paths or dicts, each with the optimizer's state dict beside the weights
            ("optimizer", "optimizer_state_dict", Lightning's "optimizer_states"), or folders of
            Hugging Face's Trainer or of accelerate.
        parameter_names: the names of the optimizer's parameters in its order. None takes the
            model's order (all its parameters, or those that require a gradient) within each
            parameter group, where the shapes allow only one such order.

    Raises:
        InvalidArgumentError: when a direction is computed, if the checkpoint holds no optimizer's
            state, one without steps, that of another optimizer (SGD), or one whose parameters are
            not those of the model.

    Example:
        >>> import torch
        >>> from influence_kit import InnerProductInfluence
        >>> from influence_kit.scoring import AdamDirections, Term
        >>> class AdamDot(InnerProductInfluence):
        ...     def terms(self):
        ...         directions = AdamDirections(self.model, self.checkpoints)
        ...         return [Term(self.test_at(0), self.train_at(0, directions.at(0)))]
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
        >>> loss(model(x), y).backward()
        >>> optimizer.step()
        >>> saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> AdamDot(model, train, [saved], loss_fn=loss).influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Any],
        parameter_names: Sequence[str] | None = None,
    ) -> None:
        self.model = check_model(model)
        self.checkpoints = list(check_sequence(checkpoints, "checkpoints", "paths or dicts"))
        self.parameter_names = check_names(parameter_names)
        self._held: tuple[int, dict[str, Moments], dict[str, Direction]] | None = None

    def at(self, checkpoint: int) -> Transform:
        """The map from gradients at a checkpoint, given by its index, to directions."""
        if check_count(checkpoint, "checkpoint", least=0) >= len(self.checkpoints):
            raise InvalidArgumentError(
                f"`checkpoint` must be the index of one of {len(self.checkpoints)} checkpoints; "
                f"got {shown(checkpoint)}"
            )
        return partial(self._applied, checkpoint)

    def _applied(self, checkpoint: int, gradients: Gradients) -> Gradients:
        if self._held is None or self._held[0] != checkpoint:
            self._held = None
            moments = adam_moments(self.model, self.checkpoints[checkpoint], self.parameter_names)
            self._held = (checkpoint, moments, {})
        _, moments, directions = self._held
        forms: dict[str, Form] = {}
        for name, shape in gradients.parameters.items():
            if name not in directions:
                if name not in moments:
                    raise InvalidArgumentError(
                        f"the optimizer of checkpoint {checkpoint} does not have the parameter "
                        f"'{name}': it has {', '.join(moments)}; leave it out with `layers`"
                    )
                size = shape.numel()
                directions[name] = Direction.of(moments[name], size, gradients.sample)
            form = gradients.forms.get(name)
            # a gradient of zero has a direction, too: that of the mean of earlier ones
            values = (
                gradients.sample.new_zeros(gradients.n, shape.numel())
                if form is None
                else form.dense()
            )
            forms[name] = Dense(directions[name](values), torch.Size(shape))
        return replace(gradients, forms=forms)


def check_names(names: Any) -> list[str] | None:
    """The argument ``parameter_names``."""
    if names is None:
        return None
    return check_texts(names, "parameter_names", "names of parameters, or None")
