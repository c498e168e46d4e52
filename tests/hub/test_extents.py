"""A data set by name holds what is known of it, or is refused: wherever it comes from, and whatever differs."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.hub import datasets, load_dataset, prompts
from paperworks.hub.extents import CONTENTS, EXTENTS, check, content, sizes
from paperworks.hub.kinds import Conversation, Question, QuestionData, SeriesData, TableData, TextData
from tests.hub.test_data import idx

DATA = os.environ.get("PAPERWORKS_DATA")
real = pytest.mark.skipif(not DATA, reason="PAPERWORKS_DATA is not set")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path))
    return tmp_path


def put(root: Path, place: str, contents: bytes | str) -> Path:
    file = root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return file


def table(rows: int, columns: int, seed: int = 0) -> str:
    stream = io.StringIO()
    np.savetxt(stream, np.random.default_rng(seed).uniform(0.1, 1.4, (rows, columns)), fmt="%.6f")
    return stream.getvalue()


def questions(count: int) -> str:
    return "".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(count))


def problems(count: int) -> bytes:
    record = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "pass", "entry_point": "f"}
    lines = [json.dumps(record | {"task_id": f"HumanEval/{n}"}) for n in range(count)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


def conversations(count: int) -> str:
    lines = [{"question_id": n, "category": "math", "turns": [f"{n}?", "And?"]} for n in range(count)]
    return "\n".join(map(json.dumps, lines))


def characters(alphabets: int, each: int, drawers: int, side: int = 105) -> bytes:
    from PIL import Image

    stream, drawing = io.BytesIO(), io.BytesIO()
    Image.new("1", (side, side), 1).save(drawing, "PNG")
    with zipfile.ZipFile(stream, "w") as archive:
        for alphabet in range(alphabets):
            for character in range(each):
                for drawer in range(1, drawers + 1):
                    archive.writestr(f"a/A{alphabet}/c{character:03}/1_{drawer:02}.png", drawing.getvalue())
    return stream.getvalue()


def rates(values: np.ndarray) -> bytes:
    stream = io.StringIO()
    np.savetxt(stream, values, fmt="%.6f", delimiter=",")
    return gzip.compress(stream.getvalue().encode(), mtime=0)


def test_every_data_set_by_name_is_known(root: Path) -> None:
    names = {name for name, _ in EXTENTS}
    assert names == {entry.name for entry in datasets()}
    assert {split for name, split in EXTENTS if name == "wikitext-2"} == {"train", "valid", "test"}
    # What was at hand when this was written down: every one that is read from files, but for one part.
    of_files = {name for name, _ in EXTENTS if "scikit-learn" not in origin(name) and name != "mnist1d"}
    assert {key for key in EXTENTS if key[0] in of_files} - set(CONTENTS) == {("wikitext-2", "train")}
    assert len(set(CONTENTS.values())) == len(CONTENTS) == 14


def origin(name: str) -> str:
    return next(entry.origin for entry in datasets() if entry.name == name)


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("uci:kin8nm", {"uci/kin8nm.txt": table(37, 4)}, "has 37 rows and 3 features, and uci:kin8nm has 8192 rows and 8 f"),
        ("uci:kin8nm", {"uci/kin8nm.txt": table(8192, 8)}, "has 7 features, and uci:kin8nm has 8 features;"),
        ("uci:bostonHousing", {"uci/bostonHousing.txt": table(505, 14)}, "505 rows, and uci:bostonHousing has 506 rows"),
        ("uci:energy", {"uci/energy.txt": table(768, 10)}, "9 features, and uci:energy has 8"),
        ("uci:power-plant", {"uci/power-plant.txt": table(2, 5)}, "2 rows, and uci:power-plant has 9568"),
        ("uci:wine-quality-red", {"uci/wine-quality-red.txt": table(1599, 13)}, "12 features, and .* has 11"),
        ("gsm8k", {"gsm8k/test.jsonl": questions(1)}, "has 1 items, and gsm8k test has 1319 items"),
        ("gsm8k", {"gsm8k/test.jsonl": questions(7473)}, "has 7473 items, and gsm8k test has 1319"),
        ("humaneval", {"humaneval/HumanEval.jsonl.gz": problems(163)}, "163 items, and humaneval has 164"),
        ("mt_bench", {"mt_bench/question.jsonl": conversations(81)}, "81 items, and mt_bench has 80"),
        ("wikitext-2", {"wikitext-2/test.txt": "One line.\n"}, "1 lines and 2 words, and wikitext-2 test has 4358 lines"),
        ("omniglot", {"omniglot/images_background_small1.zip": characters(5, 2, 2, 12)}, "20 images and 12 rows of pixels"),
        (
            "mnist-10k",
            {
                "mnist-10k/images-idx3-ubyte.gz": idx(np.zeros((20, 28, 28))),
                "mnist-10k/labels-idx1-ubyte.gz": idx(np.arange(20) % 10),
            },
            "has 20 images, and mnist-10k has 10000",
        ),
        ("exchange_rate", {"exchange_rate/exchange_rate.txt.gz": rates(np.ones((7588, 7)))}, "7 series, and .* has 8"),
    ],
)  # fmt: skip
def test_files_of_another_extent_are_refused(root: Path, name: str, files: dict[str, Any], reason: str) -> None:
    placed = [put(root, place, contents) for place, contents in files.items()]
    with pytest.raises(UsageError, match=reason) as error:
        load_dataset(name)
    assert str(placed[0]) in str(error.value) and "\n" not in str(error.value)
    # By its path it goes under the same name.
    with pytest.raises(UsageError, match=reason):
        load_dataset(name, path=placed[0].parent)


def test_prompts_of_another_mt_bench_are_refused(root: Path) -> None:
    put(root, "mt_bench/question.jsonl", conversations(3))
    with pytest.raises(UsageError, match="3 items, and mt_bench has 80"):
        prompts("mt_bench")
    put(root, "mt_bench/question.jsonl", conversations(80))
    with pytest.raises(UsageError, match="size of mt_bench, but other content"):
        prompts("mt_bench")


def test_a_label_of_200_is_no_digit(root: Path) -> None:
    labels = np.arange(10_000) % 10
    labels[16] = 200
    put(root, "mnist-10k/images-idx3-ubyte.gz", idx(np.zeros((10_000, 28, 28))))
    put(root, "mnist-10k/labels-idx1-ubyte.gz", idx(labels))
    with pytest.raises(UsageError, match="label 200 of item 17 is not within 0 and 9"):
        load_dataset("mnist-10k")
    put(root, "mnist-10k/labels-idx1-ubyte.gz", idx(np.full(10_000, 3)))
    with pytest.raises(UsageError, match="9 of its 10 classes are without an item"):
        load_dataset("mnist-10k")
    put(root, "mnist-10k/labels-idx1-ubyte.gz", idx(np.arange(10_000) % 10))
    with pytest.raises(UsageError, match="size of mnist-10k, but other content"):
        load_dataset("mnist-10k")


def test_values_out_of_range_are_refused_by_row(root: Path) -> None:
    values = np.ones((7588, 8))
    values[100, 3] = 2.2
    put(root, "exchange_rate/exchange_rate.txt.gz", rates(values))
    with pytest.raises(UsageError, match=r"value 2\.2 in row 101 is not within 0\.006254 and 2\.109"):
        load_dataset("exchange_rate")
    values[100, 3] = np.nan
    put(root, "exchange_rate/exchange_rate.txt.gz", rates(values))
    with pytest.raises(UsageError, match="value nan in row 101"):
        load_dataset("exchange_rate")
    rows = np.random.default_rng(0).uniform(0.1, 1.4, (8192, 9))
    rows[5, 2] = 3
    stream = io.StringIO()
    np.savetxt(stream, rows, fmt="%.5f")
    put(root, "uci/kin8nm.txt", stream.getvalue())
    with pytest.raises(UsageError, match=r"feature 3 in row 6 is not within -1\.57068 and 1\.57075"):
        load_dataset("uci:kin8nm")


@pytest.mark.parametrize(
    ("name", "place", "make"),
    [
        ("gsm8k", "gsm8k/test.jsonl", lambda: questions(1319)),
        ("humaneval", "humaneval/HumanEval.jsonl.gz", lambda: problems(164)),
        ("wikitext-2", "wikitext-2/test.txt", lambda: "word\n" * 4357 + "word " * (245_569 - 2 * 4358 + 1) + "\n"),
        ("exchange_rate", "exchange_rate/exchange_rate.txt.gz", lambda: rates(np.ones((7588, 8)))),
    ],
)
def test_other_contents_of_the_same_extent_are_refused(
    root: Path, name: str, place: str, make: Callable[[], bytes | str]
) -> None:
    put(root, place, make())
    with pytest.raises(UsageError, match=f"size of {name}, but other content"):
        load_dataset(name)


def test_own_tables_have_no_extent(root: Path) -> None:
    put(root, "uci/mine.txt", table(7, 3))
    assert load_dataset("uci:mine").X.shape == (7, 2)  # type: ignore[union-attr]


def test_what_scikit_learn_ships_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import datasets as shipped

    iris = shipped.load_iris()
    monkeypatch.setattr(shipped, "load_iris", lambda: iris)
    for change, reason in (
        ({"data": iris.data[:-1], "target": iris.target[:-1]}, "149 rows, and iris has 150"),
        ({"data": iris.data[:, 1:]}, "3 features, and iris has 4"),
        ({"data": iris.data * 10}, "is not within 0.1 and 7.9"),
        ({"target": iris.target % 2}, "1 of its 3 classes"),
        ({"target": iris.target + 1}, "label 3 of item 101 is not within 0 and 2"),
    ):
        changed = shipped.load_iris().copy() | change
        with monkeypatch.context() as patch:
            patch.setattr(shipped, "load_iris", lambda changed=changed: type(iris)(**changed))
            with pytest.raises(UsageError, match=reason) as error:
                load_dataset("iris")
        assert "(scikit-learn)" in str(error.value)
    assert load_dataset("iris").X.shape == (150, 4)


def test_every_shipped_set_is_as_known() -> None:
    for name in ("digits", "breast_cancer", "wine", "iris", "diabetes"):
        data: Any = load_dataset(name)
        assert sizes(data) == EXTENTS[name, ""].sizes
        assert (data.X.min(), data.X.max()) == pytest.approx(EXTENTS[name, ""].values, rel=1e-5)


def test_contents_are_told_apart_and_layouts_are_not() -> None:
    X, y = np.arange(6.0).reshape(3, 2), np.arange(3.0)
    first = TableData("a", "", X, y, ("x", "y"))
    assert content(first) == content(TableData("b", "", np.asfortranarray(X), y + -0.0))
    assert content(first) != content(TableData("a", "", X[:, ::-1], y))
    assert content(SeriesData("a", X, "day")) != content(SeriesData("a", X[::-1], "day"))
    assert content(TextData("a", "", "a b\n")) != content(TextData("a", "", "a c\n"))
    turns = QuestionData("a", "", (Conversation(1, "math", ("a", "b")),))
    assert content(turns) == content(QuestionData("a", "", (Conversation(9, "x", ("a", "b")),)))
    assert content(turns) != content(QuestionData("a", "", (Conversation(1, "math", ("a", "c")),)))
    assert content(QuestionData("a", "", (Question("a", "b"),))) != content(
        QuestionData("a", "", (Question("ab", ""),))
    )


def test_rounded_copies_from_a_hub_pass_and_are_no_files() -> None:
    random = np.random.default_rng(0)
    y = random.uniform(0.1, 1.4, 8192)
    data = TableData("uci:kin8nm", "", random.uniform(-1.5, 1.5, (8192, 8)), y - y.mean() + 0.7143)
    data.X[0, 0] = 1.5712
    check(data)
    data.X[0, 0] = 1.5742
    with pytest.raises(ValueError, match=r"feature 1\.5742 in row 1"):
        check(data)


# The real data


FILES = [
    ("wikitext-2", "valid", "wikitext-2/valid.txt", b"Homarus", b"Homarys"),
    ("wikitext-2", "test", "wikitext-2/test.txt", b"Fast Eddie", b"Fast Teddy"),
    ("gsm8k", "train", "gsm8k/train.jsonl", b"Natalia", b"Natalie"),
    ("gsm8k", "test", "gsm8k/test.jsonl", b"#### 18", b"#### 19"),
    ("humaneval", None, "humaneval/HumanEval.jsonl.gz", b"threshold: float", b"threshold: int"),
    ("mt_bench", None, "mt_bench/question.jsonl", b"Hawaii", b"Jamaica"),
    ("exchange_rate", None, "exchange_rate/exchange_rate.txt.gz", b"0.785500", b"0.785600"),
    ("uci:bostonHousing", None, "uci/bostonHousing.txt", b"65.20", b"65.30"),
    ("uci:energy", None, "uci/energy.txt", b"15.55", b"15.56"),
    ("uci:kin8nm", None, "uci/kin8nm.txt", b"-1.5119208e-02", b"-1.5119209e-02"),
    ("uci:power-plant", None, "uci/power-plant.txt", b"480.48", b"480.49"),
    ("uci:wine-quality-red", None, "uci/wine-quality-red.txt", b"7.4 0.7", b"7.4 0.8"),
]


def rewritten(file: Path, change: Callable[[bytes], bytes]) -> None:
    packed = file.suffix == ".gz"
    before = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
    after = change(before)
    assert after != before
    file.write_bytes(gzip.compress(after) if packed else after)


@real
@pytest.mark.parametrize(("name", "split", "place", "before", "after"), FILES)
def test_one_changed_figure_of_a_real_file_is_seen(
    root: Path, name: str, split: str | None, place: str, before: bytes, after: bytes
) -> None:
    put(root, place, (Path(str(DATA)) / place).read_bytes())
    load_dataset(name, split=split)
    # A mark before the text and other ends of lines are no other content.
    rewritten(root / place, lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    load_dataset(name, split=split)
    rewritten(root / place, lambda text: text.replace(before, after, 1))
    with pytest.raises(UsageError, match="but other content"):
        load_dataset(name, split=split)


@real
def test_a_real_table_apart_by_comma_under_names_is_the_same(root: Path) -> None:
    lines = (Path(str(DATA)) / "uci/power-plant.txt").read_text().split("\n")
    body = "\n".join(",".join(line.split()) for line in lines)
    put(root, "uci/power-plant.txt", "AT,V,AP,RH,PE\n" + body)
    assert load_dataset("uci:power-plant").features == ("AT", "V", "AP", "RH")
    put(root, "uci/power-plant.txt", "\n".join(" ".join(line.split()[::-1]) for line in lines))
    with pytest.raises(UsageError, match=r"target .* is not within 420\.26 and 495\.76"):
        load_dataset("uci:power-plant")


@real
def test_one_changed_pixel_or_label_is_seen(root: Path) -> None:
    from paperworks.hub.readers import _idx

    shutil.copytree(Path(str(DATA)) / "mnist-10k", root / "mnist-10k")
    shutil.copytree(Path(str(DATA)) / "omniglot", root / "omniglot")
    load_dataset("omniglot")
    data = load_dataset("mnist-10k")
    files = [root / "mnist-10k/images-idx3-ubyte.gz", root / "mnist-10k/labels-idx1-ubyte.gz"]
    for file, dimensions in zip(files, (3, 1), strict=True):
        before, values = file.read_bytes(), _idx(file, dimensions)
        values.ravel()[0] ^= 1
        file.chmod(0o644)
        file.write_bytes(idx(values))
        with pytest.raises(UsageError, match="but other content"):
            load_dataset("mnist-10k")
        file.write_bytes(before)
    assert np.array_equal(load_dataset("mnist-10k").labels, data.labels)
    archive = root / "omniglot/images_background_small1.zip"
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist() if name.endswith(".png")}
    from PIL import Image

    first = next(iter(members))
    drawing, stream = Image.open(io.BytesIO(members[first])).convert("1"), io.BytesIO()
    drawing.putpixel((0, 0), 0)
    drawing.save(stream, "PNG")
    archive.chmod(0o644)
    with zipfile.ZipFile(archive, "w") as new:
        for name, contents in (members | {first: stream.getvalue()}).items():
            new.writestr(name, contents)
    with pytest.raises(UsageError, match="size of omniglot, but other content"):
        load_dataset("omniglot")
