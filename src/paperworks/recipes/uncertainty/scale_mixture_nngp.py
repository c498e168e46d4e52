"""Scale mixtures of wide networks against the Gaussian process with a fitted scale: few points, outliers, tables, strange digits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.uncertainty.tables import MEASURED, Scores, names_of, record_scores, scored, split

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

METHOD, BURR, FITTED, WRONG, TRUE = "Student's t", "Burr XII", "GP, fitted scale", "GP, scale 2", "GP, true scale"
SIZES = (4, 8, 16, 64)
NETWORK: dict[str, Any] = {"depth": 4, "w_std": math.sqrt(2), "b_std": math.sqrt(0.1)}
COLOURS = {METHOD: "#1f6f8b", BURR: "#7a5c99", FITTED: "#c8553d", WRONG: "#c98b2b", TRUE: "#777777"}
SPARSE, DIGITS_METHOD = "sparse GP", "sparse Student's t"


@recipe(
    "scale-mixture-nngp",
    baseline="the Gaussian process of the same kernel with a fitted scale; the sparse Gaussian process on digits",
    columns=(
        "NLL, n = 4",
        "NLL, n = 16",
        "NLL with outliers",
        "NLL of the others with outliers",
        "NLL of corrupted digits",
        "AUROC of unseen digits",
    ),
    rows=(METHOD, BURR, FITTED, TRUE, DIGITS_METHOD, SPARSE),
    tiny={"tasks": 12, "most_tables": 1, "rows": 60, "splits": 2, "digits": 80, "epochs": 4, "seeds": 2},
    large={"tasks": 1000, "rows": 10_000, "splits": 20, "digits": 720, "inducing": 200, "epochs": 300, "seeds": 10},
)
def scale_mixture_nngp(
    run: Run,
    data: Annotated[str, MEASURED] = "auto",
    tasks: Annotated[int, Between(2, 1000)] = 300,
    rows: Annotated[int, Between(20, 2000)] = 700,
    splits: Annotated[int, Between(2, 20)] = 5,
    most_tables: Annotated[int, Between(1, 8)] = 5,
    digits: Annotated[int, Between(40, 900)] = 600,
    inducing: Annotated[int, Between(5, 400)] = 100,
    epochs: Annotated[int, Between(1, 240)] = 60,
    seeds: Annotated[int, Between(2, 10)] = 5,
    seed: int = 0,
) -> None:
    """A prior on the last layer's scale against a fitted one, where points are few, where some are outliers, and where nothing is to be had.

    First tasks from the model itself, each with a scale of its own: negative log density of new targets for 4 to 64 points.
    Then tasks of ten points, a tenth of them with an outlier, whose prior is learned from all tasks. Then tables, where the
    kernel is learned: once the scale is learned too no gain is to be expected. Last digits 0 to 4 by sparse variational
    classifiers, which are then shown corrupted ones and 5 to 9. A table of one's own takes the place of all of that.

    Args:
        run: Keeps what is measured.
        data: A table of your own whose last column is a number (.csv, .parquet, .npz), a name, or auto for those at hand.
        tasks: From the model, for each number of points.
        rows: Of each table, at most.
        splits: Of each table, a tenth to test.
        most_tables: Tables at most.
        digits: Digits 0 to 4 to learn from.
        inducing: Inducing inputs of the classifiers.
        epochs: Passes over the digits.
        seeds: Of the digits' splits.
        seed: Of the first.
    """
    if data == "auto":
        gains = _few_points(run, tasks, seed)
        _outliers(run, tasks, seed)
    _tables(run, names_of(data, most_tables), rows, splits, seed)
    if data == "auto":
        _digits(run, digits, inducing, epochs, seeds, seed)
        run.figure(_figure(gains))


def _gram(X: Array) -> Array:
    """Covariances of the network's functions at X, of unit variance on average."""
    import torch

    from paperworks.uncertainty import NNGPKernel

    given = torch.from_numpy(X)
    K: Array = NNGPKernel(**NETWORK)(given, given).detach().numpy()
    return K / K.diagonal().mean()


