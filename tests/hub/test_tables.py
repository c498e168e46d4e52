"""A user's own table: what was written is read, and what could be read in two ways is refused with what to change."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.hub import load_dataset
from paperworks.hub.tables import read_table

pd = pytest.importorskip("pandas")

INDEX = "first column is left out"


@pytest.fixture
def frame() -> Any:
    """Five rows of two features and a target."""
    random = np.random.default_rng(0)
    columns = {"a": random.normal(size=5), "b": random.integers(9, size=5), "target": random.normal(size=5)}
    return pd.DataFrame(columns)


def load(tmp_path: Path, text: str | bytes) -> Any:
    """The table in a file of this text; what it warns of is an error."""
    (tmp_path / "own.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset(str(tmp_path / "own.csv"))


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(UsageError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "own.csv")) and "\n" not in message
    return message


# What other programs write


def test_what_pandas_writes_without_its_index_is_read_to_the_last_digit(tmp_path: Path, frame: Any) -> None:
    for separator in ",;\t ":
        data = load(tmp_path, frame.to_csv(index=False, sep=separator))
        assert data.features == ("a", "b") and data.X.flags.c_contiguous
        assert np.array_equal(data.X, frame[["a", "b"]].to_numpy()) and np.array_equal(data.y, frame["target"])


@pytest.mark.parametrize(
    "changed",
    [
        lambda frame: frame,
        lambda frame: frame.iloc[[3, 1, 4, 0, 2]],
        lambda frame: frame.iloc[2:],
        lambda frame: frame.set_axis([10, 20, 30, 40, 50]),
    ],
)
def test_the_index_that_pandas_writes_is_no_feature(tmp_path: Path, frame: Any, changed: Any) -> None:
    frame = changed(frame)
    (tmp_path / "own.csv").write_text(frame.to_csv())
    with pytest.warns(UserWarning, match=INDEX) as told:
        data: Any = load_dataset(str(tmp_path / "own.csv"))
    assert data.features == ("a", "b") and np.array_equal(data.X, frame[["a", "b"]].to_numpy())
    assert len(told) == 1 and told[0].filename == __file__


def test_an_index_that_was_written_and_read_and_written_is_no_feature_either(tmp_path: Path, frame: Any) -> None:
    twice = pd.read_csv(io.StringIO(frame.to_csv()))
    assert twice.columns[0] == "Unnamed: 0"
    for text in (twice.to_csv(index=False), twice.to_csv()):
        (tmp_path / "own.csv").write_text(text)
        with pytest.warns(UserWarning, match=INDEX):
            data: Any = load_dataset(str(tmp_path / "own.csv"))
        assert data.features == ("a", "b") and np.array_equal(data.X, frame[["a", "b"]].to_numpy())


def test_the_names_of_rows_that_r_writes_are_no_feature(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('"","a","y"\n"1",0.5,3\n"2",0.25,7\n')
    with pytest.warns(UserWarning, match=INDEX):
        data: Any = load_dataset(str(tmp_path / "own.csv"))
    assert data.X.tolist() == [[0.5], [0.25]] and data.y.tolist() == [3, 7]
    # write.table names all columns but that of the rows' names.
    assert "line 2 has another number of cells (3) than line 1 (2)" in refused(tmp_path, '"a" "y"\n"1" 0.5 3\n')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (",a,y\n0,1.5,3\n0,2.5,4\n", "column 1 has no name"),
        (",a,y\n0.5,1.5,3\n1.5,2.5,4\n", "column 1 has no name"),
        (",,a,y\n0,5,1.5,3\n1,5,2.5,4\n", "column 1 has no name"),
        ("a,,y\n1,2,3\n4,5,7\n", "column 2 has no name"),
        ("a,b,\n1,2,\n4,5,\n", "column 3 has no name"),
    ],
)
def test_a_column_without_a_name_that_is_no_index_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "own.csv").write_text(text)
        with pytest.raises(UsageError, match=reason):
            load_dataset(str(tmp_path / "own.csv"))


def test_a_column_that_counts_the_rows_is_told_or_refused(tmp_path: Path, frame: Any) -> None:
    for first in (0, 1):
        (tmp_path / "own.csv").write_text(frame.set_axis(range(first, first + 5)).rename_axis("id").to_csv())
        with pytest.warns(UserWarning, match="Column id only counts the rows: leave it out if it is an index"):
            data: Any = load_dataset(str(tmp_path / "own.csv"))
        assert data.features == ("id", "a", "b")
    assert "first column only counts the rows" in refused(tmp_path, frame.to_csv(header=False))
    last = frame[["a", "b"]].assign(y=range(5)).to_csv(index=False)
    assert "the last column, which is the target, only counts the rows" in refused(tmp_path, last)


def test_names_that_are_numbers_are_names_where_that_is_certain(tmp_path: Path, frame: Any) -> None:
    nameless = frame.set_axis(range(3), axis=1)
    (tmp_path / "own.csv").write_text(nameless.to_csv())
    with pytest.warns(UserWarning, match=INDEX):
        data: Any = load_dataset(str(tmp_path / "own.csv"))
    assert data.features == ("0", "1") and np.array_equal(data.X, frame[["a", "b"]].to_numpy())
    half = nameless.rename(columns={2: "y"})
    data = load(tmp_path, half.to_csv(index=False))
    assert data.features == ("0", "1") and len(data.y) == 5
    data = load(tmp_path, "400,401,402,y\n0.5,0.25,0.125,1\n1,2,3,4\n")
    assert data.features == ("400", "401", "402") and len(data.y) == 2


@pytest.mark.parametrize(
    "text",
    [
        "0,1,2\n0.5,1.5,3\n0.25,2.5,4\n",  # pandas, of a frame without names
        "0,1,2\n5,1,3\n2,7,4\n",
        "1,2,3\n0.5,1.5,4\n",
        "2019,2020,2021\n5,1,3\n2,7,4\n",
        "2010,2015,2020\n0.5,1.5,3.5\n0.25,2.5,4.5\n",
        "0 1\n3 4\n6 9\n",
    ],
)
def test_a_first_line_of_numbers_that_may_be_names_is_refused(tmp_path: Path, text: str) -> None:
    assert "line 1" in (message := refused(tmp_path, text)) and "may be names or numbers" in message
    width = len(text.split("\n")[0].replace(",", " ").split())
    # One line of words makes it data.
    data = load(tmp_path, ",".join("abcd"[:width]) + "\n" + text.replace(" ", ","))
    assert len(data.y) == len(text.split("\n")) - 1


def test_numbers_without_names_keep_their_first_row(tmp_path: Path) -> None:
    for text in ("5.1,3.5,0.2\n4.9,3,1.4\n", "3,1,2\n4,1,5\n", "1 3 5\n2 4 7\n", "3 4\n6 9\n"):
        data = load(tmp_path, text)
        assert data.features == () and len(data.y) == 2
        assert data.X[0].tolist() == [float(cell) for cell in text.split("\n")[0].replace(",", " ").split()[:-1]]


@pytest.mark.parametrize("first", ["1.5,red,3", "0.5,y,2", ",2.5,3", "1,5,y"])
def test_a_first_line_of_names_and_numbers_is_refused(tmp_path: Path, first: str) -> None:
    assert "line 1 holds numbers" in refused(tmp_path, f"{first}\n2,1,4\n3,1,5\n")


# Lines


def test_no_line_vanishes(tmp_path: Path) -> None:
    assert "line 3, column a holds '#3', no number" in refused(tmp_path, "a,y\n1,2\n#3,4\n5,6\n")
    assert "line 1, column 1 is a gap" in refused(tmp_path, "n/a,2.5\n3,4\n")
    assert "line 3 has another number of cells (1) than line 1 (2)" in refused(tmp_path, "a,y\n1,2\n# more\n3,4\n")
    assert "line 2 has another number of cells" in refused(tmp_path, "# written by me\na,y\n1,2\n")
    # numpy.savetxt puts its mark before the names.
    stream = io.StringIO()
    np.savetxt(stream, np.array([[1.0, 3], [2, 5]]), header="a,y", delimiter=",")
    assert load(tmp_path, stream.getvalue()).features == ("# a",)


def test_empty_lines_are_no_rows_and_lines_of_commas_are_gaps(tmp_path: Path) -> None:
    data = load(tmp_path, "\n\na,y\n1,2\n\n3,5\n   \n\n")
    assert data.X.tolist() == [[1], [3]] and data.y.tolist() == [2, 5]
    assert "line 4, column a is a gap ('')" in refused(tmp_path, "a,y\n1,2\n\n,\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b,y\n1,2,3\n4,5\n", "line 3 has another number of cells (2) than line 1 (3)"),
        ("a,y\n1,2,\n", "line 2 has another number of cells (3) than line 1 (2)"),
        ("a,y\n", "there are no rows below the names"),
        ("\n \n", "the file is empty"),
        ("", "the file is empty"),
        ("y\n1\n2\n", "needs a feature and"),
        ('a,y\n1,"2\n3,4\n', "is not CSV"),
        ('a,y\n"1"7,2\n', "line 2 is not CSV"),
        ("a\ty\n1\t2\n".encode("utf-16"), "is not text in UTF-8"),
        ("größe,y\n1,2\n".encode("latin-1"), "is not text in UTF-8 (invalid start byte at byte 2): save it"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str | bytes, reason: str) -> None:
    assert reason in refused(tmp_path, text)


def test_ends_of_lines_marks_quotes_and_space_do_not_matter(tmp_path: Path) -> None:
    expected = [[1.0, -2.5], [3.0, 400.0]]
    for text in (
        "a,b,y\n1,-2.5,3\n3,4e2,5\n",
        "a,b,y\r\n1,-2.5,3\r\n3,4E+2,5\r\n",
        "a,b,y\r1,-2.5,3\r3,400,5",
        "\ufeffa,b,y\n1,-2.5,3\n3,400,5\n",
        '"a", "b", "y"\n"1", "-2.5", "3"\n 3 , 400. , 5 \n',
        "a;b;y\n1;-2.5;3\n3;400;5\n",
        "a  b\ty\n1 -2.5 3\n3 +400  5\n",
    ):
        data = load(tmp_path, text)
        assert data.X.tolist() == expected and data.y.tolist() == [3, 5] and data.features == ("a", "b")
    assert load(tmp_path, '"price; EUR",y\n1,2\n3,4\n').features == ("price; EUR",)
    (tmp_path / "OWN.CSV").write_text("a,y\n1,2\n3,4\n")
    assert load_dataset(str(tmp_path / "OWN.CSV")).y.tolist() == [2, 4]  # type: ignore[union-attr]


# Names


def test_names_that_are_no_one_columns_are_refused(tmp_path: Path, frame: Any) -> None:
    assert "2 columns are named 'a'" in refused(tmp_path, "a,a,y\n1,2,3\n4,5,7\n")
    turned = frame[["target", "a", "b"]].to_csv(index=False)
    assert "column 1 is named 'target', but the target is the last column ('b')" in refused(tmp_path, turned)


# Cells


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("", "is a gap ('')"),
        ("NA", "is a gap ('NA')"),
        ("nan", "is a gap ('nan')"),
        ("NULL", "is a gap ('NULL')"),
        ("?", "is a gap ('?')"),
        ("inf", "is not a finite number (inf)"),
        ("-Infinity", "is not a finite number (-Infinity)"),
        ("1e999", "is not a finite number (1e999)"),
        ('"1,234"', "holds '1,234': write decimals with a point"),
        ('"1,234.5"', "holds '1,234.5': write decimals with a point"),
        ("1'234", "between thousands"),
        ("1_000", "holds '1_000', no number"),
        ("1 000", "holds '1 000', no number"),
        ("red", "holds 'red', no number: write a category as columns of 0 and 1"),
        ('"red, or blue"', "no number"),
        ("5%", "holds '5%', no number"),
        ("0x10", "holds '0x10', no number"),
        ("2024-01-31", "holds '2024-01-31', no number"),
        ("1+2j", "no number"),
        ("True", "holds 'True', no number"),
        ("12345678901234567", "more digits than float64 keeps"),
    ],
)
def test_a_cell_that_is_no_finite_number_is_named(tmp_path: Path, cell: str, reason: str) -> None:
    message = refused(tmp_path, f"a,b,y\n1,2,3\n4,{cell},7\n")
    assert "line 3, column b " in message and reason in message
    assert "line 3, column y " in refused(tmp_path, f"a,b,y\n1,2,3\n4,5,{cell}\n")


def test_decimal_commas_are_refused(tmp_path: Path) -> None:
    for text in ("a;y\n1,5;2\n2,5;3\n", "a;y\n1.234,5;2\n2;3\n"):
        assert "line 2, column a holds '1" in (message := refused(tmp_path, text))
        assert "write decimals with a point, and nothing between thousands" in message
    assert "write decimals with a point" in refused(tmp_path, "1,5;2,5\n3,5;4,5\n")


def test_truth_values_are_0_and_1(tmp_path: Path, frame: Any) -> None:
    frame = frame.assign(b=[True, False, True, True, False], target=[False, True, False, False, True])
    data = load(tmp_path, frame.to_csv(index=False))
    assert data.X[:, 1].tolist() == [1, 0, 1, 1, 0] and data.y.tolist() == [0, 1, 0, 0, 1]
    assert load(tmp_path, "True,0.5\nFalse,1.5\n").X.tolist() == [[1], [0]]


def test_a_target_of_one_value_is_refused(tmp_path: Path) -> None:
    assert "the last column, which is the target, is 5 in every row" in refused(tmp_path, "a,y\n1,5\n2,5\n4,5\n")
    assert load(tmp_path, "a,b,y\n1,5,3\n2,5,4\n").X.tolist() == [[1, 5], [2, 5]]


def test_a_large_table_is_read_as_numpy_wrote_it() -> None:
    values = np.random.default_rng(1).normal(size=(2000, 6))
    stream = io.StringIO()
    np.savetxt(stream, values, fmt="%.17g")
    cells, names, classes = read_table(stream.getvalue())
    assert names == classes == () and np.array_equal(cells, values)
