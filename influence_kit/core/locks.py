"""Locks: one thread at a time works with a model, and one with forward-mode derivatives.

A call loads checkpoints into the user's model and sets flags and hooks there, so two threads that
share a model (or a part of one) would read each other's weights. Each call therefore holds one lock
per module of its model; the second thread waits, and both get the right scores. Threads that each
have their own copy of the model run side by side, except where products use forward-mode
derivatives (curvature, perturbation): their levels, and the choice of attention kernels, are global
in torch.
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
    """Inside, no other thread that uses this context works with any module of the model.

    The same thread may enter it again.
    """
    # every thread takes the locks in the same order, so that no two wait for each other
    modules = sorted(model.modules(), key=id)
    with _GUARD:
        locks = [_LOCKS.setdefault(module, threading.RLock()) for module in modules]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
