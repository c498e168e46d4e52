"""CauchySchwarzBottleneck: regressors that keep little of x, without Gaussian assumption or bound (arXiv 2404.17951)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

Bandwidth = float | Literal["median"]


def cs_divergence(a: Tensor, b: Tensor, sigma: Bandwidth = 1.0) -> Tensor:
    """Cauchy-Schwarz divergence of two samples, log mean k(a, a) + log mean k(b, b) - 2 log mean k(a, b), at least 0.

    Args:
        a: (M, d), or (M,) for numbers.
        b: (N, d), or (N,).
        sigma: Width of the Gaussian kernel; "median" is the median distance within both samples together.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> a = torch.tensor([0.0, 1.0])
        >>> float(cs_divergence(a, a)), round(float(cs_divergence(a, a + 1)), 4)
        (0.0, 0.627)
    """
    a, b = _rows(a=a), _rows(b=b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"two samples of one space have as many columns, got {a.shape[1]} and {b.shape[1]}")
    sigma = _width(sigma, torch.cat([a, b]))
    within = [_log_kernel(one, one, sigma).logsumexp((0, 1)) - 2 * math.log(len(one)) for one in (a, b)]
    across = _log_kernel(a, b, sigma).logsumexp((0, 1)) - math.log(len(a) * len(b))
    return within[0] + within[1] - 2 * across


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
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> x, y = torch.linspace(-1, 1, 5), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
        >>> float(conditional_cs_divergence(x, y, y)), float(conditional_cs_divergence(x, y, 1 - y, 0.1)) > 0.5
        (0.0, True)
    """
    x = _rows(x=x)
    return _conditional(_log_kernel(x, x, _width(sigma_x, x)), y, y_hat, sigma_y, official)


def _conditional(K: Tensor, y: Tensor, y_hat: Tensor, sigma: Bandwidth, official: bool) -> Tensor:
    """Of K, the log kernel of x."""
    y, y_hat = _rows(y=y), _rows(y_hat=y_hat)
    if y.shape != y_hat.shape or len(K) != len(y):
        raise ValueError(
            f"x, y and y_hat are N samples, the last two of one shape, got {len(K)}, {tuple(y.shape)} and "
            f"{tuple(y_hat.shape)}"
        )
    width = _width(sigma, y)
    weighted = K - ((2 * K).logsumexp(1, keepdim=True) if official else 2 * K.logsumexp(1, keepdim=True))
    true, predicted, cross = (
        (weighted + _log_kernel(u, v, width)).logsumexp((0, 1)) for u, v in ((y, y), (y_hat, y_hat), (y_hat, y))
    )
    return true + predicted - 2 * cross


def cs_mutual_information(
    x: Tensor, t: Tensor, sigma_x: Bandwidth = 1.0, sigma_t: Bandwidth = 1.0, *, normalize: bool = True
) -> Tensor:
    """Cauchy-Schwarz divergence of the joint density of x and t from the product of theirs, in nats.

    Args:
        x: (N, d), or (N,) for numbers.
        t: (N, K), or (N,).
        sigma_x: Width of the Gaussian kernel of x; "median" is the median distance.
        sigma_t: Width of that of t.
        normalize: Divide by the geometric mean of I(x, x) and I(t, t), which leads from 0 to 1 and has no unit.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or a width that is not above 0.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> round(float(cs_mutual_information(x, x)), 4), abs(float(cs_mutual_information(x, 0 * x))) < 1e-6
        (1.0, True)
    """
    x = _rows(x=x)
    return _information(_log_kernel(x, x, _width(sigma_x, x)), t, sigma_t, normalize)


