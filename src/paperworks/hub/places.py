"""Where the hub looks: the user's folder of data, installed packages, and the Hugging Face Hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
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

    huggingface_hub compares the size of what arrives with what was announced; where the repository also
    announces a SHA-256 (its large files), data files are compared with that too.

    Args:
        repository: "owner/name".
        patterns: which files are wanted, as shell patterns.
        kind: "model" or "dataset".
        revision: branch, tag or commit; None is the newest.
        cure: what else the user can do, as the end of a sentence that begins with "or".

    Raises:
        UsageError: the package is missing, nothing answers, or there is no such repository.
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
        folder = Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                etag_timeout=_ANSWER_WITHIN,
                local_files_only=not _answers(HfApi(), repository, kind, revision),
            )
        )
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
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    if not files:
        raise _unreachable(repository, cure)
    if kind == "dataset":
        for file in files:
            verify_blob(file)
    return folder


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


def verify_blob(file: Path) -> None:
    """Compare a file in the Hugging Face cache with the SHA-256 that the Hub announced, where it did.

    The cache stores a large file under its SHA-256 and links to it; small files under another hash.

    Raises:
        UsageError: the contents differ; the broken file is removed so that the next call fetches it again.
    """
    blob = file.resolve()
    if len(blob.name) == 64 and sha256(blob) != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise UsageError(f"{file.name} arrived damaged (other SHA-256) and was removed: run this again.")
