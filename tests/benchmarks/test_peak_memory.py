"""The memory that a call adds to a process."""

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.peak_memory import added_mebibytes


def test_memory_that_a_call_adds_is_seen():
    for _ in range(2):  # malloc keeps a block of this size when it is freed the second time
        torch.ones(31 * 2**18)
    added = added_mebibytes(lambda: torch.ones(30 * 2**18).sum())  # 30 MiB
    assert added is None or 25 < added < 60  # None: not Linux


@pytest.mark.parametrize("missing", ["FORGET_PEAK", "STATUS"])
def test_where_nothing_tells_memory_is_unknown(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(peak_memory, "FORGET_PEAK", tmp_path / "clear_refs")
    monkeypatch.setattr(peak_memory, missing, tmp_path / "none" / "none")
    assert added_mebibytes(lambda: None) is None
