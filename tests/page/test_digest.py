"""The digest: what is new comes once, to whom it is due, and ends in one click."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from paperworks import cli
from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import index as index_module
from paperworks.page.digest import composed, due, new_papers, put_digests, render, write_digests
from paperworks.page.entries import Entry
from paperworks.page.index import Index
from paperworks.page.mail import send_pending
from paperworks.page.reading import keep
from paperworks.page.subscriptions import Subscription
from paperworks.page.tables import EntryRow, MailRow, SubscriptionRow, UserRow
from paperworks.page.trending import Trend
from tests.page.mailserver import MailServer

NOW = datetime(2026, 11, 25, 8, tzinfo=UTC)
URL = "https://papers.example.org"
WISH = Subscription(1, "ada@example.org", None, None, "weekly", 0.0, 0.0, "farewell-token")


@pytest.fixture
def store(store_url, monkeypatch):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    with Store(store_url) as opened:
        Index(opened)
        yield opened


def ago(**time) -> float:
    return (NOW - timedelta(**time)).timestamp()


def paper(number: int, title: str = "A paper", days: float = 1, **told) -> Entry:
    return Entry(key=f"2611.{number:05d}", title=title, published=NOW - timedelta(days=days), **told)


def add(store: Store, *entries: Entry, added: float) -> None:
    Index(store).add(entries)
    with store.writing() as session:
        mine = update(EntryRow).where(EntryRow.key.in_([entry.key for entry in entries]))
        session.execute(mine.values(added=added))


def subscribe(store: Store, number: int = 1, *, confirmed: bool = True, since: float | None = None, **told) -> None:
    since = ago(days=7) if since is None else since
    values = {"email": f"reader{number}@example.org", "query": "", "tag": "", "frequency": "weekly", **told}
    with store.writing() as session:
        session.add(
            SubscriptionRow(
                confirmation_hash=f"hash {number}", farewell=f"farewell-{number}", asked=since, digested=since,
                told_until=since, confirmed=since if confirmed else None, **values,
            )
        )  # fmt: skip


def mails(store: Store) -> list[MailRow]:
    with store.reading() as session:
        return list(session.scalars(select(MailRow).order_by(MailRow.recipient)))


def titles(store: Store, until: float | None = None, **wish) -> list[str]:
    _, new = new_papers(
        store, replace(WISH, **{"told_until": ago(days=7), **wish}), NOW.timestamp() if until is None else until
    )
    return [entry.title for entry in new]


def test_a_daily_digest_is_due_the_next_day_and_a_weekly_one_after_seven(store):
    subscribe(store, 1, frequency="daily", since=datetime(2026, 11, 24, 8, 0, 5, tzinfo=UTC).timestamp())
    subscribe(store, 2, frequency="daily", since=datetime(2026, 11, 25, 0, 5, tzinfo=UTC).timestamp())
    subscribe(store, 3, since=datetime(2026, 11, 18, 23, 0, tzinfo=UTC).timestamp())
    subscribe(store, 4, since=datetime(2026, 11, 19, 1, 0, tzinfo=UTC).timestamp())
    subscribe(store, 5, confirmed=False, since=ago(days=30))
    # Some seconds earlier in the day than the last.
    assert [wish.id for wish in due(store, datetime(2026, 11, 25, 8, 0, 3, tzinfo=UTC))] == [1, 3]
    assert [wish.id for wish in due(store, datetime(2026, 11, 26, 0, 1, tzinfo=UTC))] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="has no time zone"):
        due(store, datetime(2026, 11, 25))


def test_new_is_what_was_added_since_the_last_digest(store):
    add(store, paper(1, "Told before"), added=ago(days=8))
    add(store, paper(2, "New"), added=ago(days=6))
    add(store, paper(3, "Old news", days=60), added=ago(days=6))
    add(store, paper(4, "An old paper that runs here now", days=900, slug="hydra", status="runs"), added=ago(days=6))
    add(store, paper(5, "Too new"), added=NOW.timestamp() + 1)
    assert titles(store) == ["New", "An old paper that runs here now"]


def test_a_tag_and_a_search_choose_papers(store):
    add(store, paper(1, "Fast decoding", tags=("decoding",)), paper(2, "Decoding of speech", categories=("cs.SD",)),
        paper(3, "Fast trains", abstract="They decode nothing."), paper(4, "Rivers"), added=ago(days=2))  # fmt: skip
    add(store, paper(5, "Fast decoding, told before"), added=ago(days=9))
    assert titles(store, tag="decoding") == ["Fast decoding"]
    assert titles(store, tag="cs.sd") == ["Decoding of speech"]
    # Every word, with stems; best first.
    assert titles(store, query="fast decoding") == ["Fast decoding", "Fast trains"]
    assert titles(store, query="fast decoding", tag="decoding") == ["Fast decoding"]
    assert titles(store, query='fast") & (rivers') == []


def test_of_many_the_most_wanted_are_shown_and_the_rest_linked(store):
    add(store, *(paper(number, f"Paper {number}", days=number / 24, upvotes=number // 20) for number in range(25)),
        added=ago(days=2))  # fmt: skip
    total, new = new_papers(store, replace(WISH, told_until=ago(days=7)), NOW.timestamp())
    order = sorted(range(25), key=lambda number: (-(number // 20), number))[:20]
    assert total == 25 and [entry.title for entry in new] == [f"Paper {number}" for number in order]
    mail = render(replace(WISH, query="a b", tag="cs.LG"), new, total, [], URL)
    assert "5 more: https://papers.example.org/search?q=a+b&tag=cs.LG" in mail.text
    assert 'href="https://papers.example.org/search?q=a+b&amp;tag=cs.LG"' in mail.html
    assert "5 more: https://papers.example.org/new\n" in render(WISH, new, total, [], URL).text


def test_a_digest_says_what_is_new_and_what_is_trending():
    new = [
        paper(1, "Fast <b>&", abstract="word " * 200, authors=tuple("ABCDEF"), slug="hydra", status="measured"),
        Entry(key="cs/0501001", title="Old", published=NOW),
    ]
    mail = render(replace(WISH, tag="decoding"), new, 2, [Trend(paper(9, "Hot"), 3.0, 1, 2)], URL + "/")
    assert mail.subject == "2 new papers: Fast <b>&"
    assert "weekly digest of papers tagged decoding" in mail.text and "A, B, C, D and others, 2026" in mail.text
    for content in (mail.text, mail.html):
        for told in ("2 new papers", "Trending this week", "1 vote, 2 runs", "paperworks run hydra", f"{URL}/papers/hydra",
                     f"{URL}/papers/cs/0501001", f"{URL}/papers/2611.00009", f"{URL}/unsubscribe/farewell-token"):  # fmt: skip
            assert told in content, told
        assert content.count("word") < 70 and "…" in content
    assert "<b>" not in mail.html and "Fast &lt;b&gt;&amp;" in mail.html and "Fast <b>&" in mail.text
    assert max(map(len, mail.text.splitlines())) <= 100
    assert mail.headers == {
        "List-Unsubscribe": f"<{URL}/unsubscribe/farewell-token>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
    }


def test_the_html_is_well_formed_and_loads_nothing():
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], set()

        def handle_starttag(self, tag, attributes):
            self.seen.add(tag)
            if tag not in ("meta", "br", "hr"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    new = [paper(1, "T", abstract="A", slug="hydra", status="runs")]
    reader.feed(render(WISH, new, 3, [Trend(new[0], 1.0, 2, 1)], URL).html)
    assert reader.open == [] and not reader.seen & {"script", "img", "link", "iframe", "form", "style"}


def test_digests_are_put_once_and_go_on_from_there(store):
    for number, frequency in enumerate(["daily", "weekly", "daily"], start=1):
        subscribe(store, number, frequency=frequency)
    subscribe(store, 4, confirmed=False)
    add(store, paper(1, "First"), added=ago(days=2))
    assert put_digests(store, URL, NOW) == 3
    assert put_digests(store, URL, NOW) == put_digests(store, URL, NOW + timedelta(hours=2)) == 0
    assert [mail.recipient for mail in mails(store)] == [f"reader{number}@example.org" for number in (1, 2, 3)]
    # What comes within ten minutes before a digest is in the next.
    add(store, paper(2, "Second"), added=NOW.timestamp() - 5)
    assert put_digests(store, URL, NOW + timedelta(days=1)) == 2
    second = mails(store)[1]
    assert (
        second.recipient == "reader1@example.org"
        and "Second" in second.text
        and "First" not in second.text.split("Trending")[0]
    )


def test_what_was_added_less_than_ten_minutes_ago_waits_for_the_next_digest(store):
    subscribe(store, 1, frequency="daily")
    add(store, paper(1, "Settled"), added=ago(minutes=10, seconds=1))
    add(store, paper(2, "Unsettled"), added=ago(minutes=9, seconds=59))
    for number, (now, told, left) in enumerate(
        [(NOW, "Settled", "Unsettled"), (NOW + timedelta(days=1), "Unsettled", "Settled")], start=1
    ):
        assert put_digests(store, URL, now) == 1
        news = max(mails(store), key=lambda mail: mail.id).text.partition("Trending")[0].split()
        assert told in news and left not in news and len(mails(store)) == number


@pytest.mark.parametrize(("frequency", "days"), [("daily", 1), ("weekly", 7)])
def test_a_digest_that_cannot_be_sent_is_given_up_when_the_next_is_due(store, frequency, days):
    subscribe(store, 1, frequency=frequency)
    add(store, paper(1), added=ago(days=2))
    put_digests(store, URL, NOW)
    [mail] = mails(store)
    assert mail.until - mail.put == days * 86400


def test_what_was_published_more_than_a_month_before_the_last_digest_is_no_news(store):
    with store.writing() as session:
        session.add(UserRow(id=1, email=WISH.email, created=0.0))
    # The last digest was seven days ago.
    add(store, paper(1, "Speculative beetles"), added=ago(days=9))
    add(store, paper(2, "Late beetles", days=36.9), paper(3, "Old beetles", days=37.1), added=ago(days=2))
    keep(store, 1, "2611.00001")
    assert titles(store) == titles(store, query="beetles") == titles(store, kind="reading") == ["Late beetles"]


@pytest.mark.parametrize(("frequency", "period"), [("daily", "day"), ("weekly", "week")])
def test_a_digest_tells_five_papers_of_its_period_that_trend(store, monkeypatch, frequency, period):
    from paperworks.page import digest as module

    add(store, paper(1), added=ago(days=2))
    scores, asked = [3.0, 0.5, 0.0], []

    def trends(*arguments):
        asked.append(arguments)
        return [Trend(paper(90 + place, f"Hot {place}"), score, 1, 0) for place, score in enumerate(scores)]

    monkeypatch.setattr(module, "trending", trends)
    mail = composed(store, replace(WISH, frequency=frequency), URL, NOW.timestamp())
    assert asked == [(store, period, 5)]
    assert [f"Hot {place}" in mail.text for place in range(3)] == [True, True, False]
    assert f"Trending this {period}" in mail.text


def test_without_news_there_is_no_mail(store):
    subscribe(store, 1, query="diffusion", frequency="daily")
    add(store, paper(1, "Rivers"), added=ago(days=2))
    assert put_digests(store, URL, NOW) == 0 and mails(store) == []
    add(store, paper(2, "Diffusion"), added=NOW.timestamp() + 3600)
    assert put_digests(store, URL, NOW + timedelta(days=1)) == 1


def test_what_nobody_wants_is_not_called_trending(store):
    add(store, paper(1, "New", days=0.1), paper(2, "Long ago", days=20), added=ago(days=2))
    with_one = composed(store, replace(WISH, told_until=ago(days=7)), URL, NOW.timestamp())
    assert "Long ago" not in with_one.text.partition("Trending this week")[2]


def test_processes_at_the_same_time_put_each_digest_once(store, store_url):
    for number in range(12):
        subscribe(store, number)
    add(store, paper(1), added=ago(days=2))
    put: list[int] = []

    def work() -> None:
        with Store(store_url) as own:
            put.append(put_digests(own, URL, NOW))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(put) == 12
    assert [mail.recipient for mail in mails(store)] == sorted(f"reader{number}@example.org" for number in range(12))


def test_a_digest_that_was_stopped_goes_on_and_sends_nothing_twice(store, monkeypatch):
    from paperworks.page import digest as module

    for number in range(1, 7):
        subscribe(store, number)
    add(store, paper(1), added=ago(days=2))
    left = iter(range(3))

    def stopping(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return composed(*arguments)

    monkeypatch.setattr(module, "composed", stopping)
    with pytest.raises(KeyboardInterrupt):
        put_digests(store, URL, NOW)
    monkeypatch.undo()
    assert len(mails(store)) == 3
    assert put_digests(store, URL, NOW + timedelta(minutes=5)) == 3
    with MailServer() as server:
        assert send_pending(store, server.url).sent == 6
        assert send_pending(store, server.url).sent == 0
    assert sorted(server.recipients) == [f"reader{number}@example.org" for number in range(1, 7)]
    [got] = [mail for to, mail in server.received if to == "reader5@example.org"]
    assert got["List-Unsubscribe"] == f"<{URL}/unsubscribe/farewell-5>"
    assert got["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


def test_who_unsubscribes_meanwhile_gets_no_digest(store, monkeypatch):
    from paperworks.page import digest as module
    from paperworks.page.subscriptions import Subscriptions

    subscribe(store, 1)
    add(store, paper(1), added=ago(days=2))

    def leaving(*arguments):
        Subscriptions(store, URL).unsubscribe("farewell-1")
        return composed(*arguments)

    monkeypatch.setattr(module, "composed", leaving)
    assert put_digests(store, URL, NOW) == 0 and mails(store) == []


def test_a_dry_run_writes_files_and_changes_nothing(store, tmp_path):
    subscribe(store, 1)
    add(store, paper(1, "Fresh"), added=ago(days=2))
    for _ in range(2):
        files = write_digests(store, URL, NOW, tmp_path / "new" / "folder")
        assert [path.name for path in files] == ["000001.html", "000001.txt"]
    assert all("Fresh" in path.read_text() for path in files)
    assert mails(store) == [] and put_digests(store, URL, NOW) == 1


def test_a_dry_run_without_subscribers_shows_what_one_would_get(store, tmp_path):
    add(store, paper(1, "Fresh"), added=NOW.timestamp())
    files = write_digests(store, URL, NOW, tmp_path)
    assert [path.name for path in files] == ["preview.html", "preview.txt"]
    assert "Fresh" in files[1].read_text()


def test_a_dry_run_shows_what_has_come_within_a_week(store, tmp_path):
    for number, hours in enumerate((1, 167, 169), start=1):
        add(store, paper(number, f"After {hours} hours"), added=ago(hours=hours))
    _, text = write_digests(store, URL, NOW, tmp_path)
    news = text.read_text().partition("Trending")[0]
    assert [f"After {hours} hours" in news for hours in (1, 167, 169)] == [True, True, False]
    assert "weekly digest" in news


def test_the_command_writes_or_sends(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    run = CliRunner()
    done = run.invoke(cli.app(), ["digest", "--dry-run", "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "new papers" in (tmp_path / "out" / "preview.txt").read_text()
    refused = run.invoke(cli.app(), ["digest"])
    assert isinstance(refused.exception, UsageError) and "PAPERWORKS_SMTP names no mail server" in str(
        refused.exception
    )
    with Store() as store, MailServer() as server:
        # All cards were added just now, which the digest of a reader sees when they have settled.
        with store.writing() as session:
            session.execute(update(EntryRow).values(added=EntryRow.added - 3600))
        subscribe(store, 1, since=datetime.now(UTC).timestamp() - 7 * 86400)
        monkeypatch.setenv("PAPERWORKS_SMTP", server.url)
        for expected in ("1 digests made, 1 mails sent, 0 failed", "0 digests made, 0 mails sent, 0 failed"):
            done = run.invoke(cli.app(), ["digest", "--base-url", URL])
            assert done.exit_code == 0 and expected in done.output, done.output
        with store.reading() as session:
            cards = session.scalar(select(func.count()).select_from(EntryRow))
    [(to, mail)] = server.received
    assert to == "reader1@example.org" and mail["Subject"].startswith(f"{cards} new papers: ")
    assert f"{URL}/unsubscribe/farewell-1" in mail.get_body(("plain",)).get_content()


def test_the_command_line_loads_nothing_of_the_page():
    code = "import sys, paperworks.cli; print([m for m in ('aiosmtplib', 'argon2', 'jinja2', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reading_list_brings_what_is_new_and_like_it(store):
    with store.writing() as session:
        session.add_all(
            UserRow(id=id, email=email, created=0.0) for id, email in ((1, WISH.email), (2, "b@example.org"))
        )
    add(store, paper(1, "Speculative beetles"), paper(2, "Beetles of old"), paper(3, "Rivers"), added=ago(days=9))
    add(store, paper(4, "New beetles"), paper(5, "New trains"), added=ago(days=2))
    add(store, paper(6, "Beetles of long ago", days=60), added=ago(days=2))
    keep(store, 1, "2611.00001")
    keep(store, 2, "2611.00003")
    assert titles(store, kind="reading") == ["New beetles"]
    assert (
        titles(store, kind="reading", email="b@example.org")
        == titles(store, kind="reading", email="c@example.org")
        == []
    )
    mail = composed(store, replace(WISH, kind="reading", told_until=ago(days=7)), URL, NOW.timestamp())
    news, _, _ = mail.text.partition("Trending this week")
    assert "papers like those of your reading list" in news and "Speculative" not in news
