"""Accounts: passwords, links by mail, sessions, and what they tell to nobody."""

from __future__ import annotations

import re
import statistics
from types import SimpleNamespace

import pytest
from argon2 import PasswordHasher, Type, extract_parameters
from sqlalchemy import select, text

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import accounts as module
from paperworks.page.accounts import LINK_SECONDS, SESSION_SECONDS, Accounts
from paperworks.page.tables import LoginLinkRow, MailRow, SessionRow, UserRow

ADA, BOB, SECRET = "ada@example.org", "bob@example.org", "correct horse"


@pytest.fixture
def store(store_url):
    with Store(store_url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick_hashing(monkeypatch):
    """Argon2id with little memory, so that tests take little time."""
    quick = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)
    monkeypatch.setattr(module, "_hasher", lambda: quick)
    module._nobody.cache_clear()
    yield
    module._nobody.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def accounts_of(store: Store, confirm: bool = False) -> Accounts:
    return Accounts(store, "https://papers.example.org/", confirm=confirm)


def rows(store: Store, table) -> list:
    with store.reading() as session:
        return list(session.scalars(select(table)))


def tokens(store: Store, to: str = ADA) -> list[str]:
    """The tokens in the mails to an address, in the order they were put in the outbox."""
    with store.reading() as session:
        texts = session.scalars(select(MailRow.text).where(MailRow.recipient == to).order_by(MailRow.id)).all()
    return [re.search(r"https://papers\.example\.org/login/link/(\S+)", text)[1] for text in texts]


def test_who_registers_can_log_in_and_out(store):
    accounts = accounts_of(store)
    user = accounts.register("Ada@Example.org ", SECRET)
    assert (user.email, user.confirmed) == (ADA, False)
    token = accounts.login("ADA@example.org", SECRET)
    other = accounts.login(ADA, SECRET)
    assert accounts.user(token) == accounts.user(other) == user
    accounts.logout(token)
    assert accounts.user(token) is None and accounts.user(other) == user
    accounts.logout(token)
    accounts.logout(None)
    assert accounts.user(None) is accounts.user("") is accounts.user("no such token") is None


def test_a_password_is_kept_as_argon2id(store, monkeypatch):
    monkeypatch.undo()
    accounts_of(store).register(ADA, SECRET)
    [row] = rows(store, UserRow)
    kept = extract_parameters(row.password)
    # RFC 9106's second recommendation: 64 MiB, three passes.
    assert (kept.type, kept.memory_cost, kept.time_cost) == (Type.ID, 65536, 3)
    assert SECRET not in row.password


