"""Many readers at once: none of them meets an error."""

from __future__ import annotations

import shutil

import pytest

from paperworks.errors import PaperworksError, UsageError
from paperworks.page import load
from paperworks.page.load import free_port, load_bench, read
from tests.page.serving import serving, sqlite

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


@needs_wrk
def test_two_hundred_readers_meet_no_error(tmp_path):
    recorded = {(m.name, m.series): m.value for m in load_bench(sqlite(tmp_path), seconds=6)}
    for kind in ("list", "search"):
        assert recorded["errors", kind] == 0
        # How many is the machine's affair.
        assert recorded["requests", kind] > 0
        assert 0 < recorded["median", kind] <= recorded["95th percentile", kind] <= recorded["99th percentile", kind]


@needs_wrk
def test_answers_of_errors_count_as_errors(tmp_path):
    with serving(sqlite(tmp_path)) as server:
        told = read(server.url, ["/no-such-page"], readers=2, seconds=1, pause=0)
        assert told["errors"] == told["requests"] > 0
        good = read(server.url, ["/healthz"], readers=2, seconds=1, pause=0)
        assert good["errors"] == 0 < good["requests"]
        slow = read(server.url, ["/healthz"], readers=2, seconds=1, pause=0.25)
        assert slow["requests"] <= 2 * 1.1 * 1 / (0.5 * 0.25) + 2


@needs_wrk
def test_a_server_that_is_not_there_is_told():
    with pytest.raises(PaperworksError, match=r"wrk failed: .*Connection refused"):
        read(f"http://127.0.0.1:{free_port()}", ["/"], readers=2, seconds=1, pause=0)


def test_without_wrk_one_is_told_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(load.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="apt-get install wrk"):
        read("http://127.0.0.1:1", ["/"], readers=1, seconds=1, pause=0)
