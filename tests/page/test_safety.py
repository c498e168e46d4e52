"""Every rule of safety of the page."""

from __future__ import annotations

import logging
import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from paperworks.errors import UsageError
from paperworks.page import app as page_app
from paperworks.page.app import create_app, serve
from paperworks.page.routes.accounts import onward
from paperworks.page.safety import Guard, Limits, is_loopback

from .test_web import BASE, KEY, PASSWORD, entry, logged_in, mailed, send, token


@pytest.fixture
def app(tmp_path):
    made = create_app(f"sqlite:///{tmp_path}/runs.db", meaning=False, base_url=BASE, rates={})
    made.state.index.add([entry()])
    yield made
    made.state.runner.close()
    made.state.store.close()


@pytest.fixture
def client(app) -> TestClient:
    return TestClient(app, base_url=BASE)


def posts(app: FastAPI) -> list[str]:
    """Every address that changes something."""
    paths = app.openapi()["paths"]
    found = [path for path, methods in paths.items() if set(methods) - {"get", "head"}]
    return [re.sub(r"{(\w+)}", lambda name: {"key": KEY, "slug": "hydra"}.get(name[1], "x"), path) for path in found]


def test_no_form_is_taken_without_its_token(app, client):
    logged_in(client)
    refused = {path: client.post(path, data={}).status_code for path in posts(app)}
    assert len(refused) > 9
    assert {path for path, status in refused.items() if status != 403} == {"/unsubscribe/x"}


def test_a_token_is_good_for_its_reader_only(app, client):
    ada, eve = logged_in(client), TestClient(app, base_url=BASE)
    stolen = token(eve)
    assert ada.post(f"/papers/{KEY}/vote", data={"csrf": stolen}).status_code == 403
    assert ada.post(f"/papers/{KEY}/vote", data={"csrf": ada.cookies["visitor"]}).status_code == 403
    assert ada.post(f"/papers/{KEY}/vote", data={"csrf": token(ada) + "x"}).status_code == 403
    assert ada.get(f"/papers/{KEY}.json").json()["votes"] == 0
    header = {"X-CSRF-Token": token(ada), "Accept": "application/json"}
    assert ada.post(f"/papers/{KEY}/vote", headers=header).json() == {"key": KEY, "votes": 1}


def test_a_form_from_elsewhere_is_refused_even_with_a_token(client):
    logged_in(client)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
        sent = client.post(f"/papers/{KEY}/vote", data={"csrf": token(client)}, headers={"Origin": origin})
        assert sent.status_code == 403, origin
    own = client.post(f"/papers/{KEY}/vote", data={"csrf": token(client)}, headers={"Origin": BASE})
    assert own.status_code == 200


def test_one_click_unsubscribe_needs_only_the_token_of_the_mail(app, client):
    send(client, "/subscribe", email="ada@example.org", query="decoding")
    send(client, mailed(app, "confirm"))
    with app.state.store.reading() as session:
        from paperworks.page.tables import SubscriptionRow

        farewell = session.query(SubscriptionRow.farewell).scalar()
    mail_program = TestClient(app, base_url=BASE)
    assert mail_program.get(f"/unsubscribe/{farewell}").status_code == 200
    ended = mail_program.post(f"/unsubscribe/{farewell}", data={"List-Unsubscribe": "One-Click"})
    assert ended.status_code == 200 and "unsubscribed" in ended.text
    assert mail_program.post(f"/unsubscribe/{farewell}").status_code == 400


