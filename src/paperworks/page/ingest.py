"""Papers from the cards, from arXiv and from Hugging Face's daily papers, into the index.

What was read stays read: an ingest that is stopped goes on where it was, and the next one begins where the last
ended, a few days earlier, for papers are announced some days after they are submitted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, TypeVar

import arxiv
import requests
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import PaperInfo
from requests.adapters import HTTPAdapter

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.store import Store
from paperworks.page.entries import Entry
from paperworks.page.index import Added, Index
from paperworks.page.tables import IngestRow
from paperworks.papers import load_cards

Progress = Callable[[int, int], None]
T = TypeVar("T")

# From the submission of a paper to its announcement, over holidays.
_OVERLAP = timedelta(days=7)
_DAY = timedelta(days=1)
_TRIES = 5
_TIMEOUT = 60
_HF_PAGE = 50
# Of whichever HTTP library the Hub's client uses.
_HUB_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]
_IDS_AT_ONCE = 100
_NUMBER = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v(\d+))?(?:\.pdf)?")
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.|export\.)?(?:arxiv\.org/(?:abs|pdf|html)/|(?:huggingface\.co|hf\.co)/papers/)([^?#]+?)/?(?:[?#].*)?",
    re.IGNORECASE,
)


class SourceError(PaperworksError):
    """A source of papers does not answer as it should."""


@dataclass(frozen=True)
class Ingested:
    """What an ingest brought.

    Attributes:
        read: How many papers the source told of.
        new: How many of them the index did not hold.
        updated: How many it held otherwise.
    """

    read: int
    new: int
    updated: int

    def __add__(self, other: Ingested) -> Ingested:
        return Ingested(self.read + other.read, self.new + other.new, self.updated + other.updated)


class _Timely(HTTPAdapter):
    """Gives a request up that nobody answers."""

    def send(self, *args: Any, **options: Any) -> requests.Response:
        return super().send(*args, **{**options, "timeout": _TIMEOUT})


class Arxiv:
    """arXiv's API, asked as politely as its terms of use want: one request every three seconds.

    A request that fails is tried again after twice the time each time.

    Args:
        url: Where the API is.
        delay: Seconds between two requests.
        page_size: Papers a request, at most 2,000.
        tries: How often to ask before giving up.
    """

    def __init__(
        self,
        url: str = "https://export.arxiv.org/api/query",
        *,
        delay: float = 3.0,
        page_size: int = 200,
        tries: int = _TRIES,
    ) -> None:
        self._client = arxiv.Client(page_size=page_size, delay_seconds=delay, num_retries=0)
        self._client.query_url_format = url + "?{}"
        for scheme in ("http://", "https://"):
            self._client._session.mount(scheme, _Timely())
        self._delay, self._tries = delay, tries
        self._lock = threading.Lock()

    def submitted(self, category: str, since: datetime, until: datetime) -> list[Entry]:
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

    def revised(self, category: str, since: datetime) -> list[Entry]:
        """Papers of a category submitted or revised since, newest first."""
        search = arxiv.Search(
            f"cat:{category}", max_results=None,
            sort_by=arxiv.SortCriterion.LastUpdatedDate, sort_order=arxiv.SortOrder.Descending,
        )  # fmt: skip

        def until_older() -> list[arxiv.Result]:
            taken = []
            for result in self._client.results(search):
                if result.updated < since:
                    break
                taken.append(result)
            return taken

        return self._ask(until_older)

    def papers(self, numbers: list[str]) -> list[Entry]:
        """The newest versions of these papers, as far as arXiv has them."""
        search = arxiv.Search(id_list=numbers, max_results=len(numbers))
        return self._ask(lambda: list(self._client.results(search)))

    def _ask(self, results: Callable[[], list[arxiv.Result]]) -> list[Entry]:
        def asked() -> list[Entry]:
            try:
                with self._lock:
                    return [_of_arxiv(result) for result in results()]
            except arxiv.HTTPError as error:
                raise _Failure(f"HTTP {error.status}", for_good=_for_good(error.status)) from error
            except (arxiv.ArxivError, requests.RequestException) as error:
                raise _Failure(str(error)) from error

        return _retried(asked, "arXiv", self._delay, self._tries)


class DailyPapers:
    """Hugging Face's daily papers.

    Args:
        url: Where the Hub is; HF_ENDPOINT or huggingface.co by default.
        delay: Seconds between two requests.
    """

    def __init__(self, url: str | None = None, *, delay: float = 1.0) -> None:
        self._api = HfApi(endpoint=url)
        self._delay = delay

    def of_day(self, day: datetime) -> list[Entry]:
        """The papers of a day."""
        entries: list[Entry] = []
        for page in range(100):
            found = _retried(lambda page=page: self._page(day, page), "Hugging Face", self._delay, _TRIES)  # type: ignore[misc]
            entries += map(_of_daily, found)
            time.sleep(self._delay)
            if len(found) < _HF_PAGE:
                break
        return entries

    def _page(self, day: datetime, page: int) -> list[PaperInfo]:
        try:
            with _patience():
                return list(self._api.list_daily_papers(date=f"{day:%Y-%m-%d}", p=page, limit=_HF_PAGE, token=False))
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise _Failure(f"HTTP {status}", for_good=_for_good(status)) from error
        except _HUB_ERROR as error:
            raise _Failure(str(error) or type(error).__name__) from error


@contextmanager
def _patience() -> Iterator[None]:
    """Have the Hub's client, which all share and which waits for ever, give a request up that nobody answers."""
    client = get_session()
    before, client.timeout = client.timeout, _TIMEOUT
    try:
        yield
    finally:
        client.timeout = before


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
        entries = api.revised(category, datetime.fromtimestamp(revised, UTC) - _OVERLAP)
        days += _taken(len(entries), index.add(entries))
    with store.writing() as session:
        session.get_one(IngestRow, name).revised = began.timestamp()
    return days


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
        entries = api.papers(numbers[start : start + _IDS_AT_ONCE])
        done += _taken(len(entries), index.add(entries))
    return done


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
    number = arxiv_number(address)
    known = index.get(number)
    if known is not None and known.source == "arxiv":
        return known
    entries = (source or _shared_arxiv()).papers([number])
    if not entries:
        raise UsageError(f"arXiv has no paper {number}")
    index.add(entries)
    held = index.get(entries[0].key)
    assert held is not None
    return held


