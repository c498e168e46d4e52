"""What a reader's browser gets: escaped text, mathematics as MathML, and each page as HTML or JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from xml.etree.ElementTree import Element

from fastapi import Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from paperworks.lab.records import command, figure, interval, machine
from paperworks.lab.run import Measurement
from paperworks.lab.verdicts import TINY
from paperworks.page.accounts import PASSWORD_LENGTHS
from paperworks.page.entries import Entry
from paperworks.page.safety import csrf_token, reader
from paperworks.papers import ROOMS

STATIC = Path(__file__).parent / "static"
# As pandoc has it: no blank inside the dollars, no digit after them, so that prices stay prices.
_MATHEMATICS = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]{1,300}?)(?<=\S)\$(?![\d$])|\\\((.{1,300}?)\\\)")
_ELEMENTS = frozenset(
    {"math", "mi", "mn", "mo", "ms", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "merror"}
    | {"mpadded", "mphantom", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts"}
    | {"mprescripts", "mtable", "mtr", "mtd", "menclose"}
)
_ATTRIBUTES = frozenset(
    {"accent", "accentunder", "columnalign", "columnspacing", "depth", "displaystyle", "fence", "form", "height"}
    | {"largeop", "linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "rowspacing"}
    | {"rspace", "scriptlevel", "separator", "stretchy", "symmetric", "width"}
)


def text(source: str) -> Markup:
    r"""Text of a paper as HTML: all of it escaped, `$...$` and `\(...\)` as MathML.

    Example:
        >>> print(text("<b> in $n^2$"))
        &lt;b&gt; in <math><mrow><msup><mi>n</mi><mn>2</mn></msup></mrow></math>
    """
    return mathematics(str(escape(source)))


def mathematics(html: str) -> Markup:
    """The same with HTML that is escaped already and holds nothing but `<mark>`, which mathematics loses."""
    return Markup(_MATHEMATICS.sub(_converted, html))


def _converted(match: re.Match[str]) -> str:
    source = unescape(re.sub(r"</?mark>", "", match[1] or match[2]))
    return _mathml(source) or match[0]


@lru_cache(maxsize=4096)
def _mathml(source: str) -> str:
    """MathML of LaTeX, empty where it is not understood."""
    from latex2mathml.converter import convert_to_element

    try:
        return _clean(convert_to_element(source))
    # The converter has many exceptions of its own and meets some of Python's on broken input.
    except Exception:
        return ""


def _clean(element: Element) -> str:
    """An element as text, with only what draws: LaTeX could name links, styles and elements of its own."""
    inside = escape(unescape(element.text or ""))
    children = "".join(_clean(child) for child in element)
    tail = escape(unescape(element.tail or ""))
    if element.tag not in _ELEMENTS:
        return f"{inside}{children}{tail}"
    kept = "".join(f' {name}="{escape(value)}"' for name, value in element.attrib.items() if name in _ATTRIBUTES)
    return f"<{element.tag}{kept}>{inside}{children}</{element.tag}>{tail}"


@dataclass(frozen=True)
class Span:
    """Where a ratio and its interval lie on an axis, in per cent of its width.

    Attributes:
        low: Left end of the interval.
        value: The ratio.
        high: Right end.
        one: Where baseline and method are equal.
        standing: "better", "worse", or "even" where the interval holds 1 or there is none.
    """

    low: float
    value: float
    high: float
    one: float
    standing: str


def spans(measurements: Sequence[Measurement]) -> list[Span | None]:
    """Each ratio on one logarithmic axis; None for what cannot be drawn there.

    Example:
        >>> [span] = spans([Measurement("speed-up", 2.0, "x", low=1.0, high=4.0, against="plain")])
        >>> round(span.value), span.standing
        (50, 'even')
    """
    drawn = [m for m in measurements if m.no_effect == 1 and m.ends[0] > 0]
    ends = [math.log(end) for m in drawn for end in m.ends]
    left, right = min([0.0, *ends]), max([0.0, *ends])
    width = (right - left) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (math.log(value) - left) / width, 2)

    return [
        Span(place(m.ends[0]), place(m.value), place(m.ends[1]), place(1.0), standing(m)) if m in drawn else None
        for m in measurements
    ]


def standing(measurement: Measurement) -> str:
    """Whether a ratio or difference is better or worse than its baseline, or even as far as its interval tells.

    A figure that is taken to nothing is neither: empty.

    Example:
        >>> standing(Measurement("perplexity", 0.9, "x", better="lower", low=0.8, high=0.95, against="dense"))
        'better'
        >>> standing(Measurement("rank correlation", 0.84))
        ''
    """
    none, (low, high) = measurement.no_effect, measurement.ends
    if none is None:
        return ""
    if measurement.low is None or low <= none <= high:
        return "even"
    return "better" if (low > none) == (measurement.better == "higher") else "worse"


def ago(then: datetime, now: datetime | None = None) -> str:
    """How long ago something was.

    Example:
        >>> ago(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 3, tzinfo=UTC))
        '3 hours ago'
    """
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def paper_path(entry: Entry) -> str:
    """Address of a paper's page on this site."""
    return f"/papers/{entry.slug or quote(entry.key)}"


