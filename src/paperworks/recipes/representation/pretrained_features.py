"""Pretraining on unlabelled data against labels alone: factors, clusters, contrastive pairs, and digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

EXCESS = "excess risk"
ERROR = "test error"


@recipe(
    "pretrained-features",
    baseline="ridge or logistic regression on the labelled samples alone",
    headline="exponent of m",
    tiny={"dims": 40, "largest": 1600, "sizes": 3, "pairs": 2000, "digits": 400, "components": 5, "repeats": 3},
    large={"largest": 204_800, "sizes": 7, "pairs": 100_000, "repeats": 50},
)
def pretrained_features(
    run: Run,
    dims: int = 200,
    factors: int = 4,
    labelled: int = 80,
    smallest: int = 50,
    largest: int = 12_800,
    sizes: int = 5,
    pairs: int = 20_000,
    digits: int = 1797,
    components: int = 10,
    repeats: int = 10,
    seed: int = 0,
) -> None:
    """Excess risk by the number of unlabelled samples, and what pretraining gains over the labels alone.

    Factor models: excess risks are exact, of the Gaussian the data are drawn from. The part that the model's error
    causes is what the best predictor on its features leaves; its fall with m is held against the bound's m^(-1/2), and
    a target that the factors do not tell anything about shows what the informative condition is for. Then Gaussian
    mixtures with binary labels by component, contrastive pairs with a linear embedding, and digits, odd or even.

    Args:
        run: Keeps what is measured.
        dims: Features of the factor model.
        factors: Of the factor model.
        labelled: Samples with targets; half as many for the mixture, 30 for the pairs and 20 for digits.
        smallest: Unlabelled samples to begin with.
        largest: Unlabelled samples at most.
        sizes: How many numbers of them, spaced geometrically.
        pairs: Of the contrastive model.
        digits: Images in all; a quarter is for the test.
        components: Of the mixture on digits; another has three times as many, which cost labels.
        repeats: Draws of everything.
        seed: Of the draws.
    """
    import numpy as np

    from paperworks.representation import FactorModel, PretrainedFeatures

    grid = np.geomspace(smallest, largest, sizes).round().astype(int)
    randoms = np.random.default_rng(seed).spawn(repeats)
    drawn = [_by_size(dims, factors, labelled, grid, random) for random in run.progress(randoms, "factor models")]
    pretrained, of_model, uninformed = (np.array(one) for one in list(zip(*drawn, strict=True))[:3])
    supervised, oracle = [one.supervised for one in drawn], [one.oracle for one in drawn]
    for m, excess, part, kept in zip(grid, pretrained.T, of_model.T, uninformed.T, strict=True):
        run.ratio(
            EXCESS, method=excess.tolist(), baseline=supervised, better="lower", series=f"pretrained, m = {m}", against="ridge",
        )  # fmt: skip
        run.record(EXCESS, float(excess.mean()), better="lower", series=f"pretrained, m = {m}")
        run.record("excess risk of the model", float(part.mean()), better="lower", series=f"m = {m}")
        run.record("excess risk, uninformative target", float(kept.mean()), better="lower", series=f"m = {m}")
    run.record(EXCESS, float(np.mean(supervised)), better="lower", series="ridge")
    run.record(EXCESS, float(np.mean(oracle)), better="lower", series="true model")
    slopes = -np.polyfit(np.log(grid), np.log(of_model).T, 1)[0]
    run.record("exponent of m", float(slopes.mean()), better="higher", series="measured")
    run.ratio(
        "exponent of m", method=slopes.tolist(), baseline=[0.5] * repeats, series="measured", against="the bound's 1/2"
    )

    clustered = [_clusters(labelled // 2, largest // 4, random) for random in run.progress(randoms, "mixtures")]
    embedded = [_pairs(pairs, 30, random) for random in run.progress(randoms, "contrastive pairs")]
    counts = (components, 3 * components)
    of_digits = [f"pretrained, K = {count}" for count in counts]
    for metric, task, rows, ours, against in (
        (ERROR, "mixture", clustered, ["pretrained"], "logistic regression"),
        (EXCESS, "contrastive", embedded, ["pretrained"], "ridge"),
        (ERROR, "digits", _digits(digits, 20, counts, repeats, seed), of_digits, "logistic regression"),
    ):
        *methods, theirs = (list(one) for one in zip(*rows, strict=True))
        run.record(metric, float(np.mean(theirs)), better="lower", series=f"{task}, {against}")
        for name, values in zip(ours, methods, strict=True):
            run.record(metric, float(np.mean(values)), better="lower", series=f"{task}, {name}")
            run.ratio(
                metric, method=values, baseline=theirs, better="lower", series=f"{task}, {name}", against=against
            )  # fmt: skip

    x, y = (random := randoms[0]).normal(size=(largest, dims)), random.normal(size=labelled)
    run.compare(
        baseline=("ridge", lambda: ridge().fit(x[:labelled], y)),
        method={"pretrained": lambda: PretrainedFeatures(FactorModel(factors)).fit(x[:labelled], y, x[labelled:])},
        repeats=2,
    )
    run.figure(_figure(grid, pretrained, of_model, uninformed, supervised, oracle))


class BySize(NamedTuple):
    """Excess risks of one draw; the first three for each number of unlabelled samples."""

    pretrained: list[float]
    of_model: list[float]
    uninformed: list[float]
    supervised: float
    oracle: float


def ridge() -> Any:
    """Ridge regression with the penalty that leave-one-out error chooses."""
    import numpy as np
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-2, 5, 29))


def _by_size(dims: int, factors: int, labelled: int, grid: NDArray[np.int64], random: np.random.Generator) -> BySize:
    """Factor models fitted to more and more of the same samples, for the same labelled ones."""
    import numpy as np
    from scipy.linalg import null_space
    from sklearn.frozen import FrozenEstimator

    from paperworks.representation import FactorModel, PretrainedFeatures

    B = 0.25 * random.normal(size=(dims, factors))
    beta = random.normal(size=factors)
    beta /= np.linalg.norm(beta)
    aside = null_space(B.T)[:, 0]
    # Its variance is half the noise's, so that no factor is spent on it.
    covariance = B @ B.T + np.eye(dims) - 0.5 * np.outer(aside, aside)

    def draw(size: int) -> tuple[Array, Array, Array]:
        z, noise = random.normal(size=(size, factors)), random.normal(size=(size, dims))
        noise -= (1 - np.sqrt(0.5)) * np.outer(noise @ aside, aside)
        x, error = z @ B.T + noise, 0.3 * random.normal(size=size)
        return x, z @ beta + error, np.sqrt(2) * x @ aside + error

    best = np.linalg.solve(covariance, B @ beta)

    def excess(fitted: Any, of: Array) -> float:
        offset = fitted.predict(np.zeros((1, dims)))
        error = fitted.predict(np.eye(dims)) - offset - of
        return float(error @ covariance @ error + offset[0] ** 2)

    def left(model: FactorModel) -> float:
        """Excess risk of the best linear predictor on the model's features."""
        weights = np.linalg.cholesky(covariance).T
        features = weights @ (model.transform(np.eye(dims)) - model.transform(np.zeros((1, dims))))
        target = weights @ best
        return float(((target - features @ np.linalg.lstsq(features, target)[0]) ** 2).sum())

    (x, y, other), unlabelled = draw(labelled), draw(int(grid[-1]))[0]
    at_sizes: tuple[list[float], list[float], list[float]] = ([], [], [])
    for m in grid:
        informed = PretrainedFeatures(FactorModel(factors)).fit(x, y, X_unlabeled=unlabelled[:m])
        blind = PretrainedFeatures(FrozenEstimator(informed.model_)).fit(x, other)
        figures = excess(informed, best), left(informed.model_), excess(blind, np.sqrt(2) * aside)
        for kept, figure in zip(at_sizes, figures, strict=True):
            kept.append(figure)
    true = FactorModel(factors)
    true.mean_, true.loadings_, true.noise_variance_ = np.zeros(dims), B, 1.0
    oracle = excess(PretrainedFeatures(FrozenEstimator(true)).fit(x, y), best)
    return BySize(*at_sizes, excess(ridge().fit(x, y), best), oracle)


