"""The recipe of conditional beam search and hidden-state optimisation, seconds long."""

from __future__ import annotations

import pytest

from paperworks.lab import execute


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_conditional_beam_search_measures_both_methods_and_keeps_the_classifier(tmp_path):
    run = execute("conditional-beam-search", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m.value for m in run.measurements}
    for name in ("greedy", "beam search", "beam search by total log p", "conditional beam search"):
        kinds = [figures[kind, name] for kind in ("empty", "unfinished", "repetitive")]
        assert figures["degenerate", name] == pytest.approx(sum(kinds))
        assert figures["log p", name] < 0 and 1 <= figures["length", name] <= 20
    assert {("speed-up", "conditional beam search"), ("speed-up", "hidden-state optimisation")} <= figures.keys()
    assert {("perplexity", "plain"), ("perplexity", "hidden-state optimisation")} <= figures.keys()
    (ratio,) = [m for m in run.measurements if m.name == "perplexity, ratio"]
    assert ratio.low is not None and ratio.low <= ratio.value <= ratio.high
    assert 0 < figures["good samples", "sampling"] < 1
    assert run.artefacts["figure"].is_file()
    (folder,) = (tmp_path / "paperworks" / "attribute-classifiers").iterdir()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    again = execute("conditional-beam-search", scale="tiny", show_progress=False)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    for name in ("degenerate", "log p", "perplexity", "held-out loss"):
        both = [[(m.series, m.value) for m in r.measurements if m.name == name] for r in (run, again)]
        assert both[0] == both[1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompt_count": 400}, "cannot be taken"),
        ({"block": 5000}, "too few"),
        ({"text": "digits"}, "no running text"),
    ],
)
def test_wrong_options_are_one_sentence(options, words):
    run = execute("conditional-beam-search", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "failed" and words in run.error and getattr(run.exception, "exit_status", 1) == 2