def vote_id(entry: Entry) -> str:
    """What the button that votes for a paper is called on its page, so that its reader is led back to it.

    Example:
        >>> vote_id(Entry(key="2402.05109", title="Hydra", published=datetime(2024, 2, 7, tzinfo=UTC)))
        'vote-2402-05109'
    """
    return "vote-" + re.sub(r"[^\w-]", "-", entry.slug or entry.key)


def several(count: int, noun: str) -> str:
    """A count and its noun.

    Example:
        >>> several(1, "vote"), several(1200, "paper")
        ('1 vote', '1,200 papers')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@lru_cache(maxsize=4096, typed=True)
def with_query(path: str, /, **values: object) -> str:
    """An address with those values that say something; they may have any name.

    Example:
        >>> with_query("/search", q="a b", room=None, page=2)
        '/search?q=a+b&page=2'
    """
    given = {name: value for name, value in values.items() if value not in (None, "", False)}
    return f"{path}?{urlencode(given)}" if given else path


def address_of_page(request: Request) -> str:
    """Path and query of what was asked for, as they were sent: whatever its parameters are called, none is looked at."""
    return f"{quote(request.url.path)}{'?' if request.url.query else ''}{request.url.query}"


def page_before(request: Request, otherwise: str) -> str:
    """Path and query of this site's page from which a form was sent, as its browser tells."""
    before = urlsplit(request.headers.get("referer", ""))
    own = before.netloc == request.headers.get("host") and before.path.startswith("/")
    back = f"{before.path}{'?' if before.query else ''}{before.query}" if own else otherwise
    return back if not back.startswith("//") else otherwise


def outward(url: str | None) -> str:
    """An address as it stands, empty where it is not one of the web: data bring `javascript:` too."""
    return url if url and urlsplit(url).scheme in ("http", "https") else ""


@lru_cache
def static(name: str) -> str:
    """Address of a static file, which changes with its content."""
    return f"/static/{name}?{sha256((STATIC / name).read_bytes()).hexdigest()[:10]}"


_environment = Environment(
    loader=PackageLoader("paperworks.page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_environment.filters |= {"text": text, "mathematics": mathematics, "ago": ago, "outward": outward}
_environment.filters |= {
    "command": command,
    "figure": figure,
    "interval": interval,
    "machine": machine,
    "standing": standing,
}
_environment.globals |= {"rooms": ROOMS, "paper_path": paper_path, "with_query": with_query, "static": static}
_environment.globals |= {"several": several, "vote_id": vote_id, "password_lengths": PASSWORD_LENGTHS, "tiny": TINY}


def wants_json(request: Request) -> bool:
    """Whether the reader asked for JSON: by `.json` after the address or by the header."""
    accepted = request.headers.get("accept", "")
    return bool(request.scope.get("paperworks.json")) or (
        "application/json" in accepted and "text/html" not in accepted
    )


class _Token:
    """The reader's CSRF token, made where a form writes it, so that pages without forms name no reader."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __str__(self) -> str:
        return csrf_token(self._request)


def render(template: str, request: Request, **context: Any) -> str:
    """A template as text, with what every page knows: reader, CSRF token, address."""
    state = request.app.state
    return _environment.get_template(template).render(
        request=request,
        user=reader(request),
        csrf=_Token(request),
        allow_runs=state.allow_runs,
        htmx=state.htmx,
        here=address_of_page(request),
        **context,
    )


def respond(
    request: Request,
    template: str,
    data: Mapping[str, Any],
    *,
    status: int = 200,
    json: Mapping[str, Any] | None = None,
    **only_html: Any,
) -> Response:
    """A page: as JSON where that was asked for, else as HTML.

    Args:
        request: What was asked.
        template: Name of its template.
        data: What it shows; this alone is its JSON.
        status: HTTP status.
        json: What its JSON is instead, where that differs.
        only_html: What only the template gets.
    """
    headers = {"Vary": "Accept, Cookie"}
    if wants_json(request):
        return JSONResponse(plain(data if json is None else json), status, headers)
    return HTMLResponse(render(template, request, **data, **only_html), status, headers)


def plain(value: Any) -> Any:
    """A value as JSON holds it, by the rules that hold for HTML."""
    if isinstance(value, Entry):
        value = replace(value, url=outward(value.url))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return jsonable_encoder(value)
