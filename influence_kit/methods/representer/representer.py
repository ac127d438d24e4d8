"""Representer points of the last layer: Yeh et al. 2018, arXiv 1811.09720.

Shapes: m test examples, n training examples, t positions (1 unless an example is a sequence), d
features of the last layer, c outputs.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.arguments import check_count
from influence_kit.data.batches import Batch
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.checkpoint_fits import CheckpointFits
from influence_kit.methods.example_batches import TRAIN, BatchSize
from influence_kit.methods.fit_cache import FitCache
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.layer_names import check_layer
from influence_kit.methods.representer.linear_layer import linear_parameters, output_count
from influence_kit.methods.representer.point_gradients import (
    CHOSEN,
    VALUE,
    output_gradients,
    point_gradients,
)
from influence_kit.methods.representer.refit import Head, Refit, Settings
from influence_kit.methods.restarts import given, starts_again
from influence_kit.methods.row_check import RowCheck
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Side, Term


@documented
class RepresenterPointSelection(InnerProductInfluence):
    r"""score = alpha_train[label of test] * <f_train, f_test>, f the input of the last layer.

    .. math::
        \Theta^* = \arg\min_\Theta \frac{1}{n} \sum_i \ell(\Theta f_i, y_i) + \lambda
        \lVert \Theta \rVert^2, \qquad
        \alpha_i = -\frac{1}{2 \lambda n} \frac{\partial \ell_i}{\partial (\Theta^* f_i)}, \qquad
        \Theta^* = \sum_i \alpha_i f_i^T

    The last layer is refitted, to convergence, on the features f computed by the rest of the model.
    Its weights are then a sum over the training examples (the representer theorem, arXiv
    1811.09720), and so is each output: a score is the training example's part of the refitted
    layer's output for the test example's own label. **The scores of a test example sum to that
    output** (both are means over checkpoints if there are several). They are in the units of the
    output, do not depend on a loss of the test example, and change with l2.

    Rows are test examples. Positive is a proponent: it raises the output of the test example's
    label. If the layer has one output (regression, a single logit), the paper's score alpha_i
    <f_i, f_t> is positive if it raises the output, whether that is better or worse; here it is
    multiplied by the sign of the test example's own alpha, -sign(d loss / d output) at the refitted
    layer, so that positive lowers the test loss also in this case. The scores then sum to that
    sign times the output, and ``representer_values`` returns the paper's alphas.

    The model's output must be the output of this layer (a reshape may follow; a softmax belongs in
    ``loss_fn``). If examples are sequences, each position has its label, an example's score is
    the sum over pairs of positions, and positions that the loss ignores do not count.

    The refit is Newton's method in float64, started at zero; the features of the training set and
    the other arguments of the loss (of a dict batch, without images and the like) are in memory
    while it runs. It is done in the first call, once per checkpoint; ``save`` writes the refitted
    weights to a folder, and ``load`` reads them instead of refitting.

    Args:
        final_fc_layer: the linear layer whose output is the model's output, or its name.
        loss_fn: convex and twice differentiable in the output; any reduction.
        l2: lambda above, of the squared norm without a factor 1/2: scikit-learn's C is
            1 / (2 l2 n). The paper's experiments use 3e-3. With a smaller l2 the layer fits the
            training set more closely, fewer examples have large alphas, and the refit takes longer.
        normalize: divide features by their norm first, so that examples with large features do not
            dominate.
        count_bias: append the constant feature 1, so that a bias is refitted with the same l2 and
            <f_i, f_t> becomes <f_i, f_t> + 1. Off by default, as in the paper: with it, every
            training example of the label raises the output of every test example, however
            different.
        tol: the refit is done if the norm of the objective's gradient is at most tol times that of
            the penalty's gradient; then ||Theta - sum alpha_i f_i^T|| <= tol ||Theta||.
        max_iter: the largest number of Newton steps; 10 to 20 are usual.
        test_output_fn: ``test_output_fn(outputs, targets)``, as in ``InnerProductInfluence``: the
            output to explain, instead of that of the label. The score is then <d g / d output,
            alpha_train> <f_train, f_test> for the function g at the refitted layer's output: the
            training example's part of g if g is linear (the prediction of a regression, one class
            minus another), and to first order otherwise.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: if the layer is not linear or not the last one, the loss is not a
            function of the output, or there is no label that selects the output.
        CurvatureError: if the refit does not converge.

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
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        self._how = Settings(l2, normalize, count_bias, tol, max_iter)
        name = check_layer(model, final_fc_layer)
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            [name],
            loss_fn,
            batch_size,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        self._select = linear_parameters
        self._look_at(self.layers)
        cache = self._caches.add(FitCache("the last layer", "fitted", TRAIN), first=True)
        self._fits = CheckpointFits(self, self._caches, cache, self._fit_at, self._description)
        self._cache.remedy = cache.remedy

    # The definition of the method.

    def terms(self) -> list[Term]:
        """One term per checkpoint; scores are their mean."""
        return [
            Term(self._side(c, CHOSEN), self._side(c, VALUE), weight=1 / len(self.checkpoints))
            for c in range(len(self.checkpoints))
        ]

    # What a user reads and calls.

    @property
    def final_fc_layer(self) -> nn.Module:
        """The layer that is refitted."""
        return self.model.get_submodule(self._layer)

    @property
    def explains_output(self) -> bool:
        """Whether a positive score means that training raised an output, not lowered a loss."""
        return self.test_output_fn is not None or output_count(self.final_fc_layer) > 1

    @starts_again
    def fit(self, show_progress: bool = False) -> Self:
        """Refit at every checkpoint again; ``influence`` refits once automatically.

        Args:
            show_progress: a bar over the checkpoints.
        """
        self._fits.fit(show_progress)
        return self

    @starts_again
    def save(self, folder: str | Path) -> None:
        """Write the refitted layers to a folder; refits at checkpoints without one."""
        self._fits.save(folder)

    @starts_again
    def load(self, folder: str | Path) -> Self:
        """Read the layers that ``save`` has written, instead of ``fit``.

        Raises:
            InvalidArgumentError: if they were saved for another model, data set, loss or setting.
        """
        self._fits.load(folder)
        return self

    def representer_values(self, checkpoint: int = 0) -> Tensor:
        """The alphas of the training examples, ``[n, c]``, or ``[n, t, c]``, at a checkpoint.

        Sequences of different lengths are padded with zeros.
        """
        return _without_one(self._values(None, checkpoint)[0].deltas).to(self._dtype)

    def refitted_outputs(self, inputs: Any, checkpoint: int = 0) -> Tensor:
        """The outputs of the refitted layer: ``[m, c]``, or ``[m, t, c]``.

        Args:
            inputs: examples with their labels: one batch (tuple, list or dict) or a DataLoader.
            checkpoint: the index of the checkpoint.
        """
        form, head = self._values(given(inputs), checkpoint)
        outputs = form.inputs.double() @ head.weights.T
        return _without_one(outputs).to(self._dtype)

    # Implementation.

    @property
    def _layer(self) -> str:
        assert self.layers is not None
        return str(self.layers[0])

    @property
    def _refit(self) -> Refit:
        check = RowCheck(self.model, "the features of the last layer", can_be_slow=False)
        given = self._source, self._train_loss, self.loss_fn
        return Refit(self.model, self._layer, *given, self._how, check)

    def _description(self, loader: CheckpointLoader) -> dict[str, Any]:
        """The model, data, loss and settings that a saved fit belongs to."""
        how = asdict(self._how)
        # the limit of steps has no effect if fewer were enough
        del how["max_iter"]
        return {
            "method": self.get_name(),
            "layer": self._layer,
            **how,
            **self._identity(loader, self.train_dataloader),
        }

    def prepare(self, loader: CheckpointLoader, show_progress: bool = False) -> None:
        # before the data is divided: every rank needs all of it
        super().prepare(loader, show_progress)
        self._fits.at_all(loader, show_progress, range(len(self.checkpoints)))

    def _fit_at(self, index: int, loader: CheckpointLoader) -> None:
        states = self._fits.cache.states
        if index not in states:
            head = self._refit.head(self.train_dataloader, self.device)
            states[index] = {"weights": head.weights, "examples": torch.tensor(head.n)}

    def _head(self, index: int) -> Head:
        """The refitted layer of a checkpoint."""
        state = self._fits.cache.states[index]
        return Head(state["weights"], int(state["examples"]))

    def _side(self, index: int, kind: str) -> Side:
        name = next(iter(self._parameters))

        def one_of_both(sides: Gradients) -> Gradients:
            form = sides.forms[kind]
            return Gradients(sides.n, {name: form}, {name: form.shape}, sides.sample)

        of_output = kind == CHOSEN and self.test_output_fn is not None
        features = self._output_side if of_output else self._both_sides
        return Side(index, partial(features, index), (one_of_both,))

    def _output_side(self, index: int, batch: Batch) -> Gradients:
        """A batch as test examples of the user's output function."""
        measured = replace(self._refit, loss=self._test_loss, loss_fn=self.test_output_fn)
        return output_gradients(measured, self._head(index), batch, self._sample)

    def _both_sides(self, index: int, batch: Batch) -> Gradients:
        """A batch as training and as test examples."""
        return point_gradients(self._refit, self._head(index), batch, self._sample)

    def _values(self, inputs: Any, checkpoint: int) -> tuple[Factored, Head]:
        """The training features of examples (None: the training set), and the refitted layer."""
        check_count(checkpoint, "checkpoint", least=0, most=len(self.checkpoints) - 1)
        with self.session() as loader:
            _, batches = self._plan(loader, inputs)
            side = Side(checkpoint, partial(self._both_sides, checkpoint))
            form = SideGradients(loader, self._sample).of(side, batches).forms[VALUE]
        assert isinstance(form, Factored)
        return form, self._head(checkpoint)


def _without_one(values: Tensor) -> Tensor:
    """``[n, t, c]`` as ``[n, c]`` if there is one position."""
    return values.squeeze(1) if values.shape[1] == 1 else values
