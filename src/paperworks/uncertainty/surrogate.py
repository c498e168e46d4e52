"""Estimators of this room as BoTorch models, so that Bayesian optimisation takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior, Posterior
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from scipy.special import chdtri, ndtr
from scipy.stats import t as student_t
from torch import Tensor


class SurrogateModel(Model):
    """A fitted estimator as a BoTorch model over features in the user's own units.

    Args:
        posterior: Of features (b1 x ... x n x d), the posterior of n targets for each batch, with shape b1 x ... x n x m;
            differentiable in the features. Its second argument says whether noise is included.
        num_outputs: m.
    """

    def __init__(self, posterior: Callable[[Tensor, bool], Posterior], num_outputs: int = 1) -> None:
        super().__init__()
        self._of = posterior
        self._outputs = num_outputs

    @property
    def num_outputs(self) -> int:
        """Targets m."""
        return self._outputs

    @property
    def batch_shape(self) -> torch.Size:
        """One model, no batch of them."""
        return torch.Size([])

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """The posterior at X (b1 x ... x n x d).

        Raises:
            ValueError: Some of the outputs are asked for, noise is given as a tensor, or a transform for Student's t.
        """
        if output_indices is not None and output_indices != list(range(self._outputs)):
            raise ValueError(f"all {self._outputs} outputs are given together, got output_indices={output_indices}")
        if not isinstance(observation_noise, bool):
            raise ValueError("observation_noise is True or False: the noise is the model's own")
        found = self._of(X, observation_noise)
        if posterior_transform is None:
            return found
        if isinstance(found, StudentTPosterior):
            raise ValueError("a posterior transform would make a normal law of Student's t: give an objective instead")
        return posterior_transform(found)


def surrogate_of(
    model: Any, together: Callable[[Tensor, bool], tuple[Tensor, Tensor]], degrees: float | None = None
) -> SurrogateModel:
    """A fitted regressor of one target as a BoTorch model, in the units of its features and target.

    Args:
        model: The regressor, of which the scales are taken.
        together: Mean (n,) and covariance (n, n) of standardised targets at standardised rows (n, d), with noise or without.
        degrees: Of freedom, where that covariance is the scale matrix of Student's t.
    """
    shift, extent = (torch.from_numpy(one) for one in (model.feature_mean_, model.feature_scale_))
    location, scale = float(model.target_mean_[0]), float(model.target_scale_[0])

    def posterior(X: Tensor, noisy: bool) -> Posterior:
        rows = ((X.to(torch.float64) - shift) / extent).reshape(-1, X.shape[-2], X.shape[-1])
        found = [together(one, noisy) for one in rows]
        mean = torch.stack([one[0] for one in found]).reshape(X.shape[:-1]) * scale + location
        covariance = torch.stack([one[1] for one in found]).reshape(*X.shape[:-1], X.shape[-2]) * scale**2
        return joint_posterior(mean, covariance, degrees)

    return SurrogateModel(posterior)


def joint_posterior(mean: Tensor, covariance: Tensor, degrees: float | None = None) -> GPyTorchPosterior:
    """Normal or, with degrees of freedom, Student's t, of n targets together.

    Args:
        mean: (b1 x ... x n).
        covariance: (b1 x ... x n x n); of a t its scale matrix.
        degrees: Of freedom.
    """
    # As an operator, which gets jitter where rows are the same.
    normal = MultivariateNormal(mean, to_linear_operator(covariance))
    return GPyTorchPosterior(normal) if degrees is None else StudentTPosterior(normal, degrees)


class StudentTPosterior(GPyTorchPosterior):
    """A multivariate t: a normal law whose scale is drawn too, one for all targets of a draw.

    Base samples have one normal number more than there are targets, which tells the scale; quasi-random ones serve.

    Args:
        normal: Its centre and scale matrix.
        degrees: Of freedom.
    """

    def __init__(self, normal: MultivariateNormal, degrees: float) -> None:
        super().__init__(normal)
        self.degrees = degrees

    @property
    def base_sample_shape(self) -> torch.Size:
        """Of the targets, and one more."""
        *batch, targets = super().base_sample_shape
        return torch.Size([*batch, targets + 1])

    @property
    def variance(self) -> Tensor:
        """Infinite up to two degrees of freedom."""
        share = self.degrees / (self.degrees - 2) if self.degrees > 2 else torch.inf
        return super().variance * share

    def quantile(self, value: Tensor) -> Tensor:
        """Quantiles (b1 x ... x n x 1) of each target, for levels with more dimensions before them."""
        centre, extent = self.mean.detach(), self.distribution.variance.detach().sqrt()[..., None]
        return centre + extent * torch.as_tensor(student_t.ppf(value.cpu().numpy(), self.degrees), dtype=self.dtype)

    def density(self, value: Tensor) -> Tensor:
        """Density of each target, (b1 x ... x n x 1)."""
        centre, extent = self.mean.detach(), self.distribution.variance.detach().sqrt()[..., None]
        z = ((value - centre) / extent).cpu().numpy()
        return torch.as_tensor(student_t.pdf(z, self.degrees), dtype=self.dtype) / extent

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Draws (sample_shape x b1 x ... x n x 1) made of base samples, differentiable in the features."""
        found = super().rsample_from_base_samples(sample_shape, base_samples[..., :-1])
        told = base_samples[..., -1:, None].detach().cpu().numpy()
        # By the upper tail, in which small scales lie.
        squares = torch.as_tensor(chdtri(self.degrees, ndtr(-told)), dtype=found.dtype, device=found.device)
        return self.mean + (found - self.mean) * (self.degrees / squares).sqrt()

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Draws (sample_shape x b1 x ... x n x 1)."""
        shape = torch.Size([1]) if sample_shape is None else sample_shape
        base = torch.randn(*shape, *self.base_sample_shape, dtype=self.dtype, device=self.device)
        return self.rsample_from_base_samples(shape, base)
