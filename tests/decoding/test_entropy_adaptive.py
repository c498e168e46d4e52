"""EntropyAdaptiveDecoding: what arXiv 2502.06833 says must be true of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteriaList, StopStringCriteria

from paperworks.decoding import Target, TreeCache, acceptance, entropy_adaptive, generate
from paperworks.decoding.entropy_adaptive import EntropyAdaptiveDecoding, EntropySwitch, entropy, relative_cost
from tests.decoding.conftest import FAMILIES, distance, enumerate_law, make_model, output

NONE = dict(eos_token_id=[])


def pair(family="llama", vocab=40, dtype=torch.float64):
    """A small model of one layer and a large one of two, with laws of their own."""
    config = FAMILIES[family](vocab)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    torch.manual_seed(3)
    small = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return small.to(dtype).eval(), make_model(family, vocab, dtype)


def sampled(small, large, prompt, switch, tokens=40, **options):
    generator = torch.Generator().manual_seed(0)
    return EntropyAdaptiveDecoding(small, large, switch, **options).generate(
        prompt, max_new_tokens=tokens, temperature=1.0, generator=generator, **NONE
    )


def lively(small, large, prompt, window=2, min_stay=3, entropy_of="active", **options):
    """The rule with the threshold, of some within what the two models' own texts show, that switches most often."""
    rules = [EntropySwitch(9, start="small"), EntropySwitch(-1, start="large")]
    own = torch.tensor([sampled(small, large, prompt, rule).entropies for rule in rules])
    rules = [
        EntropySwitch(tau, window, min_stay, **options) for tau in own.quantile(torch.linspace(0.2, 0.8, 4)).tolist()
    ]
    return max(rules, key=lambda rule: sampled(small, large, prompt, rule, entropy_of=entropy_of).switches)


def fresh_law(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)


def bits(law):
    """Entropy by the definition, one probability at a time."""
    return -sum(p * math.log2(p) for p in law.tolist() if p > 0)


def brute_force(entropies, threshold, window, min_stay, start="small"):
    """Steps 2 and 3 of the paper, read off the whole list at every token: who makes each token, and the one after."""
    models = [start]
    for t in range(len(entropies)):
        last = entropies[max(0, t - window + 1) : t + 1]
        run = 0
        while run <= t and models[t - run] == models[t]:
            run += 1
        if run < min_stay:
            models.append(models[t])
        else:
            models.append("large" if sum(last) / len(last) > threshold else "small")
    return models


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_without_a_switch_the_output_is_the_models_own(prompt, temperature):
    small, large = pair()
    for model, threshold, start in ((small, math.inf, "small"), (large, -1.0, "large")):
        options = dict(max_new_tokens=20, temperature=temperature, top_p=0.9, **NONE)
        switch = EntropySwitch(threshold, start=start, min_stay=1)
        ours = EntropyAdaptiveDecoding(small, large, switch).generate(
            prompt, generator=torch.Generator().manual_seed(5), **options
        )
        alone = generate(model, prompt, generator=torch.Generator().manual_seed(5), **options)
        assert ours.sequences.tolist() == alone.sequences.tolist()
        assert ours.switches == 0 and set(ours.models) == {start}
        idle = ours.large if start == "small" else ours.small
        assert idle.passes == idle.tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_two_copies_of_one_model_give_its_own_output_whatever_the_rule(family, monkeypatch):
    model = make_model(family, dtype=torch.float32)
    prompt = torch.tensor([[3, 1, 2, 0, 2, 9, 8, 4]])  # longer than the sliding window
    expected = generate(model, prompt, max_new_tokens=24, **NONE).sequences
    with torch.no_grad():
        fresh = model(expected).logits[0]
    seen = []
    read = entropy_adaptive._Reader.next_logits

    def spy(reader, text):
        seen.append((len(text), read(reader, text)))
        return seen[-1][1]

    monkeypatch.setattr(entropy_adaptive._Reader, "next_logits", spy)
    switches = 0
    for threshold in entropy(fresh[7:-1]).quantile(torch.tensor([0.3, 0.5, 0.7])).tolist():
        for window, min_stay in ((1, 1), (5, 3), (3, 10)):
            decoding = EntropyAdaptiveDecoding(model, copy.deepcopy(model), EntropySwitch(threshold, window, min_stay))
            seen.clear()
            result = decoding.generate(prompt, max_new_tokens=24, **NONE)
            assert result.sequences.tolist() == expected.tolist()
            for length, logits in seen:
                torch.testing.assert_close(logits[0], fresh[length - 1], atol=1e-4, rtol=1e-4)
            switches += result.switches
    assert switches > 10


