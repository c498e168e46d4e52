"""What tests draw hangs on their names alone, in tests and in the examples of the sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = '''
import json, os, random
import numpy as np
import pytest

def draw(name):
    """Keep what is drawn.

    Example:
        >>> draw("example")
    """
    torch = __import__("torch")
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    with open(os.environ["DRAWN"], "a") as file:
        file.write(json.dumps([name, drawn]) + "\\n")

@pytest.fixture(scope="module", params=["a", "b"])
def shared(request):
    draw(f"shared {request.param}")

@pytest.fixture(scope="module")
def late():
    draw("late")

def test_one():
    draw("one")

def test_two(shared):
    draw("two")

def test_three(request):
    request.getfixturevalue("late")
    draw("three")

def test_four(late):
    draw("four")
'''


@pytest.fixture
def drawn(tmp_path):
    """What tests draw by their names, in the order in which they do, and what pytest says."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "test_drawing.py").write_text(TESTS)

    def run(*options: str, **environment: str) -> tuple[dict[str, list[float]], str]:
        kept = tmp_path / "drawn"
        kept.write_text("")
        command = [sys.executable, "-m", "pytest", "--doctest-modules", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"DRAWN": str(kept), "PAPERWORKS_TEST_SEED": "0"} | environment,
        )  # fmt: skip
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        # A test with a parameter draws once for each.
        return {
            f"{name} {[other for other, _ in lines[:i]].count(name)}": row for i, (name, row) in enumerate(lines)
        }, done.stdout

    return run


def test_a_test_draws_the_same_alone_and_in_any_order_and_other_than_the_others(drawn):
    drawn_first, told = drawn()
    assert "random state: PAPERWORKS_TEST_SEED=0\n" in told and "6 passed" in told
    assert set(drawn_first) == {
        "example 0", "one 0", "shared a 0", "two 0", "shared b 0", "two 1", "late 0", "three 0", "four 0"
    }  # fmt: skip
    assert len({number for row in drawn_first.values() for number in row}) == 27
    shuffled, told = drawn("--shuffle", "3")
    assert list(shuffled) != list(drawn_first) and "PAPERWORKS_TEST_SEED=0 --shuffle 3" in told
    alone, _ = drawn("sources/test_drawing.py::test_four")
    assert set(alone) == {"late 0", "four 0"}
    for name, row in (*alone.items(), *shuffled.items()):
        # Which of the two parameters comes first is the order's business.
        if not name.startswith("two"):
            assert row == drawn_first[name], name
    assert {tuple(shuffled[name]) for name in ("two 0", "two 1")} == {
        tuple(drawn_first[name]) for name in ("two 0", "two 1")
    }


def test_another_seed_draws_other_numbers_and_is_told_beside_a_failure(drawn, tmp_path):
    first, _ = drawn("-k", "test_one or example")
    with (tmp_path / "sources" / "test_drawing.py").open("a") as file:
        file.write("\ndef test_one_fails():\n    raise ValueError\n")
    other, told = drawn("-q", "-k", "test_one or example", PAPERWORKS_TEST_SEED="1")
    assert set(first) == set(other)
    assert not {number for row in first.values() for number in row} & {
        number for row in other.values() for number in row
    }
    assert "random state: PAPERWORKS_TEST_SEED=1\n" in told and "1 failed" in told
