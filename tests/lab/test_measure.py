from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from paperworks.lab import measure
from paperworks.lab.measure import (
    Effect,
    Timing,
    difference_of_pairs,
    ratio_of_pairs,
    speed_ratio,
    time_in_turn,
)


def test_the_interval_of_a_ratio_is_students_on_logarithms():
    rng = np.random.default_rng(1)
    baseline = rng.gamma(20, 1, size=7)
    method = 1.5 * baseline * np.exp(rng.normal(scale=0.2, size=7))
    ours = ratio_of_pairs(method, baseline)
    theirs = stats.ttest_1samp(np.log(method / baseline), 0).confidence_interval(0.95)
    assert ours.value == pytest.approx(stats.gmean(method / baseline))
    assert (ours.low, ours.high) == pytest.approx((np.exp(theirs.low), np.exp(theirs.high)))
    assert ours.repeats == pytest.approx(method / baseline)


def test_the_interval_of_a_difference_is_students():
    method, baseline = np.random.default_rng(2).normal(size=(2, 6))
    ours = difference_of_pairs(method, baseline, unit="nats")
    theirs = stats.ttest_rel(method, baseline).confidence_interval(0.95)
    assert ours.value == pytest.approx((method - baseline).mean()) and ours.unit == "nats"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_figures_that_may_be_zero_have_fiellers_interval():
    rng = np.random.default_rng(3)
    baseline = rng.gamma(2, 1, size=40)
    method = np.where(rng.random(40) < 0.3, 0, 1.5 * baseline + rng.normal(scale=0.2, size=40))
    ours = ratio_of_pairs(method, baseline)
    assert ours.value == pytest.approx(method.mean() / baseline.mean())
    # Its ends are where the mean of method - r baseline is just significant.
    for end in (ours.low, ours.high):
        assert stats.ttest_1samp(method - end * baseline, 0).pvalue == pytest.approx(0.05)
    assert ratio_of_pairs(method[:19], baseline[:19]).low is None
    # A baseline that may have a mean of zero leaves the ratio without bounds.
    centred = baseline - baseline.mean() + 0.01
    assert ratio_of_pairs(method, centred).low is None


def test_right_or_wrong_has_an_interval_from_a_hundred_pairs_on():
    rng = np.random.default_rng(4)
    method, baseline = (rng.random(120) < 0.5).astype(float), (rng.random(120) < 0.6).astype(float)
    assert ratio_of_pairs(method[:99], baseline[:99]).low is None
    assert difference_of_pairs(method[:99], baseline[:99]).low is None
    assert ratio_of_pairs(method, baseline).low < ratio_of_pairs(method, baseline).value
    assert difference_of_pairs(method, baseline).low is not None


LAWS = {
    "lognormal, narrow": lambda rng, size: (np.exp(0.1 * rng.normal(size=size)), 0.0),
    "lognormal, wide": lambda rng, size: (np.exp(0.8 * rng.normal(size=size)), 0.0),
    "ratio of gammas": lambda rng, size: (rng.gamma(4, size=size) / rng.gamma(4, size=size), 0.0),
    "gamma": lambda rng, size: (rng.gamma(4, size=size), stats.gamma(4).expect(np.log)),
    "exponential": lambda rng, size: (rng.gamma(1, size=size), -np.euler_gamma),
    "heavy tails": lambda rng, size: (np.exp(0.2 * rng.standard_t(3, size=size)), 0.0),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 20])
def test_the_interval_holds_the_true_ratio_in_95_of_100_cases(law, pairs):
    trials = 2000
    ratios, truth = LAWS[law](np.random.default_rng(5), (trials, pairs))
    effects = [ratio_of_pairs(row, np.ones(pairs)) for row in ratios]
    held = sum(math.log(effect.low) <= truth <= math.log(effect.high) for effect in effects) / trials
    # Two points, and three standard errors of a share over so many trials.
    assert abs(held - 0.95) <= 0.02 + 3 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 20])
def test_without_a_difference_one_interval_in_twenty_excludes_1(pairs):
    method, baseline = np.random.default_rng(6).gamma(9, size=(2, 2000, pairs))
    effects = [ratio_of_pairs(*pair) for pair in zip(method, baseline, strict=True)]
    excluded = sum(not effect.low <= 1 <= effect.high for effect in effects) / len(effects)
    assert abs(excluded - 0.05) <= 0.02


