"""Posterior collapse in conditional and hierarchical VAEs: thresholds beforehand, a meter afterwards (arXiv 2306.05023).

Throughout, z ~ N(0, eta_enc^2 I) is the prior, N(., eta_dec^2 I) the decoder, and losses are twice the negative ELBO with
beta on the divergence. As the theory has no biases, take the means off the data first. All is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paperworks.representation.features import as_matrix, as_numbers, evaluated, to_device_of
from paperworks.representation.metric import StreamedMetric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Encoder = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """Global optimum of a linear VAE or conditional VAE with d latent variables; all tensors are in float64.

    Attributes:
        spectrum: Variances that the latent variables could code, descending (d,): eigenvalues of the data's second moment,
            or of what the condition leaves of it.
        threshold: A variable is used where its variance is above this (d,).
        decoder: Singular values of the decoder U (d,).
        encoder: Singular values of the encoder on whitened data, V (d,).
        posterior_std: Standard deviations of the posterior (d,).
        kl: Divergence of posterior from prior, mean over the data, in nats (d,).
        beta: Weight of the divergence.
        eta_enc: Standard deviation of the prior.
        eta_dec: Standard deviation of the decoder.
        weights: An optimal set of weights by name: U, W, or U1, U2, W1, W2.
    """

    spectrum: Tensor
    threshold: Tensor
    decoder: Tensor
    encoder: Tensor
    posterior_std: Tensor
    kl: Tensor
    beta: float
    eta_enc: float
    eta_dec: float
    weights: dict[str, Tensor] = field(repr=False)

    @property
    def collapsed(self) -> Tensor:
        """Which variables have the prior for posterior at every input (d,)."""
        return self.kl.abs() < 1e-12

    @property
    def n_collapsed(self) -> int:
        """How many do."""
        return int(self.collapsed.sum())

    @property
    def rank(self) -> int:
        """How many directions of the data reach the output; with fixed variances it may fall with nothing collapsed."""
        return int((self.decoder > 0).sum())

    def recommend(self, active: int) -> dict[str, float]:
        """Bounds within which so many variables stay in use, each with the other options as they are.

        Args:
            active: How many, from 1 to d.

        Returns:
            Suprema of `beta` and `eta_dec`.

        Raises:
            ValueError: active is out of range.

        Example:
            >>> solution = linear_vae_solution(torch.diag(torch.tensor([2.0, 1.0])), d=2, moments=True)
            >>> {name: round(bound, 3) for name, bound in solution.recommend(2).items()}
            {'beta': 1.0, 'eta_dec': 1.0}
        """
        room = float(self._at(active, self.spectrum) / self._at(active, self.threshold))
        return {"beta": self.beta * room, "eta_dec": self.eta_dec * math.sqrt(room)}

    def _at(self, active: int, values: Tensor) -> Tensor:
        if not 1 <= active <= len(values):
            raise ValueError(f"active is {active}: give a number of latent variables from 1 to {len(values)}")
        return values[active - 1]

    def plot(self) -> Figure:
        """The spectrum against the threshold, and the divergence of each variable."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        index = np.arange(1, len(self.spectrum) + 1)
        left.bar(index, self.spectrum.cpu().numpy(), color="#1f6f8b")
        left.step(index, self.threshold.cpu().numpy(), "k--", where="mid", label="threshold")
        left.set(xlabel="direction", ylabel="variance", title="what could be coded")
        left.legend(frameon=False)
        right.bar(np.arange(1, len(self.kl) + 1), self.kl.cpu().numpy(), color="#c8553d")
        right.set(
            xlabel="latent variable", ylabel="divergence, nats", title=f"{self.n_collapsed} predicted to collapse"
        )
        return figure


