"""Temporal fusion against serving requests one by one, in threads and in batches, on a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run
from paperworks.recipes.decoding.drafting import cpu_friendly_dtype, prompt_ids

if TYPE_CHECKING:
    from paperworks.lab.measure import Effect

ALONE, THREADS, BATCHES, HOLES, FUSED = (
    "one by one", "a thread a request", "static batches", "fused, holes left", "temporal fusion",
)  # fmt: skip


class Request(NamedTuple):
    """What a client sends: after how many seconds, which prompt, and how many tokens it wants."""

    arrival: float
    prompt: int
    tokens: int


class Served(NamedTuple):
    """What became of it: its tokens, and seconds from arrival to the first and to the last of them."""

    tokens: list[int]
    first: float
    latency: float


@recipe(
    "temporal-fusion",
    baseline="one request after the other, a thread a request, and batches that run until their longest ends",
    gpu=6,
    columns=("speed", "speed-up", "latency", "p95 latency", "first token", "same text"),
    tiny={
        "model": "tiny-random-llama",
        "requests": 5,
        "shortest": 2,
        "longest": 10,
        "max_concurrency": 4,
        "batch": 2,
        "patience": 0.01,
        "rounds": 2,
    },
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "prompts": "mt_bench",
        "requests": 64,
        "shortest": 128,
        "longest": 512,
        "load": 40.0,
        "max_concurrency": 64,
        "batch": 32,
    },
)
def temporal_fusion(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    prompts: Annotated[str, Data("built-in", "mt_bench")] = "built-in",
    requests: Annotated[int, Between(1, 64)] = 16,
    shortest: Annotated[int, Between(1, 32)] = 8,
    longest: Annotated[int, Between(1, 192)] = 48,
    load: Annotated[float, Between(0.01, 40)] = 10.0,
    max_concurrency: Annotated[int, Between(1, 64)] = 16,
    batch: Annotated[int, Between(1, 32)] = 8,
    patience: Annotated[float, Between(0, 2)] = 0.5,
    rounds: Annotated[int, Between(1, 12)] = 6,
    seed: int = 0,
) -> None:
    """Requests that arrive at random, served by one fused stream and by what one would otherwise use.

    Each round draws arrivals (Poisson) and lengths (uniform) anew; every way of serving then gets the same round, in
    turn. Greedy decoding to the wanted length, so that all do the same work.

    Args:
        run: Keeps what is measured.
        model: Name of the model.
        prompts: Prompts, built-in or mt_bench, evenly spread over the set.
        requests: Requests a round.
        shortest: Fewest tokens that a request wants.
        longest: Most tokens that one wants.
        load: Requests that arrive in the time that one takes alone, on average.
        max_concurrency: Slots of the fused stream.
        batch: Requests of a static batch.
        patience: Seconds that a static batch waits to be full, from its oldest request's arrival.
        rounds: Draws of arrivals and lengths.
        seed: Of both.
    """
    from functools import partial

    import numpy as np

    from paperworks.decoding import generate

    target, _, ids = prompt_ids(model, prompts, requests, dtype=cpu_friendly_dtype())
    mean = (shortest + longest) // 2
    alone = _seconds(lambda: generate(target, ids[0], max_new_tokens=mean, eos_token_id=[]))
    run.log(f"a request of {mean} tokens takes {alone:.3g} s alone: one arrives every {alone / load:.3g} s")
    work = [_draw(requests, shortest, longest, alone / load, seed + 1000 * number) for number in range(rounds)]

    slots = {"max_concurrency": max_concurrency, "max_seq_len": max(row.shape[1] for row in ids) + longest}
    statistics: dict[str, list[Any]] = {HOLES: [], FUSED: []}
    ways: dict[str, Callable[[list[Request]], list[Served]]] = {
        ALONE: partial(_one_by_one, target, ids),
        THREADS: partial(_threads, target, ids),
        BATCHES: partial(_batches, target, ids, batch, patience),
        HOLES: partial(_fused, target, ids, {**slots, "compaction": "none"}, statistics[HOLES]),
        FUSED: partial(_fused, target, ids, slots, statistics[FUSED]),
    }
    served: dict[str, list[list[Served]]] = {name: [] for name in ways}

    def serving(name: str) -> Callable[[int], int]:
        def call(number: int) -> int:
            served[name].append(ways[name](work[number]))
            return sum(request.tokens for request in work[number])

        return call

    calls = {name: serving(name) for name in ways}
    speed_up = run.compare(
        baseline=(ALONE, calls.pop(ALONE)), method=calls, over=range(rounds), repeats=1, warmup=0, unit="tokens/s"
    )

    latencies = {name: [one.latency for each in results for one in each] for name, results in served.items()}
    firsts = {name: [one.first for each in results for one in each] for name, results in served.items()}
    tails = {name: [float(np.quantile([one.latency for one in each], 0.95)) for each in results]
             for name, results in served.items()}  # fmt: skip
    for name in ways:
        run.record("latency", float(np.mean(latencies[name])), unit="s", better="lower", series=name)
        run.record("p95 latency", float(np.quantile(latencies[name], 0.95)), unit="s", better="lower", series=name)
        run.record("first token", float(np.mean(firsts[name])), unit="s", better="lower", series=name)
        same = [one.tokens == other.tokens for each, others in zip(served[name], served[ALONE], strict=True)
                for one, other in zip(each, others, strict=True)]  # fmt: skip
        run.record("same text", sum(same), unit=f"of {len(same)}", better="higher", series=name)
    # Requests of one round wait for one another; rounds are the pairs.
    waits = {
        name: [float(np.mean([one.latency for one in each])) for each in results] for name, results in served.items()
    }
    starts = {
        name: [float(np.mean([one.first for one in each])) for each in results] for name, results in served.items()
    }
    for against in (ALONE, BATCHES):
        for measure, values in (("latency", waits), ("p95 latency", tails), ("first token", starts)):
            run.ratio(
                f"{measure}, ratio to {against}", method=values[FUSED], baseline=values[against], better="lower",
                series=FUSED, against=against,
            )  # fmt: skip
    rows = {name: [each.row_steps for each in statistics[name]] for name in statistics}
    run.ratio(
        "rows computed, ratio", method=rows[FUSED], baseline=rows[HOLES], better="lower", series=FUSED, against=HOLES
    )
    for name in statistics:
        run.record(
            "occupancy", float(np.mean([each.occupancy for each in statistics[name]])), unit="of rows", better="higher",
            series=name,
        )  # fmt: skip
    moves = sum(each.moves for each in statistics[FUSED])
    run.record("moves", moves / (rounds * requests), unit="a request", better="lower", series=FUSED)
    share = _outside_model(target, ids, work[0], slots)
    run.record("time outside the model", share, unit="of a step", better="lower", series=FUSED)
    run.figure(_figure(speed_up, latencies, firsts))


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of a second call, the first having warmed up."""
    from paperworks.lab.measure import time_in_turn

    return time_in_turn({"": call}, repeats=1).pop("").seconds[0][0]


