"""The recipe of recursive speculation, seconds long."""

from __future__ import annotations

import pytest
import torch

from paperworks.lab.executors import execute

ROWS = ("single sequence", "independent sequences", "RSD-C", "RSD-S")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


@pytest.mark.parametrize("draft", ["first layer", "tiny-random-llama"])
def test_every_row_is_measured(draft, monkeypatch):
    # In bfloat16, where the processor has it, a text may end early.
    monkeypatch.setattr("paperworks.recipes.decoding.drafting.cpu_friendly_dtype", lambda: torch.float32)
    run = execute("recursive-speculation", scale="tiny", parameters={"draft": draft}, show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series, m.against): m for m in run.measurements}
    for name in ROWS:
        assert figures["speed-up", name, "plain decoding"].value > 0
        accepted = figures["accepted per call", name, None].value
        assert 1 <= accepted <= (5 if name == ROWS[0] else 3)
        assert 0 < figures["memory-bound speed-up", name, None].value < accepted
        assert 0 < figures["drafting share", name, None].value < 1
        # Eleven tokens behind the first, of two prompts, by 1 to 5 a call.
        assert 6 <= figures["calls", name, None].value <= 22
    for name in ROWS[2:]:
        assert figures["same text", name, None].value == 2
        for other in ROWS[:2]:
            ratio = figures["accepted per call, ratio", name, other]
            assert ratio.low <= ratio.value <= ratio.high and len(ratio.repeats) == 2
    assert run.artefacts["figure"].is_file()


def test_a_draft_equal_to_the_target_is_accepted_whole():
    options = {"draft": "tiny-random-llama", "new_tokens": 13, "equality_prompts": 0}
    run = execute("recursive-speculation", scale="tiny", parameters=options, show_progress=False)
    tokens = {m.series: m.value for m in run.measurements if m.name == "accepted per call"}
    # Twelve tokens behind the first: in threes from trees two deep, in fives and a rest from a chain of four.
    assert tokens["RSD-S"] == tokens["RSD-C"] == tokens["independent sequences"] == 3
    assert tokens["single sequence"] == 4


def test_it_takes_the_options_it_shares_with_hydra():
    from paperworks.lab.recipe import find

    ours, theirs = find("recursive-speculation").parameters, find("hydra").parameters
    shared = theirs.keys() - {"prefix_layer", "heads"}
    assert shared <= ours.keys() and all(ours[name].type == theirs[name].type for name in shared)
    # Hydra's tree is the machine's best; trees here are of a size.
    assert all(ours[name].default == theirs[name].default for name in shared - {"nodes"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"nodes": 5}, "nodes as a multiple of depth"),
        ({"depth": 3}, "nodes as a multiple of depth"),
    ],
)
def test_bad_options_are_one_sentence(options, words):
    run = execute("recursive-speculation", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "failed" and words in run.error and run.exception.exit_status == 2
