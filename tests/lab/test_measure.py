from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from paperworks.lab import measure
from paperworks.lab.measure import Ratio, Timing, median_ratio, ratio_of_means, time_in_turn


def test_the_interval_agrees_with_scipy():
    rng = np.random.default_rng(1)
    baseline = rng.gamma(20, 1, size=40)
    method = 1.5 * baseline + rng.normal(size=40)
    ours = ratio_of_means(method, baseline, resamples=20_000)
    theirs = stats.bootstrap(
        (method, baseline),
        lambda above, below, axis: above.mean(axis=axis) / below.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=2,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(method.mean() / baseline.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_interval_agrees_with_the_closed_form_for_a_mean():
    method = np.random.default_rng(3).normal(10, 2, size=400)
    ratio = ratio_of_means(method, np.full(400, 2.0), resamples=20_000)
    half = 1.96 * method.std() / np.sqrt(400) / 2
    assert ratio.low == pytest.approx(ratio.value - half, abs=0.05 * half)
    assert ratio.high == pytest.approx(ratio.value + half, abs=0.05 * half)


def test_the_interval_covers_the_true_ratio_about_95_times_in_100():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(400):
        baseline = rng.gamma(25, 1, size=40)
        method = 2 * baseline + rng.normal(scale=4, size=40)
        ratio = ratio_of_means(method, baseline, seed=trial, resamples=400)
        covered += ratio.low <= 2 <= ratio.high
    # Three standard errors of a binomial with p = 0.95 over 400 trials are 0.033; percentile bootstraps run a
    # little short at n = 40.
    assert 0.90 <= covered / 400 <= 0.985


def test_pairing_makes_the_interval_narrower_than_shuffled_pairs():
    rng = np.random.default_rng(5)
    baseline = rng.gamma(2, 1, size=200)
    method = 1.5 * baseline
    paired, shuffled = ratio_of_means(method, baseline), ratio_of_means(rng.permutation(method), baseline)
    assert paired.low == pytest.approx(1.5) and paired.high == pytest.approx(1.5)
    assert shuffled.high - shuffled.low > 0.1


def test_the_same_seed_gives_the_same_interval():
    samples = np.random.default_rng(6).gamma(3, 1, size=(2, 25))
    assert ratio_of_means(*samples, seed=1) == ratio_of_means(*samples, seed=1)
    assert ratio_of_means(*samples, seed=1) != ratio_of_means(*samples, seed=2)


def test_many_samples_are_resampled_in_blocks():
    method, baseline = np.random.default_rng(7).gamma(30, 1, size=(2, 300_000))
    ratio = ratio_of_means(method, baseline, resamples=20)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.high - ratio.low < 0.01


def test_one_pair_has_no_interval():
    assert ratio_of_means([3.0], [2.0]) == Ratio(1.5, None, None, (1.5,))
    assert median_ratio([[3.0]], [[2.0]]) == Ratio(1.5, None, None, (1.5,))
    assert str(Ratio(1.5, None, None)) == "1.50x"


def test_a_baseline_that_is_zero_for_some_pairs_has_a_ratio_of_means_only():
    ratio = ratio_of_means([1, 1, 1, 0], [1, 0, 0, 0])
    assert ratio.value == 3 and ratio.repeats == ()
    assert np.isfinite([ratio.low, ratio.high]).all()


@pytest.mark.parametrize(
    ("method", "baseline", "message"),
    [
        ([], [], "has no samples"),
        ([1.0, 2.0], [1.0], "one baseline figure a method figure"),
        ([[1.0]], [[1.0]], "one baseline figure a method figure"),
        ([1.0, float("nan")], [1.0, 1.0], "the method has samples that are not finite"),
        ([1.0], [float("inf")], "the baseline has samples that are not finite"),
        ([1.0, 1.0], [-1.0, 1.0], "mean is 0"),
    ],
)
def test_unsound_samples_are_refused(method, baseline, message):
    with pytest.raises(ValueError, match=message):
        ratio_of_means(method, baseline)


def test_the_median_ratio_is_over_all_pairs():
    ratio = median_ratio([[2.0, 9.0], [4.0, 9.0], [3.0, 9.0]], [[1.0, 3.0]] * 3)
    assert ratio.value == 3
    assert ratio.repeats == (2, 3, 4, 3, 3, 3)


def test_repeats_of_few_items_do_not_narrow_the_interval_of_the_median():
    rng = np.random.default_rng(8)
    items = np.array([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    pairs = items + rng.normal(scale=0.001, size=(200, 6))
    nested = median_ratio(pairs, np.ones_like(pairs))
    assert nested.low < 1.3 and nested.high > 1.7


def test_the_median_interval_agrees_with_scipy_where_there_is_one_item():
    speeds = np.random.default_rng(9).gamma(20, 1, size=(31, 1))
    ours = median_ratio(speeds, np.ones_like(speeds), resamples=10_000)
    theirs = stats.bootstrap(
        (speeds[:, 0],), np.median, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


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
        median_ratio(method, baseline)


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
