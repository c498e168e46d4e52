"""Ingesting, from servers of our own that speak as arXiv and Hugging Face do."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest
from huggingface_hub import get_session

from paperworks import cli
from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import index as index_module
from paperworks.page import ingest as module
from paperworks.page.index import Index
from paperworks.page.ingest import (
    Arxiv,
    DailyPapers,
    Ingested,
    SourceError,
    arxiv_number,
    ingest_arxiv,
    ingest_cards,
    ingest_daily_papers,
    submit,
)
from paperworks.papers import load_cards

NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)
ENTRY = """<entry><id>http://arxiv.org/abs/{number}v{version}</id><updated>{updated}</updated>
<published>{published}</published><title>{title}</title><summary>{summary}</summary>
<author><name>Ann Ä</name></author><author><name>Bob</name></author>
<link href="https://arxiv.org/pdf/{number}v{version}" rel="related" type="application/pdf" title="pdf"/>
<category term="{category}" scheme="http://arxiv.org/schemas/atom"/></entry>"""


class Source:
    """Papers, the requests that came for them, and statuses to answer with first."""

    def __init__(self) -> None:
        self.papers: list[dict] = []
        self.daily: dict[str, list[dict] | str] = {}
        # Statuses for days of the daily papers, and for those whose papers arXiv is asked for.
        self.refused: dict[str, int] = {}
        self.requests: list[tuple[float, dict[str, str]]] = []
        self.failures: list[int | str] = []
        self.url = ""

    def add(self, day: float, *, version=1, updated=None, number=None, title=None, category="cs.LG") -> str:
        number = number or f"2611.{len(self.papers) + 1:05d}"
        published = NOVEMBER + timedelta(days=day)
        self.papers = [paper for paper in self.papers if paper["number"] != number]
        self.papers.append(
            {
                "number": number, "version": version, "published": published, "category": category,
                "updated": published if updated is None else NOVEMBER + timedelta(days=updated),
                "title": title or f"Paper {number}", "summary": "Of\n  <math> & $x$.",
            }
        )  # fmt: skip
        return number

    def feed(self, asked: dict[str, str]) -> str:
        found = self.papers
        if asked.get("id_list"):
            found = [paper for paper in found if paper["number"] in asked["id_list"].split(",")]
        query = asked.get("search_query", "")
        if wanted := re.search(r"cat:(\S+)", query):
            found = [paper for paper in found if paper["category"] == wanted[1]]
        if span := re.search(r"submittedDate:\[(\d{12}) TO (\d{12})\]", query):
            found = [paper for paper in found if span[1] <= f"{paper['published']:%Y%m%d%H%M}" <= span[2]]
        field = "updated" if asked["sortBy"] == "lastUpdatedDate" else "published"
        found = sorted(found, key=lambda paper: paper[field], reverse=asked["sortOrder"] == "descending")
        start, size = int(asked["start"]), int(asked["max_results"])
        entries = "".join(
            ENTRY.format(
                **{**paper, "title": escape(paper["title"]), "summary": escape(paper["summary"])}
                | {name: f"{paper[name]:%Y-%m-%dT%H:%M:%SZ}" for name in ("published", "updated")}
            )
            for paper in found[start : start + size]
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom" '
            'xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
            f"<opensearch:totalResults>{len(found)}</opensearch:totalResults>{entries}</feed>"
        )

    def arxiv(self, **options) -> Arxiv:
        return Arxiv(f"{self.url}/api/query", **{"delay": 0.001, "page_size": 3, **options})

    def hub(self, **options) -> DailyPapers:
        return DailyPapers(self.url, **{"delay": 0.001, **options})


def day_of(asked: dict[str, str]) -> str:
    """The day that a request is for, if it is for one."""
    if span := re.search(r"submittedDate:\[(\d{4})(\d\d)(\d\d)", asked.get("search_query", "")):
        return "-".join(span.groups())
    return asked.get("date", "")


@contextmanager
def serving(source: Source):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            address = urlsplit(self.path)
            asked = {name: values[0] for name, values in parse_qs(address.query).items()}
            source.requests.append((time.monotonic(), asked))
            status, body = 200, ""
            failure = source.failures.pop(0) if source.failures else None
            if failure == "empty":
                body = source.feed({**asked, "id_list": "none"})
            elif failure == "silent":
                time.sleep(0.5)
                return
            elif failure == "hang up":
                self.connection.close()
                return
            elif failure:
                status = int(failure)
            elif day := source.refused.get(day_of(asked)):
                status = day
            elif address.path == "/api/daily_papers":
                page, limit = int(asked.get("p", 0)), int(asked["limit"])
                found = source.daily.get(asked["date"], [])
                body = found if isinstance(found, str) else json.dumps(found[page * limit : (page + 1) * limit])
            else:
                body = source.feed(asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    source.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield source
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def source():
    with serving(Source()) as served:
        yield served


# Over SQLite and PostgreSQL; the others look at the source, whatever the store.
over_both = pytest.mark.usefixtures("store_url")


@pytest.fixture
def store(request, tmp_path):
    both = "store_url" in request.fixturenames
    with Store(request.getfixturevalue("store_url") if both else tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def index(store, monkeypatch):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    return Index(store)


def november(day: float) -> datetime:
    return NOVEMBER + timedelta(days=day)


@over_both
def test_papers_come_from_arxiv(index, store, source):
    for day in (0.0, 0.5, 0.9, 1.0, 1.2, 1.3, 1.4, 2.5):
        source.add(day)
    source.add(1.1, category="cs.CL")
    source.add(-1)
    seen = []
    done = ingest_arxiv(
        index, store, "cs.LG", since=NOVEMBER, until=november(3), source=source.arxiv(),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    # What was submitted at midnight belongs to two days.
    assert done == Ingested(9, 8, 0)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert index.search("").total == 8
    entry = index.get("2611.00001")
    assert (entry.title, entry.abstract, entry.authors) == ("Paper 2611.00001", "Of <math> & $x$.", ("Ann Ä", "Bob"))
    assert (entry.version, entry.categories, entry.published, entry.source) == (1, ("cs.LG",), NOVEMBER, "arxiv")
    assert entry.url == "https://arxiv.org/abs/2611.00001"


def test_the_same_again_brings_nothing_new(index, store, source):
    for day in range(4):
        source.add(day + 0.5)
    options = {"since": NOVEMBER, "until": november(4), "source": source.arxiv()}
    assert ingest_arxiv(index, store, "cs.LG", **options).new == 4
    again = ingest_arxiv(index, store, "cs.LG", **options)
    assert (again.new, again.updated) == (0, 0) and index.search("").total == 4


@over_both
def test_an_ingest_goes_on_where_it_was_stopped(index, store, source):
    for day in range(30):
        source.add(day + 0.5)
    answered = 0

    def stop(done, total):
        nonlocal answered
        answered = done
        if done == 20:
            raise KeyboardInterrupt

    options = {"since": NOVEMBER, "until": november(30), "source": source.arxiv()}
    with pytest.raises(KeyboardInterrupt):
        ingest_arxiv(index, store, "cs.LG", progress=stop, **options)
    assert answered == 20 and index.search("").total == 20
    source.requests.clear()
    assert ingest_arxiv(index, store, "cs.LG", **options).new == 10
    assert index.search("").total == 30
    # The days read before are not asked for again, but for the week in which papers may still be announced.
    first = re.search(r"\[(\d{8})", source.requests[0][1]["search_query"])[1]
    assert first == "20261114"


@over_both
def test_the_next_ingest_begins_where_the_last_ended(index, store, source):
    source.add(0.5)
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(10), source=source.arxiv())
    late, later = source.add(6.5), source.add(12.5)
    source.requests.clear()
    done = ingest_arxiv(index, store, "cs.LG", until=november(14), source=source.arxiv())
    assert done.new == 2 and index.get(late) and index.get(later)
    assert "[202611040000" in source.requests[0][1]["search_query"]


@over_both
def test_an_earlier_beginning_reads_what_lies_before(index, store, source):
    source.add(-2.5)
    source.add(1.5)
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(2), source=source.arxiv())
    assert index.search("").total == 1
    ingest_arxiv(index, store, "cs.LG", since=november(-4), until=november(2), source=source.arxiv())
    assert index.search("").total == 2


@over_both
def test_a_revision_of_a_paper_read_long_ago_is_taken_in(index, store, source):
    old = source.add(0.5, title="As submitted")
    other = source.add(0.6, title="Not revised")
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(20), source=source.arxiv())
    days_on = (datetime.now(UTC) - NOVEMBER) / timedelta(days=1)
    source.add(0.5, number=old, version=2, title="As revised", updated=days_on + 1)
    done = ingest_arxiv(index, store, "cs.LG", until=november(21), source=source.arxiv())
    assert done.updated == 1
    assert (index.get(old).title, index.get(old).version) == ("As revised", 2)
    assert index.get(other).version == 1 and index.search("").total == 2


def test_categories_are_read_each_for_itself(index, store, source):
    source.add(0.5)
    source.add(0.5, category="cs.CL")
    options = {"since": NOVEMBER, "until": november(1), "source": source.arxiv()}
    assert ingest_arxiv(index, store, "cs.LG", **options).new == 1
    assert ingest_arxiv(index, store, "cs.CL", **options).new == 1


def test_requests_keep_their_distance(index, store, source):
    for hour in range(8):
        source.add(hour / 24)
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(0.9), source=source.arxiv(delay=0.1))
    times = [at for at, _ in source.requests]
    assert len(times) == 3
    assert all(later - earlier >= 0.09 for earlier, later in pairwise(times))


@pytest.mark.parametrize("failure", [500, 503, 429, "hang up"])
def test_a_request_that_fails_is_tried_again_later_and_later(index, store, source, failure):
    source.add(0.5)
    source.failures = [failure] * 3
    done = ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv(delay=0.02))
    assert done.new == 1
    times = [at for at, _ in source.requests]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert len(waits) == 3 and all(wait >= 0.02 * 2**n for n, wait in enumerate(waits, 1))


def test_a_source_that_does_not_answer_is_one_sentence_and_what_was_read_is_kept(index, store, source):
    for day in range(3):
        source.add(day + 0.5)

    def fail(done, total):
        if done == 2:
            source.failures = [503] * 50

    with pytest.raises(SourceError, match=r"arXiv does not answer \(HTTP 503\); what was read is kept") as failed:
        ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(3), source=source.arxiv(), progress=fail)
    assert failed.value.exit_status == 1 and index.search("").total == 2


def test_a_request_refused_for_good_is_not_tried_again(index, store, source):
    source.failures = [400] * 9
    with pytest.raises(SourceError, match=r"arXiv refuses the request \(HTTP 400\)"):
        ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    assert len(source.requests) == 1


def test_an_empty_answer_is_asked_for_twice(index, store, source):
    source.add(0.5)
    source.failures = ["empty"]
    done = ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    assert done.new == 1


def daily(number: str, upvotes: int, **told) -> dict:
    return {
        "paper": {
            "id": number, "authors": [{"_id": "1", "name": "Ann", "hidden": False}], "upvotes": upvotes,
            "publishedAt": "2026-11-01T12:00:00.000Z", "title": f"Daily {number}", "summary": "Of the day.",
        },
        "publishedAt": "2026-11-02T00:00:00.000Z", "title": f"Daily {number}", "summary": "Of the day.",
        "numComments": 1, **told,
    }  # fmt: skip


@over_both
def test_papers_come_from_the_daily_papers(index, store, source):
    source.daily["2026-11-02"] = [daily(f"2611.{n:05d}", n) for n in range(120)]
    source.daily["2026-11-03"] = [daily("2611.00007", 70, ai_keywords=["Diffusion", "speed"]), daily("2611.00900", 9)]
    done = ingest_daily_papers(index, store, since=NOVEMBER, until=november(3), source=source.hub())
    assert done == Ingested(122, 121, 1)
    entry = index.get("2611.00007")
    assert (entry.title, entry.authors, entry.upvotes, entry.source) == (
        "Daily 2611.00007",
        ("Ann",),
        70,
        "daily-papers",
    )
    assert entry.published == datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert entry.key in {hit.entry.key for hit in index.search("", tag="diffusion", limit=200).hits}
    assert {asked["date"] for _, asked in source.requests} == {"2026-11-01", "2026-11-02", "2026-11-03"}


# What records may hold that is no paper, and what is said of it.
ODD = [
    (daily("hydra", 1), "'hydra', which is left out: a key is an arXiv number"),
    (daily("2611.00002/../x", 1), "a key is an arXiv number"),
    (daily("", 1), "which is left out"),
    (daily("2611.00003", 1) | {"title": "\x00 \n"}, "the title is empty"),
    (daily("2611.00004", 1) | {"title": 5}, "'2611.00004', which is left out"),
    (daily("2611.00005", 10**12), "its upvotes is '1000000000000', which is no number of such"),
    (daily("2611.00006", -4), "its upvotes is '-4'"),
    (daily("2611.00007", 1, ai_keywords=["x" * 3000]), "its longest label has 3,000 characters"),
    (daily("2611.00008", 1, title="x" * 3000), "its title has 3,000 characters"),
    (daily("2611.00009", 1, ai_keywords=7), "'2611.00009', which is left out"),
    ({"paper": {"id": "2611.00010", "publishedAt": "yesterday"}, "title": "T"}, "'2611.00010', which is left out"),
    ({"paper": {"id": "2611.00011", "publishedAt": "2999-01-01T00:00:00.000Z"}, "title": "T"}, "which is far ahead"),
    ({"paper": {"id": "2611.00012", "authors": ["Ann"]}, "title": "T"}, "'2611.00012', which is left out"),
    ({"paper": {"id": "2611.00013", "authors": [{"name": None}]}, "title": "T"}, "'2611.00013', which is left out"),
    ({"paper": None}, "which is left out"),
    ({}, "which is left out"),
    ("a paper", "'a paper', which is left out"),
    (None, "'None', which is left out"),
    ([1], "which is left out"),
]


@over_both
def test_an_odd_record_of_the_daily_papers_is_left_out_and_told_of(index, store, source):
    good = [daily(f"2612.{number:05d}", number) for number in range(1, 4)]
    source.daily["2026-11-01"] = [good[0], *(record for record, _ in ODD), good[1]]
    source.daily["2026-11-02"] = [good[2]]
    done = ingest_daily_papers(index, store, since=NOVEMBER, until=november(2), source=source.hub())
    assert (done.read, done.new) == (3, 3) and {index.get(f"2612.0000{n}").upvotes for n in (1, 2, 3)} == {1, 2, 3}
    assert len(done.left_out) == len(ODD)
    for told, (_, expected) in zip(done.left_out, ODD, strict=True):
        assert told.startswith("Hugging Face tells of ") and expected in told and len(told) < 400
    # The next ingest begins where this one ended.
    source.requests.clear()
    ingest_daily_papers(index, store, until=november(4), source=source.hub())
    assert {asked["date"] for _, asked in source.requests} >= {"2026-11-03", "2026-11-04"}


@over_both
def test_what_only_the_store_refuses_is_left_out_too(index, store, source, monkeypatch):
    """As what no check has thought of: here a number that is too large for a column."""
    monkeypatch.setattr(module, "_checked", lambda entry: entry)
    source.daily["2026-11-01"] = [daily("2611.00001", 1), daily("2611.00002", 10**30), daily("2611.00003", 3)]
    done = ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())
    assert done.new == 2 and index.get("2611.00001") and index.get("2611.00003") and not index.get("2611.00002")
    [told] = done.left_out
    assert told.startswith("2611.00002 is left out, for the store refuses it")


def test_a_day_that_is_refused_for_good_is_passed_over_and_told_of(index, store, source):
    source.daily |= {f"2026-11-0{day}": [daily(f"2611.0000{day}", day)] for day in (1, 2, 3)}
    source.refused = {"2026-11-02": 400}
    done = ingest_daily_papers(index, store, since=NOVEMBER, until=november(3), source=source.hub())
    assert done.new == 2 and index.get("2611.00003")
    told = "2026-11-02: Hugging Face refuses the request (HTTP 400); the next ingest asks for it again"
    assert done.left_out == (told,)
    # It was asked for once: it would be refused again.
    assert sum(asked["date"] == "2026-11-02" for _, asked in source.requests) == 1


def test_a_source_that_refuses_everything_is_asked_for_the_same_days_again(index, store, source):
    source.daily |= {f"2026-11-{day:02d}": [daily(f"2611.{day:05d}", day)] for day in range(1, 20)}
    source.refused = {f"2026-11-{day:02d}": 403 for day in range(3, 20)}
    options = {"since": NOVEMBER, "until": november(19), "source": source.hub()}
    with pytest.raises(SourceError, match=r"Hugging Face refuses the request \(HTTP 403\)"):
        ingest_daily_papers(index, store, **options)
    # After three days in a row, and the last of all, it is not bothered any more.
    assert [asked["date"][-2:] for _, asked in source.requests] == ["01", "02", "03", "04", "05", "19"]
    source.refused = {}
    assert ingest_daily_papers(index, store, **options).new == 17


def asked_for(source: Source, day: str) -> int:
    """How often a day was asked for since this was last asked."""
    count = sum(day_of(asked) == day for _, asked in source.requests)
    source.requests.clear()
    return count


def read(index, store, source, kind, day: float, since=None) -> Ingested:
    if kind == "arxiv":
        return ingest_arxiv(index, store, "cs.LG", since=since, until=november(day), source=source.arxiv(tries=2))
    return ingest_daily_papers(index, store, since=since, until=november(day), source=source.hub())


@pytest.fixture(params=["arxiv", "daily-papers"])
def kind(request, source, monkeypatch):
    """A source with a paper a day, and two tries a request."""
    monkeypatch.setattr(module, "_TRIES", 2)
    for day in range(1, 21):
        if request.param == "arxiv":
            source.add(day - 0.5)
        else:
            source.daily[f"2026-11-{day:02d}"] = [daily(f"2611.{day:05d}", day)]
    return request.param


def held(index) -> list[int]:
    """The days whose papers the index holds."""
    return [day for day in range(1, 21) if index.get(f"2611.{day:05d}")]


@over_both
def test_a_day_that_fails_for_ever_keeps_no_later_day_away_and_is_given_up(index, store, source, kind):
    source.refused = {"2026-11-03": 500}
    # On the day itself nothing tells it from a source that is down.
    with pytest.raises(SourceError, match=r"does not answer \(HTTP 500\); what was read is kept, and the same command"):
        read(index, store, source, kind, 3, since=NOVEMBER)
    assert asked_for(source, "2026-11-03") == 2
    name = "arXiv" if kind == "arxiv" else "Hugging Face"
    reason = f"2026-11-03: {name} does not answer (HTTP 500)"
    # An ingest a day: it is asked for in the week in which papers may still be announced, and once more.
    for day in range(4, 20):
        done = read(index, store, source, kind, day)
        tries = asked_for(source, "2026-11-03")
        assert day in held(index) and 3 not in held(index)
        if day <= 10:
            assert (tries, done.left_out) == (2, (f"{reason}; the next ingest asks for it again",)), day
        elif day == 11:
            assert (tries, done.left_out) == (2, (f"{reason}; it is given up",))
        else:
            assert (tries, done.left_out) == (0, ()), day
    assert held(index) == [1, 2, *range(4, 20)]
    # Who reads from an earlier day on reads it again.
    source.refused = {}
    assert read(index, store, source, kind, 20, since=november(-1)).new == 2 and held(index) == [*range(1, 21)]


@over_both
def test_a_day_of_long_ago_that_failed_is_asked_for_once_more(index, store, source, kind):
    source.refused = {"2026-11-03": 503, "2026-11-04": 400}
    done = read(index, store, source, kind, 30, since=NOVEMBER)
    assert len(done.left_out) == 2 and held(index) == [1, 2, *range(5, 21)]
    source.refused = {"2026-11-04": 400}
    source.requests.clear()
    done = read(index, store, source, kind, 30)
    assert (done.new, held(index)) == (1, [1, 2, 3, *range(5, 21)])
    [told] = done.left_out
    assert told.startswith("2026-11-04: ") and told.endswith(" refuses the request (HTTP 400); it is given up")
    assert sum(day_of(asked) == "2026-11-04" for _, asked in source.requests) == 1
    source.requests.clear()
    assert read(index, store, source, kind, 30).left_out == () and asked_for(source, "2026-11-04") == 0


@over_both
def test_many_days_that_fail_in_a_row_are_passed_over_where_the_source_answers_for_the_last(index, store, source, kind):
    source.refused = {f"2026-11-{day:02d}": 500 for day in range(1, 8)}
    done = read(index, store, source, kind, 12, since=NOVEMBER)
    assert held(index) == [8, 9, 10, 11, 12] and len(done.left_out) == 7
    source.refused = {}
    assert read(index, store, source, kind, 12).new == 7 and held(index) == [*range(1, 13)]


def test_a_source_that_is_down_when_a_day_is_asked_for_once_more_does_not_lose_it(index, store, source, kind):
    source.refused = {"2026-11-03": 500}
    read(index, store, source, kind, 30, since=NOVEMBER)

    def down(start, end):
        if start == november(2):
            source.refused |= {"2026-11-30": 500}
        return api(start, end)

    days = [(november(29), november(30))]
    api = (lambda start, end: source.arxiv(tries=2).submitted("cs.LG", start, end)) if kind == "arxiv" else (
        lambda start, end: source.hub().of_day(start)
    )  # fmt: skip
    name = "arxiv:cs.LG" if kind == "arxiv" else kind
    with pytest.raises(SourceError, match=r"does not answer \(HTTP 500\)"):
        module._read_once_more(index, store, name, days, down)
    source.refused = {}
    assert read(index, store, source, kind, 30).new == 1 and held(index) == [*range(1, 21)]


def test_a_day_that_failed_is_asked_for_from_its_beginning(index, store, source):
    """Though ingests do not end at midnight, and the week before the last one's end begins in the middle of it."""
    morning = source.add(2.1)
    source.refused = {"2026-11-03": 500}
    options = {"source": source.arxiv(tries=2)}
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(9.5), **options)
    assert len(ingest_arxiv(index, store, "cs.LG", until=november(9.6), **options).left_out) == 1
    source.refused = {}
    source.requests.clear()
    assert ingest_arxiv(index, store, "cs.LG", until=november(9.7), **options).new == 1 and index.get(morning)
    assert "[202611030000" in source.requests[0][1]["search_query"]
    # It is no debt any more.
    for until in (20, 21):
        source.requests.clear()
        ingest_arxiv(index, store, "cs.LG", until=november(until), **options)
    assert asked_for(source, "2026-11-03") == 0


