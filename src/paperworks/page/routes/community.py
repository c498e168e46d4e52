"""What readers add: votes, reading lists, papers and subscriptions."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from paperworks.errors import UsageError
from paperworks.page import ingest, reading, votes
from paperworks.page.entries import Entry
from paperworks.page.mail import address as mail_address
from paperworks.page.rendering import page_before, paper_path, respond, vote_id, wants_json
from paperworks.page.routes.papers import entry_of, lines_of
from paperworks.page.safety import Reader, SignedIn
from paperworks.page.search import words_of
from paperworks.page.subscriptions import LONGEST

router = APIRouter(tags=["community"])

# What is no address, or none at all, is said in the form itself.
Email = Annotated[str, Form()]
Short = Annotated[str, Form(max_length=300)]
_BEGINS = "The digest begins when you follow the link in it."
Frequency = Literal["weekly", "daily"]


@router.post("/papers/{key:path}/vote", summary="Vote for a paper")
def vote(request: Request, user: SignedIn, key: str) -> Response:
    """One vote a user; voting again changes nothing."""
    entry = entry_of(request, key)
    votes.vote(request.app.state.store, user.id, entry.key)
    return _voted(request, entry)


@router.post("/papers/{key:path}/unvote", summary="Take a vote back")
def unvote(request: Request, user: SignedIn, key: str) -> Response:
    """Take one's vote back."""
    entry = entry_of(request, key)
    votes.unvote(request.app.state.store, user.id, entry.key)
    return _voted(request, entry)


def _voted(request: Request, entry: Entry) -> Response:
    if wants_json(request):
        count = votes.votes_of(request.app.state.store, [entry.key])[entry.key]
        return respond(request, "", {"key": entry.key, "votes": count})
    # Back to the list from which the vote came, and to its button there.
    return RedirectResponse(f"{page_before(request, paper_path(entry))}#{vote_id(entry)}", 303)


@router.post("/papers/{key:path}/keep", summary="Keep a paper for reading")
def keep(request: Request, user: SignedIn, key: str) -> Response:
    """Put a paper on one's reading list."""
    entry = entry_of(request, key)
    reading.keep(request.app.state.store, user.id, entry.key)
    return _kept(request, entry, True)


@router.post("/papers/{key:path}/unkeep", summary="Take a paper off the reading list")
def unkeep(request: Request, user: SignedIn, key: str) -> Response:
    """Take a paper off one's reading list."""
    entry = entry_of(request, key)
    reading.take_off(request.app.state.store, user.id, entry.key)
    return _kept(request, entry, False)


def _kept(request: Request, entry: Entry, kept: bool) -> Response:
    if wants_json(request):
        return respond(request, "", {"key": entry.key, "kept": kept})
    return RedirectResponse(f"{page_before(request, paper_path(entry))}#keep", 303)


@router.get("/reading", summary="One's reading list")
def reading_page(request: Request, user: SignedIn) -> Response:
    """The papers that one keeps, and those that are like them."""
    state = request.app.state
    kept = reading.reading_list(state.store, user.id)
    like = state.index.recommended([entry.key for entry in kept])
    begun = [one for one in state.subscriptions.of(user.email) if one.kind == "reading"] if user.confirmed else []
    data = {
        "papers": lines_of(state.store, user, kept), "recommended": lines_of(state.store, user, like),
        "frequency": begun[0].frequency if begun else None,
    }  # fmt: skip
    return respond(request, "reading.html", data)


@router.post("/reading/subscribe", summary="Recommendations by mail")
def reading_by_mail(request: Request, user: SignedIn, frequency: Annotated[Frequency, Form()] = "weekly") -> Response:
    """New papers that are like those of one's reading list, by mail to one's own address."""
    begun = request.app.state.subscriptions.subscribe(
        user.email, kind="reading", frequency=frequency, owned=user.confirmed
    )
    return _subscribed(request) if begun is not None else mailed(request, _BEGINS)


@router.get("/submit", summary="Form to submit a paper")
def submit_form(request: Request, user: SignedIn, address: Annotated[str, Query(max_length=300)] = "") -> Response:
    """Where a paper is submitted."""
    return respond(request, "submit.html", {"error": None, "address": address})


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
    return respond(request, "subscribe.html", data, wrong="")


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
        return respond(request, "subscribe.html", data, status=400, wrong=_wrong(email, query))
    return _subscribed(request) if begun is not None else mailed(request, _BEGINS)


def _wrong(email: str, query: str) -> str:
    """The field that what was refused stands in."""
    if no_address(email):
        return "email"
    return "query" if query.strip() and (not words_of(query) or len(query.strip()) > LONGEST) else "tag"


def no_address(email: str) -> bool:
    """Whether mail cannot be sent to this."""
    try:
        mail_address(email)
    except UsageError:
        return True
    return False


def mailed(request: Request, then: str) -> Response:
    """What is said once a mail is in the outbox: that it comes, or where it is read where no server sends it."""
    if request.app.state.accounts.confirms:
        told = {"title": "Look into your mail", "message": f"A mail is on its way. {then}", "command": ""}
        return respond(request, "message.html", told)
    told = {
        "title": "The mail is kept, not sent",
        "message": f"This page has no mail server (PAPERWORKS_SMTP names one), so the mail waits in its store. {then}",
        # Who reads a page of their own machine can read it there.
        "command": "paperworks mail" if request.app.state.local else "",
    }
    return respond(request, "message.html", told)


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
