"""See what a network has learnt.

A method of this room is a torchmetrics `Metric` (update, compute, reset; its sums add up over processes), or an analysis
function that returns a dataclass with `plot()`. Both work on any `nn.Module`: `layer_features` streams what a named layer gives.

What each keeps to: order and splitting of batches do not change a result; rotating features changes nothing where the theory
says so; one class, one sample, constant features or NaN is one clear sentence.
"""

from paperworks.representation.cauchy_schwarz_bottleneck import (
    CauchySchwarzBottleneck,
    CauchySchwarzBottleneckRegressor,
)
from paperworks.representation.features import layer_features, layers_features
from paperworks.representation.near_collapse import (
    NearCollapse,
    central_path,
    implied_beta,
    near_collapse,
    orthogonal_collapse,
)
from paperworks.representation.neural_collapse import NeuralCollapse
from paperworks.representation.posterior_collapse import (
    LinearCVAE,
    LinearHVAE2,
    LinearVAE,
    PosteriorCollapse,
    linear_cvae_solution,
    linear_hvae_solution,
    linear_vae_solution,
)
from paperworks.representation.pretrained_features import (
    ComponentTable,
    ContrastiveModel,
    FactorModel,
    Informativeness,
    MixtureModel,
    PretrainedFeatures,
    PretrainingGain,
    PretrainingReport,
    compare_pretraining,
    contrastive_loss,
    informativeness,
    pretraining_gain,
)
from paperworks.representation.unconstrained_features import (
    FrameGeometry,
    UnconstrainedFeatures,
    frame_geometry,
    unconstrained_features,
)
from paperworks.representation.variable_activity import PassiveFilter, VariableActivity, representation_report
from paperworks.representation.wasserstein_dependency import (
    ConcatCritic,
    Dependency,
    WassersteinDependency,
    exact_wasserstein_dependency,
    wasserstein_dependency,
)

__all__ = [
    "CauchySchwarzBottleneck",
    "CauchySchwarzBottleneckRegressor",
    "ComponentTable",
    "ConcatCritic",
    "ContrastiveModel",
    "Dependency",
    "FactorModel",
    "FrameGeometry",
    "Informativeness",
    "LinearCVAE",
    "LinearHVAE2",
    "LinearVAE",
    "MixtureModel",
    "NearCollapse",
    "NeuralCollapse",
    "PassiveFilter",
    "PosteriorCollapse",
    "PretrainedFeatures",
    "PretrainingGain",
    "PretrainingReport",
    "UnconstrainedFeatures",
    "VariableActivity",
    "WassersteinDependency",
    "central_path",
    "compare_pretraining",
    "contrastive_loss",
    "exact_wasserstein_dependency",
    "frame_geometry",
    "implied_beta",
    "informativeness",
    "layer_features",
    "layers_features",
    "linear_cvae_solution",
    "linear_hvae_solution",
    "linear_vae_solution",
    "near_collapse",
    "orthogonal_collapse",
    "pretraining_gain",
    "representation_report",
    "unconstrained_features",
    "wasserstein_dependency",
]
