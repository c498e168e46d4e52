"""The page's tables in the lab's store."""

from __future__ import annotations

from sqlalchemy import JSON, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from paperworks.lab.store import Base


class EntryRow(Base):
    """A paper of the index; times are seconds since 1970 UTC.

    `name` and `about` are searched beside title and abstract: what a card adds to its paper, and labels.
    """

    __tablename__ = "entries"
    __table_args__ = (Index("ix_entries_published", "published", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    version: Mapped[int]
    title: Mapped[str]
    abstract: Mapped[str]
    authors: Mapped[list[str]] = mapped_column(JSON)
    categories: Mapped[list[str]] = mapped_column(JSON)
    tags: Mapped[list[str]] = mapped_column(JSON)
    published: Mapped[float]
    year: Mapped[int] = mapped_column(index=True)
    room: Mapped[str | None] = mapped_column(index=True)
    slug: Mapped[str | None] = mapped_column(unique=True)
    status: Mapped[str | None] = mapped_column(index=True)
    url: Mapped[str]
    source: Mapped[str]
    upvotes: Mapped[int]
    name: Mapped[str]
    about: Mapped[str]
    added: Mapped[float] = mapped_column(index=True)


class EntryLabelRow(Base):
    """A tag or category of a paper, to filter by."""

    __tablename__ = "entry_labels"

    label: Mapped[str] = mapped_column(primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True, index=True)


class EntryVectorRow(Base):
    """The embedding of a paper: half-precision numbers, and their signs as bits.

    A changed embedding gets a new `id`, so that a reader who knows the last one it saw finds what is new.
    """

    __tablename__ = "entry_vectors"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id", ondelete="CASCADE"), unique=True)
    embedder: Mapped[str]
    signs: Mapped[bytes]
    vector: Mapped[bytes]


class IngestRow(Base):
    """How far a source has been read: all from `start` to `reached` is in the index, and all revised before `revised`.

    A day that a source has not told of has a row of its own until it is read or given up, by the name of both; nothing of
    it is in the index. Times are seconds since 1970 UTC.
    """

    __tablename__ = "ingests"

    source: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[float]
    reached: Mapped[float]
    revised: Mapped[float | None]


class UserRow(Base):
    """A person with an account; times are seconds since 1970 UTC.

    `password` is argon2's hash, None for who logs in by link only; `confirmed` is when the address was shown to be
    theirs.
    """

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    password: Mapped[str | None]
    created: Mapped[float]
    confirmed: Mapped[float | None]


class SessionRow(Base):
    """A browser that a person is logged in with, by the hash of its token."""

    __tablename__ = "sessions"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    expires: Mapped[float] = mapped_column(index=True)


class LoginLinkRow(Base):
    """A link that was mailed and is good once; `kind` is what it does: login, register or reset.

    It leads on to `next`, a path on this site, and casts a vote for the paper of the key `vote`, where that is not empty.
    One that a newer one has replaced is kept until it expires, so that mails can be counted.
    """

    __tablename__ = "login_links"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    replaced: Mapped[bool]
    expires: Mapped[float] = mapped_column(index=True)
    next: Mapped[str] = mapped_column(default="/")
    vote: Mapped[str] = mapped_column(default="")


class GuessRow(Base):
    """How many guesses at a password remained at a time (seconds since 1970 UTC); `key` is a hash of whose and where."""

    __tablename__ = "guesses"

    key: Mapped[str] = mapped_column(primary_key=True)
    remaining: Mapped[float]
    at: Mapped[float] = mapped_column(index=True)


class VoteRow(Base):
    """A person's vote for a paper."""

    __tablename__ = "votes"

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True, index=True)
    at: Mapped[float] = mapped_column(index=True)


class ReadingRow(Base):
    """A paper on a person's reading list."""

    __tablename__ = "reading"

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True, index=True)
    at: Mapped[float]


class SubscriptionRow(Base):
    """A wish for digests: of all papers, of those of a `query` and `tag`, or of those like a reading list (`kind`).

    `farewell` is the token that ends it: every digest carries it, so it is kept as it is. The last digest was made at
    `digested`, and has told of what was added until `told_until`.
    """

    __tablename__ = "subscriptions"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(index=True)
    query: Mapped[str]
    tag: Mapped[str]
    kind: Mapped[str] = mapped_column(default="papers")
    frequency: Mapped[str]
    confirmation_hash: Mapped[str] = mapped_column(unique=True)
    farewell: Mapped[str] = mapped_column(unique=True)
    asked: Mapped[float]
    confirmed: Mapped[float | None]
    digested: Mapped[float]
    told_until: Mapped[float]


class MailRow(Base):
    """A mail that waits, was sent or could not be; its text is kept only while it waits.

    `due` is when it is tried next, or when the try began that has not ended; after `until` it is of no use.
    """

    __tablename__ = "mails"
    __table_args__ = (Index("ix_mails_status", "status", "due"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipient: Mapped[str]
    subject: Mapped[str]
    text: Mapped[str]
    html: Mapped[str]
    headers: Mapped[dict[str, str]] = mapped_column(JSON)
    status: Mapped[str]
    put: Mapped[float]
    due: Mapped[float]
    until: Mapped[float | None]
    attempts: Mapped[int]
    error: Mapped[str | None]


class RunRequestRow(Base):
    """What the page knows of a run that was started from it: who asked, and whether it works, waits or is to stop."""

    __tablename__ = "run_requests"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"), index=True)
    requested: Mapped[float]
    working: Mapped[bool]
    cancelled: Mapped[bool]
