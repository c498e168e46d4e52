"""The recipe of entropy adaptive decoding, seconds long."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from paperworks.decoding import generate
from paperworks.lab import execute
from paperworks.lab.hub import load_model
from paperworks.lab.recipes.decoding.entropy_adaptive_decoding import (
    Turns,
    _begun_anywhere,
    _own_choices,
    _spread_evenly,
)

SHARES = ("25%", "50%", "75%")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def figures(run):
    assert run.status == "finished", run.traceback
    return {(m.name, m.series, m.against): m for m in run.measurements}


def test_the_whole_curve_is_measured_at_equal_cost():
    run = execute("entropy-adaptive-decoding", scale="tiny", show_progress=False)
    found = figures(run)
    assert found["large fraction", "small alone", None].value == 0
    assert found["agreement", "large alone", None].value > 0.95 > found["agreement", "small alone", None].value
    assert found["cost", "small alone", None].value < found["cost", "EAD 50%", None].value < 1
    for share in SHARES:
        own = found["large fraction", f"EAD {share}", None].value
        for kind in ("random", "even"):
            assert found["large fraction", f"{kind} {share}", None].value == pytest.approx(own, abs=0.05)
        assert found["speed-up", f"EAD {share}", "large alone"].value > 0
        for kind in ("random", "even", "whole prompts"):
            ratio = found["agreement at equal cost, ratio", f"EAD {share}", kind]
            assert ratio.low <= ratio.value <= ratio.high and len(ratio.repeats) == 3
    assert ("agreement at equal cost, ratio", "EAD, all shares", "random") in found
    assert run.artefacts["figure"].is_file()


def test_accuracy_is_measured_where_there_are_answers(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 9)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path / "data"))
    options = {"prompts": "gsm8k", "small": "tiny-random-llama"}
    found = figures(execute("entropy-adaptive-decoding", scale="tiny", parameters=options, show_progress=False))
    for name in ("large alone", "small alone", *(f"EAD {share}" for share in SHARES)):
        assert 0 <= found["accuracy", name, None].value <= 1
        # The small model is a copy of the large one.
        assert found["agreement", name, None].value == pytest.approx(1, abs=0.05)


def test_agreement_counts_the_models_own_choices():
    model, _ = load_model("tiny-random-llama")
    prompt = torch.tensor([[1, 2, 3]])
    own = generate(model, prompt, max_new_tokens=10, eos_token_id=[]).sequences[0, 3:]
    changed = own.clone()
    changed[0] = (own[0] + 1) % 128
    law = model(torch.cat([prompt[0], changed])[None]).logits[0, 2:-1].argmax(-1)
    expected = float((law == changed).float().mean())
    values = _own_choices(model, prompt, [own, own[:4], changed])
    assert values == pytest.approx([1, 1, expected]) and expected <= 0.9


def test_turns_of_the_references():
    turns = ["small"] * 5 + ["large"] * 3
    shifted = _begun_anywhere(turns, 3)
    assert sorted(shifted) == sorted(turns) and any(_begun_anywhere(turns, seed) != turns for seed in range(5))
    spread = _spread_evenly(turns, 0)
    places = [index for index, name in enumerate(spread) if name == "large"]
    assert len(places) == 3 and all(2 <= later - earlier <= 3 for earlier, later in pairwise(places))
    switch, writers = Turns(["small", "large", "large"]), []
    for _ in range(5):
        switch.step(0.0)
        writers.append(switch.writer)
    assert writers == ["small", "large", "large", "small", "large"]


def test_too_many_prompts_are_refused():
    run = execute("entropy-adaptive-decoding", scale="tiny", parameters={"prompt_count": 99}, show_progress=False)
    assert run.status == "failed" and "ask for fewer" in run.error
