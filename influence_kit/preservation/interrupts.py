"""Ctrl-C while a model is restored is delivered when the model is whole again.

While a model is in use, a SIGINT handler wraps the user's. It passes interrupts on, except where
the model would stay changed: in functions that are ``uninterrupted``, at whose end they are
delivered, and inside contextlib between a ``with`` block and the restoration, where they are tried
again a moment later. None is lost. Only the main thread runs handlers of signals; other threads
need nothing.
"""

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
MOMENT = 0.02  # seconds until an interrupt that came at a bad time is tried again
MOST_REPEATS = 100
_MANAGER: Any = contextlib._GeneratorContextManager
_MANAGERS = {_MANAGER.__enter__.__code__, _MANAGER.__exit__.__code__}


class Interrupts:
    """The handler of SIGINT while models are in use."""

    def __init__(self) -> None:
        self._users: Any = None
        self._depth = 0
        self._pending: list[int] = []
        # for each model in use, the frames that were running when its use began
        self._in_use: dict[int, list[FrameType]] = {}
        self._held: CodeType | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Pass an interrupt on to the user's handler, now or later."""
        if self._is_bad_time(frame):
            self._pending.append(signum)
            # no threading.Thread: its locks might be held by the code that was interrupted
            _thread.start_new_thread(self._try_again, ())
        else:
            self._users(signum, frame)

    def use(self, user: object, frame: FrameType | None) -> None:
        """Stay installed for the use of a model that begins in a frame."""
        if threading.current_thread() is not threading.main_thread():
            return
        frames = self._in_use[id(user)] = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back

    def leave(self, user: object) -> None:
        """The use of a model has ended."""
        self._in_use.pop(id(user), None)

    def hold(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function, which interrupts do not stop; see ``uninterrupted``."""

        @wraps(function)
        def held(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self._begin()
            try:
                return function(*args, **kwargs)
            finally:
                self._end()

        code: Any = held
        self._held = code.__code__  # the same of all functions
        return held

    def _begin(self) -> None:
        """Install itself around the user's handler, unless that is not a function."""
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and handler is not self:
            self._users = handler
            signal.signal(signal.SIGINT, self)
        self._depth += 1

    def _end(self) -> None:
        """Deliver held interrupts; after the last use, install the user's handler again."""
        self._depth -= 1
        if self._depth:
            return
        try:
            handler: Any = signal.getsignal(signal.SIGINT)
            if not self._in_use and handler is self:
                signal.signal(signal.SIGINT, self._users)
        finally:
            self._deliver()

    def _deliver(self) -> None:
        try:
            if self._pending:
                self._users(self._pending.pop(), None)
        finally:
            if self._pending:
                self._deliver()

    def _try_again(self) -> None:
        time.sleep(MOMENT)
        if self._pending:
            self._pending.pop()
            _thread.interrupt_main()

    def _is_bad_time(self, frame: FrameType | None) -> bool:
        """Whether the model would stay changed if the frame was left now."""
        while frame is not None:
            if frame.f_code is self._held:
                return True
            if frame.f_code in _MANAGERS:
                generator = getattr(frame.f_locals.get("self"), "gen", None)
                if generator is not None and self._would_skip(generator):
                    return True
            frame = frame.f_back
        return False

    def _would_skip(self, generator: Any) -> bool:
        """Whether a generator is suspended inside a ``with`` that restores a model."""
        own = generator.gi_frame
        in_use = any(own is frame for frames in self._in_use.values() for frame in frames)
        return in_use and not generator.gi_running


INTERRUPTS = Interrupts()


def uninterrupted(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, during which Ctrl-C waits: each is delivered when the function has ended.

    If the user's handler of SIGINT is not a Python function, interrupts are not held back.
    """
    return INTERRUPTS.hold(function)


def to_its_end(function: Callable[[], object]) -> None:
    """Run a function that may be repeated, again from its start if it raises KeyboardInterrupt.

    The interrupt is raised afterwards: other threads and extensions can raise it without a signal.
    """
    interrupt: KeyboardInterrupt | None = None
    for _ in range(MOST_REPEATS):
        try:
            function()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