def test_entropy_is_in_bits_bounded_shift_free_and_blind_to_temperature(prompt):
    for vocab in (2, 40, 49152):
        assert float(entropy(torch.zeros(vocab))) == pytest.approx(math.log2(vocab), rel=1e-5)
    one_hot = torch.full((40,), -torch.inf).index_fill(0, torch.tensor(3), 0.0)
    assert float(entropy(one_hot)) == 0.0
    logits = torch.randn(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(entropy(logits + 17), entropy(logits), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy(logits)[2], torch.tensor(bits(logits[2].softmax(-1)), dtype=torch.float64))
    small, large = pair()
    decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(math.inf))
    first = [
        decoding.generate(prompt, max_new_tokens=1, **options, **NONE).entropies[0]
        for options in ({}, {"temperature": 0.2}, {"temperature": 3.0, "top_k": 2})
    ]
    assert first[0] == first[1] == first[2] == pytest.approx(bits(fresh_law(small, prompt[0].tolist())))


def test_state_machine_equals_a_brute_force_reading_of_the_rule():
    generator = torch.Generator().manual_seed(1)
    for window in (1, 2, 5):
        for min_stay in (1, 2, 4, 10):
            for start in ("small", "large"):
                # Multiples of 1/2, so that means hit the threshold exactly.
                entropies = (torch.randint(0, 9, (60,), generator=generator) / 2).tolist()
                switch = EntropySwitch(2.0, window, min_stay, start)
                models = [start, *(switch.step(value) for value in entropies)]
                assert models == brute_force(entropies, 2.0, window, min_stay, start)
                turns = [index for index in range(1, 61) if models[index] != models[index - 1]]
                assert all(later - earlier >= min_stay for earlier, later in pairwise(turns))
                assert len(turns) > 1
    assert EntropySwitch(2.0, 1, 1, "large").step(2.0) == "small"


def test_share_falls_with_the_threshold_on_a_fixed_list():
    entropies = (torch.rand(200, generator=torch.Generator().manual_seed(2)) * 5).tolist()
    shares = []
    for threshold in torch.linspace(-0.5, 5.5, 61).tolist():
        switch = EntropySwitch(threshold, window=5, min_stay=1)
        shares.append([switch.step(value) for value in entropies].count("large"))
    assert shares == sorted(shares, reverse=True) and shares[0] == 200 and shares[-1] == 0
    assert len(set(shares)) > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entropy_of", ["active", "small"])
