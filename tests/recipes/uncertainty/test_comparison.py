"""The room side by side, and what stands in it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from paperworks.lab import execute
from paperworks.lab.recipe import comparisons
from paperworks.recipes.uncertainty.baselines import BoostedQuantiles, DeepEnsemble, ExactGP, SparseGP
from paperworks.recipes.uncertainty.comparison import GAP
from paperworks.recipes.uncertainty.tables import Split, names_of, scored, split

METHODS = (
    "ScaleMixtureNNGP", "DeepKernelMachine", "Gaussian process", "sparse Gaussian process", "deep ensemble",
    "boosted quantiles",
)  # fmt: skip


def test_all_stand_on_the_same_splits(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    run = execute(comparisons()["uncertainty"], scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m.value for m in run.measurements}
    for name in METHODS:
        assert figures["RMSE", name] == pytest.approx(figures["RMSE, diabetes", name])
        assert 0 < figures["coverage", name] <= 1 and figures["fit time", name] > 0
        # Quantiles alone have no density.
        assert (("NLL", name) in figures) == ((f"NLL, {GAP}", name) in figures) == (name != "boosted quantiles")
    assert run.artefacts["figure"].is_file()


def wave(n, random):
    X = random.uniform(-2, 2, size=(n, 1))
    return X, np.sin(2 * X[:, 0]) + 0.2 * random.normal(size=n)


@pytest.mark.parametrize(
    "make", [ExactGP, lambda: SparseGP(20, 150), lambda: DeepEnsemble(steps=400), BoostedQuantiles]
)
def test_baselines_are_worth_beating(make):
    random = np.random.default_rng(0)
    part = Split("wave", *wave(200, random), *wave(300, random))
    found = scored(make, part)
    assert 0.7 < found.coverage < 0.97 and found.rmse < 0.45
    assert np.isnan(found.nll) or found.nll < 0.2


def test_scores_are_what_they_say():
    class Known:
        def fit(self, X, y):
            return self

        def predict(self, X, return_std=False):
            return X[:, 0], np.full(len(X), 2.0)

        def predict_quantiles(self, X, levels):
            return X + 2 * norm.ppf(levels)

        def log_predictive_density(self, X, y):
            return norm.logpdf(y, X[:, 0], 2.0)

    random = np.random.default_rng(0)
    X = random.normal(size=(4000, 1))
    y = X[:, 0] + 2 * random.normal(size=4000)
    found = scored(Known, Split("known", X[:100], 10 * X[:100, 0], X, y))
    spread = 10 * X[:100, 0].std()
    assert found.coverage == pytest.approx(0.9, abs=0.02)
    assert found.rmse == pytest.approx(2 / spread, rel=0.05)
    # A density of targets in standard deviations is so many times as high.
    assert found.nll == pytest.approx(norm.entropy(0, 2) - np.log(spread), abs=0.05)


def test_splits_are_of_the_table_and_share_nothing(tmp_path, monkeypatch):
    path = tmp_path / "own.csv"
    random = np.random.default_rng(0)
    np.savetxt(
        path, np.c_[random.normal(size=(50, 2)), np.arange(50) ** 1.5], delimiter=",", header="a,b,c", comments=""
    )
    first, again, other = (split(str(path), 40, seed) for seed in (0, 0, 1))
    assert len(first.y) == 36 and len(first.y_test) == 4 and first.name == "own.csv"
    assert not set(first.y) & set(first.y_test) and np.array_equal(first.y, again.y)
    assert not np.array_equal(first.y_test, other.y_test)
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    assert names_of("auto", 3) == ["diabetes"] and names_of("mine.csv", 3) == ["mine.csv"]
