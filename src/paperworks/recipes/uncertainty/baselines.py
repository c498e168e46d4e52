"""What one would otherwise take for predictions with bands: Gaussian processes, a deep ensemble, gradient boosting with quantiles."""

from __future__ import annotations

import math
from typing import Any, NoReturn, Self

import gpytorch
import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal

from paperworks.nn import FlatNetwork
from paperworks.uncertainty.deep_kernel_machine import centres
from paperworks.uncertainty.estimator import Array, ProbabilisticRegressor


class _Baseline(ProbabilisticRegressor):
    """Made to be scored, and not to be kept."""

    def _state(self) -> NoReturn:
        raise NotImplementedError

    def _restore(self, tensors: Any, values: Any) -> NoReturn:
        raise NotImplementedError


class ExactGP(_Baseline):
    """BoTorch's Gaussian process with its own priors, fitted by marginal likelihood."""

    def _fit(self, X: Tensor, y: Tensor) -> None:
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Normalize

        # Its priors are those of a unit cube.
        cube = Normalize(X.shape[1])
        self.process = SingleTaskGP(X, y[:, None], outcome_transform=None, input_transform=cube)
        fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(self.process.likelihood, self.process))

    def _predictive(self, X: Tensor) -> Distribution:
        with torch.no_grad():
            found = self.process.posterior(X, observation_noise=True)
            return Normal(found.mean[:, 0], found.variance[:, 0].sqrt())


class _Process(gpytorch.models.ExactGP):  # type: ignore[misc]
    def __init__(self, X: Tensor, y: Tensor, likelihood: Any, inducing: Tensor) -> None:
        super().__init__(X, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        rbf = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=X.shape[1]))
        self.kernel = gpytorch.kernels.InducingPointKernel(rbf, inducing_points=inducing, likelihood=likelihood)

    def forward(self, X: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(X), self.kernel(X))


class SparseGP(_Baseline):
    """GPyTorch's sparse process by Titsias's bound: RBF, a lengthscale for each feature, inducing rows that are learned.

    Args:
        inducing: Inducing rows.
        steps: Of Adam.
    """

    def __init__(self, inducing: int = 100, steps: int = 200) -> None:
        self.inducing, self.steps = inducing, steps

    def _fit(self, X: Tensor, y: Tensor) -> None:
        Z = X if len(X) <= self.inducing else centres(X, self.inducing, np.random.RandomState(0))
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        self.process = _Process(X, y, self.likelihood, Z.clone()).double()
        optimizer = torch.optim.Adam(self.process.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.process)
        self.process.train()
        for _ in range(self.steps):
            optimizer.zero_grad()
            (-evidence(self.process(X), y)).backward()
            optimizer.step()
            schedule.step()
        self.process.eval()

    def _predictive(self, X: Tensor) -> Distribution:
        with torch.no_grad():
            found = self.likelihood(self.process(X))
            return Normal(found.mean, found.stddev)


class DeepEnsemble(_Baseline):
    """Networks that predict mean and variance, each from weights of its own (arXiv 1612.01474), all trained at once.

    Args:
        members: Networks.
        hidden: Units of their two layers.
        steps: Of Adam, all rows a step.
        held_out: Share of the rows by which the best step is chosen.
        random_state: Of weights and held-out rows.
    """

    def __init__(
        self, members: int = 5, hidden: int = 50, steps: int = 500, held_out: float = 0.1, random_state: int = 0
    ) -> None:
        self.members, self.hidden, self.steps = members, hidden, steps
        self.held_out, self.random_state = held_out, random_state

    def _fit(self, X: Tensor, y: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.random_state)
        module = torch.nn.Sequential(
            torch.nn.Linear(X.shape[1], self.hidden), torch.nn.ReLU(), torch.nn.Linear(self.hidden, self.hidden),
            torch.nn.ReLU(), torch.nn.Linear(self.hidden, 2),
        ).double()  # fmt: skip
        self.network = FlatNetwork(module)
        parts = [
            torch.randn(self.members, shape.numel(), generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
            * (len(shape) > 1)
            for shape in self.network.shapes.values()
        ]  # fmt: skip
        weights = torch.cat(parts, 1).requires_grad_()
        order = torch.randperm(len(X), generator=generator)
        held = order[: max(1, round(self.held_out * len(X)))]
        kept = order[len(held) :] if len(order) > len(held) else order
        optimizer = torch.optim.Adam([weights], lr=1e-2, weight_decay=1e-4)
        best, self.weights = torch.full((self.members,), math.inf, dtype=torch.float64), weights.detach().clone()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self._nll(weights, X[kept], y[kept]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                told = self._nll(weights, X[held], y[held])
                better = told < best
                best = torch.where(better, told, best)
                self.weights = torch.where(better[:, None], weights, self.weights)

    def _moments(self, weights: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.network(weights, X).unbind(-1)
        return mean, torch.nn.functional.softplus(raw) + 1e-4

    def _nll(self, weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
        mean, variance = self._moments(weights, X)
        return ((y - mean).square() / variance + variance.log()).mean(1)

    def _predictive(self, X: Tensor) -> Distribution:
        with torch.no_grad():
            mean, variance = self._moments(self.weights, X)
            weights = torch.full((len(X), self.members), 1 / self.members, dtype=torch.float64)
            return MixtureSameFamily(Categorical(weights), Normal(mean.T, variance.sqrt().T))


class BoostedQuantiles:
    """scikit-learn's gradient boosting: a model of the mean, and one for each quantile; it has no density.

    Args:
        iterations: Trees of each model.
    """

    def __init__(self, iterations: int = 100) -> None:
        self.iterations = iterations

    def fit(self, X: Array, y: Array) -> Self:
        """Fit the model of the mean, and keep what models of quantiles are fitted to."""
        self.mean = self._model().fit(X, y)
        self.quantiles = {level: self._model(loss="quantile", quantile=level).fit(X, y) for level in (0.05, 0.95)}
        return self

    def predict(self, X: Array, return_std: bool = False) -> Any:
        """Means, and standard deviations of a normal law whose 90 % interval is as wide."""
        low, high = self.predict_quantiles(X, [0.05, 0.95]).T
        mean = self.mean.predict(X)
        return (mean, np.maximum(high - low, 1e-12) / 3.29) if return_std else mean

    def predict_quantiles(self, X: Array, quantiles: Any) -> Array:
        """Quantiles (n, q), of 0.05 and 0.95."""
        found: Array = np.stack([self.quantiles[level].predict(X) for level in quantiles], axis=-1)
        return np.sort(found, axis=-1)

    def log_predictive_density(self, X: Array, y: Array) -> Array:
        """Not a number."""
        return np.full(len(y), np.nan)

    def _model(self, **options: Any) -> Any:
        return HistGradientBoostingRegressor(max_iter=self.iterations, random_state=0, **options)