def _draw(count: int, shortest: int, longest: int, gap: float, seed: int) -> list[Request]:
    """Requests with exponential gaps between them and uniform lengths; the first comes at once."""
    import random

    chance, now, drawn = random.Random(seed), 0.0, []
    for prompt in range(count):
        drawn.append(Request(now, prompt, chance.randint(shortest, longest)))
        now += chance.expovariate(1 / gap)
    return drawn


def _arriving(work: list[Request], start: float) -> Iterator[Request]:
    """The requests, each not before its time."""
    from time import perf_counter, sleep

    for request in work:
        sleep(max(0.0, start + request.arrival - perf_counter()))
        yield request


def _stream(target: Any, ids: list[Any], requests: list[Request], start: float) -> list[Served]:
    """Decode requests as one batch until the longest has ended; each is served when its own last token is there."""
    from time import perf_counter

    import torch
    from torch.nn.utils.rnn import pad_sequence

    from paperworks.decoding import stream

    prompts = [ids[request.prompt][0] for request in requests]
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True)
    tokens: list[list[int]] = [[] for _ in requests]
    times: list[list[float]] = [[] for _ in requests]
    for new in stream(
        target, pad_sequence(prompts, batch_first=True), attention_mask=mask, eos_token_id=[],
        max_new_tokens=max(request.tokens for request in requests),
    ):  # fmt: skip
        now = perf_counter() - start
        for row, request in enumerate(requests):
            if len(tokens[row]) < request.tokens:
                tokens[row] += new[row]
                times[row].append(now - request.arrival)
    return [Served(text, when[0], when[-1]) for text, when in zip(tokens, times, strict=True)]


