"""Pretraining on unlabelled data against labels alone: factors, clusters, contrastive pairs, and digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.samples import CLASSED, Samples, samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

EXCESS, UNINFORMED = "excess risk", "excess risk, uninformative target"
ERROR = "test error"
LOGISTIC, SPREADING = "logistic regression", "label spreading"
# A quarter of the samples is for the test.
TEST_TO_TRAIN = 1 / 3


@recipe(
    "pretrained-features",
    baseline="ridge or logistic regression on the labelled samples alone, and label spreading",
    tiny={"dims": 40, "largest": 1600, "sizes": 3, "pairs": 2000, "digits": 400, "components": 5, "repeats": 3},
    large={"largest": 204_800, "sizes": 7, "pairs": 100_000, "repeats": 50},
    columns=(
        EXCESS, f"{EXCESS} against ridge", f"{UNINFORMED} against ridge", ERROR, f"{ERROR} against {LOGISTIC}",
        f"{ERROR} against {SPREADING}",
    ),
    rows=("pretrained, m = *", "true model", "mixture, pretrained", "contrastive, pretrained", "*, pretrained, K = *"),
)  # fmt: skip
def pretrained_features(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    dims: Annotated[int, Between(1, 400)] = 200,
    factors: Annotated[int, Between(1, 16)] = 4,
    labelled: Annotated[int, Between(2, 320)] = 80,
    smallest: Annotated[int, Between(1, 200)] = 50,
    largest: Annotated[int, Between(1, 51_200)] = 12_800,
    sizes: Annotated[int, Between(2, 12)] = 5,
    pairs: Annotated[int, Between(1, 80_000)] = 20_000,
    digits: Annotated[int, Between(20, 1797)] = 1797,
    components: Annotated[int, Between(1, 40)] = 10,
    repeats: Annotated[int, Between(2, 40)] = 10,
    seed: int = 0,
) -> None:
    """Excess risk by the numbers of unlabelled and labelled samples, against learning from the labels alone.

    Factor models: excess risks are exact, of the Gaussian the data are drawn from. Pretraining is held against ridge
    regression at equal labelled samples, for each number m of unlabelled and n of labelled ones. The bound says that the
    part which the model's error causes, what the best predictor on its features leaves, falls at least as fast as m^(-1/2),
    and the rest as n^(-1/2); whether the exponents keep to that is counted, a faster fall being no gain. A target that the
    factors do not tell anything about shows what the informative condition is for, and kappa how informative a model is.

    Then Gaussian mixtures with binary labels by component, contrastive pairs with a linear embedding, and digits, odd or
    even, or your own samples and classes, each time with another split, model and labels. Penalties of the baselines are chosen by cross-validation; label
    spreading uses the unlabelled samples too.

    Args:
        run: Keeps what is measured.
        data: What a mixture model learns before it sees labels: a table or folder of images of your own, or a name.
        dims: Features of the factor model.
        factors: Of the factor model.
        labelled: Samples with targets, and from a quarter of them to four times as many; half as many for the mixture, 30
            for the pairs and 20 for digits, or four of each class.
        smallest: Unlabelled samples to begin with.
        largest: Unlabelled samples at most.
        sizes: How many numbers of them, spaced geometrically.
        pairs: Of the contrastive model.
        digits: Samples of `data` in all, at most; a quarter is for the test.
        components: Of the mixture on them; another has three times as many, which cost labels.
        repeats: Draws of everything.
        seed: Of the draws.
    """
    import numpy as np

    from paperworks.representation import FactorModel, PretrainedFeatures

    grid = np.geomspace(smallest, largest, sizes).round().astype(int)
    counts = np.array([n for n in (labelled * 2**power // 4 for power in range(5)) if n > factors])
    randoms = np.random.default_rng(seed).spawn(repeats)
    drawn = [
        _by_size(dims, factors, labelled, grid, counts, random) for random in run.progress(randoms, "factor models")
    ]
    _record_factors(run, grid, counts, labelled, drawn)

    clustered = [_clusters(labelled // 2, largest // 4, random) for random in run.progress(randoms, "mixtures")]
    embedded = [_pairs(pairs, 30, random) for random in run.progress(randoms, "contrastive pairs")]
    sizes_of_mixture = (components, 3 * components)
    own = samples(data)
    numbers = run.progress(range(seed, seed + repeats), own.name)
    of_data = [_of_data(own, digits, 20, sizes_of_mixture, number) for number in numbers]
    for metric, task, rows, ours, theirs, share in (
        (ERROR, "mixture", clustered, ["pretrained"], [LOGISTIC, SPREADING], None),
        (EXCESS, "contrastive", embedded, ["pretrained"], ["ridge"], None),
        (ERROR, own.name, of_data, [f"pretrained, K = {count}" for count in sizes_of_mixture], [LOGISTIC, SPREADING], TEST_TO_TRAIN),
    ):  # fmt: skip
        found = dict(zip([*ours, *theirs], ([*one] for one in zip(*rows, strict=True)), strict=True))
        for name, values in found.items():
            run.mean(metric, values, better="lower", series=f"{task}, {name}")
        # Some errors are 0, so that there may be no ratio of them; excess risks are above it.
        held = run.difference if metric == ERROR else run.ratio
        for name in ours:
            for against in theirs:
                held(
                    metric, method=found[name], baseline=found[against], better="lower", series=f"{task}, {name}",
                    against=against, test_to_train=share,
                )  # fmt: skip
    run.mean("kappa", [one.kappa for one in drawn], better="lower", series="factor model")
    kappas = [_kappa_of_mixture(random) for random in run.progress(randoms, "informativeness")]
    run.mean("kappa", kappas, better="lower", series="mixture")

    x, y = (random := randoms[0]).normal(size=(largest, dims)), random.normal(size=labelled)
    run.compare(
        baseline=("ridge", lambda: ridge().fit(x[:labelled], y)),
        method={"pretrained": lambda: PretrainedFeatures(FactorModel(factors)).fit(x[:labelled], y, x[labelled:])},
        repeats=2,
    )
    run.figure(_figure(grid, counts, labelled, drawn))


class BySize(NamedTuple):
    """Excess risks of one draw.

    `pretrained`, `of_model` and `uninformed` are by the number of unlabelled samples, `pretrained_by_labels` and
    `ridge_by_labels` by that of labelled ones at most unlabelled ones; `kappa` is of the model that has seen most but one.
    """

    pretrained: list[float]
    of_model: list[float]
    uninformed: list[float]
    pretrained_by_labels: list[float]
    ridge_by_labels: list[float]
    oracle_by_labels: list[float]
    supervised: float
    supervised_uninformed: float
    oracle: float
    kappa: float


def _record_factors(
    run: Run, grid: NDArray[np.int64], counts: NDArray[np.int64], labelled: int, drawn: Sequence[BySize]
) -> None:
    import numpy as np

    pretrained, of_model, uninformed, ours, theirs, oracles = (
        np.array(one) for one in list(zip(*drawn, strict=True))[:6]
    )
    supervised, uninformed_ridge = [one.supervised for one in drawn], [one.supervised_uninformed for one in drawn]
    for m, excess, part, kept in zip(grid, pretrained.T, of_model.T, uninformed.T, strict=True):
        series = f"pretrained, m = {m}, n = {labelled}"
        for name, values, baseline in ((EXCESS, excess, supervised), (UNINFORMED, kept, uninformed_ridge)):
            run.mean(name, values.tolist(), better="lower", series=series)
            run.ratio(name, method=values.tolist(), baseline=baseline, better="lower", series=series, against="ridge")
        run.mean("excess risk of the model", part.tolist(), better="lower", series=f"m = {m}")
    for n, excess, baseline in zip(counts, ours.T, theirs.T, strict=True):
        if n != labelled:
            series = f"pretrained, m = {grid[-1]}, n = {n}"
            run.mean(EXCESS, excess.tolist(), better="lower", series=series)
            run.ratio(
                EXCESS, method=excess.tolist(), baseline=baseline.tolist(), better="lower", series=series, against="ridge"
            )  # fmt: skip
        run.mean(EXCESS, baseline.tolist(), better="lower", series=f"ridge, n = {n}")
    run.mean(EXCESS, [one.oracle for one in drawn], better="lower", series="true model")
    unit = f"of {len(drawn)}"
    for series, numbers, fall in (
        ("of the model in m", grid, of_model), ("with the true model in n", counts, oracles),
        ("uninformative target, in m", grid, uninformed),
    ):  # fmt: skip
        exponents = -np.polyfit(np.log(numbers), np.log(fall).T, 1)[0]
        run.mean("exponent of the fall", exponents.tolist(), better="higher", series=series)
        if "uninformative" not in series:
            kept = int((exponents >= 0.5).sum())
            run.record(
                "draws that keep to the bound's exponent of 1/2", kept, unit=unit, better="higher", series=series
            )


def ridge() -> Any:
    """Ridge regression with the penalty that leave-one-out error chooses."""
    import numpy as np
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-2, 5, 29))


def logistic() -> Any:
    """Logistic regression with the penalty that cross-validation chooses."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    return GridSearchCV(LogisticRegression(max_iter=1000), {"C": np.logspace(-3, 3, 7)}, cv=4)


