"""unconstrained_features: the geometry that training to the end leads to, in closed form and by a solver (arXiv 2301.00437)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

from paperworks.representation.features import as_numbers


@dataclass(frozen=True)
class FrameGeometry:
    """Lengths of the general orthogonal frame of imbalanced classes; each tensor is (K,) in float64.

    Attributes:
        counts: Samples a class.
        weight_squared: |row k of P|^2, P = W_M ... W_1; P P^T is the diagonal matrix of them.
        feature_squared: |h_k|^2 of the class mean; the means are orthogonal.
        logit: What P says of class k's own features; of others it says 0.
        collapsed: Whether class k has no row and no features left.
        threshold: A class with this many samples, or fewer, collapses.
    """

    counts: Tensor
    weight_squared: Tensor
    feature_squared: Tensor
    logit: Tensor
    collapsed: Tensor
    threshold: float

    def plot(self) -> Any:
        """Lengths of classifier rows and features over class sizes, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        order = self.counts.argsort()
        for squared, name in ((self.weight_squared, "classifier row"), (self.feature_squared, "class mean")):
            axes.plot(self.counts[order], squared[order].sqrt(), "o-", label=name)
        axes.axvline(self.threshold, color="#333333", linestyle=":", label="collapse below")
        axes.set_xlabel("samples of a class")
        axes.set_ylabel("length")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def frame_geometry(
    counts: Sequence[int] | Tensor, *, lam_w: float, lam_h: float, depth: int = 1, rank: int | None = None
) -> FrameGeometry:
    """Where features and linear layers end up for squared error without bias: a general orthogonal frame.

    The global minimum of |W_M ... W_1 H - Y|^2 / 2N + lam_w/2 sum |W_j|^2 + lam_h/2 |H|^2 falls apart into one problem a
    class. With x_k the x >= 0 at which 1/(1 + x^M) + b x / n_k is least, b = M N (N lam_w^M lam_h)^(1/M), the row of class
    k has |p_k|^2 = N lam_h x_k^M, and its features |p_k|^2 / (|p_k|^2 + N lam_h)^2.

    Args:
        counts: Samples of each class, n_k.
        lam_w: Weight decay of each linear layer.
        lam_h: Decay of the features.
        depth: Linear layers, M.
        rank: The narrowest width where it is less than K: only so many of the largest classes survive.

    Raises:
        ValueError: Values out of range, or classes of one size of which only some fit into `rank`.
        TypeError: Counts that are no real numbers.

    Example:
        >>> frame_geometry([40, 20, 10, 10], lam_w=0.01, lam_h=0.01).weight_squared.round(decimals=4).tolist()
        [5.5246, 3.6721, 2.3623, 2.3623]
    """
    n = _sizes(counts)
    _check_decays(lam_w, lam_h)
    if not isinstance(depth, Integral) or depth < 1:
        raise ValueError(f"depth is a number of layers, at least 1, got {depth}")
    total, keep = float(n.sum()), torch.ones(len(n), dtype=torch.bool)
    if rank is not None and rank < len(n):
        if not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"rank is a width of at least 1, got {rank}")
        ordered = n.sort(descending=True).values
        if ordered[rank - 1] == ordered[rank]:
            raise ValueError(
                f"{int((n == ordered[rank]).sum())} classes of {int(ordered[rank])} samples share the last of {rank} "
                "dimensions, and are not orthogonal then: give a rank that does not cut them apart"
            )
        keep = n >= ordered[rank - 1]
    # By logarithms, since the power of a small decay would vanish.
    b = depth * total * lam_w * math.exp((math.log(total) + math.log(lam_h)) / depth)
    x = torch.tensor([_best_root(b / size, depth) for size in n.tolist()], dtype=torch.float64) * keep
    squared = total * lam_h * x**depth
    largest_ratio = 1.0 if depth == 1 else (depth - 1) ** ((depth - 1) / depth) / depth
    return FrameGeometry(
        n, squared, squared / (squared + total * lam_h).square(), squared / (squared + total * lam_h), squared == 0,
        b / largest_ratio,
    )  # fmt: skip


def _sizes(counts: Sequence[int] | Tensor) -> Tensor:
    """Class sizes as (K,) in float64."""
    n = as_numbers(counts, "counts").double()
    if n.ndim != 1 or len(n) < 2 or not bool((n.isfinite() & (n >= 1)).all()):
        raise ValueError(f"counts are at least two class sizes of 1 or more, got {n.tolist()}")
    return n.cpu()


def _check_decays(lam_w: float, lam_h: float) -> None:
    if not (0 < lam_w < math.inf and 0 < lam_h < math.inf):
        raise ValueError(f"decays are above 0, got lam_w={lam_w}, lam_h={lam_h}")


def _best_root(ratio: float, depth: int) -> float:
    """The x >= 0 at which 1/(1 + x^M) + ratio x is least."""
    if depth == 1:
        return max(0.0, 1 / math.sqrt(ratio) - 1)
    if ratio >= (depth - 1) ** ((depth - 1) / depth) / depth:
        return 0.0

    def slope(x: float) -> float:
        return depth * x ** (depth - 1) / (1 + x**depth) ** 2 - ratio

    # The slope's first term rises to its peak, and falls from there: the root behind the peak is the minimum.
    peak = ((depth - 1) / (depth + 1)) ** (1 / depth)
    far = peak
    while slope(far) > 0:
        far *= 2
    return float(brentq(slope, peak, far, xtol=1e-14))


