"""Accounts: register, log in by password or by a link in a mail, choose and change a password, log out, and be gone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.responses import RedirectResponse, Response

from paperworks.errors import UsageError
from paperworks.page import votes
from paperworks.page.accounts import LINKS, PASSWORD_LENGTHS
from paperworks.page.entries import Entry
from paperworks.page.history import runs_of
from paperworks.page.places import BusyError
from paperworks.page.reading import reading_list
from paperworks.page.rendering import respond, vote_id, wants_json
from paperworks.page.routes.community import Email, mailed, no_address
from paperworks.page.safety import (
    Reader,
    SignedIn,
    drop_session,
    keep_browser,
    keep_session,
    known_browser,
    session_token,
)

router = APIRouter(tags=["accounts"])
_SHOWN = 20

Password = Annotated[str, Form()]
Next = Annotated[str, Form(max_length=1000)]
NextAsked = Annotated[str, Query(max_length=1000, description="Where to go then, a path on this site.")]
# The paper that somebody was about to vote for.
Vote = Annotated[str, Form(max_length=100)]
VoteAsked = Annotated[str, Query(max_length=100, description="Key of the paper to vote for then.")]


def onward(path: str) -> str:
    """Where to go after logging in: a path on this site, whatever was asked for.

    Example:
        >>> onward("/papers/hydra"), onward("//evil.example"), onward("https://evil.example")
        ('/papers/hydra', '/', '/')
    """
    own = path.startswith("/") and path[1:2] not in ("/", "\\") and path.isprintable()
    return path if own else "/"


@router.get("/login", summary="Form to log in")
def login_form(request: Request, reader: Reader, next: NextAsked = "/", vote: VoteAsked = "") -> Response:
    """Where one signs in."""
    if reader is not None and not wants_json(request):
        return RedirectResponse(onward(next), 303)
    data = {"email": "", "next": onward(next), "vote": vote, "error": None}
    return respond(request, "login.html", data, wrong="", voted=_paper(request, vote))


@router.post("/login", summary="Log in")
def login(request: Request, email: Email = "", password: Password = "", next: Next = "/", vote: Vote = "") -> Response:
    """Log in with a password; without one, a mail with a link to log in is sent."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if password:
            browser = known_browser(request, email.lower())
            return _welcome(request, accounts.login(email, password, browser), next, vote)
        accounts.request_link(email, next=onward(next), vote=vote)
    except (UsageError, BusyError) as error:
        data = {"email": email, "next": onward(next), "vote": vote}
        wrong = "password" if password and not no_address(email) else "email"
        return _again(request, "login.html", data, error, wrong, voted=_paper(request, vote))
    return _mailed(request, "Follow the link in it, and you are logged in.")


@router.get("/login/link/{token}", summary="Ask whether to log in")
def link_form(request: Request, token: str) -> Response:
    """A mail program that looks at links ahead does not use them up."""
    link = request.app.state.accounts.link(token, "login")
    told = f"The link in the mail is good once, and logs you in as {link.email}."
    if voted := _paper(request, link.vote):
        told += f" You vote for “{voted.title}” with it."
    return respond(request, "ask.html", {"title": "Log in?", "action": "Log in", "message": told})


@router.post("/login/link/{token}", summary="Log in by a link")
def link(request: Request, token: str) -> Response:
    """Log in by the link that a mail brought."""
    accounts = request.app.state.accounts
    asked = accounts.link(token, "login")
    return _welcome(request, accounts.login_by_link(token), asked.next, asked.vote)


@router.get("/register", summary="Form to register")
def register_form(request: Request, reader: Reader, next: NextAsked = "/", vote: VoteAsked = "") -> Response:
    """Where one asks for an account."""
    if reader is not None and not wants_json(request):
        return RedirectResponse(onward(next), 303)
    confirms = request.app.state.accounts.confirms
    data = {"email": "", "confirms": confirms, "next": onward(next), "vote": vote, "error": None}
    return respond(request, "register.html", data, wrong="", voted=_paper(request, vote))


@router.post("/register", summary="Register")
def register(
    request: Request, email: Email = "", password: Password = "", next: Next = "/", vote: Vote = ""
) -> Response:
    """Ask for a mail, behind whose link the password is chosen; where the server sends none, choose it here."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if not accounts.confirms:
            return _welcome(request, accounts.register(email, password), next, vote)
        accounts.request_password(email, next=onward(next), vote=vote)
    except UsageError as error:
        data = {"email": email, "confirms": accounts.confirms, "next": onward(next), "vote": vote}
        short = not accounts.confirms and not no_address(email) and len(password) not in PASSWORD_LENGTHS
        wrong = "password" if short else "email"
        return _again(request, "register.html", data, error, wrong, voted=_paper(request, vote))
    return _mailed(request, "Follow the link in it and choose a password, and you have an account.")


@router.get("/forgotten", summary="Form to replace a forgotten password")
def forgotten_form(request: Request, next: NextAsked = "/", vote: VoteAsked = "") -> Response:
    """Where one asks for a link behind which a new password is chosen."""
    return respond(
        request, "forgotten.html", {"email": "", "next": onward(next), "vote": vote, "error": None}, wrong=""
    )


@router.post("/forgotten", summary="Replace a forgotten password")
def forgotten(request: Request, email: Email = "", next: Next = "/", vote: Vote = "") -> Response:
    """Ask for a mail, behind whose link a new password is chosen."""
    email = email.strip()
    try:
        request.app.state.accounts.request_password(email, next=onward(next), vote=vote)
    except UsageError as error:
        return _again(request, "forgotten.html", {"email": email, "next": onward(next), "vote": vote}, error, "email")
    return _mailed(request, "Follow the link in it and choose a new password.")


@router.get("/password/{token}", summary="Form to choose a password")
def password_form(request: Request, token: str) -> Response:
    """Where the link in a mail leads; looking at it does not use it up."""
    link = request.app.state.accounts.link(token, "register", "reset")
    data = {"kind": link.kind, "email": link.email, "error": None}
    return respond(request, "password.html", data, wrong="", voted=_paper(request, link.vote))


@router.post("/password/{token}", summary="Choose a password")
def password(request: Request, token: str, password: Password = "") -> Response:
    """Choose the password of the account whose address the link was mailed to, and log in."""
    accounts = request.app.state.accounts
    link = accounts.link(token, "register", "reset")
    try:
        return _welcome(request, accounts.set_password(token, password), link.next, link.vote)
    except UsageError as error:
        data = {"kind": link.kind, "email": link.email}
        return _again(request, "password.html", data, error, "password", voted=_paper(request, link.vote))


@router.get("/account", summary="One's account")
def account(request: Request, user: SignedIn) -> Response:
    """What one's account is: runs, votes, subscriptions, the password, and how to be gone."""
    return respond(request, "account.html", {**_account(request, user), "error": None}, wrong="")


