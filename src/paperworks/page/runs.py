"""Runs that are started from the page: who may have how many, where they stand, and how they are stopped.

Each run is a process of its own (`paperworks.page.work`), which takes its place when one is free and keeps all it
records in the store. So several servers may share a store, a run outlives the server that started it, and any
server can tell how it stands or stop it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Self

from sqlalchemy import ColumnElement, func, select, update

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.recipe import Recipe, find
from paperworks.lab.run import Run
from paperworks.lab.store import RunRow, Store, row_of
from paperworks.page.tables import RunRequestRow

_LONGEST_TEXT = 200
# Over all who watch, so that a crowd does not keep the store busy.
_LOOKS_A_SECOND = 40
_SECRETS = ("PAPERWORKS_SMTP", "PAPERWORKS_SECRET")


class BusyError(PaperworksError):
    """All places are taken and enough runs wait already; later there will be room."""


class Runner:
    """Starts, watches and stops runs for readers of the page.

    Args:
        store_url: Where runs are kept, as for `paperworks.lab.Store`.
        workers: How many runs take place at once, over all servers of this store.
        places: How many may take place or wait.
        places_each: How many of them one user may have.
        time_limit: Seconds after which a run is stopped.
        grace: Seconds that a run has to end by itself once it is to stop.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Runner(f"sqlite:///{folder}/runs.db") as runner:
        ...     runner.start("hydra", {"model": "/etc/passwd"})
        Traceback (most recent call last):
        ...
        paperworks.errors.UsageError: model takes a name here, not a path such as '/etc/passwd'; the command line takes paths
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
    ) -> None:
        if workers < 1 or time_limit <= 0:
            raise UsageError(f"runs need at least one worker and some time, given {workers} and {time_limit} s")
        self.store = Store(store_url)
        self._limits = [str(workers), str(time_limit), str(grace)]
        self._places, self._places_each = places, places_each
        self._watchers = 0
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
    ) -> str:
        """Start a run; it waits while all places are taken.

        Args:
            slug: The paper.
            parameters: Options of its recipe, typed or as text.
            scale: Scale of the work.
            user_id: Who starts it; None for whoever may use this machine's page without an account.
            seed: Seed of all that is random.

        Returns:
            The identity of the run, which is in the store by then.

        Raises:
            UsageError: The paper has no recipe, or an option, its value, the scale or the seed is not one.
            BusyError: Enough runs wait already, or enough of this user's.
        """
        recipe = find(slug)
        options = _checked(recipe, parameters or {}, scale)
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
            mine = session.scalar(unfinished.where(RunRequestRow.user_id == user_id)) or 0
            if user_id is not None and mine >= self._places_each:
                raise BusyError(f"you have {mine} runs under way or waiting already; cancel one or let one end first")
            session.add(row_of(run))
            session.flush()
            session.add(
                RunRequestRow(run_id=run.id, user_id=user_id, requested=time.time(), working=False, cancelled=False)
            )
        self._spawn(run.id)
        return run.id

    def _spawn(self, run_id: str) -> None:
        # A session of its own, so that what stops the server from its terminal does not stop the run.
        process = subprocess.Popen(
            [sys.executable, "-m", "paperworks.page.work", run_id, *self._limits],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=self._reap, args=(process, run_id), name=f"end of {run_id}", daemon=True).start()

    def _reap(self, process: subprocess.Popen[bytes], run_id: str) -> None:
        status = process.wait()
        # Where the store is away, its next opening finds the process gone.
        with suppress(UsageError):
            run = self.store.run(run_id)
            if run.status == "running":
                # It has not even said that the run is its own.
                run.status, run.finished = "failed", datetime.now(UTC)
                run.error = f"its process could not start: exit status {status}"
                self.store.end(run)

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
        self._watchers += 1
        try:
            while True:
                run = await asyncio.to_thread(self.store.run, run_id)
                now = (run.status, run.bars, len(run.logs), len(run.measurements), len(run.artefacts))
                if now != seen:
                    seen = now
                    yield run
                if run.status != "running":
                    return
                await asyncio.sleep(max(every, self._watchers / _LOOKS_A_SECOND))
        finally:
            self._watchers -= 1


def _unfinished() -> ColumnElement[bool]:
    return RunRequestRow.run_id.in_(select(RunRow.id).where(RunRow.status == "running"))


def _checked(recipe: Recipe, parameters: Mapping[str, object], scale: str) -> dict[str, Any]:
    options = recipe.plain(parameters, scale)
    for name in recipe.parse(parameters):
        value = options[name]
        if isinstance(value, str) and not recipe.parameters[name].choices:
            _check_text(name, value)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UsageError(f"{name} is too large: a whole number has 64 bits here")
    return options


def _check_text(name: str, value: str) -> None:
    if len(value) > _LONGEST_TEXT or not value.isprintable():
        raise UsageError(f"{name} takes at most {_LONGEST_TEXT} characters, all of them printable")
    # The server's files are not the reader's.
    if value.startswith(("/", "~", ".")) or "\\" in value or "://" in value or ".." in PurePosixPath(value).parts:
        raise UsageError(f"{name} takes a name here, not a path such as {value!r}; the command line takes paths")
    if Path(value).exists():
        raise UsageError(f"{name} takes a name here, and {value!r} is a file of the server; the command line takes it")
