"""The digest: new and trending papers, by mail to who has subscribed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote, urlencode

from sqlalchemy import func, or_, select, update

from paperworks.lab.store import Store
from paperworks.page.entries import Entry, entries_of
from paperworks.page.index import Index
from paperworks.page.mail import Mail, Outbox, written
from paperworks.page.reading import list_of
from paperworks.page.search import words_of
from paperworks.page.subscriptions import FREQUENCIES, Subscription, of_row
from paperworks.page.tables import EntryLabelRow, EntryRow, SubscriptionRow
from paperworks.page.trending import Trend, trending
from paperworks.page.words import Fts5, TsVector, Where, count, ranked

_DAY = 86400.0
# What is added just now may not be readable yet; it comes in the next digest.
_SETTLED = 600.0
# Older papers that a source brings are no news.
_NEWS = 30 * _DAY
_SHOWN = 20
_TRENDING = 5
_ABSTRACT = 320
_AUTHORS = 4
_PERIODS = {"daily": "day", "weekly": "week"}


def due(store: Store, now: datetime) -> list[Subscription]:
    """The subscriptions whose digest is to be made, by dates in UTC, so that a few minutes earlier or later do not matter.

    Args:
        store: The lab's store.
        now: The time, with a time zone.

    Raises:
        ValueError: The time has no zone.
    """
    if now.tzinfo is None:
        raise ValueError("now has no time zone; give it one, such as datetime.UTC")
    today = now.astimezone(UTC).date()
    with store.reading() as session:
        rows = session.scalars(
            select(SubscriptionRow).where(SubscriptionRow.confirmed.is_not(None)).order_by(SubscriptionRow.id)
        )
        confirmed = [of_row(row) for row in rows]
    return [
        subscription
        for subscription in confirmed
        if (today - datetime.fromtimestamp(subscription.digested, UTC).date()).days
        >= FREQUENCIES[subscription.frequency]
    ]


def put_digests(store: Store, base_url: str, now: datetime) -> int:
    """Put the digests that are due in the outbox, each once, though several processes may do so at the same time.

    Stopped, it goes on where it was. Where there is no new paper there is no mail.

    Args:
        store: The lab's store.
        base_url: Address of the page.
        now: The time, with a time zone.

    Returns:
        How many were put in.
    """
    outbox, put = Outbox(store), 0
    until = now.timestamp() - _SETTLED
    for subscription in due(store, now):
        mail = composed(store, subscription, base_url, until)
        unchanged = update(SubscriptionRow).where(
            SubscriptionRow.id == subscription.id, SubscriptionRow.digested == subscription.digested
        )
        told = {"digested": now.timestamp(), "told_until": max(until, subscription.told_until)}
        with store.writing(alone=True) as session:
            # Another process may have made it meanwhile, or the reader has unsubscribed.
            mine = session.scalar(unchanged.values(told).returning(SubscriptionRow.id)) is not None
            if mine and mail is not None:
                outbox.put(
                    subscription.email, mail, useful_for=FREQUENCIES[subscription.frequency] * _DAY, session=session
                )
                put += 1
    return put


def write_digests(store: Store, base_url: str, now: datetime, folder: Path) -> list[Path]:
    """Write the digests that are due as files, one of HTML and one of text each, and leave all else as it is.

    Where none is due, what a reader would get who had subscribed to all papers a week ago is written.

    Args:
        store: The lab's store.
        base_url: Address of the page.
        now: The time, with a time zone.
        folder: Where to write; made where it is missing.

    Returns:
        The files.
    """
    until = now.timestamp() - _SETTLED
    mails = {f"{wish.id:06d}": composed(store, wish, base_url, until) for wish in due(store, now)}
    if not any(mails.values()):
        week_ago = now.timestamp() - 7 * _DAY
        reader = Subscription(0, "reader@example.org", None, None, "weekly", week_ago, week_ago, "preview")
        mails = {"preview": composed(store, reader, base_url, now.timestamp())}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, mail in mails.items():
        for kind, content in (("html", mail.html), ("txt", mail.text)) if mail else ():
            files.append(folder / f"{name}.{kind}")
            files[-1].write_text(content, encoding="utf-8")
    return files


def composed(store: Store, subscription: Subscription, base_url: str, until: float) -> Mail | None:
    """The digest of a subscription up to a time (seconds since 1970 UTC); None where there is no new paper."""
    total, new = new_papers(store, subscription, until)
    if not new:
        return None
    trends = [trend for trend in trending(store, _PERIODS[subscription.frequency], _TRENDING) if trend.score > 0]
    return render(subscription, new, total, trends, base_url)


def new_papers(store: Store, subscription: Subscription, until: float) -> tuple[int, list[Entry]]:
    """How many papers of a subscription are new, and the first of them.

    New is what was added to the index since the last digest, unless it was published more than a month before that
    and does not run here. For a search they hold every word of it, best first; else those with most votes on Hugging
    Face come first, then the newest. For a reading list they are like its papers, and what it holds is not told.
    """
    since = subscription.told_until
    if subscription.kind == "reading":
        keys = [entry.key for entry in list_of(store, subscription.email)]
        like = Index(store).recommended(keys, _SHOWN, added=(since, until))
        fresh = [entry for entry in like if entry.slug or entry.published.timestamp() > since - _NEWS]
        return len(fresh), fresh
    news = or_(EntryRow.slug.is_not(None), EntryRow.published > since - _NEWS)
    where: Where = [EntryRow.added > since, EntryRow.added <= until, news]
    if subscription.tag:
        labelled = select(EntryLabelRow.entry_id).where(EntryLabelRow.label == subscription.tag)
        where = [*where, EntryRow.id.in_(labelled)]
    with store.reading() as session:
        if subscription.query:
            words = Fts5() if store.sqlite else TsVector()
            expression = words.expression(words_of(subscription.query), every=True)
            total = count(session, words, expression, where)
            ids = ranked(session, words, expression, where, _SHOWN)
        else:
            total = session.scalar(select(func.count()).select_from(EntryRow).where(*where)) or 0
            order = (EntryRow.upvotes.desc(), EntryRow.published.desc(), EntryRow.id.desc())
            ids = list(session.scalars(select(EntryRow.id).where(*where).order_by(*order).limit(_SHOWN)))
        entries = entries_of(session, ids)
    return total, [entries[id] for id in ids if id in entries]


def render(
    subscription: Subscription, new: Sequence[Entry], total: int, trends: Sequence[Trend], base_url: str
) -> Mail:
    """The mail of a digest, with the headers by which a mail program unsubscribes in one click (RFC 8058).

    Args:
        subscription: Whom it is for, and what.
        new: New papers, first the most important.
        total: How many new papers there are, of which `new` are some.
        trends: Trending papers.
        base_url: Address of the page.

    Returns:
        Subject, text, HTML and headers.
    """
    base_url = base_url.rstrip("/")
    farewell = f"{base_url}/unsubscribe/{subscription.farewell}"
    asked = {name: told for name, told in (("q", subscription.query), ("tag", subscription.tag)) if told}
    what = f"1 new paper: {new[0].title}" if total == 1 else f"{total} new papers: {new[0].title}"
    values = {
        "subject": shorten(what, 120, placeholder=" …"),
        "frequency": subscription.frequency,
        "wanted": subscription.subject,
        "period": _PERIODS[subscription.frequency],
        "total": total,
        "papers": [_told(entry, base_url) for entry in new],
        "trends": [{**_told(trend.entry, base_url), "votes": trend.votes, "runs": trend.runs} for trend in trends],
        "more": total - len(new),
        "all": f"{base_url}/search?{urlencode(asked)}" if asked else f"{base_url}/new",
        "base_url": base_url,
        "farewell": farewell,
    }
    return Mail(
        str(values["subject"]),
        written("digest.txt", **values),
        written("digest.html", **values),
        {"List-Unsubscribe": f"<{farewell}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"},
    )


def _told(entry: Entry, base_url: str) -> dict[str, object]:
    """What a digest says of a paper."""
    others = " and others" if len(entry.authors) > _AUTHORS else ""
    return {
        "title": entry.title,
        "authors": ", ".join(entry.authors[:_AUTHORS]) + others,
        "year": entry.year,
        "abstract": shorten(entry.abstract, _ABSTRACT, placeholder=" …"),
        "page": f"{base_url}/papers/{quote(entry.slug or entry.key, safe='/')}",
        "slug": entry.slug if entry.status in ("runs", "measured") else None,
    }
