"""Subscriptions to digests: confirmed by mail, ended in one click."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.mail import Outbox, address, letter
from paperworks.page.search import words_of
from paperworks.page.tables import SubscriptionRow
from paperworks.page.tokens import hashed, new_token

FREQUENCIES = {"daily": 1, "weekly": 7}
KINDS = ("papers", "reading")
CONFIRMATION_SECONDS = 7 * 86400
LONGEST = 200
# Nobody's mailbox can be filled from here: more confirmations are not asked for within a day.
_OPEN_A_DAY = 5


@dataclass(frozen=True)
class Subscription:
    """A wish for digests.

    Attributes:
        id: Its number.
        email: Where they go.
        query: What is searched, or None.
        tag: Tag or arXiv category of the papers, or None; without query and tag it is for all papers.
        frequency: daily or weekly.
        kind: "papers", or "reading" for papers like those of the reading list of the account with this address.
        digested: When the last digest was made, or when it was confirmed; seconds since 1970 UTC.
        told_until: Up to when what was added to the index has been told of; seconds since 1970 UTC.
        farewell: The token that ends it.
    """

    id: int
    email: str
    query: str | None
    tag: str | None
    frequency: str
    digested: float
    told_until: float
    farewell: str = field(repr=False)
    kind: str = "papers"

    @property
    def subject(self) -> str:
        """What it is for, in words.

        Example:
            >>> Subscription(1, "ada@example.org", "faster llm", None, "daily", 0, 0, "").subject
            'papers for “faster llm”'
        """
        if self.kind == "reading":
            return "papers like those of your reading list"
        of_query = f" for “{self.query}”" if self.query else ""
        of_tag = f" tagged {self.tag}" if self.tag else ""
        return f"papers{of_query}{of_tag}" if self.query or self.tag else "all papers"


class Subscriptions:
    """Subscriptions in a store: each begins when its address confirms it, and ends with one click.

    Args:
        store: The lab's store.
        base_url: Address of the page, which links in mails begin with.
    """

    def __init__(self, store: Store, base_url: str) -> None:
        self._store = store
        self._base_url = base_url.rstrip("/")
        self._outbox = Outbox(store)

    def subscribe(
        self,
        email: str,
        *,
        query: str | None = None,
        tag: str | None = None,
        frequency: str = "weekly",
        kind: str = "papers",
        owned: bool = False,
    ) -> Subscription | None:
        """Mail a link that begins a subscription; the answer is the same whether or not there is one already.

        The mail may come to a stranger, so that it holds nothing of the search. It is shown where the link leads.

        Args:
            email: Where digests go.
            query: Papers that a search finds.
            tag: Papers with this tag or arXiv category; without query and tag all papers.
            frequency: daily or weekly.
            kind: "papers", or "reading" for papers like those of a reading list, which takes no query and no tag.
            owned: Whether who asks has shown already that the address is theirs; then it begins at once, whatever
                others have asked for.

        Returns:
            The subscription where it has begun; None where a mail asks first.

        Raises:
            UsageError: The address is none, the search has no word to search for, query or tag is too long, or there
                is no such frequency.
        """
        email = address(email)
        query, tag = _clean("search", query), _clean("tag", tag).lower()
        if query and not words_of(query):
            raise UsageError(f"the search {query!r} has no word to search for; give one that says what you look for")
        if frequency not in FREQUENCIES:
            raise UsageError(f"there is no frequency {frequency!r}, only {' and '.join(FREQUENCIES)}")
        if kind not in KINDS or (kind == "reading" and (query or tag)):
            raise UsageError(
                f"a digest is of {' or '.join(KINDS)}, and one of a reading list has no search, not {kind!r}"
            )
        now, token = time.time(), new_token()
        with self._store.writing(alone=True) as session:
            open_ones = SubscriptionRow.confirmed.is_(None)
            session.execute(
                delete(SubscriptionRow).where(open_ones, SubscriptionRow.asked < now - CONFIRMATION_SECONDS)
            )
            row = SubscriptionRow(
                email=email, query=query, tag=tag, kind=kind, frequency=frequency, confirmation_hash=hashed(token),
                farewell=new_token(), asked=now, digested=now, told_until=now,
            )  # fmt: skip
            if owned:
                session.add(row)
                session.flush()
                return of_row(_begun(session, row, now))
            today = (open_ones, SubscriptionRow.email == email, SubscriptionRow.asked > now - 86400)
            if (session.scalar(select(func.count()).where(*today)) or 0) >= _OPEN_A_DAY:
                return None
            session.add(row)
            mail = letter(
                "Confirm your subscription at Paperworks",
                paragraphs=[f"Someone, probably you, wants a {frequency} digest of papers at this address."],
                link=f"{self._base_url}/confirm/{token}",
                label="See what it is for, and confirm it",
                small="If it was not you, do nothing: without the link no digest is sent.",
            )
            self._outbox.put(email, mail, useful_for=CONFIRMATION_SECONDS, session=session)
        return None

    def asked(self, token: str) -> Subscription:
        """The subscription that a mailed link is for, which leaves it as it is.

        Raises:
            UsageError: The link is too old or none, or the subscription has ended.
        """
        with self._store.reading() as session:
            return of_row(_asked(session, token, time.time()))

    def confirm(self, token: str) -> Subscription:
        """Begin the subscription that a mailed link is for; opening the link again changes nothing.

        Where there is one for the same papers already, it takes over the new frequency.

        Raises:
            UsageError: The link is too old or none, or the subscription has ended.
        """
        now = time.time()
        with self._store.writing(alone=True) as session:
            row = _asked(session, token, now)
            if row.confirmed is None:
                row = _begun(session, row, now)
            return of_row(row)

    def unsubscribe(self, token: str) -> Subscription:
        """End the subscription whose digests carry this token; nothing of it is kept.

        Returns:
            The subscription as it was.

        Raises:
            UsageError: There is none, or no longer.
        """
        with self._store.writing(alone=True) as session:
            row = session.scalar(select(SubscriptionRow).where(SubscriptionRow.farewell == token))
            if row is None:
                raise UsageError("this link ends no subscription: it has ended already, or the link is not whole")
            ended = of_row(row)
            # A confirmation that is still open for the same papers would begin it anew.
            session.execute(delete(SubscriptionRow).where(*_same(row)))
        return ended

    def of(self, email: str) -> list[Subscription]:
        """The subscriptions of an address that have begun, in the order in which they did."""
        mine = select(SubscriptionRow).where(SubscriptionRow.email == email, SubscriptionRow.confirmed.is_not(None))
        with self._store.reading() as session:
            return [of_row(row) for row in session.scalars(mine.order_by(SubscriptionRow.id))]


def of_row(row: SubscriptionRow) -> Subscription:
    """A subscription from its row in the store."""
    return Subscription(
        row.id, row.email, row.query or None, row.tag or None, row.frequency, row.digested, row.told_until, row.farewell,
        row.kind,
    )  # fmt: skip


def _same(row: SubscriptionRow) -> list[ColumnElement[bool]]:
    """What is for the same papers at the same address."""
    return [getattr(SubscriptionRow, name) == getattr(row, name) for name in ("email", "query", "tag", "kind")]


def _asked(session: Session, token: str, now: float) -> SubscriptionRow:
    row = session.scalar(select(SubscriptionRow).where(SubscriptionRow.confirmation_hash == hashed(token)))
    if row is None or (row.confirmed is None and row.asked <= now - CONFIRMATION_SECONDS):
        raise UsageError("this link confirms no subscription, or no longer; subscribe again")
    return row


def _begun(session: Session, row: SubscriptionRow, now: float) -> SubscriptionRow:
    known = session.scalar(select(SubscriptionRow).where(*_same(row), SubscriptionRow.confirmed.is_not(None)))
    if known is None:
        row.confirmed = row.digested = row.told_until = now
        return row
    # Digests that were sent can still end it, and what they have told is not told again.
    frequency, confirmation = row.frequency, row.confirmation_hash
    session.delete(row)
    session.flush()
    known.frequency, known.confirmation_hash = frequency, confirmation
    return known


def _clean(what: str, text: str | None) -> str:
    kept = " ".join((text or "").split())
    if len(kept) > LONGEST or not kept.isprintable():
        raise UsageError(f"a {what} has at most {LONGEST} characters, all of them printable; shorten {kept[:40]!r}")
    return kept
