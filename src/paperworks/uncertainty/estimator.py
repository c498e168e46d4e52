"""What the estimators of this room have in common: targets in their own units, quantiles, densities, files."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Tensor
from torch.distributions import Distribution, StudentT

Array = NDArray[np.float64]
RandomState = int | np.random.RandomState | None
_MOST_TOGETHER = 10_000


class Probabilistic(BaseEstimator):  # type: ignore[misc]
    """An estimator that is saved as safetensors and JSON, its features standardised inside where it wants that.

    Attributes:
        feature_mean_: Subtracted from features (d,), zeros where they are not standardised.
        feature_scale_: By which they are divided then, 1 where a feature is constant.
    """

    _standardizes_features: ClassVar[bool] = True
    _least_rows: ClassVar[int] = 1
    # Rows that a fit takes at most, None for any number.
    _most_rows: ClassVar[int | None] = None

    feature_mean_: Array
    feature_scale_: Array
    _fitted_options: dict[str, Any]

    def _features(self, X: ArrayLike) -> Tensor:
        """Checked and standardised features (n, d), in float64."""
        check_is_fitted(self)
        return self._standardized(validate_data(self, X, reset=False, dtype=np.float64))

    def _measured(self, X: Array) -> Array:
        if self._most_rows is not None and len(X) > self._most_rows:
            raise ValueError(
                f"{type(self).__name__} takes up to {self._most_rows:,} rows here, got {len(X):,}: {self._for_more_rows()}"
            )
        self.feature_mean_, self.feature_scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self._standardizes_features:
            self.feature_mean_, self.feature_scale_ = _location_and_scale(X)
        return X

    def _standardized(self, X: Array) -> Tensor:
        return torch.from_numpy((X - self.feature_mean_) / self.feature_scale_)

    def _for_more_rows(self) -> str:
        """What to do with more rows than `_most_rows`."""
        return "give fewer"

    def _check(self) -> None:
        """Raise where an argument is out of range."""

    @abstractmethod
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a fit found, as tensors and as JSON values."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Set what `_state` gave."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fitted estimator to a folder, as safetensors and JSON."""
        check_is_fitted(self)
        tensors, values = self._state()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shared = {name: torch.from_numpy(np.asarray(getattr(self, name))) for name in self._scales()}
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in (tensors | shared).items()}
        save_file(tensors, folder / "model.safetensors")
        options = self._options()
        if not isinstance(options.get("random_state"), Integral):
            options.pop("random_state", None)
        kept = {
            "estimator": type(self).__name__,
            "options": _finite(options),
            "features": list(getattr(self, "feature_names_in_", [])),
            "fitted": _finite(values | self._labels()),
        }
        # Options from a grid of NumPy's are of its types.
        text = json.dumps(kept, indent=2, default=_plain, allow_nan=False)
        (folder / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read an estimator that `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds none, one of another class, or a damaged one.
        """
        folder = Path(folder)
        try:
            kept = _infinite(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            tensors = load_file(folder / "model.safetensors")
            if kept["estimator"] != cls.__name__:
                raise ValueError(f"it is a {kept['estimator']}")
            model = cls._from_options(kept["options"], tensors)
            model._check()
            model._fitted_options = model.get_params(deep=False)
            for name in model._scales():
                setattr(model, name, tensors.pop(name).numpy())
            model.n_features_in_ = len(model.feature_mean_)
            if kept["features"]:
                model.feature_names_in_ = np.array(kept["features"], dtype=object)
            model._restore_labels(kept["fitted"])
            model._restore(tensors, kept["fitted"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}, or a damaged one: {error}") from error
        return model

    def _options(self) -> dict[str, Any]:
        """The constructor's arguments at the fit, as JSON values."""
        return dict(self._fitted_options)

    @classmethod
    def _from_options(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})

    def _scales(self) -> tuple[str, ...]:
        return ("feature_mean_", "feature_scale_")

    def _labels(self) -> dict[str, Any]:
        return {}

    def _restore_labels(self, values: dict[str, Any]) -> None:
        pass


class ProbabilisticRegressor(RegressorMixin, Probabilistic):  # type: ignore[misc]
    """A regressor that predicts a distribution of each target.

    A method gives `_fit`, of standardised features and targets, and `_predictive`, of standardised targets too; all that
    users call is here, and in the units of y.

    Attributes:
        target_mean_: Subtracted from targets, (p,).
        target_scale_: By which they are divided then, 1 where they are constant.
    """

    _standardizes_targets: ClassVar[bool] = True
    _many_targets: ClassVar[bool] = False

    target_mean_: Array
    target_scale_: Array

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit features X (n, d) and targets y, (n,) or, where a method takes several, (n, p).

        Raises:
            ValueError: Values that are not finite, too few or too many rows, or an argument out of range.
        """
        self._check()
        self._fitted_options = self.get_params(deep=False)
        features, targets = validate_data(
            self, X, y, dtype=np.float64, y_numeric=True, multi_output=self._many_targets,
            ensure_min_samples=self._least_rows,
        )  # fmt: skip
        self._single_target = targets.ndim == 1
        features, targets = _sorted(features, np.asarray(targets, dtype=np.float64).reshape(len(features), -1))
        features = self._measured(features)
        self.target_mean_, self.target_scale_ = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
        if self._standardizes_targets:
            self.target_mean_, self.target_scale_ = _location_and_scale(targets)
        z = torch.from_numpy((targets - self.target_mean_) / self.target_scale_)
        self._fit(self._standardized(features), z if self._many_targets else z[:, 0])
        return self

    @abstractmethod
    def _fit(self, X: Tensor, y: Tensor) -> None:
        """Fit features (n, d) and targets (n,), or (n, p) where it takes several."""

    @abstractmethod
    def _predictive(self, X: Tensor) -> Distribution:
        """The distribution of each standardised target, noise included, with batch shape (n,) or (n, p)."""

    def _draws(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of all targets of X together, (n_samples, n) or (n_samples, n, p); independent ones unless overridden."""
        law = self._predictive(X)
        shape = (n_samples, *law.batch_shape)
        return quantile(law, torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """Means (n,) or (n, p) of the targets of X (n, d); with `return_std` a pair of them and standard deviations."""
        law = self._predictive(self._features(X))
        mean = self._shaped(law.mean * self._scale + self._mean)
        return (mean, self._shaped(law.stddev * self._scale)) if return_std else mean

    def predict_quantiles(self, X: ArrayLike, quantiles: ArrayLike = (0.05, 0.5, 0.95)) -> Array:
        """Quantiles (n, q) or (n, p, q) of the targets of X (n, d).

        Args:
            X: Features.
            quantiles: Between 0 and 1, ends excluded; by default the ends and the middle of a 90 % interval.
        """
        levels = np.atleast_1d(check_array(np.atleast_1d(quantiles), dtype=np.float64, ensure_2d=False))
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"quantiles are between 0 and 1, ends excluded, got {levels.tolist()}")
        law = self._predictive(self._features(X))
        found = [
            quantile(law, torch.full(law.batch_shape, float(level), dtype=torch.float64)) * self._scale + self._mean
            for level in levels
        ]
        return np.stack([self._shaped(one) for one in found], axis=-1)

    def log_predictive_density(self, X: ArrayLike, y: ArrayLike) -> Array:
        """Log density (n,) of each row's targets y under its prediction, in nats and in the units of y; summed over several."""
        features = self._features(X)
        targets = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        check_consistent_length(features, targets)
        targets = targets.reshape(len(features), -1)
        if targets.shape[1] != len(self.target_mean_):
            raise ValueError(f"y holds {len(self.target_mean_)} targets of each row, got {targets.shape[1]}")
        law = self._predictive(features)
        z = torch.from_numpy((targets - self.target_mean_) / self.target_scale_).reshape(law.batch_shape)
        found = law.log_prob(z).reshape(len(features), -1) - torch.from_numpy(np.log(self.target_scale_))
        return found.sum(1).detach().numpy()

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: RandomState = 0) -> Array:
        """Draws of the targets of X (n, d), noise included, (n, n_samples) or (n, p, n_samples)."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples is a whole number of at least 1, got {n_samples}")
        features = self._features(X)
        drawn = self._draws(features, int(n_samples), generator_of(random_state))
        return self._shaped((drawn * self._scale + self._mean).movedim(0, -1))

    @property
    def _mean(self) -> Tensor:
        mean = torch.from_numpy(self.target_mean_)
        return mean if self._many_targets else mean[0]

    @property
    def _scale(self) -> Tensor:
        scale = torch.from_numpy(self.target_scale_)
        return scale if self._many_targets else scale[0]

    def _shaped(self, values: Tensor) -> Array:
        found = values.detach().numpy()
        return found[:, 0] if self._many_targets and self._single_target else found

    def _scales(self) -> tuple[str, ...]:
        return (*super()._scales(), "target_mean_", "target_scale_")

    def _labels(self) -> dict[str, Any]:
        return {"single_target": self._single_target}

    def _restore_labels(self, values: dict[str, Any]) -> None:
        self._single_target = values["single_target"]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self._many_targets
        return tags


class ProbabilisticClassifier(ClassifierMixin, Probabilistic):  # type: ignore[misc]
    """A classifier whose probabilities are a posterior predictive distribution.

    A method gives `_fit`, of standardised features and whole numbers as classes, and `_probabilities`.

    Attributes:
        classes_: Class labels, ascending.
    """

    _least_classes: ClassVar[int] = 2

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit features X (n, d) and labels y (n,).

        Raises:
            ValueError: Values that are not finite, one class, too many rows, or an argument out of range.
        """
        self._check()
        self._fitted_options = self.get_params(deep=False)
        features, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=self._least_rows)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < self._least_classes:
            raise ValueError(f"labels are of {self._least_classes} or more classes, got one class, {self.classes_[0]}")
        features, sorted_codes = _sorted(features, codes[:, None].astype(np.float64))
        features = self._measured(features)
        self._fit(self._standardized(features), torch.from_numpy(sorted_codes[:, 0].astype(np.int64)))
        return self

    @abstractmethod
    def _fit(self, X: Tensor, y: Tensor) -> None:
        """Fit features (n, d) and classes (n,), counted from 0."""

    @abstractmethod
    def _probabilities(self, X: Tensor) -> Tensor:
        """Probabilities (n, classes)."""

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probability of each class (n, classes)."""
        return self._probabilities(self._features(X)).detach().numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The likeliest class of each row (n,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def log_predictive_density(self, X: ArrayLike, y: ArrayLike) -> Array:
        """Log probability (n,) of each row's label, in nats."""
        found = self.predict_proba(X)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(found, labels)
        if not np.isin(labels, self.classes_).all():
            raise ValueError(f"labels are among {self.classes_.tolist()}, got {np.unique(labels).tolist()}")
        with np.errstate(divide="ignore"):
            return np.log(found[np.arange(len(labels)), np.searchsorted(self.classes_, labels)])

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: RandomState = 0) -> NDArray[Any]:
        """Labels drawn for X (n, d), (n, n_samples), each row by itself."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples is a whole number of at least 1, got {n_samples}")
        probabilities = torch.from_numpy(self.predict_proba(X))
        drawn = torch.multinomial(probabilities, int(n_samples), True, generator=generator_of(random_state))
        return self.classes_[drawn.numpy()]

    def _labels(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist()}

    def _restore_labels(self, values: dict[str, Any]) -> None:
        self.classes_ = np.array(values["classes"])


def generator_of(random_state: RandomState) -> torch.Generator:
    """A generator that scikit-learn's `random_state` seeds."""
    return torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))


def quantile(law: Distribution, level: Tensor) -> Tensor:
    """The values below which a share `level` of each distribution lies, by its `icdf`, else by bisection of its `cdf`.

    Args:
        law: Distributions of numbers, of any batch shape.
        level: Between 0 and 1, of the batch shape, or with more dimensions before it.

    Example:
        >>> from torch.distributions import Categorical, MixtureSameFamily, Normal
        >>> parts = Normal(torch.tensor([[-1.0, 1.0]], dtype=torch.float64), 0.5)
        >>> mixture = MixtureSameFamily(Categorical(torch.tensor([[0.5, 0.5]])), parts)
        >>> [round(float(quantile(mixture, torch.tensor([level]))), 3) for level in (0.05, 0.95)]
        [-1.641, 1.641]
    """
    if isinstance(law, StudentT):
        from scipy.stats import t

        unit = t.ppf(level.numpy(), law.df.detach().numpy())
        return law.loc + law.scale * torch.from_numpy(np.asarray(unit))
    try:
        return law.icdf(level)
    except NotImplementedError:
        pass
    spread = law.stddev.detach()
    low, high = (law.mean.detach() + sign * spread for sign in (-1, 1))
    low, high = (one.expand(level.shape).clone() for one in (low, high))
    # The ends are moved until they enclose all levels, then the rest is halved to rounding.
    for _ in range(200):
        below, above = law.cdf(low) > level, law.cdf(high) < level
        if not bool(below.any() | above.any()):
            break
        extent = high - low
        low, high = torch.where(below, low - extent, low), torch.where(above, high + extent, high)
    for _ in range(64):
        middle = (low + high) / 2
        under = law.cdf(middle) < level
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (low + high) / 2


def check_together(X: Tensor) -> None:
    """Refuse draws of more rows together than their covariance, n x n, has room for."""
    if len(X) > _MOST_TOGETHER:
        raise ValueError(
            f"draws of all rows together are of up to {_MOST_TOGETHER:,} rows, got {len(X):,}: give some at a time"
        )


def _sorted(X: Array, y: Array) -> tuple[Array, Array]:
    """Rows in an order of their own, so that draws among them and sums over them do not hang on how they came."""
    order = np.lexsort([*y.T[::-1], *X.T[::-1]])
    return X[order], y[order]


def _location_and_scale(values: Array) -> tuple[Array, Array]:
    """Means and standard deviations of columns, 1 where a column is constant but for rounding."""
    varied = np.ptp(values, axis=0) > 16 * np.finfo(np.float64).eps * np.abs(values).max(axis=0)
    return values.mean(0), np.where(varied, values.std(0), 1.0)


def _plain(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} cannot be kept as JSON: give numbers, text, true or false")
    return value.tolist()


# JSON has no infinity.
_INFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _finite(value: Any) -> Any:
    """Numbers that are none in JSON as {"number": "inf"}, however deep they lie."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return {"number": str(float(value))} if isinstance(value, float) and not math.isfinite(value) else value


def _infinite(value: Any) -> Any:
    """What `_finite` was given, with tuples as lists."""
    if isinstance(value, dict):
        if set(value) == {"number"}:
            return _INFINITE[value["number"]]
        return {name: _infinite(one) for name, one in value.items()}
    return [_infinite(one) for one in value] if isinstance(value, list) else value