def test_caches_equal_fresh_ones_and_every_token_is_read_once(family, entropy_of, monkeypatch):
    small, large = pair(family)
    prompt = torch.tensor([[3, 1, 2, 0, 2, 9, 8, 4]])
    switch = lively(small, large, prompt, entropy_of=entropy_of)
    readers, read = [], {"small": [], "large": []}
    start = entropy_adaptive._Reader.__init__

    def spy(reader, *arguments):
        start(reader, *arguments)
        readers.append(reader)

    monkeypatch.setattr(entropy_adaptive._Reader, "__init__", spy)
    hooks = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: read[name].append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        for name, model in (("small", small), ("large", large))
    ]
    result = sampled(small, large, prompt, switch, entropy_of=entropy_of)
    for hook in hooks:
        hook.remove()
    assert result.switches >= 3
    for reader, name, usage in zip(readers, ("small", "large"), (result.small, result.large), strict=True):
        turns = [index for index, model in enumerate(result.models) if model == name]
        if name == "small" and entropy_of == "small":
            turns = list(range(40))
        # A token is read when the model makes the next one: the text before its last turn, in as many passes as turns.
        expected = [8 + turns[0], *(later - earlier for earlier, later in pairwise(turns))]
        assert read[name] == expected
        assert (usage.passes, usage.tokens) == (len(turns), 8 + turns[-1]) and reader.cache.lengths == [usage.tokens]
        fresh = TreeCache(reader.target.config, 1)
        with torch.inference_mode():
            reader.target.prefill([result.sequences[0, : usage.tokens]], fresh)
        for one, other in zip(reader.cache.layers, fresh.layers, strict=True):
            for states in ("keys", "values"):
                mine, theirs = (getattr(layer, states)[:, :, : usage.tokens] for layer in (one, other))
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fraction", "small", "large", "saving"), [(0.43, 3, 11, 41.5), (0.25, 1.5, 14, 67.0)], ids=["llama", "qwen"]
)
def test_cost_formula_gives_the_abstracts_savings(fraction, small, large, saving):
    assert 100 * (1 - relative_cost(fraction, small, large)) == pytest.approx(saving, abs=0.1)
    assert relative_cost(1, small, large) == 1 and relative_cost(0, small, large) == small / large


def tokenizer(words):
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


def test_vocabulary_mismatch_raises_an_error():
    small, large = pair()
    words = [f"w{index}" for index in range(40)]
    swapped = [*words[:-2], words[-1], words[-2]]
    same, other = tokenizer(words), tokenizer(swapped)
    assert EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0), tokenizers=(same, same)).vocabulary == 40
    with pytest.raises(ValueError, match="tokenizers differ, such as in 'w38'"):
        EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0), tokenizers=(same, other))
    with pytest.raises(ValueError, match="scores 40 tokens and the large one's 44"):
        EntropyAdaptiveDecoding(small, make_model(vocab=44), EntropySwitch(1.0))
    with pytest.raises(ValueError, match="give the models' own"):
        EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0), tokenizers=(tokenizer([*words, "w40"]),) * 2)


def test_padding_rows_of_a_head_are_left_out(prompt):
    small, large = pair()[0], make_model(vocab=44)
    large.lm_head.weight.data[40:] *= 30
    words = tokenizer([f"w{index}" for index in range(40)])
    decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(-1.0, start="large"), tokenizers=(words, words))
    result = decoding.generate(prompt, max_new_tokens=12, **NONE)
    assert max(result.new_tokens[0]) < 40
    law = fresh_law(large, prompt[0].tolist())[:40]
    assert result.entropies[0] == pytest.approx(bits(law / law.sum()))


def test_law_of_the_output_equals_the_paper_by_enumeration(monkeypatch):
    """Every continuation's chance, by fresh passes of the model whose turn it is, at a temperature of 0.7."""
    small, large = pair(vocab=3)
    prompt, window, tau = [0, 2], 2, 1.48
    expected, turns = {}, set()

    def walk(past, chance, entropies):
        models = brute_force(entropies, tau, window, 1)
        if len(past) == 4:
            expected[tuple(past)] = chance
            turns.add(tuple(models[:4]))
            return
        law = fresh_law(small if models[-1] == "small" else large, prompt + past)
        drawn = law ** (1 / 0.7) / (law ** (1 / 0.7)).sum()
        for token, p in enumerate(drawn.tolist()):
            walk([*past, token], chance * p, [*entropies, bits(law)])

    walk([], 1.0, [])
    assert len(turns) >= 3
    decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(tau, window, min_stay=1))
    monkeypatch.setattr(entropy_adaptive, "draw", lambda law, generator=None: acceptance.draw(law, generator))

    def run():
        result = decoding.generate(torch.tensor([prompt]), max_new_tokens=4, temperature=0.7, **NONE)
        return tuple(result.new_tokens[0])

    assert distance(enumerate_law(run, monkeypatch), expected) < 1e-12