@dataclass(frozen=True, eq=False)
class HierarchicalSolution(LinearSolution):
    """Global optimum of a linear two-level VAE x -> z1 -> z2.

    `decoder` and `encoder` belong to z1 (d1,); `posterior_std`, `kl`, `collapsed` and `recommend` are z2's (d2,), whose
    divergence is the mean over the data and over z1. A variable of z2 may hold nothing but the noise of z1: it is not
    collapsed, and the encoder's singular value there is 0.

    Attributes:
        top_decoder: Singular values of the decoder U2 from z2 to z1 (d2,).
        beta1: Weight of the divergence of z1; `beta` is that of z2.
        sigma1: Posterior standard deviation of z1.
        effective_std: eta_dec where z2's variance is learnt, sigma2 eta_dec / eta_enc where it is fixed.
    """

    top_decoder: Tensor
    beta1: float
    sigma1: float
    effective_std: float

    @property
    def rank(self) -> int:
        """How many directions of z1 the decoder of z2 reaches."""
        return int((self.top_decoder > 0).sum())

    def recommend(self, active: int) -> dict[str, float]:
        """Bounds within which so many variables of z2 stay in use, each with the other options as they are.

        Args:
            active: How many, from 1 to d2.

        Returns:
            Suprema of `beta2` and `eta_dec`, infimum of `beta1`.

        Raises:
            ValueError: active is out of range.
        """
        variance = float(self._at(active, self.spectrum))
        noise, s2 = self.beta1 * self.sigma1**2, self.effective_std**2
        most = math.sqrt(noise * max(noise, variance)) / s2
        least = self.beta * s2 / self.sigma1**2
        if variance > 0:
            least = min(least, (self.beta * s2 / self.sigma1) ** 2 / variance)
        return {"beta2": most, "beta1": least, "eta_dec": self.eta_dec * math.sqrt(most / self.beta)}


def linear_vae_solution(
    X: Any,
    d: int,
    beta: float = 1.0,
    eta_enc: float = 1.0,
    eta_dec: float = 1.0,
    sigma: float | Sequence[float] | None = None,
    *,
    moments: bool = False,
) -> LinearSolution:
    """Closed form of the linear VAE with d latent variables: z ~ N(W x, Sigma), x ~ N(U z, eta_dec^2 I).

    With Sigma learnt, a variable collapses exactly when its theta^2 < beta eta_dec^2. With Sigma fixed the weights may lose
    rank, yet the posterior is not the prior: learning Sigma is itself a cause of collapse.

    Args:
        X: Data (n, D), or with `moments=True` its second moment E[x x^T] (D, D).
        d: Number of latent variables.
        beta: Weight of the divergence.
        eta_enc: Standard deviation of the prior.
        eta_dec: Standard deviation of the decoder.
        sigma: Fixed standard deviations of the posterior, one or d; None learns them.
        moments: Whether X is a second moment.

    Returns:
        The optimum; variables in the order of the spectrum, and of ascending sigma.

    Raises:
        ValueError: Data empty, not two-dimensional, not finite or no second moment, or an option out of range.
        TypeError: Data that are no real numbers.

    Example:
        >>> solution = linear_vae_solution(torch.diag(torch.tensor([4.0, 2.0, 0.5])), d=3, moments=True)
        >>> solution.n_collapsed, [round(kl, 3) for kl in solution.kl.tolist()]
        (1, [0.693, 0.347, 0.0])
    """
    _check_options(d=d, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec)
    return _solve(_spectrum(X, moments, d), None, beta, eta_enc, eta_dec, sigma)


def linear_cvae_solution(
    X: Any, Y: Any, d: int, beta: float = 1.0, eta_enc: float = 1.0, eta_dec: float = 1.0
) -> LinearSolution:
    """Closed form of the linear conditional VAE: z ~ N(W1 x + W2 y, Sigma), y ~ N(U1 z + U2 x, eta_dec^2 I), Sigma learnt.

    U2 regresses y on x and z codes the residual alone: a variable collapses exactly when its eigenvalue of
    E = Syy - Syx Sxx^-1 Sxy is below beta eta_dec^2. The better x predicts y, the more variables collapse.

    Args:
        X: Conditions (n, Dx).
        Y: Outputs (n, Dy).
        d: Number of latent variables.
        beta: Weight of the divergence.
        eta_enc: Standard deviation of the prior.
        eta_dec: Standard deviation of the decoder.

    Returns:
        The optimum; its spectrum holds eigenvalues of E.

    Raises:
        ValueError: Data empty, not two-dimensional, not finite or of unequal length, or an option out of range.
        TypeError: Data that are no real numbers.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> linear_cvae_solution(x, x, d=2, beta=0.1).n_collapsed
        2
    """
    _check_options(d=d, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec)
    X, Y = _matrix(X, "X"), _matrix(Y, "Y")
    if len(X) != len(Y):
        raise ValueError(f"X has {len(X)} rows and Y has {len(Y)}: give one condition for each output")
    # Least squares in the directions that x has.
    left, values, right = torch.linalg.svd(X, full_matrices=False)
    kept = values > max(X.shape) * torch.finfo(X.dtype).eps * values[0]
    onto = left[:, kept].mT @ Y
    regression = (right[kept].mT @ (onto / values[kept, None])).mT
    return _solve(_of_data(Y - left[:, kept] @ onto, d, Y), regression, beta, eta_enc, eta_dec, None)


