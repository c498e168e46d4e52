"""Subscriptions: nothing is sent before the address has confirmed, and one click ends it."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sqlalchemy import select

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import subscriptions as module
from paperworks.page.subscriptions import CONFIRMATION_SECONDS, Subscriptions
from paperworks.page.tables import MailRow, SubscriptionRow

ADA = "ada@example.org"


@pytest.fixture
def store(store_url):
    with Store(store_url) as opened:
        yield opened


@pytest.fixture
def subscriptions(store):
    return Subscriptions(store, "https://papers.example.org/")


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def rows(store: Store) -> list[SubscriptionRow]:
    with store.reading() as session:
        return list(session.scalars(select(SubscriptionRow).order_by(SubscriptionRow.id)))


def tokens(store: Store) -> list[str]:
    with store.reading() as session:
        texts = session.scalars(select(MailRow.text).order_by(MailRow.id)).all()
    return [re.search(r"https://papers\.example\.org/confirm/(\S+)", text)[1] for text in texts]


def test_a_subscription_begins_when_its_address_confirms_it(store, subscriptions, clock):
    subscriptions.subscribe("Ada@Example.org", query="  faster \n llm ", tag="CS.LG", frequency="daily")
    [row] = rows(store)
    assert row.confirmed is None and row.email == ADA
    clock.now += 100
    begun = subscriptions.confirm(tokens(store)[0])
    assert (begun.email, begun.query, begun.tag, begun.frequency) == (ADA, "faster llm", "cs.lg", "daily")
    assert begun.digested == begun.told_until == clock.now == rows(store)[0].confirmed
    assert begun.subject == "papers for “faster llm” tagged cs.lg"


def test_the_mail_asks_and_only_a_hash_of_its_token_is_kept(store, subscriptions):
    assert subscriptions.subscribe(ADA, query="<b>diffusion", tag="language") is None
    with store.reading() as session:
        [mail] = session.scalars(select(MailRow))
    assert mail.recipient == ADA and "weekly digest of papers at this address" in mail.text
    # What it is for a stranger may have written: the page that the link leads to shows it.
    for typed in ("diffusion", "language"):
        assert typed not in f"{mail.subject} {mail.text} {mail.html} {mail.headers}"
    asked = subscriptions.asked(tokens(store)[0])
    assert (asked.email, asked.subject) == (ADA, "papers for “<b>diffusion” tagged language")
    assert rows(store)[0].confirmed is None
    assert tokens(store)[0] not in {
        getattr(rows(store)[0], column.name) for column in SubscriptionRow.__table__.columns
    }


def test_confirming_twice_changes_nothing(store, subscriptions, clock):
    subscriptions.subscribe(ADA)
    begun = subscriptions.confirm(tokens(store)[0])
    clock.now += 1000
    assert subscriptions.confirm(tokens(store)[0]) == begun
    assert begun.subject == "all papers" and len(rows(store)) == 1


def test_a_link_that_is_too_old_or_none_confirms_nothing(store, subscriptions, clock):
    subscriptions.subscribe(ADA)
    clock.now += CONFIRMATION_SECONDS
    for token in (tokens(store)[0], "no such token", ""):
        for call in (subscriptions.confirm, subscriptions.asked):
            with pytest.raises(UsageError, match="confirms no subscription, or no longer"):
                call(token)
    clock.now += 1
    subscriptions.subscribe("bob@example.org")
    assert [row.email for row in rows(store)] == ["bob@example.org"]


def test_unsubscribing_takes_one_token_and_keeps_nothing(store, subscriptions):
    subscriptions.subscribe(ADA, tag="vision")
    subscriptions.subscribe(ADA, tag="language")
    begun = [subscriptions.confirm(token) for token in tokens(store)]
    assert subscriptions.unsubscribe(begun[0].farewell) == begun[0]
    assert [row.tag for row in rows(store)] == ["language"]
    for farewell in (begun[0].farewell, "", "no such token"):
        with pytest.raises(UsageError, match="ended already"):
            subscriptions.unsubscribe(farewell)
    with pytest.raises(UsageError):
        subscriptions.confirm(tokens(store)[0])
    assert len({row.farewell for row in rows(store)} | {begun[0].farewell}) == 2
    assert begun[0].farewell not in repr(begun[0])


def test_subscribing_again_changes_the_frequency_once_confirmed(store, subscriptions, clock):
    subscriptions.subscribe(ADA, query="diffusion")
    first = subscriptions.confirm(tokens(store)[0])
    clock.now += 1000
    subscriptions.subscribe(ADA, query="diffusion", frequency="daily")
    assert [row.frequency for row in rows(store) if row.confirmed] == ["weekly"]
    again = subscriptions.confirm(tokens(store)[1])
    assert (again.id, again.frequency, again.farewell) == (first.id, "daily", first.farewell)
    assert (again.digested, again.told_until) == (first.digested, first.told_until)
    assert subscriptions.confirm(tokens(store)[1]) == again and len(rows(store)) == 1


def test_the_answer_is_the_same_for_who_has_subscribed_already(store, subscriptions):
    assert subscriptions.subscribe(ADA) is None
    subscriptions.confirm(tokens(store)[0])
    assert subscriptions.subscribe(ADA) is None
    with store.reading() as session:
        first, second = session.scalars(select(MailRow).order_by(MailRow.id))
    one, two = tokens(store)
    assert first.subject == second.subject and first.text.replace(one, "") == second.text.replace(two, "")


def test_nobodys_mailbox_is_filled(store, subscriptions, clock):
    for number in range(20):
        subscriptions.subscribe(ADA, tag=f"tag{number}")
    assert len(tokens(store)) == len(rows(store)) == 5
    clock.now += 86401
    subscriptions.subscribe(ADA, tag="another")
    assert len(tokens(store)) == 6


def test_who_has_shown_that_the_address_is_theirs_needs_no_mail(store, subscriptions, clock):
    for number in range(20):
        subscriptions.subscribe(ADA, tag=f"tag{number}")
    begun = subscriptions.subscribe(ADA, tag="vision", owned=True)
    assert (begun.email, begun.tag, begun.told_until) == (ADA, "vision", clock.now) and len(tokens(store)) == 5
    again = subscriptions.subscribe(ADA, tag="vision", frequency="daily", owned=True)
    assert (again.id, again.frequency, again.farewell) == (begun.id, "daily", begun.farewell)
    assert [row.tag for row in rows(store) if row.confirmed] == ["vision"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"email": "ada"}, "is no e-mail address"),
        ({"frequency": "hourly"}, "no frequency 'hourly', only daily and weekly"),
        ({"query": "of the"}, "has no word to search for"),
        ({"query": "x" * 201}, "a search has at most 200 characters"),
        ({"tag": "a\x00b"}, "a tag has at most 200 characters, all of them printable"),
    ],
)
def test_what_cannot_be_subscribed_to_is_refused(store, subscriptions, wrong, message):
    with pytest.raises(UsageError, match=message):
        subscriptions.subscribe(**{"email": ADA, **wrong})
    assert rows(store) == [] and tokens(store) == []


def test_a_subscription_that_was_answered_survives_a_kill(store, store_url):
    code = (
        "import os, signal, sys; from paperworks.lab import Store; from paperworks.page.subscriptions import Subscriptions; "
        "Subscriptions(Store(sys.argv[1]), 'https://papers.example.org').subscribe('ada@example.org', tag='vision'); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, store_url]).returncode == -9
    begun = Subscriptions(store, "https://papers.example.org").confirm(tokens(store)[0])
    assert (begun.email, begun.tag) == (ADA, "vision")


def test_a_digest_of_a_reading_list_is_a_subscription_of_its_own(store, subscriptions, clock):
    everything = subscriptions.subscribe(ADA, owned=True)
    reading = subscriptions.subscribe(ADA, kind="reading", frequency="daily", owned=True)
    assert everything.id != reading.id and reading.subject == "papers like those of your reading list"
    assert [(one.kind, one.frequency) for one in subscriptions.of(ADA)] == [("papers", "weekly"), ("reading", "daily")]
    # One that waits for its confirmation has not begun.
    subscriptions.subscribe(ADA, query="llm")
    subscriptions.subscribe("bob@example.org", owned=True)
    assert len(subscriptions.of(ADA)) == 2
    subscriptions.unsubscribe(everything.farewell)
    assert [one.kind for one in subscriptions.of(ADA)] == ["reading"]
    for wrong in ({"kind": "poems"}, {"kind": "reading", "query": "llm"}, {"kind": "reading", "tag": "cs.lg"}):
        with pytest.raises(UsageError, match="a digest is of papers or reading"):
            subscriptions.subscribe(ADA, **wrong)
