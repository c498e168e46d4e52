"""Papers from the cards, from arXiv and from Hugging Face's daily papers, into the index.

What was read stays read: an ingest that is stopped goes on where it was, and the next one begins where the last
ended, a few days earlier, for papers are announced some days after they are submitted. A record that is no paper is left
out and told of, and the rest goes on. So does it past a day that a source does not tell of: that day is told of, and asked
for by each ingest of the week after it and once more.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, TypeVar

import arxiv
import requests
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import PaperInfo
from requests.adapters import HTTPAdapter
from sqlalchemy import delete, select
from sqlalchemy.exc import DataError, IntegrityError

from paperworks import __version__
from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.store import Store
from paperworks.page.entries import ARXIV_NUMBER, Entry, arxiv_number
from paperworks.page.index import Index
from paperworks.page.tables import IngestRow
from paperworks.papers import load_cards

Progress = Callable[[int, int], None]
T = TypeVar("T")

# From the submission of a paper to its announcement, over holidays.
_OVERLAP = timedelta(days=7)
_DAY = timedelta(days=1)
_TRIES = 5
_TIMEOUT = 60
_HF_PAGE, _HF_PAGES = 50, 100
# What SQLAlchemy and the driver below it make of values that a column cannot hold.
_REFUSED = (DataError, IntegrityError, OverflowError)
# Where so many days fail one after another, the source itself may be at fault.
_FAILED_IN_A_ROW = 3
# Clocks go wrong by days.
_AHEAD = timedelta(days=60)
# Of whichever HTTP library the Hub's client uses.
_HUB_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]
_NAMED = {"User-Agent": f"paperworks/{__version__}"}
_IDS_AT_ONCE = 100
_DATE = re.compile(rb"<(published|updated)>([^<]*)</\1>")
_NO_DATE = b"<%b>0001-01-01T00:00:00Z</%b>"
_FIRST_YEAR = 1980


class SourceError(PaperworksError):
    """A source of papers does not answer as it should."""


class RefusedError(SourceError):
    """A source refuses a request, and would do so again."""


@dataclass(frozen=True)
class Told:
    """What a source told.

    Attributes:
        entries: The papers.
        odd: What is no paper to take in, a sentence each.
    """

    entries: list[Entry] = field(default_factory=list)
    odd: tuple[str, ...] = ()

    def __add__(self, other: Told) -> Told:
        return Told(self.entries + other.entries, self.odd + other.odd)


@dataclass(frozen=True)
class Ingested:
    """What an ingest brought.

    Attributes:
        read: How many papers the source told of.
        new: How many of them the index did not hold.
        updated: How many it held otherwise.
        left_out: What the source told that is no paper, and days that it did not tell of, a sentence each.
    """

    read: int
    new: int
    updated: int
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Ingested) -> Ingested:
        return Ingested(
            self.read + other.read,
            self.new + other.new,
            self.updated + other.updated,
            self.left_out + other.left_out,
        )


class _Timely(HTTPAdapter):
    """Gives a request up that nobody answers."""

    def __init__(self, timeout: float | None) -> None:
        super().__init__()
        self._timeout = timeout

    def send(self, *args: Any, **options: Any) -> requests.Response:
        response = super().send(*args, **{**options, "timeout": self._timeout or _TIMEOUT})
        # One date that is none would fail its whole page.
        response._content = _DATE.sub(
            lambda date: date[0] if _is_time(date[2]) else _NO_DATE % (date[1], date[1]), response.content
        )
        return response


def _is_time(text: bytes) -> bool:
    try:
        return bool(datetime.fromisoformat(text.decode().strip()).astimezone(UTC))
    except (ValueError, OverflowError):
        return False


class Arxiv:
    """arXiv's API, asked as politely as its terms of use want: one request every three seconds.

    A request that fails is tried again after twice the time each time.

    Args:
        url: Where the API is.
        delay: Seconds between two requests.
        page_size: Papers a request, at most 2,000.
        tries: How often to ask before giving up.
        timeout: Seconds to wait for an answer, a minute by default.
    """

    def __init__(
        self,
        url: str = "https://export.arxiv.org/api/query",
        *,
        delay: float = 3.0,
        page_size: int = 200,
        tries: int = _TRIES,
        timeout: float | None = None,
    ) -> None:
        self._client = arxiv.Client(page_size=page_size, delay_seconds=delay, num_retries=0)
        self._client.query_url_format = url + "?{}"
        for scheme in ("http://", "https://"):
            self._client._session.mount(scheme, _Timely(timeout))
        self._delay, self._tries = delay, tries
        self._lock = threading.Lock()

    def submitted(self, category: str, since: datetime, until: datetime) -> Told:
        """Papers of a category submitted from one time to another, to the minute."""
        span = f"[{since:%Y%m%d%H%M} TO {until:%Y%m%d%H%M}]"
        search = arxiv.Search(
            f"cat:{category} AND submittedDate:{span}", max_results=None,
            sort_by=arxiv.SortCriterion.SubmittedDate, sort_order=arxiv.SortOrder.Ascending,
        )  # fmt: skip

        def results() -> list[arxiv.Result]:
            # The API sometimes answers with nothing where there is something.
            return list(self._client.results(search)) or list(self._client.results(search))

        return self._ask(results)

    def revised(self, category: str, since: datetime) -> Told:
        """Papers of a category submitted or revised since, newest first."""
        search = arxiv.Search(
            f"cat:{category}", max_results=None,
            sort_by=arxiv.SortCriterion.LastUpdatedDate, sort_order=arxiv.SortOrder.Descending,
        )  # fmt: skip

        def until_older() -> list[arxiv.Result]:
            taken = []
            for result in self._client.results(search):
                if result.updated.year >= _FIRST_YEAR and result.updated < since:
                    break
                taken.append(result)
            return taken

        return self._ask(until_older)

    def papers(self, numbers: list[str]) -> Told:
        """The newest versions of these papers, as far as arXiv has them."""
        search = arxiv.Search(id_list=numbers, max_results=len(numbers))
        return self._ask(lambda: list(self._client.results(search)))

    def _ask(self, results: Callable[[], list[arxiv.Result]]) -> Told:
        def asked() -> Told:
            try:
                with self._lock:
                    found = results()
            except arxiv.HTTPError as error:
                raise _Failure(f"HTTP {error.status}", for_good=_for_good(error.status)) from error
            # A date that is none fails its whole page.
            except (arxiv.ArxivError, requests.RequestException, ValueError, OverflowError) as error:
                raise _Failure(str(error)) from error
            return _sound(found, _of_arxiv, "arXiv", lambda result: result.entry_id)

        return _retried(asked, "arXiv", self._delay, self._tries)


class DailyPapers:
    """Hugging Face's daily papers.

    Args:
        url: Where the Hub is; HF_ENDPOINT or huggingface.co by default.
        delay: Seconds between two requests.
    """

    def __init__(self, url: str | None = None, *, delay: float = 1.0) -> None:
        self._url = f"{HfApi(endpoint=url).endpoint}/api/daily_papers"
        self._delay = delay

    def of_day(self, day: datetime) -> Told:
        """The papers of a day."""
        told = Told()
        for page in range(_HF_PAGES):
            found = _retried(lambda page=page: self._page(day, page), "Hugging Face", self._delay, _TRIES)  # type: ignore[misc]
            told += _sound(found, _of_daily, "Hugging Face", _daily_name)
            time.sleep(self._delay)
            if len(found) < _HF_PAGE:
                break
        return told

    def _page(self, day: datetime, page: int) -> list[Any]:
        # As they come, for the Hub's client fails a whole page with one record that it does not understand.
        asked: dict[str, str | int] = {"date": f"{day:%Y-%m-%d}", "p": page, "limit": _HF_PAGE}
        try:
            with _patience():
                answer = get_session().get(self._url, params=asked, headers=_NAMED)
            if answer.status_code >= 300:
                raise _Failure(f"HTTP {answer.status_code}", for_good=_for_good(answer.status_code))
            found = answer.json()
        except _HUB_ERROR as error:
            raise _Failure(str(error) or type(error).__name__) from error
        except ValueError as error:
            raise _Failure("its answer is no JSON") from error
        if not isinstance(found, list):
            raise _Failure(f"its answer is no list of papers: {str(found)[:100]}")
        return found


@contextmanager
def _patience() -> Iterator[None]:
    """Have the Hub's client, which all share and which waits for ever, give a request up that nobody answers."""
    client = get_session()
    before, client.timeout = client.timeout, _TIMEOUT
    try:
        yield
    finally:
        client.timeout = before


