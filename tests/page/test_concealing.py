"""No page shows a path of the server: not in the error of a run, nor its traceback, log, progress or parameters."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from paperworks import cli
from paperworks.errors import UsageError
from paperworks.lab.run import Bar, Bars, Log, Run
from paperworks.page.app import create_app
from paperworks.page.concealing import for_visitors, without_paths
from paperworks.page.runs import Runner
from tests.page.serving import sqlite
from tests.page.test_run_pages import JSON, begun, reader

SECRET = "/srv/ada/papers"
ERROR = f"FileNotFoundError: [Errno 2] No such file or directory: '{SECRET}/models/my model/config.json'"
TRACEBACK = (
    f'Traceback (most recent call last):\n  File "{SECRET}/lib/run.py", line 3, in <module>\n    load()\n{ERROR}\n'
)


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (ERROR, "FileNotFoundError: [Errno 2] No such file or directory: '…/config.json'"),
        ('  File "/a/b/c.py", line 3', '  File "…/c.py", line 3'),
        ("cannot read /srv/data/iris.csv: it is damaged", "cannot read …/iris.csv: it is damaged"),
        ("error:/opt/a/b, (/tmp/x/y) path=/root/k/x", "error:…/b, (…/y) path=…/x"),
        ("['/a/b', \"/c/d e/f\"]", "['…/b', \"…/f\"]"),
        ("made ~/models/x and ~ada/y/z", "made …/x and …/z"),
        ("in /home/ada and /Users/ada/x", "in … and …/x"),
        (f"below {Path.home()}", "below …"),
        ("no //srv/data//x.csv and /srv//data/y.csv, '/srv//a b/z'", "no …/x.csv and …/y.csv, '…/z'"),
        ("gcc -I/usr/include/ada -L/opt/lib/x -o/srv/y a.c", "gcc -I…/ada -L…/x -o…/y a.c"),
        ("'\\n/work/main/x.py'", "'\\n…/x.py'"),
        ("sqlite:////srv/store/runs.db does not answer", "sqlite:…/runs.db does not answer"),
        ("file:///srv/store/runs.db", "file:…/runs.db"),
        ("postgresql+psycopg://ada:hunter2@db.lan/papers: no", "postgresql+psycopg://… no"),
        # What is no path of a server stays.
        ("20 tokens/s, 1/2 of train/test", "20 tokens/s, 1/2 of train/test"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("see https://example.org:8000/a/b/c", "see https://example.org:8000/a/b/c"),
        ("(https://example.org//a/b)", "(https://example.org//a/b)"),
        ("/ and // and a / b", "/ and // and a / b"),
        ("", ""),
    ],
)
def test_of_a_path_its_end_stays(told, shown):
    assert without_paths(told) == shown


def test_long_texts_take_no_longer_than_their_length():
    begun_at = time.process_time()
    for text in (
        "/a" * 50_000,
        "'/" * 50_000,
        '"/a/' * 30_000,
        "a@" * 50_000,
        "~" * 50_000,
        "x://" * 30_000,
        "/" * 50_000,
        "//a" * 30_000,
    ):
        without_paths(text)
    assert time.process_time() - begun_at < 20


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    made = create_app(sqlite(tmp_path), base_url="http://127.0.0.1", meaning=False, rates={}, allow_runs=True)
    yield made
    made.state.runner.close()
    made.state.store.close()


def test_a_failed_run_shows_visitors_no_path_of_the_server(app, capsys, monkeypatch):
    client, store = reader(app), app.state.store
    run_id = begun(client, scale="tiny")
    store.add(run_id, Log(f"reading {SECRET}/data.csv", time.time()))
    store.add(run_id, Bars((Bar(0, f"converting {SECRET}/weights.gguf", 1.0, 2),)))
    while_it_lasts = [client.get(f"/runs/{run_id}{ending}").text for ending in ("", ".json", "/log")]
    run = store.run(run_id)
    run.status, run.error, run.traceback, run.finished = "failed", ERROR, TRACEBACK, run.started
    store.end(run)
    afterwards = [client.get(f"/runs/{run_id}{ending}").text for ending in ("", ".json", "/log", "/events")]
    for shown in (*while_it_lasts, *afterwards):
        assert SECRET not in shown and "…/" in shown
    html, json = afterwards[:2]
    assert "Where it stopped" in html and "No such file or directory: &#39;…/config.json&#39;" in html
    assert "…/data.csv" in json
    # The operator sees all of it, on the machine.
    monkeypatch.setattr("sys.argv", ["paperworks", "results", run_id, "--store", store.url])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().out
    assert f"reading {SECRET}/data.csv" in told and f'File "{SECRET}/lib/run.py"' in told


def test_a_run_of_the_command_line_shows_no_path_it_was_given(app):
    run = Run("hydra", {"model": f"{SECRET}/model", "nodes": 4})
    app.state.store.begin(run)
    client = reader(app)
    for ending in ("", ".json"):
        shown = client.get(f"/runs/{run.id}{ending}").text
        assert SECRET not in shown and "model" in shown
    assert run.parameters["model"] == f"{SECRET}/model"


def test_what_is_shown_of_a_run_leaves_the_run_as_it_is():
    run = Run("hydra", {"model": f"{SECRET}/m"})
    run.record(f"loss on {SECRET}/x.csv", 1.0, better="lower", series=f"{SECRET}/y")
    shown = for_visitors(run)
    assert (shown.measurements[0].name, shown.measurements[0].series) == ("loss on …/x.csv", "…/y")
    assert run.measurements[0].series == f"{SECRET}/y" and shown.id == run.id


def test_an_error_of_a_page_names_no_path(app, monkeypatch):
    def failing(*given, **named):
        raise UsageError(f"PAPERWORKS_DATA is '{SECRET}/data', which is not a folder")

    monkeypatch.setattr(app.state.index, "newest", failing)
    client = TestClient(app, base_url="http://127.0.0.1")
    for answer in (client.get("/new"), client.get("/new", headers=JSON)):
        assert answer.status_code == 400 and SECRET not in answer.text and "…/data" in answer.text
