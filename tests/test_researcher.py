"""The researcher's day, as the docs tell it: every block is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "researcher.md").read_text(), flags=re.DOTALL)
# What each shows.
SEEN = (
    "",
    "within / between classes.*says nothing of the claims.*no figures, only a trial",
    "",
    "classifier, 2, 150 samples.*nc1.*figure: figures/neural-collapse.png",
    "NC1 of the columns themselves: {nc1:.3g}",
    r"draw fair numbers.*Yuval Peres.*Peres, depth 5.*run \S+: finished.*2 claims: 1 reproduced, 1 proved",
)


def nc1() -> float:
    """tr(Sigma_W Sigma_B^+) / C of the flowers' columns."""
    X, y = load_iris(return_X_y=True)
    means = np.stack([X[y == label].mean(0) for label in range(3)])
    within = np.cov((X - means[y]).T, bias=True)
    return float(np.trace(within @ np.linalg.pinv(np.cov(means.T, bias=True))) / 3)


def test_every_block_does_what_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "paperworks"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from paperworks.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    assert len(BLOCKS) == len(SEEN)
    for (kind, block), seen in zip(BLOCKS, SEEN, strict=True):
        words = [sys.executable, "-c", block] if kind == "python" else ["bash", "-euc", block]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert re.search(seen.replace("{nc1:.3g}", f"{nc1():.3g}"), done.stdout, flags=re.DOTALL), (
            f"{block}\n{done.stdout}"
        )