def test_days_that_failed_are_each_sources_own(index, store, source):
    source.add(2.5)
    source.add(2.6, category="cs.CL")
    source.refused = {"2026-11-03": 500}
    options = {"until": november(20), "source": source.arxiv(tries=2)}
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, **options)
    ingest_arxiv(index, store, "cs.CL", since=NOVEMBER, **options)
    source.refused = {}
    assert ingest_arxiv(index, store, "cs.LG", **options).new == 1
    assert ingest_arxiv(index, store, "cs.CL", **options).new == 1


@pytest.mark.parametrize("body", ["<html>", "", '{"error": "no"}', '"paper"'])
def test_an_answer_that_is_no_list_is_asked_for_again_and_given_up(index, store, source, body):
    source.daily["2026-11-01"] = body
    with pytest.raises(SourceError, match=r"Hugging Face does not answer \(its answer is no (JSON|list of papers)"):
        ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())
    assert len(source.requests) == module._TRIES


def test_a_day_has_an_end_whatever_the_hub_says(index, store, source, monkeypatch):
    monkeypatch.setattr(module, "_HF_PAGES", 3)

    class Endless(list):
        def __getitem__(self, which):
            return [daily(f"2611.{number:05d}", 1) for number in range(50)]

    source.daily["2026-11-01"] = Endless()
    ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub(delay=0))
    assert len(source.requests) == 3


