"""Figures, tables and a web page of results.

Each figure is a ``matplotlib.figure.Figure``, which is returned and not shown.
"""

from influence_kit.core.tables import text_table
from influence_kit.viz.comparison_figure import comparison
from influence_kit.viz.curves import detection_curves
from influence_kit.viz.images import proponents_and_opponents, suspects
from influence_kit.viz.layers import layer_bars
from influence_kit.viz.matrix import feature_matrix
from influence_kit.viz.ranking import self_influence_ranking
from influence_kit.viz.report import Report
from influence_kit.viz.scatter import predicted_and_actual
from influence_kit.viz.texts import influential_texts
from influence_kit.viz.token_heat import token_heat

__all__ = [
    "Report",
    "comparison",
    "detection_curves",
    "feature_matrix",
    "influential_texts",
    "layer_bars",
    "predicted_and_actual",
    "proponents_and_opponents",
    "self_influence_ranking",
    "suspects",
    "text_table",
    "token_heat",
]
