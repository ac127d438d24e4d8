"""The recorded runs of ``MAGIC``, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from influence_kit.errors import InvalidArgumentError
from influence_kit.training.optimizers import known_kind
from influence_kit.training.recipe import Recipe
from influence_kit.training.step import Step, steps_of
from influence_kit.training.trace import TrainingTrace


@dataclass(frozen=True)
class Run:
    """One recorded run.

    Args:
        trace: the record.
        steps: its steps.
        recipes: how they were taken.
        last: over how many states at its end the measurement is averaged.
    """

    trace: TrainingTrace
    steps: Sequence[Step]
    recipes: Sequence[Recipe]
    last: int

    @property
    def measured(self) -> list[int]:
        """The numbers of steps after which the measurement is taken, the end first."""
        return [len(self.steps) - back for back in range(self.last)]

    @property
    def measured_states(self) -> list[dict[str, Tensor]]:
        """The weights there."""
        return [self.trace.final, *(self.trace[n]["state_dict"] for n in self.measured[1:])]

    @property
    def trained(self) -> set[str]:
        """The names of the parameters that some step changed."""
        return {name for recipe in self.recipes for name in recipe.trained}

    @property
    def largest_batch(self) -> int:
        """The most examples of one backward pass."""
        return max(
            max(r.micro_batches or [len(s.indices)])
            for r, s in zip(self.recipes, self.steps, strict=True)
        )

    @property
    def slots(self) -> int:
        """How many tensors of its size the optimizer holds for a parameter, at most."""
        return max(_slots(recipe.optimizer, g) for recipe in self.recipes for g in recipe.groups)


def _slots(optimizer: str | None, options: Mapping[str, Any]) -> int:
    if optimizer == "SGD":
        return int(options["momentum"] != 0)
    return 3 if options["amsgrad"] else 2


def check_traces(trace: Any, count: int, last: int) -> list[Run]:
    """The argument ``trace``: one recorded run, or several."""
    traces = [trace] if isinstance(trace, TrainingTrace) else trace
    several = isinstance(traces, list | tuple) and len(traces) > 0
    if not several or not all(isinstance(one, TrainingTrace) for one in traces):
        raise InvalidArgumentError(
            "`trace` must be a TrainingTrace, which records what it takes to repeat a run, or a "
            f"list of them; got a {type(trace).__name__}"
        )
    return [_checked(one, count, last) for one in traces]


def _checked(trace: TrainingTrace, count: int, last: int) -> Run:
    steps = steps_of(trace, count, of_groups=True)
    if last > len(steps):
        raise InvalidArgumentError(
            f"`last` must be at most {len(steps)}, the number of steps of the trace; got {last}"
        )
    recipes = [trace.recipe(number) for number in range(len(steps))]
    for recipe in recipes:
        known_kind(recipe)
    return Run(trace, steps, recipes, last)


def trained_by(runs: Sequence[Run]) -> Callable[..., Mapping[str, nn.Parameter]]:
    """A function that returns the parameters of a model that the runs have trained."""

    def select(model: nn.Module, layers: Any) -> dict[str, nn.Parameter]:
        trained, own = set().union(*(run.trained for run in runs)), dict(model.named_parameters())
        missing = sorted(trained - own.keys())
        if missing or not trained:
            raise InvalidArgumentError(
                f"the run of the trace trained {missing[:3] or 'no parameters'}, and the model has "
                f"the parameters {list(own)[:3]}: pass the model that was trained"
            )
        pairs = sorted(name for name in trained if own[name].is_complex())
        if pairs:
            raise InvalidArgumentError(
                f"the parameters {pairs[:3]} are complex, and MAGIC carries derivatives through "
                "real ones only: train their real and imaginary parts as two parameters"
            )
        _refuse_changed_buffers(model, runs)
        return {name: p for name, p in own.items() if name in trained}

    return select


def _refuse_changed_buffers(model: nn.Module, runs: Sequence[Run]) -> None:
    """Refuse runs in which buffers changed: the statistics of BatchNorm, say."""
    for run in runs:
        evaluated = set(run.recipes[0].evaluated)
        first, final = run.trace[0]["state_dict"], run.trace.final
        changed = [
            *(n for n, _ in model.named_buffers() if n in final and not first[n].equal(final[n])),
            # the state before the only step may be that after its forward pass
            *(n for n, module in model.named_modules() if n not in evaluated and _counts(module)),
        ]
        if changed:
            raise InvalidArgumentError(
                f"training changed the buffers of '{changed[0]}' (running statistics of BatchNorm, "
                "say), through which no derivative is carried: train with such layers in "
                "evaluation mode (module.eval()), or with GroupNorm or LayerNorm in their stead"
            )


def _counts(module: nn.Module) -> bool:
    """Whether a module in training mode keeps running statistics."""
    return isinstance(module, _NormBase) and module.running_mean is not None