def _spread(x: Array, y: NDArray[Any], unlabelled: Array, x_test: Array) -> NDArray[Any]:
    """Classes of other samples by spreading labels over the graph of nearest neighbours."""
    import numpy as np
    from sklearn.semi_supervised import LabelSpreading

    known = np.concatenate([y, np.full(len(unlabelled), -1)])
    # A sample that no label reaches has no probabilities; it takes the first class.
    with np.errstate(invalid="ignore"):
        return LabelSpreading(kernel="knn").fit(np.concatenate([x, unlabelled]), known).predict(x_test)


def _by_size(
    dims: int,
    factors: int,
    labelled: int,
    grid: NDArray[np.int64],
    counts: NDArray[np.int64],
    random: np.random.Generator,
) -> BySize:
    """Factor models fitted to more and more of the same samples, for more and more of the same labelled ones."""
    import numpy as np
    from scipy.linalg import null_space
    from sklearn.frozen import FrozenEstimator

    from paperworks.representation import FactorModel, PretrainedFeatures, informativeness

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

    (all_x, all_y, other), unlabelled = draw(int(max(labelled, *counts))), draw(int(grid[-1]))[0]
    x, y, other = all_x[:labelled], all_y[:labelled], other[:labelled]
    at_sizes: tuple[list[float], list[float], list[float]] = ([], [], [])
    for m in grid:
        informed = PretrainedFeatures(FactorModel(factors)).fit(x, y, X_unlabeled=unlabelled[:m])
        blind = PretrainedFeatures(FrozenEstimator(informed.model_)).fit(x, other)
        figures = excess(informed, best), left(informed.model_), excess(blind, np.sqrt(2) * aside)
        for kept, figure in zip(at_sizes, figures, strict=True):
            kept.append(figure)
    true = FactorModel(factors)
    true.mean_, true.loadings_, true.noise_variance_ = np.zeros(dims), B, 1.0
    pretrained, model = PretrainedFeatures(FrozenEstimator(true)), FactorModel(factors).fit(unlabelled)
    most = PretrainedFeatures(FrozenEstimator(model))
    by_count = [
        [excess(learner.fit(all_x[:n], all_y[:n]), best) for n in counts] for learner in (most, ridge(), pretrained)
    ]
    return BySize(  # type: ignore[call-arg]
        *at_sizes, *by_count,  # type: ignore[arg-type]
        excess(ridge().fit(x, y), best), excess(ridge().fit(x, other), np.sqrt(2) * aside),
        excess(pretrained.fit(x, y), best),
        informativeness(FactorModel(factors), unlabelled[: grid[-2]], draws=5, random_state=int(random.integers(2**31))).kappa,
    )  # fmt: skip


