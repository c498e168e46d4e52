"""Every recipe of the room on a user's own file, seconds long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.lab import execute
from paperworks.lab.report import table
from paperworks.recipes.representation.samples import rows, samples

CLASSED = ("near-collapse", "neural-collapse", "variable-activity", "pretrained-features", "wasserstein-dependency")


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three classes in words, in the order of the classes, of which the third is rare."""
    random = np.random.default_rng(0)
    lines = ["length,width,height,depth,weight,kind"]
    for place, (kind, count) in enumerate((("aster", 60), ("rose", 50), ("tulip", 20))):
        values = random.normal(3 * place, 1, size=(count, 5)) * [1, 10, 100, 0.1, 5]
        lines += [",".join([*map(str, row), kind]) for row in values.tolist()]
    path = tmp_path_factory.mktemp("own") / "flowers.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def ran(paper: str, data: Path, **options: object):
    run = execute(paper, scale="tiny", parameters={"data": str(data), **options}, show_progress=False)
    assert run.status == "finished", run.traceback
    return run


@pytest.mark.parametrize("paper", CLASSED)
def test_every_recipe_that_tells_classes_apart_takes_a_table_of_ones_own(paper, flowers):
    run = ran(paper, flowers)
    headings, lines = table(paper, run.measurements)
    assert len(headings) > 1 and lines and run.artefacts["figure"].is_file()
    if paper == "pretrained-features":
        assert any(line[0].startswith("flowers.csv, pretrained, K = ") for line in lines)
    if paper == "wasserstein-dependency":
        assert any(line[0].startswith("grids, batch") for line in lines)
    if paper == "neural-collapse":
        # Three classes, and of the rarest as many as there are.
        assert any(m.name == "rarest class's own logit" for m in run.measurements)


def test_posterior_collapse_takes_rows_whose_target_is_no_class(tmp_path):
    X = np.random.default_rng(0).normal(size=(80, 6))
    np.savez(tmp_path / "own.npz", X=X, y=X.sum(1))
    run = ran("posterior-collapse", tmp_path / "own.npz")
    errors = {m.series: m.value for m in run.measurements if m.name == "divergence, largest error"}
    assert set(errors) == {"linear CVAE", "linear HVAE"} and max(errors.values()) < 0.05


def test_the_bottleneck_takes_a_table_with_a_number_and_compares_over_its_splits(tmp_path):
    X = np.random.default_rng(0).normal(size=(120, 4))
    rows = np.column_stack([X, np.sin(X).sum(1)])
    np.savetxt(tmp_path / "own.csv", rows, delimiter=",", header="a,b,c,d,y", comments="")
    run = ran("cauchy-schwarz-bottleneck", tmp_path / "own.csv")
    found = {(m.name, m.series, m.against): m for m in run.measurements}
    ratio = found["RMSE, all tables", "CS bottleneck", "VIB"]
    same = found["RMSE against VIB, own.csv", "CS bottleneck", "VIB"]
    assert ratio.repeats == same.repeats and (ratio.low, ratio.value, ratio.high) == (same.low, same.value, same.high)
    assert not any("heavy tails" in name for name, *_ in found)


def test_a_folder_of_images_is_learnt_as_a_table_is(tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for kind, bright in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(12):
            pixels = (bright + random.integers(40, size=(6, 6))).astype(np.uint8)
            image.fromarray(pixels).save(tmp_path / "pictures" / kind / f"{number}.png")
    own = samples(str(tmp_path / "pictures"))
    assert own.shape == (6, 6) and own.classes == ("dark", "light") and own.X.shape == (24, 36)
    assert own.X[own.y == 0].max() < 0.32 and own.X[own.y == 1].min() > 0.78
    # Of two classes the means, and of a classifier with a bias the rows, are a simplex always: NC2 is left out.
    for paper, left_out in (("near-collapse", "NC2 moved"), ("neural-collapse", "NC2, ratio")):
        found = [(m.name, m.series) for m in ran(paper, tmp_path / "pictures").measurements]
        assert not any(name.startswith(left_out) and "squared" not in series for name, series in found)
        assert any(name.startswith(left_out.replace("2", "1")) for name, _ in found)


# What they learn from


def test_columns_are_stretched_and_classes_numbered_without_gaps(tmp_path):
    (tmp_path / "own.csv").write_text("a,b,y\n1,5,3\n3,5,7\n2,5,3\n5,5,7\n")
    own = samples(str(tmp_path / "own.csv"))
    assert own.X.tolist() == [[0, 0], [0.5, 0], [0.25, 0], [1, 0]]
    assert own.y.tolist() == [0, 1, 0, 1] and own.classes == ("3", "7") and own.name == "own.csv"
    X, shape = rows(str(tmp_path / "own.csv"))
    assert np.array_equal(X, own.X) and shape is None


def test_digits_are_ink_within_0_and_1():
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    own = samples()
    assert np.array_equal(own.X, X / 16) and np.array_equal(own.y, y) and own.shape == (8, 8)


def test_classes_with_fewer_samples_than_are_wanted_come_last():
    own = samples("wine")  # 59, 71 and 48
    same, counts = own.as_many([40, 30])
    assert same.classes == ("class_0", "class_1") and counts == [40, 30] and len(same.y) == 130
    turned, counts = own.as_many([70, 55, 50])
    assert turned.classes == ("class_1", "class_0", "class_2") and counts == [70, 55, 48]
    assert np.bincount(turned.y).tolist() == [71, 59, 48]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,y\n1,0.5\n2,1.5\n3,0.5\n", "the target of own.csv is no class, but 0.5 in row 1"),
        ("a,y\n1,0\n2,0\n3,0\n5,1\n", "own.csv holds a single sample of class 1"),
    ],
)
def test_samples_without_classes_are_one_sentence(tmp_path, text, reason):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(UsageError, match=reason):
        samples(str(tmp_path / "own.csv"))
    run = execute("near-collapse", scale="tiny", parameters={"data": str(tmp_path / "own.csv")}, show_progress=False)
    assert run.status == "failed" and run.error == str(run.exception) and reason in run.error


def test_text_is_no_samples(tmp_path):
    (tmp_path / "own.txt").write_text("Words.\n")
    with pytest.raises(UsageError, match="is neither a table nor images"):
        samples(str(tmp_path / "own.txt"))
    run = execute(
        "cauchy-schwarz-bottleneck", scale="tiny", parameters={"data": str(tmp_path / "own.txt")}, show_progress=False
    )
    assert run.status == "failed" and "is no table" in run.error
