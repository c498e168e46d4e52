"""The recipe of pretrained features, seconds long."""

from __future__ import annotations

import pytest

from paperworks.lab import execute
from paperworks.lab.report import table
from paperworks.recipes.representation.pretrained_features import ERROR, EXCESS, LOGISTIC, SPREADING, UNINFORMED


@pytest.fixture(scope="module")
def run():
    run = execute("pretrained-features", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    return run


def test_pretraining_is_held_against_ridge_at_every_number_of_samples(run):
    plain = {(m.name, m.series): m for m in run.measurements if m.against is None}
    ratios = {(m.name, m.series): m for m in run.measurements if m.against == "ridge"}
    assert plain[EXCESS, "true model"].value < plain[EXCESS, "pretrained, m = 1600, n = 80"].value
    for m, n in ((50, 80), (283, 80), (1600, 20), (1600, 40), (1600, 80), (1600, 160), (1600, 320)):
        series = f"pretrained, m = {m}, n = {n}"
        ratio, ours, theirs = ratios[EXCESS, series], plain[EXCESS, series], plain[EXCESS, f"ridge, n = {n}"]
        assert ratio.low < ratio.value < ratio.high and len(ratio.repeats) == 3
        each = [a / b for a, b in zip(ours.repeats, theirs.repeats, strict=True)]
        assert ratio.repeats == pytest.approx(each)
    # What the factors tell nothing about stays as it is, where ridge regression finds it.
    assert plain[UNINFORMED, "pretrained, m = 1600, n = 80"].value > 0.9
    assert ratios[UNINFORMED, "pretrained, m = 1600, n = 80"].low > 1


def test_exponents_are_counted_against_the_bound_and_are_no_gain(run):
    found = {(m.name, m.series): m for m in run.measurements if m.against is None}
    for series in ("of the model in m", "with the true model in n"):
        exponent, kept = (
            found["exponent of the fall", series],
            found["draws that keep to the bound's exponent of 1/2", series],
        )
        assert kept.value == sum(one >= 0.5 for one in exponent.repeats) and kept.unit == "of 3"
    assert abs(found["exponent of the fall", "uninformative target, in m"].value) < 0.1
    assert all(m.against is None for m in run.measurements if "exponent" in m.name)
    assert found["kappa", "factor model"].value >= 1 and found["kappa", "mixture"].value > 0.9


def test_every_model_meets_its_baselines(run):
    found = {(m.name, m.series, m.against): m for m in run.measurements}
    for task, ours, baselines in (
        ("mixture", ["pretrained"], (LOGISTIC, SPREADING)),
        ("digits", ["pretrained, K = 5", "pretrained, K = 15"], (LOGISTIC, SPREADING)),
    ):
        for name in ours:
            for baseline in baselines:
                gained = found[ERROR, f"{task}, {name}", baseline]
                means = [found[ERROR, f"{task}, {one}", None].value for one in (name, baseline)]
                assert gained.value == pytest.approx(means[0] - means[1]) and gained.low < gained.value < gained.high
    assert found[ERROR, "mixture, pretrained", LOGISTIC].high < 0
    assert found[EXCESS, "contrastive, pretrained", "ridge"].high < 1
    # Splits of the same digits overlap: the interval is wider than that of independent draws.
    wide, plain = (found[ERROR, "digits, pretrained, K = 5", one] for one in (LOGISTIC, None))
    assert len(set(wide.repeats)) > 1 and len(set(plain.repeats)) > 1
    assert ("speed-up", "pretrained", "ridge") in found and run.artefacts["figure"].is_file()


def test_its_table_has_a_row_for_every_method(run):
    headings, rows = table(run.paper, run.measurements)
    named = {row[0] for row in rows}
    assert len(headings) == 7 and {"true model", "mixture, pretrained", "contrastive, pretrained"} <= named
    assert any(name.startswith("digits, pretrained") for name in named)
