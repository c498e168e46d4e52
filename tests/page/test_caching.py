"""Shared answers are made for nobody: no reader's own page is kept for the others."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from paperworks.page.app import create_app
from tests.page.serving import sqlite
from tests.page.test_web import BASE, logged_in


@pytest.fixture
def app(tmp_path):
    made = create_app(sqlite(tmp_path), meaning=False, base_url=BASE, rates={})
    yield made
    made.state.runner.close()
    made.state.store.close()


def headers_of(session: str) -> list[list[tuple[str, str]]]:
    """Ways to write a cookie that a parser takes for `session` and a search for "session=" may not."""
    return [
        [("Cookie", f"session ={session}")],
        [("Cookie", f"a=b;  session\t= {session}")],
        [("Cookie", "a=b"), ("Cookie", f"session={session}")],
        [("Cookie", f'session="{session}"')],
    ]


@pytest.mark.parametrize("number", range(4))
def test_no_page_of_one_reader_is_kept_for_the_others(app, number):
    session = logged_in(TestClient(app, base_url=BASE)).cookies["session"]
    for path in ("/", "/new", "/search?q=llm", "/rooms/decoding", "/claims"):
        TestClient(app, base_url=BASE).get(path, headers=headers_of(session)[number])
        stranger = TestClient(app, base_url=BASE).get(path)
        assert stranger.status_code == 200 and "ada@example.org" not in stranger.text, path
        assert "Log out" not in stranger.text and "set-cookie" not in stranger.headers


def test_who_is_signed_in_sees_their_own_page(app):
    ada = logged_in(TestClient(app, base_url=BASE))
    TestClient(app, base_url=BASE).get("/")
    assert "ada@example.org" in ada.get("/").text


def test_headers_that_change_nothing_make_no_answer_anew(app, monkeypatch):
    from paperworks.page.routes import papers

    made = []

    def counted(*given, old=papers.trending):
        made.append(given)
        return old(*given)

    monkeypatch.setattr(papers, "trending", counted)
    client = TestClient(app, base_url=BASE)
    for number in range(5):
        client.get("/", headers={"Accept": f"text/html;q=0.{number}", "Host": f"127.0.0.1:{number + 1}"})
    assert len(made) == 1
    client.get("/", headers={"Accept": "application/json"})
    assert len(made) == 2
