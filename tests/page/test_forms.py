"""Forms as a browser sends them: read from the page that is served, with all of their fields and no others."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from paperworks.lab.recipe import find, recipes
from paperworks.page import ingest
from paperworks.page.app import create_app
from paperworks.page.digest import put_digests
from paperworks.page.runs import Runner
from paperworks.page.tables import SubscriptionRow, VoteRow
from paperworks.page.work import end
from tests.page.mailserver import MailServer
from tests.page.serving import sqlite
from tests.page.test_account_attacks import ADA, BASE, Mailbox, quick_hashing  # noqa: F401
from tests.page.test_web import entry

OLD, NEW, NEWEST = "Ada's own secret", "Ada's other secret", "Ada's third secret"


@dataclass
class Field:
    """One field of a form, as it is sent when nobody touches it; None where it is not sent then."""

    value: str | None
    attributes: dict[str, str]
    choices: list[str] | None = None

    def why_not(self, typed: str) -> str:
        """Why a browser would not send this."""
        has = self.attributes
        if self.choices is not None:
            return "" if typed in self.choices else "it is not offered"
        if not typed:
            return "it is required" if "required" in has else ""
        if not int(has.get("minlength", 0)) <= len(typed) <= int(has.get("maxlength", 10**9)):
            return "it is too short or too long"
        if has.get("type") == "number" and not float(has["min"]) <= float(typed) <= float(has["max"]):
            return "it is too small or too large"
        return "it is no address" if has.get("type") == "email" and "@" not in typed else ""


@dataclass
class Form:
    """A form: where it goes, and its fields."""

    method: str
    action: str
    fields: dict[str, Field] = field(default_factory=dict)


class Page(HTMLParser):
    """A page that is open: its forms and its heading."""

    def __init__(self, url: str, html: str) -> None:
        super().__init__()
        self.url, self.html = url, html
        self.forms: list[Form] = []
        self._form: Form | None = None
        self._select: Field | None = None
        self._option: dict[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._form = Form(has.get("method", "get"), urljoin(self.url, has.get("action", "")))
            self.forms.append(self._form)
        elif self._form is None:
            return
        elif tag == "input" and has.get("name"):
            self._input(self._form, has)
        elif tag == "select":
            self._select = self._form.fields[has["name"]] = Field(None, has, [])
        elif tag == "option" and self._select is not None:
            self._option = has
            if "value" in has:
                self._offer(has["value"])

    def _input(self, form: Form, has: dict[str, str]) -> None:
        if has.get("type") != "radio":
            assert has["name"] not in form.fields, f"two fields are named {has['name']}"
            form.fields[has["name"]] = Field(has.get("value", ""), has)
            return
        radio = form.fields.setdefault(has["name"], Field(None, has, []))
        radio.choices.append(has["value"])
        if "checked" in has:
            radio.value = has["value"]

    def handle_data(self, data: str) -> None:
        if self._option is not None and "value" not in self._option:
            self._offer(data.strip())

    def _offer(self, value: str) -> None:
        self._select.choices.append(value)
        # The first is chosen where none says that it is.
        if self._select.value is None or "selected" in self._option:
            self._select.value = value

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._select = None
        elif tag == "option":
            self._option = None

    def form(self, path: str) -> Form:
        """The form that goes to this address."""
        [found] = [form for form in self.forms if urlsplit(form.action).path == path and form.method == "post"]
        return found

    def of(self, tag: str) -> str:
        """The text of the first element of a kind."""
        inside = re.search(rf"<{tag}\b[^>]*>(.*?)</{tag}>", self.html, re.DOTALL)
        return re.sub(r"<[^>]+>", "", inside[1]).strip() if inside else ""

    @property
    def alert(self) -> str:
        """What is said to be wrong."""
        told = re.search(r'role="alert">([^<]+)', self.html)
        return told[1] if told else ""


class Browser:
    """Loads pages, follows where they lead, keeps cookies, and sends forms as they stand, filled in."""

    def __init__(self, app) -> None:
        self._client = TestClient(app, base_url=BASE)
        self.status = 0
        self.page = Page("", "")

    def open(self, path: str) -> Page:
        """Load a page."""
        return self._shown(self._client.get(path))

    def send(self, path: str, checked: bool = True, /, **typed: str) -> Page:
        """Fill in the form of the open page that goes to this address, and send it.

        With `checked` it is filled in with what a browser sends only.
        """
        form = self.page.form(path)
        assert not set(typed) - set(form.fields), f"the form has no such field: {sorted(form.fields)}"
        sent = {name: field.value for name, field in form.fields.items()} | typed
        wrong = {name: why for name, value in sent.items() if (why := form.fields[name].why_not(value or ""))}
        assert bool(wrong) is not checked, wrong
        headers = {"Origin": BASE, "Referer": self.page.url}
        data = {name: value for name, value in sent.items() if value is not None}
        return self._shown(self._client.post(form.action, data=data, headers=headers))

    def _shown(self, answer) -> Page:
        self.status, self.page = answer.status_code, Page(str(answer.url), answer.text)
        return self.page

    @property
    def at(self) -> str:
        """The path of the open page."""
        return urlsplit(self.page.url).path

    @property
    def reader(self) -> str | None:
        """Who is logged in, as the header of every page says."""
        told = re.search(r'title="Logged in as ([^"]+)"', self.page.html)
        return told[1] if told else None


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The page with a mail server; no run of it takes place."""
    monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://127.0.0.1")
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    made = create_app(sqlite(tmp_path), meaning=False, base_url=BASE, rates={})
    yield made
    made.state.runner.close()
    made.state.store.close()


