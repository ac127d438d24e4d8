"""Training-data attribution for PyTorch: which training examples made my model do this?"""

from influence_kit.checkpoint_selection import select_checkpoints
from influence_kit.checkpoints import checkpoint_table, load_checkpoint
from influence_kit.dropout_ensemble import dropout_ensemble
from influence_kit.errors import CurvatureError
from influence_kit.margins import classification_margin
from influence_kit.methods.arnoldi import ArnoldiInfluenceFunction
from influence_kit.methods.conjugate_gradients import CGInfluenceFunction
from influence_kit.methods.datainf import DataInf
from influence_kit.methods.distances import cosine_similarity, euclidean_distance
from influence_kit.methods.dvemb import DVEmb
from influence_kit.methods.explicit import ExplicitInfluenceFunction
from influence_kit.methods.grad_cos import GradCos
from influence_kit.methods.grad_dot import GradDot
from influence_kit.methods.grass import FactGraSS, GraSS
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.kfac import EKFACInfluenceFunction, KFACInfluenceFunction
from influence_kit.methods.knn_shapley import KNNShapley
from influence_kit.methods.lissa import LiSSAInfluenceFunction
from influence_kit.methods.logra import LoGra
from influence_kit.methods.naive import NaiveInfluenceFunction
from influence_kit.methods.nearest_neighbors import (
    ExactNearestNeighbors,
    FaissNearestNeighbors,
    NearestNeighbors,
)
from influence_kit.methods.nystrom import NystromInfluenceFunction
from influence_kit.methods.representer import RepresenterPointSelection
from influence_kit.methods.similarity import SimilarityInfluence
from influence_kit.methods.tracin import TracInCP, TracInCPBase
from influence_kit.methods.tracin_fast import TracInCPFast
from influence_kit.methods.tracin_projected import TracInCPRandProj
from influence_kit.methods.tracin_rand_proj import TracInCPFastRandProj
from influence_kit.methods.trak import TRAK
from influence_kit.scoring.features import MostInfluentialFeatures
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.training_trace import TrainingTrace

__version__ = "0.1.0"

__all__ = [
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
    "InnerProductInfluence",
    "KFACInfluenceFunction",
    "KMostInfluentialResults",
    "KNNShapley",
    "LiSSAInfluenceFunction",
    "LoGra",
    "MostInfluentialFeatures",
    "NaiveInfluenceFunction",
    "NearestNeighbors",
    "NystromInfluenceFunction",
    "RepresenterPointSelection",
    "SimilarityInfluence",
    "TracInCP",
    "TracInCPBase",
    "TracInCPFast",
    "TracInCPFastRandProj",
    "TracInCPRandProj",
    "TrainingTrace",
    "checkpoint_table",
    "classification_margin",
    "cosine_similarity",
    "dropout_ensemble",
    "euclidean_distance",
    "load_checkpoint",
    "select_checkpoints",
]
