"""Cached folders: built once, checked, rebuilt when stale or corrupt."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from paperworks.lab.cache import cached_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(f"made {self.calls}")


def test_second_call_reuses_what_the_first_built():
    build = Builder()
    first = cached_folder("things", {"a": 1}, build)
    assert cached_folder("things", {"a": 1}, build) == first
    assert build.calls == 1


def test_another_key_builds_another_folder():
    build = Builder()
    assert cached_folder("things", {"a": 1}, build) != cached_folder("things", {"a": 2}, build)
    assert build.calls == 2


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest", "no manifest", "stale key"])
def test_damaged_folder_is_rebuilt(damage):
    build = Builder()
    folder = cached_folder("things", {"a": 1}, build)
    file, manifest = folder / "deep" / "file", folder / "manifest.json"
    match damage:
        case "change":
            file.write_text("MADE 1")
        case "remove":
            file.unlink()
        case "add":
            (folder / "more").write_text("")
        case "manifest":
            manifest.write_text("{")
        case "no manifest":
            manifest.unlink()
        case "stale key":
            manifest.write_text(manifest.read_text().replace("1}", "2}"))
    assert (cached_folder("things", {"a": 1}, build) / "deep" / "file").read_text() == "made 2"


def test_failed_build_leaves_nothing_behind(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        cached_folder("things", {"a": 1}, fail)
    assert not list((tmp_path / "paperworks" / "things").iterdir())


def test_what_a_killed_build_left_is_removed_after_a_day(tmp_path):
    for name, age in (("building-old", 2 * 86_400), ("building-now", 60)):
        (tmp_path / "paperworks" / "things" / name).mkdir(parents=True)
        then = time.time() - age
        os.utime(tmp_path / "paperworks" / "things" / name, (then, then))
    cached_folder("things", {"a": 1}, Builder())
    left = {folder.name for folder in (tmp_path / "paperworks" / "things").glob("building-*")}
    assert left == {"building-now"}
