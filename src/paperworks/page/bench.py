"""How fast the page is: search over many papers, and many readers at once; the record of both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from paperworks.lab.environment import environment
from paperworks.lab.records import interval, machine, write_json
from paperworks.lab.run import Measurement, Run
from paperworks.lab.store import Store
from paperworks.page.entries import Entry
from paperworks.page.index import Index
from paperworks.page.load import load_bench
from paperworks.page.meaning import Embedder, SentenceEmbedder
from paperworks.page.search import chosen_embedder, words_of
from paperworks.papers import load_cards

Progress = Callable[[str, int, int], None]

_VOCABULARY = 30_000
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "qui", "ra", "se", "ti", "tron", "vo", "zu")
_ABSTRACT = 150


def search_bench(
    store: Store, *, papers: int = 100_000, queries: int = 200, seed: int = 0, progress: Progress | None = None
) -> list[Measurement]:
    """Fill an index with generated papers beside the cards, and time searches in it.

    The words of the papers are those of the cards, in their frequencies, and invented ones, by Zipf's law. Papers
    get the mean of their words' vectors: to embed them one by one with the model takes hours, and a search does not
    notice. Queries go through the model, as they would in use, and none is asked twice. A store that was left in
    the middle is filled on.

    Args:
        store: Where the index is.
        papers: How many papers to generate.
        queries: How many queries to time, of each kind.
        seed: Seed of papers and queries.
        progress: Called with what is being done, how much is done and how much there is to do.

    Returns:
        The seconds it took to fill and to build, and the median and 95th percentile of each kind of query in ms.
    """
    tell = progress or (lambda what, done, total: None)
    language = _Language(seed)
    name = chosen_embedder()
    model = SentenceEmbedder(name) if name else None
    averaged = _Averaged(language, model)
    index = Index(store, averaged)
    index.sync_cards()
    begun = time.perf_counter()
    held = index.search("", meaning=False).total - len(load_cards())
    generated = islice(language.papers(papers), held, None)
    while batch := list(islice(generated, 1000)):
        tell("papers", held, papers)
        index.add(batch)
        held += len(batch)
    tell("papers", held, papers)
    filled = time.perf_counter()
    index.build(lambda done, total: tell("embeddings", done, total))
    built = time.perf_counter()
    recorded = [
        Measurement("papers", papers, "", "higher"),
        Measurement("fill", filled - begun, "s", "lower"),
        Measurement("build", built - filled, "s", "lower"),
    ]
    searched = Index(store, _Renamed(model, averaged.name) if model else averaged)
    year = 2020
    for kind, options in (
        ("words and meaning", {}), ("words", {"meaning": False}), ("words and meaning of a year", {"year": year}),
        ("words and meaning of what runs here", {"runs_here": True}),
    ):  # fmt: skip
        asked = language.queries(queries + 5)
        for query in asked[:5]:
            searched.search(query, **options)
        times = []
        for number, query in enumerate(asked[5:]):
            tell(kind, number, queries)
            begun = time.perf_counter()
            searched.search(query, **options)
            times.append(1000 * (time.perf_counter() - begun))
        tell(kind, queries, queries)
        recorded += [
            Measurement("search, median", median(times), "ms", "lower", series=kind, repeats=times),
            Measurement("search, 95th percentile", quantiles(times, n=20)[-1], "ms", "lower", series=kind),
        ]
    return recorded


def page_bench(root: Path, *, progress: Progress | None = None) -> Run:
    """Measure search at 100,000 papers and 200 readers at once, and write benchmarks/page.json and page.md of a checkout.

    The filled index is kept in the user's cache folder, so that the next time it need not be filled.

    Args:
        root: The checkout.
        progress: As for `search_bench`.

    Raises:
        UsageError: wrk is not installed.
    """
    run = Run("page", {"papers": 100_000, "readers": 200})
    kept = user_cache_path("paperworks") / "page-bench" / "runs.db"
    with Store(kept) as store:
        measured = search_bench(store, progress=progress)
    tell = progress or (lambda what, done, total: None)
    with TemporaryDirectory() as folder:
        for pause, name in ((1.0, "one page a second"), (5.0, "one page in five seconds")):
            tell(f"200 readers, {name}", 0, 1)
            for one in load_bench(f"sqlite:///{folder}/runs.db", pause=pause):
                measured.append(replace(one, series=f"{one.series}, 200 readers, {name}"))
            tell(f"200 readers, {name}", 1, 1)
    run.measurements.extend(measured)
    run.environment.update(environment())
    run.status, run.finished = "finished", datetime.now(UTC)
    benchmarks = root / "benchmarks"
    write_json(run, benchmarks / "page.json")
    rows = [f"| {m.name} | {m.series or ''} | {interval(m)} |" for m in run.measurements]
    table = "\n".join(["| figure | of | measured |", "| --- | --- | --- |", *rows])
    text = f"# The page\n\n{table}\n\n{machine(run.environment)}\n"
    (benchmarks / "page.md").write_text(text, encoding="utf-8")
    return run


class _Language:
    """Papers and queries in words of the cards and invented ones, by Zipf's law."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        cards = load_cards().values()
        known = Counter(word for card in cards for word in words_of(f"{card.title} {card.summary}"))
        self.real = [word for word, _ in known.most_common()]
        generator = np.random.default_rng(seed)
        invented: dict[str, None] = {}
        while len(invented) < _VOCABULARY - len(self.real):
            invented["".join(generator.choice(_SYLLABLES, size=generator.integers(2, 5)))] = None
        self.words = np.array([*self.real, *invented])
        weights = 1 / np.arange(3, len(self.words) + 3)
        self._upto = np.cumsum(weights) / weights.sum()
        self._asking = np.random.default_rng((seed, 1))

    def papers(self, count: int) -> Iterator[Entry]:
        """The papers, one after another."""
        generator = np.random.default_rng((self._seed, 2))
        start = datetime(2015, 1, 1, tzinfo=UTC)
        for number in range(count):
            words = self._drawn(generator, 10 + _ABSTRACT)
            yield Entry(
                key=f"{1500 + number // 100_000:04d}.{number % 100_000:05d}", version=1, title=" ".join(words[:10]),
                abstract=" ".join(words[10:]), authors=("Ann Other", "Bob Else"), categories=("cs.LG",),
                published=start + timedelta(hours=number), source="generated",
            )  # fmt: skip

    def queries(self, count: int) -> list[str]:
        """Queries of one to four words."""
        return [" ".join(self._drawn(self._asking, int(self._asking.integers(1, 5)))) for _ in range(count)]

    def _drawn(self, generator: np.random.Generator, count: int) -> NDArray[np.str_]:
        return self.words[np.searchsorted(self._upto, generator.random(count))]


class _Averaged:
    """The mean of the vectors of words: the model's for real words, random ones for invented words."""

    name = "averaged"

    def __init__(self, language: _Language, model: Embedder | None) -> None:
        aims = language.real
        real = model.encode(aims) if model else np.random.default_rng(0).normal(size=(len(aims), 384))
        invented = np.random.default_rng(1).normal(size=(len(language.words) - len(real), real.shape[1]))
        unit = np.concatenate((real, invented / np.linalg.norm(invented, axis=1, keepdims=True)))
        self._vectors = dict(zip(language.words.tolist(), unit.astype(np.float32), strict=True))
        self._none = unit.mean(axis=0)

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts, (texts, d)."""
        means = np.stack([
            np.mean([self._vectors.get(word, self._none) for word in words_of(text)] or [self._none], axis=0)
            for text in texts
        ])  # fmt: skip
        unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit.astype(np.float32)


class _Renamed:
    """A model that goes by another's name, so that its queries are compared with the other's vectors."""

    def __init__(self, model: Embedder, name: str) -> None:
        self.name = name
        self.encode = model.encode
