"""near_collapse: features that must stay near given ones collapse a little more, and by how much (arXiv 2210.16658)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import brentq, minimize
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from paperworks.representation.features import as_classes, as_matrix

_TOLERANCE = 1e-10


@dataclass(frozen=True)
class NearCollapse:
    """The minimiser of the near-collapse model.

    Attributes:
        features: H, (N, d).
        weight: The classifier W, (K, d).
        losses: The objective after each round; it never rises.
        variability_before: tr Sigma_W / tr Sigma_B of the given features.
        variability_after: The same of `features`.
        given: H0, (N, d).
        labels: Classes in int64, (N,).
        lam_w: Decay of the classifier.
        lam_h: Decay of the features.
        beta: Pull towards the given features.
    """

    features: Tensor
    weight: Tensor
    losses: tuple[float, ...]
    variability_before: float
    variability_after: float
    given: Tensor
    labels: Tensor
    lam_w: float
    lam_h: float
    beta: float

    @property
    def shrink(self) -> tuple[float, float]:
        """Near collapse, an imperfection within classes is multiplied by these: along the class means, and across them."""
        return self.beta / (self.beta + math.sqrt(self.lam_h / self.lam_w)), self.beta / (self.beta + self.lam_h)

    @cached_property
    def perturbation(self) -> Perturbation:
        """The linear map from imperfections of the given features to those of the result."""
        return Perturbation(self)

    def plot(self) -> Any:
        """Objective by round, and variability within classes before and after, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(self.losses, color="#1f6f8b")
        left.set_xlabel("round")
        left.set_ylabel("objective")
        right.bar(["given", "collapsed further"], [self.variability_before, self.variability_after], color="#1f6f8b")
        right.set_ylabel("within / between classes")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def near_collapse(
    features: Tensor, labels: Tensor, *, lam_w: float, lam_h: float, beta: float, max_rounds: int = 100_000
) -> NearCollapse:
    """Collapse features a bit more, as the layers behind them would that cannot change them much.

    Minimises |H W^T - Y|^2 / 2N + lam_w/2K |W|^2 + lam_h/2N |H|^2 + beta/2N |H - H0|^2 over H and W in turn, each step
    exact, from H = H0. A large beta stands for few layers between H0 and H.

    Args:
        features: H0, (N, d), of a shallower layer.
        labels: Classes 0..K-1 as whole numbers, as many samples of each, (N,).
        lam_w: Decay of the classifier, above 0; the weight decay of a network's head.
        lam_h: Decay of the features, at least 0; that of its body.
        beta: Pull towards the given features, at least 0.
        max_rounds: Rounds at most, with a `ConvergenceWarning` where they are not enough; it ends when the features change by
            less than 1e-10 of their size, beside their mean.

    Raises:
        ValueError: Values out of range, shapes that do not fit, classes of different sizes, or values that are not finite.
        TypeError: Features that are no real numbers.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H0, y = torch.randn(12, 7, generator=generator), torch.arange(3).repeat(4)
        >>> found = near_collapse(H0, y, lam_w=0.3, lam_h=0.2, beta=1.0)
        >>> found.variability_after < found.variability_before
        True
    """
    H0, y, Y = _checked(features, labels, lam_w, lam_h)
    if not 0 <= beta < math.inf or lam_h + beta == 0:
        raise ValueError(f"beta is a number of at least 0, and above 0 where lam_h is 0, got {beta}")
    if max_rounds < 1:
        raise ValueError(f"max_rounds is at least 1, got {max_rounds}")
    H, losses, change = H0, [], math.inf
    for _ in range(max_rounds):
        W = best_classifier(H, Y, lam_w)
        new = _best_features(W, H0, Y, lam_h, beta)
        losses.append(_objective(new, W, H0, Y, lam_w, lam_h, beta))
        size = torch.linalg.norm(new - new.mean(0)).clamp_min(torch.finfo(H.dtype).tiny)
        change = float(torch.linalg.norm(new - H) / size)
        H = new
        # Features that vanish get smaller by the same share each time.
        if change < _TOLERANCE or torch.linalg.norm(H) < 1e-150:
            break
    else:
        warnings.warn(
            f"near_collapse: after {max_rounds} rounds the features still change by {change:.1g} of their size; give more "
            "`max_rounds`",
            ConvergenceWarning,
            stacklevel=2,
        )
    W = best_classifier(H, Y, lam_w)
    return NearCollapse(H, W, tuple(losses), variability(H0, Y), variability(H, Y), H0, y, lam_w, lam_h, beta)


