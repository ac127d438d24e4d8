"""Values of training examples, from models fitted on parts of the training set."""

from influence_kit.valuation.banzhaf import DataBanzhaf
from influence_kit.valuation.out_of_bag import DataOOB
from influence_kit.valuation.permutations import BetaShapley, TMCShapley
from influence_kit.valuation.refits import Values

__all__ = ["BetaShapley", "DataBanzhaf", "DataOOB", "TMCShapley", "Values"]
