"""The demo: train a digit classifier, explain its decisions, find the wrong labels it learned.

``run`` runs the whole demo; its steps are functions that return data, for tutorials and tests.
"""

from influence_kit.demo.digits import (
    Digits,
    Settings,
    accuracy,
    flip_labels,
    load_digits_split,
    make_network,
    one_thread,
    train_network,
)
from influence_kit.demo.findings import Detection, Explained, choose_tests, detect, explain
from influence_kit.demo.job import Result, run

__all__ = [
    "Detection",
    "Digits",
    "Explained",
    "Result",
    "Settings",
    "accuracy",
    "choose_tests",
    "detect",
    "explain",
    "flip_labels",
    "load_digits_split",
    "make_network",
    "one_thread",
    "run",
    "train_network",
]