def _clusters(labelled: int, unlabelled: int, random: np.random.Generator) -> tuple[float, float]:
    """Test errors with and without pretraining where a label goes by the component of 8 in 30 dimensions."""
    from sklearn.linear_model import LogisticRegression

    from paperworks.representation import MixtureModel, PretrainedFeatures

    means, table = random.normal(size=(8, 30)), random.permutation([0, 0, 0, 0, 1, 1, 1, 1])
    z = random.integers(8, size=labelled + unlabelled + 4000)
    x = means[z] + random.normal(size=(len(z), 30))
    y = table[z]
    seen, test = slice(labelled), slice(labelled + unlabelled, None)
    model = MixtureModel(8, random_state=int(random.integers(2**31)))
    ours = PretrainedFeatures(model).fit(x[seen], y[seen], X_unlabeled=x[labelled : labelled + unlabelled])
    theirs = LogisticRegression(max_iter=1000).fit(x[seen], y[seen])
    return 1 - ours.score(x[test], y[test]), 1 - float(theirs.score(x[test], y[test]))


def _pairs(size: int, labelled: int, random: np.random.Generator) -> tuple[float, float]:
    """Excess risks with and without pretraining on pairs, of 50 features that embed in 3 dimensions."""
    import numpy as np

    from paperworks.representation import ContrastiveModel, PretrainedFeatures

    theta, beta = 0.2 * random.normal(size=(3, 50)), random.normal(size=3)
    weights = beta @ theta / np.linalg.norm(beta @ theta)
    x, other = random.normal(size=(2, size, 50))
    similar = random.random(size) < 1 / (1 + np.exp(-((x @ theta.T) * (other @ theta.T)).sum(1)))
    seen = random.normal(size=(labelled, 50))
    y = seen @ weights + 0.3 * random.normal(size=labelled)

    def excess(fitted: Any) -> float:
        offset = fitted.predict(np.zeros((1, 50)))
        return float(((fitted.predict(np.eye(50)) - offset - weights) ** 2).sum() + offset[0] ** 2)

    model = ContrastiveModel(3, random_state=int(random.integers(2**31)))
    return excess(PretrainedFeatures(model).fit(seen, y, pairs=(x, other, similar))), excess(ridge().fit(seen, y))


