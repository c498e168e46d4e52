"""What readers add: votes, papers and subscriptions."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from paperworks.errors import UsageError
from paperworks.page import ingest, votes
from paperworks.page.rendering import paper_path, respond, wants_json
from paperworks.page.routes.papers import entry_of
from paperworks.page.safety import Reader, SignedIn

router = APIRouter(tags=["community"])

# What is no address, or none at all, is said in the form itself.
Email = Annotated[str, Form()]
Short = Annotated[str, Form(max_length=300)]
Frequency = Literal["weekly", "daily"]


@router.post("/papers/{key:path}/vote", summary="Vote for a paper")
def vote(request: Request, user: SignedIn, key: str) -> Response:
    """One vote a user; voting again changes nothing."""
    entry = entry_of(request, key)
    votes.vote(request.app.state.store, user.id, entry.key)
    return _voted(request, entry.key, paper_path(entry))


@router.post("/papers/{key:path}/unvote", summary="Take a vote back")
def unvote(request: Request, user: SignedIn, key: str) -> Response:
    """Take one's vote back."""
    entry = entry_of(request, key)
    votes.unvote(request.app.state.store, user.id, entry.key)
    return _voted(request, entry.key, paper_path(entry))


def _voted(request: Request, key: str, path: str) -> Response:
    if wants_json(request):
        return respond(request, "", {"key": key, "votes": votes.votes_of(request.app.state.store, [key]).get(key, 0)})
    # Back to the list from which the vote came.
    before = urlsplit(request.headers.get("referer", ""))
    own = before.netloc == request.headers.get("host") and before.path.startswith("/")
    back = f"{before.path}{'?' if before.query else ''}{before.query}" if own else path
    return RedirectResponse(back if not back.startswith("//") else path, 303)


@router.get("/submit", summary="Form to submit a paper")
def submit_form(request: Request, user: SignedIn) -> Response:
    """Where a paper is submitted."""
    return respond(request, "submit.html", {"error": None, "address": ""})


@router.post("/submit", summary="Submit a paper")
async def submit(request: Request, user: SignedIn, address: Annotated[str, Form(max_length=300)]) -> Response:
    """Take in a paper by its arXiv number or address; one at a time, and a few within a minute."""
    try:
        entry = await request.app.state.submissions.submit(user.id, address)
    except (UsageError, ingest.SourceError) as error:
        status = 400 if isinstance(error, UsageError) else 502
        return await run_in_threadpool(
            respond, request, "submit.html", {"error": str(error), "address": address}, status=status
        )
    if wants_json(request):
        return respond(request, "", {"key": entry.key, "title": entry.title}, status=201)
    return RedirectResponse(paper_path(entry), 303)


@router.get("/subscribe", summary="Form to subscribe")
def subscribe_form(
    request: Request,
    query: Annotated[str, Query(max_length=300)] = "",
    tag: Annotated[str, Query(max_length=300)] = "",
) -> Response:
    """Where one subscribes to a digest."""
    data = {"query": query, "tag": tag, "email": "", "frequency": "weekly", "error": None}
    return respond(request, "subscribe.html", data)


@router.post("/subscribe", summary="Subscribe to a digest")
def subscribe(
    request: Request,
    reader: Reader,
    email: Email = "",
    query: Short = "",
    tag: Short = "",
    frequency: Annotated[Frequency, Form()] = "weekly",
) -> Response:
    """Ask for a digest by mail; it begins when the link in the mail that comes is followed.

    Who is logged in with a confirmed address has shown that it is theirs, and needs no mail to show it again.
    """
    owned = reader is not None and reader.confirmed and reader.email == email.strip().lower()
    try:
        begun = request.app.state.subscriptions.subscribe(
            email.strip(), query=query.strip() or None, tag=tag.strip() or None, frequency=frequency, owned=owned
        )
    except UsageError as error:
        data = {"query": query, "tag": tag, "email": email, "frequency": frequency, "error": str(error)}
        return respond(request, "subscribe.html", data, status=400)
    if begun is not None:
        return _subscribed(request)
    told = "A mail is on its way. The digest begins when you follow the link in it."
    return respond(request, "message.html", {"title": "Look into your mail", "message": told})


@router.get("/confirm/{token}", summary="Ask whether to begin a digest")
def confirm_form(request: Request, token: str) -> Response:
    """A mail program that looks at links ahead confirms nothing."""
    asked = request.app.state.subscriptions.asked(token)
    told = f"A {asked.frequency} digest of {asked.subject} goes to {asked.email}."
    return respond(request, "ask.html", {"title": "Begin the digest?", "action": "Confirm", "message": told})


@router.post("/confirm/{token}", summary="Begin a digest")
def confirm(request: Request, token: str) -> Response:
    """Begin the digest that a mail asked about."""
    request.app.state.subscriptions.confirm(token)
    return _subscribed(request)


def _subscribed(request: Request) -> Response:
    told = "The next digest comes to you by mail. Each has a link that ends it."
    return respond(request, "message.html", {"title": "You are subscribed", "message": told})


@router.get("/unsubscribe/{token}", summary="Ask whether to end a digest")
def unsubscribe_form(request: Request, token: str) -> Response:
    """A mail program that looks at links ahead ends nothing."""
    data = {"title": "End the digest?", "action": "Unsubscribe", "message": "No more mail will come of this one."}
    return respond(request, "ask.html", data)


@router.post("/unsubscribe/{token}", summary="End a digest")
def unsubscribe(request: Request, token: str) -> Response:
    """End a digest, from its page or by a mail program's own button (RFC 8058)."""
    request.app.state.subscriptions.unsubscribe(token)
    return respond(request, "message.html", {"title": "You are unsubscribed", "message": "No more mail will come."})