@over_both
def test_an_odd_record_of_arxiv_is_left_out_and_told_of(index, store, source):
    good = [source.add(0.1), source.add(0.9)]
    source.add(0.3, number="2611.77777", title=" ")
    source.add(0.4, number="not-a-number")
    source.add(0.5, number="2611.88888", category="cs.LG", title="x" * 3000)
    done = ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    assert (done.read, done.new) == (2, 2) and all(map(index.get, good))
    assert [told.partition("which is left out: ")[2] for told in done.left_out] == [
        "2611.77777: the title is empty",
        "it has no arXiv number",
        "its title has 3,000 characters, and no paper's has more than 2,000",
    ]
    assert all(told.startswith("arXiv tells of 'http://arxiv.org/abs/") for told in done.left_out)


@pytest.mark.parametrize("date", ["", "soon", "2026-13-45T00:00:00Z", "0001-01-01T00:00:00+14:00"])
@pytest.mark.parametrize("field", ["published", "updated"])
def test_a_date_that_is_none_fails_its_record_and_not_its_page(index, store, source, monkeypatch, field, date):
    good, odd = source.add(0.1), source.add(0.5)
    feed = source.feed

    def with_odd_date(asked):
        whole = re.compile(rf"(<id>http://arxiv.org/abs/{odd}v1</id>.*?<{field}>)[^<]*", re.DOTALL)
        return whole.sub(rf"\g<1>{date}", feed(asked))

    monkeypatch.setattr(source, "feed", with_odd_date)
    done = ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    # When it was revised does not matter to a paper that is read for the first time.
    assert index.get(good) and bool(index.get(odd)) is (field == "updated")
    told = [] if field == "updated" else ["it has no date of publication, or one that is none"]
    assert [told.partition("which is left out: ")[2] for told in done.left_out] == told
    # Nor does it end the reading of what was revised since.
    days_on = (datetime.now(UTC) - NOVEMBER) / timedelta(days=1)
    later = source.add(-40, number="2609.00001", updated=days_on + 1)
    ingest_arxiv(index, store, "cs.LG", until=november(2), source=source.arxiv())
    assert index.get(later)


