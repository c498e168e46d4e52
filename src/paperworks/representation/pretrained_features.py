"""Pretraining by maximum likelihood on unlabelled data, then a small predictor on its features (arXiv 2303.01566)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, xlogy
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone, is_classifier
from sklearn.cluster import kmeans_plusplus
from sklearn.ensemble import StackingClassifier, StackingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score, zero_one_loss
from sklearn.model_selection import KFold, RepeatedKFold, RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_consistent_length, check_random_state, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

Array = NDArray[np.float64]
Pairs = tuple[ArrayLike, ArrayLike, ArrayLike]


class FactorModel(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """x = B z + mean + noise with z ~ N(0, I_r) and noise ~ N(0, s^2 I_d), fitted by its closed-form maximum likelihood.

    Args:
        n_components: Factors r, at most d, and fewer than samples.
        noise_variance: s^2 where it is known; None estimates it as the mean of the d - r smallest eigenvalues.

    Attributes:
        mean_: (d,).
        loadings_: B, (d, r), unique up to a rotation of the factors.
        noise_variance_: s^2.

    Raises:
        ValueError: Too many components, a negative variance, features that are constant or not finite, or one sample.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 6)) @ np.diag([3, 2, 1, 1, 1, 1])
        >>> FactorModel(2).fit_transform(x).shape
        (50, 2)
    """

    def __init__(self, n_components: int, *, noise_variance: float | None = None) -> None:
        self.n_components = n_components
        self.noise_variance = noise_variance

    def fit(self, X: ArrayLike, y: None = None) -> Self:
        """Fit samples (m, d); `y` is not looked at."""
        X = _varied(validate_data(self, X, dtype=np.float64))
        m, d = X.shape
        r, known = self.n_components, self.noise_variance
        if not 1 <= r <= min(d, m - 1):
            raise ValueError(f"n_components is between 1 and {min(d, m - 1)} for {m} samples of {d} features, got {r}")
        if known is not None and not 0 <= known < math.inf:
            raise ValueError(f"noise_variance is a number of at least 0, or None to estimate it, got {known}")
        self.mean_ = X.mean(0)
        centred = X - self.mean_
        # Not of the covariance: noise less than 1e-8 times the signal would be lost in its rounding.
        _, singular, directions = np.linalg.svd(
            np.linalg.qr(centred, mode="r") if m > d else centred, full_matrices=False
        )
        eigenvalues = singular**2 / m
        # Where d > m the eigenvalues beyond the samples' are zeros, and count.
        self.noise_variance_ = float(eigenvalues[r:].sum() / max(1, d - r)) if known is None else float(known)
        self.loadings_ = directions[:r].T * np.sqrt(np.maximum(eigenvalues[:r] - self.noise_variance_, 0))
        return self

    def transform(self, X: ArrayLike) -> Array:
        """Posterior means (B^T B + s^2 I)^(-1) B^T (x - mean), (n, r)."""
        check_is_fitted(self)
        B = self.loadings_
        centred = validate_data(self, X, reset=False, dtype=np.float64) - self.mean_
        precision = B.T @ B + self.noise_variance_ * np.eye(B.shape[1])
        return (np.linalg.pinv(precision, hermitian=True) @ B.T @ centred.T).T

    def score_samples(self, X: ArrayLike) -> Array:
        """Log-likelihood of each sample (n,)."""
        check_is_fitted(self)
        d, r = self.loadings_.shape
        directions, singular, _ = np.linalg.svd(self.loadings_, full_matrices=False)
        variances = singular**2 + self.noise_variance_
        smallest = self.noise_variance_ if d > r else variances.min()
        if smallest <= np.finfo(float).eps * variances.max():
            raise ValueError("the noise variance is 0, which leaves no density: take fewer components or more samples")
        centred = validate_data(self, X, reset=False, dtype=np.float64) - self.mean_
        inside = centred @ directions
        squared = (inside**2 / variances).sum(1)
        constant = d * math.log(2 * math.pi) + np.log(variances).sum()
        if d > r:
            squared += ((centred**2).sum(1) - (inside**2).sum(1)) / self.noise_variance_
            constant += (d - r) * math.log(self.noise_variance_)
        return -(squared + constant) / 2

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean log-likelihood of samples, in nats."""
        return float(self.score_samples(X).mean())

    def divergences(self, true: FactorModel, rng: np.random.RandomState) -> tuple[float, float]:
        """KL(self, true) in nats, of p(x, z) after the best rotation of z, and of p(x); both in closed form."""
        d, s, t = len(self.mean_), self.noise_variance_, true.noise_variance_
        if not min(s, t) > 0:
            raise ValueError("the noise variance is 0, which leaves no density: take fewer components or more samples")
        rotation, _ = orthogonal_procrustes(self.loadings_, true.loadings_)
        shift = self.mean_ - true.mean_
        moved = ((self.loadings_ @ rotation - true.loadings_) ** 2).sum() + (shift**2).sum()
        joint = (d * (s / t - 1 - math.log(s / t)) + moved / t) / 2
        ours, theirs = (one.loadings_ @ one.loadings_.T + one.noise_variance_ * np.eye(d) for one in (self, true))
        ratio = np.linalg.solve(theirs, ours)
        marginal = (np.trace(ratio) - d - np.linalg.slogdet(ratio)[1] + shift @ np.linalg.solve(theirs, shift)) / 2
        return float(joint), float(marginal)


