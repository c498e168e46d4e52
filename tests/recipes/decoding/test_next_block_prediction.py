"""The recipe of next-block prediction, seconds long."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch

from paperworks.lab.executors import execute
from paperworks.recipes.decoding.next_block_prediction import moving_clips


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_every_block_is_measured(tmp_path):
    run = execute("next-block-prediction", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    # Two frames of 4 x 4 codes.
    passes = {name: figures["passes a clip", name].value for name in ("next token", "next row", "next frame")}
    assert passes == {"next token": 32, "next row": 8, "next frame": 2}
    for name in ("next row", "next frame"):
        assert figures["speed-up", name].against == "next token"
        for what, pairs in (("Fréchet distance", 2), ("bits a token", 179), ("bits a token, continued", 179)):
            ratio = figures[f"{what}, ratio", name]
            assert ratio.low <= ratio.value <= ratio.high and len(ratio.repeats) == pairs
            # The geometric mean of the pairs' ratios is near the ratio of the means that stand beside it.
            means = figures[what, name].value / figures[what, "next token"].value
            assert (
                ratio.value
                == pytest.approx(math.exp(fmean(map(math.log, ratio.repeats))))
                == pytest.approx(means, rel=0.05)
            )
    assert run.artefacts["figure"].is_file()
    assert len(list((tmp_path / "paperworks" / "block-models").iterdir())) == 3


def test_digits_move_by_a_pixel_a_frame_and_bounce():
    images = torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    clips, moves = moving_clips(images, 6, 5, seed=1)
    assert set(moves.tolist()) == set(range(8))
    directions = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    for clip, image, move in zip(clips, images, moves.tolist(), strict=True):
        places = []
        for frame in clip:
            y, x = (frame > 0).nonzero().amin(0).tolist()
            assert frame[y : y + 2, x : x + 2].equal(image) and (frame > 0).sum() == 4
            places.append((y, x))
        step = list(directions[move])
        for before, after in itertools.pairwise(places):
            for axis in range(2):
                if not 0 <= before[axis] + step[axis] <= 3:
                    step[axis] = -step[axis]
                assert after[axis] == before[axis] + step[axis]
