"""Processes of tests, forked from one that has imported everything: each starts in milliseconds."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest import mock

PRELOAD = [
    "torch._dynamo",  # which torch.func imports late
    "influence_kit.gradients.store",
    "folders",
    "kills.run",
    "kills.others",
]


def context() -> ForkServerContext:
    """The context in which they are started."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    # the server is a program of its own, and knows no path that pytest has added
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return found
