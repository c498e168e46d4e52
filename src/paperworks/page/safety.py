"""What keeps the page and its readers safe: who reads, forged requests, limits, and the headers of every answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paperworks.errors import UsageError

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_FORM = "application/x-www-form-urlencoded"
# The token in the address is the secret there, and a mail program posts without a form of ours.
_ONE_CLICK = "/unsubscribe/"
_SESSION, _VISITOR, _BROWSER = "session", "visitor", "browser"
_SESSION_SECONDS = 30 * 86400
_BROWSER_SECONDS = 365 * 86400
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


def address_of(scope: Scope) -> str:
    """Whom to count a request for: its address, or the network of 64 bits that a household gets of IPv6.

    Example:
        >>> address_of({"client": ("2001:db8::7:1", 1)}), address_of({"client": ("198.51.100.1", 1)})
        ('2001:db8::/64', '198.51.100.1')
    """
    given = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        # A proxy that is trusted may name a client as it likes, but not at any length.
        return str(given)[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


def networks(proxies: str) -> list[str]:
    """The proxies whose word on addresses and schemes is taken, from a list with commas.

    Raises:
        UsageError: One is no address and no network, or holds every address.

    Example:
        >>> networks("127.0.0.1, 10.0.0.0/8")
        ['127.0.0.1/32', '10.0.0.0/8']
    """
    named = []
    for given in filter(None, (part.strip() for part in proxies.split(","))):
        try:
            network = ipaddress.ip_network(given, strict=False)
        except ValueError:
            network = None
        if network is None or network.prefixlen == 0:
            raise UsageError(
                f"a proxy to be trusted is an address or a network such as 127.0.0.1 or 10.0.0.0/8, not {given!r}: "
                "whoever it names can pass for any address"
            )
        named.append(str(network))
    return named


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


def keep_browser(request: Request, response: Any, email: str) -> None:
    """Let the reader's browser show later that it has been logged in to this account."""
    name = known_browser(request, email) or secrets.token_urlsafe(16)
    signed = _signer(request, f"browser {email}").dumps(name)
    response.set_cookie(_BROWSER, signed, max_age=_BROWSER_SECONDS, **_cookie(request))


def known_browser(request: Request, email: str) -> str:
    """The name of a browser that has been logged in to this account; empty for one that has not."""
    try:
        return str(_signer(request, f"browser {email}").loads(request.cookies.get(_BROWSER, "")))
    except BadSignature:
        return ""


def _cookie(request: Request) -> dict[str, Any]:
    # Readers of an HTTPS address come by it, whatever the way from the proxy to here is; by plain HTTP a browser would
    # drop a cookie marked so, and no form would work.
    secure = "https" in (request.url.scheme, urlsplit(request.app.state.base_url).scheme)
    return {"httponly": True, "samesite": "lax", "secure": secure, "path": "/"}


def csrf_token(request: Request) -> str:
    """What the forms of this reader carry; the first one gives the browser a name to sign."""
    scope = request.scope
    visitor = scope.get("paperworks.visitor") or request.cookies.get(_VISITOR)
    if not visitor or len(visitor) > 64:
        visitor = secrets.token_urlsafe(16)
        scope["paperworks.new_visitor"] = (visitor, _cookie(request))
    scope["paperworks.visitor"] = visitor
    token: str = _signer(request, "csrf").dumps(visitor)
    return token


def _signer(request: Request, salt: str) -> URLSafeSerializer:
    return URLSafeSerializer(request.app.state.secret, salt=salt)


