"""Data sets by name: the user's own files, what packages ship, the Hugging Face Hub and OpenML."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import re
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from paperworks.errors import UsageError
from paperworks.lab.hub.places import Entry, data_root, from_hugging_face, package_folder, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TextData:
    """Running text.

    Attributes:
        name: of the data set, or the file's name.
        split: which part, "" where there is only one.
        text: all of it.
    """

    name: str
    split: str
    text: str = field(repr=False)

    @property
    def paragraphs(self) -> tuple[str, ...]:
        """The lines that hold more than space, in order, without space around them."""
        return tuple(line.strip() for line in self.text.split("\n") if line.strip())


@dataclass(frozen=True)
class Question:
    r"""A question and its worked answer (GSM8K).

    Example:
        >>> Question("What are 2 and 3?", "They are 2 + 3 = <<2+3=5>>5.\n#### 5").number
        5.0
    """

    question: str
    answer: str

    @property
    def number(self) -> float:
        """The final number of the answer, which follows `####`."""
        return float(self.answer.rpartition("####")[2].strip().replace(",", ""))


@dataclass(frozen=True)
class Problem:
    """A Python function to complete (HumanEval).

    Attributes:
        task_id: "HumanEval/0" and so on.
        prompt: imports, signature and docstring.
        solution: a right body to append to the prompt.
        test: code that defines `check(candidate)`.
        entry_point: name of the function.
    """

    task_id: str
    prompt: str
    solution: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class Conversation:
    """What a user says in a conversation, turn by turn (MT-bench)."""

    question_id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class QuestionData(Generic[_Item]):
    """Questions in a fixed order; a sequence of `Question`, `Problem` or `Conversation`.

    Example:
        >>> data = QuestionData("sums", "test", (Question("1 + 1?", "#### 2"),))
        >>> len(data), data[0].question
        (1, '1 + 1?')
    """

    name: str
    split: str
    items: tuple[_Item, ...] = field(repr=False)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    def __iter__(self) -> Iterator[_Item]:
        """All of them, in order."""
        return iter(self.items)

    def __getitem__(self, index: int) -> _Item:
        """The one at a position, from 0."""
        return self.items[index]


@dataclass(frozen=True, eq=False)
class TableData:
    """A table for regression or classification.

    Attributes:
        name: of the data set.
        split: which part, "" where there is only one.
        X: float64, n x d, finite.
        y: n targets: float64 for regression, int64 indices into `classes` for classification.
        features: d names, or () where the data has none.
        classes: names of the classes; () means regression.
    """

    name: str
    split: str
    X: NDArray[np.float64] = field(repr=False)
    y: NDArray[Any] = field(repr=False)
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey images with labels.

    Attributes:
        name: of the data set.
        images: uint8, n x height x width; 0 is the background, 255 full ink.
        labels: int64, n indices into `classes`.
        classes: names of the classes.
    """

    name: str
    images: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def resized(self, size: int) -> ImageData:
        """The same data with images of `size` x `size` pixels, each the mean of the pixels it covers.

        Raises:
            ValueError: size below 1.
        """
        import numpy as np
        from PIL import Image

        if size < 1:
            raise ValueError(f"size is {size}; give the side of the images in pixels, at least 1.")
        images = np.empty((len(self.images), size, size), np.uint8)
        for small, image in zip(images, self.images, strict=True):
            small[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
        return replace(self, images=images)


@dataclass(frozen=True, eq=False)
class CharacterData(ImageData):
    """Handwritten characters of many alphabets, each drawn once by each of several people (Omniglot).

    Attributes:
        alphabets: names of the alphabets.
        alphabet: int64, n indices into `alphabets`.
        drawer: int64, n; who drew the image, from 1. Drawers of different alphabets are different people.
    """

    alphabets: tuple[str, ...] = ()
    alphabet: NDArray[np.int64] = field(repr=False, kw_only=True)
    drawer: NDArray[np.int64] = field(repr=False, kw_only=True)


@dataclass(frozen=True, eq=False)
class SeriesData:
    """Time series observed together.

    Attributes:
        name: of the data set.
        values: float64, times x series, finite.
        step: time between two rows, in words.
    """

    name: str
    values: NDArray[np.float64] = field(repr=False)
    step: str


Dataset = (
    TextData
    | QuestionData[Question]
    | QuestionData[Problem]
    | QuestionData[Conversation]
    | TableData
    | ImageData
    | SeriesData
)


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
def load_dataset(name: str, *, split: str | None = None, path: str | Path | None = None) -> Dataset: ...
def load_dataset(name: str, *, split: str | None = None, path: str | Path | None = None) -> Dataset:
    """A data set by name, or the user's own file.

    Looked for in this order: the path, the folder `PAPERWORKS_DATA`, what an installed package ships, the
    Hugging Face Hub or OpenML. What is downloaded is checked by size or checksum, and by its known extent.

    Args:
        name: one of those that `datasets()` lists; or the user's own: the folder of such a set, a text file
            (.txt), or a table of numbers (.csv) whose last column is the target.
        split: which part, where a set has parts ("train", "valid", "test"); None is the test part.
        path: folder that holds the set's files, or holds the set's folder as `PAPERWORKS_DATA` would.

    Raises:
        UsageError: the name or split is unknown, a file is damaged, or the data is not here and cannot be
            fetched.

    Example:
        >>> iris = load_dataset("iris")
        >>> iris.X.shape, iris.classes
        ((150, 4), ('setosa', 'versicolor', 'virginica'))
    """
    if path is None and Path(name).suffix in (".txt", ".csv"):
        return _own_file(name, split)
    if path is None and name not in _SOURCES and Path(name).expanduser().is_dir():
        # The folder of one set: .../gsm8k.
        path, name = name, Path(name).resolve().name
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
        return _read(source, name, split, files)
    if source.fetch is None:
        raise UsageError(f"The data set {name!r} is not here and no hub is known for it: {source.cure}.")
    return source.fetch(name, split)


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
        name: "built-in" (40 that come with the package) or "mt_bench" (the first turn of each of its 80).
        n: how many, from the first on; None is all.

    Raises:
        UsageError: unknown name, n below 1 or above what there is, or MT-bench cannot be had.

    Example:
        >>> prompts(n=1)
        ['What causes the tides, and why are there usually two high tides a day?']
    """
    if name == "built-in":
        lines = resources.files("paperworks.lab.hub").joinpath("prompts.txt").read_text(encoding="utf-8")
        found = lines.splitlines()
    elif name == "mt_bench":
        found = [conversation.turns[0] for conversation in load_dataset("mt_bench")]
    else:
        raise unknown("set of prompts", name, ["built-in", "mt_bench"], "your own list of strings")
    if n is not None and not 1 <= n <= len(found):
        raise UsageError(f"n is {n}, but {name} has {len(found)} prompts: give n from 1 to {len(found)}.")
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
    if uci and uci[1] not in _UCI:
        names = [key for key in known if key.startswith("uci:")]
        raise unknown("data set", name, names, f"a file uci/{uci[1]}.txt in the folder PAPERWORKS_DATA")
    raise unknown("data set", name, known, "a .txt or .csv file")


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


def _read(source: _Source, name: str, split: str, files: Sequence[Path]) -> Dataset:
    assert source.read is not None
    try:
        return source.read(name, split, files)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, UsageError):
            raise
        shown = ", ".join(map(str, files))
        raise UsageError(f"{shown} cannot be read as {name}: {error!s}; replace the damaged file.") from error


def _own_file(name: str, split: str | None) -> Dataset:
    file = Path(name).expanduser()
    if split is not None:
        raise UsageError(f"{name} is one file, without parts: leave out split={split!r}.")
    if not file.is_file():
        raise UsageError(f"There is no file {name!r}: give a text file, a table, or a data set's name.")
    return _read(_Source("", _text if file.suffix == ".txt" else _table), file.name, "", [file])


# Reading


def _text(name: str, split: str, files: Sequence[Path]) -> TextData:
    text = files[0].read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("the file is empty")
    return TextData(name, split, text)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, compressed or not."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    records = []
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    if not records:
        raise ValueError("the file is empty")
    return records


def _question(record: dict[str, Any]) -> Question:
    return Question(record["question"], record["answer"])


def _problem(record: dict[str, Any]) -> Problem:
    solution = record["canonical_solution"]
    return Problem(record["task_id"], record["prompt"], solution, record["test"], record["entry_point"])


def _conversation(record: dict[str, Any]) -> Conversation:
    # The Hub's copy of MT-bench names two of the fields differently.
    number = record["question_id"] if "question_id" in record else record["prompt_id"]
    turns = record["turns"] if "turns" in record else record["prompt"]
    return Conversation(int(number), record["category"], tuple(turns))


def _questions(
    make: Callable[[dict[str, Any]], _Item],
) -> Callable[[str, str, Sequence[Path]], QuestionData[_Item]]:
    def read(name: str, split: str, files: Sequence[Path]) -> QuestionData[_Item]:
        items = []
        for number, record in enumerate(_lines(files[0]), 1):
            try:
                items.append(make(record))
            except KeyError as error:
                raise ValueError(f"record {number} has no field {error}") from error
        return QuestionData(name, split, tuple(items))

    return read


def _numbers(file: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """A table of finite numbers, apart by space or comma, and the names in its first line, if any."""
    import numpy as np

    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [line for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    if not rows:
        raise ValueError("the file is empty")
    delimiter = "," if "," in rows[0] else None
    head = [cell.strip().strip('"') for cell in rows[0].split(delimiter)]
    names = () if _is_number(head[0]) else tuple(head)
    table = np.loadtxt(io.StringIO("\n".join(rows[1:] if names else rows)), delimiter=delimiter, ndmin=2)
    if not table.size:
        raise ValueError("there are no rows")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"row {row + 1}, column {column + 1} is not a finite number")
    return table, names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _table(name: str, split: str, files: Sequence[Path]) -> TableData:
    table, names = _numbers(files[0])
    if table.shape[1] < 2:
        raise ValueError("a table needs a feature and, as its last column, the target")
    return TableData(name, split, table[:, :-1].copy(), table[:, -1].copy(), names[:-1])


def _series(name: str, split: str, files: Sequence[Path]) -> SeriesData:
    return SeriesData(name, _numbers(files[0])[0], "one day")


def _idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file of bytes: a magic number, the extents, the values."""
    import numpy as np

    raw = gzip.decompress(file.read_bytes())
    if len(raw) < 4 + 4 * dimensions or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{file.name} is not an IDX file of bytes in {dimensions} dimensions")
    shape = tuple(int(extent) for extent in np.frombuffer(raw, ">u4", dimensions, 4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ValueError(f"{file.name} holds {values.size} values, its head says {math.prod(shape)}")
    return values.reshape(shape).copy()


def _mnist(name: str, split: str, files: Sequence[Path]) -> ImageData:
    import numpy as np

    images, labels = _idx(files[0], 3), _idx(files[1], 1)
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    return ImageData(name, images, labels.astype(np.int64), tuple("0123456789"))


def _omniglot(name: str, split: str, files: Sequence[Path]) -> CharacterData:
    import numpy as np
    from PIL import Image

    # .../Balinese/character01/0108_07.png: the seventh drawer's version of the character.
    drawings: list[tuple[str, str, int, str]] = []
    with zipfile.ZipFile(files[0]) as archive:
        for member in archive.namelist():
            parts = member.split("/")
            if member.endswith(".png") and len(parts) >= 3:
                drawer = int(parts[-1].removesuffix(".png").split("_")[1])
                drawings.append((parts[-3], f"{parts[-3]}/{parts[-2]}", drawer, member))
        if not drawings:
            raise ValueError("the archive holds no alphabet/character/number_drawer.png")
        drawings.sort()
        images = np.stack(
            # Ink is black on white in the files.
            [255 - np.asarray(Image.open(archive.open(member)).convert("L")) for *_, member in drawings]
        )
    alphabets = sorted({alphabet for alphabet, *_ in drawings})
    characters = sorted({character for _, character, *_ in drawings})
    return CharacterData(
        name,
        images,
        np.array([characters.index(character) for _, character, *_ in drawings], np.int64),
        tuple(characters),
        tuple(alphabets),
        alphabet=np.array([alphabets.index(alphabet) for alphabet, *_ in drawings], np.int64),
        drawer=np.array([drawer for _, _, drawer, _ in drawings], np.int64),
    )


# Installed packages


def _scikit_learn(name: str, split: str) -> TableData:
    import numpy as np

    try:
        from sklearn import datasets as shipped
    except ImportError as error:
        raise UsageError(f"{name} comes with scikit-learn: pip install scikit-learn") from error
    if name == "california_housing":
        # scikit-learn fetches this one, and compares its SHA-256.
        with _no_long_wait(name, "take the data set diabetes instead"):
            found = shipped.fetch_california_housing(n_retries=1)
    else:
        found = getattr(shipped, f"load_{name}")()
    classes = tuple(str(label) for label in getattr(found, "target_names", ())) if name in _CLASSES else ()
    y = found.target.astype(np.int64 if classes else np.float64)
    features = tuple(str(feature) for feature in found.feature_names)
    return TableData(name, split, found.data.astype(np.float64), y, features, classes)


def _mnist1d(name: str, split: str) -> TableData:
    """MNIST-1D as its package makes it from its fixed seed; 4000 examples to train, 1000 to test."""
    import numpy as np

    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise UsageError("mnist1d is made by the package of that name: pip install mnist1d") from error
    # The package seeds the global generators.
    before, before_numpy = random.getstate(), np.random.get_state()
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
    end = "_test" if split == "test" else ""
    X, y = made[f"x{end}"].astype(np.float64), made[f"y{end}"].astype(np.int64)
    return TableData(name, split, X, y, classes=tuple("0123456789"))


# The Hugging Face Hub and OpenML


@dataclass(frozen=True)
class _Hosted:
    repository: str
    revision: str
    files: str  # pattern; may hold {split}
    rows: dict[str, int]


def _rows(name: str, split: str, hosted: _Hosted) -> list[dict[str, Any]]:
    """The records of one part on the Hub, as many as are known to be in it."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(f"Reading {name} from the Hub needs pyarrow: pip install pyarrow") from error
    pattern = hosted.files.format(split={"valid": "validation"}.get(split, split))
    cure = f"set PAPERWORKS_DATA to a folder that holds {_SOURCES[name].files[0].format(split=split)}"
    folder = from_hugging_face(hosted.repository, [pattern], kind="dataset", revision=hosted.revision, cure=cure)
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob(pattern)):
        rows += parquet.read_table(file).to_pylist()
    if len(rows) != hosted.rows[split]:
        raise UsageError(f"{hosted.repository} gave {len(rows)} rows of {name}, not {hosted.rows[split]}: {cure}.")
    return rows


def _hosted_questions(
    hosted: _Hosted, make: Callable[[dict[str, Any]], _Item]
) -> Callable[[str, str], QuestionData[_Item]]:
    def fetch(name: str, split: str) -> QuestionData[_Item]:
        return QuestionData(name, split, tuple(make(record) for record in _rows(name, split, hosted)))

    return fetch


def _hosted_wikitext(name: str, split: str) -> TextData:
    # A line of space alone is an empty row there.
    return TextData(name, split, "".join(row["text"] or " \n" for row in _rows(name, split, _WIKITEXT)))


def _openml(name: str, number: int, cure: str) -> Any:
    """A data set of OpenML as a pandas frame; scikit-learn compares its MD5."""
    try:
        import pandas  # type: ignore[import-untyped]  # noqa: F401
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        raise UsageError(f"{name} lies on OpenML: pip install scikit-learn pandas, or {cure}.") from error
    with _no_long_wait(name, cure):
        return fetch_openml(data_id=number, as_frame=True, parser="auto", n_retries=1).frame


@contextmanager
def _no_long_wait(name: str, cure: str) -> Iterator[None]:
    """Turn what goes wrong while scikit-learn downloads into one sentence, soon."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with warnings.catch_warnings():
            # The sentence below says what these say.
            warnings.filterwarnings("ignore", message="A network error|Retry|Invalid cache")
            yield
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error).strip().split("\n")[0]
        sentence = f"{name} could not be fetched ({reason}): connect to a network, or {cure}."
        raise UsageError(sentence) from error
    finally:
        socket.setdefaulttimeout(before)


def _openml_mnist(name: str, split: str) -> ImageData:
    import numpy as np

    frame = _openml(name, 554, "set PAPERWORKS_DATA to a folder that holds mnist-10k/images-idx3-ubyte.gz")
    if frame.shape != (70_000, 785):
        raise UsageError(f"OpenML gave {name} as a table of {frame.shape}, not (70000, 785).")
    frame = frame.iloc[-10_000:]
    images = frame.iloc[:, :-1].to_numpy(np.uint8).reshape(-1, 28, 28)
    return ImageData(name, images, frame.iloc[:, -1].astype(np.int64).to_numpy(), tuple("0123456789"))


@dataclass(frozen=True)
class _Table:
    """What is known of a table of UCI, to check what OpenML gives."""

    rows: int
    features: int
    mean_target: float
    openml: int | None


_UCI = {
    "bostonHousing": _Table(506, 13, 22.5328, 531),
    "energy": _Table(768, 8, 22.3072, 1472),
    "kin8nm": _Table(8192, 8, 0.7143, 189),
    "power-plant": _Table(9568, 4, 454.3650, None),
    "wine-quality-red": _Table(1599, 11, 5.6360, 40691),
}


def _openml_uci(name: str, split: str) -> TableData:
    import numpy as np

    short = name.removeprefix("uci:")
    known = _UCI[short]
    cure = f"set PAPERWORKS_DATA to a folder that holds uci/{short}.txt"
    assert known.openml is not None
    frame = _openml(name, known.openml, cure)
    # The energy table has a second target behind the first.
    table = frame.iloc[:, : known.features + 1].astype("float64").to_numpy()
    mean = float(table[:, -1].mean()) if table.size else math.nan
    expected = (known.rows, known.features + 1)
    if table.shape != expected or not math.isclose(mean, known.mean_target, rel_tol=1e-3):
        raise UsageError(
            f"OpenML gave {name} as a table of {table.shape} with mean target {mean:.4g}, "
            f"not {expected} with {known.mean_target:.4g}: {cure}."
        )
    features = tuple(str(column) for column in frame.columns[: known.features])
    return TableData(name, split, np.ascontiguousarray(table[:, :-1]), table[:, -1].copy(), features)


def _uci(short: str) -> _Source:
    known = _UCI.get(short)
    place = f"uci/{short}.txt"
    hosted = known is not None and known.openml is not None
    return _Source(
        f"OpenML {known.openml}" if known and hosted else f"{place} in PAPERWORKS_DATA",
        _table,
        (place,),
        fetch=_openml_uci if hosted else None,
        cure=f"set PAPERWORKS_DATA to a folder that holds {place} (the last column is the target)",
    )


_WIKITEXT = _Hosted(
    "Salesforce/wikitext",
    "b08601e04326c79dfdd32d625aee71d232d685c3",
    "wikitext-2-v1/{split}-*.parquet",
    {"train": 36_718, "valid": 3760, "test": 4358},
)
_GSM8K = _Hosted(
    "openai/gsm8k",
    "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "main/{split}-*.parquet",
    {"train": 7473, "test": 1319},
)
_HUMANEVAL = _Hosted(
    "openai/openai_humaneval",
    "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "openai_humaneval/test-*.parquet",
    {"": 164},
)
_MT_BENCH = _Hosted(
    "HuggingFaceH4/mt_bench_prompts",
    "e3a795c5e9a82ee40611c416b8a7786c73198991",
    "data/train-*.parquet",
    {"": 80},
)

_CLASSES = ("digits", "breast_cancer", "wine", "iris")

_SOURCES: dict[str, _Source] = {
    "wikitext-2": _Source(
        "Hugging Face Hub, Salesforce/wikitext (wikitext-2-v1)",
        _text,
        ("wikitext-2/{split}.txt",),
        ("train", "valid", "test"),
        _hosted_wikitext,
    ),
    "gsm8k": _Source(
        "Hugging Face Hub, openai/gsm8k",
        _questions(_question),
        ("gsm8k/{split}.jsonl",),
        ("train", "test"),
        _hosted_questions(_GSM8K, _question),
    ),
    "humaneval": _Source(
        "Hugging Face Hub, openai/openai_humaneval",
        _questions(_problem),
        ("humaneval/HumanEval.jsonl.gz",),
        fetch=_hosted_questions(_HUMANEVAL, _problem),
    ),
    "mt_bench": _Source(
        "Hugging Face Hub, HuggingFaceH4/mt_bench_prompts",
        _questions(_conversation),
        ("mt_bench/question.jsonl",),
        fetch=_hosted_questions(_MT_BENCH, _conversation),
    ),
    "mnist-10k": _Source(
        "OpenML 554 (mnist_784), the last 10,000",
        _mnist,
        ("mnist-10k/images-idx3-ubyte.gz", "mnist-10k/labels-idx1-ubyte.gz"),
        fetch=_openml_mnist,
    ),
    "omniglot": _Source(
        "omniglot/images_background_small1.zip in PAPERWORKS_DATA",
        _omniglot,
        ("omniglot/images_background_small1.zip",),
        cure="set PAPERWORKS_DATA to a folder that holds omniglot/images_background_small1.zip, from the "
        "repository brendenlake/omniglot",
    ),
    "exchange_rate": _Source(
        "exchange_rate/exchange_rate.txt.gz in PAPERWORKS_DATA",
        _series,
        ("exchange_rate/exchange_rate.txt.gz",),
        cure="set PAPERWORKS_DATA to a folder that holds exchange_rate/exchange_rate.txt.gz, from the "
        "repository laiguokun/multivariate-time-series-data",
    ),
    **{f"uci:{short}": _uci(short) for short in _UCI},
    **{name: _Source("scikit-learn", fetch=_scikit_learn, package="sklearn") for name in (*_CLASSES, "diabetes")},
    "california_housing": _Source("scikit-learn, which downloads it", fetch=_scikit_learn),
    "mnist1d": _Source("made by the package mnist1d", splits=("train", "test"), fetch=_mnist1d, package="mnist1d"),
}