def implied_beta(features: Tensor, labels: Tensor, wanted: float, *, lam_w: float, lam_h: float) -> float:
    """The pull beta at which the near-collapse model leaves as much variability within classes as was measured.

    Of the features of a layer and the variability behind the next one, it says how freely that layer can move them: a
    small beta stands for an expressive part of a network. The features are minimised over in closed form, and L-BFGS
    finds the classifier from a triangle as wide as features and classes, whatever the number of samples.

    Args:
        features: H0, (N, d), of the shallower layer.
        labels: Classes 0..K-1 as whole numbers, as many samples of each, (N,).
        wanted: tr Sigma_W / tr Sigma_B behind the next layer, above 0 and below that of `features`.
        lam_w: Decay of the classifier.
        lam_h: Decay of the features.

    Raises:
        ValueError: As `near_collapse`, or a variability that no beta from 1e-8 to 1e4 leaves.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H0, y = torch.randn(12, 7, generator=generator), torch.arange(3).repeat(4)
        >>> left = near_collapse(H0, y, lam_w=0.3, lam_h=0.2, beta=2.0).variability_after
        >>> round(implied_beta(H0, y, left, lam_w=0.3, lam_h=0.2), 4)
        2.0
    """
    H0, _, Y = _checked(features, labels, lam_w, lam_h)
    (N, K), d = Y.shape, H0.shape[1]
    # Of features and classes side by side Q R, the errors of any classifier are Q times those on R's columns: no digits are
    # lost in second moments. The classifier is sought as V in W = V U^(-T), in which the problem of a large beta is round.
    R = torch.linalg.qr(torch.cat([H0, Y], 1), mode="r").R.cpu().numpy()
    seen, told = R[:, :d], R[:, d:]
    U = _root(H0, N / K * lam_w)[1].cpu().numpy()
    start = best_classifier(H0, Y, lam_w).cpu().numpy() @ U.T

    def left(log_beta: float) -> float:
        beta = math.exp(log_beta)
        pull = lam_h + beta
        kept = seen * (beta / pull)

        def objective(flat: NDArray[Any]) -> tuple[float, NDArray[Any]]:
            W = solve_triangular(U, flat.reshape(start.shape).T).T
            # Over features near H0 beta / pull the least error of W is that of W alone, in a metric that W W^T softens.
            error = told - kept @ W.T
            soft = np.linalg.inv(np.eye(K) + W @ W.T / pull)
            squared = soft @ error.T @ error
            value = np.trace(squared) / 2 / N + lam_w / 2 / K * np.vdot(W, W)
            slope = lam_w / K * W - (soft @ error.T @ kept + squared @ soft @ W / pull) / N
            return value, solve_triangular(U, slope.T, trans="T").T.reshape(-1)

        found = minimize(
            objective, start.reshape(-1), jac=True, method="L-BFGS-B",
            options={"maxiter": 20_000, "maxfun": 50_000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        W = torch.from_numpy(solve_triangular(U, found.x.reshape(start.shape).T).T.copy()).to(H0)
        return variability(_best_features(W, H0, Y, lam_h, beta), Y)

    @cache
    def excess(log_beta: float) -> float:
        return math.log(left(log_beta) / wanted)

    # From beta = 1 by powers of ten, since for the smallest ones the classifier takes longest to find.
    if 0 < wanted < variability(H0, Y):
        upwards = excess(0.0) < 0
        powers = [power * math.log(10) for power in (range(5) if upwards else range(0, -9, -1))]
        for near, far in pairwise(powers):
            if (excess(far) < 0) != upwards:
                return math.exp(brentq(excess, near, far, xtol=1e-4))
    raise ValueError(
        f"no beta from 1e-8 to 1e4 leaves a variability of {wanted:g}: that of the features given is "
        f"{variability(H0, Y):g}, and the one behind the next layer must be lower, and above 0"
    )


def central_path(
    features: Tensor, labels: Tensor, *, lam_w: float, lam_h: float, step: float = 0.01, steps: int = 2000
) -> Tensor:
    """Follow the central path, dH/dt = -((H W^T - Y) W + lam_h H) at the best W, by Euler's steps.

    Along it tr Sigma_W / tr Sigma_B falls, for any features to begin with; t is about 1/beta.

    Returns:
        tr Sigma_W and tr Sigma_B at each time, the beginning included, (steps + 1, 2).

    Raises:
        ValueError: As `near_collapse`, or a step that is not above 0, or too long for the path to be followed.
    """
    H, _, Y = _checked(features, labels, lam_w, lam_h)
    if not 0 < step < math.inf or steps < 1:
        raise ValueError(f"step is above 0 and steps at least 1, got {step} and {steps}")
    traces = [_traces(H, Y)]
    for _ in range(steps):
        W = best_classifier(H, Y, lam_w)
        steepest = float(torch.linalg.matrix_norm(W, 2)) ** 2 + lam_h
        if step * steepest > 1:
            raise ValueError(f"a step of {step:g} overshoots on this path: take one below {1 / steepest:.2g}")
        H = H - step * ((H @ W.T - Y) @ W + lam_h * H)
        traces.append(_traces(H, Y))
    return torch.stack(traces)


def orthogonal_collapse(
    num_classes: int,
    per_class: int,
    dim: int,
    *,
    lam_w: float,
    lam_h: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fully collapsed features, a minimiser without H0: orthogonal means of squared length (1 - c) sqrt(lam_w / lam_h).

    Args:
        num_classes: K.
        per_class: Samples of each.
        dim: d, at least K.
        lam_w: Decay of the classifier.
        lam_h: Decay of the features; c = sqrt(lam_w lam_h) must be below 1, or both are zero.
        generator: Of the directions.

    Returns:
        Features (K * per_class, dim), labels, and the classifier (K, dim).

    Raises:
        ValueError: Too few dimensions, or decays so strong that nothing is left.
    """
    if num_classes < 2 or per_class < 1 or dim < num_classes:
        raise ValueError(
            f"two or more orthogonal means need as many dimensions, and a sample each, got num_classes={num_classes}, "
            f"per_class={per_class}, dim={dim}"
        )
    if not (lam_w > 0 and lam_h > 0 and lam_w * lam_h < 1):
        raise ValueError(f"lam_w and lam_h are above 0 and their product below 1, got {lam_w} and {lam_h}")
    c = math.sqrt(lam_w * lam_h)
    basis = torch.linalg.qr(torch.randn(dim, num_classes, dtype=torch.float64, generator=generator)).Q.T
    means = math.sqrt((1 - c) * math.sqrt(lam_w / lam_h)) * basis
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return means[labels], labels, math.sqrt(lam_h / lam_w) * means


def best_classifier(H: Tensor, Y: Tensor, lam_w: float) -> Tensor:
    """W = Y^T H (H^T H + n lam_w I)^(-1), (K, d), for n samples a class."""
    Q, R = _root(H, len(Y) / Y.shape[1] * lam_w)
    return torch.linalg.solve_triangular(R, Q[: len(H)].T @ Y, upper=True).T


def _root(H: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Q and triangular R of H over sqrt(ridge) I, so that R^T R = H^T H + ridge I: of H itself, far from zero or not."""
    return torch.linalg.qr(torch.cat([H, math.sqrt(ridge) * _identity(H.T)]))


def _best_features(W: Tensor, H0: Tensor, Y: Tensor, lam_h: float, beta: float) -> Tensor:
    """H = (Y W + beta H0) (W^T W + (lam_h + beta) I)^(-1), (N, d), written as a change of H0 beta / (lam_h + beta)."""
    pull = lam_h + beta
    kept = beta / pull * H0
    return kept + torch.linalg.solve(W @ W.T + pull * _identity(W), (Y - kept @ W.T).T).T @ W


class Perturbation:
    """F with dH = F dH0, to first order at a minimiser; matrix-free, or dense for small sizes.

    With the Hessian's blocks, F = beta/N (f_HH - f_HW f_WW^(-1) f_WH)^(-1), and dW = -f_WW^(-1) f_WH dH.

    Args:
        at: The minimiser.

    Raises:
        ValueError: Its beta is 0, where the given features change nothing.
    """

    def __init__(self, at: NearCollapse) -> None:
        if at.beta == 0:
            raise ValueError("with beta = 0 the given features do not move the result: take a beta above 0")
        self.at = at
        H, W = at.features, at.weight
        self._error = H @ W.T - F.one_hot(at.labels).to(H)
        self._of_weight = _root(H, len(H) / len(W) * at.lam_w)[1]
        self._of_features = W.T @ W + (at.lam_h + at.beta) * _identity(H.T)

    def classifier_response(self, dH: Tensor) -> Tensor:
        """How the classifier answers, dW (..., K, d), to a change of the features dH (..., N, d)."""
        mixed = (dH @ self.at.weight.T).mT @ self.at.features + self._error.T @ dH
        return -torch.cholesky_solve(mixed.mT, self._of_weight, upper=True).mT

    def inverse(self, dH: Tensor) -> Tensor:
        """The change of the given features (..., N, d) that leads to dH."""
        dW = self.classifier_response(dH)
        moved = dH @ self._of_features + self.at.features @ dW.mT @ self.at.weight + self._error @ dW
        return moved / self.at.beta

    def __call__(self, dH0: Tensor) -> Tensor:
        """How the features answer, dH (N, d), to a change of the given ones (N, d); by conjugate gradients.

        Raises:
            ValueError: The change has another shape than the features, or they did not converge: the minimiser is not
                isolated there.
        """
        H, shape = self.at.features, self.at.features.shape
        given = as_matrix(dH0, "dH0")
        if given.shape != shape:
            raise ValueError(f"a change of the given features is {tuple(shape)}, got {tuple(given.shape)}")

        def product(flat: Any) -> Any:
            return self.inverse(torch.from_numpy(flat).to(H).view(shape)).reshape(-1).cpu().numpy()

        size = shape.numel()
        operator = LinearOperator((size, size), matvec=product, dtype="float64")
        flat, failed = cg(operator, given.reshape(-1).cpu().numpy(), rtol=1e-12, maxiter=20 * size)
        if failed:
            raise ValueError("conjugate gradients did not converge: take a larger beta")
        return torch.from_numpy(flat).to(H).view(shape)

    def dense(self) -> Tensor:
        """F as an array (N, d, N, d): what sample i's features get of a change of sample j's."""
        shape = self.at.features.shape
        size = shape.numel()
        unit = torch.eye(size, dtype=torch.float64, device=self.at.features.device)
        columns = self.inverse(unit.view(size, *shape)).reshape(size, size).T
        return torch.linalg.inv(columns).view(*shape, *shape)


def variability(H: Tensor, Y: Tensor) -> float:
    """Traces' ratio tr Sigma_W / tr Sigma_B of features (N, d) and one-hot labels (N, K); infinite where all class means are the same."""
    within, between = _traces(H, Y)
    return float(within / between)


def _traces(H: Tensor, Y: Tensor) -> Tensor:
    means = (Y / Y.sum(0)).T @ H
    return torch.stack([(H - Y @ means).square().sum() / len(H), (means - H.mean(0)).square().sum() / len(means)])


def _objective(H: Tensor, W: Tensor, H0: Tensor, Y: Tensor, lam_w: float, lam_h: float, beta: float) -> float:
    terms = (H @ W.T - Y).square().sum() + lam_h * H.square().sum() + beta * (H - H0).square().sum()
    return float(terms / 2 / len(H) + lam_w / 2 / len(W) * W.square().sum())


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _checked(features: Tensor, labels: Tensor, lam_w: float, lam_h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features in float64, classes, and those one-hot."""
    H = as_matrix(features, "features")
    y = as_classes(labels, len(H)).to(H.device)
    if not 0 < lam_w < math.inf or not 0 <= lam_h < math.inf:
        raise ValueError(f"lam_w is above 0 and lam_h at least 0, got {lam_w} and {lam_h}")
    counts = torch.bincount(y)
    if len(counts) < 2 or bool((counts != counts[0]).any()):
        raise ValueError(
            f"the theory is of two or more classes of one size, got classes of {counts.tolist()[:10]} samples: take as "
            "many of each"
        )
    return H, y, F.one_hot(y).double()
