"""Wide networks with a prior on the variance of their last layer: scale mixtures of Gaussian processes (arXiv 2107.01408)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import burr12, invgamma
from sklearn.base import clone
from sklearn.utils import check_random_state, check_X_y
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal, StudentT

from paperworks.linalg import NanError, NotPSDError, cholesky, erf_gram, relu_gram
from paperworks.uncertainty.estimator import (
    ProbabilisticClassifier,
    ProbabilisticRegressor,
    RandomState,
    check_together,
    generator_of,
)

Activation = Literal["relu", "erf"]
Kernel = Callable[[Tensor, Tensor], Any]
# "invgamma", ("burr12", c, d), ("point", s2), a frozen distribution of SciPy, or a log density of arrays of s2.
Prior = Any
_NODES = 600


class NNGPKernel(nn.Module):
    """Covariance of a wide network of `depth` hidden layers at initialisation, its last layer's weights of unit variance.

    K_0 = w^2 x . x' / d + b^2 and K_l = w^2 E[phi phi] + b^2; the last layer, without bias, leaves E[phi phi] of K_depth-1.

    Args:
        depth: Hidden layers, at least 1.
        activation: "relu" or "erf".
        w_std: Standard deviation w of a hidden layer's weights, times the square root of its inputs; learned.
        b_std: Standard deviation b of its biases; learned.

    Example:
        >>> kernel = NNGPKernel(1, w_std=2**0.5, b_std=0.0)
        >>> kernel(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
        tensor([[1., 2.]], grad_fn=<DivBackward0>)
    """

    def __init__(
        self, depth: int = 4, activation: Activation = "relu", *, w_std: float = 1.0, b_std: float = 1e-8
    ) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        # b may be 0, and then stays 0.
        self.log_w = nn.Parameter(torch.tensor(math.log(w_std), dtype=torch.float64))
        self.log_b = nn.Parameter(torch.tensor(math.log(b_std) if b_std else -math.inf, dtype=torch.float64))
        self.log_b.requires_grad_(b_std > 0)

    def forward(self, X: Tensor, Z: Tensor) -> Tensor:
        """Covariances (n, m) of X (n, d) and Z (m, d)."""
        w, b = ((2 * one).exp().to(X.dtype) for one in (self.log_w, self.log_b))
        K, rows, columns = X @ Z.T, X.square().sum(1), Z.square().sum(1)
        for layer in range(self.depth):
            # Inputs are shared out among d weights; the products of hidden units are expectations already.
            share = w / X.shape[1] if layer == 0 else w
            K, rows, columns = (share * one + b for one in (K, rows, columns))
            K, rows, columns = self._products(K, rows, columns)
        return K

    def diagonal(self, X: Tensor) -> Tensor:
        """Variances (n,) of X (n, d)."""
        w, b = ((2 * one).exp().to(X.dtype) for one in (self.log_w, self.log_b))
        k = X.square().mean(1)
        for _ in range(self.depth):
            k = w * k + b
            k = k / 2 if self.activation == "relu" else 2 / math.pi * (2 * k / (1 + 2 * k)).arcsin()
        return k

    def tangent(self, X: Tensor, Z: Tensor) -> Tensor:
        """The neural tangent kernel (n, m) in the same parametrisation: of all layers, the last one's with unit scale."""
        w, b = ((2 * one).exp().to(X.dtype) for one in (self.log_w, self.log_b))
        K, rows, columns = X @ Z.T, X.square().sum(1), Z.square().sum(1)
        theta = torch.zeros_like(K)
        for layer in range(self.depth):
            share = w / X.shape[1] if layer == 0 else w
            K, rows, columns = (share * one + b for one in (K, rows, columns))
            theta = K if layer == 0 else w * theta + K
            slopes = self._slopes(K, rows, columns)
            K, rows, columns = self._products(K, rows, columns)
            # Through the layer above, the layers so far are felt by the slope of this one.
            theta = theta * slopes
        return theta + K

    def _products(self, K: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.activation == "relu":
            return relu_gram(K, rows, columns) / 2, rows / 2, columns / 2
        each = (2 / math.pi * (2 * one / (1 + 2 * one)).arcsin() for one in (rows, columns))
        return erf_gram(K, rows, columns), *each  # type: ignore[return-value]

    def _slopes(self, K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """E[phi' phi']."""
        if self.activation == "relu":
            extent = (rows[:, None] * columns).sqrt()
            # A row without variance is on the edge of both sides.
            correlation = torch.where(extent > 0, K / extent.clamp_min(1e-300), 0.0)
            return (math.pi - correlation.clamp(-1, 1).arccos()) / (2 * math.pi)
        return 4 / math.pi * ((1 + 2 * rows)[:, None] * (1 + 2 * columns) - 4 * K.square()).rsqrt()


class ScaleMixtureNNGPRegressor(ProbabilisticRegressor):
    """A wide network whose last layer's variance s^2 is unknown: y ~ N(0, s^2 (K + noise I)), s^2 from a prior.

    The kernel is that of the infinitely wide network. With an inverse gamma prior predictions are Student's t, exactly; with
    any other one integral over s^2 is left. The mean is the Gaussian process's whatever the prior; bands have the width that the
    data tell, and tails for what they leave open. That matters for few points, and is no guard against outliers: one scale
    serves all targets.

    Args:
        depth: Hidden layers of the network.
        activation: "relu" or "erf".
        kernel: Instead of the network's, a GPyTorch kernel, whose parameters are learned, or any function of X (n, d) and
            Z (m, d) that gives their covariances (n, m).
        prior: Of s^2: "invgamma" with `alpha` and `beta`; ("burr12", c, d); ("point", s2), which is the Gaussian process;
            a frozen distribution of SciPy; or a function that gives log densities of arrays of s^2.
        alpha: Shape of the inverse gamma prior; 0 with `beta` 0 is 1 / s^2, which leaves the scale to the data.
        beta: Its rate.
        w_std: Of the network's weights, where learning starts.
        b_std: Of its biases, likewise; 0 for none. (The published code starts at 1e-8, from where nothing is learned: the
            evidence hangs on its square.)
        noise: Variance of the targets' noise, where learning starts; in units of s^2 where it is scaled.
        noise_model: "scaled", so that s^2 multiplies it too, or "independent" of s^2 (then there is no closed form).
        learn: Whether kernel and noise are those of the highest evidence, or stay as given.
        method: "exact" where that is possible and else "quadrature" over log s^2; or "importance", as the paper does.
        n_samples: Draws of "importance".
        proposal: Of "importance": "likelihood" draws s^2 from where the data want it, "prior" from an inverse gamma or
            SciPy's prior, which leaves few draws of weight when there are many rows.
        standardize: Features and targets are standardised inside. A task among others keeps its scale where they are not.
        max_iter: Steps of learning.
        random_state: Of "importance".

    Attributes:
        kernel_: The kernel that was learned.
        noise_: Its noise.
        log_evidence_: Log density of the (standardised) training targets.
        ess_: Effective draws of "importance"; NaN without.
        n_iter_: Steps of learning.

    Raises:
        ValueError: An argument out of range, a prior that is none, more than 10,000 rows, or targets of which an improper
            prior leaves the scale open: all 0, or constant where they are standardised.

    Example:
        >>> X = np.linspace(-1, 1, 8)[:, None]
        >>> model = ScaleMixtureNNGPRegressor().fit(X, np.sin(3 * X[:, 0]))
        >>> mean, std = model.predict([[0.0], [4.0]], return_std=True)
        >>> bool(abs(mean[0]) < 0.1), bool(std[0] < std[1])
        (True, True)
    """

    _most_rows: ClassVar[int | None] = 10_000

    def __init__(
        self, depth: int = 4, activation: Activation = "relu", *, kernel: Kernel | None = None, prior: Prior = "invgamma",
        alpha: float = 2.0, beta: float = 2.0, w_std: float = 1.0, b_std: float = 0.1, noise: float = 1e-2,
        noise_model: Literal["scaled", "independent"] = "scaled", learn: bool = True,
        method: Literal["exact", "quadrature", "importance"] = "exact", n_samples: int = 1000,
        proposal: Literal["likelihood", "prior"] = "likelihood", standardize: bool = True, max_iter: int = 50,
        random_state: RandomState = 0,
    ) -> None:  # fmt: skip
        self.depth, self.activation, self.kernel = depth, activation, kernel
        self.prior, self.alpha, self.beta = prior, alpha, beta
        self.w_std, self.b_std, self.noise, self.noise_model = w_std, b_std, noise, noise_model
        self.learn, self.method, self.n_samples, self.proposal = learn, method, n_samples, proposal
        self.standardize, self.max_iter, self.random_state = standardize, max_iter, random_state

    @property
    def _standardizes_features(self) -> bool:  # type: ignore[override]
        return self.standardize

    @property
    def _standardizes_targets(self) -> bool:  # type: ignore[override]
        return self.standardize

    def _for_more_rows(self) -> str:
        return "its time grows with their cube; give fewer, or a model with inducing points"

    def _check(self) -> None:
        check_network(self.depth, self.activation, self.w_std, self.b_std, self.alpha, self.beta)
        check_prior(self.prior)
        if self.kernel is not None and not callable(self.kernel):
            raise ValueError(f"kernel is one of GPyTorch's or a function of X and Z, or None, got {self.kernel!r}")
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ValueError(f"max_iter is a whole number of at least 1, got {self.max_iter}")
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is a variance above 0, got {self.noise}")
        for name, value, known in (
            ("noise_model", self.noise_model, ("scaled", "independent")),
            ("method", self.method, ("exact", "quadrature", "importance")),
            ("proposal", self.proposal, ("likelihood", "prior")),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if self.method == "importance":
            if self.noise_model == "independent":
                raise ValueError("noise apart from the scale is integrated by quadrature: take method='exact'")
            if not isinstance(self.n_samples, Integral) or self.n_samples < 2:
                raise ValueError(f"n_samples is a whole number of at least 2, got {self.n_samples}")
            if isinstance(self.prior, tuple) and self.prior[0] == "point":
                raise ValueError("a point prior leaves nothing to draw: take method='exact'")
            if self.proposal == "prior" and callable(self.prior) and not hasattr(self.prior, "rvs"):
                raise ValueError("a prior that is a function cannot be drawn from: take proposal='likelihood'")
            if self.proposal == "prior" and self.prior == "invgamma" and not self.alpha:
                raise ValueError("an improper prior cannot be drawn from: take proposal='likelihood'")

    def _fit(self, X: Tensor, y: Tensor) -> None:
        kernel = self._fresh_kernel()
        log_noise = torch.tensor(math.log(self.noise), dtype=torch.float64, requires_grad=True)
        prior = self._prior()
        if isinstance(prior, _InverseGamma) and not prior.alpha and not bool(y.any()):
            raise ValueError("targets that are all the same leave their scale open: give alpha and beta above 0")
        self.n_iter_ = self._learn([(X, y)], kernel, log_noise, lambda: prior, []) if self.learn else 0
        self._keep(X, y, kernel, float(log_noise.detach().exp()))

    def fit_tasks(self, tasks: Sequence[tuple[ArrayLike, ArrayLike]]) -> Self:
        """An estimator for tasks like these: kernel, noise and, of an inverse gamma prior, alpha and beta of the highest evidence of all.

        Each task has a scale s^2 of its own; only several tell how scales are spread.

        Args:
            tasks: Pairs of X (n, d) and y (n,), in common units: `standardize` is False.

        Returns:
            A new estimator whose arguments are what was learned, and which learns nothing more when it is fitted to a task.
        """
        if self.standardize or self.kernel is not None:
            raise ValueError(
                "tasks have their scale in common units and a network's kernel: standardize=False and kernel=None"
            )
        self._check()
        if len(tasks) < 2 or not self.alpha:
            raise ValueError(
                f"how scales are spread is learned from two tasks or more, and from alpha and beta above 0, got {len(tasks)}"
            )
        checked = [check_X_y(X, y, dtype=np.float64, y_numeric=True) for X, y in tasks]
        if len(widths := {X.shape[1] for X, _ in checked}) > 1:
            raise ValueError(f"tasks are of the same features, got {sorted(widths)} columns")
        pairs = [(torch.from_numpy(X), torch.from_numpy(y)) for X, y in checked]
        kernel = self._fresh_kernel()
        log_noise = torch.tensor(math.log(self.noise), dtype=torch.float64, requires_grad=True)
        logs: list[Tensor] = []
        prior: Callable[[], Any] = self._prior
        if self.prior == "invgamma":
            logs = [
                torch.tensor(math.log(one), dtype=torch.float64, requires_grad=True) for one in (self.alpha, self.beta)
            ]
            prior = lambda: _InverseGamma(*(one.exp() for one in logs))  # noqa: E731
        self._learn(pairs, kernel, log_noise, prior, logs)
        learned: dict[str, Any] = dict(zip(("alpha", "beta"), (float(one.exp()) for one in logs), strict=False))
        network = cast(NNGPKernel, kernel)
        learned |= {
            "w_std": float(network.log_w.exp()),
            "b_std": float(network.log_b.exp()),
            "noise": float(log_noise.exp()),
        }
        return cast(Self, clone(self).set_params(learn=False, **learned))

    def _learn(
        self, tasks: Sequence[tuple[Tensor, Tensor]], kernel: Any, log_noise: Tensor, prior: Callable[[], Any],
        logs: list[Tensor],
    ) -> int:  # fmt: skip
        """Climb the log evidence of all tasks in so many steps; where a step fails, what was best is kept."""
        learned = [*(one for one in getattr(kernel, "parameters", list)() if one.requires_grad), log_noise, *logs]
        optimizer = torch.optim.LBFGS(learned, max_iter=self.max_iter, line_search_fn="strong_wolfe")
        best, kept = math.inf, [one.detach().clone() for one in learned]
        # Noise that vanishes leaves kernels that are singular to rounding.
        floor = math.log(min(1e-9, self.noise / 2))

        def loss() -> Tensor:
            nonlocal best, kept
            optimizer.zero_grad()
            found = -torch.stack([
                self._evidence(_conditioned(_gram(kernel, X, X), y, log_noise.exp(), self.noise_model), prior())
                for X, y in tasks
            ]).sum()  # fmt: skip
            found.backward()  # type: ignore[no-untyped-call]
            value = float(found.detach())
            if value < best and float(log_noise.detach()) > floor:
                best, kept = value, [one.detach().clone() for one in learned]
            return found

        try:
            optimizer.step(loss)
        except RuntimeError as error:
            # From linear algebra: the line search went to where the kernel is singular.
            if not math.isfinite(best):
                raise ValueError(f"the kernel of the training rows is not positive definite: {error}") from error
        with torch.no_grad():
            for one, value in zip(learned, kept, strict=True):
                one.copy_(value)
        return max(1, int(optimizer.state[learned[0]].get("n_iter", 1)))

    def _evidence(self, given: _Conditioned, prior: Any) -> Tensor:
        if isinstance(prior, _InverseGamma) and self.noise_model == "scaled":
            return prior.evidence(given)
        if isinstance(prior, _Point):
            return given.log_likelihood(torch.tensor([prior.s2], dtype=torch.float64))[0]
        return _nodes(given, prior)[2]

    def _keep(self, X: Tensor, y: Tensor, kernel: Any, noise: float) -> None:
        # What is told later is of this fit, whatever arguments are set after it.
        self._law = prior = self._prior()
        if isinstance(kernel, nn.Module):
            kernel.requires_grad_(False)
            kernel.zero_grad()
        with torch.no_grad():
            try:
                given = _conditioned(_gram(kernel, X, X), y, torch.tensor(noise, dtype=torch.float64), self.noise_model)
            except (NanError, NotPSDError) as error:
                raise ValueError(f"the kernel of the training rows is not positive definite: {error}") from error
            self.log_evidence_ = float(self._evidence(given, prior))
            scales, weights, self.ess_, self._heavy = self._scales_of(given, prior)
        self.kernel_, self.noise_ = kernel, noise
        self._X, self._y, self._given, self._s2, self._weights = X, y, given, scales, weights

    def _scales_of(self, given: _Conditioned, prior: Any) -> tuple[Tensor, Tensor, float, bool]:
        """Values of s^2 and their posterior weights, none where the posterior is known; effective draws; whether E s^2 is infinite."""
        none = torch.empty(0, dtype=torch.float64)
        if isinstance(prior, _Point):
            return torch.tensor([prior.s2], dtype=torch.float64), torch.ones(1, dtype=torch.float64), math.nan, False
        if self.method == "exact" and isinstance(prior, _InverseGamma) and self.noise_model == "scaled":
            return none, none, math.nan, False
        scales, weights, _, heavy = _nodes(given, prior)
        if self.method == "importance":
            drawn, of_drawn = self._drawn(given, prior)
            ess = float(1 / of_drawn.square().sum())
            if ess >= 0.1 * len(drawn):
                return drawn, of_drawn, ess, heavy
            warnings.warn(
                f"of {len(drawn)} draws from the {self.proposal} {0 if math.isnan(ess) else ess:.0f} count: s^2 is integrated by "
                "quadrature instead",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return scales, weights, math.nan, heavy

    def _drawn(self, given: _Conditioned, prior: Any) -> tuple[Tensor, Tensor]:
        random = check_random_state(self.random_state)
        if self.proposal == "prior":
            scales = torch.from_numpy(np.asarray(prior.draw(self.n_samples, random)))
            logs = given.log_likelihood(scales)
        else:
            generator = generator_of(random)
            shape, rate = given.rows / 2, float(given.quadratic) / 2
            gamma = torch.from_numpy(
                check_random_state(generator.initial_seed() % 2**32).gamma(shape, size=self.n_samples)
            )
            scales = rate / gamma
            # Over the density IG(n / 2, d / 2), of which the likelihood is a multiple of s^2 times.
            logs = prior.log_density(scales) + scales.log()
        return scales, (logs - logs.logsumexp(0)).exp()

    @property
    def scale_posterior_(self) -> Distribution:
        """The posterior of s^2, in units of the (standardised) targets' variance: inverse gamma, or weights on values of s^2."""
        if len(self._s2):
            return _Weighted(self._s2, self._weights)
        from torch.distributions import InverseGamma

        law = self._law.posterior(self._given)
        return InverseGamma(law.alpha, law.beta)

    def _predictive(self, X: Tensor) -> Distribution:
        with torch.no_grad():
            # Some rows at a time: their covariances with all training rows are held at once.
            size = max(1, 4_000_000 // len(self._X))
            covariances = [
                (_gram(self.kernel_, rows, self._X), _diagonal(self.kernel_, rows)) for rows in X.split(size)
            ]
            if not len(self._s2):
                found = [self._given.predict(*each) for each in covariances]
                mean, variance = (torch.cat(each) for each in zip(*found, strict=True))
                law = self._law.posterior(self._given)
                return _Heavy(2 * law.alpha, mean, (law.beta / law.alpha * variance).sqrt())
            found = [self._given.predict_at(*each, self._s2) for each in covariances]
            mean, variance = (torch.cat(each) for each in zip(*found, strict=True))
            parts = Normal(mean, variance.sqrt())
            if len(self._s2) == 1:
                return Normal(parts.loc[:, 0], parts.scale[:, 0])
            return _Mixture(Categorical(logits=self._weights.log().expand(len(X), -1)), parts, self._heavy)

    def _draws(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Of all rows together: one scale a draw, shared by all of them."""
        check_together(X)
        with torch.no_grad():
            if len(self._s2):
                chosen = torch.multinomial(self._weights, n_samples, True, generator=generator)
                s2 = self._s2[chosen]
            else:
                law = self._law.posterior(self._given)
                gamma = check_random_state(generator.initial_seed() % 2**32).gamma(float(law.alpha), size=n_samples)
                s2 = law.beta / torch.from_numpy(gamma)
            cross, own = _gram(self.kernel_, X, self._X), _gram(self.kernel_, X, X)
            noise = torch.randn(n_samples, len(X), generator=generator, dtype=torch.float64)
            return self._given.draws(cross, own, s2, noise)

    def as_botorch(self) -> Any:
        """This fitted regressor as a BoTorch `Model`, whose posterior is a multivariate t or, for a point prior, normal.

        Raises:
            ValueError: The posterior of the scale has no closed form.
        """
        from paperworks.uncertainty.surrogate import surrogate_of

        if len(self._s2) > 1:
            raise ValueError(
                "a BoTorch model wants a t or normal posterior: take an inverse gamma or point prior, exact"
            )
        degrees = None if len(self._s2) else 2 * float(self._law.posterior(self._given).alpha)
        return surrogate_of(self, self._joint, degrees)

    def _joint(self, X: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Mean (n,) and scale matrix (n, n) of all rows together."""
        mean, covariance = self._given.joint(_gram(self.kernel_, X, self._X), _gram(self.kernel_, X, X), noisy)
        if len(self._s2):
            return mean, float(self._s2[0]) * covariance
        law = self._law.posterior(self._given)
        return mean, law.beta / law.alpha * covariance

    def _fresh_kernel(self) -> Any:
        if self.kernel is None:
            return NNGPKernel(self.depth, self.activation, w_std=self.w_std, b_std=self.b_std)
        return copy.deepcopy(self.kernel).double() if isinstance(self.kernel, nn.Module) else self.kernel

    def _prior(self) -> Any:
        return _prior_of(self.prior, self.alpha, self.beta)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.kernel is not None or not isinstance(self.prior, str | tuple):
            raise ValueError(
                "a kernel or prior of one's own is code, which is not saved: keep the training data instead"
            )
        values = {
            "w_std": float(self.kernel_.log_w.exp()),
            "b_std": float(self.kernel_.log_b.exp()),
            "noise": self.noise_,
            "n_iter": self.n_iter_,
            "ess": self.ess_,
            "heavy": self._heavy,
        }
        tensors = {"X": self._X, "y": self._y, "s2": self._s2, "weights": self._weights}
        return tensors | self.kernel_.state_dict(prefix="kernel."), values

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        kernel = self._fresh_kernel()
        kernel.load_state_dict({name.removeprefix("kernel."): one for name, one in tensors.items() if "." in name})
        self.n_iter_ = values["n_iter"]
        with warnings.catch_warnings():
            # What draws were worth was told when they were made; they are kept.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._keep(tensors["X"], tensors["y"], kernel, values["noise"])
        self._s2, self._weights, self.ess_, self._heavy = (
            tensors["s2"],
            tensors["weights"],
            values["ess"],
            values["heavy"],
        )


class _Conditioned(NamedTuple):
    """Targets under the kernel, whatever s^2 is: its factor or, where noise is apart from s^2, its eigenvalues."""

    rows: int
    quadratic: Tensor
    log_determinant: Tensor
    factor: Tensor
    weights: Tensor
    noise: Tensor
    eigenvalues: Tensor | None

    def log_likelihood(self, s2: Tensor) -> Tensor:
        """Log p(y | s^2) for values (S,) of s^2."""
        if self.eigenvalues is None:
            spread = self.rows * (2 * math.pi * s2).log() + self.log_determinant + self.quadratic / s2
            return -spread / 2
        variances = s2[:, None] * self.eigenvalues + self.noise
        return -((2 * math.pi * variances).log() + self.weights.square() / variances).sum(1) / 2

    def predict(self, cross: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (m,) and variance (m,) for s^2 = 1, noise included; noise is scaled."""
        half = torch.linalg.solve_triangular(self.factor, cross.T, upper=False)
        variance = own + self.noise - half.square().sum(0)
        return half.T @ self.weights, variance.clamp_min(float(self.noise) * 1e-3)

    def predict_at(self, cross: Tensor, own: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """Means (m, S) and variances (m, S) for values (S,) of s^2, noise included."""
        if self.eigenvalues is None:
            mean, variance = self.predict(cross, own)
            return mean[:, None].expand(-1, len(s2)), variance[:, None] * s2
        turned = cross @ self.factor
        shares = s2[:, None] / (s2[:, None] * self.eigenvalues + self.noise)
        mean = turned @ (shares * self.weights).T
        variance = s2 * own[:, None] + self.noise - (turned.square() @ shares.T) * s2
        return mean, variance.clamp_min(float(self.noise) * 1e-3)

    def joint(self, cross: Tensor, own: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Mean (m,) and covariance (m, m) for s^2 = 1; noise is scaled."""
        half = torch.linalg.solve_triangular(self.factor, cross.T, upper=False)
        covariance = own - half.T @ half
        if noisy:
            covariance = covariance + self.noise * torch.eye(len(own), dtype=own.dtype)
        return half.T @ self.weights, covariance

    def draws(self, cross: Tensor, own: Tensor, s2: Tensor, noise: Tensor) -> Tensor:
        """Draws (S, m) for values (S,) of s^2 and standard normal noise (S, m)."""
        if self.eigenvalues is None:
            mean, covariance = self.joint(cross, own, True)
            return mean + s2.sqrt()[:, None] * noise @ cholesky(covariance).T
        turned, eye = cross @ self.factor, torch.eye(len(own), dtype=own.dtype)
        found = torch.empty_like(noise)
        for value in s2.unique():
            share, these = value / (value * self.eigenvalues + self.noise), s2 == value
            covariance = value * (own - (turned * share) @ turned.T) + self.noise * eye
            found[these] = turned @ (share * self.weights) + noise[these] @ cholesky(covariance).T
        return found


def _conditioned(K: Tensor, y: Tensor, noise: Tensor, noise_model: str) -> _Conditioned:
    eye = torch.eye(len(K), dtype=K.dtype)
    if noise_model == "independent":
        eigenvalues, vectors = torch.linalg.eigh(K)
        zero = torch.zeros((), dtype=K.dtype)
        return _Conditioned(len(y), zero, zero, vectors, vectors.T @ y, noise, eigenvalues.clamp_min(0))
    factor = cholesky(K + noise * eye)
    half = torch.linalg.solve_triangular(factor, y[:, None], upper=False)[:, 0]
    return _Conditioned(
        len(y), half.square().sum(), 2 * factor.diagonal().log().sum(), factor, half, noise, None
    )  # fmt: skip


class _InverseGamma(NamedTuple):
    alpha: Any
    beta: Any

    def posterior(self, given: _Conditioned) -> _InverseGamma:
        return _InverseGamma(
            torch.as_tensor(self.alpha + given.rows / 2, dtype=torch.float64), self.beta + given.quadratic / 2
        )

    def evidence(self, given: _Conditioned) -> Tensor:
        """Log density of a multivariate t; without the constant that an improper prior has none of."""
        alpha, beta = (torch.as_tensor(one, dtype=torch.float64) for one in self)
        after = self.posterior(given)
        found = after.alpha.lgamma() - after.alpha * after.beta.log()
        if float(alpha):
            found = found - alpha.lgamma() + alpha * beta.log()
        return found - (given.rows * math.log(2 * math.pi) + given.log_determinant) / 2

    def log_density(self, s2: Tensor) -> Tensor:
        alpha, beta = (torch.as_tensor(one, dtype=torch.float64) for one in self)
        constant = alpha * beta.log() - alpha.lgamma() if float(alpha) else 0.0
        return constant - (alpha + 1) * s2.log() - beta / s2

    def draw(self, count: int, random: np.random.RandomState) -> Any:
        return float(self.beta) / random.gamma(float(self.alpha), size=count)

    def bounds(self) -> tuple[float, float]:
        """Of log s^2."""
        return -math.inf, math.inf

    def middle(self) -> Tensor:
        """Values of log s^2 where the prior has its mass."""
        if not float(self.alpha):
            return torch.zeros(0, dtype=torch.float64)
        return _middle(invgamma(float(self.alpha), scale=float(self.beta)))


class _Point(NamedTuple):
    s2: float


class _Law(NamedTuple):
    """A frozen distribution of SciPy, or a function that gives log densities."""

    law: Any

    def log_density(self, s2: Tensor) -> Tensor:
        logpdf = getattr(self.law, "logpdf", self.law)
        with np.errstate(divide="ignore"):
            found = torch.from_numpy(np.asarray(logpdf(s2.detach().numpy()), dtype=np.float64))
        if found.shape != s2.shape or bool(found.isnan().any()):
            raise ValueError("a prior gives a log density, which is a number, for each s^2 of an array")
        return found

    def draw(self, count: int, random: np.random.RandomState) -> Any:
        return self.law.rvs(size=count, random_state=random)

    def bounds(self) -> tuple[float, float]:
        """Of log s^2."""
        if not hasattr(self.law, "support"):
            return -math.inf, math.inf
        low, high = (float(one) for one in self.law.support())
        return (math.log(low) if low > 0 else -math.inf), (math.log(high) if high < math.inf else math.inf)

    def middle(self) -> Tensor:
        """Values of log s^2 where the prior has its mass."""
        return _middle(self.law) if hasattr(self.law, "ppf") else torch.zeros(0, dtype=torch.float64)


def _middle(law: Any) -> Tensor:
    found = torch.from_numpy(np.asarray(law.ppf(np.linspace(0.001, 0.999, 61)))).log()
    return found[found.isfinite()]


def _prior_of(prior: Prior, alpha: float, beta: float) -> _InverseGamma | _Point | _Law:
    if isinstance(prior, str):
        return _InverseGamma(alpha, beta)
    if isinstance(prior, tuple):
        return _Point(float(prior[1])) if prior[0] == "point" else _Law(burr12(*prior[1:]))
    return _Law(prior)


def _nodes(given: _Conditioned, prior: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Values of s^2 where the posterior has its mass, their weights, the log evidence, and whether E s^2 is infinite.

    Gauss-Legendre quadrature over log s^2, between the ends of the support or where the integrand has vanished.
    """

    def height(logs: Tensor) -> Tensor:
        return prior.log_density(logs.exp()) + logs + given.log_likelihood(logs.exp())

    with torch.no_grad():
        centre = math.log(float(given.quadratic) / given.rows) if given.rows and float(given.quadratic) > 0 else 0.0
        least, most = prior.bounds()
        low, high = max(least, min(-80.0, centre - 80)), min(most, max(80.0, centre + 80))
        middle = prior.middle()
        # Each time nearer to where the mass lies, which may be a thousandth of what was looked at.
        for _ in range(12):
            wide = torch.linspace(low, high, 4001, dtype=torch.float64)
            places = torch.cat([wide, middle])
            heights = height(places)
            if not bool(heights.isfinite().any()):
                raise ValueError(
                    "s^2 has no mass where it was looked for: the prior's density is 0 or not finite there"
                )
            # As far as the tails in which an outlier would have to lie.
            inside = places[heights > heights.max() - 90]
            step = float(wide[1] - wide[0])
            low, high = max(least, float(inside.min()) - step), min(most, float(inside.max()) + step)
            if int((heights[: len(wide)] > heights.max() - 90).sum()) > 40 or step < 1e-14:
                break
        # E s^2 is infinite where the density of log s^2 falls more slowly than 1 / s^2.
        ends = torch.tensor([high - 1e-3, high], dtype=torch.float64)
        fall = height(ends).diff() / 1e-3
        heavy = high < most and float(fall) > -1.001
    points, weights = _legendre()
    nodes = low + (high - low) * (points + 1) / 2
    logs = height(nodes) + (weights * (high - low) / 2).log()
    evidence = logs.logsumexp(0)
    return nodes.exp(), (logs - evidence).exp().detach(), evidence, heavy


@cache
def _legendre() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points and weights; learning asks for them at every step."""
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(points), torch.from_numpy(weights)


class _Heavy(StudentT):
    """Student's t, whose centre is told as its mean where it has none, and whose variance is infinite up to two degrees of freedom."""

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.where(self.df > 2, super().variance, math.inf)


class _Mixture(MixtureSameFamily):
    """A mixture whose variance may be infinite, which no number of nodes would show."""

    def __init__(self, weights: Categorical, parts: Normal, heavy: bool) -> None:
        super().__init__(weights, parts)
        self.heavy = heavy

    @property
    def variance(self) -> Tensor:
        return torch.full_like(super().variance, math.inf) if self.heavy else super().variance


class _Weighted(Distribution):
    """Weights on some values."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        super().__init__(validate_args=False)
        self.values, self.weights = values, weights

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.values).sum()

    @property
    def variance(self) -> Tensor:
        return (self.weights * (self.values - self.mean).square()).sum()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return self.values[torch.multinomial(self.weights, max(1, shape.numel()), True)].reshape(shape)


def _gram(kernel: Any, X: Tensor, Z: Tensor) -> Tensor:
    found = kernel(X, Z)
    found = found.to_dense() if hasattr(found, "to_dense") and not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor) or found.shape != (len(X), len(Z)):
        told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"a kernel gives covariances as a tensor {(len(X), len(Z))} here, and gave {told}")
    return found


def _diagonal(kernel: Any, X: Tensor) -> Tensor:
    if isinstance(kernel, NNGPKernel):
        return kernel.diagonal(X)
    return torch.cat([_gram(kernel, rows, rows).diagonal() for rows in X.split(200)])


def check_network(depth: Any, activation: Any, w_std: Any, b_std: Any, alpha: Any, beta: Any) -> None:
    """Raise where a number or name is out of range."""
    if not isinstance(depth, Integral) or depth < 1:
        raise ValueError(f"depth is a whole number of at least 1, got {depth}")
    if activation not in ("relu", "erf"):
        raise ValueError(f"activation is relu or erf, got {activation!r}")
    if not 0 < w_std < math.inf or not 0 <= b_std < math.inf:
        raise ValueError(f"w_std is above 0 and b_std at least 0, got {w_std} and {b_std}")
    if not (0 < alpha < math.inf and 0 < beta < math.inf) and not alpha == beta == 0:
        raise ValueError(f"alpha and beta are both above 0, or both 0, got {alpha} and {beta}")


def check_prior(prior: Prior) -> None:
    """Raise where a prior of s^2 is none."""
    if (
        isinstance(prior, tuple)
        and len(prior) > 1
        and all(isinstance(one, Real) and float(one) > 0 for one in prior[1:])
    ):
        if (prior[0], len(prior)) in (("burr12", 3), ("point", 2)):
            return
    elif isinstance(prior, str):
        if prior == "invgamma":
            return
    elif hasattr(prior, "logpdf"):
        if float(prior.support()[0]) < 0 and float(prior.cdf(0)) > 0:
            raise ValueError("s^2 is a variance, and this prior has mass below 0: truncate it, or give another")
        return
    elif callable(prior):
        return
    raise ValueError(
        'prior is "invgamma", ("burr12", c, d), ("point", s2) with numbers above 0, a frozen distribution of SciPy, or a '
        f"function that gives log densities, got {prior!r}"
    )


class ScaleMixtureNNGPClassifier(ProbabilisticClassifier):
    """A wide network whose last layer's variance is unknown, as a classifier: a sparse variational Student-t process.

    Each class has a latent function at inducing inputs, q(u_c | s^2) = N(m_c, s^2 S_c), and all share q(s^2), an inverse
    gamma. Kernel, inducing inputs and all of q are learned by the evidence lower bound. (The published code keeps S_c
    diagonal, and draws every function value with a scale of its own, which loses the tails that values have together.)

    Args:
        depth: Hidden layers of the network.
        activation: "relu" or "erf".
        prior: "invgamma", or ("point", s2), which is the sparse Gaussian process.
        alpha: Shape of the inverse gamma prior of s^2.
        beta: Its rate.
        w_std: Of the network's weights, where learning starts.
        b_std: Of its biases, likewise; 0 for none.
        n_inducing: Inducing inputs, drawn evenly among classes at first.
        n_samples: Draws of function values a step.
        n_pred_samples: Draws of a prediction.
        batch_size: Rows a step.
        lr: Adam's rate.
        max_epoch: Passes over the rows.
        standardize: Each feature is standardised inside; pixels, whose unit is one, are better left as they are.
        random_state: Of inducing inputs, batches and draws.

    Attributes:
        kernel_: The kernel that was learned, an `NNGPKernel`.
        scale_: alpha and beta of q(s^2).
        elbo_: Evidence lower bound in nats, by epoch.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> X = np.linspace(-1, 1, 40)[:, None]
        >>> model = ScaleMixtureNNGPClassifier(b_std=0.3, n_inducing=10, max_epoch=30, lr=0.05).fit(X, X[:, 0] > 0)
        >>> model.score(X, X[:, 0] > 0) > 0.9
        True
    """

    def __init__(
        self, depth: int = 4, activation: Activation = "relu", *, prior: Prior = "invgamma", alpha: float = 2.0,
        beta: float = 2.0, w_std: float = 1.4, b_std: float = 0.1, n_inducing: int = 200, n_samples: int = 100,
        n_pred_samples: int = 1000, batch_size: int = 100, lr: float = 1e-2, max_epoch: int = 300,
        standardize: bool = True, random_state: RandomState = 0,
    ) -> None:  # fmt: skip
        self.depth, self.activation, self.prior = depth, activation, prior
        self.alpha, self.beta, self.w_std, self.b_std = alpha, beta, w_std, b_std
        self.n_inducing, self.n_samples, self.n_pred_samples = n_inducing, n_samples, n_pred_samples
        self.batch_size, self.lr, self.max_epoch = batch_size, lr, max_epoch
        self.standardize, self.random_state = standardize, random_state

    @property
    def _standardizes_features(self) -> bool:  # type: ignore[override]
        return self.standardize

    def _check(self) -> None:
        check_network(self.depth, self.activation, self.w_std, self.b_std, self.alpha, self.beta)
        check_prior(self.prior)
        if self.prior != "invgamma" and not (isinstance(self.prior, tuple) and self.prior[0] == "point"):
            raise ValueError(f'a classifier\'s prior is "invgamma" or ("point", s2), got {self.prior!r}')
        if self.prior == "invgamma" and not self.alpha:
            raise ValueError("an improper prior has no bound: give alpha and beta above 0")
        for name in ("n_inducing", "n_samples", "n_pred_samples", "batch_size", "max_epoch"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr is above 0, got {self.lr}")

    def _fit(self, X: Tensor, y: Tensor) -> None:
        random = check_random_state(self.random_state)
        process = self._process(_evenly(X, y, self.n_inducing, random), int(y.max()) + 1)
        generator = generator_of(random)
        optimizer = torch.optim.Adam(process.parameters(), lr=self.lr)
        self.elbo_ = []
        for _ in range(self.max_epoch):
            bounds = []
            for batch in torch.randperm(len(X), generator=generator).split(self.batch_size):
                optimizer.zero_grad()
                fitted = process.log_likelihood(X[batch], y[batch], self.n_samples, generator)
                bound = len(X) / len(batch) * fitted - process.divergence()
                (-bound / len(X)).backward()
                optimizer.step()
                bounds.append(float(bound.detach()))
            self.elbo_.append(float(np.mean(bounds)))
        self._keep(process, int(random.randint(2**31 - 1)))

    def _keep(self, process: _StudentTProcess, seed: int) -> None:
        self.kernel_, self._trained, self._seed = process.kernel, process, seed
        self.scale_ = tuple(float(one) for one in process.scale())

    def _process(self, inducing: Tensor, classes: int) -> _StudentTProcess:
        kernel = NNGPKernel(self.depth, self.activation, w_std=self.w_std, b_std=self.b_std)
        point = None if self.prior == "invgamma" else float(self.prior[1])
        return _StudentTProcess(kernel, inducing, classes, self.alpha, self.beta, point)

    def _probabilities(self, X: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            s2 = self._trained.draw_scale(self.n_pred_samples, generator)
            # The same for all rows, so that what is said of one does not hang on where it stands.
            noise = torch.randn(len(s2), len(self.classes_), 1, generator=generator, dtype=torch.float64)
            return torch.cat([self._trained.draws(rows, s2, noise).softmax(-1).mean(0) for rows in X.split(500)])

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self._trained.state_dict()), {"seed": self._seed, "elbo": self.elbo_}

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        process = self._process(tensors["inducing"], len(self.classes_))
        process.load_state_dict(tensors)
        self._keep(process, values["seed"])
        self.elbo_ = values["elbo"]


class _StudentTProcess(nn.Module):
    """Functions of C classes through their values at M inducing inputs, whitened by the kernel's factor."""

    def __init__(
        self, kernel: NNGPKernel, inducing: Tensor, classes: int, alpha: float, beta: float, point: float | None
    ) -> None:
        super().__init__()
        self.kernel, self.alpha, self.beta, self.point = kernel, alpha, beta, point
        M = len(inducing)
        self.inducing = nn.Parameter(inducing.clone())
        self.mean = nn.Parameter(torch.zeros(classes, M, dtype=torch.float64))
        self.lower = nn.Parameter(torch.zeros(classes, M, M, dtype=torch.float64))
        self.log_diagonal = nn.Parameter(torch.zeros(classes, M, dtype=torch.float64))
        self.log_a, self.log_b = (
            nn.Parameter(torch.tensor(math.log(one or 1.0), dtype=torch.float64), requires_grad=point is None)
            for one in (alpha, beta)
        )

    def scale(self) -> tuple[Tensor, Tensor]:
        """Alpha and beta of q(s^2)."""
        return self.log_a.exp(), self.log_b.exp()

    def factor(self) -> Tensor:
        """Lower factor (C, M, M) of S_c, whitened."""
        return self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def draw_scale(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count,) of s^2, differentiable in q(s^2)."""
        if self.point is not None:
            return torch.full((count,), self.point, dtype=torch.float64)
        a, b = self.scale()
        # Global random numbers stay as they are: those of a gamma law take no generator.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return b / torch.distributions.Gamma(a, 1.0).rsample((count,)).clamp_min(1e-12)

    def moments(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances (C, n) of function values for s^2 = 1."""
        factor = cholesky(self.kernel(self.inducing, self.inducing), 1e-6)
        half = torch.linalg.solve_triangular(factor, self.kernel(self.inducing, X), upper=False)
        own = self.kernel.diagonal(X) - half.square().sum(0)
        spread = (self.factor().mT @ half).square().sum(1)
        return self.mean @ half, (spread + own.clamp_min(0)).clamp_min(1e-12)

    def draws(self, X: Tensor, s2: Tensor, noise: Tensor) -> Tensor:
        """Function values (S, n, C) for scales (S,) and standard normal noise (S, C, n) or (S, C, 1)."""
        mean, variance = self.moments(X)
        return (mean + (s2[:, None, None] * variance).sqrt() * noise).mT

    def log_likelihood(self, X: Tensor, y: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Sum over rows of E log softmax."""
        noise = torch.randn(count, len(self.mean), len(X), generator=generator, dtype=torch.float64)
        logits = self.draws(X, self.draw_scale(count, generator), noise)
        return logits.log_softmax(-1)[:, torch.arange(len(y)), y].mean(0).sum()

    def divergence(self) -> Tensor:
        """KL of q(u | s^2) q(s^2) from the prior."""
        a, b = self.scale()
        inverse = a / b if self.point is None else torch.tensor(1 / self.point, dtype=torch.float64)
        classes, M = self.mean.shape
        of_values = (
            self.factor().square().sum()
            - 2 * self.log_diagonal.sum()
            - classes * M
            + inverse * self.mean.square().sum()
        )
        return of_values / 2 + (inverse_gamma_divergence(a, b, self.alpha, self.beta) if self.point is None else 0.0)


def inverse_gamma_divergence(a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    """KL divergence of IG(a, b) from IG(alpha, beta), in nats.

    Example:
        >>> a, b = torch.tensor([3.0, 2.5], dtype=torch.float64)
        >>> round(float(inverse_gamma_divergence(a, b, 2.0, 2.0)), 10)
        0.0759242572
    """
    return (
        (a - alpha) * a.digamma() - a.lgamma() + math.lgamma(alpha) + alpha * (b / beta).log() + a * (beta - b) / b
    )  # fmt: skip


def _evenly(X: Tensor, y: Tensor, wanted: int, random: np.random.RandomState) -> Tensor:
    """Different rows, as many of each class as there are, in turn, until there are so many."""
    rows = torch.from_numpy(random.permutation(len(X)))
    rank = torch.zeros(len(X), dtype=torch.long)
    for label in y.unique():
        these = rows[y[rows] == label]
        rank[these] = torch.arange(len(these))
    chosen = rows[rank[rows].argsort(stable=True)]
    distinct = {tuple(row.tolist()): index for index, row in reversed(list(enumerate(X[chosen])))}
    return X[chosen[sorted(distinct.values())[:wanted]]]


class WideNetworkLimit:
    """What infinitely wide networks predict after training by gradient descent, their last layer's variance drawn from a prior.

    f = s v^T phi / sqrt(width), squared loss, no noise, trained to the end. Given s^2 predictions are normal; s^2 stays as it was drawn,
    for training does not update it: this is no posterior.

    Args:
        depth: Hidden layers.
        activation: "relu" or "erf".
        train: "readout", the last layer alone, or "all" layers.
        prior: Of s^2, as for `ScaleMixtureNNGPRegressor`.
        alpha: Of an inverse gamma prior.
        beta: Of an inverse gamma prior.
        w_std: Of the weights.
        b_std: Of the biases.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> limit = WideNetworkLimit(1, b_std=0.5)
        >>> X = torch.tensor([[-1.0], [0.5], [1.0]], dtype=torch.float64)
        >>> law = limit.predictive(X[:2], torch.tensor([1.0, -1.0], dtype=torch.float64), X)
        >>> [round(value, 6) for value in law.mean[:2].tolist()]
        [1.0, -1.0]
    """

    def __init__(
        self, depth: int = 1, activation: Activation = "relu", *, train: Literal["readout", "all"] = "readout",
        prior: Prior = "invgamma", alpha: float = 2.0, beta: float = 2.0, w_std: float = 1.0, b_std: float = 0.0,
    ) -> None:  # fmt: skip
        check_network(depth, activation, w_std, b_std, alpha, beta)
        check_prior(prior)
        if prior == "invgamma" and not alpha:
            raise ValueError("s^2 is drawn from the prior, and an improper one cannot be: give alpha and beta above 0")
        if train not in ("readout", "all"):
            raise ValueError(f"train is readout or all, got {train!r}")
        self.kernel, self.train = NNGPKernel(depth, activation, w_std=w_std, b_std=b_std), train
        self._law = _prior_of(prior, alpha, beta)

    def moments(self, X: Tensor, y: Tensor, X_test: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (m,) and covariance (m, m) at X_test (m, d) of networks trained on X (n, d) and y (n,), for s^2 = 1.

        Raises:
            ValueError: Shapes that do not fit, or values that are not finite.
        """
        X, y, X_test = (torch.as_tensor(one, dtype=torch.float64) for one in (X, y, X_test))
        if X.ndim != 2 or X_test.ndim != 2 or X.shape[1] != X_test.shape[1] or y.shape != (len(X),):
            raise ValueError(
                f"X is (n, d), y (n,) and X_test (m, d), got {tuple(X.shape)}, {tuple(y.shape)} and {tuple(X_test.shape)}"
            )
        if not all(bool(one.isfinite().all()) for one in (X, y, X_test)):
            raise ValueError("X, y and X_test hold NaN or infinity")
        with torch.no_grad():
            K, cross, own = (self.kernel(*pair) for pair in ((X, X), (X_test, X), (X_test, X_test)))
            theta, theta_cross = K, cross
            if self.train == "all":
                theta, theta_cross = self.kernel.tangent(X, X), self.kernel.tangent(X_test, X)
            weights = torch.cholesky_solve(theta_cross.T, cholesky(theta)).T
            mixed = weights @ cross.T
            return weights @ y, own + weights @ K @ weights.T - mixed - mixed.T

    def predictive(self, X: Tensor, y: Tensor, X_test: Tensor) -> Distribution:
        """The distribution of each prediction, with batch shape (m,)."""
        mean, covariance = self.moments(X, y, X_test)
        variance = covariance.diagonal().clamp_min(1e-12)
        if isinstance(self._law, _InverseGamma):
            return _Heavy(2.0 * self._law.alpha, mean, (self._law.beta / self._law.alpha * variance).sqrt())
        if isinstance(self._law, _Point):
            return Normal(mean, (self._law.s2 * variance).sqrt())
        zero = torch.zeros((), dtype=torch.float64)
        nothing = _Conditioned(0, zero, zero, zero, zero, zero, None)
        s2, weights, _, heavy = _nodes(nothing, self._law)
        parts = Normal(mean[:, None], (variance[:, None] * s2).sqrt())
        return _Mixture(Categorical(logits=weights.log().expand(len(mean), -1)), parts, heavy)
