"""Atom feeds, read back by an XML parser and against what RFC 4287 asks for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from xml.etree import ElementTree

import pytest

from paperworks import __version__
from paperworks.page.entries import Entry
from paperworks.page.feeds import atom

NAMES = {"a": "http://www.w3.org/2005/Atom"}
DAY = datetime(2026, 11, 1, 12, tzinfo=UTC)
URL = "https://papers.example.org/feed.atom?q=fast&tag=cs.LG"
PAPERS = [
    Entry(key="2611.00001", title="Fast & <small> $x_1$", abstract='Says "so" & more.', authors=("Ada", "Bøb"),
          categories=("cs.LG", "stat.ML"), tags=("fast", "cs.LG"), published=DAY),
    Entry(key="card:shrink-match", title="A card", published=DAY - timedelta(days=1), slug="shrink-match"),
    Entry(key="cs/0501001", title="Old", published=DAY.astimezone(timezone(timedelta(hours=5)))),
]  # fmt: skip


def parsed(title: str = "Search: fast", entries=PAPERS) -> ElementTree.Element:
    return ElementTree.fromstring(atom(title, URL, entries, DAY))


def test_a_feed_holds_its_papers_in_order():
    feed = parsed()
    assert feed.tag == "{http://www.w3.org/2005/Atom}feed"
    entries = feed.findall("a:entry", NAMES)
    assert [entry.findtext("a:title", None, NAMES) for entry in entries] == [entry.title for entry in PAPERS]
    first, card, old = entries
    assert first.findtext("a:summary", None, NAMES) == 'Says "so" & more.'
    assert [name.text for name in first.findall("a:author/a:name", NAMES)] == ["Ada", "Bøb"]
    assert [label.get("term") for label in first.findall("a:category", NAMES)] == ["cs.LG", "stat.ML", "fast"]
    links = {link.get("rel"): link.get("href") for link in first.findall("a:link", NAMES)}
    assert links == {
        "alternate": "https://papers.example.org/papers/2611.00001", "related": "https://arxiv.org/abs/2611.00001",
    }  # fmt: skip
    assert card.find("a:link[@rel='related']", NAMES) is None and card.find("a:summary", NAMES) is None
    assert card.findtext("a:id", None, NAMES) == "https://papers.example.org/papers/card%3Ashrink-match"
    assert old.findtext("a:id", None, NAMES) == "https://papers.example.org/papers/cs/0501001"
    for name in ("updated", "published"):
        told = [entry.findtext(f"a:{name}", None, NAMES) for entry in entries]
        assert told == ["2026-11-01T12:00:00Z", "2026-10-31T12:00:00Z", "2026-11-01T12:00:00Z"]


def test_a_feed_has_what_rfc_4287_asks_for():
    feed = parsed()
    for element in (feed, *feed.findall("a:entry", NAMES)):
        for name in ("id", "title", "updated"):
            assert len(element.findall(f"a:{name}", NAMES)) == 1 and element.findtext(f"a:{name}", None, NAMES)
        assert datetime.fromisoformat(element.findtext("a:updated", None, NAMES)).tzinfo is not None
        relations = [link.get("rel") for link in element.findall("a:link", NAMES)]
        assert relations.count("alternate") == 1
    assert feed.findtext("a:author/a:name", None, NAMES) == feed.findtext("a:generator", None, NAMES) == "Paperworks"
    assert feed.find("a:generator", NAMES).get("version") == __version__
    assert feed.find("a:link[@rel='self']", NAMES).get("href") == URL == feed.findtext("a:id", None, NAMES)
    assert len({element.findtext("a:id", None, NAMES) for element in (feed, *feed.findall("a:entry", NAMES))}) == 4


def test_no_text_breaks_a_feed():
    hostile = 'q: ]]></title><script>alert(1)</script>\x00\x0b\ufffe & "quoted" 速い 🚀'
    entry = Entry(key="2611.00001", title="T", abstract="bad \ufffe\uffff here", tags=("\ufffe<tag>",), published=DAY)
    feed = parsed(hostile, [entry])
    kept = 'q: ]]></title><script>alert(1)</script> & "quoted" 速い 🚀'
    assert feed.findtext("a:title", None, NAMES) == kept
    assert feed.findtext("a:entry/a:summary", None, NAMES) == "bad  here"
    assert feed.find("a:entry/a:category", NAMES).get("term") == "<tag>"


def test_an_empty_feed_is_one():
    assert parsed(entries=[]).findall("a:entry", NAMES) == []


def test_a_time_without_zone_is_refused():
    with pytest.raises(ValueError, match="updated has no time zone"):
        atom("New", URL, [], datetime(2026, 11, 1))
