"""The tensors of a step under one name each: weights, the optimizer's, random states.

The names of weights are those of the state dict, which never begin with a dot.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from influence_kit.training.forward_states import RandomState
from influence_kit.training.optimizers import Slots

OPTIMIZER, RANDOM = ".optimizer.", ".random."


def packed(slots: Slots, random: Sequence[RandomState | None]) -> dict[str, Tensor]:
    """Copies of the optimizer's tensors and of random states, by name."""
    tensors = {
        f"{OPTIMIZER}{slot}.{name}": value.detach().clone().cpu()
        for name, held in slots.items()
        for slot, value in held.items()
    }
    for number, state in enumerate(random):
        tensors.update({f"{RANDOM}{number}.{kind}": v for kind, v in (state or {}).items()})
    return tensors


def weights_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone."""
    return {name: value for name, value in tensors.items() if not name.startswith(".")}


def slots_in(tensors: Mapping[str, Tensor]) -> Slots:
    """The optimizer's tensors, by parameter."""
    slots: Slots = {}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            slot, _, name = key.removeprefix(OPTIMIZER).partition(".")
            slots.setdefault(name, {})[slot] = value
    return slots


def random_in(tensors: Mapping[str, Tensor]) -> dict[int, RandomState]:
    """The random states, by micro-batch."""
    found: dict[int, RandomState] = {}
    for key, value in tensors.items():
        if key.startswith(RANDOM):
            number, _, kind = key.removeprefix(RANDOM).partition(".")
            found.setdefault(int(number), {})[kind] = value
    return found