class ComponentTable(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """One class for each mixture component: that of most labelled samples assigned to it.

    This minimises the 0-1 loss on the labelled samples over all tables. Ties and components without a labelled sample
    take the commonest class. `predict` assigns a sample to its likeliest component; `predict_proba` adds up the responsibilities.

    Attributes:
        classes_: Class labels, ascending.
        table_: Index of each component's class (K,).

    Raises:
        ValueError: All labels are the same, some are missing, or the features are no responsibilities.

    Example:
        >>> table = ComponentTable().fit(np.eye(3)[[0, 0, 1, 2]], ["a", "a", "b", "a"])
        >>> table.predict(np.eye(3)).tolist()
        ['a', 'b', 'a']
    """

    def fit(self, responsibilities: ArrayLike, y: ArrayLike) -> Self:
        """Fit responsibilities (n, K) with labels (n,)."""
        Z, labels = validate_data(self, responsibilities, _without_gaps(y), dtype=np.float64)
        _shares(Z)
        self.classes_, codes = np.unique(_classes(labels), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"labels are of two or more classes, got one class, {self.classes_[0]}: label some of another"
            )
        counts = np.zeros((Z.shape[1], len(self.classes_)))
        np.add.at(counts, (Z.argmax(1), codes), 1)
        tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1
        self.table_ = np.where(tied, counts.sum(0).argmax(), counts.argmax(1))
        return self

    def predict(self, responsibilities: ArrayLike) -> NDArray[Any]:
        """Class of each sample's likeliest component (n,)."""
        check_is_fitted(self)
        Z = _shares(validate_data(self, responsibilities, reset=False, dtype=np.float64))
        return self.classes_[self.table_[Z.argmax(1)]]

    def predict_proba(self, responsibilities: ArrayLike) -> Array:
        """Probability of each class (n, classes)."""
        check_is_fitted(self)
        Z = _shares(validate_data(self, responsibilities, reset=False, dtype=np.float64))
        return Z @ np.eye(len(self.classes_))[self.table_]


class _Climb(NamedTuple):
    """Where one start of expectation maximisation leads."""

    likelihood: float
    means: Array
    weights: Array
    variance: float
    rounds: int
    converged: bool


class MixtureModel(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """x | z = k ~ N(u_k, s^2 I), fitted by expectation maximisation from several k-means++ starts; the likeliest is kept.

    Args:
        n_components: K.
        variance: s^2 where it is known, 1 in the paper; None estimates one for all components.
        uniform: Whether all components have weight 1/K; else the weights are estimated.
        n_init: Starts.
        max_iter: Rounds of a start at most.
        tol: It ends when the mean log-likelihood rises by less.
        random_state: Of the starts.

    Attributes:
        means_: u, (K, d).
        weights_: (K,).
        variance_: s^2.
        n_iter_: Rounds of the start that was kept.

    Raises:
        ValueError: Too many components, a variance that is not positive, features that are constant or not finite.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 2)) + np.repeat([[-9, 0], [9, 0]], 30, axis=0)
        >>> MixtureModel(2, random_state=0).fit_transform(x).sum(0)
        array([30., 30.])
    """

    default_predictor: ClassVar[type] = ComponentTable

    def __init__(
        self, n_components: int, *, variance: float | None = None, uniform: bool = False, n_init: int = 5,
        max_iter: int = 500, tol: float = 1e-7, random_state: int | np.random.RandomState | None = None,
    ) -> None:  # fmt: skip
        self.n_components = n_components
        self.variance = variance
        self.uniform = uniform
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: None = None) -> Self:
        """Fit samples (m, d); `y` is not looked at."""
        X = _varied(validate_data(self, X, dtype=np.float64))
        distinct = len(np.unique(X, axis=0))
        if not 1 <= self.n_components <= distinct - (self.variance is None):
            raise ValueError(f"{self.n_components} components need more distinct samples, got {distinct}")
        if self.variance is not None and not 0 < self.variance < math.inf:
            raise ValueError(f"variance is above 0, or None to estimate it, got {self.variance}")
        if self.n_init < 1 or self.max_iter < 1:
            raise ValueError(f"n_init and max_iter are at least 1, got {self.n_init} and {self.max_iter}")
        random = check_random_state(self.random_state)
        # Near zero, where distances by inner products, as k-means++ takes them, lose no digits.
        centre = X.mean(0)
        best = max((self._climb(X - centre, random) for _ in range(self.n_init)), key=lambda one: one.likelihood)
        if not best.converged:
            warnings.warn(
                f"the likeliest start had not converged after max_iter={self.max_iter} rounds: allow more, or a larger tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.means_, self.weights_ = best.means + centre, best.weights
        self.variance_, self.n_iter_ = best.variance, best.rounds
        return self

    def _climb(self, X: Array, random: np.random.RandomState) -> _Climb:
        """Where one start leads."""
        K, d = self.n_components, X.shape[1]
        means, _ = kmeans_plusplus(X, K, random_state=random)
        weights = np.full(K, 1 / K)
        spread = X.var(0).mean()
        least = cdist(X, means, "sqeuclidean").min(1).mean() / d
        variance = self.variance or max(least, spread * 1e-6)
        rounds, before = 0, -math.inf
        while True:
            joint = _log_joint(X, means, weights, variance)
            evidence = logsumexp(joint, axis=1)
            reached = float(evidence.mean())
            gained = reached - before
            if gained < self.tol or rounds == self.max_iter:
                break
            rounds, before = rounds + 1, reached
            shares = np.exp(joint - evidence[:, None])
            sizes = shares.sum(0) + 10 * np.finfo(float).eps
            means = shares.T @ X / sizes[:, None]
            if not self.uniform:
                weights = sizes / sizes.sum()
            if self.variance is None:
                variance = float((shares * cdist(X, means, "sqeuclidean")).sum() / X.size)
                if not variance > 1e-12 * spread:
                    raise ValueError(f"the variance fell to 0 with {K} components: take fewer, or give the variance")
        return _Climb(reached, means, weights, float(variance), rounds, gained < self.tol)

    def transform(self, X: ArrayLike) -> Array:
        """Responsibilities P(z = k | x), (n, K)."""
        joint = self._log_joint(X)
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))

    def score_samples(self, X: ArrayLike) -> Array:
        """Log-likelihood of each sample (n,)."""
        return logsumexp(self._log_joint(X), axis=1)

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean log-likelihood of samples, in nats."""
        return float(self.score_samples(X).mean())

    def divergences(self, true: MixtureModel, rng: np.random.RandomState) -> tuple[float, float]:
        """KL(self, true) in nats, of p(x, z) after the best permutation, and of p(x) by 20 000 draws."""
        d, s, t = self.means_.shape[1], self.variance_, true.variance_
        cost = (cdist(self.means_, true.means_, "sqeuclidean") / t + d * (s / t - 1 - math.log(s / t))) / 2
        cost = xlogy(self.weights_, self.weights_)[:, None] + self.weights_[:, None] * (cost - np.log(true.weights_))
        joint = cost[linear_sum_assignment(cost)].sum()
        drawn = self.means_[rng.choice(len(self.weights_), size=20_000, p=self.weights_)]
        drawn = drawn + math.sqrt(s) * rng.standard_normal(drawn.shape)
        apart = self.score_samples(drawn) - true.score_samples(drawn)
        # exp(-apart) - 1 is 0 on average; with it no draw is below 0, so that near fits keep an order.
        return float(joint), float((apart + np.expm1(-apart)).mean())

    def _log_joint(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        samples = validate_data(self, X, reset=False, dtype=np.float64)
        return _log_joint(samples, self.means_, self.weights_, self.variance_)


def contrastive_loss(embedded: Tensor, other: Tensor, similar: Tensor) -> Tensor:
    """Negative mean log-likelihood of P(similar) = sigmoid(f(x)^T f(x')).

    Args:
        embedded: f(x), (m, r).
        other: f(x'), (m, r).
        similar: 1 where the two are similar, 0 where not, (m,).

    Returns:
        The loss in nats, a scalar; in float32 where embeddings are narrower.

    Raises:
        ValueError: Shapes that do not fit.

    Example:
        >>> round(float(contrastive_loss(torch.zeros(4, 2), torch.ones(4, 2), torch.ones(4))), 4)
        0.6931
    """
    if embedded.ndim != 2 or embedded.shape != other.shape or similar.shape != embedded.shape[:1]:
        raise ValueError(
            f"embeddings are two of (m, r), and similar (m,), got {tuple(embedded.shape)}, {tuple(other.shape)} and "
            f"{tuple(similar.shape)}"
        )
    dtype = torch.promote_types(embedded.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits((embedded.to(dtype) * other.to(dtype)).sum(1), similar.to(dtype))


class ContrastiveModel(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """P(x and x' similar) = sigmoid(f(x)^T f(x')), fitted by maximum likelihood on pairs with L-BFGS.

    Args:
        n_components: Length r of f(x).
        encoder: f, a module from (m, d) to (m, r); None takes the linear f(x) = Theta x. It is copied, not changed, and
            evaluated as it will be used, without dropout; in float32 where it is narrower.
        max_iter: Iterations of L-BFGS at most.
        random_state: Of the beginning of a linear f, which must not be zero: that is a saddle.

    Attributes:
        theta_: Theta, (r, d), unique up to a rotation; of a linear f only.
        encoder_: The fitted module where one was given.

    Raises:
        ValueError: No pairs are given, values are not finite or similarities not two-valued, an encoder without
            parameters or of another length, or a fit that diverges.

    Example:
        >>> x, other = np.random.default_rng(0).normal(size=(2, 200, 4))
        >>> model = ContrastiveModel(1, random_state=0).fit((x, other, x[:, 0] * other[:, 0] > 0))
        >>> model.transform(x).shape
        (200, 1)
    """

    def __init__(
        self, n_components: int, *, encoder: nn.Module | None = None, max_iter: int = 500,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:  # fmt: skip
        self.n_components = n_components
        self.encoder = encoder
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, pairs: Pairs, y: None = None) -> Self:
        """Fit pairs (X, X', s) of (m, d), (m, d) and (m,) with s in {0, 1} or {-1, 1}; `y` is not looked at."""
        X, other, similar = _pairs(self, pairs, reset=True)
        if self.n_components < 1 or self.max_iter < 1:
            raise ValueError(f"n_components and max_iter are at least 1, got {self.n_components} and {self.max_iter}")
        random = check_random_state(self.random_state)
        unit = 1.0
        if self.encoder is None:
            # What L-BFGS takes for no slope is an absolute number, so inputs are brought to one size.
            unit = math.sqrt((np.square(X).mean() + np.square(other).mean()) / 2) or 1.0
            encoder: nn.Module = nn.Linear(X.shape[1], self.n_components, bias=False, dtype=torch.float64)
            beginning = random.standard_normal((self.n_components, X.shape[1])) / math.sqrt(X.shape[1])
            encoder.weight.data = torch.from_numpy(beginning)  # type: ignore[assignment]
        else:
            encoder = clone(self.encoder, safe=False).eval()
            if not any(one.requires_grad for one in encoder.parameters()):
                raise ValueError("the encoder has no parameters to fit: give one that has, or encoder=None")
            if next(encoder.parameters()).dtype in (torch.float16, torch.bfloat16):
                encoder = encoder.float()
        given = [torch.from_numpy(one).to(next(encoder.parameters())) for one in (X / unit, other / unit, similar)]
        with torch.no_grad():
            length = encoder(given[0][:1]).shape[1:]
        if length != (self.n_components,):
            raise ValueError(f"the encoder gives (m, {self.n_components}), got (m, {', '.join(map(str, length))})")
        optimiser = torch.optim.LBFGS(
            encoder.parameters(), max_iter=self.max_iter, tolerance_grad=1e-9, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = contrastive_loss(encoder(given[0]), encoder(given[1]), given[2])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        try:
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            finite = all(bool(one.isfinite().all()) for one in encoder.parameters())
        except (IndexError, RuntimeError):
            # The line search has words of its own for slopes that are not finite, or lead to a step that overflows.
            if all(one.grad is None or bool(one.grad.abs().max() < 1e15) for one in encoder.parameters()):
                raise
            finite = False
        if not finite:
            raise ValueError("the fit diverged: scale the inputs down, or take an encoder with a bounded output")
        if self.encoder is None:
            self.theta_ = encoder.weight.detach().numpy() / unit  # type: ignore[operator]
        else:
            self.encoder_ = encoder
        return self

    def transform(self, X: ArrayLike) -> Array:
        """f(x), (n, r)."""
        check_is_fitted(self)
        return self._embedded(validate_data(self, X, reset=False, dtype=np.float64))

    def _embedded(self, samples: Array) -> Array:
        if self.encoder is None:
            return samples @ self.theta_.T
        with torch.no_grad():
            given = torch.from_numpy(samples).to(next(self.encoder_.parameters()))
            return self.encoder_(given).double().cpu().numpy()

    def score(self, pairs: Pairs, y: None = None) -> float:
        """Mean log-likelihood of pairs, in nats."""
        check_is_fitted(self)
        X, other, similar = _pairs(self, pairs)
        embedded, to = (torch.from_numpy(self._embedded(one)) for one in (X, other))
        return -float(contrastive_loss(embedded, to, torch.from_numpy(similar)))


class PretrainedFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fit a latent-variable model to unlabelled data, then a small predictor from its features to labels (arXiv 2303.01566).

    The model sees no labels. With a factor model the excess risk is of order sqrt(d r / m) + sqrt(r / n), against
    sqrt(d / n) for n labelled samples alone.

    Args:
        model: `FactorModel`, `MixtureModel`, `ContrastiveModel`, or anything with `fit(X)` and `transform(X)`. One that
            is fitted already goes in as `sklearn.frozen.FrozenEstimator(model)`.
        predictor: Estimator of y from features; by default least squares, and `ComponentTable` for a mixture.
        clip: Bound on what a regressor predicts, |y| <= clip, as the theory has it; None for none.

    Attributes:
        model_: The fitted model.
        predictor_: The fitted predictor.

    Raises:
        ValueError: Fewer labelled samples than least squares has coefficients, or what the model refuses.

    Example:
        >>> random = np.random.default_rng(0)
        >>> z, loadings = random.normal(size=(500, 2)), random.normal(size=(2, 30))
        >>> x, y = z @ loadings + random.normal(size=(500, 30)), z[:, 0]
        >>> pretrained = PretrainedFeatures(FactorModel(2)).fit(x[:20], y[:20], X_unlabeled=x[20:])
        >>> bool(pretrained.score(x[20:], y[20:]) > 0.8)
        True
    """

    def __init__(self, model: Any, predictor: Any = None, *, clip: float | None = None) -> None:
        self.model = model
        self.predictor = predictor
        self.clip = clip

    def fit(self, X: ArrayLike, y: ArrayLike, X_unlabeled: ArrayLike | None = None, pairs: Pairs | None = None) -> Self:
        """Fit both steps.

        Args:
            X: Labelled samples (n, d); without labels they are added to the unlabelled ones.
            y: Their labels or targets (n,).
            X_unlabeled: Unlabelled samples (m, d).
            pairs: For a contrastive model, (X, X', s) in place of unlabelled samples.
        """
        samples, y = _labelled(self, X, y)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is above 0, or None, got {self.clip}")
        if pairs is not None and X_unlabeled is not None:
            raise ValueError("give X_unlabeled or pairs, not both: a model is fitted to one of them")
        self.model_ = clone(self.model, safe=False).fit(_observed(self, samples, X_unlabeled, pairs), None)
        Z = self._features(X, samples)
        self.predictor_ = clone(self._predictor())
        if isinstance(self.predictor_, LinearRegression) and len(Z) < Z.shape[1] + self.predictor_.fit_intercept:
            raise ValueError(
                f"least squares on {Z.shape[1]} features is not determined by n_samples={len(Z)} with labels: label more, "
                "take fewer components, or predictor=Ridge()"
            )
        self.predictor_.fit(Z, y)
        return self

    def transform(self, X: ArrayLike) -> Array:
        """Features of samples (n, r)."""
        check_is_fitted(self)
        return self._features(X, validate_data(self, X, reset=False, dtype=np.float64))

    def _features(self, X: ArrayLike, checked: Array) -> Array:
        # A frozen model that was fitted to named columns checks the names itself.
        return self.model_.transform(X if hasattr(self.model_, "feature_names_in_") else checked)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels or targets of samples (n,)."""
        check_is_fitted(self)
        predicted = self.predictor_.predict(self.transform(X))
        return predicted if self.clip is None else np.clip(predicted, -self.clip, self.clip)

    @available_if(lambda self: hasattr(self._predictor(), "predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: ArrayLike) -> Array:
        """Probability of each class (n, classes)."""
        check_is_fitted(self)
        return self.predictor_.predict_proba(self.transform(X))

    @property
    def classes_(self) -> NDArray[Any]:
        """Class labels, of a classifier."""
        return self.predictor_.classes_

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Accuracy of a classifier, R^2 of a regressor."""
        return float((accuracy_score if is_classifier(self) else r2_score)(y, self.predict(X)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what was fitted as safetensors and JSON.

        Raises:
            TypeError: The model or predictor is not one of this module, `LinearRegression`, `Ridge` or `LogisticRegression`.
        """
        check_is_fitted(self)
        config: dict[str, Any] = {
            "clip": self.clip,
            "n_features": self.n_features_in_,
            "features": list(getattr(self, "feature_names_in_", [])),
        }
        arrays: dict[str, NDArray[Any]] = {}
        for part in ("model", "predictor"):
            fitted = getattr(self, f"{part}_")
            fitted = fitted.estimator if isinstance(fitted, FrozenEstimator) else fitted
            if _SAVED.get(type(fitted).__name__) is not type(fitted) or hasattr(fitted, "encoder_"):
                raise TypeError(f"{fitted} cannot be saved, only {', '.join(_SAVED)}: keep its parameters yourself")
            values = {name: np.asarray(value) for name, value in vars(fitted).items() if name.endswith("_")}
            text = {name: value.tolist() for name, value in values.items() if value.dtype.kind in "UO"}
            options = {name: value for name, value in fitted.get_params().items() if name != "random_state"}
            numbers = sorted(values.keys() - text.keys())
            config[part] = {"class": type(fitted).__name__, "options": options, "fitted": text, "arrays": numbers}
            arrays |= {f"{part}.{name}": np.array(values[name], order="C") for name in numbers}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Options may be of NumPy's types.
        written = json.dumps(config, indent=1, default=lambda value: value.tolist())
        (folder / "config.json").write_text(written, encoding="utf-8")
        save_file(arrays, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds none, or a damaged one.
        """
        parts = {}
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            arrays = load_file(Path(folder) / "model.safetensors")
            for part in ("model", "predictor"):
                kept = config[part]
                parts[part] = fitted = _SAVED[kept["class"]](**kept["options"])
                for name, text in kept["fitted"].items():
                    setattr(fitted, name, np.asarray(text, dtype=object if name == "feature_names_in_" else None))
                for name in kept["arrays"]:
                    value = arrays[f"{part}.{name}"]
                    setattr(fitted, name, value if value.ndim else value.item())
            found = cls(**parts, clip=config["clip"])
            found.n_features_in_ = config["n_features"]
            if config["features"]:
                found.feature_names_in_ = np.array(config["features"], dtype=object)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}, or a damaged one: {error}") from error
        found.model_, found.predictor_ = parts["model"], parts["predictor"]
        return found

    def _predictor(self) -> Any:
        return (
            self.predictor
            if self.predictor is not None
            else getattr(self.model, "default_predictor", LinearRegression)()
        )

    def __sklearn_tags__(self) -> Any:
        tags, inner = super().__sklearn_tags__(), get_tags(self._predictor())
        tags.estimator_type, tags.target_tags = inner.estimator_type, inner.target_tags
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        tags.target_tags.required = True
        return tags


_SAVED: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (
        FactorModel, MixtureModel, ContrastiveModel, ComponentTable, LinearRegression, Ridge, LogisticRegression,
    )
}  # fmt: skip


class PretrainingGain(NamedTuple):
    """The two bounds up to constants: to compare with each other, not to certify a risk.

    Attributes:
        pretrained: kappa sqrt(C_phi / m) + sqrt(C_psi / n).
        supervised: sqrt(C_joint / n).
    """

    pretrained: float
    supervised: float

    @property
    def ratio(self) -> float:
        """Supervised over pretrained; above 1 pretraining should pay."""
        return self.supervised / self.pretrained


def pretraining_gain(
    m: int, n: int, *, C_phi: float, C_psi: float, C_joint: float, kappa: float = 1.0
) -> PretrainingGain:
    """Bounds on the excess risk with and without pretraining, without their constants.

    Args:
        m: Unlabelled samples.
        n: Labelled samples.
        C_phi: Complexity of the latent-variable models: d r for r factors, d K for K components.
        C_psi: Of the predictors: r, or K.
        C_joint: Of the predictors from x to y that both make up: d for factors.
        kappa: Inverse informativeness, of `informativeness`.

    Raises:
        ValueError: A value is not positive.

    Example:
        >>> round(pretraining_gain(100_000, 80, C_phi=800, C_psi=4, C_joint=200).ratio, 1)
        5.1
    """
    if not all(0 < value < math.inf for value in (m, n, C_phi, C_psi, C_joint, kappa)):
        raise ValueError("m, n, the complexities and kappa are finite and above 0")
    return PretrainingGain(kappa * math.sqrt(C_phi / m) + math.sqrt(C_psi / n), math.sqrt(C_joint / n))


@dataclass(frozen=True)
class Informativeness:
    """How far a model's latent variable moves when its fit to x does.

    Attributes:
        joint: KL of p(x, z) after the best rotation or permutation of z, one a bootstrap fit, in nats.
        marginal: KL of p(x).
    """

    joint: Array
    marginal: Array

    @property
    def kappa(self) -> float:
        """Largest sqrt(joint / 2) / sqrt(marginal / 2): these bound total variation by Pinsker. At least 1 but for draws."""
        return float(np.sqrt(self.joint / self.marginal).max())

    def plot(self) -> Any:
        """The two distances of each bootstrap fit, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.scatter(np.sqrt(self.marginal / 2), np.sqrt(self.joint / 2), color="#1f6f8b")
        axes.axline((0, 0), slope=self.kappa, color="#c8553d", label=f"kappa {self.kappa:.2f}")
        axes.set(xlabel="distance of p(x)", ylabel="distance of p(x, z)")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def informativeness(
    model: FactorModel | MixtureModel,
    X: ArrayLike,
    *,
    draws: int = 20,
    random_state: int | np.random.RandomState | None = None,
) -> Informativeness:
    """Estimate kappa: bootstrap fits against the fit to all samples, which stands for the truth.

    Args:
        model: A factor model or mixture; it is copied.
        X: Samples (m, d).
        draws: Bootstrap fits.
        random_state: Of the bootstrap, and of the draws that a mixture's p(x) takes.

    Raises:
        TypeError: The model is neither.
        ValueError: `draws` is below 1, or what the model refuses.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 5)) * [3, 2, 1, 1, 1]
        >>> informativeness(FactorModel(2), x, draws=5, random_state=0).kappa >= 1
        True
    """
    if not isinstance(model, FactorModel | MixtureModel):
        raise TypeError(f"kappa is estimated for a FactorModel or MixtureModel, got {type(model).__name__}")
    if draws < 1:
        raise ValueError(f"draws is at least 1, got {draws}")
    samples, random = check_array(X, dtype=np.float64), check_random_state(random_state)
    true = clone(model).fit(samples)
    fits = (clone(model).fit(samples[random.randint(len(samples), size=len(samples))]) for _ in range(draws))
    joint, marginal = np.array([one.divergences(true, random) for one in fits]).T
    return Informativeness(joint, marginal)


@dataclass(frozen=True)
class PretrainingReport:
    """Whether pretraining pays, by cross-validation.

    Attributes:
        likelihoods: Held-out mean log-likelihood of each candidate, in nats.
        model: The likeliest candidate, fitted to all samples.
        risks: "pretrained", "supervised" and "stacked": squared error or 0-1 loss of each fold.
    """

    likelihoods: dict[str, float]
    model: Any
    risks: dict[str, Array]

    @property
    def choice(self) -> str:
        """Least risk of pretrained and supervised, and the two stacked where that is better by a standard error."""
        best = min(("pretrained", "supervised"), key=lambda name: self.risks[name].mean())
        gained = self.risks[best] - self.risks["stacked"]
        return "stacked" if gained.mean() > gained.std(ddof=1) / math.sqrt(len(gained)) else best

    def __str__(self) -> str:
        told = ", ".join(f"{name} {values.mean():.4g}" for name, values in self.risks.items())
        return f"{self.model}: cross-validated risk {told}. Take {self.choice}."

    def plot(self) -> Any:
        """Likelihoods of the candidates and the risks, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(list(self.likelihoods), list(self.likelihoods.values()), "o-", color="#1f6f8b")
        left.tick_params(axis="x", rotation=30)
        left.set_ylabel("held-out log-likelihood")
        right.boxplot(list(self.risks.values()), tick_labels=list(self.risks))
        right.set_ylabel("cross-validated risk")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def compare_pretraining(
    X: ArrayLike,
    y: ArrayLike,
    models: Sequence[Any] | Mapping[str, Any],
    *,
    X_unlabeled: ArrayLike | None = None,
    pairs: Pairs | None = None,
    predictor: Any = None,
    baseline: Any = None,
    folds: int = 5,
    repeats: int = 4,
    random_state: int | np.random.RandomState | None = None,
) -> PretrainingReport:
    """Choose a model by held-out likelihood, and say whether it beats learning from the labels alone.

    Args:
        X: Labelled samples (n, d).
        y: Their labels or targets (n,).
        models: Candidates, say factor models of several sizes; by name, or by what they print as.
        X_unlabeled: Unlabelled samples (m, d).
        pairs: For contrastive models, (X, X', s).
        predictor: As in `PretrainedFeatures`.
        baseline: Supervised estimator; by default ridge regression with a cross-validated penalty, or logistic
            regression, on standardised features.
        folds: Of cross-validation, over samples for likelihoods and over labels for risks.
        repeats: Of cross-validation over labels.
        random_state: Of the folds.

    Raises:
        ValueError: No candidates, or what a model refuses.

    Example:
        >>> random = np.random.default_rng(0)
        >>> z, loadings = random.normal(size=(500, 2)), random.normal(size=(2, 30))
        >>> x, y = z @ loadings + random.normal(size=(500, 30)), z[:, 0]
        >>> models = [FactorModel(r) for r in (1, 2, 3)]
        >>> report = compare_pretraining(x[:30], y[:30], models, X_unlabeled=x[30:], random_state=0)
        >>> report.model, report.choice
        (FactorModel(n_components=2), 'pretrained')
    """
    candidates = dict(models) if isinstance(models, Mapping) else {str(one): one for one in models}
    if not candidates:
        raise ValueError("models is empty: give candidates, say [FactorModel(r) for r in (1, 2, 4)]")
    random = check_random_state(random_state)
    checks = PretrainedFeatures(next(iter(candidates.values())), predictor)
    X, y = _labelled(checks, X, y)
    seen = _observed(checks, X, X_unlabeled, pairs)
    splits = list(KFold(folds, shuffle=True, random_state=random).split(seen[0] if isinstance(seen, tuple) else seen))
    likelihoods = {
        name: float(np.mean([clone(one).fit(_rows(seen, kept)).score(_rows(seen, out)) for kept, out in splits]))
        for name, one in candidates.items()
    }
    model = clone(candidates[max(likelihoods, key=likelihoods.__getitem__)]).fit(seen)

    # The model has seen these x, never their labels: folds over labels need no new fit of it.
    pretrained = PretrainedFeatures(FrozenEstimator(model), predictor)
    classify = is_classifier(pretrained)
    if baseline is None:
        plain = LogisticRegression(max_iter=1000) if classify else RidgeCV(np.logspace(-3, 5, 17))
        baseline = make_pipeline(StandardScaler(), plain)
    both = [("pretrained", pretrained), ("supervised", baseline)]
    stacked = (
        StackingClassifier(both) if classify else StackingRegressor(both, LinearRegression(fit_intercept=False, positive=True))
    )  # fmt: skip
    folding, risk = (RepeatedStratifiedKFold, zero_one_loss) if classify else (RepeatedKFold, mean_squared_error)
    folded = list(folding(n_splits=folds, n_repeats=repeats, random_state=random).split(X, y))
    risks = {
        name: np.array([risk(y[out], clone(one).fit(X[kept], y[kept]).predict(X[out])) for kept, out in folded])
        for name, one in (*both, ("stacked", stacked))
    }
    if hasattr(checks, "feature_names_in_"):
        model.feature_names_in_ = checks.feature_names_in_
    return PretrainingReport(likelihoods, model, risks)


def _labelled(estimator: Any, X: ArrayLike, y: ArrayLike) -> tuple[Array, NDArray[Any]]:
    """Samples in float64 and their labels or targets, both without gaps; keeps the columns' names."""
    classify = is_classifier(estimator)
    samples, targets = validate_data(
        estimator, X, _without_gaps(y) if classify else y, dtype=np.float64, multi_output=not classify,
        y_numeric=not classify,
    )  # fmt: skip
    return samples, _classes(targets) if classify else targets


def _classes(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels, once they are known to name classes."""
    check_classification_targets(labels)
    return labels


def _without_gaps(labels: ArrayLike) -> ArrayLike:
    """Labels none of which is None, NaN or pandas' NA, of which NumPy would make a class "nan" where others are text."""
    if labels is not None and any(map(_is_gap, np.asarray(labels, dtype=object).ravel())):
        raise ValueError("y contains NaN, None or NA, which are no class: take these samples out")
    return labels


def _is_gap(label: Any) -> bool:
    try:
        return label is None or not bool(label == label)
    except TypeError:
        return True


def _observed(estimator: Any, X: Array, X_unlabeled: ArrayLike | None, pairs: Pairs | None) -> Any:
    """What a model is fitted to: the pairs, or labelled and unlabelled samples together, of the same columns as X."""
    if pairs is not None:
        _three(pairs)
        return (*(validate_data(estimator, one, reset=False, dtype=np.float64) for one in pairs[:2]), pairs[2])
    if X_unlabeled is None:
        return X
    return np.concatenate([validate_data(estimator, X_unlabeled, reset=False, dtype=np.float64), X])


def _rows(data: Any, chosen: NDArray[np.int64]) -> Any:
    return tuple(np.asarray(one)[chosen] for one in data) if isinstance(data, tuple) else data[chosen]


def _log_joint(X: Array, means: Array, weights: Array, variance: float) -> Array:
    constant = X.shape[1] * math.log(2 * math.pi * variance)
    with np.errstate(divide="ignore"):
        return np.log(weights) - (cdist(X, means, "sqeuclidean") / variance + constant) / 2


def _shares(Z: Array) -> Array:
    """Responsibilities, once they are known to be some."""
    # float32's add up to 1 but for rounding.
    if Z.min() < 0 or np.abs(Z.sum(1) - 1).max() > 1e-3:
        raise ValueError("responsibilities are at least 0 and add up to 1: take another predictor for other features")
    return Z


def _varied(samples: Array) -> Array:
    """Samples that a density can be fitted to."""
    if bool((samples == samples[0]).all()):
        raise ValueError(f"a density takes two or more samples that differ, got n_samples={len(samples)} of one value")
    return samples


def _three(pairs: Pairs) -> None:
    if not isinstance(pairs, tuple | list) or len(pairs) != 3:
        raise ValueError("a contrastive model is fitted to pairs (X, X', s): give PretrainedFeatures.fit its pairs")


def _pairs(estimator: Any, pairs: Pairs, *, reset: bool = False) -> tuple[Array, Array, Array]:
    _three(pairs)
    X = validate_data(estimator, pairs[0], reset=reset, dtype=np.float64)
    other = validate_data(estimator, pairs[1], reset=False, dtype=np.float64)
    similar = check_array(pairs[2], dtype=np.float64, ensure_2d=False, input_name="s")
    check_consistent_length(X, other, similar)
    values = set(np.unique(similar))
    if X.shape != other.shape or not (values == {0.0, 1.0} or values == {-1.0, 1.0}):
        raise ValueError(
            f"X and X' have one shape and s is of 0 and 1 or -1 and 1, got {X.shape}, {other.shape}, {values}"
        )
    return X, other, (similar > 0).astype(np.float64)
