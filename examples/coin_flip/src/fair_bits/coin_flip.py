"""Peres's bits a flip against von Neumann's."""

from __future__ import annotations

from typing import Annotated

from paperworks.lab import Between, Run, recipe

PLAIN = "von Neumann's pairs"


@recipe(
    "coin-flip",
    baseline="von Neumann's trick on pairs of flips",
    columns=("bits a flip", "bits a flip, in the long run", "bits a flip, ratio"),
    tiny={"flips": 200, "seeds": 3},
)
def coin_flip(
    run: Run,
    heads: Annotated[float, Between(0.01, 0.99)] = 0.7,
    flips: Annotated[int, Between(2, 40_000)] = 10_000,
    depth: Annotated[int, Between(1, 10)] = 5,
    seeds: Annotated[int, Between(2, 80)] = 20,
    seed: int = 0,
) -> None:
    """Fair bits out of the same flips of an unfair coin, with and without iteration.

    Args:
        run: Keeps what is measured.
        heads: How often the coin falls on heads.
        flips: Of each coin.
        depth: How often the trick is done.
        seeds: Coins.
        seed: Of the first.
    """
    # Heavy libraries are imported here, so that `paperworks list` stays quick.
    import random

    from matplotlib.figure import Figure

    from fair_bits import peres, rate

    found: dict[str, list[float]] = {PLAIN: [], f"Peres, depth {depth}": []}
    for number in run.progress(range(seed, seed + seeds), "flipping"):
        chance = random.Random(number)
        fallen = [int(chance.random() < heads) for _ in range(flips)]
        for series, often in zip(found, (1, depth), strict=True):
            found[series].append(len(peres(fallen, often)) / flips)
    for (series, bits), often in zip(found.items(), (1, depth), strict=True):
        run.mean("bits a flip", bits, better="higher", series=series)
        run.record("bits a flip, in the long run", rate(heads, often), better="higher", series=series)
    plain, iterated = found.values()
    run.ratio("bits a flip, ratio", method=iterated, baseline=plain, series="Peres", against=PLAIN)

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, depth + 1), [rate(heads, often) for often in range(1, depth + 1)], "o-", color="#1f6f8b")
    axes.set(xlabel="depth", ylabel="bits a flip, in the long run")
    run.figure(figure)
