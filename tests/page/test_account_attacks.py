"""Attacks on accounts and mailboxes, as they would be made: over HTTP, through a mail server."""

from __future__ import annotations

import re
import threading

import pytest
from argon2 import PasswordHasher
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from paperworks.page import accounts as accounts_module
from paperworks.page.accounts import GUESSES, LINKS
from paperworks.page.app import create_app
from paperworks.page.mail import send_pending
from paperworks.page.tables import SessionRow, SubscriptionRow, UserRow
from tests.page.mailserver import MailServer

BASE = "http://127.0.0.1:8000"
ADA, SECRET, EVIL = "ada@example.org", "Ada's own secret", "evil password"


@pytest.fixture(autouse=True)
def quick_hashing(monkeypatch):
    """Argon2id with little memory, so that tests take little time."""
    quick = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)
    monkeypatch.setattr(accounts_module, "_hasher", lambda: quick)
    accounts_module._nobody.cache_clear()
    yield
    accounts_module._nobody.cache_clear()


class Mailbox:
    """What has come to an address, by way of the outbox and the mail server."""

    def __init__(self, app, server: MailServer) -> None:
        self._app, self._server = app, server

    def mails(self, to: str = ADA) -> list:
        send_pending(self._app.state.store, self._server.url)
        return [mail for recipient, mail in self._server.received if recipient == to]

    def text(self, to: str = ADA) -> str:
        """The text of the newest mail."""
        return self.mails(to)[-1].get_body(("plain",)).get_content()

    def link(self, to: str = ADA) -> str:
        """The path of the link in the newest mail."""
        return re.search(rf"{BASE}(/(?:password|login/link|confirm)/\S+)", self.text(to))[1]


@pytest.fixture
def app(store_url, monkeypatch):
    """The page with a mail server, so that addresses are confirmed."""
    monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://127.0.0.1")
    made = create_app(store_url, meaning=False, base_url=BASE, rates={})
    yield made
    made.state.runner.close()
    made.state.store.close()


@pytest.fixture
def mailbox(app):
    with MailServer() as server:
        yield Mailbox(app, server)


class Browser(TestClient):
    """A browser: keeps cookies, and takes the token of a form along."""

    def __init__(self, app) -> None:
        super().__init__(app, base_url=BASE, follow_redirects=False)

    def fill(self, path: str, form: str | None = None, **fields: str):
        """Load the page with the form, fill it in and send it."""
        page = self.get(form or path)
        token = re.search(r'name="csrf" value="([^"]+)"', page.text)
        assert token, page.text
        return self.post(path, data={"csrf": token[1], **fields})

    @property
    def reader(self) -> str | None:
        """Who is logged in."""
        return self.get("/account.json").json().get("email")


@pytest.fixture
def ada(app):
    return Browser(app)


@pytest.fixture
def eve(app):
    return Browser(app)


def registered(browser: Browser, mailbox: Mailbox, email: str = ADA, password: str = SECRET) -> Browser:
    """A browser whose reader has an account, and is logged in."""
    assert browser.fill("/register", email=email).status_code == 200
    assert browser.fill(mailbox.link(email), password=password).status_code == 303
    assert browser.reader == email
    return browser


def alert(page) -> str:
    return re.search(r'role="alert">([^<]+)', page.text)[1]


def test_a_password_that_a_stranger_chose_before_its_owner_came_is_good_for_nothing(app, mailbox, ada, eve):
    # Eve registers with Ada's address and a password of her own, as the form once took it.
    eve.fill("/register", email=ADA, password=EVIL)
    first = mailbox.link()
    # Ada registers too, gets a mail of her own, and follows it.
    assert ada.fill("/register", email=ADA).status_code == 200
    assert len(mailbox.mails()) == 2 and mailbox.link() != first
    assert ada.fill(mailbox.link(), password=SECRET).status_code == 303
    assert ada.reader == ADA and eve.reader is None
    assert eve.fill("/login", email=ADA, password=EVIL).status_code == 400
    # What Eve has asked for is dead.
    assert ada.get(first).status_code == 400
    assert ada.fill("/login", "/subscribe", email=ADA, password=SECRET).status_code == 303


