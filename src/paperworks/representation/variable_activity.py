"""Active, mixed and passive latent variables of a VAE; mean against sampled codes (arXiv 2109.12679)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.metrics import mutual_info_score
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from paperworks.representation.metric import StreamedMetric
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


class VariableActivity(StreamedMetric):
    """Sorts latent variables by the encoder's variance over data, in one pass (arXiv 2109.12679).

    With a the mean and v the variance over data of the encoder's variance: v < t_var and a <= t_mean is active,
    v < t_var and |a - 1| <= t_mean is passive, anything else is mixed. Kept are means and scatter in float64, into which
    batches and processes are merged, so that means far from zero lose no digits.

    Args:
        dims: Latent variables d.
        prior_std: Standard deviation of the prior.
        t_var: Threshold on v.
        t_mean: Threshold on a, below one half so that the types are disjoint.
        **options: Of torchmetrics.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> activity = VariableActivity(2)
        >>> activity.update(torch.randn(50, 2), torch.tensor([0.01, 1.0]).expand(50, 2))
        >>> activity.compute().types.tolist()
        ['active', 'passive']
    """

    seen: Tensor
    dims: int
    prior_std: float
    t_var: float
    t_mean: float

    def __init__(
        self, dims: int, *, prior_std: float = 1.0, t_var: float = 0.1, t_mean: float = 0.1, **options: Any
    ) -> None:
        super().__init__(**options)
        bounded = 0 < prior_std < math.inf and 0 < t_var < math.inf and 0 < t_mean < 0.5
        if not isinstance(dims, Integral) or dims < 1 or not bounded:
            raise ValueError(
                "give dims of at least 1, prior_std and t_var finite and above 0 and t_mean between 0 and 0.5, got "
                f"{dims}, {prior_std}, {t_var} and {t_mean}"
            )
        self.dims, self.prior_std, self.t_var, self.t_mean = int(dims), prior_std, t_var, t_mean
        # One state, because means can be merged only together with counts.
        nothing = torch.zeros(1 + 3 * dims + dims**2, dtype=torch.float64)
        self.add_state("seen", nothing, dist_reduce_fx=partial(_merged, dims=self.dims))

    def update(self, mu: Tensor, var: Tensor) -> None:
        """Take in the posteriors of a batch.

        Args:
            mu: Means (n, d).
            var: Variances (n, d), not their logarithms.

        Raises:
            ValueError: Shapes do not fit, values are not finite, or a variance is not positive.
            TypeError: They are no real numbers.
        """
        mu, var = posteriors(mu, var, self.dims)
        if not len(mu):
            return
        mu, var = mu / self.prior_std, var / self.prior_std**2
        centre, a = mu.mean(0), var.mean(0)
        batch = [
            mu.new_tensor([len(mu)]),
            a,
            (var - a).square().sum(0),
            centre,
            ((mu - centre).mT @ (mu - centre)).ravel(),
        ]
        self.seen = _merged(torch.stack([self.seen, torch.cat(batch).to(self.seen.device)]), self.dims)

    def compute(self) -> ActivityReport:
        """The types over all batches.

        Raises:
            ValueError: Fewer than two samples have been seen.
        """
        count, means, squares, _, scatter = _parts(self.seen.cpu(), self.dims)
        n = float(count)
        if n < 2:
            self._untold(f"{n:.0f} samples have been seen: variances over data need at least two")
        a, v, covariance = means.numpy(), (squares / n).numpy(), (scatter / (n - 1) if n > 1 else scatter / 0).numpy()
        # A mean that lies on a threshold comes out beside it by rounding, float32's where the encoder works in that.
        room = self.t_mean + 1e-6
        types = np.where(v >= self.t_var, "mixed", np.where(a <= room, "active", np.where(abs(a - 1) <= room, "passive", "mixed")))  # fmt: skip
        return ActivityReport(types, a, v, covariance.diagonal().copy(), covariance, covariance + np.diag(a))

    @classmethod
    def from_encoder(cls, encoder: Encoder, loader: Iterable[Any], **options: Any) -> Self:
        """Stream a loader through an encoder that gives (means, log-variances); see `PosteriorCollapse.from_encoder`."""
        return stream(cls, encoder, loader, **options)


def _parts(seen: Tensor, dims: int) -> tuple[Tensor, ...]:
    """Count (...), means of the variances (..., d) and their squares about it, means of the means and scatter (..., d, d)."""
    count, *middle, scatter = seen.split([1, dims, dims, dims, dims**2], -1)
    return count[..., 0], *middle, scatter.unflatten(-1, (dims, dims))


def _merged(seen: Tensor, dims: int) -> Tensor:
    """What several batches or processes have seen, (k, 1 + 3 d + d^2), as one, by Chan's rule."""
    count, var_means, var_squares, centres, scatter = _parts(seen, dims)
    share = count / count.sum().clamp(min=1)
    a, centre = share @ var_means, share @ centres
    apart = centres - centre
    return torch.cat([
        count.sum(0, keepdim=True), a, var_squares.sum(0) + count @ (var_means - a).square(), centre,
        (scatter.sum(0) + (apart * count[:, None]).mT @ apart).ravel(),
    ])  # fmt: skip


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
        """Learn the types from the encoder's means and variances, each (n, d), with columns in one order.

        Raises:
            ValueError: Nothing is left to keep, a type is unknown, or the input is not sound.
        """
        if not set(self.keep) <= set(_KINDS):
            raise ValueError(f"keep is {self.keep}: choose among {', '.join(_KINDS)}")
        means = validate_data(self, _array(mu), dtype=np.float64, ensure_min_samples=2)
        variances = validate_data(self, _array(var), dtype=np.float64, reset=False)
        activity = VariableActivity(means.shape[-1])
        activity.update(*(torch.tensor(values) for values in (means, variances)))
        self.report_ = activity.compute()
        if not self._get_support_mask().any() and not self.allow_empty:
            raise ValueError(f"no variable is {' or '.join(self.keep)}: keep others, or set allow_empty=True")
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        return np.isin(self.report_.types, list(self.keep))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Variances take the place of targets.
        tags.target_tags.required = True
        return tags