PATHS = ["/", "/search?q=<script>", f"/papers/{KEY}", "/papers/nothing", "/static/style.css", "/healthz", "/index.json"]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_headers(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'" and policy["form-action"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"


def test_no_page_needs_inline_script_or_style(client):
    logged_in(client)
    for path in (
        "/",
        "/search?q=llm",
        "/papers/hydra",
        "/rooms/decoding",
        "/rooms",
        "/subscribe",
        "/submit",
        f"/papers/{KEY}",
    ):
        html = client.get(path).text
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", html), path
        assert all(src.startswith("/static/") for src in re.findall(r'<script[^>]*src="([^"]+)', html))


def test_titles_authors_and_addresses_of_papers_are_escaped_everywhere(app, client):
    bad = '"><img src=x onerror=alert(1)>'
    app.state.index.add(
        [entry("2611.00009", title=f"T {bad}", abstract=bad, authors=(bad,), tags=(bad,), url="javascript:alert(1)")]
    )
    for path in ("/", "/new", "/search?q=alert", "/papers/2611.00009", "/feed.atom"):
        html = client.get(path).text
        assert "<img src=x" not in html and 'href="javascript' not in html, path


def test_cookies_are_out_of_reach_of_scripts_and_of_other_sites(app, tmp_path):
    here = TestClient(app, base_url=BASE)
    answer = send(here, "/register", email="ada@example.org", password=PASSWORD)
    public = create_app(
        f"sqlite:///{tmp_path}/public.db", meaning=False, base_url="https://papers.example.org", rates={}
    )
    there = TestClient(public, base_url="https://papers.example.org")
    outside = send(there, "/register", email="ada@example.org", password=PASSWORD)
    for one, secure in ((answer, False), (outside, True)):
        cookie = one.headers["set-cookie"].lower()
        assert cookie.startswith("session=") and "httponly" in cookie and "samesite=lax" in cookie
        assert ("secure" in cookie) is secure
        assert ("strict-transport-security" in one.headers) is secure
    named = TestClient(public, base_url="https://papers.example.org").get("/login").headers["set-cookie"].lower()
    assert named.startswith("visitor=") and "httponly" in named and "samesite=lax" in named and "secure" in named


def test_a_browser_forgets_its_session_when_it_logs_out_and_when_it_has_ended(app, client):
    logged_in(client)
    assert "session" in client.cookies
    send(client, "/logout")
    assert "session" not in client.cookies
    client.cookies.set("session", "one that has ended", domain="127.0.0.1")
    assert client.get("/submit", follow_redirects=False).headers["location"] == "/login?next=/submit"
    assert "session" not in client.cookies


def test_only_users_start_runs_unless_the_server_allows_all(app, client, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(app.state.runner, "start", lambda *given, **named: started.append(given) or "1-a")
    refused = send(client, "/papers/hydra/runs", scale="tiny")
    assert refused.headers["location"].startswith("/login") and not started
    as_json = client.post("/papers/hydra/runs", data={"csrf": token(client)}, headers={"Accept": "application/json"})
    assert as_json.status_code == 401 and not started
    assert send(logged_in(client), "/papers/hydra/runs", scale="tiny").status_code == 303 and len(started) == 1
    open_app = create_app(f"sqlite:///{tmp_path}/open.db", meaning=False, base_url=BASE, allow_runs=True, rates={})
    monkeypatch.setattr(open_app.state.runner, "start", lambda *given, **named: started.append(given) or "1-b")
    assert send(TestClient(open_app, base_url=BASE), "/papers/hydra/runs").status_code == 303 and len(started) == 2


def test_votes_and_papers_come_from_users_only(app, client):
    for path in (f"/papers/{KEY}/vote", f"/papers/{KEY}/unvote", "/submit"):
        assert send(client, path, address="2611.00002").headers["location"].startswith("/login"), path
    ended = logged_in(client).cookies["session"]
    send(client, "/logout")
    client.cookies.set("session", ended)
    assert send(client, f"/papers/{KEY}/vote").headers["location"].startswith("/login")
    assert client.get(f"/papers/{KEY}.json").json()["votes"] == 0


def test_after_logging_in_one_stays_on_the_site(client):
    logged_in(client)
    for strange in (
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nSet-Cookie: x",
    ):
        assert onward(strange) == "/", strange
    send(client, "/logout")
    answer = send(client, "/login", email="ada@example.org", password=PASSWORD, next="//evil.example")
    assert answer.headers["location"] == "/"


def test_large_bodies_are_refused_whatever_their_header_says(client):
    form = {"csrf": token(client), "email": "a@example.org", "query": "x" * 70_000}
    assert client.post("/subscribe", data=form).status_code == 413

    def parts():
        for _ in range(80):
            yield b"x" * 1000

    chunked = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/subscribe", content=parts(), headers=chunked).status_code == 413


def test_a_name_that_leads_here_from_elsewhere_is_not_answered(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "papers.example.org@evil.example", "[", ""):
        assert client.get("/papers/hydra", headers={"Host": host}).status_code == 421, host
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/healthz", headers={"Host": host}).status_code == 200, host


def test_rates_are_limited_for_each_address(tmp_path):
    rates = {"/": 5, "/login": 2}
    app = create_app(f"sqlite:///{tmp_path}/runs.db", meaning=False, base_url=BASE, rates=rates)
    client = TestClient(app, base_url=BASE, client=("198.51.100.1", 1))
    wrong = [send(client, "/login", email="a@example.org", password="x") for _ in range(4)]
    assert [answer.status_code for answer in wrong] == [400, 400, 429, 429]
    assert int(wrong[-1].headers["retry-after"]) >= 1
    other = TestClient(app, base_url=BASE, client=("198.51.100.2", 1))
    assert send(other, "/login", email="a@example.org", password="x").status_code == 400
    assert client.get("/").status_code == 200


def test_a_bucket_fills_again_and_memory_is_bounded():
    import asyncio

    now, passed = [0.0], []

    async def inner(scope, receive, send):
        passed.append(scope["path"])

    limits = Limits(inner, rates={"/": 60, "/login": 2}, most=3, clock=lambda: now[0])

    async def ask(path, address="a", method="POST"):
        sent = []

        async def keep(message):
            sent.append(message)

        await limits(
            {"type": "http", "method": method, "path": path, "client": (address, 1), "headers": []}, None, keep
        )
        return sent[0]["status"] if sent else 200

    async def story():
        assert [await ask("/login/link/x") for _ in range(3)] == [200, 200, 429]
        assert [await ask("/vote") for _ in range(60)] == [200] * 60 and await ask("/vote") == 429
        assert [await ask("/login", method="GET") for _ in range(5)] == [200] * 5
        now[0] = 31.0
        assert [await ask("/login") for _ in range(2)] == [200, 429]
        for number in range(10):
            await ask("/login", str(number))
        assert len(limits._buckets) <= 3

    asyncio.run(story())


def test_secrets_never_reach_the_logs(app, client, caplog):
    caplog.set_level(logging.DEBUG)
    send(client, "/register", email="ada@example.org", password=PASSWORD)
    session = client.cookies["session"]
    send(client, "/logout")
    send(client, "/login", email="ada@example.org", password="")
    link = mailed(app, "login/link").rsplit("/", 1)[1]
    send(client, f"/login/link/{link}")
    send(client, f"/login/link/{link}")
    client.post("/subscribe", data={"csrf": "x" * 70_000})
    told = "\n".join(
        f"{record.getMessage()} {record.exc_text or ''}"
        for record in caplog.records
        if record.name.startswith("paperworks")
    )
    for secret in (PASSWORD, session, link, app.state.secret, client.cookies["visitor"]):
        assert secret not in told


def test_a_defect_tells_readers_nothing_of_the_inside(app, monkeypatch):
    def broken(*given, **named):
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(app.state.index, "newest", broken)
    client = TestClient(app, base_url=BASE)
    for answer in (client.get("/new"), client.get("/new.json")):
        assert answer.status_code == 500 and "swordfish" not in answer.text and "RuntimeError" not in answer.text
        assert "content-security-policy" in answer.headers
    assert "defect" in client.get("/new.json").json()["error"]


def test_a_store_that_is_away_is_not_named_to_readers(app, client, monkeypatch):
    def away(*given, **named):
        with app.state.store.reading() as session:
            session.execute(text("SELECT * FROM nowhere"))

    monkeypatch.setattr(app.state.index, "newest", away)
    monkeypatch.setattr(app.state.accounts, "user", away)
    client.cookies.set("session", "x")
    for answer in (client.get("/new"), client.get("/new.json")):
        assert answer.status_code == 503 and "sqlite" not in answer.text and "nowhere" not in answer.text


def test_it_listens_to_this_machine_only_unless_told(monkeypatch):
    import uvicorn

    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: told.update(settings))
    monkeypatch.setenv(page_app._SETTINGS, "")
    monkeypatch.setenv("PAPERWORKS_SECRET", "s")
    serve()
    assert told["host"] == "127.0.0.1" and told["access_log"] is False
    with pytest.raises(UsageError, match="--base-url"):
        serve(host="0.0.0.0")
    assert is_loopback("::1") and is_loopback("127.8.8.8") and not is_loopback("0.0.0.0") and not is_loopback("")


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="such as https"):
        create_app(f"sqlite:///{tmp_path}/runs.db", base_url="papers.example.org")


def test_headers_do_not_replace_what_a_route_says():
    import asyncio

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"referrer-policy", b"no-referrer")]})

    guard, sent = Guard(inner, hosts=frozenset({"a"}), https=False), []

    async def keep(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"a")]}, None, keep))
    assert [value for name, value in sent[0]["headers"] if name == b"referrer-policy"] == [b"no-referrer"]
