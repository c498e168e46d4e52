"""The recipe posterior-collapse, seconds long."""

from __future__ import annotations

from paperworks.lab import execute


def test_every_figure_is_recorded():
    run = execute("posterior-collapse", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    rows = {(m.name, m.series) for m in run.measurements}
    assert {
        ("divergence, largest error", "linear CVAE"),
        ("divergence, largest error", "linear HVAE"),
        ("active units", "beta 4"),
        ("active units, difference", "rho 1"),
        *(("active units of z2, difference", series) for series in ("beta1 4", "beta2 4", "eta_dec 1")),
    } <= rows
    assert run.artefacts["figure"].is_file()
