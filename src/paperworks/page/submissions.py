"""Papers that readers submit: fetched one after another, for arXiv wants its requests three seconds apart."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from math import ceil

from fastapi.concurrency import run_in_threadpool

from paperworks.page import ingest
from paperworks.page.entries import Entry
from paperworks.page.index import Index
from paperworks.page.places import BusyError, Places
from paperworks.page.safety import Buckets


class Submissions:
    """Takes papers into the index for readers; who waits for arXiv keeps nobody else waiting.

    Args:
        index: Where the papers go.
        waiting: How many submissions may wait at once.
        a_minute: How many papers one account may have fetched in a minute.
    """

    def __init__(self, index: Index, *, waiting: int = 5, a_minute: int = 5) -> None:
        self._index, self._a_minute = index, a_minute
        self._fetched = Buckets()
        # A thread of its own: those of the pool answer readers.
        self._thread = ThreadPoolExecutor(1, "submissions")
        self._places = Places(
            waiting,
            each=1,
            full="several papers wait for arXiv already; submit this one in a while",
            enough="the paper you submitted before is still being fetched; submit the next one after it",
            retry_after=15,
        )

    def close(self) -> None:
        """Fetch no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, account: Hashable, address: str) -> Entry:
        """Take one paper into the index, by its arXiv number or address.

        Args:
            account: Who submits it.
            address: As for `paperworks.page.ingest.submit`.

        Raises:
            UsageError: The address names no paper, or arXiv has none of this number.
            SourceError: arXiv does not answer, or not as it should.
            BusyError: Enough submissions wait already, or this account has submitted enough for now.
        """
        if (known := await run_in_threadpool(ingest.known, self._index, address)) is not None:
            return known
        with self._places.held(account):
            if wait := self._fetched.wait(account, self._a_minute):
                told = f"you have submitted {self._a_minute} papers within a minute; go on in {wait:.0f} s"
                raise BusyError(told, retry_after=ceil(wait))
            return await asyncio.get_running_loop().run_in_executor(self._thread, ingest.submit, self._index, address)
