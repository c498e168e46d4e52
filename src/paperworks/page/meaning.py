"""Search by meaning: the nearest embeddings, by their signs first and then by cosine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from paperworks.page.search import load_embedder
from paperworks.page.tables import EntryVectorRow

# How many candidates the signs pick at least, and for each that is wanted.
_CANDIDATES, _OVERSAMPLING = 250, 5


class Embedder(Protocol):
    """What turns text into a vector; two embedders of one name give the same vectors."""

    name: str

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts, (texts, d)."""


class SentenceEmbedder:
    """A sentence-transformers model, loaded when it is first needed.

    Args:
        name: Its folder or name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()

    @cached_property
    def _model(self) -> Any:
        return load_embedder(self.name)

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts, (texts, d)."""
        with self._lock:
            model = self._model
        vectors: NDArray[np.float32] = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return vectors


class Vectors:
    """The embeddings of the papers in the store.

    Their signs, a bit a dimension, stay in memory: the Hamming distance between two sign patterns estimates the
    angle between the vectors, so it picks the candidates, and only those are read and compared by cosine. Another
    process may add embeddings meanwhile: each search takes in what is new.

    Args:
        name: Name of the embedder; the vectors of others are no neighbours of its own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._last = 0
        # Entries (n,), and their signs with a column each, (d / 64, n).
        self._held: tuple[NDArray[np.int64], NDArray[np.uint64]] | None = None

    def refresh(self, session: Session) -> bool:
        """Take in the embeddings added since, and say whether there are any."""
        newest = session.scalar(select(func.max(EntryVectorRow.id))) or 0
        if newest > self._last:
            with self._lock:
                self._take_in(session, newest)
        return self._held is not None

    def _take_in(self, session: Session, newest: int) -> None:
        added = session.execute(
            select(EntryVectorRow.entry_id, EntryVectorRow.signs)
            .where(EntryVectorRow.id.between(self._last + 1, newest), EntryVectorRow.embedder == self._name)
            .order_by(EntryVectorRow.id)
        ).all()
        self._last = newest
        if not added:
            return
        ids = np.array([entry for entry, _ in added], dtype=np.int64)
        signs = np.frombuffer(b"".join(row for _, row in added), dtype=np.uint64).reshape(len(added), -1).T
        if self._held is not None:
            known, kept = self._held
            still = ~np.isin(known, ids)
            ids, signs = np.concatenate((known[still], ids)), np.concatenate((kept[:, still], signs), axis=1)
        self._held = ids, np.ascontiguousarray(signs)

    def nearest(
        self, session: Session, vector: NDArray[np.float32], limit: int, among: Sequence[int] | None = None
    ) -> dict[int, float]:
        """Identities of the papers nearest to a vector and the cosines, nearest first.

        Args:
            session: To read their vectors with.
            vector: A unit vector, (d,).
            limit: How many at most.
            among: Only these papers; all by default.
        """
        if self._held is None:
            return {}
        ids, signs = self._held
        if among is not None:
            chosen = np.isin(ids, np.asarray(among, dtype=np.int64))
            ids, signs = ids[chosen], signs[:, chosen]
        wanted = max(_CANDIDATES, _OVERSAMPLING * limit)
        if len(ids) > wanted:
            differ = np.bitwise_count(signs ^ _signs(vector[None])[0][:, None]).sum(axis=0, dtype=np.uint16)
            ids = ids[np.argpartition(differ, wanted)[:wanted]]
        found = session.execute(
            select(EntryVectorRow.entry_id, EntryVectorRow.vector).where(EntryVectorRow.entry_id.in_(ids.tolist()))
        ).all()
        if not found:
            return {}
        likeness = np.stack([np.frombuffer(row, dtype=np.float16) for _, row in found]).astype(np.float32) @ vector
        return {found[place][0]: float(likeness[place]) for place in np.argsort(-likeness, kind="stable")[:limit]}

    def vector(self, session: Session, entry: int) -> NDArray[np.float32] | None:
        """The vector of a paper, (d,), or None where it has none yet."""
        mine = (EntryVectorRow.entry_id == entry, EntryVectorRow.embedder == self._name)
        kept = session.scalar(select(EntryVectorRow.vector).where(*mine))
        return None if kept is None else np.frombuffer(kept, dtype=np.float16).astype(np.float32)

    def keep(self, session: Session, entries: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Keep the vectors of papers, (entries, d), in place of those they had."""
        session.execute(delete(EntryVectorRow).where(EntryVectorRow.entry_id.in_(entries)))
        rows = zip(entries, _signs(vectors), vectors.astype(np.float16), strict=True)
        session.add_all(
            EntryVectorRow(entry_id=entry, embedder=self._name, signs=signs.tobytes(), vector=vector.tobytes())
            for entry, signs, vector in rows
        )


def _signs(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The signs of vectors (n, d) as bits, (n, d / 64 rounded up)."""
    bits = np.packbits(vectors > 0, axis=1)
    return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