def test_preempt_gives_the_uncertain_token_itself_to_the_large_model(prompt):
    switch = EntropySwitch(2.0, window=1, min_stay=2, preempt=True)
    writers = []
    for value in (3.0, 1.0, 3.0, 1.0, 1.0, 3.0, 3.0, 3.0):
        switch.step(value)
        writers.append(switch.writer)
    # The first 3.0 comes too soon. The large model's law that calms down is its own token; the next is the small's.
    assert writers == ["small", "small", "large", "large", "small", "small", "large", "large"]
    small, large = pair()
    switch = lively(small, large, prompt, preempt=True)
    result = sampled(small, large, prompt, switch)
    first = result.models.index("large")
    assert result.rolling[first] > switch.threshold and result.switches >= 3
    text = result.sequences[0].tolist()
    assert result.entropies[first] == pytest.approx(bits(fresh_law(small, text[: 5 + first])))
    begun = sum(now == "large" != before for before, now in zip(["small", *result.models], result.models, strict=False))
    assert result.small.passes == result.models.count("small") + begun


def test_window_can_wait_until_full_or_be_cleared_at_a_switch():
    entropies = [6.0, 1.0, 1.0, 1.0]
    plain, full, cleared = (
        EntropySwitch(2.0, window=3, min_stay=1, **options)
        for options in ({}, {"full_window": True}, {"clear_window": True})
    )
    assert [plain.step(value) for value in entropies] == ["large", "large", "large", "small"]
    assert [full.step(value) for value in entropies] == ["small", "small", "large", "small"]
    assert [cleared.step(value) for value in entropies] == ["large", "small", "small", "small"]


def test_entropy_of_the_small_model_decides_where_asked(prompt):
    small, large = pair()
    switch = lively(small, large, prompt, min_stay=1, entropy_of="small")
    result = sampled(small, large, prompt, switch, tokens=20, entropy_of="small")
    text = result.sequences[0].tolist()
    expected = [bits(fresh_law(small, text[: 5 + index])) for index in range(20)]
    assert result.entropies == pytest.approx(expected)
    assert result.models == brute_force(expected, switch.threshold, 2, 1)[:20] and result.switches > 1


def test_real_cost_counts_prompt_and_catching_up(prompt):
    small, large = pair()
    result = sampled(small, large, prompt, lively(small, large, prompt), tokens=20)
    assert result.switches > 1
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
    assert (result.small.parameters, result.large.parameters) == tuple(sizes)
    read = result.small.tokens * sizes[0] + result.large.tokens * sizes[1]
    assert not result.sequences.is_inference()
    assert result.real_cost == pytest.approx(read / (24 * sizes[1]))
    assert result.cost == pytest.approx(relative_cost(result.models.count("large") / 20, *sizes))
    alone = EntropyAdaptiveDecoding(small, large, EntropySwitch(-1, start="large")).generate(
        prompt, max_new_tokens=20, **NONE
    )
    assert alone.cost == alone.real_cost == 1


def test_replay_of_both_models_entropies_is_what_happened(prompt):
    small, large = pair()
    for options in ({}, {"preempt": True}, {"clear_window": True}):
        switch = lively(small, large, prompt, **options)
        result = sampled(small, large, prompt, switch)
        decoding = EntropyAdaptiveDecoding(small, large, switch)
        assert result.switches > 1 and decoding._replay(decoding._entropies(result), switch.threshold) == result.models


