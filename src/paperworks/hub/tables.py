"""A user's own table of numbers, the last of which may be words: every line becomes a row, or it is said why not.

What `DataFrame.to_csv`, `numpy.savetxt` and spreadsheets write is read as it is meant where that is certain. Where it is
not (a first line that may be names or numbers, a gap, a decimal comma), the table is refused with what to change.
"""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_GAPS = {"", "na", "n/a", "#n/a", "nan", "null", "none", "?"}
_TRUTHS = {"true": 1.0, "false": 0.0}
# Whole numbers beyond it are rounded in float64.
_EXACT = 2**53


class _Line(NamedTuple):
    number: int  # in the file, from 1
    cells: list[str]  # without space around them


def read_table(text: str) -> tuple[NDArray[np.float64], tuple[str, ...], tuple[str, ...]]:
    r"""The numbers in a text, apart by semicolon, comma or space, and the names in its first line, if any.

    The last column may hold words instead, each in several rows: they are classes, of which the numbers are indices.

    A first column that has no name, beside others that have, and holds different whole numbers is the index that
    `DataFrame.to_csv` writes: it is left out with a warning. True and False are 1 and 0.

    Args:
        text: what the file holds.

    Returns:
        float64, rows x columns, finite; as many names, or () where the first line holds numbers; and the classes in the
        last column, () where it holds numbers.

    Raises:
        ValueError: the text is no such table, or can be read in two ways.

    Example:
        >>> cells, names, classes = read_table("a;b\n1;2.5\n3;4\n")
        >>> cells.tolist(), names, classes
        ([[1.0, 2.5], [3.0, 4.0]], ('a', 'b'), ())
        >>> read_table("length,kind\n1,cat\n3,dog\n2,cat\n")[2]
        ('cat', 'dog')
    """
    import numpy as np

    lines = _lines(text)
    width = len(lines[0].cells)
    for number, cells in lines:
        if len(cells) != width:
            raise ValueError(
                f"line {number} has another number of cells ({len(cells)}) than line {lines[0].number} ({width})"
            )
    names: tuple[str, ...] = ()
    if _holds_names(lines):
        # pandas reads a name that is missing as "Unnamed: 0", and may have written it again.
        names = tuple("" if re.fullmatch(r"Unnamed: \d+(\.\d+)?", name) else name for name in lines.pop(0).cells)
    if not lines:
        raise ValueError("there are no rows below the names")
    columns = list(zip(*(cells for _, cells in lines), strict=True))
    while names and not names[0] and _is_index(columns[0]):
        warnings.warn(
            "The first column is left out: it has no name and holds the index that DataFrame.to_csv writes; name it if "
            "it is a feature, or write to_csv(..., index=False).",
            stacklevel=5,
        )
        names, columns = names[1:], columns[1:]
    _check_names(names)
    labels = names or tuple(map(str, range(1, width + 1)))
    classes = classes_of(columns[-1]) if len(columns) > 1 else ()
    if classes:
        columns[-1] = tuple(str(classes.index(cell)) for cell in columns[-1])
    table = np.array([_numbers(label, column, lines) for label, column in zip(labels, columns, strict=True)]).T
    _check_counts(table, names)
    return np.ascontiguousarray(table), names, classes


def classes_of(column: Sequence[str]) -> tuple[str, ...]:
    """The different words in a column, in order; () where it holds other things, or every word but once.

    Example:
        >>> classes_of(["setosa", "virginica", "setosa"]), classes_of(["setosa", "2"]), classes_of(["red", "blue"])
        (('setosa', 'virginica'), (), ())
    """
    words = all(cell[:1].isalpha() and not _is_number(cell) and cell.lower() not in _GAPS for cell in column)
    found = tuple(sorted(set(column)))
    return found if words and len(found) < len(column) else ()


