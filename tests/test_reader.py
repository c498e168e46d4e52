"""The reader's day, as the docs tell it: every command and address is tried as it stands, and the page as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reader.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
HOME = "http://127.0.0.1:8000"
ADDRESSES = [address.removeprefix(HOME) for address in re.findall(rf"`({HOME}[^`]*)`", TEXT)]
# What each command shows, in their order.
SEEN = (
    r"speculation.*measured: \d of \d claims hold",
    r"hydra\s+Generates the same text",
    r"Hydra: Sequentially-Dependent.*from paperworks\.decoding import Hydra.*plain decoding.*claim .*verdict",
    r"claim .*paper .*here .*verdict.*3 claims: ",
    r"next-block-prediction.*claims?: \d+ contradicted",
    "",
    r"mail .*to .*subject.*1 .*ada@example\.org .*Confirm your subscription",
    r"To: ada@example\.org\nSubject: .*http://127\.0\.0\.1:8000/confirm/\S+",
    r"digests/preview\.html\ndigests/preview\.txt",
    r"hydra.*finished.*tiny",
)
# Long enough for a machine where all else runs too.
PATIENCE = 150


@pytest.fixture
def typed(tmp_path: Path):
    """Types a command into a shell that has the program, in a folder and with a home of its own."""
    command = tmp_path / "bin" / "paperworks"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from paperworks.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("PAPERWORKS_SMTP", "PAPERWORKS_STORE")}
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("DATA", "CACHE")}
    environment = {**kept, **homes, "PATH": f"{command.parent}:{os.environ['PATH']}", "COLUMNS": "120"}

    def start(line: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", "-euc", f"exec {line}"], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=environment
        )

    return start


@pytest.fixture
def shown(typed):
    """What a command of the page shows."""

    def run(line: str) -> str:
        process = typed(line)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, f"{line}\n{out}\n{err}"
        return out

    return run


@pytest.fixture
def served(typed, free_port) -> Iterator[str]:
    """The address of the page that `paperworks serve` gives, at a port where nobody listens yet."""
    process = typed(f"paperworks serve --port {free_port}")
    try:
        address = HOME.replace("8000", str(free_port))
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                assert httpx.get(f"{address}/healthz").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def free_port() -> int:
    """A port of this machine at which nobody listens."""
    from paperworks.page.load import free_port

    return free_port()


def test_every_command_and_address_does_what_the_page_says(shown, served) -> None:
    assert COMMANDS.index("paperworks serve") == SEEN.index("") and len(COMMANDS) == len(SEEN)

    def check(line: str) -> str:
        out = shown(line).replace(served, HOME)
        assert re.search(SEEN[COMMANDS.index(line)], out, re.DOTALL), f"{line}\n{out}"
        return out

    at_the_page = COMMANDS.index("paperworks serve")
    for line in COMMANDS[:at_the_page]:
        check(line)
    with httpx.Client(base_url=served, follow_redirects=True) as reader:

        def send(form: str, path: str, **fields: str) -> httpx.Response:
            token = re.search(r'name="csrf" value="([^"]+)"', reader.get(form).text)
            assert token is not None, form
            answer = reader.post(path, data={"csrf": token[1], **fields})
            assert answer.status_code == 200, answer.text
            return answer

        send("/register", "/register", email="ada@example.org", password="correct horse battery staple")
        for address in ADDRESSES:
            assert reader.get(address).status_code == 200, address
        feeds = [ElementTree.fromstring(reader.get(one).content) for one in ADDRESSES if "atom" in one]
        everything, found = (len(feed.findall("{*}entry")) for feed in feeds)
        assert everything >= found > 0

        assert "Keep for reading" in reader.get("/papers/hydra").text
        send("/papers/hydra", "/papers/hydra/keep")
        kept, recommended = reader.get("/reading").text.split("Recommended from it")
        assert "/papers/hydra" in kept and "/papers/" in recommended

        assert "Digest by mail" in reader.get("/search?q=speculative+decoding").text
        send(
            "/subscribe", "/subscribe", email="ada@example.org", query="speculative decoding", frequency="weekly"
        )  # fmt: skip
        list_of_mails, mail, digest, results = COMMANDS[at_the_page + 1 :]
        check(list_of_mails)
        link = re.search(r"\S+/confirm/(\S+)", check(mail))
        assert link is not None
        assert "You are subscribed" in send(f"/confirm/{link[1]}", f"/confirm/{link[1]}").text
        check(digest)

        run = send("/papers/hydra", "/papers/hydra/runs", scale="tiny").url
        deadline = time.monotonic() + PATIENCE
        while (told := reader.get(f"{run}.json").json())["status"] == "running" and time.monotonic() < deadline:
            time.sleep(0.5)
        assert told["status"] == "finished", told
    check(results)


def test_every_verdict_is_told() -> None:
    from paperworks.lab.verdicts import KINDS

    assert re.findall(r"^\| ([a-z ]+) \| ", TEXT, re.MULTILINE)[1:] == list(KINDS)
