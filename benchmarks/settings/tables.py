"""Tables: data sets that come with scikit-learn, drawn ones, and the UCI's of concrete."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings.data import Data, Sizes, first
from benchmarks.settings.optional import optional
from benchmarks.settings.readers.concrete import read_concrete
from benchmarks.settings.readers.files import check_folder

SPLIT_SEED = 0
TRAIN_SHARE, LARGER_SHARE = 0.8, 0.9
SPARSE_FEATURES, SPARSE_SIZES, SPARSE_SHARE, SPARSE_WRONG = 800, (400, 60), 0.06, 0.05
BRIGHTEST = 16  # of a pixel of the digits


class Table(NamedTuple):
    """Rows ``[n, d]`` and their targets: classes ``[n]``, or values ``[n, 1]``."""

    rows: Tensor
    targets: Tensor


def digits(folder: Path | None, sizes: Sizes) -> Data:
    """1797 images of 8 x 8 pixels from 0 to 1, 1437 of them for training; float32."""
    table = _shuffled("digits")
    return _split(Table((table.rows / BRIGHTEST).float(), table.targets), sizes, classes=10)


def digits_in_double(folder: Path | None, sizes: Sizes) -> Data:
    """The same in float64, for training to convergence."""
    table = _shuffled("digits")
    return _split(Table(table.rows / BRIGHTEST, table.targets), sizes, classes=10)


def breast_cancer(folder: Path | None, sizes: Sizes) -> Data:
    """569 tumours with 30 measures each, standardised; 2 classes."""
    return _split(_standardised(_shuffled("breast_cancer")), sizes, classes=2)


def wine(folder: Path | None, sizes: Sizes) -> Data:
    """178 wines with 13 measures each, standardised; 3 classes."""
    return _split(_standardised(_shuffled("wine")), sizes, classes=3)


def diabetes(folder: Path | None, sizes: Sizes) -> Data:
    """442 patients with 10 measures each; their disease's progress after a year, standardised."""
    rows, values = _standardised(_shuffled("diabetes"))
    values = (values - values.mean()) / values.std()
    return _split(Table(rows, values[:, None]), sizes, classes=1)


def concrete(folder: Path | None, sizes: Sizes) -> Data:
    """1030 mixes of concrete with 8 measures each; their strength; all standardised."""
    rows = _standardised(Table(read_concrete(check_folder(folder)), torch.empty(0))).rows.float()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    table = Table(rows[order, :-1], rows[order, -1:])
    return _split(table, sizes, classes=1)


def concrete_in_tenths(folder: Path | None, sizes: Sizes) -> Data:
    """The same table, nine tenths for training, standardised by these; kronfluence's own split.

    Rows are drawn by numpy's generator of 2004 with seed 0, as its example of UCI data does.
    """
    rows = read_concrete(check_folder(folder))
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(rows)))
    border = round(LARGER_SHARE * len(rows))
    deviation, mean = torch.std_mean(rows[order[:border]], dim=0, correction=0)
    rows = ((rows[order] - mean) / deviation).float()
    return _split(Table(rows[:, :-1], rows[:, -1:]), sizes, classes=1, border=border)


def sparse(folder: Path | None, sizes: Sizes) -> Data:
    """400 + 60 rows of 800 features that are 0 or 1, drawn; 5 % of the training labels are wrong.

    Each of 2 classes has its own probability of each feature, .06 times a uniform number.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    probabilities = SPARSE_SHARE * torch.rand(2, SPARSE_FEATURES, generator=generator)
    labels = torch.randint(0, 2, (sum(SPARSE_SIZES),), generator=generator)
    rows = torch.bernoulli(probabilities[labels], generator=generator)
    train, test = zip(rows.split(SPARSE_SIZES), labels.split(SPARSE_SIZES), strict=True)
    data = Data(first(train, sizes.train, "training"), first(test, sizes.test, "test"), outputs=2)
    return data.with_wrong_labels(SPARSE_WRONG, seed=SPLIT_SEED)[0]


def _shuffled(name: str) -> Table:
    """A data set of scikit-learn in a fixed random order, float64 and int64."""
    rows, targets = getattr(optional("sklearn.datasets"), f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Table(torch.from_numpy(rows)[order], torch.from_numpy(targets)[order])


def _standardised(table: Table) -> Table:
    """Every column with mean 0 and standard deviation 1 over all rows."""
    deviation, mean = torch.std_mean(table.rows, dim=0)
    return Table((table.rows - mean) / deviation, table.targets)


def _split(table: Table, sizes: Sizes, classes: int, border: int | None = None) -> Data:
    """The first rows, up to the border (80 %), for training, the rest for testing."""
    border = int(TRAIN_SHARE * len(table.rows)) if border is None else border
    train, test = (
        tuple(part[half] for part in table) for half in (slice(border), slice(border, None))
    )
    return Data(
        first(train, sizes.train, "training"), first(test, sizes.test, "test"), outputs=classes
    )
