"""Answers that many readers share for some seconds, so that a crowd costs no more than one of them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paperworks.page.places import BusyError
from paperworks.page.rendering import wants_json
from paperworks.page.safety import session_token


@dataclass(frozen=True)
class _Answer:
    messages: list[Message]
    good_until: float


class Shared:
    """Keeps the answers to readers who are not signed in, and makes each once while many ask for it.

    Only pages that are the same for all of them may be shared: lists, without forms that carry a token. They are made
    for nobody: what one reader's cookies say is not for the others, however they are written.

    Args:
        app: What answers.
        paths: The pages that are shared.
        seconds: How long an answer is good; for as long again it is still given while a new one is made.
        most: How many answers are kept.
        clock: Seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: tuple[str, ...],
        seconds: float = 5.0,
        most: int = 1000,
        clock: Any = time.monotonic,
    ) -> None:
        self._app, self._paths, self._seconds, self._most, self._clock = app, paths, seconds, most, clock
        self._answers: OrderedDict[tuple[Any, ...], _Answer] = OrderedDict()
        self._making: dict[tuple[Any, ...], asyncio.Task[_Answer]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from what is kept, or make the answer and keep it."""
        if not self._shared(scope):
            return await self._app(scope, receive, send)
        # Nothing else of a request shows in the answer, and who varies the rest is not to have it made anew.
        key = (scope["method"], scope["path"], scope["query_string"], wants_json(Request(scope)))
        answer, now = self._answers.get(key), self._clock()
        if answer is None or answer.good_until < now:
            task = self._making.get(key)
            if task is None:
                task = self._making[key] = asyncio.create_task(self._make(key, scope, receive))
                task.add_done_callback(lambda _: self._making.pop(key, None))
            if answer is None or answer.good_until + self._seconds < now:
                # One reader who leaves does not take the answer from the others.
                answer = await asyncio.shield(task)
        for message in answer.messages:
            await send(_copy(message))

    def _shared(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        return scope["path"] in self._paths and session_token(Request(scope)) is None

    async def _make(self, key: tuple[Any, ...], scope: Scope, receive: Receive) -> _Answer:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        headers = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
        await self._app({**scope, "headers": headers}, receive, keep)
        answer = _Answer(messages, self._clock() + self._seconds)
        if messages[0]["status"] == 200:
            self._answers[key] = answer
            self._answers.move_to_end(key)
        while len(self._answers) > self._most:
            self._answers.popitem(last=False)
        return answer


class Crowd:
    """Serves a few at once while the others wait, and serves a crowd plainly rather than late.

    Work that keeps a processor busy is done sooner one after another: threads that all want it only hinder each other.

    Args:
        few: How many that are served or wait are no crowd.
        at_once: How many are served at once.
        most: How many may be served or wait.

    Example:
        >>> async def first_and_second():
        ...     crowd = Crowd(few=1, at_once=2)
        ...     async with crowd.turn() as first, crowd.turn() as second:
        ...         return first, second
        >>> asyncio.run(first_and_second())
        (True, False)
    """

    def __init__(self, *, few: int, at_once: int, most: int = 1000) -> None:
        self._few, self._most, self._present, self._turns = few, most, 0, asyncio.Semaphore(at_once)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """Wait for one's turn; within it one knows whether there were few when one came.

        Raises:
            BusyError: So many wait that one would be gone before one's turn.
        """
        if self._present >= self._most:
            raise BusyError("too many search just now; try again in a few seconds", retry_after=5)
        self._present += 1
        few = self._present <= self._few
        try:
            async with self._turns:
                yield few
        finally:
            self._present -= 1


def _copy(message: Message) -> MutableMapping[str, Any]:
    """A message of its own, for those who pass it on add headers."""
    return {**message, "headers": list(message["headers"])} if "headers" in message else dict(message)
