"""Unrolled differentiation by segments of a run: Bae et al. 2024, arXiv 2405.12186."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.kronecker_curvature import FisherName, WithoutForm
from influence_kit.curvature.segments import Segment, SegmentBatches, SegmentedEKFAC, Segments
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.layer_names import Layers
from influence_kit.scoring.term import Term


@documented
class SOURCE(InfluenceFunction):
    r"""score = sum over segments l of <r_l S_(l+1) ... S_L grad loss(test), grad loss_l(train)>.

    .. math::
        S_l = \exp(-R_l H_l), \qquad r_l = \bigl( I - \exp(-R_l H_l) \bigr) H_l^{-1}, \qquad
        R_l = \sum_{t \in l} \frac{\eta_t}{1 - \mu}

    What a little more weight on the training example, in all steps of the run, does to the test
    loss at its end (arXiv 2405.12186). The run is divided into L segments, each with one
    checkpoint, at its end, or several: the means of their curvatures, H_l, and of their training
    gradients stand for the whole segment. The test gradient is that at the last checkpoint. R_l is
    the sum of the learning rates over the steps of segment l, with momentum mu. r_l is R_l I for
    small R_l H_l, which is ``TracInCP`` with R_l as learning rates, and the inverse of H_l for
    large: an influence function whose damping is near 1 / R_l. Rows are test examples; positive is
    a proponent, and leaving the training example out raises the test loss by about score / n.

    H_l is EK-FAC: S_l and r_l are functions of its eigenvalues, in its eigenbasis; see
    ``EKFACInfluenceFunction`` for the forms of layers and the cost of the fit, which is per
    checkpoint. Test gradients that are carried through segments are written out, m x P floats.

    Args:
        segments: the number L of segments, each with as many checkpoints, or a list of their
            numbers of checkpoints in the order of the run. None for one checkpoint per segment:
            as many passes, and means over fewer checkpoints in more steps.
        rate_sums: R_l of each segment: the number of its steps times the learning rate / (1 -
            momentum), where these are constant. None reads from the checkpoints (of SGD, with
            optimizer and scheduler, or with "learning_rate", "step" and "momentum") the sums over
            the steps between the ends of two segments, and before the first. ``damping_used`` shows
            1 / R_l, in the units of the eigenvalues.
        curvature, hessian_dataset, rtol, seed, layers_without_kronecker: as in
            ``EKFACInfluenceFunction``.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: in a call, if ``segments`` does not fit the checkpoints, if the sums
            are not known from the checkpoints, or these are not in the order of the run; if
            ``rate_sums`` has another number of items.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1)
        >>> run = []
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        ...     if step % 10 == 9:
        ...         run.append({k: v.clone() for k, v in model.state_dict().items()})
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> source = SOURCE(model, train, run, loss_fn=loss, rate_sums=[10 * 0.1, 10 * 0.1])
        >>> source.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        segments: Segments | None = None,
        rate_sums: Sequence[float] | None = None,
        curvature: FisherName = "fisher",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        rtol: float = 1e-5,
        layers_without_kronecker: WithoutForm = "diagonal",
        seed: int = 0,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
            inverse=SegmentedEKFAC(
                rate_sums, segments, curvature, seed, rtol, layers_without_kronecker
            ),
            hessian_dataset=hessian_dataset,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
        # its "damping" is not chosen
        self._warns_of_damping = False

    def terms(self) -> list[Term]:
        """One term per checkpoint; all test gradients are at the last."""
        last, terms = len(self.checkpoints) - 1, []
        for number, members in enumerate(self._members):
            for index in members:
                test = replace(self.test_at(last), solve=self._carried_to(number))
                terms.append(Term(test, self.train_at(index), weight=1 / len(members)))
        return terms

    def fitted_checkpoints(self) -> Sequence[int]:
        """The ends of the segments."""
        return [members[-1] for members in self._members]

    @property
    def _members(self) -> list[range]:
        """The indices of the checkpoints of each segment."""
        assert isinstance(self.inverse, SegmentedEKFAC)
        return self.inverse.members(len(self.checkpoints))

    def _fit_data(self, index: int, loader: CheckpointLoader) -> FitData:
        """The examples at each checkpoint of the segment that ends at one, as one data set."""
        data = super()._fit_data(index, loader)
        (members,) = (own for own in self._members if own[-1] == index)
        if len(members) == 1:
            return data
        batches = SegmentBatches(self._hessian_loader, members, loader.load)
        return replace(data, examples=replace(data.examples, batches=batches))

    def _carried_to(self, number: int) -> Transform:
        """Test gradients at the end of the run, carried back through the segments after one."""
        ends = self.fitted_checkpoints()

        def apply(gradients: Gradients) -> Gradients:
            for later in reversed(ends[number + 1 :]):
                gradients = self._segment(later).carried(gradients)
            return self._segment(ends[number])(gradients)

        return apply

    def _segment(self, index: int) -> Segment:
        found = self._fitted.cache.inverses[index]
        assert isinstance(found, Segment)
        return found

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
    ) -> Tensor:
        """Refused: both gradients of an example would be needed at two checkpoints at once."""
        raise NotImplementedError(
            "SOURCE takes the test gradient at the end of the run and the training gradient at "
            "each segment; the scores of examples with themselves are the diagonal of `influence`, "
            "called with these examples"
        )
