"""Threads take turns: one works with a model, and one with derivatives that torch keeps globally.

A call puts checkpoints, flags and hooks into the user's model, so that two threads that share a
model (or a part of one) would read each other's weights. Each call therefore holds a lock per
module of its model; the second thread waits, and both get the right scores. Threads with a copy of
the model each run side by side, except where products use forward-mode derivatives (curvature,
perturbation): their levels, and the choice of attention kernels, are global in torch.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()
# held around everything that uses ``torch.func.jvp`` or chooses attention kernels
FORWARD_MODE = threading.RLock()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Inside, no other thread that asks for this is at work with any module of the model.

    The same thread may ask again.
    """
    # in one order everywhere, so that no two threads wait for each other
    modules = sorted(model.modules(), key=id)
    with _GUARD:
        locks = [_LOCKS.setdefault(module, threading.RLock()) for module in modules]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
