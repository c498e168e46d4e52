"""Recipes of the decoding room, seconds long."""

from __future__ import annotations

import pytest
import torch

from paperworks.errors import UsageError
from paperworks.lab import execute
from paperworks.lab.executors import execute as run_recipe
from paperworks.lab.run import Run
from paperworks.recipes.decoding.drafting import load_target, trained


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_hydra_measures_every_row():
    run = run_recipe("hydra", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    rows = {(m.name, m.series) for m in run.measurements}
    for name in ("Medusa", "Hydra", "Hydra++"):
        assert {("speed", name), ("speed-up", name), ("accepted per call", name), ("same text", name)} <= rows
    assert {
        ("speed", "plain decoding"),
        ("speed", "transformers generate"),
        ("speed", "transformers prompt look-up"),
    } <= rows
    same = [m for m in run.measurements if m.name == "same text"]
    assert all(m.value == 2 for m in same) and len(same) == 4
    assert run.artefacts["figure"].is_file()


def kept(folder):
    """The trained drafters, without what was found damaged and moved aside."""
    found = (folder / "paperworks" / "drafters").iterdir()
    return sorted(path for path in found if not path.name.startswith("damaged-"))


def test_hydra_reuses_trained_heads_and_mends_damaged_ones(tmp_path):
    first = execute("hydra", scale="tiny", parameters={"equality_prompts": 0}, show_progress=False)
    drafters = kept(tmp_path)
    times = [(folder / "model.safetensors").stat().st_mtime_ns for folder in drafters]
    (drafters[0] / "model.safetensors").write_bytes(b"rubbish")
    again = execute("hydra", scale="tiny", parameters={"equality_prompts": 0}, show_progress=False)
    assert again.status == "finished" and kept(tmp_path) == drafters
    new = [(folder / "model.safetensors").stat().st_mtime_ns for folder in drafters]
    assert new[1:] == times[1:] and new[0] != times[0]
    accepted = [[m.value for m in run.measurements if m.name == "accepted per call"] for run in (first, again)]
    assert accepted[0] == accepted[1]


def test_one_training_serves_trees_of_every_size(tmp_path, monkeypatch):
    target, tokenizer = load_target("tiny-random-llama", dtype=torch.float32)
    options = {"model": "tiny-random-llama", "tokens": 300, "epochs": 1.0, "vocabulary": 32, "seed": 0}
    small = trained(Run("hydra"), "Hydra", target, tokenizer, nodes=4, **options)
    monkeypatch.setattr("paperworks.decoding.train_drafter", None)
    large = trained(Run("hydra"), "Hydra", target, tokenizer, nodes=7, **options)
    assert [len(drafter.tree) for drafter in (small, large)] == [5, 8]
    assert set(small.tree.paths) < set(large.tree.paths)
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fewer_than_no_nodes_is_one_sentence_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match="nodes takes a whole number of at least 0, not -1"):
        execute("hydra", scale="tiny", parameters={"nodes": -1}, show_progress=False)
    assert not (tmp_path / "paperworks").exists()


def test_no_number_of_nodes_leaves_it_to_the_machine(monkeypatch):
    from paperworks.recipes.decoding import drafting

    chosen, fitted = [], drafting.fitted

    def noted(run, name, folder, target, nodes):
        chosen.append(nodes)
        return fitted(run, name, folder, target, 2)

    monkeypatch.setattr(drafting, "fitted", noted)
    execute("hydra", scale="tiny", parameters={"nodes": 0, "prefix_layer": False}, show_progress=False)
    assert chosen == [None, None]


def test_unknown_model_is_one_sentence():
    run = execute("hydra", scale="tiny", parameters={"model": "no-such-model"}, show_progress=False)
    assert run.status == "failed" and "no-such-model" in run.error and getattr(run.exception, "exit_status", 1) == 2


def test_shipped_heads_are_for_their_own_model_alone():
    import json
    from pathlib import Path

    import paperworks.recipes.decoding.drafting as drafting
    from paperworks.hub import load_model

    folder = Path(drafting.__file__).parent / "heads" / "smollm2-135m"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15 * 2**20
    told = json.loads((folder / "config.json").read_text())
    assert told["made_for"]["weights"].keys() == {"bfloat16"}
    run = Run("hydra")
    small, _ = load_model("tiny-random-llama")
    assert drafting.shipped(run, small, model="tiny-random-llama", nodes=4) is None
    # Of the same name, with other weights.
    assert drafting.shipped(run, small, model="somewhere/smollm2-135m", nodes=4) is None
    for options, sentence in (
        ({"prefix_layer": False}, "no heads come with paperworks for tiny-random-llama"),
        ({"prefix_layer": True}, "does not come with"),
    ):
        ended = execute("hydra", scale="tiny", parameters={"heads": "shipped", **options}, show_progress=False)
        assert ended.status == "failed" and sentence in ended.error
