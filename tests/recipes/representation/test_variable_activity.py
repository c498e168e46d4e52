"""The recipe variable-activity, seconds long."""

from __future__ import annotations

from paperworks.lab import execute


def test_every_figure_is_recorded():
    run = execute("variable-activity", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    rows = {(m.name, m.series) for m in run.measurements}
    assert {
        ("passive variables", "beta 1"),
        ("accuracy kept", "beta 1"),
        ("total correlation, mean", "beta 1, full"),
    } <= rows
    assert run.artefacts["figure"].is_file()
