"""Folders of expensive results, kept between runs, checked before use and rebuilt when they do not check."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

_MANIFEST = "manifest.json"
_ABANDONED = 7 * 86_400


def cached_folder(kind: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """A folder that `build` filled for `key`, now or on an earlier run.

    The folder carries a manifest with its key and the SHA-256 of every file. Where the manifest is missing, belongs to
    another key or does not match the files, the folder is built anew; it appears under its name only once complete.
    A folder that is intact is never replaced, for somebody may be reading it: where two build the same at once, the
    later one's is discarded. One that is damaged is moved aside, and removed a week later.

    Args:
        kind: First level of the cache, such as "drafters".
        key: All that the result depends on, as JSON values.
        build: Fills the empty folder that it is given.

    Returns:
        The folder's path.

    Example:
        >>> import os, tempfile
        >>> from unittest import mock
        >>> with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, XDG_CACHE_HOME=home):
        ...     folder = cached_folder("greetings", {"name": "Ada"}, lambda path: (path / "hello").write_text("hi"))
        ...     print((folder / "hello").read_text())
        hi
    """
    text = json.dumps(key, sort_keys=True)
    parent = user_cache_path("paperworks") / kind
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:24]
    brought = [Path(root) / kind / folder.name for root in os.environ.get(BROUGHT, "").split(os.pathsep) if root]
    for there in (folder, *brought):
        if _intact(there, text):
            return _noted(there)
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent)
    fresh = Path(tempfile.mkdtemp(prefix="building-", dir=parent))
    try:
        build(fresh)
        (fresh / _MANIFEST).write_text(json.dumps({"key": text, "files": _digests(fresh)}, indent=1))
        _put(fresh, folder, text)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return _noted(folder)


BROUGHT = "PAPERWORKS_PARTS"
"""Environment variable: folders in which results of the cache were brought along, as `pack` leaves them."""

_used: ContextVar[list[Path] | None] = ContextVar("used", default=None)


@contextmanager
def folders_used() -> Iterator[list[Path]]:
    """Collects which folders of the cache are handed out, each once.

    Example:
        >>> with folders_used() as used:
        ...     pass
        >>> used
        []
    """
    used: list[Path] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def _noted(folder: Path) -> Path:
    used = _used.get()
    if used is not None and folder not in used:
        used.append(folder)
    return folder


def pack(folders: Iterable[Path], into: Path, *, most: int) -> dict[Path, bool]:
    """Copy folders of the cache to where another machine can take them along: the first that have room together.

    Args:
        folders: The folders, as `folders_used` collects them.
        into: Where they go; a run finds them there by the environment variable PAPERWORKS_PARTS.
        most: How many bytes they may have in all.

    Returns:
        Of each folder whether it was copied.
    """
    room, packed = most, {}
    for folder in folders:
        size = size_of(folder)
        packed[folder] = size <= room
        if packed[folder]:
            room -= size
            shutil.copytree(folder, into / folder.parent.name / folder.name, dirs_exist_ok=True)
    return packed


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _put(fresh: Path, folder: Path, text: str) -> None:
    """Give what was built its name, unless what bears it is intact by now."""
    # One at a time: else what another has just put there could be taken for the damaged folder seen before.
    locks = folder.parent.parent / "locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{folder.parent.name}-{folder.name}"):
        if _intact(folder, text):
            return
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=folder.parent))
            folder.rename(aside / folder.name)
        fresh.rename(folder)


def _clear_abandoned(parent: Path) -> None:
    """Remove what is damaged and what killed processes left half built; nothing is built for a whole week."""
    for folder in (*parent.glob("building-*"), *parent.glob("damaged-*")):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _intact(folder: Path, text: str) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest["key"] == text and manifest["files"] == _digests(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False
