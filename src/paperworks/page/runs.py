"""Runs that are started from the page: who may have how many, where they stand, and how they are stopped.

Each run is a process of its own (`paperworks.page.work`), which takes its place when one is free and keeps all it
records in the store. So several servers may share a store, a run outlives the server that started it, and any
server can tell how it stands or stop it.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.recipe import find
from paperworks.lab.run import Run
from paperworks.lab.store import RunRow, Store, row_of
from paperworks.page.offered import checked
from paperworks.page.places import BusyError, Places
from paperworks.page.tables import RunRequestRow

# Over all who watch, so that a crowd does not keep the store busy.
_LOOKS_A_SECOND = 40
# Seconds after which a process that has not said that the run is its own will not do so any more.
_BEGINS_WITHIN = 120.0
_STORE_AGAIN = 5.0
_SECRETS = ("PAPERWORKS_SMTP", "PAPERWORKS_SECRET")


class Runner:
    """Starts, watches and stops runs for readers of the page.

    Args:
        store_url: Where runs are kept, as for `paperworks.lab.Store`.
        workers: How many runs take place at once, over all servers of this store.
        places: How many may take place or wait.
        places_each: How many of them one user may have, or one address where runs need no account.
        time_limit: Seconds after which a run is stopped.
        grace: Seconds that a run has to end by itself once it is to stop.
        watchers: How many may watch runs at once, at each server process.
        watchers_each: How many of them may come from one address.

    Attributes:
        watching: The places of those who watch.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Runner(f"sqlite:///{folder}/runs.db") as runner:
        ...     runner.start("hydra", {"new_tokens": 10**9})
        Traceback (most recent call last):
        ...
        paperworks.errors.UsageError: new_tokens is at most 384 in a run from the page, not 1000000000; the command line takes more
    """

    def __init__(
        self,
        store_url: str | Path | None = None,
        workers: int = 1,
        *,
        places: int = 16,
        places_each: int = 3,
        time_limit: float = 3600.0,
        grace: float = 10.0,
        watchers: int = 200,
        watchers_each: int = 6,
    ) -> None:
        if workers < 1 or time_limit <= 0:
            raise UsageError(f"runs need at least one worker and some time, given {workers} and {time_limit} s")
        self.store = Store(store_url)
        self._limits = [str(workers), str(time_limit), str(grace)]
        self._places, self._places_each = places, places_each
        self._strangers: dict[str, str] = {}
        self.watching = Places(
            watchers,
            each=watchers_each,
            full="many watch runs just now; look again in a while",
            enough=f"you watch {watchers_each} runs at once already; close the page of one",
            retry_after=15,
        )
        self._environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        if isinstance(store_url, Path):
            store_url = f"sqlite:///{store_url.expanduser().absolute()}"
        if store_url is not None:
            # Not an argument, for all users of a machine see those, and the URL may hold a password.
            self._environment["PAPERWORKS_STORE"] = store_url

    def close(self) -> None:
        """Close the store; the runs go on."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(
        self,
        slug: str,
        parameters: Mapping[str, object] | None = None,
        scale: str = "default",
        user_id: int | None = None,
        *,
        seed: int = 0,
        address: str = "",
    ) -> str:
        """Start a run; it waits while all places are taken.

        Args:
            slug: The paper.
            parameters: Options of its recipe, typed or as text, within what `paperworks.page.offered` tells.
            scale: Scale of the work.
            user_id: Who starts it; None for whoever may use this machine's page without an account.
            seed: Seed of all that is random.
            address: Where it is started from, for who has no account; each server process counts for itself.

        Returns:
            The identity of the run, which is in the store by then.

        Raises:
            UsageError: The paper has no recipe, or an option, its value, the scale or the seed is not one.
            BusyError: Enough runs wait already, or enough of this user's.
            PaperworksError: The machine has no room for its process.
        """
        recipe = find(slug)
        options = checked(recipe, parameters or {}, scale)
        # PostgreSQL's whole numbers end there.
        if not 0 <= seed < 2**31:
            raise UsageError(f"seed is a whole number from 0 to {2**31 - 1}, not {seed}")
        run = Run(recipe.paper, options, seed=seed, scale=scale)
        # Those whose process is gone no longer count.
        self.store.runs(status="running")
        with self.store.writing(alone=True) as session:
            unfinished = select(func.count()).select_from(RunRequestRow).where(_unfinished())
            if (session.scalar(unfinished) or 0) >= self._places:
                raise BusyError(f"{self._places} runs are under way or wait already; try again when one has ended")
            if user_id is not None:
                mine = session.scalar(unfinished.where(RunRequestRow.user_id == user_id)) or 0
            else:
                mine = self._of_stranger(session, address)
            if mine >= self._places_each:
                raise BusyError(f"you have {mine} runs under way or waiting already; cancel one or let one end first")
            session.add(row_of(run))
            session.flush()
            session.add(
                RunRequestRow(run_id=run.id, user_id=user_id, requested=time.time(), working=False, cancelled=False)
            )
            if user_id is None and address:
                self._strangers[run.id] = address
        try:
            self._spawn(run.id)
        except BaseException as error:
            self._release(run.id, "its process could not be started")
            if isinstance(error, Exception):
                told = "the run could not be started: this machine has no room for its process; try again later"
                raise PaperworksError(told) from error
            raise
        return run.id

    def _of_stranger(self, session: Session, address: str) -> int:
        """How many unfinished runs were started from an address without an account; 0 where no address is told."""
        asked = select(RunRequestRow.run_id).where(_unfinished(), RunRequestRow.run_id.in_(list(self._strangers)))
        unfinished = set(session.scalars(asked))
        self._strangers = {run_id: who for run_id, who in self._strangers.items() if run_id in unfinished}
        return list(self._strangers.values()).count(address) if address else 0

    def _spawn(self, run_id: str) -> None:
        # A session of its own, so that what stops the server from its terminal does not stop the run.
        process = subprocess.Popen(
            [sys.executable, "-m", "paperworks.page.work", run_id, *self._limits],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            threading.Thread(target=self._reap, args=(process, run_id), name=f"end of {run_id}", daemon=True).start()
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _reap(self, process: subprocess.Popen[bytes], run_id: str) -> None:
        try:
            status = process.wait(_BEGINS_WITHIN)
        except subprocess.TimeoutExpired:
            if self._announced(run_id):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        # Where it has not even said that the run is its own.
        self._settle(run_id, f"its process could not start: exit status {status}")

    def _announced(self, run_id: str) -> bool:
        """Whether a run of this server waits for its process to take it over, as far as the store can tell."""
        with suppress(UsageError), self.store.reading() as session:
            return session.scalar(select(RunRow.id).where(_of_this_process(run_id))) is not None
        return False

    def _fail(self, run_id: str, reason: str) -> None:
        """Keep that a run has failed whose process has not taken it over, which frees its place."""
        ended = {"status": "failed", "finished": time.time(), "error": reason, "progress": []}
        with self.store.writing() as session:
            session.execute(update(RunRow).where(_of_this_process(run_id)).values(**ended))

    def _settle(self, run_id: str, reason: str) -> None:
        """The same, as soon as the store answers: while this server lives nobody else finds that the process is gone."""
        while True:
            try:
                return self._fail(run_id, reason)
            except UsageError:
                time.sleep(_STORE_AGAIN)

    def _release(self, run_id: str, reason: str) -> None:
        """The same, without waiting for a store that is away."""
        try:
            self._fail(run_id, reason)
        except UsageError:
            threading.Thread(target=self._settle, args=(run_id, reason), name=f"end of {run_id}", daemon=True).start()

    def cancel(self, run_id: str) -> None:
        """Stop a run; it ends as interrupted soon afterwards and keeps what it has recorded.

        Raises:
            UsageError: There is no such run, it is over, or it was not started from the page.
        """
        mine = update(RunRequestRow).where(RunRequestRow.run_id == run_id, _unfinished())
        with self.store.writing() as session:
            # Also the second of two clicks finds its row.
            found = session.execute(mine.values(cancelled=True).returning(RunRequestRow.run_id)).first()
        if found is None:
            run = self.store.run(run_id)
            if run.status == "running":
                raise UsageError(f"run {run_id} was started from the command line; stop it there")
            raise UsageError(f"run {run_id} is {run.status} already")

    def request(self, run_id: str) -> RunRequestRow | None:
        """Who asked for a run, and whether it is to stop; None where it was not started from the page."""
        with self.store.reading() as session:
            return session.get(RunRequestRow, run_id)

    async def events(self, run_id: str, *, every: float = 0.5) -> AsyncIterator[Run]:
        """The run as it stands, again each time that has changed, until it is over.

        Args:
            run_id: Its identity.
            every: Seconds between two looks; more pass where many watch.

        Raises:
            UsageError: There is no such run.
        """
        seen: tuple[Any, ...] = ()
        while True:
            run = await asyncio.to_thread(self.store.run, run_id)
            now = (run.status, run.bars, len(run.logs), len(run.measurements), len(run.artefacts))
            if now != seen:
                seen = now
                yield run
            if run.status != "running":
                return
            await asyncio.sleep(max(every, self.watching.taken / _LOOKS_A_SECOND))


def _unfinished() -> ColumnElement[bool]:
    return RunRequestRow.run_id.in_(select(RunRow.id).where(RunRow.status == "running"))


def _of_this_process(run_id: str) -> ColumnElement[bool]:
    """The run while it bears the mark of the server that announced it: a process that takes it over puts its own."""
    mine = (RunRow.host == platform.node()) & (RunRow.pid == os.getpid())
    return (RunRow.id == run_id) & (RunRow.status == "running") & mine
