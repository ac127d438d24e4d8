"""How far an optimizer moves the weights per step under a steady gradient."""

from collections.abc import Sequence
from typing import Any

from influence_kit.core.arguments import check_number, is_one_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.applied import State
from influence_kit.learning_rates.rate import NONE, STORED
from influence_kit.learning_rates.training_record import MOMENTUM, TrainingRecord

# settings that parameter groups of torch.optim.SGD have, and settings that rule it out (LARS, Muon)
OF_SGD, OF_OTHERS = {"momentum", "dampening"}, {"betas", "eps"}


def only_sgd(record: TrainingRecord) -> None:
    """Refuse an optimizer whose steps are not along the gradient, or that is not known.

    A checkpoint with a stored learning rate and without an optimizer is assumed to be from SGD.

    Raises:
        InvalidArgumentError: for such an optimizer, and for several optimizers.
    """
    groups, count = record.groups, len(record.state.optimizers)
    if count > 1:
        raise InvalidArgumentError(f"it holds {count} optimizers, whose rates do not form one sum")
    if any("betas" in group for group in groups):
        raise InvalidArgumentError(
            "its optimizer is Adam, AdamW or similar (it has 'betas'), which divides each entry "
            "of the gradient by the root of its mean square: a step is not the learning rate times "
            "the gradient, and the sum of the rates is not in units of one over the curvature"
        )
    for group in groups:
        if not set(group) >= OF_SGD or set(group) & OF_OTHERS:
            raise InvalidArgumentError(
                "its optimizer is not torch.optim.SGD, so a step may differ from the learning rate "
                f"times the gradient (its settings are {sorted(group)})"
            )
    if not groups and record.rate.kind not in (STORED, NONE):
        raise InvalidArgumentError(
            "it lacks the state of its optimizer, so it is not known whether that is SGD, nor its "
            f"momentum; it holds {', '.join(record.found)}"
        )


def gain_of(groups: Sequence[State], stored: Any = None) -> float:
    """How far a steady gradient moves the weights per step, in units of the learning rate.

    1 / (1 - momentum), times 1 - dampening.

    Args:
        groups: the parameter groups of SGD.
        stored: the momentum that a user stored, which takes precedence.

    Raises:
        InvalidArgumentError: if groups have several values; for a momentum outside [0, 1).
    """
    own = sorted({float(group.get("momentum", 0.0)) for group in groups})
    dampening = {float(group.get("dampening", 0.0)) for group in groups}
    if stored is None and (len(own) > 1 or len(dampening) > 1):
        raise InvalidArgumentError(
            f"its parameter groups have momentum {own} and dampening {sorted(dampening)}; "
            "store one 'momentum' with the weights"
        )
    if stored is not None:
        given = float(stored) if is_one_number(stored) else stored
        return 1 / (1 - check_number(given, MOMENTUM, least=0, below=1))
    momentum = own[0] if own else 0.0
    return (1 - (dampening.pop() if momentum else 0.0)) / (1 - momentum)