def test_an_odd_revision_stops_no_later_ingest(index, store, source):
    source.add(0.5)
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    days_on = (datetime.now(UTC) - NOVEMBER) / timedelta(days=1)
    source.add(-40, number="2611.77777", title=" ", updated=days_on + 1)
    revised = source.add(-50, number="2611.66666", title="As revised", version=2, updated=days_on + 1)
    for _ in range(2):
        done = ingest_arxiv(index, store, "cs.LG", until=november(2), source=source.arxiv())
        assert index.get(revised).title == "As revised" and len(done.left_out) == 1


def test_an_odd_paper_is_not_submitted_and_one_is_told_why(index, source):
    source.add(0.5, number="2611.77777", title=" ")
    with pytest.raises(SourceError, match=r"which is left out: 2611\.77777: the title is empty"):
        submit(index, "2611.77777", source=source.arxiv())


def test_the_command_tells_what_was_left_out(source, tmp_path, monkeypatch, capsys):
    source.daily["2026-11-01"] = [daily("2611.00001", 1), daily("hydra", 1)]
    place = ("--url", source.url, "--store", f"sqlite:///{tmp_path}/runs.db", "--words")
    span = ("--since", "2026-11-01", "--until", "2026-11-02")
    status, out, error = run_command(monkeypatch, capsys, "daily-papers", *span, *place)
    assert status == 0 and out.startswith("1 papers read: 1 new")
    assert error.endswith(
        "Hugging Face tells of 'hydra', which is left out: a key is an arXiv number without version or card:SLUG, "
        "not 'hydra'\n"
    )
    status, out, _ = run_command(monkeypatch, capsys, "daily-papers", *span, *place, "--json")
    assert len(json.loads(out)["left_out"]) == 1