def _digits(size: int, labelled: int, counts: Sequence[int], repeats: int, seed: int) -> list[tuple[float, ...]]:
    """Test errors of odd against even for each number of components, and without pretraining; only the labels change."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    from paperworks.representation import MixtureModel, PretrainedFeatures

    x, digit = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x[:size] / 16, digit[:size] % 2, test_size=0.25, random_state=seed)
    learners = [
        *(PretrainedFeatures(FrozenEstimator(MixtureModel(K, random_state=seed).fit(x))) for K in counts),
        LogisticRegression(max_iter=1000),
    ]
    chosen = [random.permutation(len(x))[:labelled] for random in np.random.default_rng(seed).spawn(repeats)]
    return [tuple(1 - float(one.fit(x[few], y[few]).score(x_test, y_test)) for one in learners) for few in chosen]


def _figure(
    grid: NDArray[np.int64],
    pretrained: Array,
    of_model: Array,
    uninformed: Array,
    supervised: list[float],
    oracle: list[float],
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(grid, pretrained.mean(0), "o-", color="#1f6f8b", label="pretrained")
    left.loglog(grid, uninformed.mean(0), "o-", color="#c9a66b", label="pretrained, uninformative target")
    for values, label, colour in ((supervised, "ridge", "#c8553d"), (oracle, "true model", "#777777")):
        left.axhline(sum(values) / len(values), label=label, color=colour, linestyle="--")
    # Room for the legend above the lines.
    left.set(xlabel="unlabelled samples m", ylabel="excess risk", ylim=(None, 30))
    right.loglog(grid, of_model.mean(0), "o-", color="#1f6f8b", label="excess risk of the model")
    right.loglog(grid, of_model[:, -1].mean() * (grid / grid[-1]) ** -0.5, ":", color="#777777", label="slope -1/2")
    right.set(xlabel="unlabelled samples m")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