async def check_csrf(request: Request) -> None:
    """Refuse what changes something unless it comes from a form of this page, for this reader.

    The application applies it to every route, so none can forget it.

    Raises:
        HTTPException: 403; 415 for a form of another kind, which names its own charset and brings text in it that is
            none.
    """
    if request.method in _SAFE or request.url.path.startswith(_ONE_CLICK):
        return
    origin = request.headers.get("origin")
    own = {urlsplit(request.app.state.base_url).netloc, request.headers.get("host", "")}
    if origin is not None and urlsplit(origin).netloc not in own:
        raise HTTPException(403, f"this request comes from {origin[:100]}, and only pages from here may send it")
    if request.headers.get("content-type", _FORM).partition(";")[0].strip().lower() != _FORM:
        raise HTTPException(415, f"forms come as {_FORM}; send this one so")
    token = request.headers.get("x-csrf-token")
    if token is None:
        token = str((await request.form()).get("csrf", ""))
    visitor = request.cookies.get(_VISITOR, "")
    try:
        signed = str(_signer(request, "csrf").loads(token))
        good = bool(visitor) and secrets.compare_digest(signed.encode(), visitor.encode())
    except BadSignature:
        good = False
    if not good:
        told = f"load its page anew at {request.app.state.base_url}, with cookies allowed, and send it again"
        raise HTTPException(403, f"the form is out of date: {told}")


class Buckets:
    """How often something may be done: a bucket of tokens for each key, which fills again with time.

    Args:
        most: How many keys are remembered.
        clock: Seconds.

    Example:
        >>> now = [0.0]
        >>> buckets = Buckets(clock=lambda: now[0])
        >>> [buckets.wait("ada", 2) for _ in range(3)]
        [0.0, 0.0, 30.0]
        >>> now[0] = 30.0
        >>> buckets.wait("ada", 2)
        0.0
    """

    def __init__(self, *, most: int = 10_000, clock: Any = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, key: Hashable, a_minute: int) -> float:
        """Take a token; seconds until there will be one where there is none, 0 where it was taken."""
        rate, now = a_minute / 60, self._clock()
        with self._lock:
            tokens, then = self._buckets.pop(key, (float(a_minute), now))
            tokens = min(float(a_minute), tokens + (now - then) * rate)
            self._buckets[key] = (tokens - 1 if tokens >= 1 else tokens, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        return 0.0 if tokens >= 1 else max(1.0, (1 - tokens) / rate)


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
        self._app, self._rates, self._buckets = app, rates, Buckets(most=most, clock=clock)

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
        return 0.0 if kind is None else self._buckets.wait((kind, address_of(scope)), self._rates[kind])


class Guard:
    """Size of what is sent, the host that is asked for, and the headers of every answer.

    Args:
        app: What is protected.
        hosts: Names under which the page may be asked for beside this machine's own; a page elsewhere whose name
            leads to this machine must not read what stands here.
        https: Whether browsers are to come by HTTPS only.
        most_bytes: The largest body.
        seconds: The longest that a body may take to come.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        https: bool,
        most_bytes: int = 64 * 1024,
        seconds: float = 30.0,
    ) -> None:
        self._app, self._hosts, self._most, self._seconds = app, hosts, most_bytes, seconds
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
            try:
                # Who sends a byte now and then would hold a connection for ever.
                async with asyncio.timeout(self._seconds):
                    body = await self._body(receive)
            except TimeoutError:
                slow = refusal(scope, 408, f"what is sent has to come within {self._seconds:.0f} s")
                return await _last(slow)(scope, receive, with_headers)
            if body is None:
                large = refusal(scope, 413, f"at most {self._most} bytes are taken")
                return await _last(large)(scope, receive, with_headers)
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


def _last(answer: Response) -> Response:
    """An answer to a request whose rest is not waited for."""
    answer.headers["Connection"] = "close"
    return answer


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


def beginning(scope: Scope) -> str:
    """The first part of an address, which holds no token."""
    return str(scope["path"]).strip("/").partition("/")[0][:100]


def refusal(scope: Scope, status: int, reason: str) -> PlainTextResponse | JSONResponse:
    """An answer that needs neither store nor template; the log names no address, for addresses hold tokens."""
    _log.info("%s %r: %d", scope["method"], beginning(scope), status)
    if scope.get("paperworks.json") or "application/json" in Headers(scope=scope).get("accept", ""):
        return JSONResponse({"error": reason}, status)
    return PlainTextResponse(f"{reason}\n", status)
