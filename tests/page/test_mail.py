"""The outbox: what is put in is sent once, whatever the mail server or the sender does."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

import pytest
from sqlalchemy import select, update

from paperworks import cli
from paperworks.errors import PaperworksError, UsageError
from paperworks.lab import Store
from paperworks.page import mail as module
from paperworks.page.load import free_port
from paperworks.page.mail import Mail, Outbox, Sent, address, keep_sending, letter, send_pending, waiting
from paperworks.page.tables import MailRow
from tests.page.mailserver import MailServer

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
HELLO = Mail("Hello", "Hello.", "<p>Hello.</p>")


@pytest.fixture
def store(store_url):
    with Store(store_url) as opened:
        yield opened


@pytest.fixture
def local(tmp_path):
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def server():
    with MailServer() as started:
        yield started


@pytest.fixture
def clock(monkeypatch):
    """The time as the outbox sees it."""
    clock = SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def mails(store: Store) -> list[MailRow]:
    with store.reading() as session:
        return list(session.scalars(select(MailRow).order_by(MailRow.id)))


def test_a_mail_arrives_as_it_was_written(store, server):
    text = "Grüße,\n.a line that begins with a dot\n" + "long " * 300 + "\n"
    mail = Mail("Neue Papiere: “schneller” 速い " + "x" * 120, text, "<p>Grüße &amp; 速い</p>\n",
                {"List-Unsubscribe": "<https://example.org/unsubscribe/" + "t" * 100 + ">"})  # fmt: skip
    Outbox(store).put("Ada@Example.org", mail)
    assert send_pending(store, server.url + "?from=papers@example.org") == Sent(1, 0)
    [(to, got)] = server.received
    assert to == got["To"] == "ada@example.org"
    assert server.senders == ["papers@example.org"] and got["From"] == "Paperworks <papers@example.org>"
    assert got["Subject"] == mail.subject
    assert got["List-Unsubscribe"] == mail.headers["List-Unsubscribe"]
    assert got.get_body(("plain",)).get_content().replace("\r\n", "\n") == text
    assert got.get_body(("html",)).get_content().replace("\r\n", "\n") == mail.html
    assert got["Message-ID"].endswith("@example.org>") and got["Auto-Submitted"] == "auto-generated"
    assert abs(parsedate_to_datetime(got["Date"]).timestamp() - time.time()) < 60


def test_each_mail_is_sent_once_and_its_text_is_forgotten(store, server):
    for number in range(3):
        Outbox(store).put(f"reader{number}@example.org", HELLO)
    assert send_pending(store, server.url) == Sent(3, 0)
    assert send_pending(store, server.url) == Sent(0, 0)
    assert server.recipients == [f"reader{number}@example.org" for number in range(3)]
    assert {(row.status, row.text, row.html) for row in mails(store)} == {("sent", "", "")}


def test_senders_at_the_same_time_send_each_mail_once(store, store_url, server):
    for number in range(20):
        Outbox(store).put(f"reader{number}@example.org", HELLO)
    told: list[Sent] = []

    def send() -> None:
        with Store(store_url) as own:
            told.append(send_pending(own, server.url))

    senders = [threading.Thread(target=send) for _ in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(server.recipients) == sorted(f"reader{number}@example.org" for number in range(20))
    assert sum(sent.sent for sent in told) == 20


def test_a_sender_that_is_killed_sends_nothing_twice(store, store_url, server, clock):
    clock.now = time.time() - 1
    count = 12
    for number in range(count):
        Outbox(store).put(f"reader{number}@example.org", HELLO)
    server.pause = 0.1
    code = "import sys; from paperworks.lab import Store; from paperworks.page.mail import send_pending; send_pending(Store(sys.argv[1]), sys.argv[2])"
    sender = subprocess.Popen([sys.executable, "-c", code, store_url, server.url])
    while len(server.received) < 4 and sender.poll() is None:
        time.sleep(0.02)
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    time.sleep(0.3)
    server.pause = 0.0
    clock.now = time.time() + 1
    before = len(server.received)
    assert 4 <= before < count
    send_pending(store, server.url)
    assert len(set(server.recipients)) == len(server.recipients) >= count - 1
    # The one that it had in hand is not sent again, and in the end it is said why.
    doubtful = [row for row in mails(store) if row.status == "sending"]
    assert len(doubtful) <= 1
    clock.now += 1000
    assert send_pending(store, server.url) == Sent(0, len(doubtful))
    assert all("may have arrived" in row.error for row in mails(store) if row.status == "failed")
    assert len(set(server.recipients)) == len(server.recipients)


def test_what_is_refused_for_the_time_being_is_tried_again_with_longer_pauses(store, server, clock):
    Outbox(store).put("ada@example.org", HELLO)
    server.refuse["ada@example.org"] = "451 try later"
    started, tries = clock.now, []
    while mails(store)[0].status == "waiting":
        clock.now = mails(store)[0].due
        assert send_pending(store, server.url) == Sent(0, 1)
        tries.append(clock.now - started)
        clock.now += 1
        assert send_pending(store, server.url) == Sent(0, 0)
    assert tries == [0, 60, 300, 1260, 5100, 20460]
    [row] = mails(store)
    assert row.status == "failed" and row.error == "451 try later" and row.text == ""
    assert server.received == []


def test_a_mail_that_is_taken_at_the_second_try_arrives(local, server, clock):
    Outbox(local).put("ada@example.org", HELLO)
    server.answer["ada@example.org"] = "452 no room"
    assert send_pending(local, server.url) == Sent(0, 1)
    server.answer.clear()
    clock.now += 61
    assert send_pending(local, server.url) == Sent(1, 0)
    assert server.recipients == ["ada@example.org"] and mails(local)[0].attempts == 2


def test_one_that_is_refused_for_good_does_not_stop_the_others(local, server):
    for name in ("ada", "gone", "full", "bob"):
        Outbox(local).put(f"{name}@example.org", HELLO)
    server.refuse["gone@example.org"] = "550 no such mailbox"
    server.answer["full@example.org"] = "554 no"
    assert send_pending(local, server.url) == Sent(2, 2)
    assert server.recipients == ["ada@example.org", "bob@example.org"]
    assert [(row.status, row.error) for row in mails(local)] == [
        ("sent", None), ("failed", "550 no such mailbox"), ("failed", "554 no"), ("sent", None),
    ]  # fmt: skip


def test_one_that_cannot_be_written_does_not_stop_the_others(local, server):
    for name in ("ada", "bob"):
        Outbox(local).put(f"{name}@example.org", HELLO)
    with local.writing() as session:
        session.execute(update(MailRow).where(MailRow.recipient == "ada@example.org").values(subject="Hi\u2028there"))
    assert send_pending(local, server.url) == Sent(1, 1)
    assert server.recipients == ["bob@example.org"]
    assert [row.status for row in mails(local)] == ["failed", "sent"]
    assert "cannot be written as a mail" in mails(local)[0].error


def test_a_server_that_hangs_up_over_a_mail_is_not_given_it_again(local, server, clock):
    for name in ("ada", "bob"):
        Outbox(local).put(f"{name}@example.org", HELLO)
    server.answer["ada@example.org"] = "drop"
    assert send_pending(local, server.url) == Sent(1, 1)
    clock.now += 86400
    assert send_pending(local, server.url) == Sent(0, 0)
    assert server.recipients == ["ada@example.org", "bob@example.org"]
    assert "may have arrived" in mails(local)[0].error


def test_a_server_that_is_away_leaves_the_mails_waiting(local):
    port = free_port()
    Outbox(local).put("ada@example.org", HELLO)
    with pytest.raises(PaperworksError, match=rf"127.0.0.1:{port} does not take mail .* wait in the outbox"):
        send_pending(local, f"smtp://127.0.0.1:{port}")
    assert mails(local)[0].attempts == 0
    with MailServer(port=port) as back:
        assert send_pending(local, back.url) == Sent(1, 0)


def test_a_password_is_used_and_told_to_nobody(local, caplog):
    caplog.set_level(logging.DEBUG)
    Outbox(local).put("ada@example.org", HELLO)
    with MailServer(password="p@ss/word") as server:
        wrong = f"smtp://papers%40example.org:s3cret@127.0.0.1:{server.port}"
        with pytest.raises(PaperworksError, match="does not take mail") as refused:
            send_pending(local, wrong)
        assert send_pending(local, f"smtp://papers%40example.org:p%40ss%2Fword@127.0.0.1:{server.port}") == Sent(1, 0)
        assert server.logins[-1] == (b"papers@example.org", b"p@ss/word")
        assert server.senders == ["papers@example.org"]
    told = f"{refused.value!r} {refused.value.__cause__!r} {caplog.text} {module._Server.of(wrong)!r}"
    assert "s3cret" not in told and "p@ss/word" not in told


def test_a_password_goes_to_another_machine_only_encrypted(local, monkeypatch):
    monkeypatch.setattr(module, "_loopback", lambda host: False)
    Outbox(local).put("ada@example.org", HELLO)
    with MailServer(password="s3cret") as server:
        with pytest.raises(PaperworksError, match="does not take mail"):
            send_pending(local, f"smtp://papers%40example.org:s3cret@127.0.0.1:{server.port}")
        assert server.logins == [] and server.received == []


@pytest.mark.parametrize(
    "url",
    ["", "localhost:25", "https://ann:s3cret@mail.example.org", "smtp://ann:s3cret@", "smtp://ann:s3cret@host:port"],
)
def test_a_url_that_names_no_mail_server_is_refused_without_its_password(local, url):
    with pytest.raises(UsageError, match="give smtp://user:password@host:port") as refused:
        send_pending(local, url)
    assert "s3cret" not in str(refused.value)


def test_a_mail_that_is_of_no_use_any_more_is_not_sent(local, server, clock):
    Outbox(local).put("ada@example.org", HELLO, useful_for=3600)
    Outbox(local).put("bob@example.org", HELLO, useful_for=7200)
    clock.now += 3601
    assert send_pending(local, server.url) == Sent(1, 1)
    assert server.recipients == ["bob@example.org"]


def test_what_was_sent_long_ago_is_forgotten(local, server, clock):
    Outbox(local).put("ada@example.org", HELLO)
    send_pending(local, server.url)
    clock.now += 91 * 86400
    send_pending(local, server.url)
    assert mails(local) == []


def test_a_mail_is_put_in_together_with_what_it_tells_of(store):
    with pytest.raises(RuntimeError), store.writing() as session:
        Outbox(store).put("ada@example.org", HELLO, session=session)
        raise RuntimeError("what it tells of did not happen")
    assert mails(store) == []


def test_mails_are_sent_as_they_come_until_told_to_stop(local, server):
    stop = threading.Event()
    sending = threading.Thread(target=keep_sending, args=(local, server.url, stop, 0.05))
    sending.start()
    Outbox(local).put("ada@example.org", HELLO)
    for _ in range(200):
        if server.received:
            break
        time.sleep(0.05)
    stop.set()
    sending.join(10)
    assert server.recipients == ["ada@example.org"] and not sending.is_alive()


@pytest.mark.parametrize(
    "email",
    ["", "ada", "ada@", "@example.org", "ada @example.org", "ada@example.org\nBcc: eve@example.org", "a@b@c.org",
     "Ada <ada@example.org>", "ada..b@example.org", "ädä@example.org", "\u212aate@example.org", "a" * 65 + "@example.org", "a@" + "b" * 260],
)  # fmt: skip
def test_what_is_no_address_is_refused(local, email):
    with pytest.raises(UsageError, match="is no e-mail address; give one such as"):
        Outbox(local).put(email, HELLO)


def test_an_address_is_kept_in_one_way():
    assert address("  Ada.Lovelace+papers@Example.ORG ") == "ada.lovelace+papers@example.org"


@pytest.mark.parametrize(
    "told",
    [{"subject": "Hi\nBcc: eve@example.org"}, {"headers": {"X": "a\r\nBcc: eve@x.org"}}, {"subject": "Hi\u2028there"},
     {"subject": "Hi\x85"}],
)  # fmt: skip
def test_no_header_can_be_smuggled_in(told):
    with pytest.raises(ValueError, match="single lines"):
        Mail(**{"subject": "Hi", "text": "", "html": "", **told})


def test_a_letter_is_escaped_in_html_and_plain_in_text():
    mail = letter("S", paragraphs=["papers for “<b>&”"], link="https://e.org/x", label="Go", small="Small.")
    assert "papers for “<b>&”" in mail.text and "https://e.org/x" in mail.text
    assert "papers for “&lt;b&gt;&amp;”" in mail.html and "<b>" not in mail.html
    assert '<a href="https://e.org/x"' in mail.html


def test_what_waits_is_listed_while_it_is_of_use(store, clock, server):
    outbox = Outbox(store)
    outbox.put("ada@example.org", HELLO)
    outbox.put("bob@example.org", HELLO, useful_for=60)
    told = waiting(store)
    assert [(one.to, one.subject, one.text) for one in told] == [
        ("ada@example.org", "Hello", "Hello."), ("bob@example.org", "Hello", "Hello."),
    ]  # fmt: skip
    assert told[0].put.timestamp() == clock.now
    clock.now += 61
    assert [one.to for one in waiting(store)] == ["ada@example.org"]
    send_pending(store, server.url)
    assert waiting(store) == []


def test_the_command_lists_and_shows_what_waits(local, monkeypatch, capsys):
    def paperworks(*words):
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["paperworks", *words, "--store", local.url])
            with pytest.raises(SystemExit) as stop:
                cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    assert paperworks("mail") == (0, "no mail waits\n", "")
    Outbox(local).put("ada@example.org", Mail("Your account", "Choose it behind [a link].", ""))
    status, listed, hint = paperworks("mail")
    assert status == 0 and "ada@example.org" in listed and "Your account" in listed
    assert "Choose it" not in listed and hint == "`paperworks mail 1` shows the newest\n"
    status, shown, _ = paperworks("mail", "1")
    assert (status, shown) == (0, "To: ada@example.org\nSubject: Your account\n\nChoose it behind [a link].\n")
    status, told, _ = paperworks("mail", "--json")
    assert status == 0 and [(one["id"], one["to"]) for one in json.loads(told)] == [(1, "ada@example.org")]
    status, _, error = paperworks("mail", "7")
    assert (status, error) == (2, "paperworks: no mail 7 waits; `paperworks mail` lists those that do\n")
