"""What recipes of this room share: regression tables in splits, how a fitted estimator is scored, and what one would take instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Of a size that a run from the page may take.
MEASURED = Data("auto", "diabetes", "uci:*")
# A tenth is tested.
TEST_TO_TRAIN = 1 / 9


class Split(NamedTuple):
    """A table, split at random.

    Attributes:
        name: Of the table.
        X: Features to fit, (n, d).
        y: Targets to fit, (n,).
        X_test: Features to test, (m, d).
        y_test: Targets to test, (m,).
    """

    name: str
    X: Array
    y: Array
    X_test: Array
    y_test: Array


class Scores(NamedTuple):
    """How a fitted estimator does on what it has not seen.

    Attributes:
        nll: Mean negative log density in nats, in standard deviations of the training targets; NaN where there is no density.
        rmse: Root mean squared error, in standard deviations of the training targets.
        coverage: Share of targets within the 90 % interval.
        fit_seconds: Of the fit.
        predict_seconds: Of means and standard deviations for all tested rows.
    """

    nll: float
    rmse: float
    coverage: float
    fit_seconds: float
    predict_seconds: float


def names_of(data: str, most: int) -> list[str]:
    """The tables that `data` names: itself, or for "auto" those of UCI that are at hand and, where there are none, diabetes."""
    from paperworks.hub import datasets

    if data != "auto":
        return [data]
    uci = [entry.name for entry in datasets() if entry.name.startswith("uci:") and entry.available]
    return (uci or ["diabetes"])[:most]


def split(name: str, rows: int, seed: int) -> Split:
    """At most so many rows of a table, drawn at random, of which a tenth is to test.

    Raises:
        UsageError: It is no table whose last column is a number, or has fewer than 20 rows.
    """
    import numpy as np

    from paperworks.hub import TableData, load_dataset

    loaded = load_dataset(name)
    if not isinstance(loaded, TableData):
        raise UsageError(f"{name} is no table, and one is wanted whose last column is a number")
    X, y = loaded.measured().X, np.asarray(loaded.y, dtype=np.float64)
    if len(y) < 20:
        raise UsageError(f"{name} has {len(y)} rows: give 20 or more")
    chosen = np.random.default_rng(seed).permutation(len(y))[:rows]
    tested = max(2, round(len(chosen) * TEST_TO_TRAIN / (1 + TEST_TO_TRAIN)))
    fit, test = chosen[tested:], chosen[:tested]
    return Split(Path(name).name, X[fit], y[fit], X[test], y[test])


def scored(make: Callable[[], Any], part: Split) -> Scores:
    """Fit an estimator to a split and score it."""
    import numpy as np

    start = perf_counter()
    model = make().fit(part.X, part.y)
    fitted = perf_counter()
    mean, _ = model.predict(part.X_test, return_std=True)
    done = perf_counter()
    low, high = model.predict_quantiles(part.X_test, [0.05, 0.95]).T
    spread = part.y.std()
    density = model.log_predictive_density(part.X_test, part.y_test)
    return Scores(
        nll=float(-density.mean() - np.log(spread)),
        rmse=float(np.sqrt(np.mean((mean - part.y_test) ** 2)) / spread),
        coverage=float(np.mean((low <= part.y_test) & (part.y_test <= high))),
        fit_seconds=fitted - start,
        predict_seconds=done - fitted,
    )


def record_scores(
    run: Any, scores: dict[str, dict[str, Sequence[Scores]]], method: str, against: Sequence[str]
) -> None:
    """Record what was scored: each figure of each estimator, and the differences of the method's NLL and RMSE from others'.

    Args:
        run: Keeps what is measured.
        scores: By table and estimator, a split after another, the same splits for all.
        method: The estimator that is compared.
        against: With which others.
    """
    import numpy as np

    for table, each in scores.items():
        for name, found in each.items():
            for figure, unit, better in (
                ("nll", "nats", "lower"), ("rmse", "", "lower"), ("coverage", "", "higher"),
                ("fit_seconds", "s", "lower"), ("predict_seconds", "s", "lower"),
            ):  # fmt: skip
                values = [getattr(one, figure) for one in found]
                if np.isfinite(values).all():
                    run.mean(f"{_told(figure)}, {table}", values, unit=unit, better=better, series=name)
                elif not np.isnan(values).all():
                    run.log(f"{name} on {table}: {_told(figure)} is not finite on every split, and left out")
        for other in against:
            for figure in ("nll", "rmse"):
                ours, theirs = ([getattr(one, figure) for one in each[name]] for name in (method, other))
                if np.isfinite([*ours, *theirs]).all():
                    run.difference(
                        f"{_told(figure)} less that of {other}, {table}", method=ours, baseline=theirs, better="lower",
                        series=method, against=other, test_to_train=TEST_TO_TRAIN,
                    )  # fmt: skip


def _told(figure: str) -> str:
    return {"nll": "NLL", "rmse": "RMSE", "fit_seconds": "fit time", "predict_seconds": "time to predict"}.get(
        figure, figure
    )
