"""A paper of the index, and its row in the store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from paperworks.errors import UsageError
from paperworks.lab import records
from paperworks.page.tables import EntryRow
from paperworks.papers import ROOMS, Paper, load_cards

STATUSES = ("planned", "runs", "measured")
_ARXIV = r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})"
# With its version, as addresses of papers end.
ARXIV_NUMBER = re.compile(rf"({_ARXIV})(?:v(\d+))?(?:\.pdf)?")
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.|export\.)?(?:arxiv\.org/(?:abs|pdf|html)/|(?:huggingface\.co|hf\.co)/papers/)([^?#]+?)/?(?:[?#].*)?",
    re.IGNORECASE,
)
_KEY = re.compile(rf"{_ARXIV}|card:[a-z0-9]+(?:-[a-z0-9]+)*")
# Where several sources tell of one version of a paper, the higher has the say.
_AUTHORITY = {"arxiv": 2, "daily-papers": 1}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A paper of the index.

    Attributes:
        key: arXiv number without its version, or `card:SLUG` for a card without one.
        version: arXiv version; 0 for what only a card tells.
        title: Its title.
        abstract: Its abstract; a card's summary until the abstract is known.
        authors: Their names.
        categories: arXiv categories, the primary first.
        tags: Words to find it by, in lower case.
        published: When it was first published, with a time zone.
        year: Of first publication; that of `published` by default.
        room: Room of its method here, None where it does not run here.
        slug: The card's name, None where it has no card.
        status: How far it has come here: planned, runs or measured; None without a card.
        url: Its page elsewhere; that of arXiv by default, empty where it has none.
        source: Who told of it: arxiv, daily-papers, card or another.
        upvotes: Votes that it has on Hugging Face.

    Raises:
        ValueError: The key is not one, the title is empty or the time has no zone.

    Example:
        >>> entry = Entry(key="2402.05109", title="Hydra", published=datetime(2024, 2, 7, tzinfo=UTC))
        >>> entry.year, entry.url
        (2024, 'https://arxiv.org/abs/2402.05109')
    """

    key: str
    version: int = 0
    title: str
    abstract: str = ""
    authors: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    published: datetime
    year: int = 0
    room: str | None = None
    slug: str | None = None
    status: str | None = None
    url: str = ""
    source: str = ""
    upvotes: int = 0

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a key is an arXiv number without version or card:SLUG, not {self.key!r}")
        if self.published.tzinfo is None:
            raise ValueError(f"{self.key}: published has no time zone; give it one, such as datetime.UTC")
        for name in ("title", "abstract"):
            object.__setattr__(self, name, _clean(getattr(self, name)))
        for name in ("authors", "categories", "tags"):
            cleaned = map(_clean, getattr(self, name))
            object.__setattr__(self, name, tuple(dict.fromkeys(word for word in cleaned if word)))
        if not self.title:
            raise ValueError(f"{self.key}: the title is empty")
        object.__setattr__(self, "year", self.year or self.published.year)
        if not self.url and not self.key.startswith("card:"):
            object.__setattr__(self, "url", f"https://arxiv.org/abs/{self.key}")


def arxiv_number(address: str) -> str:
    """The arXiv number, without version, in a number or address.

    Raises:
        UsageError: There is none.

    Example:
        >>> arxiv_number("https://arxiv.org/pdf/2402.05109v2.pdf"), arxiv_number("arXiv:2402.05109")
        ('2402.05109', '2402.05109')
    """
    number = number_in(address)
    if number is None:
        raise UsageError(
            f"give an arXiv number such as 2402.05109 or the address of its page, not {address.strip()[:100]!r}"
        )
    return number


def number_in(query: str) -> str | None:
    """The arXiv number, without version, where a query is nothing but one or the address of its page; else None.

    Example:
        >>> number_in(" arxiv.org/abs/cs/0309136v1 "), number_in("faster than 2402.05109")
        ('cs/0309136', None)
    """
    text = query.strip()
    inside = _ADDRESS.fullmatch(text)
    number = ARXIV_NUMBER.fullmatch(inside[1] if inside else re.sub(r"^arxiv:\s*", "", text, flags=re.IGNORECASE))
    return None if number is None else number[1]


