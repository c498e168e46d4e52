"""In how many of a hundred cases the lab's intervals hold the truth, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paperworks.lab.measure import Effect, difference_of_pairs, ratio_of_pairs, speed_ratio
from paperworks.lab.report import markdown_rows

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
_TRIALS = 2000
_GAMMA_4_LOG = 1.2561176684318  # digamma(4)


def _ratio(draw: Draw) -> Callable[[np.random.Generator, int], list[Effect]]:
    return lambda rng, n: [ratio_of_pairs(row, np.ones(n)) for row in draw(rng, (_TRIALS, n))]  # type: ignore[arg-type]


def _speed(draw: Draw) -> Callable[[np.random.Generator, int], list[Effect]]:
    return lambda rng, n: [speed_ratio([row], [np.ones(n)]) for row in draw(rng, (_TRIALS, n))]  # type: ignore[list-item]


def _mended(rng: np.random.Generator, n: int) -> list[Effect]:
    method = rng.gamma(2, size=(_TRIALS, n)) * (rng.random((_TRIALS, n)) < 0.8)
    return [ratio_of_pairs(*pair) for pair in zip(method, rng.gamma(2, 0.8, size=(_TRIALS, n)), strict=True)]


def _difference(rng: np.random.Generator, n: int) -> list[Effect]:
    return [difference_of_pairs(row, np.ones(n)) for row in rng.exponential(size=(_TRIALS, n))]  # type: ignore[arg-type]


_LAWS: dict[str, tuple[Callable[[np.random.Generator, int], list[Effect]], float]] = {
    "ratio, lognormal, spread 0.1": (_ratio(lambda rng, size: np.exp(0.1 * rng.normal(size=size))), 1),
    "ratio, lognormal, spread 0.8": (_ratio(lambda rng, size: np.exp(0.8 * rng.normal(size=size))), 1),
    "ratio of two gammas": (_ratio(lambda rng, size: rng.gamma(4, size=size) / rng.gamma(4, size=size)), 1),
    "ratio, gamma": (_ratio(lambda rng, size: rng.gamma(4, size=size)), math.exp(_GAMMA_4_LOG)),
    "ratio, exponential": (_ratio(lambda rng, size: rng.exponential(size=size)), math.exp(-np.euler_gamma)),
    "ratio, heavy tails": (_ratio(lambda rng, size: np.exp(0.2 * rng.standard_t(3, size=size))), 1),
    "ratio of means, a fifth zeros": (_mended, 1),
    "speed-up, lognormal": (_speed(lambda rng, size: np.exp(0.3 * rng.normal(size=size))), 1),
    "speed-up, heavy tails": (_speed(lambda rng, size: np.exp(0.1 * rng.standard_t(2, size=size))), 1),
    "difference, exponential": (_difference, 0),
}


def coverage_table() -> list[str]:
    """The lines of a Markdown table: a row a law, a column for each number of pairs; a dash where there is no interval."""
    sizes = (2, 3, 5, 8, 20, 50)
    rows = []
    for name, (draw, truth) in _LAWS.items():
        cells = []
        for n in sizes:
            given = [effect for effect in draw(np.random.default_rng(n), n) if effect.low is not None]
            held = np.mean([effect.low <= truth <= effect.high for effect in given]) if given else math.nan
            cells.append(f"{100 * held:.1f}" if given else "-")
        rows.append([name, *cells])
    return markdown_rows(["", *(f"{n} pairs" for n in sizes)], rows)


if __name__ == "__main__":
    print("\n".join(coverage_table()))