def _information(K: Tensor, t: Tensor, sigma: Bandwidth, normalize: bool) -> Tensor:
    """Of K, the log kernel of x."""
    t = _rows(t=t)
    if len(K) != len(t):
        raise ValueError(f"x and t are of the same N samples, got {len(K)} and {len(t)}")
    Q = _log_kernel(t, t, _width(sigma, t))

    def joint(one: Tensor, other: Tensor) -> Tensor:
        # The powers of N cancel.
        whole = (one + other).logsumexp((0, 1)) + one.logsumexp((0, 1)) + other.logsumexp((0, 1))
        return whole - 2 * (one.logsumexp(1) + other.logsumexp(1)).logsumexp(0)

    # The small number keeps the gradient finite where t collapses.
    return joint(K, Q) / (joint(K, K) * joint(Q, Q) + 1e-12).sqrt() if normalize else joint(K, Q)


def _log_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Logarithms: sums of kernels between far points would underflow."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (-2 * sigma**2)


def _rows(**given: Tensor) -> Tensor:
    ((name, values),) = given.items()
    if values.ndim not in (1, 2) or not values.numel() or not values.is_floating_point():
        raise ValueError(
            f"{name} is (N,) or (N, d) of floating-point numbers, got {tuple(values.shape)} of {values.dtype}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: take these samples out")
    # Without a second dimension every kernel would be one number, and the loss a plain squared error.
    return values[:, None] if values.ndim == 1 else values


def _width(sigma: Bandwidth, values: Tensor) -> float:
    if sigma == "median":
        distance = torch.pdist(values.detach())
        median = float(distance.median()) if len(distance) else 0.0
        if not median > 0:
            raise ValueError("most samples are the same, so their median distance is 0: give sigma as a number")
        return median
    if isinstance(sigma, str) or not 0 < sigma < math.inf:
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
        x = _rows(x=x)
        K = _log_kernel(x, x, _width(self.sigma_x, x))
        loss = _conditional(K, y, y_hat, self.sigma_y, self.official)
        if not self.beta:
            return loss
        if self.sigma_compression is not None:
            K = _log_kernel(x, x, _width(self.sigma_compression, x))
        return loss + self.beta * _information(K, t, self.sigma_t, self.normalize)


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
                errors.append(float((network(validation[0]) - validation[1]).square().mean()))
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


@torch.no_grad()
def information_plane(
    network: BottleneckNetwork, x: Tensor, y: Tensor, sigma: Bandwidth = "median"
) -> InformationPlane:
    """Coordinates of a network over samples x (N, d) and y (N, p); compression with kernels as wide as sigma.

    Raises:
        ValueError: As `cs_mutual_information`, or constant targets.
    """
    t = network.eval().encode(x)
    spread, error = (y - y.mean(0)).square().mean(), (network.decoder(t) - y).square().mean()
    if not spread > 0:
        raise ValueError("all targets are the same: give samples with different ones")
    return InformationPlane(float(cs_mutual_information(x, t, sigma, sigma)), float((spread / error).log2() / 2))


