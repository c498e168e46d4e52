"""Behind a proxy: the examples of docs/deploying.md as they stand, what is believed of a proxy, and cookies that work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from paperworks import cli
from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.lab.run import Log, Run
from paperworks.page import app as page_app
from paperworks.page.app import create_app, serve
from paperworks.page.load import free_port
from paperworks.page.safety import networks
from paperworks.page.work import end
from tests.page.serving import Reader, serving, sqlite
from tests.page.test_web import PASSWORD, logged_in, send

DOCS = Path(__file__).parents[2] / "docs" / "deploying.md"
NAME = "papers.example.org"


def made(folder, base_url, **settings):
    app = create_app(sqlite(folder), meaning=False, base_url=base_url, **{"rates": {}, **settings})

    # Who a request is counted for, as the page sees it.
    @app.get("/seen")
    def seen(request: Request) -> dict[str, str]:
        return {"client": request.client.host if request.client else "", "scheme": request.url.scheme}

    return app


@pytest.mark.parametrize(
    ("base_url", "secure"),
    [
        ("http://papers.lan:8000", False),
        ("http://192.168.1.5:8000", False),
        ("http://127.0.0.1:8000", False),
        ("http://localhost:8000", False),
        ("https://papers.example.org", True),
        ("https://localhost:8443", True),
    ],
)
def test_cookies_are_secure_where_the_address_is_and_every_form_works(tmp_path, base_url, secure):
    """A client that keeps cookies as browsers do: those that are secure are dropped at plain HTTP."""
    client = TestClient(made(tmp_path, base_url), base_url=base_url)
    named = client.get("/login").headers["set-cookie"]
    assert ("secure" in named.lower().split("; ")) is secure
    assert logged_in(client).get("/account.json").status_code == 200
    assert send(client, "/papers/hydra/vote").status_code == 303
    assert client.get("/papers/hydra.json").json()["votes"] == 1
    assert send(client, "/logout").status_code == 303 and "Log in" in client.get("/").text


def test_cookies_are_secure_where_a_trusted_proxy_says_that_the_browser_came_by_https(tmp_path):
    app = made(tmp_path, "http://papers.lan:8000", proxies="192.0.2.1")
    for peer, secure in (("192.0.2.1", True), ("192.0.2.2", False)):
        client = TestClient(app, base_url="http://papers.lan:8000", client=(peer, 1))
        cookie = client.get("/login", headers={"X-Forwarded-Proto": "https"}).headers["set-cookie"]
        assert ("secure" in cookie.lower()) is secure, peer


def test_a_form_without_cookies_is_told_by_which_address_to_come(tmp_path):
    client = TestClient(made(tmp_path, "https://papers.example.org"), base_url="http://papers.example.org")
    # At plain HTTP the cookie of an HTTPS address is dropped, as browsers do.
    refused = send(client, "/subscribe", email="ada@example.org")
    assert (
        refused.status_code == 403 and "load its page anew at https://papers.example.org, with cookies" in refused.text
    )


FORWARDED = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "client"),
    [
        # Nobody is believed who is not named, not even this machine.
        (None, "127.0.0.1", "203.0.113.9", "127.0.0.1"),
        ("", "127.0.0.1", "203.0.113.9", "127.0.0.1"),
        ("10.0.0.1", "127.0.0.1", "203.0.113.9", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.7", "203.0.113.9", "198.51.100.7"),
        ("127.0.0.1", "127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.0/8, ::1", "10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.0/8, ::1", "::1", "2001:db8::7", "2001:db8::7"),
        # What a reader has put there himself stands before what the proxy saw.
        ("127.0.0.1", "127.0.0.1", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "127.0.0.1", "6.6.6.6, 127.0.0.1, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.1, 10.0.0.2", "127.0.0.1", "6.6.6.6, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
    ],
)
def test_an_address_is_taken_from_those_proxies_that_are_named(tmp_path, monkeypatch, proxies, peer, forwarded, client):
    monkeypatch.delenv("PAPERWORKS_PROXIES", raising=False)
    app = made(tmp_path, "http://127.0.0.1", proxies=proxies)
    asking = TestClient(app, base_url="http://127.0.0.1", client=(peer, 1))
    told = asking.get("/seen", headers={"X-Forwarded-For": forwarded, "X-Forwarded-Proto": "https"}).json()
    assert told == {"client": client, "scheme": "https" if client != peer else "http"}


def test_limits_hold_whatever_address_a_stranger_claims(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_PROXIES", raising=False)
    app = made(tmp_path, "http://127.0.0.1", rates={"/login": 2})
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    told = [client.post("/login", headers={"X-Forwarded-For": f"203.0.113.{n}"}).status_code for n in range(4)]
    assert told[2:] == [429, 429]


def test_the_environment_names_proxies_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_PROXIES", "127.0.0.1")
    app = made(tmp_path, "http://127.0.0.1")
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    assert client.get("/seen", headers=FORWARDED).json() == {"client": "203.0.113.9", "scheme": "https"}


@pytest.mark.parametrize("wrong", ["*", "proxy.example.org", "127.0.0.1 10.0.0.1", "0.0.0.0/0", "::/0", "10.0.0.0/40"])
def test_a_proxy_is_an_address_or_a_network_and_never_everybody(tmp_path, monkeypatch, capsys, wrong):
    with pytest.raises(UsageError, match=r"a proxy to be trusted is an address or a network such as 127\.0\.0\.1"):
        networks(wrong)
    monkeypatch.setattr("sys.argv", ["paperworks", "serve", "--proxies", wrong])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "a proxy to be trusted is" in capsys.readouterr().err


def test_uvicorn_believes_nobody_by_itself(monkeypatch):
    import uvicorn

    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: told.update(settings))
    monkeypatch.setenv(page_app._SETTINGS, "")
    monkeypatch.setenv("PAPERWORKS_SECRET", "s")
    serve(host="::1", proxies="10.0.0.0/8")
    assert told["proxy_headers"] is False
    assert '"base_url": "http://[::1]:8000"' in page_app.os.environ[page_app._SETTINGS]


@pytest.mark.parametrize(
    "wrong", ["https://example.org/papers", "https://example.org/?x=1", "https://example.org:port"]
)
def test_the_page_lives_at_the_root_of_an_address(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"lives at the root of its address|address is such as"):
        create_app(sqlite(tmp_path), base_url=wrong)


# The proxies themselves.


def example(kind: str) -> str:
    """The configuration that docs/deploying.md gives."""
    found = re.search(rf"```{kind}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None, f"docs/deploying.md has no example for {kind}"
    return found[1]


def certificate(folder: Path) -> tuple[Path, Path]:
    files = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={NAME}", "-addext",
         f"subjectAltName=DNS:{NAME}", "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def replaced(text: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        assert old in text, f"the example has no {old!r} any more"
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, behind: str) -> list[str]:
    public, private = certificate(folder)
    server = replaced(
        example("nginx"),
        {
            "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "/etc/letsencrypt/live/papers.example.org/fullchain.pem": str(public),
            "/etc/letsencrypt/live/papers.example.org/privkey.pem": str(private),
            "http://127.0.0.1:8000": behind,
        },
    )
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;\n"
        f"events {{ worker_connections 64; }}\nhttp {{ access_log off; {temporary}\n{server}\n}}\n"
    )
    return ["nginx", "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)]


def caddy(folder: Path, port: int, behind: str) -> list[str]:
    public, private = certificate(folder)
    server = replaced(
        example("caddy"),
        {
            f"{NAME} {{": f"https://{NAME}:{port} {{\n\tbind 127.0.0.1\n\ttls {public} {private}",
            "127.0.0.1:8000": urlsplit(behind).netloc,
        },
    )
    config = folder / "Caddyfile"
    # No ports but this one.
    config.write_text(f"{{\n\tadmin off\n\tauto_https off\n\tstorage file_system {folder}\n}}\n{server}")
    return ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"]


PROXIES = {"nginx": nginx, "caddy": caddy}


@contextmanager
def proxied(kind: str, folder: Path, behind: str):
    """The proxy of an example on a port of its own, before a server; its address."""
    if shutil.which(kind) is None or shutil.which("openssl") is None:
        pytest.skip(f"{kind} or openssl is not installed")
    port = free_port()
    command = PROXIES[kind](folder, port, behind)
    # Whatever it keeps is kept here.
    home = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    with (folder / "told").open("w") as told:
        process = subprocess.Popen(command, cwd=folder, stdout=told, stderr=told, env=home)
    try:
        url, deadline = f"https://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "told").read_text()
            try:
                with reader(url) as first:
                    first.get("/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def reader(url: str) -> Reader:
    """A browser that has looked the page's name up and found the proxy."""

    def named(request: httpx.Request) -> None:
        request.headers["host"] = NAME
        request.extensions["sni_hostname"] = NAME

    return Reader(base_url=url, verify=False, timeout=30, event_hooks={"request": [named]})


