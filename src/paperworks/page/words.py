"""Search by words in the store: FTS5 in SQLite, tsvector in PostgreSQL.

Both search what a paper is called here, its title, what labels say about it, and its abstract, in that order of
weight. The database itself keeps them up to date with the table of entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

from sqlalchemy import ColumnElement, column, func, literal_column, select, table, text
from sqlalchemy.orm import Session

from paperworks.page.tables import EntryRow

# Around what matched, until the rest is escaped; no text in the index holds them.
_OPEN, _CLOSE = "\x02", "\x03"
_LESS = "\x04"
_SNIPPET_WORDS = 40

Where = Sequence[ColumnElement[bool]]


class Words(Protocol):
    """What the index asks of a database's full-text search.

    `id` is the paper's identity; `matched` is the same, for a filter that is applied to what matches.
    """

    id: ColumnElement[Any]
    matched: ColumnElement[Any]

    def prepare(self, session: Session) -> None:
        """Make what is searched, where it is missing."""

    def tidy(self, session: Session) -> None:
        """Put in order what many small additions have scattered."""

    def expression(self, words: list[str], *, every: bool) -> str:
        """What finds papers that hold every one of the words, or any."""

    def tiers(self, expression: str) -> tuple[str, str]:
        """What finds the papers that match outside their abstract, and what finds the others."""

    def holds(self, expression: str) -> ColumnElement[bool]:
        """Whether a paper matches."""

    def rank(self, expression: str) -> ColumnElement[Any]:
        """What to order by, so that the best comes first."""

    def marks(self, expression: str) -> tuple[ColumnElement[str], ColumnElement[str]]:
        """Title and a snippet of the abstract, with marks around what matched."""


class Fts5:
    """SQLite's FTS5 with Porter stemming, ranked by BM25.

    The text stays in the table of entries; FTS5 holds only the inverted index.
    """

    id: ColumnElement[Any] = table("entry_words", column("rowid")).c.rowid
    # Given the bare column, SQLite would begin with the filter, and search the index once for each paper that passes it.
    matched: ColumnElement[Any] = literal_column("+entry_words.rowid")

    def prepare(self, session: Session) -> None:
        """Make the virtual table and the triggers that keep it up to date."""
        if session.scalar(text("SELECT 1 FROM sqlite_master WHERE name = 'entry_words'")):
            return
        columns = ("name", "title", "about", "abstract")
        old, new = (", ".join(f"{row}.{name}" for name in ("id", *columns)) for row in ("old", "new"))
        named = ", ".join(columns)
        forget = f"INSERT INTO entry_words(entry_words, rowid, {named}) VALUES ('delete', {old});"
        learn = f"INSERT INTO entry_words(rowid, {named}) VALUES ({new});"
        for statement in (
            f"CREATE VIRTUAL TABLE entry_words USING fts5({named}, content='entries', content_rowid='id', "
            "tokenize='porter unicode61')",
            f"CREATE TRIGGER entry_words_insert AFTER INSERT ON entries BEGIN {learn} END",
            f"CREATE TRIGGER entry_words_delete AFTER DELETE ON entries BEGIN {forget} END",
            f"CREATE TRIGGER entry_words_update AFTER UPDATE OF {named} ON entries BEGIN {forget} {learn} END",
            "INSERT INTO entry_words(entry_words) VALUES ('rebuild')",
        ):
            session.connection().exec_driver_sql(statement)

    def tidy(self, session: Session) -> None:
        """Merge the segments of the index into one."""
        session.execute(text("INSERT INTO entry_words(entry_words) VALUES ('optimize')"))

    def expression(self, words: list[str], *, every: bool) -> str:
        """A query in FTS5's language; quotes make operators plain words."""
        return (" AND " if every else " OR ").join(f'"{word}"' for word in words)

    def tiers(self, expression: str) -> tuple[str, str]:
        """What finds the papers that match outside their abstract, and what finds the others."""
        outside = f"{{name title about}} : ({expression})"
        return outside, f"({expression}) NOT ({outside})"

    def holds(self, expression: str) -> ColumnElement[bool]:
        """Whether a paper matches."""
        words: ColumnElement[Any] = literal_column("entry_words")
        return words.op("MATCH", is_comparison=True)(expression)

    def rank(self, expression: str) -> ColumnElement[Any]:
        """BM25, where less is better."""
        return literal_column("bm25(entry_words, 8, 5, 4, 2)")

    def marks(self, expression: str) -> tuple[ColumnElement[str], ColumnElement[str]]:
        """Title and a snippet of the abstract, with marks around what matched."""
        words: ColumnElement[Any] = literal_column("entry_words")
        title = func.highlight(words, 1, _OPEN, _CLOSE)
        return title, func.snippet(words, 3, _OPEN, _CLOSE, " … ", _SNIPPET_WORDS)


