"""The pages, as HTML and as JSON, over SQLite and PostgreSQL."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
from fastapi.testclient import TestClient
from markupsafe import escape
from sqlalchemy import select

from paperworks.lab import records
from paperworks.lab.run import Run
from paperworks.lab.verdicts import KINDS, in_words, tally, verdicts
from paperworks.page import ingest
from paperworks.page.app import create_app
from paperworks.page.caching import Crowd, Shared
from paperworks.page.entries import Entry
from paperworks.page.tables import MailRow
from paperworks.papers import ROOMS, get, load_cards

BASE = "http://127.0.0.1:8000"
PASSWORD = "a long secret"
KEY = "2611.00001"


def entry(key: str = KEY, **values) -> Entry:
    values = {"title": r"Bounds in $\ell_1$ <b>now</b>", "abstract": "About <i>zyzzyva</i> beetles.", **values}
    return Entry(key=key, version=1, published=datetime.now(UTC) - timedelta(days=1), source="arxiv", **values)


@pytest.fixture
def app(store_url):
    made = create_app(store_url, meaning=False, base_url=BASE, rates={})
    made.state.index.add([entry(authors=("Ada Lovelace",), categories=("cs.LG",))])
    yield made
    made.state.runner.close()
    made.state.store.close()


@pytest.fixture
def client(app) -> TestClient:
    return TestClient(app, base_url=BASE)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A reader of pages that a test leaves as they are."""
    made = create_app(f"sqlite:///{tmp_path_factory.mktemp('pages')}/runs.db", meaning=False, base_url=BASE, rates={})
    made.state.index.add([entry(authors=("Ada Lovelace",), categories=("cs.LG",))])
    yield TestClient(made, base_url=BASE)
    made.state.runner.close()
    made.state.store.close()


def token(client: TestClient, path: str = "/subscribe") -> str:
    return re.search(r'name="csrf" value="([^"]+)"', client.get(path).text)[1]


def send(client: TestClient, path: str, **fields):
    return client.post(path, data={"csrf": token(client), **fields}, follow_redirects=False)


def logged_in(client: TestClient, email: str = "ada@example.org") -> TestClient:
    answer = send(client, "/register", email=email, password=PASSWORD)
    assert answer.status_code == 303, answer.text
    return client


def mailed(app, kind: str) -> str:
    with app.state.store.reading() as session:
        text = session.scalars(select(MailRow.text).order_by(MailRow.id.desc())).first()
    return re.search(rf"{BASE}(/{kind}/[\w-]+)", text)[1]


PAGES = [
    "/",
    "/new",
    "/search?q=decoding",
    "/rooms",
    "/claims",
    "/rooms/decoding",
    "/papers/hydra",
    f"/papers/{KEY}",
    "/subscribe",
]


@pytest.mark.parametrize("path", [*PAGES, "/login", "/register"])
def test_every_page_is_html_and_json(pages, path):
    html = pages.get(path)
    assert html.status_code == 200 and html.headers["content-type"].startswith("text/html")
    assert html.text.count("<h1") == 1 and '<html lang="en">' in html.text
    bare, _, query = path.partition("?")
    by_address = pages.get(f"{'/index' if bare == '/' else bare}.json{'?' + query if query else ''}")
    by_header = pages.get(path, headers={"Accept": "application/json"})
    assert by_address.status_code == by_header.status_code == 200
    # The score of a trending paper falls with the time.
    one, two = (re.sub(r'"score":[\d.e-]+', "", answer.text) for answer in (by_address, by_header))
    assert one == two and isinstance(by_address.json(), dict)


def test_every_link_on_the_pages_leads_somewhere(pages):
    seen: set[str] = set()
    for path in [*PAGES, "/login", "/register"]:
        seen |= set(re.findall(r'(?:href|src|action)="(/[^"#]*)', pages.get(path).text))
    posts = {path for path in seen if path in ("/logout",) or path.endswith(("/runs", "/vote", "/unvote"))}
    assert len(seen) > 100
    for path in sorted(seen - posts):
        answer = pages.get(path.replace("&amp;", "&"), follow_redirects=False)
        assert answer.status_code in (200, 303), (path, answer.status_code)


