"""The recipe of the Wasserstein dependency measure, seconds long."""

from __future__ import annotations

import math

from paperworks.lab import execute
from paperworks.recipes.representation.wasserstein_dependency import ACCURACY


def test_wasserstein_dependency_measures_what_both_losses_keep():
    run = execute("wasserstein-dependency", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for data in ("codes", "digit grids"):
        for size in (16, 64):
            setting = f"{data}, batch {size}"
            accuracy = {method: figures[ACCURACY, f"{setting}, {method}"].value for method in ("CPC", "WPC")}
            assert all(0 < value <= 1 for value in accuracy.values())
            gained = figures["accuracy gained", f"{setting}, WPC"]
            assert math.isclose(gained.value, accuracy["WPC"] - accuracy["CPC"], abs_tol=1e-9)
            norms = [figures["gradient norm", f"{setting}, {method}"].value for method in ("CPC", "WPC")]
            # The few steps on grids end before the critics part.
            assert data == "digit grids" or norms[1] < norms[0]
            assert figures["bound on mutual information", f"{setting}, WPC"].value <= math.log(size)
            kept = figures["accuracy kept", f"{setting}, WPC"]
            assert kept.low <= kept.value <= kept.high
    assert run.artefacts["figure"].is_file()