def test_splits_of_one_data_set_are_corrected_for_their_overlap():
    # Means over random halves of 40 figures, against those of the other half: all splits see the same few figures.
    rng = np.random.default_rng(7)
    held = plain = 0
    for _ in range(600):
        errors = rng.gamma(9, size=40)
        tested = np.array([errors[rng.permutation(40)[:20]].mean() for _ in range(8)])
        for corrected in (True, False):
            effect = difference_of_pairs(tested, np.full(8, 9.0), test_to_train=1.0 if corrected else None)
            if effect.low <= 0 <= effect.high:
                held, plain = held + corrected, plain + (not corrected)
    assert held / 600 >= 0.93 and plain / 600 < 0.85
    half = difference_of_pairs([1.0, 2.0, 4.0], [0.0] * 3, test_to_train=0.25)
    usual = difference_of_pairs([1.0, 2.0, 4.0], [0.0] * 3)
    assert (half.high - half.low) / (usual.high - usual.low) == pytest.approx(math.sqrt((1 / 3 + 1 / 4) / (1 / 3)))
    with pytest.raises(ValueError, match="test_to_train is n_test / n_train"):
        ratio_of_pairs([1.0, 2.0], [1.0, 2.0], test_to_train=0)


def test_pairing_makes_the_interval_narrower_than_shuffled_pairs():
    rng = np.random.default_rng(5)
    baseline = rng.gamma(2, 1, size=200)
    method = 1.5 * baseline
    paired, shuffled = ratio_of_pairs(method, baseline), ratio_of_pairs(rng.permutation(method), baseline)
    assert paired.low == pytest.approx(1.5) and paired.high == pytest.approx(1.5)
    assert shuffled.high - shuffled.low > 0.1


def test_one_pair_has_no_interval():
    assert ratio_of_pairs([3.0], [2.0]) == Effect(pytest.approx(1.5), None, None, (pytest.approx(1.5),))
    assert speed_ratio([[3.0]], [[2.0]]) == Effect(1.5, None, None, (1.5,))
    assert difference_of_pairs([3.0], [2.0]) == Effect(1.0, None, None, (1.0,), "")
    assert (
        str(Effect(1.5, None, None)) == "1.50x" and str(Effect(0.1, 0.0, 0.2, unit="nats")) == "0.10 nats [0.00, 0.20]"
    )


def test_a_baseline_that_is_zero_for_some_pairs_has_a_ratio_of_means_only():
    ratio = ratio_of_pairs([1, 1, 1, 0], [1, 0, 0, 0])
    assert ratio.value == 3 and ratio.repeats == ()
    assert ratio.low is None


@pytest.mark.parametrize(
    ("method", "baseline", "message"),
    [
        ([], [], "has no samples"),
        ([1.0, 2.0], [1.0], "a pair is one baseline figure a method figure"),
        ([[1.0]], [[1.0]], "a pair is one baseline figure a method figure"),
        ([1.0, float("nan")], [1.0, 1.0], "the method has samples that are not finite"),
        ([1.0], [float("inf")], "the baseline has samples that are not finite"),
        ([1.0, 1.0], [-1.0, 1.0], "mean is 0"),
    ],
)
def test_unsound_samples_are_refused(method, baseline, message):
    with pytest.raises(ValueError, match=message):
        ratio_of_pairs(method, baseline)


def test_an_item_is_the_median_of_its_turns():
    ratio = speed_ratio([[2.0, 9.0], [40.0, 9.0], [3.0, 9.0]], [[1.0, 3.0]] * 3)
    assert ratio.repeats == (3, 3) and ratio.value == pytest.approx(3)


def test_few_items_have_students_interval_and_many_that_of_a_trimmed_mean():
    few = np.random.default_rng(8).gamma(9, size=(2, 4))
    assert str(speed_ratio(few[:1], few[1:])) == str(ratio_of_pairs(*few))
    rng = np.random.default_rng(9)
    speeds = rng.gamma(9, size=(1, 15))
    ours = speed_ratio(speeds, np.ones((1, 15)))
    assert math.log(ours.value) == pytest.approx(stats.trim_mean(np.log(speeds[0]), 0.2))
    # Yuen's two-sample test against figures that hardly vary leaves the interval of one sample.
    still = np.log1p(1e-12 * np.arange(15))
    theirs = stats.ttest_ind(np.log(speeds[0]), still, equal_var=False, trim=0.2).confidence_interval(0.95)
    assert (math.log(ours.low), math.log(ours.high)) == pytest.approx((theirs.low, theirs.high), rel=1e-6)