@pytest.mark.parametrize("kind", PROXIES)
def test_the_page_works_behind_the_proxies_of_the_examples(tmp_path, kind):
    url = sqlite(tmp_path)
    settings = {"base_url": f"https://{NAME}", "proxies": "127.0.0.1", "allow_runs": True}
    with (
        Store(url) as store,
        serving(url, **settings) as server,
        proxied(kind, tmp_path, server.url) as address,
        reader(address) as ada,
    ):
        # Forms, whose cookies only HTTPS brings back.
        answer = ada.get("/login")
        cookie = answer.headers["set-cookie"].lower()
        assert "; secure" in cookie and "httponly" in cookie
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        answer = ada.send_form("/register", "/register", email="ada@example.org", password=PASSWORD)
        assert answer.status_code == 303 and "; secure" in answer.headers["set-cookie"].lower()
        origin = {"Origin": f"https://{NAME}"}
        voted = ada.post("/papers/hydra/vote", data={"csrf": ada.token()}, headers=origin)
        assert voted.status_code == 303 and ada.get("/papers/hydra.json").json()["votes"] == 1
        forged = ada.post("/papers/hydra/vote", data={"csrf": ada.token()}, headers={"Origin": "https://evil.example"})
        assert forged.status_code == 403
        assert ada.post("/subscribe", data={"csrf": "x" * 70_000}).status_code == 413

        # The proxy's word on addresses is taken, not that of readers, who would be another each time.
        told = [ada.post("/login", headers={"X-Forwarded-For": f"198.51.100.{n}"}).status_code for n in range(12)]
        assert told[-1] == 429 and 403 in told

        # Events come one by one, as they happen.
        run = Run("hydra", recorder=store)
        store.begin(run)
        came: list[tuple[float, str]] = []

        def watch() -> None:
            with reader(address) as watcher, watcher.stream("GET", f"/runs/{run.id}/events") as events:
                assert events.headers["content-type"].startswith("text/event-stream")
                for line in events.iter_lines():
                    if line.startswith("event:") or "marked" in line:
                        came.append((time.monotonic(), line))

        watching = threading.Thread(target=watch)
        watching.start()
        for mark in ("marked one", "marked two"):
            until(lambda: came)
            came.clear()
            store.add(run.id, Log(mark, time.time()))
            until(lambda mark=mark: any(mark in line for _, line in came))
        end(store, run.id, "finished", "")
        watching.join(30)
        assert not watching.is_alive() and came[-1][1] == "event: end"


def until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