class TsVector:
    """PostgreSQL's full-text search with its English dictionary, ranked by weight and frequency."""

    id: ColumnElement[Any] = EntryRow.__table__.c.id
    matched: ColumnElement[Any] = id
    _words: ColumnElement[Any] = literal_column("entries.words")

    def prepare(self, session: Session) -> None:
        """Make the column that PostgreSQL computes, and its index."""
        weighted = " || ".join(
            f"setweight(to_tsvector('english', {name}), '{weight}')"
            for name, weight in (("name", "A"), ("title", "B"), ("about", "C"), ("abstract", "D"))
        )
        column = f"ALTER TABLE entries ADD COLUMN IF NOT EXISTS words tsvector GENERATED ALWAYS AS ({weighted}) STORED"
        session.execute(text(column))
        session.execute(text("CREATE INDEX IF NOT EXISTS entry_words ON entries USING gin (words)"))

    def tidy(self, session: Session) -> None:
        """Take what waits beside the index into it, and count anew for the planner."""
        session.execute(text("SELECT gin_clean_pending_list('entry_words')"))
        session.execute(text("ANALYZE entries"))

    def expression(self, words: list[str], *, every: bool) -> str:
        """A query in PostgreSQL's language; quotes make operators plain words."""
        return (" & " if every else " | ").join(f"'{word}'" for word in words)

    def tiers(self, expression: str) -> tuple[str, str]:
        """What finds the papers that match outside their abstract, and what finds the others."""
        outside = re.sub(r"('\w+')", r"\1:ABC", expression)
        return outside, f"({expression}) & !({outside})"

    def holds(self, expression: str) -> ColumnElement[bool]:
        """Whether a paper matches."""
        return self._words.op("@@", is_comparison=True)(func.to_tsquery("english", expression))

    def rank(self, expression: str) -> ColumnElement[Any]:
        """Weighted frequency of the words, dampened for long texts."""
        weights: ColumnElement[Any] = literal_column("'{0.2, 0.4, 0.6, 1.0}'::float4[]")
        return func.ts_rank(weights, self._words, func.to_tsquery("english", expression), 1).desc()

    def marks(self, expression: str) -> tuple[ColumnElement[str], ColumnElement[str]]:
        """Title and a snippet of the abstract, with marks around what matched."""
        query = func.to_tsquery("english", expression)
        marks = f'StartSel="{_OPEN}", StopSel="{_CLOSE}"'
        options = (f"{marks}, HighlightAll=true", f"{marks}, MaxWords={_SNIPPET_WORDS}, MinWords=20")
        title, snippet = (
            # PostgreSQL takes what stands between < and > for a tag and leaves it out.
            func.replace(func.ts_headline("english", func.replace(source, "<", _LESS), query, option), _LESS, "<")
            for source, option in zip((EntryRow.title, EntryRow.abstract), options, strict=True)
        )
        return title, snippet


def ranked(session: Session, words: Words, expression: str, where: Where, limit: int) -> list[int]:
    """Identities of the papers that match, best first.

    Those that match in name, title or labels go before those that need their abstract for it. That is what people
    look for, and there is no need to rank every abstract that holds a common word.
    """
    best: list[int] = []
    for tier in words.tiers(expression):
        if len(best) < limit:
            query = select(words.id).where(*_matching(words, tier, where)).order_by(words.rank(tier), words.id)
            best += session.scalars(query.limit(limit - len(best)))
    return best


def count(session: Session, words: Words, expression: str, where: Where) -> int:
    """How many papers match."""
    return session.scalar(select(func.count(words.id)).where(*_matching(words, expression, where))) or 0


def among(session: Session, words: Words, expression: str, ids: Sequence[int]) -> set[int]:
    """Those of the papers that match."""
    return set(session.scalars(select(words.id).where(words.holds(expression), words.id.in_(ids))))


def marked(session: Session, words: Words, expression: str, ids: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Title and snippet of those of the papers that match, as HTML with `<mark>` around what matched."""
    query = select(words.id, *words.marks(expression)).where(words.holds(expression), words.id.in_(ids))
    return {id: (_html(title), _html(snippet)) for id, title, snippet in session.execute(query)}


def _matching(words: Words, expression: str, where: Where) -> Where:
    inside = [words.matched.in_(select(EntryRow.id).where(*where))] if where else []
    return [words.holds(expression), *inside]


def _html(text: str) -> str:
    return escape(text).replace(_OPEN, "<mark>").replace(_CLOSE, "</mark>")
