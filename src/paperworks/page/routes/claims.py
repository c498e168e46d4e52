"""Claims: what each paper says, what was measured here, and the verdict; and the badge that sums them up."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from pydantic import BeforeValidator

from paperworks.lab import records
from paperworks.lab.verdicts import KINDS, tally, verdicts
from paperworks.page.badge import badge
from paperworks.page.rendering import respond
from paperworks.papers import ROOMS, load_cards

router = APIRouter(tags=["papers"])

# An empty field of a form says nothing.
_Blank = BeforeValidator(lambda value: value or None)
Room = Annotated[Literal[*ROOMS] | None, _Blank]  # type: ignore[valid-type]
Kind = Annotated[Literal[*KINDS] | None, _Blank]  # type: ignore[valid-type]


@router.get("/claims", summary="Every claim and its verdict")
def claims(request: Request, room: Room = None, verdict: Kind = None) -> Response:
    """What the papers that run here claim, what was measured, and the verdict."""
    found = {
        paper.slug: [one for one in verdicts(paper) if verdict in (None, one.kind)]
        for paper in load_cards().values()
        if room in (None, paper.room) and records.status(paper) != "planned"
    }
    shown = {slug: claimed for slug, claimed in found.items() if claimed}
    counts = tally([one for claimed in shown.values() for one in claimed])
    data: dict[str, Any] = {"room": room, "verdict": verdict, "counts": counts}
    listed = [{"paper": slug, **one.as_json()} for slug, claimed in shown.items() for one in claimed]
    cards = load_cards()
    return respond(
        request, "claims.html", data, json={**data, "claims": listed}, kinds=KINDS,
        papers=[(cards[slug], claimed) for slug, claimed in shown.items()],
    )  # fmt: skip


@router.get("/papers/{slug}/badge.svg", summary="How many claims hold, as a badge", response_class=Response)
def paper_badge(request: Request, slug: str) -> Response:
    """An image for a README: "3 of 4 claims hold"."""
    paper = load_cards().get(slug)
    if paper is None or records.status(paper) == "planned":
        raise HTTPException(404, "no claims of such a paper were measured here")
    image = badge(verdicts(paper))
    tag = f'"{sha256(image.encode()).hexdigest()[:16]}"'
    headers = {"Cache-Control": "public, max-age=3600", "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(image, media_type="image/svg+xml; charset=utf-8", headers=headers)
