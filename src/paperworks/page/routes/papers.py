"""Papers: trending, new, sought, by room, and each one's page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BeforeValidator, Field
from sqlalchemy import func, select, text

from paperworks.errors import UsageError
from paperworks.lab import records
from paperworks.lab.recipe import Recipe, recipes
from paperworks.lab.report import table
from paperworks.lab.run import Measurement
from paperworks.lab.store import RunRow, Store
from paperworks.lab.verdicts import Verdict, in_words, verdicts
from paperworks.lab.verdicts import headline as best_verdict
from paperworks.page.citing import bibtex
from paperworks.page.entries import STATUSES, Entry, number_in
from paperworks.page.feeds import atom
from paperworks.page.history import runs_of
from paperworks.page.index import Index
from paperworks.page.offered import offered, why_refused
from paperworks.page.reading import kept
from paperworks.page.rendering import outward, paper_path, respond, spans, wants_json, with_query
from paperworks.page.safety import Reader
from paperworks.page.trending import FORMULA, trending
from paperworks.page.votes import voted, votes_of
from paperworks.papers import ROOMS, Paper, load_cards, source_of

router = APIRouter(tags=["papers"])
_PAGE = 20
# Plugins bring rooms, which are to be among the others below.
load_cards()
_RUNS_SHOWN = 8
_FEED = 50
# Before the names of a recipe's parameters in the form that starts a run.
PARAMETER = "parameter."

Period = Literal["day", "week", "month"]
Number = Annotated[int, Query(ge=1, le=500, description="Which page of the list.")]
# An empty field of a form says nothing.
Blank = BeforeValidator(lambda value: value or None)
Room = Annotated[Literal[*ROOMS] | None, Blank]  # type: ignore[valid-type]
Status = Annotated[Literal[*STATUSES] | None, Blank]  # type: ignore[valid-type]
Year = Annotated[Annotated[int, Field(ge=1900, le=2100)] | None, Blank]
Words = Annotated[str, Query(max_length=300)]


# Asynchronous, for to fetch a thread for it would take longer.
async def _filters(
    room: Room = None, tag: Words = "", year: Year = None, status: Status = None, runs_here: bool = False
) -> dict[str, Any]:
    return {"room": room, "tag": tag.strip() or None, "year": year, "status": status, "runs_here": runs_here}


Filters = Annotated[dict[str, Any], Depends(_filters)]


@dataclass(frozen=True)
class Line:
    """A paper in a list, with what the list says about it."""

    entry: Entry
    votes: int
    voted: bool
    figure: Measurement | None
    title_html: str = ""
    snippet_html: str = ""
    runs: int = 0
    score: float = 0.0


@dataclass(frozen=True)
class Leader:
    """A paper on its room's leaderboard, with the claim that a figure speaks to first, and where that comes from."""

    paper: Paper
    status: str
    verdict: Verdict | None
    sum: str
    machine: str
    run_id: str | None

    @property
    def figure(self) -> Measurement | None:
        """What was measured of that claim."""
        return self.verdict.measurement if self.verdict else None


def lines_of(store: Store, reader: Any, entries: list[Entry], **columns: list[Any]) -> list[Line]:
    """Papers as a list shows them to a reader, with columns of what else is known of each."""
    keys = [entry.key for entry in entries]
    votes = votes_of(store, keys)
    mine = voted(store, reader.id, keys) if reader else set()
    return [
        Line(
            entry, votes.get(entry.key, 0), entry.key in mine, headline(entry.slug),
            **{name: column[index] for name, column in columns.items()},
        )
        for index, entry in enumerate(entries)
    ]  # fmt: skip


def headline(slug: str | None) -> Measurement | None:
    """The committed figure of a paper that a list has room for."""
    card = load_cards().get(slug or "")
    best = best_verdict(verdicts(card)) if card else None
    return best.measurement if best else None


@router.get("/", summary="Trending papers")
def front(request: Request, reader: Reader, period: Period = "week", page: Number = 1) -> Response:
    """Papers by votes, runs and recency, with time decay."""
    store = request.app.state.store
    trends = trending(store, period, _PAGE + 1, (page - 1) * _PAGE)
    shown = trends[:_PAGE]
    lines = lines_of(
        store, reader, [trend.entry for trend in shown],
        runs=[trend.runs for trend in shown], score=[trend.score for trend in shown],
    )  # fmt: skip
    data = {"period": period, "page": page, "papers": lines, "formula": FORMULA}
    return respond(
        request, "trending.html", data, more=len(trends) > _PAGE,
        pages=lambda number: with_query("/", period=period, page=number),
    )  # fmt: skip


@router.get("/new", summary="Newest papers")
def new(request: Request, reader: Reader, page: Number = 1) -> Response:
    """Papers by date of publication."""
    entries = request.app.state.index.newest(_PAGE + 1, (page - 1) * _PAGE)
    data = {"page": page, "papers": lines_of(request.app.state.store, reader, entries[:_PAGE])}
    return respond(
        request, "new.html", data, more=len(entries) > _PAGE, pages=lambda number: with_query("/new", page=number)
    )


