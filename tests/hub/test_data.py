"""Data by name: every set reads as it should, and a damaged or missing one says so in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.hub import datasets, extents, load_dataset, prompts

DATA = os.environ.get("PAPERWORKS_DATA")
real = pytest.mark.skipif(not DATA, reason="PAPERWORKS_DATA is not set")

QUESTION = {"question": "2 + 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 1,005"}
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}
TURNS = {"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]}
TEXT = " \n = Title = \n \n A <unk> of words . \n"


def idx(values: np.ndarray) -> bytes:
    extents = b"".join(int(extent).to_bytes(4, "big") for extent in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + extents + values.astype(np.uint8).tobytes(), mtime=0)


def png(ink: tuple[int, int]) -> bytes:
    from PIL import Image

    image = Image.new("1", (12, 12), 1)
    image.putpixel(ink, 0)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder laid out as PAPERWORKS_DATA is."""
    root = tmp_path / "all"
    for name in (
        "wikitext-2",
        "gsm8k",
        "humaneval",
        "mt_bench",
        "mnist-10k",
        "omniglot",
        "uci",
        "exchange_rate",
    ):
        (root / name).mkdir(parents=True)
    (root / "wikitext-2" / "valid.txt").write_text(TEXT)
    (root / "wikitext-2" / "test.txt").write_text(TEXT.replace("Title", "Test"))
    (root / "gsm8k" / "train.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (root / "gsm8k" / "test.jsonl").write_text((json.dumps(QUESTION) + "\n") * 2)
    (root / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(PROBLEM).encode(), mtime=0))
    (root / "mt_bench" / "question.jsonl").write_text(json.dumps(TURNS) + "\n")
    (root / "mnist-10k" / "images-idx3-ubyte.gz").write_bytes(idx(np.arange(2 * 28 * 28).reshape(2, 28, 28)))
    (root / "mnist-10k" / "labels-idx1-ubyte.gz").write_bytes(idx(np.array([7, 2])))
    with zipfile.ZipFile(root / "omniglot" / "images_background_small1.zip", "w") as archive:
        for alphabet, character, drawer in [
            ("Greek", 2, 1),
            ("Greek", 1, 2),
            ("Greek", 1, 1),
            ("Aramaic", 1, 1),
        ]:
            archive.writestr(
                f"images_background_small1/{alphabet}/character{character:02}/0001_{drawer:02}.png",
                png((character, drawer)),
            )
    (root / "uci" / "energy.txt").write_text("1\t2 4\n4 5\t6\n\n")
    (root / "uci" / "mine.txt").write_text("1,3\n3,4\n")
    (root / "exchange_rate" / "exchange_rate.txt.gz").write_bytes(gzip.compress(b"1,2,3\n4,5,6\n", mtime=0))
    return root


@pytest.fixture(autouse=True)
def data_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAPERWORKS_DATA", str(folder))
    return folder


