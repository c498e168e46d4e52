"""Runs: start one, watch it, stop it, and see what it measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from paperworks.errors import UsageError
from paperworks.lab.recipe import recipes
from paperworks.lab.records import as_record
from paperworks.lab.report import table
from paperworks.lab.run import Run
from paperworks.page.concealing import for_visitors
from paperworks.page.rendering import render, respond, wants_json
from paperworks.page.runs import Runner
from paperworks.page.safety import MayRun, Reader, address_of
from paperworks.papers import load_cards

router = APIRouter(tags=["runs"])
_PREFIX = "parameter."
_SEED = "seed"
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
                    "patternProperties": {f"^{_PREFIX}": {"type": "string"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}


async def fields(request: Request) -> dict[str, str]:
    """The form that was sent, as text."""
    return {name: str(value) for name, value in (await request.form()).items() if name != "csrf"}


def known_run(request: Request, run_id: Annotated[str, InPath(pattern="^[0-9A-Za-z-]{1,64}$")]) -> Run:
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
    if slug not in recipes():
        raise HTTPException(404, "there is no paper of this name that runs here")
    scale, seed = sent.pop("scale", "default"), sent.pop(_SEED, "") or "0"
    if strangers := [name for name in sent if not name.startswith(_PREFIX)]:
        raise UsageError(f"the form has no field {strangers[0][:100]!r}; parameters are named {_PREFIX}NAME")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20):
        raise UsageError(f"seed is a whole number of at least 0, not {seed[:100]!r}")
    parameters = {name.removeprefix(_PREFIX): value for name, value in sent.items() if value.strip()}
    runner: Runner = request.app.state.runner
    who = {"user_id": user.id} if user else {"address": address_of(request.scope)}
    run_id = runner.start(slug, parameters, scale, seed=int(seed), **who)
    address = f"/runs/{run_id}"
    if wants_json(request):
        return respond(request, "", {"id": run_id, "address": address}, status=201)
    return RedirectResponse(address, 303)


@router.get("/runs/{run_id}", summary="A run")
def show(request: Request, reader: Reader, run: Known) -> Response:
    """How a run stands, what it measured, its figure and its log."""
    card = load_cards().get(run.paper)
    return respond(
        request,
        "run.html",
        _view(run),
        json=_as_json(run),
        name=" and ".join(card.names) if card else run.paper,
        card=card,
        mine=_mine(request, run, reader),
    )


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
    headings, rows = table(run.paper, run.measurements) if run.measurements else ([], [])
    files = _files(run)
    figures = [files[name] for name, path in run.artefacts.items() if path.suffix == ".png"]
    return {"run": run, "headings": headings, "rows": rows, "files": files, "figures": figures}


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
