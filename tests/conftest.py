"""What every room's tests share: an empty registry, and databases to test against."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks of these tests."""
    config.addinivalue_line("markers", "ray: starts Ray on this machine")
    # A shell has what it runs in the background ignore interruptions, nohup the end of the terminal; the tests make some.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """An empty registry of recipes, so that a test may define one for any paper."""
    from importlib import import_module

    module = import_module("paperworks.lab.recipe")
    module.recipes()
    empty: dict[str, object] = {}
    monkeypatch.setattr(module, "_registry", empty)
    return empty


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server of our own; a test that asks for it is skipped where none can be started."""
    programs = _postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: no initdb and pg_ctl in PATH or /usr/lib/postgresql")
    with tempfile.TemporaryDirectory(prefix="paperworks-pg-") as home:
        as_user: list[str] = []
        if os.geteuid() == 0:
            # The server refuses to run as root.
            shutil.chown(home, "postgres")
            as_user = ["runuser", "-u", "postgres", "--"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data = f"{home}/data"
        control = [*as_user, str(programs / "pg_ctl"), "-D", data, "-w"]
        make = [
            *as_user,
            str(programs / "initdb"),
            "-D",
            data,
            "-U",
            "paperworks",
            "-A",
            "trust",
            "--no-sync",
        ]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=home)
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
        started = [*control, "-o", options, "-l", f"{home}/log", "start"]
        subprocess.run(started, check=True, stdout=subprocess.DEVNULL, cwd=home)
        try:
            yield f"postgresql+psycopg://paperworks@127.0.0.1:{port}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, cwd=home)


def _postgresql_programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty store, in SQLite and in PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store/runs.db"
        return
    from sqlalchemy import create_engine

    server = request.getfixturevalue("postgresql")
    name = f"test_{os.getpid()}_{abs(hash(request.node.nodeid))}"
    engine = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield f"{server}/{name}"
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()
