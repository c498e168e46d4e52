"""What every drafter of the room keeps to."""

from __future__ import annotations

import pytest
import torch

from paperworks.decoding import Drafter, Exact, RecursiveSpeculation, Target, TreeCache, Typical, generate
from tests.decoding.conftest import (
    DRAFTERS,
    FAMILIES,
    distance,
    enumerate_law,
    make_model,
    model_law,
    output,
    scramble,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_the_targets_whatever_the_weights(family, name, prompt):
    model = make_model(family)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    drafter = scramble(DRAFTERS[name](model))
    result = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[])
    assert result.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", DRAFTERS)
def test_output_law_is_the_targets_by_enumeration(name, monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS[name](model))
    if isinstance(drafter, RecursiveSpeculation):
        pytest.skip("its trees are drawn at random; test_recursive_speculation enumerates those draws too")
    if name == "hydra":
        drafter.tree = type(drafter.tree)([(0,), (1,), (0, 0), (1, 1)])
    law = enumerate_law(lambda: output(model, prompt, drafter=drafter, max_new_tokens=3, temperature=1.0), monkeypatch)
    assert distance(law, model_law(model, prompt, 3)) < 1e-12


def test_typical_acceptance_is_not_lossless(monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS["hydra"](model))
    law = enumerate_law(
        lambda: output(model, prompt, drafter=drafter, acceptance=Typical(), max_new_tokens=3, temperature=1.0),
        monkeypatch,
    )
    assert distance(law, model_law(model, prompt, 3)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_rows_of_a_padded_batch_equal_prompts_one_by_one(family, name):
    model = make_model(family)
    drafter = scramble(DRAFTERS[name](model))
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 8, 7]]
    for side in ("left", "right"):
        pads = [[0] * (8 - len(prompt)) for prompt in prompts]
        joined = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
        ones = [[0] * len(pad) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(pad)
                for pad, p in zip(pads, prompts, strict=True)]  # fmt: skip
        batch = generate(
            model, torch.tensor(joined), attention_mask=torch.tensor(ones), drafter=drafter, max_new_tokens=12,
            eos_token_id=[],
        )  # fmt: skip
        alone = [list(output(model, torch.tensor([prompt]), max_new_tokens=12)) for prompt in prompts]
        assert batch.new_tokens == alone


@pytest.mark.parametrize("name", DRAFTERS)
def test_saved_and_loaded_drafter_drafts_the_same(name, model, prompt, tmp_path):
    drafter = scramble(DRAFTERS[name](model))
    drafter.save_pretrained(tmp_path / "saved")
    again = Drafter.from_pretrained(tmp_path / "saved", model)
    assert type(again) is type(drafter)
    one, other = (generate(model, prompt, drafter=d, max_new_tokens=16, eos_token_id=[]) for d in (drafter, again))
    assert one.statistics.emitted == other.statistics.emitted
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", DRAFTERS)
def test_same_seed_same_samples(name, model, prompt):
    drafter = scramble(DRAFTERS[name](model))
    texts = [
        output(
            model,
            prompt,
            drafter=drafter,
            max_new_tokens=20,
            temperature=5.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_after_a_rejected_branch_equals_one_built_from_scratch(family, prompt):
    model = make_model(family)
    drafter = scramble(DRAFTERS["hydra"](model))
    target = Target(model)
    cache = TreeCache(target.config, 1)
    with torch.inference_mode():
        logits, _ = target.prefill(list(prompt), cache)
        tree = drafter.tree.tree(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]))
        target.verify(tree, cache)
        cache.commit(torch.tensor([[0, 2, 5]]), [3])
        tokens = torch.cat([prompt, tree.tokens[:, [0, 2, 5]]], dim=1)
        fresh = TreeCache(target.config, 1)
        target.prefill(list(tokens), fresh)
    assert cache.lengths == fresh.lengths == [8]
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(one.keys[:, :, :8], other.keys[:, :, :8], atol=1e-10, rtol=0)
        torch.testing.assert_close(one.values[:, :, :8], other.values[:, :, :8], atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_attention_equals_every_path_run_alone(family, implementation):
    model = make_model(family, implementation=implementation)
    target = Target(model)
    # transformers' eager attention normalises in float32 whatever the model's type.
    close = {"atol": 1e-5 if implementation == "eager" else 1e-9, "rtol": 0}
    shape = DRAFTERS["hydra"](model).tree
    prompts = [torch.tensor([3, 1, 2, 0, 2, 9, 9, 4]), torch.tensor([5, 6])]
    cache = TreeCache(target.config, 2)
    tokens = torch.randint(40, (2, len(shape)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        target.prefill(prompts, cache)
        tree = shape.tree(tokens)
        logits, hidden = target.verify(tree, cache)
        for row, prompt in enumerate(prompts):
            for node in range(len(shape)):
                path = tree.ancestors[row, node].nonzero()[:, 0]
                ids = torch.cat([prompt, tokens[row, path]])[None]
                alone = model(ids, output_hidden_states=True)
                torch.testing.assert_close(logits[row, node], alone.logits[0, -1], **close)
                torch.testing.assert_close(hidden[row, node], alone.hidden_states[-1][0, -1], **close)


def test_exact_acceptance_of_a_random_model_passes_chi_square(model, prompt):
    """The compiled path too: 3,000 two-token samples against the model's own law, ends lumped."""
    model = make_model(vocab=4)
    drafter = scramble(DRAFTERS["hydra"](model))
    batch = prompt.expand(3000, -1)
    samples = generate(
        model, batch, drafter=drafter, acceptance=Exact(), max_new_tokens=2, temperature=1.0, eos_token_id=[],
        generator=torch.Generator().manual_seed(0),
    ).new_tokens  # fmt: skip
    law = model_law(model, prompt, 2)
    counts = {key: 0 for key in law}
    for sample in samples:
        counts[tuple(sample)] += 1
    statistic = sum((counts[key] - 3000 * p) ** 2 / (3000 * p) for key, p in law.items())
    assert statistic < 37.7  # 99.9 % point for 15 degrees of freedom
