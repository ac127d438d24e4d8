"""The exact derivative of a recorded run in the weights of its examples: MAGIC, arXiv 2504.16430.

Shapes: m test examples, n training examples, P trained parameters.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from influence_kit.core.arguments import check_count
from influence_kit.core.distributed import is_mine
from influence_kit.core.locks import alone_with
from influence_kit.core.memory import resident_bytes, rows_within
from influence_kit.data.batches import to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify, kept_bytes
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.dvemb.backward_pass import check_epochs
from influence_kit.methods.dvemb.examples_by_index import ExamplesByIndex, count_by_index
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.magic.reverse_pass import ReversePass
from influence_kit.methods.magic.runs import Run, check_traces, trained_by
from influence_kit.methods.magic.step_gradient import Batched
from influence_kit.methods.restarts import given, starts_again
from influence_kit.preservation.restore import borrowed
from influence_kit.scoring.reducers import Reducer, WholeRows
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side
from influence_kit.training.replay import Replay
from influence_kit.training.step_loss import StepLoss
from influence_kit.training.trace import TrainingTrace

# copies of an adjoint of a query that are held at once
COPIES = 4


@documented
class MAGIC(ExampleInfluence):
    r"""score = - d loss(test) after training / d weight of the training example, through the run.
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

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """Refused: it takes the adjoint of every training example; ``influence`` has its diagonal."""
        raise NotImplementedError(
            "self influence takes one adjoint through the whole run per training example; "
            "`influence` of a few training examples has the scores of these with themselves, and "
            "`DVEmb.self_influence` is an approximation for all"
        )

    # Implementation.

    def make_reducer(self, k: int | None, proponents: bool) -> Reducer:
        return WholeRows(k, proponents)

    def stream_scores(
        self, inputs: Any, reducer: Reducer, doing: str, show_progress: bool, aggregate: bool
    ) -> None:
        vectors = self._test_gradients(given(inputs), aggregate)
        mine = torch.tensor([row for row in range(len(vectors[0])) if is_mine(row)], dtype=torch.long)
        n = self._examples.train_count
        size = self._queries_at_once()
        groups = mine.split(size) if len(mine) else ()
        steps = sum(len(run.steps) for run in self._runs)
        with self.progress(doing, len(groups) * steps, show_progress) as bar:
            for rows in groups:
                total = self._sample.new_zeros(len(rows), n)
                for number, run in enumerate(self._runs):
                    own = vectors[number * self.last : (number + 1) * self.last]
                    total += self._scores_of(run, [v[rows.to(v.device)] for v in own], bar)
                reducer.update(rows, total / len(self._runs))
        if not len(mine):
            reducer.update(mine, self._sample.new_zeros(0, n))

    def _test_gradients(self, inputs: Any, aggregate: bool) -> list[Tensor]:
        """The test gradients ``[m, P]`` at each measured state of each run."""
        with self.session() as loader:
            loader.load(0)
            few = self._by_index(self._runs[0].steps[0].indices[:16])
            self._source.prepare(to_device(few, self.device), self._train_loss)
            self._row_bytes = kept_bytes(self.model, to_device(few, self.device))
            stream = Stream([], loader, self._sample)
            return [
                stream.vectors(
                    Side(number, lambda batch: self._source(batch, self._test_loss)),
                    self.batches(inputs, ordered=not aggregate),
                    aggregate,
                )
                for number in range(len(self.checkpoints))
            ]

    def _scores_of(self, run: Run, vectors: Sequence[Tensor], bar: "tqdm[Any]") -> Tensor:
        """The scores ``[m, n]`` of one run, given test gradients at its measured states."""
        scores = self._sample.new_zeros(len(vectors[0]), self._examples.train_count)
        sizes = {name: p.shape for name, p in self._parameters.items()}
        measured = {
            after: {
                name: (column.reshape(len(vector), *shape) / -self.last).to(self._parameters[name])
                for (name, shape), column in zip(
                    sizes.items(), vector.split([s.numel() for s in sizes.values()], 1), strict=True
                )
            }
            for after, vector in zip(run.measured, vectors, strict=True)
        }
        with self._replaying(run) as replay:
            batched = Batched(4 * self._row_bytes * run.largest_batch)
            ReversePass(replay, batched, self.epochs, bar.update)(measured, scores)
        return scores

    @contextmanager
    def _replaying(self, run: Run) -> Iterator[Replay]:
        """The model, borrowed for taking the steps of a run again."""
        with alone_with(self.model), borrowed(self.model, eval_mode=False):
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            loss = StepLoss(self.model, self.loss_fn, self._train_loss)
            yield Replay(self.model, run.trace, run.steps, loss, self._by_index)

    def _queries_at_once(self) -> int:
        """How many test examples are carried back through a run together."""
        size = sum(p.numel() * p.element_size() for p in self._parameters.values())
        tensors = 1 + max(run.slots for run in self._runs)
        return rows_within(resident_bytes(self.device), COPIES * tensors * size)

    @property
    def _by_index(self) -> ExamplesByIndex:
        self.train_dataloader.check_draws()
        return ExamplesByIndex(self.train_dataloader)