def _solve(
    spectral: tuple[Tensor, Tensor], regression: Tensor | None, beta: float, eta_enc: float, eta_dec: float, sigma: Any
) -> LinearSolution:
    spectrum, P = spectral
    d, limit, theta = len(spectrum), beta * eta_dec**2, spectrum.sqrt()
    if sigma is None:
        threshold = torch.full_like(spectrum, limit)
        surplus = (spectrum - limit).clamp(min=0)
        decoder = surplus.sqrt() / eta_enc
        encoder = torch.where(surplus > 0, eta_enc * surplus.sqrt() / theta, 0)
        std = torch.where(surplus > 0, eta_enc * math.sqrt(limit) / theta, eta_enc)
    else:
        std = as_numbers(sigma, "sigma").to(spectrum)
        if std.shape not in ((), (1,), (d,)) or not (std.isfinite() & (std > 0)).all():
            raise ValueError(
                f"sigma is {sigma}: give one positive standard deviation, or one for each of {d} variables"
            )
        std = std.expand(d).sort().values
        g = math.sqrt(limit) / eta_enc
        threshold, surplus = (g * std) ** 2, (theta - g * std).clamp(min=0)
        decoder, encoder = (g * surplus / std).sqrt(), (std * surplus / g).sqrt()
    W = _over(encoder, theta)[:, None] * P.mT
    U = P * decoder
    weights = {"U": U, "W": W}
    if regression is not None:
        weights = {"U1": U, "U2": regression, "W1": -W @ regression, "W2": W}
    kl = _mean_kl(encoder**2, std, eta_enc)
    return LinearSolution(spectrum, threshold, decoder, encoder, std, kl, beta, eta_enc, eta_dec, weights)


def linear_hvae_solution(
    X: Any,
    d1: int,
    d2: int,
    beta1: float = 1.0,
    beta2: float = 1.0,
    eta_enc: float = 1.0,
    eta_dec: float = 1.0,
    sigma1: float = 0.5,
    sigma2: float | None = None,
    *,
    moments: bool = False,
) -> HierarchicalSolution:
    """Closed form of the linear two-level VAE x -> z1 -> z2: x ~ N(U1 z1, eta_dec^2 I), z1 ~ N(U2 z2, eta_dec^2 I).

    A larger beta1 ties z1 to its reconstruction from z2, and keeps z2 in use; larger beta2 and eta_dec collapse it.

    Args:
        X: Data (n, D), or with `moments=True` its second moment E[x x^T] (D, D).
        d1: Variables of z1.
        d2: Variables of z2.
        beta1: Weight of the divergence of z1.
        beta2: Weight of the divergence of z2.
        eta_enc: Standard deviation of the prior of z2.
        eta_dec: Standard deviation of both decoders.
        sigma1: Fixed posterior standard deviation of z1.
        sigma2: Fixed posterior standard deviation of z2; None learns one for each variable.
        moments: Whether X is a second moment.

    Returns:
        The optimum.

    Raises:
        ValueError: Data empty, not two-dimensional, not finite or no second moment, or an option out of range.
        TypeError: Data that are no real numbers.

    Example:
        >>> moment = torch.diag(torch.tensor([3.0, 2.0, 0.5]))
        >>> linear_hvae_solution(moment, d1=3, d2=3, moments=True).n_collapsed
        3
        >>> linear_hvae_solution(moment, d1=3, d2=3, beta1=3.0, moments=True).n_collapsed
        1
    """
    positive = {"beta1": beta1, "beta2": beta2, "eta_enc": eta_enc, "eta_dec": eta_dec, "sigma1": sigma1}
    _check_options(d1=d1, d2=d2, **positive, **_given(sigma2=sigma2))
    spectrum, P = _spectrum(X, moments, d1)
    theta, r, c = spectrum.sqrt(), beta2 / beta1, eta_dec / eta_enc
    alone = ((sigma1 / math.sqrt(beta1)) * (theta - math.sqrt(beta1) * sigma1)).clamp(min=0).sqrt()
    effective = eta_dec if sigma2 is None else c * sigma2
    dominated = sigma1**2 < r * effective**2
    threshold = torch.full_like(spectrum, (beta2 * effective**2) ** 2 / (beta1 * sigma1**2) if dominated else 0.0)
    used = (spectrum > threshold) if dominated else torch.ones_like(spectrum, dtype=torch.bool)
    used = used & (torch.arange(d1, device=theta.device) < d2)
    if sigma2 is None:
        lam = sigma1 / (math.sqrt(beta2) * eta_dec) * (spectrum - beta2 * eta_dec**2).clamp(min=0).sqrt()
        om2 = (sigma1**2 * (spectrum / (beta2 * eta_dec**2)).clamp(min=1) - r * eta_dec**2) / eta_enc**2
    else:
        b, s = math.sqrt(beta1 * beta2), sigma1
        shown = theta >= math.sqrt(b * c * s * sigma2)
        reach = (theta ** (4 / 3) - (b * c * s * sigma2) ** (2 / 3)).clamp(min=0).sqrt()
        lam = torch.where(shown, (s**2 / (b * c * sigma2)) ** (1 / 3) * reach, 0)
        rise = theta ** (2 / 3) - (beta2**2 * c**4 * sigma2**4 / (beta1 * s**2)) ** (1 / 3)
        om2 = (math.sqrt(beta2) * c * s / (beta1 * sigma2**2)) ** (2 / 3) * rise
        om2 = torch.where(shown, om2, math.sqrt(r) * c * s / sigma2 - r * c**2)
    lam = torch.where(used, lam, alone)
    top = torch.where(used, om2.clamp(min=0).sqrt(), 0)
    both = min(d1, d2)
    omega, W2 = theta.new_zeros(d2), theta.new_zeros(d2, d1)
    omega[:both] = top[:both]
    back, mean_square = omega / (omega**2 + r * c**2), torch.zeros_like(omega)
    W2[range(both), range(both)] = back[:both]
    mean_square[:both] = (back[:both] ** 2) * (lam[:both] ** 2 + sigma1**2)
    if sigma2 is None:
        std = torch.where(omega > 0, (r * eta_dec**2 / (omega**2 + r * c**2)).sqrt(), eta_enc)
    else:
        std = torch.full_like(omega, sigma2)
    out = theta * lam / (lam**2 + sigma1**2)
    U2 = theta.new_zeros(d1, d2)
    U2[range(both), range(both)] = omega[:both]
    weights = {"U1": P * out, "U2": U2, "W1": _over(lam, theta)[:, None] * P.mT, "W2": W2}
    return HierarchicalSolution(
        spectrum, threshold, out, lam, std, _mean_kl(mean_square, std, eta_enc), beta2, eta_enc, eta_dec, weights,
        omega, beta1, sigma1, effective,
    )  # fmt: skip


