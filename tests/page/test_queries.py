"""Whatever a query calls its parameters, they reach no function's own, and no page is a defect."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from paperworks.lab.run import Run
from paperworks.page.app import create_app
from tests.page.serving import sqlite
from tests.page.test_web import BASE, KEY, entry, logged_in

# No page has a parameter of these names, so all may come at once.
NAMES = (
    "path", "self", "request", "context", "args", "kwargs", "name", "values", "template", "data", "json", "here", "user", "csrf",
    "url", "key", "slug", "reader", "run", "run_id", "token", "class", "__class__", "import", "0", "a b", "a-b", "é", "%00", "%ff",
    "[]", "{{7*7}}", "<b>", "parameter.model", "",
)  # fmt: skip
# Some page has a parameter of these, and may refuse the value.
OWN = ("q", "page", "room", "status", "tag", "year", "runs_here", "period", "next", "query", "verdict")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    made = create_app(
        sqlite(tmp_path_factory.mktemp("queries")), meaning=False, base_url=BASE, rates={}, allow_runs=True
    )
    made.state.index.add([entry()])
    run = Run("hydra", id="1-a", recorder=made.state.store)
    made.state.store.begin(run)
    run.status = "finished"
    made.state.store.end(run)
    yield made
    made.state.runner.close()
    made.state.store.close()


@pytest.fixture(scope="module")
def clients(app):
    """A reader who is signed in and one who is not: their pages differ."""
    return [TestClient(app, base_url=BASE), logged_in(TestClient(app, base_url=BASE))]


def pages(app):
    """Every address that shows something, twice: as HTML and as JSON."""
    filled = {"key": KEY, "slug": "hydra", "room": "decoding", "run_id": "1-a", "name": "figure", "token": "x"}
    paths = [path for path, methods in app.openapi()["paths"].items() if "get" in methods]
    plain = [re.sub(r"{(\w+)}", lambda part: filled[part[1]], path) for path in paths]
    return [*plain, *(f"{path}.json" for path in plain if path != "/"), "/index.json"]


def test_no_page_is_a_defect_whatever_its_parameters_are_called(app, clients):
    asked = pages(app)
    assert len(asked) > 40
    every = "&".join(f"{name if '%' in name else quote(name)}=1" for name in NAMES)
    for path in asked:
        for client in clients:
            answer = client.get(f"{path}?{every}", follow_redirects=False)
            assert answer.status_code < 500, path
        for name in OWN:
            assert clients[0].get(f"{path}?{name}=1", follow_redirects=False).status_code < 500, (path, name)


QUERIES = (
    "path=1&path=2&path=3", "path", "=1", "&&&", "path=1;self=2", "%70ath=1", "q=&q=a&q=", "page=1&page=",
    f"room=&status=&year=&tag=&runs_here=&{'self=1&' * 900}", "x" * 8000 + "=1",
)  # fmt: skip


def test_repeated_and_empty_parameters_are_no_defect(app, clients):
    for path in (
        "/",
        "/search",
        "/new",
        "/papers/hydra",
        "/login",
        "/subscribe",
        "/runs/1-a",
        "/feed.atom",
        "/search.json",
    ):
        for query in QUERIES:
            assert clients[0].get(f"{path}?{query}", follow_redirects=False).status_code < 500, (path, query)


def test_a_page_is_shown_and_links_back_to_itself_with_its_parameters(clients):
    stranger, ada = clients
    for path in (
        "/",
        "/new",
        "/search",
        "/rooms",
        "/rooms/decoding",
        "/claims",
        "/papers/hydra",
        "/subscribe",
        "/runs/1-a",
    ):
        query = "path=1&self=2&request=3&path=4"
        assert ada.get(f"{path}?{query}").status_code == 200, path
        shown = stranger.get(f"{path}?{query}")
        assert shown.status_code == 200 and f"/login?next={quote(f'{path}?{query}', safe='')}" in shown.text, path
