"""The recipe of programmable variational inference, seconds long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paperworks.lab import execute
from paperworks.lab.recipe import find
from paperworks.lab.verdicts import find as measured
from paperworks.papers import get
from paperworks.recipes.uncertainty import programmable_vi as recipe
from paperworks.recipes.uncertainty.programmable_vi import BEST, ESTIMATORS, PYRO, STARTS, Trained, _reached


@pytest.fixture(scope="module")
def run():
    done = execute("programmable-vi", scale="tiny", show_progress=False)
    assert done.status == "finished", done.traceback
    return done


def test_every_objective_and_estimator_is_measured(run):
    figures = {(m.name, m.series, m.against): m for m in run.measurements}
    bounds = {name: figures["bound on the cone", name, None] for name in (*STARTS, PYRO, "Pyro, Renyi (5)")}
    for name, bound in bounds.items():
        short = figures["bound short of the evidence", name, None].value
        assert short == pytest.approx(-5.323232 - bound.value) and short > 0
        if name != BEST:
            gained = figures["bound gained on the cone", BEST, name]
            assert gained.repeats == pytest.approx(np.subtract(bounds[BEST].repeats, bound.repeats))
    # Pyro draws the same noise from the same seed, and its estimator is the same.
    assert bounds[PYRO].repeats == pytest.approx(bounds["ELBO"].repeats, rel=1e-6)
    for place, name in enumerate(ESTIMATORS):
        assert figures["test ELBO of the images", name, None].value < 0
        assert 0 <= figures["flips all right", name, None].value <= 1
        for other in ESTIMATORS[place + 1 :]:
            assert ("test ELBO gained", name, other) in figures
    for name in ("vi, batch 8", "vi unchecked, batch 8", "Pyro, batch 8"):
        assert figures["speed-up", name, "by hand, batch 8"].value > 0
    for name in ("Enum", "Reinforce"):
        assert figures["speed-up", f"vi, images by {name}", f"Pyro, images by {name}"].value > 0
    assert run.artefacts["figure"].is_file()


def test_claims_name_what_the_recipe_measures(run):
    """At scale tiny, but for the size of the autoencoder's batches and what a longer training reaches."""
    for claim in get("programmable-vi").claims:
        if claim.shown_by is None or claim.shown_by.test:
            continue
        evidence = claim.shown_by.model_copy(
            update={
                "series": claim.shown_by.series.replace("1024", "8"),
                "against": claim.shown_by.against.replace("1024", "8"),
            }
        )
        assert measured(evidence, run.measurements) is not None, evidence


def test_columns_are_measured(run):
    names = {m.name for m in run.measurements} | {f"{m.name} against {m.against}" for m in run.measurements}
    assert {column.replace("batch 1024", "batch 8") for column in find("programmable-vi").columns} <= names


def test_the_same_seed_trains_the_same():
    rows = recipe._rows("digits")
    one, again, other = (recipe._train_images(rows, 2, 3, "MVD", seed) for seed in (0, 0, 1))
    assert one.elbo == again.elbo and one.elbo != other.elbo


def test_estimators_agree_on_the_gradient_of_the_images():
    """In the mean over many images of the same pixels, MVD and the score function with a baseline give what Enum gives."""
    from paperworks.uncertainty import vi

    rows = recipe._rows("digits")
    networks, objective = recipe._networks(64, 2, 0), recipe._image_objective(2)
    pixels = recipe._draw_images(rows, 2, 1, torch.Generator().manual_seed(0)).pixels.expand(6000, 2, 64)
    found = {}
    for name, strategy in (("Enum", vi.Enum()), ("MVD", vi.MVD()), ("Reinforce", vi.Reinforce(-300.0))):
        networks.zero_grad()
        estimator = objective(networks, pixels, strategy)
        estimator.surrogate(batch_shape=(6000,), generator=torch.Generator().manual_seed(1)).mean().backward()
        found[name] = networks["presence"][-1].bias.grad
    assert torch.allclose(found["MVD"], found["Enum"], rtol=0.05)
    assert torch.allclose(found["Reinforce"], found["Enum"], rtol=0.3)


def test_targets_are_reached_between_evaluations():
    one = Trained([0, 20, 40], [-10.0, -6.0, -2.0], [0.0, 1.0, 3.0], 1.0)
    assert _reached(one, -4.0, one.steps) == pytest.approx(30)
    assert _reached(one, -4.0, one.seconds) == pytest.approx(2)
    assert _reached(one, -10.0, one.steps) == 0
    assert _reached(one, -1.0, one.steps) is None


def test_a_table_of_ones_own_and_images_lie_in_the_slots(tmp_path):
    path = tmp_path / "own.csv"
    lines = ["a,b,c,y", *(f"{x},{10 * y},5,{x + y}" for x, y in np.random.default_rng(0).normal(size=(30, 2)))]
    path.write_text("\n".join(lines))
    rows = recipe._rows(str(path))
    assert rows.shape == (30, 3) and rows.min() == 0 and rows.max() == 1
    done = execute(
        "programmable-vi", scale="tiny", parameters={"data": str(path), "cone_steps": 1}, show_progress=False
    )
    assert done.status == "finished", done.traceback


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [({"batches": "8, many"}, "whole numbers"), ({"batches": "8, 8"}, "different"), ({"batches": "0"}, "1 to 4096")],
)
def test_wrong_batches_are_one_sentence(parameters, sentence):
    done = execute("programmable-vi", scale="tiny", parameters=parameters, show_progress=False)
    assert done.status == "failed" and sentence in done.traceback
