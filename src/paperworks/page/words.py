"""Search by words in the store: FTS5 in SQLite, tsvector in PostgreSQL.

Both search what a paper is called here, its title, what labels say about it, and its abstract, in that order of
weight. The database itself keeps them up to date with the table of entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any, ClassVar, NamedTuple, Protocol

# So that its functions are known when queries are made.
import sqlalchemy.dialects.postgresql  # noqa: F401
from sqlalchemy import ColumnElement, Select, String, bindparam, column, func, literal_column, select, table, text
from sqlalchemy.orm import Session

from paperworks.page.tables import EntryRow

# Around what matched, until the rest is escaped; no text in the index holds them.
_OPEN, _CLOSE = "\x02", "\x03"
_LESS = "\x04"
_SNIPPET_WORDS = 40
# What PostgreSQL is to make of a title, and of an abstract.
_WHOLE = f'StartSel="{_OPEN}", StopSel="{_CLOSE}", HighlightAll=true'
_PART = f'StartSel="{_OPEN}", StopSel="{_CLOSE}", MaxWords={_SNIPPET_WORDS}, MinWords=20'

Where = Sequence[ColumnElement[bool]]

# What is sought, in the database's language. A query is made once and run with many expressions: to make it takes longer
# than to run it.
_SOUGHT: ColumnElement[str] = bindparam("sought", type_=String)


class Words(Protocol):
    """What the index asks of a database's full-text search.

    Attributes:
        id: The paper's identity.
        matched: The same, for a filter that is applied to what matches.
        holds: Whether a paper matches what is sought.
        rank: What to order by, so that the best comes first.
        marks: Title and a snippet of the abstract, with marks around what matched.
    """

    id: ClassVar[ColumnElement[Any]]
    matched: ClassVar[ColumnElement[Any]]
    holds: ClassVar[ColumnElement[bool]]
    rank: ClassVar[ColumnElement[Any]]
    marks: ClassVar[tuple[ColumnElement[Any], ColumnElement[Any]]]

    def __hash__(self) -> int:
        """The same for all of one kind."""

    def prepare(self, session: Session) -> None:
        """Make what is searched, where it is missing."""

    def tidy(self, session: Session) -> None:
        """Put in order what many small additions have scattered."""

    def expression(self, words: list[str], *, every: bool) -> str:
        """What finds papers that hold every one of the words, or any."""

    def tiers(self, expression: str) -> tuple[str, str]:
        """What finds the papers that match outside their abstract, and what finds the others."""


@dataclass(frozen=True)
class Fts5:
    """SQLite's FTS5 with Porter stemming, ranked by BM25.

    The text stays in the table of entries; FTS5 holds only the inverted index.
    """

    id: ClassVar[ColumnElement[Any]] = table("entry_words", column("rowid")).c.rowid
    # Given the bare column, SQLite would begin with the filter, and search the index once for each paper that passes it.
    matched: ClassVar[ColumnElement[Any]] = literal_column("+entry_words.rowid")
    _words: ClassVar[ColumnElement[Any]] = literal_column("entry_words")
    holds: ClassVar[ColumnElement[bool]] = _words.op("MATCH", is_comparison=True)(_SOUGHT)
    # BM25, where less is better.
    rank: ClassVar[ColumnElement[Any]] = literal_column("bm25(entry_words, 8, 5, 4, 2)")
    marks: ClassVar[tuple[ColumnElement[Any], ColumnElement[Any]]] = (
        func.highlight(_words, 1, _OPEN, _CLOSE),
        func.snippet(_words, 3, _OPEN, _CLOSE, " … ", _SNIPPET_WORDS),
    )

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


@dataclass(frozen=True)
class TsVector:
    """PostgreSQL's full-text search with its English dictionary, ranked by weight and frequency."""

    id: ClassVar[ColumnElement[Any]] = EntryRow.__table__.c.id
    matched: ClassVar[ColumnElement[Any]] = id
    _words: ClassVar[ColumnElement[Any]] = literal_column("entries.words")
    _query: ClassVar[ColumnElement[Any]] = func.to_tsquery("english", _SOUGHT)
    holds: ClassVar[ColumnElement[bool]] = _words.op("@@", is_comparison=True)(_query)
    # Weighted frequency of the words, dampened for long texts.
    rank: ClassVar[ColumnElement[Any]] = func.ts_rank(
        literal_column("'{0.2, 0.4, 0.6, 1.0}'::float4[]"), _words, _query, 1
    ).desc()

    # PostgreSQL takes what stands between < and > for a tag and leaves it out.
    marks: ClassVar[tuple[ColumnElement[Any], ColumnElement[Any]]] = (
        func.replace(func.ts_headline("english", func.replace(EntryRow.title, "<", _LESS), _query, _WHOLE), _LESS, "<"),
        func.replace(
            func.ts_headline("english", func.replace(EntryRow.abstract, "<", _LESS), _query, _PART), _LESS, "<"
        ),
    )

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


def ranked(session: Session, words: Words, expression: str, where: Where, limit: int) -> list[int]:
    """Identities of the papers that match, best first.

    Those that match in name, title or labels go before those that need their abstract for it. That is what people
    look for, and there is no need to rank every abstract that holds a common word.
    """
    best: list[int] = []
    for tier in words.tiers(expression):
        if len(best) < limit:
            query = _queries(words).ranked.where(*_inside(words, where)).limit(limit - len(best))
            best += session.scalars(query, {"sought": tier})
    return best


def count(session: Session, words: Words, expression: str, where: Where) -> int:
    """How many papers match."""
    query = _queries(words).counted.where(*_inside(words, where))
    return session.scalar(query, {"sought": expression}) or 0


def among(session: Session, words: Words, expression: str, ids: Sequence[int]) -> set[int]:
    """Those of the papers that match."""
    return set(session.scalars(_queries(words).among, {"sought": expression, "ids": ids}))


def marked(session: Session, words: Words, expression: str, ids: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Title and snippet of those of the papers that match, as HTML with `<mark>` around what matched."""
    found = session.execute(_queries(words).marked, {"sought": expression, "ids": ids})
    return {id: (_html(title), _html(snippet)) for id, title, snippet in found}


class _Queries(NamedTuple):
    ranked: Select[Any]
    counted: Select[Any]
    among: Select[Any]
    marked: Select[Any]


@cache
def _queries(words: Words) -> _Queries:
    these = words.id.in_(bindparam("ids", expanding=True))
    return _Queries(
        ranked=select(words.id).where(words.holds).order_by(words.rank, words.id),
        counted=select(func.count(words.id)).where(words.holds),
        among=select(words.id).where(words.holds, these),
        marked=select(words.id, *words.marks).where(words.holds, these),
    )


def _inside(words: Words, where: Where) -> Where:
    return [words.matched.in_(select(EntryRow.id).where(*where))] if where else []


def _html(text: str) -> str:
    return escape(text).replace(_OPEN, "<mark>").replace(_CLOSE, "</mark>")
