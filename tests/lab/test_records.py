"""Committed records and the tables made from them."""

from __future__ import annotations

import json

import pytest

from paperworks.errors import UsageError
from paperworks.lab import Run, records, report
from paperworks.lab.run import Measurement
from paperworks.papers import get


@pytest.fixture
def run():
    run = Run("hydra", {"model": "/home/ada/models/mine", "new_tokens": 8})
    run.environment = {"cpu": "Chip", "cores": 2, "threads": 2, "host": "ada-laptop", "gpu": None}
    run.record("speed", 20.5, unit="tokens/s", better="higher", series="plain")
    run.ratio("speed-up", method=[3.0, 3.2], baseline=[2.0, 2.0], series="Hydra", against="plain")
    run.status = "finished"
    return run


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text("# P\n<!-- benchmarks:start -->\nold\n<!-- benchmarks:end -->\nend\n")
    yield tmp_path
    records.load_records.cache_clear()


def test_record_survives_writing_and_reading(run, root):
    path = records.write_record(run, root)
    assert path == root / "benchmarks" / "records" / "hydra.json"
    read = records.load_records(path.parent)["hydra"]
    assert read["measurements"] == run.measurements


def test_record_names_no_machine_and_no_user(run, root):
    text = records.write_record(run, root).read_text()
    assert "ada" not in text and '"model": "mine"' in text


def test_tables_in_both_readmes_are_rewritten(run, root):
    records.write_record(run, root)
    table = (root / "benchmarks" / "README.md").read_text().split("\n\n", 1)[1]
    assert "speed-up, Hydra: 1.55x (1.5 to 1.6) against plain" in table and "Chip, 2 cores, 2 threads" in table
    readme = (root / "README.md").read_text()
    assert "speed-up, Hydra: 1.55x (1.5 to 1.6) against plain" in readme
    assert "old" not in readme and readme.endswith("end\n")
    records.write_record(run, root)
    assert (root / "README.md").read_text() == readme


def test_readme_has_one_figure_and_one_claim_a_paper(run, root):
    run.status = "running"
    run.ratio("speed-up", method=[5.0], baseline=[2.0], series="Hydra++", against="plain")
    run.ratio("accepted per call, ratio", method=[5.0], baseline=[2.0], series="Hydra++", against="Medusa")
    run.status = "finished"
    records.write_record(run, root)
    rows = [line for line in (root / "README.md").read_text().splitlines() if "against" in line]
    assert len(rows) == 1 and "speed-up, Hydra++: 2.5x" in rows[0] and ";" not in rows[0]


def test_figure_is_committed_too(run, root):
    from matplotlib.figure import Figure

    run.status = "running"
    run.figure(Figure())
    run.status = "finished"
    records.write_record(run, root)
    assert (root / "benchmarks" / "figures" / "hydra.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_run_becomes_no_record(run, root):
    run.status = "interrupted"
    with pytest.raises(UsageError, match="only a finished run"):
        records.write_record(run, root)


@pytest.mark.parametrize("change", [{"schema": 99}, {"paper": "other"}, {"measurements": [{"name": "x"}]}])
def test_foreign_record_is_refused_by_name(run, root, change):
    path = records.write_record(run, root)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    records.load_records.cache_clear()
    with pytest.raises(UsageError, match=r"hydra\.json is not a benchmark record"):
        records.load_records(path.parent)


def test_status_follows_from_recipe_and_record(monkeypatch):
    monkeypatch.setattr(records, "load_records", lambda: {"chimera": {}})
    monkeypatch.setattr(records, "recipes", lambda: {"hydra": object(), "chimera": object()})
    assert [records.status(get(slug)) for slug in ("chimera", "hydra", "tsdiff")] == ["measured", "runs", "planned"]


@pytest.mark.parametrize(
    "measurement, text",
    [
        (Measurement("n", 1234.5), "1,234"),
        (Measurement("n", 0.01234, "s"), "0.0123 s"),
        (Measurement("n", 2.0, "x", low=1.5, high=2.5), "2x (1.5 to 2.5)"),
    ],
)
def test_figures_are_short(measurement, text):
    assert records.interval(measurement) == text


def test_grid_has_a_row_for_each_series_and_a_column_for_each_measurement(run):
    headings, rows = report.grid(run.measurements)
    assert headings == ["", "speed (tokens/s)", "speed-up against plain"]
    assert rows == [["plain", "20.5", ""], ["Hydra", "", "1.55x (1.5 to 1.6)"]]


def test_markdown_shows_the_claim_beside_ours(run):
    text = report.markdown(run, get("hydra"))
    assert "| Hydra |  | 1.55x (1.5 to 1.6) |" in text and "- paper: " in text
