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
    for loss in ("squared error", "cross-entropy"):
        variants = {f"{name}, {loss}" for name in ("both", "body x2", "body 0", "head x2", "head 0")}
        for measure in ("NC1", "NC2"):
            assert {(f"{measure} at the end", name) for name in variants} <= set(figures)
            for change in ("x2", "0"):
                moved = figures[f"{measure} moved by decay {change}", f"body, {loss}"]
                assert moved.against == "head" and moved.low <= moved.value <= moved.high and len(moved.repeats) == 2
    # A layer is compared with the one before it; of each network the weakest layer is as weak as any.
    for measure in (VARIABILITY, "NC1"):
        each = [figures[f"{measure}, ratio", f"layer {number}"] for number in (1, 2)]
        weakest = figures[f"{measure}, ratio", "weakest layer"]
        assert {m.against for m in (*each, weakest)} == {"the layer before"}
        assert weakest.repeats == [max(pair) for pair in zip(each[0].repeats, each[1].repeats, strict=True)]
    assert run.artefacts["figure"].is_file()
