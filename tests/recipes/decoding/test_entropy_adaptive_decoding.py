"""The recipe of entropy adaptive decoding, seconds long."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch

from paperworks.decoding import EntropyAdaptiveDecoding, generate
from paperworks.hub import load_model
from paperworks.hub.extents import EXTENTS
from paperworks.lab import execute
from paperworks.recipes.decoding.entropy_adaptive_decoding import (
    Turns,
    _begun_anywhere,
    _read,
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
    assert found["divergence", "large alone", None].value == 0 < found["divergence", "small alone", None].value
    assert found["cost", "small alone", None].value < found["cost", "EAD 50%", None].value < 1
    for share in SHARES:
        own = found["large fraction", f"EAD {share}", None].value
        for kind in ("random", "even"):
            assert found["large fraction", f"{kind} {share}", None].value == pytest.approx(own, abs=0.05)
        assert found["speed-up", f"EAD {share}", "large alone"].value > 0
        for kind in ("random", "even", "whole prompts"):
            ratio = found["divergence at equal cost, ratio", f"EAD {share}", kind]
            assert ratio.low <= ratio.value <= ratio.high and len(ratio.repeats) == 3
    assert ("divergence at equal cost, ratio", "EAD, all shares", "random") in found
    assert run.artefacts["figure"].is_file()


def test_accuracy_is_measured_where_there_are_answers(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 9)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("PAPERWORKS_DATA", str(tmp_path / "data"))
    monkeypatch.delitem(EXTENTS, ("gsm8k", "test"))
    options = {"prompts": "gsm8k", "small": "tiny-random-llama"}
    found = figures(execute("entropy-adaptive-decoding", scale="tiny", parameters=options, show_progress=False))
    for name in ("large alone", "small alone", *(f"EAD {share}" for share in SHARES)):
        assert 0 <= found["accuracy", name, None].value <= 1
        # The small model is the large one again: there is no divergence, and nothing to compare.
        assert found["divergence", name, None].value == 0
    assert not any(name.startswith("divergence at equal cost") for name, _, _ in found)


@torch.no_grad()
def test_divergence_and_surprise_equal_those_of_fresh_laws():
    large, _ = load_model("tiny-random-llama")
    small = copy.deepcopy(large)
    for parameter in small.parameters():
        parameter.data *= 1.3
    prompt = torch.tensor([[1, 2, 3]])
    decoding = EntropyAdaptiveDecoding(small, large, Turns(["small", "large", "large"]))
    own = torch.Generator().manual_seed(0)
    texts = [
        decoding.generate(prompt, max_new_tokens=tokens, temperature=0.7, generator=own, eos_token_id=[])
        for tokens in (11, 5)
    ]
    texts.append(generate(large, prompt, max_new_tokens=8, temperature=0.7, generator=own, eos_token_id=[]))
    scores = _read(decoding, prompt, texts, 0.7)
    assert scores[0][0] > 1e-3 and scores[2][0] == 0
    for text, (divergence, surprise) in zip(texts[:2], scores, strict=False):
        far, near = [], []
        for place, name in enumerate(text.models):
            p, q = (
                (model(text.sequences[:, : 3 + place]).logits[0, -1].double() / 0.7).softmax(-1)
                for model in (small, large)
            )
            far.append(float((p * (p / q).log2()).sum()) if name == "small" else 0.0)
            near.append(-math.log2(q[text.sequences[0, 3 + place]]))
        assert divergence == pytest.approx(sum(far) / len(far), rel=1e-3)
        assert surprise == pytest.approx(sum(near) / len(near), rel=1e-3)


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


@pytest.mark.parametrize(
    ("name", "value", "words"), [("prompt_count", 99, "ask for fewer"), ("temperature", 0.0, "above 0")]
)
def test_bad_options_are_refused(name, value, words):
    run = execute("entropy-adaptive-decoding", scale="tiny", parameters={name: value}, show_progress=False)
    assert run.status == "failed" and words in run.error