def fgsm(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Inputs (N, d) changed by eps a feature, where this raises the squared error against y (N, p) fastest.

    Example:
        >>> fgsm(lambda x: 2 * x, torch.tensor([[1.0]]), torch.tensor([[0.0]]), 0.5)
        tensor([[1.5000]])
    """
    moved = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad((model(moved) - y).square().sum(), moved)
    return x + eps * slope.sign()


def pgd(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float = 0.3, *, step: float = 0.05, steps: int = 5
) -> Tensor:
    """Several small steps of `fgsm`, each kept within eps of x (N, d) in every feature."""
    moved = x
    for _ in range(steps):
        moved = torch.clamp(fgsm(model, moved, y, step), x - eps, x + eps)
    return moved


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
        self._single_output = targets.ndim == 1
        targets = targets.astype(features.dtype).reshape(len(features), -1)
        random = check_random_state(self.random_state)
        order = random.permutation(len(features))
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        # Kernel estimates need two samples to train on.
        held_out = min(math.ceil(self.validation_fraction * len(features)), len(features) - 2)
        train = order[held_out:]
        self.feature_mean_, self.feature_scale_ = _scaling(features[train])
        self.target_mean_, self.target_scale_ = _scaling(targets[train])
        x = torch.from_numpy(self._scaled(features))
        wanted = torch.from_numpy((targets - self.target_mean_) / self.target_scale_)
        self._build(targets.shape[1], x.dtype, generator)
        network = self.network_
        loss = CauchySchwarzBottleneck(self.beta, self.sigma, self.sigma_y, self.sigma)

        def objective(x: Tensor, y: Tensor) -> Tensor:
            t = network.encode(x)
            return loss(x, y, network.decoder(t), t)

        validation = (x[order[:held_out]], wanted[order[:held_out]]) if held_out else None
        self.validation_errors_ = train_bottleneck(
            network, objective, x[train], wanted[train], validation=validation, lr=self.lr, decay=self.decay,
            epochs=self.epochs, batch_size=self.batch_size, generator=generator,
        )  # fmt: skip
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Targets of X (N, d), shaped as those it was trained on."""
        x = self._checked(X)
        with torch.no_grad():
            found = self.network_(x).numpy() * self.target_scale_ + self.target_mean_
        return found[:, 0] if self._single_output else found

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """The bottleneck t of X (N, d), (N, bottleneck)."""
        x = self._checked(X)
        with torch.no_grad():
            return self.network_.encode(x).numpy()

    def information_plane(self, X: ArrayLike, y: ArrayLike, sigma: Bandwidth = "median") -> InformationPlane:
        """How much t keeps of X, and how much it tells of y."""
        x = self._checked(X)
        y = np.asarray(y, self.target_mean_.dtype).reshape(len(x), -1)
        target = (y - self.target_mean_) / self.target_scale_
        return information_plane(self.network_, x, torch.from_numpy(target), sigma)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained regressor to a folder, as safetensors and JSON."""
        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in _SCALES}
        save_file(arrays | self.network_.state_dict(), folder / "model.safetensors")
        options = self.get_params() | {"hidden": list(self.hidden)}
        if not isinstance(self.random_state, int):
            options["random_state"] = None
        kept = {
            "options": options,
            "single_output": self._single_output,
            "features": list(getattr(self, "feature_names_in_", [])),
            "validation_errors": self.validation_errors_,
        }
        (folder / "config.json").write_text(json.dumps(kept, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a regressor that `save_pretrained` wrote."""
        folder = Path(folder)
        kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        model = cls(**kept["options"] | {"hidden": tuple(kept["options"]["hidden"])})
        for name in _SCALES:
            setattr(model, name, weights.pop(name).numpy())
        model.n_features_in_ = len(model.feature_mean_)
        if kept["features"]:
            model.feature_names_in_ = np.array(kept["features"], dtype=object)
        model._single_output = kept["single_output"]
        model.validation_errors_ = kept["validation_errors"]
        model._build(len(model.target_mean_), weights["mean.weight"].dtype, torch.Generator())
        model.network_.load_state_dict(weights)
        return model

    @property
    def _n_features_out(self) -> int:
        return self.bottleneck

    def _build(self, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
            self.network_ = BottleneckNetwork(
                self.n_features_in_, self.hidden, self.bottleneck, outputs, stochastic=self.stochastic,
            ).to(dtype).eval()  # fmt: skip
        self.network_.generator = generator

    def _scaled(self, X: NDArray[Any]) -> NDArray[Any]:
        return (X - self.feature_mean_) / self.feature_scale_

    def _checked(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        features: Any = validate_data(self, X, reset=False, dtype=self.feature_mean_.dtype)
        return torch.from_numpy(self._scaled(features))

    def _check(self) -> None:
        for name in ("bottleneck", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden holds sizes of at least 1, got {self.hidden}")
        if not self.lr > 0 or not 0 < self.decay <= 1:
            raise ValueError(f"lr is above 0 and decay above 0 and at most 1, got {self.lr} and {self.decay}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is at least 0 and below 1, got {self.validation_fraction}")


_SCALES = ("feature_mean_", "feature_scale_", "target_mean_", "target_scale_")


def _scaling(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means and standard deviations of columns, 1 where a column is constant."""
    scale = values.std(0)
    constant = scale <= 10 * np.finfo(values.dtype).eps * np.abs(values).max(0)
    return values.mean(0), np.where(constant, 1, scale).astype(values.dtype)
