"""Data sets by name: the user's own files, what packages ship, the Hugging Face Hub and OpenML."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, overload

from paperworks.errors import UsageError
from paperworks.hub import extents, hosted, readers
from paperworks.hub.kinds import (
    CharacterData,
    Conversation,
    Dataset,
    ImageData,
    Problem,
    Question,
    QuestionData,
    SeriesData,
    TableData,
    TextData,
)
from paperworks.hub.places import Entry, data_root, package_folder, unknown


@dataclass(frozen=True)
class _Source:
    """How a data set is had: files to look for, how to read them, and what else to try."""

    origin: str
    read: Callable[[str, str, Sequence[Path]], Dataset] | None = None
    files: tuple[str, ...] = ()  # relative to the folder of all data; may hold {split}
    splits: tuple[str, ...] = ()
    fetch: Callable[[str, str], Dataset] | None = None
    package: str = ""  # that ships it; then `fetch` needs no network
    cure: str = ""


@overload
def load_dataset(
    name: Literal["wikitext-2"], *, split: str | None = None, path: str | Path | None = None
) -> TextData: ...
@overload
def load_dataset(
    name: Literal["gsm8k"], *, split: str | None = None, path: str | Path | None = None
) -> QuestionData[Question]: ...
@overload
def load_dataset(
    name: Literal["humaneval"], *, split: str | None = None, path: str | Path | None = None
) -> QuestionData[Problem]: ...
@overload
def load_dataset(
    name: Literal["mt_bench"], *, split: str | None = None, path: str | Path | None = None
) -> QuestionData[Conversation]: ...
@overload
def load_dataset(
    name: Literal["omniglot"], *, split: str | None = None, path: str | Path | None = None
) -> CharacterData: ...
@overload
def load_dataset(
    name: Literal["mnist-10k"], *, split: str | None = None, path: str | Path | None = None
) -> ImageData: ...
@overload
def load_dataset(
    name: Literal["exchange_rate"], *, split: str | None = None, path: str | Path | None = None
) -> SeriesData: ...
@overload
def load_dataset(
    name: Literal[
        "mnist1d",
        "digits",
        "breast_cancer",
        "diabetes",
        "wine",
        "iris",
        "california_housing",
        "uci:bostonHousing",
        "uci:energy",
        "uci:kin8nm",
        "uci:power-plant",
        "uci:wine-quality-red",
    ],
    *,
    split: str | None = None,
    path: str | Path | None = None,
) -> TableData: ...
@overload
def load_dataset(name: str | Path, *, split: str | None = None, path: str | Path | None = None) -> Dataset: ...
def load_dataset(name: str | Path, *, split: str | None = None, path: str | Path | None = None) -> Dataset:
    """A data set by name, or the user's own file.

    Looked for in this order: the path, the folder `PAPERWORKS_DATA`, what an installed package ships, the
    Hugging Face Hub or OpenML. What is downloaded is compared with its checksums; and wherever it comes from, a set by
    name with what is known of it: how much it holds, within which bounds, and, where it is read from files, what.

    Args:
        name: one of those that `datasets()` lists; or the user's own: the folder of such a set; a text file (.txt); a table
            (.csv, .parquet) whose last column is the target, a number or a word, with names above it or without; NumPy's
            arrays X and y (.npz), where X has a row or a grey image a sample; or a folder of images, one subfolder a class.
        split: which part, where a set has parts ("train", "valid", "test"); None is the test part.
        path: folder that holds the set's files, or holds the set's folder as `PAPERWORKS_DATA` would.

    Raises:
        UsageError: the name or split is unknown, a file is damaged or holds other data, or the data is not here and
            cannot be fetched.

    Example:
        >>> iris = load_dataset("iris")
        >>> iris.X.shape, iris.classes
        ((150, 4), ('setosa', 'versicolor', 'virginica'))
    """
    name = str(name)
    if not name.strip():
        raise UsageError("The name of the data set is empty: give one that datasets() lists, or a path.")
    if path is None and Path(name).suffix.lower() in _OWN:
        return _own_file(name, split)
    if path is None and name not in _SOURCES and (given := Path(name).expanduser()).is_dir():
        known = _SOURCES.get(given.resolve().name)
        if (known is None or known.read is None) and any(one.is_dir() for one in given.iterdir()):
            return _own_folder(given, split)
        # The folder of one set: .../gsm8k.
        path, name = name, given.resolve().name
    source = _source(name)
    split = _checked_split(name, source, split)
    files: list[Path] = []
    if path is not None:
        given = Path(path).expanduser()
        if source.read is None:
            raise UsageError(f"{name} comes from {source.origin} and is not read from files: leave out path.")
        files = _find(given, source, split) or _find(given, source, split, own=True)
        if not files:
            wanted = ", ".join(file.format(split=split) for file in source.files)
            raise UsageError(f"{given} does not hold {name}: expected {wanted} there.")
    elif source.read is not None and (root := data_root()):
        files = _find(root, source, split)
    if files:
        shown = ", ".join(map(str, files))
        with _one_sentence(f"{shown} cannot be read as {name}", "correct or replace what is there"):
            assert source.read is not None
            data = source.read(name, split, files)
            extents.check(data, from_files=True)
        return data
    if source.fetch is None:
        raise UsageError(f"The data set {name!r} is not here and no hub is known for it: {source.cure}.")
    cure = (
        f"set PAPERWORKS_DATA to a folder that holds {' and '.join(source.files).format(split=split)}"
        if source.files
        else "install that package again"
    )
    with _one_sentence(f"{name} is not what it should be ({source.origin})", cure):
        data = source.fetch(name, split)
        extents.check(data)
    return data


def datasets() -> list[Entry]:
    """The data sets known by name, where they come from, and whether they are here.

    Example:
        >>> {entry.name: entry.available for entry in datasets()}["digits"]
        True
    """
    return [Entry(name, source.origin, _here(source)) for name, source in _sources().items()]


def prompts(name: str = "built-in", n: int | None = None) -> list[str]:
    """Instructions of users, for trying a language model on.

    Args:
        name: "built-in" (40 that come with the package), "mt_bench" (the first turn of each of its 80), or the user's own
            text file (.txt), a prompt a line.
        n: how many, from the first on; None is all.

    Raises:
        UsageError: unknown name, n below 1 or above what there is, or MT-bench cannot be had.

    Example:
        >>> prompts(n=1)
        ['What causes the tides, and why are there usually two high tides a day?']
    """
    if name == "built-in":
        lines = resources.files("paperworks.hub").joinpath("prompts.txt").read_text(encoding="utf-8")
        found = lines.splitlines()
    elif name == "mt_bench":
        found = [conversation.turns[0] for conversation in load_dataset("mt_bench")]
    elif str(name).lower().endswith(".txt"):
        own = load_dataset(str(name))
        assert isinstance(own, TextData)
        found = list(own.paragraphs)
    else:
        raise unknown("set of prompts", str(name), ["built-in", "mt_bench"], "a .txt file, a prompt a line")
    if n is not None and (type(n) is not int or not 1 <= n <= len(found)):
        raise UsageError(f"n is {n!r}, but {name} has {len(found)} prompts: give n from 1 to {len(found)}.")
    return found[:n]


# Finding


def _sources() -> dict[str, _Source]:
    known = dict(_SOURCES)
    root = data_root()
    for file in sorted((root / "uci").glob("*.txt")) if root else []:
        known.setdefault(f"uci:{file.stem}", _uci(file.stem))
    return known


def _source(name: str) -> _Source:
    known = _sources()
    if name in known:
        return known[name]
    uci = re.fullmatch(r"uci:([\w-]+)", name)
    if uci and uci[1] not in hosted.UCI:
        names = [key for key in known if key.startswith("uci:")]
        raise unknown("data set", name, names, f"a file uci/{uci[1]}.txt in the folder PAPERWORKS_DATA")
    raise unknown("data set", name, known, "a .txt, .csv, .parquet or .npz file, or a folder of images")


def _checked_split(name: str, source: _Source, split: str | None) -> str:
    if split is None:
        return "test" if source.splits else ""
    if not source.splits:
        raise UsageError(f"{name} has no parts: leave out split={split!r}.")
    if split not in source.splits:
        raise UsageError(f"{name} has no part {split!r}: choose one of {', '.join(source.splits)}.")
    return split


def _find(folder: Path, source: _Source, split: str, *, own: bool = False) -> list[Path]:
    """The files of a set in a folder of all data, or in its `own` folder; empty unless all are there."""
    names = [file.format(split=split) for file in source.files]
    files = [folder / (Path(name).name if own else name) for name in names]
    return files if all(file.is_file() for file in files) else []


def _here(source: _Source) -> bool:
    if source.package:
        return package_folder(source.package) is not None
    root = data_root()
    return bool(root and source.read and any(_find(root, source, split) for split in source.splits or ("",)))


@contextmanager
def _one_sentence(what: str, cure: str) -> Iterator[None]:
    """Turn what goes wrong with damaged or other data into a sentence that begins with `what`."""
    try:
        yield
    except UsageError:
        raise
    # What pyarrow raises is a ValueError; RuntimeError is an archive with a password.
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{what}: {error!s}; {cure}.") from error


_OWN: dict[str, tuple[str, Callable[[str, str, Sequence[Path]], Dataset]]] = {
    ".txt": ("text", readers.text),
    ".csv": ("a table of numbers", readers.table),
    ".parquet": ("a table of numbers", readers.parquet),
    ".npz": ("arrays of numbers", readers.arrays),
}


def _own_file(name: str, split: str | None) -> Dataset:
    file = Path(name).expanduser()
    if split is not None:
        raise UsageError(f"{name} is one file, without parts: leave out split={split!r}.")
    if not file.is_file():
        raise UsageError(f"There is no file {name!r}: give a text file, a table, or a data set's name.")
    kind, read = _OWN[file.suffix.lower()]
    with _one_sentence(f"{file} cannot be read as {kind}", "correct the file"):
        return read(file.name, "", [file])


def _own_folder(folder: Path, split: str | None) -> Dataset:
    if split is not None:
        raise UsageError(f"{folder} is a folder of images, without parts: leave out split={split!r}.")
    with _one_sentence(f"{folder} cannot be read as images", "correct the folder"):
        return readers.pictures(folder.resolve().name, "", [folder])


def _uci(short: str) -> _Source:
    number = hosted.UCI.get(short)
    place = f"uci/{short}.txt"
    return _Source(
        f"OpenML {number}" if number else f"{place} in PAPERWORKS_DATA",
        readers.table,
        (place,),
        fetch=hosted.openml_uci if number else None,
        cure=f"set PAPERWORKS_DATA to a folder that holds {place} (the last column is the target)",
    )


_SOURCES: dict[str, _Source] = {
    "wikitext-2": _Source(
        "Hugging Face Hub, Salesforce/wikitext (wikitext-2-v1)",
        readers.text,
        (hosted.WIKITEXT.place,),
        ("train", "valid", "test"),
        hosted.wikitext,
    ),
    "gsm8k": _Source(
        "Hugging Face Hub, openai/gsm8k",
        readers.questions(readers.question),
        (hosted.GSM8K.place,),
        ("train", "test"),
        hosted.questions(hosted.GSM8K, readers.question),
    ),
    "humaneval": _Source(
        "Hugging Face Hub, openai/openai_humaneval",
        readers.questions(readers.problem),
        (hosted.HUMANEVAL.place,),
        fetch=hosted.questions(hosted.HUMANEVAL, readers.problem),
    ),
    "mt_bench": _Source(
        "Hugging Face Hub, HuggingFaceH4/mt_bench_prompts",
        readers.questions(readers.conversation),
        (hosted.MT_BENCH.place,),
        fetch=hosted.questions(hosted.MT_BENCH, readers.conversation),
    ),
    "mnist-10k": _Source(
        "OpenML 554 (mnist_784), the last 10,000",
        readers.mnist,
        hosted.MNIST,
        fetch=hosted.openml_mnist,
    ),
    "omniglot": _Source(
        "omniglot/images_background_small1.zip in PAPERWORKS_DATA",
        readers.omniglot,
        ("omniglot/images_background_small1.zip",),
        cure="set PAPERWORKS_DATA to a folder that holds omniglot/images_background_small1.zip, from the "
        "repository brendenlake/omniglot",
    ),
    "exchange_rate": _Source(
        "exchange_rate/exchange_rate.txt.gz in PAPERWORKS_DATA",
        readers.series,
        ("exchange_rate/exchange_rate.txt.gz",),
        cure="set PAPERWORKS_DATA to a folder that holds exchange_rate/exchange_rate.txt.gz, from the "
        "repository laiguokun/multivariate-time-series-data",
    ),
    **{f"uci:{short}": _uci(short) for short in hosted.UCI},
    **{
        name: _Source("scikit-learn", fetch=hosted.scikit_learn, package="sklearn")
        for name in (*hosted.CLASSES, "diabetes")
    },
    "california_housing": _Source("scikit-learn, which downloads it", fetch=hosted.scikit_learn),
    "mnist1d": _Source(
        "made by the package mnist1d", splits=("train", "test"), fetch=hosted.mnist1d, package="mnist1d"
    ),
}
