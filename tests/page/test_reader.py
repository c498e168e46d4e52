"""A reader's day: find a paper, vote before there is an account, run it, compare, keep a list, and be gone."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from paperworks.lab import Run
from paperworks.lab.recipe import find
from paperworks.page.app import create_app
from paperworks.page.runs import Runner
from paperworks.page.tables import ReadingRow, RunRequestRow, SessionRow, SubscriptionRow, UserRow, VoteRow
from paperworks.page.votes import votes_of
from paperworks.page.work import end
from tests.page.mailserver import MailServer
from tests.page.serving import sqlite
from tests.page.test_account_attacks import ADA, BASE, Mailbox, quick_hashing  # noqa: F401
from tests.page.test_forms import Browser
from tests.page.test_web import entry, mailed

SECRET = "Ada's own secret"
HYDRA = "2402.05109"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page, with a mail server or without one; no run of it takes place."""
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    made = []

    def make(smtp: bool = False, base_url: str = BASE):
        monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
        if smtp:
            monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://127.0.0.1")
        made.append(create_app(sqlite(tmp_path), meaning=False, base_url=base_url, rates={}))
        return made[-1]

    yield make
    for app in made:
        app.state.runner.close()
        app.state.store.close()


@pytest.fixture
def app(make):
    return make()


@pytest.fixture
def ada(app):
    """A browser whose reader has an account, where addresses are taken at their word."""
    browser = Browser(app)
    browser.open("/register")
    browser.send("/register", email=ADA, password=SECRET)
    assert browser.reader == ADA
    return browser


def count(app, table) -> int:
    with app.state.store.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def ran(app, slug="hydra", *, scale="default", seed=0, speed=1.5, series="Hydra", **options) -> Run:
    """A run that is over and has measured something."""
    run = Run(slug, find(slug).plain(options, scale), seed=seed, scale=scale, recorder=app.state.store)
    app.state.store.begin(run)
    run.ratio("speed-up", method=[speed] * 3, baseline=[1.0] * 3, series=series, against="plain decoding")
    run.record("calls", 7, better="lower", series="of the warm-up")
    run.status, run.finished = "finished", datetime.now(UTC)
    app.state.store.end(run)
    return run


def focused(html: str) -> list[str]:
    """The fields that have the focus when the page is loaded."""
    return [
        re.search(r'\bid="([^"]+)"', tag)[1] for tag in re.findall(r"<(?:input|select)\b[^>]*\bautofocus\b[^>]*>", html)
    ]


