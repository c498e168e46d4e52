"""Runs: start one, watch it, stop it, see what it measured, list them all, and lay two side by side."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from paperworks.errors import UsageError
from paperworks.lab.recipe import Recipe, recipes
from paperworks.lab.records import as_record, machine
from paperworks.lab.report import grid
from paperworks.lab.run import Measurement, Run
from paperworks.page.concealing import for_visitors, without_paths
from paperworks.page.history import counted, name_of, of_the_table, runs_of
from paperworks.page.offered import why_refused
from paperworks.page.places import BusyError
from paperworks.page.rendering import render, respond, spans, wants_json, with_query
from paperworks.page.routes.papers import PARAMETER, Number, show_paper
from paperworks.page.runs import Runner
from paperworks.page.safety import MayRun, Reader, address_of
from paperworks.papers import load_cards

router = APIRouter(tags=["runs"])
_SEED = "seed"
_RUN_ID = "^[0-9A-Za-z-]{1,64}$"
_PAGE, _OTHERS = 50, 20
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "csrf": {"type": "string"},
                        "scale": {"type": "string", "enum": ["tiny", "default", "paper"], "default": "default"},
                        _SEED: {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": 0},
                    },
                    "patternProperties": {f"^{PARAMETER}": {"type": "string"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}


async def fields(request: Request) -> dict[str, str]:
    """The form that was sent, as text."""
    return {name: str(value) for name, value in (await request.form()).items() if name != "csrf"}


def known_run(request: Request, run_id: Annotated[str, InPath(pattern=_RUN_ID)]) -> Run:
    """The run that the address names, as visitors see it.

    Raises:
        HTTPException: 404.
    """
    try:
        run: Run = request.app.state.store.run(run_id)
    except UsageError:
        raise HTTPException(404, "there is no such run here") from None
    return for_visitors(run)


async def watching(request: Request) -> AsyncIterator[None]:
    """Hold a place among those who watch, for as long as the answer lasts.

    Raises:
        BusyError: Too many watch, or too many from this address.
    """
    with request.app.state.runner.watching.held(address_of(request.scope)):
        yield


Fields = Annotated[dict[str, str], Depends(fields)]
Known = Annotated[Run, Depends(known_run)]


@router.post("/papers/{slug}/runs", summary="Start a run", openapi_extra=_FORM)
def start(request: Request, user: MayRun, slug: str, sent: Fields) -> Response:
    """Start a run of a paper's recipe: `scale`, `seed`, and its parameters, `parameter.` before each name.

    A parameter left empty has the value that the scale gives it.
    """
    recipe = recipes().get(slug)
    if recipe is None:
        raise HTTPException(404, "there is no paper of this name that runs here")
    typed = dict(sent)
    scale, seed = sent.pop("scale", "default"), sent.pop(_SEED, "") or "0"
    parameters = {name.removeprefix(PARAMETER): value for name, value in sent.items() if value.strip()}
    try:
        if strangers := [name for name in sent if not name.startswith(PARAMETER)]:
            raise UsageError(f"the form has no field {strangers[0][:100]!r}; parameters are named {PARAMETER}NAME")
        if not _is_seed(seed):
            raise UsageError(f"seed is a whole number of at least 0, not {seed[:100]!r}")
        runner: Runner = request.app.state.runner
        who = {"user_id": user.id} if user else {"address": address_of(request.scope)}
        run_id = runner.start(slug, parameters, scale, seed=int(seed), **who)
    except (UsageError, BusyError) as error:
        entry = None if wants_json(request) else request.app.state.index.get(slug)
        if entry is None:
            raise
        return _refused(request, user, entry, recipe, typed, parameters, error)
    address = f"/runs/{run_id}"
    if wants_json(request):
        return respond(request, "", {"id": run_id, "address": address}, status=201)
    return RedirectResponse(address, 303)


def _is_seed(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _refused(
    request: Request,
    user: Any,
    entry: Any,
    recipe: Recipe,
    typed: Mapping[str, str],
    parameters: Mapping[str, str],
    error: UsageError | BusyError,
) -> Response:
    """The paper's page with the form as it was filled in, what was wrong with it, and the field that it was."""
    wrong, busy = "", isinstance(error, BusyError)
    scale, seed = typed.get("scale", "default"), typed.get(_SEED, "") or "0"
    if not busy and why_refused(recipe, {}, scale):
        wrong = "scale"
    elif not busy:
        reasons = {name: why_refused(recipe, {name: value}, scale) for name, value in parameters.items()}
        said = [name for name, reason in reasons.items() if reason == str(error)]
        wrong = said[0] if said else _SEED if not _is_seed(seed) or int(seed) >= 2**31 else ""
    page = show_paper(
        request, user, entry, typed=typed, refused=without_paths(str(error)), wrong=wrong, status=429 if busy else 400
    )
    if isinstance(error, BusyError):
        page.headers["Retry-After"] = str(error.retry_after)
    return page


