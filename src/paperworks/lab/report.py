"""What a run measured, as a table for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paperworks.lab.records import figure, interval, machine
from paperworks.lab.run import Measurement, Run
from paperworks.papers import Paper

if TYPE_CHECKING:
    from rich.table import Table


def grid(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row for each series, a column for each measurement.

    Example:
        >>> grid([Measurement("speed", 20, "tokens/s", series="plain"), Measurement("speed", 31, "tokens/s", series="Hydra")])
        (['', 'speed (tokens/s)'], [['plain', '20'], ['Hydra', '31']])
    """
    columns: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    for measurement in measurements:
        unit = measurement.unit if measurement.unit not in ("", "x") else ""
        heading = f"{measurement.name} ({unit})" if unit else measurement.name
        if measurement.against:
            heading = f"{heading} against {measurement.against}"
        columns[heading] = measurement.name
        plain = Measurement(**{**measurement.__dict__, "unit": "x" if measurement.unit == "x" else ""})
        rows.setdefault(measurement.series or "", {})[heading] = interval(plain)
    return ["", *columns], [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()]


def tall(headings: list[str], rows: list[list[str]], *, most: int = 7) -> tuple[list[str], list[list[str]]]:
    """The same table with a row for each measurement, where it has more than `most` columns and fewer rows.

    Example:
        >>> tall(["", "speed", "calls"], [["plain", "20", "9"]], most=2)
        (['', 'plain'], [['speed', '20'], ['calls', '9']])
    """
    if len(headings) <= max(most, len(rows) + 1):
        return headings, rows
    columns = [list(column) for column in zip(headings, *rows, strict=True)]
    return columns[0], columns[1:]


def results_table(run: Run, paper: Paper) -> Table:
    """A run as a rich table, the paper's claims beneath."""
    from rich.table import Table

    headings, rows = tall(*grid(run.measurements))
    # No padding: beside lines it is not missed, and six columns then hold long words unbroken in a narrow terminal.
    table = Table(
        title=f"{' and '.join(paper.names)}: {paper.title}", title_justify="left", caption_justify="left", padding=0
    )
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] in paper.names else None)
    table.caption = "\n".join([*claims(paper), machine(run.environment)])
    return table


def claims(paper: Paper) -> list[str]:
    """The paper's claims, a line each."""
    return [
        f"paper: {claim.metric} {figure(claim.value)}{claim.unit and f' {claim.unit}'}"
        f"{f' against {claim.against}' if claim.against else ''} ({claim.setting})"
        for claim in paper.claims
    ]


def markdown(run: Run, paper: Paper) -> str:
    """A run as a Markdown table with the paper's claims beneath."""
    headings, rows = grid(run.measurements)
    lines = [f"### {' and '.join(paper.names)}", "", "| " + " | ".join(headings) + " |"]
    lines.append("| " + " | ".join("---" if index == 0 else "---:" for index in range(len(headings))) + " |")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in claims(paper)), f"- {machine(run.environment)}", ""])
