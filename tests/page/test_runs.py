"""Runs started from the page: processes of their own, in turn, that end when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from sqlalchemy import update

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab import Store
from paperworks.lab.run import Log
from paperworks.page import runs as module
from paperworks.page import work
from paperworks.page.runs import BusyError, Runner
from paperworks.page.tables import RunRequestRow, UserRow

RECIPE = '''
"""A recipe of a package that is not Paperworks."""

import os
import sys
import time
from typing import Annotated, Literal

from paperworks.lab import Between, Run, recipe


@recipe(paper="sleeper", baseline="staying awake", tiny={"seconds": 0.0})
def sleeper(
    run: Run, seconds: float = 60.0, naps: Annotated[int, Between(1, 9)] = 2, bed: Literal["soft", "hard"] = "soft", model: str = "nobody",
    deaf: bool = False, sour: bool = False, seed: int = 0,
) -> None:
    """Sleep.

    Args:
        seconds: How long.
        naps: How often.
        bed: Where.
        model: Who.
        deaf: Whether nothing wakes it.
        sour: Whether to be woken is an error.
    """
    run.log(f"secrets seen: {[name for name in os.environ if name in ('PAPERWORKS_SMTP', 'PAPERWORKS_SECRET')]}")
    run.record("naps", naps, better="higher", series=bed)
    run.log(f"pid {os.getpid()}, seed {seed}, arguments {sys.argv[1:]}")
    with run.progress(2, "sleeping") as bar:
        bar.advance()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                time.sleep(max(0, until - time.monotonic()))
            except KeyboardInterrupt:
                if sour:
                    raise ImportError("could not import a dream") from None
                if not deaf:
                    raise
        bar.advance()
'''

CARD = """
slug = "sleeper"
title = "On Sleep"
year = 2026
room = "tuning"
names = ["Sleeper"]
summary = "Sleeps."
tags = ["rest"]
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch, registry):
    """A plugin, found by this process and by those of the runs."""
    site = tmp_path / "site"
    (site / "sleeper-1.0.dist-info").mkdir(parents=True)
    (site / "sleeper_plugin").mkdir()
    (site / "sleeper_plugin" / "__init__.py").write_text(RECIPE)
    (site / "sleeper_plugin" / "sleeper.toml").write_text(CARD)
    (site / "sleeper-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sleeper\nVersion: 1.0\n")
    entry = "[paperworks.recipes]\nsleeper = sleeper_plugin\n"
    (site / "sleeper-1.0.dist-info" / "entry_points.txt").write_text(entry)
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PAPERWORKS_SMTP", "smtp://paperworks:hunter2@127.0.0.1:25")
    monkeypatch.syspath_prepend(str(site))
    __import__("sleeper_plugin")
    yield
    del sys.modules["sleeper_plugin"]


@pytest.fixture
def runner(sleeper, tmp_path):
    with Runner(f"sqlite:///{tmp_path}/store/runs.db") as runner:
        yield from started(runner)


def users(runner, *ids):
    with runner.store.writing() as session:
        session.add_all(UserRow(id=id, email=f"{id}@example.org", password=None, created=0.0) for id in ids)


def started(runner):
    yield runner
    for run in runner.store.runs(status="running"):
        runner.cancel(run.id)
    assert all(until(runner, run.id, lambda run: run.status != "running") for run in runner.store.runs())


