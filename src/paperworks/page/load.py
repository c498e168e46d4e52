"""How the page bears a crowd: many readers at once, by the load tool wrk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from paperworks.errors import PaperworksError, UsageError
from paperworks.lab.run import Measurement
from paperworks.page.search import words_of
from paperworks.papers import load_cards

# Each connection is a reader who asks for one path after another, with a pause between them.
_READERS = """
local paths, pause, turn = {}, 0, 0

function init(args)
  for path in io.lines(args[1]) do paths[#paths + 1] = path end
  pause = tonumber(args[2])
  math.randomseed(tonumber(tostring(paths):match("0x(%x+)"), 16) % 1000000)
  turn = math.random(#paths)
end

function request()
  turn = turn % #paths + 1
  return wrk.format("GET", paths[turn])
end

function delay()
  return pause * (0.5 + math.random())
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "seconds": %f, "median": %f, "p95": %f, "p99": %f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def load_bench(
    store_url: str, *, readers: int = 200, seconds: float = 20.0, pause: float = 1.0, processes: int = 2
) -> list[Measurement]:
    """Serve a store and have many readers ask for lists and searches at once.

    Every search of a round differs from the others, so that it is made and not found among those just made.

    Args:
        store_url: Where the papers are.
        readers: How many readers there are at once, each with a connection of its own.
        seconds: How long they read, for each kind of page.
        pause: Seconds that a reader looks at a page, on average, before asking for the next; 0 for as fast as it goes.
        processes: How many server processes there are.

    Returns:
        For each kind of page: requests a second, median, 95th and 99th percentile of the time to an answer in ms, and
        errors: answers that are none and those of status 400 and above.

    Raises:
        UsageError: wrk is not installed.
        PaperworksError: The server does not start.
    """
    recorded = []
    with served(store_url, processes=processes) as server:
        for kind, paths in (("list", _lists()), ("search", _searches())):
            read(server.url, paths, readers=readers, seconds=2, pause=pause)
            told = read(server.url, paths, readers=readers, seconds=seconds, pause=pause)
            recorded += [
                Measurement("requests", told["requests"] / told["seconds"], "1/s", "higher", kind),
                Measurement("median", told["median"], "ms", "lower", kind),
                Measurement("95th percentile", told["p95"], "ms", "lower", kind),
                Measurement("99th percentile", told["p99"], "ms", "lower", kind),
                Measurement("errors", told["errors"], "", "lower", kind),
            ]
    return recorded


def read(url: str, paths: Sequence[str], *, readers: int, seconds: float, pause: float) -> dict[str, float]:
    """Have readers ask for paths, one after another.

    Returns:
        How many requests were answered, in how many seconds, the median and percentiles in ms, and how many errors
        there were.

    Raises:
        UsageError: wrk is not installed.
        PaperworksError: wrk could not reach the server.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise UsageError("load is made by wrk: apt-get install wrk")
    with TemporaryDirectory() as folder:
        script, listed = Path(folder) / "readers.lua", Path(folder) / "paths"
        script.write_text(_READERS)
        listed.write_text("\n".join(paths))
        threads = str(min(2, readers))
        command = [
            wrk,
            "-t",
            threads,
            "-c",
            str(readers),
            "-d",
            f"{seconds:.0f}s",
            "--timeout",
            "30s",
            "-s",
            str(script),
        ]
        ran = subprocess.run([*command, url, "--", str(listed), str(1000 * pause)], capture_output=True, text=True)
    if ran.returncode:
        raise PaperworksError(f"wrk failed: {(ran.stderr or ran.stdout).strip()[:300]}")
    told: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return told


@dataclass(frozen=True)
class Server:
    """A page served by processes of its own, and its store."""

    url: str
    store_url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(store_url: str, **settings: Any) -> Iterator[Server]:
    """A server over a store; it answers from the beginning of the block to its end.

    Args:
        store_url: Where the papers are.
        settings: As for `paperworks.page.app.serve`.

    Raises:
        PaperworksError: It does not start.
    """
    port = free_port()
    told = json.dumps({"store_url": store_url, "port": port, **settings})
    code = "import json, sys; from paperworks.page.app import serve; serve(**json.loads(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, told], start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", store_url, process)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: Server) -> None:
    deadline = time.monotonic() + 120
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{server.url}/healthz"):
                return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    raise PaperworksError(f"the server at {server.url} did not start")


def _lists() -> list[str]:
    return ["/", "/new", "/?period=month", "/new?page=2", "/rooms/decoding"]


def _searches() -> list[str]:
    """Two neighbouring words of each card's summary at a time."""
    pairs = {" ".join(pair) for card in load_cards().values() for pair in pairwise(words_of(card.summary))}
    return [f"/search?{urlencode({'q': pair})}" for pair in sorted(pairs)]
