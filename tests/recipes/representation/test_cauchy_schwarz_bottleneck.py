"""The recipe of the Cauchy-Schwarz bottleneck, seconds long."""

from __future__ import annotations

import math

import pytest

from paperworks.lab import execute
from paperworks.recipes.representation.cauchy_schwarz_bottleneck import METHOD, PLAIN, STARTS, Trained, _sought


def test_every_objective_is_measured_clean_and_attacked(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    run = execute("cauchy-schwarz-bottleneck", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for objective in (PLAIN, *STARTS):
        assert 0 < figures["I(x; t), compressed, diabetes", objective].value < 1.1
        clean, attacked = (figures[f"{name}, diabetes", objective] for name in ("RMSE", "RMSE under FGSM of 0.3"))
        assert 0 < clean.value < attacked.value
        if objective != METHOD:
            ratio = figures[f"RMSE against {objective}, diabetes", METHOD]
            assert ratio.low <= ratio.value <= ratio.high
            lower = figures[f"tables with a lower RMSE than {objective}", METHOD].value
            assert lower == (figures["RMSE, diabetes", METHOD].value < figures["RMSE, diabetes", objective].value)
    assert ("RMSE without compression, diabetes", METHOD) in figures
    medians = {series: m for (name, series), m in figures.items() if name == "median error under heavy tails"}
    assert set(medians) == {PLAIN, "absolute error", "Huber", METHOD}
    ratios = [m for m in run.measurements if m.name == "median error under heavy tails, ratio"]
    assert {m.against for m in ratios} == {PLAIN, "absolute error", "Huber"}
    for m in ratios:
        assert m.repeats == pytest.approx(
            [a / b for a, b in zip(medians[METHOD].repeats, medians[m.against].repeats, strict=True)]
        )
    for name in ("RMSE", *(f"RMSE under FGSM of {size}" for size in (0.05, 0.1, 0.2, 0.3, 0.6))):
        assert sum(figures[f"tables with the lowest {name}, compressed", objective].value for objective in STARTS) == 1
    assert run.artefacts["figure"].is_file()


def test_noise_is_put_on_the_code_of_the_method_alone(monkeypatch):
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    with_it, without = (
        {(m.name, m.series): m.value for m in run.measurements}
        for run in (
            execute("cauchy-schwarz-bottleneck", scale="tiny", parameters={"noise": noise}, show_progress=False)
            for noise in (True, False)
        )
    )
    for objective in (PLAIN, *STARTS):
        error = "RMSE, diabetes", objective
        assert (with_it[error] == without[error]) == (objective != METHOD)


@pytest.mark.parametrize("start", [1e-4, 0.03, 50.0])
def test_weight_is_sought_that_leaves_what_is_wanted(start):
    betas = []

    def trained(beta: float) -> Trained:
        betas.append(beta)
        return Trained(1 / (1 + 10 * beta), 0.0, (1.0, 2.0), 0.5, 0.5)

    seen = _sought(trained, start, 0.4, 12)
    assert len(seen) == len(betas) == 12
    assert seen[0].chosen_by == pytest.approx(0.4, rel=0.05)
    assert seen == sorted(seen, key=lambda one: abs(math.log(one.chosen_by / 0.4)))


def test_search_goes_on_where_compression_falls_in_a_jump():
    seen = _sought(lambda beta: Trained(0.9 if beta < 0.37 else 0.0, 0.0, (1.0, 2.0), 0.5, 0.5), 0.03, 0.4, 9)
    assert {one.chosen_by for one in seen} == {0.9, 0.0}
