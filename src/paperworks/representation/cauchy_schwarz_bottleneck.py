"""CauchySchwarzBottleneck: regressors that keep little of x, without Gaussian assumption or bound (arXiv 2404.17951)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from paperworks.representation.features import evaluated

Bandwidth = float | Literal["median"]


def cs_divergence(a: Tensor, b: Tensor, sigma: Bandwidth = 1.0) -> Tensor:
    """Cauchy-Schwarz divergence of two samples, log mean k(a, a) + log mean k(b, b) - 2 log mean k(a, b), at least 0.

    As all estimates here it is worked out in float64 and given in the dtype of the samples, in float32 for narrower ones.

    Args:
        a: (M, d), or (M,) for numbers.
        b: (N, d), or (N,).
        sigma: Width of the Gaussian kernel; "median" is the median distance within both samples together.

    Raises:
        TypeError: A sample that is no tensor.
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> a = torch.tensor([0.0, 1.0])
        >>> float(cs_divergence(a, a)), round(float(cs_divergence(a, a + 1)), 4)
        (0.0, 0.627)
    """
    a, b, dtype = *_rows(a=a, b=b), _result_dtype(a, b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"two samples of one space have as many columns, got {a.shape[1]} and {b.shape[1]}")
    sigma = _width(sigma, torch.cat([a, b]))
    across = _log_kernel(a, b, sigma)
    p, q = (_log_kernel(one, one, sigma).expm1().mean() for one in (a, b))
    found = _divergence(p, q, across.expm1().mean(), lambda: across.logsumexp((0, 1)) - math.log(across.numel()))
    return found.to(dtype)


def conditional_cs_divergence(
    x: Tensor, y: Tensor, y_hat: Tensor, sigma_x: Bandwidth = 1.0, sigma_y: Bandwidth = 1.0, *, official: bool = False
) -> Tensor:
    """Cauchy-Schwarz divergence of p(y|x) and p(y_hat|x), from N samples of x, y and y_hat.

    A narrow kernel of x compares targets one by one (then it is the correntropy loss); one so wide that all x look alike
    only compares the distributions of y and y_hat. The estimate may be a little below 0.

    Args:
        x: (N, d), or (N,) for numbers.
        y: (N, p), or (N,).
        y_hat: As y.
        sigma_x: Width of the Gaussian kernel of x; "median" is the median distance.
        sigma_y: Width of the kernel of y and y_hat.
        official: Weigh sample j by 1 / sum_i K_ji^2 as the published code, not by 1 / (sum_i K_ji)^2 as the paper.

    Raises:
        TypeError: A sample that is no tensor.
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> x, y = torch.linspace(-1, 1, 5), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
        >>> float(conditional_cs_divergence(x, y, y)), float(conditional_cs_divergence(x, y, 1 - y, 0.1)) > 0.5
        (0.0, True)
    """
    x, y, y_hat, dtype = *_rows(x=x, y=y, y_hat=y_hat), _result_dtype(x, y, y_hat)
    return _conditional(_log_kernel(x, x, _width(sigma_x, x)), y, y_hat, sigma_y, official).to(dtype)


def _conditional(K: Tensor, y: Tensor, y_hat: Tensor, sigma: Bandwidth, official: bool) -> Tensor:
    """Of K, the log kernel of x."""
    if y.shape != y_hat.shape or len(K) != len(y):
        raise ValueError(
            f"x, y and y_hat are N samples, the last two of one shape, got {len(K)}, {tuple(y.shape)} and "
            f"{tuple(y_hat.shape)}"
        )
    width = _width(sigma, y)
    # Weights of pairs (j, i): one factor for all of them cancels, so they may add up to 1.
    weights = K - ((2 * K).logsumexp(1, keepdim=True) if official else 2 * K.logsumexp(1, keepdim=True))
    weights = weights - weights.logsumexp((0, 1))
    share, across = weights.exp(), _log_kernel(y_hat, y, width)
    true, predicted, crossed = (
        (share * one.expm1()).sum() for one in (_log_kernel(y, y, width), _log_kernel(y_hat, y_hat, width), across)
    )
    return _divergence(true, predicted, crossed, lambda: (weights + across).logsumexp((0, 1)))


def _divergence(p: Tensor, q: Tensor, across: Tensor, log_across: Callable[[], Tensor]) -> Tensor:
    """Log p.p + log q.q - 2 log p.q of three overlaps, each given less 1, and of the logarithm of the last.

    Wide kernels leave overlaps near 1, and like samples leave overlaps that are alike. Their logarithms would cancel, so
    the ratio p.p q.q / (p.q)^2 is written by what it is above 1.
    """
    overlap, p_above, q_above = 1 + across, p - across, q - across
    if bool(4 * overlap**2 > (1 + p) * (1 + q)):
        return ((overlap * (p_above + q_above) + p_above * q_above) / overlap**2).log1p()
    # Far samples: their overlap may be too small for a number.
    return p.log1p() + q.log1p() - 2 * log_across()


def cs_mutual_information(
    x: Tensor, t: Tensor, sigma_x: Bandwidth = 1.0, sigma_t: Bandwidth = 1.0, *, normalize: bool = True
) -> Tensor:
    """Cauchy-Schwarz divergence of the joint density of x and t from the product of theirs, in nats; at least 0.

    Args:
        x: (N, d), or (N,) for numbers.
        t: (N, K), or (N,).
        sigma_x: Width of the Gaussian kernel of x; "median" is the median distance.
        sigma_t: Width of that of t.
        normalize: Divide by the geometric mean of I(x, x) and I(t, t). This has no unit, is 1 for t = x, and 0 where x or t
            is constant; where few samples and kernels of different widths meet it may exceed 1, for two samples by 0.2.

    Raises:
        TypeError: A sample that is no tensor.
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> round(float(cs_mutual_information(x, x)), 4), float(cs_mutual_information(x, 0 * x))
        (1.0, 0.0)
    """
    x, t, dtype = *_rows(x=x, t=t), _result_dtype(x, t)
    return _information(_log_kernel(x, x, _width(sigma_x, x)), t, sigma_t, normalize).to(dtype)


def hsic(x: Tensor, t: Tensor, sigma_x: Bandwidth = 1.0, sigma_t: Bandwidth = 1.0, *, normalize: bool = True) -> Tensor:
    """Hilbert-Schmidt independence criterion of x and t, the other kernel measure of dependence; at least 0.

    It is the squared distance of the joint density from the product of theirs, where `cs_mutual_information` has the
    logarithm of an angle.

    Args:
        x: (N, d), or (N,) for numbers.
        t: (N, K), or (N,).
        sigma_x: Width of the Gaussian kernel of x; "median" is the median distance.
        sigma_t: Width of that of t.
        normalize: Divide by the geometric mean of those of x with x and t with t, which leads from 0 to 1; 0 where x or t
            is constant.

    Raises:
        TypeError: A sample that is no tensor.
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> round(float(hsic(x, x)), 4), float(hsic(x, 0 * x))
        (1.0, 0.0)
    """
    x, t, dtype = *_rows(x=x, t=t), _result_dtype(x, t)
    return _dependence(_log_kernel(x, x, _width(sigma_x, x)), t, sigma_t, normalize, _squared_distance).to(dtype)


def _information(K: Tensor, t: Tensor, sigma: Bandwidth, normalize: bool) -> Tensor:
    return _dependence(K, t, sigma, normalize, _angle)


def _dependence(
    K: Tensor, t: Tensor, sigma: Bandwidth, normalize: bool, measure: Callable[[_Centred, _Centred], Tensor]
) -> Tensor:
    """Of K, the log kernel of x."""
    if len(K) != len(t):
        raise ValueError(f"x and t are of the same N samples, got {len(K)} and {len(t)}")
    of_x, of_t = (_Centred.of(one.expm1()) for one in (K, _log_kernel(t, t, _width(sigma, t))))
    found = measure(of_x, of_t)
    if not normalize:
        return found
    alone = measure(of_x, of_x).sqrt(), measure(of_t, of_t).sqrt()
    # A constant tells nothing, and its share of nothing is none.
    return found / alone[0] / alone[1] if all(bool(one > 0) for one in alone) else found


class _Centred(NamedTuple):
    """A kernel matrix by its mean, what the means of its rows add to that, and what is left.

    It is given less 1: what a wide kernel leaves would be lost beside 1.
    """

    mean: Tensor
    rows: Tensor
    rest: Tensor

    @classmethod
    def of(cls, kernel: Tensor) -> Self:
        mean = kernel.mean()
        rows = kernel.mean(1) - mean
        return cls(mean, rows, kernel - rows - rows[:, None] - mean)


def _squared_distance(one: _Centred, other: _Centred) -> Tensor:
    """Of the joint density from the product."""
    return (one.rest * other.rest).mean()


def _angle(one: _Centred, other: _Centred) -> Tensor:
    """Log joint.joint + log product.product - 2 log joint.product, by what is inside the logarithm above 1."""
    product, beside = (1 + one.mean) * (1 + other.mean), (one.rows * other.rows).mean()
    return ((product * _squared_distance(one, other) - beside**2) / (product + beside) ** 2).log1p()


def _log_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Logarithms: kernels of far points would underflow, and those of near ones differ from 1 by less than rounding."""
    return (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / sigma).square() / -2


