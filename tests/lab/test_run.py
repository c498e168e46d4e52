from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from paperworks.errors import PaperworksError
from paperworks.lab import Effect, Run
from paperworks.lab.run import Artefact, Bars, Entry, Measurement


class Notebook:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, run_id: str, entry: Entry) -> None:
        self.entries.append(entry)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def run(notebook, tmp_path) -> Run:
    return Run("hydra", seed=3, recorder=notebook, artefacts=tmp_path)


def test_a_record_reaches_the_recorder_before_record_returns(run, notebook):
    run.record("perplexity", np.float32(12.5), unit="", better="lower", series="Hydra")
    assert notebook.entries == [Measurement("perplexity", 12.5, "", "lower", "Hydra")]
    assert run.measurements == notebook.entries
    assert type(run.measurements[0].value) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_figure_that_is_not_finite_is_refused(run, notebook, value):
    with pytest.raises(ValueError, match=r"perplexity is .*only finite figures are recorded"):
        run.record("perplexity", value, better="lower")
    assert not run.measurements and not notebook.entries


def test_a_record_needs_a_name_and_a_direction(run):
    with pytest.raises(ValueError, match="needs a name"):
        run.record("", 1, better="lower")
    with pytest.raises(ValueError, match="better is 'higher' or 'lower', given 'bigger'"):
        run.record("size", 1, better="bigger")
    assert not run.measurements


def test_a_run_that_is_over_takes_no_more(run, notebook):
    run.status = "finished"
    with pytest.raises(PaperworksError, match=f"run {run.id} is finished and takes no more"):
        run.record("perplexity", 1, better="lower")
    assert not notebook.entries


def test_a_ratio_is_recorded_with_its_interval(run):
    method, baseline = np.random.default_rng(0).gamma(30, 1, size=(2, 20))
    ratio = run.ratio("accuracy", method=method, baseline=baseline, series="A", against="B", better="lower")
    [kept] = run.measurements
    assert isinstance(ratio, Effect)
    assert (kept.name, kept.series, kept.against, kept.unit, kept.better) == (
        "accuracy",
        "A",
        "B",
        "x",
        "lower",
    )
    assert (kept.value, kept.low, kept.high) == (ratio.value, ratio.low, ratio.high)
    assert kept.repeats == pytest.approx(list(method / baseline))
    assert ratio.low < method.mean() / baseline.mean() < ratio.high


def test_compare_records_rates_where_calls_say_their_work(run, monkeypatch):
    clock = _clock(monkeypatch)
    ratios = run.compare(
        baseline=("plain", lambda item: clock.spend(item, 10)),
        method={
            "Hydra": lambda item: clock.spend(item / 2, 10),
            "Medusa": lambda item: clock.spend(item, 20),
        },
        over=[1.0, 4.0],
        repeats=3,
        unit="tokens/s",
    )
    kept = {(m.name, m.series): m for m in run.measurements}
    assert list(kept) == [
        ("speed", "plain"),
        ("speed", "Hydra"),
        ("speed", "Medusa"),
        ("speed-up", "Hydra"),
        ("speed-up", "Medusa"),
    ]
    assert kept["speed", "plain"].repeats == [10, 2.5] * 3
    assert kept["speed", "plain"].value == 6.25
    assert (kept["speed", "plain"].unit, kept["speed", "plain"].better) == ("tokens/s", "higher")
    assert kept["speed-up", "Hydra"].against == "plain" and kept["speed-up", "Hydra"].unit == "x"
    assert (ratios["Hydra"].value, ratios["Medusa"].value) == (2, 2)


def test_compare_records_seconds_where_calls_are_silent(run, monkeypatch):
    clock = _clock(monkeypatch)
    ratios = run.compare(baseline=lambda: clock.spend(4), method=lambda: clock.spend(1), repeats=2)
    kept = {(m.name, m.series): m for m in run.measurements}
    assert list(kept) == [("time", "baseline"), ("time", "method"), ("speed-up", "method")]
    assert (kept["time", "method"].value, kept["time", "method"].unit, kept["time", "method"].better) == (
        1,
        "s",
        "lower",
    )
    assert ratios["method"].value == 4 and kept["speed-up", "method"].better == "higher"


