"""The recipe of scale mixtures, seconds long."""

from __future__ import annotations

import numpy as np
import pytest

from paperworks.lab import execute
from paperworks.recipes.uncertainty.scale_mixture_nngp import (
    BURR,
    DIGITS_METHOD,
    FITTED,
    METHOD,
    SIZES,
    SPARSE,
    TRUE,
    WRONG,
)


def test_all_is_measured(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    run = execute("scale-mixture-nngp", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements if not m.against}
    for n in SIZES:
        for name in (METHOD, BURR, FITTED, WRONG, TRUE):
            assert len(figures[f"NLL, n = {n}", name].repeats) == 12
        [gain] = [
            m
            for m in run.measurements
            if m.name == f"NLL less that of the fitted scale, n = {n}" and m.series == METHOD
        ]
        assert gain.value == pytest.approx(
            figures[f"NLL, n = {n}", METHOD].value - figures[f"NLL, n = {n}", FITTED].value
        )
    for figure in ("NLL with outliers", "NLL of the others with outliers"):
        assert {series for name, series in figures if name == figure} == {METHOD, FITTED, "GP, shared scale"}
    assert 0 < figures["coverage, diabetes", METHOD].value <= 1
    for name in (DIGITS_METHOD, SPARSE):
        assert 0 < figures["AUROC of unseen digits", name].value <= 1
        assert figures["NLL of corrupted digits", name].value > 0
    assert run.artefacts["figure"].is_file()


def test_a_table_of_ones_own_is_measured_alone(tmp_path):
    random = np.random.default_rng(0)
    X = random.normal(size=(40, 3))
    path = tmp_path / "own.csv"
    np.savetxt(path, np.c_[X, X.sum(1)], delimiter=",", header="a,b,c,y", comments="")
    run = execute("scale-mixture-nngp", scale="tiny", parameters={"data": str(path)}, show_progress=False)
    assert run.status == "finished", run.traceback
    assert {m.name.rpartition(", ")[2] for m in run.measurements} == {"own.csv"}
    short = tmp_path / "short.csv"
    np.savetxt(short, np.c_[X, X.sum(1)][:12], delimiter=",", header="a,b,c,y", comments="")
    run = execute("scale-mixture-nngp", scale="tiny", parameters={"data": str(short)}, show_progress=False)
    assert run.status == "failed" and "20 or more" in run.error