@cache
def _shared_arxiv() -> Arxiv:
    # A reader waits for the answer.
    return Arxiv(tries=2)


def arxiv_number(address: str) -> str:
    """The arXiv number, without version, in a number or address.

    Raises:
        UsageError: There is none.

    Example:
        >>> arxiv_number("https://arxiv.org/pdf/2402.05109v2.pdf"), arxiv_number("arXiv:2402.05109")
        ('2402.05109', '2402.05109')
    """
    text = address.strip()
    inside = _ADDRESS.fullmatch(text)
    number = _NUMBER.fullmatch(inside[1] if inside else re.sub(r"^arxiv:\s*", "", text, flags=re.IGNORECASE))
    if number is None:
        raise UsageError(f"give an arXiv number such as 2402.05109 or the address of its page, not {address[:100]!r}")
    return number[1]


def _read_by_day(
    index: Index,
    store: Store,
    name: str,
    since: datetime | None,
    until: datetime,
    read: Callable[[datetime, datetime], list[Entry]],
    progress: Progress | None,
) -> Ingested:
    start = _begin(store, name, since, until)
    days = list(_days(start, until))
    done = Ingested(0, 0, 0)
    for number, (first, last) in enumerate(days):
        if progress:
            progress(number, len(days))
        entries = read(first, last)
        done += _taken(len(entries), index.add(entries))
        with store.writing() as session:
            row = session.get_one(IngestRow, name)
            row.reached = max(row.reached, last.timestamp())
    if progress:
        progress(len(days), len(days))
    return done


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
        return max(datetime.fromtimestamp(row.start, UTC), min(reached, until) - _OVERLAP)


def _days(start: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
    """The days from `start` to `until`, the first and the last perhaps cut short."""
    while start < until:
        midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
        end = min(midnight + _DAY, until)
        yield start, end
        start = end


def _taken(read: int, added: Added) -> Ingested:
    return Ingested(read, added.new, added.updated)


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
                raise SourceError(f"{source} refuses the request ({failure})") from failure
            time.sleep(wait)
    try:
        return ask()
    except _Failure as failure:
        raise SourceError(
            f"{source} does not answer ({failure}); what was read is kept, and the same command goes on from there"
        ) from failure


def _of_arxiv(result: arxiv.Result) -> Entry:
    number = _NUMBER.fullmatch(result.get_short_id())
    if number is None:
        raise SourceError(f"arXiv names a paper {result.entry_id!r}, which holds no arXiv number")
    return Entry(
        key=number[1], version=int(number[2] or 1), title=result.title, abstract=result.summary,
        authors=tuple(author.name for author in result.authors), categories=tuple(result.categories),
        published=result.published, source="arxiv",
    )  # fmt: skip


def _of_daily(paper: PaperInfo) -> Entry:
    told: dict[str, Any] = {"published": paper.published_at or paper.submitted_at or datetime.now(UTC)}
    return Entry(
        key=paper.id, version=1, title=paper.title or paper.id, abstract=paper.summary or "",
        authors=tuple(author.name for author in paper.authors or ()),
        tags=tuple(word.lower() for word in paper.ai_keywords or ()),
        source="daily-papers", upvotes=paper.upvotes or 0, **told,
    )  # fmt: skip
