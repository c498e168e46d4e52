"""Deep kernel machines: a kernel method that learns its kernel in every layer (arXiv 2108.13097)."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from paperworks.linalg import cholesky, erf_gram, relu_gram
from paperworks.uncertainty.estimator import (
    ProbabilisticClassifier,
    ProbabilisticRegressor,
    RandomState,
    check_together,
    generator_of,
)

GramKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
KernelName = Literal["relu", "erf", "rbf", "linear"]
NUS = (1.0, 10.0, 30.0, 100.0, 300.0)


def rbf_gram(K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gaussian kernel (..., n, m) of features with products K (..., n, m) and squared lengths (..., n) and (..., m)."""
    return (K - (rows[..., :, None] + columns[..., None, :]) / 2).exp()


def linear_gram(K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products K (..., n, m) of features as they are."""
    return K


class ActivationGram:
    """The kernel of a wide layer with any activation, E[phi(f) phi(g)] of jointly normal f and g, by Gauss-Hermite quadrature.

    For smooth activations it is exact to some digits; for a ReLU 48 nodes leave an error of a few thousandths.

    Args:
        phi: Works on tensors element by element.
        nodes: In each of two dimensions; fewer do where phi is smooth and variances are small.

    Example:
        >>> G = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
        >>> exact = erf_gram(G, G.diagonal(), G.diagonal())
        >>> torch.allclose(ActivationGram(torch.erf)(G, G.diagonal(), G.diagonal()), exact, atol=1e-4)
        True
    """

    def __init__(self, phi: Callable[[Tensor], Tensor], nodes: int = 48) -> None:
        self.phi, self.nodes = phi, nodes

    def __call__(self, K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Kernel (..., n, m) of products K (..., n, m) and squared lengths rows (..., n) and columns (..., m)."""
        places, weights = (torch.from_numpy(one) for one in np.polynomial.hermite_e.hermegauss(self.nodes))
        weights = weights / weights.sum()
        first = rows.clamp_min(1e-30).sqrt()
        slope = K / first[..., :, None]
        left = (columns[..., None, :] - slope.square()).clamp_min(1e-30).sqrt()
        total = torch.zeros_like(K)
        for u, weight in zip(places, weights, strict=True):
            g = slope[..., None] * u + left[..., None] * places
            total = total + weight * self.phi(first * u)[..., :, None] * (self.phi(g) * weights).sum(-1)
        return total


KERNELS: dict[str, GramKernel] = {"relu": relu_gram, "erf": erf_gram, "rbf": rbf_gram, "linear": linear_gram}


class Blocks(NamedTuple):
    """Products of features: among P inducing rows, of t other rows with them, and of each other row with itself.

    Attributes:
        inducing: (P, P).
        cross: (t, P).
        own: (t,), or (t, t) where the others are wanted together.
    """

    inducing: Tensor
    cross: Tensor
    own: Tensor

    def mapped(self, kernel: GramKernel) -> Blocks:
        """The same of a kernel."""
        rows = self.inducing.diagonal()
        each = self.own if self.own.ndim == 1 else self.own.diagonal()
        own = kernel(self.own, each, each) if self.own.ndim == 2 else _of_itself(kernel, each)
        return Blocks(kernel(self.inducing, rows, rows), kernel(self.cross, each, rows), own)


def _of_itself(kernel: GramKernel, each: Tensor) -> Tensor:
    return kernel(each[:, None, None], each[:, None], each[:, None])[:, 0, 0]


class DeepKernelMachine(nn.Module):
    """The layers: from products of inputs to the kernel of the last layer, with what the Gram matrices cost.

    In each layer G = C T T' C' with C the Cholesky factor of the kernel K of the layer below: T = I is G = K, the network
    that learns no representation, which is where it starts. Its cost is KL(N(0, G) || N(0, K)) a unit of nu.

    Args:
        inputs: Columns d of the input.
        inducing: Inducing rows (P, d).
        n_layers: L, at least 1.
        kernel: "relu" (arc-cosine), "erf", "rbf", "linear", or a function of products (..., n, m) and squared lengths (..., n)
            and (..., m).
        nu: Weight of each layer's cost, one for all or L of them; infinite keeps G = K, the neural network Gaussian process.
        learn_inducing: Whether inducing rows move.
        jitter: Added to each kernel's diagonal, in shares of its mean.

    Raises:
        ValueError: A number out of range.

    Example:
        >>> machine = DeepKernelMachine(2, torch.eye(2, dtype=torch.float64), n_layers=1)
        >>> K, divergences = machine(torch.ones(3, 2, dtype=torch.float64))
        >>> K.cross.shape, [float(one.detach()) for one in divergences]
        (torch.Size([3, 2]), [0.0])
    """

    def __init__(
        self, inputs: int, inducing: Tensor, *, n_layers: int = 2, kernel: KernelName | GramKernel = "relu",
        nu: float | Sequence[float] = 1.0, learn_inducing: bool = True, jitter: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_layers, self.jitter = n_layers, jitter
        self.kernel = KERNELS[kernel] if isinstance(kernel, str) else kernel
        each = [float(nu)] if isinstance(nu, Real) else [float(one) for one in nu]  # type: ignore[union-attr]
        if n_layers < 1 or len(each) not in (1, n_layers) or not all(one > 0 for one in each):
            raise ValueError(
                f"n_layers is at least 1 and nu above 0, one or one for each layer, got {n_layers} and {nu}"
            )
        self.nu = each * n_layers if len(each) == 1 else each
        P, double = len(inducing), torch.float64
        self.inducing = nn.Parameter(inducing.clone(), requires_grad=learn_inducing)
        self.log_scales = nn.Parameter(torch.zeros(inputs, dtype=double))
        self.log_bias = nn.Parameter(torch.tensor(math.log(0.1), dtype=double))
        # A kernel is scaled and shifted before it is taken for the next layer's: of each layer and of the output.
        self.log_w = nn.Parameter(torch.zeros(n_layers + 1, dtype=double))
        self.log_b = nn.Parameter(torch.full((n_layers + 1,), math.log(0.1), dtype=double))
        self.lower = nn.ParameterList(
            nn.Parameter(torch.zeros(P, P, dtype=double), requires_grad=math.isfinite(one)) for one in self.nu
        )
        self.log_diagonal = nn.ParameterList(
            nn.Parameter(torch.zeros(P, dtype=double), requires_grad=math.isfinite(one)) for one in self.nu
        )

    def products(self, X: Tensor, *, together: bool = False) -> Blocks:
        """Products of scaled inputs X (t, d), of inducing rows, and of both."""
        scale, bias = self.log_scales.exp() / X.shape[1] ** 0.5, self.log_bias.exp()
        Z, X = self.inducing * scale, X * scale
        own = X @ X.T if together else X.square().sum(1)
        return Blocks(Z @ Z.T + bias, X @ Z.T + bias, own + bias)

    def forward(self, X: Tensor, *, together: bool = False) -> tuple[Blocks, list[Tensor]]:
        """The last layer's kernel at X (t, d), and the cost of each layer in nats, without nu.

        Args:
            X: Rows.
            together: Whether the kernel of all rows with one another is wanted.
        """
        return self.deepened(self.products(X, together=together))

    def deepened(self, G: Blocks) -> tuple[Blocks, list[Tensor]]:
        """As `forward`, of products that are given."""
        divergences = []
        for layer, T in enumerate(self.factors()):
            K = self._kernel(G, layer)
            C = cholesky(K.inducing, self.jitter)
            V = C @ T
            half = torch.linalg.solve_triangular(C, K.cross.T, upper=False)
            U = half.T @ T
            own = K.own + (U @ U.T - half.T @ half if K.own.ndim == 2 else U.square().sum(1) - half.square().sum(0))
            G = Blocks(V @ V.T, U @ V.T, own)
            divergences.append((T.square().sum() - len(T)) / 2 - T.diagonal().log().sum())
        return self._kernel(G, self.n_layers), divergences

    def factors(self) -> list[Tensor]:
        """T of each layer, lower triangular (P, P)."""
        return [
            lower.tril(-1) + torch.diag_embed(diagonal.exp())
            for lower, diagonal in zip(self.lower, self.log_diagonal, strict=True)
        ]

    def grams(self) -> list[Tensor]:
        """Gram matrices G (P, P) of all layers at the inducing rows, that of the inputs first."""
        G = self.products(self.inducing[:0]).inducing
        found = [G]
        nothing = Blocks(G, G[:0], G.new_zeros(0))
        for layer, T in enumerate(self.factors()):
            V = cholesky(self._kernel(nothing._replace(inducing=found[-1]), layer).inducing, self.jitter) @ T
            found.append(V @ V.T)
        return found

    def _kernel(self, G: Blocks, layer: int) -> Blocks:
        w, b = self.log_w[layer].exp(), self.log_b[layer].exp()
        return Blocks(*(w * one + b for one in G.mapped(self.kernel)))

    def penalty(self, divergences: Sequence[Tensor]) -> Tensor:
        """Sum over layers of nu times the cost; layers with infinite nu cost nothing, for they do not move."""
        return sum(
            (nu * one for nu, one in zip(self.nu, divergences, strict=True) if math.isfinite(nu)),
            torch.zeros((), dtype=torch.float64),
        )


def collapsed_bound(K: Blocks, Y: Tensor, noise: Tensor, jitter: float = 1e-8) -> Tensor:
    """Titsias's bound on log p(Y), in nats, of targets Y (t, p) with Gaussian noise; exact where inducing rows are the rows.

    Args:
        K: Kernel of the last layer.
        Y: Targets.
        noise: Its variance.
        jitter: In shares of the inducing kernel's mean diagonal.
    """
    A, B, c = _summary(K, Y, noise, jitter)
    n, p = Y.shape
    quadratic = (Y.square().sum() - c.square().sum()) / noise
    determinant = n * (2 * math.pi * noise).log() + 2 * B.diagonal().log().sum()
    missing = K.own.sum() / noise - A.square().sum()
    return -(quadratic + p * determinant + p * missing) / 2


def _summary(K: Blocks, Y: Tensor, noise: Tensor, jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    """A = C^-1 K_it / s (P, t), the factor of I + A A', and B^-1 A Y (P, p)."""
    C = cholesky(K.inducing, jitter)
    A = torch.linalg.solve_triangular(C, K.cross.T, upper=False) / noise.sqrt()
    B = torch.linalg.cholesky(torch.eye(len(C), dtype=A.dtype) + A @ A.T)
    return A, B, torch.linalg.solve_triangular(B, A @ Y, upper=False)


class _Inducing(nn.Module):
    """Values u = C v of p functions at the inducing rows, q(v) = N(m, S) with one S for all of them."""

    def __init__(self, points: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(points, outputs, dtype=torch.float64))
        self.lower = nn.Parameter(torch.zeros(points, points, dtype=torch.float64))
        self.log_diagonal = nn.Parameter(torch.zeros(points, dtype=torch.float64))

    def factor(self) -> Tensor:
        """Lower factor of S."""
        return self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def moments(self, K: Blocks, jitter: float) -> tuple[Tensor, Tensor]:
        """Means (t, p), and variances (t,) or covariances (t, t), of function values."""
        C = cholesky(K.inducing, jitter)
        half = torch.linalg.solve_triangular(C, K.cross.T, upper=False)
        spread = self.factor().T @ half
        if K.own.ndim == 2:
            return half.T @ self.mean, K.own - half.T @ half + spread.T @ spread
        own = K.own - half.square().sum(0) + spread.square().sum(0)
        return half.T @ self.mean, own.clamp_min(1e-12)

    def bound(self, K: Blocks, Y: Tensor, noise: Tensor, jitter: float, share: float = 1.0) -> Tensor:
        """Evidence lower bound in nats for Gaussian noise, of some rows' targets Y (t, p), each counted `share` times."""
        mean, own = self.moments(K, jitter)
        error = (Y - mean).square() + own[:, None]
        return -share * (error / noise + (2 * math.pi * noise).log()).sum() / 2 - self.divergence()

    def divergence(self) -> Tensor:
        """KL of q from the prior, summed over functions."""
        points, outputs = self.mean.shape
        of_spread = self.factor().square().sum() - points - 2 * self.log_diagonal.sum()
        return (outputs * of_spread + self.mean.square().sum()) / 2

    @torch.no_grad()
    def settle(self, K: Blocks, Y: Tensor, noise: Tensor, jitter: float) -> None:
        """The best q for Gaussian noise, in closed form."""
        _, B, c = _summary(K, Y, noise, jitter)
        self.mean.copy_(torch.linalg.solve_triangular(B.T, c, upper=True) / noise.sqrt())
        inverse = torch.linalg.solve_triangular(B, torch.eye(len(B), dtype=B.dtype), upper=False)
        factor = cholesky(inverse.T @ inverse)
        self.lower.copy_(factor.tril(-1))
        self.log_diagonal.copy_(factor.diagonal().log())


class _Trained(NamedTuple):
    """Where one start led."""

    objective: list[float]
    layers: DeepKernelMachine
    values: _Inducing
    noise: float


class _DeepKernelEstimator:
    """What regressor and classifier have in common: layers, inducing rows, optimisation, nu by validation."""

    n_layers: int
    nu: Any
    nus: Sequence[float]
    n_inducing: int | None
    kernel: Any
    lr: float
    max_iter: int
    batch_size: int | None
    n_restarts: int
    random_state: Any
    _layers: DeepKernelMachine

    @property
    def _most_rows(self) -> int | None:
        return 2000 if self.n_inducing is None else None

    def _for_more_rows(self) -> str:
        return "give n_inducing, such as 100, whose cost grows with rows as such"

    @property
    def inducing_(self) -> np.ndarray[Any, Any]:
        """Inducing rows (P, d), standardised as the features are."""
        return self._layers.inducing.detach().numpy()

    @property
    def gram_matrices_(self) -> list[np.ndarray[Any, Any]]:
        """Gram matrices of all layers at the inducing rows."""
        with torch.no_grad():
            return [one.numpy() for one in self._layers.grams()]

    def _check_layers(self) -> None:
        for name in ("n_layers", "max_iter", "n_restarts"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value}")
        for name, value in (("n_inducing", self.n_inducing), ("batch_size", self.batch_size)):
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise ValueError(f"{name} is a whole number of at least 1, or None, got {value}")
        if not (isinstance(self.kernel, str) and self.kernel in KERNELS) and not callable(self.kernel):
            raise ValueError(f"kernel is one of {', '.join(KERNELS)}, or a function of products, got {self.kernel!r}")
        if not self.lr > 0:
            raise ValueError(f"lr is above 0, got {self.lr}")
        if not len(self.nus) or not all(isinstance(one, Real) and float(one) > 0 for one in self.nus):
            raise ValueError(f"nus are numbers above 0, one or more, got {self.nus!r}")
        each = [self.nu] if isinstance(self.nu, Real | str) else list(self.nu)
        if not (isinstance(self.nu, str) and self.nu == "validate") and not (
            all(isinstance(one, Real) and float(one) > 0 for one in each) and len(each) in (1, self.n_layers)
        ):
            raise ValueError(
                f'nu is a number above 0, one for each of {self.n_layers} layers, or "validate", got {self.nu!r}'
            )

    def _machine(self, X: Tensor, random: np.random.RandomState, nu: Any, restart: int) -> DeepKernelMachine:
        full = self.n_inducing is None or self.n_inducing >= len(X)
        inducing = X if full else centres(X, int(self.n_inducing or 0), random)
        machine = DeepKernelMachine(
            X.shape[1], inducing, n_layers=self.n_layers, kernel=self.kernel, nu=nu, learn_inducing=not full,
            jitter=1e-8 if full else 1e-6,
        )  # fmt: skip
        # The first start is the network that learns no representation, others are representations at random.
        for T in [*machine.lower, *machine.log_diagonal] if restart else []:
            if T.requires_grad:
                T.data += 0.5 * torch.from_numpy(random.normal(size=T.shape)) / len(T) ** (0.5 * (T.ndim == 2))
        return machine

    def _chosen(
        self, X: Tensor, y: Tensor, random: np.random.RandomState, score: Callable[[Tensor, Tensor], float]
    ) -> Any:
        """Nu as given, or that which predicts rows left out best; of too few rows that which keeps nearest to the prior."""
        if not isinstance(self.nu, str):
            return self.nu
        if len(X) < 20:
            return max(self.nus)
        order = torch.from_numpy(random.permutation(len(X)))
        held, kept = order[: len(X) // 10], order[len(X) // 10 :]
        seed, told = int(random.randint(2**31 - 1)), []
        for nu in self.nus:
            self._best(X[kept], y[kept], nu, np.random.RandomState(seed))
            told.append(score(X[held], y[held]))
        return list(self.nus)[int(np.argmax(told))]

    def _best(self, X: Tensor, y: Tensor, nu: Any, random: np.random.RandomState) -> None:
        """Keep the start that ends with the highest objective."""
        found = [self._trained(X, y, nu, random, restart) for restart in range(self.n_restarts)]
        kept = max(found, key=lambda one: one.objective[-1])
        self.objective_, self._layers, self._values = kept.objective, kept.layers, kept.values
        self._layers.requires_grad_(False)
        self._values.requires_grad_(False)
        self.n_iter_, self.nu_ = self.max_iter, nu
        self._keep(kept)

    @abstractmethod
    def _trained(self, X: Tensor, y: Tensor, nu: Any, random: np.random.RandomState, restart: int) -> _Trained:
        """Where the start of that number leads."""

    @abstractmethod
    def _keep(self, kept: _Trained) -> None:
        """Set what predictions take from the start that is kept, beside layers and values."""

    def _climb(
        self, parameters: Iterator[nn.Parameter], objective: Callable[[Tensor], Tensor], rows: int,
        generator: torch.Generator,
    ) -> list[float]:  # fmt: skip
        """Maximise with Adam under a cosine, all rows a step or minibatches; the objective a row, step by step."""
        learned = [one for one in parameters if one.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_iter)
        size = min(rows, self.batch_size or rows)
        told, order = [], torch.arange(rows)
        for step in range(self.max_iter):
            start = step * size % max(1, rows - size + 1)
            if size < rows and (step == 0 or start < size):
                order = torch.randperm(rows, generator=generator)
            optimizer.zero_grad()
            found = objective(order[start : start + size])
            (-found / rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            told.append(float(found.detach()))
        return told


def centres(X: Tensor, count: int, random: np.random.RandomState) -> Tensor:
    """Centres (count, d) of k-means, and random rows in place of those that no row belongs to."""
    rows = X[torch.from_numpy(random.choice(len(X), count, replace=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        means, _ = kmeans2(X.numpy(), rows.numpy(), iter=10, minit="matrix")
    found = torch.from_numpy(means)
    return torch.where(found.isfinite().all(1, keepdim=True), found, rows)


class DeepKernelMachineRegressor(_DeepKernelEstimator, ProbabilisticRegressor):  # type: ignore[override]
    """A kernel method whose layers learn their kernels, with calibrated bands.

    Each layer's Gram matrix is free and maximises log p(y) - sum nu KL(N(0, G) || N(0, K(G of the layer below))): the exact wide
    limit of a deep Gaussian process whose data counts as much as its width. nu = inf is the neural network Gaussian process
    of the same kernel, by the same code.

    The bound always prefers a small nu, which fits noise: leave it to validation.

    Args:
        n_layers: L.
        nu: Weight of staying near the kernel of the layer below, one for all layers or one for each; "validate" takes that
            of `nus` which predicts a tenth of the rows best, and fits all rows with it.
        nus: Tried by "validate"; the largest is taken for fewer than 20 rows.
        n_inducing: Inducing rows, learned from centres of k-means on; None for all rows, whose cost grows with their cube.
        kernel: "relu", "erf", "rbf", "linear", or a function of products (..., n, m) and squared lengths (..., n), (..., m); see
            `ActivationGram`.
        noise: Variance of the noise in shares of the targets', where learning starts.
        learn_noise: Whether it is learned.
        lr: Adam's rate at first; it falls to 0 along a cosine.
        max_iter: Steps.
        batch_size: Rows a step; None for all, with the best distribution at the inducing rows in closed form.
        n_restarts: Starts, the first from the network that learns no representation; the highest objective is kept.
        random_state: Of inducing rows, the validation part, batches and other starts.

    Attributes:
        nu_: nu that was used.
        objective_: The objective in nats, step by step.
        inducing_: Inducing rows (P, d), standardised; without `n_inducing` all rows, in an order of their own.
        gram_matrices_: Gram matrices (P, P) of all layers at the inducing rows, that of the inputs first.
        noise_: Variance of the noise, in shares of the targets'.
        n_iter_: Steps.

    Raises:
        ValueError: An argument out of range, or more than 2,000 rows without inducing rows.

    Example:
        >>> X = np.linspace(-2, 2, 30)[:, None]
        >>> model = DeepKernelMachineRegressor(n_layers=1, nu=10.0, max_iter=60).fit(X, np.sin(2 * X[:, 0]))
        >>> model.score(X, np.sin(2 * X[:, 0])) > 0.95
        True
    """

    _many_targets = True

    def __init__(
        self, n_layers: int = 2, *, nu: Any = "validate", nus: Sequence[float] = NUS, n_inducing: int | None = None,
        kernel: KernelName | GramKernel = "relu", noise: float = 0.1, learn_noise: bool = True, lr: float = 0.02,
        max_iter: int = 400, batch_size: int | None = None, n_restarts: int = 1, random_state: RandomState = 0,
    ) -> None:  # fmt: skip
        self.n_layers, self.nu, self.nus, self.n_inducing, self.kernel = n_layers, nu, nus, n_inducing, kernel
        self.noise, self.learn_noise, self.lr, self.max_iter = noise, learn_noise, lr, max_iter
        self.batch_size, self.n_restarts, self.random_state = batch_size, n_restarts, random_state

    def _check(self) -> None:
        self._check_layers()
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is a variance above 0, got {self.noise}")

    def _fit(self, X: Tensor, y: Tensor) -> None:
        random = check_random_state(self.random_state)
        score = lambda X, y: float(self._predictive(X).log_prob(y).mean())  # noqa: E731
        self._best(X, y, self._chosen(X, y, random, score), random)

    def _trained(self, X: Tensor, y: Tensor, nu: Any, random: np.random.RandomState, restart: int) -> _Trained:
        machine = self._machine(X, random, nu, restart)
        log_noise = nn.Parameter(
            torch.tensor(math.log(self.noise), dtype=torch.float64), requires_grad=self.learn_noise
        )
        values = _Inducing(len(machine.inducing), y.shape[1])
        # Noise that vanishes leaves matrices that are singular to rounding.
        variance = lambda: log_noise.exp() + 1e-6  # noqa: E731

        def collapsed(rows: Tensor) -> Tensor:
            K, divergences = machine(X)
            return collapsed_bound(K, y, variance(), machine.jitter) - machine.penalty(divergences)

        def by_batch(rows: Tensor) -> Tensor:
            K, divergences = machine(X[rows])
            found = values.bound(K, y[rows], variance(), machine.jitter, len(X) / len(rows))
            return found - machine.penalty(divergences)

        parameters = [*machine.parameters(), log_noise]
        whole = self.batch_size is None
        objective = self._climb(
            iter(parameters if whole else [*parameters, *values.parameters()]), collapsed if whole else by_batch, len(X),
            generator_of(random),
        )  # fmt: skip
        if whole:
            with torch.no_grad():
                values.settle(machine(X)[0], y, variance(), machine.jitter)
        return _Trained(objective, machine, values, float(variance().detach()))

    def _keep(self, kept: _Trained) -> None:
        self.noise_ = kept.noise

    def _predictive(self, X: Tensor) -> Distribution:
        with torch.no_grad():
            # Some rows at a time: their products with all inducing rows are held at once, of each layer.
            size = max(1, 1_000_000 // len(self._layers.inducing))
            found = [self._values.moments(self._layers(rows)[0], self._layers.jitter) for rows in X.split(size)]
            mean, variance = (torch.cat(each) for each in zip(*found, strict=True))
            return Normal(mean, (variance + self.noise_).sqrt()[:, None].expand_as(mean))

    def _together(self, X: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Mean (n, p) and covariance (n, n) of all rows together."""
        mean, covariance = self._values.moments(self._layers(X, together=True)[0], self._layers.jitter)
        return mean, covariance + (self.noise_ if noisy else 0.0) * torch.eye(len(X), dtype=torch.float64)

    def _draws(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Of all rows together."""
        check_together(X)
        with torch.no_grad():
            mean, covariance = self._together(X, True)
            noise = torch.randn(n_samples, *mean.shape, generator=generator, dtype=torch.float64)
            return mean + cholesky(covariance) @ noise

    def as_botorch(self) -> Any:
        """This fitted regressor, of one target, as a BoTorch `Model`.

        Raises:
            ValueError: It was fitted to several targets.
        """
        from paperworks.uncertainty.surrogate import surrogate_of

        if len(self.target_mean_) > 1:
            raise ValueError(
                f"a BoTorch model of one target is made, and there are {len(self.target_mean_)}: fit each by itself"
            )

        def together(X: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
            mean, covariance = self._together(X, noisy)
            return mean[:, 0], covariance

        return surrogate_of(self, together)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return _kept(self, {"noise": self.noise_})

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        _read(self, tensors, values, len(self.target_mean_))
        self.noise_ = values["noise"]


class DeepKernelMachineClassifier(_DeepKernelEstimator, ProbabilisticClassifier):  # type: ignore[override]
    """A deep kernel machine with a latent function for each class, whose values at inducing rows have one covariance.

    Args:
        n_layers: L.
        nu: As for `DeepKernelMachineRegressor`.
        nus: As for `DeepKernelMachineRegressor`.
        n_inducing: Inducing rows; None for all rows.
        kernel: As for `DeepKernelMachineRegressor`.
        n_samples: Draws of function values a step.
        n_pred_samples: Draws of a prediction.
        lr: Adam's rate at first.
        max_iter: Steps.
        batch_size: Rows a step; None for all.
        n_restarts: Starts, the first from the network that learns no representation; the highest objective is kept.
        random_state: Of inducing rows, the validation part, batches, other starts and draws.

    Attributes:
        nu_: nu that was used.
        objective_: The objective in nats, step by step.
        inducing_: Inducing rows (P, d), standardised; without `n_inducing` all rows, in an order of their own.
        gram_matrices_: Gram matrices (P, P) of all layers at the inducing rows, that of the inputs first.
        n_iter_: Steps.

    Raises:
        ValueError: An argument out of range, one class, or more than 2,000 rows without inducing rows.

    Example:
        >>> X = np.linspace(-2, 2, 40)[:, None]
        >>> model = DeepKernelMachineClassifier(1, nu=10.0, n_inducing=10, max_iter=100, lr=0.1).fit(X, X[:, 0] ** 2 > 1)
        >>> model.score(X, X[:, 0] ** 2 > 1) > 0.9
        True
    """

    def __init__(
        self, n_layers: int = 2, *, nu: Any = "validate", nus: Sequence[float] = NUS, n_inducing: int | None = 100,
        kernel: KernelName | GramKernel = "relu", n_samples: int = 32, n_pred_samples: int = 1000, lr: float = 0.02,
        max_iter: int = 400, batch_size: int | None = None, n_restarts: int = 1, random_state: RandomState = 0,
    ) -> None:  # fmt: skip
        self.n_layers, self.nu, self.nus, self.n_inducing, self.kernel = n_layers, nu, nus, n_inducing, kernel
        self.n_samples, self.n_pred_samples, self.lr, self.max_iter = n_samples, n_pred_samples, lr, max_iter
        self.batch_size, self.n_restarts, self.random_state = batch_size, n_restarts, random_state

    def _check(self) -> None:
        self._check_layers()
        for name in ("n_samples", "n_pred_samples"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value}")

    def _fit(self, X: Tensor, y: Tensor) -> None:
        random = check_random_state(self.random_state)
        score = lambda X, y: float(self._probabilities(X)[torch.arange(len(y)), y].log().mean())  # noqa: E731
        self._best(X, y, self._chosen(X, y, random, score), random)

    def _trained(self, X: Tensor, y: Tensor, nu: Any, random: np.random.RandomState, restart: int) -> _Trained:
        machine, classes = self._machine(X, random, nu, restart), len(self.classes_)
        values, generator = _Inducing(len(machine.inducing), classes), generator_of(random)
        objective = self._objective(machine, values, X, y, generator)
        parameters = iter([*machine.parameters(), *values.parameters()])
        return _Trained(self._climb(parameters, objective, len(X), generator), machine, values, 0.0)

    def _objective(
        self, machine: DeepKernelMachine, values: _Inducing, X: Tensor, y: Tensor, generator: torch.Generator
    ) -> Callable[[Tensor], Tensor]:
        """The evidence lower bound in nats, estimated from some rows by draws of function values."""

        def objective(rows: Tensor) -> Tensor:
            K, divergences = machine(X[rows])
            mean, variance = values.moments(K, machine.jitter)
            noise = torch.randn(self.n_samples, *mean.shape, generator=generator, dtype=torch.float64)
            logits = mean + variance.sqrt()[:, None] * noise
            fitted = logits.log_softmax(-1)[:, torch.arange(len(rows)), y[rows]].mean(0).sum()
            return len(X) / len(rows) * fitted - values.divergence() - machine.penalty(divergences)

        return objective

    def _keep(self, kept: _Trained) -> None:
        # Of what predictions draw.
        self._seed = 0 if not isinstance(self.random_state, Integral) else int(self.random_state)

    def _probabilities(self, X: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            classes = self._values.mean.shape[1]
            # The same for all rows, so that what is said of one does not hang on where it stands.
            noise = torch.randn(self.n_pred_samples, 1, classes, generator=generator, dtype=torch.float64)
            found = []
            for rows in X.split(500):
                mean, variance = self._values.moments(self._layers(rows)[0], self._layers.jitter)
                found.append((mean + variance.sqrt()[:, None] * noise).softmax(-1).mean(0))
            return torch.cat(found)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return _kept(self, {"seed": self._seed})

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        _read(self, tensors, values, len(self.classes_))
        self._seed = values["seed"]


def _kept(model: Any, told: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(model.kernel, str):
        raise ValueError("a kernel of one's own is code, which is not saved: keep the training data instead")
    nu = model.nu_ if isinstance(model.nu_, Real) else list(model.nu_)
    layers, values = model._layers.state_dict(prefix="layers."), model._values.state_dict(prefix="values.")
    told |= {"nu": nu, "objective": model.objective_, "jitter": model._layers.jitter}
    return layers | values, told


def _read(model: Any, tensors: dict[str, Tensor], told: dict[str, Any], outputs: int) -> None:
    inducing = tensors["layers.inducing"]
    model.nu_ = told["nu"]
    model._layers = DeepKernelMachine(
        inducing.shape[1], inducing, n_layers=model.n_layers, kernel=model.kernel, nu=model.nu_, jitter=told["jitter"]
    )
    model._values = _Inducing(len(inducing), outputs)
    for module, prefix in ((model._layers, "layers."), (model._values, "values.")):
        module.load_state_dict(
            {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        )
    model.objective_, model.n_iter_ = told["objective"], model.max_iter


def sample_finite_dgp(
    X: Tensor, width: int, n_layers: int = 1, *, kernel: KernelName | GramKernel = "relu", jitter: float = 1e-8,
    generator: torch.Generator | None = None,
) -> list[Tensor]:  # fmt: skip
    """Features of a deep Gaussian process of finite width, drawn from its prior.

    Args:
        X: Features of the input (n, d); their products over d are the first Gram matrix.
        width: Features of each layer.
        n_layers: Layers.
        kernel: As for `DeepKernelMachine`, unscaled.
        jitter: In shares of each kernel's mean diagonal.
        generator: Of the draws.

    Returns:
        Features of each layer (n, width); their products over the width are Gram matrices, which in wide ones are the
        kernel of the layer below.

    Example:
        >>> X = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
        >>> (F,) = sample_finite_dgp(X, 100_000, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(F @ F.T / 100_000, X @ X.T, atol=0.02)
        True
    """
    if width < 1 or n_layers < 1:
        raise ValueError(f"width and n_layers are at least 1, got {width} and {n_layers}")
    gram, G, found = KERNELS[kernel] if isinstance(kernel, str) else kernel, X @ X.T / X.shape[1], []
    for _ in range(n_layers):
        factor = cholesky(gram(G, G.diagonal(), G.diagonal()), jitter)
        F = factor @ torch.randn(len(X), width, generator=generator, dtype=X.dtype)
        found.append(F)
        G = F @ F.T / width
    return found