@router.post("/account", summary="Change a password")
def change(request: Request, user: SignedIn, old: Password = "", password: Password = "") -> Response:
    """Replace a password by who knows it; all other browsers are logged out."""
    try:
        return _welcome(request, request.app.state.accounts.change_password(user, old, password), "/account")
    except (UsageError, BusyError) as error:
        wrong = "old" if len(password) in PASSWORD_LENGTHS else "password"
        return _again(request, "account.html", _account(request, user), error, wrong)


@router.post("/account/sessions", summary="Log out everywhere")
def end_sessions(request: Request, user: SignedIn) -> Response:
    """End all sessions of one's account, this one too."""
    request.app.state.accounts.end_sessions(user)
    response: Response = (
        respond(request, "", {"logged_in": False}) if wants_json(request) else RedirectResponse("/login", 303)
    )
    drop_session(request, response)
    return response


@router.post("/account/subscriptions/{number}", summary="End a digest of one's own")
def end_subscription(request: Request, user: SignedIn, number: int) -> Response:
    """End a subscription of one's own address."""
    subscriptions = request.app.state.subscriptions
    mine = [one for one in subscriptions.of(user.email) if one.id == number] if user.confirmed else []
    if not mine:
        raise HTTPException(404, "there is no such subscription of yours")
    subscriptions.unsubscribe(mine[0].farewell)
    if wants_json(request):
        return respond(request, "", {"ended": number})
    return RedirectResponse("/account", 303)


@router.post("/account/delete", summary="Delete one's account")
def delete(request: Request, user: SignedIn, confirm: Password = "") -> Response:
    """Delete one's account by its password, with votes and reading list; runs stay without a name."""
    try:
        request.app.state.accounts.delete(user, confirm)
    except (UsageError, BusyError) as error:
        return _again(request, "account.html", _account(request, user), error, "confirm")
    told = "Your votes and your reading list are gone with it. Runs that you started stay, without your name."
    response = respond(request, "message.html", {"title": "Your account is deleted", "message": told, "command": ""})
    drop_session(request, response)
    return response


@router.post("/logout", summary="Log out")
def logout(request: Request) -> Response:
    """End the session, here and in the store."""
    request.app.state.accounts.logout(session_token(request))
    response: Response = (
        respond(request, "", {"logged_in": False}) if wants_json(request) else RedirectResponse("/", 303)
    )
    drop_session(request, response)
    return response


def _account(request: Request, user: Any) -> dict[str, Any]:
    state = request.app.state
    # An address that is not confirmed may be another's, and so may its subscriptions.
    begun = state.subscriptions.of(user.email) if user.confirmed else []
    return {
        "email": user.email, "confirmed": user.confirmed, "has_password": state.accounts.has_password(user),
        "runs": runs_of(state.store, user_id=user.id, limit=_SHOWN), "votes": votes.votes_by(state.store, user.id),
        "reading": reading_list(state.store, user.id),
        "subscriptions": [{"id": one.id, "subject": one.subject, "frequency": one.frequency} for one in begun],
    }  # fmt: skip


def _paper(request: Request, key: str) -> Entry | None:
    """The paper to vote for; None where there is none of this key."""
    found: Entry | None = request.app.state.index.get(key) if key and key.isprintable() else None
    return found


def _again(
    request: Request, template: str, data: dict[str, Any], error: UsageError | BusyError, wrong: str, **only_html: Any
) -> Response:
    """The form once more, which says what was wrong and in which field."""
    response = respond(request, template, {**data, "error": str(error)}, status=400, wrong=wrong, **only_html)
    if isinstance(error, BusyError):
        response.status_code = 429
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _mailed(request: Request, then: str) -> Response:
    return mailed(request, f"{then} Of several mails the newest counts; more than {LINKS} an hour are not sent.")


def _welcome(request: Request, token: str, path: str, vote: str = "") -> Response:
    """A reader who has logged in, on the way to where they were going, with the vote that they were about to cast."""
    accounts = request.app.state.accounts
    # The session that this browser had is nobody's any more.
    accounts.logout(session_token(request))
    path = onward(path)
    user, voted = accounts.user(token), _paper(request, vote)
    if user and voted:
        votes.vote(request.app.state.store, user.id, voted.key)
        path = f"{path.partition('#')[0]}#{vote_id(voted)}"
    response: Response = (
        respond(request, "", {"logged_in": True}) if wants_json(request) else RedirectResponse(path, 303)
    )
    keep_session(request, response, token)
    if user:
        keep_browser(request, response, user.email)
    return response