def test_the_paper_page_shows_claims_beside_measured_figures_with_interval_and_machine(pages):
    html = pages.get("/papers/hydra").text
    record = records.load_records()["hydra"]
    assert records.machine(record["environment"]) in html
    for found in verdicts(get("hydra")):
        assert f">{found.kind}</span>" in html and str(escape(found.ours)) in html
        assert str(escape(found.claim.differs)) in html
    for claim in get("hydra").claims:
        assert records.figure(claim.value).replace(">", "&gt;") in html
    assert "from paperworks.decoding import Hydra" in html and "paperworks run hydra" in html
    assert str(escape(get("hydra").shortfall)) in html
    assert "/figures/hydra.png" in html and pages.get("/figures/hydra.png").headers["content-type"] == "image/png"
    assert "@misc{" in html and 'action="/papers/hydra/runs"' in html
    shown = pages.get("/papers/hydra.json").json()
    assert [one["verdict"] for one in shown["verdicts"]] == [found.kind for found in verdicts(get("hydra"))]
    assert shown["record"]["measurements"] and shown["paper"]["claims"] and len(shown["similar"]) > 2


def test_claims_are_listed_with_their_verdicts_and_filtered(pages):
    everything = pages.get("/claims.json").json()
    assert sum(everything["counts"].values()) == len(everything["claims"]) > 50
    for kind in KINDS:
        some = pages.get("/claims.json", params={"verdict": kind, "room": "decoding"}).json()
        assert all(one["verdict"] == kind for one in some["claims"])
        html = pages.get("/claims", params={"verdict": kind, "room": "decoding"}).text
        assert html.count('<span class="verdict') == len(some["claims"])
    hydra = [one for one in everything["claims"] if one["paper"] == "hydra"]
    assert tally(verdicts(get("hydra"))) == {
        kind: sum(one["verdict"] == kind for one in hydra)
        for kind in KINDS
        if any(one["verdict"] == kind for one in hydra)
    }
    assert pages.get("/claims?verdict=wonderful").status_code == 422
    assert pages.get("/claims?room=&verdict=").text.count('<span class="verdict') == len(everything["claims"])


