"""The process of one run that was started from the page; `paperworks.page.runs` starts it.

It waits until a place is free, executes the recipe, and stops when the store says that the run is cancelled.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from types import FrameType

from sqlalchemy import select, update

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.executors import execute
from paperworks.lab.run import Bar, Bars, Status
from paperworks.lab.store import Store
from paperworks.page.tables import RunRequestRow

_EVERY = 0.5


class Watch:
    """Interrupts the main thread when the run is to stop, and ends the process where that has no effect.

    Args:
        store: Where the run is kept.
        run_id: The run.
        time_limit: Seconds it may take.
        grace: Seconds it then has to end by itself.

    Attributes:
        stopped: Why it was interrupted, "" before.
    """

    stopped = ""

    def __init__(self, store: Store, run_id: str, time_limit: float, grace: float) -> None:
        self._store, self._run_id = store, run_id
        self._time_limit, self._grace = time_limit, grace
        self._begun: float | None = None
        self._reason = "the machine it ran on stopped it"
        self._over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        threading.Thread(target=self._look, name=f"watch over {run_id}", daemon=True).start()

    def begin(self) -> None:
        """From now on time is counted."""
        self._begun = time.monotonic()

    def end(self) -> None:
        """The run is over, and nothing stops this process any more."""
        self._over.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self._reason
        raise KeyboardInterrupt(self._reason)

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            if reason := self._why():
                self._reason = reason
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                if not self._over.wait(self._grace):
                    with suppress(UsageError):
                        end(self._store, self._run_id, "interrupted", reason)
                    os.killpg(0, signal.SIGKILL)
                return

    def _why(self) -> str:
        if self._begun is not None and time.monotonic() - self._begun > self._time_limit:
            return f"it took longer than the {self._time_limit:.0f} seconds that a run from the page may take"
        # A store that is away for a moment does not stop the run.
        with suppress(UsageError), self._store.reading() as session:
            asked = select(RunRequestRow.cancelled).where(RunRequestRow.run_id == self._run_id)
            return "cancelled" if session.scalar(asked) else ""
        return ""


def end(store: Store, run_id: str, status: Status, error: str) -> None:
    """Keep how a run ended, where nobody has yet."""
    run = store.run(run_id)
    if run.status == "running":
        run.status, run.finished, run.error = status, datetime.now(UTC), error
        store.end(run)


def wait_for_place(store: Store, run_id: str, workers: int) -> None:
    """Return when fewer than `workers` runs are at work and this one is the next."""
    told = 0
    while ahead := _ahead(store, run_id, workers):
        if ahead != told:
            told = ahead
            store.add(run_id, Bars((Bar(0, f"waiting for {ahead} other run{'s' if ahead > 1 else ''}", 0, None),)))
        store.beat(run_id)
        time.sleep(_EVERY)


def _ahead(store: Store, run_id: str, workers: int) -> int:
    """How many runs are at work or come first; 0 once this one is at work too."""
    alive = [run.id for run in store.runs(status="running")]
    with store.writing(alone=True) as session:
        unfinished = select(RunRequestRow).where(RunRequestRow.run_id.in_(alive))
        requests = session.scalars(unfinished.order_by(RunRequestRow.requested, RunRequestRow.run_id)).all()
        working = sum(request.working for request in requests)
        waiting = [request.run_id for request in requests if not request.working]
        before = waiting.index(run_id)
        if working + before >= workers:
            return working + before
        session.execute(update(RunRequestRow).where(RunRequestRow.run_id == run_id).values(working=True))
        return 0


def work(run_id: str, workers: int, time_limit: float, grace: float) -> None:
    """Carry out the run that the page has announced in the store.

    Args:
        run_id: The run.
        workers: How many such runs may be at work at once.
        time_limit: Seconds it may take.
        grace: Seconds it has to end by itself once it is to stop.
    """
    with Store() as store:
        run = store.run(run_id)
        if run.status != "running":
            # The server that announced it is gone, and its readers have been told so.
            return
        store.begin(run)
        watch = Watch(store, run_id, time_limit, grace)
        try:
            wait_for_place(store, run_id, workers)
            watch.begin()
            execute(
                run.paper,
                parameters=run.parameters,
                scale=run.scale,
                seed=run.seed,
                store=store,
                show_progress=False,
                run_id=run_id,
                stopped=lambda: watch.stopped,
            )
            watch.end()
        except KeyboardInterrupt as stop:
            watch.end()
            end(store, run_id, "interrupted", str(stop))
        except PaperworksError as error:
            watch.end()
            end(store, run_id, "failed", str(error))


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