def test_an_owner_who_follows_the_mail_that_a_stranger_has_asked_for_chooses_the_password(mailbox, ada, eve):
    eve.fill("/register", email=ADA, password=EVIL)
    link = mailbox.link()
    page = ada.get(link).text
    assert 'type="password"' in page and EVIL not in page
    assert ada.fill(link, password=SECRET).status_code == 303
    assert ada.reader == ADA
    assert eve.reader is None and eve.fill("/login", email=ADA, password=EVIL).status_code == 400


def test_the_browser_that_asks_gets_nothing_by_the_link_that_another_opens(app, mailbox, ada, eve):
    eve.fill("/register", email=ADA)
    before = dict(eve.cookies)
    registered(ada, mailbox)
    assert eve.reader is None and dict(eve.cookies) == before and "session" not in before
    # Two browsers of one person: the one that opens the link is the one that is logged in.
    phone = Browser(app)
    ada.fill("/login", "/subscribe", email=ADA, password="")
    assert phone.fill(mailbox.link()).status_code == 303
    assert phone.reader == ada.reader == ADA


def test_a_token_without_the_form_behind_it_sets_no_password(app, mailbox, ada, eve):
    ada.fill("/register", email=ADA)
    link = mailbox.link()
    stolen = re.search(r'name="csrf" value="([^"]+)"', eve.get("/subscribe").text)[1]
    fresh = Browser(app)
    for form in ({}, {"csrf": stolen}):
        assert fresh.post(link, data={"password": EVIL, **form}).status_code == 403
    assert ada.fill(link, password=SECRET).status_code == 303


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/register", {"email": ADA}), ("/forgotten", {"email": ADA}), ("/password/x", {"password": EVIL}),
     ("/account", {"old": SECRET, "password": EVIL}), ("/login", {"email": ADA, "password": SECRET}), ("/login/link/x", {}),
     ("/logout", {})],
)  # fmt: skip
def test_no_form_of_accounts_is_taken_without_its_token(app, mailbox, ada, path, fields):
    registered(ada, mailbox)
    known = len(mailbox.mails())
    assert ada.post(path, data=fields).status_code == 403
    foreign = ada.post(path, data={**fields, "csrf": _token(ada)}, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403
    assert ada.reader == ADA and len(mailbox.mails()) == known
    assert Browser(app).fill("/login", email=ADA, password=SECRET).status_code == 303


def test_a_mail_program_that_looks_at_links_uses_none_up(app, mailbox, ada):
    ada.fill("/register", email=ADA)
    _look_at(app, mailbox.link())
    assert ada.fill(mailbox.link(), password=SECRET).status_code == 303
    ada.fill("/login", "/subscribe", email=ADA, password="")
    _look_at(app, mailbox.link())
    assert ada.fill(mailbox.link()).status_code == 303
    with app.state.store.reading() as session:
        assert len(session.scalars(select(UserRow)).all()) == 1


def _look_at(app, link: str) -> None:
    scanner = Browser(app)
    for _ in range(3):
        assert scanner.get(link).status_code == 200
        assert scanner.head(link).status_code in (200, 405)
        assert scanner.get(f"{link}.json").status_code == 200
    assert "session" not in scanner.cookies


def test_a_link_whose_kind_is_another_leads_nowhere(mailbox, ada):
    ada.fill("/register", email=ADA)
    password = mailbox.link().rpartition("/")[2]
    ada.fill("/login", email=ADA, password="")
    log_in = mailbox.link().rpartition("/")[2]
    for path, fields in ((f"/login/link/{password}", {}), (f"/password/{log_in}", {"password": EVIL})):
        assert ada.get(path).status_code == 400
        assert ada.fill(path, "/subscribe", **fields).status_code == 400
    assert ada.reader is None


def test_registering_and_asking_tell_nobody_who_has_an_account(app, mailbox, ada, eve):
    registered(ada, mailbox)
    with app.state.store.writing() as session:
        session.add(UserRow(email="unconfirmed@example.org", password="x", created=0.0))
    for path in ("/register", "/forgotten", "/login"):
        answers = {}
        for email in (ADA, "unconfirmed@example.org", "nobody@example.org"):
            answer = eve.fill(path, email=email)
            assert answer.status_code == 200
            answers[email] = (re.sub(r'value="[^"]+"', "", answer.text), sorted(answer.headers.items()))
        assert len({str(answer) for answer in answers.values()}) == 1, path
    # Each of them has its mails, by which its owner gets in.
    assert [mail["Subject"] for mail in mailbox.mails("nobody@example.org")] == [
        "Your account at Paperworks", "Your account at Paperworks", "Log in to Paperworks",
    ]  # fmt: skip
    assert [mail["Subject"] for mail in mailbox.mails(ADA)][1:] == [
        "Your password at Paperworks", "Your password at Paperworks", "Log in to Paperworks",
    ]  # fmt: skip


def test_guesses_end_for_an_address_from_wherever_they_come(app, mailbox, ada):
    registered(ada, mailbox)
    ada.fill("/logout", "/subscribe")
    told = {}
    for email in (ADA, "nobody@example.org"):
        told[email] = []
        for number in range(GUESSES + 2):
            # A new browser, from another address.
            bot = TestClient(app, base_url=BASE, client=(f"198.51.100.{number}", 1))
            answer = bot.post(
                "/login", data={"csrf": _token(bot), "email": email.upper(), "password": f"guess {number}"}
            )
            told[email].append((answer.status_code, re.sub(r"\d+", "", alert(answer)), "retry-after" in answer.headers))
    assert told[ADA] == told["nobody@example.org"]
    assert [status for status, _, _ in told[ADA]] == [400] * GUESSES + [429] * 2
    assert "wait  min, or log in by a link to your mailbox" in told[ADA][-1][1] and told[ADA][-1][2]
    # The right password does not get in either, or guessing would go on.
    strange = Browser(app)
    assert strange.fill("/login", email=ADA, password=SECRET).status_code == 429
    # Ada does: in the browser she was in before, and anywhere by her mailbox.
    assert ada.fill("/login", email="Ada@Example.org", password=SECRET).status_code == 303 and ada.reader == ADA
    strange.fill("/login", email=ADA, password="")
    assert strange.fill(mailbox.link()).status_code == 303 and strange.reader == ADA
    strange.fill("/logout", "/subscribe")
    assert strange.fill("/login", email=ADA, password=SECRET).status_code == 303


def test_a_browser_known_to_one_account_is_not_known_to_another(app, mailbox, ada, eve):
    registered(ada, mailbox)
    registered(eve, mailbox, "eve@example.org", EVIL)
    eve.fill("/logout", "/subscribe")
    answers = []
    for number in range(GUESSES + 1):
        answers.append(eve.fill("/login", email=ADA, password=f"guess {number}").status_code)
        # Between guesses she logs in to her own, which makes her browser no better known to Ada's.
        assert eve.fill("/login", email="eve@example.org", password=EVIL).status_code == 303
        eve.fill("/logout", "/subscribe")
    assert answers == [400] * GUESSES + [429]
    forged = Browser(app)
    forged.cookies.set("browser", ada.cookies["browser"][:-1] + ("x" if ada.cookies["browser"][-1] != "x" else "y"))
    assert forged.fill("/login", email=ADA, password=SECRET).status_code == 429


def test_a_password_is_changed_by_who_knows_it_and_all_others_are_logged_out(app, mailbox, ada):
    registered(ada, mailbox)
    thief = Browser(app)
    thief.cookies.set("session", ada.cookies["session"])
    assert thief.reader == ADA
    wrong = thief.fill("/account", old="a guess", password=EVIL)
    assert wrong.status_code == 400 and "is not the password that you have" in alert(wrong)
    short = ada.fill("/account", old=SECRET, password="short")
    assert short.status_code == 400 and "8 to 1024 characters" in alert(short)
    changed = ada.fill("/account", old=SECRET, password="another secret")
    assert changed.status_code == 303 and changed.headers["location"] == "/account"
    assert ada.reader == ADA and thief.reader is None
    assert Browser(app).fill("/login", email=ADA, password=SECRET).status_code == 400
    assert Browser(app).fill("/login", email=ADA, password="another secret").status_code == 303


@pytest.mark.parametrize("email", ["", "ada", "a" * 5000, "\r\nBcc: eve@example.org"])
def test_what_is_no_address_is_said_in_the_form(app, mailbox, ada, email):
    for path in ("/register", "/forgotten", "/login", "/subscribe"):
        refused = ada.fill(path, email=email)
        assert refused.status_code == 400 and "is no e-mail address" in alert(refused), path
        assert f'action="{path}"' in refused.text
    assert "do not go together" in alert(ada.fill("/login", email=email, password=SECRET))


def test_a_form_does_not_choose_its_charset(ada):
    for path in ("/register", "/forgotten", "/login", "/subscribe"):
        parts = [("csrf", _token(ada)), ("email", r"\ud800"), ("password", r"\ud800"), ("query", r"\ud800")]
        body = "".join(
            f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts
        )
        headers = {"Content-Type": "multipart/form-data; boundary=b; charset=raw_unicode_escape"}
        refused = ada.post(path, content=f"{body}--b--\r\n", headers=headers)
        assert refused.status_code == 415 and "application/x-www-form-urlencoded" in refused.text, path


def test_what_is_no_password_is_said_in_the_form(mailbox, ada):
    ada.fill("/register", email=ADA)
    link = mailbox.link()
    for password in ("", "short", "x" * 1025):
        refused = ada.fill(link, password=password)
        assert refused.status_code == 400 and "8 to 1024 characters" in alert(refused)
        assert 'type="password"' in refused.text
    ada.fill(link, password=SECRET)
    for old, new in (("", "another secret"), (SECRET, ""), ("", "")):
        assert alert(ada.fill("/account", old=old, password=new))


def test_a_forgotten_password_is_replaced_by_mail_which_ends_all_sessions(app, mailbox, ada, eve):
    registered(ada, mailbox)
    eve.fill("/login", email=ADA, password=SECRET)
    assert eve.reader == ADA
    # She forgets it, in a third browser.
    phone = Browser(app)
    assert "Password forgotten" in phone.get("/login").text
    phone.fill("/forgotten", email=ADA)
    link = mailbox.link()
    assert "logs out all other browsers" in phone.get(link).text
    assert phone.fill(link, password="another secret").status_code == 303
    assert phone.reader == ADA and ada.reader is None and eve.reader is None
    assert eve.fill("/login", email=ADA, password=SECRET).status_code == 400
    # The link is used up, in every browser.
    for browser in (phone, eve):
        assert browser.get(link).status_code == 400
        assert browser.fill(link, "/subscribe", password=EVIL).status_code == 400


def test_nobody_is_flooded_and_who_floods_locks_nobody_out(mailbox, ada, eve):
    registered(ada, mailbox)
    ada.fill("/logout", "/subscribe")
    before = len(mailbox.mails())
    for _ in range(2 * LINKS):
        for path in ("/register", "/forgotten", "/login"):
            assert eve.fill(path, email=ADA).status_code == 200
    assert len(mailbox.mails()) - before == 2 * LINKS
    # The newest of the mails that Eve has caused serve Ada, who asks in vain for more.
    assert ada.fill("/forgotten", email=ADA).status_code == 200
    assert len(mailbox.mails()) - before == 2 * LINKS
    reset = [mail for mail in mailbox.mails() if mail["Subject"] == "Your password at Paperworks"][-1]
    link = re.search(rf"{BASE}(/password/\S+)", reset.get_body(("plain",)).get_content())[1]
    assert ada.fill(link, password="another secret").status_code == 303 and ada.reader == ADA
    # She can have another at once.
    ada.fill("/forgotten", email=ADA)
    assert len(mailbox.mails()) - before == 2 * LINKS + 1


TYPED = "Your account is blocked http://evil.example"


def test_mails_to_addresses_that_are_not_confirmed_hold_nothing_that_was_typed(app, mailbox, eve):
    headers = {
        "Host": "localhost:8000",
        "User-Agent": TYPED,
        "Accept-Language": TYPED,
        "X-Forwarded-Host": "evil.example",
    }
    for path, fields in (
        ("/subscribe", {"query": TYPED, "tag": TYPED}),
        ("/register", {"password": TYPED, "name": TYPED, "next": f"/{TYPED}"}),
        ("/forgotten", {"name": TYPED}),
        ("/login", {"next": f"/{TYPED}"}),
    ):
        token = _token(eve)
        sent = eve.post(path, data={"csrf": token, "email": "victim@example.org", **fields}, headers=headers)
        assert sent.status_code == 200, path
    mails = mailbox.mails("victim@example.org")
    assert len(mails) == 4
    for mail in mails:
        whole = "\n".join(
            [*map(str, mail.values()), *(mail.get_body((kind,)).get_content() for kind in ("plain", "html"))]
        )
        for word in ("blocked", "evil", "victim"):
            assert word not in whole.replace(mail["To"], ""), mail["Subject"]
        assert "List-Unsubscribe" not in mail
        assert set(re.findall(r"https?://[^/\s\"<]+", whole)) == {BASE}
    # What it is for is shown on the page, as text.
    page = eve.get(mailbox.link("victim@example.org").replace("login/link", "confirm"))
    assert page.status_code == 400
    confirm = re.search(rf"{BASE}(/confirm/\S+)", mails[0].get_body(("plain",)).get_content())[1]
    asked = eve.get(confirm).text
    assert f"papers for “{TYPED}” tagged {TYPED.lower()}" in asked and f'href="{TYPED}' not in asked
    with app.state.store.reading() as session:
        assert [row.confirmed for row in session.scalars(select(SubscriptionRow))] == [None]


def test_who_fills_a_mailbox_with_confirmations_keeps_its_owner_from_no_digest(app, mailbox, ada, eve):
    for number in range(10):
        eve.fill("/subscribe", email=ADA, query=f"draft {number}")
    assert len(mailbox.mails()) == 5
    eve.fill("/subscribe", email=ADA, query="diffusion")
    assert len(mailbox.mails()) == 5
    registered(ada, mailbox)
    begun = ada.fill("/subscribe", email="Ada@example.org", query="diffusion")
    assert "You are subscribed" in begun.text
    with app.state.store.reading() as session:
        confirmed = select(SubscriptionRow.query).where(SubscriptionRow.confirmed.is_not(None))
        assert session.scalars(confirmed).all() == ["diffusion"]
    # For the address of another she asks as everybody does.
    assert "Look into your mail" in ada.fill("/subscribe", email="bob@example.org").text


def test_who_has_not_confirmed_an_address_is_mailed_before_a_digest_comes_there(store_url, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
    app = create_app(store_url, meaning=False, base_url=BASE, rates={})
    eve = Browser(app)
    assert eve.fill("/register", email="victim@example.org", password=EVIL).status_code == 303
    assert "kept, not sent" in eve.fill("/subscribe", email="victim@example.org").text
    with app.state.store.reading() as session:
        assert [row.confirmed for row in session.scalars(select(SubscriptionRow))] == [None]
    app.state.store.close()


def test_a_session_that_was_planted_is_not_the_one_that_is_logged_in(app, mailbox, ada, eve):
    registered(ada, mailbox)
    registered(eve, mailbox, "eve@example.org", EVIL)
    victim = Browser(app)
    for planted in ("chosen-by-eve", eve.cookies["session"]):
        victim.cookies.clear()
        victim.cookies.set("session", planted)
        victim.cookies.set("visitor", eve.cookies["visitor"])
        assert victim.fill("/login", "/subscribe", email=ADA, password=SECRET).status_code == 303
        own = [cookie.value for cookie in victim.cookies.jar if cookie.name == "session"]
        victim.cookies.clear()
        victim.cookies.set("session", own[-1])
        assert own[-1] != planted and victim.reader == ADA
        # What was planted leads nowhere, not even to where it led before.
        other = Browser(app)
        other.cookies.set("session", planted)
        assert other.reader is None
    with app.state.store.reading() as session:
        assert len(session.scalars(select(SessionRow)).all()) == 3


def test_a_link_to_an_account_of_a_stranger_says_whose_it_is(mailbox, ada, eve):
    eve.fill("/login", email="eve@example.org", password="")
    # Eve sends hers on to Ada, who would work in Eve's account without knowing it.
    assert "logs you in as eve@example.org" in ada.get(mailbox.link("eve@example.org")).text
    eve.fill("/register", email="eve@example.org")
    assert 'value="eve@example.org"' in ada.get(mailbox.link("eve@example.org")).text


def test_case_and_unicode_make_no_second_account(app, mailbox, ada, eve):
    registered(ada, mailbox, "kate@example.org")
    for email in ("KATE@example.org", " kate@EXAMPLE.org "):
        assert eve.fill("/register", email=email).status_code == 200
    assert [mail["Subject"] for mail in mailbox.mails("kate@example.org")][1:] == ["Your password at Paperworks"] * 2
    # The Kelvin sign is a k in lower case, the first a of the next is Cyrillic, the last a full-width letter.
    for email in ("\u212aate@example.org", "k\u0430te@example.org", "kate@example.or\uff47", "kate\u0000@example.org"):
        for path in ("/register", "/forgotten", "/login"):
            refused = eve.fill(path, email=email)
            assert refused.status_code == 400 and "is no e-mail address" in alert(refused), email
    with app.state.store.reading() as session:
        assert session.scalars(select(UserRow.email)).all() == ["kate@example.org"]


def test_one_link_used_by_several_browsers_at_once_lets_one_in(app, mailbox, ada):
    ada.fill("/register", email=ADA)
    link = mailbox.link()
    browsers = [Browser(app) for _ in range(4)]
    start, statuses = threading.Barrier(len(browsers)), []

    def use(number: int) -> None:
        token = _token(browsers[number])
        start.wait()
        answer = browsers[number].post(link, data={"csrf": token, "password": f"password {number}"})
        statuses.append((answer.status_code, number))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(browsers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in statuses) == [303, 400, 400, 400]
    [winner] = [number for status, number in statuses if status == 303]
    assert [browser.reader for browser in browsers] == [ADA if n == winner else None for n in range(len(browsers))]
    assert Browser(app).fill("/login", email=ADA, password=f"password {winner}").status_code == 303


def test_logging_out_ends_this_session_in_the_store_and_no_other(app, mailbox, ada):
    registered(ada, mailbox)
    phone = Browser(app)
    phone.fill("/login", email=ADA, password=SECRET)
    ended = ada.cookies["session"]
    assert ada.fill("/logout", "/subscribe").status_code == 303 and "session" not in ada.cookies
    ada.cookies.set("session", ended)
    assert ada.reader is None and phone.reader == ADA
    # A browser that logs in anew leaves no session behind either.
    phone.fill("/login", "/subscribe", email=ADA, password=SECRET)
    with app.state.store.reading() as session:
        assert len(session.scalars(select(SessionRow)).all()) == 1


def test_an_account_that_was_taken_before_there_was_a_mail_server_goes_to_its_owner(app, mailbox, ada, eve):
    app.state.accounts.confirms = False
    assert eve.fill("/register", email=ADA, password=EVIL).status_code == 303 and eve.reader == ADA
    app.state.accounts.confirms = True
    registered(ada, mailbox)
    assert eve.reader is None and eve.fill("/login", email=ADA, password=EVIL).status_code == 400
    with app.state.store.reading() as session:
        assert session.execute(text("SELECT count(*) FROM users")).scalar() == 1


def _token(browser: TestClient) -> str:
    return re.search(r'name="csrf" value="([^"]+)"', browser.get("/subscribe").text)[1]
