"""Accounts: passwords, links by mail, sessions, and what they tell to nobody."""

from __future__ import annotations

import re
import statistics
import threading
from types import SimpleNamespace

import pytest
from argon2 import PasswordHasher, Type, extract_parameters
from sqlalchemy import event, select, text

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import accounts as module
from paperworks.page.accounts import GUESS_SECONDS, GUESSES, LINK_SECONDS, LINKS, SESSION_SECONDS, Accounts
from paperworks.page.places import BusyError
from paperworks.page.subscriptions import Subscriptions
from paperworks.page.tables import GuessRow, LoginLinkRow, MailRow, SessionRow, SubscriptionRow, UserRow

ADA, BOB, SECRET, NEW = "ada@example.org", "bob@example.org", "correct horse", "battery staple"
SPENT = "used already, has been replaced by a newer one or is more than an hour old"


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


def accounts_of(store: Store, confirms: bool = False) -> Accounts:
    return Accounts(store, "https://papers.example.org/", confirms=confirms)


def registered(store: Store, email: str = ADA, password: str = SECRET) -> Accounts:
    """Accounts of which one has been made by its owner."""
    accounts = accounts_of(store, confirms=True)
    accounts.request_password(email)
    accounts.set_password(tokens(store, email)[-1], password)
    return accounts


def rows(store: Store, table) -> list:
    with store.reading() as session:
        return list(session.scalars(select(table)))


def tokens(store: Store, to: str = ADA) -> list[str]:
    """The tokens in the mails to an address, in the order they were put in the outbox."""
    with store.reading() as session:
        texts = session.scalars(select(MailRow.text).where(MailRow.recipient == to).order_by(MailRow.id)).all()
    return [re.search(r"https://papers\.example\.org/(?:login/link|password)/(\S+)", text)[1] for text in texts]


def subjects(store: Store, to: str = ADA) -> list[str]:
    with store.reading() as session:
        return list(session.scalars(select(MailRow.subject).where(MailRow.recipient == to).order_by(MailRow.id)))


def test_who_registers_can_log_in_and_out(store):
    accounts = accounts_of(store)
    user = accounts.user(accounts.register("Ada@Example.org ", SECRET))
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
    accounts = registered(store)
    accounts.request_link(BOB)
    accounts.login_by_link(tokens(store, BOB)[0])
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


def test_a_password_is_chosen_behind_the_link_and_nowhere_else(store):
    accounts = accounts_of(store, confirms=True)
    with pytest.raises(UsageError, match="choose the password behind it"):
        accounts.register(ADA, "evil password")
    assert rows(store, UserRow) == [] and rows(store, MailRow) == []
    assert accounts.request_password(ADA) is None
    assert rows(store, UserRow) == [] and subjects(store) == ["Your account at Paperworks"]
    [token] = tokens(store)
    # Looking at it does not use it up.
    assert [accounts.link(token, "register") for _ in range(2)] == [module.Link("register", ADA)] * 2
    session = accounts.set_password(token, SECRET)
    assert accounts.user(session).confirmed and accounts.user(accounts.login(ADA, SECRET)).email == ADA
    for refused in (lambda: accounts.set_password(token, NEW), lambda: accounts.link(token, "register")):
        with pytest.raises(UsageError, match=SPENT):
            refused()
    accounts.login(ADA, SECRET)


def test_who_registers_an_address_that_has_an_account_gets_a_mail_that_says_so(store):
    accounts = registered(store)
    assert accounts.request_password(ADA) is None
    assert subjects(store) == ["Your account at Paperworks", "Your password at Paperworks"]
    assert "It has an account" in rows(store, MailRow)[1].text
    # Until the owner chooses another the password is the old one.
    accounts.login(ADA, SECRET)
    accounts.set_password(tokens(store)[1], NEW)
    accounts.login(ADA, NEW)
    with pytest.raises(UsageError):
        accounts.login(ADA, SECRET)


def test_a_link_that_replaces_a_password_ends_all_sessions_and_all_links(store):
    accounts = registered(store)
    thief = accounts.login(ADA, SECRET)
    accounts.request_link(ADA)
    accounts.request_password(ADA)
    _, log_in, reset = tokens(store)
    session = accounts.set_password(reset, NEW)
    assert accounts.user(thief) is None and accounts.user(session).email == ADA
    assert len(rows(store, SessionRow)) == 1
    with pytest.raises(UsageError, match=SPENT):
        accounts.login_by_link(log_in)


