"""States of optimizers and schedulers that are not as torch saves them: one clear error."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from influence_kit.errors import InvalidArgumentError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# what reading a value of another kind raises; a state has too many entries to check each before
OTHER_KINDS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    NameError,  # a loop over nothing
)


def of_given_states(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which reads states that users give, with a clear error for damaged ones."""

    @wraps(function)
    def read(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except InvalidArgumentError:
            raise
        except OTHER_KINDS as error:
            raise InvalidArgumentError(
                f"the state of an optimizer or scheduler {_place(args)} is not as torch saves it "
                f"({type(error).__name__}: {error}), so its learning rate is not known; store it "
                "with the weights as 'learning_rate', without that state, or pass a "
                "`checkpoints_load_func` that returns it"
            ) from error

    return read


def _place(args: tuple[Any, ...]) -> str:
    path = next((arg for arg in args if isinstance(arg, str | Path)), None)
    return "of a checkpoint in memory" if path is None else f"of '{path}'"