def test_compare_refuses_what_it_cannot_tell_apart(run):
    with pytest.raises(ValueError, match="none named 'plain'"):
        run.compare(baseline=("plain", abs), method={"plain": abs})
    with pytest.raises(ValueError, match="at least one method"):
        run.compare(baseline=abs, method={})


def test_a_figure_is_a_png_in_the_artefact_folder(run, notebook):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    path = run.figure(figure, "speed-up")
    assert path == run.artefact_folder / "speed-up.png" == run.artefacts["speed-up"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert isinstance(notebook.entries[-1], Artefact) and notebook.entries[-1].path == "speed-up.png"
    with pytest.raises(ValueError, match="a figure's name has letters"):
        run.figure(figure, "../escape")


def test_files_left_in_the_artefact_folder_are_kept(run):
    (run.artefact_folder / "heads").mkdir()
    (run.artefact_folder / "heads" / "config.json").write_text("{}")
    run.keep_files()
    run.keep_files()
    assert run.artefacts == {"heads/config.json": run.artefact_folder / "heads" / "config.json"}


def test_progress_counts_and_several_may_be_under_way(run):
    with run.progress(10, "training") as outer:
        outer.advance(4)
        for item in run.progress(["a", "b"], "testing"):
            if item == "b":
                assert [(bar.description, bar.done, bar.total) for bar in run.bars] == [
                    ("training", 4, 10),
                    ("testing", 1, 2),
                ]
        assert [bar.description for bar in run.bars] == ["training"]
    assert run.bars == ()
    assert list(run.progress(3)) == [0, 1, 2]
    with run.progress() as endless:
        endless.advance()
        assert run.bars[0].total is None
    assert list(run.progress(iter("ab"))) == ["a", "b"]


def test_progress_from_several_threads_loses_no_step(run):
    with run.progress(4000, "chains") as bar:
        threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar.bar.done == 4000


def test_the_recorder_hears_of_progress_once_a_second_and_when_work_begins_or_ends(run, notebook, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("paperworks.lab.run.time.monotonic", lambda: now[0])
    with run.progress(100, "training") as bar:
        for _ in range(100):
            now[0] += 0.25
            bar.advance()
    heard = [entry for entry in notebook.entries if isinstance(entry, Bars)]
    assert len(heard) == 1 + 25 + 1
    assert heard[0].bars[0].done == 0 and heard[-2].bars[0].done == 100 and heard[-1].bars == ()


def test_an_iterator_left_early_may_close_after_the_run(run):
    steps = iter(run.progress(3))
    next(steps)
    run.status = "finished"
    steps.close()


def test_map_keeps_the_order_and_raises_what_the_function_raises(run):
    assert run.map(lambda x: x * x, range(4), "squares") == [0, 1, 4, 9]
    with pytest.raises(ZeroDivisionError):
        run.map(lambda x: 1 / x, [1, 0])
    assert run.bars == ()


def test_messages_are_kept_with_their_time(run, notebook):
    run.log("half way")
    assert [log.message for log in run.logs] == ["half way"]
    assert run.logs[0].at == pytest.approx(run.started.timestamp(), abs=60)
    assert notebook.entries == run.logs


def test_a_run_by_hand_keeps_its_files_in_a_temporary_folder():
    run = Run("hydra")
    (run.artefact_folder / "note.txt").write_text("kept")
    run.keep_files()
    assert Path(run.artefacts["note.txt"]).read_text() == "kept"
    assert run.id in repr(run)


class _Clock:
    now = 0.0

    def spend(self, seconds: float, work: float | None = None) -> float | None:
        self.now += seconds
        return work


def _clock(monkeypatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr("paperworks.lab.measure.perf_counter", lambda: clock.now)
    return clock
