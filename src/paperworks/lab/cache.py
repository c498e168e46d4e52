"""Folders of expensive results, kept between runs, checked before use and rebuilt when they do not check."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

_MANIFEST = "manifest.json"


def cached_folder(kind: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """A folder that `build` filled for `key`, now or on an earlier run.

    The folder carries a manifest with its key and the SHA-256 of every file. Where the manifest is missing, belongs to
    another key or does not match the files, the folder is built anew; it appears under its name only once complete.

    Args:
        kind: First level of the cache, such as "drafters".
        key: All that the result depends on, as JSON values.
        build: Fills the empty folder that it is given.

    Returns:
        The folder's path.

    Example:
        >>> import tempfile, os
        >>> os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
        >>> folder = cached_folder("greetings", {"name": "Ada"}, lambda path: (path / "hello").write_text("hi"))
        >>> (folder / "hello").read_text()
        'hi'
    """
    text = json.dumps(key, sort_keys=True)
    parent = user_cache_path("paperworks") / kind
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:24]
    if _intact(folder, text):
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent)
    fresh = Path(tempfile.mkdtemp(prefix="building-", dir=parent))
    try:
        build(fresh)
        (fresh / _MANIFEST).write_text(json.dumps({"key": text, "files": _digests(fresh)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fresh.rename(folder)
        except OSError:
            # Another process finished the same folder first; its copy is as good.
            if not _intact(folder, text):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _clear_abandoned(parent: Path) -> None:
    """Remove what killed processes left half built; nothing is built for a whole day."""
    for folder in parent.glob("building-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 86_400:
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
