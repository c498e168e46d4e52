"""Write a page for each room from its cards and docstrings, and one on adding a paper."""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files

from paperworks.lab.records import interval, load_records, machine
from paperworks.papers import ROOMS, load_cards

cards, records = load_cards().values(), load_records()
for room, purpose in ROOMS.items():
    papers = [paper for paper in cards if paper.room == room]
    lines = [f"# {room.capitalize()}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
    for paper in papers:
        link = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else "no arXiv number"
        lines += [
            f"## {' and '.join(paper.names)}",
            "",
            f"*{paper.title}* ({paper.year}, {link})",
            "",
            paper.summary,
            "",
        ]
        if paper.claims:
            lines += ["| claim | value | setting | against |", "| --- | --- | --- | --- |"]
            lines += [f"| {c.metric} | {c.value} {c.unit} | {c.setting} | {c.against} |" for c in paper.claims]
            lines.append("")
        if record := records.get(paper.slug):
            lines += ["| measured here | |", "| --- | --- |"]
            for m in record["measurements"]:
                name = f"{m.name}, {m.series}" if m.series else m.name
                lines.append(f"| {name} | {interval(m)}{f' against {m.against}' if m.against else ''} |")
            lines += ["", f"*{machine(record['environment'])}*", ""]
            if paper.shortfall:
                lines += [f"**Short of the claim.** {paper.shortfall}", ""]
        public = Path(f"src/paperworks/{room}/__init__.py")
        exported = public.read_text() if public.is_file() else ""
        for name in paper.names:
            if f'"{name}"' in exported:
                lines += [f"::: paperworks.{room}.{name}", ""]
    with mkdocs_gen_files.open(f"rooms/{room}.md", "w") as page:
        page.write("\n".join(lines))

with mkdocs_gen_files.open("adding.md", "w") as page:
    page.write(Path("CONTRIBUTING.md").read_text())
