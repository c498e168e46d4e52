"""FunctionalTucker in the room's contract test: with a core, and without one, for as many columns as scikit-learn's checks have."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from paperworks.state_space import StateSpaceGP
from paperworks.uncertainty.functional_tucker import FunctionalTucker
from tests.uncertainty.subjects import RegressorSubject

Array = np.ndarray


def make(core: str) -> FunctionalTucker:
    return FunctionalTucker(2, core, lengthscale=0.5, max_iter=15, tol=1e-3, n_restarts=2, random_state=0)


def prior(random: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """A core of one number, a function of each of two indices, and noise a fifth to a half as large."""
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    X = random.uniform(size=(60, 2))
    f = np.full(60, random.normal())
    for column in X.T:
        order = np.argsort(column)
        f[order] *= (
            StateSpaceGP("matern32", 0.5).sample(torch.from_numpy(column[order]), generator=generator)[0].numpy()
        )
    y = f + f.std() * random.uniform(0.2, 0.5) * random.normal(size=60)
    return X[:50], y[:50], X[50:], y[50:]


def oracle() -> FunctionalTucker:
    return FunctionalTucker(1, lengthscale=0.5, intercept=False, max_iter=10, tol=1e-2, n_restarts=2, random_state=0)


REGRESSORS = {
    "FunctionalTucker": RegressorSubject(partial(make, "tucker"), prior, oracle, tasks=80, checks=False),
    "FunctionalTucker without a core": RegressorSubject(partial(make, "cp")),
}
