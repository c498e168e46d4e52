"""The recipe of superposed decoding, seconds long."""

from __future__ import annotations

import random

import pytest
import torch

from paperworks.hub import load_model
from paperworks.lab.executors import execute
from paperworks.recipes.decoding.superposed_decoding import _cosines, _perplexity

ROWS = (
    "nucleus, one by one",
    "nucleus, one batch",
    "greedy",
    "beam search",
    "Superposed",
    "Superposed without n-grams",
)


def test_every_row_is_measured():
    run = execute("superposed-decoding", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series, m.against): m for m in run.measurements}
    for name in ROWS:
        assert figures["speed", name, None].value > 0
        assert figures["perplexity", name, None].value > 1
        assert figures["distinct drafts", name, None].value <= (1 if name == "greedy" else 3)
        assert 0 < figures["distinct tokens", name, None].value <= 1
    assert [figures["passes", name, None].value for name in ROWS] == [30, 10, 10, 10, 10, 10]
    for name in ROWS[1:]:
        ratio = figures["perplexity, ratio", name, ROWS[0]]
        assert ratio.low <= ratio.value <= ratio.high and len(ratio.repeats) == 3
        assert figures["speed-up", name, ROWS[0]].value > 0
    assert figures["distinct drafts", "Superposed", None].value == 3
    assert ("perplexity, ratio", "Superposed", "Superposed without n-grams") in figures
    assert run.artefacts["figure"].is_file()


def test_a_text_of_ones_own_serves(tmp_path):
    chance = random.Random(0)
    words = ["the", "boat", "went", "over", "water", "and", "back"]
    text = "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(40))
    (tmp_path / "boats.txt").write_text(text)
    options = {"corpus": str(tmp_path / "boats.txt"), "new_tokens": 4}
    run = execute("superposed-decoding", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback
    options["prompt_count"] = 41
    run = execute("superposed-decoding", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "failed" and "too small for 41 prompts" in run.error


def test_a_table_is_no_corpus():
    run = execute("superposed-decoding", scale="tiny", parameters={"corpus": "iris"}, show_progress=False)
    assert run.status == "failed" and "iris is no running text" in run.error


def test_perplexity_is_that_of_the_tokens_one_by_one():
    model, _ = load_model("tiny-random-llama", dtype=torch.float64)
    prompt, drafts = torch.tensor([[72, 105, 33]]), [[5, 6], [70, 71]]
    losses = []
    with torch.no_grad():
        for draft in drafts:
            for place, token in enumerate(draft):
                ids = torch.cat([prompt, torch.tensor([draft[:place]], dtype=torch.long)], 1)
                losses.append(-float(model(ids).logits[0, -1].log_softmax(-1)[token]))
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp()
    assert _perplexity(model, prompt, drafts) == pytest.approx(float(expected), rel=1e-5)


def test_embeddings_mix_exactly_and_states_nearly():
    model, _ = load_model("tiny-random-llama")
    cosines = _cosines(model, torch.tensor([[72, 105, 33]]), 3)
    assert cosines.shape == (3,) and float(cosines[0]) == pytest.approx(1)
    assert 0.5 < float(cosines[2]) < 1 - 1e-4
