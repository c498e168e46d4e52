"""What is trending: papers by votes, runs and how new they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import case, select, union
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import RunRow, Store
from paperworks.page.entries import RUNS_HERE, Entry, entries_of
from paperworks.page.tables import EntryRow, VoteRow

PERIODS = {"day": 1, "week": 7, "month": 30}
FORMULA = (
    "The score of a paper is V + log₂(1 + R) + (1 + log₂(1 + U)) · N. V adds up its votes and R its finished runs of "
    "the last day, week or month, tiny ones left out; U is its votes on Hugging Face; N is how new it is. A vote, a run and the paper itself "
    "count 1 when they are fresh, half as much after each half of the period, 2^(−2 · age / period), and nothing after it. "
    "Of equals what runs here comes first, then the newer."
)
_DAY = 86400.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trend:
    """A paper and why it is where it is.

    Attributes:
        entry: The paper.
        score: Its score by `FORMULA`.
        votes: How many votes it got in the period.
        runs: How many of its runs finished in the period; those of scale tiny measure nothing and do not count.
    """

    entry: Entry
    score: float
    votes: int
    runs: int


def trending(store: Store, period: str = "week", limit: int = 20, offset: int = 0) -> list[Trend]:
    """Papers by their score of the last day, week or month (`FORMULA`), highest first; of equals what runs here first, then the newer.

    Args:
        store: The lab's store.
        period: day, week or month.
        limit: How many to return at most.
        offset: How many of the highest to leave out.

    Raises:
        UsageError: There is no such period, or limit or offset is out of range.
    """
    if period not in PERIODS:
        raise UsageError(f"there is no period {period!r}, only {', '.join(PERIODS)}")
    if limit < 1 or offset < 0:
        raise UsageError(f"limit is at least 1 and offset at least 0, not {limit} and {offset}")
    now, length = time.time(), PERIODS[period] * _DAY
    voted = select(VoteRow.entry_id, VoteRow.at).where(VoteRow.at > now - length)
    ran = (
        select(EntryRow.id, RunRow.finished)
        .join(RunRow, RunRow.paper == EntryRow.slug)
        .where(RunRow.status == "finished", RunRow.scale != "tiny", RunRow.finished > now - length)
    )
    # Few papers have a slug, and there is an index of them.
    runs_here = EntryRow.slug.is_not(None) & RUNS_HERE
    columns = select(EntryRow.id, EntryRow.published, EntryRow.upvotes, case((runs_here, 1), else_=0))
    newest = columns.order_by(EntryRow.published.desc(), EntryRow.id.desc()).limit(offset + limit)
    # The rest score nothing, and are older than as many of these as are asked for. A union, for each part has its index.
    parts = union(
        columns.where(EntryRow.published > now - length),
        columns.where(EntryRow.id.in_(newest.with_only_columns(EntryRow.id))),
        columns.where(EntryRow.id.in_(newest.where(runs_here).with_only_columns(EntryRow.id))),
        columns.where(EntryRow.id.in_(voted.with_only_columns(VoteRow.entry_id))),
        columns.where(EntryRow.id.in_(ran.with_only_columns(EntryRow.id))),
    )
    candidates = parts.order_by("id")
    with store.reading() as session:
        ids, published, upvotes, here = _columns(session, candidates, 4)
        if not ids.size:
            return []
        freshness, votes = _added_up(session, voted, ids, now, length)
        ran_freshly, runs = _added_up(session, ran, ids, now, length)
        newness = _fresh(now - published, length)
        scores = freshness + np.log2(1 + ran_freshly) + (1 + np.log2(1 + upvotes)) * newness
        best = np.lexsort((-ids, -published, -here, -scores))[offset : offset + limit]
        entries = entries_of(session, ids[best].astype(int).tolist())
    return [
        Trend(entries[id], score, count, run)
        for id, score, count, run in zip(*(column[best].tolist() for column in (ids, scores, votes, runs)), strict=True)
        if id in entries
    ]


def _columns(session: Session, query: Any, count: int) -> Floats:
    """What a query finds, (count, rows)."""
    # Of plain tuples an array is made many times as fast as of rows.
    rows: Floats = np.array([tuple(row) for row in session.execute(query).all()], dtype=float)
    return rows.reshape(-1, count).T


def _fresh(age: Floats, length: float) -> Floats:
    fresh: Floats = np.where(age < length, np.exp2(-2 * np.maximum(age, 0) / length), 0)
    return fresh


def _added_up(
    session: Session, events: Any, ids: Floats, now: float, length: float
) -> tuple[Floats, NDArray[np.int64]]:
    """How much what happened to each paper counts together, and how often it happened; in the order of `ids`, which ascend."""
    papers, times = _columns(session, events, 2)
    where = np.minimum(np.searchsorted(ids, papers), len(ids) - 1)
    # What has come since the papers were read may be of others.
    known = ids[where] == papers
    weights = _fresh(now - times[known], length)
    places = where[known]
    return np.bincount(places, weights, len(ids)).astype(np.float64), np.bincount(places, minlength=len(ids))
