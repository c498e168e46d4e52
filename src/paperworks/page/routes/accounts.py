"""Accounts: register, log in by password or by a link in a mail, log out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from paperworks.errors import UsageError
from paperworks.page.rendering import respond, wants_json
from paperworks.page.routes.community import Email
from paperworks.page.safety import Reader, drop_session, keep_session, session_token

router = APIRouter(tags=["accounts"])

Password = Annotated[str, Form(max_length=1000)]
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
def login(request: Request, email: Email, password: Password = "", next: Next = "/") -> Response:
    """Log in with a password; without one, a mail with a link to log in is sent."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if password:
            return _welcome(request, accounts.login(email, password), next)
        accounts.request_link(email)
    except UsageError as error:
        data = {"email": email, "next": onward(next), "error": str(error)}
        return respond(request, "login.html", data, status=400)
    told = "If there is an account with this address, a mail with a link to log in is on its way."
    return respond(request, "message.html", {"title": "Look into your mail", "message": told})


@router.get("/login/link/{token}", summary="Ask whether to log in")
def link_form(request: Request, token: str) -> Response:
    """A mail program that looks at links ahead does not use them up."""
    data = {"title": "Log in?", "action": "Log in", "message": "The link in the mail is good once."}
    return respond(request, "ask.html", data)


@router.post("/login/link/{token}", summary="Log in by a link")
def link(request: Request, token: str) -> Response:
    """Log in by the link that a mail brought."""
    return _welcome(request, request.app.state.accounts.login_by_link(token), "/")


@router.get("/register", summary="Form to register")
def register_form(request: Request, reader: Reader) -> Response:
    """Where one makes an account."""
    if reader is not None and not wants_json(request):
        return RedirectResponse("/", 303)
    return respond(request, "register.html", {"email": "", "error": None})


@router.post("/register", summary="Register")
def register(request: Request, email: Email, password: Password) -> Response:
    """Make an account, at once or by a link in a mail, as the server is set up."""
    accounts = request.app.state.accounts
    email = email.strip()
    try:
        if accounts.register(email, password) is not None:
            return _welcome(request, accounts.login(email, password), "/")
    except UsageError as error:
        return respond(request, "register.html", {"email": email, "error": str(error)}, status=400)
    told = "A mail is on its way. Follow the link in it, and you have an account."
    return respond(request, "message.html", {"title": "Look into your mail", "message": told})


@router.post("/logout", summary="Log out")
def logout(request: Request) -> Response:
    """End the session, here and in the store."""
    if token := session_token(request):
        request.app.state.accounts.logout(token)
    response: Response = (
        respond(request, "", {"logged_in": False}) if wants_json(request) else RedirectResponse("/", 303)
    )
    drop_session(request, response)
    return response


def _welcome(request: Request, token: str, path: str) -> Response:
    response: Response = (
        respond(request, "", {"logged_in": True}) if wants_json(request) else RedirectResponse(onward(path), 303)
    )
    keep_session(request, response, token)
    return response
