"""Data sets from files: each reader takes the set's name, its part and its files, and raises ValueError on a damaged one."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
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
    """A table of numbers whose last column is the target."""
    cells, names = read_table(_text(files[0]))
    if cells.shape[1] < 2:
        raise ValueError("a table needs a feature and, as its last column, the target")
    y = cells[:, -1].copy()
    if (y == y[0]).all():
        raise ValueError(f"the last column, which is the target, is {y[0]:g} in every row: put the target last")
    return TableData(name, split, cells[:, :-1].copy(), y, names[:-1])


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
