"""A Hugging Face Hub of the test's own: the real client speaks with it over HTTP and keeps its real cache."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the Hub holds, and what it was asked for.

    Attributes:
        files: contents by repository ("models/owner/name", "datasets/owner/name") and path.
        cache: the folder of the client's cache.
        fetched: paths whose contents were sent, in order.
        asked: repositories and commits whose lists of files were sent.
        damage: path -> contents to send for it, under the checksum of what `files` holds.
        answers: whether it answers; where not, all is refused with 503.
    """

    cache: Path
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    damage: dict[str, bytes] = field(default_factory=dict)
    answers: bool = True

    def cached(self, name: str) -> Path:
        """The link in the cache's snapshot under which a file lies."""
        (found,) = self.cache.glob(f"*/snapshots/{'?' * 40}/{name}")
        return found


def is_large(name: str) -> bool:
    """Whether the Hub stores a file by its SHA-256, as it does what Git LFS holds; others have git's name."""
    return name.endswith((".safetensors", ".parquet"))


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, body: bool) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            if not hub.answers:
                return self.send(503, b"closed", body)
            if parts[0] == "api":
                repository, rest = "/".join(parts[1:4]), parts[4:]
            else:
                kind = parts.pop(0) if parts[0] == "datasets" else "models"
                repository, rest = f"{kind}/{parts[0]}/{parts[1]}", parts[2:]
            files = hub.files.get(repository)
            if files is None:
                return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            if rest[:1] == ["resolve"]:
                return self.send_file(files, rest[1], "/".join(rest[2:]), body)
            if rest[:1] == ["tree"]:
                hub.asked.append((repository, rest[1]))
                listed = [self.entry(name, content) for name, content in sorted(files.items())]
                return self.send_json(listed, body)
            commit = rest[1] if rest[1:] and len(rest[1]) == 40 else COMMIT
            owner = repository.partition("/")[2]
            self.send_json({"id": owner, "sha": commit, "siblings": [{"rfilename": name} for name in files]}, body)

        def entry(self, name: str, content: bytes) -> dict[str, object]:
            found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git_name(content)}
            if is_large(name):
                sha = hashlib.sha256(content).hexdigest()
                found["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            return found

        def send_file(self, files: dict[str, bytes], commit: str, name: str, body: bool) -> None:
            if name not in files:
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            content = files[name]
            etag = hashlib.sha256(content).hexdigest() if is_large(name) else git_name(content)
            if body:
                hub.fetched.append(name)
            self.send(200, hub.damage.get(name, content), body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        def send_json(self, value: object, body: bool) -> None:
            self.send(200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that the client meets, and its empty cache."""
    client = pytest.importorskip("huggingface_hub")
    place = Hub(tmp_path / "hf")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(place))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)
    constants = "huggingface_hub.constants"
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(place.cache))
    client.close_session()  # its proxies were read from the environment before
    yield place
    client.close_session()
    server.shutdown()
    server.server_close()
