"""The cards: list, search, show."""

from __future__ import annotations

from typing import Annotated

import typer

from paperworks.cli.shared import JsonOption, print_json, terminal
from paperworks.errors import UsageError
from paperworks.papers import ROOMS, Paper, get, load_cards


def list_papers(
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    status: Annotated[str | None, typer.Option(help="Only planned, runs or measured.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The papers: what each does, and how many of its claims hold here."""
    from paperworks.lab import records

    if room is not None and room not in ROOMS:
        raise UsageError(f"there is no room {room!r}, only {', '.join(ROOMS)}")
    if status not in (None, "planned", "runs", "measured"):
        raise UsageError(f"there is no status {status!r}, only planned, runs and measured")
    papers = [
        paper
        for paper in load_cards().values()
        if room in (None, paper.room) and status in (None, records.status(paper))
    ]
    _print_papers(papers, as_json, by_room=True)


def _print_papers(papers: list[Paper], as_json: bool, *, by_room: bool = False) -> None:
    """The papers as a table, under their rooms or in their order: what each does, and how many of its claims hold."""
    from paperworks.lab import records
    from paperworks.lab.verdicts import in_words, tally, verdicts

    found = {paper.slug: verdicts(paper) if records.status(paper) != "planned" else [] for paper in papers}
    if as_json:
        return print_json(
            [
                {**paper.model_dump(), "status": records.status(paper), "verdicts": tally(found[paper.slug])}
                for paper in papers
            ]
        )
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    widest = max((len(paper.slug) for paper in papers), default=0)
    table.add_column("slug", no_wrap=True, min_width=widest)
    table.add_column("what it does", min_width=20)
    table.add_column("here", min_width=len("contradicted"))
    room = None
    for paper in sorted(papers, key=lambda paper: list(ROOMS).index(paper.room)) if by_room else papers:
        if by_room and paper.room != room:
            table.add_section()
            table.add_row(f"[bold]{paper.room}[/bold]", f"[bold]{ROOMS[paper.room]}[/bold]", "")
        room = paper.room
        status = records.status(paper)
        here = f"{status}: {in_words(found[paper.slug])}" if status == "measured" else status
        if status == "measured" and all(record["scale"] == "tiny" for record in records.records_of(paper.slug)):
            here = "runs, tried at scale tiny"
        table.add_row(paper.slug, paper.summary.split(". ")[0].rstrip("."), here)
    terminal().print(table)


def search_papers(
    query: Annotated[str, typer.Argument(help="What you are looking for, in plain words.")],
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    words: Annotated[bool, typer.Option("--words", help="By words only, at once.")] = False,
    embedder: Annotated[str | None, typer.Option(help="A sentence-transformers model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find papers by words and by meaning."""
    from paperworks.page.search import search

    found = search(query, meaning=not words, embedder=embedder, limit=limit)
    if not found and not as_json:
        return print("nothing found: try other words, or `paperworks list`")
    _print_papers(found, as_json)


def show(
    paper: Annotated[str, typer.Argument(help="Slug, public name or arXiv number.")], as_json: JsonOption = False
) -> None:
    """A paper's card, its claims, how to import it, and the newest figures."""
    from paperworks.lab import records
    from paperworks.lab.report import print_claims, rendered, table, told
    from paperworks.lab.verdicts import TINY, verdicts

    card = get(paper)
    kept = records.records_of(card.slug)
    found = verdicts(card)
    if as_json:
        return print_json(
            {
                **card.model_dump(exclude={"claims"}),
                "claims": [verdict.as_json() for verdict in found],
                "status": records.status(card),
                "records": [{**r, "measurements": [m.__dict__ for m in r["measurements"]]} for r in kept],
            }
        )
    console = terminal()
    console.print(f"[bold]{card.title}[/bold] ({card.year})", highlight=False)
    for line in (
        ", ".join(card.authors),
        card.url,
        card.code and f"{card.code} ({card.licence or 'licence not known'})",
    ):
        if line:
            console.print(line, highlight=False, markup=False)
    console.print(f"\n{card.summary}\n", highlight=False, markup=False)
    state = records.status(card)
    console.print(f"{state} · {card.room}: {ROOMS[card.room]} · {', '.join(card.tags)}", highlight=False)
    if state != "planned":
        console.print("\n".join(["", *card.imports, f"paperworks run {card.slug}"]), highlight=False, markup=False)
    for record in kept:
        console.print()
        console.print(rendered(*table(card.slug, record["measurements"]), console.width), highlight=False)
        console.print(f"\n{told(record)}\n{records.command(record)}", highlight=False, markup=False, soft_wrap=True)
        if record["scale"] == "tiny":
            console.print(f"{TINY.capitalize()}.", highlight=False, markup=False)
    console.print()
    print_claims(console, found)
    if kept and card.shortfall:
        console.print(f"\nShort of the claims: {card.shortfall}", highlight=False, markup=False)


def claims(
    paper: Annotated[str | None, typer.Argument(help="Slug, public name or arXiv number; all by default.")] = None,
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only claims with this verdict.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What the papers claim, what was measured here, and the verdict; a line a claim, the sum at the end."""
    from paperworks.lab import records
    from paperworks.lab.report import claims as told_claims
    from paperworks.lab.report import rendered
    from paperworks.lab.verdicts import KINDS, tally, verdicts_by_paper

    if room is not None and room not in ROOMS:
        raise UsageError(f"there is no room {room!r}, only {', '.join(ROOMS)}")
    if verdict is not None and verdict not in KINDS:
        raise UsageError(f"there is no verdict {verdict!r}, only {', '.join(KINDS)}")
    if paper is not None and records.status(get(paper)) == "planned":
        raise UsageError(f"{get(paper).slug} is planned: nothing here speaks to its claims yet")
    found = verdicts_by_paper(room, verdict)
    if paper is not None:
        slug = get(paper).slug
        found = {slug: found.get(slug, [])}
    counts = tally([one for claimed in found.values() for one in claimed])
    if as_json:
        listed = [{"paper": slug, **one.as_json()} for slug, claimed in found.items() for one in claimed]
        return print_json({"claims": listed, "verdicts": counts})
    console = terminal()
    for slug, claimed in found.items():
        if claimed:
            console.print(f"\n[bold]{slug}[/bold]", highlight=False)
            console.print(rendered(*told_claims(claimed), console.width), highlight=False)
    total = sum(counts.values())
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    console.print(f"\n{total} claim{'' if total == 1 else 's'}{f': {told}' if told else ''}", highlight=False)
