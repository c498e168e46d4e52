"""Active, mixed and passive latent variables of a VAE; mean against sampled codes (arXiv 2109.12679)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.metrics import mutual_info_score
from torch import Tensor
from torchmetrics import Metric

from paperworks.representation.posterior_collapse import Encoder, posteriors, stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
_KINDS = ("active", "mixed", "passive")


class ActivityReport(NamedTuple):
    """Types of the latent variables, and what they rest on.

    Attributes:
        types: "active", "mixed" or "passive" (d,).
        mean_variance: Mean over data of the encoder's variance, in units of the prior's (d,).
        variance_variance: Its population variance over data (d,).
        mu_variance: Variance over data of the encoder's mean (d,).
        covariance: Covariance of the mean code (d, d).
        sampled_covariance: Covariance of the sampled code, Cov(mu) + diag(mean variance), in expectation (d, d).
    """

    types: NDArray[np.str_]
    mean_variance: Array
    variance_variance: Array
    mu_variance: Array
    covariance: Array
    sampled_covariance: Array

    def indices(self, *kinds: str) -> NDArray[np.int64]:
        """Variables of these types, ascending."""
        return np.flatnonzero(np.isin(self.types, kinds))

    @property
    def disagreement(self) -> NDArray[np.int64]:
        """Passive variables whose mean still varies by more than 0.01, and others whose mean does not."""
        return np.flatnonzero((self.types == "passive") == (self.mu_variance > 0.01))

    def plot(self) -> Figure:
        """Mean and variance of the encoder's variance, coloured by type."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for kind, colour in zip(_KINDS, ("#1f6f8b", "#c9a66b", "#c8553d"), strict=True):
            chosen = self.indices(kind)
            label = f"{len(chosen)} {kind}"
            axes.scatter(self.mean_variance[chosen], self.variance_variance[chosen], color=colour, label=label)
        axes.set(xlabel="mean of the encoder's variance", ylabel="variance of the encoder's variance")
        axes.legend(frameon=False)
        return figure


class VariableActivity(Metric):
    """Sorts latent variables by the encoder's variance over data, in one pass (arXiv 2109.12679).

    With a the mean and v the variance over data of the encoder's variance: v < t_var and a <= t_mean is active,
    v < t_var and |a - 1| <= t_mean is passive, anything else is mixed.

    Args:
        dims: Latent variables d.
        prior_std: Standard deviation of the prior.
        t_var: Threshold on v.
        t_mean: Threshold on a, below one half so that the types are disjoint.
        **options: Of torchmetrics.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> activity = VariableActivity(2)
        >>> activity.update(torch.randn(50, 2), torch.tensor([0.01, 1.0]).expand(50, 2))
        >>> activity.compute().types.tolist()
        ['active', 'passive']
    """

    full_state_update = False
    count: Tensor
    var_sums: Tensor
    mu_sum: Tensor
    mu_square: Tensor

    def __init__(
        self, dims: int, *, prior_std: float = 1.0, t_var: float = 0.1, t_mean: float = 0.1, **options: Any
    ) -> None:
        super().__init__(**options)
        if dims < 1 or not (prior_std > 0 and t_var > 0 and 0 < t_mean < 0.5):
            raise ValueError("give dims of at least 1, prior_std and t_var above 0 and t_mean between 0 and 0.5")
        self.dims, self.prior_std, self.t_var, self.t_mean = dims, prior_std, t_var, t_mean
        for name, shape in (("count", ()), ("var_sums", (2, dims)), ("mu_sum", (dims,)), ("mu_square", (dims, dims))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mu: Tensor, var: Tensor) -> None:
        """Take in the posteriors of a batch.

        Args:
            mu: Means (n, d).
            var: Variances (n, d), not their logarithms.

        Raises:
            ValueError: Shapes do not fit, values are not finite, or a variance is not positive.
        """
        mu, var = posteriors(mu, var, self.dims)
        mu, var = mu / self.prior_std, var / self.prior_std**2
        self.count += len(mu)
        self.var_sums += torch.stack([var.sum(0), var.square().sum(0)])
        self.mu_sum += mu.sum(0)
        self.mu_square += mu.mT @ mu

    def compute(self) -> ActivityReport:
        """The types over all batches.

        Raises:
            ValueError: Fewer than two samples have been seen.
        """
        n = float(self.count)
        if n < 2:
            raise ValueError(f"{n:.0f} samples have been seen: variances over data need at least two")
        a, square = (self.var_sums / n).cpu().numpy()
        v = np.maximum(square - a**2, 0)
        mean = self.mu_sum / n
        covariance = ((self.mu_square - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()
        # A mean that lies on a threshold comes out beside it by rounding, float32's where the encoder works in that.
        room = self.t_mean + 1e-6
        types = np.where(v >= self.t_var, "mixed", np.where(a <= room, "active", np.where(abs(a - 1) <= room, "passive", "mixed")))  # fmt: skip
        return ActivityReport(types, a, v, covariance.diagonal().copy(), covariance, covariance + np.diag(a))

    @classmethod
    def from_encoder(cls, encoder: Encoder, loader: Iterable[Any], **options: Any) -> Self:
        """Stream a loader through an encoder that gives (means, log-variances); see `PosteriorCollapse.from_encoder`."""
        return stream(cls, encoder, loader, **options)


class PassiveFilter(SelectorMixin, BaseEstimator):
    """Keeps the columns of a code whose variables are of certain types, as a scikit-learn transformer.

    Args:
        keep: Types to keep.
        allow_empty: Give no columns, instead of an error, where none is of these types.

    Example:
        >>> var = np.tile([0.01, 1.0], (20, 1))
        >>> PassiveFilter().fit(np.zeros((20, 2)), var).transform(np.ones((3, 2))).shape
        (3, 1)
    """

    def __init__(self, keep: Sequence[str] = ("active", "mixed"), allow_empty: bool = False) -> None:
        self.keep = keep
        self.allow_empty = allow_empty

    def fit(self, mu: ArrayLike, var: ArrayLike) -> PassiveFilter:
        """Learn the types from the encoder's means and variances, each (n, d).

        Raises:
            ValueError: Nothing is left to keep, a type is unknown, or the input is not sound.
        """
        if not set(self.keep) <= set(_KINDS):
            raise ValueError(f"keep is {self.keep}: choose among {', '.join(_KINDS)}")
        means, variances = (torch.as_tensor(np.asarray(values)) for values in (mu, var))
        activity = VariableActivity(means.shape[-1])
        activity.update(means, variances)
        self.report_ = activity.compute()
        self.n_features_in_ = means.shape[-1]
        if not self._get_support_mask().any() and not self.allow_empty:
            raise ValueError(f"no variable is {' or '.join(self.keep)}: keep others, or set allow_empty=True")
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        return np.isin(self.report_.types, list(self.keep))


def gaussian_total_correlation(C: ArrayLike) -> float:
    """Total correlation of a Gaussian with covariance C (d, d), in nats; inf with a warning where C is singular.

    Example:
        >>> round(gaussian_total_correlation([[1.0, 0.6], [0.6, 1.0]]), 4)
        0.2231
    """
    C = np.asarray(C, np.float64)
    sign, log_det = np.linalg.slogdet(C)
    if sign <= 0 or not np.isfinite(log_det):
        warnings.warn("the covariance is singular: its total correlation is infinite", RuntimeWarning, stacklevel=2)
        return float("inf")
    return float(0.5 * (np.log(C.diagonal()).sum() - log_det))


def gaussian_wasserstein_correlation(C: ArrayLike, *, normalised: bool = False) -> float:
    """Squared Wasserstein distance of a Gaussian with covariance C (d, d) from its independent version.

    Example:
        >>> round(gaussian_wasserstein_correlation([[1.0, 0.6], [0.6, 1.0]]), 4)
        0.2053
    """
    C = np.asarray(C, np.float64)
    scale = np.sqrt(C.diagonal())
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(scale[:, None] * C * scale), 0)).sum()
    distance = 2 * (C.trace() - root)
    return float(distance / C.trace() if normalised else distance)