def _rows(**given: Tensor) -> tuple[Tensor, ...]:
    """Samples as rows, in float64 where the device has it: what is looked for may be a small part of each kernel."""
    rows = []
    for name, values in given.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a tensor, got {type(values).__name__}: torch.as_tensor makes one")
        if values.ndim not in (1, 2) or not values.numel() or not values.is_floating_point():
            raise ValueError(
                f"{name} is (N,) or (N, d) of floating-point numbers, got {tuple(values.shape)} of {values.dtype}"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{name} holds NaN or infinity: take these samples out, or train more slowly where a network gave them"
            )
        # Without a second dimension every kernel would be one number, and the loss a plain squared error.
        rows.append((values[:, None] if values.ndim == 1 else values).to(_working_dtype(values)))
    return tuple(rows)


def _working_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _result_dtype(*given: Tensor) -> torch.dtype:
    """That of the widest, float32 at least: a divergence may be more than float16 can hold."""
    return functools.reduce(torch.promote_types, (one.dtype for one in given), torch.float32)


def _width(sigma: Bandwidth, values: Tensor) -> float:
    if sigma == "median":
        distance = torch.pdist(values.detach())
        median = float(distance.median()) if len(distance) else 0.0
        if not median > 0:
            raise ValueError("most samples are the same, so their median distance is 0: give sigma as a number")
        return median
    if not isinstance(sigma, Real) or not 0 < sigma < math.inf:
        raise ValueError(f'a kernel\'s width sigma is a number above 0 or "median", got {sigma!r}')
    return float(sigma)


