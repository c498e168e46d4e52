"""A page of our own, served by a process of its own, for tests from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

SERVE = """
import json, sys
from paperworks.page.app import serve
serve(**json.loads(sys.argv[1]))
"""


@dataclass
class Server:
    """A server and its store."""

    url: str
    store_url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(store_url: str, **settings: object) -> Iterator[Server]:
    """A server over a store; it answers when this returns."""
    port = free_port()
    told = json.dumps({"store_url": store_url, "port": port, "meaning": False, **settings})
    process = subprocess.Popen([sys.executable, "-c", SERVE, told], start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", store_url, process)
    try:
        _wait_for(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{server.url}/healthz").raise_for_status()
            return
        except httpx.HTTPError:
            assert server.process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


class Reader(httpx.Client):
    """A reader without a browser: keeps cookies, and takes the token of a form along."""

    def send_form(self, path: str, form: str, **fields: str) -> httpx.Response:
        """Load the page with the form, fill it in and send it."""
        token = re.search(r'name="csrf" value="([^"]+)"', self.get(form).text)
        assert token is not None, f"{form} has no form"
        return self.post(path, data={"csrf": token[1], **fields})

    def token(self) -> str:
        """A token for forms of this reader."""
        found = re.search(r'name="csrf" value="([^"]+)"', self.get("/subscribe").text)
        assert found is not None
        return found[1]


def sqlite(folder: Path) -> str:
    """URL of a store in a folder."""
    return f"sqlite:///{folder}/runs.db"
