"""The committed benchmarks folder of a checkout: records, figures, and the pages made from them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.records import (
    command,
    device,
    forget_records,
    interval,
    load_records,
    records_of,
    write_json,
)
from paperworks.lab.report import claims, markdown_rows, table, told
from paperworks.lab.run import Measurement, Run
from paperworks.lab.verdicts import TINY, headline, in_words, tally, verdicts
from paperworks.papers import ROOMS, Paper, load_cards

_MARKS = ("<!-- benchmarks:start -->", "<!-- benchmarks:end -->")


def write_record(run: Run, root: Path) -> Path:
    """Commit a finished run to `root`/benchmarks: its record, its figures and the pages of all.

    A paper has one record a device: that of a GPU stands beside that of a CPU.

    Raises:
        UsageError: The run is not finished.
    """
    if run.status != "finished":
        raise UsageError(f"only a finished run becomes a record, and run {run.id} is {run.status}")
    on = device({"environment": run.environment})
    stem = run.paper if on == "cpu" else f"{run.paper}.{on}"
    benchmarks = root / "benchmarks"
    path = benchmarks / "records" / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(run, path)
    figures = benchmarks / "figures"
    for name, artefact in run.artefacts.items():
        if artefact.suffix == ".png":
            figures.mkdir(exist_ok=True)
            shutil.copy(artefact, figures / (f"{stem}.png" if name == "figure" else f"{stem}-{name}.png"))
    forget_records()
    write_pages(root)
    return path


def write_pages(root: Path) -> None:
    """Make the pages of `root`'s records: one of claims a room, one of all figures a paper, and the README's table."""
    benchmarks = root / "benchmarks"
    folder = benchmarks / "records"
    cards = [paper for paper in load_cards().values() if paper.slug in load_records(folder)]
    (benchmarks / "README.md").write_text(_rooms(cards, folder), encoding="utf-8")
    pages = benchmarks / "papers"
    pages.mkdir(exist_ok=True)
    for paper in cards:
        (pages / f"{paper.slug}.md").write_text(paper_page(paper, records_of(paper.slug, folder)), encoding="utf-8")
    readme = root / "README.md"
    if readme.is_file() and all(mark in (text := readme.read_text(encoding="utf-8")) for mark in _MARKS):
        start, end = map(re.escape, _MARKS)
        brief = "\n".join(_brief(cards, folder))
        # A function, since the table's own text must not be read as a replacement pattern.
        new = re.sub(f"{start}.*{end}", lambda _: f"{_MARKS[0]}\n{brief}\n{_MARKS[1]}", text, flags=re.DOTALL)
        readme.write_text(new, encoding="utf-8")


def _rooms(cards: list[Paper], folder: Path) -> str:
    """Claims and verdicts, a table a room."""
    everything = [verdict for paper in cards for verdict in verdicts(paper, records_of(paper.slug, folder))]
    counts = ", ".join(f"{count} {kind}" for kind, count in tally(everything).items())
    lines = ["# Benchmarks", "", f"{len(everything)} claims of {len(cards)} papers: {counts}.", ""]
    for room in ROOMS:
        papers = [paper for paper in cards if paper.room == room]
        if not papers:
            continue
        lines += [f"## {room.capitalize()}", ""]
        rows = []
        for paper in papers:
            found = verdicts(paper, records_of(paper.slug, folder))
            link = f"[{' and '.join(paper.names)}](papers/{paper.slug}.md): {in_words(found)}"
            headings, told_claims = claims(found)
            rows += [[link if index == 0 else "", *row] for index, row in enumerate(told_claims)]
        lines += [*markdown_rows(["paper", *headings], rows), ""]
    return "\n".join(lines)


def paper_page(paper: Paper, records: list[dict[str, Any]]) -> str:
    """Claims with verdicts, the recipe's table and every figure of a paper, as Markdown."""
    found = verdicts(paper, records)
    lines = [f"# {' and '.join(paper.names)}: {paper.title}", "", f"{in_words(found)}.", ""]
    if found:
        lines += [*markdown_rows(*claims(found)), ""]
    if paper.shortfall:
        lines += [f"**Short of the claims.** {paper.shortfall}", ""]
    for record in records:
        measured = record["measurements"]
        lines += [f"## Measured on {told(record)}", ""]
        if record["scale"] == "tiny":
            lines += [f"{TINY.capitalize()}.", ""]
        lines += [*markdown_rows(*table(paper.slug, measured)), ""]
        parameters = ", ".join(f"{name} {value}" for name, value in record["parameters"].items())
        lines += [
            f"Made by `{command(record)}`.",
            "",
            f"Parameters: {parameters}.",
            "",
            "### Every figure",
            "",
            *markdown_rows(*every_figure(measured)),
            "",
        ]
    return "\n".join(lines)


def every_figure(measurements: list[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a line a figure, with what it is of, what it is taken to, and how many pairs or repeats it has."""
    rows = [
        [m.name, m.series or "", interval(m), m.against or "", str(len(m.repeats)) if m.repeats else "", m.better]
        for m in measurements
    ]
    return ["figure", "of", "measured", "against", "n", "better"], rows


def _brief(cards: list[Paper], folder: Path) -> list[str]:
    """The README's table: of each paper the first claim that a figure speaks to, and how many of all hold."""
    rows = []
    for paper in cards:
        found = verdicts(paper, records_of(paper.slug, folder))
        first = headline(found)
        name = f"[{' and '.join(paper.names)}](benchmarks/papers/{paper.slug}.md)"
        shown = (
            [f"{first.claim.metric} {first.paper_says}", first.ours, f"{first.kind}: {first.why}"]
            if first
            else ["", "", ""]
        )
        rows.append([name, *shown, in_words(found)])
    return markdown_rows(["paper", "a claim of it", "measured here", "verdict", "all claims"], rows)
