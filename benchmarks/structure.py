"""How far a reader goes: files of the package that run for a call, and changes of file on the way.

``python -m benchmarks.structure`` prints both for TracInCP, EK-FAC and TRAK with a store, and the
lines of the package. A change of file is counted where a function of an object calls another of the
same object that stands in another file.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import TRAK, EKFACInfluenceFunction, TracInCP

ROOT = str(Path(influence_kit.__file__).parent)


class Trace:
    """Files of the package that run, and calls within one object from one file to another."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.changes: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Of ``sys.setprofile``."""
        here = frame.f_code.co_filename
        if event != "call" or not here.startswith(ROOT):
            return
        self.files.add(here)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(ROOT):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename == here:
            return
        own = frame.f_locals.get("self")
        if own is not None and own is caller.f_locals.get("self"):
            there = caller.f_code
            self.changes.add(
                (f"{there.co_filename}:{there.co_name}", f"{here}:{frame.f_code.co_name}")
            )


def traced(make: Callable[[], Any], batch: Any) -> Trace:
    """The trace of a method that is made and asked."""
    trace, method = Trace(), make()
    sys.setprofile(trace)
    try:
        method.influence(batch)
    finally:
        sys.setprofile(None)
    return trace


def main() -> None:
    """Print the figures."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    data, states, loss = TensorDataset(x, y), [model.state_dict()], nn.CrossEntropyLoss()
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {
            "TracInCP": lambda: TracInCP(model, data, states, loss_fn=loss),
            "EK-FAC": lambda: EKFACInfluenceFunction(model, data, states, loss_fn=loss),
            "TRAK with a store": lambda: TRAK(
                model, data, states, projection_dim=8, store=f"{folder}/store"
            ),
        }
        for name, make in calls.items():
            trace = traced(make, (x[:5], y[:5]))
            print(f"{name}: {len(trace.files)} files, {len(trace.changes)} changes of file")
    lines = sum(len(path.read_text().splitlines()) for path in Path(ROOT).rglob("*.py"))
    print(f"{lines} lines")


if __name__ == "__main__":
    main()
