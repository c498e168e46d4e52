"""Committed records: what was measured for each paper, and the table made from them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.recipe import recipes
from paperworks.lab.run import Measurement, Run
from paperworks.papers import Paper, load_cards

SCHEMA = 1
_MARKS = ("<!-- benchmarks:start -->", "<!-- benchmarks:end -->")


def checkout() -> Path | None:
    """The checkout this package is run from, or None where it is installed."""
    root = Path(__file__).parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "benchmarks").is_dir() else None


def records_folder() -> Path:
    """Where the committed records lie: in the checkout, else inside the installed package."""
    root = checkout()
    return root / "benchmarks" / "records" if root else Path(str(files("paperworks"))) / "benchmarks"


def as_record(run: Run) -> dict[str, Any]:
    """A run as JSON values, without anything that names its machine or user.

    Example:
        >>> run = Run("hydra", {"new_tokens": 8})
        >>> run.record("accepted per call", 2.5, better="higher", series="Hydra")
        >>> as_record(run)["measurements"][0]["value"]
        2.5
    """
    environment = {key: value for key, value in run.environment.items() if key != "host"}
    parameters = {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in run.parameters.items()
    }
    return {
        "schema": SCHEMA,
        "paper": run.paper,
        "status": run.status,
        "scale": run.scale,
        "seed": run.seed,
        "parameters": parameters,
        "started": run.started.isoformat(),
        "finished": run.finished.isoformat() if run.finished else None,
        "environment": environment,
        "measurements": [asdict(measurement) for measurement in run.measurements],
    }


@cache
def load_records(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The committed record of each paper that has one.

    Raises:
        UsageError: A file is not a record of this version.
    """
    records = {}
    for path in sorted((folder or records_folder()).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA or record["paper"] != path.stem:
                raise ValueError(f"schema {record['schema']} of {record['paper']!r}")
            record["measurements"] = [Measurement(**entry) for entry in record["measurements"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path.name} is not a benchmark record of schema {SCHEMA}: {error}") from error
        records[path.stem] = record
    return records


def status(paper: Paper) -> str:
    """How far a paper has come: planned, runs (it has a recipe) or measured (a record is committed)."""
    if paper.slug in load_records():
        return "measured"
    return "runs" if paper.slug in recipes() else "planned"


def write_record(run: Run, root: Path) -> Path:
    """Commit a finished run to `root`/benchmarks: its record, its figure and the table of all.

    Raises:
        UsageError: The run is not finished.
    """
    if run.status != "finished":
        raise UsageError(f"only a finished run becomes a record, and run {run.id} is {run.status}")
    benchmarks = root / "benchmarks"
    path = benchmarks / "records" / f"{run.paper}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(run, path)
    figures = benchmarks / "figures"
    for name, artefact in run.artefacts.items():
        if artefact.suffix == ".png":
            figures.mkdir(exist_ok=True)
            shutil.copy(artefact, figures / (f"{run.paper}.png" if name == "figure" else f"{run.paper}-{name}.png"))
    load_records.cache_clear()
    write_tables(root)
    return path


def write_json(run: Run, path: Path) -> None:
    """Write the record of a run."""
    path.write_text(json.dumps(as_record(run), indent=1) + "\n", encoding="utf-8")


def write_tables(root: Path) -> None:
    """Make the tables of `root`'s records: every ratio in benchmarks/README.md, one a paper in README.md."""
    benchmarks = root / "benchmarks"
    records = load_records(benchmarks / "records")
    (benchmarks / "README.md").write_text(f"# Benchmarks\n\n{markdown_table(records)}", encoding="utf-8")
    readme = root / "README.md"
    if readme.is_file() and all(mark in (text := readme.read_text(encoding="utf-8")) for mark in _MARKS):
        start, end = map(re.escape, _MARKS)
        table = markdown_table(records, brief=True)
        # A function, since the table's own text must not be read as a replacement pattern.
        new = re.sub(f"{start}.*{end}", lambda _: f"{_MARKS[0]}\n{table}{_MARKS[1]}", text, flags=re.DOTALL)
        readme.write_text(new, encoding="utf-8")


def headline(record: dict[str, Any]) -> Measurement | None:
    """The one figure that a list has room for: what the recipe names, else the last ratio; None where there is neither."""
    recipe = recipes().get(record["paper"])
    name = recipe.headline if recipe else "speed-up"
    ratios = [measurement for measurement in record["measurements"] if measurement.against]
    named = [measurement for measurement in record["measurements"] if measurement.name == name]
    return next(reversed(named or ratios), None)


def markdown_table(records: dict[str, dict[str, Any]], *, brief: bool = False) -> str:
    """Paper, claim, ours with its interval, and machine: a line for each measured ratio, or one a paper."""
    lines = ["| paper | the paper's claim | measured here | machine |", "| --- | --- | --- | --- |"]
    cards = load_cards()
    for slug, record in records.items():
        paper = cards[slug]
        claims = "; ".join(
            " ".join(
                filter(None, [claim.metric, figure(claim.value), claim.unit, f"against {claim.against or 'nothing'}"])
            )
            for claim in paper.claims[: 1 if brief else None]
        )
        best = headline(record)
        ratios = [best] if brief and best else [m for m in record["measurements"] if m.against]
        for index, measurement in enumerate(ratios or record["measurements"]):
            told = f"{measurement.name}, {measurement.series or paper.names[0]}: {interval(measurement)}"
            told += f" against {measurement.against}" if measurement.against else ""
            first = index == 0
            row = (" and ".join(paper.names), claims, told, machine(record["environment"]))
            lines.append(
                "| " + " | ".join(cell if first or column == 2 else "" for column, cell in enumerate(row)) + " |"
            )
    return "\n".join(lines) + "\n"


def machine(environment: dict[str, Any]) -> str:
    """One line about where a run took place.

    Example:
        >>> machine({"cpu": "Chip", "cores": 2, "threads": 1})
        'Chip, 2 cores, 1 thread'
    """
    counted = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for noun in ("core", "thread")
        if (count := environment.get(f"{noun}s"))
    ]
    return ", ".join(filter(None, [environment.get("gpu") or environment.get("cpu"), *counted]))


def figure(value: float | str) -> str:
    """A number to three or four figures; words as they are."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(measurement: Measurement) -> str:
    """Value, unit and interval in short: "1.52x (1.48 to 1.57)".

    Example:
        >>> interval(Measurement("speed-up", 1.524, "x", low=1.48, high=1.571))
        '1.52x (1.48 to 1.57)'
    """
    unit = "x" if measurement.unit == "x" else f" {measurement.unit}" if measurement.unit else ""
    text = f"{figure(measurement.value)}{unit}"
    if measurement.low is not None and measurement.high is not None:
        text += f" ({figure(measurement.low)} to {figure(measurement.high)})"
    return text
