"""Data sets from files: each reader takes the set's name, its part and its files, and raises ValueError on a damaged one."""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def text(name: str, split: str, files: Sequence[Path]) -> TextData:
    """Running text in UTF-8."""
    content = files[0].read_text(encoding="utf-8")
    if not content.strip():
        raise ValueError("the file is empty")
    return TextData(name, split, content)


def _content(file: Path) -> bytes:
    """What a file holds, compressed or not."""
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    records = []
    for number, line in enumerate(_content(file).decode("utf-8").split("\n"), 1):
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
    return Question(record["question"], record["answer"])


def problem(record: dict[str, Any]) -> Problem:
    """A record of HumanEval."""
    solution = record["canonical_solution"]
    return Problem(record["task_id"], record["prompt"], solution, record["test"], record["entry_point"])


def conversation(record: dict[str, Any]) -> Conversation:
    """A record of MT-bench."""
    # The Hub's copy of MT-bench names two of the fields differently.
    number = record["question_id"] if "question_id" in record else record["prompt_id"]
    turns = record["turns"] if "turns" in record else record["prompt"]
    return Conversation(int(number), record["category"], tuple(turns))


def questions(
    make: Callable[[dict[str, Any]], Item],
) -> Callable[[str, str, Sequence[Path]], QuestionData[Item]]:
    """A reader of JSON lines, each of which `make` turns into an item."""

    def read(name: str, split: str, files: Sequence[Path]) -> QuestionData[Item]:
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

    rows = [line for line in _content(file).decode("utf-8-sig").splitlines() if line.strip()]
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


def table(name: str, split: str, files: Sequence[Path]) -> TableData:
    """A table of numbers whose last column is the target."""
    cells, names = _numbers(files[0])
    if cells.shape[1] < 2:
        raise ValueError("a table needs a feature and, as its last column, the target")
    return TableData(name, split, cells[:, :-1].copy(), cells[:, -1].copy(), names[:-1])


def series(name: str, split: str, files: Sequence[Path]) -> SeriesData:
    """A table of numbers, a row a day."""
    return SeriesData(name, _numbers(files[0])[0], "one day")


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
