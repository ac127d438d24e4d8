"""The exact derivative of a recorded run in the weights of its examples: MAGIC, arXiv 2504.16430.

Shapes: m test examples, n training examples, P trained parameters.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.core.arguments import check_count, check_number, check_seed
from influence_kit.core.distributed import is_mine
from influence_kit.data.batches import to_device
from influence_kit.errors import FixedAttributeError
from influence_kit.gradients.batch_memory import kept_bytes
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.examples_by_index import ExamplesByIndex, count_by_index
from influence_kit.methods.magic.repeated_runs import RepeatedRuns
from influence_kit.methods.magic.runs import Run, check_traces, trained_by
from influence_kit.methods.magic.smoothness import Smoothness, drawn_examples
from influence_kit.methods.magic.weighted_run import check_weights, mean_measures
from influence_kit.methods.restarts import given, starts_again
from influence_kit.scoring.reducers import Reducer, WholeRows
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.term import Side
from influence_kit.training.step import check_epochs
from influence_kit.training.step_loss import StepLoss
from influence_kit.training.trace import TrainingTrace

# training examples that show the reduction of the loss
FEW = 16


@documented
class MAGIC(ExampleInfluence):
    r"""score = - d loss(test) / d w_train, the exact derivative of a recorded training run.

    .. math::
        \theta_{t+1} = \text{step}_t\left(\theta_t, \; \frac{1}{|B_t|} \sum_{i \in B_t}
        w_i \nabla \ell_i(\theta_t)\right), \qquad
        \text{score}(z', i) = -\frac{\partial \, \ell(z', \theta_T)}{\partial w_i}
        \quad \text{at } w = 1

    The metagradient of arXiv 2504.16430 with exact replay. Weight 1 is the run as it was, and
    weight 0 leaves the example out of its batches, so a score is the first-order change of the test
    loss when that is done: the unit and scale are those of ``DVEmb``, without its approximations.
    Rows are test examples; positive is a proponent. With ``test_output_fn``, a score is the
    derivative of the output.

    A call goes back through the run once for all its test examples: each step is taken again
    from the recorded state (compared bit for bit with what was recorded), then the derivative is
    carried back through clipping, the optimizer's update (SGD with momentum, Nesterov, dampening
    and weight decay; Adam and AdamW, also with ``amsgrad``) and the gradient, by one backward pass
    through the backward pass. Schedules, parameter groups, accumulation, dropout and tied weights
    (one weight, one state) are followed. Memory: m times P times 1 + the number of the optimizer's
    tensors per parameter; more test examples than fit are carried back in turn. Buffers that
    training changes (BatchNorm) have no derivative here, and are refused. Also refused, as
    they are not repeated: mixed precision, numbers that a forward draws from numpy or Python, and
    gradients that ``zero_grad(set_to_none=False)`` leaves for parameters without one.

    The derivative is of one run with one seed. It predicts well what leaving out a few examples
    does where training is smooth (tanh or GELU, large batches), less well with ReLU:
    ``smoothness`` measures that. Several traces (other seeds) are averaged. On digits, that and the
    mean over the states of the last epochs (``last``) predicted models trained again with other
    seeds far better than one state of one run.

    Args:
        train_dataset: a ``Dataset`` that supports indexing, or a ``DataLoader`` that reads one in
            order; it gives the examples as training saw them.
        trace: the recorded run, a ``TrainingTrace`` with its optimizer; or a list of them, over
            which scores are averaged.
        loss_fn: the loss of the run, of any reduction; the trace's ``reduction`` is what a step
            took.
        epochs: the epochs whose steps count, as the trace numbers them; None for all.
        last: the test loss is averaged over the last ``last`` states of the run, which the trace
            must have kept.
        eval_mode: whether test examples are measured in evaluation mode. The steps are taken again
            in the modes in which they were recorded.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: for a trace that does not fit the data, is not finished, or is of
            another optimizer; for changed buffers; from ``influence`` if the steps, taken again, do
            not give what was recorded.
        NonFiniteError: from ``influence`` if the derivatives overflow.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> with TrainingTrace(model, optimizer) as trace:
        ...     for indices in torch.arange(8).split(4):
        ...         optimizer.zero_grad()
        ...         loss(model(x[indices]), y[indices]).backward()
        ...         trace.record(indices)
        ...         optimizer.step()
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> magic = MAGIC(model, train, trace=trace, loss_fn=loss)
        >>> magic.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        *,
        trace: TrainingTrace | Sequence[TrainingTrace],
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        epochs: Collection[int] | None = None,
        last: int = 1,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        self.trace, self.epochs, self.last = trace, epochs, check_count(last, "last")
        self._runs = check_traces(trace, count_by_index(train_dataset), last)
        for run in self._runs:
            check_epochs(epochs, run.steps)
        super().__init__(
            model,
            train_dataset,
            [state for run in self._runs for state in run.measured_states],
            loss_fn=loss_fn,
            batch_size=batch_size,
            test_loss_fn=test_loss_fn,
            sample_wise_grads_per_batch=sample_wise_grads_per_batch,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            select=trained_by(self._runs),
        )

    # What a user calls.

    @starts_again
    def replay(self, weights: Any, run: int = 0) -> dict[str, Tensor]:
        """The state dict after the run, had the training examples these weights in its batches.

        The loss of a batch of B examples becomes sum_i w_i loss_i / B (for a trace of sums without
        the B): an example of weight 0 is left out, while batches, their order, random states and
        the number of steps stay the same. With ``epochs``, weights count in these alone.

        Args:
            weights: the weights ``[n]``; 1 is the run as it was.
            run: the index of the trace, if there are several.
        """
        found = check_weights(weights, self._examples.train_count).to(self._sample)
        chosen = self._run(run)
        return self._repeated().weighted(chosen, found)[0]

    @starts_again
    def smoothness(
        self, inputs: Any, change: float = 0.1, share: float = 0.1, seed: int = 0, run: int = 0
    ) -> Smoothness:
        """What scores predict against what one repeated run gives, at a small change of weights.

        Args:
            inputs: test examples, as for ``influence``.
            change: by how much the weights of some training examples are lowered.
            share: the share of the training examples, drawn at random.
            seed: of the draw.
            run: the index of the trace, if there are several.

        Returns:
            The changes, predicted and real, and how well they agree.
        """
        change = check_number(change, "change", above=0, most=1)
        share = check_number(share, "share", above=0, most=1)
        chosen, n = self._run(run), self._examples.train_count
        some = drawn_examples(n, share, check_seed(seed))
        weights = self._sample.new_ones(n)
        weights[some] -= change
        gradients = self._test_gradients(given(inputs), aggregate=False)[run]
        repeated = self._repeated()
        scores = repeated.scores(chosen, gradients, n, lambda: None)
        changed = self._measures(inputs, repeated.weighted(chosen, weights))
        real = changed - self._measures(inputs, chosen.measured_states)
        lowered = scores[:, some.to(scores.device)].sum(1) * change
        predicted = -lowered if self.explains_output else lowered
        return Smoothness(predicted, real, some, change)

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """Refused: it takes an adjoint through the run for every training example."""
        raise NotImplementedError(
            "self influence takes one adjoint through the whole run per training example; "
            "`influence` of a few training examples has the scores of these with themselves, and "
            "`DVEmb.self_influence` is an approximation for all"
        )

    # Implementation.

    @property
    def checkpoints(self) -> list[Any]:
        """The states of the runs at which the test loss is measured."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        raise FixedAttributeError(
            "`checkpoints` cannot be assigned: they are the states at the end of the recorded "
            "runs; make a new MAGIC(..., trace=...)"
        )

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        return WholeRows(k, proponents)

    def stream_scores(
        self, inputs: Any, reducer: Reducer, doing: str, show_progress: bool, aggregate: bool
    ) -> None:
        by_run = self._test_gradients(given(inputs), aggregate)
        n, repeated = self._examples.train_count, self._repeated()
        rows = [row for row in range(len(by_run[0][0])) if is_mine(row)]
        groups = torch.tensor(rows, dtype=torch.int64).split(repeated.queries_at_once(self._runs))
        steps = sum(len(run.steps) for run in self._runs)
        with self.progress(doing, len(groups) * steps, show_progress) as bar:
            for some in groups:
                total = self._sample.new_zeros(len(some), n)
                for run, gradients in zip(self._runs, by_run, strict=True):
                    if len(some):
                        own = [vectors[some.to(vectors.device)] for vectors in gradients]
                        total += repeated.scores(run, own, n, bar.update)
                reducer.update(some, total / len(self._runs))

    def _test_gradients(self, inputs: Any, aggregate: bool) -> list[list[Tensor]]:
        """The test gradients ``[m, P]`` at each measured state, by run."""
        with self.session() as loader:
            sides = SideGradients(loader, self._sample)
            found = [
                sides.vectors(
                    Side(number, lambda batch: self._source(batch, self._test_loss)),
                    self.batches(inputs, ordered=not aggregate),
                    aggregate,
                )
                for number in range(len(self.checkpoints))
            ]
        return [found[start : start + self.last] for start in range(0, len(found), self.last)]

    def _measures(self, inputs: Any, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The test loss (or output) of each test example, ``[m]``, averaged over states."""
        function = self.test_loss_fn if self.test_output_fn is None else self.test_output_fn
        with self.session():
            batches = (to_device(batch, self.device) for batch in self.batches(inputs))
            return mean_measures(self.model, (self._test_loss, function), batches, states)

    def _repeated(self) -> RepeatedRuns:
        """What repeats the runs, once the reduction of the training loss has been found."""
        with self.session() as loader:
            loader.load(0)
            few = to_device(self._by_index(self._runs[0].steps[0].indices[:FEW]), self.device)
            self._source.prepare(few, self._train_loss)
            example_bytes = kept_bytes(self.model, few)
        return RepeatedRuns(
            self.model,
            self._parameters,
            StepLoss(self.model, self.loss_fn, self._train_loss),
            self._by_index,
            self.epochs,
            example_bytes,
        )

    def _run(self, number: int) -> Run:
        check_count(number, "run", 0, most=len(self._runs) - 1)
        return self._runs[number]

    @property
    def _by_index(self) -> ExamplesByIndex:
        self.train_dataloader.check_draws()
        return ExamplesByIndex(self.train_dataloader)
