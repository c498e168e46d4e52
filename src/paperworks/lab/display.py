"""Progress on the error stream: bars on a terminal, and plain lines where a log file or a pipe takes it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from paperworks.lab.run import Bar, Bars, Entry, Log

# Seconds without a word of a piece of work, and between two looks at the clock.
_EVERY = 30.0
_LOOK = 1.0


class Display:
    """Shows on the error stream how far work is, and its messages.

    A terminal has a bar for each piece of work; the last stays on the screen when all is done. Elsewhere a line says
    when a piece begins, every thirty seconds how far it is and about how long it will take, and when it ends.

    Args:
        name: What the lines begin with; with a name they tell begin and end of the work as a whole too.
        bars: Whether to draw bars; by default where the error stream is a terminal.

    Example:
        >>> with Display() as display:
        ...     for done in range(3):
        ...         display.tell("reading", done, 2)
    """

    def __init__(self, name: str = "", *, bars: bool | None = None) -> None:
        self._told: dict[str, Bar] = {}
        self._shown: _Bars | _Lines = _Bars() if (sys.stderr.isatty() if bars is None else bars) else _Lines(name)

    def show(self, entry: Entry) -> None:
        """Show the progress or the message of an entry; other entries are shown in the results."""
        # Who has closed the terminal or the pipe does not stop the work.
        with suppress(OSError):
            if isinstance(entry, Log):
                self._shown.message(entry.message)
            elif isinstance(entry, Bars):
                self._shown.bars(entry.bars)

    def tell(self, what: str, done: float, total: float | None) -> None:
        """Show how far a piece of work that has this name is."""
        key = self._told[what].key if what in self._told else len(self._told)
        self._told[what] = Bar(key, what, done, total)
        self.show(Bars(tuple(self._told.values())))

    def close(self) -> None:
        """End what is shown and leave the terminal as it is now."""
        with suppress(OSError):
            self._shown.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Bars:
    """Bars that move, by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        class OwnConsole(Console):
            def on_broken_pipe(self) -> None:
                # Rich would end the process, and the work with it.
                self.quiet = True

        self._console = OwnConsole(file=sys.stderr)
        self._live: Any = None
        self._tasks: dict[int, Any] = {}

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def bars(self, bars: Sequence[Bar]) -> None:
        from rich import progress
        from rich.markup import escape

        if not bars:
            self.close()
            return
        if self._live is None:
            self._live = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._live.start()
        for key in self._tasks.keys() - {bar.key for bar in bars}:
            self._live.remove_task(self._tasks.pop(key))
        for bar in bars:
            if bar.key not in self._tasks:
                self._tasks[bar.key] = self._live.add_task(escape(bar.description), total=bar.total)
            self._live.update(self._tasks[bar.key], completed=bar.done)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._tasks = None, {}


@dataclass
class _Piece:
    """A piece of work under way: how far it was when it began, how far it is, and when it was last told of."""

    first: float
    bar: Bar
    begun: float
    told: float


class _Lines:
    """Lines that stay, each with all that it says."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream = sys.stderr
        self._begun = self._told = time.monotonic()
        self._pieces: dict[int, _Piece] = {}
        self._ended: set[int] = set()
        # The work tells of itself, and so does the clock while a step of it takes long.
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._look, name="progress", daemon=True)
        if name:
            self._print("begins")
        self._clock.start()

    def message(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def bars(self, bars: Sequence[Bar]) -> None:
        now = time.monotonic()
        with self._lock:
            for key in self._pieces.keys() - {bar.key for bar in bars}:
                self._end(key, now)
            for bar in bars:
                if bar.key in self._pieces:
                    self._pieces[bar.key].bar = bar
                elif bar.key not in self._ended and bar.total != 0:
                    self._pieces[bar.key] = _Piece(bar.done, bar, now, now)
                    self._print(bar.description, "begins" if bar.total is None else f"begins, {_far(bar)}")
                if bar.key in self._pieces and bar.total is not None and bar.done >= bar.total:
                    self._end(bar.key, now)

    def tick(self) -> None:
        """Tell of each piece of work of which nothing has been told for thirty seconds, or that there is work at all."""
        now = time.monotonic()
        with self._lock:
            for piece in self._pieces.values():
                if now - piece.told >= _EVERY:
                    piece.told = now
                    passed = f"{_far(piece.bar)} after {span(now - piece.begun)}"
                    self._print(piece.bar.description, passed + _left(piece, now))
            if self._name and not self._pieces and now - self._told >= _EVERY:
                self._print(f"at work for {span(now - self._begun)}")

    def close(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._clock.join()
        now = time.monotonic()
        with self._lock:
            for key in list(self._pieces):
                self._end(key, now)
            if self._name:
                self._print(f"ended after {span(now - self._begun)}")

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            self.tick()

    def _end(self, key: int, now: float) -> None:
        piece = self._pieces.pop(key)
        self._ended.add(key)
        self._print(piece.bar.description, f"ended, {_far(piece.bar)} after {span(now - piece.begun)}")

    def _print(self, *words: str) -> None:
        self._told = time.monotonic()
        # A stream that is closed, or whose reader is gone, does not stop the work.
        with suppress(OSError, ValueError):
            print(": ".join(filter(None, (self._name, *words))), file=self._stream, flush=True)


def _far(bar: Bar) -> str:
    return f"{bar.done:,.0f}" if bar.total is None else f"{bar.done:,.0f} of {bar.total:,.0f}"


def _left(piece: _Piece, now: float) -> str:
    done = piece.bar.done - piece.first
    if piece.bar.total is None or done <= 0:
        return ""
    return f", about {span((now - piece.begun) * (piece.bar.total - piece.bar.done) / done)} left"


def span(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> span(42.3), span(199.7), span(3725)
        ('42 s', '3 min 20 s', '1 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