def until(runner, run_id, true, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not true(run := runner.store.run(run_id)):
        assert time.monotonic() < deadline, f"{run_id} is still {run.status}: {run.bars} {run.logs}"
        time.sleep(0.05)
    return run


def over(runner, run_id):
    return until(runner, run_id, lambda run: run.status != "running")


def asleep(runner, run_id):
    return until(runner, run_id, lambda run: any(bar.description == "sleeping" for bar in run.bars))


def waiting(runner, run_id):
    return until(runner, run_id, lambda run: any("waiting" in bar.description for bar in run.bars))


def test_a_run_finishes_in_its_own_process_with_its_options(sleeper, store_url):
    with Runner(store_url) as runner:
        users(runner, 3)
        run_id = runner.start("sleeper", {"naps": "7", "bed": "hard"}, "tiny", user_id=3, seed=11)
        announced = runner.store.run(run_id)
        assert announced.status == "running" and announced.parameters["naps"] == 7
        run = over(runner, run_id)
        assert (run.status, run.error, run.scale, run.seed) == ("finished", None, "tiny", 11)
        [naps] = run.measurements
        assert (naps.value, naps.series) == (7, "hard")
        seen, told = (log.message for log in run.logs)
        assert f"pid {os.getpid()}," not in told and ", seed 11, " in told
        assert seen == "secrets seen: []"
        assert "hunter2" not in told and store_url not in told
        request = runner.request(run_id)
        assert (request.user_id, request.working, request.cancelled) == (3, True, False)
        assert run.environment["cores"] >= 1


def test_runs_take_place_one_after_the_other_in_the_order_asked_for(sleeper, store_url):
    with Runner(store_url) as first, Runner(store_url) as second:
        one = first.start("sleeper", {})
        asleep(first, one)
        two, three = second.start("sleeper", {}), first.start("sleeper", {}, "tiny")
        assert waiting(first, two).bars[0].description == "waiting for 1 other run"
        until(first, three, lambda run: run.bars and run.bars[0].description == "waiting for 2 other runs")
        assert first.store.run(one).status == "running"
        # Any server stops any run, whichever started it.
        second.cancel(one)
        assert over(first, one).status == "interrupted"
        asleep(first, two)
        assert waiting(second, three).measurements == []
        first.cancel(two)
        assert over(first, two).error == "cancelled"
        run = over(first, three)
        assert run.status == "finished" and run.started >= first.store.run(two).finished


def test_two_workers_are_two_at_once(sleeper, tmp_path):
    with Runner(tmp_path / "runs.db", workers=2) as runner:
        ids = [runner.start("sleeper", {}) for _ in range(3)]
        asleep(runner, ids[0]), asleep(runner, ids[1])
        assert waiting(runner, ids[2]).bars[0].description == "waiting for 2 other runs"
        for run_id in ids:
            runner.cancel(run_id)
        assert {over(runner, run_id).status for run_id in ids} == {"interrupted"}


def test_a_cancelled_run_is_interrupted_and_keeps_what_it_recorded(runner):
    run_id = runner.start("sleeper", {"naps": 5})
    asleep(runner, run_id)
    runner.cancel(run_id)
    runner.cancel(run_id)
    run = over(runner, run_id)
    assert (run.status, run.error, run.bars) == ("interrupted", "cancelled", ())
    assert [m.value for m in run.measurements] == [5]
    with pytest.raises(UsageError, match=f"run {run_id} is interrupted already"):
        runner.cancel(run_id)


def test_a_cancelled_run_is_interrupted_whatever_a_library_makes_of_it(runner):
    run_id = runner.start("sleeper", {"sour": True})
    asleep(runner, run_id)
    runner.cancel(run_id)
    run = over(runner, run_id)
    assert (run.status, run.error) == ("interrupted", "cancelled") and "could not import a dream" in run.traceback


def test_a_run_that_waits_can_be_cancelled(runner):
    one = runner.start("sleeper", {})
    asleep(runner, one)
    two = runner.start("sleeper", {})
    waiting(runner, two)
    runner.cancel(two)
    assert over(runner, two).error == "cancelled"
    assert runner.store.run(one).status == "running"


def test_a_run_that_does_not_listen_is_ended_all_the_same(sleeper, tmp_path):
    with Runner(tmp_path / "runs.db", grace=0.3) as runner:
        run_id = runner.start("sleeper", {"deaf": "yes"})
        pid = process(asleep(runner, run_id))
        runner.cancel(run_id)
        assert over(runner, run_id).error == "cancelled"
        deadline = time.monotonic() + 20
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def process(run):
    return int(run.logs[1].message.split()[1].rstrip(","))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_that_takes_too_long_is_stopped(sleeper, tmp_path):
    with Runner(tmp_path / "runs.db", time_limit=1.0) as runner:
        run = over(runner, runner.start("sleeper", {}))
        assert run.status == "interrupted"
        assert run.error == "it took longer than the 1 seconds that a run from the page may take"
        assert [m.name for m in run.measurements] == ["naps"]


def test_a_killed_process_frees_its_place(runner):
    one = runner.start("sleeper", {})
    run = asleep(runner, one)
    two = runner.start("sleeper", {}, "tiny")
    waiting(runner, two)
    os.kill(process(run), signal.SIGKILL)
    assert over(runner, two).status == "finished"
    assert "process ended before the run did" in runner.store.run(one).error


def test_a_process_that_cannot_start_is_a_failed_run(runner, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    run = over(runner, runner.start("sleeper", {}))
    assert (run.status, run.error) == ("failed", "its process could not start: exit status 1")


def no_room(*given, **named):
    raise OSError(12, "Cannot allocate memory")


def no_thread(self):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("fault", ["process", "thread"])
def test_a_start_that_fails_frees_its_place(sleeper, store_url, monkeypatch, fault):
    with Runner(store_url, places=1) as runner:
        with monkeypatch.context() as full:
            if fault == "process":
                full.setattr(module.subprocess, "Popen", no_room)
            else:
                full.setattr(module.threading.Thread, "start", no_thread)
            for _ in range(3):
                # Not that all places are taken.
                with pytest.raises(PaperworksError, match="this machine has no room for its process") as refused:
                    runner.start("sleeper", {}, "tiny")
                assert not isinstance(refused.value, BusyError)
        told = [(run.status, run.error) for run in runner.store.runs()]
        assert told == [("failed", "its process could not be started")] * 3
        assert over(runner, runner.start("sleeper", {}, "tiny")).status == "finished"


def test_a_start_that_is_interrupted_frees_its_place(sleeper, tmp_path, monkeypatch):
    def stopped(self, run_id):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_spawn", stopped)
    with Runner(tmp_path / "runs.db") as runner:
        with pytest.raises(KeyboardInterrupt):
            runner.start("sleeper", {})
        assert [run.status for run in runner.store.runs()] == ["failed"]


@pytest.mark.parametrize("when", ["at its start", "at its end"])
def test_a_store_that_is_away_for_a_while_keeps_no_place_taken(runner, monkeypatch, when):
    monkeypatch.setattr(module, "_STORE_AGAIN", 0.01)
    fail, away = runner._fail, iter(range(3))

    def busy(run_id, reason):
        if next(away, None) is not None:
            raise UsageError("the store does not answer")
        fail(run_id, reason)

    monkeypatch.setattr(runner, "_fail", busy)
    if when == "at its start":
        monkeypatch.setattr(module.subprocess, "Popen", no_room)
        with pytest.raises(PaperworksError, match="no room"):
            runner.start("sleeper", {})
        [run] = runner.store.runs()
        run_id = run.id
    else:
        monkeypatch.setattr(module.sys, "executable", "/bin/false")
        run_id = runner.start("sleeper", {})
    assert over(runner, run_id).status == "failed" and next(away, None) is None


def test_a_process_that_never_begins_is_ended(runner, tmp_path, monkeypatch):
    hung = tmp_path / "hung"
    hung.write_text("#!/bin/sh\nexec sleep 600\n")
    hung.chmod(0o755)
    monkeypatch.setattr(module, "_BEGINS_WITHIN", 0.2)
    monkeypatch.setattr(module.sys, "executable", str(hung))
    run = over(runner, runner.start("sleeper", {}))
    assert (run.status, run.error) == ("failed", "its process could not start: exit status -9")


def test_a_run_that_has_begun_is_not_taken_for_one_that_never_will(runner):
    run_id = runner.start("sleeper", {"seconds": 3.0})
    asleep(runner, run_id)
    assert not runner._announced(run_id)
    runner._fail(run_id, "it could not start")
    assert over(runner, run_id).status == "finished"


SERVER = """
import sys, time
import sleeper_plugin
from paperworks.page.runs import Runner
print(Runner(sys.argv[1]).start("sleeper", {"seconds": 1.0}), flush=True)
time.sleep(600)
"""


def test_a_run_outlives_the_server_that_started_it(sleeper, tmp_path):
    url = f"sqlite:///{tmp_path}/runs.db"
    with subprocess.Popen([sys.executable, "-c", SERVER, url], stdout=subprocess.PIPE, text=True) as server:
        run_id = server.stdout.readline().strip()
        with Runner(url) as runner:
            asleep(runner, run_id)
            server.kill()
            server.wait()
            assert over(runner, run_id).status == "finished"


@pytest.mark.parametrize(
    ("parameters", "scale", "message"),
    [
        ({"nap": 3}, "tiny", "sleeper has no option nap; did you mean naps"),
        ({"naps": "many"}, "tiny", "naps takes a whole number of at least 1, not 'many'"),
        ({"naps": "9" * 30}, "tiny", "naps is at most 9 in a run from the page, not 9999"),
        ({"naps": 10}, "tiny", "naps is at most 9 in a run from the page, not 10"),
        ({"naps": 0}, "tiny", "naps takes a whole number of at least 1, not 0"),
        ({"seconds": 61}, "tiny", "seconds is at most 60 in a run from the page, not 61.0"),
        ({"bed": "wet"}, "tiny", "bed takes one of soft, hard, not 'wet'"),
        ({"seconds": "nan"}, "tiny", "seconds takes a finite number"),
        ({}, "huge", "sleeper has no scale 'huge'"),
        ({"model": "/etc/passwd"}, "tiny", "model is one of nobody in a run from the page, not '/etc/passwd'"),
        ({"model": "owner/model"}, "tiny", "model is one of nobody in a run from the page, not 'owner/model'"),
        ({"model": "here.gguf"}, "tiny", "model is one of nobody in a run from the page, not 'here.gguf'"),
        ({"model": "a\nb"}, "tiny", "model is one of nobody in a run from the page"),
    ],
)
def test_only_known_options_and_sound_values_start_a_run(runner, tmp_path, monkeypatch, parameters, scale, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.gguf").touch()
    with pytest.raises(UsageError, match=message):
        runner.start("sleeper", parameters, scale)
    assert runner.store.runs() == []


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(runner, seed):
    with pytest.raises(UsageError, match="seed is a whole number"):
        runner.start("sleeper", {}, "tiny", seed=seed)


def test_an_unknown_or_planned_paper_is_refused(runner):
    with pytest.raises(UsageError, match="no-such-paper"):
        runner.start("no-such-paper", {})
    with pytest.raises(UsageError, match="has no recipe yet"):
        runner.start("hydra", {})
    assert runner.store.runs() == []


def test_each_user_and_all_together_have_so_many_places(sleeper, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    with Runner(tmp_path / "runs.db", places=5, places_each=2) as runner:
        users(runner, 1, 2, 3)
        first = [runner.start("sleeper", {}, user_id=1) for _ in range(2)]
        with pytest.raises(BusyError, match="you have 2 runs under way"):
            runner.start("sleeper", {}, user_id=1)
        runner.start("sleeper", {}, user_id=2)
        runner.start("sleeper", {}), runner.start("sleeper", {})
        with pytest.raises(BusyError, match="5 runs are under way or wait already"):
            runner.start("sleeper", {}, user_id=3)
        assert len(runner.store.runs()) == 5
        work.end(runner.store, first[0], "interrupted", "cancelled")
        runner.start("sleeper", {}, user_id=1)


def test_each_address_has_so_many_places_where_runs_need_no_account(sleeper, store_url, monkeypatch):
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    with Runner(store_url, places=9, places_each=2) as runner:
        first = [runner.start("sleeper", {}, address="198.51.100.1") for _ in range(2)]
        with pytest.raises(BusyError, match="you have 2 runs under way"):
            runner.start("sleeper", {}, address="198.51.100.1")
        runner.start("sleeper", {}, address="198.51.100.2")
        work.end(runner.store, first[0], "interrupted", "cancelled")
        runner.start("sleeper", {}, address="198.51.100.1")
        assert len(runner._strangers) == 3


def test_a_run_of_the_command_line_is_not_cancelled_from_the_page(runner):
    from paperworks.lab import Run

    runner.store.begin(run := Run("sleeper"))
    with pytest.raises(UsageError, match="was started from the command line; stop it there"):
        runner.cancel(run.id)
    run.status = "finished"
    runner.store.end(run)
    with pytest.raises(UsageError, match="there is no run 'nothing'"):
        runner.cancel("nothing")


def test_events_tell_of_each_change_until_the_end(sleeper, store_url, monkeypatch):
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)

    async def watch(runner, run_id):
        seen = []
        async for run in runner.events(run_id, every=0.01):
            seen.append((run.status, len(run.logs)))
            if len(seen) == 1:
                runner.store.add(run_id, Log("half way", time.time()))
            elif len(seen) == 2:
                work.end(runner.store, run_id, "failed", "fell")
        return seen

    with Runner(store_url) as runner:
        run_id = runner.start("sleeper", {})
        seen = asyncio.run(asyncio.wait_for(watch(runner, run_id), 30))
        assert seen == [("running", 0), ("running", 1), ("failed", 1)]


def test_a_place_is_given_to_one_process_only(sleeper, store_url, monkeypatch):
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    with Runner(store_url) as runner:
        ids = [runner.start("sleeper", {}) for _ in range(3)]
        with Store(store_url) as store:
            assert [work._ahead(store, run_id, 1) for run_id in ids] == [0, 1, 2]
            # Two that became free while the first still works.
            assert [work._ahead(store, run_id, 2) for run_id in (ids[2], ids[1], ids[2])] == [2, 0, 2]
            work.end(store, ids[0], "finished", "")
            assert [work._ahead(store, run_id, 1) for run_id in ids[2:]] == [1]
            with store.writing() as session:
                session.execute(update(RunRequestRow).where(RunRequestRow.run_id == ids[1]).values(working=False))
            assert [work._ahead(store, run_id, 1) for run_id in (ids[2], ids[1], ids[2])] == [1, 0, 1]


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"time_limit": 0.0}])
def test_a_runner_without_workers_or_time_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match="at least one worker and some time"):
        Runner(tmp_path / "runs.db", **wrong)
