"""FunctionalTucker: Tucker decomposition of tensors whose indices are real numbers (arXiv 2311.04829)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.distributions import Normal

from paperworks.linalg import cholesky
from paperworks.state_space import Kernel, StateSpaceGP
from paperworks.uncertainty.estimator import Array, ProbabilisticRegressor, RandomState, generator_of

Core = Literal["tucker", "cp"]
Prior: TypeAlias = "StateSpaceGP | IndependentRows"
Kind = Literal["continuous", "categorical"]

# Numbers that are held at a time for a block of entries.
_BLOCK = 2**21
# Numbers that an entry takes with a full core, the product of all R_k (R_k + 1) / 2.
_MOST_WIDE = 2**18
# Before anything is seen: variance of latent values about a path of the prior, and noise precision of unit targets.
_START_VARIANCE, _START_PRECISION = 1e-4, 10.0


class FunctionalTucker(ProbabilisticRegressor):
    """Bayesian Tucker decomposition with a function of each index in the place of each factor matrix (FunBaT).

    An entry at indices (i_1, ..., i_K) is y = vec(W)^T (u_1(i_1) kron ... kron u_K(i_K)) + N(0, 1 / tau), where each of the R_k
    coordinates of u_k is a Gaussian process over the index of mode k, vec(W) ~ N(0, I) and tau ~ Gamma(a0, b0). A mode may also
    be categorical; its rows are then independent, as in ordinary Tucker. With `core="cp"` W is fixed to a superdiagonal of
    ones.

    Posteriors of functions, core and noise are found in turn, each given the others. To the functions of a mode, entries are
    Gaussian pseudo-observations, so that a Kalman filter and smoother give their posterior: a sweep costs time linear in the
    entries. The evidence lower bound never falls; of several random starts the one with the highest is kept. Lengthscales are not
    learned: the highest `elbo_` of several fits tells which to take, or a `GridSearchCV`.

    Indices of continuous modes are scaled to [0, 1] and targets to unit variance first, by what is fitted. Rows are predicted
    and drawn independently of one another, as normal distributions with the exact mean and variance under the posterior.

    Where it differs from the paper: a constant is added, for a Tucker decomposition of centred targets would spend a rank on
    what was subtracted. From the authors' release: the core has the prior above, and its covariance is in all moments; an
    index between, before and after those seen is predicted exactly; indices are not rounded.

    Args:
        ranks: R_k of each mode, or one for all.
        core: "tucker", or "cp" for equal ranks without a core.
        kernel: Of the functions, "matern12" or "matern32".
        lengthscale: Of the functions, in shares of the range of a mode's indices; one for all modes, or one of each.
        variance: Of the functions; one for all modes, or one of each.
        modes: "continuous" or "categorical" of each column of X; all are continuous by default. A category that was not
            fitted is predicted from the prior.
        intercept: Whether a constant is added to all entries, with prior N(0, 1) about the mean of y in its standard
            deviations. Without one targets are scaled and not centred, as in the paper.
        a0: Shape of the Gamma prior of the noise precision.
        b0: Its rate, for targets of unit variance.
        damping: Share of the old natural parameters in each update, from 0 to below 1.
        max_iter: Sweeps at most.
        tol: The sweeps end when the lower bound rises by less than this much an entry, in nats.
        n_restarts: Random starts.
        random_state: Of the starts.

    Attributes:
        core_: Posterior mean of W for targets of unit variance, (R_1, ..., R_K).
        noise_: Standard deviation of the noise, in the unit of y.
        elbo_: Lower bound on the log evidence of y, in nats.
        elbos_: The same after each sweep.
        n_iter_: Sweeps made.

    Raises:
        ValueError: In `fit`: an argument out of range, or ranks, lengthscales, variances or modes that are not as many as the
            columns of X.

    Example:
        >>> X = np.random.default_rng(0).uniform(size=(200, 2))
        >>> y = np.sin(6 * X[:, 0]) * np.cos(4 * X[:, 1])
        >>> model = FunctionalTucker(ranks=1, lengthscale=0.3, random_state=0).fit(X[:150], y[:150])
        >>> mean, std = model.predict(X[150:], return_std=True)
        >>> bool(abs(mean - y[150:]).max() < 0.1), model.latent(0, [0.5])[0].shape
        (True, (1, 1))
    """

    # With three modes of rank two and three starts some 11 GiB.
    _most_rows: ClassVar[int | None] = 1_000_000

    def __init__(
        self,
        ranks: int | Sequence[int] = 2,
        core: Core = "tucker",
        kernel: Kernel = "matern32",
        lengthscale: float | Sequence[float] = 0.1,
        variance: float | Sequence[float] = 1.0,
        modes: Sequence[Kind] | None = None,
        intercept: bool = True,
        a0: float = 1.0,
        b0: float = 1.0,
        damping: float = 0.0,
        max_iter: int = 100,
        tol: float = 1e-4,
        n_restarts: int = 3,
        random_state: RandomState = None,
    ) -> None:
        self.ranks = ranks
        self.core = core
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.variance = variance
        self.modes = modes
        self.intercept = intercept
        self.a0 = a0
        self.b0 = b0
        self.damping = damping
        self.max_iter = max_iter
        self.tol = tol
        self.n_restarts = n_restarts
        self.random_state = random_state

    def latent(self, mode: int, t: ArrayLike) -> tuple[Array, Array]:
        """Means and standard deviations, each (m, R), of a mode's functions at indices t (m,) in the unit of X.

        They are told from one another by the prior alone: an invertible mixing of them that the core undoes leaves all
        predictions as they are.

        Raises:
            ValueError: There is no such mode, or indices are not finite.
        """
        check_is_fitted(self)
        if not isinstance(mode, Integral) or not 0 <= mode < len(self._posteriors):
            raise ValueError(f"modes are counted from 0 to {len(self._posteriors) - 1}, got {mode}")
        places = np.asarray(t, dtype=np.float64)
        if places.ndim != 1 or not len(places) or not np.isfinite(places).all():
            raise ValueError(f"indices t are finite numbers (m,), at least one, got shape {places.shape}")
        scaled = torch.from_numpy((places - self.feature_mean_[mode]) / self.feature_scale_[mode])
        mean, cov = self._posteriors[mode].at(scaled)
        return mean.numpy(), cov.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().numpy()

    def _check(self) -> None:
        if self.core not in get_args(Core):
            raise ValueError(f"core is one of {', '.join(get_args(Core))}, got {self.core!r}")
        for name, least in (("max_iter", 1), ("n_restarts", 1)):
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {getattr(self, name)!r}")
        for name in ("a0", "b0"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a number above 0, got {getattr(self, name)!r}")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping is from 0 to below 1, got {self.damping!r}")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol is a number of at least 0, got {self.tol!r}")

    def _measured(self, X: Array) -> Array:
        super()._measured(X)
        modes = self._of_modes("modes", X.shape[1]) if self.modes is not None else ["continuous"] * X.shape[1]
        if unknown := set(modes) - set(get_args(Kind)):
            raise ValueError(f"modes are {' or '.join(get_args(Kind))}, got {sorted(map(str, unknown))}")
        self._kinds = modes
        # The base class's names, for the ends of what was fitted: indices lie within [0, 1].
        measured, span = np.array([kind == "continuous" for kind in modes]), np.ptp(X, axis=0)
        self.feature_mean_ = np.where(measured, X.min(0), 0.0)
        self.feature_scale_ = np.where(measured & (span > 0), span, 1.0)
        return X

    def _of_modes(self, name: str, count: int) -> list[Any]:
        """An argument that is given once for all modes, or for each."""
        given = getattr(self, name)
        if name != "modes" and isinstance(given, Real):
            return [given] * count
        if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != count:
            raise ValueError(f"X has {count} columns, so {name} names {count} modes, got {given!r}")
        return list(given)

    def _fit(self, X: Tensor, y: Tensor) -> None:
        if not self.intercept:
            # Without one, zero means zero: targets are scaled only.
            y = y + float(self.target_mean_[0] / self.target_scale_[0])
            self.target_mean_ = np.zeros(1)
        # In one order, so that sums are the same to the last digit in whatever order rows come.
        order = torch.from_numpy(np.lexsort((y.numpy(), *X.T.numpy()[::-1])))
        X, y = X[order], y[order]
        found = MeanField(
            X, y, self._priors(X.shape[1]), self._core_of(X.shape[1]), intercept=self.intercept,
            n_starts=int(self.n_restarts), a0=self.a0, b0=self.b0, damping=self.damping,
            generator=generator_of(self.random_state),
        )  # fmt: skip
        bounds: list[Tensor] = []
        for _ in range(self.max_iter):
            found.sweep()
            bounds.append(found.elbo())
            if len(bounds) > 1 and _settled(bounds[-2], bounds[-1], len(bounds), self.tol * len(y)):
                break
        best = int(bounds[-1].argmax())
        self.elbos_ = torch.stack(bounds)[:, best].numpy() - len(y) * math.log(self.target_scale_[0])
        tensors = {f"core.{name}": value[best] for name, value in found.core.state().items()}
        tensors["noise"] = torch.stack([found.a[best], found.b[best]])
        tensors["constant"] = torch.stack([found.constant[best], found.constant_variance[best]])
        for k, mode in enumerate(found.modes):
            tensors |= {
                f"modes.{k}.places": mode.places, f"modes.{k}.precision": mode.precision[best],
                f"modes.{k}.shift": mode.shift[best],
            }  # fmt: skip
        self._keep(tensors)

    def _priors(self, count: int) -> list[Prior]:
        lengthscales, variances = (self._of_modes(name, count) for name in ("lengthscale", "variance"))
        return [
            StateSpaceGP(self.kernel, lengthscale, variance) if kind == "continuous" else IndependentRows(variance)
            for kind, lengthscale, variance in zip(self._kinds, lengthscales, variances, strict=True)
        ]

    def _core_of(self, count: int) -> TuckerCore | CPCore:
        ranks = self._of_modes("ranks", count)
        if not all(isinstance(rank, Integral) and int(rank) >= 1 for rank in ranks):
            raise ValueError(f"ranks are whole numbers of at least 1, got {self.ranks!r}")
        ranks = [int(rank) for rank in ranks]
        if self.core == "cp":
            if len(set(ranks)) > 1:
                raise ValueError(f"without a core all modes have one rank, got ranks={self.ranks!r}: give one number")
            return CPCore(ranks[0], count)
        core = TuckerCore(ranks)
        if core.width > _MOST_WIDE:
            raise ValueError(
                f"{count} modes of ranks {', '.join(map(str, ranks))} take {core.width:,} numbers an entry, and up to "
                f"{_MOST_WIDE:,} are supported: give lower ranks, fewer columns or core='cp'"
            )
        return core

    def _keep(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        priors = self._priors(len(self.feature_mean_))
        self._posteriors = [
            prior.posterior(*(tensors[f"modes.{k}.{name}"] for name in ("places", "precision", "shift")))
            for k, prior in enumerate(priors)
        ]
        self._core = self._core_of(len(priors))
        self._core.restore({
            name.removeprefix("core."): value[None] for name, value in tensors.items() if name.startswith("core.")
        })  # fmt: skip
        a, b = tensors["noise"]
        self._noise_variance = b / a
        self.core_ = self._core.mean_tensor()[0].numpy()
        self.noise_ = float(self._noise_variance.sqrt() * self.target_scale_[0])
        self.elbo_, self.n_iter_ = float(self.elbos_[-1]), len(self.elbos_)

    def _predictive(self, X: Tensor) -> Normal:
        moments, which = [], []
        for k, posterior in enumerate(self._posteriors):
            places, rows = X[:, k].unique(return_inverse=True)
            mean, cov = posterior.at(places)
            moments.append((mean[None], _second_moments(mean, cov)[None]))
            which.append(rows)
        found = []
        for block in _blocks(len(X), self._core.width):
            chosen = [[part[:, rows[block]] for part in parts] for parts, rows in zip(moments, which, strict=True)]
            means, seconds = zip(*chosen, strict=True)
            found.append(torch.cat(self._core.moments(means, seconds)))
        mean, second = torch.cat(found, dim=1)
        constant, spread = self._tensors["constant"]
        variance = (second - mean.square()).clamp(min=0) + spread + self._noise_variance
        return Normal(mean + constant, variance.sqrt())

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._tensors, {"elbos": self.elbos_.tolist(), "modes": self._kinds}

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.elbos_, self._kinds = np.array(values["elbos"]), values["modes"]
        self._keep(tensors)


class MeanField:
    """The posterior q(u_1) ... q(u_K) q(W) q(tau) of several random starts at once, by coordinate ascent.

    Args:
        X: Indices (N, K).
        y: Entries (N,).
        priors: Of the functions of each mode.
        core: W.
        intercept: Whether a constant c ~ N(0, 1) is added to each entry.
        n_starts: Starts S.
        a0: Shape of the prior of tau.
        b0: Its rate.
        damping: Share of the old natural parameters in each update.
        generator: Of the starts.

    Attributes:
        modes: The functions of each mode.
        core: W.
        a: Shape of q(tau), (S,).
        b: Its rate, (S,).
        constant: Mean of q(c), (S,), zero without an intercept.
        constant_variance: Its variance.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        priors: Sequence[Prior],
        core: TuckerCore | CPCore,
        *,
        intercept: bool = False,
        n_starts: int = 1,
        a0: float = 1.0,
        b0: float = 1.0,
        damping: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.y, self.core, self.damping = y, core, damping
        self.a0, self.b0 = (torch.full((n_starts,), value, dtype=torch.float64) for value in (a0, b0))
        self.modes = [
            Mode(prior, indices, rank, n_starts, generator)
            for prior, indices, rank in zip(priors, X.T, core.ranks, strict=True)
        ]
        self.a, self.b = torch.full_like(self.a0, _START_PRECISION), torch.ones_like(self.b0)
        self.intercept = intercept
        self.constant, self.constant_variance = torch.zeros_like(self.a0), torch.zeros_like(self.a0)
        core.start(n_starts)
        self._weights = torch.stack([y, torch.ones_like(y)], dim=1)
        self._collected: tuple[Tensor, Tensor] | None = None
        self.update_core()

    @property
    def tau(self) -> Tensor:
        """Mean of q(tau), (S,)."""
        return self.a / self.b

    def sweep(self) -> None:
        """Update the functions of each mode in turn, then the core, then the noise."""
        for k in range(len(self.modes)):
            self.update_mode(k)
        self.update_core()
        self.update_intercept()
        self.update_noise()

    def update_mode(self, k: int) -> None:
        """The functions of mode k given the rest: messages of all entries to them, then their filter and smoother."""
        mode, tau = self.modes[k], self.tau[:, None, None]
        precision = tau.new_zeros(len(tau), len(mode.places), mode.second.shape[-1])
        shift = tau.new_zeros(len(tau), len(mode.places), mode.mean.shape[-1])
        for block in _blocks(len(self.y), len(self.tau) * self.core.width):
            quadratic, linear = self.core.messages(k, *self._moments(block))
            precision.index_add_(1, mode.rows[block], quadratic)
            shift.index_add_(1, mode.rows[block], linear * (self.y[block] - self.constant[:, None])[:, :, None])
        mode.update(_unpacked(tau * precision), tau * shift, self.damping)
        self._collected = None

    def update_core(self) -> None:
        """The core given functions and noise."""
        second, linear = self.collected()
        self.core.update(second, linear[..., 0] - self.constant[:, None] * linear[..., 1], self.tau, self.damping)

    def update_intercept(self) -> None:
        """The constant given the rest."""
        if self.intercept:
            precision = 1 + len(self.y) * self.tau
            _, linear = self.collected()
            self.constant = self.tau * (self.y.sum() - self.core.expected(linear[..., 1])) / precision
            self.constant_variance = 1 / precision

    def update_noise(self) -> None:
        """The noise given functions and core."""
        keep = self.damping
        self.a = keep * self.a + (1 - keep) * (self.a0 + len(self.y) / 2)
        self.b = keep * self.b + (1 - keep) * (self.b0 + self.squared_error() / 2)

    def squared_error(self) -> Tensor:
        """Expected sum over entries of (y - w^T z)^2, (S,)."""
        second, linear = self.collected()
        left = (self.y - self.constant[:, None]).square().sum(1) + len(self.y) * self.constant_variance
        fit = self.core.expected(linear[..., 0] - self.constant[:, None] * linear[..., 1])
        return (left - 2 * fit + self.core.expected_square(second)).clamp(min=0)

    def elbo(self) -> Tensor:
        """Evidence lower bound, (S,), in nats."""
        a, b, a0, b0 = self.a, self.b, self.a0, self.b0
        fit = len(self.y) / 2 * (a.digamma() - b.log() - math.log(2 * math.pi)) - self.tau / 2 * self.squared_error()
        noise = (a - a0) * a.digamma() - a.lgamma() + a0.lgamma() + a0 * (b / b0).log() + a * (b0 / b - 1)
        if self.intercept:
            c, v = self.constant, self.constant_variance
            fit = fit - (v + c.square() - 1 - v.log()) / 2
        return fit - noise - self.core.kl - torch.stack([mode.kl for mode in self.modes]).sum(0)

    def collected(self) -> tuple[Tensor, Tensor]:
        """Sums over entries of E[z z^T], packed, and of E[z] times y and 1, where z is the product of all modes' functions."""
        if self._collected is None:
            parts = [
                self.core.statistics(*self._moments(block), self._weights[block])
                for block in _blocks(len(self.y), len(self.tau) * self.core.width)
            ]
            second, linear = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
            self._collected = second, linear
        return self._collected

    def _moments(self, block: slice) -> tuple[list[Tensor], list[Tensor]]:
        means = [mode.mean[:, mode.rows[block]] for mode in self.modes]
        return means, [mode.second[:, mode.rows[block]] for mode in self.modes]