def _array(values: Any) -> Any:
    """A tensor of any device or precision as an array; anything else as it is."""
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values


def _covariance(C: Any) -> Array:
    """A covariance matrix, once it is known to be one but for rounding.

    Raises:
        ValueError: It is not square, finite, symmetric or has a negative variance.
    """
    C = np.asarray(_array(C), np.float64)
    if C.ndim != 2 or C.shape[0] != C.shape[1] or not C.size or not np.isfinite(C).all():
        raise ValueError(f"C is a covariance matrix (d, d) of finite numbers, got shape {C.shape}")
    if (C.diagonal() < 0).any() or not np.allclose(C, C.T, rtol=1e-6, atol=1e-6 * np.abs(C).max()):
        raise ValueError(
            "C is not symmetric, or has negative variances: give a covariance matrix, as numpy.cov makes one"
        )
    return C


def gaussian_total_correlation(C: ArrayLike) -> float:
    """Total correlation of a Gaussian with covariance C (d, d), in nats.

    It is inf, with a warning, where variables determine one another. A variable without variance depends on none.

    Raises:
        ValueError: C is no covariance matrix.

    Example:
        >>> round(gaussian_total_correlation([[1.0, 0.6], [0.6, 1.0]]), 4)
        0.2231
    """
    C = _covariance(C)
    varied = C.diagonal() > 0
    scale = np.sqrt(C.diagonal()[varied])
    values = np.linalg.eigvalsh(C[np.ix_(varied, varied)] / scale[:, None] / scale)
    if len(values) and values[0] <= len(values) * np.finfo(float).eps:
        warnings.warn("the covariance is singular: its total correlation is infinite", RuntimeWarning, stacklevel=2)
        return float("inf")
    return float(-0.5 * np.log(values).sum())


def gaussian_wasserstein_correlation(C: ArrayLike, *, normalised: bool = False) -> float:
    """Squared Wasserstein distance of a Gaussian with covariance C (d, d) from its independent version.

    Args:
        C: The covariance.
        normalised: Divide by the sum of the variances, where there are any.

    Raises:
        ValueError: C is no covariance matrix.

    Example:
        >>> round(gaussian_wasserstein_correlation([[1.0, 0.6], [0.6, 1.0]]), 4)
        0.2053
    """
    C = _covariance(C)
    scale = np.sqrt(C.diagonal())
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(scale[:, None] * C * scale), 0)).sum()
    distance = 2 * (C.trace() - root)
    return float(distance / C.trace() if normalised and C.trace() > 0 else distance)


def averaged_mutual_information(Z: ArrayLike, bins: int = 20) -> float:
    """Mean over pairs of different columns of Z (n, d) of their plug-in mutual information, equal-width bins, in nats.

    Raises:
        ValueError: Fewer than two columns, values that are not finite, or bins below 1.

    Example:
        >>> z = np.repeat([0.0, 1.0], 10)
        >>> round(averaged_mutual_information(np.stack([z, z], 1)), 4)
        0.6931
    """
    Z = np.asarray(_array(Z), np.float64)
    if Z.ndim != 2 or Z.shape[1] < 2 or not len(Z) or bins < 1:
        raise ValueError(
            f"Z has shape {Z.shape} and bins is {bins}: give (n, d) with at least two columns, and at least one bin"
        )
    if not np.isfinite(Z).all():
        raise ValueError("Z holds NaN or infinity: leave such samples out")
    low, width = Z.min(0), np.ptp(Z, axis=0)
    cut = np.minimum(bins * (Z - low) / np.where(width > 0, width, 1), bins - 1).astype(int)
    return float(np.mean([mutual_info_score(cut[:, i], cut[:, j]) for i, j in combinations(range(Z.shape[1]), 2)]))


def effective_rank(C: ArrayLike) -> float:
    """Exponential of the entropy of C's normalised singular values, from 1 to d.

    Raises:
        ValueError: C is no covariance matrix, or all zero.

    Example:
        >>> round(effective_rank(np.eye(3)), 6)
        3.0
    """
    values = np.linalg.svd(_covariance(C), compute_uv=False)
    if not values[0] > 0:
        raise ValueError("C is all zero: a code that never varies has no effective rank")
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
        (normalised), mutual_information and effective_rank, which a code that never varies has not. Groups of fewer than
        two variables are left out.

    Raises:
        ValueError: As `PassiveFilter.fit`.
    """
    types = PassiveFilter(_KINDS).fit(mu, var).report_.types
    mu, var = np.asarray(_array(mu), np.float64), np.asarray(_array(var), np.float64)
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
                **({"effective_rank": effective_rank(C)} if C.any() else {}),
            }
    return table