@contextmanager
def _then(what: str) -> Iterator[None]:
    """Say of a source that does not answer what comes of it or can be done."""
    try:
        yield
    except RefusedError:
        raise
    except SourceError as error:
        raise SourceError(f"{error}; {what}") from error


_GOES_ON = "what was read is kept, and the same command goes on from there"


@_then(_GOES_ON)
def ingest_arxiv(
    index: Index,
    store: Store,
    category: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    source: Arxiv | None = None,
    progress: Progress | None = None,
) -> Ingested:
    """Take a category of arXiv into the index, day by day, and what was revised since the last time.

    Args:
        index: Where the papers go.
        store: Where it is kept how far the category has been read; that of the index.
        category: arXiv category, such as `cs.LG`.
        since: From when; where the last ingest ended by default, or a week ago.
        until: To when; now by default.
        source: arXiv's API.
        progress: Called with the days done and the days there are.

    Raises:
        UsageError: The category is not one, or `since` is not before `until`.
        SourceError: arXiv does not answer, or not as it should.
    """
    if not re.fullmatch(r"[a-z-]+(\.[A-Za-z-]+)?", category):
        raise UsageError(f"an arXiv category is one such as cs.LG, not {category!r}")
    api = source or Arxiv()
    began = datetime.now(UTC)
    name = f"arxiv:{category}"
    days = _read_by_day(
        index, store, name, since, until or began, lambda start, end: api.submitted(category, start, end), progress
    )
    with store.reading() as session:
        revised = session.get_one(IngestRow, name).revised
    if revised is not None:
        days += _take(index, api.revised(category, datetime.fromtimestamp(revised, UTC) - _OVERLAP))
    with store.writing() as session:
        session.get_one(IngestRow, name).revised = began.timestamp()
    return days