class Mode:
    """Posterior q(u) of the functions of one mode, at its different indices, of S starts.

    Args:
        prior: Of each of its R functions.
        indices: One of each entry, (N,).
        rank: R.
        n_starts: S.
        generator: Of paths of the prior, from which they start.

    Attributes:
        places: The different indices, ascending, (T,).
        rows: Which of them is that of each entry, (N,).
        mean: E[u], (S, T, R).
        second: E[u u^T], packed, (S, T, R (R + 1) / 2).
        precision: Natural parameters of the messages to u, (S, T, R, R).
        shift: The same, (S, T, R).
        kl: Divergence from the prior, (S,).
    """

    precision: Tensor
    shift: Tensor
    kl: Tensor

    def __init__(
        self, prior: Prior, indices: Tensor, rank: int, n_starts: int, generator: torch.Generator | None
    ) -> None:
        self.prior = prior
        self.places, self.rows = indices.unique(return_inverse=True)
        paths = prior.sample(self.places, n_starts * rank, generator=generator)
        self.mean = paths.unflatten(0, (n_starts, rank)).mT
        self.second = _second_moments(self.mean, _START_VARIANCE * torch.eye(rank, dtype=torch.float64))
        self._begun = False

    def update(self, precision: Tensor, shift: Tensor, damping: float) -> None:
        """Take in messages, and find q(u)."""
        if self._begun and damping:
            precision = damping * self.precision + (1 - damping) * precision
            shift = damping * self.shift + (1 - damping) * shift
        self.precision, self.shift, self._begun = precision, shift, True
        found = self.prior.posterior(self.places, precision, shift)
        self.mean, self.second, self.kl = found.mean, _second_moments(found.mean, found.cov), found.kl


