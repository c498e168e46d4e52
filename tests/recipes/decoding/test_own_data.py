"""Recipes of the decoding room on a user's own prompts and images, seconds long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paperworks.errors import UsageError
from paperworks.lab import execute
from paperworks.recipes.decoding.images import identity, pixels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


@pytest.fixture
def pictures(tmp_path):
    """Forty images of 12 x 9 pixels, of two classes, in their order."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(40, 12, 9)).astype(np.uint8)
    images[20:] //= 4
    np.savez(tmp_path / "own.npz", X=images, y=np.repeat([0, 1], 20))
    return tmp_path / "own.npz", images


def test_images_of_ones_own_are_resized_and_mixed_with_their_classes(pictures):
    path, images = pictures
    shown, labels = pixels(str(path), 6)
    assert shown.shape == (40, 6, 6) and torch.bincount(labels).tolist() == [20, 20]
    assert len(set(labels[:10].tolist())) == 2
    # The darker class is the second, wherever its images lie now; a mean of pixels keeps the mean.
    for label, part in enumerate((images[:20], images[20:])):
        assert shown[labels == label].mean() == pytest.approx(part.mean() / 255, abs=0.01)
    assert identity(str(path), shown) != identity(str(path), shown / 2)
    assert identity("digits", shown) == "digits" and identity("auto", shown) == 40


def test_what_holds_no_images_or_few_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="wine holds no images: give a folder with one subfolder a class"):
        pixels("wine", 8)
    np.savez(tmp_path / "few.npz", X=np.zeros((4, 3, 3), np.uint8), y=np.array([0, 1, 0, 1]))
    with pytest.raises(UsageError, match="holds 4 images: give 20 or more"):
        pixels(str(tmp_path / "few.npz"), 8)


def test_next_block_prediction_learns_images_of_ones_own(pictures):
    options = {"data": str(pictures[0]), "samples": 20}
    run = execute("next-block-prediction", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback
    found = {(m.name, m.series): m.value for m in run.measurements}
    assert found["passes a clip", "next frame"] == 2 and found["digit as asked", "next row"] <= 100


def test_lantern_learns_images_of_ones_own(pictures):
    run = execute("lantern", scale="tiny", parameters={"data": str(pictures[0])}, show_progress=False)
    assert run.status == "finished", run.traceback
    assert any(m.name == "digit as asked" for m in run.measurements)


def test_prompts_of_ones_own_are_decoded(tmp_path):
    (tmp_path / "asked.txt").write_text("\n".join(f"What is {number} and {number}?" for number in range(9)))
    options = {"prompts": str(tmp_path / "asked.txt")}
    for paper in ("entropy-adaptive-decoding", "temporal-fusion"):
        run = execute(paper, scale="tiny", parameters=options, show_progress=False)
        assert run.status == "finished", run.traceback
    (tmp_path / "asked.txt").write_text("Only one?\n")
    run = execute("entropy-adaptive-decoding", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "failed" and "has 1 prompts, so 5 of them cannot be taken: ask for fewer" in run.error