@_then(_GOES_ON)
def ingest_daily_papers(
    index: Index,
    store: Store,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    source: DailyPapers | None = None,
    progress: Progress | None = None,
) -> Ingested:
    """Take Hugging Face's daily papers into the index, day by day, with their upvotes.

    Args:
        index: Where the papers go.
        store: Where it is kept how far they have been read; that of the index.
        since: From which day; where the last ingest ended by default, or a week ago.
        until: To which day; now by default.
        source: The Hub.
        progress: Called with the days done and the days there are.

    Raises:
        UsageError: `since` is not before `until`.
        SourceError: The Hub does not answer, or not as it should.
    """
    api = source or DailyPapers()
    return _read_by_day(
        index, store, "daily-papers", since, until or datetime.now(UTC), lambda start, end: api.of_day(start), progress
    )


def ingest_cards(index: Index, *, abstracts: bool = False, source: Arxiv | None = None) -> Ingested:
    """Take the cards into the index.

    Args:
        index: Where the papers go.
        abstracts: Whether to ask arXiv for their abstracts, authors and dates.
        source: arXiv's API.

    Raises:
        SourceError: arXiv does not answer, or not as it should.
    """
    cards = load_cards().values()
    changed = index.sync_cards()
    done = Ingested(len(cards), 0, changed)
    numbers = [card.arxiv for card in cards if card.arxiv] if abstracts else []
    api = source or Arxiv()
    for start in range(0, len(numbers), _IDS_AT_ONCE):
        done += _take(index, api.papers(numbers[start : start + _IDS_AT_ONCE]))
    return done


def known(index: Index, address: str) -> Entry | None:
    """The paper of this arXiv number or address where the index holds what arXiv tells of it, else None.

    Raises:
        UsageError: The address names no paper.
    """
    entry = index.get(arxiv_number(address))
    return entry if entry is not None and entry.source == "arxiv" else None


def submit(index: Index, address: str, *, source: Arxiv | None = None) -> Entry:
    """Take one paper into the index, by its arXiv number or address.

    Args:
        index: Where the paper goes.
        address: Such as `2402.05109`, `arXiv:2402.05109v2` or the address of its page at arXiv or Hugging Face.
        source: arXiv's API; by default one that all submissions of this process share, to keep their distance.

    Returns:
        The paper as the index holds it; arXiv is not asked for what came from there before.

    Raises:
        UsageError: The address names no paper, or arXiv has none of this number.
        SourceError: arXiv does not answer, or not as it should.
    """
    if (held := known(index, address)) is not None:
        return held
    number = arxiv_number(address)
    with _then("submit the paper again in a while"):
        told = (source or _shared_arxiv()).papers([number])
    if told.odd:
        raise SourceError(told.odd[0])
    if not told.entries:
        raise UsageError(f"arXiv has no paper {number}")
    index.add(told.entries)
    held = index.get(told.entries[0].key)
    assert held is not None
    return held