@router.get("/search", summary="Search by words and meaning")
async def search(request: Request, reader: Reader, filters: Filters, q: Words = "", page: Number = 1) -> Response:
    """Papers for a query, best first; without one, the newest that fit. A number at arXiv leads to its paper."""
    async with request.app.state.crowd.turn() as few:
        return await run_in_threadpool(_found, request, reader, filters, q, page, request.app.state.meaning and few)


def _found(request: Request, reader: Any, filters: dict[str, Any], q: str, page: int, meaning: bool) -> Response:
    index: Index = request.app.state.index
    results = index.search(_said(q), **filters, limit=_PAGE, offset=(page - 1) * _PAGE, meaning=meaning)
    number = number_in(_said(q))
    # Where a script asks for the list, there is no page to go to.
    if number and results.hits and not (wants_json(request) or "hx-request" in request.headers):
        return RedirectResponse(paper_path(results.hits[0].entry), 303)
    lines = lines_of(
        request.app.state.store, reader, [hit.entry for hit in results.hits],
        score=[hit.score for hit in results.hits], title_html=[hit.title_html for hit in results.hits],
        snippet_html=[hit.snippet_html for hit in results.hits],
    )  # fmt: skip
    data = {"query": q, **filters, "total": results.total, "page": page, "papers": lines}
    return respond(
        request, "search.html", data, statuses=STATUSES, number=number, more=page * _PAGE < results.total and bool(results.hits),
        pages=lambda number: with_query("/search", q=q, **filters, page=number),
        feed=with_query("/feed.atom", q=q, **filters), subscribe=with_query("/subscribe", query=q, tag=filters["tag"]),
    )  # fmt: skip


def _said(query: str) -> str:
    """A query without control characters, which PostgreSQL would refuse."""
    return "".join(char if char.isprintable() else " " for char in query)


@router.get("/feed.atom", summary="Atom feed of a search")
async def feed(request: Request, filters: Filters, q: Words = "") -> Response:
    """What a search finds, newest first, for feed readers."""
    async with request.app.state.crowd.turn():
        return await run_in_threadpool(_feed, request, filters, q)


def _feed(request: Request, filters: dict[str, Any], q: str) -> Response:
    found = request.app.state.index.search(_said(q), **filters, limit=_FEED, meaning=False)
    newest = sorted((hit.entry for hit in found.hits), key=lambda entry: entry.published, reverse=True)
    entries = [replace(entry, url=outward(entry.url)) for entry in newest]
    told = {**filters, "runs_here": filters["runs_here"] and "runs here"}
    about = " · ".join(str(value) for value in (q, *told.values()) if value)
    url = request.app.state.base_url + with_query("/feed.atom", q=q, **filters)
    updated = max((entry.published for entry in entries), default=datetime.now(UTC))
    body = atom(f"Paperworks: {about or 'new papers'}", url, entries, updated)
    return Response(body, media_type="application/atom+xml")


@router.get("/rooms", summary="The rooms")
def rooms(request: Request) -> Response:
    """Every room, what one would do there, and how many of its papers run."""
    counts = [
        {
            "room": room, "aim": aim, "papers": len(papers),
            "run": sum(records.status(paper) != "planned" for paper in papers),
            "measured": sum(records.status(paper) == "measured" for paper in papers),
        }
        for room, aim in ROOMS.items()
        if (papers := [paper for paper in load_cards().values() if paper.room == room])
    ]  # fmt: skip
    return respond(request, "rooms.html", {"counts": counts})


@router.get("/rooms/{room}", summary="Leaderboard of a room")
def room_page(request: Request, room: str) -> Response:
    """The room's papers by what was measured: committed records, else the newest run here."""
    if room not in ROOMS:
        raise HTTPException(404, f"there is no such room, only {', '.join(ROOMS)}")
    store = request.app.state.store
    papers = [paper for paper in load_cards().values() if paper.room == room]
    leaders = sorted((_leader(store, paper) for paper in papers), key=_standing)
    measured = [leader for leader in leaders if leader.figure]
    data = {"room": room, "aim": ROOMS[room], "leaders": leaders}
    drawn = spans([leader.figure for leader in measured if leader.figure])
    return respond(request, "room.html", data, measured=list(zip(measured, drawn, strict=True)))


def _leader(store: Store, paper: Paper) -> Leader:
    status = records.status(paper)
    measured, run_id = records.records_of(paper.slug), None
    if not measured and status == "runs" and (run := store.latest(paper.slug)) is not None:
        measured, run_id = [records.as_record(run) | {"measurements": run.measurements}], run.id
    found = verdicts(paper, measured)
    best = best_verdict(found)
    machine = next(
        (records.machine(r["environment"]) for r in measured if best and records.device(r) == best.device), ""
    )
    return Leader(paper, status, best, in_words(found) if status != "planned" else "", machine, run_id)


def _standing(leader: Leader) -> tuple[Any, ...]:
    """Like figures together; among them the best gain first, then what runs, then what is planned."""
    best = leader.figure
    if best is None:
        return (1, STATUSES[::-1].index(leader.status), leader.paper.number)
    gain = best.value if best.better == "higher" else 1 / best.value if best.value else 0.0
    return (0, best.name != "speed-up", best.name, -gain)


