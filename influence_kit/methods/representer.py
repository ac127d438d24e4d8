"""Representer points of the last layer: Yeh et al. 2018, arXiv 1811.09720.

Letters: m test and n training examples, t positions (1 unless an example is a sequence), d features
of the last layer, c outputs.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.checkpoints import LoadFunction, load_checkpoint
from influence_kit.data import Batch, take, to_device
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rules import linear, rule_for, transposed_linear
from influence_kit.losses import Loss, LossFunction
from influence_kit.methods.base import BatchSize
from influence_kit.methods.example_influence import given
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.last_layer import LastLayer, at_last_layer, chosen_outputs, joined
from influence_kit.methods.refit import Objective, refit
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term

# the two sides of an example, beside each other
VALUE, CHOSEN = "representer value", "chosen output"


@dataclass(frozen=True)
class Head:
    """A last layer that was refitted.

    Args:
        weights: ``[c, d]``, float64.
        n: the number of training examples.
        made_of: what it depends on beside the data.
    """

    weights: Tensor
    n: int
    made_of: tuple[float, ...]


class RepresenterPointSelection(InnerProductInfluence):
    r"""score = alpha_train[label of test] * <f_train, f_test>, f the input of the last layer.

    .. math::
        \Theta^* = \arg\min_\Theta \frac{1}{n} \sum_i \ell(\Theta f_i, y_i) + \lambda
        \lVert \Theta \rVert^2, \qquad
        \alpha_i = -\frac{1}{2 \lambda n} \frac{\partial \ell_i}{\partial (\Theta^* f_i)}, \qquad
        \Theta^* = \sum_i \alpha_i f_i^T

    The last layer is refitted, to convergence, on the features f that the rest of the model gives.
    Its weights are then a sum over the training examples (the representer theorem, arXiv
    1811.09720), and so is each output: a score is the training example's part of the refitted
    layer's output for the test example's own label. **The scores of a test example sum to that
    output** (its mean over checkpoints where there are several, as the scores are). They are in
    the units of the output, do not depend on a loss of the test example, and change with l2.

    Rows are test examples. Positive is a proponent: it raises the output of the test example's
    label. Where the layer has one output (regression, a single logit) the paper's score alpha_i
    <f_i, f_t> is positive where it raises the output, whether that is good or not; here it is
    multiplied by the sign of the test example's own alpha, -sign(d loss / d output) at the refitted
    layer, so that positive lowers the test loss there, too. The scores then sum to that sign times
    the output, and ``representer_values`` has the paper's.

    The model's output must be the output of this layer (a reshape may follow; a softmax belongs in
    ``loss_fn``). Where examples are sequences each position has its label, an example's score is
    the sum over pairs of positions, and a position that the loss ignores has no part in it.

    The refit is Newton's method in float64, started at zero; the features of the training set and
    what the loss takes beside them (of a dict batch, without images and the like) are in memory
    while it runs. It is done at the first call, once a checkpoint; nothing is saved to disk.

    Args:
        final_fc_layer: the linear layer that gives the model's output, or its name.
        loss_fn: convex and twice differentiable in the output; of any reduction.
        l2: lambda above, of the squared norm without a factor 1/2: scikit-learn's C is
            1 / (2 l2 n). The paper's experiments have 3e-3. The smaller, the closer the layer fits
            the training set, the fewer examples carry it, and the longer the refit takes.
        normalize: divide features by their norm before anything is done with them, so that
            examples with large features do not dominate.
        count_bias: append the constant feature 1, so that a bias is refitted with the same l2 and
            <f_i, f_t> becomes <f_i, f_t> + 1. Not by default, as in the paper: it has every
            training example of the label raise the output of every test example, however unlike.
        tol: the refit is done where the norm of the objective's gradient is at most tol times that
            of the penalty's part; then ||Theta - sum alpha_i f_i^T|| <= tol ||Theta||.
        max_iter: the most Newton steps; 10 to 20 are usual.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: where the layer is not linear or not the last one, the loss is not a
            function of the output, or there is no label to choose the output by.
        CurvatureError: where the refit does not converge.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> representer = RepresenterPointSelection(
        ...     model, "2", train, [model.state_dict()], loss_fn=nn.CrossEntropyLoss()
        ... )
        >>> scores = representer.influence((x[:4], y[:4]))
        >>> scores.shape
        torch.Size([4, 8])
        >>> outputs = representer.refitted_outputs((x[:4], y[:4]))
        >>> bool(torch.allclose(scores.sum(1), outputs[range(4), y[:4]], atol=1e-5))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: str | nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        *,
        l2: float = 3e-3,
        normalize: bool = False,
        count_bias: bool = False,
        tol: float = 1e-12,
        max_iter: int = 100,
        eval_mode: bool = True,
    ) -> None:
        for name, value, most in (("l2", l2, math.inf), ("tol", tol, 1)):
            if (
                isinstance(value, bool)
                or not isinstance(value, float | int)
                or not 0 < value < most
            ):
                raise InvalidArgumentError(
                    f"`{name}` must be a number above 0 and below {most}; got {value!r}"
                )
        if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
            raise InvalidArgumentError(f"`max_iter` must be a positive int; got {max_iter!r}")
        self.l2, self.tol, self.max_iter = l2, tol, max_iter
        self.normalize, self.count_bias = normalize, count_bias
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            [names.get(final_fc_layer, final_fc_layer)],
            loss_fn,
            batch_size,
            eval_mode=eval_mode,
        )
        if rule_for(self.final_fc_layer) not in (linear, transposed_linear):
            raise InvalidArgumentError(
                f"`final_fc_layer` must be a linear layer; '{self._layer}' is {self.final_fc_layer}"
            )

    # What a method says.

    def terms(self) -> list[Term]:
        """One term a checkpoint; scores are their mean."""
        return [
            Term(self._side(c, CHOSEN), self._side(c, VALUE), weight=1 / len(self.checkpoints))
            for c in range(len(self.checkpoints))
        ]

    # What a user reads and calls.

    @property
    def final_fc_layer(self) -> nn.Module:
        """The layer that is refitted."""
        return self.model.get_submodule(self._layer)

    def representer_values(self, checkpoint: int = 0) -> Tensor:
        """The alphas of the training examples at a checkpoint: ``[n, c]``; of sequences ``[n, t, c]``.

        Sequences of different lengths are filled up with zeros.
        """
        return _without_one(self._found(None, checkpoint)[0].deltas).to(self._dtype)

    def refitted_outputs(self, inputs: Any, checkpoint: int = 0) -> Tensor:
        """What the refitted layer gives: ``[m, c]``, or ``[m, t, c]``.

        Args:
            inputs: examples with their labels: one batch (tuple, list or dict) or a DataLoader.
            checkpoint: the number of the checkpoint.
        """
        form, head = self._found(given(inputs), checkpoint)
        outputs = form.inputs.double() @ head.weights.T
        return _without_one(outputs).to(self._dtype)

    # How it is done.

    @property
    def _layer(self) -> str:
        assert self.layers is not None
        return self.layers[0]

    @property
    def _made_of(self) -> tuple[float, ...]:
        """The settings that a refit depends on."""
        return (self.l2, self.normalize, self.count_bias, self.tol)

    def _forget(self) -> None:
        self._heads: dict[int, Head] = {}

    def _plan(
        self, loader: CheckpointLoader, inputs: Any, ordered: bool = True
    ) -> tuple[list[Term], Iterable[Batch]]:
        # before the data is shared out: every rank needs the whole of it
        for place in range(len(self.checkpoints)):
            self._fit_at(place, loader)
        return super()._plan(loader, inputs, ordered)

    def _fit_at(self, place: int, loader: CheckpointLoader) -> None:
        """Have the refitted layer of a checkpoint."""
        loader.load(place)
        made_of = (*loader.fingerprint(place), *self._made_of)
        known = self._heads.get(place)
        if known is None or known.made_of != made_of:
            self._heads[place] = self._refitted(made_of)

    def _refitted(self, made_of: tuple[float, ...]) -> Head:
        parts = joined(self._training_examples())
        shapes = [part.features.shape[:2] for part in parts]
        loss = self._precise_loss()

        def losses(outputs: Tensor) -> Tensor:
            pieces = zip(parts, outputs.split([s.numel() for s in shapes]), shapes, strict=True)
            return torch.stack([part.total(loss, o.view(*s, -1)) for part, o, s in pieces]).sum()

        features = torch.cat([part.features.flatten(0, 1) for part in parts])
        n = sum(shape[0] for shape in shapes)
        objective = Objective(features, losses, n, self.l2)
        return Head(refit(objective, parts[0].width, self.tol, self.max_iter), n, made_of)

    def _training_examples(self) -> list[LastLayer]:
        parts: list[LastLayer] = []
        start = 0
        for batch in self.train_dataloader:
            batch = to_device(batch, self._device)
            part = self._seen(batch)
            if not parts:
                # one example shows where examples stand, were there as many positions as examples
                self._seen(take(batch, slice(0, 1)))
            finite = torch.isfinite(part.features).flatten(1).all(1)
            if not bool(finite.all()):
                raise NonFiniteError(
                    f"the input of layer '{self._layer}' is NaN or infinite for training example "
                    f"{start + int(finite.int().argmin())}; look at that example"
                )
            parts.append(part)
            start += len(finite)
        if not parts:
            raise InvalidArgumentError("there are no examples: the data set or loader is empty")
        return parts

    def _seen(self, batch: Batch) -> LastLayer:
        """A batch at the last layer, its features as they are multiplied with."""
        self._source.prepare(batch, self._train_loss)
        if not self._train_loss.is_of_outputs:
            raise InvalidArgumentError(
                "the last layer cannot be refitted without a loss that is a function of its "
                "output: pass `loss_fn`"
            )
        seen = at_last_layer(self.model, self._layer, batch, self._precise_loss())
        features = seen.features
        if self.normalize:
            norms = features.norm(dim=-1, keepdim=True)
            features = features / torch.where(norms > 0, norms, 1.0)
        if self.count_bias:
            features = F.pad(features, (0, 1), value=1.0)
        return replace(seen, features=features)

    def _precise_loss(self) -> Loss:
        """The training loss with what it holds (weights of classes, say) in float64."""
        if not isinstance(self.loss_fn, nn.Module):
            return self._train_loss
        exact = copy.deepcopy(self.loss_fn).double()
        return Loss(exact, self._train_loss.reduction, "loss_fn")

    def _side(self, place: int, kind: str) -> Side:
        name = next(iter(self._parameters))

        def one_of_both(sides: Gradients) -> Gradients:
            form = sides.forms[kind]
            return Gradients(sides.n, {name: form}, {name: form.shape}, sides.sample)

        return Side(place, partial(self._both_sides, place), (one_of_both,))

    def _both_sides(self, place: int, batch: Batch) -> Gradients:
        """A batch as training examples and as test examples: alpha f^T, and (chosen output) f^T."""
        seen, head, sample = self._seen(batch), self._heads[place], self._sample
        slopes = seen.slopes(self._precise_loss(), seen.features @ head.weights.T)
        values = -slopes / (2 * self.l2 * head.n)
        deltas = {VALUE: values, CHOSEN: chosen_outputs(values, seen.batch, self._train_loss.shift)}
        features, shape = seen.features.to(sample), head.weights.shape
        forms = {kind: Factored(d.to(sample), features, shape) for kind, d in deltas.items()}
        return Gradients(len(values), forms, dict.fromkeys(forms, shape), sample)

    def _found(self, inputs: Any, checkpoint: int) -> tuple[Factored, Head]:
        """The training side of examples (of the training set where None), and the refitted layer."""
        if checkpoint not in range(len(self.checkpoints)):
            raise InvalidArgumentError(
                f"`checkpoint` must be from 0 to {len(self.checkpoints) - 1}; got {checkpoint!r}"
            )
        with self._session() as loader:
            _, batches = self._plan(loader, inputs)
            side = Side(checkpoint, partial(self._both_sides, checkpoint))
            form = Stream([], loader, self._sample).test_side(side, batches).forms[VALUE]
        assert isinstance(form, Factored)
        return form, self._heads[checkpoint]


def _without_one(values: Tensor) -> Tensor:
    """``[n, t, c]`` as ``[n, c]`` where there is one position."""
    return values.squeeze(1) if values.shape[1] == 1 else values
