"""The recipe variable-activity, seconds long."""

from __future__ import annotations

import pytest

from paperworks.lab import execute
from paperworks.lab.report import table
from paperworks.recipes.representation.variable_activity import BETAS, CLASSIFIERS, FULL, KEPT


@pytest.fixture(scope="module")
def run():
    run = execute("variable-activity", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    return run


def test_every_pair_is_an_autoencoder_of_its_own(run):
    found = {(m.name, m.series): m for m in run.measurements if m.against is None}
    for beta in BETAS:
        kinds = [found[f"{kind} variables", f"beta {beta:g}, {FULL}"] for kind in ("active", "mixed", "passive")]
        assert [sum(counts) for counts in zip(*(one.repeats for one in kinds), strict=True)] == [6, 6]
        for classifier in CLASSIFIERS:
            accuracies = found[f"accuracy, {classifier}", f"beta {beta:g}, {FULL}"].repeats
            assert len(set(accuracies)) == 2 and all(0.1 < one < 1 for one in accuracies)


def test_both_codes_and_both_groups_of_variables_are_held_against_each_other(run):
    plain = {(m.name, m.series): m for m in run.measurements if m.against is None}
    effects = {(m.name, m.series): m for m in run.measurements if m.against is not None}
    for measure in ("total correlation", "mutual information"):
        for label in (FULL, KEPT):
            series = f"beta 1, {label}"
            mean, sampled = (plain[f"{measure}, {code}", series].repeats for code in ("mean", "sampled"))
            gap = effects[f"{measure} of the mean code", series]
            assert gap.repeats == pytest.approx([a / b for a, b in zip(mean, sampled, strict=True)])
        left = effects["gap left without passive variables", f"{measure}, beta 1"]
        gaps = [effects[f"{measure} of the mean code", f"beta 1, {label}"].repeats for label in (KEPT, FULL)]
        assert left.repeats == pytest.approx([a / b for a, b in zip(*gaps, strict=True)])
        assert ("growth of the gap between codes", measure) in effects
    for classifier in CLASSIFIERS:
        gained = effects["accuracy gained without passive variables", f"beta 1, mean code, {classifier}"]
        means = [plain[f"accuracy, {classifier}", f"beta 1, {label}"].value for label in (KEPT, FULL)]
        assert gained.value == pytest.approx(means[0] - means[1]) and gained.against == "the full code"
    correlations = effects["largest correlation of a passive variable", "beta 1"]
    assert correlations.value > 1 and correlations.against == "the sampled code"


def test_its_table_has_a_row_for_each_group_and_a_figure_is_kept(run):
    headings, rows = table(run.paper, run.measurements)
    assert [row[0] for row in rows] == [f"beta {beta:g}, {label}" for beta in BETAS for label in (FULL, KEPT)]
    assert len(headings) == 6 and run.artefacts["figure"].is_file()
    epochs = [m.series for m in run.measurements if m.name == "largest covariance of a passive variable"]
    assert all(series.startswith("beta 2, epoch") for series in epochs)
