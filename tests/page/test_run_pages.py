"""The addresses of runs: who may start and stop them, what they show, and what they refuse."""

from __future__ import annotations

import re
import time

import pytest
from fastapi.testclient import TestClient

from paperworks.lab import Run
from paperworks.lab.recipe import find
from paperworks.lab.run import Bar, Bars, Log
from paperworks.page.app import create_app
from paperworks.page.runs import Runner
from paperworks.page.work import end
from tests.page.serving import sqlite

JSON = {"Accept": "application/json"}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page; no run of it takes place."""
    monkeypatch.setattr(Runner, "_spawn", lambda self, run_id: None)
    monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)

    def make(**settings):
        return create_app(sqlite(tmp_path), base_url="http://127.0.0.1", meaning=False, rates={}, **settings)

    return make


def reader(app, email=None):
    """A reader with a token for forms; signed in where there is an address."""
    client = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    client.csrf = re.search(r'name="csrf" value="([^"]+)"', client.get("/subscribe").text)[1]
    if email:
        send(client, "/register", email=email, password="correct horse battery staple")
        assert "session" in client.cookies
    return client


def send(client, path, headers=None, **fields):
    return client.post(path, data={"csrf": client.csrf, **fields}, headers=headers)


def begun(client, **fields):
    answer = send(client, "/papers/hydra/runs", JSON, **fields)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def test_a_form_starts_a_run_with_its_parameters(make):
    app = make()
    ann = reader(app, "ann@example.org")
    fields = {"scale": "tiny", "seed": "7", "parameter.new_tokens": "9", "parameter.model": "", "parameter.epochs": " "}
    answer = send(ann, "/papers/hydra/runs", **fields)
    assert answer.status_code == 303
    run = app.state.store.run(answer.headers["location"].rpartition("/")[2])
    assert (run.paper, run.scale, run.seed, run.parameters["new_tokens"]) == ("hydra", "tiny", 7, 9)
    assert run.parameters["model"] == "tiny-random-llama"
    shown = ann.get(answer.headers["location"])
    assert shown.status_code == 200 and "Cancel" in shown.text and "new tokens" in shown.text
    told = ann.get(f"{answer.headers['location']}.json").json()
    assert (told["id"], told["status"], told["parameters"]["new_tokens"]) == (run.id, "running", 9)


def test_only_readers_who_are_signed_in_start_runs(make):
    app = make()
    stranger = reader(app)
    answer = send(stranger, "/papers/hydra/runs", scale="tiny")
    assert answer.status_code == 303 and answer.headers["location"].startswith("/login")
    assert send(stranger, "/papers/hydra/runs", JSON, scale="tiny").status_code == 401
    assert app.state.store.runs() == []
    assert "Run it</button>" not in stranger.get("/papers/hydra").text


def test_everybody_starts_and_stops_runs_where_the_server_allows_it(make):
    app = make(allow_runs=True)
    stranger = reader(app)
    assert "Run it</button>" in stranger.get("/papers/hydra").text
    run_id = begun(stranger, scale="tiny")
    assert send(reader(app), f"/runs/{run_id}/cancel").status_code == 303
    assert app.state.runner.request(run_id).cancelled


def test_only_who_started_a_run_cancels_it(make):
    app = make(allow_runs=True)
    ann, bob = reader(app, "ann@example.org"), reader(app, "bob@example.org")
    run_id = begun(ann)
    for other in (bob, reader(app)):
        assert "Cancel</button>" not in other.get(f"/runs/{run_id}").text
        assert send(other, f"/runs/{run_id}/cancel", JSON).status_code == 403
    assert not app.state.runner.request(run_id).cancelled
    assert send(ann, f"/runs/{run_id}/cancel", JSON).status_code == 202
    assert app.state.runner.request(run_id).cancelled
    end(app.state.store, run_id, "interrupted", "cancelled")
    answer = send(ann, f"/runs/{run_id}/cancel", JSON)
    assert answer.status_code == 400 and "is interrupted already" in answer.json()["error"]


def test_a_run_of_the_command_line_is_shown_and_not_cancelled(make):
    app = make(allow_runs=True)
    run = Run("hydra")
    app.state.store.begin(run)
    client = reader(app)
    assert "Cancel</button>" not in client.get(f"/runs/{run.id}").text
    assert send(client, f"/runs/{run.id}/cancel", JSON).status_code == 403


@pytest.mark.parametrize("path", ["/papers/hydra/runs", "/runs/{run}/cancel"])
def test_a_forged_form_starts_and_stops_nothing(make, path):
    app = make(allow_runs=True)
    client = reader(app)
    run_id = begun(client)
    path = path.format(run=run_id)
    assert client.post(path, data={"scale": "tiny"}).status_code == 403
    assert client.post(path, data={"csrf": "x", "scale": "tiny"}).status_code == 403
    stolen = reader(app).csrf
    assert client.post(path, data={"csrf": stolen}).status_code == 403
    assert len(app.state.store.runs()) == 1 and not app.state.runner.request(run_id).cancelled


@pytest.mark.parametrize(
    ("path", "fields", "status", "told"),
    [
        ("hydra", {"scale": "huge"}, 400, "hydra has no scale 'huge'"),
        ("hydra", {"scale": "paper"}, 400, "hydra at scale paper is more than a run from the page may take"),
        ("hydra", {"parameter.new_tokens": "many"}, 400, "new_tokens takes a whole number of at least 1, not 'many'"),
        ("hydra", {"parameter.new_tokens": "385"}, 400, "new_tokens is at most 384 in a run from the page, not 385"),
        ("hydra", {"parameter.epochs": "1e9"}, 400, "epochs is at most 12 in a run from the page, not 1000000000.0"),
        ("hydra", {"parameter.model": "/etc/passwd"}, 400, "model is one of smollm2-135m, tiny-random-llama"),
        ("hydra", {"parameter.model": "owner/model"}, 400, "model is one of smollm2-135m, tiny-random-llama"),
        ("hydra", {"parameter.prompts": "mt_bench"}, 400, "prompts is one of built-in in a run from the page"),
        ("hydra", {"parameter.__class__": "x"}, 400, "hydra has no option __class__"),
        ("hydra", {"on": "ray://evil:1"}, 400, "the form has no field 'on'"),
        ("hydra", {"seed": "-1"}, 400, "seed is a whole number of at least 0, not '-1'"),
        ("hydra", {"seed": str(2**40)}, 400, "seed is a whole number"),
        ("maskllm-nothing", {}, 404, "there is no paper of this name that runs here"),
    ],
)
def test_unknown_papers_fields_and_values_are_refused_in_one_sentence(make, path, fields, status, told):
    app = make(allow_runs=True)
    client = reader(app)
    answer = send(client, f"/papers/{path}/runs", JSON, **fields)
    assert answer.status_code == status and told in answer.json()["error"]
    assert "<h1" in send(client, f"/papers/{path}/runs", **fields).text
    assert app.state.store.runs() == []


def test_the_form_tells_the_bounds_and_offers_what_is_here(make):
    app = make(allow_runs=True)
    html = reader(app).get("/papers/hydra").text
    field = re.search(r'<input id="run-new_tokens"[^>]*>', html)[0]
    assert 'min="1"' in field and 'max="384"' in field and 'step="1"' in field
    models = re.search(r'<select id="run-model".*?</select>', html, re.DOTALL)[0]
    assert re.findall(r'value="([^"]*)"', models) == ["", "smollm2-135m", "tiny-random-llama"]
    scales = re.search(r'<select id="run-scale".*?</select>', html, re.DOTALL)[0]
    assert re.findall(r'value="([^"]*)"', scales) == ["tiny", "default"]
    # The paper's own is more than the page lets anybody ask for; the form says where it runs.
    assert "the paper's own scale runs on a machine of yours: <code>paperworks run hydra --scale paper</code>" in html
    assert "paper" in find("hydra").scales
    assert 'type="text"' not in re.search(r'<form class="parameters".*?</form>', html, re.DOTALL)[0]
    offer = reader(app).get("/papers/hydra.json").json()["offer"]
    [told] = [field for field in offer["fields"] if field["name"] == "new_tokens"]
    assert (told["low"], told["high"], offer["scales"]) == (1, 384, ["tiny", "default"])


def test_an_address_with_enough_runs_is_told_to_wait_where_runs_need_no_account(make):
    app = make(allow_runs=True)
    stranger = reader(app)
    for _ in range(3):
        begun(stranger)
    answer = send(stranger, "/papers/hydra/runs", JSON)
    assert answer.status_code == 429 and "you have 3 runs" in answer.json()["error"]
    # Who has an account has places of their own.
    begun(reader(app, "ann@example.org"))


def test_a_user_with_enough_runs_is_told_to_wait(make):
    app = make()
    ann = reader(app, "ann@example.org")
    for _ in range(3):
        begun(ann)
    answer = send(ann, "/papers/hydra/runs", JSON)
    assert answer.status_code == 429 and "you have 3 runs" in answer.json()["error"]
    assert answer.headers["retry-after"] == "60"


@pytest.mark.parametrize(
    "path", ["/runs/nothing", "/runs/nothing/events", "/runs/nothing/log", "/runs/nothing/files/x"]
)
def test_an_unknown_run_is_not_found(make, path):
    assert reader(make()).get(path).status_code == 404


def test_events_bring_what_changed_and_end_with_the_run(make):
    app = make(allow_runs=True)
    client = reader(app)
    run_id = begun(client)
    store = app.state.store
    store.add(run_id, Log("<script>alert(1)</script>", time.time()))
    store.add(run_id, Bars((Bar(0, "training <b>", 2.0, 5),)))
    end(store, run_id, "failed", "ValueError: <i>no</i>")
    answer = client.get(f"/runs/{run_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in event.splitlines() if line.startswith("event"))
        for event in answer.text.split("\n\n")
        if event
    ]
    assert [event.get("event") for event in events] == ["run", "end"]
    assert "&lt;script&gt;" in answer.text and "<script>" not in answer.text and "<i>" not in answer.text


def test_a_run_that_is_under_way_shows_how_far_it_is(make):
    app = make(allow_runs=True)
    client = reader(app)
    run_id = begun(client)
    app.state.store.add(run_id, Bars((Bar(0, "training <b>", 2.0, 5), Bar(1, "looking", 1.0, None))))
    text = client.get(f"/runs/{run_id}").text
    assert 'value="2.0" max="5"' in text and "training &lt;b&gt;: 2 of 5" in text and "<b>" not in text
    assert f'data-events="/runs/{run_id}/events"' in text and 'http-equiv="refresh"' in text
    assert client.get(f"/runs/{run_id}.json").json()["progress"][0] == {
        "key": 0, "description": "training <b>", "done": 2.0, "total": 5,
    }  # fmt: skip


def test_files_of_a_run_are_served_and_no_others(make):
    from matplotlib.figure import Figure

    app = make()
    store = app.state.store
    run = Run("hydra", recorder=store, artefacts=store.artefacts)
    store.begin(run)
    run.figure(Figure())
    for name, content in (("notes.html", "<script>alert(1)</script>"), ("table.json", "{}")):
        (run.artefact_folder / name).write_text(content)
    run.keep_files()
    (store.artefacts / "secret.txt").write_text("secret")
    (run.artefact_folder / "later.txt").write_text("not kept")
    run.log("one"), run.log("two")
    run.status, run.finished = "finished", run.started
    store.end(run)
    client = reader(app)
    figure = client.get(f"/runs/{run.id}/files/figure")
    assert figure.headers["content-type"] == "image/png" and figure.content.startswith(b"\x89PNG")
    html = client.get(f"/runs/{run.id}/files/notes.html")
    # Not as a page of this site: its script would be ours.
    assert html.headers["content-type"] == "application/octet-stream"
    assert html.headers["content-disposition"].startswith("attachment")
    assert client.get(f"/runs/{run.id}/files/table.json").content == b"{}"
    for path in ("../secret.txt", "..%2Fsecret.txt", "later.txt", "/etc/passwd", "%2Fetc%2Fpasswd"):
        assert client.get(f"/runs/{run.id}/files/{path}").status_code in (404, 422), path
    assert client.get(f"/runs/{run.id}/log").text == "one\ntwo\n"
    page = client.get(f"/runs/{run.id}").text
    assert f'src="/runs/{run.id}/files/figure"' in page and "data-events" not in page
