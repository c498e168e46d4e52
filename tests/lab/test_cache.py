"""Cached folders: built once, checked, rebuilt when stale or corrupt, and never taken from who reads them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from paperworks.lab import cache as module
from paperworks.lab.cache import cached_folder, folders_used, pack


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


def test_who_builds_second_discards_its_own(tmp_path):
    handed_out = []

    def second(folder: Path) -> None:
        # Meanwhile another builds the same and hands it out.
        handed_out.append(cached_folder("things", {"a": 1}, Builder()))
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("made by the second")

    folder = cached_folder("things", {"a": 1}, second)
    assert [folder] == handed_out
    assert (folder / "deep" / "file").read_text() == "made 1"
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_who_builds_second_in_place_of_a_damaged_folder_discards_its_own(tmp_path):
    damaged = cached_folder("things", {"a": 1}, Builder())
    (damaged / "manifest.json").unlink()

    def second(folder: Path) -> None:
        cached_folder("things", {"a": 1}, Builder())
        (folder / "late").write_text("")

    folder = cached_folder("things", {"a": 1}, second)
    assert (folder / "deep" / "file").read_text() == "made 1" and not (folder / "late").exists()


def test_a_damaged_folder_is_moved_aside_and_removed_after_a_week(tmp_path):
    build = Builder()
    folder = cached_folder("things", {"a": 1}, build)
    (folder / "deep" / "file").write_text("MADE 1")
    with (folder / "deep" / "file").open() as reader:
        assert cached_folder("things", {"a": 1}, build) == folder
        assert reader.read() == "MADE 1"
    [aside] = folder.parent.glob("damaged-*/*")
    assert (aside / "deep" / "file").read_text() == "MADE 1" and (folder / "deep" / "file").read_text() == "made 2"
    cached_folder("things", {"a": 2}, build)
    assert aside.exists()
    then = time.time() - 8 * 86_400
    os.utime(aside.parent, (then, then))
    cached_folder("things", {"a": 3}, build)
    assert not aside.parent.exists()


def _build_and_read(cache: str, number: int, ready: object, told: object) -> None:
    os.environ["XDG_CACHE_HOME"] = cache

    def build(folder: Path) -> None:
        (folder / "builder").write_text(str(number))
        # Each has seen that there is none, or that it is damaged, before any has put its own there.
        ready.wait()

    folder = cached_folder("things", {"a": 1}, build)
    with (folder / "builder").open() as file:
        told.put((os.fstat(file.fileno()).st_ino, file.read()))


@pytest.mark.parametrize("damaged", [False, True])
def test_of_processes_that_build_at_once_all_hand_out_the_same_folder(tmp_path, damaged):
    if damaged:
        folder = cached_folder("things", {"a": 1}, Builder())
        (folder / "deep" / "file").write_text("MADE 1")
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(4), context.Queue()
    builders = [
        context.Process(target=_build_and_read, args=(str(tmp_path), number, ready, told)) for number in range(4)
    ]
    for builder in builders:
        builder.start()
    read = {told.get(timeout=120) for _ in builders}
    for builder in builders:
        builder.join()
    assert len(read) == 1
    assert len(list((tmp_path / "paperworks" / "things").glob("damaged-*"))) == damaged


def test_nobody_looks_while_another_puts_a_folder_in_place_of_a_damaged_one(tmp_path, monkeypatch):
    folder = cached_folder("things", {"a": 1}, Builder())
    (folder / "manifest.json").unlink()
    both, intact = threading.Barrier(2), module._intact

    def looked(place: Path, text: str) -> bool:
        found = intact(place, text)
        # Where both could look before either has put its own there, the later would take the other's for the damaged one.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(2)
        return found

    fresh = [folder.parent / name for name in ("building-1", "building-2")]
    for place in fresh:
        place.mkdir()
        (place / "manifest.json").write_text(json.dumps({"key": "{}", "files": {}}))
    monkeypatch.setattr(module, "_intact", looked)
    threads = [threading.Thread(target=module._put, args=(place, folder, "{}")) for place in fresh]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.parent.glob("damaged-*/*"))) == 1
    assert [place.exists() for place in fresh].count(True) == 1


def test_what_a_killed_build_left_is_removed_after_a_week(tmp_path):
    for name, age in (("building-old", 8 * 86_400), ("building-now", 6 * 86_400)):
        (tmp_path / "paperworks" / "things" / name).mkdir(parents=True)
        then = time.time() - age
        os.utime(tmp_path / "paperworks" / "things" / name, (then, then))
    cached_folder("things", {"a": 1}, Builder())
    left = {folder.name for folder in (tmp_path / "paperworks" / "things").glob("building-*")}
    assert left == {"building-now"}


def test_what_was_used_is_packed_and_found_again_elsewhere(tmp_path, monkeypatch):
    build = Builder()
    cached_folder("things", {"a": 0}, build)
    with folders_used() as used:
        first = cached_folder("things", {"a": 1}, build)
        cached_folder("things", {"a": 1}, build)
    assert used == [first]
    assert pack(used, tmp_path / "parts", most=10_000) == {first: True}
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / "elsewhere")
    monkeypatch.setenv("PAPERWORKS_PARTS", str(tmp_path / "parts"))
    assert cached_folder("things", {"a": 1}, build) == tmp_path / "parts" / "things" / first.name
    assert build.calls == 2
    # What was damaged on the way is built anew, and what was brought is left alone.
    (tmp_path / "parts" / "things" / first.name / "deep" / "file").write_text("damaged")
    again = cached_folder("things", {"a": 1}, build)
    assert again.is_relative_to(tmp_path / "elsewhere") and build.calls == 3


def test_parts_are_packed_in_order_as_long_as_they_have_room(tmp_path):
    folders = []
    for name, size in (("a", 40), ("b", 70), ("c", 60), ("d", 1)):
        folder = tmp_path / "things" / name
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_bytes(b"x" * size)
        folders.append(folder)
    packed = pack(folders, tmp_path / "parts", most=100)
    assert list(packed) == folders and list(packed.values()) == [True, False, True, False]
    assert sorted(path.name for path in (tmp_path / "parts" / "things").iterdir()) == ["a", "c"]
    assert len((tmp_path / "parts" / "things" / "c" / "deep" / "file").read_bytes()) == 60
