"""Votes for papers, one a person and paper."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.entries import ENTRY_COLUMNS, Entry, entry_id_of, read_entries
from paperworks.page.tables import EntryRow, UserRow, VoteRow


def vote(store: Store, user_id: int, key: str) -> int:
    """Vote for a paper; a second vote of the same person changes nothing.

    Args:
        store: The lab's store.
        user_id: Number of the person's account.
        key: The paper's key in the index.

    Returns:
        How many votes it has; the vote is in the store.

    Raises:
        UsageError: There is no such person or paper.
    """
    with store.writing(alone=True) as session:
        entry_id = entry_id_of(session, key)
        if session.get(UserRow, user_id) is None:
            raise UsageError(f"there is no account {user_id}; log in to vote")
        if session.get(VoteRow, (user_id, entry_id)) is None:
            session.add(VoteRow(user_id=user_id, entry_id=entry_id, at=time.time()))
            session.flush()
        return _count(session, entry_id)


def unvote(store: Store, user_id: int, key: str) -> int:
    """Take a vote back, where there is one.

    Returns:
        How many votes the paper has; the change is in the store.

    Raises:
        UsageError: There is no such paper.
    """
    with store.writing(alone=True) as session:
        entry_id = entry_id_of(session, key)
        session.execute(delete(VoteRow).where(VoteRow.user_id == user_id, VoteRow.entry_id == entry_id))
        return _count(session, entry_id)


def votes_of(store: Store, keys: Iterable[str]) -> dict[str, int]:
    """How many votes each of the papers has, by key; 0 for one that the index does not hold."""
    counts = dict.fromkeys(keys, 0)
    query = (
        select(EntryRow.key, func.count())
        .join(VoteRow, VoteRow.entry_id == EntryRow.id)
        .where(EntryRow.key.in_(counts))
        .group_by(EntryRow.key)
    )
    with store.reading() as session:
        return {**counts, **{key: count for key, count in session.execute(query)}}


def voted(store: Store, user_id: int, keys: Iterable[str]) -> set[str]:
    """Those of the papers, by key, that a person has voted for."""
    query = select(EntryRow.key).join(VoteRow, VoteRow.entry_id == EntryRow.id)
    with store.reading() as session:
        return set(session.scalars(query.where(VoteRow.user_id == user_id, EntryRow.key.in_(list(keys)))))


def votes_by(store: Store, user_id: int) -> list[Entry]:
    """The papers that a person has voted for, the last one first."""
    query = select(*ENTRY_COLUMNS).join(VoteRow, VoteRow.entry_id == EntryRow.id).where(VoteRow.user_id == user_id)
    with store.reading() as session:
        found = read_entries(session, query.order_by(VoteRow.at.desc(), EntryRow.id.desc()))
    return [entry for _, entry in found]


def _count(session: Session, entry_id: int) -> int:
    return session.scalar(select(func.count()).where(VoteRow.entry_id == entry_id)) or 0