def averaged_mutual_information(Z: ArrayLike, bins: int = 20) -> float:
    """Mean over pairs of different columns of Z (n, d) of their plug-in mutual information, equal-width bins, in nats.

    Raises:
        ValueError: Fewer than two columns, or bins below 1.

    Example:
        >>> z = np.repeat([0.0, 1.0], 10)
        >>> round(averaged_mutual_information(np.stack([z, z], 1)), 4)
        0.6931
    """
    Z = np.asarray(Z, np.float64)
    if Z.ndim != 2 or Z.shape[1] < 2 or bins < 1:
        raise ValueError(f"Z has shape {Z.shape}: give (n, d) with at least two columns, and at least one bin")
    low, width = Z.min(0), np.ptp(Z, axis=0)
    cut = np.minimum(bins * (Z - low) / np.where(width > 0, width, 1), bins - 1).astype(int)
    return float(np.mean([mutual_info_score(cut[:, i], cut[:, j]) for i, j in combinations(range(Z.shape[1]), 2)]))


def effective_rank(C: ArrayLike) -> float:
    """Exponential of the entropy of C's normalised singular values, from 1 to d.

    Example:
        >>> round(effective_rank(np.eye(3)), 6)
        3.0
    """
    values = np.linalg.svd(np.asarray(C, np.float64), compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def representation_report(
    mu: ArrayLike, var: ArrayLike, *, random_state: int = 0
) -> dict[tuple[str, str], dict[str, float]]:
    """Dependence within mean and sampled codes, for all variables and each union of types.

    Args:
        mu: Means (n, d).
        var: Variances (n, d).
        random_state: Of the one draw for each sample.

    Returns:
        By group ("full", "active", "active+mixed", ...) and code ("mean" or "sampled"): total_correlation, wasserstein
        (normalised), mutual_information and effective_rank. Groups of fewer than two variables are left out.
    """
    mu, var = np.asarray(mu, np.float64), np.asarray(var, np.float64)
    types = PassiveFilter(_KINDS).fit(mu, var).report_.types
    sampled = mu + np.sqrt(var) * np.random.default_rng(random_state).standard_normal(mu.shape)
    groups = {"full": _KINDS, **{"+".join(kinds): kinds for size in (1, 2) for kinds in combinations(_KINDS, size)}}
    table = {}
    for group, kinds in groups.items():
        chosen = np.flatnonzero(np.isin(types, kinds))
        if len(chosen) < 2:
            continue
        for name, code in (("mean", mu), ("sampled", sampled)):
            C = np.cov(code[:, chosen], rowvar=False)
            table[group, name] = {
                "total_correlation": gaussian_total_correlation(C),
                "wasserstein": gaussian_wasserstein_correlation(C, normalised=True),
                "mutual_information": averaged_mutual_information(code[:, chosen]),
                "effective_rank": effective_rank(C),
            }
    return table
