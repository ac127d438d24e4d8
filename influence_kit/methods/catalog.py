"""The list of methods: what each computes, needs and costs, and where it comes from.

The tables of methods in the documentation are made from this list by ``sphinx/method_tables.py``.
Letters in the texts: m test examples, n training examples, P chosen parameters, C checkpoints, K
floats per projected gradient. A pass is one forward and one backward pass over the training set.
"""

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: the class, as in ``influence_kit`` or ``influence_kit.valuation``.
        family: the page of the reference that documents the class, ``api_FAMILY``.
        summary: the score in words.
        formula: the score in LaTeX, in the notation of the page on concepts.
        unit: what the number measures.
        needs: what must be given or hold.
        fit_cost: work that is done once per object; empty for none.
        call_cost: work per call of ``influence``; empty for none.
        memory: what the object holds of the training set, or of the curvature, between calls.
        reference: the paper's number on arXiv; empty for none.
    """

    name: str
    family: str
    summary: str
    formula: str
    unit: str
    needs: str
    call_cost: str
    memory: str = "nothing of the training set"
    fit_cost: str = ""
    reference: str = ""


_TRACIN = "2002.08484"
_COSINES = "2102.05262"
_INFLUENCE = r"mean over $c$ of $\; g'^T_c \, (\text{curvature}_c + \lambda I)^{-1} \, g_c$"
_INFLUENCE_UNIT = "test loss; divided by $n$: the rise when the example is left out"
_CAPTUM = (
    r"$g'^T V D^{-1} V^T g$, $V D V^T$ the largest eigenpairs of "
    r"$\sum_j \nabla^2 \ell(z_j) + \text{reg} \, I$"
)
_CAPTUM_UNIT = "test loss: the rise when the example is left out"
_KRONECKER = (
    "any layers: a Kronecker product for linear layers, convolutions and embeddings, the exact "
    "diagonal for all other parameters"
)
_PROJECTED = (
    r"mean over $c$ of $\; \sum_l u'^T_{cl} \, (F_{cl} + \lambda_{cl} I)^{-1} \, u_{cl}$ "
    "over layers $l$"
)
_PROJECTED_UNIT = "that of influence functions, up to the error of the projection"
_GRADIENT_CACHE = "n x K floats, or a folder"
_SHORT_PRODUCT = "product of short vectors"
_SEMIVALUE = r"weighted mean over sets $S$ of $\; u(S + z) - u(S)$"
_UTILITY = "the score $u$ of a model that is fitted again"
_REFITS = "dozens to thousands of fits, repeated per call unless `keep_models=True`"
_MODELS = "the models, with `keep_models=True`"

_influence = partial(Method, family="influence_functions", formula=_INFLUENCE, unit=_INFLUENCE_UNIT)
_captums = partial(Method, family="influence_functions", formula=_CAPTUM, unit=_CAPTUM_UNIT)
_projected = partial(
    Method,
    family="projected",
    formula=_PROJECTED,
    unit=_PROJECTED_UNIT,
    needs="any layers",
    fit_cost="one pass, one small inverse per layer",
    call_cost=_SHORT_PRODUCT,
    memory=_GRADIENT_CACHE,
)
_valuation = partial(
    Method,
    family="valuation",
    formula=_SEMIVALUE,
    unit=_UTILITY,
    needs="any `fit` and `score` functions",
    call_cost=_REFITS,
    memory=_MODELS,
)

METHODS = (
    Method(
        name="TracInCP",
        family="tracin",
        summary="learning rate times the dot product of the gradients, summed over checkpoints",
        formula=r"$\sum_c \eta_c \, \langle g'_c, g_c \rangle$",
        unit="test loss",
        needs="checkpoints of the run, with learning rates",
        call_cost="C passes",
        reference=_TRACIN,
    ),
    Method(
        name="TracInCPFast",
        family="tracin",
        summary="`TracInCP` of one linear layer",
        formula=r"$\sum_c \eta_c \, (d'_c \cdot d_c)(a'_c \cdot a_c + 1)$",
        unit="test loss",
        needs="checkpoints of the run, with learning rates; one linear layer",
        call_cost="C forward passes",
        reference=_TRACIN,
    ),
    Method(
        name="TracInCPFastRandProj",
        family="tracin",
        summary="`TracInCPFast`, or an estimate of it, from stored vectors that can be searched",
        formula=r"$\sum_c \eta_c \, \langle J^T G'_c A, \; J^T G_c A \rangle$",
        unit="test loss",
        needs="checkpoints of the run, with learning rates; one linear layer",
        fit_cost="C forward passes",
        call_cost="product of short vectors, or a nearest-neighbour search",
        memory="one vector per example and checkpoint",
        reference=_TRACIN,
    ),
    Method(
        name="TracInCPRandProj",
        family="tracin",
        summary="an estimate of `TracInCP` from projected gradients",
        formula=r"$\sum_c \eta_c \sum_l u'_{cl} \cdot u_{cl}$ over layers $l$",
        unit="test loss, up to the error of the projection",
        needs="checkpoints of the run, with learning rates",
        fit_cost="C passes",
        call_cost=_SHORT_PRODUCT,
        memory="C x n x K floats, or a folder",
        reference=_TRACIN,
    ),
    Method(
        name="GradDot",
        family="tracin",
        summary="the dot product of the gradients",
        formula=r"$\sum_c \langle g'_c, g_c \rangle$",
        unit="test loss per unit of learning rate",
        needs="one checkpoint or more",
        call_cost="C passes",
        reference=_COSINES,
    ),
    Method(
        name="GradCos",
        family="tracin",
        summary="the cosine of the gradients",
        formula=(
            r"$\sum_c \langle g'_c, g_c \rangle \, / \, "
            r"(\lVert g'_c \rVert \, \lVert g_c \rVert)$"
        ),
        unit="none: between $-C$ and $C$ for $C$ checkpoints",
        needs="one checkpoint or more",
        call_cost="C passes",
        reference=_COSINES,
    ),
    Method(
        name="LESS",
        family="tracin",
        summary="the cosine of the test gradient and the direction of Adam's step on the example",
        formula=r"$\sum_c \eta_c \, \cos(g'_c, \Gamma_c)$, $\Gamma_c$ Adam's direction for $g_c$",
        unit='learning rate; test loss with `similarity="dot"`',
        needs="checkpoints of the run, each with the state of its Adam or AdamW",
        call_cost="C passes, with gradients written out",
        reference="2402.04333",
    ),
    _influence(
        name="ExplicitInfluenceFunction",
        summary="influence function with the exact inverse curvature",
        needs="a few thousand parameters per block",
        fit_cost=(
            "about P passes and the inverse of a P x P matrix per block (for the Fisher "
            "matrices one pass, and an n x n inverse where n ≤ P / 2)"
        ),
        call_cost="one pass",
        memory="P² floats per block (for the Fisher matrices n x P where n ≤ P / 2)",
        reference="1703.04730",
    ),
    _influence(
        name="CGInfluenceFunction",
        summary="influence function by conjugate gradients, exact to a tolerance",
        needs="a curvature that is positive definite after damping",
        call_cost="one pass with m vectors per iteration, and one scoring pass",
        memory="a few times m x P floats during a call",
        reference="1703.04730",
    ),
    _influence(
        name="LiSSAInfluenceFunction",
        summary="influence function by a stochastic series",
        needs="a data set whose examples can be drawn at random",
        call_cost="one small batch with m vectors per iteration, and one scoring pass",
        memory="a few times m x P floats during a call",
        reference="1602.03943",
    ),
    _influence(
        name="NystromInfluenceFunction",
        summary="influence function with a curvature of low rank, exact up to that rank",
        needs="a curvature without negative eigenvalues",
        fit_cost="one pass with `rank` vectors",
        call_cost="one pass",
        memory="`rank` x P floats",
        reference="2110.02820",
    ),
    _influence(
        name="DataInf",
        summary="influence function with the mean of the examples' inverses, an approximation",
        needs="any layers",
        fit_cost="one pass",
        call_cost="two passes",
        reference="2310.00902",
    ),
    _influence(
        name="KFACInfluenceFunction",
        summary="influence function with a Kronecker product as the curvature of each layer",
        needs=_KRONECKER,
        fit_cost="one pass, eigenvectors of two small matrices per layer",
        call_cost="one pass",
        memory="the matrices",
        reference="1503.05671",
    ),
    _influence(
        name="EKFACInfluenceFunction",
        summary="K-FAC with eigenvalues measured in a second pass",
        needs=_KRONECKER,
        fit_cost="two passes, eigenvectors of two small matrices per layer",
        call_cost="one pass",
        memory="the matrices, and P floats",
        reference="2308.03296",
    ),
    Method(
        name="SOURCE",
        family="influence_functions",
        summary="the effect of the example through the steps of a run, in segments, by EK-FAC",
        formula=(
            r"$\sum_l \langle r_l \, S_{l+1} \cdots S_L \, g', g_l \rangle$, "
            r"$S_l = e^{-R_l H_l}$, $r_l = (I - S_l) H_l^{-1}$"
        ),
        unit=_INFLUENCE_UNIT,
        needs="checkpoints of one run of SGD and its learning rates; " + _KRONECKER,
        fit_cost="2C passes, eigenvectors of two small matrices per layer and checkpoint",
        call_cost="C passes",
        memory="C times the matrices, and C x P floats",
        reference="2405.12186",
    ),
    _captums(
        name="NaiveInfluenceFunction",
        summary="Captum's influence function from eigenvectors of the whole Hessian",
        needs="Captum's arguments; a few thousand parameters",
        fit_cost="about P passes",
        call_cost="one pass",
        memory="P² floats",
        reference="1703.04730",
    ),
    _captums(
        name="ArnoldiInfluenceFunction",
        summary="Captum's influence function from eigenvectors found by Arnoldi's iteration",
        needs="Captum's arguments",
        fit_cost="one pass per dimension of the subspace",
        call_cost="one pass",
        memory="dimensions x P floats",
        reference="2112.03052",
    ),
    _projected(
        name="LoGra",
        summary="influence function of gradients projected by two dense maps per layer",
        reference="2405.13954",
    ),
    _projected(
        name="GraSS",
        summary="influence function of gradients projected by a mask and a sparse map per layer",
        reference="2505.18976",
    ),
    _projected(
        name="FactGraSS",
        summary="`GraSS` of the factors of a gradient, which is never formed",
        reference="2505.18976",
    ),
    Method(
        name="TrackStar",
        family="projected",
        summary="the cosine, under R^-1, of projected gradients that Adam's second moments scale",
        formula=(
            r"mean over $c$ of $\cos(R_c^{-1/2} u'_c, R_c^{-1/2} u_c)$, $u$ the projection of "
            r"$g / \sqrt{v}$, $R$ a mean of $u u^T$"
        ),
        unit="none: between $-1$ and $1$",
        needs="the state of Adam, AdamW or Adafactor in each checkpoint (or `optimizer=None`)",
        fit_cost="one pass, one small inverse per layer",
        call_cost=_SHORT_PRODUCT,
        memory=_GRADIENT_CACHE,
        reference="2410.17413",
    ),
    Method(
        name="TRAK",
        family="trak",
        summary="influence function of the margin, from projected gradients; a mean over models",
        formula=(
            r"mean over $c$ of $\; \phi'^T_c \, (\Phi^T_c \Phi_c + \lambda_c I)^{-1} \, \phi_c \;$ "
            r"times mean over $c$ of $\; 1 - p_c$"
        ),
        unit="margin (log-odds): the fall when the example is left out",
        needs="class labels, or an output function; several checkpoints",
        fit_cost="C passes, C small inverses",
        call_cost=_SHORT_PRODUCT,
        memory="C x n x K floats, or a folder",
        reference="2303.14186",
    ),
    Method(
        name="DVEmb",
        family="dvemb",
        summary="what leaving the example out of one recorded run does to the final weights",
        formula=r"$\langle g', e \rangle$, $e$ the change of the final weights",
        unit="test loss: the rise when the example is left out of this run",
        needs="a `TrainingTrace` of plain SGD",
        fit_cost="the gradients of every step of the run",
        call_cost="product with the embeddings",
        memory="n x P floats, and P² while they are computed",
        reference="2412.09538",
    ),
    Method(
        name="MAGIC",
        family="magic",
        summary="the exact derivative of one recorded run in the weight of the example",
        formula=r"$-\partial \ell(z', \theta_T) / \partial w_z$ at $w = 1$, through every step",
        unit="test loss: the rise when the example is left out of this run, to first order",
        needs="a `TrainingTrace` of SGD, Adam or AdamW",
        call_cost="the run again, and about three passes with m vectors per step",
        reference="2504.16430",
    ),
    Method(
        name="RepresenterPointSelection",
        family="features",
        summary="the example's share of an output of the refitted last layer",
        formula=r"mean over $c$ of $\; \alpha_{c,y'} \, \langle f_c, f'_c \rangle$",
        unit="output: the example's share of the test label's refitted output",
        needs="a linear last layer",
        fit_cost="one forward pass, a refit of the last layer",
        call_cost="one forward pass",
        memory="the features while the layer is refitted",
        reference="1811.09720",
    ),
    Method(
        name="KNNShapley",
        family="features",
        summary="the exact Shapley value for a vote of the nearest neighbours",
        formula=r"$\sum_{j \ge r} (c_j - c_{j+1}) \, / \, \max(K, j)$",
        unit="share of right votes among the $K$ nearest",
        needs="labels; the output of a layer, or the inputs",
        call_cost="one forward pass (none on the inputs), one sort per test example",
        memory="the features during a call",
        reference="1908.08619",
    ),
    Method(
        name="SimilarityInfluence",
        family="features",
        summary="the similarity of the outputs of a layer",
        formula=r"metric(layer of $z'$, layer of $z$)",
        unit="the metric's: from $-1$ to $1$ for the cosine",
        needs="layers and a metric",
        fit_cost="one forward pass",
        call_cost="product with the activations",
        memory="activations in a folder",
    ),
    _valuation(
        name="TMCShapley",
        summary="Shapley value of the example for the score of a refitted model",
        reference="1904.02868",
    ),
    _valuation(
        name="BetaShapley",
        summary="the same with other weights on the sizes of the subsets",
        reference="2110.14049",
    ),
    _valuation(
        name="DataBanzhaf",
        summary="Banzhaf value of the example for the score of a refitted model",
        reference="2205.15466",
    ),
    _valuation(
        name="DataOOB",
        summary="how well bagged models predict the example that they were not fitted on",
        formula="mean of the score for $z$ over models fitted on bags without $z$",
        reference="2304.07718",
    ),
)
