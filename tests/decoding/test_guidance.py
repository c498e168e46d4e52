"""Classifier-free guidance: guided logits, and drafting for a guided model."""

from __future__ import annotations

import pytest
import torch

from paperworks.decoding import DraftingData, Exact, Hydra, Target, collect, generate, train_drafter
from paperworks.decoding.guidance import ClassifierFreeGuidance
from tests.decoding.conftest import DRAFTERS, FAMILIES, distance, enumerate_law, make_model, output, scramble

LABELS, NULL = [0, 1], 2


def guided(model, scale=2.5):
    return ClassifierFreeGuidance(model, condition=LABELS, null=NULL, scale=scale)


def by_hand(model, ids, scale=2.5):
    """u + s (c - u) of the model's logits, from two passes over whole sequences."""
    without = torch.tensor([[NULL if token in LABELS else token for token in row] for row in ids.tolist()])
    with torch.no_grad():
        c, u = model(ids).logits, model(without).logits
    return u + scale * (c - u)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_guided(family):
    model = make_model(family)
    ids = torch.tensor([[1, 5, 6, 0, 7], [0, 9, 2, 3, 3]])
    with torch.no_grad():
        logits = guided(model)(ids).logits
        assert (logits - model(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(guided(model, 1.0)(ids).logits, model(ids).logits, atol=1e-10, rtol=0)
        last = guided(model)(ids, logits_to_keep=1).logits
    torch.testing.assert_close(logits, by_hand(model, ids), atol=1e-9, rtol=0)
    torch.testing.assert_close(last, logits[:, -1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_of_a_padded_batch_is_the_guided_one_whatever_is_drafted(name):
    model = make_model()
    drafter = scramble(DRAFTERS[name](guided(model)))
    expected = torch.tensor([[1, 4]])
    for _ in range(12):
        expected = torch.cat([expected, by_hand(model, expected)[:, -1:].argmax(-1)], 1)
    prompts, mask = torch.tensor([[1, 4], [0, 0]]), torch.tensor([[1, 1], [1, 0]])
    result = generate(guided(model), prompts, attention_mask=mask, drafter=drafter, max_new_tokens=12, eos_token_id=[])
    assert result.new_tokens[0] == expected[0, 2:].tolist()


def test_law_with_a_drafter_is_the_guided_law_by_enumeration(monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[1]])
    drafter = scramble(DRAFTERS["hydra"](guided(model)))
    law = enumerate_law(
        lambda: output(guided(model), prompt, drafter=drafter, acceptance=Exact(), max_new_tokens=2, temperature=1.0),
        monkeypatch,
    )
    expected = {}
    first = by_hand(model, prompt)[0, -1].softmax(-1)
    for token, chance in enumerate(first.tolist()):
        second = by_hand(model, torch.tensor([[1, token]]))[0, -1].softmax(-1)
        expected |= {(token, other): chance * p for other, p in enumerate(second.tolist())}
    assert distance(law, expected) < 1e-12


def test_a_drafter_learns_the_guided_law():
    model = make_model(dtype=torch.float32)
    data = collect(guided(model), [([1], list(range(3, 12))), ([0], [7, 3, 9])])
    assert isinstance(data, DraftingData)
    target = Target(guided(model))
    ids = torch.tensor([[1, *range(3, 12)]])
    torch.testing.assert_close(target.logits(data.hidden[:1]), by_hand(model, ids), atol=1e-3, rtol=1e-4)
    losses = train_drafter(Hydra.from_target(guided(model), heads=2, tree=[(0,)]), guided(model), data, epochs=20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guided(make_model(), -1.0), "scale must be a number of at least 0"),
        (lambda: guided(make_model(), float("inf")), "scale must be a number of at least 0"),
        (lambda: guided(make_model(), float("nan")), "scale must be a number of at least 0"),
        (lambda: ClassifierFreeGuidance(make_model(), condition=[0], null=40), r"within 0\.\.39"),
        (lambda: ClassifierFreeGuidance(make_model(), condition=[0, 40], null=1), r"within 0\.\.39"),
        (lambda: ClassifierFreeGuidance(make_model(), condition=[-1], null=1), r"within 0\.\.39"),
        (lambda: guided(capped()), "caps its logits"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def capped():
    model = make_model("gemma3")
    model.config.final_logit_softcapping = 30.0
    return model


@pytest.mark.parametrize("scale", [0.0, 0.5, 7.0])
def test_a_scale_of_0_forgets_the_condition_and_others_go_on_from_there(scale):
    model, ids = make_model(), torch.tensor([[1, 5, 6, 0, 7, 39]])
    with torch.no_grad():
        logits = guided(model, scale)(ids).logits
        torch.testing.assert_close(logits, by_hand(model, ids, scale), atol=1e-9, rtol=0)
        picked = guided(model, scale)(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(picked, logits[:, [1, 4]], atol=1e-12, rtol=0)
    if not scale:
        with torch.no_grad():
            assert torch.allclose(logits, model(torch.tensor([[2, 5, 6, 2, 7, 39]])).logits)
    # One cache holds both: as many layers again, of the same kinds.
    for family in ("llama", "gemma3"):
        config = guided(make_model(family)).config
        assert config.num_hidden_layers == 4 and make_model(family).config.num_hidden_layers == 2
        assert family == "llama" or config.layer_types == ["sliding_attention", "full_attention"] * 2


def test_every_family_decodes():
    for family in FAMILIES:
        model = make_model(family)
        ids = torch.tensor([[1]])
        made = generate(guided(model), ids, max_new_tokens=8, eos_token_id=[]).sequences
        for end in range(1, 9):
            assert by_hand(model, made[:, :end])[0, -1].argmax() == made[0, end]