def _lines(text: str) -> list[_Line]:
    """The lines that are not empty, cut into cells."""
    raw = [line if line.strip() else "" for line in re.split("\r\n|\r|\n", text)]
    first = next(filter(None, raw), None)
    if first is None:
        raise ValueError("the file is empty")
    unquoted = re.sub('"[^"]*"', "", first)
    delimiter = next((mark for mark in ";," if mark in unquoted), " ")
    if delimiter == " ":
        raw = [" ".join(line.split()) for line in raw]
    reader = csv.reader(raw, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return [_Line(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not CSV ({error})") from error


def _holds_names(lines: Sequence[_Line]) -> bool:
    """Whether the first line holds names.

    Raises:
        ValueError: it may hold names or numbers.
    """
    number, first = lines[0]
    numbers = [cell for cell in first if _is_number(cell)]
    # A word that stands again below it is a class, and no name.
    if (
        len(numbers) == len(first) - 1
        and not _is_number(first[-1])
        and classes_of([cells[-1] for _, cells in lines])
        and any(cells[-1] == first[-1] for _, cells in lines[1:])
    ):
        return False
    words = [cell for cell in first if not _is_number(cell) and cell.lower() not in _GAPS]
    # The columns of a frame that has no names count from 0, and its index has no name either.
    if words or (not first[0] and len(numbers) == len(first) - 1):
        if numbers and not _count(numbers):
            raise ValueError(
                f"line {number} holds numbers ({numbers[0]}) beside {repr(words[0]) if words else 'a gap'}: let the first "
                "line name every column by a word, or none"
            )
        return True
    if len(numbers) == len(first) and (_count(first) or _looks_unlike(first, lines[1:])):
        raise ValueError(
            f"line {number} ({', '.join(first[:3])}{', ...' if len(first) > 3 else ''}) may be names or numbers: name every "
            "column by a word, in its place or in a line above it"
        )
    return False


def _count(cells: Sequence[str]) -> bool:
    """Whether cells count on by one: from 0 or 1, or from anywhere where there are three or more."""
    if not all(re.fullmatch(r"\d+", cell) for cell in cells):
        return False
    numbers = [int(cell) for cell in cells]
    return numbers == list(range(numbers[0], numbers[-1] + 1)) and (numbers[0] < 2 or len(numbers) > 2)


def _looks_unlike(first: Sequence[str], lines: Sequence[_Line]) -> bool:
    """Whether the first line holds different whole numbers, and all below it fractions: years, say, above rates."""
    whole = all(re.fullmatch(r"\d+", cell) for cell in first) and len(set(first)) == len(first)
    return whole and bool(lines) and all("." in cell for _, cells in lines for cell in cells)


def _is_index(column: Sequence[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", cell) for cell in column) and len(set(column)) == len(column)


def _check_names(names: Sequence[str]) -> None:
    for position, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"column {position} has no name: give it one, or leave it out")
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} columns are named {name!r}: give each its own name")
        if name.lower() == "target" and position < len(names):
            raise ValueError(
                f"column {position} is named {name!r}, but the target is the last column ({names[-1]!r}): move it"
            )


def _numbers(label: str, column: Sequence[str], lines: Sequence[_Line]) -> list[float]:
    """The cells of a column as finite numbers."""
    if all(cell.lower() in _TRUTHS for cell in column):
        return [_TRUTHS[cell.lower()] for cell in column]
    numbers = []
    for cell, (number, _) in zip(column, lines, strict=True):
        where = f"line {number}, column {label}"
        if cell.lower() in _GAPS:
            raise ValueError(f"{where} is a gap ({cell!r}): fill it, or leave out the line")
        if re.fullmatch(r"[-+.,'\d]*\d[,'][-+.,'\d]*", cell):
            raise ValueError(f"{where} holds {cell!r:.40}: write decimals with a point, and nothing between thousands")
        if not _is_number(cell) or cell.lower() in _TRUTHS:
            raise ValueError(
                f"{where} holds {cell!r:.40}, no number: write a category as columns of 0 and 1, or leave it out"
            )
        value = float(cell)
        if not math.isfinite(value):
            raise ValueError(f"{where} is not a finite number ({cell})")
        if abs(value) > _EXACT and re.fullmatch(r"[-+]?\d+", cell):
            raise ValueError(f"{where} holds {cell}, more digits than float64 keeps: leave out identifiers")
        numbers.append(value)
    return numbers


def _is_number(cell: str) -> bool:
    if cell.lower() in _GAPS or "_" in cell:
        return False
    try:
        float(_TRUTHS.get(cell.lower(), cell))
    except ValueError:
        return False
    return True


def _check_counts(table: NDArray[np.float64], names: Sequence[str]) -> None:
    """Refuse, or warn of, columns that only count the rows, from 0 or 1."""
    import numpy as np

    if len(table) < 3:
        return
    counts = np.arange(len(table))[:, None]
    for column in np.flatnonzero((table == counts).all(0) | (table == counts + 1).all(0)).tolist():
        if column == table.shape[1] - 1:
            raise ValueError("the last column, which is the target, only counts the rows")
        if not names and column == 0:
            raise ValueError("the first column only counts the rows: leave it out, or name the columns in a first line")
        warnings.warn(
            f"Column {names[column] if names else column + 1} only counts the rows: leave it out if it is an index.",
            stacklevel=6,
        )