@cache
def _shared_arxiv() -> Arxiv:
    # A reader waits for the answer, and others behind.
    return Arxiv(tries=2, timeout=10)


def _read_by_day(
    index: Index,
    store: Store,
    name: str,
    since: datetime | None,
    until: datetime,
    read: Callable[[datetime, datetime], Told],
    progress: Progress | None,
) -> Ingested:
    start = _begin(store, name, since, until)
    days = list(_days(start, until))
    done = Ingested(0, 0, 0)
    failed: list[tuple[datetime, SourceError]] = []
    for number, (first, last) in enumerate(days):
        if progress:
            progress(number, len(days))
        try:
            told = read(first, last)
        except SourceError as error:
            # A day that fails for ever would stop every later ingest too. It is passed over once the source has answered
            # for a later one; a source that answers for none is asked for the same days next time.
            failed.append((first, error))
            if len(failed) % _FAILED_IN_A_ROW == 0:
                read(*days[-1])
            continue
        done += _take(index, told)
        with store.writing() as session:
            row = session.get_one(IngestRow, name)
            row.reached = max(row.reached, last.timestamp())
            session.execute(delete(IngestRow).where(IngestRow.source == _unread(name, first)))
            for day, reason in failed:
                done += Ingested(0, 0, 0, (f"{day:%Y-%m-%d}: {reason}; the next ingest asks for it again",))
                at = day.timestamp()
                session.merge(IngestRow(source=_unread(name, day), start=at, reached=at, revised=None))
        failed.clear()
    if failed:
        raise failed[0][1]
    if days:
        done += _read_once_more(index, store, name, days, read)
    if progress:
        progress(len(days), len(days))
    return done


def _read_once_more(
    index: Index,
    store: Store,
    name: str,
    days: list[tuple[datetime, datetime]],
    read: Callable[[datetime, datetime], Told],
) -> Ingested:
    """Ask once more for what could not be read of the time before these days."""
    done = Ingested(0, 0, 0)
    with store.reading() as session:
        before = (IngestRow.source.startswith(f"{name} ", autoescape=True), IngestRow.start < days[0][0].timestamp())
        starts = session.scalars(select(IngestRow.start).where(*before).order_by(IngestRow.start)).all()
    for start in starts:
        first, last = next(_days(datetime.fromtimestamp(start, UTC), days[-1][1]))
        try:
            done += _take(index, read(first, last))
        except SourceError as error:
            # Unless it is the source that is at fault.
            read(*days[-1])
            done += Ingested(0, 0, 0, (f"{first:%Y-%m-%d}: {error}; it is given up",))
        with store.writing() as session:
            session.execute(delete(IngestRow).where(IngestRow.source == _unread(name, first)))
    return done


def _unread(name: str, day: datetime) -> str:
    """By what a day that could not be read is kept."""
    return f"{name} {day:%Y-%m-%d}"


def _begin(store: Store, name: str, since: datetime | None, until: datetime) -> datetime:
    """From when to read, so that all from the first time asked for is in the index afterwards."""
    if since is not None and since >= until:
        raise UsageError(f"there is no time from {since:%Y-%m-%d} to {until:%Y-%m-%d}: give an earlier --since")
    with store.writing(alone=True) as session:
        row = session.get(IngestRow, name)
        if row is None:
            start = since or until - _OVERLAP
            session.add(IngestRow(source=name, start=start.timestamp(), reached=start.timestamp(), revised=None))
            return start
        if since is not None and since.timestamp() < row.start:
            row.start = row.reached = since.timestamp()
            return since
        reached = datetime.fromtimestamp(row.reached, UTC)
        return max(datetime.fromtimestamp(row.start, UTC), _midnight(min(reached, until) - _OVERLAP))