def test_the_daily_papers_are_asked_again_when_they_fail(index, store, source):
    source.daily["2026-11-01"] = [daily("2611.00001", 1)]
    source.failures = [503, 429, "hang up"]
    assert ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub()).new == 1
    source.failures = [503] * 9
    with pytest.raises(SourceError, match=r"Hugging Face does not answer \(HTTP 503\)"):
        ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())


@over_both
def test_a_hub_that_does_not_answer_is_given_up(index, store, source, monkeypatch):
    monkeypatch.setattr(module, "_TIMEOUT", 0.05)
    source.daily["2026-11-01"] = [daily("2611.00001", 1)]
    source.failures = ["silent"]
    before = get_session().timeout
    assert ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub()).new == 1
    source.failures = ["silent"] * 9
    with pytest.raises(SourceError, match=r"Hugging Face does not answer \(timed out\)"):
        ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())
    assert get_session().timeout == before


@over_both
def test_a_paper_of_both_sources_is_one(index, store, source):
    number = source.add(0.5)
    source.daily["2026-11-01"] = [daily(number, 33, ai_keywords=["Diffusion", "speed"])]
    ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())
    ingest_arxiv(index, store, "cs.LG", since=NOVEMBER, until=november(1), source=source.arxiv())
    ingest_daily_papers(index, store, since=NOVEMBER, until=november(1), source=source.hub())
    entry = index.get(number)
    assert index.search("").total == 1
    assert (entry.title, entry.upvotes, entry.tags) == (f"Paper {number}", 33, ("diffusion", "speed"))