@pytest.fixture
def mailbox(app):
    with MailServer() as server:
        yield Mailbox(app, server)


@pytest.fixture
def ada(app, mailbox):
    """A browser whose reader has registered."""
    browser = Browser(app)
    browser.open("/register")
    assert set(browser.page.form("/register").fields) == {"csrf", "next", "email"}
    assert browser.send("/register", email=ADA).of("h1") == "Look into your mail"
    link = mailbox.link()
    assert browser.open(link).of("h1") == "Choose a password" and browser.reader is None
    assert "8 to 1024 characters" in browser.send(link, False, password="short").alert
    browser.send(link, password=OLD)
    assert (browser.status, browser.at, browser.reader) == (200, "/", ADA)
    return browser


def count(app, table) -> int:
    with app.state.store.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_an_account_from_its_beginning_through_all_its_forms(app, mailbox, ada):
    ada.send("/logout")
    assert (ada.at, ada.reader) == ("/", None)
    # One who is not logged in is led back to where they were going.
    assert ada.open("/submit").of("h1") == "Log in" and ada.at == "/login"
    assert ada.send("/login", email=ADA, password="wrong secret").alert and ada.reader is None
    assert ada.page.form("/login").fields["email"].value == ADA
    ada.send("/login", email=ADA, password=OLD)
    assert (ada.at, ada.reader) == ("/submit", ADA)

    ada.open("/account")
    assert set(ada.page.form("/account").fields) == {"csrf", "old", "password"}
    assert ada.send("/account", old="wrong secret", password=NEW).alert
    assert not ada.send("/account", old=OLD, password=NEW).alert and ada.reader == ADA
    ada.send("/logout")
    ada.open("/login")
    assert ada.send("/login", email=ADA, password=OLD).alert
    assert ada.send("/login", email=ADA, password=NEW) and ada.reader == ADA

    ada.send("/logout")
    ada.open("/forgotten")
    assert ada.send("/forgotten", email=ADA).of("h1") == "Look into your mail"
    link = mailbox.link()
    assert ada.open(link).of("h1") == "Choose a new password"
    ada.send(link, password=NEWEST)
    assert (ada.at, ada.reader) == ("/", ADA)
    ada.send("/logout")
    ada.open("/login")
    assert ada.send("/login", email=ADA, password=NEW).alert
    ada.send("/login", email=ADA, password=NEWEST)
    ada.send("/logout")

    # Without a password, by a link.
    ada.open("/login")
    assert ada.send("/login", email=ADA).of("h1") == "Look into your mail"
    link = mailbox.link()
    assert ada.open(link).of("h1") == "Log in?"
    ada.send(link)
    assert ada.reader == ADA


def test_a_vote_and_its_taking_back(app, ada):
    ada.open("/papers/hydra")
    assert count(app, VoteRow) == 0
    ada.send("/papers/hydra/vote")
    assert (ada.status, ada.at, count(app, VoteRow)) == (200, "/papers/hydra", 1)
    ada.send("/papers/hydra/unvote")
    assert (ada.at, count(app, VoteRow)) == ("/papers/hydra", 0)
    # From a list, back to it.
    ada.open("/search?q=hydra")
    ada.send("/papers/hydra/vote")
    assert (ada.page.url, count(app, VoteRow)) == (f"{BASE}/search?q=hydra#vote-hydra", 1)