def test_a_pause_of_the_machine_does_not_move_a_speed_up():
    speeds = np.random.default_rng(10).normal(2, 0.05, size=(1, 16))
    calm = speed_ratio(speeds, np.ones((1, 16)))
    speeds[0, 3] /= 40
    paused = speed_ratio(speeds, np.ones((1, 16)))
    assert paused.value == pytest.approx(calm.value, rel=0.01) and paused.high - paused.low < 0.15


@pytest.mark.parametrize("items", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("law", ["lognormal, wide", "ratio of gammas", "heavy tails"])
def test_the_interval_of_a_speed_up_holds_the_truth_in_95_of_100_cases(law, items):
    trials = 2000
    ratios, _ = LAWS[law](np.random.default_rng(11), (trials, items))
    effects = [speed_ratio(row[None], np.ones((1, items))) for row in ratios]
    held = sum(effect.low <= 1 <= effect.high for effect in effects) / trials
    assert abs(held - 0.95) <= 0.02 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_turns_of_few_items_do_not_narrow_the_interval():
    rng = np.random.default_rng(8)
    items = np.array([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    pairs = items + rng.normal(scale=0.001, size=(200, 6))
    nested = speed_ratio(pairs, np.ones_like(pairs))
    assert nested.low < 1.25 and nested.high > 1.7
    assert speed_ratio(pairs[:, :1], np.ones((200, 1))).low is None


@pytest.mark.parametrize(
    ("method", "baseline", "message"),
    [
        ([1.0], [1.0], "one shape"),
        ([[1.0, 2.0]], [[1.0]], "one shape"),
        ([[0.0]], [[1.0]], "above 0"),
        ([[1.0]], [[-1.0]], "above 0"),
    ],
)
def test_unsound_speeds_are_refused(method, baseline, message):
    with pytest.raises(ValueError, match=message):
        speed_ratio(method, baseline)


def test_calls_have_their_turns_in_order():
    turns = []
    calls = {name: lambda item, name=name: turns.append(name + item) for name in "ABC"}
    advanced = []
    timings = time_in_turn(calls, over=["1", "2"], repeats=2, warmup=1, advance=lambda: advanced.append(1))
    assert " ".join(turns) == "A1 B1 C1 A1 B1 C1 A2 B2 C2 A1 B1 C1 A2 B2 C2"
    assert len(advanced) == len(turns)
    assert np.shape(timings["A"].seconds) == (2, 2)


def test_the_clock_is_read_around_each_call(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def wait(seconds):
        clock.now += seconds

    monkeypatch.setattr(measure, "perf_counter", lambda: clock.now)
    timings = time_in_turn({"slow": wait, "fast": lambda s: wait(s / 4)}, over=[1.0, 2.0], repeats=3)
    assert timings["slow"].seconds == [[1.0, 2.0]] * 3
    assert timings["fast"].seconds == [[0.25, 0.5]] * 3
    assert timings["fast"].speed == [[4.0, 2.0]] * 3


def test_an_accelerator_is_waited_for_before_and_after_each_call(monkeypatch):
    events = []
    cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: events.append("wait"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    time_in_turn({"call": lambda: events.append("call")}, repeats=2, warmup=0)
    assert events == ["wait", "call", "wait"] * 2


def test_work_becomes_speed():
    assert Timing([[2.0, 4.0]], [[10.0, 10.0]]).speed == [[5.0, 2.5]]
    timings = time_in_turn({"a": lambda item: item, "b": lambda item: np.float32(2 * item)}, over=[1, 3], repeats=1)
    assert timings["a"].work == [[1.0, 3.0]] and timings["b"].work == [[2.0, 6.0]]
    silent = time_in_turn({"a": lambda: True, "b": lambda: "text"}, repeats=1)
    assert silent["a"].work is None


def test_unsound_calls_are_refused():
    with pytest.raises(TypeError, match="but not so: silent"):
        time_in_turn({"loud": lambda: 1, "silent": lambda: None}, repeats=1)
    turns = itertools.cycle([1, None])
    with pytest.raises(TypeError, match="odd returned its work as a number in some turns only"):
        time_in_turn({"odd": lambda: next(turns)}, repeats=2)
    for work in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="work is finite and above 0"):
            time_in_turn({"idle": lambda work=work: work}, repeats=1)
    with pytest.raises(ValueError, match="repeats is at least 1"):
        time_in_turn({"call": lambda: None}, repeats=0)
    with pytest.raises(ValueError, match="warmup at least 0"):
        time_in_turn({"call": lambda: None}, warmup=-1)
    with pytest.raises(ValueError, match="nothing to time the calls over"):
        time_in_turn({"call": lambda item: None}, over=[])
