"""Temporal fusion (Flover, arXiv 2305.13484): requests that come and go at any time share one pass of the model."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Literal, Self

import torch
from torch import Tensor, nn

from paperworks.decoding.cache import SlotCache
from paperworks.decoding.engine import as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.sampling import Sampling, check_logits, draw
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree

Status = Literal["waiting", "running", "finished", "cancelled", "failed"]


def compaction_plan(live: Sequence[bool]) -> tuple[int, dict[int, int]]:
    """The least moves after which the live slots are contiguous.

    Of all windows as wide as there are live slots, the first that holds most of them stays; the live slots outside it
    go, in ascending order, to the free slots inside. The plan depends on the flags alone, so that every rank of a
    model split over several devices makes the same one.

    Args:
        live: Whether each slot holds a request.

    Returns:
        Where the window starts, and the moves as `{source: destination}`.

    Example:
        >>> compaction_plan([True, False, True, True, False])
        (0, {3: 1})
    """
    width, before = sum(live), [0, *accumulate(live)]
    inside = [before[start + width] - before[start] for start in range(len(live) - width + 1)]
    start = inside.index(max(inside))
    window = range(start, start + width)
    sources = [slot for slot, alive in enumerate(live) if alive and slot not in window]
    return start, dict(zip(sources, (slot for slot in window if not live[slot]), strict=True))


class RequestHandle:
    """A request in the hands of its owner, as `TemporalFusion.submit` returns it.

    Iterate over it for its tokens as they come: `for token in handle`. Where no thread serves, waiting for it runs the
    server's steps.

    Attributes:
        prompt: Token ids, shape (length,).
        max_new_tokens: Tokens to generate at most.
        sampling: How they are chosen.
        generator: Source of its randomness.
        tokens: The tokens so far, the end-of-sequence token included where one came.
        status: "waiting", "running", "finished", "cancelled" or "failed".
        error: Why it failed.
        submitted: When it was handed over, in seconds of `time.perf_counter`.
        started: When its first token came, None before.
        ended: When it was finished, cancelled or failed, None before.
    """

    def __init__(
        self,
        server: TemporalFusion,
        prompt: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        ends: set[int],
        generator: torch.Generator,
    ) -> None:
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.sampling, self.generator = sampling, generator
        self.tokens: list[int] = []
        self.status: Status = "waiting"
        self.error: Exception | None = None
        self.submitted = perf_counter()
        self.started: float | None = None
        self.ended: float | None = None
        self._server, self._ends = server, ends
        self._news = threading.Condition(server._lock)

    def __repr__(self) -> str:
        return f"<request of {len(self.prompt)} tokens: {self.status}, {len(self.tokens)} of {self.max_new_tokens} new>"

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.ended is not None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token, None before it."""
        return None if self.started is None else self.started - self.submitted

    @property
    def latency(self) -> float | None:
        """Seconds from submission to the end, None before it."""
        return None if self.ended is None else self.ended - self.submitted

    def __iter__(self) -> Iterator[int]:
        """Yield the tokens as they come, and raise what made the request fail; a cancelled one just ends."""
        read, done = 0, False
        while not done:
            self._wait(read, None)
            # In this order: tokens that come after the look at `done` are read in the next round.
            done, new = self.done, self.tokens[read:]
            yield from new
            read += len(new)
        if self.error is not None:
            raise self.error

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all tokens.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: it has not ended by then; it goes on.
            concurrent.futures.CancelledError: it was cancelled; `tokens` has what came before.
            Exception: whatever made it fail.
        """
        deadline = None if timeout is None else perf_counter() + timeout
        while not self.done:
            self._wait(len(self.tokens), deadline)
        if self.error is not None:
            raise self.error
        if self.status == "cancelled":
            raise CancelledError(f"the request was cancelled after {len(self.tokens)} tokens")
        return list(self.tokens)

    def cancel(self) -> bool:
        """Give the request up; its slot is free from the next step on.

        Returns:
            Whether there was anything left to give up.
        """
        with self._server._lock:
            if self.done:
                return False
            self._end("cancelled")
            return True

    def _wait(self, read: int, deadline: float | None) -> None:
        """Return when there are more than `read` tokens or the request has ended."""
        while not self.done and len(self.tokens) <= read:
            left = None if deadline is None else deadline - perf_counter()
            if left is not None and left <= 0:
                raise TimeoutError(f"no end within the timeout: {self!r}")
            if self._server.serving:
                with self._news:
                    if not self.done and len(self.tokens) <= read:
                        self._news.wait(left)
            else:
                self._server.step()

    def _take(self, outcome: int | Exception) -> None:
        """Take in what a pass gave, under the server's lock."""
        if self.done:
            return
        if isinstance(outcome, Exception):
            self.error = outcome
            self._end("failed")
            return
        self.started = self.started or perf_counter()
        self.tokens.append(outcome)
        self._settle()
        self._news.notify_all()

    def _settle(self) -> None:
        """End where the last token says so."""
        full = len(self.tokens) == self.max_new_tokens
        if not self.done and self.tokens and (full or self.tokens[-1] in self._ends):
            self._end("finished")

    def _end(self, status: Status) -> None:
        self.status, self.ended = status, perf_counter()
        self._server._open.discard(self)
        self._news.notify_all()