def _matrix(X: Any, name: str) -> Tensor:
    X = as_matrix(X, name)
    if not X.numel():
        raise ValueError(f"{name} has shape {tuple(X.shape)}: give samples as rows, (n, D), at least one")
    return X


def _check_options(**options: float) -> None:
    for name, value in options.items():
        if name.startswith("d") and not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} is {value}: give a number of latent variables, at least 1")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: give a positive finite number")


def _given(**options: float | None) -> dict[str, float]:
    return {name: value for name, value in options.items() if value is not None}


def _spectrum(X: Any, moments: bool, d: int) -> tuple[Tensor, Tensor]:
    """The d largest eigenvalues of the second moment of data, or of one that is given, and their vectors (D, d)."""
    X = _matrix(X, "X")
    if not moments:
        return _of_data(X, d, X)
    if X.shape[0] != X.shape[1] or float((X - X.mT).abs().max()) > 1e-5 * float(X.abs().max()):
        raise ValueError(
            f"X has shape {tuple(X.shape)} and is no second moment: give a symmetric one, or moments=False"
        )
    values, vectors = torch.linalg.eigh((X + X.mT) / 2)
    largest = float(values.abs().max())
    if float(values[0]) < -1e-5 * largest:
        raise ValueError(
            f"X has the eigenvalue {float(values[0]):.3g} and is no second moment: those are at least 0; give E[x x^T]"
        )
    return _padded(values.flip(0), vectors.flip(1), d, largest)


def _of_data(X: Tensor, d: int, beside: Tensor) -> tuple[Tensor, Tensor]:
    """The same of data (n, D) by their singular values, whose squares keep more digits than the moment's eigenvalues.

    Values are zero where they are rounding of the data `beside` which X was computed from.
    """
    _, values, vectors = torch.linalg.svd(torch.linalg.qr(X, mode="r").R / math.sqrt(len(X)), full_matrices=False)
    rounding = len(X) * torch.finfo(X.dtype).eps * torch.linalg.matrix_norm(beside) / math.sqrt(len(X))
    return _padded(torch.where(values > rounding, values, 0) ** 2, vectors.mT, d, 0.0)