class CauchySchwarzBottleneck(nn.Module):
    """The objective: predict y well, and let the bottleneck t keep little of x.

    D(p(y|x); p(y_hat|x)) + beta I(x; t), both Cauchy-Schwarz divergences of kernel density estimates over a batch. Its
    memory is N^2 for N samples, and N is part of the estimate. Standardise x and y first where the widths are numbers.

    Args:
        beta: Weight of the compression, at least 0.
        sigma_x: Width of the Gaussian kernel of x; "median" is the median distance in the batch.
        sigma_y: Of y and y_hat.
        sigma_t: Of t.
        sigma_compression: Width of the kernel of x in the compression; that of the prediction if none is given. A
            narrow one there compares targets one by one, where a wide one here still sees that x is kept.
        normalize: Compression from 0 to 1, not in nats.
        official: Weights of the published code; see `conditional_cs_divergence`.

    Raises:
        ValueError: A value out of range; when called, shapes that do not fit or values that are not finite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> body, head = nn.Linear(3, 2), nn.Linear(2, 1)
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> t = body(x)
        >>> CauchySchwarzBottleneck(beta=0.1)(x, y, head(t), t).backward()
    """

    def __init__(
        self,
        beta: float = 0.01,
        sigma_x: Bandwidth = 1.0,
        sigma_y: Bandwidth = 1.0,
        sigma_t: Bandwidth = 1.0,
        *,
        sigma_compression: Bandwidth | None = None,
        normalize: bool = True,
        official: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta is a number of at least 0, got {beta}")
        for sigma in (sigma_x, sigma_y, sigma_t, sigma_compression):
            if sigma is not None and sigma != "median":
                _width(sigma, torch.empty(0))
        self.beta, self.sigma_x, self.sigma_y, self.sigma_t = beta, sigma_x, sigma_y, sigma_t
        self.sigma_compression, self.normalize, self.official = sigma_compression, normalize, official

    def forward(self, x: Tensor, y: Tensor, y_hat: Tensor, t: Tensor) -> Tensor:
        """The objective over a batch of N.

        Args:
            x: Inputs (N, d).
            y: Targets (N, p) or (N,).
            y_hat: Predictions, as y.
            t: Bottleneck (N, K).
        """
        dtype = _result_dtype(x, y, y_hat, t)
        x, y, y_hat, t = _rows(x=x, y=y, y_hat=y_hat, t=t)
        K = _log_kernel(x, x, _width(self.sigma_x, x))
        loss = _conditional(K, y, y_hat, self.sigma_y, self.official)
        if self.beta:
            if self.sigma_compression is not None:
                K = _log_kernel(x, x, _width(self.sigma_compression, x))
            loss = loss + self.beta * _information(K, t, self.sigma_t, self.normalize)
        return loss.to(dtype)


class BottleneckNetwork(nn.Module):
    """Layers, a linear bottleneck t, and a decoder of one hidden layer; t may be noisy while training.

    Args:
        inputs: d.
        hidden: Sizes of the encoder's layers; the last is the decoder's too.
        bottleneck: K.
        outputs: p.
        stochastic: While training t = mean + std * noise, both from the encoder.
        generator: Of the noise; the one that torch keeps if none is given.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (128, 128),
        bottleneck: int = 128,
        outputs: int = 1,
        *,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        layers = [(nn.Linear(wide, narrow), nn.ReLU()) for wide, narrow in pairwise((inputs, *hidden))]
        last = hidden[-1] if hidden else inputs
        self.body = nn.Sequential(*(part for layer in layers for part in layer))
        self.mean = nn.Linear(last, bottleneck)
        self.log_var = nn.Linear(last, bottleneck) if stochastic else None
        self.decoder = nn.Sequential(nn.Linear(bottleneck, last), nn.ReLU(), nn.Linear(last, outputs))
        self.generator = generator

    def code(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Means and log variances of t, both (N, K); none where t has no noise."""
        features = self.body(x)
        return self.mean(features), None if self.log_var is None else self.log_var(features)

    def encode(self, x: Tensor) -> Tensor:
        """Bottleneck t (N, K): its mean, and noise while training a stochastic network."""
        mean, log_var = self.code(x)
        if log_var is None or not self.training:
            return mean
        noise = torch.empty_like(mean).normal_(generator=self.generator)
        return mean + (log_var / 2).exp() * noise

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (N, p)."""
        return self.decoder(self.encode(x))


def train_bottleneck(
    network: nn.Module,
    objective: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    lr: float = 1e-4,
    decay: float = 1.0,
    epochs: int = 200,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Adam over shuffled batches; ends with the weights of the epoch that predicted the validation samples best.

    Args:
        network: Predicts y (N, p) from x (N, d).
        objective: Loss of a batch of x and y.
        x: (N, d).
        y: (N, p).
        validation: Samples held out; without them the last weights stay.
        lr: Adam's rate.
        decay: It is multiplied by this every tenth epoch; the published script takes 0.6.
        epochs: Passes over the samples.
        batch_size: Samples a step; kernel estimates depend on it.
        generator: Of the order.

    Returns:
        Mean squared errors over the validation samples, by epoch; empty without any.

    Raises:
        ValueError: Validation targets that are not of the predictions' shape, or what the objective refuses.
    """
    adam = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(adam, 10, decay)
    errors: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(epochs):
        network.train()
        order = torch.randperm(len(x), generator=generator).to(x.device)
        # A batch of one has no pairs: what is left over joins the others.
        for batch in order.tensor_split(max(1, round(len(x) / batch_size))):
            loss = objective(x[batch], y[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
        network.eval()
        if validation is not None:
            with torch.no_grad():
                predicted = network(validation[0])
                _same_shape(predicted, validation[1])
                errors.append(float((predicted - validation[1]).square().mean()))
            if errors[-1] <= min(errors):
                best = {name: value.clone() for name, value in network.state_dict().items()}
    if best:
        network.load_state_dict(best)
    return errors


@dataclass(frozen=True)
class InformationPlane:
    """Where a network lies between predicting and compressing.

    Attributes:
        compression: I(x; t), Cauchy-Schwarz, normalised: lower keeps less of x.
        prediction: I(y; t) in bits, by the Gaussian proxy log2(Var y / MSE) / 2.
    """

    compression: float
    prediction: float


def information_plane(
    network: BottleneckNetwork, x: Tensor, y: Tensor, sigma: Bandwidth = "median"
) -> InformationPlane:
    """Coordinates of a network over samples x (N, d) and y (N, p); compression with kernels as wide as sigma.

    The network is evaluated without noise, and left in the mode it was in.

    Raises:
        TypeError: As `cs_mutual_information`.
        ValueError: As `cs_mutual_information`, targets that are not of the predictions' shape, or constant ones.
    """
    with evaluated(network):
        t = network.encode(x)
        predicted = network.decoder(t)
    _same_shape(predicted, y)
    predicted, y = _rows(predictions=predicted, y=y)
    if bool((y == y[0]).all()):
        raise ValueError("all targets are the same: give samples with different ones")
    spread, error = (y - y.mean(0)).square().mean(), (predicted - y).square().mean()
    return InformationPlane(float(cs_mutual_information(x, t, sigma, sigma)), float((spread / error).log2() / 2))


def fgsm(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Inputs (N, d) changed by eps a feature, where this raises the squared error against y (N, p) fastest.

    Raises:
        ValueError: Targets that are not of the predictions' shape, or eps that is not a number of at least 0.

    Example:
        >>> fgsm(lambda x: 2 * x, torch.tensor([[1.0]]), torch.tensor([[0.0]]), 0.5)
        tensor([[1.5000]])
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is a number of at least 0, got {eps}")
    moved = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        predicted = model(moved)
        _same_shape(predicted, y)
        (slope,) = torch.autograd.grad((predicted - y).square().sum(), moved)
    return x + eps * slope.sign()


def pgd(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float = 0.3, *, step: float = 0.05, steps: int = 5
) -> Tensor:
    """Several small steps of `fgsm`, each kept within eps of x (N, d) in every feature.

    Raises:
        ValueError: As `fgsm`, or no steps.
    """
    if not 0 <= eps < math.inf or steps < 1:
        raise ValueError(f"eps is a number of at least 0 and steps at least 1, got {eps} and {steps}")
    moved = x
    for _ in range(steps):
        moved = torch.clamp(fgsm(model, moved, y, step), x - eps, x + eps)
    return moved


def _same_shape(predicted: Tensor, y: Tensor) -> None:
    # (N, 1) less (N,) would be N x N differences.
    if predicted.shape != y.shape:
        raise ValueError(f"y is of the shape of the predictions, {tuple(predicted.shape)}, got {tuple(y.shape)}")


class CauchySchwarzBottleneckRegressor(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, MultiOutputMixin, RegressorMixin, BaseEstimator
):
    """Neural network whose bottleneck keeps little of x, trained by Cauchy-Schwarz divergences (arXiv 2404.17951).

    Features and targets are standardised inside. `transform` gives the bottleneck. The network runs in float32 for
    float32 features, else in float64.

    Args:
        hidden: Sizes of the encoder's layers.
        bottleneck: Size of t.
        beta: Weight of the compression.
        sigma: Width of the kernels of standardised x and of t, or "median".
        sigma_y: Width of the kernel of standardised y, or "median". Wider counts large errors more.
        stochastic: Noise on t while training.
        lr: Adam's rate.
        decay: It is multiplied by this every tenth epoch; the published script takes 0.6, for large tables.
        epochs: Passes over the samples.
        batch_size: Samples a step.
        validation_fraction: Share held out to choose the best epoch by; 0 keeps the last.
        random_state: Of first weights, held-out samples, order and noise.

    Attributes:
        network_: The trained `BottleneckNetwork`, on standardised features and targets.
        validation_errors_: Mean squared error of standardised targets over the samples held out, by epoch.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = CauchySchwarzBottleneckRegressor(hidden=(32,), bottleneck=8, lr=1e-2, epochs=20, random_state=0)
        >>> model.fit(X[:300], y[:300]).score(X[300:], y[300:]) > 0.3
        True
        >>> model.transform(X).shape
        (442, 8)
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        bottleneck: int = 128,
        beta: float = 0.01,
        sigma: Bandwidth = 1.0,
        sigma_y: Bandwidth = 1.0,
        *,
        stochastic: bool = False,
        lr: float = 1e-4,
        decay: float = 1.0,
        epochs: int = 200,
        batch_size: int = 128,
        validation_fraction: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.bottleneck = bottleneck
        self.beta = beta
        self.sigma = sigma
        self.sigma_y = sigma_y
        self.stochastic = stochastic
        self.lr = lr
        self.decay = decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on features X (N, d) and targets y, (N,) or (N, p).

        Raises:
            ValueError: Fewer than two samples, values that are not finite, or an argument out of range.
        """
        features: Any
        targets: Any
        features, targets = validate_data(
            self, X, y, dtype=[np.float64, np.float32], y_numeric=True, multi_output=True, ensure_min_samples=2
        )
        self._check()
        single_output, targets = targets.ndim == 1, targets.astype(np.float64).reshape(len(features), -1)
        random = check_random_state(self.random_state)
        order = random.permutation(len(features))
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        # Kernel estimates need two samples to train on.
        held_out = min(math.ceil(self.validation_fraction * len(features)), len(features) - 2)
        train = order[held_out:]
        scales = *_scaling(features[train]), *_scaling(targets[train])
        x, wanted = _scaled(features, *scales[:2]), _scaled(targets, *scales[2:])
        wanted = wanted.to(x.dtype)
        network = self._build(features.shape[1], targets.shape[1], x.dtype, generator)
        loss = CauchySchwarzBottleneck(self.beta, self.sigma, self.sigma_y, self.sigma)

        def objective(x: Tensor, y: Tensor) -> Tensor:
            t = network.encode(x)
            return loss(x, y, network.decoder(t), t)

        validation = (x[order[:held_out]], wanted[order[:held_out]]) if held_out else None
        errors = train_bottleneck(
            network, objective, x[train], wanted[train], validation=validation, lr=self.lr, decay=self.decay,
            epochs=self.epochs, batch_size=self.batch_size, generator=generator,
        )  # fmt: skip
        # All at once: a fit that is interrupted leaves no network with another's scales.
        self.network_, self.validation_errors_, self._single_output = network, errors, single_output
        self.feature_mean_, self.feature_scale_, self.target_mean_, self.target_scale_ = scales
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Targets of X (N, d), shaped as those it was trained on."""
        x = self._checked(X)
        with torch.no_grad():
            found = self.network_(x).numpy()
        found = (found * self.target_scale_ + self.target_mean_).astype(found.dtype)
        return found[:, 0] if self._single_output else found

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """The bottleneck t of X (N, d), (N, bottleneck)."""
        x = self._checked(X)
        with torch.no_grad():
            return self.network_.encode(x).numpy()

    def information_plane(self, X: ArrayLike, y: ArrayLike, sigma: Bandwidth = "median") -> InformationPlane:
        """How much t keeps of X, and how much it tells of y."""
        x = self._checked(X)
        targets: Any = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        targets = targets.reshape(len(targets), -1)
        if targets.shape != (len(x), len(self.target_mean_)):
            raise ValueError(
                f"y holds {len(self.target_mean_)} targets of each of {len(x)} samples, got {targets.shape}"
            )
        wanted = _scaled(targets, self.target_mean_, self.target_scale_).to(x.dtype)
        return information_plane(self.network_, x, wanted, sigma)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained regressor to a folder, as safetensors and JSON."""
        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in _SCALES}
        save_file(arrays | self.network_.state_dict(), folder / "model.safetensors")
        options = self.get_params() | {"hidden": [int(size) for size in self.hidden]}
        if not isinstance(self.random_state, Integral):
            options["random_state"] = None
        kept = {
            "options": options,
            "single_output": self._single_output,
            "features": list(getattr(self, "feature_names_in_", [])),
            "validation_errors": self.validation_errors_,
        }
        # Options from a grid of NumPy's are of its types.
        text = json.dumps(kept, indent=2, default=lambda value: value.item())
        (folder / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a regressor that `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds none, or a damaged one.
        """
        folder = Path(folder)
        try:
            kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            model = cls(**kept["options"] | {"hidden": tuple(kept["options"]["hidden"])})
            for name in _SCALES:
                setattr(model, name, weights.pop(name).numpy())
            model.n_features_in_ = len(model.feature_mean_)
            if kept["features"]:
                model.feature_names_in_ = np.array(kept["features"], dtype=object)
            model._single_output, model.validation_errors_ = kept["single_output"], kept["validation_errors"]
            dtype = weights["mean.weight"].dtype
            model.network_ = model._build(model.n_features_in_, len(model.target_mean_), dtype, torch.Generator())
            model.network_.load_state_dict(weights)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}, or a damaged one: {error}") from error
        return model

    @property
    def _n_features_out(self) -> int:
        return self.bottleneck

    def _build(self, inputs: int, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> BottleneckNetwork:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
            network = BottleneckNetwork(inputs, self.hidden, self.bottleneck, outputs, stochastic=self.stochastic)
        network.generator = generator
        return network.to(dtype).eval()

    def _checked(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        dtype = next(self.network_.parameters()).dtype
        features: Any = validate_data(self, X, reset=False, dtype=str(dtype).removeprefix("torch."))
        return _scaled(features, self.feature_mean_, self.feature_scale_)

    def _check(self) -> None:
        for name in ("bottleneck", "epochs", "batch_size"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value}")
        if not all(isinstance(size, Integral) and size >= 1 for size in self.hidden):
            raise ValueError(f"hidden holds whole numbers of at least 1, got {self.hidden}")
        if not self.lr > 0 or not 0 < self.decay <= 1:
            raise ValueError(f"lr is above 0 and decay above 0 and at most 1, got {self.lr} and {self.decay}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is at least 0 and below 1, got {self.validation_fraction}")


_SCALES = ("feature_mean_", "feature_scale_", "target_mean_", "target_scale_")


def _scaling(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means and standard deviations of columns, 1 where a column is constant, in float64."""
    values = values.astype(np.float64)
    return values.mean(0), np.where(np.ptp(values, axis=0) > 0, values.std(0), 1)


def _scaled(values: NDArray[Any], mean: NDArray[Any], scale: NDArray[Any]) -> Tensor:
    """Of the dtype of the values: in float32 a large mean would take digits from what is near it."""
    return torch.from_numpy(((values - mean) / scale).astype(values.dtype))
