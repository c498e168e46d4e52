"""Claims: what each paper says, what was measured here, and the verdict; and the badge that sums them up."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from paperworks.lab import records
from paperworks.lab.verdicts import KINDS, tally, verdicts, verdicts_by_paper
from paperworks.page.badge import badge
from paperworks.page.rendering import respond
from paperworks.page.routes.papers import Blank, Room
from paperworks.papers import load_cards

router = APIRouter(tags=["papers"])

Kind = Annotated[Literal[*KINDS] | None, Blank]  # type: ignore[valid-type]


@router.get("/claims", summary="Every claim and its verdict")
def claims(request: Request, room: Room = None, verdict: Kind = None) -> Response:
    """What the papers that run here claim, what was measured, and the verdict."""
    shown = verdicts_by_paper(room, verdict)
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
