"""What the paper says of its bits, and what the recipe measures."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise, product

import pytest
from paperworks.lab import Run

from fair_bits import peres, rate
from fair_bits.coin_flip import coin_flip


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("heads", [Fraction(1, 2), Fraction(2, 7)])
def test_all_outputs_of_a_length_are_equally_likely(heads: Fraction, depth: int) -> None:
    chances: Counter[tuple[int, ...]] = Counter()
    for flips in product((0, 1), repeat=9):
        chances[tuple(peres(flips, depth))] += heads ** sum(flips) * (1 - heads) ** (9 - sum(flips))
    for length in {len(bits) for bits in chances}:
        alike = {chances[bits] for bits in product((0, 1), repeat=length)}
        assert len(alike) == 1, f"of {length} bits some are likelier than others"


def test_each_iteration_brings_the_rate_nearer_to_the_entropy() -> None:
    rates = [rate(0.3, depth) for depth in range(1, 12)]
    entropy = 0.8812908992306927  # -0.3 log2 0.3 - 0.7 log2 0.7
    assert rates[0] == pytest.approx(0.21)
    assert all(before < after < entropy for before, after in pairwise(rates))
    assert entropy - rates[-1] < 0.05


def test_the_recipe_measures_what_the_formula_says() -> None:
    run = Run("coin-flip")
    coin_flip(run, flips=20_000, seeds=4, depth=3, heads=0.2)
    found = {measurement.series: measurement for measurement in run.measurements if measurement.name == "bits a flip"}
    assert found["von Neumann's pairs"].value == pytest.approx(0.16, abs=0.005)
    assert found["Peres, depth 3"].value == pytest.approx(rate(0.2, 3), abs=0.01)
