"""Committed records and the tables made from them."""

from __future__ import annotations

import json
import shlex
from typing import Literal

import pytest

from paperworks.errors import UsageError
from paperworks.lab import Run, benchmarks, recipe, records
from paperworks.lab.recipe import find
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
    records.forget_records()


def test_record_survives_writing_and_reading(run, root):
    path = benchmarks.write_record(run, root)
    assert path == root / "benchmarks" / "records" / "hydra.json"
    read = records.load_records(path.parent)["hydra"]
    assert read["measurements"] == run.measurements


def test_record_names_no_machine_and_no_user(run, root):
    text = benchmarks.write_record(run, root).read_text()
    assert "ada" not in text and '"model": "mine"' in text


def test_pages_and_the_readme_are_rewritten(run, root):
    benchmarks.write_record(run, root)
    rooms = (root / "benchmarks" / "README.md").read_text()
    assert "## Decoding" in rooms and "[Hydra](papers/hydra.md): 0 of" in rooms and "not shown here" in rooms
    page = (root / "benchmarks" / "papers" / "hydra.md").read_text()
    assert (
        "| speed-up | Hydra | 1.55x (1.03 to 2.33) | plain | 2 | higher |" in page
        and "Chip, 2 cores, 2 threads" in page
    )
    readme = (root / "README.md").read_text()
    assert "[Hydra](benchmarks/papers/hydra.md)" in readme and "\nold\n" not in readme and readme.endswith("end\n")
    benchmarks.write_record(run, root)
    assert (root / "README.md").read_text() == readme


def test_a_paper_has_one_record_a_device(run, root):
    path = benchmarks.write_record(run, root)
    run.environment = {**run.environment, "gpu": "Great GPU"}
    assert benchmarks.write_record(run, root) == path.with_name("hydra.cuda.json")
    assert [records.device(one) for one in records.records_of("hydra", path.parent)] == ["cuda", "cpu"]
    assert records.device(records.load_records(path.parent)["hydra"]) == "cpu"
    page = (root / "benchmarks" / "papers" / "hydra.md").read_text()
    assert "## Measured on Great GPU" in page and "## Measured on Chip" in page
    path.with_name("hydra.cuda.json").write_text(path.read_text())
    records.forget_records()
    with pytest.raises(UsageError, match=r"hydra\.cuda\.json is not a benchmark record .* it was measured on cpu"):
        records.load_records(path.parent)


def test_figure_is_committed_too(run, root):
    from matplotlib.figure import Figure

    run.status = "running"
    run.figure(Figure())
    run.status = "finished"
    benchmarks.write_record(run, root)
    assert (root / "benchmarks" / "figures" / "hydra.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_run_becomes_no_record(run, root):
    run.status = "interrupted"
    with pytest.raises(UsageError, match="only a finished run"):
        benchmarks.write_record(run, root)


@pytest.mark.parametrize("change", [{"schema": 99}, {"paper": "other"}, {"measurements": [{"name": "x"}]}])
def test_foreign_record_is_refused_by_name(run, root, change):
    path = benchmarks.write_record(run, root)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    records.forget_records()
    with pytest.raises(UsageError, match=r"hydra\.json is not a benchmark record"):
        records.load_records(path.parent)


def test_status_follows_from_recipe_and_record(monkeypatch):
    monkeypatch.setattr(records, "load_records", lambda: {"chimera": {}})
    monkeypatch.setattr(records, "recipes", lambda: {"hydra": object(), "chimera": object()})
    assert [records.status(get(slug)) for slug in ("chimera", "hydra", "tsdiff")] == ["measured", "runs", "planned"]


RECORDS = [(slug, kept) for slug in records.load_records() for kept in records.records_of(slug)]


@pytest.mark.parametrize(("slug", "kept"), RECORDS, ids=[f"{slug} on {records.device(kept)}" for slug, kept in RECORDS])
def test_the_command_of_a_record_gives_its_parameters(slug, kept, monkeypatch):
    from typer.testing import CliRunner

    from paperworks.cli import app, runs

    given = []

    def execute(slug, options, *, scale, seed, **shared):
        given.append((slug, find(slug).plain(options, scale), scale, seed))

    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(runs, "report", lambda done, as_json: 0)
    program, *words = shlex.split(records.command(kept))
    done = CliRunner().invoke(app(), words)
    assert program == "paperworks" and done.exit_code == 0, done.output
    ((found, parameters, scale, seed),) = given
    assert (found, scale, seed) == (slug, kept["scale"], kept["seed"])
    # A recipe may have got options since.
    assert {name: parameters[name] for name in kept["parameters"]} == kept["parameters"]


def test_a_command_names_what_differs_from_its_scale_and_nothing_else(registry):
    @recipe(paper="hydra", tiny={"throws": 2})
    def hydra(
        run: Run, throws: int = 6, share: float = 0.5, fair: bool = True, loud: bool = False,
        name: str = "die", kind: Literal["a", "b"] = "a", seed: int = 0,
    ) -> None: ...  # fmt: skip

    def command(scale="default", seed=0, **options):
        parameters = hydra.plain(options, scale)
        return records.command({"paper": "hydra", "scale": scale, "seed": seed, "parameters": parameters})

    assert command() == "paperworks run hydra"
    assert command("tiny") == "paperworks run hydra --scale tiny"
    assert command("tiny", throws=6) == "paperworks run hydra --scale tiny --throws 6"
    assert command(seed=7, fair=False, loud=True) == "paperworks run hydra --seed 7 --no-fair --loud"
    assert command(share=0.25, name="my die", kind="b") == "paperworks run hydra --share 0.25 --name 'my die' --kind b"
    # An option that is no more, and a recipe that is not here.
    kept = {"paper": "hydra", "scale": "default", "seed": 0, "parameters": {"sides": 6, "throws": 6, "new_name": "x"}}
    assert records.command(kept) == "paperworks run hydra"
    assert records.command({**kept, "paper": "tsdiff"}) == "paperworks run tsdiff --sides 6 --throws 6 --new-name x"


def test_a_machine_is_told_with_what_its_processor_can():
    environment = {"cpu": "AMD EPYC", "instructions": "AVX2", "cores": 2, "threads": 1, "gpu": None}
    assert records.machine(environment) == "AMD EPYC, AVX2, 2 cores, 1 thread"
    assert records.machine({**environment, "gpu": "Great GPU"}) == "Great GPU, 2 cores, 1 thread"
    del environment["instructions"]
    assert records.machine(environment) == "AMD EPYC, 2 cores, 1 thread"


@pytest.mark.parametrize(
    "measurement, text",
    [
        (Measurement("n", 1234.5), "1,234"),
        (Measurement("n", 0.01234, "s"), "0.0123 s"),
        (Measurement("n", 999.7), "1,000"),
        (Measurement("n", 0.0, "x", low=0.0, high=0.5), "0x (0 to 0.5)"),
        (Measurement("n", 2.0, "x", low=1.5, high=2.5), "2x (1.5 to 2.5)"),
    ],
)
def test_figures_are_short(measurement, text):
    assert records.interval(measurement) == text