def test_papers_come_from_the_cards_and_their_abstracts_from_arxiv(index, source):
    cards = load_cards()
    source.add(-900, number=cards["hydra"].arxiv, title=cards["hydra"].title, version=2)
    assert ingest_cards(index) == Ingested(len(cards), 0, len(cards))
    assert source.requests == []
    done = ingest_cards(index, abstracts=True, source=source.arxiv())
    assert done.updated == 1
    entry = index.get("hydra")
    assert (entry.abstract, entry.version, entry.room) == ("Of <math> & $x$.", 2, "decoding")
    asked = {number for _, request in source.requests for number in request["id_list"].split(",")}
    assert asked == {card.arxiv for card in cards.values() if card.arxiv}
    assert ingest_cards(index).updated == 0


def test_a_paper_is_submitted_by_number_or_address(index, source):
    number = source.add(0.5)
    for address in (number, f"https://arxiv.org/abs/{number}v1"):
        assert submit(index, address, source=source.arxiv()).key == number
    assert index.search("").total == 1 and len(source.requests) == 1
    with pytest.raises(UsageError, match=r"arXiv has no paper 2611\.99999"):
        submit(index, "2611.99999", source=source.arxiv())


def test_a_card_is_submitted_to_get_its_abstract(index, source):
    index.sync_cards()
    source.add(-900, number="2402.05109", version=2)
    entry = submit(index, "https://hf.co/papers/2402.05109", source=source.arxiv())
    assert (entry.slug, entry.version, entry.abstract) == ("hydra", 2, "Of <math> & $x$.")