@router.get("/papers/{slug}/runs", summary="Runs of a paper")
def of_paper(slug: str) -> Response:
    """Where the runs of a paper are listed."""
    return RedirectResponse(with_query("/runs", paper=slug), 303)


@router.get("/runs", summary="All runs")
def listed(
    request: Request, paper: Annotated[str, Query(max_length=100, description="Slug.")] = "", page: Number = 1
) -> Response:
    """What was run here, the last first: of which paper, with which model, and the figure that sums it up."""
    store = request.app.state.store
    # Those whose process is gone are marked so.
    store.runs(status="running")
    papers = counted(store)
    some = paper if paper in papers else None
    found = runs_of(store, paper=some, limit=_PAGE + 1, offset=(page - 1) * _PAGE) if not paper or some else []
    total = papers.get(paper, 0) if paper else sum(papers.values())
    data = {"paper": some, "page": page, "total": total, "runs": found[:_PAGE]}
    return respond(
        request, "runs.html", data, papers=dict(sorted(papers.items())), more=len(found) > _PAGE,
        name=name_of(some or ""), pages=lambda number: with_query("/runs", paper=some, page=number),
    )  # fmt: skip


@router.get("/runs/compare", summary="Two runs side by side")
def compare(request: Request, run: Annotated[list[str], Query(description="The two runs.")] = []) -> Response:  # noqa: B006
    """Two runs of one recipe: their options, with those marked that differ, and what they measured."""
    chosen = list(dict.fromkeys(run))
    if len(chosen) != 2:
        raise UsageError(f"two runs are laid side by side, not {len(chosen)}: choose two in the list of runs")
    if not all(re.fullmatch(_RUN_ID, id) for id in chosen):
        raise HTTPException(404, "there is no such run here")
    both = sorted((known_run(request, id) for id in chosen), key=lambda one: one.started)
    if both[0].paper != both[1].paper:
        raise UsageError(
            f"only runs of one recipe are laid side by side, and these are of {both[0].paper} and {both[1].paper}"
        )
    options = _options(both)
    differing = [row["name"].replace("_", " ") for row in options if row["differs"]]
    heads = [{"id": one.id, "when": f"{one.started:%Y-%m-%d %H:%M}", "scale": one.scale} for one in both]
    data = {"paper": both[0].paper, "runs": heads, "options": options, "figures": _figures_beside(both)}
    return respond(request, "compare.html", data, name=name_of(both[0].paper), differing=differing)


def _options(both: list[Run]) -> list[dict[str, Any]]:
    told = [
        {"scale": run.scale, "seed": run.seed, **run.parameters, "machine": machine(run.environment)} for run in both
    ]
    names = dict.fromkeys(name for one in told for name in one)
    rows = [{"name": name, "beside": [one.get(name, "") for one in told]} for name in names]
    return [{**row, "differs": row["beside"][0] != row["beside"][1]} for row in rows]


def _figures_beside(both: list[Run]) -> list[dict[str, Any]]:
    """What either measured: first what makes the recipe's table, then the rest."""
    cells: list[dict[tuple[str, str], str]] = []
    order: dict[tuple[str, str], None] = {}
    for run in both:
        order |= dict.fromkeys(_named(m) for m in of_the_table(run.paper, run.measurements))
    for run in both:
        cells.append({_named(m): grid([m])[1][0][1] for m in run.measurements})
        order |= dict.fromkeys(cells[-1])
    return [
        {"name": name, "series": series, "beside": [one.get((name, series), "") for one in cells]}
        for name, series in order
    ]


def _named(measurement: Measurement) -> tuple[str, str]:
    return grid([measurement])[0][1], measurement.series or ""


