"""What keeps the page and its readers safe: who reads, forged requests, limits, and the headers of every answer."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# The token in the address is the secret there, and a mail program posts without a form of ours.
_ONE_CLICK = "/unsubscribe/"
_SESSION, _VISITOR = "session", "visitor"
_SESSION_SECONDS = 30 * 86400
_READER = "paperworks.reader"
_log = logging.getLogger(__name__)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine itself.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("example.org")
        (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def reader(request: Request) -> Any:
    """Who is logged in; None for everybody else."""
    if _READER not in request.scope:
        token = request.cookies.get(_SESSION)
        request.scope[_READER] = request.app.state.accounts.user(token) if token else None
    return request.scope[_READER]


def signed_in(request: Request) -> Any:
    """Who is logged in, for what only they may do.

    Raises:
        HTTPException: 401; a browser is sent to log in.
    """
    user = reader(request)
    if user is None:
        raise HTTPException(401, "log in first")
    return user


def may_run(request: Request) -> Any:
    """Who may start runs: users who are logged in, and everybody where the server allows it.

    Raises:
        HTTPException: 401; a browser is sent to log in.
    """
    return reader(request) if request.app.state.allow_runs else signed_in(request)


async def _reading(request: Request) -> Any:
    """As `reader`, which takes a thread only where there is something to look up."""
    return await run_in_threadpool(reader, request) if session_token(request) else None


Reader = Annotated[Any, Depends(_reading)]
SignedIn = Annotated[Any, Depends(signed_in)]
MayRun = Annotated[Any, Depends(may_run)]


def keep_session(request: Request, response: Any, token: str) -> None:
    """Let the reader's browser keep the session."""
    response.set_cookie(_SESSION, token, max_age=_SESSION_SECONDS, **_cookie(request))


def drop_session(request: Request, response: Any) -> None:
    """Let the reader's browser forget the session."""
    response.delete_cookie(_SESSION, **_cookie(request))


def session_token(request: Request) -> str | None:
    """The session that the browser keeps."""
    return request.cookies.get(_SESSION)


def _cookie(request: Request) -> dict[str, Any]:
    host = urlsplit(request.app.state.base_url).hostname
    return {"httponly": True, "samesite": "lax", "secure": not is_loopback(host), "path": "/"}


def csrf_token(request: Request) -> str:
    """What the forms of this reader carry; the first one gives the browser a name to sign."""
    scope = request.scope
    visitor = scope.get("paperworks.visitor") or request.cookies.get(_VISITOR)
    if not visitor or len(visitor) > 64:
        visitor = secrets.token_urlsafe(16)
        scope["paperworks.new_visitor"] = (visitor, _cookie(request))
    scope["paperworks.visitor"] = visitor
    token: str = _signer(request).dumps(visitor)
    return token


def _signer(request: Request) -> URLSafeSerializer:
    return URLSafeSerializer(request.app.state.secret, salt="csrf")


async def check_csrf(request: Request) -> None:
    """Refuse what changes something unless it comes from a form of this page, for this reader.

    The application applies it to every route, so none can forget it.

    Raises:
        HTTPException: 403.
    """
    if request.method in _SAFE or request.url.path.startswith(_ONE_CLICK):
        return
    origin = request.headers.get("origin")
    own = {urlsplit(request.app.state.base_url).netloc, request.headers.get("host", "")}
    if origin is not None and urlsplit(origin).netloc not in own:
        raise HTTPException(403, f"this request comes from {origin[:100]}, and only pages from here may send it")
    token = request.headers.get("x-csrf-token")
    if token is None:
        token = str((await request.form()).get("csrf", ""))
    visitor = request.cookies.get(_VISITOR, "")
    try:
        good = bool(visitor) and secrets.compare_digest(str(_signer(request).loads(token)).encode(), visitor.encode())
    except BadSignature:
        good = False
    if not good:
        raise HTTPException(403, "the form is out of date: load its page anew, with cookies allowed, and send it again")


class Limits:
    """How often one address may send what changes something: a bucket of tokens for each address and kind of route.

    Each server process counts for itself.

    Args:
        app: What is protected.
        rates: For each beginning of a path how many requests a minute; the longest that fits counts.
        most: How many addresses are remembered.
        clock: Seconds.
    """

    def __init__(
        self, app: ASGIApp, *, rates: Mapping[str, int], most: int = 10_000, clock: Any = time.monotonic
    ) -> None:
        self._app, self._rates, self._most, self._clock = app, rates, most, clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through what is within the rate."""
        if scope["type"] == "http" and scope["method"] not in _SAFE:
            wait = self._wait(scope)
            if wait > 0:
                answer = refusal(scope, 429, f"too many requests: try again in {wait:.0f} s")
                answer.headers["Retry-After"] = f"{wait:.0f}"
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)

    def _wait(self, scope: Scope) -> float:
        """Seconds until this request would be welcome; 0 where it is."""
        kind = max((path for path in self._rates if scope["path"].startswith(path)), key=len, default=None)
        if kind is None:
            return 0.0
        rate, now = self._rates[kind] / 60, self._clock()
        address = (scope.get("client") or ("",))[0]
        tokens, then = self._buckets.pop((kind, address), (float(self._rates[kind]), now))
        tokens = min(float(self._rates[kind]), tokens + (now - then) * rate)
        self._buckets[kind, address] = (max(tokens - 1, 0.0) if tokens >= 1 else tokens, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if tokens >= 1 else max(1.0, (1 - tokens) / rate)


class Guard:
    """Size of what is sent, the host that is asked for, and the headers of every answer.

    Args:
        app: What is protected.
        hosts: Names under which the page may be asked for beside this machine's own; a page elsewhere whose name
            leads to this machine must not read what stands here.
        https: Whether browsers are to come by HTTPS only.
        most_bytes: The largest body.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], https: bool, most_bytes: int = 64 * 1024) -> None:
        self._app, self._hosts, self._most = app, hosts, most_bytes
        self._headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if https else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through what is sound, and add the headers to the answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                if scope.get("paperworks.new_visitor"):
                    headers.append("Set-Cookie", _visitor_cookie(*scope["paperworks.new_visitor"]))
            await send(message)

        headers = Headers(scope=scope)
        if not self._known(headers.get("host", "")):
            return await refusal(scope, 421, "this page is not at that address")(scope, receive, with_headers)
        if scope["method"] not in _SAFE:
            body = await self._body(receive)
            if body is None:
                large = refusal(scope, 413, f"at most {self._most} bytes are taken")
                return await large(scope, receive, with_headers)
            receive = _again(body, receive)
        await self._app(scope, receive, with_headers)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, None where it is too large; no length that a header tells is trusted."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                return None
        return bytes(body)

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in self._hosts or is_loopback(name)


def _again(body: bytes, receive: Receive) -> Receive:
    """What is received when the body has been read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


def _visitor_cookie(visitor: str, attributes: dict[str, Any]) -> str:
    response = PlainTextResponse()
    response.set_cookie(_VISITOR, visitor, **attributes)
    return response.headers["set-cookie"]


def refusal(scope: Scope, status: int, reason: str) -> PlainTextResponse | JSONResponse:
    """An answer that needs neither store nor template; the log names no address, for addresses hold tokens."""
    _log.info("%s %s: %d", scope["method"], scope["path"].split("/")[1], status)
    if scope.get("paperworks.json") or "application/json" in Headers(scope=scope).get("accept", ""):
        return JSONResponse({"error": reason}, status)
    return PlainTextResponse(f"{reason}\n", status)
