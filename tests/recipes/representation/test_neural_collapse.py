"""The recipe of neural collapse, seconds long."""

from __future__ import annotations

import pytest
import torch

from paperworks.lab import execute
from paperworks.recipes.representation.neural_collapse import LENGTHS, LOSSES, deep, row_error, train
from paperworks.recipes.representation.samples import samples
from paperworks.representation import frame_geometry


def test_neural_collapse_measures_training_geometry_and_threshold():
    run = execute("neural-collapse", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    assert figures[LENGTHS, "solver"].value < 1e-3
    assert figures["NC1", "end of training"].value <= figures["NC1", "zero training error"].value
    for loss in ("squared error", "cross-entropy"):
        for name in ("NC1", "NC2", "NC3"):
            assert figures[f"{name}, ratio", f"{loss}, worst of 2 layers"].against == "initialisation"
    fall = figures["fall of NC1", "end of training"]
    assert fall.low <= fall.value <= fall.high
    assert {("distance of the rows (NC2)", "predicted frame"), ("speed-up", "closed form")} <= set(figures)
    kept, lost = (figures["rarest digit's own logit", f"{share} of the threshold"].value for share in ("0.4", "1.2"))
    assert kept > lost
    assert run.artefacts["figure"].is_file()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_linear_layer_collapses_from_where_it_began(loss):
    before, after = deep((12, 12, 12), 32, 2, 1e-3, 500, 0, loss)
    assert set(before) == set(after) == {"NC1", "NC2", "NC3"}
    assert after["NC1"] < 0.05 * before["NC1"]
    assert after["NC2"] < 0.6 * before["NC2"] and after["NC3"] < 0.3 * before["NC3"]


def test_a_network_ends_at_the_predicted_lengths():
    counts, lam = (30, 15, 8), 0.01
    frame = frame_geometry(counts, lam_w=lam, lam_h=lam)
    one = train(counts, 128, lam, 600, 0)
    assert row_error(one.weight, frame) < 0.05
    assert one.at_zero_error > 10 * one.path[-1][2]


def test_digits_are_so_many_of_each_and_repeat_with_the_seed():
    digits = samples().drawn
    x, y = digits([7, 3, 5], 1)
    assert torch.bincount(y).tolist() == [7, 3, 5] and float(x.min()) == -1 and float(x.max()) == 1
    assert torch.equal(x, digits([7, 3, 5], 1)[0]) and not torch.equal(x, digits([7, 3, 5], 2)[0])


def test_row_error_leaves_out_collapsed_classes():
    frame = frame_geometry([40, 20, 1], lam_w=0.01, lam_h=0.04)
    assert frame.collapsed.tolist() == [False, False, True]
    rows = frame.weight_squared.sqrt().diag()
    rows[1] *= 1.1
    assert row_error(rows, frame) == pytest.approx(0.1)