def _padded(values: Tensor, vectors: Tensor, d: int, largest: float) -> tuple[Tensor, Tensor]:
    """The first d, zeros where there are fewer; rounding of the largest is zero."""
    values, vectors = values[:d], vectors[:, :d]
    values = torch.where(values > len(vectors) * torch.finfo(values.dtype).eps * largest, values, 0)
    missing = d - len(values)
    return nn.functional.pad(values, (0, missing)), nn.functional.pad(vectors, (0, missing))


def _over(numerator: Tensor, theta: Tensor) -> Tensor:
    return torch.where(theta > 0, numerator / theta, 0)


def _mean_kl(mean_square: Tensor, std: Tensor, prior_std: float) -> Tensor:
    # Where both are at the prior's the difference would only be rounding.
    ratio = (std / prior_std) ** 2
    kl: Tensor = 0.5 * (mean_square / prior_std**2 + ratio - ratio.log() - 1)
    return torch.where((mean_square == 0) & (std == prior_std), 0, kl)


class LinearCVAE(nn.Module):
    """Linear conditional VAE, z ~ N(W1 x + W2 y, Sigma) and y ~ N(U1 z + U2 x, eta_dec^2 I), with its loss in closed form.

    Args:
        x_dim: Size of the condition, 0 for a plain VAE.
        y_dim: Size of the output.
        d: Latent variables.
        beta: Weight of the divergence.
        eta_enc: Standard deviation of the prior.
        eta_dec: Standard deviation of the decoder.
        sigma: Fixed posterior standard deviation, or None to learn one for each variable.
        generator: Draws the first weights.

    Example:
        >>> model = LinearCVAE(0, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> loss = model.fit(torch.diag(torch.tensor([4.0, 0.5]).double()))
        >>> bool(abs(model.log_var.exp().min() - 0.25) < 1e-6)
        True
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        d: int,
        *,
        beta: float = 1.0,
        eta_enc: float = 1.0,
        eta_dec: float = 1.0,
        sigma: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_options(d=d, beta=beta, eta_enc=eta_enc, eta_dec=eta_dec, **_given(sigma=sigma))
        if x_dim < 0 or y_dim < 1:
            raise ValueError(f"x_dim is {x_dim} and y_dim {y_dim}: give sizes of at least 0 and 1")
        self.beta, self.eta_enc, self.eta_dec, self.x_dim = beta, eta_enc, eta_dec, x_dim
        self.U1, self.U2 = _weight(y_dim, d, generator), _weight(y_dim, x_dim, generator)
        self.W1, self.W2 = _weight(d, x_dim, generator), _weight(d, y_dim, generator)
        self.log_var = nn.Parameter(
            torch.full((d,), 2 * math.log(sigma or 0.5 * eta_enc), dtype=torch.float64), requires_grad=sigma is None
        )

    def encode(self, y: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the posterior, each (n, d)."""
        y, x = self._rows(y, x)
        mean = y @ self.W2.mT + x @ self.W1.mT
        return mean, self.log_var.exp().expand_as(mean)

    def exact_loss(self, moment: Tensor) -> Tensor:
        """Expected loss, without sampling.

        Args:
            moment: Second moment of (x, y) stacked, condition first.

        Raises:
            ValueError: It is of another size.
        """
        moment = _sized(moment, self.x_dim + len(self.U1), self.U1)
        encode = torch.cat([self.W1, self.W2], dim=1)
        copy = torch.eye(len(self.U2), len(moment), dtype=moment.dtype, device=moment.device).roll(self.x_dim, 1)
        residual = copy - self.U1 @ encode - nn.functional.pad(self.U2, (0, len(self.U2)))
        var = self.log_var.exp()
        error = _trace(residual, moment) + (self.U1**2 @ var).sum()
        prior = (_trace(encode, moment) + var.sum()) / self.eta_enc**2 - self.log_var.sum()
        return error / self.eta_dec**2 + self.beta * prior

    def loss(self, y: Tensor, x: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss with one sample of z for each row, averaged over rows."""
        y, x = self._rows(y, x)
        mean, var = self.encode(y, x)
        z = mean + var.sqrt() * _noise(mean, generator)
        error = (y - z @ self.U1.mT - x @ self.U2.mT).square().sum(-1)
        prior = ((mean**2 + var) / self.eta_enc**2 - var.log()).sum(-1)
        return (error / self.eta_dec**2 + self.beta * prior).mean()

    def fit(self, moment: Tensor, steps: int = 3000) -> float:
        """Minimise the expected loss by L-BFGS, in place; returns the loss reached."""
        return _minimise(self, moment, steps)

    def _rows(self, y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and conditions in the model's dtype, the latter of no columns where the model takes none."""
        x = y.new_zeros(len(y), 0) if x is None else x
        if y.shape != (len(y), len(self.U1)) or x.shape != (len(y), self.x_dim):
            raise ValueError(
                f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}: the model takes (n, {len(self.U1)}) given (n, "
                f"{self.x_dim})"
            )
        return y.to(self.U1), x.to(self.U1)


class LinearVAE(LinearCVAE):
    """Linear VAE, z ~ N(W x, Sigma) and x ~ N(U z, eta_dec^2 I): a `LinearCVAE` without condition.

    Args:
        dim: Size of the data.
        d: Latent variables.
        **options: As for `LinearCVAE`.
    """

    def __init__(self, dim: int, d: int, **options: Any) -> None:
        super().__init__(0, dim, d, **options)


class LinearHVAE2(nn.Module):
    """Linear two-level VAE x -> z1 -> z2 with its loss in closed form.

    Args:
        dim: Size of the data.
        d1: Variables of z1.
        d2: Variables of z2.
        beta1: Weight of the divergence of z1.
        beta2: Weight of the divergence of z2.
        eta_enc: Standard deviation of the prior of z2.
        eta_dec: Standard deviation of both decoders.
        sigma1: Fixed posterior standard deviation of z1.
        sigma2: The same of z2, or None to learn one for each variable.
        generator: Draws the first weights.
    """

    def __init__(
        self,
        dim: int,
        d1: int,
        d2: int,
        *,
        beta1: float = 1.0,
        beta2: float = 1.0,
        eta_enc: float = 1.0,
        eta_dec: float = 1.0,
        sigma1: float = 0.5,
        sigma2: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        positive = {"beta1": beta1, "beta2": beta2, "eta_enc": eta_enc, "eta_dec": eta_dec, "sigma1": sigma1}
        _check_options(dim=dim, d1=d1, d2=d2, **positive, **_given(sigma2=sigma2))
        self.beta1, self.beta2, self.eta_enc, self.eta_dec, self.sigma1 = beta1, beta2, eta_enc, eta_dec, sigma1
        self.U1, self.W1 = _weight(dim, d1, generator), _weight(d1, dim, generator)
        self.U2, self.W2 = _weight(d1, d2, generator), _weight(d2, d1, generator)
        self.log_var = nn.Parameter(
            torch.full((d2,), 2 * math.log(sigma2 or 0.5 * eta_enc), dtype=torch.float64), requires_grad=sigma2 is None
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of z2 at points of z1 whose second moment is the posterior's exactly, each (2 n d1, d2).

        Averages of quadratic functions over them, such as divergences, have no sampling error.
        """
        x, d1 = self._rows(x), len(self.W1)
        steps = math.sqrt(d1) * self.sigma1 * torch.eye(d1, dtype=x.dtype, device=x.device)
        z1 = (x @ self.W1.mT)[:, None] + torch.cat([steps, -steps])
        mean = (z1 @ self.W2.mT).flatten(0, 1)
        return mean, self.log_var.exp().expand_as(mean)

    def exact_loss(self, moment: Tensor) -> Tensor:
        """Expected loss for data with this second moment, without sampling.

        Raises:
            ValueError: It is of another size.
        """
        moment = _sized(moment, len(self.U1), self.U1)
        var1, var2 = self.sigma1**2, self.log_var.exp()
        one, two = torch.eye(len(moment)).to(moment), torch.eye(len(self.W1)).to(moment)
        code = self.W1 @ moment @ self.W1.mT + var1 * two
        error = _trace(one - self.U1 @ self.W1, moment) + var1 * (self.U1**2).sum()
        between = _trace(two - self.U2 @ self.W2, code) + (self.U2**2 @ var2).sum()
        prior = (_trace(self.W2, code) + var2.sum()) / self.eta_enc**2 - self.log_var.sum()
        return (error + self.beta1 * between) / self.eta_dec**2 + self.beta2 * prior

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss with one sample of z1 and z2 for each row, averaged over rows."""
        x = self._rows(x)
        mean1 = x @ self.W1.mT
        z1 = mean1 + self.sigma1 * _noise(mean1, generator)
        mean2, var2 = z1 @ self.W2.mT, self.log_var.exp()
        z2 = mean2 + var2.sqrt() * _noise(mean2, generator)
        error = (x - z1 @ self.U1.mT).square().sum(-1) + self.beta1 * (z1 - z2 @ self.U2.mT).square().sum(-1)
        prior = ((mean2**2 + var2) / self.eta_enc**2 - self.log_var).sum(-1)
        return (error / self.eta_dec**2 + self.beta2 * prior).mean()

    def fit(self, moment: Tensor, steps: int = 3000) -> float:
        """Minimise the expected loss by L-BFGS, in place; returns the loss reached."""
        return _minimise(self, moment, steps)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape != (len(x), len(self.U1)):
            raise ValueError(f"x has shape {tuple(x.shape)}: the model takes (n, {len(self.U1)})")
        return x.to(self.U1)


def _weight(rows: int, columns: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64))


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _sized(moment: Tensor, size: int, like: Tensor) -> Tensor:
    if moment.shape != (size, size):
        raise ValueError(f"the second moment has shape {tuple(moment.shape)}: give ({size}, {size})")
    return moment.to(like)


def _trace(A: Tensor, moment: Tensor) -> Tensor:
    return ((A @ moment) * A).sum()


def _minimise(model: LinearCVAE | LinearHVAE2, moment: Tensor, steps: int) -> float:
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad and p.numel()], max_iter=steps, max_eval=2 * steps,
        history_size=30, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.exact_loss(moment)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(model.exact_loss(moment).detach())


class CollapseReport(NamedTuple):
    """What became of each latent variable of a VAE.

    Attributes:
        kl: Divergence of posterior from prior, mean over samples, in nats (d,).
        active_units: Share of samples and variables whose divergence is 0.01 or more, from 0 to 1.
        epsilons: Levels of divergence, ascending (k,).
        below: Share of samples whose divergence is below each level (k, d).
        delta: Share of samples that may be above a level in a collapsed variable.
        samples: How many samples were seen.
    """

    kl: NDArray[np.float64]
    active_units: float
    epsilons: NDArray[np.float64]
    below: NDArray[np.float64]
    delta: float
    samples: int

    def collapsed(self, epsilon: float = 0.01) -> NDArray[np.bool_]:
        """Which variables are (epsilon, delta)-collapsed (d,): below epsilon on at least 1 - delta of the samples.

        Raises:
            ValueError: epsilon is not among the levels that were counted.
        """
        near = np.flatnonzero(np.isclose(self.epsilons, epsilon))
        if not len(near):
            raise ValueError(f"epsilon {epsilon} was not counted: give it to PosteriorCollapse(epsilons=...) first")
        return self.below[near[0]] >= 1 - self.delta

    def advise(self, predicted: LinearSolution | None = None) -> str:
        """One sentence on what collapsed and, given a closed form on the same data, what the theory would change."""
        lost = int(self.collapsed().sum())
        text = f"{lost} of {len(self.kl)} latent variables are collapsed"
        if predicted is None or not lost:
            return text + ("." if not lost else ": lower beta or eta_dec, or fix the encoder's variance.")
        possible = int((predicted.spectrum > 0).sum())
        if not possible:
            return f"{text}, and the linear theory finds nothing that the variables could code in such data."
        kept = min(len(self.kl), possible)
        bounds = predicted.recommend(kept)
        change = ", ".join(
            f"{name} {'above' if name == 'beta1' else 'below'} {value:.3g}" for name, value in bounds.items()
        )
        return f"{text}, the linear theory predicts {predicted.n_collapsed}; to keep {kept} take one of: {change}."

    def plot(self) -> Figure:
        """The divergence of each variable, and the share of collapsed variables against epsilon."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(np.arange(1, len(self.kl) + 1), np.sort(self.kl)[::-1], color="#1f6f8b")
        left.set(xlabel="latent variable", ylabel="divergence, nats", title=f"active units {self.active_units:.0%}")
        right.step(self.epsilons, (self.below >= 1 - self.delta).mean(1), where="post", color="#c8553d")
        right.set(xlabel="epsilon, nats", ylabel="collapsed", ylim=(-0.03, 1.03), title=f"delta {self.delta:g}")
        return figure


class PosteriorCollapse(StreamedMetric):
    """Measures the collapse of any VAE with a Gaussian posterior, over batches (arXiv 2306.05023).

    KL_j(x) = (mu^2 / eta^2 + s^2 / eta^2 - log(s^2 / eta^2) - 1) / 2, without beta, for each sample and variable. What the
    theory predicts beforehand is told by `linear_vae_solution`, `linear_cvae_solution` and `linear_hvae_solution`.

    Args:
        dims: Latent variables d.
        prior_std: Standard deviation eta of the prior.
        delta: Share of samples that may lie above epsilon in a collapsed variable.
        epsilons: Levels to count at, in nats; None takes 0.1, 0.2 and so on up to 6. 0.01 is always among them.
        **options: Of torchmetrics.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> meter = PosteriorCollapse(2)
        >>> meter.update(torch.tensor([[0.0, 3.0], [0.0, -3.0]]), torch.tensor([[1.0, 0.01], [1.0, 0.01]]))
        >>> report = meter.compute()
        >>> report.active_units, report.collapsed().tolist()
        (0.5, [True, False])
    """

    below: Tensor
    total: Tensor
    count: Tensor
    levels: Tensor

    def __init__(
        self,
        dims: int,
        *,
        prior_std: float = 1.0,
        delta: float = 0.05,
        epsilons: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _check_options(dims=dims, prior_std=prior_std)
        if not 0 <= delta < 1:
            raise ValueError(f"delta is {delta}: give a share of samples from 0 to below 1")
        given = np.linspace(0.1, 6, 60).tolist() if epsilons is None else [float(level) for level in epsilons]
        if any(not (math.isfinite(level) and level > 0) for level in given):
            raise ValueError(f"epsilons are {given}: give levels that are positive and finite")
        self.dims, self.prior_std, self.delta = dims, prior_std, delta
        self.epsilons = sorted({0.01, *given})
        self.add_state("total", torch.zeros(dims, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("below", torch.zeros(len(self.epsilons), dims, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # A state as well, although it never changes: a MetricCollection lets metrics of equal states share them.
        self.add_state("levels", torch.tensor(self.epsilons, dtype=torch.float64), dist_reduce_fx="max")

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
        ratio = var / self.prior_std**2
        kl = 0.5 * (mu**2 / self.prior_std**2 + ratio - ratio.log() - 1)
        self.total = self.total + kl.sum(0)
        self.below = self.below + torch.stack([(kl < level).sum(0) for level in self.levels])
        self.count = self.count + len(kl)

    def compute(self) -> CollapseReport:
        """The report over all batches.

        Raises:
            ValueError: No sample has been seen.
        """
        if not self.count:
            self._untold("no sample has been seen: call update with posterior means and variances first")
        below, samples = (self.below.double() / self.count).cpu().numpy(), int(self.count)
        levels = np.array(self.epsilons)
        active = 1 - float(below[int(np.argmin(abs(levels - 0.01)))].mean())
        return CollapseReport((self.total / self.count).cpu().numpy(), active, levels, below, self.delta, samples)

    @classmethod
    def from_encoder(cls, encoder: Encoder, loader: Iterable[Any], **options: Any) -> Self:
        """Stream a loader through an encoder.

        Args:
            encoder: Gives (means, log-variances), each (n, d), for a batch's first element; a module runs in `eval` mode.
            loader: Batches, inputs alone or inputs first.
            **options: As for the class.

        Raises:
            ValueError: The loader is empty.

        Example:
            >>> encoder = lambda x: (x, torch.zeros_like(x))
            >>> PosteriorCollapse.from_encoder(encoder, [torch.zeros(4, 3)]).compute().active_units
            0.0
        """
        return stream(cls, encoder, loader, **options)


def posteriors(mu: Tensor, var: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Means and variances in float64, once they are known to be sound.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or a variance is not positive.
        TypeError: They are no real numbers.
    """
    mu, var = as_numbers(mu, "mu"), as_numbers(var, "var")
    if mu.shape != var.shape or mu.ndim != 2 or mu.shape[1] != dims:
        raise ValueError(f"mu is {tuple(mu.shape)} and var {tuple(var.shape)}: give both as (samples, {dims})")
    if not (mu.isfinite().all() and var.isfinite().all()):
        raise ValueError("mu or var holds NaN or infinite values: the encoder has diverged")
    if not (var > 0).all():
        raise ValueError("var holds values that are not positive: give variances, not log-variances")
    return mu.double(), var.double()


def stream(metric: Callable[..., Any], encoder: Encoder, loader: Iterable[Any], **options: Any) -> Any:
    """A metric of posteriors over all batches of a loader; between batches the encoder is as it was.

    Raises:
        ValueError: The loader is empty.
        TypeError: The encoder gives something else than means and log-variances.
    """
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    meter = None
    for batch in loader:
        with evaluated(module):
            given = encoder(to_device_of(module, batch[0] if isinstance(batch, tuple | list) else batch))
        if not (isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(one, Tensor) for one in given)):
            raise TypeError(
                f"the encoder gives a {type(given).__name__}: two tensors, means and log-variances, are wanted"
            )
        mu, log_var = given
        meter = metric(mu.shape[-1] if mu.ndim else 1, **options).to(mu.device) if meter is None else meter
        # In half precision the variance of a sure variable would be rounded to 0.
        meter.update(mu, log_var.double().exp())
    if meter is None:
        raise ValueError("the loader is empty: give at least one batch")
    return meter
