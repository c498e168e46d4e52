"""What is seen of long work: bars on a terminal, and lines in a log file."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time

import pytest

from paperworks import cli
from paperworks.lab import Run, execute, recipe
from paperworks.lab import display as module
from paperworks.lab.display import Display
from paperworks.lab.run import Bar, Bars, Log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """From the time it is called the error stream is a terminal."""

    def opened(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return opened


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds by the clock, which stands still."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "_LOOK", 3600.0)
    return now


def at(clock: list[float], seconds: float, display: Display) -> None:
    clock[0] = 1000 + seconds
    display._shown.tick()


def test_a_terminal_shows_bars_and_messages_as_text(on_terminal):
    terminal = on_terminal(Terminal())
    display = Display()
    display.show(Bars((Bar(1, "training [heads]", 1, 4), Bar(2, "chains", 2, None))))
    display.show(Log("loss [red]0.5", 0))
    display.show(Bars((Bar(1, "training [heads]", 3, 4),)))
    live = display._shown._live
    assert len(live.tasks) == 1 and live.tasks[0].completed == 3
    display.show(Bars(()))
    assert display._shown._live is None
    text = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue())
    assert "training [heads]" in text and "chains" in text and "3/4" in text and "loss [red]0.5" in text


def test_a_log_has_a_line_when_work_begins_every_thirty_seconds_and_when_it_ends(capsys, clock):
    display = Display("hydra")
    display.show(Bars((Bar(1, "training", 0, 4000),)))
    at(clock, 29, display)
    at(clock, 30, display)
    display.show(Bars((Bar(1, "training", 1000, 4000),)))
    at(clock, 59, display)
    at(clock, 60, display)
    display.show(Log("loss 0.5", 0))
    display.show(Bars((Bar(1, "training", 2400, 4000), Bar(2, "testing", 0, None))))
    at(clock, 90, display)
    display.show(Bars((Bar(1, "training", 3999, 4000), Bar(2, "testing", 5, None))))
    at(clock, 100, display)
    display.show(Bars((Bar(2, "testing", 5, None),)))
    display.show(Bars(()))
    at(clock, 129, display)
    at(clock, 130, display)
    at(clock, 3830, display)
    display.close()
    display.close()
    assert capsys.readouterr().err.splitlines() == [
        "hydra: begins",
        "hydra: training: begins, 0 of 4,000",
        "hydra: training: 0 of 4,000 after 30 s",
        "hydra: training: 1,000 of 4,000 after 1 min 0 s, about 3 min 0 s left",
        "hydra: loss 0.5",
        "hydra: testing: begins",
        "hydra: training: 2,400 of 4,000 after 1 min 30 s, about 1 min 0 s left",
        "hydra: testing: 0 after 30 s",
        "hydra: training: ended, 3,999 of 4,000 after 1 min 40 s",
        "hydra: testing: ended, 5 after 40 s",
        "hydra: at work for 2 min 10 s",
        "hydra: at work for 1 h 3 min",
        "hydra: ended after 1 h 3 min",
    ]


def test_what_is_left_goes_by_what_was_done_here(capsys, clock):
    with Display() as display:
        display.tell("papers", 50_000, 100_000)
        clock[0] += 10
        display.tell("papers", 60_000, 100_000)
        at(clock, 30, display)
        display.tell("papers", 100_000, 100_000)
        display.tell("papers", 100_000, 100_000)
        display.tell("embedding", 0, 0)
        display.tell("queries", 0, 5)
    assert capsys.readouterr().err.splitlines() == [
        "papers: begins, 50,000 of 100,000",
        "papers: 60,000 of 100,000 after 30 s, about 2 min 0 s left",
        "papers: ended, 100,000 of 100,000 after 30 s",
        "queries: begins, 0 of 5",
        "queries: ended, 0 of 5 after 0 s",
    ]


def test_a_line_comes_also_while_one_step_takes_long(capsys, clock, monkeypatch):
    log = ""
    monkeypatch.setattr(module, "_LOOK", 0.01)
    with Display() as display:
        display.tell("loading", 0, 1)
        clock[0] += 31
        until = time.perf_counter() + 30
        while "after" not in log and time.perf_counter() < until:
            time.sleep(0.01)
            log += capsys.readouterr().err
    assert log == "loading: begins, 0 of 1\nloading: 0 of 1 after 31 s\n"


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class GoneTerminal(Gone):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def coin(registry):
    @recipe(paper="coin")
    def coin(run: Run) -> None:
        run.log("a message")
        for _ in run.progress(3, "tossing"):
            pass
        run.record("tosses", 3, better="higher")

    return coin


@pytest.mark.parametrize("stream", [Gone, GoneTerminal])
def test_a_run_goes_on_where_nobody_sees_it_any_more(coin, tmp_path, on_terminal, stream):
    on_terminal(stream())
    run = execute(coin, store=tmp_path / "runs.db")
    assert (run.status, run.measurements[0].value) == ("finished", 3)


def test_a_run_tells_of_itself_on_the_error_stream(coin, tmp_path, capfd):
    assert execute(coin, store=tmp_path / "runs.db").status == "finished"
    printed = capfd.readouterr()
    lines = [re.sub(r"\d+ s$", "0 s", line) for line in printed.err.splitlines()]
    assert printed.out == ""
    assert lines == [
        "coin: begins",
        "coin: a message",
        "coin: tossing: begins, 0 of 3",
        "coin: tossing: ended, 3 of 3 after 0 s",
        "coin: ended after 0 s",
    ]


def test_a_run_is_silent_where_that_is_asked_for(coin, tmp_path, capfd):
    assert execute(coin, store=tmp_path / "runs.db", show_progress=False).status == "finished"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False])
def test_a_run_shows_bars_on_a_terminal(coin, tmp_path, on_terminal, shown):
    terminal = on_terminal(Terminal())
    assert execute(coin, store=tmp_path / "runs.db", show_progress=shown).status == "finished"
    assert ("tossing" in terminal.getvalue()) is shown and "begins" not in terminal.getvalue()


def test_the_command_writes_its_progress_into_a_file_and_json_alone_to_its_output(tmp_path):
    program = [sys.executable, "-c", "from paperworks.cli import main; main()"]
    command = [*program, "run", "superposed-decoding", "--scale", "tiny", "--json"]
    with (tmp_path / "log").open("w") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "finished"
    assert lines[0] == "superposed-decoding: begins"
    assert re.fullmatch(r"superposed-decoding: ended after [\w ]+", lines[-1])
    # Bars and warnings of libraries have no place among them.
    assert all(line.startswith("superposed-decoding: ") for line in lines)
    pieces = [re.sub(r"\d+", "0", line.partition(": ")[2]) for line in lines]
    assert "timing in turn: begins, 0 of 0" in pieces


def test_libraries_are_silent_under_the_command():
    code = (
        "import sys; sys.argv = ['paperworks', '--version']\nfrom paperworks import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "from transformers.utils import logging\nfrom huggingface_hub.utils import logging as hub, are_progress_bars_disabled\n"
        "from tqdm.auto import tqdm\n"
        "print(logging.is_progress_bar_enabled(), logging.get_verbosity(), hub.get_verbosity(), are_progress_bars_disabled())\n"
        "print(list(tqdm([1, 2])))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in cli._SILENT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[1:] == [f"False {logging.ERROR} {logging.ERROR} True", "[1, 2]"]
    assert done.stderr == ""
