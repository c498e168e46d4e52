"""Tables that a person reads: the recipe's own, whole at every width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from paperworks.lab import Run, recipe, records, report
from paperworks.lab.benchmarks import every_figure
from paperworks.lab.run import Measurement
from paperworks.lab.verdicts import verdicts
from paperworks.papers import get

RECORDS = [(slug, kept) for slug in records.load_records() for kept in records.records_of(slug)]
IDS = [f"{slug} on {records.device(kept)}" for slug, kept in RECORDS]


def shown(headings, rows, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(report.rendered(headings, rows, width), highlight=False)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize(("slug", "kept"), RECORDS, ids=IDS)
def test_nothing_is_cut_in_the_middle_of_a_number_or_a_word(slug, kept, width):
    grids = [
        report.table(slug, kept["measurements"]),
        report.claims(verdicts(get(slug))),
        every_figure(kept["measurements"]),
    ]
    for headings, rows in grids:
        printed = shown(headings, rows, width)
        assert all(len(line) <= width for line in printed.splitlines())
        pieces = re.split(r"[\s–]+", printed)
        for cell in [*headings, *(cell for row in rows for cell in row)]:
            for word in cell.split():
                assert word == "to" or word in pieces or f"{word}:" in pieces, (word, printed)


@pytest.mark.parametrize(("slug", "kept"), RECORDS, ids=IDS)
def test_a_recipe_names_the_table_of_its_record(slug, kept):
    found = recipe_of(slug)
    measured = {m.name for m in kept["measurements"]} | {f"{m.name} against {m.against}" for m in kept["measurements"]}
    assert 1 <= len(found.columns) <= 6
    assert set(found.columns) <= measured, set(found.columns) - measured
    headings, rows = report.table(slug, kept["measurements"])
    assert 1 < len(headings) <= 7 and 1 <= len(rows) <= 16
    assert all(any(row[1:]) for row in rows)


def recipe_of(slug):
    from paperworks.lab.recipe import find

    return find(slug)


def test_grid_has_a_row_for_each_series_and_a_column_for_each_measurement():
    run = Run("hydra")
    run.record("speed", 20.5, unit="tokens/s", better="higher", series="plain")
    run.ratio("speed-up", method=[3.0, 3.2], baseline=[2.0, 2.0], series="Hydra", against="plain")
    headings, rows = report.grid(run.measurements)
    assert headings == ["", "speed (tokens/s)", "speed-up against plain"]
    assert rows == [["plain", "20.5", ""], ["Hydra", "", "1.55x (1.03 to 2.33)"]]


def test_the_table_has_the_columns_and_rows_that_the_recipe_names(registry):
    @recipe(paper="hydra", columns=("gain against old", "speed"), rows=("old", "new*"))
    def hydra(run: Run) -> None: ...

    measured = [
        Measurement("speed", 1, series="old"),
        Measurement("noise", 7, series="old"),
        Measurement("speed", 2, series="new one"),
        Measurement("speed", 9, series="other"),
        Measurement("gain", 2, "x", series="new one", against="old"),
        Measurement("gain", 5, "x", series="new one", against="other"),
    ]
    headings, rows = report.table("hydra", measured)
    assert headings == ["", "gain against old", "speed"]
    assert rows == [["old", "", "1"], ["new one", "2x", "2"]]


def test_a_recipe_that_names_no_table_shows_its_first_six_figures(registry):
    measured = [Measurement(f"figure {number}", number) for number in range(9)]
    headings, rows = report.table("hydra", measured)
    assert headings == ["", *(f"figure {number}" for number in range(6))] and len(rows) == 1


def test_a_table_that_does_not_fit_becomes_lines():
    wide = ["", *("measurement" * 2 for _ in range(4))]
    printed = shown(wide, [["row", "1", "2", "", "4"]], 80)
    assert printed.splitlines() == ["row:", *(f"  {'measurement' * 2}: {n}" for n in "124")]


def test_markdown_shows_the_claims_beside_the_table():
    run = Run("hydra")
    run.environment = {"cpu": "Chip", "cores": 2}
    run.ratio("speed-up", method=[3.0, 3.2], baseline=[2.0, 2.0], series="Hydra", against="plain decoding")
    text = report.markdown(run, get("hydra"))
    assert "| Hydra | 1.55x (1.03 to 2.33) |" in text and "| claim | paper | here | verdict |" in text
    assert "- Chip, 2 cores, scale default" in text and "\n- `paperworks run hydra`\n" in text


def test_results_are_followed_by_the_command_that_gives_them():
    kept = records.load_records()["hydra"]
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    report.print_results(console, get("hydra"), kept)
    # In one line, however long, as it is to be copied.
    assert records.command(kept) in console.file.getvalue().splitlines()
    assert "--train-tokens 672000" in records.command(kept) and "--nodes 11" in records.command(kept)


def test_a_run_that_measures_no_claim_says_so_instead_of_none_hold(capsys):
    from rich.console import Console

    from paperworks.lab.report import print_results
    from paperworks.lab.run import Measurement
    from paperworks.papers import get

    record = {
        "paper": "hydra", "scale": "default", "seed": 0, "parameters": {"heads": "shipped"}, "environment": {},
        "measurements": [Measurement("speed-up", 1.3, "x", series="Hydra", against="plain decoding", low=1.1, high=1.5)],
    }  # fmt: skip
    print_results(Console(width=100), get("hydra"), record)
    out = capsys.readouterr().out
    assert "None of the paper's 3 claims is measured with these options" in out and "claims hold" not in out
