"""The recipe of dynamic inference, seconds long."""

from __future__ import annotations

import random

import pytest

from paperworks.lab import execute
from paperworks.recipes.decoding.dynamic_inference import rouge_l


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_dynamic_inference_measures_the_whole_curve():
    run = execute("dynamic-inference", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for threshold in ("0.5", "0.7", "0.9", "0.97"):
        name = f"exit at {threshold}"
        assert {("quality", name), ("speed-up", name)} <= figures.keys()
        # Random exits are the controller's own in another order: the cost is the same to the layer.
        assert figures["layers a token", name].value == pytest.approx(
            figures["layers a token", f"random for {name}"].value
        )
        ratio = figures["agreement at equal cost, ratio", name]
        assert ratio.low is not None and ratio.low <= ratio.value <= ratio.high
    assert figures["agreement", "all layers"].value == 1
    assert figures["layers a token", "all layers"].value == 2
    assert figures["layers a token", "layer 1"].value == 1
    assert {("speed-up", f"{what} at 0.9") for what in ("exit", "stop", "exit and stop", "confident")} <= figures.keys()
    lengths = [figures["length", f"stop at {threshold}"].value for threshold in ("0.5", "0.7", "0.9", "0.97")]
    assert lengths == sorted(lengths) and lengths[-1] <= figures["length", "all layers"].value
    assert run.artefacts["figure"].is_file()


def test_rouge_l_is_that_of_every_common_subsequence():
    from itertools import combinations

    chance = random.Random(0)
    for _ in range(30):
        one, other = ([chance.randrange(3) for _ in range(chance.randrange(1, 7))] for _ in range(2))
        parts = [{c for n in range(len(ids) + 1) for c in combinations(ids, n)} for ids in (one, other)]
        longest = max(map(len, parts[0] & parts[1]))
        expected = (
            2 * (longest / len(one)) * (longest / len(other)) / (longest / len(one) + longest / len(other))
            if longest
            else 0
        )
        assert rouge_l(one, other) == pytest.approx(expected)
    assert rouge_l([], [1]) == 0
