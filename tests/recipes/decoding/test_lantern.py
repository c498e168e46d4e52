"""The recipe of LANTERN, seconds long."""

from __future__ import annotations

import pytest

from paperworks.lab.executors import execute

ROWS = ("delta 0.1", "delta 0.5", "random neighbours, delta 0.5")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_every_budget_is_measured():
    run = execute("lantern", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for name in ROWS:
        ratio = figures["accepted per call, ratio", name]
        assert len(ratio.repeats) == 20 and ratio.low <= ratio.value <= ratio.high
        assert len(figures["accepted per call, ratio", f"{name}, greedy"].repeats) == 10
        # A draft gains no more than its budget, and one step goes no further than its drafts together.
        budget = float(name.split()[-1])
        assert 0 <= figures["mass moved to a draft", name].value <= budget
    for name in ("plain decoding", *ROWS[:2]):
        assert figures["speed-up", name].against == "exact speculation"
    for name in ("plain decoding", *ROWS[1:]):
        greedy = figures["speed-up", f"{name}, greedy"]
        assert greedy.against == "exact speculation, greedy" and len(greedy.repeats) == 10
    for name in ("plain decoding", "exact speculation", *ROWS):
        assert 0 <= figures["digit as asked", name].value <= 100 and figures["Fréchet distance", name].value >= 0
    departures = [figures["total variation of a step", name].value for name in ROWS[:2]]
    assert 0 < departures[0] < departures[1] < 1
    assert figures["accepted per call", "delta 0.5"].value > figures["accepted per call", "exact speculation"].value
    assert run.artefacts["figure"].is_file()


def test_trained_models_are_kept(tmp_path):
    options = {"samples": 10, "timed_images": 1, "text_model": "", "guidance": 1.0}
    first, again = (execute("lantern", scale="tiny", parameters=options, show_progress=False) for _ in range(2))
    accepted = [[m.value for m in run.measurements if m.name == "accepted per call"] for run in (first, again)]
    assert first.status == "finished" and accepted[0] == accepted[1]
    kinds = [len(list((tmp_path / "paperworks" / kind).iterdir())) for kind in ("image-models", "image-drafters")]
    assert kinds == [1, 1]


@pytest.mark.parametrize("deltas", ["", "0.1,x", "0,0.5", "0.1,1.2", "0.1,0.1"])
def test_budgets_that_are_none_are_refused(deltas):
    run = execute("lantern", scale="tiny", parameters={"deltas": deltas}, show_progress=False)
    assert run.status == "failed" and "deltas are different numbers above 0" in run.error