def test_submissions_of_a_process_keep_their_distance(index, source, monkeypatch):
    monkeypatch.setattr(module, "Arxiv", lambda tries, timeout: source.arxiv(delay=0.1, tries=tries, timeout=timeout))
    module._shared_arxiv.cache_clear()
    numbers = [source.add(0.5), source.add(0.6)]
    for number in numbers:
        submit(index, number)
    first, second = (at for at, _ in source.requests)
    assert second - first >= 0.09
    source.failures = [503] * 9
    told = r"^arXiv does not answer \(HTTP 503\); submit the paper again in a while$"
    with pytest.raises(SourceError, match=told):
        submit(index, "2611.00900")
    assert len(source.requests) == 4
    module._shared_arxiv.cache_clear()


@pytest.mark.parametrize(
    "address",
    [
        "2402.05109", " arXiv:2402.05109v3 ", "arxiv.org/abs/2402.05109", "http://www.arxiv.org/pdf/2402.05109v1.pdf",
        "https://export.arxiv.org/abs/2402.05109", "https://huggingface.co/papers/2402.05109", "hf.co/papers/2402.05109/",
        "https://arxiv.org/html/2402.05109v2?x=1#S2", "https://arxiv.org/pdf/2402.05109",
    ],
)  # fmt: skip
def test_an_address_holds_its_number(address):
    assert arxiv_number(address) == "2402.05109"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "hydra",
        "https://example.org/abs/2402.05109",
        "https://arxiv.org/list/cs.LG",
        "2402.05109 or 2402.05110",
        "x" * 9999,
    ],
)
def test_an_address_without_a_number_is_refused(address):
    with pytest.raises(UsageError, match="give an arXiv number such as"):
        arxiv_number(address)


