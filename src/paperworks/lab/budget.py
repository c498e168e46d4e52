"""Recipes within a few minutes: which go first, and how long each may take."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from paperworks.lab.recipe import Recipe

# How long an interruption that was asked for may take to arrive.
_ARRIVES = 0.2


def within(seconds: float, work: Callable[[Callable[[], bool]], object]) -> bool:
    """Do some work on the main thread, which is interrupted, as by the user, when so many seconds are over.

    Args:
        seconds: How many.
        work: Is given a function that says whether they are over.

    Returns:
        Whether it was done in time.

    Example:
        >>> within(30, lambda over: "quick"), within(0.05, lambda over: time.sleep(5))
        (True, False)
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        _thread.interrupt_main()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    # A shell has what it runs in the background ignore interruptions.
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        try:
            work(over.is_set)
        finally:
            timer.cancel()
        if over.is_set():
            # It was done in the moment in which it was to be interrupted.
            time.sleep(_ARRIVES)
    except KeyboardInterrupt:
        if not over.is_set():
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    return not over.is_set()


def in_order(recipes: Iterable[Recipe]) -> list[Recipe]:
    """The recipes that a GPU changes, those that it changes most first."""
    return sorted((one for one in recipes if one.gpu), key=lambda one: (-one.gpu, one.paper))


def shares(
    recipes: Sequence[Recipe], seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Recipe, float]]:
    """Each recipe with the seconds that it may take: its part, by what a GPU changes, of those left when its turn comes.

    Example:
        >>> from paperworks.lab.recipe import recipe
        >>> @recipe("first", gpu=3)
        ... def first(run) -> None: ...
        >>> @recipe("second", gpu=1)
        ... def second(run) -> None: ...
        >>> [(one.paper, share) for one, share in shares([first, second], 60, clock=lambda: 0)]
        [('first', 45.0), ('second', 60.0)]
    """
    until = clock() + seconds
    for index, one in enumerate(recipes):
        left = until - clock()
        yield one, max(0.0, left * one.gpu / sum(other.gpu for other in recipes[index:]))