def test_a_password_hashed_more_weakly_is_hashed_anew_at_login(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    weak = PasswordHasher(time_cost=1, memory_cost=512, parallelism=1).hash(SECRET)
    with store.writing() as session:
        session.execute(text("UPDATE users SET password = :weak"), {"weak": weak})
    accounts.login(ADA, SECRET)
    assert extract_parameters(rows(store, UserRow)[0].password).memory_cost == 1024
    accounts.login(ADA, SECRET)


def test_the_same_password_composed_otherwise_is_the_same(store):
    accounts = accounts_of(store)
    accounts.register(ADA, "pässwörd!")
    assert accounts.login(ADA, "pa\u0308sswo\u0308rd!")


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_a_password_too_short_or_too_long_is_refused(store, password):
    with pytest.raises(UsageError, match=rf"8 to 1024 characters, not {len(password)}"):
        accounts_of(store).register(ADA, password)


def test_a_wrong_password_and_an_unknown_address_get_the_same_answer(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    answers = set()
    for email, password in [(ADA, "wrong horse"), (BOB, SECRET), (ADA, ""), ("no address", SECRET), (ADA, "x" * 5000)]:
        with pytest.raises(UsageError) as refused:
            accounts.login(email, password)
        answers.add(str(refused.value))
    assert len(answers) == 1


def test_an_unknown_address_costs_a_hash_as_a_known_one_does(store, monkeypatch):
    accounts = accounts_of(store, confirm=True)
    accounts.request_link(ADA)
    accounts.login_by_link(tokens(store)[0])
    accounts_of(store).register(BOB, SECRET)
    verified = []
    real = module._hasher()
    seen = SimpleNamespace(
        hash=real.hash,
        check_needs_rehash=real.check_needs_rehash,
        verify=lambda known, password: verified.append(known) or real.verify(known, password),
    )
    monkeypatch.setattr(module, "_hasher", lambda: seen)
    for email in (ADA, BOB, "nobody@example.org"):
        with pytest.raises(UsageError):
            accounts.login(email, "wrong horse")
    costs = [extract_parameters(known) for known in verified]
    assert len(costs) == 3 and costs[0] == costs[1] == costs[2]


def test_with_confirmation_registering_tells_nobody_who_has_an_account(store):
    accounts = accounts_of(store, confirm=True)
    assert accounts.register(ADA, SECRET) is None
    with pytest.raises(UsageError, match="do not go together"):
        accounts.login(ADA, SECRET)
    session = accounts.login_by_link(tokens(store)[0])
    assert accounts.user(session).confirmed and accounts.user(accounts.login(ADA, SECRET)).email == ADA
    # Again, by another: the same answer, a mail to the owner, and the password stays.
    assert accounts.register(ADA, "evil password") is None
    accounts.login_by_link(tokens(store)[1])
    accounts.login(ADA, SECRET)
    with pytest.raises(UsageError):
        accounts.login(ADA, "evil password")
    assert [row.subject for row in rows(store, MailRow)] == [
        "Confirm your account at Paperworks", "You have an account at Paperworks",
    ]  # fmt: skip


def test_without_confirmation_a_taken_address_is_refused(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    with pytest.raises(UsageError, match="has an account already"):
        accounts.register(ADA.upper(), "another secret")
    accounts.login(ADA, SECRET)


def test_addresses_are_confirmed_where_there_is_a_mail_server(store, monkeypatch):
    assert Accounts(store, "https://example.org").register(ADA, SECRET) is not None
    monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://127.0.0.1")
    assert Accounts(store, "https://example.org").register(BOB, SECRET) is None


def test_a_link_logs_in_once_with_or_without_an_account(store):
    accounts = accounts_of(store, confirm=True)
    for _ in range(2):
        accounts.request_link(ADA)
    first, second = tokens(store)
    user = accounts.user(accounts.login_by_link(first))
    assert (user.email, user.confirmed) == (ADA, True)
    for used in (first, "no such token", ""):
        with pytest.raises(UsageError, match="used already or is more than an hour old"):
            accounts.login_by_link(used)
    assert accounts.user(accounts.login_by_link(second)) == user
    # Who has no password logs in by none.
    for password in ("", SECRET):
        with pytest.raises(UsageError):
            accounts.login(ADA, password)


def test_a_request_looks_the_same_whether_or_not_there_is_an_account(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    assert accounts.request_link(ADA) is accounts.request_link(BOB) is None
    ada, bob = rows(store, MailRow)
    assert (ada.subject, ada.text.replace(tokens(store)[0], "")) == (
        bob.subject, bob.text.replace(tokens(store, BOB)[0], ""),
    )  # fmt: skip


def test_links_and_sessions_expire(store, clock):
    accounts = accounts_of(store)
    accounts.request_link(ADA)
    accounts.request_link(ADA)
    early, late = tokens(store)
    clock.now += LINK_SECONDS - 1
    session = accounts.login_by_link(early)
    clock.now += 1
    with pytest.raises(UsageError, match="more than an hour old"):
        accounts.login_by_link(late)
    clock.now += SESSION_SECONDS - 2
    assert accounts.user(session) is not None
    clock.now += 1
    assert accounts.user(session) is None
    # What has expired is not kept for ever.
    accounts.request_link(ADA)
    accounts.login_by_link(tokens(store)[-1])
    assert len(rows(store, SessionRow)) == 1 and rows(store, LoginLinkRow) == []


def test_the_owner_of_an_address_takes_over_what_another_registered_with_it(store):
    accounts = accounts_of(store)
    accounts.register(ADA, "evil password")
    evil = accounts.login(ADA, "evil password")
    accounts.request_link(ADA)
    session = accounts.login_by_link(tokens(store)[0])
    assert accounts.user(session).confirmed
    assert accounts.user(evil) is None
    with pytest.raises(UsageError):
        accounts.login(ADA, "evil password")


def test_a_registration_still_open_does_not_change_an_account_made_meanwhile(store):
    accounts = accounts_of(store, confirm=True)
    accounts.register(ADA, "evil password")
    accounts.request_link(ADA)
    evil, own = tokens(store)
    accounts.login_by_link(own)
    accounts.login_by_link(evil)
    with pytest.raises(UsageError):
        accounts.login(ADA, "evil password")


def test_tokens_are_256_random_bits_and_only_their_hash_is_kept(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    sessions = {accounts.login(ADA, SECRET) for _ in range(20)}
    accounts.request_link(ADA)
    [link] = tokens(store)
    assert len(sessions) == 20
    bits = [bin(int.from_bytes(_decoded(token), "big")).count("1") for token in sessions | {link}]
    assert {len(_decoded(token)) for token in sessions | {link}} == {32}
    assert 118 < statistics.mean(bits) < 138
    kept = {row.token_hash for row in rows(store, SessionRow)} | {row.token_hash for row in rows(store, LoginLinkRow)}
    assert len(kept) == 21 and not kept & (sessions | {link})


def test_nobodys_mailbox_is_filled(store, clock):
    accounts = accounts_of(store)
    for _ in range(10):
        assert accounts.request_link(ADA) is None
    assert len(tokens(store)) == 3
    clock.now += LINK_SECONDS + 1
    accounts.request_link(ADA)
    assert len(tokens(store)) == 4


@pytest.mark.parametrize("call", ["register", "request_link"])
def test_what_is_no_address_is_refused(store, call):
    arguments = ("nobody", SECRET) if call == "register" else ("nobody",)
    with pytest.raises(UsageError, match="is no e-mail address"):
        getattr(accounts_of(store), call)(*arguments)


def _decoded(token: str) -> bytes:
    from base64 import urlsafe_b64decode

    return urlsafe_b64decode(token + "=")