def test_the_badge_tells_how_many_claims_hold(pages):
    answer = pages.get("/papers/hydra/badge.svg")
    assert answer.headers["content-type"].startswith("image/svg+xml") and "max-age" in answer.headers["cache-control"]
    image = ElementTree.fromstring(answer.text)
    told = in_words(verdicts(get("hydra")))
    assert image.get("aria-label") == f"Paperworks: {told}"
    assert [text.text for text in image.iter("{http://www.w3.org/2000/svg}text")] == ["Paperworks", told]
    again = pages.get("/papers/hydra/badge.svg", headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert pages.get("/papers/tsdiff/badge.svg").status_code == pages.get("/papers/none/badge.svg").status_code == 404
    assert "/papers/hydra/badge.svg)" in pages.get("/papers/hydra").text


def test_a_paper_without_a_card_shows_its_abstract_escaped(pages):
    html = pages.get(f"/papers/{KEY}").text
    assert "About &lt;i&gt;zyzzyva&lt;/i&gt; beetles." in html and "<msub><mi>ℓ</mi>" in html
    assert "&lt;b&gt;now&lt;/b&gt;" in html and "<b>now" not in html
    assert "does not run here" not in html and "Run it" not in html


def test_a_paper_is_found_by_slug_and_arxiv_number_and_version(client):
    names = {
        client.get(f"/papers/{key}.json").json()["entry"]["slug"] for key in ("hydra", "2402.05109", "2402.05109v2")
    }
    assert names == {"hydra"}
    for missing in (
        "/papers/nothing",
        "/papers/9901.99999",
        "/rooms/cellar",
        "/figures/hydra2.png",
        "/x",
        "/papers/a%00b",
    ):
        assert client.get(missing).status_code == 404, missing
    assert client.get("/papers/nothing.json").json()["error"].startswith("there is no such paper")


def test_search_finds_filters_and_marks(client):
    first = client.get("/search.json", params={"q": "make my llm faster"}).json()["papers"][0]["entry"]
    assert first["room"] == "decoding"
    html = client.get("/search", params={"q": "zyzzyva"}).text
    assert "&lt;i&gt;<mark>zyzzyva</mark>&lt;/i&gt;" in html and "1 paper<" in html
    found = client.get("/search.json", params={"room": "decoding", "runs_here": "true", "year": ""}).json()
    assert found["total"] == sum(p.room == "decoding" and records.status(p) != "planned" for p in load_cards().values())
    assert client.get("/search.json", params={"tag": "cs.LG"}).json()["total"] == 1
    assert client.get("/search", params={"q": '"><script>alert(1)</script>'}).text.count("<script>") == 0


def test_bad_searches_are_refused_in_words(client):
    for wrong in ("room=cellar", "year=twelve", "year=99999999999999999999", "page=0", "status=done", f"q={'x' * 400}"):
        answer = client.get(f"/search.json?{wrong}")
        assert answer.status_code == 422 and answer.json()["error"].startswith(wrong.split("=")[0]), wrong
    assert client.get("/search", params={"q": "\x00 OR ' \" * NEAR("}).status_code == 200


def test_lists_have_pages_that_do_not_overlap(client):
    pages = [
        [line["entry"]["key"] for line in client.get(f"{path}page={page}").json()["papers"]]
        for path in ("/new.json?", "/index.json?period=month&", "/search.json?q=&")
        for page in (1, 2)
    ]
    for first, second in zip(pages[::2], pages[1::2], strict=True):
        assert len(first) == len(second) == 20 and not set(first) & set(second)
    assert 'rel="next"' in client.get("/new").text and 'rel="prev"' in client.get("/new?page=2").text


def test_votes_count_once_move_the_list_and_can_be_taken_back(app, client):
    ada, bob = logged_in(client), logged_in(TestClient(app, base_url=BASE), "bob@example.org")
    assert [send(ada, f"/papers/{KEY}/vote").status_code for _ in range(2)] == [303, 303]
    send(bob, f"/papers/{KEY}/vote")
    # By its other name a card's paper is the same one.
    send(ada, "/papers/hydra/vote")
    assert send(ada, "/papers/2402.05109/vote").headers["location"] == "/papers/hydra#vote-hydra"
    trending = ada.get("/index.json").json()["papers"]
    assert trending[0]["entry"]["key"] == KEY and trending[0]["votes"] == 2 and trending[0]["voted"]
    assert ada.get("/papers/hydra.json").json()["votes"] == 1
    assert 'aria-pressed="true"' in ada.get(f"/papers/{KEY}").text
    send(ada, f"/papers/{KEY}/unvote")
    assert ada.get(f"/papers/{KEY}.json").json()["votes"] == 1
    assert send(ada, "/papers/nothing/vote").status_code == 404


def test_a_vote_leads_back_to_the_list_it_came_from(app, client):
    logged_in(client)
    fields = {"csrf": token(client)}
    back = client.post(
        f"/papers/{KEY}/vote", data=fields, headers={"Referer": f"{BASE}/search?q=a"}, follow_redirects=False
    )
    assert back.headers["location"] == "/search?q=a#vote-2611-00001"
    for strange in ("https://evil.example/x", f"{BASE}//evil.example"):
        sent = client.post(f"/papers/{KEY}/vote", data=fields, headers={"Referer": strange}, follow_redirects=False)
        assert sent.headers["location"] == f"/papers/{KEY}#vote-2611-00001", strange


def test_register_log_in_and_out(client):
    logged_in(client)
    assert "Log out" in client.get("/").text and client.get("/login", follow_redirects=False).status_code == 303
    assert send(client, "/logout").headers["location"] == "/"
    assert "Log in" in client.get("/").text
    wrong = send(client, "/login", email="ada@example.org", password="wrong")
    unknown = send(client, "/login", email="eve@example.org", password="wrong")
    assert wrong.status_code == unknown.status_code == 400
    told = [re.search(r'role="alert">([^<]+)', page.text)[1] for page in (wrong, unknown)]
    assert told[0] == told[1]
    again = send(client, "/login", email="ada@example.org", password=PASSWORD, next="/papers/hydra")
    assert again.headers["location"] == "/papers/hydra"


def test_log_in_by_a_link_which_looking_at_does_not_use_up(app, client):
    asked = send(client, "/login", email="new@example.org", password="")
    assert asked.status_code == 200 and "kept, not sent" in asked.text and "paperworks mail" in asked.text
    link = mailed(app, "login/link")
    assert [client.get(link).status_code for _ in range(2)] == [200, 200]
    assert "Log in" in client.get("/").text
    assert send(client, link).status_code == 303 and "Log out" in client.get("/").text
    assert send(client, link).status_code == 400


def test_subscribe_confirm_and_unsubscribe(app, client):
    answer = send(client, "/subscribe", email="ada@example.org", query="decoding", frequency="daily")
    assert "kept, not sent" in answer.text and "is on its way" not in answer.text
    link = mailed(app, "confirm")
    assert "Confirm</button>" in client.get(link).text
    assert "You are subscribed" in send(client, link).text
    assert send(client, "/confirm/none").status_code == 400
    for wrong in ({"email": "nobody"}, {"email": "a@example.org", "query": "the of"}):
        refused = send(client, "/subscribe", **wrong)
        assert refused.status_code == 400 and 'role="alert"' in refused.text and wrong["email"] in refused.text


def test_a_paper_is_submitted_by_its_number(app, client, monkeypatch):
    def answered(index, address):
        assert address == "2611.00002"
        index.add([entry("2611.00002", title="Submitted")])
        return index.get("2611.00002")

    monkeypatch.setattr(ingest, "submit", answered)
    assert client.get("/submit", follow_redirects=False).headers["location"] == "/login?next=/submit"
    logged_in(client)
    assert send(client, "/submit", address="2611.00002").headers["location"] == "/papers/2611.00002"
    assert client.get("/papers/2611.00002").status_code == 200


def test_what_is_no_paper_is_not_submitted(client, monkeypatch):
    logged_in(client)
    refused = send(client, "/submit", address="https://evil.example/2611.00002")
    assert refused.status_code == 400 and "arXiv number" in refused.text

    def down(index, address):
        raise ingest.SourceError("arXiv does not answer")

    monkeypatch.setattr(ingest, "submit", down)
    assert send(client, "/submit", address="2611.00002").status_code == 502


def test_the_feed_of_a_search_is_atom(pages):
    answer = pages.get("/feed.atom", params={"q": "zyzzyva"})
    assert answer.headers["content-type"].startswith("application/atom+xml")
    feed = ElementTree.fromstring(answer.content)
    atom = {"a": "http://www.w3.org/2005/Atom"}
    [one] = feed.findall("a:entry", atom)
    assert f"{BASE}/papers/{KEY}" in {link.get("href") for link in one.findall("a:link", atom)}
    assert ElementTree.fromstring(pages.get("/feed.atom?q=nothingatall").content).findall("a:entry", atom) == []


def test_citations_come_as_bibtex(pages):
    answer = pages.get("/papers/hydra.bib")
    assert answer.text.startswith("@misc{") and answer.headers["content-type"].startswith("application/x-bibtex")


def test_the_leaderboard_ranks_records_and_runs(app, client, monkeypatch):
    slug = "chimera"
    others = {paper: record for paper, record in records.load_records().items() if paper != slug}
    of = {paper: records.records_of(paper) for paper in others}
    monkeypatch.setattr(records, "load_records", lambda folder=None: others)
    monkeypatch.setattr(records, "records_of", lambda paper, folder=None: of.get(paper, []))
    run = Run(slug, recorder=app.state.store)
    app.state.store.begin(run)
    run.ratio("speed-up", method=[99.0, 99.0], baseline=[1.0, 1.0], series="Chimera", against="plain decoding")
    run.status, run.finished = "finished", datetime.now(UTC)
    app.state.store.end(run)
    shown = client.get("/rooms/decoding.json").json()
    leaders = [leader for leader in shown["leaders"] if leader["verdict"]]
    assert leaders[0]["paper"]["slug"] == slug and leaders[0]["run_id"] == run.id
    assert leaders[0]["verdict"]["kind"] == "reproduced"
    figures = [leader["verdict"]["measurement"] for leader in leaders]
    gains = [figure["value"] for figure in figures if figure["name"] == "speed-up"]
    assert len(gains) > 1 and gains == sorted(gains, reverse=True)
    assert f"/runs/{run.id}" in client.get("/rooms/decoding").text
    assert set(ROOMS) == {count["room"] for count in client.get("/rooms.json").json()["counts"]}


def test_pages_work_without_htmx(tmp_path, monkeypatch):
    from paperworks.page import app as module

    monkeypatch.setattr(module, "_htmx", lambda: None)
    app = create_app(f"sqlite:///{tmp_path}/web.db", meaning=False, base_url=BASE, rates={})
    client = TestClient(app, base_url=BASE)
    page = logged_in(client).get("/search?q=llm").text
    assert "hx-" not in page and "<script" not in page and 'method="post"' in page


def test_the_server_tells_whether_it_is_well(pages):
    assert pages.get("/healthz").json() == {"status": "ok", "runs": 0}


def test_openapi_names_every_route(pages):
    paths = pages.get("/openapi.json").json()["paths"]
    assert {"/", "/search", "/new", "/rooms/{room}", "/login", "/subscribe", "/feed.atom", "/healthz"} <= set(paths)


def test_readers_share_an_answer_for_some_seconds():
    import asyncio

    made, now = [], [0.0]

    async def slow(scope, receive, send):
        made.append(scope["path"])
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": str(len(made)).encode()})

    shared = Shared(slow, paths=("/",), seconds=5, clock=lambda: now[0])

    async def ask(path="/", cookie="", accept="text/html") -> str:
        sent = []

        async def keep(message):
            sent.append(message)

        headers = [(b"cookie", cookie.encode()), (b"accept", accept.encode())]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
        await shared(scope, None, keep)
        return sent[1]["body"].decode()

    async def story():
        crowd = await asyncio.gather(*(ask() for _ in range(20)))
        assert set(crowd) == {"1"} and len(made) == 1
        assert await ask(accept="application/json") == "2"
        # Who is logged in sees their own page, and pages with forms are made for each reader.
        assert await ask(cookie="session=x") == "3" and await ask(cookie="session=x") == "4"
        assert await ask("/papers/hydra") == "5" and await ask("/papers/hydra") == "6"
        # For a while the old answer is given at once, and a new one is made behind it.
        now[0] = 6.0
        assert await ask() == "1"
        await asyncio.sleep(0.05)
        assert await ask() == "7"
        now[0] = 60.0
        assert await ask() == "8"

    asyncio.run(story())


def test_a_crowd_takes_turns_and_is_told_that_it_is_one():
    import asyncio

    crowd, working, most, told = Crowd(few=3, at_once=2), 0, 0, []

    async def searcher(fails: bool = False) -> None:
        nonlocal working, most
        async with crowd.turn() as few:
            working += 1
            most = max(most, working)
            told.append(few)
            await asyncio.sleep(0.001)
            working -= 1
            if fails:
                raise RuntimeError("the search failed")

    async def story():
        await asyncio.gather(*(searcher() for _ in range(10)))
        assert most == 2 and told == [True] * 3 + [False] * 7
        # Who fails or gives up waiting leaves his place to the others.
        gone = [asyncio.create_task(searcher(fails)) for fails in (True, True, False, False, False)]
        await asyncio.sleep(0)
        gone[-1].cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        told.clear()
        await asyncio.gather(*(searcher() for _ in range(3)))
        assert told == [True] * 3 and most == 2

    asyncio.run(story())


def test_two_servers_share_a_store(store_url):
    one, two = (create_app(store_url, meaning=False, base_url=BASE, secret="shared", rates={}) for _ in range(2))
    ada = logged_in(TestClient(one, base_url=BASE))
    other = TestClient(two, base_url=BASE, cookies=ada.cookies)
    answer = other.post("/papers/hydra/vote", data={"csrf": token(ada)}, follow_redirects=False)
    assert answer.status_code == 303 and ada.get("/papers/hydra.json").json()["votes"] == 1
