"""The page: ingest, serve, digest, mail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from paperworks.cli.shared import JsonOption, StoreOption, print_json, terminal
from paperworks.errors import UsageError

SinceOption = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d"], help="From this day; where the last ingest ended, or a week ago, by default."),
]


UntilOption = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d"], help="To the beginning of this day; now by default.")
]


WordsOption = Annotated[bool, typer.Option("--words", help="Do not embed the papers, for search by words only.")]


def ingest_commands() -> typer.Typer:
    """`ingest`, with a command for every source."""
    example = "Example: `paperworks ingest arxiv --category cs.LG --since 2026-11-01`"
    group = typer.Typer(
        help="Take papers into the page's index; stopped, the same command goes on where it was.",
        no_args_is_help=True,
        epilog=example,
        rich_markup_mode="markdown",
    )
    group.command("arxiv", epilog=example)(ingest_arxiv)
    group.command("daily-papers", epilog="Example: `paperworks ingest daily-papers --since 2026-11-01`")(ingest_daily)
    group.command("cards", epilog="Example: `paperworks ingest cards --abstracts`")(ingest_cards)
    return group


def ingest_arxiv(
    category: Annotated[str, typer.Option(help="arXiv category, such as cs.LG.")],
    since: SinceOption = None,
    until: UntilOption = None,
    url: Annotated[str | None, typer.Option(help="arXiv's API, where it is not at arxiv.org.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Papers of a category of arXiv: those submitted, and those revised since the last time."""
    from paperworks.page import ingest

    api = ingest.Arxiv(url) if url else ingest.Arxiv()
    days = {"since": _in_utc(since), "until": _in_utc(until)}
    _ingest(
        lambda index, opened, progress: ingest.ingest_arxiv(
            index, opened, category, source=api, progress=progress, **days
        ),
        store, words, as_json,
    )  # fmt: skip


def ingest_daily(
    since: SinceOption = None,
    until: UntilOption = None,
    url: Annotated[str | None, typer.Option(help="The Hub, where it is not at huggingface.co.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hugging Face's daily papers, with their upvotes."""
    from paperworks.page import ingest

    days = {"since": _in_utc(since), "until": _in_utc(until)}
    _ingest(
        lambda index, opened, progress: ingest.ingest_daily_papers(
            index, opened, source=ingest.DailyPapers(url), progress=progress, **days
        ),
        store, words, as_json,
    )  # fmt: skip


def ingest_cards(
    abstracts: Annotated[bool, typer.Option("--abstracts", help="Ask arXiv for their abstracts and authors.")] = False,
    url: Annotated[str | None, typer.Option(help="arXiv's API, where it is not at arxiv.org.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """The cards, which are what runs here."""
    from paperworks.page import ingest

    api = ingest.Arxiv(url) if url else ingest.Arxiv()
    _ingest(
        lambda index, opened, progress: ingest.ingest_cards(index, abstracts=abstracts, source=api),
        store, words, as_json,
    )  # fmt: skip


def _ingest(read: Callable[..., Any], store: str | None, words: bool, as_json: bool) -> None:
    """Read a source into the index, embed what is new, and say what came."""
    from paperworks.lab.display import Display
    from paperworks.lab.store import Store
    from paperworks.page.index import Index

    with Store(store) as opened, Display() as display:
        index = Index(opened)
        came = read(index, opened, partial(display.tell, "reading"))
        embedded = 0 if words else index.build(partial(display.tell, "embedding"))
        held = index.search("", limit=1).total
    told = {
        "read": came.read, "new": came.new, "updated": came.updated, "embedded": embedded, "held": held,
        "left_out": list(came.left_out),
    }  # fmt: skip
    if as_json:
        return print_json(told)
    for sentence in came.left_out:
        print(sentence, file=sys.stderr)
    print(f"{came.read} papers read: {came.new} new, {came.updated} updated; the index holds {held}")


def _in_utc(day: datetime | None) -> datetime | None:
    return day and day.replace(tzinfo=UTC)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; this machine only by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    base_url: Annotated[
        str | None, typer.Option(help="Address by which readers come, such as https://papers.example.org.")
    ] = None,
    allow_runs: Annotated[
        bool, typer.Option("--allow-runs", help="Let readers start runs without logging in.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Server processes that share the work.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs that may take place at once.")] = 1,
    proxies: Annotated[
        str | None,
        typer.Option(
            envvar="PAPERWORKS_PROXIES",
            help="Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, such as 127.0.0.1,10.0.0.0/8; "
            "nobody's by default.",
        ),
    ] = None,
    store: StoreOption = None,
) -> None:
    """The page: search, trending, subscriptions, and a run button for every paper."""
    from paperworks.page.app import serve as serve_page

    serve_page(
        host=host, port=port, base_url=base_url, processes=processes, allow_runs=allow_runs, workers=workers,
        proxies=proxies, store_url=store,
    )  # fmt: skip


def digest(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the digests as HTML and text, send nothing, change nothing.")
    ] = False,
    to: Annotated[Path, typer.Option(help="Folder to write them into.")] = Path("digests"),
    base_url: Annotated[
        str, typer.Option(help="Address by which readers come, such as https://papers.example.org.")
    ] = "http://127.0.0.1:8000",
    store: StoreOption = None,
) -> None:
    """The e-mail of new and trending papers, to those whose subscription is due; for a daily or hourly timer.

    Mails go through the server of PAPERWORKS_SMTP=smtp://user:password@host:port?from=papers@example.org.
    """
    import os

    from paperworks.lab.store import Store
    from paperworks.page.digest import put_digests, write_digests
    from paperworks.page.index import Index
    from paperworks.page.mail import send_pending

    smtp = os.environ.get("PAPERWORKS_SMTP")
    if not (smtp or dry_run):
        raise UsageError("PAPERWORKS_SMTP names no mail server; set it, or write files instead: --dry-run --to FOLDER")
    with Store(store) as opened:
        Index(opened).sync_cards()
        now = datetime.now(UTC)
        if dry_run:
            for path in write_digests(opened, base_url, now, to):
                print(path)
            return
        made = put_digests(opened, base_url, now)
        sent = send_pending(opened, str(smtp))
    print(f"{made} digests made, {sent.sent} mails sent, {sent.failed} failed")


def mail(
    number: Annotated[int | None, typer.Argument(help="The mail to show whole; all are listed by default.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mails that wait to be sent: without a mail server this is where to read the link in one."""
    from dataclasses import asdict

    from paperworks.lab.store import Store
    from paperworks.page.mail import waiting

    with Store(store) as opened:
        mails = waiting(opened)
    if number is not None:
        mails = [one for one in mails if one.id == number]
        if not mails:
            raise UsageError(f"no mail {number} waits; `paperworks mail` lists those that do")
    if as_json:
        return print_json([{**asdict(one), "put": one.put.isoformat()} for one in mails])
    if number is not None:
        [shown] = mails
        print(f"To: {shown.to}\nSubject: {shown.subject}\n\n{shown.text}")
        return
    if not mails:
        print("no mail waits")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("mail", "to", "subject", "since"):
        table.add_column(heading, overflow="fold")
    for one in mails:
        table.add_row(str(one.id), *map(Text, (one.to, one.subject, f"{one.put:%Y-%m-%d %H:%M} UTC")))
    terminal().print(table)
    print(f"`paperworks mail {mails[-1].id}` shows the newest", file=sys.stderr)
