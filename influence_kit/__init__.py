"""Training-data attribution for PyTorch: which training examples made my model do this?"""

from influence_kit.checkpoints.discovery import checkpoint_table, load_checkpoint
from influence_kit.checkpoints.dropout_ensemble import dropout_ensemble
from influence_kit.checkpoints.selection import select_checkpoints
from influence_kit.errors import CurvatureError
from influence_kit.losses.answers import SequenceLogProbability, prompt_and_answer
from influence_kit.losses.margins import classification_margin
from influence_kit.losses.targets import TokenDifference, TokenLogit, TokenLogProbability
from influence_kit.methods.contrast import contrast
from influence_kit.methods.dvemb.dvemb import DVEmb
from influence_kit.methods.influence_functions.arnoldi import ArnoldiInfluenceFunction
from influence_kit.methods.influence_functions.conjugate_gradients import CGInfluenceFunction
from influence_kit.methods.influence_functions.datainf import DataInf
from influence_kit.methods.influence_functions.explicit import ExplicitInfluenceFunction
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.influence_functions.kfac import (
    EKFACInfluenceFunction,
    KFACInfluenceFunction,
)
from influence_kit.methods.influence_functions.lissa import LiSSAInfluenceFunction
from influence_kit.methods.influence_functions.naive import NaiveInfluenceFunction
from influence_kit.methods.influence_functions.nystrom import NystromInfluenceFunction
from influence_kit.methods.influence_functions.source import SOURCE
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.knn_shapley.knn_shapley import KNNShapley
from influence_kit.methods.magic.magic import MAGIC
from influence_kit.methods.projected.grass import FactGraSS, GraSS
from influence_kit.methods.projected.logra import LoGra
from influence_kit.methods.projected.trackstar import TrackStar
from influence_kit.methods.representer.representer import RepresenterPointSelection
from influence_kit.methods.selection import max_over_groups, two_stage
from influence_kit.methods.similarity.distances import cosine_similarity, euclidean_distance
from influence_kit.methods.similarity.similarity import SimilarityInfluence
from influence_kit.methods.tracin.grad_cos import GradCos
from influence_kit.methods.tracin.grad_dot import GradDot
from influence_kit.methods.tracin.less import LESS
from influence_kit.methods.tracin.nearest_neighbors import (
    ExactNearestNeighbors,
    FaissNearestNeighbors,
    NearestNeighbors,
)
from influence_kit.methods.tracin.tracin import TracInCP, TracInCPBase
from influence_kit.methods.tracin.tracin_fast import TracInCPFast
from influence_kit.methods.tracin.tracin_projected import TracInCPRandProj
from influence_kit.methods.tracin.tracin_rand_proj import TracInCPFastRandProj
from influence_kit.methods.trak.trak import TRAK
from influence_kit.scoring.features import MostInfluentialFeatures
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.scoring.token_results import KMostInfluentialTokens
from influence_kit.training.trace import TrainingTrace

__version__ = "0.1.0"

__all__ = [
    "LESS",
    "MAGIC",
    "SOURCE",
    "TRAK",
    "ArnoldiInfluenceFunction",
    "CGInfluenceFunction",
    "CurvatureError",
    "DVEmb",
    "DataInf",
    "EKFACInfluenceFunction",
    "ExactNearestNeighbors",
    "ExplicitInfluenceFunction",
    "FactGraSS",
    "FaissNearestNeighbors",
    "GraSS",
    "GradCos",
    "GradDot",
    "InfluenceFunction",
    "InnerProductInfluence",
    "KFACInfluenceFunction",
    "KMostInfluentialResults",
    "KMostInfluentialTokens",
    "KNNShapley",
    "LiSSAInfluenceFunction",
    "LoGra",
    "MostInfluentialFeatures",
    "NaiveInfluenceFunction",
    "NearestNeighbors",
    "NystromInfluenceFunction",
    "RepresenterPointSelection",
    "SequenceLogProbability",
    "SimilarityInfluence",
    "TokenDifference",
    "TokenLogProbability",
    "TokenLogit",
    "TracInCP",
    "TracInCPBase",
    "TracInCPFast",
    "TracInCPFastRandProj",
    "TracInCPRandProj",
    "TrackStar",
    "TrainingTrace",
    "checkpoint_table",
    "classification_margin",
    "contrast",
    "cosine_similarity",
    "dropout_ensemble",
    "euclidean_distance",
    "load_checkpoint",
    "max_over_groups",
    "prompt_and_answer",
    "select_checkpoints",
    "two_stage",
]