def test_a_subscription_of_an_account_and_of_a_stranger(app, mailbox, ada):
    ada.open("/subscribe")
    form = ada.page.form("/subscribe")
    assert {name: field.value for name, field in form.fields.items() if name != "csrf"} == {
        "email": "", "query": "", "tag": "", "frequency": "weekly",
    }  # fmt: skip
    assert "no word to search for" in ada.send("/subscribe", email=ADA, query="the of", frequency="daily").alert
    # What was typed is not lost.
    kept = ada.page.form("/subscribe").fields
    assert (kept["email"].value, kept["query"].value, kept["frequency"].value) == (ADA, "the of", "daily")
    assert ada.send("/subscribe", query="zyzzyva").of("h1") == "You are subscribed"

    bob = Browser(app)
    bob.open("/subscribe?tag=cs.LG")
    assert bob.send("/subscribe", email="bob@example.org").of("h1") == "Look into your mail"
    link = mailbox.link("bob@example.org")
    assert "A weekly digest of papers tagged cs.lg goes to bob@example.org." in bob.open(link).html
    assert bob.send(link).of("h1") == "You are subscribed"

    app.state.index.add([entry(categories=("cs.LG",))])
    assert put_digests(app.state.store, BASE, datetime.now(UTC) + timedelta(days=8)) == 2
    for browser, email, left in ((ada, ADA, 1), (bob, "bob@example.org", 0)):
        farewell = re.search(rf"{BASE}(/unsubscribe/\S+)", mailbox.text(email))[1]
        assert browser.open(farewell).of("h1") == "End the digest?" and count(app, SubscriptionRow) == left + 1
        assert browser.send(farewell).of("h1") == "You are unsubscribed" and count(app, SubscriptionRow) == left


def test_a_paper_is_submitted_after_one_that_is_none(app, ada, monkeypatch):
    def answered(index, address):
        index.add([entry("2611.00002", title="Submitted")])
        return index.get("2611.00002")

    monkeypatch.setattr(ingest, "submit", answered)
    ada.open("/submit")
    assert "give an arXiv number" in ada.send("/submit", address="hydra").alert and ada.status == 400
    assert ada.page.form("/submit").fields["address"].value == "hydra"
    assert ada.send("/submit", address="arXiv:2611.00002v1").of("h1") == "Submitted"
    assert (ada.status, ada.at) == (200, "/papers/2611.00002")


def test_a_run_is_started_after_values_that_are_refused_and_is_stopped(app, ada):
    path = "/papers/hydra/runs"
    refused = {"parameter.new_tokens": "385", "parameter.model": "owner/model", "scale": "paper", "seed": "-1"}
    for name, value in refused.items():
        ada.open("/papers/hydra")
        told = ada.send(path, False, **{name: value})
        assert ada.status == 400 and value in told.alert, name
        # What was typed is not lost, and the field that was refused has the focus.
        field = told.form(path).fields[name]
        assert field.value == value or value not in (field.choices or [value]), name
        assert "autofocus" in field.attributes and field.attributes["aria-describedby"].startswith("wrong")
        assert told.html.count("autofocus") == 1
    ada.open("/papers/hydra")
    ada.send(path, False, **{"parameter.new_tokens": "385", "parameter.epochs": "2", "seed": "5"})
    kept = ada.page.form(path).fields
    assert (kept["parameter.epochs"].value, kept["seed"].value) == ("2", "5")
    assert re.search(r"<details open>\s*<summary>Parameters", ada.page.html)
    assert app.state.store.runs() == []
    ada.open("/papers/hydra")
    ada.send(path, **{"scale": "tiny", "seed": "7", "parameter.new_tokens": "9", "parameter.model": ""})
    [run] = app.state.store.runs()
    assert (ada.status, ada.at) == (200, f"/runs/{run.id}")
    assert (run.scale, run.seed) == ("tiny", 7)
    assert run.parameters == find("hydra").plain({"new_tokens": 9}, "tiny")
    ada.send(f"/runs/{run.id}/cancel")
    assert ada.at == f"/runs/{run.id}" and app.state.runner.request(run.id).cancelled


@pytest.mark.parametrize("slug", recipes())
def test_the_form_of_every_recipe_is_taken_as_it_is_served_and_at_its_bounds(app, ada, slug):
    path = f"/papers/{slug}/runs"

    def started(**typed: str):
        before = {run.id for run in app.state.store.runs()}
        ada.send(path, **typed)
        [run] = [run for run in app.state.store.runs() if run.id not in before]
        assert ada.status == 200 and ada.at == f"/runs/{run.id}"
        end(app.state.store, run.id, "interrupted", "cancelled")
        return run

    ada.open(f"/papers/{slug}")
    assert started().parameters == find(slug).plain({}, "tiny")
    fields = ada.open(f"/papers/{slug}").form(path).fields
    parameters = {name: field for name, field in fields.items() if name.startswith("parameter.")}
    assert set(parameters) == {f"parameter.{name}" for name in find(slug).parameters}
    for bound in ("min", "max"):
        typed = {
            name: field.attributes[bound] if field.choices is None else field.choices[-1]
            for name, field in parameters.items()
        }
        ada.open(f"/papers/{slug}")
        run = started(**typed)
        sent = {name.removeprefix("parameter."): value for name, value in typed.items()}
        assert run.parameters == find(slug).plain(sent, "tiny")