class TuckerCore:
    """Posterior q(W) = N(mean, cov) of a full core, of S starts.

    Args:
        ranks: R_1, ..., R_K.

    Attributes:
        mean: E[vec W], (S, R_1 ... R_K), the last mode's index running fastest.
        cov: Its covariance.
        kl: Divergence from N(0, I), (S,).
        width: Numbers that an entry takes in one start.
    """

    mean: Tensor
    cov: Tensor
    kl: Tensor

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.width = math.prod(_packed_size(rank) for rank in ranks)
        self._precision: Tensor | None = None
        self._shift: Tensor | None = None

    def start(self, n_starts: int) -> None:
        """There is nothing to start from: the core is the first to be updated."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set what `state` gave."""
        self.mean, self.cov = state["mean"], state["cov"]
        # E[W W^T] with the pair of indices of each mode packed: of its moments, only what is symmetric in each pair counts.
        second = self.cov + self.mean[:, :, None] * self.mean[:, None, :]
        K = len(self.ranks)
        second = second.reshape(-1, *self.ranks, *self.ranks)
        second = second.permute(0, *(1 + k + K * side for k in range(K) for side in (0, 1)))
        for k, rank in enumerate(self.ranks):
            second = second.flatten(1 + k, 2 + k)
            folded = second.new_zeros(*second.shape[: 1 + k], _packed_size(rank), *second.shape[2 + k :])
            second = folded.index_add_(1 + k, _pair_of(rank).flatten(), second)
        self._second = second

    def state(self) -> dict[str, Tensor]:
        """Mean and covariance."""
        return {"mean": self.mean, "cov": self.cov}

    def mean_tensor(self) -> Tensor:
        """E[W], (S, R_1, ..., R_K)."""
        return self.mean.reshape(-1, *self.ranks)

    def messages(self, k: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What entries say to the functions of mode k, for tau = 1 and y = 1: E[W_k z z^T W_k^T], packed, and E[W_k] E[z].

        Here z is the Kronecker product of the other modes' functions and W_k the unfolding of the core along mode k.

        Args:
            k: The mode.
            means: E[u] of each mode, (S, n, R).
            seconds: E[u u^T] of each mode, packed, (S, n, R (R + 1) / 2).
        """
        others, other_means = ([part for j, part in enumerate(parts) if j != k] for parts in (seconds, means))
        quadratic = _products(others, means[k]) @ _unfolded(self._second, k) / _times(self.ranks[k])
        return quadratic, _products(other_means, means[k]) @ _unfolded(self.mean_tensor(), k)

    def moments(self, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """E[w^T z] and E[(w^T z)^2] of entries, each (S, n)."""
        quadratic, linear = self.messages(0, means, seconds)
        return (linear * means[0]).sum(-1), (quadratic * _times(self.ranks[0]) * seconds[0]).sum(-1)

    def statistics(self, means: Sequence[Tensor], seconds: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over entries of E[z z^T], packed by mode, and of E[z] times each of their weights (n, p); z is of all modes."""
        second = seconds[0].mT @ _products(seconds[1:], means[0])
        return second.flatten(1), _products(means, means[0]).mT @ weights

    def expected(self, linear: Tensor) -> Tensor:
        """Weighted sum over entries of E[w^T z], (S,), from that of E[z]."""
        return (self.mean * linear).sum(-1)

    def expected_square(self, second: Tensor) -> Tensor:
        """Sum over entries of E[(w^T z)^2], (S,), from that of E[z z^T]."""
        return (self._second.flatten(1) * second).sum(-1)

    def update(self, second: Tensor, linear: Tensor, tau: Tensor, damping: float = 0.0) -> None:
        """q(W) from `statistics`."""
        size = self.mean_size
        precision = torch.eye(size, dtype=second.dtype) + tau[:, None, None] * self._unpacked(second)
        shift = tau[:, None] * linear
        if damping and self._precision is not None and self._shift is not None:
            precision = damping * self._precision + (1 - damping) * precision
            shift = damping * self._shift + (1 - damping) * shift
        self._precision, self._shift = precision, shift
        root = cholesky(precision)
        cov = torch.cholesky_inverse(root)
        mean = torch.cholesky_solve(shift[:, :, None], root)[:, :, 0]
        self.kl = (cov.diagonal(dim1=-2, dim2=-1).sum(-1) + mean.square().sum(-1) - size) / 2
        self.kl = self.kl + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.restore({"mean": mean, "cov": cov})

    @property
    def mean_size(self) -> int:
        """Entries of the core."""
        return math.prod(self.ranks)

    def _unpacked(self, second: Tensor) -> Tensor:
        """Packed sums of E[z z^T] as (S, R_1 ... R_K, R_1 ... R_K)."""
        K = len(self.ranks)
        second = second.reshape(-1, *map(_packed_size, self.ranks))
        for k, rank in enumerate(self.ranks):
            second = second.index_select(1 + 2 * k, _pair_of(rank).flatten()).unflatten(1 + 2 * k, (rank, rank))
        second = second.permute(0, *range(1, 2 * K, 2), *range(2, 2 * K + 1, 2))
        return second.reshape(-1, self.mean_size, self.mean_size)


class CPCore:
    """A core that is fixed to a superdiagonal of ones: y is the sum over r of the product of all modes' r-th functions.

    It has the methods of `TuckerCore`, at the cost of R^2 an entry.

    Args:
        rank: R.
        count: Modes K.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.ranks = [rank] * count
        self.width = 2 * _packed_size(rank)

    def start(self, n_starts: int) -> None:
        """It is what it is, of each start."""
        self.kl = torch.zeros(n_starts, dtype=torch.float64)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def mean_tensor(self) -> Tensor:
        """W, (1, R, ..., R)."""
        rank, count = self.ranks[0], len(self.ranks)
        found = torch.zeros(rank**count, dtype=torch.float64)
        found[torch.arange(rank) * sum(rank**k for k in range(count))] = 1.0
        return found.reshape(1, *self.ranks)

    def messages(self, k: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As for `TuckerCore`: elementwise products of the other modes' moments."""
        quadratic, linear = torch.ones_like(seconds[k]), torch.ones_like(means[k])
        for j in range(len(means)):
            if j != k:
                quadratic, linear = quadratic * seconds[j], linear * means[j]
        return quadratic, linear

    def moments(self, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As for `TuckerCore`."""
        quadratic, linear = self.messages(0, means, seconds)
        return (linear * means[0]).sum(-1), (quadratic * seconds[0] * _times(self.ranks[0])).sum(-1)

    def statistics(self, means: Sequence[Tensor], seconds: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over entries of E[(w^T z)^2], (S, 1), and of E[w^T z] times each of their weights, (S, 1, p)."""
        mean, second = self.moments(means, seconds)
        return second.sum(-1, keepdim=True), (mean @ weights)[:, None]

    def expected(self, linear: Tensor) -> Tensor:
        """As for `TuckerCore`."""
        return linear.sum(-1)

    def expected_square(self, second: Tensor) -> Tensor:
        """As for `TuckerCore`."""
        return second.sum(-1)

    def update(self, second: Tensor, linear: Tensor, tau: Tensor, damping: float = 0.0) -> None:
        """It is fixed."""


class IndependentRows:
    """Rows N(0, variance I) of a categorical mode, with the methods of `StateSpaceGP` that a mode needs."""

    def __init__(self, variance: float) -> None:
        if not 0 < variance < math.inf:
            raise ValueError(f"variance is a number above 0, got {variance}")
        self.variance = variance

    def sample(self, t: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Rows drawn from the prior, (n, T)."""
        return math.sqrt(self.variance) * torch.randn(n, len(t), generator=generator, dtype=torch.float64)

    def posterior(self, t: Tensor, precision: Tensor, shift: Tensor) -> IndependentPosterior:
        """As that of `StateSpaceGP`."""
        return IndependentPosterior(self.variance, t, precision, shift)


class IndependentPosterior:
    """Rows of a categorical mode given messages, with the attributes of `StateSpacePosterior` that a mode needs."""

    def __init__(self, variance: float, t: Tensor, precision: Tensor, shift: Tensor) -> None:
        self._variance, self._categories = variance, t
        R = shift.shape[-1]
        root = torch.linalg.cholesky(torch.eye(R, dtype=shift.dtype) / variance + precision)
        self.cov = torch.cholesky_inverse(root)
        self.mean = torch.cholesky_solve(shift[..., None], root)[..., 0]
        spread = self.cov.diagonal(dim1=-2, dim2=-1).sum(-1) + self.mean.square().sum(-1)
        entropy = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.kl = ((spread / variance - R + R * math.log(variance)) / 2 + entropy).sum(-1)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means (..., M, R) and covariances (..., M, R, R) of categories t (M,); of one that is not known, the prior's."""
        places = torch.searchsorted(self._categories, t).clamp(max=len(self._categories) - 1)
        known = self._categories[places] == t
        R = self.mean.shape[-1]
        mean = torch.where(known[:, None], self.mean[..., places, :], 0.0)
        prior = self._variance * torch.eye(R, dtype=self.cov.dtype)
        return mean, torch.where(known[:, None, None], self.cov[..., places, :, :], prior)


def _settled(before: Tensor, now: Tensor, sweeps: int, least: float) -> bool:
    """Whether no start rises by `least` any more, but for those that would not reach the best in as many sweeps again."""
    rise = now - before
    return bool(((rise < least) | (now + sweeps * rise < now.max())).all())


# Symmetric matrices (..., R, R) are kept packed, as the R (R + 1) / 2 entries of their upper triangle.


def _packed_size(rank: int) -> int:
    return rank * (rank + 1) // 2


@cache
def _upper(rank: int) -> Tensor:
    return torch.triu_indices(rank, rank)


@cache
def _pair_of(rank: int) -> Tensor:
    """Where each entry of an (R, R) matrix lies when packed."""
    places = torch.empty(rank, rank, dtype=torch.long)
    rows, columns = _upper(rank)
    places[rows, columns] = places[columns, rows] = torch.arange(_packed_size(rank))
    return places


@cache
def _times(rank: int) -> Tensor:
    """How often each packed entry stands in the matrix, 1 or 2."""
    rows, columns = _upper(rank)
    return torch.where(rows == columns, 1.0, 2.0).double()


def _second_moments(mean: Tensor, cov: Tensor) -> Tensor:
    """E[u u^T] = cov + mean mean^T, packed."""
    rows, columns = _upper(mean.shape[-1])
    return cov[..., rows, columns] + mean[..., rows] * mean[..., columns]


def _unpacked(packed: Tensor) -> Tensor:
    rank = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    return packed[..., _pair_of(rank)]


def _unfolded(tensors: Tensor, k: int) -> Tensor:
    """Of tensors (S, n_1, ..., n_K) the unfolding along mode k, transposed, (S, the other n, n_k)."""
    moved = tensors.movedim(1 + k, -1)
    return moved.reshape(len(tensors), -1, moved.shape[-1])


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Entries, so many at a time that not too many numbers are held."""
    size = max(1, _BLOCK // width)
    return (slice(start, start + size) for start in range(0, count, size))


def _products(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Kronecker products of the rows of several (S, n, r), the last one's index running fastest; ones where there is none."""
    found = like.new_ones(*like.shape[:-1], 1)
    for part in parts:
        found = (found[..., :, None] * part[..., None, :]).flatten(-2)
    return found
