"""Escaping, mathematics, BibTeX and the drawing of intervals."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from paperworks.lab.run import Measurement
from paperworks.page.citing import bibtex
from paperworks.page.entries import Entry
from paperworks.page.rendering import mathematics, outward, spans, standing, text, with_query

WHEN = datetime(2026, 11, 20, tzinfo=UTC)
HOSTILE = [
    "<script>alert(1)</script>",
    "$\\text{<script>alert(1)</script>}$",
    "$\\text{&lt;script&gt;}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\style{background:url(//evil.example)}{x}$",
    '$\\class{x" onload="alert(1)}{x}$',
    '$\\color{red" onmouseover="alert(1)}{x}$',
    "$<img src=x onerror=alert(1)>$",
    "\\(</math><script>alert(1)</script>\\)",
    '"><svg onload=alert(1)>',
]


class Seen(HTMLParser):
    """Elements and attributes as a browser's parser meets them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("source", HOSTILE)
def test_paper_text_and_mathematics_are_escaped(source):
    seen = Seen(text(source))
    assert seen.tags <= {"math", "mrow", "mtext", "mi", "mo", "mn", "mstyle", "mspace"}
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("href", "style", "class", "src")]


def test_mathematics_becomes_mathml():
    html = str(text(r"a $\frac{a_1}{b^2}$ and \(x<y\)"))
    assert html.count("<math>") == 2
    assert (
        "<mfrac><mrow><msub><mi>a</mi><mn>1</mn></msub></mrow><mrow><msup><mi>b</mi><mn>2</mn></msup></mrow></mfrac>"
        in html
    )
    assert "<mo>&lt;</mo>" in html and "$" not in html


def test_prices_and_broken_mathematics_stay_as_they_were():
    for source in ("between $5 and $10 a run", "costs $ 5 or $6", "$}{$", "a $ b", "US$5 and US$6"):
        assert Seen(text(source)).text == source and "<math" not in text(source), source


def test_marks_of_a_search_stay_and_leave_mathematics_whole():
    html = mathematics("a <mark>fast</mark> $O(<mark>n</mark> \\log n)$ &lt;b&gt;")
    assert html.startswith("a <mark>fast</mark> <math>") and html.count("<mark>") == 1 and html.endswith("&lt;b&gt;")


def test_bibtex_survives_hostile_titles():
    entry = Entry(
        key="2611.00001",
        title=r"100% \input{/etc/passwd} } of $\ell_1$ & {x}",
        authors=("Åsa Öberg", "B. C"),
        published=WHEN,
    )
    cited = bibtex(entry)
    assert cited.startswith("@misc{oberg2026input,")
    assert r"\input" not in cited and r"100\%" in cited and r"$\ell_1$" in cited and r"\&" in cited
    assert cited.count("{") == cited.count("}")
    assert "author = {Åsa Öberg and B. C}" in cited and "eprint = {2611.00001}" in cited


def test_intervals_share_one_logarithmic_axis():
    ratios = [
        Measurement("speed-up", value, "x", low=low, high=high, against="plain")
        for low, value, high in ((0.25, 0.5, 1.0), (1.0, 2.0, 4.0))
    ]
    one, two = spans(ratios)
    assert one is not None and two is not None
    # The axis goes from 1/4 to 4 with 1 in its middle, and a factor of two is everywhere as wide.
    assert one.one == two.one == 50 and (one.low, two.high) == (4, 96)
    assert one.value - one.low == pytest.approx(two.value - two.low)
    assert spans([Measurement("time", 3.0, "s")]) == [None]


def test_the_standing_follows_the_interval_and_the_direction():
    def ratio(low, high, better="higher"):
        return standing(Measurement("r", (low + high) / 2, "x", better, low=low, high=high, against="plain"))

    assert [ratio(1.1, 1.3), ratio(0.9, 1.2), ratio(0.7, 0.9)] == ["better", "even", "worse"]
    assert [ratio(1.1, 1.3, "lower"), ratio(0.7, 0.9, "lower")] == ["worse", "better"]
    assert standing(Measurement("r", 1.5, "x", against="plain")) == "even"
    gained = Measurement("gained", 0.2, "", low=0.1, high=0.3, against="plain")
    assert standing(gained) == "better" and spans([gained]) == [None]


def test_a_figure_that_is_taken_to_nothing_is_neither_better_nor_worse():
    assert standing(Measurement("rank correlation", 0.84)) == standing(Measurement("tables won", 3, "of 6")) == ""


def test_a_measured_zero_is_a_figure():
    [span] = spans([Measurement("r", 0.5, "x", low=0.0, high=0.9, against="plain")])
    assert span is None
    assert standing(Measurement("r", 0.0, "x", "lower", low=0.0, high=0.5, against="plain")) == "better"


def test_addresses():
    assert outward("javascript:alert(1)") == outward("data:text/html,x") == outward(None) == ""
    assert outward("https://arxiv.org/abs/1") == "https://arxiv.org/abs/1"
    assert with_query("/search", q='a&b="', page=1, tag=None, runs_here=False) == "/search?q=a%26b%3D%22&page=1"
    assert re.fullmatch(r"/x", with_query("/x"))
