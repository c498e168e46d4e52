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
    """The papers, what works, and the newest figure of each."""
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
    """The papers as a table, in their order with the whole first sentence of each, or one line each under their rooms."""
    from paperworks.lab import records

    if as_json:
        return print_json([{**paper.model_dump(), "status": records.status(paper)} for paper in papers])
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    console = terminal()
    widest = max((len(paper.slug) for paper in papers), default=0)
    table.add_column("slug", no_wrap=True, min_width=widest)
    table.add_column("status", no_wrap=True, min_width=len("measured"))
    room_left = max(20, console.width - widest - len("measured") - 26) if by_room else None
    table.add_column("what it does", no_wrap=by_room, overflow="ellipsis", max_width=room_left)
    table.add_column("newest figure", overflow="fold", min_width=18)
    room = None
    for paper in sorted(papers, key=lambda paper: list(ROOMS).index(paper.room)) if by_room else papers:
        if by_room and paper.room != room:
            table.add_section()
            table.add_row(f"[bold]{paper.room}[/bold]", "", f"[bold]{ROOMS[paper.room]}[/bold]", "")
        room = paper.room
        record = records.load_records().get(paper.slug)
        best = records.headline(record) if record else None
        newest = f"{best.name} {records.interval(best)}" if best else ""
        table.add_row(paper.slug, records.status(paper), paper.summary.split(". ")[0], newest)
    console.print(table)


def search_papers(
    query: Annotated[str, typer.Argument(help="What you are looking for, in plain words.")],
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    words: Annotated[bool, typer.Option("--words", help="By words only, at once.")] = False,
    embedder: Annotated[str | None, typer.Option(help="A sentence-transformers model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find papers by words and by meaning."""
    from paperworks.page.search import search

    _print_papers(search(query, meaning=not words, embedder=embedder, limit=limit), as_json)


def show(
    paper: Annotated[str, typer.Argument(help="Slug, public name or arXiv number.")], as_json: JsonOption = False
) -> None:
    """A paper's card, its claims, how to import it, and the newest figures."""
    from paperworks.lab import records
    from paperworks.lab.report import claims, grid, tall

    card = get(paper)
    record = records.load_records().get(card.slug)
    if as_json:
        newest = record and {**record, "measurements": [m.__dict__ for m in record["measurements"]]}
        return print_json({**card.model_dump(), "status": records.status(card), "record": newest})
    console = terminal()
    console.print(f"[bold]{card.title}[/bold] ({card.year})", highlight=False)
    for line in (
        ", ".join(card.authors),
        card.url,
        card.code and f"{card.code} ({card.licence or 'licence not known'})",
    ):
        if line:
            console.print(line, highlight=False)
    console.print(f"\n{card.summary}\n", highlight=False)
    state = records.status(card)
    console.print(f"{state} · {card.room}: {ROOMS[card.room]} · {', '.join(card.tags)}", highlight=False)
    if state != "planned":
        console.print("\n".join(["", *card.imports, f"paperworks run {card.slug}"]), highlight=False)
    console.print("\n".join(["", *claims(card)]), highlight=False)
    if record:
        headings, rows = tall(*grid(record["measurements"]))
        from rich.table import Table

        table = Table(*headings, title="measured", title_justify="left", caption=records.machine(record["environment"]))
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if card.shortfall:
            console.print(f"Short of the claim: {card.shortfall}", highlight=False)