def _clusters(labelled: int, unlabelled: int, random: np.random.Generator) -> tuple[float, ...]:
    """Test errors with pretraining, and of both baselines, where a label goes by the component of 8 in 30 dimensions."""
    from paperworks.representation import MixtureModel, PretrainedFeatures

    means, table = random.normal(size=(8, 30)), random.permutation([0, 0, 0, 0, 1, 1, 1, 1])
    z = random.integers(8, size=labelled + unlabelled + 4000)
    x = means[z] + random.normal(size=(len(z), 30))
    y = table[z]
    seen, test = slice(labelled), slice(labelled + unlabelled, None)
    unseen = x[labelled : labelled + unlabelled]
    model = MixtureModel(8, random_state=int(random.integers(2**31)))
    ours = PretrainedFeatures(model).fit(x[seen], y[seen], X_unlabeled=unseen)
    told = (
        ours.predict(x[test]),
        logistic().fit(x[seen], y[seen]).predict(x[test]),
        _spread(x[seen], y[seen], unseen, x[test]),
    )
    return tuple(float((one != y[test]).mean()) for one in told)


def _kappa_of_mixture(random: np.random.Generator) -> float:
    """Of a mixture like those."""
    from paperworks.representation import MixtureModel, informativeness

    means = random.normal(size=(8, 30))
    x = means[random.integers(8, size=800)] + random.normal(size=(800, 30))
    number = int(random.integers(2**31))
    return informativeness(MixtureModel(8, n_init=3, random_state=number), x, draws=3, random_state=number).kappa


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