def _clean(text: str) -> str:
    """Text in one line, without control characters and half characters, which a database would refuse."""
    whole = text.encode("utf-8", "ignore").decode()
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", whole).split())


def of_card(card: Paper) -> Entry:
    """What a card tells of its paper."""
    known = card.arxiv is not None
    year, month = (2000 + int(card.arxiv[:2]), int(card.arxiv[2:4])) if card.arxiv else (card.year, 1)
    return Entry(
        key=card.arxiv if card.arxiv else f"card:{card.slug}", title=card.title, abstract=card.summary,
        authors=card.authors, tags=card.tags, published=datetime(year, month, 1, tzinfo=UTC), year=card.year,
        room=card.room, slug=card.slug, status=records.status(card),
        url=card.url if known and card.url else card.code or "", source="card",
    )  # fmt: skip


def merged(known: Entry, told: Entry) -> Entry:
    """One entry of two tellings of a paper, the second of which comes later."""
    later = (told.version, _AUTHORITY.get(told.source, 0)) >= (known.version, _AUTHORITY.get(known.source, 0))
    chosen, other = (told, known) if later else (known, told)
    card = told if told.slug else known
    return replace(
        chosen,
        abstract=chosen.abstract or other.abstract,
        authors=chosen.authors or other.authors,
        categories=chosen.categories or other.categories,
        tags=(*known.tags, *told.tags),
        room=card.room,
        slug=card.slug,
        status=card.status,
        upvotes=told.upvotes if told.source == "daily-papers" else known.upvotes,
    )


_FIELDS = tuple(field.name for field in fields(Entry))
STORED = (*_FIELDS, "name", "about")
# Where one of these changes, so may what is embedded of a paper.
EMBEDDED = ("title", "abstract", "room", "slug")
ENTRY_COLUMNS = (EntryRow.id, *(getattr(EntryRow, name) for name in _FIELDS))
RUNS_HERE = EntryRow.status.in_(("runs", "measured"))

# Made once: to build a query takes longer than to run this one.
_OF_IDS = select(*ENTRY_COLUMNS).where(EntryRow.id.in_(bindparam("ids", expanding=True)))


def entries_of(session: Session, ids: Sequence[int]) -> dict[int, Entry]:
    """The papers of these rows that there are, in no order."""
    return {row.id: of_row(row) for row in session.execute(_OF_IDS, {"ids": ids})}


def read_entries(session: Session, query: Any) -> list[tuple[int, Entry]]:
    """Papers with their row's number, of a query that selects `ENTRY_COLUMNS`."""
    return [(row.id, of_row(row)) for row in session.execute(query)]


def entry_id_of(session: Session, key: str) -> int:
    """The number of the row of the paper with this key.

    Raises:
        UsageError: The index holds none.
    """
    id = session.scalar(select(EntryRow.id).where(EntryRow.key == key))
    if id is None:
        raise UsageError(f"the index holds no paper {key!r}; search for it, or submit it")
    return id


def of_row(row: Any) -> Entry:
    """The paper of a row that holds `ENTRY_COLUMNS`."""
    values = {name: getattr(row, name) for name in _FIELDS}
    return Entry(**{**values, "published": datetime.fromtimestamp(row.published, UTC)})


def values_of(entry: Entry) -> dict[str, Any]:
    """The columns of an entry."""
    values = {name: getattr(entry, name) for name in _FIELDS}
    values["published"] = entry.published.timestamp()
    for name in ("authors", "categories", "tags"):
        values[name] = list(values[name])
    card = load_cards().get(entry.slug or "")
    values["name"] = " ".join((card.slug, *card.names, card.room, ROOMS[card.room])) if card else ""
    values["about"] = " ".join((*entry.tags, *entry.categories, *entry.authors, card.summary if card else "")).strip()
    return values


def text_of(entry: Entry) -> str:
    """What is embedded of a paper."""
    card = load_cards().get(entry.slug or "")
    return ". ".join(dict.fromkeys((entry.title, *([card.summary] if card else ()), entry.abstract)))
