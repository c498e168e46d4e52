"""Conditional beam search and exact modes against transformers' beam search and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paperworks.decoding.conditional_beam_search import ConditionalBeamSearch, exact_mode
from tests.decoding.conftest import FAMILIES, make_model, model_law

PROMPTS = torch.randint(1, 40, (10, 6), generator=torch.Generator().manual_seed(5))


def indifferent(hidden, tokens):
    return hidden.new_zeros(tokens.shape[:-1])


@pytest.mark.parametrize("num_beams, length_penalty", [(1, 1.0), (4, 0.0), (4, 1.0), (3, -0.5)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weight_0_equals_transformers_beam_search_on_10_prompts(num_beams, length_penalty, weight):
    """With a weight, a classifier that says the same of all texts must change nothing either."""
    model = make_model()
    ends = [0, 7, 11]
    theirs = model.generate(
        PROMPTS, num_beams=num_beams, num_return_sequences=num_beams, length_penalty=length_penalty, max_new_tokens=12,
        do_sample=False, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    ) if num_beams > 1 else None  # fmt: skip
    search = ConditionalBeamSearch(
        model, indifferent, num_beams=num_beams, weight=weight, length_penalty=length_penalty, candidates=12
    )
    found = search.generate(PROMPTS, max_new_tokens=12, eos_token_id=ends)
    if theirs is None:
        greedy = model.generate(PROMPTS, do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
        assert found.sequences[:, 0].tolist() == greedy.tolist()
        return
    assert found.sequences.flatten(0, 1).tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(found.scores.flatten().float(), theirs.sequences_scores, atol=1e-4, rtol=1e-5)
    assert len({len(text) for texts in found.new_tokens for text in texts}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_log_likelihoods(family):
    model = make_model(family)
    search = ConditionalBeamSearch(model, lambda hidden, tokens: -0.5 * (tokens == 9).sum(-1), num_beams=3, weight=2.0)
    found = search.generate(PROMPTS, max_new_tokens=8, eos_token_id=[0, 7])
    for prompt, texts, log_p, log_a, score in zip(
        PROMPTS, found.new_tokens, found.log_likelihoods, found.log_attributes, found.scores, strict=True
    ):
        for index, text in enumerate(texts):
            ids = torch.cat([prompt, torch.tensor(text)])[None]
            law = model(ids).logits[0, 5:-1].log_softmax(-1)
            assert float(log_p[index]) == pytest.approx(float(law[range(len(text)), text].sum().detach()), abs=1e-4)
            assert float(log_a[index]) == -0.5 * text.count(9)
            assert float(score[index]) == pytest.approx(float(log_p[index]) + 2 * float(log_a[index]), abs=1e-6)
        assert score.tolist() == sorted(score.tolist(), reverse=True)


def exact_classifier(law, attribute):
    """log p(a | prefix) of every prefix, from all texts and their probabilities."""
    mass, joint = {}, {}
    for text, chance in law.items():
        for end in range(1, len(text) + 1):
            mass[text[:end]] = mass.get(text[:end], 0.0) + chance
            joint[text[:end]] = joint.get(text[:end], 0.0) + chance * attribute(text)

    def classify(hidden, tokens):
        rows = [tuple(row) for row in tokens.flatten(0, -2).tolist()]
        chances = [joint.get(row, 0.0) / mass.get(row, 1.0) for row in rows]
        return torch.tensor(chances, dtype=torch.float64).log().view(tokens.shape[:-1])

    return classify


ATTRIBUTES = {
    "no token twice in a row": lambda text: all(a != b for a, b in itertools.pairwise(text)),
    "a 1 and a 2": lambda text: {1, 2} <= set(text),
    "the last is the first": lambda text: text[0] == text[-1],
}


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
@pytest.mark.parametrize("prompt", [[[0, 2]], [[1, 1]], [[2, 0]]])
def test_exact_classifier_and_a_beam_as_wide_as_the_space_give_the_conditional_mode(prompt, attribute):
    model, prompt = make_model(vocab=3), torch.tensor(prompt)
    law = model_law(model, prompt, 4)
    mass = sum(chance for text, chance in law.items() if attribute(text))
    wanted = max((text for text in law if attribute(text)), key=law.__getitem__)
    search = ConditionalBeamSearch(model, exact_classifier(law, attribute), num_beams=81)
    found = search.generate(prompt, max_new_tokens=4, eos_token_id=[])
    assert tuple(found.new_tokens[0][0]) == wanted
    # log p(x | a) = log p(x) + log p(a | x) - log p(a), for all texts that have the attribute, and no others.
    finite = [index for index, score in enumerate(found.scores[0].tolist()) if score > -math.inf]
    assert {tuple(found.new_tokens[0][index]) for index in finite} == {text for text in law if attribute(text)}
    for index in finite:
        expected = math.log(law[tuple(found.new_tokens[0][index])] / mass)
        assert float(found.scores[0, index]) - math.log(mass) == pytest.approx(expected, abs=1e-5)
    assert not any(found.new_tokens[0][len(finite) :])


def test_a_narrow_beam_is_led_to_texts_that_plain_beam_search_misses():
    model, prompt = make_model(vocab=3), torch.tensor([[0, 2]])
    law = model_law(model, prompt, 4)
    plain = ConditionalBeamSearch(model, indifferent, num_beams=2).generate(prompt, max_new_tokens=4, eos_token_id=[])
    led = 0
    for attribute in ATTRIBUTES.values():
        search = ConditionalBeamSearch(model, exact_classifier(law, attribute), num_beams=2)
        assert attribute(tuple(search.generate(prompt, max_new_tokens=4, eos_token_id=[]).new_tokens[0][0]))
        led += not attribute(tuple(plain.new_tokens[0][0]))
    assert led


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_sees_the_state_behind_each_prefix_as_a_fresh_pass_has_it(family):
    model, seen = make_model(family), []

    def watch(hidden, tokens):
        seen.append((hidden, tokens))
        return -(hidden.norm(dim=-1) % 1)  # moves the search about

    ConditionalBeamSearch(model, watch, num_beams=3).generate(PROMPTS[:1], max_new_tokens=9, eos_token_id=[0, 7])
    assert [tokens.shape for _, tokens in seen] == [(1, 3, 6, length) for length in range(1, len(seen) + 1)]
    for hidden, tokens in seen[1::3]:
        ids = torch.cat([PROMPTS[:1].expand(18, -1), tokens.reshape(18, -1)], dim=1)
        with torch.no_grad():
            fresh = model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
        torch.testing.assert_close(hidden.reshape(18, -1), fresh, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padded_batch_equal_prompts_one_by_one(family, side):
    def classifier(hidden, tokens):
        return -(hidden.sum(-1) % 2)

    search = ConditionalBeamSearch(make_model(family), classifier, num_beams=3, candidates=16)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 8, 7], [4, 4]]
    pads = [[0] * (8 - len(prompt)) for prompt in prompts]
    pairs = list(zip(pads, prompts, strict=True))
    ids = torch.tensor([pad + prompt if side == "left" else prompt + pad for pad, prompt in pairs])
    kept = [([0] * len(pad), [1] * len(prompt)) for pad, prompt in pairs]
    mask = torch.tensor([pad + ones if side == "left" else ones + pad for pad, ones in kept])
    together = search.generate(
        ids, attention_mask=mask, max_new_tokens=12, eos_token_id=list(range(0, 40, 4)), pad_token_id=39
    )
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = search.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=list(range(0, 40, 4)))
        assert together.new_tokens[row] == alone.new_tokens[0]
        torch.testing.assert_close(together.scores[row], alone.scores[0], atol=1e-4, rtol=0)
        lengths.add(alone.target_calls)
        for text, sequence in zip(together.new_tokens[row], together.sequences[row].tolist(), strict=True):
            assert sequence == ids[row].tolist() + text + [39] * (len(sequence) - 8 - len(text))
    assert len(lengths) > 1  # some were done before others


def test_custom_generate_of_transformers():
    model = make_model()
    search = ConditionalBeamSearch(model, indifferent, num_beams=4)
    expected = search.generate(PROMPTS, max_new_tokens=6, eos_token_id=7).sequences[:, 0]
    given = dict(custom_generate=search.custom_generate, max_new_tokens=6, eos_token_id=7, pad_token_id=0)
    assert model.generate(PROMPTS, **given).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="another model"):
        make_model().generate(PROMPTS, **given)
    with pytest.raises(ValueError, match="leave num_beams"):
        model.generate(PROMPTS, num_beams=2, **given)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_beams=0), "num_beams must be at least 1"),
        (dict(weight=-0.1), "weight must be a number from 0 on"),
        (dict(weight=float("nan")), "weight"),
        (dict(weight=float("inf")), "weight"),
        (dict(candidates=0), "candidates must be between 1"),
        (dict(candidates=41), r"the vocabulary \(40\)"),
    ],
)
def test_bad_values_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ConditionalBeamSearch(make_model(), indifferent, **options)


def test_bad_inputs_are_refused():
    model = make_model()
    with pytest.raises(TypeError, match="causal language model"):
        ConditionalBeamSearch(torch.nn.Linear(2, 2), indifferent)
    with pytest.raises(TypeError, match="classifier must be a function"):
        ConditionalBeamSearch(model, "nice")
    search = ConditionalBeamSearch(model, indifferent, candidates=2)
    with pytest.raises(ValueError, match="more than the 2 end tokens"):
        search.generate(PROMPTS, max_new_tokens=3, eos_token_id=[1, 2])
    with pytest.raises(ValueError, match="context"):
        search.generate(PROMPTS, max_new_tokens=100)
    for wrong in (lambda h, t: h.new_ones(t.shape[:-1]), lambda h, t: h, lambda h, t: h[..., 0] * float("nan")):
        with pytest.raises(ValueError, match="must return log-probabilities"):
            ConditionalBeamSearch(model, wrong).generate(PROMPTS, max_new_tokens=3)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        search.generate(PROMPTS, max_new_tokens=3, eos_token_id=[])


def finished_texts(model, prompt, tokens, end):
    """Log-probability of every text that ends within so many tokens."""
    texts, open_ = {}, {(): 0.0}
    for _ in range(tokens):
        longer = {}
        for past, log_p in open_.items():
            ids = torch.cat([prompt, torch.tensor([past], dtype=torch.long)], dim=1)
            with torch.no_grad():
                law = model(ids).logits[0, -1].log_softmax(-1).tolist()
            texts[(*past, end)] = log_p + law[end]
            longer |= {(*past, token): log_p + p for token, p in enumerate(law) if token != end}
        open_ = longer
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_equals_brute_force(family):
    model = make_model(family, vocab=4)
    for prompt, end in (([[2, 1]], 3), ([[3, 3, 1]], 0)):
        prompt = torch.tensor(prompt)
        texts = finished_texts(model, prompt, 5, end)
        for length in (None, 0, 1, 2, 3, 4):
            wanted = max((text for text in texts if length in (None, len(text) - 1)), key=texts.__getitem__)
            for width in (1, 16):
                mode = exact_mode(model, prompt, max_new_tokens=5, length=length, eos_token_id=end, width=width)
                assert tuple(mode.tokens) == wanted and mode.proven
                assert mode.log_probability == pytest.approx(texts[wanted], abs=1e-4)
                # All beginnings are 3 + 9 + 27 + 81, or 1 + 3 + 9 + 27 groups of siblings: the bound must save some.
                assert mode.target_calls < (120 if width == 1 else 40)


def test_exact_mode_with_several_end_tokens():
    model, prompt = make_model(vocab=4), torch.tensor([[2, 1]])
    best = max(exact_mode(model, prompt, max_new_tokens=1, eos_token_id=end).log_probability for end in (1, 2))
    mode = exact_mode(model, prompt, max_new_tokens=1, eos_token_id=[1, 2])
    assert mode.log_probability == best and mode.tokens[0] in (1, 2)


def markov_chain(law):
    """A Llama whose next token has the law (tokens, tokens) of its last one."""
    tokens = len(law)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=tokens, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        head_dim=4, tie_word_embeddings=False, rms_norm_eps=0.0, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    model.model.embed_tokens.weight.data.copy_(torch.eye(tokens))
    # The last norm makes a unit vector sqrt(tokens) long.
    model.lm_head.weight.data.copy_(law.clamp(min=1e-30).log().T / tokens**0.5)
    return model


def test_mode_of_a_contaminated_distribution_is_empty_and_conditioned_on_length_is_not():
    """1 % empty texts among texts of five tokens, three choices each: the best of those has 0.99 * 0.4 ** 5 = 1 %."""
    end, start = 0, 1
    law = torch.zeros(17, 17, dtype=torch.float64)
    choice = torch.tensor([0.38, 0.33, 0.29], dtype=torch.float64)
    law[start, end], law[start, 2:5] = 0.01, 0.99 * choice
    for layer in range(4):
        law[2 + 3 * layer : 5 + 3 * layer, 5 + 3 * layer : 8 + 3 * layer] = choice
    law[14:17, end] = 1.0
    law[end, end] = 1.0
    model, prompt = markov_chain(law), torch.tensor([[start]])
    mode = exact_mode(model, prompt, max_new_tokens=8, eos_token_id=end)
    assert mode.tokens == [end] and mode.log_probability == pytest.approx(math.log(0.01), abs=1e-5)
    mode = exact_mode(model, prompt, max_new_tokens=8, length=5, eos_token_id=end)
    assert mode.tokens == [2, 5, 8, 11, 14, end]
    assert mode.log_probability == pytest.approx(math.log(0.99 * 0.38**5), abs=1e-5)
    # Beam search for a mode falls for it too; conditioned on a text that is not empty it does not.
    plain = ConditionalBeamSearch(model, indifferent, num_beams=8).generate(prompt, max_new_tokens=8, eos_token_id=end)
    assert plain.new_tokens[0][0] == [end]

    def not_empty(hidden, tokens):
        return torch.zeros(tokens.shape[:-1]).masked_fill(tokens[..., 0] == end, -torch.inf)

    found = ConditionalBeamSearch(model, not_empty, num_beams=8).generate(prompt, max_new_tokens=8, eos_token_id=end)
    assert found.new_tokens[0][0] == [2, 5, 8, 11, 14, end]


def test_exact_mode_that_gives_up_says_so():
    model, prompt = make_model(), torch.tensor([[2, 1]])
    found = exact_mode(model, prompt, max_new_tokens=20, length=9, eos_token_id=0, width=2, max_calls=15)
    assert not found.proven and found.target_calls == 15
    assert len(found.tokens) in (0, 10)
    # One pass for the first of two tokens: nothing has been finished, or what has is not known to be the best.
    once = exact_mode(model, prompt, max_new_tokens=20, length=2, eos_token_id=0, max_calls=1)
    assert (once.tokens, once.log_probability, once.proven, once.target_calls) == ([], -math.inf, False, 1)


def test_a_mode_has_the_probability_of_its_text_and_no_pass_is_needed_for_an_empty_one():
    model, prompt = make_model(), torch.tensor([[2, 1]])
    mode = exact_mode(model, prompt[0], max_new_tokens=3, length=2, eos_token_id=[5, 9])
    with torch.no_grad():
        law = model(torch.cat([prompt, torch.tensor([mode.tokens])], dim=1)).logits[0, 1:-1].log_softmax(-1)
    assert mode.proven and len(mode.tokens) == 3 and mode.tokens[-1] in (5, 9) and not {5, 9} & set(mode.tokens[:-1])
    assert mode.log_probability == pytest.approx(float(law[range(3), mode.tokens].sum()), abs=1e-5)
    empty = exact_mode(model, prompt, max_new_tokens=1, eos_token_id=5)
    assert (empty.tokens, empty.proven, empty.target_calls) == ([5], True, 0)


def test_scores_of_half_precision_are_kept_in_float32():
    model = make_model(dtype=torch.bfloat16)
    search = ConditionalBeamSearch(model, lambda hidden, tokens: hidden[..., 0].abs().neg(), num_beams=2)
    found = search.generate(PROMPTS[:1], max_new_tokens=3, eos_token_id=[])
    kinds = {found.scores.dtype, found.log_likelihoods.dtype, found.log_attributes.dtype}
    assert kinds == {torch.float32} and found.target_calls == 3


def test_exact_mode_refuses_bad_input():
    model, prompt = make_model(), torch.tensor([[2, 1]])
    for words, options in {
        "an end token": dict(eos_token_id=[]),
        "length must be from 0 to": dict(eos_token_id=0, length=5),
        "length": dict(eos_token_id=0, length=-1),
        "width and max_calls": dict(eos_token_id=0, width=0),
        "max_calls": dict(eos_token_id=0, max_calls=0),
    }.items():
        with pytest.raises(ValueError, match=words):
            exact_mode(model, prompt, max_new_tokens=5, **options)
    with pytest.raises(ValueError, match="2 prompts"):
        exact_mode(model, prompt.expand(2, -1), max_new_tokens=5, eos_token_id=0)
