"""Measuring: paired samples and their intervals, and calls timed in turn."""

from __future__ import annotations

import math
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


# Below so many pairs a ratio of means has no interval: with fewer, Fieller's holds the truth in 87 to 92 of 100 cases.
_LEAST_FOR_MEANS = 20
# And of figures that are all 0 or 1, right or wrong, below so many.
_LEAST_FOR_BINARY = 100
# The share of items that is left out at each end of their speed-ups.
_TRIMMED = 0.2


@dataclass(frozen=True)
class Effect:
    """How a method does against its baseline: a ratio or a difference, over pairs.

    Args:
        value: The ratio or difference.
        low: Lower end of its 95 % interval, None where the pairs do not carry one.
        high: Upper end.
        repeats: That of each pair, empty where a baseline of zero leaves a ratio undefined.
        unit: "x" for a ratio, else the unit of the difference.

    Example:
        >>> print(Effect(1.5, 1.4, 1.62))
        1.50x [1.40, 1.62]
    """

    value: float
    low: float | None
    high: float | None
    repeats: tuple[float, ...] = ()
    unit: str = "x"

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the interval; the value itself where there is none."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{self.unit if self.unit == 'x' else f' {self.unit}'.rstrip()}{interval}"


def ratio_of_pairs(method: Sequence[float], baseline: Sequence[float], *, test_to_train: float | None = None) -> Effect:
    """Ratio over independent pairs, with a 95 % interval by Student's t.

    Where all figures are above 0, the ratio is the geometric mean of the pairs' ratios, and its interval Student's t on
    their logarithms, from two pairs on. Where some are not, it is the ratio of the two means, and its interval
    Fieller's, from 20 pairs on (100 where every figure is 0 or 1). docs/measuring.md tells in how many cases
    these intervals hold the truth.

    Args:
        method: One figure of the method a prompt or seed, shape `(n,)`. Pairs are independent: repeats of one prompt or
            folds of one fit are averaged before.
        baseline: The baseline's figure for the same, shape `(n,)`.
        test_to_train: Where pairs are random splits of one data set, the share n_test / n_train, by which the variance
            is corrected (Nadeau and Bengio, 2003), for splits overlap.

    Raises:
        ValueError: The samples differ in length, are empty or not finite, the baseline's mean is zero, or the share is
            not above 0.

    Example:
        >>> print(ratio_of_pairs([3.0, 4.2, 4.8], [2.0, 2.0, 2.0]))
        1.96x [1.08, 3.58]
    """
    import numpy as np

    above, below = _pairs(method, baseline)
    if below.mean() == 0:
        raise ValueError("a ratio to a baseline whose mean is 0 is undefined; record the difference instead")
    if min(above.min(), below.min()) > 0:
        logs = np.log(above) - np.log(below)
        low, high = _student(logs, test_to_train)
        low, high = (None if end is None else math.exp(end) for end in (low, high))
        return Effect(math.exp(logs.mean()), low, high, tuple(np.exp(logs).tolist()))
    low, high = _fieller(above, below, test_to_train)
    each = tuple((above / below).tolist()) if (below != 0).all() else ()
    return Effect(float(above.mean() / below.mean()), low, high, each)


def difference_of_pairs(
    method: Sequence[float], baseline: Sequence[float], *, unit: str = "", test_to_train: float | None = None
) -> Effect:
    """Mean difference over independent pairs, with a 95 % interval by Student's t.

    Args:
        method: As for `ratio_of_pairs`.
        baseline: As for `ratio_of_pairs`.
        unit: Unit of the figures.
        test_to_train: As for `ratio_of_pairs`.

    Raises:
        ValueError: The samples differ in length, are empty or not finite, or the share is not above 0.

    Example:
        >>> print(difference_of_pairs([0.91, 0.93, 0.92], [0.90, 0.91, 0.91]))
        0.01 [-0.00, 0.03]
    """
    above, below = _pairs(method, baseline)
    between = above - below
    low, high = _student(between, test_to_train) if _enough(above, below, 2) else (None, None)
    return Effect(float(between.mean()), low, high, tuple(between.tolist()), unit)


