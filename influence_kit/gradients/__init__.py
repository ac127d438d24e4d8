"""Per-example gradients of a loss: one form per parameter, captured layer by layer."""

from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.gradients.rules import gradient_rule

__all__ = [
    "Convolved",
    "Dense",
    "Factored",
    "FeatureMap",
    "Form",
    "Gradients",
    "Rows",
    "gradient_rule",
]
