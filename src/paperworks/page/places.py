"""Places that are few: who holds one, and what those are told who come too late."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from paperworks.errors import PaperworksError


class BusyError(PaperworksError):
    """What was asked for has no room now; later it will.

    Attributes:
        retry_after: Seconds after which to try again.
    """

    def __init__(self, reason: str, *, retry_after: int = 60) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Places:
    """So many places in all, so many of them for each, held for as long as a block lasts.

    Args:
        in_all: How many there are.
        each: How many of them one may hold.
        full: What is said when all are taken.
        enough: What is said to who holds enough already.
        retry_after: Seconds after which to try again.

    Example:
        >>> desks = Places(2, each=1, full="both desks are taken", enough="you have a desk")
        >>> with desks.held("ada"), desks.held("ben"):
        ...     desks.taken
        2
        >>> with desks.held("ada"), desks.held("ada"):
        ...     pass
        Traceback (most recent call last):
        ...
        paperworks.page.places.BusyError: you have a desk
        >>> desks.taken
        0
    """

    def __init__(self, in_all: int, *, each: int, full: str, enough: str, retry_after: int = 60) -> None:
        self._in_all, self._each, self._full, self._enough = in_all, each, full, enough
        self._retry_after = retry_after
        self._held: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How many places are taken."""
        with self._lock:
            return self._held.total()

    @contextmanager
    def held(self, who: Hashable) -> Iterator[None]:
        """Hold a place until the block ends, however it ends.

        Raises:
            BusyError: All are taken, or this one holds enough already.
        """
        with self._lock:
            if self._held[who] >= self._each:
                raise BusyError(self._enough, retry_after=self._retry_after)
            if self._held.total() >= self._in_all:
                raise BusyError(self._full, retry_after=self._retry_after)
            self._held[who] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[who] -= 1
                # Who holds none is forgotten.
                self._held += Counter()
