"""Reading lists: papers that a person keeps, and what is like them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import delete, func, select

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.entries import ENTRY_COLUMNS, Entry, entry_id_of, read_entries
from paperworks.page.tables import EntryRow, ReadingRow, UserRow

MOST = 500


def keep(store: Store, user_id: int, key: str) -> None:
    """Put a paper on a reading list; one that is there stays where it is.

    Args:
        store: The lab's store.
        user_id: Number of the person's account.
        key: The paper's key in the index.

    Raises:
        UsageError: There is no such person or paper, or the list is full.
    """
    with store.writing(alone=True) as session:
        entry_id = entry_id_of(session, key)
        if session.get(UserRow, user_id) is None:
            raise UsageError(f"there is no account {user_id}; log in to keep a reading list")
        if session.get(ReadingRow, (user_id, entry_id)) is not None:
            return
        held = session.scalar(select(func.count()).where(ReadingRow.user_id == user_id)) or 0
        if held >= MOST:
            raise UsageError(f"a reading list holds {MOST} papers: take one off that you have read")
        session.add(ReadingRow(user_id=user_id, entry_id=entry_id, at=time.time()))


def take_off(store: Store, user_id: int, key: str) -> None:
    """Take a paper off a reading list, where it is on it."""
    these = select(EntryRow.id).where(EntryRow.key == key)
    with store.writing() as session:
        session.execute(delete(ReadingRow).where(ReadingRow.user_id == user_id, ReadingRow.entry_id.in_(these)))


def reading_list(store: Store, user_id: int) -> list[Entry]:
    """The papers of a person's reading list, the last one first."""
    query = select(*ENTRY_COLUMNS).join(ReadingRow, ReadingRow.entry_id == EntryRow.id)
    mine = query.where(ReadingRow.user_id == user_id).order_by(ReadingRow.at.desc(), EntryRow.id.desc())
    with store.reading() as session:
        return [entry for _, entry in read_entries(session, mine)]


def kept(store: Store, user_id: int, keys: Iterable[str]) -> set[str]:
    """Those of the papers, by key, that are on a person's reading list."""
    query = select(EntryRow.key).join(ReadingRow, ReadingRow.entry_id == EntryRow.id)
    with store.reading() as session:
        return set(session.scalars(query.where(ReadingRow.user_id == user_id, EntryRow.key.in_(list(keys)))))


def list_of(store: Store, email: str) -> list[Entry]:
    """The reading list of the account with this address; empty where there is none."""
    with store.reading() as session:
        user_id = session.scalar(select(UserRow.id).where(UserRow.email == email))
    return [] if user_id is None else reading_list(store, user_id)
