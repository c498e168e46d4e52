"""The recipe of FSPAD, seconds long."""

from __future__ import annotations

import pytest

from paperworks.decoding import Drafter
from paperworks.lab.executors import execute

PARTS = ("EAGLE-2, feature sampling", "EAGLE-2, partial alignment", "EAGLE-2, two layers")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_fspad_measures_every_row():
    run = execute("fspad", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    rows = {(m.name, m.series): m for m in run.measurements}
    drafters = ("EAGLE-2", *PARTS, "FSPAD")
    for name in drafters:
        assert {("speed", name), ("speed-up", name), ("drafting share", name)} <= rows.keys()
        assert 1 <= rows["accepted per call", name].value <= 5
        assert 6 <= rows["calls", name].value <= 22
    for name in drafters[1:]:
        ratio = rows["accepted per call, ratio", name]
        assert ratio.against == "EAGLE-2" and ratio.low <= ratio.value <= ratio.high
    assert all(rows["same text", name].value == 2 for name in (*drafters, "plain decoding"))
    assert run.artefacts["figure"].is_file()


def test_only_eagle_2_is_trained_beside_it_and_the_budget_is_the_one_asked_for(monkeypatch):
    seen = {}
    load = Drafter.from_pretrained.__func__

    def loaded(cls, folder, model):
        drafter = load(cls, folder, model)
        seen[drafter.sampling is not None, drafter.align is not None] = drafter
        return drafter

    monkeypatch.setattr(Drafter, "from_pretrained", classmethod(loaded))
    options = {"ablations": False, "equality_prompts": 0, "nodes": 7}
    run = execute("fspad", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback
    assert {m.series for m in run.measurements if m.name == "accepted per call"} == {"EAGLE-2", "FSPAD"}
    assert {kind: drafter.nodes for kind, drafter in seen.items()} == {(False, False): 7, (True, True): 7}
