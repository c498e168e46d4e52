"""Accounts: who votes, starts runs and submits papers."""

from __future__ import annotations

import os
import time
import unicodedata
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Literal

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.mail import Mail, Outbox, address, letter
from paperworks.page.places import BusyError
from paperworks.page.tables import GuessRow, LoginLinkRow, MailRow, SessionRow, SubscriptionRow, UserRow
from paperworks.page.tokens import hashed, new_token

Kind = Literal["login", "register", "reset"]
SESSION_SECONDS = 30 * 86400
LINK_SECONDS = 3600
# Mailed to an address while they are good, so that nobody's mailbox can be filled from here.
LINKS = 3
# At an account's password, and how long until one more.
GUESSES, GUESS_SECONDS = 10, 600.0
PASSWORD_LENGTHS = range(8, 1025)
_LOGIN: tuple[Kind, ...] = ("login",)
_PASSWORD: tuple[Kind, ...] = ("register", "reset")
_NOT_YOURS = "this is not the password that you have; check it, or ask for a link to your mailbox that replaces it"
_WRONG = "this address and password do not go together; check both, or log in by a link to your mailbox"
_SPENT = "this link was used already, has been replaced by a newer one or is more than an hour old; ask for a new one"


@dataclass(frozen=True)
class User:
    """A person with an account.

    Attributes:
        id: Number of the account.
        email: Their address.
        confirmed: Whether they have shown that it is theirs, by opening a link mailed to it.
    """

    id: int
    email: str
    confirmed: bool


@dataclass(frozen=True)
class Link:
    """A mailed link that is good still.

    Attributes:
        kind: What it does: "login" logs in, "register" makes an account with a password, "reset" replaces a password.
        email: The address that it was mailed to.
        next: Where it leads on to, a path as it was asked for.
        vote: Key of the paper that it votes for; empty for none.
    """

    kind: Kind
    email: str
    next: str = "/"
    vote: str = ""


