"""Verdicts: what a record says of a claim, and that every claim which names its evidence has it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from paperworks.lab import records
from paperworks.lab.measure import ratio_of_pairs, speed_ratio
from paperworks.lab.run import Measurement
from paperworks.lab.verdicts import find, headline, in_words, judge, tally, verdicts
from paperworks.papers import Claim, Evidence, get, load_cards

ROOT = Path(__file__).parents[2]


def ratio(value, low=None, high=None, **other):
    return Measurement("r", value, "x", low=low, high=high, against="b", **other)


def ratio_of(better="higher", figure=None):
    return Evidence(measurement="r", against="b", better=better, figure=figure)


@pytest.mark.parametrize(
    ("measurement", "evidence", "kind"),
    [
        (ratio(2.1, 1.9, 2.3), ratio_of(figure=2.0), "reproduced"),
        (ratio(1.5, 1.4, 1.6), ratio_of(figure=2.0), "direction"),
        (ratio(1.5, 1.4, 1.6), ratio_of(), "reproduced"),
        (ratio(2.1, 0.9, 4.9), ratio_of(figure=2.0), "unclear"),
        (ratio(2.1), ratio_of(figure=2.0), "unclear"),
        (ratio(1.2, 1.0, 1.4), ratio_of(), "unclear"),
        (ratio(0.8, 0.7, 0.9), ratio_of(figure=2.0), "contradicted"),
        (ratio(0.8, 0.7, 0.9), ratio_of("lower", figure=0.85), "reproduced"),
        (ratio(0.8, 0.7, 0.9), ratio_of("lower", figure=0.5), "direction"),
        (ratio(1.2, 1.1, 1.3), ratio_of("lower"), "contradicted"),
        (ratio(0.0, 0.0, 0.5), ratio_of("lower", figure=0.1), "reproduced"),
        # A difference has no effect at 0.
        (Measurement("r", 0.2, "nats", low=0.1, high=0.3, against="b"), ratio_of(), "reproduced"),
        (Measurement("r", 0.2, "nats", low=-0.1, high=0.5, against="b"), ratio_of(), "unclear"),
        (Measurement("r", -0.2, "", low=-0.3, high=-0.1, against="b"), ratio_of(), "contradicted"),
        # Plain figures: reached or not, and with an interval and a figure without effect, as a ratio.
        (Measurement("r", 20), Evidence(measurement="r", figure=20), "reproduced"),
        (Measurement("r", 19), Evidence(measurement="r", figure=20), "unclear"),
        (Measurement("r", 1e-9), Evidence(measurement="r", better="lower", figure=1e-8), "reproduced"),
        (Measurement("r", 0.0), Evidence(measurement="r", better="lower", figure=0.0), "reproduced"),
        (Measurement("r", 0.84, low=0.8, high=0.9), Evidence(measurement="r", figure=0.9, no_effect=0), "direction"),
        (Measurement("r", 0.84, low=-0.1, high=0.9), Evidence(measurement="r", no_effect=0), "unclear"),
        (Measurement("r", 0.84), Evidence(measurement="r", no_effect=0), "unclear"),
    ],
)
def test_the_rules(measurement, evidence, kind):
    assert judge(measurement, evidence)[0] == kind


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_an_interval_that_holds_1_never_says_direction_or_reproduced(better):
    for low, value, high in ((0.5, 1.7, 2.0), (1.0, 1.5, 2.0), (0.5, 0.7, 1.0), (1.0, 1.0, 1.0)):
        for figure in (None, 0.1, 1.0, 1.6):
            assert judge(ratio(value, low, high), ratio_of(better, figure))[0] == "unclear"


def card(*claims):
    return get("hydra").model_copy(update={"claims": claims})


def claim(**shown):
    about = {"metric": "speed", "value": "2x", "setting": "GPU", "source": "abstract"}
    return Claim(**about, shown_by=Evidence(**shown) if shown else None)


def record(*measurements, gpu=None):
    return {"environment": {"gpu": gpu}, "measurements": list(measurements)}


def test_the_verdict_changes_with_the_record():
    paper = card(claim(measurement="r", against="b", figure=2.0))
    for low, high, kind in ((1.9, 2.2, "reproduced"), (0.9, 4.0, "unclear"), (0.5, 0.8, "contradicted")):
        [found] = verdicts(paper, [record(ratio((low * high) ** 0.5, low, high))])
        assert found.kind == kind
    [found] = verdicts(paper, [record()])
    assert found.kind == "not shown here" and found.measurement is None


def test_a_test_proves_and_nothing_shows_nothing():
    proved, nothing = verdicts(card(claim(test="tests/lab/test_x.py::test_it"), claim()), [])
    assert (proved.kind, nothing.kind) == ("proved", "not shown here")
    assert proved.holds and not nothing.holds
    assert in_words([proved, nothing]) == "1 of 2 claims hold" and tally([proved, nothing]) == {
        "proved": 1,
        "not shown here": 1,
    }


def test_a_gpu_has_the_word_where_its_record_has_an_interval():
    paper = card(claim(measurement="r", against="b", figure=2.0))
    cpu, gpu = record(ratio(1.5, 1.4, 1.6)), record(ratio(2.5, 2.4, 2.6), gpu="Great GPU")
    assert [(v.kind, v.device) for v in verdicts(paper, [gpu, cpu])] == [("reproduced", "cuda")]
    without = record(ratio(2.5), gpu="Great GPU")
    assert [(v.kind, v.device) for v in verdicts(paper, [without, cpu])] == [("direction", "cpu")]


def test_scale_tiny_says_nothing():
    paper = card(claim(measurement="r", against="b", figure=2.0))
    [found] = verdicts(paper, [{**record(ratio(2.1, 1.9, 2.3)), "scale": "tiny"}])
    assert found.kind == "not shown here"


def test_the_tests_of_a_plugin_prove_its_claims():
    paper = card(claim(test="tests/test_coin.py::test_it_is_fair"))
    [own], [other] = verdicts(paper, []), verdicts(paper.model_copy(update={"origin": "the plugin coin"}), [])
    assert own.kind == other.kind == "proved"
    assert (own.why, other.why) == ("a test of this repository shows it", "a test of the plugin coin shows it")


def test_series_and_baseline_are_told_apart():
    figures = [replace(ratio(value), series=series) for value, series in ((1.0, "Medusa"), (2.0, "Hydra"))]
    named = Evidence(measurement="r", series="Hydra", against="b")
    assert find(named, figures) is figures[1]
    assert find(named.model_copy(update={"against": "c"}), figures) is None
    with pytest.raises(ValueError, match="2 measurements are named"):
        find(named, [figures[1], figures[1]])


@pytest.mark.parametrize(
    "shown", [{}, {"measurement": "r", "test": "tests/a.py::test_b"}, {"measurement": "r"}, {"test": "a.py"}]
)
def test_evidence_is_a_measurement_or_a_test(shown):
    with pytest.raises(ValidationError):
        Evidence(**shown)


def test_what_it_would_take_is_told_only_where_nothing_shows_a_claim():
    with pytest.raises(ValidationError, match="only where nothing does"):
        Claim.model_validate({**claim(measurement="r", figure=1).model_dump(), "needs": "a GPU"})


MEASURED = [paper for paper in load_cards().values() if records.status(paper) != "planned"]


@pytest.mark.parametrize("paper", MEASURED, ids=[paper.slug for paper in MEASURED])
def test_every_claim_of_a_paper_that_runs_has_its_evidence_or_says_what_it_would_take(paper):
    kept = records.records_of(paper.slug)
    for claimed in paper.claims:
        shown = claimed.shown_by
        if shown is None:
            assert claimed.needs, f"{claimed.metric}: nothing shows it, and `needs` does not say what it would take"
        elif shown.test:
            path, _, name = shown.test.partition("::")
            tree = ast.parse((ROOT / path).read_text())
            assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)), shown.test
        else:
            assert any(find(shown, one["measurements"]) for one in kept), f"no record holds {shown}"


@pytest.mark.parametrize("paper", MEASURED, ids=[paper.slug for paper in MEASURED])
def test_the_headline_is_the_measurement_of_the_claim_it_stands_beside(paper):
    best = headline(verdicts(paper))
    if best is not None:
        assert best.claim.shown_by.measurement == best.measurement.name


@pytest.mark.parametrize("slug", records.load_records())
def test_no_committed_interval_is_narrower_than_its_pairs_carry(slug):
    for kept in records.records_of(slug):
        for m in kept["measurements"]:
            if m.low is None or m.no_effect != 1 or not m.repeats or min(m.repeats) <= 0:
                continue
            ones = [1.0] * len(m.repeats)
            again = speed_ratio([m.repeats], [ones]) if m.name == "speed-up" else ratio_of_pairs(m.repeats, ones)
            assert again.low is not None, f"{m.name}, {m.series}: one pair carries no interval"
            assert again.value == pytest.approx(m.value, rel=1e-6), (m.name, m.series)
            assert m.low <= again.low * (1 + 1e-6) and m.high >= again.high * (1 - 1e-6), (m.name, m.series)
