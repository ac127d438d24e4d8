"""What must hold around every call: no time, no memory, no change beyond bounds.

A call that breaks one of these ends in an exception that is no ``Exception``, so that no code takes
it for an error of its own.
"""

import os
import resource
import signal
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# seconds at work, and seconds in all: a call that waits is not at work, nor is one whose turn it is
# not on a busy machine
LIMIT, PATIENCE = 5, 40
GIB = 2**30
MOST_MEMORY = 2 * GIB
# beyond this the system refuses memory, before the machine has none left
REFUSED_MEMORY = 4 * GIB
# files of the user's in the folder where a call runs, some with names as ours have them
FILES = {
    "notes.txt": b"of the user",
    "thesis.part": b"the only copy",
    "manifest.json": b"{}",
    "step-0.safetensors": b"of the user, too",
}


class Hung(BaseException):
    """Raised in a call that takes too long."""


class Changed(BaseException):
    """Raised after a call that changed the objects or files that it was given."""


class TooLarge(BaseException):
    """Raised after a call that took too much memory."""


class LetIn(BaseException):
    """Raised after a call that returned something wrong."""


@contextmanager
def watched(given: Mapping[str, Any], changed: Collection[str] = ()) -> Iterator[None]:
    """Around a call, in a folder of its own with files of the user's.

    Args:
        given: its arguments.
        changed: those that the call is there to change.
    """
    kept = {name: value for name, value in given.items() if name not in changed}
    with warnings.catch_warnings(), in_a_folder(), unchanged(kept), in_bounds():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def afterwards(check: Callable[[], None]) -> Iterator[None]:
    """Check after what is inside, also after an error; not after something worse than an error."""
    try:
        yield
    except Exception:
        check()
        raise
    check()


@contextmanager
def in_bounds() -> Iterator[None]:
    """Refuse a call that takes too long, or too much memory."""
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    before = _resident(reset=True)

    def check() -> None:
        no_limit()
        more = _resident() - before
        if more > MOST_MEMORY:
            raise TooLarge(f"{more / GIB:.1f} GiB")

    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        with afterwards(check):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise TooLarge(str(error)[:100]) from error
        raise
    finally:
        no_limit()


def no_limit() -> None:
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _hang(*_: Any) -> None:
    raise Hung


def _resident(reset: bool = False) -> int:
    """The most memory in bytes that this process had since the last reset; where Linux says so."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def limit_memory() -> None:
    """From now on the system refuses this process more than what it has and some more."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + REFUSED_MEMORY, hard))


@contextmanager
def in_a_folder() -> Iterator[None]:
    """A working directory for what a text as a folder's name creates, with files of the user's."""
    before = os.getcwd()
    with TemporaryDirectory() as folder:

        def check() -> None:
            paths = {name: Path(folder, name) for name in FILES}
            lost = [name for name, path in paths.items() if _is_other(path, FILES[name])]
            if lost:
                raise Changed(f"the user's {lost[0]}")

        for name, text in FILES.items():
            Path(folder, name).write_bytes(text)
        os.chdir(folder)
        try:
            with afterwards(check):
                yield
        finally:
            os.chdir(before)


def _is_other(path: Path, text: bytes) -> bool:
    return path.is_symlink() or not path.is_file() or path.read_bytes() != text


def looks(item: Any) -> Any:
    """What a user sees of a model, a data set or a dict of tensors, as plain values."""
    if isinstance(item, nn.Module):
        flags = [(module.training, len(vars(module))) for module in item.modules()]
        grads = [(p.requires_grad, p.grad is None) for p in item.parameters()]
        return flags, grads, looks(item.state_dict())
    if isinstance(item, TensorDataset):
        return looks(item.tensors)
    if isinstance(item, Mapping):
        return {str(key): looks(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        # what is nested too deeply for recursion is looked at from outside
        return [len(value) if isinstance(value, list) else looks(value) for value in item]
    if isinstance(item, np.ndarray):
        return item.dtype, item.shape, str(item.tolist())
    if isinstance(item, Tensor):
        kind = (item.dtype, tuple(item.shape), item.requires_grad)
        known = not (item.is_meta or item.is_sparse)
        return (kind, str(item.tolist())) if known else kind
    return repr(item) if isinstance(item, int | float | str) else None


@contextmanager
def unchanged(given: Mapping[str, Any]) -> Iterator[None]:
    """Refuse a call that changes what it was given, or the state of torch's random numbers."""
    torch.manual_seed(11)
    before, state = looks(given), torch.get_rng_state()

    def check() -> None:
        after = looks(given)
        changed = [key for key in given if after[key] != before[key]]
        if not torch.equal(torch.get_rng_state(), state):
            changed.append("the random state")
        if changed:
            raise Changed(", ".join(changed))

    with afterwards(check):
        yield
