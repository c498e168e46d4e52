"""Data sets from files: each reader takes the set's name, its part and its files, and raises ValueError on a damaged one."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.hub.kinds import (
    CharacterData,
    Conversation,
    ImageData,
    Item,
    Problem,
    Question,
    QuestionData,
    SeriesData,
    TableData,
    TextData,
)
from paperworks.hub.tables import read_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def text(name: str, split: str, files: Sequence[Path]) -> TextData:
    """Running text in UTF-8."""
    content = _text(files[0]).replace("\r\n", "\n").replace("\r", "\n")
    if not content.strip():
        raise ValueError("the file is empty")
    return TextData(name, split, content)


def _content(file: Path) -> bytes:
    """What a file holds, compressed or not."""
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        return gzip.decompress(file.read_bytes())
    except zlib.error as error:
        raise ValueError(f"it cannot be decompressed ({error})") from error


def _text(file: Path) -> str:
    """The text in a file, without the mark that some programs put before UTF-8."""
    try:
        return _content(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    records = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    if not records:
        raise ValueError("the file is empty")
    return records


def question(record: dict[str, Any]) -> Question:
    """A record of GSM8K."""
    found = Question(record["question"], record["answer"])
    _check_text(question=found.question, answer=found.answer)
    # Raises where the answer ends without one.
    float(found.number)
    return found


def problem(record: dict[str, Any]) -> Problem:
    """A record of HumanEval."""
    solution = record["canonical_solution"]
    found = Problem(record["task_id"], record["prompt"], solution, record["test"], record["entry_point"])
    _check_text(**vars(found))
    return found


def conversation(record: dict[str, Any]) -> Conversation:
    """A record of MT-bench."""
    # The Hub's copy of MT-bench names two of the fields differently.
    number = record["question_id"] if "question_id" in record else record["prompt_id"]
    turns = record["turns"] if "turns" in record else record["prompt"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns are {turns!r:.40}, not a list of texts")
    _check_text(category=record["category"], **{f"turn {turn}": text for turn, text in enumerate(turns, 1)})
    return Conversation(int(number), record["category"], tuple(turns))


def _check_text(**fields: Any) -> None:
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {value!r:.40}, not a text")


def questions(
    make: Callable[[dict[str, Any]], Item],
) -> Callable[[str, str, Sequence[Path]], QuestionData[Item]]:
    """A reader of JSON lines, each of which `make` turns into an item."""

    def read(name: str, split: str, files: Sequence[Path]) -> QuestionData[Item]:
        return QuestionData(name, split, items_of(_lines(files[0]), make))

    return read


def items_of(records: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Item]) -> tuple[Item, ...]:
    """What `make` makes of each record.

    Raises:
        ValueError: one of them lacks a field, or holds something else in it.
    """
    items = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is a {type(record).__name__}, not an object with fields")
        try:
            items.append(make(record))
        except KeyError as error:
            raise ValueError(f"record {number} has no field {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"record {number}: {error}") from error
    return tuple(items)


def table(name: str, split: str, files: Sequence[Path]) -> TableData:
    """A table of numbers whose last column is the target, a number or a word."""
    cells, names, classes = read_table(_text(files[0]))
    return _table(name, split, cells, names, classes)


def _table(
    name: str, split: str, cells: NDArray[np.float64], names: Sequence[str], classes: tuple[str, ...]
) -> TableData:
    import numpy as np

    if cells.shape[1] < 2:
        raise ValueError("a table needs a feature and, as its last column, the target")
    y = cells[:, -1].astype(np.int64 if classes else np.float64)
    if (y == y[0]).all():
        told = classes[0] if classes else f"{y[0]:g}"
        raise ValueError(f"the last column, which is the target, is {told} in every row: put the target last")
    return TableData(name, split, cells[:, :-1].copy(), y, tuple(names[:-1]), classes)


def parquet(name: str, split: str, files: Sequence[Path]) -> TableData:
    """A Parquet file of numbers whose last column is the target, a number or a word."""
    from pyarrow import compute
    from pyarrow.parquet import read_table as read_parquet

    found = read_parquet(files[0])
    # pandas keeps an index that has no name so.
    kept = [column for column in found.column_names if not column.startswith("__index_level_")]
    columns = {}
    for column in kept:
        values = found[column].combine_chunks()
        if (gaps := compute.index(compute.is_null(values), True).as_py()) >= 0:
            raise ValueError(f"row {gaps + 1}, column {column} is a gap: fill it, or leave out the row")
        if hasattr(values, "dictionary_decode"):
            values = values.dictionary_decode()
        columns[column] = values.to_numpy(zero_copy_only=False)
    return _of_columns(name, split, columns)


def _of_columns(name: str, split: str, columns: Mapping[str, NDArray[Any]]) -> TableData:
    """A table of named columns, the last of which is the target."""
    import numpy as np

    names = list(columns)
    if not names or len(columns[names[0]]) == 0:
        raise ValueError("it has no rows")
    for column in names[:-1]:
        if column.lower() in ("target", "y"):
            raise ValueError(
                f"column {column!r} is named as the target is, but the target is the last column ({names[-1]!r}): move it"
            )
    classes: tuple[str, ...] = ()
    numbers: list[NDArray[np.float64]] = []
    for column, values in columns.items():
        if column == names[-1]:
            values, classes = _target(column, values)
        numbers.append(_finite(column, values))
    return _table(name, split, np.column_stack(numbers), names, classes)


def _target(label: str, values: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Numbers as they are; of words and truth values, indices and the classes."""
    import numpy as np

    if values.dtype.kind not in "OUSb" or not all(isinstance(value, str | bytes | bool) for value in values.tolist()):
        return values, ()
    words = [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
    found, indices = np.unique(words, return_inverse=True)
    if len(found) > max(2, len(words) // 2):
        raise ValueError(
            f"{label} holds {len(found)} different words in {len(words)} rows: classes have several rows each"
        )
    return indices, tuple(str(word) for word in found)


def _finite(label: str, values: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"{label} holds {str(values.reshape(-1)[0])!r:.40}, no number: write a category as columns of 0 and 1, or leave it out"
        )
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        place = np.argwhere(~np.isfinite(numbers))[0]
        raise ValueError(f"row {place[0] + 1} of {label} is not a finite number: fill it, or leave out the row")
    return numbers


# What others call inputs and targets, as numpy.savez, Keras and scikit-learn write them.
_ARRAYS = (("X", "y"), ("x", "y"), ("images", "labels"), ("data", "target"), ("x_train", "y_train"))


def arrays(name: str, split: str, files: Sequence[Path]) -> TableData | ImageData:
    """An archive of NumPy arrays: `X` and `y`, where X has a row or a grey image a sample; or a column an array, the target last."""
    import numpy as np

    with np.load(files[0], allow_pickle=False) as archive:
        found = {key: archive[key] for key in archive.files}
    for inputs, targets in _ARRAYS:
        if inputs in found and targets in found:
            return _arrays(name, split, inputs, found[inputs], targets, found[targets])
    lengths = {values.shape for values in found.values()}
    if len(found) > 1 and len(lengths) == 1 and len(next(iter(lengths))) == 1:
        return _of_columns(name, split, found)
    held = (
        ", ".join(f"{key} {'x'.join(map(str, values.shape)) or 'alone'}" for key, values in found.items()) or "nothing"
    )
    lacks = next((pair[1 - pair.index(key)] for pair in _ARRAYS for key in pair if key in found), "X and y")
    raise ValueError(
        f"it lacks {lacks} (it holds {held}): save it with numpy.savez(file, X=..., y=...), or a column an array of equal "
        "length, the target last"
    )


def _arrays(
    name: str, split: str, inputs: str, X: NDArray[Any], targets: str, y: NDArray[Any]
) -> TableData | ImageData:
    import numpy as np

    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or len(X) != len(y) or not len(y):
        raise ValueError(
            f"{inputs} is {'x'.join(map(str, X.shape))} and {targets} {'x'.join(map(str, y.shape))}: give a target a row of {inputs}"
        )
    numbers, classes = _target(targets, y)
    numbers = _finite(targets, numbers)
    if X.ndim == 2:
        return _table(name, split, np.column_stack([_finite(inputs, X), numbers]), (), classes)
    if X.ndim != 3:
        raise ValueError(
            f"{inputs} has {X.ndim} dimensions: give samples x features, or grey images as samples x height x width"
        )
    pixels = _finite(inputs, X)
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"{inputs} goes from {pixels.min():g} to {pixels.max():g}: pixels are within 0 and 255, or 0 and 1"
        )
    if X.dtype.kind == "f" and pixels.max() <= 1:
        pixels = pixels * 255
    labels = TableData(name, split, pixels[:, 0], numbers.astype(np.int64) if classes else numbers, classes=classes)
    labels = labels.labelled()
    return ImageData(name, pixels.round().astype(np.uint8), labels.y, labels.classes)


_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


def pictures(name: str, split: str, files: Sequence[Path]) -> ImageData:
    """A folder with one subfolder a class, as torchvision's ImageFolder has it; images become grey."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    [folder] = files
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        told = f"one class only ({classes[0]})" if classes else "no class"
        raise ValueError(f"it has {told}: give one subfolder a class, with its images in it")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first: tuple[Path, tuple[int, ...]] | None = None
    for label, one in enumerate(classes):
        paths = sorted(path for path in (folder / one).rglob("*") if path.suffix.lower() in _PICTURES)
        if not paths:
            raise ValueError(
                f"its subfolder {one} holds no image ({', '.join(_PICTURES[:3])} ...): give one subfolder a class"
            )
        for path in paths:
            try:
                with Image.open(path) as opened:
                    image = np.asarray(opened.convert("L"))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{path.relative_to(folder)} is no image that can be read") from error
            first = first or (path, image.shape)
            if image.shape != first[1]:
                sizes = [
                    f"{path.relative_to(folder)} is {shape[1]} x {shape[0]}"
                    for path, shape in (first, (path, image.shape))
                ]
                raise ValueError(f"{' and '.join(sizes)} pixels: give all images one size")
            images.append(image)
            labels.append(label)
    return ImageData(name, np.stack(images), np.array(labels, np.int64), tuple(classes))


def series(name: str, split: str, files: Sequence[Path]) -> SeriesData:
    """A table of numbers apart by comma, without names, a row a day."""
    import numpy as np

    return SeriesData(name, np.loadtxt(io.StringIO(_text(files[0])), delimiter=",", comments=None, ndmin=2), "one day")


def _idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file of bytes: a magic number, the extents, the values."""
    import numpy as np

    raw = _content(file)
    if len(raw) < 4 + 4 * dimensions or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{file.name} is not an IDX file of bytes in {dimensions} dimensions")
    shape = tuple(int(extent) for extent in np.frombuffer(raw, ">u4", dimensions, 4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ValueError(f"{file.name} holds {values.size} values, its head says {math.prod(shape)}")
    return values.reshape(shape).copy()


def mnist(name: str, split: str, files: Sequence[Path]) -> ImageData:
    """Two gzipped IDX files, of images and of labels."""
    import numpy as np

    images, labels = _idx(files[0], 3), _idx(files[1], 1)
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    return ImageData(name, images, labels.astype(np.int64), tuple("0123456789"))


def omniglot(name: str, split: str, files: Sequence[Path]) -> CharacterData:
    """An archive of alphabet/character/number_drawer.png."""
    import numpy as np
    from PIL import Image

    # .../Balinese/character01/0108_07.png: the seventh drawer's version of the character.
    drawings: list[tuple[str, str, int, str]] = []
    with zipfile.ZipFile(files[0]) as archive:
        for member in archive.namelist():
            if member.endswith(".png"):
                found = re.fullmatch(r"(?:.*/)?([^/]+)/([^/]+)/\d+_(\d+)\.png", member)
                if found is None:
                    raise ValueError(f"{member} in it is not alphabet/character/number_drawer.png")
                alphabet, character, drawer = found.groups()
                drawings.append((alphabet, f"{alphabet}/{character}", int(drawer), member))
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
