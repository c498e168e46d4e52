"""Data sets that an installed package, the Hugging Face Hub or OpenML has; what comes over a network is checked."""

from __future__ import annotations

import random
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from paperworks.errors import UsageError
from paperworks.hub.extents import EXTENTS
from paperworks.hub.kinds import ImageData, Item, QuestionData, TableData, TextData
from paperworks.hub.places import from_hugging_face
from paperworks.hub.readers import items_of

CLASSES = ("digits", "breast_cancer", "wine", "iris")


def scikit_learn(name: str, split: str) -> TableData:
    """A table that scikit-learn ships, or downloads."""
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
    classes = tuple(str(label) for label in getattr(found, "target_names", ())) if name in CLASSES else ()
    y = found.target.astype(np.int64 if classes else np.float64)
    features = tuple(str(feature) for feature in found.feature_names)
    return TableData(name, split, found.data.astype(np.float64), y, features, classes)


def mnist1d(name: str, split: str) -> TableData:
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


@dataclass(frozen=True)
class Hosted:
    """A data set on the Hugging Face Hub.

    Attributes:
        place: Its file in a folder of all data; may hold {split}.
        repository: On the Hub.
        revision: The commit that is known.
        files: Pattern of its files there; may hold {split}.
    """

    place: str
    repository: str
    revision: str
    files: str


WIKITEXT = Hosted(
    "wikitext-2/{split}.txt",
    "Salesforce/wikitext",
    "b08601e04326c79dfdd32d625aee71d232d685c3",
    "wikitext-2-v1/{split}-*.parquet",
)
GSM8K = Hosted(
    "gsm8k/{split}.jsonl",
    "openai/gsm8k",
    "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "main/{split}-*.parquet",
)
HUMANEVAL = Hosted(
    "humaneval/HumanEval.jsonl.gz",
    "openai/openai_humaneval",
    "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "openai_humaneval/test-*.parquet",
)
MT_BENCH = Hosted(
    "mt_bench/question.jsonl",
    "HuggingFaceH4/mt_bench_prompts",
    "e3a795c5e9a82ee40611c416b8a7786c73198991",
    "data/train-*.parquet",
)


def _rows(name: str, split: str, hosted: Hosted) -> list[dict[str, Any]]:
    """The records of one part on the Hub."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(f"Reading {name} from the Hub needs pyarrow: pip install pyarrow") from error
    pattern = hosted.files.format(split={"valid": "validation"}.get(split, split))
    cure = f"set PAPERWORKS_DATA to a folder that holds {hosted.place.format(split=split)}"
    folder = from_hugging_face(hosted.repository, [pattern], kind="dataset", revision=hosted.revision, cure=cure)
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob(pattern)):
        rows += parquet.read_table(file).to_pylist()
    return rows


def questions(hosted: Hosted, make: Callable[[dict[str, Any]], Item]) -> Callable[[str, str], QuestionData[Item]]:
    """What fetches questions from the Hub, of which `make` turns each record into an item."""

    def fetch(name: str, split: str) -> QuestionData[Item]:
        return QuestionData(name, split, items_of(_rows(name, split, hosted), make))

    return fetch


def wikitext(name: str, split: str) -> TextData:
    """WikiText-2 from the Hub."""
    # A line of space alone is an empty row there.
    return TextData(name, split, "".join(row["text"] or " \n" for row in _rows(name, split, WIKITEXT)))


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


# The files of MNIST's test part in a folder of all data.
MNIST = ("mnist-10k/images-idx3-ubyte.gz", "mnist-10k/labels-idx1-ubyte.gz")


def openml_mnist(name: str, split: str) -> ImageData:
    """The last 10,000 images of MNIST, which are its test part."""
    import numpy as np

    frame = _openml(name, 554, f"set PAPERWORKS_DATA to a folder that holds {' and '.join(MNIST)}")
    if frame.shape != (70_000, 785):
        raise UsageError(f"OpenML gave {name} as a table of {frame.shape}, not (70000, 785).")
    frame = frame.iloc[-10_000:]
    pixels = frame.iloc[:, :-1].to_numpy(np.float64)
    if not ((pixels >= 0) & (pixels <= 255)).all():
        raise ValueError("it has pixels that are not within 0 and 255")
    images = pixels.astype(np.uint8).reshape(-1, 28, 28)
    return ImageData(name, images, frame.iloc[:, -1].astype(np.int64).to_numpy(), tuple("0123456789"))


# Name of a table of UCI -> its number on OpenML, where it has one.
UCI: dict[str, int | None] = {
    "bostonHousing": 531,
    "energy": 1472,
    "kin8nm": 189,
    "power-plant": None,
    "wine-quality-red": 40691,
}


def openml_uci(name: str, split: str) -> TableData:
    """A table of `UCI` from OpenML."""
    import numpy as np

    short = name.removeprefix("uci:")
    number = UCI[short]
    assert number is not None
    frame = _openml(name, number, f"set PAPERWORKS_DATA to a folder that holds uci/{short}.txt")
    # The energy table has a second target behind the first.
    width = EXTENTS[name, split].sizes["features"] + 1
    table = frame.iloc[:, :width].astype("float64").to_numpy()
    features = tuple(str(column) for column in frame.columns[: width - 1])
    return TableData(name, split, np.ascontiguousarray(table[:, :-1]), table[:, -1].copy(), features)
