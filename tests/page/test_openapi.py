"""Whatever is sent to any address of the page, the answer is no defect of the server."""

from __future__ import annotations

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings

from paperworks.page import safety
from paperworks.page.app import create_app
from tests.page.serving import sqlite

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 25


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The page with a user who is signed in and forms that need no token, so that the addresses themselves are met."""

    async def unchecked(request: Request) -> None:
        """Leave out the check of the token."""

    app = create_app(sqlite(tmp_path), base_url="http://testserver", meaning=False, allow_runs=True, rates={})
    app.dependency_overrides[safety.check_csrf] = unchecked
    # No run takes place, and no paper is fetched from elsewhere.
    monkeypatch.setattr("paperworks.page.runs.Runner._spawn", lambda self, run_id: None)
    monkeypatch.setattr("paperworks.page.ingest.submit", lambda index, address: index.newest(1, 0)[0])
    return app


def operations(app):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [result.ok() for result in schema.get_all_operations()]


def test_the_openapi_describes_every_route(app):
    described = {(operation.method.upper(), operation.path) for operation in operations(app)}
    for expected in (
        ("GET", "/"), ("GET", "/search"), ("GET", "/rooms/{room}"), ("POST", "/papers/{slug}/runs"), ("GET", "/runs/{run_id}"),
        ("POST", "/runs/{run_id}/cancel"), ("POST", "/subscribe"), ("POST", "/login"), ("GET", "/feed.atom"),
    ):  # fmt: skip
        assert expected in described
    assert len(described) >= 25


def test_schemathesis_finds_no_server_error(app):
    client = TestClient(app)
    client.cookies.set("session", app.state.accounts.login(*_user(app)))
    run_id = app.state.runner.start("hydra", {}, "tiny")
    app.state.runner.store.end(_over(app.state.store.run(run_id)))
    told = {}

    for operation in operations(app):

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def meet(case):
            generated = (case.path_parameters or {}).get("run_id")
            if generated and ord(generated[0]) % 2:
                case.path_parameters["run_id"] = run_id
            response = case.call(cookies=dict(client.cookies))
            told.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

        meet()
    assert len(told) == len(operations(app))
    # The addresses were met, not only their guards.
    assert {200, 404} <= told["GET /runs/{run_id}"] and 200 in told["GET /search"]
    assert not any(400 > code >= 300 and "POST" not in label for label, codes in told.items() for code in codes - {303})


def _user(app):
    email, password = "reader@example.org", "correct horse battery staple"
    app.state.accounts.register(email, password)
    return email, password


def _over(run):
    run.status = "finished"
    return run


@pytest.mark.parametrize("path", ["/", "/search?q=draft", "/papers/hydra", "/rooms/decoding", "/no-such-page"])
def test_errors_and_pages_are_json_too(app, path):
    answer = TestClient(app).get(path, headers={"Accept": "application/json"})
    assert answer.headers["content-type"] == "application/json" and isinstance(answer.json(), dict)