@dataclass
class ServingStatistics:
    """What a server has done so far.

    Attributes:
        prefills: Requests whose prompt was read.
        steps: Passes over the window.
        row_steps: Rows computed in them.
        live_row_steps: Those of them that held a request.
        moves: Rows copied to close holes.
    """

    prefills: int = 0
    steps: int = 0
    row_steps: int = 0
    live_row_steps: int = 0
    moves: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the computed rows that held a request."""
        return self.live_row_steps / self.row_steps if self.row_steps else float("nan")


class TemporalFusion:
    """A server that decodes all live requests, at whatever step each is, in one pass a token.

    A request is prefilled alone into a free slot next to the window of live slots, and takes part in the next pass. One
    that has reached its length or its end token leaves at once. A hole that it leaves within the window is closed by
    the least number of row copies, so that a pass computes live rows and nothing else.

    As a context manager it serves in a thread of its own, and `submit`, `RequestHandle.cancel` and waiting for tokens may be
    called from any thread. Without it call `step` as long as it returns True; waiting for a handle does that too.

    The text of a request does not depend on its companions, but for rounding: kernels may add in another order for
    another batch size, which can turn the choice between two tokens that are equally likely to the last digits.

    With a model split over several devices (transformers' `tp_plan="auto"`) let every rank submit the same requests in the
    same order, seeds included, and call `step` in turn: all of them then take the same decisions.

    Args:
        model: A causal LM that a `Target` takes.
        max_concurrency: Slots, requests decoded at the same time.
        max_seq_len: Tokens of prompt and answer that a slot holds. Memory for all slots is taken at the first request.
        compaction: "window" closes holes by the least moves; "none" leaves them, and they are computed until the
            window's ends pass them.
        joins_per_step: Requests prefilled at most between two passes: running requests wait for no more than that.
        max_waiting: Requests that may wait when every slot is taken; one more is refused.

    Attributes:
        statistics: A `ServingStatistics`.

    Raises:
        ValueError: an argument out of range.
        TypeError, ValueError: a model that cannot be a `Target`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> with TemporalFusion(model, max_concurrency=4, max_seq_len=64) as server:
        ...     long = server.submit([1, 2, 3], max_new_tokens=20, eos_token_id=[])
        ...     short = server.submit([4, 5], max_new_tokens=5, sampling=Sampling(temperature=0.7), eos_token_id=[])
        ...     len([token for token in short]), len(long.result())
        (5, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_concurrency: int = 32,
        max_seq_len: int = 512,
        compaction: Literal["window", "none"] = "window",
        joins_per_step: int = 1,
        max_waiting: int = 1024,
    ) -> None:
        sizes = {"max_concurrency": max_concurrency, "max_seq_len": max_seq_len, "joins_per_step": joins_per_step,
                 "max_waiting": max_waiting}  # fmt: skip
        for name, value in sizes.items():
            if value < (least := 0 if name == "max_waiting" else 1):
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if compaction not in ("window", "none"):
            raise ValueError(f"compaction must be 'window' or 'none', got {compaction!r}")
        self.target = Target(model)
        self.max_seq_len, self.joins_per_step, self.max_waiting = max_seq_len, joins_per_step, max_waiting
        self.compaction = compaction
        self.statistics = ServingStatistics()
        self._cache = SlotCache(self.target.config, max_concurrency, max_seq_len)
        self._slots: list[RequestHandle | None] = [None] * max_concurrency
        self._waiting: deque[RequestHandle] = deque()
        self._open: set[RequestHandle] = set()
        # One lock for requests, held for moments; one for whoever runs a step, held through the passes.
        self._lock = threading.RLock()
        self._stepping = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> RequestHandle:
        """Hand over a request; it is served in the order of arrival.

        Args:
            prompt: Token ids, shape (length,) or (1, length).
            max_new_tokens: Tokens to generate at most.
            sampling: How tokens are chosen; the most likely ones if None.
            eos_token_id: Token or tokens that end it; the model's generation config has the say if None, [] for none.
            generator: Source of its randomness, for it alone, on the model's device; a freshly seeded one if None.

        Raises:
            TypeError: the prompt is text, or max_new_tokens is no whole number.
            ValueError: an empty prompt, unknown token ids, more tokens than the model's context or a slot holds, or a
                generator that another request still draws from.
            queue.Full: so many requests wait that this one is refused.
            RuntimeError: the server is closed.
        """
        if isinstance(prompt, str):
            raise TypeError("a prompt is token ids, got text: give tokenizer(text).input_ids")
        if not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens must be a whole number, got {max_new_tokens!r}")
        ids = torch.as_tensor(prompt).clone()
        ids = ids if ids.numel() else ids.long()
        prompts = split_prompts(as_prompts(ids), None)
        if len(prompts) > 1:
            raise ValueError(f"a request is one prompt, got {len(prompts)}: submit them one by one")
        check_lengths(self.target, prompts, max_new_tokens)
        if len(prompts[0]) + max_new_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(prompts[0])} tokens and {max_new_tokens} more are asked for, but a slot holds "
                f"{self.max_seq_len}: lower max_new_tokens or make the server with a larger max_seq_len"
            )
        own = generator
        if own is None:
            own = torch.Generator(self.target.device)
            own.seed()
        ends = end_tokens(self.target.model, eos_token_id)
        with self._lock:
            if self._closed:
                raise RuntimeError("the server is closed and takes no more requests: make another")
            if len(self._open) >= (most := len(self._slots) + self.max_waiting):
                raise queue.Full(
                    f"{most} requests run or wait, as many as the server takes: submit again when some have ended, or "
                    "make it with a larger max_waiting"
                )
            if any(handle.generator is own for handle in self._open):
                raise ValueError(
                    "another request draws from this generator: give each its own, or their texts would mix"
                )
            handle = RequestHandle(self, prompts[0], max_new_tokens, sampling or Sampling(), ends, own)
            self._waiting.append(handle)
            self._open.add(handle)
            self._wake.notify()
        return handle

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._open)

    @torch.inference_mode()
    def step(self) -> bool:
        """Let waiting requests join, and give every live one its next token.

        Returns:
            Whether requests are left.
        """
        with self._stepping:
            try:
                self._leave()
                self._join()
                self._fuse()
                self._leave()
            except BaseException:
                self._begin_anew()
                raise
        return self.busy

    def _begin_anew(self) -> None:
        """Let all open requests join again, each with its tokens so far.

        Whoever interrupts a step (Ctrl-C) may go on with the next, but cannot know where slots, cache and requests
        stood when it broke off.
        """
        with self._lock:
            for slot in range(len(self._slots)):
                self._slots[slot] = None
                self._cache.clear(slot)
            for handle in [*self._open]:
                handle._settle()
                if handle.done:
                    self._open.discard(handle)
                else:
                    handle.status = "waiting"
            self._waiting = deque(sorted(self._open, key=lambda handle: handle.submitted))

    def _join(self) -> None:
        """Prefill waiting requests, each into a slot of its own; this gives their first token."""
        for _ in range(self.joins_per_step):
            slot = self._free_slot()
            handle = self._next() if slot is not None else None
            if slot is None or handle is None:
                return
            self._slots[slot] = handle
            self._cache.show(slot, slot + 1)
            outcome: int | Exception
            try:
                text = torch.cat([handle.prompt, handle.prompt.new_tensor(handle.tokens)])
                logits, _ = self.target.prefill([text], self._cache)
                self.statistics.prefills += 1
                outcome = self._choose(logits, [handle])[0]
            except Exception as error:
                outcome = error
            with self._lock:
                handle._take(outcome)
            self._leave()

    def _fuse(self) -> None:
        """One token for all requests in the window, in one pass."""
        low, high = self._window()
        if low == high:
            return
        outcomes = self._decode(low, high)
        handles = self._slots[low:high]
        # A hole reads a token too, but never keeps it.
        kept = [
            int(handle is not None and isinstance(outcome, int))
            for handle, outcome in zip(handles, outcomes, strict=True)
        ]
        self._cache.show(low, high)
        self._cache.commit(torch.zeros(high - low, 1, dtype=torch.long, device=self.target.device), kept)
        with self._lock:
            for handle, outcome in zip(handles, outcomes, strict=True):
                if handle is not None:
                    handle._take(outcome)

    def _decode(self, low: int, high: int) -> list[int | Exception]:
        """The next token of every slot of a window, or what keeps it from having one.

        Where a pass fails its halves are tried again, down to single rows: nobody fails through a companion. A pass
        that is not committed leaves the cache as it was.
        """
        handles = self._slots[low:high]
        self.statistics.steps += 1
        self.statistics.row_steps += high - low
        self.statistics.live_row_steps += sum(handle is not None for handle in handles)
        last = [[0 if handle is None else handle.tokens[-1]] for handle in handles]
        try:
            self._cache.show(low, high)
            logits, _ = self.target.verify(TokenTree.chain(torch.tensor(last, device=self.target.device)), self._cache)
            return self._choose(logits[:, 0], handles)
        except Exception as error:
            if high - low == 1:
                return [error]
            middle = (low + high) // 2
            return self._decode(low, middle) + self._decode(middle, high)

    def _choose(self, logits: Tensor, handles: Sequence[RequestHandle | None]) -> list[int | Exception]:
        """A token for each row of `logits` (rows, vocab), by each request's own settings and generator."""
        # First of all: a row that had drawn already would draw again when the pass is repeated without its companion.
        check_logits(logits)
        tokens: list[int | Exception] = list(logits.argmax(-1).tolist())
        sampled: dict[Sampling, list[int]] = {}
        for row, handle in enumerate(handles):
            if handle is not None and not handle.sampling.greedy:
                sampled.setdefault(handle.sampling, []).append(row)
        for sampling, rows in sampled.items():
            for row, law in zip(rows, sampling.probabilities(logits[rows]), strict=True):
                handle = handles[row]
                assert handle is not None
                tokens[row] = int(draw(law, handle.generator))
        return tokens

    def _leave(self) -> None:
        """Free the slots of requests that have ended, and close the holes they leave."""
        for slot, handle in enumerate(self._slots):
            if handle is not None and handle.done:
                self._slots[slot] = None
                self._cache.clear(slot, erase=handle.status == "failed")
        if self.compaction == "window":
            _, moves = compaction_plan([handle is not None for handle in self._slots])
            self._cache.move(moves)
            for source, destination in moves.items():
                self._slots[destination], self._slots[source] = self._slots[source], None
            self.statistics.moves += len(moves)

    def _window(self) -> tuple[int, int]:
        """First live slot, and the one behind the last."""
        live = [slot for slot, handle in enumerate(self._slots) if handle is not None]
        return (live[0], live[-1] + 1) if live else (0, 0)

    def _free_slot(self) -> int | None:
        """Above the window, else below it, else in one of its holes."""
        low, high = self._window()
        free = [slot for slot, handle in enumerate(self._slots) if handle is None]
        above, below = [slot for slot in free if slot >= high], [slot for slot in free if slot < low]
        return next(iter([*above, *reversed(below), *free]), None)

    def _next(self) -> RequestHandle | None:
        """The request that has waited longest, now running."""
        with self._lock:
            while self._waiting:
                handle = self._waiting.popleft()
                if not handle.done:
                    handle.status = "running"
                    return handle
        return None

    @property
    def serving(self) -> bool:
        """Whether a thread of the server's own runs the steps."""
        return self._thread is not None

    def __enter__(self) -> Self:
        if self._closed or self._thread is not None:
            raise RuntimeError("a server serves once: make another")
        self._thread = threading.Thread(target=self._serve, name="temporal-fusion", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(cancel=kind is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and return when those handed over have ended.

        Args:
            cancel: Cancel them instead of serving them to their end.
        """
        with self._lock:
            self._closed = True
            if cancel:
                for handle in [*self._open]:
                    handle.cancel()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self.busy)
                if not self.busy:
                    return
            try:
                self.step()
            except BaseException as error:
                # Not of a request but of the server itself: nobody may wait for it for ever.
                failure = (
                    error if isinstance(error, Exception) else RuntimeError(f"the server was stopped by {error!r}")
                )
                with self._lock:
                    self._closed = True
                    for handle in [*self._open]:
                        handle._take(failure)
                raise
