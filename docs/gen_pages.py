"""Write a page for each room from its cards and docstrings, and one on adding a paper."""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, "docs")
from coverage import coverage_table

from paperworks.lab.records import load_records, records_of, status
from paperworks.lab.report import claims, markdown_rows, table, told
from paperworks.lab.verdicts import in_words, verdicts
from paperworks.papers import ROOMS, load_cards

cards = load_cards().values()
for room, purpose in ROOMS.items():
    papers = [paper for paper in cards if paper.room == room]
    lines = [f"# {room.capitalize()}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
    for paper in papers:
        link = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else "no arXiv number"
        authors = ", ".join(paper.authors[:6]) + (" and others" if len(paper.authors) > 6 else "")
        lines += [
            f"## {' and '.join(paper.names)}",
            "",
            f"*{paper.title}* ({authors}{', ' if authors else ''}{paper.year}, {link})",
            "",
            paper.summary,
            "",
        ]
        if paper.claims and status(paper) != "planned":
            found = verdicts(paper)
            lines += [f"{in_words(found)}.", "", *markdown_rows(*claims(found)), ""]
        elif paper.claims:
            lines += ["| claim | value | setting | against |", "| --- | --- | --- | --- |"]
            lines += [f"| {c.metric} | {c.value} {c.unit} | {c.setting} | {c.against} |" for c in paper.claims]
            lines.append("")
        for record in records_of(paper.slug):
            lines += [*markdown_rows(*table(paper.slug, record["measurements"])), "", f"*{told(record)}*", ""]
        if paper.slug in load_records() and paper.shortfall:
            lines += [f"**Short of the claims.** {paper.shortfall}", ""]
        public = Path(f"src/paperworks/{room}/__init__.py")
        exported = public.read_text() if public.is_file() else ""
        for name in paper.names:
            if f'"{name}"' in exported:
                lines += [f"::: paperworks.{room}.{name}", ""]
    with mkdocs_gen_files.open(f"rooms/{room}.md", "w") as page:
        page.write("\n".join(lines))

with mkdocs_gen_files.open("adding.md", "w") as page:
    page.write(Path("CONTRIBUTING.md").read_text())

with mkdocs_gen_files.open("measuring.md", "w") as page:
    page.write(Path("docs/measuring.md").read_text().replace("<!-- coverage -->", "\n".join(coverage_table())))
