"""What a run measured, for the terminal or as Markdown: its recipe's table, and the claims with their verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from paperworks.lab.recipe import MOST_COLUMNS, comparisons, recipes
from paperworks.lab.records import as_record, command, interval, machine
from paperworks.lab.run import Measurement, Run
from paperworks.lab.verdicts import TINY, Verdict, in_words, verdicts
from paperworks.papers import Paper

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Grid = tuple[list[str], list[list[str]]]


def grid(measurements: Sequence[Measurement]) -> Grid:
    """Headings and rows: a row for each series, a column for each measurement.

    Example:
        >>> grid([Measurement("speed", 20, "tokens/s", series="plain"), Measurement("speed", 31, "tokens/s", series="Hydra")])
        (['', 'speed (tokens/s)'], [['plain', '20'], ['Hydra', '31']])
    """
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, str]] = {}
    for measurement in measurements:
        unit = measurement.unit if measurement.unit not in ("", "x") else ""
        heading = f"{measurement.name} ({unit})" if unit else measurement.name
        if measurement.against:
            heading = f"{heading} against {measurement.against}"
        columns[heading] = None
        plain = Measurement(**{**measurement.__dict__, "unit": "x" if measurement.unit == "x" else ""})
        rows.setdefault(measurement.series or "", {})[heading] = interval(plain)
    return ["", *columns], [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()]


def table(paper: str, measurements: Sequence[Measurement]) -> Grid:
    """The table of a paper's recipe: the measurements and rows that it names, at most six columns.

    Where the recipe names none of what was measured, as a plugin's may, the first six columns are taken.
    """
    recipe = recipes().get(paper) or comparisons().get(paper)
    columns, patterns = (recipe.columns, recipe.rows) if recipe else ((), ())
    shown = [
        m
        for m in measurements
        if (m.name in columns or f"{m.name} against {m.against}" in columns)
        and (not patterns or any(fnmatchcase(m.series or "", pattern) for pattern in patterns))
    ]
    if not shown:
        headings, rows = grid(measurements)
        return headings[: MOST_COLUMNS + 1], [row[: MOST_COLUMNS + 1] for row in rows]
    # Rows stand in the order in which they were measured, columns in the recipe's.
    headings, rows = grid(shown)
    ordered, _ = grid(
        sorted(shown, key=lambda m: columns.index(m.name if m.name in columns else f"{m.name} against {m.against}"))
    )
    places = [headings.index(heading) for heading in ordered]
    return ordered, [[row[place] for place in places] for row in rows]


def rendered(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A grid for a terminal so many characters wide: nothing is cut in the middle of a number or a word.

    Where its longest words do not fit side by side, each row becomes lines of its own.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # An interval stays on one line.
    rows = [[re.sub(r"(?<=\d) to (?=\d\S*\))", "–", cell) for cell in row] for row in rows]
    columns = [[heading, *(row[index] for row in rows)] for index, heading in enumerate(headings)]
    widest = [max((len(word) for cell in column for word in cell.split(" ")), default=0) for column in columns]
    # Two spaces stand behind each column.
    if sum(widest) + 2 * len(columns) > width:
        lines = []
        for row in rows:
            lines.append(f"{row[0]}:" if row[0] else "")
            lines += [f"  {heading}: {cell}" for heading, cell in zip(headings[1:], row[1:], strict=True) if cell]
        return Text("\n".join(line for line in lines if line))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for (heading, *cells), wide in zip(columns, _widths(columns, widest, width - 2 * len(columns)), strict=True):
        figures = any(cells) and all(not cell or (cell[0] in "-0123456789" and len(cell.split()) < 4) for cell in cells)
        made.add_column(heading, justify="right" if figures else "left", width=wide, vertical="top")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _widths(columns: Sequence[Sequence[str]], least: Sequence[int], room: int) -> list[int]:
    """How wide each column is: its longest word at least, and what is left goes to where cells are broken most."""
    widths = list(least)
    longest = [max(map(len, column)) for column in columns]
    for _ in range(room - sum(least)):
        lines = [-(-most // have) if most > have else 0 for most, have in zip(longest, widths, strict=True)]
        if not any(lines):
            break
        widths[lines.index(max(lines))] += 1
    return widths


def print_results(console: Console, paper: Paper, record: Mapping[str, Any]) -> None:
    """The recipe's table of a record, where it was measured, and the claims with the verdicts that this record gives."""
    console.print()
    console.print(rendered(*table(paper.slug, record["measurements"]), console.width), highlight=False, markup=False)
    console.print(f"\n{told(record)}\n{command(record)}\n", highlight=False, markup=False, soft_wrap=True)
    if record["scale"] == "tiny":
        console.print(f"Seconds long, {TINY}.", highlight=False)
        return
    found = verdicts(paper, [record])
    if found and all(verdict.measurement is None for verdict in found):
        told_elsewhere = (
            f"None of the paper's {len(found)} claims is measured with these options: `paperworks claims {paper.slug}`"
        )
        console.print(told_elsewhere, highlight=False, markup=False, soft_wrap=True)
    else:
        print_claims(console, found)


def print_comparison(console: Console, record: Mapping[str, Any]) -> None:
    """The table of a room's comparison."""
    console.print()
    console.print(
        rendered(*table(record["paper"], record["measurements"]), console.width), highlight=False, markup=False
    )
    console.print(f"\n{told(record)}", highlight=False, markup=False, soft_wrap=True)
    if record["scale"] == "tiny":
        console.print(f"Seconds long, {TINY}.", highlight=False)


def print_claims(console: Console, found: Sequence[Verdict]) -> None:
    """A line a claim, with the paper's figure, ours and the verdict, and the sum."""
    if not found:
        return
    console.print(rendered(*claims(found), console.width), highlight=False, markup=False)
    console.print(f"\n{in_words(found)}", highlight=False, markup=False)


def claims(found: Sequence[Verdict]) -> Grid:
    """Headings and rows of claims: what is claimed, the paper's figure, ours, the verdict."""
    rows = [
        [
            verdict.claim.metric,
            verdict.paper_says,
            verdict.ours,
            f"{verdict.kind}{f': {verdict.why}' if verdict.why else ''}"
            f"{f' ({verdict.claim.differs})' if verdict.claim.differs else ''}",
        ]
        for verdict in found
    ]
    return ["claim", "paper", "here", "verdict"], rows


def told(record: Mapping[str, Any]) -> str:
    """Where and how a record was measured, in one line."""
    when = str(record.get("started", ""))[:10]
    return ", ".join(
        filter(None, [machine(record["environment"]), f"scale {record['scale']}", f"seed {record['seed']}", when])
    )


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A grid as the lines of a Markdown table."""
    ruled = " | ".join("---:" if index else "---" for index in range(len(headings)))
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (headings,)] + [
        f"| {ruled} |",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def markdown(run: Run, paper: Paper) -> str:
    """A run as Markdown: the recipe's table, then the claims."""
    record = as_record(run) | {"measurements": run.measurements}
    found = verdicts(paper, [record])
    lines = [f"### {' and '.join(paper.names)}", "", *markdown_rows(*table(run.paper, run.measurements))]
    if found:
        lines += ["", *markdown_rows(*claims(found))]
    return "\n".join([*lines, "", f"- {told(record)}", f"- `{command(record)}`", ""])