@pytest.mark.parametrize(
    "said",
    [
        "2402.05109",
        " arXiv:2402.05109v2 ",
        "https://arxiv.org/abs/2402.05109",
        "http://www.arxiv.org/pdf/2402.05109v1.pdf",
    ],
)
def test_a_number_or_address_leads_to_its_paper(app, said):
    client = Browser(app)._client
    answer = client.get("/search", params={"q": said}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/papers/hydra")
    told = client.get("/search.json", params={"q": said}).json()
    assert (told["total"], [one["entry"]["slug"] for one in told["papers"]]) == (1, ["hydra"])
    # A script that asks for the list gets the list.
    listed = client.get("/search", params={"q": said}, headers={"HX-Request": "true"}, follow_redirects=False)
    assert listed.status_code == 200 and "1 paper<" in listed.text


def test_a_number_of_the_old_style_leads_to_its_paper_and_an_unknown_one_to_its_submission(app):
    app.state.index.add([entry("cs/0309136", title="An old paper")])
    client = Browser(app)._client
    for said in ("cs/0309136", "cs/0309136v1", "https://arxiv.org/abs/cs/0309136"):
        answer = client.get("/search", params={"q": said}, follow_redirects=False)
        assert answer.headers["location"] == "/papers/cs/0309136", said
    for told in (client.get("/search?q=9901.99999").text, client.get(f"/search?q={HYDRA}&room=attention").text):
        assert "nothing found" in told and re.search(r'href="/submit\?address=[\d.]+"', told)
    assert client.get("/search.json?q=9901.99999").json()["total"] == 0


def test_what_has_to_do_with_no_paper_finds_nothing(app):
    page = Browser(app).open("/search?q=xyzzy")
    assert "nothing found" in page.html and "No paper has to do with this" in page.html
    assert Browser(app)._client.get("/search.json?q=xyzzy").json()["papers"] == []


def vote_link(page, slug="hydra") -> str:
    return re.search(rf'id="vote-{slug}" href="([^"]+)"', page.html)[1].replace("&amp;", "&")


def test_who_registers_from_a_vote_has_voted_and_is_back(app):
    reader = Browser(app)
    link = vote_link(reader.open("/search?q=hydra"))
    assert "Then your vote for" in reader.open(link).html
    register = re.search(r'href="(/register[^"]+)"', reader.page.html)[1].replace("&amp;", "&")
    reader.open(register)
    # What is refused keeps both.
    assert reader.send("/register", False, email=ADA, password="short").alert
    reader.send("/register", email=ADA, password=SECRET)
    assert reader.page.url == f"{BASE}/search?q=hydra#vote-hydra"
    assert votes_of(app.state.store, [HYDRA]) == {HYDRA: 1}
    button = re.search(r'<button[^>]*id="vote-hydra"[^>]*>', reader.page.html)[0]
    assert 'aria-pressed="true"' in button and re.search(r'aria-label="Take back your vote for [^"]+, 1 vote"', button)
    assert ">ada</a>" in reader.page.html


@pytest.mark.parametrize("way", ["register", "login", "forgotten"])
def test_a_mailed_link_leads_back_and_casts_the_vote_of_which_its_page_tells(make, way):
    app = make(smtp=True)
    with MailServer() as server:
        mailbox, reader = Mailbox(app, server), Browser(app)
        link = vote_link(reader.open("/papers/hydra"))
        reader.open(link.replace("/login", f"/{way}"))
        reader.send(f"/{way}", email=ADA)
        mail = mailbox.text()
        assert HYDRA not in mail and "/papers/hydra" not in mail
        # Another browser: the one that opens mails.
        other = Browser(app)
        opened = other.open(mailbox.link())
        assert "Hydra" in opened.of("main") and count(app, VoteRow) == 0
        other.send(mailbox.link(), **({} if way == "login" else {"password": SECRET}))
    assert (other.page.url, other.reader) == (f"{BASE}/papers/hydra#vote-hydra", ADA)
    assert votes_of(app.state.store, [HYDRA]) == {HYDRA: 1}


@pytest.mark.parametrize("path", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_no_link_leads_away_from_here(make, path):
    app = make(smtp=True)
    with MailServer() as server:
        mailbox, reader = Mailbox(app, server), Browser(app)
        reader._client.get("/register", params={"next": path})
        token = re.search(r'name="csrf" value="([^"]+)"', reader.open("/register").html)[1]
        reader._client.post("/register", data={"csrf": token, "email": ADA, "next": path, "vote": "no-such-paper"})
        reader.open(mailbox.link())
        reader.send(mailbox.link(), password=SECRET)
    assert reader.page.url == f"{BASE}/" and count(app, VoteRow) == 0


def test_who_votes_after_the_session_has_ended_finds_the_way_back(app, ada):
    ada.open("/search?q=hydra")
    app.state.accounts.end_sessions(app.state.accounts.user(ada._client.cookies["session"]))
    ada.send("/papers/hydra/vote")
    assert ada.page.of("h1") == "Log in" and "Then your vote for" in ada.page.html
    ada.send("/login", email=ADA, password=SECRET)
    assert ada.page.url == f"{BASE}/search?q=hydra#vote-hydra" and count(app, VoteRow) == 1


def test_votes_are_counted_in_the_singular_and_the_plural(app, ada):
    label = r'aria-label="Vote for [^"]+, (\d votes?)"'
    assert re.search(label, ada.open("/papers/hydra").html)[1] == "0 votes"
    ada.send("/papers/hydra/vote")
    stranger = Browser(app).open("/papers/hydra").html
    assert re.search(r'aria-label="Log in to vote for [^"]+, (\d votes?)"', stranger)[1] == "1 vote"


@pytest.mark.parametrize(
    ("path", "typed", "field"),
    [
        ("/register", {"email": "a@b", "password": "short"}, "password"),
        ("/register", {"email": "nobody", "password": SECRET}, "email"),
        ("/register", {"email": ADA, "password": SECRET}, "email"),
        ("/login", {"email": ADA, "password": "wrong secret"}, "password"),
        ("/login", {"email": "nobody", "password": ""}, "email"),
        ("/forgotten", {"email": "nobody"}, "email"),
        ("/subscribe", {"email": "nobody"}, "email"),
        ("/subscribe", {"email": ADA, "query": "the of"}, "query"),
        ("/subscribe", {"email": ADA, "query": "llm", "tag": "x" * 250}, "tag"),
    ],
)
def test_after_an_error_the_field_has_the_focus_and_says_what_was_wrong(app, path, typed, field):
    app.state.accounts.register(ADA, SECRET)
    reader = Browser(app)
    assert focused(reader.open(path).html) == []
    form = reader.page.form(path)
    data = {name: one.value for name, one in form.fields.items() if one.value is not None} | typed
    shown = reader._client.post(path, data=data)
    assert shown.status_code == 400 and focused(shown.text) == [field]
    tag = re.search(rf'<input id="{field}"[^>]*>', shown.text)[0]
    assert 'aria-invalid="true"' in tag and re.search(r'aria-describedby="wrong[ "]', tag)
    assert re.search(r'<p class="failed" id="wrong" role="alert">[^<]+', shown.text)


@pytest.mark.parametrize("smtp", [False, True])
def test_the_rules_of_a_password_are_told_before_it_is_chosen(make, smtp):
    assert "at least 8 characters" in Browser(make(smtp)).open("/register").of("main").lower()


def test_a_mail_that_is_not_sent_is_not_said_to_be_on_its_way(make):
    for base_url, told in ((BASE, True), ("https://papers.example.org", False)):
        reader = TestClient(make(base_url=base_url), base_url=base_url)
        token = re.search(r'name="csrf" value="([^"]+)"', reader.get("/subscribe").text)[1]
        shown = reader.post("/subscribe", data={"csrf": token, "email": "bob@example.org"}).text
        assert "The mail is kept, not sent" in shown and "on its way" not in shown
        assert ("<code>paperworks mail</code>" in shown) == told, base_url


def test_an_account_shows_what_is_its_own(app, ada):
    told = ada.open("/account").of("main")
    assert "You have started no run" in ada.page.html and "You have voted for no paper" in ada.page.html, told
    ada.open("/papers/hydra")
    ada.send("/papers/hydra/vote")
    ada.send("/papers/hydra/keep")
    ada.send("/papers/hydra/runs", scale="tiny")
    other = Browser(app)
    other.open("/register")
    other.send("/register", email="bob@example.org", password=SECRET)
    other.open("/papers/chimera")
    other.send("/papers/chimera/vote")
    told = ada._client.get("/account.json").json()
    assert [one["paper"] for one in told["runs"]] == ["hydra"] and [one["slug"] for one in told["votes"]] == ["hydra"]
    assert [one["slug"] for one in told["reading"]] == ["hydra"] and told["email"] == ADA
    page = ada.open("/account").html
    assert f"/runs/{told['runs'][0]['id']}" in page and 'href="/papers/hydra"' in page and "1 paper<" in page


def test_subscriptions_are_shown_and_ended_by_the_owner_of_the_address_alone(make):
    app = make(smtp=True)
    subscriptions = app.state.subscriptions
    subscriptions.subscribe(ADA, query="llm", owned=True)
    subscriptions.subscribe("bob@example.org", query="vision", owned=True)
    mine, others = subscriptions.of(ADA)[0], subscriptions.of("bob@example.org")[0]
    # Whoever took the address at its word has not shown that it is theirs.
    app.state.accounts.confirms = False
    stranger = Browser(app)
    stranger._client.cookies["session"] = app.state.accounts.register(ADA, SECRET)
    assert "once a link" in stranger.open("/account").html
    app.state.accounts.confirms = True
    with MailServer() as server:
        mailbox, owner = Mailbox(app, server), Browser(app)
        owner.open("/login")
        owner.send("/login", email=ADA)
        owner.open(mailbox.link())
        owner.send(mailbox.link())
    told = owner._client.get("/account.json").json()["subscriptions"]
    assert told == [{"id": mine.id, "subject": "papers for “llm”", "frequency": "weekly"}]
    assert mine.farewell not in owner.open("/account").html
    token = owner.page.form("/account/sessions").fields["csrf"].value
    assert owner._client.post(f"/account/subscriptions/{others.id}", data={"csrf": token}).status_code == 404
    owner.send(f"/account/subscriptions/{mine.id}")
    assert owner.at == "/account" and "No digest goes to your address" in owner.page.html
    assert [one.id for one in subscriptions.of("bob@example.org")] == [others.id]


def test_all_sessions_end_at_once(app, ada):
    other = Browser(app)
    other.open("/login")
    other.send("/login", email=ADA, password=SECRET)
    ada.open("/account")
    ada.send("/account/sessions")
    assert ada.at == "/login" and ada.reader is None and count(app, SessionRow) == 0
    assert other.open("/account").of("h1") == "Log in"


def test_an_account_is_deleted_by_its_password_and_what_becomes_of_its_things_is_said(app, ada):
    ada.open("/papers/hydra")
    ada.send("/papers/hydra/vote")
    ada.send("/papers/hydra/keep")
    ada.send("/papers/hydra/runs", scale="tiny")
    page = ada.open("/account")
    assert "Your votes and your reading list go with it" in page.html and "Runs that you started stay" in page.html
    assert "not the password" in ada.send("/account/delete", confirm="a wrong one").alert
    assert focused(ada.page.html) == ["confirm"] and count(app, UserRow) == 1
    assert ada.send("/account/delete", confirm=SECRET).of("h1") == "Your account is deleted"
    assert [count(app, table) for table in (UserRow, SessionRow, VoteRow, ReadingRow)] == [0, 0, 0, 0]
    [run] = app.state.store.runs()
    assert app.state.runner.request(run.id).user_id is None and count(app, RunRequestRow) == 1
    assert ada.open("/account").of("h1") == "Log in"
    assert ada.send("/login", email=ADA, password=SECRET).alert


def test_all_runs_are_listed_with_model_and_figure_and_by_paper(app):
    first, second = ran(app, speed=1.25), ran(app, scale="tiny", speed=9.0)
    other = ran(app, "chimera", series="Chimera")
    client = Browser(app)._client
    told = client.get("/runs.json").json()
    assert [one["id"] for one in told["runs"]] == [other.id, second.id, first.id] and told["total"] == 3
    assert told["runs"][2]["model"] == "smollm2-135m" and told["runs"][2]["headline"]["value"] == 1.25
    html = client.get("/runs").text
    assert html.count('class="chip tiny"') == 1 and "says nothing of the claims" in html
    assert "1.25x" in html and "speed-up against plain decoding" in html and "smollm2-135m" in html
    some = client.get("/runs.json?paper=chimera").json()
    assert [one["id"] for one in some["runs"]] == [other.id] and (some["paper"], some["total"]) == ("chimera", 1)
    assert client.get("/runs.json?paper=nothing").json()["runs"] == []
    answer = client.get("/papers/chimera/runs", follow_redirects=False)
    assert answer.headers["location"] == "/runs?paper=chimera"


def test_the_figures_of_a_run_stand_below_one_another_and_none_is_left_out(app):
    run = ran(app, scale="tiny")
    html = Browser(app).open(f"/runs/{run.id}").html
    shown, rest = re.findall(r'<table class="tall">(.*?)</table>', html, re.DOTALL)
    assert re.findall(r'<th scope="row">([^<]+)', shown) == ["speed-up"] and ">1.5x" in shown and "Hydra" in shown
    assert re.findall(r'<th scope="row">([^<]+)', rest) == ["calls"] and "1 more figure<" in html
    # Name, row and figure come first, whatever the width.
    assert re.findall(r'<th scope="col"[^>]*>([^<]+)', shown)[:3] == ["Figure", "Of", "Measured"]
    assert "says nothing of the claims" in html and 'class="chip tiny"' in html
    assert 'class="chip tiny"' not in Browser(app).open(f"/runs/{ran(app).id}").html
    assert 'class="chip tiny"' in Browser(app).open("/papers/hydra").html


def test_the_status_says_what_a_run_does(app, ada):
    from paperworks.lab.run import Bar, Bars, Environment, Log

    ada.open("/papers/hydra")
    ada.send("/papers/hydra/runs", scale="tiny")
    [run] = app.state.store.runs()

    def status() -> str:
        told = re.search(r'data-status data-run="running">\s*(.*?)\s*</p>', ada.open(f"/runs/{run.id}").html, re.DOTALL)
        return told[1]

    assert status() == "waiting for its process to start"
    app.state.store.add(run.id, Environment({"cpu": "Chip"}))
    assert status() == "running: it loads what it needs"
    app.state.store.add(run.id, Log("training 3 heads", 1.0))
    assert status() == "running: training 3 heads"
    app.state.store.add(run.id, Bars((Bar(0, "steps", 2.0, 5),)))
    assert status() == "running: steps"
    app.state.store.add(run.id, Bars((Bar(0, "waiting for 2 other runs", 0.0, None),)))
    assert status() == "waiting for 2 other runs"
    end(app.state.store, run.id, "interrupted", "cancelled")


def test_two_runs_of_a_recipe_stand_side_by_side_with_what_differs_marked(app):
    older, newer = ran(app, speed=1.25, new_tokens=64), ran(app, seed=3, speed=2.5, new_tokens=128)
    client = Browser(app)._client
    told = client.get("/runs/compare.json", params={"run": [newer.id, older.id]}).json()
    assert [one["id"] for one in told["runs"]] == [older.id, newer.id]
    differing = {row["name"]: row["beside"] for row in told["options"] if row["differs"]}
    assert differing == {"seed": [0, 3], "new_tokens": [64, 128]}
    alike = {row["name"] for row in told["options"]} - set(differing)
    assert {"scale", "model", "machine"} <= alike
    figures = {(row["name"], row["series"]): row["beside"] for row in told["figures"]}
    assert [cell.split()[0] for cell in figures["speed-up against plain decoding", "Hydra"]] == ["1.25x", "2.5x"]
    assert figures["calls", "of the warm-up"] == ["7", "7"]
    html = client.get("/runs/compare", params={"run": [newer.id, older.id]}).text
    assert re.findall(r"<mark>([^<]+)</mark>", html) == ["0", "3", "64", "128"]
    # From a run one comes there by a choice among the others of its recipe.
    form = re.search(
        r'<form class="line" action="/runs/compare".*?</form>', client.get(f"/runs/{newer.id}").text, re.DOTALL
    )
    assert f'value="{newer.id}"' in form[0] and f'<option value="{older.id}"' in form[0]


def test_what_cannot_be_laid_side_by_side_is_said(app):
    one, other = ran(app), ran(app, "chimera", series="Chimera")
    client = Browser(app)._client
    for chosen, status, told in (
        ([one.id], 400, "two runs are laid side by side, not 1"),
        ([one.id, one.id], 400, "not 1"),
        ([one.id, other.id], 400, "these are of hydra and chimera"),
        ([one.id, "nothing"], 404, "no such run"),
        ([one.id, "a\x00b"], 404, "no such run"),
    ):
        answer = client.get("/runs/compare.json", params={"run": chosen})
        assert answer.status_code == status and told in answer.json()["error"], chosen


def test_a_run_is_run_again_with_its_options(app, ada):
    run = ran(app, scale="tiny", seed=7, new_tokens=9)
    again = re.search(r'href="(/papers/hydra\?again=[^"#]+)#run"', ada.open(f"/runs/{run.id}").html)[1]
    fields = ada.open(again).form("/papers/hydra/runs").fields
    assert (fields["scale"].value, fields["seed"].value, fields["parameter.new_tokens"].value) == ("tiny", "7", "9")
    # What the scale gives is left to it.
    typed = {name for name, field in fields.items() if name.startswith("parameter.") and field.value}
    assert typed == {"parameter.new_tokens"} and re.search(r"<details open>\s*<summary>Parameters", ada.page.html)
    ada.send("/papers/hydra/runs")
    assert app.state.store.run(ada.at.rpartition("/")[2]).parameters == run.parameters
    # Nothing of a run of another recipe, nor what the page does not offer.
    elsewhere = ran(app, new_tokens=9999)
    fields = ada.open(f"/papers/hydra?again={elsewhere.id}").form("/papers/hydra/runs").fields
    assert fields["parameter.new_tokens"].value == "" and fields["scale"].value == "default"
    fields = ada.open(f"/papers/chimera?again={run.id}").form("/papers/chimera/runs").fields
    assert fields["seed"].value == "0"


def test_a_reading_list_is_kept_shown_and_recommended_from(app, ada):
    beetles = [
        entry(f"2611.0000{number}", title=f"Speculative beetles part {number}", abstract="") for number in range(1, 5)
    ]
    app.state.index.add(beetles)
    ada.open("/papers/2611.00001")
    ada.send("/papers/2611.00001/keep")
    assert ada.page.url == f"{BASE}/papers/2611.00001#keep" and "Take off the reading list" in ada.page.html
    told = ada._client.get("/reading.json").json()
    assert [line["entry"]["key"] for line in told["papers"]] == ["2611.00001"]
    assert {line["entry"]["key"] for line in told["recommended"][:3]} == {"2611.00002", "2611.00003", "2611.00004"}
    ada.open("/reading")
    ada.send("/papers/2611.00001/unkeep")
    assert ada.at == "/reading" and count(app, ReadingRow) == 0 and "Keep a paper by" in ada.page.html
    assert Browser(app).open("/reading").of("h1") == "Log in"


def test_recommendations_come_by_mail_to_who_has_shown_the_address_to_be_theirs(make):
    app = make(smtp=True)
    with MailServer() as server:
        mailbox, reader = Mailbox(app, server), Browser(app)
        reader.open("/register")
        reader.send("/register", email=ADA)
        reader.open(mailbox.link())
        reader.send(mailbox.link(), password=SECRET)
    reader.open("/reading")
    assert reader.send("/reading/subscribe", frequency="daily").of("h1") == "You are subscribed"
    with app.state.store.reading() as session:
        [row] = session.scalars(select(SubscriptionRow)).all()
    assert (row.email, row.kind, row.frequency, row.confirmed is None) == (ADA, "reading", "daily", False)
    assert "come to ada@example.org, daily" in reader.open("/reading").html
    assert "papers like those of your reading list" in reader.open("/account").html


def test_without_a_mail_server_recommendations_wait_for_their_confirmation(app, ada):
    ada.open("/reading")
    assert ada.send("/reading/subscribe").of("h1") == "The mail is kept, not sent"
    assert "like those of your reading list" in ada.open(mailed(app, "confirm")).html
