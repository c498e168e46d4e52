"""How far long work is and how long it will take, on the error stream, for those who call it and say nothing of that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

Progress = Callable[[int], Any]


class _Lines(tqdm):  # type: ignore[misc, type-arg]
    """Lines that stay, for a log file or a pipe."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes one state of the work; tqdm ends the last line itself."""
        before = ""

        def show(text: str) -> None:
            nonlocal before
            print(before + text, end="", file=file, flush=True)
            before = "\n"

        return show


@contextmanager
def telling(progress: Progress | bool | None, total: int, what: str) -> Iterator[Progress]:
    """Yield whom to tell of steps done: `progress` itself if it is a function, nobody if it is False or None.

    If it is True a bar on the terminal tells how far `what` is and how long it will take, or where there is no terminal
    a line at its begin, every ten seconds and at its end; nothing where tqdm is disabled (TQDM_DISABLE=1).

    Example:
        >>> done = []
        >>> with telling(done.append, 3, "reading") as tell:
        ...     tell(2)
        >>> done
        [2]
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda steps: None
        return
    options: dict[str, Any] = {"total": total, "desc": what, "file": sys.stderr}
    if sys.stderr.isatty():
        bar = tqdm(**options)
    else:
        form = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left"
        bar = _Lines(**options, mininterval=10, maxinterval=30, miniters=1, bar_format=form)
    with bar:
        # More than was asked for may come, for work is done in batches.
        yield lambda steps: bar.update(min(steps, total - bar.n))
