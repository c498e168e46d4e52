from __future__ import annotations

import math

import numpy as np
import torch

from paperworks.uncertainty.scale_mixture_nngp import (
    NNGPKernel,
    ScaleMixtureNNGPClassifier,
    ScaleMixtureNNGPRegressor,
)
from tests.uncertainty.subjects import ClassifierSubject, RegressorSubject

NETWORK = {"depth": 2, "w_std": math.sqrt(2), "b_std": 0.3}
KNOWN = {"learn": False, "standardize": False, "noise": 0.05}


def prior(random):
    X = random.normal(size=(12, 3))
    K = NNGPKernel(**NETWORK)(torch.from_numpy(X), torch.from_numpy(X)).detach().numpy()
    s2 = 1 / random.gamma(2.0, 0.5)
    y = np.sqrt(s2) * np.linalg.cholesky(K + 0.05 * np.eye(12)) @ random.normal(size=12)
    fit = random.integers(1, 8)
    return X[:fit], y[:fit], X[fit:], y[fit:]


def burr_prior(random):
    X = random.normal(size=(12, 3))
    K = NNGPKernel(**NETWORK)(torch.from_numpy(X), torch.from_numpy(X)).detach().numpy()
    # Burr XII by its inverse distribution function.
    s2 = ((1 - random.random()) ** -1.0 - 1) ** 0.5
    y = np.sqrt(s2) * np.linalg.cholesky(K) @ random.normal(size=12) + np.sqrt(0.05) * random.normal(size=12)
    fit = random.integers(1, 8)
    return X[:fit], y[:fit], X[fit:], y[fit:]


REGRESSORS = {
    "ScaleMixtureNNGPRegressor": RegressorSubject(
        lambda: ScaleMixtureNNGPRegressor(**NETWORK, noise=0.05), prior, lambda: ScaleMixtureNNGPRegressor(**NETWORK, **KNOWN),
        
    ),
    "ScaleMixtureNNGPRegressor, Burr, independent noise": RegressorSubject(
        lambda: ScaleMixtureNNGPRegressor(
            **NETWORK, noise=0.05, learn=False, prior=("burr12", 2.0, 3.0), noise_model="independent"
        ),
        burr_prior,
        lambda: ScaleMixtureNNGPRegressor(**NETWORK, **KNOWN, prior=("burr12", 2.0, 1.0), noise_model="independent"),
        tasks=100,
        checks=False,
    ),
}  # fmt: skip
CLASSIFIERS = {
    "ScaleMixtureNNGPClassifier": ClassifierSubject(
        lambda: ScaleMixtureNNGPClassifier(
            **NETWORK, n_inducing=12, n_samples=8, n_pred_samples=1000, max_epoch=25, lr=0.1
        ),
    ),
}