def test_old_numbers_are_known():
    assert arxiv_number("https://arxiv.org/abs/math.GT/0309136v1") == "math.GT/0309136"


def test_bad_use_is_one_sentence(index, store, source):
    with pytest.raises(UsageError, match=r"an arXiv category is one such as cs\.LG, not 'cs.LG OR all:x'"):
        ingest_arxiv(index, store, "cs.LG OR all:x", source=source.arxiv())
    with pytest.raises(UsageError, match="there is no time from 2026-11-03 to 2026-11-01"):
        ingest_arxiv(index, store, "cs.LG", since=november(2), until=NOVEMBER, source=source.arxiv())
    assert source.requests == []


def test_days_cover_the_time_without_gap_or_overlap():
    start, end = datetime(2026, 10, 30, 7, 5, tzinfo=UTC), datetime(2026, 11, 2, 3, tzinfo=UTC)
    days = list(module._days(start, end))
    assert days[0][0] == start and days[-1][1] == end and len(days) == 4
    assert all(earlier[1] == later[0] for earlier, later in pairwise(days))


def run_command(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["paperworks", "ingest", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_the_command_takes_in_what_it_names(source, store_url, monkeypatch, capsys):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    number = source.add(0.5)
    source.daily["2026-11-01"] = [daily("2611.00900", 3)]
    place = ("--store", store_url, "--json", "--words")
    status, out, _ = run_command(monkeypatch, capsys, "cards", *place)
    cards = len(load_cards())
    assert (status, json.loads(out)["held"]) == (0, cards)
    span = ("--since", "2026-11-01", "--until", "2026-11-02")
    where = ("--url", f"{source.url}/api/query")
    status, out, _ = run_command(monkeypatch, capsys, "arxiv", "--category", "cs.LG", *span, *where, *place)
    assert status == 0
    assert json.loads(out) == {
        "read": 1, "new": 1, "updated": 0, "embedded": 0, "held": cards + 1, "left_out": [],
    }  # fmt: skip
    status, out, _ = run_command(monkeypatch, capsys, "daily-papers", *span, "--url", source.url, *place[:2])
    assert (status, out) == (0, f"1 papers read: 1 new, 0 updated; the index holds {cards + 2}\n")
    with Store(store_url) as store:
        assert Index(store).get(number).published == november(0.5)


def test_a_command_that_cannot_read_is_one_sentence(source, tmp_path, monkeypatch, capsys):
    source.failures = [404] * 4
    where = ("--url", f"{source.url}/api/query", "--store", f"sqlite:///{tmp_path}/runs.db", "--words")
    status, out, error = run_command(monkeypatch, capsys, "arxiv", "--category", "cs.LG", *where)
    assert (status, out) == (1, "") and error.endswith("paperworks: arXiv refuses the request (HTTP 404)\n")
    status, _, error = run_command(monkeypatch, capsys, "arxiv", "--category", "cs.LG", "--since", "yesterday", *where)
    assert status == 2 and "yesterday" in error and "Traceback" not in error
