"""Accounts: who votes, starts runs and submits papers."""

from __future__ import annotations

import os
import time
import unicodedata
from dataclasses import dataclass
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.mail import Mail, Outbox, address, letter
from paperworks.page.tables import LoginLinkRow, SessionRow, UserRow
from paperworks.page.tokens import hashed, new_token

SESSION_SECONDS = 30 * 86400
LINK_SECONDS = 3600
_SHORTEST, _LONGEST = 8, 1024
# Nobody's mailbox can be filled from here: more links are not sent until these have expired.
_OPEN_LINKS = 3
_WRONG = "this address and password do not go together; check both, or log in by a link to your mailbox"


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


class Accounts:
    """Accounts in a store: by password (argon2id) or by links to a mailbox, and the sessions of who is logged in.

    Tokens of sessions and links are 256 random bits, of which the store keeps a hash; they expire, and a link logs in
    once. Whether an address has an account shows in no answer as long as addresses are confirmed.

    Args:
        store: The lab's store.
        base_url: Address of the page, which links in mails begin with.
        confirm: Whether an account by password comes about only when a link in a mail is opened; by default where
            PAPERWORKS_SMTP names a mail server, for without one nobody would ever get in.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        ...     accounts = Accounts(store, "https://example.org", confirm=False)
        ...     user = accounts.register("ada@example.org", "a long secret")
        ...     token = accounts.login("ada@example.org", "a long secret")
        ...     accounts.user(token) == user
        True
    """

    def __init__(self, store: Store, base_url: str, *, confirm: bool | None = None) -> None:
        self._store = store
        self._base_url = base_url.rstrip("/")
        self._confirm = bool(os.environ.get("PAPERWORKS_SMTP")) if confirm is None else confirm
        self._outbox = Outbox(store)

    def register(self, email: str, password: str) -> User | None:
        """Make an account with a password, or mail a link that makes it.

        Where addresses are confirmed, the answer is the same whether or not the address has an account already: who
        has one is mailed a link that logs in, and keeps the password they had.

        Args:
            email: The address.
            password: Between 8 and 1024 characters.

        Returns:
            The account; None where it is made when the link is opened.

        Raises:
            UsageError: The address or the password is none that can be used, or, where addresses are not confirmed,
                the address has an account.
        """
        email = address(email)
        if not _SHORTEST <= len(password) <= _LONGEST:
            raise UsageError(f"a password has {_SHORTEST} to {_LONGEST} characters, not {len(password)}")
        # Hashed in either case, so that the time taken tells nothing.
        secret = _hasher().hash(_normal(password))
        if self._confirm:
            self._mail_link(email, secret)
            return None
        with self._store.writing(alone=True) as session:
            if _row(session, email) is not None:
                raise UsageError(f"{email} has an account already; log in, or choose another address")
            row = UserRow(email=email, password=secret, created=time.time())
            session.add(row)
            session.flush()
            return _user(row)

    def login(self, email: str, password: str) -> str:
        """Log in by password.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: Address and password do not go together; the sentence and the time it takes are the same
                whether or not the address has an account.
        """
        try:
            email = address(email)
        except UsageError:
            raise UsageError(_WRONG) from None
        with self._store.reading() as session:
            row = _row(session, email)
        known = row.password if row is not None else None
        fits = _fits(password, known or _nobody())
        if row is None or known is None or not fits:
            raise UsageError(_WRONG)
        stronger = _hasher().hash(_normal(password)) if _hasher().check_needs_rehash(known) else None
        with self._store.writing(alone=True) as session:
            if stronger:
                # Unless the password was changed meanwhile.
                unchanged = update(UserRow).where(UserRow.id == row.id, UserRow.password == known)
                session.execute(unchanged.values(password=stronger))
            return _new_session(session, row.id)

    def request_link(self, email: str) -> None:
        """Mail a link that logs in once, within an hour; who has no account gets one by opening it.

        Raises:
            UsageError: The address is none.
        """
        self._mail_link(address(email), None)

    def login_by_link(self, token: str) -> str:
        """Log in by the token of a mailed link, which is used up by that.

        Programs that look through mail open links by GET, so that a page behind a link logs in only by POST.

        Returns:
            The token of a new session, for a cookie.

        Raises:
            UsageError: The link was used, is too old or is none.
        """
        now = time.time()
        with self._store.writing(alone=True) as session:
            link = session.get(LoginLinkRow, hashed(token))
            if link is None or link.expires <= now:
                raise UsageError("this link was used already or is more than an hour old; ask for a new one")
            session.delete(link)
            row = _row(session, link.email)
            if row is None:
                row = UserRow(email=link.email, password=link.password, created=now, confirmed=now)
                session.add(row)
            elif row.confirmed is None:
                # Whoever registered had not shown that the address is theirs; its owner has, and begins anew.
                row.password, row.confirmed = None, now
                session.execute(delete(SessionRow).where(SessionRow.user_id == row.id))
            session.flush()
            return _new_session(session, row.id)

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

    def _mail_link(self, email: str, password: str | None) -> None:
        now, token = time.time(), new_token()
        with self._store.writing(alone=True) as session:
            session.execute(delete(LoginLinkRow).where(LoginLinkRow.expires <= now))
            open_links = select(func.count()).select_from(LoginLinkRow).where(LoginLinkRow.email == email)
            if (session.scalar(open_links) or 0) >= _OPEN_LINKS:
                return
            known = _row(session, email) is not None
            session.add(
                LoginLinkRow(token_hash=hashed(token), email=email, password=password, expires=now + LINK_SECONDS)
            )
            mail = self._letter(token, registers=password is not None, known=known)
            self._outbox.put(email, mail, useful_for=LINK_SECONDS, session=session)

    def _letter(self, token: str, *, registers: bool, known: bool) -> Mail:
        if registers and known:
            told = "Someone, probably you, wanted to register at Paperworks with this address, which has an account."
            subject, paragraphs = "You have an account at Paperworks", [told, "This link logs you in to it."]
        elif registers:
            told = "Someone, probably you, wants an account at Paperworks with this address."
            subject, paragraphs = "Confirm your account at Paperworks", [told, "This link confirms it and logs you in."]
        else:
            told = "Someone, probably you, asked for a link to log in to Paperworks."
            subject, paragraphs = "Log in to Paperworks", [told]
        return letter(
            subject,
            paragraphs=paragraphs,
            link=f"{self._base_url}/login/link/{token}",
            label="Confirm and log in" if registers and not known else "Log in",
            small="The link works once, within an hour. If it was not you, do nothing: without it nothing happens.",
        )


@cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@cache
def _nobody() -> str:
    """A hash to compare with where there is no account, which takes as long."""
    return _hasher().hash(new_token())


def _fits(password: str, known: str) -> bool:
    if len(password) > _LONGEST:
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


def _new_session(session: Session, user_id: int) -> str:
    now, token = time.time(), new_token()
    session.execute(delete(SessionRow).where(SessionRow.expires <= now))
    session.add(SessionRow(token_hash=hashed(token), user_id=user_id, expires=now + SESSION_SECONDS))
    return token
