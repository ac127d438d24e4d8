"""The curvature of a model's loss, and its inverses: the parts of influence functions."""

from influence_kit.curvature.conjugate_gradients import ConjugateGradients
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.kronecker_curvature import EKFAC, KFAC
from influence_kit.curvature.mean_inverse import MeanOfInverses
from influence_kit.curvature.operator_inverses import Explicit, Nystrom
from influence_kit.curvature.stochastic_series import LiSSA

__all__ = [
    "EKFAC",
    "KFAC",
    "ConjugateGradients",
    "Explicit",
    "FitData",
    "InverseCurvature",
    "LiSSA",
    "MeanOfInverses",
    "Nystrom",
    "State",
]