def _known(table: Array, noise: float, **options: Any) -> Any:
    """A regressor of points by their number, under covariances that are given."""
    import torch

    from paperworks.uncertainty import ScaleMixtureNNGPRegressor

    known = torch.from_numpy(table)

    def kernel(X: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
        return known[X[:, 0].long()][:, Z[:, 0].long()]

    return ScaleMixtureNNGPRegressor(kernel=kernel, noise=noise, learn=False, standardize=False, **options)


def _fitted_scale(table: Array, noise: float, y: Array) -> tuple[str, float]:
    """The scale of the highest likelihood, as a prior."""
    import numpy as np

    n = len(y)
    return "point", max(float(y @ np.linalg.solve(table[:n, :n] + noise * np.eye(n), y)) / n, 1e-12)


def _few_points(run: Run, tasks: int, seed: int) -> dict[str, dict[int, list[float]]]:
    """Tasks with scales from IG(2, 2), and with known kernel and noise."""
    import numpy as np

    random, tested, noise = np.random.default_rng(seed), 50, 0.05
    found: dict[str, dict[int, list[float]]] = {
        name: {n: [] for n in SIZES} for name in (METHOD, BURR, FITTED, WRONG, TRUE)
    }
    for n in run.progress([n for n in SIZES for _ in range(tasks)], "tasks of few points"):
        table = _gram(random.normal(size=(n + tested, 3)))
        s2 = 2 / random.gamma(2.0)
        y = math.sqrt(s2) * np.linalg.cholesky(table + noise * np.eye(n + tested)) @ random.normal(size=n + tested)
        points = np.arange(n + tested)[:, None]
        priors: dict[str, Any] = {
            METHOD: "invgamma", BURR: ("burr12", 2.0, 1.0), FITTED: _fitted_scale(table, noise, y[:n]),
            WRONG: ("point", 2.0), TRUE: ("point", s2),
        }  # fmt: skip
        for name, prior in priors.items():
            model = _known(table, noise, prior=prior).fit(points[:n], y[:n])
            found[name][n].append(float(-model.log_predictive_density(points[n:], y[n:]).mean()))
    for name, by_size in found.items():
        for n, values in by_size.items():
            run.mean(f"NLL, n = {n}", values, unit="nats", better="lower", series=name)
            if name in (METHOD, BURR):
                run.difference(
                    f"NLL less that of the fitted scale, n = {n}", method=values, baseline=found[FITTED][n], unit="nats",
                    better="lower", series=name, against=FITTED,
                )  # fmt: skip
    return found


def _outliers(run: Run, tasks: int, seed: int) -> None:
    """Tasks of ten points with scale 1, of which each target is an outlier with probability 0.1; half of them teach the prior."""
    import numpy as np
    from scipy.optimize import minimize
    from scipy.stats import multivariate_t

    random, n, tested, noise = np.random.default_rng(seed + 1), 10, 30, 0.05
    drawn = []
    for _ in range(2 * tasks):
        table = _gram(random.normal(size=(n + tested, 3)))
        clean = np.linalg.cholesky(table + noise * np.eye(n + tested)) @ random.normal(size=n + tested)
        struck = random.random(n + tested) < 0.1
        drawn.append((table, clean + struck * 5 * random.normal(size=n + tested), struck))
    learning, measured = drawn[:tasks], drawn[tasks:]
    shared = float(np.mean([_fitted_scale(table, noise, y[:n])[1] for table, y, _ in learning]))

    def evidence(logs: Array) -> float:
        alpha, beta = np.exp(logs)
        return -sum(
            multivariate_t(np.zeros(n), beta / alpha * (table[:n, :n] + noise * np.eye(n)), 2 * alpha).logpdf(y[:n])
            for table, y, _ in learning
        )

    alpha, beta = np.exp(minimize(evidence, np.zeros(2), method="Nelder-Mead", options={"maxiter": 80}).x)
    run.record("alpha learned under outliers", float(alpha), better="higher", series=METHOD)
    found: dict[str, list[tuple[float, float]]] = {METHOD: [], FITTED: [], "GP, shared scale": []}
    for table, y, struck in run.progress(measured, "tasks with outliers"):
        points = np.arange(n + tested)[:, None]
        options: dict[str, dict[str, Any]] = {
            METHOD: {"alpha": float(alpha), "beta": float(beta)}, FITTED: {"prior": _fitted_scale(table, noise, y[:n])},
            "GP, shared scale": {"prior": ("point", shared)},
        }  # fmt: skip
        for name, each in options.items():
            told = -_known(table, noise, **each).fit(points[:n], y[:n]).log_predictive_density(points[n:], y[n:])
            found[name].append((float(told.mean()), float(told[~struck[n:]].mean())))
    for place, figure in enumerate(("NLL with outliers", "NLL of the others with outliers")):
        values = {name: [one[place] for one in each] for name, each in found.items()}
        for name, told_all in values.items():
            run.mean(figure, told_all, unit="nats", better="lower", series=name)
            if name != METHOD:
                run.difference(
                    f"{figure}, less", method=values[METHOD], baseline=told_all, unit="nats", better="lower", series=METHOD,
                    against=name,
                )  # fmt: skip


def _tables(run: Run, names: list[str], rows: int, splits: int, seed: int) -> None:
    """Tables: both learn kernel and noise by their evidence, and the Gaussian process its scale by that too."""
    import numpy as np

    from paperworks.uncertainty import ScaleMixtureNNGPRegressor

    start: dict[str, Any] = {**NETWORK, "noise": 0.1}
    makes = {
        METHOD: lambda: ScaleMixtureNNGPRegressor(**start),
        BURR: lambda: ScaleMixtureNNGPRegressor(**start, prior=("burr12", 2.0, 1.0)),
        FITTED: lambda: ScaleMixtureNNGPRegressor(**start, prior=("point", 1.0)),
    }
    scores: dict[str, dict[str, list[Scores]]] = {}
    for name, number in run.progress([(n, s) for n in names for s in range(seed, seed + splits)], "tables"):
        part = split(name, rows, number)
        for told, make in makes.items():
            scores.setdefault(part.name, {}).setdefault(told, []).append(scored(make, part))
    record_scores(run, scores, METHOD, [FITTED])  # type: ignore[arg-type]
    means = {told: [float(np.mean([one.nll for one in each[told]])) for each in scores.values()] for told in makes}
    if len(names) > 1:
        for told in (METHOD, BURR):
            run.difference(
                "NLL less that of the GP, all tables", method=means[told], baseline=means[FITTED], unit="nats",
                better="lower", series=told, against=FITTED,
            )  # fmt: skip


def _digits(run: Run, digits: int, inducing: int, epochs: int, seeds: int, seed: int) -> None:
    """Digits 0 to 4 to learn, others of these to test, as they are and with noise, and 5 to 9 to be told apart."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    from paperworks.hub import load_dataset
    from paperworks.uncertainty import ScaleMixtureNNGPClassifier

    loaded: Any = load_dataset("digits")
    X, y = loaded.X / 16, loaded.y
    inside, outside = np.flatnonzero(y < 5), np.flatnonzero(y >= 5)
    priors: dict[str, Any] = {DIGITS_METHOD: "invgamma", SPARSE: ("point", 1.0)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in priors}
    for number, name in run.progress([(s, n) for s in range(seed, seed + seeds) for n in priors], "digits"):
        random = np.random.default_rng(number)
        order = random.permutation(inside)
        train, test = order[:digits], order[digits:]
        corrupted = X[test] + 0.4 * random.normal(size=X[test].shape)
        model = ScaleMixtureNNGPClassifier(
            **NETWORK, prior=priors[name], n_inducing=inducing, max_epoch=epochs, n_samples=30, standardize=False, random_state=number
        ).fit(X[train], y[train])  # fmt: skip
        told = {rows: model.predict_proba(given) for rows, given in (("clean", X[test]), ("strange", X[outside]))}
        entropy = {rows: -(p * np.log(np.maximum(p, 1e-12))).sum(1) for rows, p in told.items()}
        figures = {
            "accuracy": model.score(X[test], y[test]),
            "NLL of clean digits": -model.log_predictive_density(X[test], y[test]).mean(),
            "NLL of corrupted digits": -model.log_predictive_density(corrupted, y[test]).mean(),
            "accuracy on corrupted digits": model.score(corrupted, y[test]),
            "AUROC of unseen digits": roc_auc_score(
                np.repeat([0, 1], [len(test), len(outside)]), np.concatenate([entropy["clean"], entropy["strange"]])
            ),
        }
        for figure, value in figures.items():
            found[name].setdefault(figure, []).append(float(value))
    for figure in found[SPARSE]:
        better, unit = ("lower", "nats") if figure.startswith("NLL") else ("higher", "")
        for name, each in found.items():
            run.mean(figure, each[figure], unit=unit, better=better, series=name)  # type: ignore[arg-type]
        run.difference(
            f"{figure}, less", method=found[DIGITS_METHOD][figure], baseline=found[SPARSE][figure], unit=unit,
            better=better, series=DIGITS_METHOD, against=SPARSE,  # type: ignore[arg-type]
        )  # fmt: skip


def _figure(gains: dict[str, dict[int, list[float]]]) -> Figure:
    """What a prior on the scale gains by points, and bands of both for four points of a sine."""
    import numpy as np
    from matplotlib.figure import Figure

    from paperworks.uncertainty import ScaleMixtureNNGPRegressor

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in (METHOD, BURR, FITTED, WRONG):
        above = [np.mean(gains[name][n]) - np.mean(gains[TRUE][n]) for n in SIZES]
        left.plot(SIZES, above, "o-", color=COLOURS[name], label=name)
    left.set(xscale="log", xlabel="points", ylabel="NLL above that of the true scale, nats")
    left.set_xticks(SIZES, [str(n) for n in SIZES])
    left.minorticks_off()
    X = np.array([[-1.5], [-0.5], [0.4], [1.2]])
    y, grid = np.sin(2 * X[:, 0]), np.linspace(-3, 3, 200)[:, None]
    options: dict[str, Any] = {**NETWORK, "noise": 1e-3, "learn": False}
    fitted = ScaleMixtureNNGPRegressor(**options).fit(X, y)
    for name, prior in ((METHOD, "invgamma"), (FITTED, ("point", float(fitted._given.quadratic) / len(y)))):
        low, middle, high = ScaleMixtureNNGPRegressor(**options, prior=prior).fit(X, y).predict_quantiles(grid).T
        right.fill_between(grid[:, 0], low, high, alpha=0.3, color=COLOURS[name], label=f"90 % band, {name}")
    right.plot(grid[:, 0], middle, color="#333333")
    right.plot(X[:, 0], y, "o", color="#333333")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
