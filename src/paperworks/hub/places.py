"""Where the hub looks: the user's folder of data, installed packages, and the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paperworks.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Long enough for a slow line, short enough that nobody waits a minute to learn that there is none.
_ANSWER_WITHIN = 5.0


@dataclass(frozen=True)
class Entry:
    """A model or data set that the hub knows by name.

    Attributes:
        name: what `load_model` or `load_dataset` is given.
        origin: where it comes from, in words.
        available: whether it is certainly here; what is not may have to be fetched.
    """

    name: str
    origin: str
    available: bool


def data_root() -> Path | None:
    """The folder that `PAPERWORKS_DATA` names, or None.

    Raises:
        UsageError: the variable names something that is not a folder.
    """
    given = os.environ.get("PAPERWORKS_DATA")
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UsageError(f"PAPERWORKS_DATA is {given!r}, which is not a folder; set it to one or unset it.")
    return folder


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without running any of its code; None where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str) -> UsageError:
    """The error for a name that the hub does not know, with the names that come close.

    Example:
        >>> print(unknown("data set", "gsm8", ["gsm8k", "iris"], "a path"))
        Unknown data set 'gsm8': did you mean 'gsm8k'? Otherwise give a path.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(names)}."
    return UsageError(f"Unknown {kind} {name!r}: {hint} Otherwise give {otherwise}.")


def from_hugging_face(
    repository: str,
    patterns: Sequence[str],
    *,
    kind: str = "model",
    revision: str | None = None,
    cure: str,
) -> Path:
    """Folder with the files of a Hugging Face repository, downloaded unless its cache holds them.

    Each file is compared once with the hash that the Hub announced, and fetched again where it differs; until its
    size or its times change, that is remembered.

    Args:
        repository: "owner/name".
        patterns: which files are wanted, as shell patterns.
        kind: "model" or "dataset".
        revision: branch, tag or commit; None is the newest.
        cure: what else the user can do, as the end of a sentence that begins with "or".

    Raises:
        UsageError: the package is missing, nothing answers, there is no such repository, or a file is damaged and
            no better one can be had.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise UsageError(
            f"{repository!r} lies on the Hugging Face Hub: pip install 'paperworks[llm]', or {cure}."
        ) from error
    try:
        answers = _answers(HfApi(), repository, kind, revision)
        folder = Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                etag_timeout=_ANSWER_WITHIN,
                local_files_only=not answers,
            )
        )
        damaged = [name for name in _wanted(folder, patterns) if not _undamaged(folder / name)]
        if damaged and answers:
            snapshot_download(
                repository,
                repo_type=kind,
                revision=folder.name,
                allow_patterns=[glob.escape(name) for name in damaged],
                etag_timeout=_ANSWER_WITHIN,
                force_download=True,
            )
            damaged = [name for name in damaged if not _undamaged(folder / name)]
    except GatedRepoError as error:
        raise UsageError(
            f"{repository!r} asks for consent: accept its terms on the Hub and set HF_TOKEN, or {cure}."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"The Hugging Face Hub has no {kind} {repository!r} that you may read: check the name "
            f"(private ones need HF_TOKEN), or {cure}."
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repository, cure) from error
    except OSError as error:
        raise UsageError(f"{repository!r} could not be fetched ({error}): try again, or {cure}.") from error
    # Without a network, a folder that another call left in the cache is given, whatever it holds.
    if not _wanted(folder, patterns):
        if not answers:
            raise _unreachable(repository, cure)
        raise UsageError(f"{repository!r} on the Hugging Face Hub holds no file {' or '.join(patterns)}: {cure}.")
    if damaged:
        why = "the Hub gave it so again" if answers else "the Hub does not answer"
        cure = cure if answers else f"connect to a network (and unset HF_HUB_OFFLINE), or {cure}"
        raise UsageError(
            f"{', '.join(damaged)} of {repository!r} is damaged in the Hugging Face cache (another checksum than the "
            f"Hub announced), and {why}: {cure}."
        )
    return folder


def _wanted(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names, within a snapshot, of the files that the patterns mean, which huggingface_hub reads so too."""
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _answers(api: HfApi, repository: str, kind: str, revision: str | None) -> bool:
    """Whether the Hub answers, asked once: a download would try for half a minute before it gives up."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        api.repo_info(repository, repo_type=kind, revision=revision, timeout=_ANSWER_WITHIN)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception:  # its HTTP library's, which changes from version to version
        return False
    return True


def _unreachable(repository: str, cure: str) -> UsageError:
    return UsageError(
        f"{repository!r} is not in the Hugging Face cache and the Hub does not answer: connect to a network "
        f"(and unset HF_HUB_OFFLINE), or {cure}."
    )


def _undamaged(file: Path) -> bool:
    """Whether a file in the Hugging Face cache has the hash that the Hub announced.

    The cache stores contents under that hash and links to them. Where a system has no links it stores the file
    itself, and there is nothing to compare with.
    """
    # One step only: where repositories share contents, what is stored under the hash is itself a link.
    announced = Path(os.readlink(file)).name if file.is_symlink() else ""
    return not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", announced) or has_checksum(file, announced)


def has_checksum(file: Path, expected: str) -> bool:
    """Whether a file has this checksum: computed once, then remembered until its size or its times change.

    Args:
        file: any file.
        expected: in hexadecimal, SHA-256 or (40 digits) what git calls a blob by.
    """
    import platformdirs

    file = file.resolve()
    now = file.stat()
    seen = f"{expected} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"
    place = hashlib.sha256(os.fsencode(file)).hexdigest()
    note = Path(platformdirs.user_cache_dir("paperworks")) / "verified" / place
    with contextlib.suppress(OSError, UnicodeError):
        if note.read_text() == seen:
            return True
    if (_git_blob(file) if len(expected) == 40 else sha256(file)) != expected:
        return False
    # Where the cache cannot be written, the next call computes it again.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(seen)
    return True


def _git_blob(file: Path) -> str:
    """Name of a file's contents in git, by which the Hub knows its small files."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