def speed_ratio(method: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Effect:
    """Ratio of speeds over several items, each timed in turn a few times.

    An item's ratio is the median over its turns. Over the items it is the geometric mean without the fifth of them at
    each end, which a pause of the machine would move, with Student's t for trimmed means (Yuen, 1974); of fewer than
    five items none is left out. Turns of one item tell nothing of others, so a single item has no interval.

    Args:
        method: Speeds of the method, shape `(repeats, items)`, above 0.
        baseline: Speeds of the baseline in the same turns, same shape, above 0.

    Raises:
        ValueError: The shapes differ or are empty, or a speed is not above 0.

    Example:
        >>> print(speed_ratio([[4.0, 9.0], [4.2, 9.0]], [[2.0, 3.0], [2.0, 3.0]]))
        2.48x [0.22, 27.86]
    """
    import numpy as np

    above, below = _samples(method, "method"), _samples(baseline, "baseline")
    if above.shape != below.shape or above.ndim != 2:
        raise ValueError(f"speeds have one shape (repeats, items), given {above.shape} and {below.shape}")
    if above.min() <= 0 or below.min() <= 0:
        raise ValueError(f"speeds are above 0, given {min(above.min(), below.min())}")
    ratios = np.median(above / below, axis=0)
    logs = np.sort(np.log(ratios))
    items, cut = len(logs), int(_TRIMMED * len(logs))
    kept = logs[cut : items - cut]
    low = high = None
    if items > 1:
        # The variance is that of all items, those at the ends moved in to the nearest that is kept.
        spread = (items - 1) * float(np.clip(logs, kept[0], kept[-1]).var(ddof=1)) / (len(kept) * (len(kept) - 1))
        half = _quantile(len(kept)) * math.sqrt(spread)
        low, high = math.exp(kept.mean() - half), math.exp(kept.mean() + half)
    return Effect(math.exp(kept.mean()), low, high, tuple(ratios.tolist()))


def _pairs(method: Any, baseline: Any) -> tuple[Array, Array]:
    above, below = _samples(method, "method"), _samples(baseline, "baseline")
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(
            f"a pair is one baseline figure a method figure, given {above.shape} and {below.shape}; "
            "take both for the same prompts, seeds or splits"
        )
    return above, below


def _samples(values: Any, name: str) -> Array:
    import numpy as np

    samples = np.asarray(values, dtype=float)
    if samples.size == 0:
        raise ValueError(f"the {name} has no samples; give at least one, better ten")
    if not np.isfinite(samples).all():
        raise ValueError(f"the {name} has samples that are not finite; drop the failed pairs from both sides")
    return samples


def _enough(above: Array, below: Array, least: int) -> bool:
    import numpy as np

    right_or_wrong = bool(np.isin(above, (0, 1)).all() and np.isin(below, (0, 1)).all())
    return len(above) >= (_LEAST_FOR_BINARY if right_or_wrong else least)


def _spread(n: int, test_to_train: float | None) -> float:
    """By what a variance over pairs is multiplied to be that of their mean."""
    if test_to_train is not None and test_to_train <= 0:
        raise ValueError(f"test_to_train is n_test / n_train of the splits, above 0, given {test_to_train}")
    return 1 / n + (test_to_train or 0.0)


def _quantile(n: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))


def _student(values: Array, test_to_train: float | None) -> tuple[float | None, float | None]:
    n = len(values)
    spread = _spread(n, test_to_train)
    if n < 2:
        return None, None
    mean, half = float(values.mean()), _quantile(n) * math.sqrt(float(values.var(ddof=1)) * spread)
    return mean - half, mean + half


def _fieller(above: Array, below: Array, test_to_train: float | None) -> tuple[float | None, float | None]:
    """The ratios r for which mean(above - r below) is within Student's t of 0, where they are an interval."""
    import numpy as np

    n = len(above)
    spread = _spread(n, test_to_train)
    if not _enough(above, below, _LEAST_FOR_MEANS):
        return None, None
    (vary, together), (_, below_varies) = _quantile(n) ** 2 * spread * np.cov(above, below)
    a = below.mean() ** 2 - below_varies
    b = above.mean() * below.mean() - together
    c = above.mean() ** 2 - vary
    # A baseline whose mean may be zero leaves the ratio without bounds.
    if a <= 0:
        return None, None
    root = math.sqrt(max(0.0, b * b - a * c))
    return float((b - root) / a), float((b + root) / a)


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
