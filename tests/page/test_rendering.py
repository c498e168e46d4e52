"""Escaping, mathematics, BibTeX and the drawing of intervals."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from paperworks.lab.run import Measurement
from paperworks.page.citing import bibtex
from paperworks.page.entries import Entry
from paperworks.page.rendering import mathematics, outward, plain, spans, standing, text, with_query

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
        title=BRACES,
        authors=("Åsa Öberg", "B. C"),
        published=WHEN,
    )
    cited = bibtex(entry)
    assert cited.startswith("@misc{oberg2026input,")
    assert r"\input" not in cited and r"100\%" in cited and r"$\ell_1$" in cited and r"\&" in cited
    assert cited.count("{") == cited.count("}")
    assert "author = {Åsa Öberg and B. C}" in cited and "eprint = {2611.00001}" in cited


BRACES = r"100% \input{/etc/passwd} } of $\ell_1$ & {x}"
# Titles that end their own value, or begin another, where they are not escaped.
TITLES = [
    BRACES,
    "$}{$, author={Evil}, note={",
    "$}$ and ${$",
    "}} @misc{evil, title={{x",
    'say "no", note = "x',
    "a % b # c & d_e ~f ^g <h> |",
    "$\\input{/etc/passwd}$",
    "$\\write18{rm -rf x}$",
    "$^^5cinput{/etc/passwd}$",
    "$\\csname input\\endcsname$",
    "$a % b$",
    "$x\\$",
    "\\",
    "{" * 50,
    "}" * 50,
    "costs $5 or $6",
    "one\ntwo\r\nthree\u2028four",
]


def fields(cited: str) -> dict[str, str]:
    """A citation taken apart as BibTeX does: braces count wherever they stand, and nothing else ends a value."""
    assert cited.startswith("@misc{") and cited.endswith("}\n")
    found, depth, start = {}, 0, 0
    body = cited[len("@misc{") : -2]
    key, body = body.split(",", 1)
    for place, char in enumerate(body):
        depth += (char == "{") - (char == "}")
        assert depth >= 0, cited
        if char == "," and depth == 0:
            name, value = body[start:place].split("=", 1)
            value = value.strip()
            assert value[0] == "{" and value[-1] == "}"
            found[name.strip()], start = value[1:-1], place + 1
    assert depth == 0 and not body[start:].strip(), cited
    return {"key": key, **found}


@pytest.mark.parametrize("title", TITLES)
def test_a_citation_has_its_fields_and_no_others_whatever_titles_and_names_hold(title):
    entry = Entry(
        key="2611.00001", title=title, authors=(title, "Ada Lovelace"), published=WHEN,
        url="https://example.org/a}{b\\c\" d?e=%20&f",
    )  # fmt: skip
    cited = fields(bibtex(entry))
    assert set(cited) == {"key", "title", "author", "year", "eprint", "archivePrefix", "url"}
    assert re.fullmatch("[a-z0-9]+", cited["key"]) and cited["year"] == "2026" and cited["eprint"] == "2611.00001"
    assert re.fullmatch(r"https://example\.org/a[\w%]+d\?e=%20&f", cited["url"])
    # Two names, however often the first says "and".
    assert len(split_names(cited["author"])) == 2 and split_names(cited["author"])[1] == "Ada Lovelace"
    for value in (cited["title"], cited["author"]):
        assert "\n" not in value and not re.search(r"\\(input|write|csname|def|endcsname)", value) and "^^" not in value
        # Outside of braces of their own, TeX's characters stand behind a backslash.
        assert not re.search(r"(?<!\\)[%#]", value) and not re.search(r'(?<!{)"', value)


def split_names(authors: str) -> list[str]:
    """Names as BibTeX finds them: "and" parts them where no brace is open."""
    names, depth, start = [], 0, 0
    for place, char in enumerate(authors):
        depth += (char == "{") - (char == "}")
        if depth == 0 and re.match(r"\sand\s", authors[place : place + 5]):
            names.append(authors[start:place])
            start = place + 5
    return [*names, authors[start:]]


def test_what_is_escaped_reads_as_it_was():
    entry = Entry(key="2611.00001", title='50% "of" {it} \\ $\\frac{1}{n}$', authors=("A, B", "Others"), published=WHEN)
    cited = fields(bibtex(entry))
    assert cited["title"] == (r'{50\% {"}of{"} \textbraceleft{}it\textbraceright{} \textbackslash{} $\frac{1}{n}$}')
    assert cited["author"] == "{A, B} and {Others}"


def test_of_a_title_its_mathematics_stays_and_what_stands_between_is_escaped():
    title = "$a_1$ x_y $b_2$ 5% $c_3$ & $d_4"
    cited = fields(bibtex(Entry(key="2611.00001", title=title, authors=(), published=WHEN)))
    assert cited["title"] == r"{$a_1$ x\_y $b_2$ 5\% $c_3$ \& \$d\_4}"


def test_a_citation_is_named_after_its_first_author_its_year_and_its_first_word():
    named = {
        ("Ada Lovelace", "Charles Babbage"): "lovelace2026bounds",
        ("Jürgen Ångström",): "angstrom2026bounds",
        (): "2026bounds",
        ("王 芳",): "2026bounds",
    }
    for authors, key in named.items():
        entry = Entry(key="2611.00001", title="Bounds in all", authors=authors, published=WHEN)
        assert fields(bibtex(entry))["key"] == key


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


def test_json_holds_no_address_that_html_would_not_link_to():
    entry = Entry(key="2611.00001", title="T", published=WHEN, url="javascript:alert(1)")
    # An entry without one has that of arXiv.
    assert plain({"papers": [entry]})["papers"][0]["url"] == "https://arxiv.org/abs/2611.00001"
    card = Entry(key="card:hydra", title="T", published=WHEN, url="data:text/html,x")
    assert plain(card)["url"] == ""


def test_addresses():
    assert outward("javascript:alert(1)") == outward("data:text/html,x") == outward(None) == ""
    assert outward("https://arxiv.org/abs/1") == "https://arxiv.org/abs/1"
    assert with_query("/search", q='a&b="', page=1, tag=None, runs_here=False) == "/search?q=a%26b%3D%22&page=1"
    assert re.fullmatch(r"/x", with_query("/x"))
