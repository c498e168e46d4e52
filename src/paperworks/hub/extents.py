"""What is known of each data set by name, so that another under its name is refused, wherever it came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from paperworks.hub.kinds import (
    CharacterData,
    Conversation,
    Dataset,
    ImageData,
    QuestionData,
    SeriesData,
    TableData,
    TextData,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Copies may be rounded by this much of the way from the smallest value to the largest.
_ROUNDED = 1e-3


@dataclass(frozen=True)
class Extent:
    """What is known of one part of a data set.

    Attributes:
        sizes: how many there are of what, as `sizes` counts.
        values: the smallest and the largest feature or value, where there are bounds.
        targets: the smallest and the largest target of a regression, where there are bounds.
        mean_target: their mean.
    """

    sizes: dict[str, int]
    values: tuple[float, float] = (-math.inf, math.inf)
    targets: tuple[float, float] = (-math.inf, math.inf)
    mean_target: float = math.nan


def sizes(data: Dataset) -> dict[str, int]:
    r"""How many there are of what a data set consists of.

    Example:
        >>> sizes(TextData("two words", "", "One.\n\nTwo.\n"))
        {'lines': 3, 'words': 2}
    """
    match data:
        case TextData():
            return {"lines": data.text.count("\n"), "words": len(data.text.split())}
        case QuestionData():
            return {"items": len(data)}
        case TableData():
            rows, features = data.X.shape
            return {"rows": rows, "features": features, "classes": len(data.classes)}
        case ImageData():
            images, height, width = data.images.shape
            counted = {
                "images": images,
                "rows of pixels": height,
                "columns of pixels": width,
                "classes": len(data.classes),
            }
            return counted | ({"alphabets": len(data.alphabets)} if isinstance(data, CharacterData) else {})
        case SeriesData():
            times, series = data.values.shape
            return {"times": times, "series": series}


def content(data: Dataset) -> str:
    r"""SHA-256 of what a data set holds, in hexadecimal; how its files are laid out does not matter.

    Example:
        >>> content(TextData("a", "", "One.\n")) == content(TextData("b", "", " One.\n\n"))
        True
    """
    digest = hashlib.sha256()
    for part in _parts(data):
        digest.update(part)
    return digest.hexdigest()


def _parts(data: Dataset) -> Iterator[bytes]:
    match data:
        case TextData():
            yield "\n".join(data.paragraphs).encode()
        case QuestionData():
            # Copies of MT-bench number and sort into categories as they like.
            items = [item.turns if isinstance(item, Conversation) else astuple(item) for item in data]
            yield json.dumps(items).encode()
        case TableData():
            yield from _bytes(data.X, data.y)
        case ImageData():
            yield from _bytes(data.images, data.labels)
            if isinstance(data, CharacterData):
                yield from _bytes(data.alphabet, data.drawer)
        case SeriesData():
            yield from _bytes(data.values)


def _bytes(*arrays: NDArray[Any]) -> Iterator[bytes]:
    for array in arrays:
        # A zero has one sign only, and numbers their least significant byte first.
        yield (array + 0).astype(array.dtype.newbyteorder("<")).tobytes()


def check(data: Dataset, *, from_files: bool = False) -> None:
    """Compare a data set by name with what is known of it.

    Args:
        data: as it was read.
        from_files: compare its content too. What a package or a hub gives has its publisher's checksums, and need not be
            written as the files are.

    Raises:
        ValueError: it has another extent, values out of range or, from files, other content.
    """
    key = data.name, getattr(data, "split", "")
    known = EXTENTS.get(key)
    if known is None:
        return
    if (found := sizes(data)) != known.sizes:
        kinds = [kind for kind in known.sizes if found[kind] != known.sizes[kind]]
        raise ValueError(
            f"it has {_count(found, kinds)}, and {' '.join(filter(None, key))} has {_count(known.sizes, kinds)}"
        )
    match data:
        case TableData():
            _check_range("feature", data.X, *known.values)
            if data.classes:
                _check_labels(data.y, len(data.classes))
            else:
                _check_range("target", data.y, *known.targets)
                if not math.isclose(data.y.mean(), known.mean_target, rel_tol=_ROUNDED):
                    raise ValueError(
                        f"the mean target is {data.y.mean():.6g}, and {data.name} has {known.mean_target:.6g}"
                    )
        case ImageData():
            _check_labels(data.labels, len(data.classes))
        case SeriesData():
            _check_range("value", data.values, *known.values)
    if from_files and content(data) != CONTENTS.get(key, content(data)):
        raise ValueError(f"it has the size of {data.name}, but other content (its SHA-256 is another)")


def _count(found: dict[str, int], kinds: list[str]) -> str:
    return " and ".join(f"{found[kind]} {kind}" for kind in kinds)


def _check_range(kind: str, values: NDArray[Any], low: float, high: float) -> None:
    import numpy as np

    slack = _ROUNDED * (high - low) if math.isfinite(high - low) else 0
    outside = np.argwhere(~((values >= low - slack) & (values <= high + slack) & np.isfinite(values)))
    if len(outside):
        place = tuple(outside[0])
        raise ValueError(f"{kind} {values[place]:g} in row {place[0] + 1} is not within {low:g} and {high:g}")


def _check_labels(labels: NDArray[Any], classes: int) -> None:
    import numpy as np

    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(f"label {labels[outside[0]]} of item {outside[0] + 1} is not within 0 and {classes - 1}")
    if empty := classes - len(np.unique(labels)):
        raise ValueError(f"{empty} of its {classes} classes are without an item")


def _table(rows: int, features: int, classes: int = 0) -> dict[str, int]:
    return {"rows": rows, "features": features, "classes": classes}


def _text(lines: int, words: int) -> dict[str, int]:
    return {"lines": lines, "words": words}


def _images(images: int, side: int, classes: int) -> dict[str, int]:
    return {"images": images, "rows of pixels": side, "columns of pixels": side, "classes": classes}


# By name and part.
EXTENTS = {
    # The published counts of words have an end mark for each line.
    ("wikitext-2", "train"): Extent(_text(36_718, 2_088_628 - 36_718)),
    ("wikitext-2", "valid"): Extent(_text(3_760, 217_646 - 3_760)),
    ("wikitext-2", "test"): Extent(_text(4_358, 245_569 - 4_358)),
    ("gsm8k", "train"): Extent({"items": 7_473}),
    ("gsm8k", "test"): Extent({"items": 1_319}),
    ("humaneval", ""): Extent({"items": 164}),
    ("mt_bench", ""): Extent({"items": 80}),
    ("mnist-10k", ""): Extent(_images(10_000, 28, 10)),
    ("omniglot", ""): Extent(_images(2_720, 105, 136) | {"alphabets": 5}),
    ("exchange_rate", ""): Extent({"times": 7_588, "series": 8}, (0.006254, 2.109)),
    ("uci:bostonHousing", ""): Extent(_table(506, 13), (0, 711), (5, 50), 22.53281),
    ("uci:energy", ""): Extent(_table(768, 8), (0, 808.5), (6.01, 43.1), 22.30720),
    ("uci:kin8nm", ""): Extent(_table(8_192, 8), (-1.570681, 1.570753), (0.0401654, 1.458521), 0.7142835),
    ("uci:power-plant", ""): Extent(_table(9_568, 4), (1.81, 1033.3), (420.26, 495.76), 454.3650),
    ("uci:wine-quality-red", ""): Extent(_table(1_599, 11), (0, 289), (3, 8), 5.636023),
    ("digits", ""): Extent(_table(1_797, 64, 10), (0, 16)),
    ("breast_cancer", ""): Extent(_table(569, 30, 2), (0, 4254)),
    ("wine", ""): Extent(_table(178, 13, 3), (0.13, 1680)),
    ("iris", ""): Extent(_table(150, 4, 3), (0.1, 7.9)),
    ("diabetes", ""): Extent(_table(442, 10), (-0.1377672, 0.1987880), (25, 346), 152.1335),
    ("california_housing", ""): Extent(_table(20_640, 8), targets=(0.14999, 5.00001), mean_target=2.068558),
    ("mnist1d", "train"): Extent(_table(4_000, 40, 10)),
    ("mnist1d", "test"): Extent(_table(1_000, 40, 10)),
}

# SHA-256 of what those hold that are read from files, as `content` reckons it; the train part of WikiText-2 was not at hand.
CONTENTS = {
    ("wikitext-2", "valid"): "391e61aa30d9e6e8df638b3bae4279c1c07744cd70e85597af2d25e1127dc5cf",
    ("wikitext-2", "test"): "95c00987012b5f52a0ccc98405b19795ef1f4725cef3b0d2cf9a2052dbc2b872",
    ("gsm8k", "train"): "78212a281c5c91ee0a8a573ee3387c55d62493ea1853a46f94668e8382b45bf6",
    ("gsm8k", "test"): "9ba9db83465ec4c9450b62c0dc13a69505d69a27c6a0817d7dfa679b496276e9",
    ("humaneval", ""): "c3d5eafcda64133dc03d62daf1da769670f76db99a98c9a462a880400c68b550",
    ("mt_bench", ""): "08c588a334985a99c573caa90fa225455eef4da3d885774ed46d8371499bf401",
    ("mnist-10k", ""): "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
    ("omniglot", ""): "6180bd6d7d120f6c9d4f4baa7aa6e960a38cf64303c6088fba1d65feaefeede9",
    ("exchange_rate", ""): "104309475f8e69b4df233c35c706ee6b1b6a5719ea39eb4ad9fbe5ce55b97a82",
    ("uci:bostonHousing", ""): "a452688f7de3e21b6013d6c370ad53e04c3181c33ad9f0dd91b8b2f67317e787",
    ("uci:energy", ""): "f1b4ffffca1a4a6cbf7a814738731cb60bf9a7721b56e754e20cdca07a9ef9a0",
    ("uci:kin8nm", ""): "62724b272be0bfde5e0518c43da7800caae1373d3a39a2ff69890921152b54d5",
    ("uci:power-plant", ""): "bbe83d856e3255f5749587de7597a6fa48916bb1dce0865d3dc82d60fedd9d3d",
    ("uci:wine-quality-red", ""): "ab3b807dc4b7b8ef574f2dc395e5aada904bd7941c1802f3b3c998738fe53323",
}