class Accounts:
    """Accounts in a store: by password (argon2id) or by links to a mailbox, and the sessions of who is logged in.

    Whoever asks for an account gives its address alone. The password is chosen by who opens the link that is mailed
    there. Tokens of sessions and links are 256 random bits, of which the store keeps a hash; they expire, a link is
    good once, and the newest of a kind replaces the others. Whether an address has an account shows in no answer.

    Args:
        store: The lab's store.
        base_url: Address of the page, which links in mails begin with.
        confirms: Whether addresses are confirmed by mail; by default where PAPERWORKS_SMTP names a mail server, for
            without one nobody would ever get in. Elsewhere an address is taken at its word, with a password, until
            a link that was mailed to it is opened.

    Attributes:
        confirms: Whether addresses are confirmed by mail.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        ...     accounts = Accounts(store, "https://example.org", confirms=False)
        ...     accounts.user(accounts.register("ada@example.org", "a long secret"))
        ...     accounts.user(accounts.login("ada@example.org", "a long secret")).email
        User(id=1, email='ada@example.org', confirmed=False)
        'ada@example.org'
    """

    def __init__(self, store: Store, base_url: str, *, confirms: bool | None = None) -> None:
        self._store = store
        self._base_url = base_url.rstrip("/")
        self.confirms = bool(os.environ.get("PAPERWORKS_SMTP")) if confirms is None else confirms
        self._outbox = Outbox(store)

    def register(self, email: str, password: str) -> str:
        """Make an account with a password at once, where addresses are not confirmed.

        Args:
            email: The address.
            password: Between 8 and 1024 characters.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: The address or the password is none that can be used, the address has an account, or
                addresses are confirmed here.
        """
        if self.confirms:
            raise UsageError("addresses are confirmed here: ask for a link by mail, and choose the password behind it")
        email, secret = address(email), _secret(password)
        with self._store.writing(alone=True) as session:
            if _row(session, email) is not None:
                raise UsageError(f"{email} has an account already; log in, or choose another address")
            row = UserRow(email=email, password=secret, created=time.time())
            session.add(row)
            session.flush()
            return _new_session(session, row.id)

    def request_password(self, email: str, *, next: str = "/", vote: str = "") -> None:
        """Mail a link behind which a password is chosen: it makes an account, or replaces the password of one.

        Nothing tells which of both; three such links an hour are mailed to an address, and the last stays good.

        Args:
            email: The address.
            next: Where it leads on to.
            vote: Key of the paper that is voted for then; its page tells so.

        Raises:
            UsageError: The address is none.
        """
        self._mail_link(address(email), _PASSWORD, next, vote)

    def request_link(self, email: str, *, next: str = "/", vote: str = "") -> None:
        """Mail a link that logs in, three an hour to an address; who has no account gets one by opening it.

        Args:
            email: The address.
            next: Where it leads on to.
            vote: Key of the paper that is voted for then; its page tells so.

        Raises:
            UsageError: The address is none.
        """
        self._mail_link(address(email), _LOGIN, next, vote)

    def link(self, token: str, *kinds: Kind) -> Link:
        """What a mailed link is for, which leaves it as it is: programs that look through mail open links.

        Raises:
            UsageError: The link is of none of these kinds, was used or replaced, is too old or is none.
        """
        with self._store.reading() as session:
            return _good(session, token, kinds)

    def login_by_link(self, token: str) -> str:
        """Log in by the token of a mailed link, which uses it up.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: The link does not log in, was used or replaced, is too old or is none.
        """
        now = time.time()
        with self._store.writing(alone=True) as session:
            row = _owner(session, _used(session, token, _LOGIN), now)
            if row.confirmed is None:
                # Whoever registered had not shown that the address is theirs; its owner has, and begins anew.
                row.password, row.confirmed = None, now
                _end_sessions(session, row)
            return _new_session(session, row.id)

    def set_password(self, token: str, password: str) -> str:
        """Choose the password behind a mailed link, which uses it up and ends all sessions that there were.

        Args:
            token: The token of the link.
            password: Between 8 and 1024 characters; another leaves the link good.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: The password is none that can be used, or the link sets none, was used or replaced, is too old
                or is none.
        """
        # Before the work of hashing, which nobody gets for nothing.
        self.link(token, *_PASSWORD)
        secret, now = _secret(password), time.time()
        with self._store.writing(alone=True) as session:
            row = _owner(session, _used(session, token, _PASSWORD), now)
            row.password, row.confirmed = secret, row.confirmed or now
            _end_sessions(session, row)
            return _new_session(session, row.id)

    def login(self, email: str, password: str, browser: str = "") -> str:
        """Log in by password.

        Args:
            email: The address.
            password: The password.
            browser: A name for a browser that has been logged in to this account before. Its guesses are counted by
                themselves, so that strangers who guess do not keep the owner out.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: Address and password do not go together; the sentence and the time it takes are the same
                whether or not the address has an account.
            BusyError: Too many were tried, whether or not the address has an account.
        """
        try:
            email = address(email)
        except UsageError:
            raise UsageError(_WRONG) from None
        key = hashed(f"login {email} {browser}")
        self._guess(key, "log in by a link to your mailbox")
        with self._store.reading() as session:
            row = _row(session, email)
        known = row.password if row is not None else None
        fits = _fits(password, known or _nobody())
        if row is None or known is None or not fits:
            raise UsageError(_WRONG)
        stronger = _hasher().hash(_normal(password)) if _hasher().check_needs_rehash(known) else known
        with self._store.writing(alone=True) as session:
            _replace(session, row.id, known, stronger, _WRONG)
            _forgive(session, key)
            return _new_session(session, row.id)

    def change_password(self, user: User, old: str, new: str) -> str:
        """Replace a password by who knows it, which ends all sessions that there were.

        Args:
            user: Whose it is.
            old: The password so far.
            new: Between 8 and 1024 characters.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: The old password is wrong, or the new one is none that can be used.
            BusyError: Too many old ones were tried.
        """
        _check(new)
        key, known = self._shown(user, old)
        secret = _secret(new)
        with self._store.writing(alone=True) as session:
            _end_sessions(session, _replace(session, user.id, known, secret, _NOT_YOURS))
            _forgive(session, key)
            return _new_session(session, user.id)

    def end_sessions(self, user: User) -> None:
        """Log out every browser of an account."""
        with self._store.writing() as session:
            session.execute(delete(SessionRow).where(SessionRow.user_id == user.id))

    def delete(self, user: User, password: str) -> None:
        """Delete an account for who knows its password, with its votes, its reading list and its sessions.

        Its runs stay, and nobody's name with them. Where the address was confirmed, its subscriptions and the mails that
        were put for it go too.

        Raises:
            UsageError: The password is wrong, or the account has none.
            BusyError: Too many were tried.
        """
        _, known = self._shown(user, password)
        with self._store.writing(alone=True) as session:
            row = session.get(UserRow, user.id)
            if row is None or row.password != known:
                raise UsageError(_NOT_YOURS)
            if row.confirmed is not None:
                session.execute(delete(SubscriptionRow).where(SubscriptionRow.email == row.email))
                session.execute(delete(MailRow).where(MailRow.recipient == row.email, MailRow.status != "sending"))
            # They stay as long as they would, so that mails can be counted, and are good for nothing.
            session.execute(update(LoginLinkRow).where(LoginLinkRow.email == row.email).values(replaced=True))
            # What hangs on it goes or forgets it by the database's own rules.
            session.execute(delete(UserRow).where(UserRow.id == row.id))

    def _shown(self, user: User, password: str) -> tuple[str, str]:
        """The key under which a guess at one's own password was counted, and the hash that it fits."""
        key = hashed(f"change {user.id}")
        self._guess(key, "ask for a link to your mailbox that replaces it")
        with self._store.reading() as session:
            known = session.scalar(select(UserRow.password).where(UserRow.id == user.id))
        if known is None or not _fits(password, known):
            raise UsageError(_NOT_YOURS)
        return key, known

    def has_password(self, user: User) -> bool:
        """Whether an account has a password, or is logged in to by links only."""
        with self._store.reading() as session:
            return session.scalar(select(UserRow.password).where(UserRow.id == user.id)) is not None

    def user(self, session_token: str | None) -> User | None:
        """Who is logged in with this token; None where nobody is, or no longer."""
        if not session_token:
            return None
        query = select(UserRow).join(SessionRow, SessionRow.user_id == UserRow.id)
        current = (SessionRow.token_hash == hashed(session_token), SessionRow.expires > time.time())
        with self._store.reading() as session:
            row = session.scalar(query.where(*current))
        return None if row is None else _user(row)

    def logout(self, session_token: str | None) -> None:
        """End a session; nothing happens where there is none."""
        if session_token:
            with self._store.writing() as session:
                session.execute(delete(SessionRow).where(SessionRow.token_hash == hashed(session_token)))

    def _guess(self, key: str, cure: str) -> None:
        """Count a guess before it is looked at, so that many at the same time count too."""
        now = time.time()
        with self._store.writing(alone=True) as session:
            session.execute(delete(GuessRow).where(GuessRow.at <= now - GUESSES * GUESS_SECONDS))
            row = session.get(GuessRow, key)
            if row is None:
                row = GuessRow(key=key, remaining=float(GUESSES), at=now)
                session.add(row)
            row.remaining = min(float(GUESSES), row.remaining + max(0.0, now - row.at) / GUESS_SECONDS)
            row.at = now
            if row.remaining < 1:
                seconds = ceil((1 - row.remaining) * GUESS_SECONDS)
                told = f"too many passwords were tried: wait {ceil(seconds / 60)} min, or {cure}"
                raise BusyError(told, retry_after=seconds)
            row.remaining -= 1

    def _mail_link(self, email: str, kinds: tuple[Kind, ...], next: str, vote: str) -> None:
        now, token = time.time(), new_token()
        same = (LoginLinkRow.email == email, LoginLinkRow.kind.in_(kinds))
        with self._store.writing(alone=True) as session:
            session.execute(delete(LoginLinkRow).where(LoginLinkRow.expires <= now))
            mailed = session.scalar(select(func.count()).select_from(LoginLinkRow).where(*same)) or 0
            if mailed >= LINKS:
                # The last of them is good still, for all go when one is used: the owner of the mailbox has it.
                return
            confirmed = session.scalar(select(UserRow.confirmed).where(UserRow.email == email)) is not None
            kind: Kind = "login" if kinds == _LOGIN else "reset" if confirmed else "register"
            session.execute(update(LoginLinkRow).where(*same).values(replaced=True))
            session.add(
                LoginLinkRow(
                    token_hash=hashed(token), email=email, kind=kind, replaced=False, expires=now + LINK_SECONDS,
                    next=next, vote=vote,
                )
            )  # fmt: skip
            self._outbox.put(email, self._letter(kind, token), useful_for=LINK_SECONDS, session=session)

    def _letter(self, kind: Kind, token: str) -> Mail:
        """The mail with a link, which holds nothing that whoever asked for it has typed."""
        if kind == "login":
            subject, label, path = "Log in to Paperworks", "Log in", "login/link"
            told = ["Someone, probably you, asked for a link to log in to Paperworks."]
        elif kind == "register":
            subject, label, path = "Your account at Paperworks", "Choose a password", "password"
            told = ["Someone, probably you, wants an account at Paperworks with this address. Choose its password."]
        else:
            subject, label, path = "Your password at Paperworks", "Choose a new password", "password"
            told = [
                "Someone, probably you, wants a new password at Paperworks, or to register with this address.",
                "It has an account: log in as you are used to, or choose a new password. That logs out all browsers.",
            ]
        return letter(
            subject,
            paragraphs=told,
            link=f"{self._base_url}/{path}/{token}",
            label=label,
            small="The link works once, within an hour, unless a newer mail replaces it. "
            "If it was not you, do nothing: without it nothing happens.",
        )


@cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@cache
def _nobody() -> str:
    """A hash to compare with where there is no account, which takes as long."""
    return _hasher().hash(new_token())


def _check(password: str) -> None:
    if len(password) not in PASSWORD_LENGTHS:
        shortest, longest = PASSWORD_LENGTHS[0], PASSWORD_LENGTHS[-1]
        raise UsageError(f"a password has {shortest} to {longest} characters, not {len(password)}")


def _secret(password: str) -> str:
    """What is kept of a password."""
    _check(password)
    return _hasher().hash(_normal(password))


def _fits(password: str, known: str) -> bool:
    if len(password) > PASSWORD_LENGTHS[-1]:
        return False
    try:
        return _hasher().verify(known, _normal(password))
    except (VerificationError, InvalidHashError):
        return False


def _normal(password: str) -> bytes:
    """The same bytes for the same characters, however a keyboard composes them."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")


def _row(session: Session, email: str) -> UserRow | None:
    return session.scalar(select(UserRow).where(UserRow.email == email))


def _user(row: UserRow) -> User:
    return User(row.id, row.email, row.confirmed is not None)


def _good(session: Session, token: str, kinds: tuple[Kind, ...]) -> Link:
    row = session.get(LoginLinkRow, hashed(token))
    if row is None or row.replaced or row.expires <= time.time() or row.kind not in kinds:
        raise UsageError(_SPENT)
    return Link(row.kind, row.email, row.next, row.vote)  # type: ignore[arg-type]


def _used(session: Session, token: str, kinds: tuple[Kind, ...]) -> Link:
    """What a link is for, which is used up with all others to this address, whose owner has come."""
    link = _good(session, token, kinds)
    session.execute(delete(LoginLinkRow).where(LoginLinkRow.email == link.email))
    return link


def _owner(session: Session, link: Link, now: float) -> UserRow:
    """The account of the address that a link was mailed to, made where there is none."""
    row = _row(session, link.email)
    confirmed = row is not None and row.confirmed is not None
    if link.kind != "login" and confirmed != (link.kind == "reset"):
        # The account has come or gone since.
        raise UsageError(_SPENT)
    if row is None:
        row = UserRow(email=link.email, created=now)
        session.add(row)
        session.flush()
    return row


def _replace(session: Session, user_id: int, known: str, secret: str, wrong: str) -> UserRow:
    """Set a password where it is still the one that was looked at; who knew one that is gone gets in no more."""
    row = session.get(UserRow, user_id)
    if row is None or row.password != known:
        raise UsageError(wrong)
    row.password = secret
    return row


def _forgive(session: Session, key: str) -> None:
    """Take back a guess that was right; wrong ones stay counted."""
    right = update(GuessRow).where(GuessRow.key == key)
    session.execute(right.values(remaining=GuessRow.remaining + 1))


def _end_sessions(session: Session, row: UserRow) -> None:
    session.execute(delete(SessionRow).where(SessionRow.user_id == row.id))


def _new_session(session: Session, user_id: int) -> str:
    now, token = time.time(), new_token()
    session.execute(delete(SessionRow).where(SessionRow.expires <= now))
    session.add(SessionRow(token_hash=hashed(token), user_id=user_id, expires=now + SESSION_SECONDS))
    return token
