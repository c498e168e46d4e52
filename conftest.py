"""What every test, and every example in the sources, has to itself: its random state and its folders."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Generator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Also where no test has imported it yet: a test alone draws what it draws among others.
torch: Any = import_module("torch") if find_spec("torch") else None

_VARIABLE = "PAPERWORKS_TEST_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that decide what is drawn, and in which order tests run."""
    group = parser.getgroup("paperworks")
    group.addoption(
        "--test-seed",
        type=int,
        default=os.environ.get(_VARIABLE, "0"),
        help=f"Each test's random state comes from this and its name; {_VARIABLE} or 0 by default.",
    )
    group.addoption(
        "--shuffle", type=int, metavar="SEED", help="Run the files, and the tests of each, in random order."
    )


def pytest_report_header(config: pytest.Config) -> str:
    """What is needed to draw the same again."""
    return _repeated_by(config)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say it beside failures too: with -q there is no header."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_repeated_by(config))


def _repeated_by(config: pytest.Config) -> str:
    shuffled = config.getoption("--shuffle")
    order = "" if shuffled is None else f" --shuffle {shuffled}"
    return f"random state: {_VARIABLE}={config.getoption('--test-seed')}{order}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle the tests where that is asked for; those of a file stay together, for they share what is dear to make."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    chance = random.Random(seed)
    place = {path: chance.random() for path in sorted({item.path for item in items})}
    order = {item.nodeid: chance.random() for item in items}
    items.sort(key=lambda item: (place[item.path], order[item.nodeid]))


@pytest.fixture(autouse=True)
def own_random_state(request: pytest.FixtureRequest) -> None:
    """What a test draws without a generator of its own hangs on its name alone, not on the tests before it."""
    _seed(request.config, request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """What several tests share hangs on its own name, not on the test that happens to be the first to ask for it."""
    if fixturedef.scope == "function":
        return (yield)
    before, before_numpy, before_torch = random.getstate(), np.random.get_state(), torch and torch.get_rng_state()
    _seed(request.config, f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param_index', 0)}")
    try:
        return (yield)
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
        if torch:
            torch.set_rng_state(before_torch)


def _seed(config: pytest.Config, name: str) -> None:
    seed = zlib.crc32(f"{config.getoption('--test-seed')} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)
    if torch:
        torch.manual_seed(seed)


@pytest.fixture(autouse=True, scope="session")
def shared_folders(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """What several tests share runs before any of them has folders of its own, and not in the user's."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERWORKS_STORE", f"sqlite:///{folder}/runs.db")
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        yield


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store and the user's data folder lie in the test's own folder."""
    monkeypatch.setenv("PAPERWORKS_STORE", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if costs := sys.modules.get("paperworks.decoding.costs"):
        # What passes cost is measured by the test that asks; models that are dear to convert stay in the user's own cache.
        monkeypatch.setattr(costs, "user_cache_path", lambda name: tmp_path / "cache" / name)
