"""The page as an ASGI application.

Example:
    >>> import tempfile
    >>> from fastapi.testclient import TestClient
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     app = create_app(f"sqlite:///{folder}/runs.db", meaning=False)
    ...     client = TestClient(app, base_url="http://127.0.0.1")
    ...     client.get("/papers/hydra.json").json()["paper"]["names"]
    ['Hydra']
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from paperworks import __version__
from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.display import Display
from paperworks.lab.store import Store
from paperworks.page.accounts import Accounts
from paperworks.page.caching import Crowd, Shared
from paperworks.page.concealing import without_paths
from paperworks.page.index import Index
from paperworks.page.mail import keep_sending
from paperworks.page.places import BusyError
from paperworks.page.rendering import STATIC, address_of_page, page_before, respond, wants_json
from paperworks.page.routes import accounts, claims, community, papers, runs
from paperworks.page.runs import Runner
from paperworks.page.safety import (
    Guard,
    Limits,
    beginning,
    check_csrf,
    drop_session,
    is_loopback,
    networks,
    refusal,
    session_token,
)
from paperworks.page.submissions import Submissions
from paperworks.page.subscriptions import Subscriptions
from paperworks.papers import rooms

# Of requests that change something, for each address and minute.
RATES = {"/": 60} | dict.fromkeys(
    ("/login", "/register", "/forgotten", "/password", "/account", "/subscribe", "/submit"), 10
)
# Lists, which hold no forms.
SHARED = ("/", "/new", "/search", "/feed.atom", "/claims", "/rooms", *(f"/rooms/{room}" for room in rooms()))
_SETTINGS = "PAPERWORKS_PAGE"
_log = logging.getLogger(__name__)


def create_app(
    store_url: str | Path | None = None,
    *,
    base_url: str = "http://127.0.0.1:8000",
    allow_runs: bool = False,
    secret: str | None = None,
    workers: int = 1,
    meaning: bool = True,
    rates: dict[str, int] | None = None,
    proxies: str | None = None,
) -> FastAPI:
    """The page over a store.

    Args:
        store_url: Where papers, votes, accounts and runs are kept, as for `paperworks.lab.Store`.
        base_url: Address by which readers reach it; mails and feeds link there.
        allow_runs: Whether runs can be started by readers who are not logged in.
        secret: Signs the forms; servers that share readers share it. PAPERWORKS_SECRET or a new one by default.
        workers: How many runs may take place at once.
        meaning: Whether search goes by meaning too, where an embedder is installed, once its model is
            loaded.
        rates: Requests that change something, for each address and minute, by beginning of their path.
        proxies: Addresses and networks, with commas between them, whose X-Forwarded-For and X-Forwarded-Proto are
            believed; those of PAPERWORKS_PROXIES by default, and nobody's where that is not set.

    Raises:
        UsageError: The store does not answer, or the address or a proxy is not one.
    """
    address = _address(base_url)
    base_url = base_url.rstrip("/")
    trusted = _trusted(proxies)
    store = Store(store_url)
    index = Index(store)
    index.sync_cards()
    runner = Runner(store_url, workers=workers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if meaning:
            threading.Thread(target=_build, args=(app,), name="index", daemon=True).start()
        stop = threading.Event()
        if mail_server := os.environ.get("PAPERWORKS_SMTP"):
            post = threading.Thread(target=keep_sending, args=(store, mail_server, stop), name="mail", daemon=True)
            post.start()
        yield
        stop.set()
        app.state.submissions.close()
        runner.close()
        store.close()

    app = FastAPI(
        title="Paperworks",
        version=__version__,
        description="The trending-papers page on which every paper runs. Each page is JSON too: add `.json` to its "
        "address or ask for `application/json`. What changes something is a form with the token `csrf`.",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(check_csrf)],
    )
    state = app.state
    state.store, state.index, state.runner = store, index, runner
    state.accounts, state.subscriptions = Accounts(store, base_url), Subscriptions(store, base_url)
    state.base_url, state.allow_runs, state.meaning = base_url, allow_runs, False
    state.local = is_loopback(address.hostname)
    state.crowd = Crowd(few=3, at_once=2, most=400)
    state.submissions = Submissions(index)
    state.secret = secret or os.environ.get("PAPERWORKS_SECRET") or secrets.token_urlsafe(32)
    state.htmx = _htmx()
    # What is not a paper's own page before what takes every address below /papers.
    for routes in (claims, runs, papers, community, accounts):
        app.include_router(routes.router)
    if state.htmx:
        app.mount("/static/htmx", StaticFiles(directory=state.htmx.parent), name="htmx")
    app.mount("/static", _Lasting(directory=STATIC), name="static")
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(PaperworksError, _paperworks_error)
    # The last added is the first to see a request.
    app.add_middleware(_Defects)
    app.add_middleware(Shared, paths=SHARED)
    app.add_middleware(_AsJson)
    app.add_middleware(Limits, rates=RATES if rates is None else rates)
    app.add_middleware(Guard, hosts=frozenset({str(address.hostname)}), https=address.scheme == "https")
    if trusted:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=trusted)  # type: ignore[arg-type]
    return app


def _trusted(proxies: str | None) -> list[str]:
    return networks(os.environ.get("PAPERWORKS_PROXIES", "") if proxies is None else proxies)


def _address(base_url: str) -> SplitResult:
    try:
        address = urlsplit(base_url)
        sound = address.scheme in ("http", "https") and address.hostname and (address.port or 1) > 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"the page's address is such as https://papers.example.org, not {base_url!r}")
    if address.path.strip("/") or address.query or address.fragment:
        raise UsageError(
            f"the page lives at the root of its address, such as {address.scheme}://{address.netloc}, not at {base_url!r}"
        )
    return address


def from_environment() -> FastAPI:
    """The application of one of the server's processes, with the settings that `serve` has left for it."""
    if find_spec("torch"):
        import torch

        # A query is too short to share among threads, and the processors are the readers'.
        torch.set_num_threads(1)
    return create_app(**json.loads(os.environ.get(_SETTINGS, "{}")))


