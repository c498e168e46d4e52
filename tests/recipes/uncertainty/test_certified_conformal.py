"""The recipe of certified conformal sets, seconds long."""

from __future__ import annotations

import numpy as np
import pytest

from paperworks.lab import execute
from paperworks.recipes.uncertainty.certified_conformal import (
    ALONE,
    ATTACKS,
    BONFERRONI,
    MEAN,
    RADII,
    RAISED,
    SHARED,
    SHUFFLED,
    TRAITS,
    shared_concepts,
)


@pytest.mark.parametrize("data", ["digits", "wine"])
def test_every_series_is_measured_clean_certified_and_attacked(data):
    run = execute("certified-conformal", scale="tiny", parameters={"data": data}, show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series, m.against): m for m in run.measurements}
    for series in (ALONE, RAISED, MEAN, SHARED, SHUFFLED, TRAITS, BONFERRONI):
        values = [figures[f"certified coverage at {radius}", series, None].value for radius in RADII]
        assert values == sorted(values, reverse=True) and values[0] <= figures["coverage", series, None].value
        attacked = figures.get(("coverage under PGD of 0.25", series, None))
        assert (attacked is None) == (series not in ATTACKS)
        if attacked is not None:
            assert values[1] <= attacked.value <= figures["coverage", series, None].value + 0.05
            assert attacked.value <= figures["coverage of certified sets under PGD of 0.25", series, None].value
        assert figures["set size", series, None].value <= figures["size of certified sets at 0.25", series, None].value
    for other in (ALONE, MEAN, RAISED, SHUFFLED):
        gained = figures["certified coverage gained at 0.25", TRAITS, other]
        ours, theirs = (figures["certified coverage at 0.25", series, None].repeats for series in (TRAITS, other))
        assert gained.repeats == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)])
    violations = figures["certified coverage above that under PGD of 0.25", TRAITS, None]
    assert violations.value == 0 and violations.unit == "of 10"
    assert ("speed-up", TRAITS, ALONE) in figures
    assert run.artefacts["figure"].is_file()


def test_shared_concepts_come_with_their_opposites():
    table = shared_concepts(10, digits=True)
    assert table.shape == (10, 10) and (table[:, ::2] == ~table[:, 1::2]).all()
    assert np.flatnonzero(table[:, 0]).tolist() == [0, 2, 4, 6, 8] and np.flatnonzero(table[:, 4]).tolist() == [
        0,
        6,
        8,
        9,
    ]
    assert shared_concepts(3, digits=False).T.tolist() == [
        [True, False, True], [False, True, False], [False, False, True], [True, True, False],
    ]  # fmt: skip


def test_data_without_classes_or_with_few_rows_is_a_sentence(tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("a,b,class\n" + "".join(f"{i},{i % 3},{'xy'[i % 2]}\n" for i in range(30)))
    run = execute("certified-conformal", scale="tiny", parameters={"data": str(few)}, show_progress=False)
    assert run.status == "failed" and "has 30 rows of 2 classes" in run.error
