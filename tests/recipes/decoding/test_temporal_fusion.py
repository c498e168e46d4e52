"""The recipe of temporal fusion, seconds long."""

from __future__ import annotations

from itertools import pairwise

import pytest

from paperworks.lab import execute
from paperworks.recipes.decoding.temporal_fusion import ALONE, BATCHES, FUSED, HOLES, THREADS, _draw


def test_temporal_fusion_measures_every_way_of_serving():
    run = execute("temporal-fusion", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for name in (ALONE, THREADS, BATCHES, HOLES, FUSED):
        # Every way has answered all five requests of both rounds with the model's own text.
        assert figures["same text", name].value == 10 and figures["same text", name].unit == "of 10"
        assert figures["speed", name].value > 0
        assert 0 < figures["first token", name].value <= figures["latency", name].value
        assert name == ALONE or figures["speed-up", name].low is not None
    for against in (ALONE, BATCHES):
        for measure in ("latency", "p95 latency", "first token"):
            ratio = figures[f"{measure}, ratio to {against}", FUSED]
            assert ratio.low <= ratio.value <= ratio.high
    assert figures["occupancy", FUSED].value == 1 >= figures["occupancy", HOLES].value
    assert 0 < figures["time outside the model", FUSED].value < 1
    assert run.artefacts["figure"].is_file()


def test_arrivals_are_poisson_and_lengths_uniform():
    work = _draw(4000, 8, 64, 0.25, seed=1)
    gaps = [later.arrival - former.arrival for former, later in pairwise(work)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.05)
    # An exponential gap's deviation is its mean.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.08)
    assert {request.tokens for request in work} == set(range(8, 65))
    assert work == _draw(4000, 8, 64, 0.25, seed=1) != _draw(4000, 8, 64, 0.25, seed=2)
