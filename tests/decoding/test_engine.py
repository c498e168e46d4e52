"""The loop itself: lengths, ends, streaming, statistics, transformers' door, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, RepetitionPenaltyLogitsProcessor

from paperworks.decoding import (
    ConditionalBeamSearch,
    Drafter,
    DynamicInference,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    HiddenStateOptimization,
    Hydra,
    Statistics,
    SuperposedDecoding,
    TokenTree,
    as_custom_generate,
    exact_mode,
    generate,
    stream,
)
from paperworks.decoding.engine import end_tokens
from tests.decoding.conftest import DRAFTERS, TREE, make_model, output, scramble


class Oracle(Drafter):
    """Drafts what the target will say, by letting it say so."""

    def __init__(self, model, depth):
        super().__init__()
        self.depth = depth
        self.said = output(model, torch.tensor([[3, 1, 2, 0, 2]]), max_new_tokens=40)

    def start(self, target, batch, sampling):
        return {"read": -5}

    def propose(self, state, committed, root, generator=None):
        state["read"] += committed.lengths[0]
        ahead = self.said[state["read"] : state["read"] + 1 + self.depth]
        return TokenTree.chain(torch.tensor([ahead]))


def test_oracle_drafter_gives_depth_plus_one_tokens_a_call(model, prompt):
    result = generate(model, prompt, drafter=Oracle(model, 3), max_new_tokens=33, eos_token_id=[])
    assert result.statistics.emitted == [[4] * 8]
    assert result.statistics.accepted_per_call == 4


def test_random_drafter_gives_about_one_token_a_call(model, prompt):
    drafter = scramble(Hydra.from_target(model, heads=2, tree=[(0,), (0, 0)]))
    result = generate(model, prompt, drafter=drafter, max_new_tokens=40, eos_token_id=[])
    assert 1 <= result.statistics.accepted_per_call < 1.3


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_never_more_tokens_than_asked_for(model, prompt, new):
    assert len(output(model, prompt, drafter=Oracle(model, 5), max_new_tokens=new)) == new


def test_last_call_drafts_no_further_than_needed(model, prompt):
    result = generate(model, prompt, drafter=Oracle(model, 5), max_new_tokens=3, eos_token_id=[])
    assert result.statistics.drafted == 1


def test_row_ends_at_its_end_token_and_is_padded(model):
    prompts = torch.tensor([[3, 1, 2, 0, 2], [9, 9, 4, 4, 1]])
    free = generate(model, prompts, max_new_tokens=10, eos_token_id=[]).new_tokens
    end = next(token for token in free[0][1:] if token not in free[1])
    result = generate(model, prompts, max_new_tokens=10, eos_token_id=end, pad_token_id=39)
    cut = free[0].index(end) + 1
    assert result.new_tokens == [free[0][:cut], free[1]]
    assert result.sequences[0, 5 + cut :].tolist() == [39] * (10 - cut)


def test_stream_yields_the_text_of_generate(model, prompt):
    steps = list(stream(model, prompt, drafter=Oracle(model, 2), max_new_tokens=10, eos_token_id=[]))
    assert tuple(token for step in steps for token in step[0]) == output(model, prompt, max_new_tokens=10)
    assert len(steps) == 4


def test_streamer_is_fed_prompt_and_tokens(model, prompt):
    class Recorder:
        seen, ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    recorder = Recorder()
    result = generate(model, prompt, max_new_tokens=6, eos_token_id=[], streamer=recorder)
    assert recorder.seen == result.sequences[0].tolist() and recorder.ended


def test_custom_generate_equals_transformers_own(model):
    drafter = scramble(Hydra.from_target(model, heads=3, tree=TREE))
    ids = torch.tensor([[0, 0, 3, 1], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model.generation_config.pad_token_id = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    ours = model.generate(ids, custom_generate=as_custom_generate(drafter), **options)
    assert ours.tolist() == model.generate(ids, **options).tolist()


def test_custom_generate_samples_with_top_k_of_the_call(model, prompt):
    options = dict(max_new_tokens=30, do_sample=True, top_k=1, temperature=2.0)
    ours = model.generate(prompt, custom_generate=as_custom_generate(), **options)
    assert ours.tolist() == model.generate(prompt, max_new_tokens=30, do_sample=False).tolist()


def test_no_hook_is_left_on_the_model(model, prompt):
    for _ in range(3):
        generate(model, prompt, max_new_tokens=3)
    assert not model.base_model._forward_hooks


def test_low_precision_and_half_filled_cache_stay_finite(prompt):
    model = make_model(dtype=torch.bfloat16)
    assert len(output(model, prompt, max_new_tokens=30)) == 30


@pytest.mark.parametrize(
    "ids, options, words",
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "prompt 0 is empty"),
        (torch.tensor([[1]]), {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (torch.tensor([[1]]), {"max_new_tokens": -3}, "got -3"),
        (torch.ones(1, 65, dtype=torch.long), {}, "context holds 64"),
        (torch.ones(1, 60, dtype=torch.long), {"max_new_tokens": 5}, "60 tokens and 5 more"),
        (torch.tensor([[1, 40]]), {}, "outside 0..39"),
        (torch.tensor([[0.5]]), {}, "input_ids must be integers"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, "attention_mask must have the shape"),
        (torch.tensor([[1], [2]]), {"streamer": object()}, "a streamer prints one prompt, got 2"),
        (torch.tensor([[1]]), {"temperature": -0.5}, "temperature must be 0"),
    ],
)
def test_bad_input_is_one_clear_sentence(model, ids, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, ids, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_reported(model, prompt, temperature):
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN logits"):
        generate(model, prompt, max_new_tokens=4, temperature=temperature)


def test_model_without_attention_is_refused(prompt):
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40))
    with pytest.raises(ValueError, match="keeps no keys and values that another cache could hold"):
        generate(model, prompt, max_new_tokens=4)


def test_attention_that_takes_no_mask_is_refused(model, prompt):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        generate(model, prompt, max_new_tokens=4)


def test_what_is_no_language_model_is_refused(prompt):
    with pytest.raises(TypeError, match="expected a transformers causal language model"):
        generate(torch.nn.Linear(2, 2), prompt)


def test_statistics_say_whose_time_it_was_and_what_was_drafted(model, prompt, monkeypatch):
    now, drafter = [0.0], Oracle(model, 3)
    monkeypatch.setattr("paperworks.decoding.engine.perf_counter", lambda: now[0])
    propose = drafter.propose

    def slowly(*arguments):
        now[0] += 3
        return propose(*arguments)

    drafter.propose = slowly
    with model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 10)):
        made = generate(model, prompt, drafter=drafter, max_new_tokens=9, eos_token_id=[], profile=True).statistics
    # The prompt's pass and two more; three drafts before each.
    assert (made.target_calls, made.drafted, made.emitted) == (2, 6, [[4, 4]])
    assert (made.target_seconds, made.drafting_seconds) == (30.0, 6.0)


def test_tokens_a_call_are_the_mean_over_all_rows(model):
    assert Statistics(emitted=[[4, 2], [1]]).accepted_per_call == pytest.approx(7 / 3)
    assert math.isnan(Statistics(emitted=[[], []]).accepted_per_call)
    prompts = torch.tensor([[3, 1, 2, 0, 2], [9, 9, 4, 4, 1]])
    made = generate(model, prompts, max_new_tokens=6, eos_token_id=[]).statistics
    assert (made.target_calls, made.drafted, made.emitted, made.accepted_per_call) == (5, 0, [[1] * 5] * 2, 1.0)


def test_end_tokens_come_as_a_number_a_list_a_tensor_or_from_the_model(model):
    model.generation_config.eos_token_id = [7, 9]
    for given, wanted in ((None, {7, 9}), (3, {3}), ([], set()), ([3, 4], {3, 4}), (torch.tensor([5, 6]), {5, 6})):
        assert end_tokens(model, given) == wanted
    model.generation_config.eos_token_id = None
    assert end_tokens(model, None) == set() == end_tokens(torch.nn.Linear(1, 1), None)
    assert end_tokens(model, torch.tensor(5)) == {5}


INT32 = {
    "plain": lambda model, ids: generate(model, ids, max_new_tokens=8, eos_token_id=[]).new_tokens,
    "processed": lambda model, ids: generate(
        model, ids, max_new_tokens=8, eos_token_id=[], logits_processor=RepetitionPenaltyLogitsProcessor(1.3)
    ).new_tokens,
    "hidden states": lambda model, ids: HiddenStateOptimization(model, window=3)
    .generate(ids, max_new_tokens=8, eos_token_id=[]).new_tokens,
    "read": lambda model, ids: HiddenStateOptimization(model, window=3).log_likelihood(ids).tolist(),
    "classified": lambda model, ids: HiddenStateOptimization(model)
    .classify(ids, ids == 1, [torch.tensor([4], dtype=ids.dtype), torch.tensor([5, 6], dtype=ids.dtype)]).tolist(),
    "beam": lambda model, ids: ConditionalBeamSearch(model, lambda hidden, tokens: -(tokens == 7).double().sum(-1))
    .generate(ids, max_new_tokens=4, eos_token_id=[]).new_tokens,
    "mode": lambda model, ids: exact_mode(model, ids, max_new_tokens=3, eos_token_id=0).tokens,
    "superposed": lambda model, ids: SuperposedDecoding(model)
    .generate(ids, max_new_tokens=4, eos_token_id=[]).new_tokens,
    "two models": lambda model, ids: EntropyAdaptiveDecoding(model, model, EntropySwitch(2.0, min_stay=1))
    .generate(ids, max_new_tokens=8, eos_token_id=[]).new_tokens,
    "layers": lambda model, ids: DynamicInference(model).generate(ids, eos_token_id=[]).new_tokens,
    **{
        name: lambda model, ids, name=name: generate(
            model, ids, drafter=scramble(DRAFTERS[name](model)), max_new_tokens=8, eos_token_id=[]
        ).new_tokens
        for name in ("hydra++", "chimera", "fspad", "rsd-s")
    },
}  # fmt: skip


@pytest.mark.parametrize("call", INT32.values(), ids=INT32)
def test_prompts_of_int32_are_read_as_those_of_int64(call, model, prompt):
    assert call(model, prompt.int()) == call(model, prompt)
