"""A question that is asked again, where its own pass shows that what was computed is in doubt."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from influence_kit.errors import InvalidArgumentError, PassAgain
from influence_kit.methods.base import InfluenceBase

Question = TypeVar("Question", bound=Callable[..., Any])
# each time one more parameter is computed in a slower way, or one more shape of batches is known
MOST = 100


def starts_again(question: Question) -> Question:
    """The method, asked again where it raises ``PassAgain``, with nothing kept of before.

    So also after an error, where the shapes of batches leave a choice of where examples stand.
    """

    @wraps(question)
    def asked(self: InfluenceBase, *args: Any, **kwargs: Any) -> Any:
        reason, first = "", None
        for _ in range(MOST):
            try:
                return question(self, *args, **kwargs)
            except PassAgain as doubt:
                reason = str(doubt)
                self.forget()
            except (ValueError, RuntimeError, IndexError) as error:
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