def test_the_newest_link_replaces_those_before(store):
    accounts = registered(store)
    accounts.request_password(ADA)
    accounts.request_password(ADA)
    _, old, new = tokens(store)
    for refused in (lambda: accounts.link(old, "reset"), lambda: accounts.set_password(old, NEW)):
        with pytest.raises(UsageError, match=SPENT):
            refused()
    # A link to log in, which others may ask for, leaves it alone.
    accounts.request_link(ADA)
    accounts.set_password(new, NEW)


def test_a_link_does_what_it_was_mailed_for_only(store):
    accounts = registered(store)
    accounts.request_link(ADA)
    accounts.request_password(ADA)
    accounts.request_password(BOB)
    (_, log_in, reset), [register] = tokens(store), tokens(store, BOB)
    for token, others in (
        (log_in, ("register", "reset")),
        (reset, ("login", "register")),
        (register, ("login", "reset")),
    ):
        with pytest.raises(UsageError, match=SPENT):
            accounts.link(token, *others)
    with pytest.raises(UsageError, match=SPENT):
        accounts.set_password(log_in, NEW)
    for token in (reset, register):
        with pytest.raises(UsageError, match=SPENT):
            accounts.login_by_link(token)
    # What was tried in vain is good still.
    assert accounts.link(reset, "reset").email == ADA and accounts.link(register, "register").email == BOB


