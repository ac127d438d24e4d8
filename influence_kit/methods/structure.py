"""The modules and parameters of a model, to detect that it has been changed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy


class Structure:
    """The modules and parameters of a model, as objects by name.

    Args:
        model: the model, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        # references keep the objects alive: the id of a deleted object may be used again
        self._modules = {
            name: (module, type(module))
            for name, module in model.named_modules(remove_duplicate=False)
        }
        self._parameters = {
            name: (parameter, _kind(parameter))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def change(self, model: nn.Module) -> str | None:
        """How the model differs from this, in words; None if it does not."""
        now = Structure(model)
        for what, before, after in (
            ("module", self._modules, now._modules),
            ("parameter", self._parameters, now._parameters),
        ):
            for name in {**before, **after}:
                if name not in before or name not in after:
                    return f"{what} '{name}' was {'added' if name in after else 'removed'}"
                (old, kind), (new, other) = before[name], after[name]
                if old is not new:
                    return f"{what} '{name}' was replaced"
                if kind != other:
                    return f"{what} '{name}' was {_text(kind)} and is {_text(other)}"
        return None


def _kind(parameter: nn.Parameter) -> object:
    if is_lazy(parameter):
        return "uninitialized"
    return list(parameter.shape), parameter.dtype, parameter.device


def _text(kind: object) -> str:
    if isinstance(kind, type):
        return f"a {kind.__name__}"
    if isinstance(kind, tuple):
        shape, dtype, device = kind
        return f"{shape} of {dtype} on {device}"
    return str(kind)


@contextmanager
def unchanged_by_errors(owner: object) -> Iterator[None]:
    """A context whose errors leave the attributes of an object as they were."""
    before = dict(vars(owner))
    try:
        yield
    except BaseException:
        vars(owner).clear()
        vars(owner).update(before)
        raise
