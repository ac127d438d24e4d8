"""Pictures and tables of results; each picture is a ``matplotlib.figure.Figure``, never shown."""

from influence_kit.tables import text_table
from influence_kit.viz.comparison import comparison
from influence_kit.viz.curves import detection_curves
from influence_kit.viz.images import proponents_and_opponents, suspects

__all__ = [
    "comparison",
    "detection_curves",
    "proponents_and_opponents",
    "suspects",
    "text_table",
]