def entry_of(request: Request, key: str) -> Entry:
    """The paper of this slug or arXiv number.

    Raises:
        HTTPException: 404.
    """
    entry = request.app.state.index.get(key) if key.isprintable() and len(key) < 100 else None
    if entry is None:
        raise HTTPException(404, "there is no such paper here: search for it, or submit it by its arXiv number")
    found: Entry = entry
    return found


@router.get("/papers/{key:path}.bib", summary="Citation in BibTeX", response_class=PlainTextResponse)
def citation(request: Request, key: str) -> Response:
    """How to cite a paper."""
    return Response(bibtex(entry_of(request, key)), media_type="application/x-bibtex; charset=utf-8")


@router.get("/papers/{key:path}", summary="A paper")
def paper_page(
    request: Request,
    reader: Reader,
    key: str,
    again: Annotated[str, Query(max_length=64, description="A run whose options fill in the form.")] = "",
) -> Response:
    """Summary, claims beside measured figures, how to import and run it, its runs, and papers like it."""
    entry = entry_of(request, key)
    recipe = recipes().get(entry.slug or "")
    return show_paper(request, reader, entry, typed=_again(request, recipe, again) if recipe and again else {})


def show_paper(
    request: Request,
    reader: Any,
    entry: Entry,
    *,
    typed: Mapping[str, str],
    refused: str = "",
    wrong: str = "",
    status: int = 200,
) -> Response:
    """A paper's page.

    Args:
        request: What was asked.
        reader: Who is logged in, if anybody.
        entry: The paper.
        typed: What the form that starts a run is filled in with, by the names of its fields.
        refused: Why what was sent by it was refused.
        wrong: The field that was refused: scale, seed or a parameter.
        status: HTTP status.
    """
    state = request.app.state
    card = load_cards().get(entry.slug or "")
    record = records.load_records().get(entry.slug or "")
    history = runs_of(state.store, paper=entry.slug, limit=_RUNS_SHOWN) if entry.slug else []
    [line] = lines_of(state.store, reader, [entry])
    recipe = recipes().get(entry.slug or "")
    data = {
        "entry": entry, "paper": card, "votes": line.votes, "record": record, "runs": history,
        "similar": state.index.similar(entry.key, 6), "bibtex": bibtex(entry),
        "offer": offered(recipe) if recipe else None,
    }  # fmt: skip
    measurements: list[Measurement] = record["measurements"] if record else []
    found = verdicts(card) if card else []
    told = in_words(found)
    address = f"{state.base_url}{paper_path(entry)}"
    return respond(
        request, "paper.html", data, json={**data, "verdicts": [verdict.as_json() for verdict in found]}, line=line,
        recipe=recipe, found=found, sum=told, status=status,
        badge=f"[![Paperworks: {told}]({address}/badge.svg)]({address})",
        drawn=list(zip(measurements, spans(measurements), strict=True)),
        table=table(entry.slug or "", measurements) if measurements else ([], []),
        has_figure=bool(entry.slug) and _figure(entry.slug or "") is not None, path=paper_path(entry),
        kept=bool(reader) and entry.key in kept(state.store, reader.id, [entry.key]),
        typed=typed, refused=refused, wrong=wrong,
        opened=any(name.startswith(PARAMETER) and value.strip() for name, value in typed.items()),
    )  # fmt: skip


def _again(request: Request, recipe: Recipe, run_id: str) -> dict[str, str]:
    """The form that starts a run as it was filled in for another: what its scale gave, and what the page offers no more, is left out."""
    try:
        run = request.app.state.store.run(run_id if run_id.isprintable() else "")
    except UsageError:
        return {}
    if run.paper != recipe.paper or run.scale not in recipe.scales:
        return {}
    typed = {"scale": run.scale, "seed": str(run.seed)}
    usual = recipe.plain({}, run.scale)
    for name, value in run.parameters.items():
        if name in usual and value != usual[name] and not why_refused(recipe, {name: value}, run.scale):
            typed[f"{PARAMETER}{name}"] = str(value)
    return typed


def _figure(slug: str) -> Path | None:
    card = load_cards().get(slug)
    if card is None:
        return None
    source = source_of(card)
    folder = source.folder if source else records.records_folder().parent / "figures"
    path = folder / f"{slug}.png"
    return path if path.is_file() else None


@router.get("/figures/{slug}.png", summary="Figure of a committed record", response_class=FileResponse)
def figure(slug: str) -> Response:
    """The figure that was committed with a paper's record."""
    path = _figure(slug)
    if path is None:
        raise HTTPException(404, "no figure is committed for this paper")
    return FileResponse(path, media_type="image/png", headers={"Cache-Control": "public, max-age=300"})


@router.get("/healthz", summary="Whether the server and its store answer", tags=["operation"])
def health(request: Request) -> dict[str, Any]:
    """For whatever watches over the server."""
    with request.app.state.store.reading() as session:
        session.execute(text("SELECT 1"))
        unfinished = session.scalar(select(func.count()).select_from(RunRow).where(RunRow.status == "running"))
    return {"status": "ok", "runs": unfinished}