def _days(start: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
    """The days from `start` to `until`, the first and the last perhaps cut short."""
    while start < until:
        end = min(_midnight(start) + _DAY, until)
        yield start, end
        start = end


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _take(index: Index, told: Told) -> Ingested:
    """Take what was told into the index; what the store refuses is left out, and the rest goes on."""
    try:
        added = index.add(told.entries)
        return Ingested(len(told.entries), added.new, added.updated, told.odd)
    except _REFUSED:
        done = Ingested(0, 0, 0, told.odd)
    for entry in told.entries:
        try:
            added = index.add([entry])
            done += Ingested(1, added.new, added.updated)
        except _REFUSED as error:
            reason = _in_short(getattr(error, "orig", error))
            done += Ingested(1, 0, 0, (f"{entry.key} is left out, for the store refuses it: {reason}",))
    return done


def _in_short(error: object) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


class _Failure(Exception):
    """A request failed, for good or for now."""

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.for_good = for_good


def _for_good(status: int) -> bool:
    return 400 <= status < 500 and status not in (408, 425, 429)


def _retried(ask: Callable[[], T], source: str, delay: float, tries: int) -> T:
    for wait in (delay * 2**number for number in range(1, tries)):
        try:
            return ask()
        except _Failure as failure:
            if failure.for_good:
                raise RefusedError(f"{source} refuses the request ({failure})") from failure
            time.sleep(wait)
    try:
        return ask()
    except _Failure as failure:
        if failure.for_good:
            raise RefusedError(f"{source} refuses the request ({failure})") from failure
        raise SourceError(f"{source} does not answer ({failure})") from failure


def _sound(records: Iterable[T], make: Callable[[T], Entry], source: str, name: Callable[[T], object]) -> Told:
    """The papers that records tell of; one that cannot be made sense of stops none of the others."""
    entries: list[Entry] = []
    odd: list[str] = []
    for record in records:
        try:
            entries.append(_checked(make(record)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            odd.append(f"{source} tells of {str(name(record))[:100]!r}, which is left out: {_in_short(error)}")
    return Told(entries, tuple(odd))


def _checked(entry: Entry) -> Entry:
    """A paper that every store can hold and every page can show.

    Raises:
        ValueError: It is none.
    """
    labels = (*entry.tags, *entry.categories)
    for what, length, most in (
        ("title", len(entry.title), 2_000),
        ("abstract", len(entry.abstract), 50_000),
        ("list of authors", sum(map(len, entry.authors)), 500_000),
        ("list of labels", sum(map(len, labels)), 20_000),
        ("longest label", max(map(len, labels), default=0), 200),
    ):
        if length > most:
            raise ValueError(f"its {what} has {length:,} characters, and no paper's has more than {most:,}")
    for what, number in (("upvotes", entry.upvotes), ("version", entry.version)):
        if not (isinstance(number, int) and 0 <= number < 2**31):
            raise ValueError(f"its {what} is {str(number)[:20]!r}, which is no number of such")
    if entry.published.year < _FIRST_YEAR:
        raise ValueError("it has no date of publication, or one that is none")
    if entry.published > datetime.now(UTC) + _AHEAD:
        raise ValueError(
            f"it was published on {entry.published:%Y-%m-%d}, which is far ahead, and would lead every list"
        )
    return entry


def _of_arxiv(result: arxiv.Result) -> Entry:
    number = ARXIV_NUMBER.fullmatch(result.get_short_id())
    if number is None:
        raise ValueError("it has no arXiv number")
    return Entry(
        key=number[1], version=int(number[2] or 1), title=result.title, abstract=result.summary,
        authors=tuple(author.name for author in result.authors), categories=tuple(result.categories),
        published=result.published, source="arxiv",
    )  # fmt: skip


def _daily_name(record: Any) -> object:
    """By what a record of the daily papers is known, whatever else is odd about it."""
    paper = record.get("paper") if isinstance(record, dict) else None
    return (paper.get("id") if isinstance(paper, dict) else None) or record


def _of_daily(record: dict[str, Any]) -> Entry:
    # The client takes what it is given apart.
    paper = PaperInfo(**deepcopy(record))
    told: dict[str, Any] = {"published": paper.published_at or paper.submitted_at or datetime.now(UTC)}
    return Entry(
        key=paper.id, version=1, title=paper.title or paper.id, abstract=paper.summary or "",
        authors=tuple(author.name for author in paper.authors or ()),
        tags=tuple(word.lower() for word in paper.ai_keywords or ()),
        source="daily-papers", upvotes=paper.upvotes or 0, **told,
    )  # fmt: skip