def _one_by_one(target: Any, ids: list[Any], work: list[Request]) -> list[Served]:
    from time import perf_counter

    start = perf_counter()
    return [_stream(target, ids, [request], start)[0] for request in _arriving(work, start)]


def _threads(target: Any, ids: list[Any], work: list[Request]) -> list[Served]:
    from concurrent.futures import ThreadPoolExecutor
    from time import perf_counter

    start = perf_counter()
    with ThreadPoolExecutor(len(work)) as pool:
        waiting = [pool.submit(_stream, target, ids, [request], start) for request in _arriving(work, start)]
    return [each.result()[0] for each in waiting]


def _batches(target: Any, ids: list[Any], size: int, patience: float, work: list[Request]) -> list[Served]:
    from time import perf_counter, sleep

    start = perf_counter()
    served: list[Served] = []
    while len(served) < len(work):
        left = work[len(served) :]
        full = left[size - 1].arrival if len(left) >= size else float("inf")
        sleep(max(0.0, start + min(full, left[0].arrival + patience, left[-1].arrival) - perf_counter()))
        now = perf_counter() - start
        served += _stream(target, ids, [request for request in left[:size] if request.arrival <= now], start)
    return served


def _fused(
    target: Any, ids: list[Any], options: dict[str, Any], statistics: list[Any], work: list[Request]
) -> list[Served]:
    from time import perf_counter

    from paperworks.decoding import TemporalFusion

    with TemporalFusion(target, **options) as server:
        start = perf_counter()
        handles = [
            server.submit(ids[request.prompt], max_new_tokens=request.tokens, eos_token_id=[])
            for request in _arriving(work, start)
        ]
    statistics.append(server.statistics)
    served = []
    for handle, request in zip(handles, work, strict=True):
        tokens = handle.result()
        assert handle.started is not None and handle.ended is not None
        # From when the request was due, not from when the client came round to sending it.
        due = start + request.arrival
        served.append(Served(tokens, handle.started - due, handle.ended - due))
    return served


def _outside_model(target: Any, ids: list[Any], work: list[Request], options: dict[str, Any]) -> float:
    """Share of a step's time that is not spent in the model: choosing tokens, book-keeping and moves."""
    from time import perf_counter

    import torch

    from paperworks.decoding import TemporalFusion

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return perf_counter()

    server, marks = TemporalFusion(target, **options), []
    for request in work:
        server.submit(ids[request.prompt], max_new_tokens=request.tokens, eos_token_id=[])
    hooks = [
        target.register_forward_pre_hook(lambda *args: marks.append(-now())),
        target.register_forward_hook(lambda *args: marks.append(now())),
    ]
    start = now()
    while server.step():
        pass
    total = now() - start
    for hook in hooks:
        hook.remove()
    return 1 - sum(marks) / total


def _figure(speed_up: dict[str, Effect], latencies: dict[str, list[float]], firsts: dict[str, list[float]]) -> Any:
    """Throughput against one by one with intervals, and how many requests have been answered after how long."""
    import numpy as np
    from matplotlib.figure import Figure

    colours = dict(zip(latencies, ("#777777", "#c9a227", "#a4553c", "#8fb8c7", "#1f6f8b"), strict=True))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = list(speed_up)[::-1]
    values = [speed_up[name].value for name in names]
    lows = [speed_up[name].value - speed_up[name].ends[0] for name in names]
    highs = [speed_up[name].ends[1] - speed_up[name].value for name in names]
    left.barh(names, values, xerr=[lows, highs], color=[colours[name] for name in names], ecolor="#333333", capsize=3)
    left.axvline(1, color="#333333", linewidth=0.8)
    left.set_xlabel("tokens/s against one by one")
    for axes, figures, label in (
        (middle, firsts, "seconds to the first token"),
        (right, latencies, "seconds to the end"),
    ):
        for name, seconds in figures.items():
            axes.step(np.sort(seconds), np.arange(1, len(seconds) + 1) / len(seconds), where="post",
                      color=colours[name], label=name)  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("share of requests")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Requests of different lengths fused in time", fontsize=11)
    return figure
