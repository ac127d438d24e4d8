"""The last layer of a model, refitted on the features of its training set.

Shapes: n examples, t positions (1 unless an example is a sequence), d features, c outputs.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.core.arguments import check_count, check_number
from influence_kit.core.objects import check_flags
from influence_kit.core.scaling import unit_rows
from influence_kit.data.batches import Batch, example_count, take, to_device
from influence_kit.data.class_labels import logits_of
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.methods.representer.last_layer import LastLayer, at_last_layer, joined
from influence_kit.methods.representer.newton import Objective, minimum
from influence_kit.methods.row_check import RowCheck


@dataclass(frozen=True)
class Settings:
    """How a last layer is refitted; see ``RepresenterPointSelection``."""

    l2: float
    normalize: bool
    count_bias: bool
    tol: float
    max_iter: int

    def __post_init__(self) -> None:
        check_flags({"normalize": self.normalize, "count_bias": self.count_bias})
        check_number(self.l2, "l2", above=0)
        check_number(self.tol, "tol", above=0, below=1)
        check_count(self.max_iter, "max_iter")


@dataclass(frozen=True)
class Head:
    """A refitted last layer.

    Args:
        weights: ``[c, d]``, float64.
        n: the number of training examples.
    """

    weights: Tensor
    n: int


@dataclass(frozen=True)
class Refit:
    """Refits the last layer of a model, at the checkpoint that is in the model.

    Args:
        model: the model.
        layer: the name of the layer.
        source: detects the reduction of the loss.
        loss: the loss of training examples.
        loss_fn: the same loss, as the user passed it.
        settings: the settings of the refit.
        row_check: compares features with those of smaller batches.
    """

    model: nn.Module
    layer: str
    source: GradientSource
    loss: Loss
    loss_fn: LossFunction | None
    settings: Settings
    row_check: RowCheck

    def head(self, batches: Iterable[Batch], device: torch.device) -> Head:
        """The layer refitted on a training set."""
        parts = self._joined(self._training_examples(batches, device))
        shapes = [part.features.shape[:2] for part in parts]
        loss = self._precise_loss()

        def losses(outputs: Tensor) -> Tensor:
            pieces = zip(parts, outputs.split([s.numel() for s in shapes]), shapes, strict=True)
            return torch.stack([part.total(loss, o.view(*s, -1)) for part, o, s in pieces]).sum()

        features = torch.cat([part.features.flatten(0, 1) for part in parts])
        n, how = sum(shape[0] for shape in shapes), self.settings
        objective = Objective(features, losses, n, how.l2)
        return Head(minimum(objective, parts[0].width, how.tol, how.max_iter), n)

    def seen(self, batch: Batch, where: str = "the batch") -> LastLayer:
        """A batch at the last layer, with the features that enter the scores.

        Args:
            batch: the batch.
            where: the name of the batch in errors.
        """
        self.source.prepare(batch, self.loss)
        if not self.loss.is_of_outputs:
            raise InvalidArgumentError(
                "the last layer cannot be refitted without a loss that is a function of its "
                "output: pass `loss_fn`"
            )
        read: list[LastLayer] = []

        def rows(some: Batch) -> list[Tensor]:
            read.append(at_last_layer(self.model, self.layer, some, self._precise_loss()))
            return [read[-1].features, logits_of(read[-1].outputs)]

        self.row_check(batch, rows)
        seen, n = read[0], example_count(batch)
        with torch.no_grad():
            self.loss.checked_total(seen.outputs, batch, n, where)
        features = seen.features
        if self.settings.normalize:
            features = unit_rows(features.flatten(0, 1)).view_as(features)
        if self.settings.count_bias:
            features = F.pad(features, (0, 1), value=1.0)
        return replace(seen, features=features)

    def values(self, seen: LastLayer, head: Head) -> Tensor:
        """The representer values of examples, ``[n, t, c]``."""
        return -self.slopes(seen, head) / (2 * self.settings.l2 * head.n)

    def slopes(self, seen: LastLayer, head: Head) -> Tensor:
        """The gradient of each example's loss in the refitted layer's output, ``[n, t, c]``."""
        return seen.slopes(self._precise_loss(), seen.features @ head.weights.T)

    def _training_examples(self, batches: Iterable[Batch], device: torch.device) -> list[LastLayer]:
        parts: list[LastLayer] = []
        start = 0
        for batch in batches:
            batch = to_device(batch, device)
            part = self.seen(batch, f"the batch that begins with example {start}")
            if not parts:
                # one example shows the dimension of examples if there are as many positions
                self.seen(take(batch, slice(0, 1)))
            finite = torch.isfinite(part.features).flatten(1).all(1)
            if not bool(finite.all()):
                raise NonFiniteError(
                    f"the input of layer '{self.layer}' is NaN or infinite for training example "
                    f"{start + int(finite.int().argmin())}; look at that example"
                )
            parts.append(part)
            start += len(finite)
        if not parts:
            raise InvalidArgumentError("there are no examples: the data set or loader is empty")
        return parts

    def _joined(self, parts: list[LastLayer]) -> list[LastLayer]:
        """All examples in one part, if their loss is a sum or mean over examples."""
        if self.loss.reduction is None and not self.loss.settled:
            return parts  # single examples do not show whether it is a sum or a mean
        whole = joined(parts)
        if len(whole) < len(parts):
            (one,) = whole
            try:
                with torch.no_grad():
                    self.loss.checked_total(one.outputs, one.batch, len(one.features))
            except InvalidArgumentError:  # need not hold for batches of one example
                return parts
        return whole

    def _precise_loss(self) -> Loss:
        """The loss with its tensors (class weights, for example) in float64."""
        if not isinstance(self.loss_fn, nn.Module):
            return self.loss
        exact = copy.deepcopy(self.loss_fn).double()
        return type(self.loss)(exact, self.loss.reduction, self.loss.name)
