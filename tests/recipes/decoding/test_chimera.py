"""The recipe of Chimera, seconds long."""

from __future__ import annotations

import pytest

from paperworks.lab.executors import execute

DRAFTERS = ("Medusa", "Chimera", "Chimera, no trigrams", "Chimera, no context")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_chimera_measures_every_row():
    run = execute("chimera", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    rows = {(m.name, m.series): m for m in run.measurements}
    for name in DRAFTERS:
        assert {("speed", name), ("speed-up", name), ("drafting share", name)} <= rows.keys()
        assert 1 <= rows["accepted per call", name].value <= 5
        assert 6 <= rows["calls", name].value <= 22
    for name in DRAFTERS[1:]:
        ratio = rows["accepted per call, ratio", name]
        assert ratio.against == "Medusa" and ratio.low <= ratio.value <= ratio.high
    assert all(rows["same text", name].value == 2 for name in (*DRAFTERS, "plain decoding"))
    assert run.artefacts["figure"].is_file()


def test_ablations_are_left_out_unless_asked_for():
    options = {"ablations": False, "equality_prompts": 0}
    run = execute("chimera", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback
    assert {m.series for m in run.measurements if m.name == "accepted per call"} == set(DRAFTERS[:2])