def serve(
    *, host: str = "127.0.0.1", port: int = 8000, base_url: str | None = None, processes: int = 1, **settings: Any
) -> None:
    """Serve the page until it is stopped.

    Args:
        host: Address to listen at.
        port: Port to listen at.
        base_url: As for `create_app`; by default where it listens.
        processes: How many server processes share the work.
        settings: As for `create_app`.

    Raises:
        UsageError: It listens beyond this machine without saying by which address readers reach it, or that address or
            a proxy is not one.
    """
    import uvicorn

    if base_url is None:
        if not is_loopback(host):
            raise UsageError(f"listening at {host}, say by which address readers come: --base-url https://…")
        base_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _address(base_url)
    _trusted(settings.get("proxies"))
    os.environ.setdefault("PAPERWORKS_SECRET", secrets.token_urlsafe(32))
    os.environ[_SETTINGS] = json.dumps({**settings, "base_url": base_url})
    # Tables and cards once, before several processes open them.
    with Store(settings.get("store_url")) as store:
        Index(store).sync_cards()
    print(f"the page is at {base_url}", file=sys.stderr)
    uvicorn.run(
        "paperworks.page.app:from_environment",
        factory=True,
        host=host,
        port=port,
        workers=processes,
        log_level="warning",
        # Addresses hold tokens of mails.
        access_log=False,
        server_header=False,
        # The application believes those proxies that the operator names; uvicorn would believe all of this machine.
        proxy_headers=False,
        # Longer than a reader looks at a page.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


def _build(app: FastAPI) -> None:
    index: Index = app.state.index
    try:
        # A server's error stream is a log, also on a terminal.
        with Display(bars=False) as display:
            index.build(partial(display.tell, "embedding papers for the search"))
        # The first search that goes by meaning loads the model, which takes seconds: no reader waits for it.
        index.search("papers that run")
        app.state.meaning = True
    except PaperworksError as error:
        _log.warning("search goes by words only: %s", error)


def _htmx() -> Path | None:
    """The htmx script from the package django-htmx, of which only this file is wanted; None where it is not installed."""
    spec = find_spec("django_htmx")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], "static", "django_htmx", "htmx-2.min.js")
    return path if path.is_file() else None


class _Lasting(StaticFiles):
    """Static files whose addresses change with their content, so browsers may keep them."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


class _AsJson:
    """Takes `.json` off an address and remembers that it was there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path.endswith(".json") and path != "/openapi.json":
            # `/index.json` is the front page, whose address has no name.
            bare = "/" if path in ("/.json", "/index.json") else path.removesuffix(".json")
            scope = {**scope, "path": bare, "raw_path": quote(bare).encode(), "paperworks.json": True}
        await self._app(scope, receive, send)


class _Defects:
    """Turns what no handler knows into an answer, where the headers of every answer are still added."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if started:
                raise
            _log.exception("a defect at /%r", beginning(scope))
            answer = refusal(scope, 500, "what you asked for met a defect of this page; it is in the server's log")
            await answer(scope, receive, send)


_SAYS = {
    401: "Log in first",
    403: "Not allowed",
    404: "Nothing here",
    405: "Not done that way",
    422: "That does not fit",
    429: "Too many at once",
}


def _error(request: Request, status: int, reason: str, headers: Any = None) -> Response:
    data = {"error": reason}
    response = respond(
        request, "error.html", data, status=status, status_code=status, title=_SAYS.get(status, "That did not work")
    )
    response.headers.update(headers or {})
    return response


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 401 and not wants_json(request):
        path = address_of_page(request) if request.method == "GET" else page_before(request, "/")
        # Who was about to vote is not to look for the button again.
        vote = f"&vote={quote(request.path_params.get('key', ''))}" if request.url.path.endswith("/vote") else ""
        response: Response = RedirectResponse(f"/login?next={quote(path)}{vote}", 303)
        if session_token(request):
            drop_session(request, response)
        return response
    return _error(request, error.status_code, str(error.detail), error.headers)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:3])
    return _error(request, 422, told)


def _paperworks_error(request: Request, error: Exception) -> Response:
    if isinstance(error.__cause__, DBAPIError):
        # The sentence names the store, and a page could not be made without it.
        _log.error("%s", error)
        return refusal(request.scope, 503, "the page's store does not answer; try again in a while")
    if isinstance(error, BusyError):
        return _error(request, 429, str(error), {"Retry-After": str(error.retry_after)})
    return _error(request, 400 if isinstance(error, UsageError) else 502, without_paths(str(error)))
