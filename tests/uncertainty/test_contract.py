"""What every estimator of the room keeps to."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import paperworks.uncertainty as room
from tests.uncertainty.subjects import classifiers, regressors

REGRESSORS, CLASSIFIERS = regressors(), classifiers()
every_regressor = pytest.mark.parametrize("name", REGRESSORS)
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)
everyone = pytest.mark.parametrize("name", [*REGRESSORS, *CLASSIFIERS])


def subject(name, test=""):
    found = (REGRESSORS | CLASSIFIERS)[name]
    if test in found.exempt:
        pytest.skip(found.exempt[test])
    return found


def table(found, n=24, seed=0):
    """Features, and targets that have to do with them."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, found.dims or 2))
    return X, 2.0 + X.sum(1) + 0.3 * random.normal(size=n)


def classes(found, n=30, seed=0):
    X, y = table(found, n, seed)
    return X, np.array(["cat", "dog", "eel"])[np.digitize(y, np.quantile(y, [0.33, 0.66]))]


def data(name, found):
    return table(found) if name in REGRESSORS else classes(found)


def told(model, X):
    if hasattr(model, "predict_proba"):
        return model.predict_proba(X)
    return np.stack(model.predict(X, return_std=True), axis=-1)


def test_every_estimator_of_the_room_is_a_subject():
    exported = (getattr(room, name) for name in getattr(room, "__all__", []))
    estimators = {one.__name__ for one in exported if isinstance(one, type) and hasattr(one, "get_params")}
    assert {type(found.make()).__name__ for found in [*REGRESSORS.values(), *CLASSIFIERS.values()]} >= estimators


@pytest.mark.parametrize("name", [name for name, found in REGRESSORS.items() if found.prior])
def test_intervals_cover_what_they_say_on_data_from_the_prior(name):
    found = subject(name)
    random = np.random.default_rng(7)
    inside = 0
    for _ in range(found.tasks):
        X, y, new, wanted = found.prior(random)
        one = random.integers(len(new))
        low, high = (found.oracle or found.make)().fit(X, y).predict_quantiles(new[[one]], [0.05, 0.95])[0]
        inside += low <= wanted[one] <= high
    # Of a thousand rightly calibrated methods one would fail.
    least, most = binom.interval(0.999, found.tasks, 0.9)
    assert least <= inside <= most


@everyone
def test_order_of_rows_changes_nothing(name):
    found = subject(name, "order")
    X, y = data(name, found)
    order = np.random.default_rng(1).permutation(len(X))
    first, second = (told(found.make().fit(*given), X) for given in ((X, y), (X[order], y[order])))
    if found.tolerance is None:
        pytest.fail("a method that hangs on the order of rows says why in `exempt`")
    assert np.abs(first - second).max() <= found.tolerance * max(1, first.std())
    with_permuted_queries = told(found.make().fit(X, y), X[order])
    assert np.abs(first[order] - with_permuted_queries).max() <= 10 * found.tolerance


@every_regressor
def test_targets_in_another_unit_give_predictions_in_that_unit(name):
    found = subject(name, "units")
    X, y = table(found)
    new = X + 0.1
    first, second = (np.array(found.make().fit(X, given).predict(new, return_std=True)) for given in (y, 40 * y - 7))
    assert np.allclose(40 * first[0] - 7, second[0], atol=40 * 1e-5 + 1e-4 * abs(second[0]).max())
    assert np.allclose(40 * first[1], second[1], rtol=1e-3)


@every_regressor
def test_far_from_the_data_the_band_is_no_narrower(name):
    found = subject(name, "far")
    X, y = table(found)
    model = found.make().fit(X, y)
    assert (
        model.predict(20 + 20 * np.abs(X[:5]), return_std=True)[1].min()
        >= 0.99 * model.predict(X, return_std=True)[1].mean()
    )


@every_regressor
def test_the_density_integrates_to_one_and_has_the_mean_quantiles_and_draws_that_are_told(name):
    found = subject(name, "density")
    X, y = table(found)
    model = found.make().fit(X, y)
    at = X[:1] + 0.2
    low, high = model.predict_quantiles(at, [1e-6, 1 - 1e-6])[0]
    # Beyond these ends, where a tail may be heavy, there is nothing to speak of.
    grid = np.linspace(low, high, 20_001)
    density = np.exp(model.log_predictive_density(np.repeat(at, len(grid), 0), grid))
    width = grid[1] - grid[0]
    below = np.cumsum(density) * width
    assert below[-1] == pytest.approx(1, abs=5e-3)
    mean, std = (float(one[0]) for one in model.predict(at, return_std=True))
    assert (density * grid).sum() * width == pytest.approx(mean, abs=0.02 * std + 1e-6)
    assert ((density * (grid - mean) ** 2).sum() * width) ** 0.5 == pytest.approx(std, rel=0.03)
    levels = [0.1, 0.5, 0.9]
    quantiles = model.predict_quantiles(at, levels)[0]
    assert np.interp(quantiles, grid, below) == pytest.approx(levels, abs=5e-3)
    draws = model.sample_y(at, 4000, random_state=0)[0]
    assert draws.shape == (4000,)
    assert (draws[:, None] <= quantiles).mean(0) == pytest.approx(levels, abs=0.03)
    assert np.array_equal(draws, model.sample_y(at, 4000, random_state=0)[0])


