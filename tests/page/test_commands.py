"""A figure that is shown comes with the command that gives it: on the page, by `show`, and in the benchmarks."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from markupsafe import escape
from typer.testing import CliRunner

from paperworks import cli
from paperworks.lab import benchmarks, records
from paperworks.page.app import create_app
from paperworks.papers import get, load_cards

BASE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = create_app(f"sqlite:///{tmp_path_factory.mktemp('pages')}/runs.db", meaning=False, base_url=BASE, rates={})
    yield TestClient(made, base_url=BASE)
    made.state.runner.close()
    made.state.store.close()


@pytest.mark.parametrize("slug", ["hydra", "chimera", "posterior-collapse"])
def test_a_record_is_shown_with_its_command(slug, client):
    kept = records.load_records()[slug]
    command = records.command(kept)
    assert command.startswith(f"paperworks run {slug}")
    paper = next(paper for paper in load_cards().values() if paper.slug == slug)
    page = client.get(f"/papers/{slug}")
    assert page.status_code == 200 and f"<code>{escape(command)}</code>" in page.text
    shown = CliRunner().invoke(cli.app(), ["show", slug])
    # In one line, to be copied.
    assert shown.exit_code == 0 and command in shown.output.splitlines()
    assert f"\nMade by `{command}`.\n" in benchmarks.paper_page(paper, records.records_of(slug))


def test_the_command_of_hydras_record_has_its_tokens_and_nodes():
    command = records.command(records.load_records()[get("hydra").slug])
    assert "--train-tokens 672000" in command and "--nodes 11" in command and "--prefix-layer" in command
