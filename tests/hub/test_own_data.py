"""A user's own table, arrays and folder of images: what was written is read, and what lacks something says what."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris

from paperworks.errors import UsageError
from paperworks.hub import ImageData, TableData, load_dataset, prompts

pd = pytest.importorskip("pandas")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def frame() -> Any:
    """Six rows of two features."""
    return pd.DataFrame({"a": [1.5, 2, 3, 4, 5, 6], "b": [7, 9, 8, 1, 3, 2]})


def loaded(path: Path) -> Any:
    return load_dataset(str(path))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        load_dataset(str(path))
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


# Words in the last column


def test_a_last_column_of_words_is_classes(tmp_path: Path) -> None:
    iris = load_iris(as_frame=True)
    words = iris.target_names[iris.target]
    frame = iris.data.assign(species=words)
    for name, text in (("own.csv", frame.to_csv(index=False)), ("bare.csv", frame.to_csv(index=False, header=False))):
        (tmp_path / name).write_text(text)
        data = loaded(tmp_path / name)
        assert data.classes == ("setosa", "versicolor", "virginica") and data.y.dtype == np.int64
        assert np.array_equal(data.y, iris.target) and np.array_equal(data.X, iris.data)
    assert data.features == ()


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("red blue 3", "line 2, column y holds 'red', no number"),
        ("red blue green", "line 2, column y holds 'red', no number"),
        ("2024-01-31 2024-01-31 2024-02-01", "holds '2024-01-31', no number"),
        ("5% 5% 6%", "holds '5%', no number"),
        ("red NA red", "line 2, column y holds 'red'"),
        ("red red red", "the target, is red in every row"),
    ],
)
def test_a_last_column_that_is_no_classes_is_refused(tmp_path: Path, cells: str, reason: str) -> None:
    rows = "\n".join(f"{number},{cell}" for number, cell in zip((5, 7, 6), cells.split(), strict=True))
    (tmp_path / "own.csv").write_text(f"a,y\n{rows}\n")
    assert reason in refused(tmp_path / "own.csv")


def test_a_word_in_a_first_line_of_numbers_is_a_class_where_it_comes_again(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("5.1,3.5,cat\n4.9,3,dog\n4.7,3.2,cat\n")
    data = loaded(tmp_path / "own.csv")
    assert data.classes == ("cat", "dog") and data.y.tolist() == [0, 1, 0] and data.X[0].tolist() == [5.1, 3.5]
    (tmp_path / "own.csv").write_text("5.1,3.5,cat\n4.9,3,dog\n4.7,3.2,dog\n")
    assert "line 1 holds numbers (5.1) beside 'cat'" in refused(tmp_path / "own.csv")


# A target as classes


@pytest.mark.parametrize(
    ("targets", "indices", "classes"),
    [
        ([0, 1, 2, 1, 0, 2], [0, 1, 2, 1, 0, 2], ("0", "1", "2")),
        # A network has an output for 0 too.
        ([1, 3, 3, 1, 1, 3], [1, 3, 3, 1, 1, 3], ("0", "1", "2", "3")),
        ([-1, 1, 1, -1, 1, 1], [0, 1, 1, 0, 1, 1], ("-1", "1")),
        ([1900, 2000, 1900, 2000, 2000, 2000], [0, 1, 0, 1, 1, 1], ("1900", "2000")),
        ([True, False, False, True, True, True], [1, 0, 0, 1, 1, 1], ("0", "1")),
    ],
)
def test_whole_numbers_become_classes_where_classes_are_wanted(tmp_path, frame, targets, indices, classes) -> None:
    for name in ("own.csv", "own.npz"):
        if name == "own.csv":
            frame.assign(y=targets).to_csv(tmp_path / name, index=False)
        else:
            np.savez(tmp_path / name, X=frame.to_numpy(), y=np.array(targets, float))
        data = loaded(tmp_path / name)
        assert data.classes == () and data.y.dtype == np.float64 and data.y.tolist() == [float(one) for one in targets]
        labelled = data.labelled()
        assert labelled.y.dtype == np.int64 and labelled.y.tolist() == indices and labelled.classes == classes
        assert labelled.labelled() is labelled and data.measured() is data


def test_a_number_is_no_class_and_a_class_no_number() -> None:
    with pytest.raises(UsageError, match="the target of diabetes has 214 different values in 442 rows"):
        load_dataset("diabetes").labelled()
    with pytest.raises(UsageError, match=r"the target of own is no class, but 2\.5 in row 2"):
        TableData("own", "", np.zeros((3, 1)), np.array([1, 2.5, 2])).labelled()
    with pytest.raises(UsageError, match=r"one of 3 classes \(one is setosa\), and a number is predicted"):
        load_dataset("iris").measured()


# Parquet


def test_parquet_is_read_as_pandas_wrote_it(tmp_path: Path, frame: Any) -> None:
    pytest.importorskip("pyarrow")
    whole = frame.assign(c=[True, False, True, True, False, False], y=[2.5, 1, 4, 3, 8, 9])
    whole.to_parquet(tmp_path / "own.parquet")
    data = loaded(tmp_path / "own.parquet")
    assert data.features == ("a", "b", "c") and np.array_equal(data.X, whole[["a", "b", "c"]].to_numpy(float))
    assert np.array_equal(data.y, whole.y) and data.classes == ()
    # An index without a name is no feature.
    whole.iloc[[3, 1, 5]].to_parquet(tmp_path / "own.parquet")
    assert loaded(tmp_path / "own.parquet").features == ("a", "b", "c")
    words = frame.assign(kind=pd.Categorical(["x", "y", "x", "x", "y", "x"]))
    words.to_parquet(tmp_path / "own.parquet")
    data = loaded(tmp_path / "own.parquet")
    assert data.classes == ("x", "y") and data.y.tolist() == [0, 1, 0, 0, 1, 0]
    truths = frame.assign(kind=[True, False, True, True, False, False])
    truths.to_parquet(tmp_path / "own.parquet")
    assert loaded(tmp_path / "own.parquet").classes == ("False", "True")


def test_parquet_that_is_no_table_of_numbers_is_refused(tmp_path: Path, frame: Any) -> None:
    pytest.importorskip("pyarrow")
    own = tmp_path / "own.parquet"
    for columns, reason in (
        ({"b": [1, None, 2, 3, 4, 5], "y": range(6)}, "row 2, column b is a gap"),
        ({"b": ["x", "y", "x", "x", "y", "x"], "y": range(6)}, "b holds 'x', no number: write a category"),
        ({"b": [1, float("inf"), 2, 3, 4, 5], "y": range(6)}, "row 2 of b is not a finite number"),
        (
            {"y": range(6), "b": range(6)},
            "column 'y' is named as the target is, but the target is the last column ('b')",
        ),
        ({"b": [1] * 6}, "the last column, which is the target, is 1 in every row"),
    ):
        frame.assign(**columns)[["a", *columns]].to_parquet(own)
        assert reason in refused(own)
    own.write_bytes(b"PAR1 no")
    assert "cannot be read as a table of numbers" in refused(own)


# NumPy's arrays


@pytest.mark.parametrize("names", [("X", "y"), ("x", "y"), ("data", "target"), ("x_train", "y_train")])
def test_arrays_are_read_by_the_names_that_others_give_them(tmp_path: Path, names: tuple[str, str]) -> None:
    X, y = np.random.default_rng(0).normal(size=(6, 3)), np.array([2, 0, 1, 1, 2, 0])
    np.savez_compressed(tmp_path / "own.npz", **dict(zip(names, (X.astype(np.float32), y), strict=True)))
    data = loaded(tmp_path / "own.npz")
    assert isinstance(data, TableData) and data.X.dtype == np.float64 and np.array_equal(data.X, X.astype(np.float32))
    assert data.y.tolist() == y.tolist()


def test_arrays_of_words_and_of_columns(tmp_path: Path, frame: Any) -> None:
    np.savez(tmp_path / "own.npz", X=frame.to_numpy(), y=np.array(["b", "a", "b", "a", "a", "b"]))
    assert loaded(tmp_path / "own.npz").classes == ("a", "b") and loaded(tmp_path / "own.npz").y.tolist() == [
        1,
        0,
        1,
        0,
        0,
        1,
    ]
    np.savez(tmp_path / "own.npz", length=frame.a, width=frame.b, price=frame.a + 0.5)
    data = loaded(tmp_path / "own.npz")
    assert (
        data.features == ("length", "width") and np.array_equal(data.X, frame) and np.array_equal(data.y, frame.a + 0.5)
    )


def test_arrays_of_images_are_images(tmp_path: Path) -> None:
    shades = np.random.default_rng(0).integers(256, size=(6, 4, 5)).astype(np.uint8)
    for X in (shades, shades / 255, shades.astype(np.int64)):
        np.savez(tmp_path / "own.npz", images=X, labels=np.array([0, 1, 1, 0, 1, 0]))
        data = loaded(tmp_path / "own.npz")
        assert isinstance(data, ImageData) and data.images.dtype == np.uint8 and np.array_equal(data.images, shades)
        assert data.labels.tolist() == [0, 1, 1, 0, 1, 0] and data.classes == ("0", "1")
    table = data.as_table()
    assert np.allclose(table.X, shades.reshape(6, 20) / 255) and table.classes == ("0", "1")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"X": np.zeros((3, 2))}, "it lacks y (it holds X 3x2): save it with numpy.savez(file, X=..., y=...)"),
        ({"y": np.zeros(3)}, "it lacks X (it holds y 3)"),
        ({"a": np.zeros((3, 2)), "b": np.zeros(3)}, "it lacks X and y (it holds a 3x2, b 3)"),
        ({}, "it lacks X and y (it holds nothing)"),
        ({"X": np.zeros((3, 2)), "y": np.arange(4)}, "X is 3x2 and y 4: give a target a row of X"),
        (
            {"X": np.zeros((3, 2, 2, 3)), "y": np.arange(3)},
            "X has 4 dimensions: give samples x features, or grey images",
        ),
        ({"X": np.full((3, 2), np.nan), "y": np.arange(3)}, "row 1 of X is not a finite number"),
        (
            {"X": np.full((3, 2, 2), -1.0), "y": np.arange(3)},
            "X goes from -1 to -1: pixels are within 0 and 255, or 0 and 1",
        ),
        ({"X": np.array([["a"], ["b"], ["c"]]), "y": np.arange(3)}, "X holds 'a', no number"),
        ({"X": np.zeros((3, 2)), "y": np.array(["a", "b", "c"])}, "y holds 3 different words in 3 rows"),
        ({"X": np.array([None, 1], object), "y": np.arange(2)}, "cannot be read as arrays of numbers"),
    ],
)
def test_arrays_that_lack_something_say_what(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    assert reason in refused(tmp_path / "own.npz")


# A folder of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, of two and three images, one of them in colour."""
    random = np.random.default_rng(0)
    for kind, names in (("cats", ("b.png", "a.png")), ("dogs", ("1.png", "2.png", "deep/3.png"))):
        for name in names:
            path = tmp_path / "pets" / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = (3,) if name == "a.png" else ()
            Image.fromarray(random.integers(256, size=(6, 4, *colours)).astype(np.uint8)).save(path)
    (tmp_path / "pets" / "cats" / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_a_folder_of_images_has_a_class_a_subfolder(folder: Path) -> None:
    data = loaded(folder)
    assert isinstance(data, ImageData) and data.classes == ("cats", "dogs") and data.labels.tolist() == [0, 0, 1, 1, 1]
    names = ["cats/a.png", "cats/b.png", "dogs/1.png", "dogs/2.png", "dogs/deep/3.png"]
    for image, name in zip(data.images, names, strict=True):
        shown = np.asarray(Image.open(folder / name).convert("RGB"), float)
        # ITU-R 601-2, which pillow and OpenCV take for grey.
        assert np.abs(shown @ [0.299, 0.587, 0.114] - image).max() <= 1
    assert data.name == "pets"
    with pytest.raises(UsageError, match="is a folder of images, without parts: leave out split='train'"):
        load_dataset(str(folder), split="train")


def test_a_folder_that_does_not_fit_is_one_sentence(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "dogs" / "9.png")
    assert "cats/a.png is 4 x 6 and dogs/9.png is 5 x 5 pixels: give all images one size" in refused(folder)
    (folder / "dogs" / "9.png").write_bytes(b"no image")
    assert "dogs/9.png is no image that can be read" in refused(folder)
    (folder / "dogs" / "9.png").unlink()
    (folder / "eels").mkdir()
    assert "its subfolder eels holds no image (.png, .jpg, .jpeg ...): give one subfolder a class" in refused(folder)
    (folder / "eels").rmdir()
    (folder / "cats").rename(folder.parent / "cats")
    assert "it has one class only (dogs): give one subfolder a class" in refused(folder)


def test_the_folder_of_a_set_by_name_is_still_that_set(tmp_path: Path) -> None:
    import json

    place = tmp_path / "gsm8k"
    (place / "inner").mkdir(parents=True)
    (place / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    # It is taken for gsm8k, which has 1319 questions.
    with pytest.raises(UsageError, match="gsm8k"):
        load_dataset(str(place))


# Prompts


def test_prompts_of_ones_own_are_lines(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("What is a tide?\n\n  Who was Ada?  \n")
    assert prompts(str(tmp_path / "asked.txt")) == ["What is a tide?", "Who was Ada?"]
    assert prompts(str(tmp_path / "asked.txt"), n=1) == ["What is a tide?"]
    with pytest.raises(UsageError, match="There is no file"):
        prompts(str(tmp_path / "none.txt"))


def test_numpy_writes_what_is_read_to_the_last_digit(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(20, 3))
    stream = io.BytesIO()
    np.savez(stream, X=values[:, :2], y=values[:, 2])
    (tmp_path / "own.npz").write_bytes(stream.getvalue())
    data = loaded(tmp_path / "own.npz")
    assert np.array_equal(data.X, values[:, :2]) and np.array_equal(data.y, values[:, 2])
