"""The recipe of near collapse, seconds long."""

from __future__ import annotations

from paperworks.lab import execute
from paperworks.recipes.representation.near_collapse import VARIABILITY


def test_near_collapse_measures_factors_layers_and_decay():
    run = execute("near-collapse", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for series in ("along the class means", "across them"):
        assert figures["largest error of a shrink factor", series].value < 1e-3
    layers = [m for (name, series), m in figures.items() if name == VARIABILITY and series in ("pixels", "layer 1")]
    assert len(layers) == 2 and layers[1].value < layers[0].value
    assert {("NC1 at the end", name) for name in ("both", "body x2", "body 0", "head x2", "head 0")} <= set(figures)
    for change in ("x2", "0"):
        moved = figures[f"NC1 moved by decay {change}", "body"]
        assert moved.low <= moved.value <= moved.high
    assert run.artefacts["figure"].is_file()
