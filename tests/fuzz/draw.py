"""What one seed draws from, and what is noted of it."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Draw(random.Random):
    """A random source that keeps notes.

    ``tags`` says which kinds were drawn; ``excuses`` why a named error is a right answer, too.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.tags: list[str] = []
        self.excuses: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def note(self, tag: str) -> None:
        if tag not in self.tags:
            self.tags.append(tag)

    def excuse(self, reason: str) -> None:
        if reason not in self.excuses:
            self.excuses.append(reason)

    def one(self, choices: Sequence[T], weights: Sequence[float] | None = None) -> T:
        return self.choices(choices, weights)[0]

    def call(self, makers: dict[str, tuple[float, Callable[..., T]]], *given: Any) -> T:
        """Draw one of the named makers by its weight, note its name, and call it."""
        name = self.one(list(makers), [weight for weight, _ in makers.values()])
        self.note(name)
        return makers[name][1](self, *given)
