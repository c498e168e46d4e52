"""Measuring: paired samples, calls timed in turn, and intervals by bootstrap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline a method is.

    Args:
        value: The ratio.
        low: Lower end of its 95 % interval, None where a single pair leaves nothing to tell it from.
        high: Upper end.
        repeats: The ratio of each pair, empty where a baseline of zero leaves one undefined.

    Example:
        >>> print(Ratio(1.5, 1.4, 1.62))
        1.50x [1.40, 1.62]
    """

    value: float
    low: float | None
    high: float | None
    repeats: tuple[float, ...] = ()

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}x{interval}"


def ratio_of_means(
    method: Sequence[float], baseline: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> Ratio:
    """Ratio of two means over paired samples, with a percentile bootstrap interval over the pairs.

    A resample in which the baseline's mean is zero says nothing about the ratio and is left out.

    Args:
        method: One figure of the method a prompt, seed or fold, shape `(n,)`.
        baseline: The baseline's figure for the same, shape `(n,)`.
        seed: Seed of the resampling.
        resamples: How many resamples to draw.

    Raises:
        ValueError: The samples differ in length, are empty or not finite, or the baseline's mean is zero.

    Example:
        >>> print(ratio_of_means([3.0, 4.2, 4.8], [2.0, 2.0, 2.0]))
        2.00x [1.50, 2.40]
    """
    import numpy as np

    above, below = _samples(method, "method"), _samples(baseline, "baseline")
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(
            f"a ratio takes one baseline figure a method figure, given {above.shape} and {below.shape}; "
            "take both for the same prompts, seeds or folds"
        )
    if below.mean() == 0:
        raise ValueError("a ratio to a baseline whose mean is 0 is undefined; record the two figures instead")
    n, rng = len(above), np.random.default_rng(seed)
    # About a million draws at a time bound the memory, however many samples there are.
    rows = max(1, 2**20 // n)
    draws = np.empty(resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, resamples, rows):
            chosen = rng.integers(n, size=(min(rows, resamples - start), n))
            draws[start : start + rows] = above[chosen].mean(axis=1) / below[chosen].mean(axis=1)
    low, high = _interval(draws, pairs=n)
    each = tuple((above / below).tolist()) if (below != 0).all() else ()
    return Ratio(float(above.mean() / below.mean()), low, high, each)


def median_ratio(
    method: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Ratio:
    """Median ratio over repeats of several items, with a percentile bootstrap interval.

    Repeats of one item are alike, so the bootstrap draws items and, within each item drawn, repeats: many
    repeats of few items do not make the interval narrower than the items allow.

    Args:
        method: Speeds of the method, shape `(repeats, items)`, above 0.
        baseline: Speeds of the baseline in the same turns, same shape, above 0.
        seed: Seed of the resampling.
        resamples: How many resamples to draw.

    Raises:
        ValueError: The shapes differ or are empty, or a speed is not above 0.

    Example:
        >>> print(median_ratio([[4.0, 9.0], [4.2, 9.0]], [[2.0, 3.0], [2.0, 3.0]]))
        2.55x [2.00, 3.00]
    """
    import numpy as np

    above, below = _samples(method, "method"), _samples(baseline, "baseline")
    if above.shape != below.shape or above.ndim != 2:
        raise ValueError(f"speeds have one shape (repeats, items), given {above.shape} and {below.shape}")
    if above.min() <= 0 or below.min() <= 0:
        raise ValueError(f"speeds are above 0, given {min(above.min(), below.min())}")
    pairs = above / below
    repeats, items = pairs.shape
    rng = np.random.default_rng(seed)
    rows = max(1, 2**20 // pairs.size)
    draws = np.empty(resamples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        item = rng.integers(items, size=(count, 1, items))
        repeat = rng.integers(repeats, size=(count, repeats, items))
        draws[start : start + rows] = np.median(pairs[repeat, item], axis=(1, 2))
    low, high = _interval(draws, pairs=pairs.size)
    return Ratio(float(np.median(pairs)), low, high, tuple(pairs.ravel().tolist()))


def _samples(values: Any, name: str) -> Array:
    import numpy as np

    samples = np.asarray(values, dtype=float)
    if samples.size == 0:
        raise ValueError(f"the {name} has no samples; give at least one, better ten")
    if not np.isfinite(samples).all():
        raise ValueError(f"the {name} has samples that are not finite; drop the failed pairs from both sides")
    return samples


def _interval(draws: Array, pairs: int) -> tuple[float | None, float | None]:
    import numpy as np

    draws = draws[np.isfinite(draws)]
    if pairs < 2 or not draws.size:
        return None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Timing:
    """What one call took, each time it had its turn.

    Args:
        seconds: Wall-clock seconds, shape `(repeats, items)`.
        work: What each call said it had done, same shape, or None where the calls do not say.
    """

    seconds: list[list[float]]
    work: list[list[float]] | None

    @property
    def speed(self) -> list[list[float]]:
        """Work a second, or calls a second where they do not say what they did, shape `(repeats, items)`."""
        work = self.work or [[1.0] * len(row) for row in self.seconds]
        return [[w / s for w, s in zip(*rows, strict=True)] for rows in zip(work, self.seconds, strict=True)]


def time_in_turn(
    calls: Mapping[str, Callable[..., object]],
    *,
    over: Sequence[Any] | None = None,
    repeats: int = 5,
    warmup: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time several calls in one process, each in its turn: A B C A B C and so on.

    What slows the machine down for a while then slows all of them alike. Work queued on an accelerator is
    waited for before the clock is read.

    Args:
        calls: The calls by name. A call may return a number above 0, the work it has done; then all must.
        over: Items each call is made with in turn, `call(item)`; without them it is `call()`.
        repeats: How often each call has its turn for each item.
        warmup: How many rounds, with the first item, go before the timed ones.
        advance: Called after each turn, warm-up included.

    Raises:
        ValueError: `repeats` is below 1, `warmup` below 0, `over` is empty, or a call's work is not above 0.
        TypeError: Some calls return a number and others do not.

    Example:
        >>> times = time_in_turn({"sum": sum, "max": max}, over=[range(10), range(20)], repeats=3)
        >>> len(times["sum"].seconds), len(times["sum"].seconds[0])
        (3, 2)
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is at least 1 and warmup at least 0, given {repeats} and {warmup}")
    if over is not None and not len(over):
        raise ValueError("there is nothing to time the calls over; give at least one item")
    arguments: list[tuple[Any, ...]] = [()] if over is None else [(item,) for item in over]
    for _ in range(warmup):
        for call in calls.values():
            call(*arguments[0])
            advance()
    synchronize = _synchronize()
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    results: dict[str, list[list[object]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in calls:
            seconds[name].append([])
            results[name].append([])
        for argument in arguments:
            for name, call in calls.items():
                elapsed, result = _timed(call, argument, synchronize)
                seconds[name][-1].append(elapsed)
                results[name][-1].append(result)
                advance()
    work = {name: _work(name, rows) for name, rows in results.items()}
    if len({rows is None for rows in work.values()}) > 1:
        silent = ", ".join(name for name, rows in work.items() if rows is None)
        raise TypeError(f"either every call returns its work as a number or none does, but not so: {silent}")
    return {name: Timing(seconds[name], work[name]) for name in calls}


def _timed(
    call: Callable[..., object], argument: tuple[Any, ...], synchronize: Callable[[], object]
) -> tuple[float, object]:
    synchronize()
    start = perf_counter()
    result = call(*argument)
    synchronize()
    # One nanosecond is what the clock can tell apart.
    return max(perf_counter() - start, 1e-9), result


def _work(name: str, results: list[list[object]]) -> list[list[float]] | None:
    returned = [result for row in results for result in row]
    numbers = [result for result in returned if isinstance(result, Real) and not isinstance(result, bool)]
    if not numbers:
        return None
    if len(numbers) < len(returned):
        raise TypeError(f"{name} returned its work as a number in some turns only; return it in all or in none")
    if not all(0 < float(number) < float("inf") for number in numbers):
        raise ValueError(f"{name} said that it had done {min(map(float, numbers))} of work; work is finite and above 0")
    return [[float(result) for result in row] for row in results]  # type: ignore[arg-type]


def _synchronize() -> Callable[[], object]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.synchronize  # type: ignore[no-any-return]
    return lambda: None
