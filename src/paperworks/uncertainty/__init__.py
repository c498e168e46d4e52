"""Know what is not known: predictions that are distributions.

A method of this room is a scikit-learn estimator. `fit(X, y)`; a regressor's `predict(X, return_std=True)`,
`predict_quantiles(X, quantiles)`, `log_predictive_density(X, y)`, `sample_y(X, n_samples)` and `score`, all in the units of y
and with the noise of new targets; a classifier's `predict_proba`, `log_predictive_density` and `sample_y`. It takes arrays and
DataFrames, works in a `Pipeline` and in `GridSearchCV`, and is kept by `save_pretrained` and `from_pretrained`. Where it serves Bayesian
optimisation, `as_botorch()` gives a BoTorch `Model`.

What each keeps to: on data drawn from its own prior 90 % intervals cover 90 %; order of rows changes nothing; targets in
another unit give predictions in that unit; far from the data bands do not get narrower; the density integrates to one, and
quantiles and draws are its own; one row, one column, constant targets are taken, and NaN and too many rows are one clear
sentence.
"""

from paperworks.uncertainty import vi
from paperworks.uncertainty.certified_conformal import (
    CertifiedConformalClassifier,
    KnowledgeCircuit,
    Rule,
    SmoothedModel,
)
from paperworks.uncertainty.deep_kernel_machine import (
    ActivationGram,
    DeepKernelMachine,
    DeepKernelMachineClassifier,
    DeepKernelMachineRegressor,
    sample_finite_dgp,
)
from paperworks.uncertainty.functional_tucker import FunctionalTucker
from paperworks.uncertainty.scale_mixture_nngp import (
    NNGPKernel,
    ScaleMixtureNNGPClassifier,
    ScaleMixtureNNGPRegressor,
    WideNetworkLimit,
)

__all__ = [
    "ActivationGram",
    "CertifiedConformalClassifier",
    "DeepKernelMachine",
    "DeepKernelMachineClassifier",
    "DeepKernelMachineRegressor",
    "FunctionalTucker",
    "KnowledgeCircuit",
    "NNGPKernel",
    "Rule",
    "ScaleMixtureNNGPClassifier",
    "ScaleMixtureNNGPRegressor",
    "SmoothedModel",
    "WideNetworkLimit",
    "sample_finite_dgp",
    "vi",
]