def test_calibrate_finds_the_share():
    model = make_model()
    prompts = [torch.tensor([[first, 2, 3]]) for first in range(4)]
    # Two copies of one model: the text is the same for every threshold, and so is the list of entropies.
    decoding = EntropyAdaptiveDecoding(model, copy.deepcopy(model), EntropySwitch(0.0, window=3, min_stay=2))
    texts = [generate(model, prompt, max_new_tokens=20, **NONE).sequences[0].tolist() for prompt in prompts]
    lists = [[bits(fresh_law(model, text[: 3 + index])) for index in range(20)] for text in texts]

    def share(threshold):
        return sum(brute_force(values, threshold, 3, 2)[:20].count("large") for values in lists) / 80

    best = {target: min(abs(share(step / 50) - target) for step in range(-1, 270)) for target in (0.0, 0.25, 0.5, 0.75)}
    for target, least in best.items():
        threshold = decoding.calibrate(prompts, target, rounds=1, max_new_tokens=20, **NONE)
        assert abs(share(threshold) - target) <= least + 0.01
    # Two models that differ: another threshold, another text.
    decoding = EntropyAdaptiveDecoding(*pair(), EntropySwitch(0.0, window=3, min_stay=2))
    threshold = decoding.calibrate(prompts, 0.5, rounds=4, max_new_tokens=20, **NONE)
    decoding.switch = replace(decoding.switch, threshold=threshold)
    made = [decoding.generate(prompt, max_new_tokens=20, **NONE).large_fraction for prompt in prompts]
    assert sum(made) / 4 == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("options", [{"entropy_of": "small"}, {"start": "large"}])
def test_calibrate_reads_the_texts_by_the_rule_that_will_write_them(options, monkeypatch):
    """Of two models that differ: the first texts are by the one that starts, and the share is that of a replay."""
    small, large = pair()
    prompts = [torch.tensor([[first, 2, 3]]) for first in range(4)]
    whose = options.pop("entropy_of", "active")
    switch = EntropySwitch(0.0, window=2, min_stay=3, **options)
    decoding, read = EntropyAdaptiveDecoding(small, large, switch, entropy_of=whose), []
    entropies = EntropyAdaptiveDecoding._entropies
    monkeypatch.setattr(
        EntropyAdaptiveDecoding,
        "_entropies",
        lambda self, text: read.append((text, entropies(self, text))) or read[-1][1],
    )
    threshold = decoding.calibrate(prompts, 0.4, rounds=1, max_new_tokens=20, **NONE)
    assert len(read) == 4 and decoding.switch.threshold == 0.0
    for prompt, (text, found) in zip(prompts, read, strict=True):
        model = large if switch.start == "large" else small
        assert text.new_tokens[0] == list(output(model, prompt, max_new_tokens=20))
        assert found.shape == (20, 2) and found.dtype == torch.float64
        ids = text.sequences[0].tolist()
        for place in (0, 7, 19):
            laws = [fresh_law(one, ids[: 3 + place]) for one in (small, large)]
            assert found[place].tolist() == pytest.approx([bits(law) for law in laws])

    def share(tau):
        writers = []
        for _, found in read:
            rule = replace(switch, threshold=tau)
            for of_small, of_large in found.tolist():
                writers.append(rule.active)
                rule.step(of_small if whose == "small" or rule.active == "small" else of_large)
        return writers.count("large") / len(writers)

    best = min(abs(share(step / 50) - 0.4) for step in range(-1, 270))
    assert abs(share(threshold) - 0.4) <= best + 0.01


def test_what_is_told_of_a_text_is_what_each_token_was_judged_by(prompt):
    small, large = pair()
    switch = lively(small, large, prompt, window=3)
    result = sampled(small, large, prompt, switch)
    assert result.rolling == pytest.approx(
        [sum(part) / len(part) for part in (result.entropies[max(0, t - 2) : t + 1] for t in range(40))]
    )
    assert result.switches == sum(a != b for a, b in pairwise(result.models)) > 1
    assert result.large_fraction == result.models.count("large") / 40
    assert result.sequences.shape == (1, 45) and result.sequences[0, 5:].tolist() == result.new_tokens[0]


