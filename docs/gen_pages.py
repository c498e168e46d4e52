"""Write a page for each room from its cards and docstrings, the reference, and one on adding a paper."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import typer

sys.path.insert(0, "docs")
from coverage import coverage_table

from paperworks.cli import app
from paperworks.lab.records import command, load_records, records_of, status
from paperworks.lab.report import claims, markdown_rows, table, told
from paperworks.lab.verdicts import TINY, in_words, verdicts
from paperworks.papers import ROOMS, Paper, load_cards


def _paper(paper: Paper) -> list[str]:
    """A paper that runs: its claims with verdicts, its records, and its public names."""
    lines = [f"## {' and '.join(paper.names)}", "", *_card(paper)]
    if paper.claims:
        found = verdicts(paper)
        lines += [f"{in_words(found)}.", "", *markdown_rows(*claims(found)), ""]
    for record in records_of(paper.slug):
        lines += [*markdown_rows(*table(paper.slug, record["measurements"])), ""]
        lines += [f"*{told(record)}*", "", f"`{command(record)}`", ""]
        if record["scale"] == "tiny":
            lines += [f"{TINY.capitalize()}.", ""]
    if paper.slug in load_records() and paper.shortfall:
        lines += [f"**Short of the claims.** {paper.shortfall}", ""]
    public = Path(f"src/paperworks/{paper.room}/__init__.py")
    exported = public.read_text() if public.is_file() else ""
    return [*lines, *(f"::: paperworks.{paper.room}.{name}\n" for name in paper.names if f'"{name}"' in exported)]


def _planned(papers: list[Paper]) -> list[str]:
    """Papers that do not run here: what they are, without figures, names to import or a command."""
    if not papers:
        return []
    lines = ["## Planned", "", "These have a card, and do not run here yet: nothing of them was measured.", ""]
    for paper in papers:
        lines += [f"### {paper.title} (planned)", "", *_card(paper)]
        if paper.claims:
            rows = [[c.metric, f"{c.value} {c.unit}".strip(), c.setting, c.against] for c in paper.claims]
            lines += [*markdown_rows(["the paper claims", "its figure", "setting", "against"], rows), ""]
    return lines


def _card(paper: Paper) -> list[str]:
    link = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else "no arXiv number"
    authors = ", ".join(paper.authors[:6]) + (" and others" if len(paper.authors) > 6 else "")
    return [f"*{paper.title}* ({authors}{', ' if authors else ''}{paper.year}, {link})", "", paper.summary, ""]


def _commands(command: Any, name: str) -> Iterator[str]:
    """A command with its options, and the commands within it, from the application itself."""
    context = command.make_context(name, [], resilient_parsing=True)
    inner = getattr(command, "commands", {})
    yield from (f"{'#' * max(2, len(name.split()))} {name}", "", (command.help or "").strip(), "")
    arguments = [one for one in command.get_params(context) if one.param_type_name == "argument"]
    options = [
        one for one in command.get_params(context) if one.param_type_name == "option" and "--help" not in one.opts
    ]
    rows = [[f"`{one.name.upper()}`", one.help or "", ""] for one in arguments]
    for one in options:
        shown = getattr(one, "show_default", None)
        # A recipe tells its own default; other options have theirs.
        default = shown if isinstance(shown, str) else one.default
        told_default = "" if default is None or default is False or default == "" else f"`{default}`"
        rows.append([", ".join(f"`{opt}`" for opt in one.opts), one.help or "", told_default])
    if rows:
        headings, _, *lines = markdown_rows(["option", "what it is", "default"], rows)
        yield from (headings, "| --- | --- | --- |", *lines, "")
    if command.epilog:
        yield from (command.epilog, "")
    for sub, within in sorted(inner.items()):
        yield from _commands(within, f"{name} {sub}")


cards = load_cards().values()
for room, purpose in ROOMS.items():
    papers = [paper for paper in cards if paper.room == room]
    planned = [paper for paper in papers if status(paper) == "planned"]
    lines = [f"# {room.capitalize()}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
    for paper in papers:
        if paper not in planned:
            lines += _paper(paper)
    with mkdocs_gen_files.open(f"rooms/{room}.md", "w") as page:
        page.write("\n".join([*lines, *_planned(planned)]))

with mkdocs_gen_files.open("reference/command-line.md", "w") as page:
    intro = [
        "# The command line",
        "",
        "Every command and option. `--json` prints what a table shows for other programs.",
        "",
    ]
    page.write("\n".join([*intro, *_commands(typer.main.get_command(app()), "paperworks")]))

contributing = Path("CONTRIBUTING.md").read_text().replace("](docs/", "](")
ours, _, others = contributing.partition("\n## ")
for name, text in (
    ("adding", ours.replace("both are told below", "[plugins](plugins.md) tells both")),
    ("plugins", f"# {others}"),
):
    with mkdocs_gen_files.open(f"{name}.md", "w") as page:
        page.write(text)

with mkdocs_gen_files.open("measuring.md", "w") as page:
    page.write(Path("docs/measuring.md").read_text().replace("<!-- coverage -->", "\n".join(coverage_table())))
