"""The recipe of deep kernel machines, seconds long."""

from __future__ import annotations

import numpy as np
import pytest

from paperworks.lab import execute
from paperworks.recipes.uncertainty.deep_kernel_machine import FIXED, METHOD, SPARSE


def test_all_is_measured(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    run = execute("deep-kernel-machine", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements if not m.against}
    for name in (METHOD, FIXED, SPARSE):
        assert np.isfinite(figures["NLL, diabetes", name].value)
        assert figures["NLL, all tables", name].value == pytest.approx(figures["NLL, diabetes", name].value)
        assert 0 < figures["coverage, all tables", name].value <= 1
    assert sum(figures["tables with the lowest NLL", name].value for name in (METHOD, FIXED, SPARSE)) == 1
    assert {m.against for m in run.measurements if m.name.startswith("NLL less that of")} == {FIXED, SPARSE}
    assert figures["relative error of the mean Gram matrix", "width 8"].value > 0
    assert len(figures["slope of log time in log rows", METHOD].repeats) == 2
    assert run.artefacts["figure"].is_file()


def test_a_table_of_ones_own_is_measured_alone(tmp_path):
    random = np.random.default_rng(0)
    X = random.normal(size=(50, 3))
    path = tmp_path / "own.csv"
    np.savetxt(path, np.c_[X, X.sum(1)], delimiter=",", header="a,b,c,y", comments="")
    run = execute("deep-kernel-machine", scale="tiny", parameters={"data": str(path)}, show_progress=False)
    assert run.status == "finished", run.traceback
    assert {m.name.rpartition(", ")[2] for m in run.measurements} == {
        "own.csv",
        "all tables",
        "tables with the lowest NLL",
    }