def test_an_end_token_of_either_model_ends_the_text(prompt):
    small, large = pair()
    whole = output(large, prompt, max_new_tokens=10)
    last = next(index for index, token in enumerate(whole) if index and token not in whole[:index])
    small.generation_config.eos_token_id = whole[last]
    decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(-1.0, start="large"))
    assert decoding.generate(prompt, max_new_tokens=10).new_tokens == [list(whole[: last + 1])]


def test_stop_strings_are_looked_for_in_the_joint_text(prompt):
    small, large = pair()
    switch = lively(small, large, prompt)
    whole = sampled(small, large, prompt, switch)
    turn = next(index for index in range(1, 40) if whole.models[index] != whole.models[index - 1])
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    words = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    words.decoder = decoders.Fuse()
    text = "".join(letters[token] for token in whole.new_tokens[0])
    stop = text[turn - 1 : turn + 1]  # one letter by each model
    expected = text.index(stop) + 2
    result = EntropyAdaptiveDecoding(small, large, switch).generate(
        prompt, max_new_tokens=40, temperature=1.0, generator=torch.Generator().manual_seed(0),
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(PreTrainedTokenizerFast(tokenizer_object=words), [stop])]), **NONE,
    )  # fmt: skip
    assert result.new_tokens[0] == whole.new_tokens[0][:expected] and expected < 40


def test_one_switch_serves_many_texts(prompt):
    switch = lively(*pair(), prompt)
    one, other = (sampled(*pair(), prompt, switch) for _ in range(2))
    assert one.switches > 1 and one.models == other.models and switch == EntropySwitch(switch.threshold, 2, 3)


def test_bad_input_is_told(prompt):
    small, large = pair()
    for options, words in (
        ({"threshold": math.nan}, "nan"),
        ({"threshold": 1.0, "window": 0}, "window"),
        ({"threshold": 1.0, "min_stay": -1}, "min_stay"),
        ({"threshold": 1.0, "start": "medium"}, "medium"),
    ):
        with pytest.raises(ValueError, match=words):
            EntropySwitch(**options)
    with pytest.raises(ValueError, match="entropy_of"):
        EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0), entropy_of="large")
    with pytest.raises(TypeError, match="causal language model"):
        EntropyAdaptiveDecoding(torch.nn.Linear(2, 2), large, EntropySwitch(1.0))
    decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0))
    with pytest.raises(ValueError, match="2 prompts"):
        decoding.generate(prompt.expand(2, -1))
    with pytest.raises(ValueError, match="context"):
        decoding.generate(prompt, max_new_tokens=60)
    with pytest.raises(ValueError, match="within \\[0, 1\\]"):
        decoding.calibrate([prompt], 1.5)
    for prompts, share, rounds in (([], 0.5, 1), ([prompt], 0.5, 0), ([prompt], -0.1, 1)):
        with pytest.raises(ValueError, match="within \\[0, 1\\]"):
            decoding.calibrate(prompts, share, rounds=rounds)
    for wrong in ((1.1, 1, 2), (-0.1, 1, 2), (0.5, 1, 0)):
        with pytest.raises(ValueError, match="positive"):
            relative_cost(*wrong)
    with pytest.raises(ValueError, match="positive"):
        relative_cost(0.5, 0, 1)
    decoding.switch = object()
    with pytest.raises(TypeError, match="EntropySwitch"):
        decoding.calibrate([prompt], 0.5)
    small.lm_head.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        EntropyAdaptiveDecoding(small, large, EntropySwitch(1.0)).generate(prompt, max_new_tokens=5)


def test_targets_leave_no_hooks_behind(prompt):
    small, large = pair()
    EntropyAdaptiveDecoding(small, large, EntropySwitch(1.9, 2, 3)).generate(prompt, max_new_tokens=5, **NONE)
    assert not small.model._forward_hooks and not large.model._forward_hooks
    assert Target(small).vocab_size == 40