@dataclass(frozen=True)
class UnconstrainedFeatures:
    """A minimiser of the unconstrained feature model.

    Attributes:
        features: One for each sample, class after class, (N, d).
        labels: (N,).
        weights: The linear layers, first applied first.
        bias: (K,), or None.
        loss: Value of the objective.
    """

    features: Tensor
    labels: Tensor
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    loss: float

    @property
    def product(self) -> Tensor:
        """P = W_M ... W_1, (K, d)."""
        product = self.weights[0]
        for weight in self.weights[1:]:
            product = weight @ product
        return product

    @property
    def class_means(self) -> Tensor:
        """(K, d)."""
        one_hot = F.one_hot(self.labels).to(self.features.dtype)
        return (one_hot / one_hot.sum(0)).T @ self.features

    def plot(self) -> Any:
        """Inner products of the classifier's rows and of the class means, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.2), layout="constrained")
        for axes, vectors, name in zip(
            figure.subplots(1, 2), (self.product, self.class_means), ("classifier rows", "class means"), strict=True
        ):
            gram = (vectors @ vectors.T).numpy()
            image = axes.imshow(gram, cmap="RdBu_r", vmin=-abs(gram).max(), vmax=abs(gram).max())
            axes.set_title(f"inner products of {name}", fontsize=10)
            figure.colorbar(image, ax=axes, shrink=0.8)
        return figure


def unconstrained_features(
    counts: Sequence[int],
    dim: int,
    *,
    lam_w: float,
    lam_h: float,
    depth: int = 1,
    bias: bool = False,
    loss: Literal["mse", "ce"] = "mse",
    restarts: int = 4,
    steps: int = 2000,
    generator: torch.Generator | None = None,
) -> UnconstrainedFeatures:
    """Minimise the unconstrained feature model: features are free, and only the linear layers behind them are a network.

    The objective is |W_M ... W_1 H (+ b) - Y|^2 / 2N, or mean cross-entropy, + lam_w/2 sum |W_j|^2 + lam_h/2 |H|^2; the bias
    is free of decay. All restarts are minimised by L-BFGS in float64 and the best is kept and brought to a gradient of 0,
    since for two layers and more zero is a local minimum.

    Args:
        counts: Samples of each class.
        dim: Width of features and of the layers between.
        lam_w: Weight decay of each linear layer.
        lam_h: Decay of the features.
        depth: Linear layers.
        bias: Whether the last layer has one.
        loss: Squared error, or cross-entropy.
        restarts: Starting points.
        steps: Steps of L-BFGS at most, each.
        generator: Of the starting points.

    Raises:
        ValueError: Values out of range.
        TypeError: Counts that are no real numbers.

    Example:
        >>> found = unconstrained_features([8, 4], 3, lam_w=0.01, lam_h=0.01, generator=torch.Generator().manual_seed(0))
        >>> wanted = frame_geometry([8, 4], lam_w=0.01, lam_h=0.01).weight_squared
        >>> torch.allclose(found.product.square().sum(1), wanted, rtol=1e-3)
        True
    """
    n = _sizes(counts)
    if not bool((n == n.floor()).all()):
        raise ValueError(f"each sample has features of its own, so that counts are whole numbers, got {n.tolist()}")
    sizes = [int(count) for count in n]
    _check_decays(lam_w, lam_h)
    whole = {"dim": dim, "depth": depth, "restarts": restarts, "steps": steps}
    for name, value in whole.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1, got {value}")
    if loss not in ("mse", "ce"):
        raise ValueError(f"loss is mse or ce, got {loss!r}")
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    one_hot = F.one_hot(labels).double()

    def objective(weights: Sequence[Tensor], features: Tensor, shift: Tensor) -> Tensor:
        scores = features
        for weight in weights:
            scores = scores @ weight.T
        scores = scores + shift
        error = F.cross_entropy(scores, labels) if loss == "ce" else (scores - one_hot).square().sum() / 2 / len(labels)
        decay = lam_w * sum(weight.square().sum() for weight in weights) + lam_h * features.square().sum()
        return error + decay / 2

    def descended(start: UnconstrainedFeatures, line_search: str | None) -> UnconstrainedFeatures:
        weights, features = [weight.requires_grad_() for weight in start.weights], start.features.requires_grad_()
        shift = torch.zeros(len(sizes), dtype=torch.float64) if start.bias is None else start.bias.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [*weights, features, *([shift] if bias else [])], max_iter=steps, history_size=50, tolerance_grad=4e-12,
            tolerance_change=1e-16 if line_search else 0, line_search_fn=line_search,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective(weights, features, shift)
            value.backward()
            return value

        optimizer.step(closure)
        value = float(objective(weights, features, shift).detach())
        return UnconstrainedFeatures(
            features.detach(),
            labels,
            tuple(weight.detach() for weight in weights),
            shift.detach() if bias else None,
            value,
        )

    def drawn() -> UnconstrainedFeatures:
        shapes = [(dim, dim)] * (depth - 1) + [(len(sizes), dim), (len(labels), dim)]
        *weights, features = (
            torch.randn(shape, dtype=torch.float64, generator=generator) / math.sqrt(dim) for shape in shapes
        )
        shift = torch.zeros(len(sizes), dtype=torch.float64) if bias else None
        return UnconstrainedFeatures(features, labels, tuple(weights), shift, math.inf)

    best = min((descended(drawn(), "strong_wolfe") for _ in range(restarts)), key=lambda found: found.loss)
    # Where losses differ by less than their rounding a line search stops; gradients still show the way.
    return descended(best, None)
