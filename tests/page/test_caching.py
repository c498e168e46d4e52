"""Shared answers are made for nobody: no reader's own page is kept for the others."""

from __future__ import annotations

import asyncio

import pytest
from fastapi.testclient import TestClient

from paperworks.page.app import create_app
from paperworks.page.caching import Shared
from tests.page.serving import sqlite
from tests.page.test_web import BASE, logged_in


@pytest.fixture
def app(tmp_path):
    made = create_app(sqlite(tmp_path), meaning=False, base_url=BASE, rates={})
    yield made
    made.state.runner.close()
    made.state.store.close()


def headers_of(session: str) -> list[list[tuple[str, str]]]:
    """Ways to write a cookie that a parser takes for `session` and a search for "session=" may not."""
    return [
        [("Cookie", f"session ={session}")],
        [("Cookie", f"a=b;  session\t= {session}")],
        [("Cookie", "a=b"), ("Cookie", f"session={session}")],
        [("Cookie", f'session="{session}"')],
    ]


@pytest.mark.parametrize("number", range(4))
def test_no_page_of_one_reader_is_kept_for_the_others(app, number):
    session = logged_in(TestClient(app, base_url=BASE)).cookies["session"]
    for path in ("/", "/new", "/search?q=llm", "/rooms/decoding", "/claims"):
        TestClient(app, base_url=BASE).get(path, headers=headers_of(session)[number])
        stranger = TestClient(app, base_url=BASE).get(path)
        assert stranger.status_code == 200 and "ada@example.org" not in stranger.text, path
        assert "Log out" not in stranger.text and "set-cookie" not in stranger.headers


def test_who_is_signed_in_sees_their_own_page(app):
    ada = logged_in(TestClient(app, base_url=BASE))
    TestClient(app, base_url=BASE).get("/")
    assert "ada@example.org" in ada.get("/").text


def test_headers_that_change_nothing_make_no_answer_anew(app, monkeypatch):
    from paperworks.page.routes import papers

    made = []

    def counted(*given, old=papers.trending):
        made.append(given)
        return old(*given)

    monkeypatch.setattr(papers, "trending", counted)
    client = TestClient(app, base_url=BASE)
    for number in range(5):
        client.get("/", headers={"Accept": f"text/html;q=0.{number}", "Host": f"127.0.0.1:{number + 1}"})
    assert len(made) == 1
    client.get("/", headers={"Accept": "application/json"})
    assert len(made) == 2


class Inner:
    """An application that answers with how often it has been asked, and keeps what came."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.scopes = status, []

    async def __call__(self, scope, receive, send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": str(len(self.scopes)).encode()})


async def ask(shared: Shared, query: str = "", method: str = "GET", **headers: str) -> int:
    sent = []

    async def keep(message) -> None:
        sent.append(message)

    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "query_string": query.encode(), "headers": named}
    await shared(scope, None, keep)
    # What is made behind an old answer is done.
    await asyncio.sleep(0.01)
    return int(sent[1]["body"])


def test_a_shared_answer_is_made_from_all_of_a_request_but_its_cookies():
    inner = Inner()
    asyncio.run(ask(Shared(inner, paths=("/",)), cookie="visitor=ada", accept="text/html", host="papers.example.org"))
    assert inner.scopes[0]["headers"] == [(b"accept", b"text/html"), (b"host", b"papers.example.org")]


def test_so_many_answers_are_kept_and_the_oldest_goes_first():
    now = [0.0]

    async def story():
        shared = Shared(Inner(), paths=("/",), most=2, clock=lambda: now[0])
        assert [await ask(shared, query) for query in "abab"] == [1, 2, 1, 2]
        assert [await ask(shared, query) for query in "cbcab"] == [3, 2, 3, 4, 5]
        # One that is made anew is the newest.
        now[0] = 60.0
        assert [await ask(shared, query) for query in "ac"] == [6, 7]
        assert [await ask(shared, query) for query in "ac"] == [6, 7]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("pause", "told", "then"),
    # Good; old, with a new one made behind it; too old.
    [(5.0, 1, 1), (5.1, 1, 2), (10.0, 1, 2), (10.1, 2, 2)],
)
def test_an_answer_is_good_for_five_seconds_and_for_five_more_while_a_new_one_is_made(pause, told, then):
    now = [0.0]

    async def story():
        shared = Shared(Inner(), paths=("/",), clock=lambda: now[0])
        assert await ask(shared) == 1
        now[0] = pause
        assert [await ask(shared), await ask(shared)] == [told, then]

    asyncio.run(story())


@pytest.mark.parametrize("status", [404, 422, 500])
def test_an_answer_that_is_no_page_is_kept_for_nobody(status):
    async def story():
        shared = Shared(Inner(status), paths=("/",), clock=lambda: 0.0)
        assert [await ask(shared) for _ in range(3)] == [1, 2, 3]

    asyncio.run(story())


def test_what_changes_something_and_what_is_asked_otherwise_is_not_shared():
    async def story():
        shared = Shared(Inner(), paths=("/",), clock=lambda: 0.0)
        told = [await ask(shared, method=method) for method in ("GET", "HEAD", "POST", "POST", "GET", "HEAD")]
        assert told == [1, 2, 3, 4, 1, 2]

    asyncio.run(story())
