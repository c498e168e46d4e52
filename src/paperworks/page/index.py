"""The index of papers: those that run here, and those read from elsewhere."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from itertools import islice
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab.store import Store
from paperworks.page.entries import (
    EMBEDDED,
    ENTRY_COLUMNS,
    RUNS_HERE,
    STATUSES,
    STORED,
    Entry,
    entries_of,
    merged,
    number_in,
    of_card,
    of_row,
    read_entries,
    text_of,
    values_of,
)
from paperworks.page.meaning import Embedder, SentenceEmbedder, Vectors
from paperworks.page.search import chosen_embedder, fused, like_enough, paper_vectors, words_of
from paperworks.page.tables import EntryLabelRow, EntryRow, EntryVectorRow
from paperworks.page.words import Fts5, TsVector, Where, among, count, marked, ranked
from paperworks.papers import ROOMS, load_cards

_BATCH = 500
_EMBEDDED_AT_ONCE = 64
# Fewer papers with every word than this, and those with any word are shown as well.
_ENOUGH = 20
_RANKED = 200
_NEAR = 50
_SNIPPET = 300
# The cosine between two papers above which one may recommend the other: of the pairs of cards one in twenty is above it, by
# text alone.
LIKE_A_PAPER = 0.45
_OF_A_LIST = 50


@dataclass(frozen=True)
class Added:
    """What became of entries given to the index."""

    new: int
    updated: int
    unchanged: int


@dataclass(frozen=True)
class Hit:
    """A paper found.

    Attributes:
        entry: The paper.
        score: Its score by reciprocal rank fusion; 0 where nothing was sought.
        title_html: Its title, escaped, with `<mark>` around what matched.
        snippet_html: The part of its abstract that matches best, likewise.
    """

    entry: Entry
    score: float
    title_html: str
    snippet_html: str


@dataclass(frozen=True)
class Results:
    """What a search found.

    Attributes:
        total: How many papers were found, of which `hits` are some.
        hits: The papers asked for, best first.
    """

    total: int
    hits: list[Hit]


class Index:
    """The papers in a store, found by words, by meaning and by what they are.

    Several processes may add to an index and search it at once.

    Args:
        store: The lab's store.
        embedder: For the meaning: a sentence-transformers model by folder or name, or an `Embedder`; by default
            what PAPERWORKS_EMBEDDER names or the one installed. Without one, search goes by words.

    Raises:
        UsageError: An embedder is named, but sentence-transformers is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        ...     index = Index(store)
        ...     cards = index.sync_cards()
        ...     results = index.search("make my llm faster", room="decoding", meaning=False, limit=3)
        ...     results.hits[0].entry.room
        'decoding'
    """

    def __init__(self, store: Store, embedder: str | Embedder | None = None) -> None:
        self._store = store
        self._words = Fts5() if store.sqlite else TsVector()
        with store.writing(alone=True) as session:
            self._words.prepare(session)
        self._embedder: Embedder | None
        if embedder is None or isinstance(embedder, str):
            name = chosen_embedder(embedder)
            self._embedder = None if name is None else SentenceEmbedder(name)
        else:
            self._embedder = embedder
        self._vectors = None if self._embedder is None else Vectors(self._embedder.name)
        self._asked = lru_cache(maxsize=1024)(self._vector_of)
        # The model reads the query while the database looks for its words.
        self._reading = ThreadPoolExecutor(2, "embedding")

    def sync_cards(self) -> int:
        """Take the cards into the index as they are now, and say how many were new or changed."""
        cards = load_cards()
        entries = [of_card(card) for card in cards.values()]
        expected = {entry.slug: entry.key for entry in entries}
        with self._store.writing(alone=True) as session:
            for id, entry in read_entries(session, select(*ENTRY_COLUMNS).where(EntryRow.slug.is_not(None))):
                if expected.get(entry.slug) == entry.key:
                    continue
                # Its card is gone or has got an arXiv number.
                if entry.key.startswith("card:"):
                    session.execute(delete(EntryRow).where(EntryRow.id == id))
                else:
                    bare = values_of(replace(entry, room=None, slug=None, status=None))
                    session.execute(update(EntryRow).where(EntryRow.id == id).values(**bare))
        added = self.add(entries)
        return added.new + added.updated

    def add(self, entries: Iterable[Entry]) -> Added:
        """Take papers into the index, one a key.

        Of two tellings of a paper the later version holds, then arXiv's before Hugging Face's before a card's; what
        a card, votes and tags add to it stays. The papers are in the store when this returns.

        Args:
            entries: The papers; a long or slow iterable is taken in by parts.
        """
        counts: Counter[str] = Counter()
        rest = iter(entries)
        while batch := list(islice(rest, _BATCH)):
            with self._store.writing(alone=True) as session:
                counts += self._take_in(session, batch)
        return Added(counts["new"], counts["updated"], counts["unchanged"])

    def _take_in(self, session: Session, batch: Sequence[Entry]) -> Counter[str]:
        query = select(*ENTRY_COLUMNS, EntryRow.name, EntryRow.about).where(EntryRow.key.in_({e.key for e in batch}))
        rows = {row.key: row for row in session.execute(query)}
        values = {key: {name: getattr(row, name) for name in STORED} for key, row in rows.items()}
        known = {key: of_row(row) for key, row in rows.items()}
        counts: Counter[str] = Counter()
        changed: dict[str, dict[str, Any]] = {}
        for entry in batch:
            before = known.get(entry.key)
            known[entry.key] = after = entry if before is None else merged(before, entry)
            told = values_of(after)
            if told == values.get(entry.key):
                counts["unchanged"] += 1
                continue
            counts["new" if before is None else "updated"] += 1
            values[entry.key] = changed[entry.key] = told
        now = time.time()
        new = [{**told, "added": now} for key, told in changed.items() if key not in rows]
        old = [{**told, "id": rows[key].id} for key, told in changed.items() if key in rows]
        if new:
            ids = session.scalars(insert(EntryRow).returning(EntryRow.id, sort_by_parameter_order=True), new).all()
            _label(session, {id: known[told["key"]] for id, told in zip(ids, new, strict=True)})
        if old:
            session.execute(update(EntryRow), old)
            _label(session, {told["id"]: known[told["key"]] for told in old})
            reworded = [
                told["id"] for told in old if any(told[name] != getattr(rows[told["key"]], name) for name in EMBEDDED)
            ]
            session.execute(delete(EntryVectorRow).where(EntryVectorRow.entry_id.in_(reworded)))
        return counts

    def build(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Embed what has no embedding yet, and put the index in order.

        Stopped, it goes on where it was; what it has embedded is in the store.

        Args:
            progress: Called with how many papers are embedded and how many there are to embed.

        Returns:
            How many were embedded.
        """
        done = self._embed(progress or (lambda done, total: None)) if self._embedder is not None else 0
        with self._store.writing(alone=True) as session:
            self._words.tidy(session)
        return done

    def _embed(self, progress: Callable[[int, int], None]) -> int:
        assert self._embedder is not None and self._vectors is not None
        fit = (EntryVectorRow.entry_id == EntryRow.id) & (EntryVectorRow.embedder == self._embedder.name)
        lacking = select(EntryRow.id).outerjoin(EntryVectorRow, fit).where(EntryVectorRow.id.is_(None))
        with self._store.reading() as session:
            pending = list(session.scalars(lacking.order_by(EntryRow.id)))
        for start in range(0, len(pending), _EMBEDDED_AT_ONCE):
            progress(start, len(pending))
            batch = pending[start : start + _EMBEDDED_AT_ONCE]
            with self._store.reading() as session:
                entries = entries_of(session, batch)
            vectors = self._vectors_of_papers(list(entries.values()))
            with self._store.writing(alone=True) as session:
                # What was told anew meanwhile stays pending.
                now = entries_of(session, batch)
                same = [id in now and text_of(now[id]) == text_of(entry) for id, entry in entries.items()]
                self._vectors.keep(session, [id for id, kept in zip(entries, same, strict=True) if kept], vectors[same])
        progress(len(pending), len(pending))
        return len(pending)

    def _vectors_of_papers(self, entries: Sequence[Entry]) -> NDArray[np.float32]:
        assert self._embedder is not None
        texts = [text_of(entry) for entry in entries]
        unit: NDArray[np.float32] = paper_vectors(self._embedder.encode, texts, [entry.room for entry in entries])
        return unit

    def get(self, key: str) -> Entry | None:
        """The paper of this slug or arXiv number, with or without a version; None where there is none."""
        with self._store.reading() as session:
            found = self._find(session, key)
        return None if found is None else found[1]

    def _find(self, session: Session, key: str) -> tuple[int, Entry] | None:
        bare = re.sub(r"v\d+$", "", key)
        found = read_entries(session, select(*ENTRY_COLUMNS).where(or_(EntryRow.slug == key, EntryRow.key == bare)))
        return found[0] if found else None

    def newest(self, limit: int = 20, offset: int = 0) -> list[Entry]:
        """Papers by date of publication, newest first."""
        with self._store.reading() as session:
            return [entry for _, entry in self._newest(session, (), limit, offset)]

    def _newest(self, session: Session, where: Where, limit: int, offset: int) -> list[tuple[int, Entry]]:
        query = select(*ENTRY_COLUMNS).where(*where).order_by(EntryRow.published.desc(), EntryRow.id.desc())
        return read_entries(session, query.limit(limit).offset(offset))

    def similar(self, key: str, limit: int = 5) -> list[Entry]:
        """The papers nearest to a paper in meaning, or in words where it is not embedded.

        Raises:
            UsageError: The index does not hold the paper.
        """
        with self._store.reading() as session:
            found = self._find(session, key)
            if found is None:
                raise UsageError(f"the index holds no paper {key!r}; give a slug or an arXiv number")
            near = self._near(session, *found, limit, ())
            entries = entries_of(session, near)
        return [entries[other] for other in near]

    def recommended(
        self, keys: Sequence[str], limit: int = 10, *, added: tuple[float, float] | None = None
    ) -> list[Entry]:
        """The papers that are like those of a list and not in it, first what is near to many of them.

        The neighbours of each paper, by meaning or by words, are fused by reciprocal rank.

        Args:
            keys: The papers of the list, as they are known to the index; of a long one the first fifty count.
            limit: How many to return at most.
            added: Only what was added to the index after the first and until the second time, seconds since 1970 UTC.
        """
        where = [] if added is None else [EntryRow.added > added[0], EntryRow.added <= added[1]]
        with self._store.reading() as session:
            listed = dict(read_entries(session, select(*ENTRY_COLUMNS).where(EntryRow.key.in_(keys))))
            ids = {entry.key: id for id, entry in listed.items()}
            taken = [ids[key] for key in keys if key in ids][:_OF_A_LIST]
            score = fused(self._near(session, id, listed[id], _NEAR, where, like=LIKE_A_PAPER) for id in taken)
            best = sorted(score.keys() - listed.keys(), key=lambda id: (-score[id], id))[:limit]
            entries = entries_of(session, best)
        return [entries[id] for id in best if id in entries]

    def _near(
        self, session: Session, id: int, entry: Entry, limit: int, where: Where, *, like: float = -1.0
    ) -> list[int]:
        """The papers nearest to a paper in meaning and at least so like it, or in words where it is not embedded."""
        if self._vectors is not None and self._vectors.refresh(session):
            vector = self._vectors.vector(session, id)
            if vector is not None:
                allowed = session.scalars(select(EntryRow.id).where(*where)).all() if where else None
                near = self._vectors.nearest(session, vector, limit + 1, allowed)
                return [other for other, cosine in near.items() if other != id and cosine >= like][:limit]
        words = words_of(entry.title)
        if not words:
            return []
        expression = self._words.expression(words, every=False)
        return [other for other in ranked(session, self._words, expression, where, limit + 1) if other != id][:limit]

    def search(
        self,
        query: str,
        *,
        room: str | None = None,
        tag: str | None = None,
        year: int | None = None,
        status: str | None = None,
        runs_here: bool = False,
        limit: int = 20,
        offset: int = 0,
        meaning: bool = True,
    ) -> Results:
        """Papers for a query, best first: by words and, where there are embeddings, by meaning.

        The orders are fused by reciprocal rank. Papers that hold every word are taken, and where they are few those
        that hold any; to them come the nearest by meaning, as far as they are near enough to have to do with it. An
        arXiv number, or the address of its page, finds its paper alone.

        Args:
            query: What is sought, in plain words; without any, the newest papers come.
            room: Only papers of this room.
            tag: Only papers with this tag or arXiv category.
            year: Only papers first published in this year.
            status: Only papers that have come this far: planned, runs or measured.
            runs_here: Only papers that run here.
            limit: How many to return at most.
            offset: How many of the best to leave out.
            meaning: Whether to go by meaning as well.

        Raises:
            UsageError: There is no such room or status, or limit or offset is out of range.
        """
        where = _where(room, tag, year, status, runs_here)
        if limit < 1 or offset < 0:
            raise UsageError(f"limit is at least 1 and offset at least 0, not {limit} and {offset}")
        with self._store.reading() as session:
            if not query.strip():
                total = session.scalar(select(func.count()).select_from(EntryRow).where(*where)) or 0
                newest = self._newest(session, where, limit, offset)
                return Results(total, [_hit(entry) for _, entry in newest])
            if (number := number_in(query)) is not None:
                said = read_entries(session, select(*ENTRY_COLUMNS).where(EntryRow.key == number, *where))
                score = fused([[id for id, _ in said]])
                return Results(len(said), [_hit(entry, score[id]) for id, entry in said][offset : offset + limit])
            by_meaning: list[int] = []
            vector = None
            if meaning and self._vectors is not None and self._vectors.refresh(session):
                vector = self._reading.submit(self._asked, query.strip())
            expression, by_words, total = self._by_words(session, query, where, max(_RANKED, offset + limit))
            if vector is not None:
                by_meaning = self._by_meaning(session, vector.result(), where)
            if by_meaning:
                others = set(by_meaning) - set(by_words)
                # With all that match in hand there is nothing to ask.
                if total > len(by_words):
                    others -= among(session, self._words, expression, sorted(others))
                total += len(others)
            score = fused([by_words, by_meaning])
            best = sorted(score, key=lambda id: (-score[id], id))[offset : offset + limit]
            entries = entries_of(session, best)
            marks = marked(session, self._words, expression, best) if expression else {}
        return Results(total, [_hit(entries[id], score[id], marks.get(id)) for id in best if id in entries])

    def _by_words(self, session: Session, query: str, where: Where, limit: int) -> tuple[str, list[int], int]:
        """What was asked of the words, the best that match, and how many do."""
        words = list(dict.fromkeys(words_of(query)))
        expression, found = "", list[int]()
        for every in (True, False):
            if words and (every or (len(found) < _ENOUGH and len(words) > 1)):
                expression = self._words.expression(words, every=every)
                found = ranked(session, self._words, expression, where, limit)
        # Fewer than were asked for are all there are.
        total = len(found) if len(found) < limit else count(session, self._words, expression, where)
        return expression, found, total

    def _by_meaning(self, session: Session, vector: NDArray[np.float32], where: Where) -> list[int]:
        assert self._vectors is not None
        allowed = session.scalars(select(EntryRow.id).where(*where)).all() if where else None
        likeness = self._vectors.nearest(session, vector, _NEAR, allowed)
        return list(likeness)[: like_enough(list(likeness.values()))]

    def _vector_of(self, query: str) -> NDArray[np.float32]:
        assert self._embedder is not None
        vector: NDArray[np.float32] = self._embedder.encode([query])[0]
        return vector


