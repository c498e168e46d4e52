"""The bench of the search, on few papers."""

from __future__ import annotations

from itertools import islice

import pytest

from paperworks.lab import Store
from paperworks.page import bench as module
from paperworks.page import index as index_module
from paperworks.page.bench import search_bench
from paperworks.page.index import Index
from paperworks.papers import load_cards


@pytest.fixture(autouse=True)
def no_embedder(monkeypatch):
    for place in (module, index_module):
        monkeypatch.setattr(place, "chosen_embedder", lambda name=None: name)


def test_the_search_bench_goes_on_and_times_every_kind_of_query(tmp_path):
    def stop(what, done, total):
        if (what, done) == ("papers", 1000):
            raise KeyboardInterrupt

    with Store(tmp_path / "runs.db") as store:
        with pytest.raises(KeyboardInterrupt):
            search_bench(store, papers=1200, queries=5, progress=stop)
        told = []
        recorded = search_bench(store, papers=1200, queries=5, progress=lambda *step: told.append(step))
        assert Index(store).search("").total == 1200 + len(load_cards())
    assert told[0] == ("papers", 1000, 1200)
    medians = {m.series: m for m in recorded if m.name == "search, median"}
    assert len(medians) == 4
    for series, measured in medians.items():
        assert len(measured.repeats) == 5 and measured.unit == "ms"
        (tail,) = [m for m in recorded if m.name == "search, 95th percentile" and m.series == series]
        assert 0 < min(measured.repeats) <= measured.value <= tail.value


def test_generated_papers_are_the_same_again_and_each_its_own():
    language = module._Language(3)
    papers = list(language.papers(50))
    assert papers == list(module._Language(3).papers(50)) == list(islice(language.papers(80), 50))
    assert len({paper.key for paper in papers}) == len({paper.abstract for paper in papers}) == 50
    assert papers != list(module._Language(4).papers(50))


def test_words_of_generated_papers_follow_zipfs_law():
    language = module._Language(0)
    words = [word for paper in language.papers(300) for word in f"{paper.title} {paper.abstract}".split()]
    first, tenth = (words.count(language.words[rank]) / len(words) for rank in (0, 9))
    assert first / tenth == pytest.approx(12 / 3, rel=0.2)
