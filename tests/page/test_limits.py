"""What is few is shared out: places at arXiv, places to watch from, connections that send slowly."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.lab.run import Run
from paperworks.page import ingest, safety
from paperworks.page.app import create_app
from paperworks.page.caching import Crowd
from paperworks.page.places import BusyError, Places
from paperworks.page.safety import Guard, Limits, address_of
from paperworks.page.submissions import Submissions
from tests.page.serving import serving, sqlite
from tests.page.test_web import BASE, entry, logged_in, send

JSON = {"Accept": "application/json"}


@pytest.fixture
def app(tmp_path):
    made = create_app(sqlite(tmp_path), meaning=False, base_url=BASE, rates={}, allow_runs=True)
    yield made
    made.state.submissions.close()
    made.state.runner.close()
    made.state.store.close()


class Slow:
    """An arXiv that answers when it is let, and counts who waits for it."""

    def __init__(self) -> None:
        self.let, self.asked = threading.Event(), []

    def submit(self, index, address):
        self.asked.append(address)
        assert self.let.wait(30)
        index.add([entry(address, title="Fetched")])
        return index.get(address)


@pytest.fixture
def arxiv(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(ingest, "submit", slow.submit)
    yield slow
    slow.let.set()


def until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_submits_papers_stalls_neither_the_page_nor_the_others(app, arxiv):
    """More submissions than there are threads that answer readers; each took one for as long as arXiv took."""

    def account(request: Request) -> Any:
        return SimpleNamespace(id=int(request.headers["x-account"]))

    async def unchecked(request: Request) -> None:
        """Leave out the check of the form's token."""

    app.dependency_overrides |= {safety.signed_in: account, safety.check_csrf: unchecked}
    answers: dict[int, httpx.Response] = {}
    with TestClient(app, base_url=BASE) as page:

        def submit(number: int) -> None:
            fields, headers = {"address": f"2611.1{number:04d}"}, JSON | {"x-account": str(number)}
            answers[number] = page.post("/submit", data=fields, headers=headers)

        threads = [threading.Thread(target=submit, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        # One is being fetched, four wait behind, and the others are told to come later.
        until(lambda: len(answers) == 45)
        assert len(arxiv.asked) == 1 and page.get("/papers/hydra").status_code == 200
        for refused in answers.values():
            assert refused.status_code == 429 and refused.headers["retry-after"] == "15"
            assert refused.json()["error"] == "several papers wait for arXiv already; submit this one in a while"
        arxiv.let.set()
        for thread in threads:
            thread.join(30)
        assert sorted(answer.status_code for answer in answers.values()) == [201] * 5 + [429] * 45
        assert len(arxiv.asked) == 5
        # Every place is free again.
        submit(50)
        assert answers[50].status_code == 201


def test_an_account_has_one_submission_at_a_time_and_a_few_a_minute(app, arxiv):
    index = app.state.index
    index.add([entry("2611.00007")])

    async def story():
        submissions = Submissions(index, a_minute=3)
        first = asyncio.create_task(submissions.submit(1, "2611.10001"))
        while not arxiv.asked:
            await asyncio.sleep(0.01)
        with pytest.raises(BusyError, match="the paper you submitted before is still being fetched"):
            await submissions.submit(1, "2611.10002")
        # What is here already is no matter of arXiv's, nor is what is no paper.
        assert (await submissions.submit(1, "2611.00007")).key == "2611.00007"
        with pytest.raises(UsageError, match="give an arXiv number"):
            await submissions.submit(1, "hydra")
        arxiv.let.set()
        assert (await first).title == "Fetched"
        for number in (2, 3):
            await submissions.submit(1, f"2611.1000{number}")
        with pytest.raises(BusyError, match=r"you have submitted 3 papers within a minute; go on in \d+ s") as told:
            await submissions.submit(1, "2611.10004")
        assert 15 <= told.value.retry_after <= 20
        # The others may.
        await submissions.submit(2, "2611.10005")
        submissions.close()

    asyncio.run(story())


def test_a_submission_that_fails_frees_its_place(app, monkeypatch):
    def down(index, address):
        raise ingest.SourceError("arXiv does not answer")

    monkeypatch.setattr(ingest, "submit", down)
    ada = logged_in(TestClient(app, base_url=BASE))
    app.state.submissions = Submissions(app.state.index, waiting=1, a_minute=60)
    assert [send(ada, "/submit", address="2611.00002").status_code for _ in range(4)] == [502] * 4


def test_a_place_is_free_again_however_its_block_ends():
    places = Places(3, each=2, full="full", enough="enough")
    for stop in (RuntimeError, KeyboardInterrupt, asyncio.CancelledError):
        with pytest.raises(stop), places.held("a"), places.held("a"):
            raise stop
    with places.held("a"), places.held("a"), places.held("b"):
        with pytest.raises(BusyError, match="enough"), places.held("a"):
            pass
        with pytest.raises(BusyError, match="full"), places.held("c"):
            pass
        assert places.taken == 3
    assert places.taken == 0 and not places._held


def begun(store, *, over=False):
    run = Run("hydra", recorder=store)
    store.begin(run)
    if over:
        run.status = "finished"
        store.end(run)
    return run


def test_watching_is_bounded_by_address_and_in_all(app):
    run = begun(app.state.store, over=True)
    watching, path = app.state.runner.watching, f"/runs/{run.id}/events"
    one, other = (TestClient(app, base_url=BASE, client=(f"198.51.100.{number}", 1)) for number in (1, 2))
    # Who has watched to the end holds no place.
    assert [one.get(path).status_code for _ in range(20)] == [200] * 20 and watching.taken == 0
    assert one.get("/runs/nothing/events").status_code == 404 and watching.taken == 0
    with ExitStack() as held:
        for _ in range(6):
            held.enter_context(watching.held("198.51.100.1"))
        refused = one.get(path, headers=JSON)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "15"
        assert refused.json()["error"] == "you watch 6 runs at once already; close the page of one"
        assert other.get(path).status_code == 200
        for number in range(194):
            held.enter_context(watching.held(number))
        assert other.get(path, headers=JSON).json()["error"].startswith("many watch runs just now")
        # The page of the run itself is shown all the same.
        assert other.get(f"/runs/{run.id}").status_code == 200
    assert one.get(path).status_code == 200


def test_those_who_leave_while_they_watch_free_their_places(tmp_path):
    """Over real connections, for only there one can leave."""
    url = sqlite(tmp_path)
    with Store(url) as store, serving(url) as server:
        run = begun(store)
        place = urlsplit(server.url)

        def watch() -> tuple[socket.socket, int]:
            watcher = socket.create_connection((place.hostname, place.port), timeout=30)
            watcher.sendall(f"GET /runs/{run.id}/events HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
            return watcher, int(watcher.recv(65536).split()[1])

        def finds_a_place() -> bool:
            watcher, status = watch()
            watcher.close()
            return status == 200

        watchers = [watch() for _ in range(6)]
        assert [status for _, status in watchers] == [200] * 6 and not finds_a_place()
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        for watcher, _ in watchers:
            watcher.close()
        # The server notices with what it sends next.
        until(finds_a_place, 60)


def test_a_household_is_counted_as_one_whatever_address_it_takes():
    passed = []

    async def inner(scope, receive, send):
        passed.append(scope["client"])

    async def ask(address: str) -> int:
        sent = []

        async def keep(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/login", "client": (address, 1), "headers": []}
        await limits(scope, None, keep)
        return sent[0]["status"] if sent else 200

    async def story():
        assert [await ask(f"2001:db8:1:2::{number:x}") for number in range(4)] == [200, 200, 429, 429]
        assert await ask("2001:db8:1:3::1") == 200
        assert [await ask(f"::ffff:198.51.100.{number}") for number in (1, 1, 1, 2)] == [200, 200, 429, 200]

    limits = Limits(inner, rates={"/login": 2})
    asyncio.run(story())
    assert address_of({"client": None}) == address_of({}) == ""
    assert address_of({"client": ("unknown" * 99, 1)}) == ("unknown" * 99)[:64]


def test_a_body_that_comes_too_slowly_is_given_up():
    """One byte now and then would hold a connection, and what is read of it, for ever."""

    async def inner(scope, receive, send):
        raise AssertionError("it never came")

    async def story():
        guard, sent = Guard(inner, hosts=frozenset({"a"}), https=False, seconds=0.05), []

        async def drip():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def keep(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/login", "headers": [(b"host", b"a")]}
        await asyncio.wait_for(guard(scope, drip, keep), 5)
        assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]

    asyncio.run(story())


def test_no_more_searches_wait_than_will_be_served():
    async def story():
        crowd = Crowd(few=1, at_once=1, most=3)

        async def search():
            async with crowd.turn():
                await asyncio.sleep(0.01)

        # Who has been served leaves one place, and no more.
        for _ in range(2):
            told = await asyncio.gather(*(search() for _ in range(5)), return_exceptions=True)
            assert [type(one) for one in told] == [type(None)] * 3 + [BusyError] * 2

    asyncio.run(story())


@pytest.mark.parametrize("path", ["/search", "/search.json", "/feed.atom"])
def test_a_search_that_finds_no_place_is_told_so(app, path):
    client = TestClient(app, base_url=BASE)
    assert client.get(f"{path}?q=draft").status_code == 200
    app.state.crowd = Crowd(few=1, at_once=1, most=0)
    answer = client.get(f"{path}?q=llm")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "5"