def _label(session: Session, entries: dict[int, Entry]) -> None:
    session.execute(delete(EntryLabelRow).where(EntryLabelRow.entry_id.in_(entries)))
    labels = [
        {"label": label, "entry_id": id}
        for id, entry in entries.items()
        for label in {word.lower() for word in (*entry.tags, *entry.categories)}
    ]
    if labels:
        session.execute(insert(EntryLabelRow), labels)


def _where(room: str | None, tag: str | None, year: int | None, status: str | None, runs_here: bool) -> Where:
    if room is not None and room not in ROOMS:
        raise UsageError(f"there is no room {room!r}, only {', '.join(ROOMS)}")
    if status is not None and status not in STATUSES:
        raise UsageError(f"there is no status {status!r}, only {', '.join(STATUSES)}")
    labelled = select(EntryLabelRow.entry_id).where(EntryLabelRow.label == (tag or "").lower())
    return [
        condition
        for wanted, condition in (
            (room, EntryRow.room == room),
            (tag, EntryRow.id.in_(labelled)),
            (year, EntryRow.year == year),
            (status, EntryRow.status == status),
            (runs_here or None, RUNS_HERE),
        )
        if wanted is not None
    ]


def _hit(entry: Entry, score: float = 0.0, marks: tuple[str, str] | None = None) -> Hit:
    if marks is None:
        # Cut roughly first: to shorten takes time in the length of the whole.
        marks = escape(entry.title), escape(shorten(entry.abstract[: 2 * _SNIPPET], _SNIPPET, placeholder=" …"))
    return Hit(entry, score, *marks)
