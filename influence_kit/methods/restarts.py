"""Public calls that start again when a pass finds an earlier assumption wrong; shared checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

from influence_kit.core.arguments import shown
from influence_kit.core.objects import check_flags_of_call
from influence_kit.errors import ChangedError, InvalidArgumentError, PassAgain

Call = TypeVar("Call", bound=Callable[..., Any])
# each restart moves one more parameter to a slower way, or adds one more shape of batches
MOST = 100


class Restartable(Protocol):
    """An object whose calls can start again."""

    def forget(self) -> None:
        """Drop everything that is cached from earlier calls."""

    def read_otherwise(self) -> bool:
        """Take another dimension as that of the examples; False if the shapes allow no other."""


def starts_again(call: Call) -> Call:
    """The method, called again with empty caches when it raises ``PassAgain``.

    Also after an error, if the shapes of batches allow another dimension of the examples.
    """

    @wraps(call)
    def repeated(self: Restartable, *args: Any, **kwargs: Any) -> Any:
        check_flags_of_call(call, args, kwargs)
        reason, first = "", None
        for _ in range(MOST):
            try:
                return call(self, *args, **kwargs)
            except PassAgain as doubt:
                reason = str(doubt)
                self.forget()
            except ChangedError:
                raise  # another dimension of the examples would not change it
            except Exception as error:
                # a wrong dimension may have been taken as that of the examples
                first = first or error
                if not self.read_otherwise():
                    raise first from None
                self.forget()
        raise InvalidArgumentError(
            f"batches contradict one another each time that they are read ({reason}); pass data "
            "that stay the same from pass to pass"
        )

    return cast(Call, repeated)


def given(inputs: Any) -> Any:
    """The inputs; an error if they are None."""
    if inputs is None:
        raise InvalidArgumentError("`inputs` argument is required.")
    return inputs


def check_k(k: object) -> None:
    """Refuse a k that is not a non-negative int or None."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k must be an int or None; got {shown(k)} of type {type(k).__name__}")
    if k is not None and k < 0:
        raise InvalidArgumentError(f"k must not be negative; got {k}")


def refuse_tokens(name: str, per_token: object, doc_ids: object = None) -> None:
    """Refuse scores by token, in a method that does not have them."""
    if per_token is not None or doc_ids is not None:
        raise NotImplementedError(
            f"{name} has no scores by token (`per_token`, `doc_ids`): they are parts of inner "
            "products of gradients; TracInCP, GradDot, GradCos, influence functions, LoGra and "
            "TRAK have them"
        )