def test_a_link_is_no_good_for_an_account_that_has_come_or_gone_since(store):
    accounts = registered(store)
    accounts.request_password(ADA)
    accounts.request_password(BOB)
    with store.writing() as session:
        session.execute(text("DELETE FROM users"))
        session.add(UserRow(email=BOB, created=1.0, confirmed=1.0))
    for token in (tokens(store)[-1], tokens(store, BOB)[0]):
        with pytest.raises(UsageError, match=SPENT):
            accounts.set_password(token, NEW)
    assert [(row.email, row.password) for row in rows(store, UserRow)] == [(BOB, None)]


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_a_link_is_used_once_though_many_use_it_at_the_same_time(store, store_url, known):
    accounts = registered(store) if known else accounts_of(store, confirms=True)
    accounts.request_password(ADA)
    token, done, start = tokens(store)[-1], [], threading.Barrier(6)

    def choose(number: int) -> None:
        with Store(store_url) as own:
            start.wait()
            try:
                done.append((number, accounts_of(own, confirms=True).set_password(token, f"password {number}")))
            except UsageError as error:
                assert "used already" in str(error)

    threads = [threading.Thread(target=choose, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [(number, session)] = done
    assert accounts.user(session).email == ADA and len(rows(store, UserRow)) == len(rows(store, SessionRow)) == 1
    accounts.login(ADA, f"password {number}")


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_a_password_that_will_not_do_leaves_the_link_good(store, password):
    accounts = accounts_of(store, confirms=True)
    accounts.request_password(ADA)
    with pytest.raises(UsageError, match="8 to 1024 characters"):
        accounts.set_password(tokens(store)[0], password)
    accounts.set_password(tokens(store)[0], SECRET)


def test_nothing_is_hashed_for_a_token_that_is_none(store, monkeypatch):
    accounts = accounts_of(store, confirms=True)
    monkeypatch.setattr(module, "_secret", lambda password: pytest.fail("a hash was made for nothing"))
    with pytest.raises(UsageError, match=SPENT):
        accounts.set_password("no such token", SECRET)


def test_changing_the_password_takes_the_old_one_and_ends_all_other_sessions(store):
    accounts = registered(store)
    here, elsewhere = accounts.login(ADA, SECRET), accounts.login(ADA, SECRET)
    user = accounts.user(here)
    for old, new, told in ((NEW, NEW, "is not the password that you have"), (SECRET, "short", "8 to 1024 characters")):
        with pytest.raises(UsageError, match=told):
            accounts.change_password(user, old, new)
    assert accounts.user(elsewhere) == user
    session = accounts.change_password(user, SECRET, NEW)
    assert accounts.user(session) == user
    assert accounts.user(here) is accounts.user(elsewhere) is None
    accounts.login(ADA, NEW)
    with pytest.raises(UsageError):
        accounts.login(ADA, SECRET)


def test_who_logs_in_by_links_has_no_old_password_to_guess(store):
    accounts = accounts_of(store, confirms=True)
    accounts.request_link(ADA)
    user = accounts.user(accounts.login_by_link(tokens(store)[0]))
    assert not accounts.has_password(user)
    for old in ("", SECRET):
        with pytest.raises(UsageError, match="ask for a link to your mailbox"):
            accounts.change_password(user, old, NEW)
    accounts.request_password(ADA)
    accounts.set_password(tokens(store)[1], SECRET)
    assert accounts.has_password(user)


@pytest.mark.parametrize("way", ["login", "change"])
def test_a_password_replaced_while_it_is_looked_at_lets_nobody_in(store, monkeypatch, way):
    accounts = registered(store)
    user = accounts.user(accounts.login(ADA, SECRET))
    accounts.request_password(ADA)
    real, reset = module._fits, tokens(store)[-1]

    def meanwhile(password, known):
        monkeypatch.setattr(module, "_fits", real)
        accounts.set_password(reset, NEW)
        return real(password, known)

    monkeypatch.setattr(module, "_fits", meanwhile)
    with pytest.raises(UsageError):
        accounts.login(ADA, SECRET) if way == "login" else accounts.change_password(user, SECRET, "evil password")
    assert len(rows(store, SessionRow)) == 1
    accounts.login(ADA, NEW)


def test_without_confirmation_a_taken_address_is_refused(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    with pytest.raises(UsageError, match="has an account already"):
        accounts.register(ADA.upper(), "another secret")
    accounts.login(ADA, SECRET)


def test_addresses_are_confirmed_where_there_is_a_mail_server(store, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
    assert not Accounts(store, "https://example.org").confirms
    monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://127.0.0.1")
    assert Accounts(store, "https://example.org").confirms


def test_a_link_logs_in_once_with_or_without_an_account(store):
    accounts = accounts_of(store, confirms=True)
    accounts.request_link(ADA)
    [first] = tokens(store)
    user = accounts.user(accounts.login_by_link(first))
    assert (user.email, user.confirmed) == (ADA, True)
    for used in (first, "no such token", ""):
        with pytest.raises(UsageError, match=SPENT):
            accounts.login_by_link(used)
    accounts.request_link(ADA)
    assert accounts.user(accounts.login_by_link(tokens(store)[1])) == user
    # Who has no password logs in by none.
    for password in ("", SECRET):
        with pytest.raises(UsageError):
            accounts.login(ADA, password)


def test_what_is_asked_and_answered_is_the_same_whether_or_not_there_is_an_account(store):
    accounts = registered(store)
    accounts_of(store).register("unconfirmed@example.org", SECRET)
    # Those who have had their mails too.
    for email in (ADA, BOB):
        for _ in range(LINKS):
            accounts.request_link(f"full.{email}")
    statements: list[str] = []

    def note(connection, cursor, statement, parameters, context, many):
        statements.append(statement)

    event.listen(store._engine, "before_cursor_execute", note)
    done = {}
    for ask in (accounts.request_password, accounts.request_link):
        for email in (ADA, BOB, "unconfirmed@example.org"):
            statements.clear()
            assert ask(email) is None
            done.setdefault(ask, []).append(list(statements))
    for email in (ADA, BOB, "unconfirmed@example.org"):
        statements.clear()
        with pytest.raises(UsageError):
            accounts.login(email, "wrong horse")
        done.setdefault("login", []).append(list(statements))
    for way, (known, unknown, unconfirmed) in done.items():
        assert known == unknown == unconfirmed and len(known) > 3, way
    links = [mail for mail in rows(store, MailRow) if mail.subject == "Log in to Paperworks"]
    told = {re.sub(r"link/\S+", "", mail.text) for mail in links}
    assert len(links) > 3 and len(told) == 1


def test_links_and_sessions_expire(store, clock):
    accounts = accounts_of(store)
    accounts.request_link(ADA)
    accounts.request_link(BOB)
    accounts.request_password("eve@example.org")
    [early], [late], [password] = tokens(store), tokens(store, BOB), tokens(store, "eve@example.org")
    clock.now += LINK_SECONDS - 1
    session = accounts.login_by_link(early)
    clock.now += 1
    with pytest.raises(UsageError, match="more than an hour old"):
        accounts.login_by_link(late)
    with pytest.raises(UsageError, match="more than an hour old"):
        accounts.set_password(password, SECRET)
    clock.now += SESSION_SECONDS - 2
    assert accounts.user(session) is not None
    clock.now += 1
    assert accounts.user(session) is None
    # What has expired is not kept for ever.
    accounts.request_link(ADA)
    accounts.login_by_link(tokens(store)[-1])
    assert len(rows(store, SessionRow)) == 1 and rows(store, LoginLinkRow) == []


@pytest.mark.parametrize("way", ["login", "password"])
def test_the_owner_of_an_address_takes_over_what_another_registered_with_it(store, way):
    accounts = accounts_of(store)
    accounts.register(ADA, "evil password")
    evil = accounts.login(ADA, "evil password")
    if way == "login":
        accounts.request_link(ADA)
        session = accounts.login_by_link(tokens(store)[0])
    else:
        accounts.request_password(ADA)
        assert subjects(store) == ["Your account at Paperworks"]
        session = accounts.set_password(tokens(store)[0], SECRET)
    assert accounts.user(session).confirmed
    assert accounts.user(evil) is None
    with pytest.raises(UsageError):
        accounts.login(ADA, "evil password")


def test_tokens_are_256_random_bits_and_only_their_hash_is_kept(store):
    accounts = accounts_of(store)
    accounts.register(ADA, SECRET)
    sessions = {accounts.login(ADA, SECRET) for _ in range(20)}
    accounts.request_link(ADA)
    [link] = tokens(store)
    # The one of registering is another.
    assert len(sessions) == 20
    bits = [bin(int.from_bytes(_decoded(token), "big")).count("1") for token in sessions | {link}]
    assert {len(_decoded(token)) for token in sessions | {link}} == {32}
    assert 118 < statistics.mean(bits) < 138
    kept = {row.token_hash for row in rows(store, SessionRow)} | {row.token_hash for row in rows(store, LoginLinkRow)}
    assert len(kept) == 22 and not kept & (sessions | {link})


@pytest.mark.parametrize("kind", ["login", "password"])
def test_nobodys_mailbox_is_filled_and_its_owner_gets_in_all_the_same(store, clock, kind):
    accounts = registered(store)
    ask = accounts.request_link if kind == "login" else accounts.request_password
    use = accounts.login_by_link if kind == "login" else lambda token: accounts.set_password(token, NEW)
    for _ in range(10):
        assert ask(ADA) is None
    assert len(tokens(store)) == 1 + LINKS
    # What others have asked for keeps the owner from nothing: the last link is in the mailbox, and good.
    clock.now += LINK_SECONDS - 1
    ask(ADA)
    use(tokens(store)[-1])
    assert len(tokens(store)) == 1 + LINKS
    # Who has been there can ask again at once.
    ask(ADA)
    use(tokens(store)[-1])
    assert len(tokens(store)) == 2 + LINKS
    for _ in range(10):
        ask(ADA)
    assert len(tokens(store)) == 2 + 2 * LINKS
    clock.now += LINK_SECONDS
    ask(ADA)
    assert len(tokens(store)) == 3 + 2 * LINKS


def test_links_of_one_kind_do_not_use_up_those_of_the_other(store):
    accounts = registered(store)
    for _ in range(10):
        accounts.request_link(ADA)
    accounts.request_password(ADA)
    accounts.set_password(tokens(store)[-1], NEW)


def test_guesses_are_braked_by_account_whoever_makes_them_and_fill_again(store, clock):
    accounts = registered(store)
    for email in (ADA, BOB):
        for _ in range(GUESSES):
            with pytest.raises(UsageError, match="do not go together"):
                accounts.login(email, "wrong horse")
        # The right one too: an answer to it would be one more guess.
        for password in ("wrong horse", SECRET):
            with pytest.raises(BusyError, match="wait 10 min, or log in by a link to your mailbox") as refused:
                accounts.login(email, password)
            assert refused.value.retry_after == GUESS_SECONDS
    clock.now += GUESS_SECONDS
    with pytest.raises(UsageError, match="do not go together"):
        accounts.login(ADA, "wrong horse")
    with pytest.raises(BusyError):
        accounts.login(ADA, SECRET)
    clock.now += GUESS_SECONDS
    accounts.login(ADA, SECRET)
    # Right ones are not counted, wrong ones stay so.
    accounts.login(ADA, SECRET)
    with pytest.raises(UsageError, match="do not go together"):
        accounts.login(ADA, "wrong horse")
    with pytest.raises(BusyError):
        accounts.login(ADA, SECRET)


def test_who_guesses_locks_no_owner_out(store):
    accounts = registered(store)
    for _ in range(GUESSES + 1):
        with pytest.raises((UsageError, BusyError)):
            accounts.login(ADA, "wrong horse")
    # In a browser that has been there before, by a link, and by a new password.
    user = accounts.user(accounts.login(ADA, SECRET, browser="Ada's"))
    accounts.request_link(ADA)
    assert accounts.user(accounts.login_by_link(tokens(store)[-1])) == user
    assert accounts.user(accounts.change_password(user, SECRET, NEW)) == user
    accounts.request_password(ADA)
    assert accounts.user(accounts.set_password(tokens(store)[-1], SECRET)) == user
    # Such a browser is not free to guess either.
    for _ in range(GUESSES):
        with pytest.raises(UsageError, match="do not go together"):
            accounts.login(ADA, "wrong horse", browser="Ada's")
    with pytest.raises(BusyError):
        accounts.login(ADA, SECRET, browser="Ada's")


def test_the_old_password_is_not_guessed_by_who_has_stolen_a_session(store):
    accounts = registered(store)
    thief = accounts.user(accounts.login(ADA, SECRET))
    for _ in range(GUESSES):
        with pytest.raises(UsageError, match="is not the password that you have"):
            accounts.change_password(thief, "wrong horse", NEW)
    with pytest.raises(BusyError, match="ask for a link to your mailbox"):
        accounts.change_password(thief, SECRET, NEW)


def test_guesses_at_the_same_time_all_count(store, store_url):
    registered(store)
    told: list[type] = []

    def guess() -> None:
        with Store(store_url) as own:
            for _ in range(3):
                try:
                    accounts_of(own, confirms=True).login(ADA, "wrong horse")
                except (UsageError, BusyError) as error:
                    told.append(type(error))

    threads = [threading.Thread(target=guess) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (told.count(UsageError), told.count(BusyError)) == (GUESSES, 18 - GUESSES)


def test_of_guesses_no_address_is_kept_and_nothing_for_long(store, clock):
    accounts = accounts_of(store, confirms=True)
    for number in range(3):
        with pytest.raises(UsageError):
            accounts.login(f"reader{number}@example.org", "wrong horse")
    kept = rows(store, GuessRow)
    assert len(kept) == 3 and not any("example" in row.key for row in kept)
    clock.now += GUESSES * GUESS_SECONDS
    with pytest.raises(UsageError):
        accounts.login(ADA, "wrong horse")
    assert len(rows(store, GuessRow)) == 1


def test_a_store_from_before_loses_the_passwords_that_may_be_a_strangers(store_url, monkeypatch):
    """Passwords were chosen at registration then, and became valid when the owner opened the link."""
    from alembic import command

    from paperworks.lab import store as store_module

    upgrade = command.upgrade
    monkeypatch.setattr(store_module, "SCHEMA", "0004")
    monkeypatch.setattr(command, "upgrade", lambda config, revision: upgrade(config, "0004"))
    with Store(store_url) as old, old.writing() as session:
        for id, email, confirmed in ((1, ADA, "5"), (2, BOB, "NULL")):
            session.execute(text(f"INSERT INTO users VALUES ({id}, '{email}', 'hash', 1, {confirmed})"))
            session.execute(text(f"INSERT INTO sessions VALUES ('{email}', {id}, 4e9)"))
        session.execute(text(f"INSERT INTO login_links VALUES ('token', '{ADA}', 'a stranger''s hash', 4e9)"))
    monkeypatch.undo()
    with Store(store_url) as store:
        assert {(row.email, row.password) for row in rows(store, UserRow)} == {(ADA, None), (BOB, "hash")}
        assert [row.token_hash for row in rows(store, SessionRow)] == [BOB]
        assert rows(store, LoginLinkRow) == []


@pytest.mark.parametrize("email", ["\u212aate@example.org", "kate@ex\u0430mple.org", "kat\u00e9@example.org"])
def test_an_address_that_only_looks_like_another_is_none(store, email):
    accounts = registered(store, "kate@example.org")
    for ask in (accounts.request_password, accounts.request_link):
        with pytest.raises(UsageError, match="is no e-mail address"):
            ask(email)
    with pytest.raises(UsageError, match="do not go together"):
        accounts.login(email, SECRET)


@pytest.mark.parametrize("call", ["register", "request_link", "request_password"])
def test_what_is_no_address_is_refused(store, call):
    arguments = ("nobody", SECRET) if call == "register" else ("nobody",)
    with pytest.raises(UsageError, match="is no e-mail address"):
        getattr(accounts_of(store), call)(*arguments)


def _decoded(token: str) -> bytes:
    from base64 import urlsafe_b64decode

    return urlsafe_b64decode(token + "=")


def test_a_link_keeps_where_it_leads_and_the_vote_and_tells_them_to_who_opens_it(store):
    accounts = accounts_of(store, confirms=True)
    accounts.request_password(ADA, next="/search?q=a", vote="2402.05109")
    accounts.request_link(ADA, next="/reading")
    register, login = tokens(store)
    assert accounts.link(register, "register") == module.Link("register", ADA, "/search?q=a", "2402.05109")
    assert accounts.link(login, "login") == module.Link("login", ADA, "/reading", "")


def test_all_sessions_of_an_account_end_and_no_others(store):
    accounts = registered(store)
    ada, again = accounts.login(ADA, SECRET), accounts.login(ADA, SECRET)
    bob = registered(store, BOB).login(BOB, SECRET)
    accounts.end_sessions(accounts.user(ada))
    assert accounts.user(ada) is accounts.user(again) is None and accounts.user(bob).email == BOB


def test_a_deleted_account_takes_with_it_what_is_its_own_and_only_that(store):
    accounts = registered(store)
    registered(store, BOB)
    token, other = accounts.login(ADA, SECRET), accounts.login(BOB, SECRET)
    ada = accounts.user(token)
    for email in (ADA, BOB):
        Subscriptions(store, "https://papers.example.org").subscribe(email, owned=True)
        accounts.request_link(email)
    links = tokens(store)
    with pytest.raises(UsageError, match="is not the password that you have"):
        accounts.delete(ada, NEW)
    accounts.delete(ada, SECRET)
    assert accounts.user(token) is None and accounts.user(other).email == BOB
    assert [row.email for row in rows(store, UserRow)] == [row.email for row in rows(store, SubscriptionRow)] == [BOB]
    assert {row.recipient for row in rows(store, MailRow)} == {BOB}
    # A link that was mailed before brings nothing back.
    with pytest.raises(UsageError, match=SPENT):
        accounts.login_by_link(links[-1])
    with pytest.raises(UsageError, match="is not the password that you have"):
        accounts.delete(ada, SECRET)


def test_of_an_address_that_is_not_confirmed_the_owners_things_stay(store):
    Subscriptions(store, "https://papers.example.org").subscribe(ADA, owned=True)
    accounts = accounts_of(store)
    accounts.delete(accounts.user(accounts.register(ADA, SECRET)), SECRET)
    assert rows(store, UserRow) == [] and [row.email for row in rows(store, SubscriptionRow)] == [ADA]


def test_guesses_at_the_password_that_deletes_an_account_are_counted(store, clock):
    accounts = registered(store)
    ada = accounts.user(accounts.login(ADA, SECRET))
    for _ in range(GUESSES):
        with pytest.raises(UsageError):
            accounts.delete(ada, NEW)
    with pytest.raises(BusyError, match="too many passwords were tried"):
        accounts.delete(ada, SECRET)
    assert [row.email for row in rows(store, UserRow)] == [ADA]