def _of_data(own: Samples, size: int, labelled: int, counts: Sequence[int], seed: int) -> tuple[float, ...]:
    """Test errors for each number of components, and of both baselines, for a split of its own; of digits, odd against even."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    from paperworks.representation import MixtureModel, PretrainedFeatures

    if own.name == "digits":
        kept, labels, stratify = np.arange(len(own.y))[:size], own.y % 2, None
    else:
        # A user's rows may lie in the order of their classes.
        kept, labels = np.random.default_rng(seed).permutation(len(own.y))[:size], own.y
        stratify = labels[kept] if np.bincount(labels[kept])[np.unique(labels[kept])].min() > 1 else None
    x, x_test, y, y_test = train_test_split(
        own.X[kept], labels[kept], test_size=0.25, random_state=seed, stratify=stratify
    )
    # As many of each class, so that every fold of the baseline has all.
    present = np.unique(y)
    each = max(4, labelled // len(present))
    few = np.concatenate([np.flatnonzero(y == label)[:each] for label in present])
    others = np.delete(x, few, axis=0)
    told = [
        PretrainedFeatures(MixtureModel(K, random_state=seed)).fit(x[few], y[few], X_unlabeled=others).predict(x_test)
        for K in counts
    ]
    told += [logistic().fit(x[few], y[few]).predict(x_test), _spread(x[few], y[few], others, x_test)]
    return tuple(float((one != y_test).mean()) for one in told)


def _figure(grid: NDArray[np.int64], counts: NDArray[np.int64], labelled: int, drawn: Sequence[BySize]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    pretrained, of_model, uninformed, ours, theirs, oracles = (
        np.array(one).mean(0) for one in list(zip(*drawn, strict=True))[:6]
    )
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.loglog(grid, pretrained, "o-", color="#1f6f8b", label="pretrained")
    left.loglog(grid, uninformed, "o-", color="#c9a66b", label="pretrained, uninformative target")
    for values, label, colour in (
        ([one.supervised for one in drawn], "ridge", "#c8553d"), ([one.oracle for one in drawn], "true model", "#777777"),
    ):  # fmt: skip
        left.axhline(sum(values) / len(values), label=label, color=colour, linestyle="--")
    # Room for the legend above the lines.
    left.set(xlabel=f"unlabelled samples m, for n = {labelled}", ylabel="excess risk", ylim=(None, 30))
    for values, label, colour in (
        (ours, "pretrained", "#1f6f8b"), (theirs, "ridge", "#c8553d"), (oracles, "true model", "#777777"),
    ):  # fmt: skip
        middle.loglog(counts, values, "o-", color=colour, label=label)
    middle.set(xlabel=f"labelled samples n, for m = {grid[-1]}")
    right.loglog(grid, of_model, "o-", color="#1f6f8b", label="excess risk of the model")
    right.loglog(grid, of_model[0] * (grid / grid[0]) ** -0.5, ":", color="#777777", label="the bound's slope, -1/2")
    right.set(xlabel="unlabelled samples m")
    for axes in (left, middle, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
