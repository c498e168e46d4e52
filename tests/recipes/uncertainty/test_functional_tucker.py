"""The recipe of FunBaT, seconds long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paperworks.hub import SeriesData
from paperworks.lab import execute
from paperworks.recipes.uncertainty.functional_tucker import (
    BINNED,
    LINEAR,
    METHOD,
    PROCESS,
    TREES,
    Binned,
    PlainSweep,
    Process,
    _full,
    made_up,
)
from paperworks.state_space import StateSpaceGP
from paperworks.uncertainty.functional_tucker import MeanField, TuckerCore


@pytest.fixture
def own_data(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)


def figures(run):
    assert run.status == "finished", run.traceback
    return {(m.name, m.series, m.against): m for m in run.measurements}


def test_every_method_is_scored_on_the_same_tensors(own_data):
    run = execute("functional-tucker", scale="tiny", show_progress=False)
    found = figures(run)
    for name in (METHOD, BINNED, PROCESS, TREES):
        for figure in ("RMSE to the noiseless values", "NLL", "RMSE", "coverage", "fit time", "time to predict"):
            assert len(found[f"{figure}, made-up tensor", name, None].repeats) == 2
    ours = found["RMSE to the noiseless values, made-up tensor", METHOD, None].repeats
    for other in (BINNED, PROCESS, TREES):
        theirs = found["RMSE to the noiseless values, made-up tensor", other, None].repeats
        ratio = found["RMSE, ratio, made-up tensor", METHOD, other]
        assert ratio.repeats == pytest.approx([a / b for a, b in zip(ours, theirs, strict=True)])
        assert ratio.better == "lower"
    assert 0 <= found["coverage of the noiseless values", METHOD, None].value <= 1
    assert ("speed-up", METHOD, "loops") in found
    assert ("slope of log time of the filter in log steps", METHOD, None) in found
    assert run.artefacts["figure"].is_file()


def test_a_table_of_ones_own(own_data, tmp_path):
    random = np.random.default_rng(0)
    X = random.uniform(size=(60, 2))
    file = tmp_path / "sensors.csv"
    rows = np.column_stack([X, np.sin(5 * X[:, 0]) * X[:, 1]])
    np.savetxt(file, rows, delimiter=",", header="place,time,value", comments="")
    run = execute("functional-tucker", parameters={"data": str(file)}, scale="tiny", show_progress=False)
    found = figures(run)
    for other in (BINNED, PROCESS, TREES):
        assert ("RMSE less that of " + other + ", sensors.csv", METHOD, other) in found
    assert ("speed-up", METHOD, "loops") not in found


def test_gaps_in_exchange_rates(own_data, monkeypatch):
    walks = np.exp(0.01 * np.random.default_rng(0).normal(size=(300, 4)).cumsum(0))
    monkeypatch.setattr("paperworks.hub.load_dataset", lambda name: SeriesData(name, walks, "a day"))
    run = execute("functional-tucker", parameters={"data": "exchange_rate"}, scale="tiny", show_progress=False)
    found = figures(run)
    ours, theirs = (found["RMSE in gaps, exchange rates", name, None].repeats for name in (METHOD, LINEAR))
    ratio = found["RMSE in gaps, ratio, exchange rates", METHOD, LINEAR]
    assert ratio.repeats == pytest.approx([a / b for a, b in zip(ours, theirs, strict=True)])


def test_loops_have_the_same_result_as_the_sweep_they_are_timed_against():
    part, _ = made_up(40, 0)
    ours = MeanField(
        torch.from_numpy(part.X), torch.from_numpy(part.y), [StateSpaceGP("matern32", 0.3)] * 3, TuckerCore([2, 3, 2]),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for _ in range(2):
        loops = PlainSweep(ours)
        loops.sweep()
        ours.sweep()
        assert loops.tau == pytest.approx(float(ours.tau), rel=1e-9)
        assert np.allclose(loops.w, ours.core.mean[0], atol=1e-9) and np.allclose(
            loops.cov, ours.core.cov[0], atol=1e-9
        )
        for k, mode in enumerate(ours.modes):
            assert np.allclose(loops.means[k], mode.mean[0], atol=1e-8)
            assert np.allclose(loops.seconds[k], _full(mode.second[0].numpy(), ours.core.ranks[k]), atol=1e-8)


def test_the_baselines_predict():
    part, f = made_up(200, 0)
    process = Process(20).fit(part.X, part.y)
    mean, std = process.predict(part.X_test, return_std=True)
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    assert np.sqrt(np.mean((mean - f) ** 2)) < 0.8 * f.std() and (std > 0).all()
    # On one index it is scikit-learn's.
    one = Process(15).fit(part.X[:60, :1], part.y[:60])
    *lengthscale, variance, noise = one.logs.exp().tolist()
    z = (part.y[:60] - part.y[:60].mean()) / part.y[:60].std()
    theirs = GaussianProcessRegressor(variance * Matern(lengthscale[0], nu=1.5), alpha=noise + 1e-8, optimizer=None)
    theirs.fit(one._scaled(part.X[:60, :1]).numpy(), z)
    wanted = theirs.predict(one._scaled(part.X_test[:, :1]).numpy()) * one.scale + one.mean
    assert np.allclose(one.predict(part.X_test[:, :1]), wanted, atol=1e-6)
    binned = Binned(4, {"ranks": 2, "max_iter": 5, "random_state": 0}).fit(part.X, part.y)
    within = part.X_test.copy()
    within[:, 0] += 1e-9
    assert np.array_equal(binned.predict(part.X_test), binned.predict(within))
