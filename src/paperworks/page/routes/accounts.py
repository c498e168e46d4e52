"""Accounts: register, log in by password or by a link in a mail, choose and change a password, log out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from paperworks.errors import UsageError
from paperworks.page.accounts import LINKS
from paperworks.page.places import BusyError
from paperworks.page.rendering import respond, wants_json
from paperworks.page.routes.community import Email
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

Password = Annotated[str, Form()]
Next = Annotated[str, Form(max_length=1000)]


def onward(path: str) -> str:
    """Where to go after logging in: a path on this site, whatever was asked for.

    Example:
        >>> onward("/papers/hydra"), onward("//evil.example"), onward("https://evil.example")
        ('/papers/hydra', '/', '/')
    """
    own = path.startswith("/") and path[1:2] not in ("/", "\\") and path.isprintable()
    return path if own else "/"


@router.get("/login", summary="Form to log in")
def login_form(request: Request, reader: Reader, next: Annotated[str, Query(max_length=1000)] = "/") -> Response:
    """Where one signs in."""
    if reader is not None and not wants_json(request):
        return RedirectResponse(onward(next), 303)
    return respond(request, "login.html", {"email": "", "next": onward(next), "error": None})


@router.post("/login", summary="Log in")
def login(request: Request, email: Email = "", password: Password = "", next: Next = "/") -> Response:
    """Log in with a password; without one, a mail with a link to log in is sent."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if password:
            browser = known_browser(request, email.lower())
            return _welcome(request, accounts.login(email, password, browser), next)
        accounts.request_link(email)
    except (UsageError, BusyError) as error:
        return _again(request, "login.html", {"email": email, "next": onward(next)}, error)
    return _mailed(request, "Follow the link in it, and you are logged in.")


@router.get("/login/link/{token}", summary="Ask whether to log in")
def link_form(request: Request, token: str) -> Response:
    """A mail program that looks at links ahead does not use them up."""
    link = request.app.state.accounts.link(token, "login")
    told = f"The link in the mail is good once, and logs you in as {link.email}."
    return respond(request, "ask.html", {"title": "Log in?", "action": "Log in", "message": told})


@router.post("/login/link/{token}", summary="Log in by a link")
def link(request: Request, token: str) -> Response:
    """Log in by the link that a mail brought."""
    return _welcome(request, request.app.state.accounts.login_by_link(token), "/")


@router.get("/register", summary="Form to register")
def register_form(request: Request, reader: Reader) -> Response:
    """Where one asks for an account."""
    if reader is not None and not wants_json(request):
        return RedirectResponse("/", 303)
    confirms = request.app.state.accounts.confirms
    return respond(request, "register.html", {"email": "", "confirms": confirms, "error": None})


@router.post("/register", summary="Register")
def register(request: Request, email: Email = "", password: Password = "") -> Response:
    """Ask for a mail, behind whose link the password is chosen; where the server sends none, choose it here."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if not accounts.confirms:
            return _welcome(request, accounts.register(email, password), "/")
        accounts.request_password(email)
    except UsageError as error:
        return _again(request, "register.html", {"email": email, "confirms": accounts.confirms}, error)
    return _mailed(request, "Follow the link in it and choose a password, and you have an account.")


@router.get("/forgotten", summary="Form to replace a forgotten password")
def forgotten_form(request: Request) -> Response:
    """Where one asks for a link behind which a new password is chosen."""
    return respond(request, "forgotten.html", {"email": "", "error": None})


@router.post("/forgotten", summary="Replace a forgotten password")
def forgotten(request: Request, email: Email = "") -> Response:
    """Ask for a mail, behind whose link a new password is chosen."""
    email = email.strip()
    try:
        request.app.state.accounts.request_password(email)
    except UsageError as error:
        return _again(request, "forgotten.html", {"email": email}, error)
    return _mailed(request, "Follow the link in it and choose a new password.")


@router.get("/password/{token}", summary="Form to choose a password")
def password_form(request: Request, token: str) -> Response:
    """Where the link in a mail leads; looking at it does not use it up."""
    link = request.app.state.accounts.link(token, "register", "reset")
    return respond(request, "password.html", {"kind": link.kind, "email": link.email, "error": None})


@router.post("/password/{token}", summary="Choose a password")
def password(request: Request, token: str, password: Password = "") -> Response:
    """Choose the password of the account whose address the link was mailed to, and log in."""
    accounts = request.app.state.accounts
    link = accounts.link(token, "register", "reset")
    try:
        return _welcome(request, accounts.set_password(token, password), "/")
    except UsageError as error:
        return _again(request, "password.html", {"kind": link.kind, "email": link.email}, error)


@router.get("/account", summary="Form to change a password")
def account(request: Request, user: SignedIn) -> Response:
    """What one's account is."""
    return respond(request, "account.html", {**_account(request, user), "error": None})


@router.post("/account", summary="Change a password")
def change(request: Request, user: SignedIn, old: Password = "", password: Password = "") -> Response:
    """Replace a password by who knows it; all other browsers are logged out."""
    try:
        return _welcome(request, request.app.state.accounts.change_password(user, old, password), "/account")
    except (UsageError, BusyError) as error:
        return _again(request, "account.html", _account(request, user), error)


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
    return {"email": user.email, "has_password": request.app.state.accounts.has_password(user)}


def _again(request: Request, template: str, data: dict[str, Any], error: UsageError | BusyError) -> Response:
    """The form once more, which says what was wrong."""
    response = respond(request, template, {**data, "error": str(error)}, status=400)
    if isinstance(error, BusyError):
        response.status_code = 429
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _mailed(request: Request, then: str) -> Response:
    way = "is on its way" if request.app.state.accounts.confirms else "waits here until whoever runs this page sends it"
    told = f"A mail {way}. {then} Of several mails the newest counts; more than {LINKS} an hour are not sent."
    return respond(request, "message.html", {"title": "Look into your mail", "message": told})


def _welcome(request: Request, token: str, path: str) -> Response:
    accounts = request.app.state.accounts
    # The session that this browser had is nobody's any more.
    accounts.logout(session_token(request))
    response: Response = (
        respond(request, "", {"logged_in": True}) if wants_json(request) else RedirectResponse(onward(path), 303)
    )
    keep_session(request, response, token)
    if user := accounts.user(token):
        keep_browser(request, response, user.email)
    return response
