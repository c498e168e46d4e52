from __future__ import annotations

import math

import numpy as np
import torch

from paperworks.uncertainty.deep_kernel_machine import (
    DeepKernelMachine,
    DeepKernelMachineClassifier,
    DeepKernelMachineRegressor,
)
from tests.uncertainty.subjects import ClassifierSubject, RegressorSubject


def prior(random):
    """Of the widest machine, whose last kernel is that of two layers."""
    X = random.normal(size=(90, 2))
    machine = DeepKernelMachine(2, torch.from_numpy(X), n_layers=2, nu=math.inf)
    K = machine(torch.zeros(0, 2, dtype=torch.float64))[0].inducing.detach().numpy()
    y = 2 * np.linalg.cholesky(K + 0.1 * np.eye(90)) @ random.normal(size=90)
    return X[:80], y[:80], X[80:], y[80:]


REGRESSORS = {
    "DeepKernelMachineRegressor": RegressorSubject(
        lambda: DeepKernelMachineRegressor(nu=10.0, max_iter=40), prior,
        lambda: DeepKernelMachineRegressor(nu=math.inf, max_iter=40, lr=0.05), tasks=60,
    ),
    "DeepKernelMachineRegressor, inducing rows": RegressorSubject(
        lambda: DeepKernelMachineRegressor(1, nu=10.0, n_inducing=8, max_iter=30, kernel="rbf"), prior,
        lambda: DeepKernelMachineRegressor(nu=math.inf, n_inducing=30, max_iter=40, lr=0.05), tasks=60, checks=False,
    ),
}  # fmt: skip
CLASSIFIERS = {
    "DeepKernelMachineClassifier": ClassifierSubject(
        lambda: DeepKernelMachineClassifier(1, nu=10.0, n_inducing=8, n_samples=8, n_pred_samples=500, max_iter=40, lr=0.1),
    ),
}  # fmt: skip