@every_classifier
def test_probabilities_are_ones_and_labels_may_be_words(name):
    found = subject(name)
    X, y = classes(found)
    model = found.make().fit(X, y)
    probabilities = model.predict_proba(X)
    assert probabilities.shape == (30, 3) and model.classes_.tolist() == ["cat", "dog", "eel"]
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-6) and (probabilities >= 0).all()
    assert set(model.predict(X)) <= set(y) and model.score(X, y) > 0.5
    chosen = probabilities[np.arange(30), np.searchsorted(model.classes_, y)]
    assert np.exp(model.log_predictive_density(X, y)) == pytest.approx(chosen, rel=1e-6)
    drawn = model.sample_y(X[:1], 2000, random_state=0)[0]
    shares = [(drawn == label).mean() for label in model.classes_]
    assert shares == pytest.approx(probabilities[0], abs=0.05)
    assert model.log_predictive_density(X, pd.DataFrame({"label": y})).shape == (30,)
    with pytest.raises(ValueError, match="fox"):
        model.log_predictive_density(X[:1], ["fox"])
    with pytest.raises(ValueError, match="class"):
        found.make().fit(X, ["cat"] * 30)


@everyone
def test_the_same_seed_gives_the_same_result_and_files_keep_it(name, tmp_path):
    found = subject(name)
    X, y = data(name, found)
    frame = pd.DataFrame(X, columns=[f"feature {column}" for column in range(X.shape[1])])
    model = found.make().fit(frame, y)
    assert np.array_equal(told(model, frame), told(found.make().fit(frame, y), frame))
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert np.array_equal(told(model, frame), told(read, frame))
    assert np.array_equal(model.log_predictive_density(frame, y), read.log_predictive_density(frame, y))
    assert np.array_equal(read.feature_names_in_, frame.columns)
    if X.shape[1] > 1:
        with pytest.raises(ValueError, match="names"):
            read.predict(frame[frame.columns[::-1]])
    with pytest.raises(ValueError, match="holds no saved"):
        type(model).from_pretrained(tmp_path / "nothing")
    # What is set after a fit is for the next one.
    others = {name: value * 2 + 1 for name, value in model.get_params().items() if isinstance(value, int | float)}
    model.set_params(
        **{name: value for name, value in others.items() if not isinstance(value, bool) and "sample" not in name}
    )
    model.save_pretrained(tmp_path / "later")
    assert np.array_equal(told(type(model).from_pretrained(tmp_path / "later"), frame), told(read, frame))


@every_regressor
def test_one_row_one_column_and_constant_targets(name):
    found = subject(name, "degenerate")
    X, y = table(found)
    cases = [(X[:1], y[:1]), (X, np.full(len(X), 3.0)), (np.repeat(X[:1], 6, 0), y[:6])]
    if found.dims is None:
        cases.append((X[:, :1], y))
        # A column that is constant but for rounding tells nothing.
        cases.append((np.c_[X, np.where(np.arange(len(X)) % 2, 0.3, 0.1 + 0.2)], y))
    for given in cases:
        mean, std = found.make().fit(*given).predict(given[0], return_std=True)
        assert np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()


@everyone
def test_bad_input_is_a_sentence_and_loses_nothing(name):
    found = subject(name)
    X, y = data(name, found)
    model = found.make().fit(X, y)
    before = told(model, X)
    broken = X.copy()
    broken[0, 0] = np.nan
    for call in (
        lambda: found.make().fit(broken, y), lambda: model.predict(broken), lambda: found.make().fit(X, y[:-1]),
        lambda: found.make().fit(X[:0], y[:0]), lambda: model.predict(X[:, :0]), lambda: model.predict(np.c_[X, X]),
        lambda: model.log_predictive_density(X, y[:-1]), lambda: model.sample_y(X, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert len(str(error.value)) > 20
    if name in REGRESSORS:
        for quantiles in ([0.0], [1.0], [-0.5, 0.5]):
            with pytest.raises(ValueError, match="between 0 and 1"):
                model.predict_quantiles(X, quantiles)
    assert np.array_equal(told(model, X), before)


@everyone
def test_a_pipeline_and_a_grid_search_take_it(name):
    found = subject(name)
    X, y = data(name, found)
    pipeline = make_pipeline(StandardScaler(), found.make()).fit(X, y)
    assert np.isfinite(pipeline.score(X, y))
    estimator = found.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = GridSearchCV(
            estimator, {"random_state": [0, 1]} if "random_state" in estimator.get_params() else {}, cv=2
        )
        assert np.isfinite(search.fit(X, y).best_score_)
    assert type(clone(estimator)) is type(estimator)


@everyone
def test_more_rows_than_it_takes_are_a_sentence(name):
    found = subject(name)
    most = found.make()._most_rows
    if most is None:
        pytest.skip("it takes any number of rows")
    X = np.zeros((most + 1, found.dims or 2))
    with pytest.raises(ValueError, match=f"{most:,}"):
        found.make().fit(X, np.arange(len(X)) % 2)


@pytest.mark.parametrize("name", [name for name, found in (REGRESSORS | CLASSIFIERS).items() if found.checks])
def test_scikit_learns_own_checks(name):
    found = subject(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(found.make(), expected_failed_checks=found.expected_failures)
