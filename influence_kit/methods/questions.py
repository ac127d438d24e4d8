"""What questions share: their arguments, and what becomes of a pass that is in doubt."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

from influence_kit.core.objects import check_flags_of_call
from influence_kit.errors import ChangedError, InvalidArgumentError, PassAgain

Question = TypeVar("Question", bound=Callable[..., Any])
# each time one more parameter is computed in a slower way, or one more shape of batches is known
MOST = 100


class Asked(Protocol):
    """What answers questions."""

    def forget(self) -> None:
        """Drop all that is kept of earlier questions."""

    def read_otherwise(self) -> bool:
        """Take another axis for that of the examples; False where shapes leave no other."""


def starts_again(question: Question) -> Question:
    """The method, asked again where it raises ``PassAgain``, with nothing kept of before.

    So also after an error, where the shapes of batches leave a choice of where examples stand.
    """

    @wraps(question)
    def asked(self: Asked, *args: Any, **kwargs: Any) -> Any:
        check_flags_of_call(question, args, kwargs)
        reason, first = "", None
        for _ in range(MOST):
            try:
                return question(self, *args, **kwargs)
            except PassAgain as doubt:
                reason = str(doubt)
                self.forget()
            except ChangedError:
                raise  # however the examples stand
            except Exception as error:
                # an axis of the batch may have been taken for that of the examples
                first = first or error
                if not self.read_otherwise():
                    raise first from None
                self.forget()
        raise InvalidArgumentError(
            f"batches contradict one another each time that they are read ({reason}); pass data "
            "that stay the same from pass to pass"
        )

    return cast(Question, asked)


def given(inputs: Any) -> Any:
    """The inputs, which must be there."""
    if inputs is None:
        raise InvalidArgumentError("`inputs` argument is required.")
    return inputs


def check_k(k: object) -> None:
    """Refuse a k that is not a count."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k must be an int or None; got {k!r} of type {type(k).__name__}")
    if k is not None and k < 0:
        raise InvalidArgumentError(f"k must not be negative; got {k}")
