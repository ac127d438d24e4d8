"""The source of a method's gradients: a capture that is checked repeatedly."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.data.batches import Batch, call_model, example_count, take
from influence_kit.errors import InvalidArgumentError, LabelError, PassAgain
from influence_kit.gradients import functional
from influence_kit.gradients.autograd_comparison import EXAMPLES, is_random
from influence_kit.gradients.capture import Capture
from influence_kit.gradients.check import check
from influence_kit.gradients.check_schedule import Schedule
from influence_kit.gradients.drawn_examples import drawn, drawn_of_batch, few_examples
from influence_kit.gradients.explanation import explanation
from influence_kit.gradients.own_loss_check import check_own_loss
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.spot_check import added_up, compare, compare_widely, not_yet_moving
from influence_kit.losses.loss import Loss

# the most examples of a later batch that are compared; fewer of a small batch
MOST_COMPARED = 8
Verify = Literal["repeated", "once"]


def check_verify(verify: Any) -> Verify:
    """The argument, checked.

    Raises:
        InvalidArgumentError: for anything but "repeated" and "once".
    """
    if not is_one_of(verify, ("repeated", "once")):
        raise InvalidArgumentError(f'`verify` must be "repeated" or "once"; got {shown(verify)}')
    found: Verify = verify
    return found


class GradientSource:
    """Per-example gradients of the chosen parameters, for any loss.

    The first batch of each loss is checked against autograd, which determines how gradients are
    captured. Some later batches are compared again (``Schedule`` chooses them): a few examples,
    by themselves, must have the gradients that they have in the batch. A parameter that differs
    goes to ``functional``, and the pass starts again.

    Args:
        model: the model.
        parameters: the chosen parameters by name.
        verify: "repeated", or "once" to trust the first check.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        verify: Verify = "repeated",
    ) -> None:
        self.capture = Capture(model, parameters)
        self.verify = verify
        # by loss and whether batches have several examples (a single one proves nothing): the loss,
        # the number of examples of the largest batch that was checked, and the parameters whose
        # gradient was not zero there
        self._checked: dict[tuple[int, bool], tuple[Loss, int, set[str]]] = {}
        self._schedule = Schedule()
        self._generator = torch.Generator().manual_seed(0)
        self._warned: set[str] = set()
        # the parameters whose layouts were searched again
        self._searched: set[str] = set()
        self._is_turn_of_one = False
        self._loader: Any = None

    def begin(self, loader: Any) -> None:
        """Start a new call: passes are counted from here.

        Args:
            loader: its ``current`` is the index of the checkpoint that is in the model.
        """
        self._loader = loader
        self._schedule.begin()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model has the hooks and flags for capturing gradients."""
        with self.capture.attached():
            yield

    def __call__(self, batch: Batch, loss: Loss) -> Gradients:
        """The gradients of each example of a batch, which must be on the model's device."""
        is_checked = self._first_check(batch, loss)
        with self._named():
            check_own_loss(self.capture.model, batch, loss)
        gradients = self._captured(batch, loss)
        if self.verify == "repeated":
            self._check_again(batch, loss, gradients, is_checked)
        return gradients

    def prepare(self, batch: Batch, loss: Loss, index: int | None = None) -> None:
        """Check that the loss of a batch is a sum over examples, as products of whole batches need.

        Args:
            batch: the batch, on the model's device.
            loss: the loss.
            index: the index of the batch's first example; None if the caller compares the loss
                itself (``Loss.checked_total``).
        """
        scaled = sorted(self.capture.scaled_by_frequency)
        if scaled:
            raise InvalidArgumentError(
                f"the embeddings {scaled} scale their gradients by how often an id occurs in the "
                "batch (scale_grad_by_freq=True), so products with the curvature of the loss are "
                "not sums over examples: set scale_grad_by_freq to False"
            )
        self._first_check(batch, loss)
        key = (self._checkpoint, id(loss), index)
        if not self._schedule.is_new(key):
            return
        n = example_count(batch)
        with self._named():
            check_own_loss(self.capture.model, batch, loss)
        if loss.compares and index is not None:
            where = f"the batch that begins with example {index}"
            with torch.no_grad(), self._named():
                loss.checked_total(call_model(self.capture.model, batch), batch, n, where)
        repeats = self.verify == "repeated" and n > 1
        if repeats and self._schedule.due(self._checkpoint, loss, True, (), ()):
            added_up(self.capture, take(batch, drawn(n, 6, self._generator)), loss)

    def state(self) -> Any:
        """What the checks have found so far."""
        return self.capture.settings, dict(self._checked)

    def take_state(self, state: Any) -> None:
        """Go back to what the checks had found at another time."""
        settings, checked = state
        self.capture.take_settings(settings)
        self._checked = dict(checked)

    @property
    def _checkpoint(self) -> int | None:
        return None if self._loader is None else self._loader.current

    def _captured(self, batch: Batch, loss: Loss) -> Gradients:
        try:
            with self._named():
                return self.capture(batch, loss)
        except (InvalidArgumentError, PassAgain):
            raise
        except Exception:
            # a layer whose examples are arranged differently than in earlier batches; or an error
            # of the model, which our batch dimension of an output may or may not have caused
            if not self.capture.misplaced:
                if (
                    not self.capture.without_rule
                    or self.capture.functional is functional.one_by_one
                ):
                    raise
                # ``vmap`` may work for the first batch and fail for one of another size
                self.capture.functional = functional.one_by_one
                self._start_again(())
            self._give_up(set(self.capture.misplaced), batch, loss)

    def _first_check(self, batch: Batch, loss: Loss) -> bool:
        """Check capture and loss unless that has been done; returns whether it was done now."""
        n = example_count(batch)
        distinct = min(n, EXAMPLES)
        _, seen, _ = self._checked.get((id(loss), n > 1), (loss, 0, set()))
        is_due = seen < distinct or (n > 1 and not loss.settled)
        if is_due:
            before = self.capture.settings if self._checked else None
            self._check(batch, loss, few_examples(batch, self._generator))
            if before not in (None, self.capture.settings):
                self._start_again(())
        return is_due

    def _check(self, batch: Batch, loss: Loss, few: Batch) -> None:
        key = id(loss), example_count(few) > 1
        _, seen, moving = self._checked.get(key, (loss, 0, set()))
        try:
            with self._named():
                moving = moving | check(self.capture, few, loss)
        except LabelError:  # its index is among the few examples: raise it again for the batch
            with torch.no_grad():
                loss.values(call_model(self.capture.model, batch), batch)
            raise
        except (InvalidArgumentError, PassAgain):
            raise
        except Exception as error:
            # the model's own error, or that of a batch that cannot be cut
            cause = explanation(self.capture.model, batch, loss, of_outputs_only=True)
            if few is batch or cause is None:
                raise
            raise InvalidArgumentError(cause) from error
        seen = max(seen, min(example_count(batch), EXAMPLES))
        self._checked[key] = (loss, seen, moving)
        self._warn_of_slow()

    def _check_again(
        self, batch: Batch, loss: Loss, gradients: Gradients, is_checked: bool
    ) -> None:
        """Compare a batch's gradients with those of some of its examples by themselves."""
        capture, n = self.capture, gradients.n
        outside = capture.used_outside - set(capture.without_rule)
        if outside:  # which no earlier batch has shown
            self._give_up(outside, batch, loss)
        moving = self._checked[id(loss), n > 1][2]
        seen = (self._checkpoint, loss, n > 1, capture.path, capture.shapes)
        due = self._schedule.due(*seen)
        unproven = set(capture.parameters) - moving
        awake = not_yet_moving(gradients, unproven) if unproven else None
        if awake is not None and self._schedule.may_look(awake.names):
            self._look_closely(batch, loss, awake.examples)
        # the first check has compared examples of this batch, in another order
        if not due or (is_checked and n == 1):
            return
        rows = drawn_of_batch(n, MOST_COMPARED, self._generator)
        wrong: set[str] = set()
        moved: set[str] = set()
        for some in self._turns(rows):
            found = compare(capture, gradients, batch, loss, some)
            if found[0]:
                found = compare_widely(capture, batch, loss, some) or found
            wrong, moved = wrong | found[0], moved | found[1]
        if wrong:
            self._give_up(wrong, batch, loss)
        if moved - moving:
            self._look_closely(batch, loss, rows)

    def _turns(self, rows: Tensor) -> list[Tensor]:
        """The sets of examples to compare, each in one batch.

        Together, examples may change each other as they did in the batch; alone, only few are
        compared. So the two alternate, and a batch unlike earlier ones gets both.
        """
        if len(rows) == 1 or is_random(self.capture.model):
            return [rows]
        if self._schedule.is_surprised:
            return [rows, rows[:1], rows[-1:]]
        self._is_turn_of_one = not self._is_turn_of_one
        return [rows[-1:] if self._is_turn_of_one else rows]

    def _look_closely(self, batch: Batch, loss: Loss, rows: Tensor) -> None:
        """Check examples as in the first batch: some rules have non-zero gradients only here."""
        before = self.capture.settings
        self._check(batch, loss, batch if example_count(batch) == 1 else take(batch, rows))
        if self.capture.settings != before:
            self._start_again(())

    def _give_up(self, wrong: set[str], batch: Batch, loss: Loss) -> NoReturn:
        """Compute parameters with wrong gradients in another way, and start again."""
        capture, few = self.capture, few_examples(batch, self._generator)
        if not wrong <= self._searched:  # the layout may have been wrong
            self._searched |= wrong
            before = capture.settings
            self._check(batch, loss, few)
            if capture.settings != before:
                self._start_again(())
        ruled = wrong - set(capture.without_rule)
        if ruled:
            capture.go_without(ruled)
            self._check(batch, loss, few)  # refuses a model that mixes examples
        elif capture.functional is functional.vmapped:
            capture.functional = functional.one_by_one
        else:
            raise InvalidArgumentError(
                f"{self._where}: the gradients of some examples by themselves differ from those "
                f"in their batch (parameters {sorted(wrong)[:6]}), and no reason was found; "
                "batches of one example (batch_size=1) always work"
            )
        self._start_again(wrong)

    def _start_again(self, slower: Collection[str]) -> NoReturn:
        """Start the pass again; ``slower`` are the parameters that now go without a rule."""
        listed = ", ".join(sorted(slower)[:6]) + (", ..." if len(slower) > 6 else "")
        if slower:
            warnings.warn(
                f"{self._where}: the gradients of {listed} differ from those of the examples by "
                "themselves, unlike in earlier batches: they are computed in a slower way, and the "
                "pass starts again",
                stacklevel=2,
            )
        raise PassAgain(f"{self._where}: {listed or 'the layout of examples has changed'}")

    @property
    def _where(self) -> str:
        checkpoint = self._checkpoint
        at = "" if checkpoint is None else f" at checkpoint {checkpoint}"
        return f"batch {self._schedule.seen}{at}"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Inside, errors about a batch name it."""
        self.capture.where = self._where
        yield

    def _warn_of_slow(self) -> None:
        names = [name for name in self.capture.without_rule if name not in self._warned]
        self._warned.update(names)
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
            warnings.warn(
                f"no gradient rule fits the parameters {', '.join(names[:6])}{more}: their "
                "per-example gradients are computed by torch.func, which is exact and slower; "
                "`layers` can leave them out",
                stacklevel=2,
            )
