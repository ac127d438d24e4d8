"""The loop over data: how often checkpoints are loaded and data is read, and what is held."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Examples
from contract import assert_close, build, scores
from torch import nn
from torch.utils.data import DataLoader

from influence_kit import TracInCP
from influence_kit.scoring.stream import chunks

MLP = CASES["mlp"]


class Counting:
    """A load function that counts, and a re-iterable of batches that counts its passes."""

    def __init__(self) -> None:
        self.loads: list[float] = []
        self.passes = 0

    def load(self, model: nn.Module, checkpoint: dict[str, Any]) -> float:
        self.loads.append(checkpoint["learning_rate"])
        model.load_state_dict(checkpoint["state_dict"])
        return checkpoint["learning_rate"]

    def __iter__(self) -> Iterator[Any]:
        x, y = MLP.train
        for i in range(0, MLP.n, 2):
            yield x[i : i + 2], y[i : i + 2]
        self.passes += 1  # the look at the first batch is none


def counted() -> tuple[Counting, TracInCP]:
    counting = Counting()
    influence = TracInCP(MLP.model(), counting, MLP.checkpoints(), counting.load, loss_fn=MLP.loss)
    return counting, influence


@pytest.mark.parametrize("call", ["scores", "top", "self", "layers"])
def test_each_checkpoint_is_loaded_once_in_all_when_scores_fit(call: str) -> None:
    counting, influence = counted()
    {
        "scores": lambda: influence.influence(MLP.test),
        "top": lambda: influence.influence(MLP.test, k=2),
        "self": influence.self_influence,
        "layers": lambda: influence.influence_by_layer(MLP.test),
    }[call]()
    assert counting.loads == [0.3, 0.05, 1.7]
    assert counting.passes == 1


def test_each_checkpoint_is_loaded_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(build("TracInCP", MLP), MLP.test)
    monkeypatch.setattr("influence_kit.scoring.stream.CHUNK_BYTES", 1)
    counting, influence = counted()
    assert_close(influence.influence(MLP.test), expected)
    batches = (MLP.n + 1) // 2
    assert len(counting.loads) == 3 * batches  # here a chunk is a batch
    assert counting.passes == 1


def test_one_checkpoint_is_loaded_once_however_many_chunks() -> None:
    counting, influence = counted()
    influence.checkpoints = MLP.checkpoints()[:1]
    influence.influence(MLP.test, k=2)
    assert counting.loads == [0.3]


def test_outer_loop_by_checkpoints_reads_the_data_once_a_checkpoint() -> None:
    counting, influence = counted()
    influence.self_influence(outer_loop_by_checkpoints=True)
    assert counting.loads == [0.3, 0.05, 1.7]
    assert counting.passes == 3


def test_chunks_group_batches_up_to_a_number_of_rows() -> None:
    batches = [(torch.zeros(n, 1), torch.zeros(n)) for n in (3, 3, 3, 5, 1)]
    groups = [([start for start, _ in chunk], last) for chunk, last in chunks(batches, 6, None)]
    assert groups == [([0, 3], False), ([6], False), ([9, 14], True)]
    ones = [[start for start, _ in chunk] for chunk, _ in chunks(batches, None, 1)]
    assert ones == [[0], [3], [6], [9], [14]]


def test_examples_of_different_lengths() -> None:
    """Batches padded to their own longest sequence: the forms are joined over lengths."""
    case = CASES["gpt"]
    ids = torch.randint(0, 7, (6, 6), generator=torch.Generator().manual_seed(0))
    ragged = [
        (ids[:2, :3], ids[:2, 1:4]),
        (ids[2:4, :5], ids[2:4, 1:6]),
        (ids[4:, :2], ids[4:, 1:3]),
    ]
    whole = build("TracInCP", case, data=Examples(case.train))
    rows = [scores(whole, batch) for batch in ragged]
    assert_close(scores(whole, DataLoader(ragged, batch_size=None)), torch.cat(rows))
    columns = build("TracInCP", case, data=DataLoader(ragged, batch_size=None))
    assert_close(scores(columns, case.train), torch.cat(rows).T)


MEMORY = """
import resource, torch
from torch import nn
from torch.utils.data import Dataset, DataLoader
from influence_kit import TracInCP

class Rows(Dataset):
    def __len__(self): return {n}
    def __getitem__(self, i): return i

def collate(places):
    places = torch.tensor(places)
    return torch.sin(places[:, None] * torch.arange(1.0, 11.0)), places % 5

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Linear(10, 5)
states = [nn.Linear(10, 5).state_dict() for _ in range(2)]
loader = DataLoader(Rows(), batch_size=1024, collate_fn=collate)
influence = TracInCP(model, loader, states, loss_fn=nn.CrossEntropyLoss())
test = collate(list(range({m})))
influence.influence((test[0][:5], test[1][:5]), k=10)  # everything is loaded and warm
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
before = peak()
found = influence.influence(test, k=10)
print(peak() - before, found.indices.shape[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc of Linux")
def test_top_k_needs_a_tenth_of_the_score_matrix() -> None:
    n, m = 200_000, 200
    script = MEMORY.format(n=n, m=m)
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    added, k = map(int, printed.split())
    assert k == 10
    assert added < n * m * 4 / 10
