"""Committed records: what was measured for each paper."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.recipe import recipes
from paperworks.lab.run import Measurement, Run
from paperworks.papers import Paper, PluginWarning, Source, load_cards, source_of

SCHEMA = 1


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


def device(record: Mapping[str, Any]) -> str:
    """What a record was measured on: "cuda" or "cpu"."""
    return "cuda" if record["environment"].get("gpu") else "cpu"


@cache
def load_records(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The committed record of each paper that has one; that of a CPU where there is one for a GPU too.

    A plugin's records lie beside its card, `<slug>.json` and `<slug>.cuda.json`.

    Raises:
        UsageError: A file is not a record of this version.
    """
    return {slug: records[-1] for slug, records in _kept(folder).items()}


def records_of(slug: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """All committed records of a paper, one a device, a GPU's first."""
    return _kept(folder).get(slug, [])


def _kept(folder: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Those of a folder; by default this repository's, and those that lie beside the cards of plugins."""
    if folder is not None:
        return _read(folder)
    kept = dict(_read(records_folder()))
    for paper in load_cards().values():
        if paper.origin and (source := source_of(paper)) is not None:
            kept |= _brought(source, paper.slug)
    return kept


@cache
def _brought(source: Source, slug: str) -> dict[str, list[dict[str, Any]]]:
    try:
        return _read(source.folder, f"{slug}.*json")
    except UsageError as error:
        warnings.warn(f"a record of {source.name} is left out: {error}", PluginWarning, stacklevel=2)
        return {}


@cache
def _read(folder: Path, pattern: str = "*.json") -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(pattern)):
        slug, _, on = path.stem.partition(".")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA or record["paper"] != slug:
                raise ValueError(f"schema {record['schema']} of {record['paper']!r}")
            record["measurements"] = [Measurement(**entry) for entry in record["measurements"]]
            if device(record) != (on or "cpu"):
                raise ValueError(f"it was measured on {device(record)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path.name} is not a benchmark record of schema {SCHEMA}: {error}") from error
        records.setdefault(slug, []).append(record)
    return records


def forget_records() -> None:
    """Read the committed records anew the next time."""
    load_records.cache_clear()
    _brought.cache_clear()
    _read.cache_clear()


def status(paper: Paper) -> str:
    """How far a paper has come: planned, runs (it has a recipe) or measured (a record is committed)."""
    if paper.slug in load_records():
        return "measured"
    return "runs" if paper.slug in recipes() else "planned"


def write_json(run: Run, path: Path) -> None:
    """Write the record of a run."""
    path.write_text(json.dumps(as_record(run), indent=1) + "\n", encoding="utf-8")


def machine(environment: dict[str, Any]) -> str:
    """One line about where a run took place; records made before it was told have no instruction set.

    Example:
        >>> machine({"cpu": "Chip", "instructions": "AVX2", "cores": 2, "threads": 1})
        'Chip, AVX2, 2 cores, 1 thread'
    """
    counted = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for noun in ("core", "thread")
        if (count := environment.get(f"{noun}s"))
    ]
    on_cpu = None if environment.get("gpu") else environment.get("instructions")
    return ", ".join(filter(None, [environment.get("gpu") or environment.get("cpu"), on_cpu, *counted]))


def command(record: Mapping[str, Any]) -> str:
    """What is typed to make a record again: its recipe's command with every option that differs from the scale's own.

    Example:
        >>> command({"paper": "hydra", "scale": "default", "seed": 3, "parameters": {"nodes": 11, "prefix_layer": True}})
        'paperworks run hydra --seed 3 --nodes 11 --prefix-layer'
    """
    recipe = recipes().get(record["paper"])
    words = ["paperworks", "run", record["paper"]]
    if record["scale"] != "default":
        words += ["--scale", record["scale"]]
    if record["seed"]:
        words += ["--seed", str(record["seed"])]
    usual = recipe.plain(scale=record["scale"]) if recipe and record["scale"] in recipe.scales else {}
    for name, value in record["parameters"].items():
        # A record may be older than its recipe, and have an option that is no more.
        if (recipe and name not in recipe.parameters) or (name in usual and usual[name] == value):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def figure(value: float | str) -> str:
    """A number to three or four figures; words as they are."""
    if isinstance(value, str):
        return value
    # From 999.5 on three figures would be written with an exponent.
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


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
