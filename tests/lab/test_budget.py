"""A few minutes, shared by recipes."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest

from paperworks.lab import Run, execute, recipe
from paperworks.lab.budget import in_order, shares, within


@pytest.fixture
def three(registry):
    @recipe("few", gpu=1)
    def few(run: Run) -> None: ...

    @recipe("many", gpu=3)
    def many(run: Run) -> None: ...

    @recipe("none")
    def none(run: Run) -> None: ...

    return [few, many, none]


def test_what_a_gpu_changes_most_goes_first_and_the_rest_is_left_out(three):
    assert [one.paper for one in in_order(three)] == ["many", "few"]


def test_time_that_is_not_used_goes_to_those_that_come_later(three):
    clock = SimpleNamespace(now=0.0)
    given = []
    for one, share in shares(in_order(three), 100, lambda: clock.now):
        given.append((one.paper, share))
        clock.now += 20
    assert given == [("many", 75.0), ("few", 80.0)]


def test_what_takes_longer_is_interrupted_and_kept_as_such(registry, tmp_path):
    @recipe("slow", gpu=1)
    def slow(run: Run) -> None:
        run.record("before", 1, better="higher")
        time.sleep(30)

    def work(over):
        execute(slow, store=tmp_path / "runs.db", show_progress=False, stopped=lambda: "its share was over" * over())

    assert not within(4, work)
    from paperworks.lab import Store

    with Store(tmp_path / "runs.db") as store:
        [kept] = store.runs("slow")
    assert (kept.status, kept.error) == ("interrupted", "its share was over")
    assert [m.name for m in kept.measurements] == ["before"]


def test_what_runs_in_the_background_is_interrupted_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not within(0.2, lambda over: time.sleep(20))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_done_in_time_is_not_interrupted():
    assert within(0.3, lambda over: None)
    time.sleep(0.5)


def test_another_interruption_is_not_swallowed():
    def stop(over):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(30, stop)


def test_an_interruption_that_arrives_when_all_is_done_does_no_harm():
    def work(over):
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            pass

    assert {within(0.01, work) for _ in range(30)} <= {True, False}
