"""The room side by side: `paperworks compare --room uncertainty`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.lab.recipe import Between, comparison
from paperworks.lab.run import Run
from paperworks.recipes.uncertainty.tables import MEASURED, Scores, Split, names_of, record_scores, scored, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = "sine with a gap"


@comparison(
    "uncertainty",
    baseline="an exact and a sparse Gaussian process, a deep ensemble, gradient boosting with quantiles",
    columns=("NLL", "RMSE", "coverage", "fit time", "time to predict", f"NLL, {GAP}"),
    tiny={"most_tables": 1, "rows": 60, "splits": 2, "steps": 10, "inducing": 10},
)
def uncertainty(
    run: Run,
    data: Annotated[str, MEASURED] = "auto",
    most_tables: Annotated[int, Between(1, 8)] = 5,
    rows: Annotated[int, Between(30, 2000)] = 500,
    splits: Annotated[int, Between(2, 20)] = 3,
    steps: Annotated[int, Between(5, 800)] = 200,
    inducing: Annotated[int, Between(5, 200)] = 50,
    seed: int = 0,
) -> None:
    """The room's regressors and what one would otherwise take, on the same splits of tables, and on a sine with a gap.

    Args:
        run: Keeps what is measured.
        data: A table of your own whose last column is a number (.csv, .parquet, .npz), a name, or auto for those at hand.
        most_tables: Tables at most.
        rows: Of each table, at most.
        splits: Of each table, a tenth to test.
        steps: Of what is trained step by step.
        inducing: Inducing rows.
        seed: Of the first split.
    """
    import numpy as np

    makes = _makes(steps, inducing)
    scores: dict[str, dict[str, list[Scores]]] = {}
    names = names_of(data, most_tables)
    for name, number in run.progress([(n, s) for n in names for s in range(seed, seed + splits)], "tables"):
        part = split(name, rows, number)
        for told, make in makes.items():
            scores.setdefault(part.name, {}).setdefault(told, []).append(scored(make, part))
    record_scores(run, scores, next(iter(makes)), [])  # type: ignore[arg-type]
    for told in makes:
        for figure, field, unit, better in (
            ("NLL", "nll", "nats", "lower"), ("RMSE", "rmse", "", "lower"), ("coverage", "coverage", "", "higher"),
            ("fit time", "fit_seconds", "s", "lower"), ("time to predict", "predict_seconds", "s", "lower"),
        ):  # fmt: skip
            value = float(np.mean([getattr(one, field) for each in scores.values() for one in each[told]]))
            if np.isfinite(value):
                run.record(figure, value, unit=unit, better=better, series=told)  # type: ignore[arg-type]
    gap = _gap(seed)
    fitted = {}
    for told, make in run.progress(list(makes.items()), GAP):
        fitted[told] = make().fit(gap.X, gap.y)
        nll = float(-fitted[told].log_predictive_density(gap.X_test, gap.y_test).mean() - np.log(gap.y.std()))
        if np.isfinite(nll):
            run.record(f"NLL, {GAP}", nll, unit="nats", better="lower", series=told)
    run.figure(_figure(fitted, gap))


def _makes(steps: int, inducing: int) -> dict[str, Callable[[], Any]]:
    from paperworks.recipes.uncertainty.baselines import BoostedQuantiles, DeepEnsemble, ExactGP, SparseGP
    from paperworks.uncertainty import DeepKernelMachineRegressor, ScaleMixtureNNGPRegressor

    return {
        "ScaleMixtureNNGP": lambda: ScaleMixtureNNGPRegressor(w_std=2**0.5, b_std=0.3, noise=0.1),
        "DeepKernelMachine": lambda: DeepKernelMachineRegressor(
            n_inducing=inducing, max_iter=steps, nus=(1.0, 10.0, 100.0)
        ),
        "Gaussian process": ExactGP,
        "sparse Gaussian process": lambda: SparseGP(inducing, steps),
        "deep ensemble": lambda: DeepEnsemble(steps=2 * steps),
        "boosted quantiles": BoostedQuantiles,
    }


def _gap(seed: int) -> Split:
    """Noisy points of a sine, none in the middle, where they are tested."""
    import numpy as np

    random = np.random.default_rng(seed)

    def draw(X: Any) -> Any:
        return np.sin(2 * X) + 0.1 * random.normal(size=X.shape)

    X = np.concatenate([random.uniform(-3, -1, 40), random.uniform(0.5, 3, 40)])
    X_test = random.uniform(-1, 0.5, 100)
    return Split(GAP, X[:, None], draw(X), X_test[:, None], draw(X_test))


def _figure(fitted: dict[str, Any], gap: Split) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = np.linspace(-4, 4, 300)[:, None]
    for axes, (told, model) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, fitted.items(), strict=True):
        low, high = model.predict_quantiles(grid, [0.05, 0.95]).T
        axes.fill_between(grid[:, 0], low, high, color="#1f6f8b", alpha=0.3)
        axes.plot(grid[:, 0], model.predict(grid), color="#1f6f8b")
        axes.plot(grid[:, 0], np.sin(2 * grid[:, 0]), "--", color="#777777", linewidth=0.8)
        axes.plot(gap.X[:, 0], gap.y, ".", color="#333333", markersize=3)
        axes.set(title=told, ylim=(-3, 3))
        axes.spines[["top", "right"]].set_visible(False)
    return figure
