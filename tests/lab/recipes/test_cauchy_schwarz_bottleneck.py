"""The recipe of the Cauchy-Schwarz bottleneck, seconds long."""

from __future__ import annotations

from paperworks.lab import execute
from paperworks.lab.recipes.representation.cauchy_schwarz_bottleneck import BETAS, METHOD, PLAIN, Trained, _compressed


def test_every_objective_is_measured_clean_and_attacked(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    run = execute("cauchy-schwarz-bottleneck", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for objective in BETAS:
        assert 0 < figures["I(x; t), compressed, diabetes", objective].value < 1.1
        clean, attacked = (figures[f"{name}, diabetes", objective] for name in ("RMSE", "RMSE under FGSM"))
        assert 0 < clean.value < attacked.value
        if objective != METHOD:
            ratio = figures[f"RMSE against {objective}, diabetes", METHOD]
            assert ratio.low <= ratio.value <= ratio.high
    assert ("RMSE without compression, diabetes", METHOD) in figures
    assert figures["tables with the lowest RMSE", METHOD].value in (0, 1)
    assert run.artefacts["figure"].is_file()


def test_the_best_is_chosen_among_those_that_compress_enough():
    loose, tight, tighter = (Trained(v, i, 1.0, 2.0) for v, i in ((0.1, 0.6), (0.5, 0.4), (0.7, 0.2)))
    plain = {0.0: Trained(0.1, 0.9, 1.0, 2.0)}
    chosen = _compressed({PLAIN: plain, "HSIC": {1: loose, 2: tight, 3: tighter}, "VIB": {1: loose}}, 0.5)
    assert chosen["HSIC"] == tight and chosen["VIB"] == loose