@router.get("/runs/{run_id}", summary="A run")
def show(request: Request, reader: Reader, run: Known) -> Response:
    """How a run stands, what it measured, its figure and its log."""
    others = [one for one in runs_of(request.app.state.store, paper=run.paper, limit=_OTHERS) if one.id != run.id]
    return respond(
        request, "run.html", _view(run), json=_as_json(run), name=name_of(run.paper),
        card=load_cards().get(run.paper), mine=_mine(request, run, reader), others=others,
        again=f"{with_query(f'/papers/{run.paper}', again=run.id)}#run" if run.paper in recipes() else "",
    )  # fmt: skip


@router.get(
    "/runs/{run_id}/events",
    summary="A run as it goes on",
    response_class=EventSourceResponse,
    dependencies=[Depends(watching)],
)
async def events(request: Request, run: Known) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `run` with how it stands, as HTML, whenever that has changed, and `end` when it is over."""
    runner: Runner = request.app.state.runner
    async for now in runner.events(run.id):
        html = await asyncio.to_thread(_standing, request, now)
        yield ServerSentEvent(event="run", raw_data=html)
        run = now
    yield ServerSentEvent(event="end", raw_data=run.status)


@router.post("/runs/{run_id}/cancel", summary="Stop a run")
def cancel(request: Request, user: MayRun, run: Known) -> Response:
    """Stop a run that one started; what it has recorded is kept."""
    runner: Runner = request.app.state.runner
    if not _mine(request, run, user):
        raise HTTPException(403, "only who started a run can cancel it")
    runner.cancel(run.id)
    if wants_json(request):
        return respond(request, "", {"id": run.id, "cancelled": True}, status=202)
    return RedirectResponse(f"/runs/{run.id}", 303)


@router.get("/runs/{run_id}/log", summary="Log of a run", response_class=PlainTextResponse)
def log(run: Known) -> str:
    """The messages of a run, a line each."""
    return "".join(f"{log.message}\n" for log in run.logs)


@router.get("/runs/{run_id}/files/{name:path}", summary="A file of a run", response_class=FileResponse)
def file(request: Request, run: Known, name: str) -> Response:
    """A file that a run has left; figures are shown, all else is downloaded."""
    if request.scope.get("paperworks.json"):
        # The ending is the file's own here.
        name += ".json"
    path = run.artefacts.get(name)
    if path is None or not path.is_file():
        raise HTTPException(404, "this run has left no such file here")
    if path.suffix == ".png":
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def _standing(request: Request, run: Run) -> str:
    return render("_run.html", request, **_view(for_visitors(run)))


def _view(run: Run) -> dict[str, Any]:
    files = _files(run)
    first = of_the_table(run.paper, run.measurements)
    rest = [measurement for measurement in run.measurements if measurement not in first]
    figures = [files[name] for name, path in run.artefacts.items() if path.suffix == ".png"]
    return {
        "run": run, "doing": _doing(run), "drawn": _drawn(first), "rest": _drawn(rest), "files": files,
        "figures": figures,
    }  # fmt: skip


def _drawn(measurements: list[Measurement]) -> list[tuple[Measurement, Any]]:
    return list(zip(measurements, spans(measurements), strict=True))


def _doing(run: Run) -> str:
    """What a run does just now: its last piece of work, else what it has said last. How far it is, its bars show."""
    if not (run.bars or run.logs or run.environment):
        return "waiting for its process to start"
    said = next((bar.description for bar in reversed(run.bars) if bar.description), "")
    said = said or (run.logs[-1].message if run.logs else "it loads what it needs")
    return said if said.startswith("waiting") else f"running: {said}"


def _files(run: Run) -> dict[str, str]:
    return {name: f"/runs/{run.id}/files/{quote(name)}" for name in run.artefacts}


def _as_json(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        **as_record(run),
        "error": run.error,
        "progress": run.bars,
        "log": run.logs,
        "files": _files(run),
    }


def _mine(request: Request, run: Run, reader: Any) -> bool:
    """Whether the reader started the run, or nobody in particular did where everybody may."""
    runner: Runner = request.app.state.runner
    asked = runner.request(run.id)
    if asked is None:
        return False
    if asked.user_id is None:
        return bool(request.app.state.allow_runs)
    return reader is not None and reader.id == asked.user_id
