"""Atom feeds (RFC 4287) of any list of papers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import quote, urljoin
from xml.etree import ElementTree

from paperworks import __version__
from paperworks.page.entries import Entry

_ATOM = "http://www.w3.org/2005/Atom"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

ElementTree.register_namespace("", _ATOM)


def atom(title: str, url: str, entries: Iterable[Entry], updated: datetime) -> bytes:
    """A feed of papers as an Atom document.

    Args:
        title: Title of the feed.
        url: Its own address, beside which the papers' pages lie at `papers/KEY`.
        entries: The papers, in the order to show.
        updated: When the list last changed, with a time zone.

    Returns:
        The document in UTF-8, to serve as `application/atom+xml`.

    Raises:
        ValueError: The time has no zone.

    Example:
        >>> entry = Entry(key="2402.05109", title="Hydra", published=datetime(2024, 2, 7, tzinfo=UTC))
        >>> feed = atom("New papers", "https://example.org/feed.atom", [entry], entry.published)
        >>> ElementTree.fromstring(feed).findtext(f"{{{_ATOM}}}entry/{{{_ATOM}}}id")
        'https://example.org/papers/2402.05109'
    """
    if updated.tzinfo is None:
        raise ValueError("updated has no time zone; give it one, such as datetime.UTC")
    feed = ElementTree.Element(f"{{{_ATOM}}}feed")
    _add(feed, "title", title)
    _add(feed, "id", url)
    _add(feed, "link", rel="self", type="application/atom+xml", href=url)
    _add(feed, "link", rel="alternate", type="text/html", href=urljoin(url, "."))
    _add(feed, "updated", _time(updated))
    _add(feed, "generator", "Paperworks", version=__version__)
    # A feed names an author, or each of its entries does; a card's authors may not be known.
    _add(_add(feed, "author"), "name", "Paperworks")
    for entry in entries:
        element = _add(feed, "entry")
        page = urljoin(url, f"papers/{quote(entry.key, safe='/')}")
        _add(element, "title", entry.title)
        _add(element, "id", page)
        _add(element, "link", rel="alternate", type="text/html", href=page)
        if entry.url:
            _add(element, "link", rel="related", href=entry.url)
        published = _time(entry.published)
        _add(element, "published", published)
        _add(element, "updated", published)
        for author in entry.authors:
            _add(_add(element, "author"), "name", author)
        for label in dict.fromkeys((*entry.categories, *entry.tags)):
            _add(element, "category", term=label)
        if entry.abstract:
            _add(element, "summary", entry.abstract)
    document: bytes = ElementTree.tostring(feed, encoding="utf-8", xml_declaration=True)
    return document


def _add(parent: ElementTree.Element, name: str, text: str = "", **attributes: str) -> ElementTree.Element:
    clean = {key: _FORBIDDEN.sub("", value) for key, value in attributes.items()}
    child = ElementTree.SubElement(parent, f"{{{_ATOM}}}{name}", clean)
    # XML has no way to write some characters, not even escaped.
    child.text = _FORBIDDEN.sub("", text) or None
    return child


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