@pytest.fixture
def any_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read under the names of large data sets; what those must hold, test_extents.py tests."""
    monkeypatch.setattr(extents, "EXTENTS", {})


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data folder, no network, and an empty cache of scikit-learn's."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.delenv("PAPERWORKS_DATA")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", refuse)


# Reading


@pytest.mark.usefixtures("any_extent")
def test_wikitext_is_the_text_of_the_file_and_its_paragraphs() -> None:
    data = load_dataset("wikitext-2", split="valid")
    assert (data.name, data.split, data.text) == ("wikitext-2", "valid", TEXT)
    assert data.paragraphs == ("= Title =", "A <unk> of words .")
    assert load_dataset("wikitext-2").paragraphs[0] == "= Test ="


@pytest.mark.usefixtures("any_extent")
def test_gsm8k_gives_questions_with_their_number() -> None:
    data = load_dataset("gsm8k")
    assert len(data) == 2 and len(load_dataset("gsm8k", split="train")) == 1
    assert [item.question for item in data] == ["2 + 3?"] * 2
    assert data[0].number == 1005


@pytest.mark.usefixtures("any_extent")
def test_humaneval_gives_problems_whose_solution_passes() -> None:
    (problem,) = load_dataset("humaneval")
    space: dict[str, Any] = {}
    exec(problem.prompt + problem.solution + problem.test, space)
    space["check"](space[problem.entry_point])
    assert problem.task_id == "HumanEval/0"


@pytest.mark.usefixtures("any_extent")
def test_mt_bench_gives_turns_and_prompts_their_first() -> None:
    (conversation,) = load_dataset("mt_bench")
    assert (conversation.question_id, conversation.category) == (81, "writing")
    assert conversation.turns == ("Write.", "Write again.")
    assert prompts("mt_bench") == ["Write."]


@pytest.mark.usefixtures("any_extent")
def test_mnist_gives_images_and_labels() -> None:
    data = load_dataset("mnist-10k")
    assert data.images.shape == (2, 28, 28) and data.images.dtype == np.uint8
    assert np.array_equal(data.images[1].ravel(), np.arange(784, 1568).astype(np.uint8))
    assert data.labels.tolist() == [7, 2] and data.labels.dtype == np.int64
    small = data.resized(14)
    assert small.images.shape == (2, 14, 14)
    block = data.images[0, :2, :2].astype(float).mean()
    assert small.images[0, 0, 0] == pytest.approx(block, abs=1)
    for size in (0, 14.5, True):
        with pytest.raises(ValueError, match=f"size is {size}"):
            data.resized(size)  # type: ignore[arg-type]


@pytest.mark.usefixtures("any_extent")
def test_omniglot_knows_alphabet_character_and_drawer() -> None:
    data = load_dataset("omniglot")
    assert data.alphabets == ("Aramaic", "Greek")
    assert data.classes == ("Aramaic/character01", "Greek/character01", "Greek/character02")
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert data.alphabet.tolist() == [0, 1, 1, 1] and data.drawer.tolist() == [1, 1, 2, 1]
    # Ink is 255 on 0; the fixture puts one dot at column `character`, row `drawer`.
    assert data.images.shape == (4, 12, 12) and data.images.sum() == 4 * 255
    assert data.images[2, 2, 1] == 255 and data.images[3, 1, 2] == 255
    assert type(data.resized(6)) is type(data) and data.resized(6).images.shape == (4, 6, 6)


@pytest.mark.usefixtures("any_extent")
def test_a_uci_table_has_its_target_last() -> None:
    data = load_dataset("uci:energy")
    assert data.X.tolist() == [[1, 2], [4, 5]] and data.y.tolist() == [4, 6]
    assert load_dataset("uci:mine").y.tolist() == [3, 4]
    assert "uci:mine" in {entry.name for entry in datasets()}


@pytest.mark.usefixtures("any_extent")
def test_exchange_rates_are_times_by_series() -> None:
    data = load_dataset("exchange_rate")
    assert data.values.tolist() == [[1, 2, 3], [4, 5, 6]] and data.step == "one day"


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1797, 64), 10),
        ("breast_cancer", (569, 30), 2),
        ("diabetes", (442, 10), 0),
        ("wine", (178, 13), 3),
        ("iris", (150, 4), 3),
    ],
)
def test_scikit_learn_sets_come_with_it(name: str, shape: tuple[int, int], classes: int) -> None:
    data: Any = load_dataset(name)
    assert data.X.shape == shape and data.X.dtype == np.float64 and len(data.features) == shape[1]
    assert len(data.classes) == classes
    assert data.y.dtype == (np.int64 if classes else np.float64)


def test_mnist1d_is_made_without_files_and_leaves_the_generators_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mnist1d")
    monkeypatch.chdir(tmp_path)
    np.random.seed(3)
    random.seed(3)
    expected = np.random.rand(), random.random()
    np.random.seed(3)
    random.seed(3)
    test = load_dataset("mnist1d")
    assert (np.random.rand(), random.random()) == expected
    train = load_dataset("mnist1d", split="train")
    assert train.X.shape == (4000, 40) and test.X.shape == (1000, 40)
    assert set(test.y.tolist()) == set(range(10)) and test.y.dtype == np.int64
    both = np.concatenate([train.X, test.X])
    assert abs(both.mean()) < 1e-9 and both.std() == pytest.approx(1)
    assert [item.name for item in tmp_path.iterdir()] == ["all"]


# Where it is looked for


@pytest.mark.usefixtures("any_extent")
def test_a_path_comes_before_the_data_folder(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "gsm8k"
    own.mkdir(parents=True)
    (own / "test.jsonl").write_text(json.dumps(QUESTION | {"question": "mine?"}))
    for path in (own, own.parent):
        assert load_dataset("gsm8k", path=path)[0].question == "mine?"
    assert load_dataset(str(own))[0].question == "mine?"  # type: ignore[index, union-attr]
    with pytest.raises(UsageError, match=r"does not hold gsm8k: expected gsm8k/train\.jsonl"):
        load_dataset("gsm8k", split="train", path=own)
    with pytest.raises(UsageError, match="leave out path"):
        load_dataset("iris", path=own)


def test_own_files_are_read_by_their_path(tmp_path: Path) -> None:
    # With a mark before UTF-8, and with two kinds of ends of lines.
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r")
    (tmp_path / "table.csv").write_text('"a",b,target\n1,2,3\n4,5,6\n')
    for name in (str(tmp_path / "notes.txt"), tmp_path / "notes.txt"):
        text: Any = load_dataset(name)
        assert text.text == "One.\n\nTwo.\n" and text.paragraphs == ("One.", "Two.")
    table: Any = load_dataset(str(tmp_path / "table.csv"))
    assert table.features == ("a", "b") and table.y.tolist() == [3, 6]
    with pytest.raises(UsageError, match="There is no file"):
        load_dataset(str(tmp_path / "none.csv"))


def test_datasets_says_what_is_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {entry.name: entry.available for entry in datasets()}
    assert here["gsm8k"] and here["omniglot"] and here["uci:energy"] and here["iris"]
    assert not here["uci:kin8nm"]
    monkeypatch.delenv("PAPERWORKS_DATA")
    here = {entry.name: entry.available for entry in datasets()}
    assert here["iris"] and not here["gsm8k"] and not here["omniglot"] and "uci:mine" not in here
    assert all(entry.origin for entry in datasets())


# OpenML


def openml(monkeypatch: pytest.MonkeyPatch, frame: Any) -> list[int]:
    """Lets OpenML give a frame; the numbers of the data sets that it is asked for."""
    asked: list[int] = []

    def fetch(**options: Any) -> Any:
        asked.append(options["data_id"])
        return type("Bunch", (), {"frame": frame})

    monkeypatch.delenv("PAPERWORKS_DATA")
    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    return asked


def test_openml_tables_are_checked_for_extent_range_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = pytest.importorskip("pandas")
    columns = {f"x{index}": np.linspace(0, 808.5, 768) for index in range(7)}
    # Three targets whose mean is that of the table.
    y = np.full(768, 22.3072)
    y[:2] = 22.3072 - 5, 22.3072 + 5
    frame = pd.DataFrame(columns | {"x7": pd.Categorical(["3", "5"] * 384), "y1": y, "y2": 1.0})
    asked = openml(monkeypatch, frame)
    data = load_dataset("uci:energy")
    assert asked == [1472] and data.X.shape == (768, 8) and data.y[1] == 27.3072
    # Categories count as the numbers they name.
    assert data.X[:2, 7].tolist() == [3, 5]
    with pytest.raises(UsageError, match=r"mnist-10k as a table of \(768, 10\)"):
        load_dataset("mnist-10k")
    for value, reason in (
        (20.0, "the mean target is 20, and uci:energy has 22"),
        (200.0, r"target 200 in row 1 is not within 6\.01 and 43"),
        (np.nan, "target nan in row 1 is not within"),
    ):
        frame["y1"] = value
        with pytest.raises(UsageError, match=reason) as error:
            load_dataset("uci:energy")
        assert "OpenML 1472" in str(error.value) and "set PAPERWORKS_DATA" in str(error.value)
    frame["y1"], frame["x3"] = y, 809.5
    with pytest.raises(UsageError, match=r"feature 809\.5 in row 1 is not within 0 and 808\.5"):
        load_dataset("uci:energy")


def test_openml_digits_are_checked_for_pixels_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = pytest.importorskip("pandas")
    pixels = np.zeros((70_000, 784), np.uint8)
    pixels[-1] = 255
    frame = pd.DataFrame(pixels).assign(label=np.tile(np.arange(10), 7000).astype(str))
    openml(monkeypatch, frame)
    data = load_dataset("mnist-10k")
    assert data.images.shape == (10_000, 28, 28) and data.images[-1].min() == 255 and data.labels[-1] == 9
    frame.iloc[-1, 784] = "200"
    with pytest.raises(UsageError, match="label 200 of item 10000 is not within 0 and 9"):
        load_dataset("mnist-10k")
    frame["label"] = "3"
    with pytest.raises(UsageError, match="9 of its 10 classes are without an item"):
        load_dataset("mnist-10k")
    frame[5] = 256
    with pytest.raises(UsageError, match="pixels that are not within 0 and 255"):
        load_dataset("mnist-10k")


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize(
    "name",
    [
        "wikitext-2",
        "gsm8k",
        "humaneval",
        "mt_bench",
        "mnist-10k",
        "omniglot",
        "exchange_rate",
        "uci:energy",
        "uci:power-plant",
    ],
)
def test_where_nothing_is_reachable_one_sentence_says_what_to_set(name: str) -> None:
    with pytest.raises(UsageError, match="set PAPERWORKS_DATA to a folder that holds") as error:
        load_dataset(name)
    assert "\n" not in str(error.value) and name.split(":")[-1] in str(error.value)
    if name in ("mnist-10k", "uci:energy"):
        # scikit-learn went as far as the network.
        assert "no network" in str(error.value)


def test_a_hub_that_refuses_is_asked_once(tmp_path: Path) -> None:
    code = "from paperworks.hub import load_dataset; load_dataset('gsm8k')"
    place = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment = {key: value for key, value in os.environ.items() if key != "PAPERWORKS_DATA"} | place
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "UsageError: 'openai/gsm8k' is not in the Hugging Face cache" in done.stderr
    assert "Retrying" not in done.stderr


@pytest.mark.usefixtures("nothing_here")
def test_california_housing_without_a_network_says_so() -> None:
    with pytest.raises(UsageError, match=r"california_housing could not be fetched \(.*no network"):
        load_dataset("california_housing")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(UsageError, match="pip install mnist1d"):
        load_dataset("mnist1d")


# Bad input


def test_unknown_names_and_parts_come_with_known_ones() -> None:
    with pytest.raises(UsageError, match="did you mean 'gsm8k'"):
        load_dataset("gsm8")
    with pytest.raises(UsageError, match="did you mean 'uci:energy'"):
        load_dataset("uci:enery")
    with pytest.raises(UsageError, match="choose one of train, valid, test"):
        load_dataset("wikitext-2", split="dev")
    with pytest.raises(UsageError, match="has no parts"):
        load_dataset("iris", split="test")
    with pytest.raises(UsageError, match="Unknown set of prompts"):
        prompts("mtbench")
    with pytest.raises(UsageError, match="Unknown set of prompts 'None'"):
        prompts(None)  # type: ignore[arg-type]
    for n in (0, -1, 41, 2.5, True, "3"):
        with pytest.raises(UsageError, match="from 1 to 40"):
            prompts(n=n)  # type: ignore[arg-type]
    for name in ("", " "):
        with pytest.raises(UsageError, match="name of the data set is empty"):
            load_dataset(name)


@pytest.mark.parametrize(
    ("name", "file", "content", "reason"),
    [
        ("gsm8k", "gsm8k/test.jsonl", b"[1, 2]\n", "record 1 is a list, not an object"),
        (
            "gsm8k",
            "gsm8k/test.jsonl",
            b'{"question": "a", "answer": "#### 1"}\n{"question": " ", "answer": "b"}',
            "record 2: question is ' '",
        ),
        ("gsm8k", "gsm8k/test.jsonl", b'{"question": "a", "answer": "five"}\n', "ends with 'five', not with #### and"),
        (
            "mt_bench",
            "mt_bench/question.jsonl",
            json.dumps(TURNS | {"turns": "Write."}).encode(),
            "record 1: turns are 'Write.', not",
        ),
        ("mt_bench", "mt_bench/question.jsonl", json.dumps(TURNS | {"turns": []}).encode(), r"turns are \[\]"),
        ("mt_bench", "mt_bench/question.jsonl", json.dumps(TURNS | {"turns": ["a", None]}).encode(), "turn 2 is None"),
        (
            "humaneval",
            "humaneval/HumanEval.jsonl.gz",
            gzip.compress(json.dumps(PROBLEM | {"test": 3}).encode(), mtime=0),
            "test is 3",
        ),
        ("humaneval", "humaneval/HumanEval.jsonl.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 20, "decompressed"),
        (
            "omniglot",
            "omniglot/images_background_small1.zip",
            zipped("a/Greek/character01/dot.png", png((1, 1))),
            r"dot\.png in it is not alphabet/character/number_drawer",
        ),
        (
            "omniglot",
            "omniglot/images_background_small1.zip",
            zipped("a/Greek/character01/1_1.png", b"no image"),
            "image",
        ),
        ("gsm8k", "gsm8k/test.jsonl", b'{"question": "a", "answer": "b"}\n{"quest', "line 2 is not JSON"),
        ("gsm8k", "gsm8k/test.jsonl", b'{"question": "a"}\n', "record 1 has no field 'answer'"),
        ("gsm8k", "gsm8k/test.jsonl", b"", "empty"),
        ("wikitext-2", "wikitext-2/test.txt", b"", "empty"),
        ("wikitext-2", "wikitext-2/test.txt", b"\xff\xfe", "not text in UTF-8 .* at byte 0"),
        ("humaneval", "humaneval/HumanEval.jsonl.gz", b"not gzip", "gzip"),
        ("mnist-10k", "mnist-10k/labels-idx1-ubyte.gz", idx(np.zeros(3)), "2 images and 3 labels"),
        ("mnist-10k", "mnist-10k/images-idx3-ubyte.gz", idx(np.zeros(3)), "not an IDX file"),
        ("mnist-10k", "mnist-10k/images-idx3-ubyte.gz", idx(np.zeros((2, 28, 28)))[:-9], "end"),
        (
            "mnist-10k",
            "mnist-10k/images-idx3-ubyte.gz",
            gzip.compress(gzip.decompress(idx(np.zeros((2, 28, 28))))[:-1], mtime=0),
            "holds 1567 values, its head says 1568",
        ),
        ("omniglot", "omniglot/images_background_small1.zip", b"PK not a zip", "zip"),
        ("uci:energy", "uci/energy.txt", b"1 2 4\n4 inf 6\n", "line 2, column 2 is not a finite number"),
        ("uci:energy", "uci/energy.txt", b"1 2 4\n4 5\n", "line 2 has another number of cells"),
        ("uci:energy", "uci/energy.txt", b"3\n2\n", "target"),
        ("uci:energy", "uci/energy.txt", b"\n", "empty"),
        ("exchange_rate", "exchange_rate/exchange_rate.txt.gz", gzip.compress(b"1,x\n", mtime=0), "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(
    folder: Path, name: str, file: str, content: bytes, reason: str
) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match=reason) as error:
        load_dataset(name)
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)


# Prompts


def test_the_built_in_prompts_are_forty_different_lines() -> None:
    found = prompts()
    assert len(found) == len(set(found)) == 40
    assert all(line == line.strip() and len(line) > 20 for line in found)
    assert prompts(n=3) == found[:3]


# The real data


@real
def test_the_real_folder_holds_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPERWORKS_DATA", str(DATA))
    for split, tokens in (("valid", 217_646), ("test", 245_569)):
        text = load_dataset("wikitext-2", split=split).text
        # The published counts have an end mark on every line.
        assert len(text.split()) + text.count("\n") == tokens
    assert len(load_dataset("gsm8k", split="train")) == 7473
    assert len(load_dataset("gsm8k")) == 1319
    assert all(np.isfinite(question.number) for question in load_dataset("gsm8k"))
    problems = load_dataset("humaneval")
    assert len({problem.task_id for problem in problems}) == 164
    conversations = load_dataset("mt_bench")
    assert len(conversations) == 80 and all(len(item.turns) == 2 for item in conversations)
    assert len({item.category for item in conversations}) == 8
    mnist = load_dataset("mnist-10k")
    assert mnist.images.shape == (10_000, 28, 28) and np.bincount(mnist.labels).min() > 800
    omniglot = load_dataset("omniglot")
    assert omniglot.images.shape == (2720, 105, 105) and len(omniglot.alphabets) == 5
    assert np.bincount(omniglot.labels).tolist() == [20] * 136
    assert load_dataset("exchange_rate").values.shape == (7588, 8)


@real
@pytest.mark.parametrize("short", ["bostonHousing", "energy", "kin8nm", "power-plant", "wine-quality-red"])
def test_the_real_tables_are_as_known(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPERWORKS_DATA", str(DATA))
    data: Any = load_dataset(f"uci:{short}")
    known = extents.EXTENTS[f"uci:{short}", ""]
    assert data.X.shape == (known.sizes["rows"], known.sizes["features"]) and data.y.shape == (known.sizes["rows"],)
    assert (data.X.min(), data.X.max()) == pytest.approx(known.values, rel=1e-5)
    assert (data.y.min(), data.y.max()) == pytest.approx(known.targets, rel=1e-5)
    assert data.y.mean() == pytest.approx(known.mean_target, rel=1e-5)
