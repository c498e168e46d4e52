"""What transformers' `generate` can be told: every field of its config is kept to, or refused in a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)

from paperworks.decoding import (
    ConditionalBeamSearch,
    Drafter,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    Hydra,
    RecursiveSpeculation,
    RelaxedAcceptance,
    TokenTree,
    as_custom_generate,
    collect,
    fit_tree,
    generate,
    nearest_codes,
    stream,
)
from paperworks.decoding.engine import Statistics
from tests.decoding.conftest import DRAFTERS, distance, enumerate_law, make_model, scramble

PROMPTS = torch.tensor([[0, 0, 3, 1, 3], [0, 0, 0, 0, 17], [9, 8, 7, 9, 8]])
MASK = (PROMPTS > 0).long()
LENGTH = 12


class Knowing(Drafter):
    """Drafts the given texts three tokens ahead, each with a wrong sibling that has a child of its own."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = [text + [1] * 4 for text in texts]

    def start(self, target, batch, sampling):
        return {"read": [0] * batch, "first": True}

    def propose(self, state, committed, root, generator=None):
        if not state["first"]:
            state["read"] = [read + n for read, n in zip(state["read"], committed.lengths, strict=True)]
        state["first"] = False
        rows = []
        for row, (text, read) in enumerate(zip(self.texts, state["read"], strict=True)):
            ahead = (text + [1] * 4)[read + 1 : read + 4]
            ahead += [1] * (3 - len(ahead))
            rows.append([int(root[row]), *(token for right in ahead for token in (right, (right + 1) % 40, 5))])
        parents = [-1, 0, 0, 2, 1, 1, 5, 4, 4, 8]
        return TokenTree(torch.tensor(rows), torch.tensor(parents).expand(len(rows), -1))


@pytest.fixture(scope="module")
def talker():
    """A model whose first prompt ends after some tokens, the others later or not at all."""
    model = make_model()
    text = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    rows = text[:, PROMPTS.shape[1] :].tolist()
    end = next(token for token in rows[0][5:] if token not in rows[0][:5] + rows[1][:7] + rows[2][:7])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    return model


def counted(model, call):
    """What a call returns, and how often it called the model."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with handle:
        return call(), len(calls)


def both(model, drafters=("knowing",), prompts=PROMPTS, mask=MASK, **options):
    """Texts (or outputs) by transformers and by the tree, which must be drafted with success where it knows the text."""
    options = {"max_new_tokens": LENGTH, "attention_mask": mask, **options}
    theirs, plain = counted(model, lambda: model.generate(prompts, **options))
    texts = getattr(theirs, "sequences", theirs)[:, prompts.shape[1] :].tolist()
    results = []
    for name in drafters:
        drafter = Knowing(texts) if name == "knowing" else scramble(DRAFTERS[name](model))
        custom = as_custom_generate(drafter)
        ours, calls = counted(model, lambda custom=custom: model.generate(prompts, custom_generate=custom, **options))
        assert name != "knowing" or calls < plain or plain < 3
        results.append(ours)
    return theirs, *results


# Of each field: a value that changes the text, or why it cannot.
SAME = {
    "max_length": dict(max_length=9, max_new_tokens=None),
    "max_new_tokens": dict(max_new_tokens=7),
    "min_length": dict(min_length=16, min_new_tokens=None),
    "min_new_tokens": dict(min_new_tokens=11),
    "max_time": dict(max_time=0.0),
    "repetition_penalty": dict(repetition_penalty=3.0),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=8.0),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "encoder_no_repeat_ngram_size": dict(encoder_no_repeat_ngram_size=1),
    "forced_bos_token_id": None,
    "forced_eos_token_id": dict(forced_eos_token_id=3),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(2, 3.0)),
    "eos_token_id": dict(eos_token_id=[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
    "pad_token_id": dict(pad_token_id=33),
}
WORKS = {"bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "remove_invalid_values",
         "renormalize_logits", "watermarking_config", "forced_bos_token_id"}  # fmt: skip
SAMPLING = {"do_sample": {}, "temperature": dict(temperature=0.5), "top_k": dict(top_k=3), "top_p": dict(top_p=0.6),
            "min_p": dict(min_p=0.3), "top_h": dict(top_h=0.4), "typical_p": dict(typical_p=0.5),
            "epsilon_cutoff": dict(epsilon_cutoff=0.2), "eta_cutoff": dict(eta_cutoff=0.3)}  # fmt: skip
RETURNED = {"return_dict_in_generate", "output_scores", "output_logits", "num_return_sequences"}
REFUSED = {
    "num_beams": 2, "num_beam_groups": 2, "constraints": [[3]], "force_words_ids": [[3]], "penalty_alpha": 0.6,
    "dola_layers": "low", "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "use_mtp": True,
    "speculation_type": "dflash", "is_assistant": True, "guidance_scale": 1.5, "use_cache": False,
    "cache_implementation": "static", "prefill_chunk_size": 2, "output_attentions": True, "output_hidden_states": True,
    "stop_strings": "a", "token_healing": True,
}  # fmt: skip
# Without beams, an assistant, a static cache or an encoder transformers itself does not look at these.
WITHOUT_MEANING = {
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size", "bos_token_id",
    "decoder_start_token_id", "cache_config", "max_cache_len", "compile_config", "disable_compile", "early_stopping",
    "length_penalty", "diversity_penalty", "low_memory", "continuous_batching_config", "transformers_version",
    "_from_model_config",
}  # fmt: skip


def test_every_field_of_the_installed_version_is_thought_of():
    known = {*SAME, *WORKS, *SAMPLING, *RETURNED, *REFUSED, *WITHOUT_MEANING}
    assert set(GenerationConfig().to_dict()) - known == set()


@pytest.mark.parametrize("name", [name for name, options in SAME.items() if options])
def test_greedy_text_is_transformers_own(talker, name):
    options = {"do_sample": False, **SAME[name]}
    options = {key: value for key, value in options.items() if value is not None or key == "max_new_tokens"}
    if name == "max_length":
        options.pop("max_new_tokens")
        theirs = talker.generate(PROMPTS, attention_mask=MASK, **options)
        drafter = Knowing(theirs[:, 5:].tolist())
        ours = talker.generate(PROMPTS, attention_mask=MASK, custom_generate=as_custom_generate(drafter), **options)
        assert ours.tolist() == theirs.tolist() and theirs.shape[1] == 9
        return
    theirs, ours, wrong = both(talker, ("knowing", "hydra"), **options)
    assert ours.tolist() == theirs.tolist() == wrong.tolist()
    free = talker.generate(PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, do_sample=False)
    assert theirs.tolist() != free.tolist(), "the option changes nothing here"
    for row, mask in zip(PROMPTS, MASK, strict=True):
        alone = row[mask.bool()][None]
        alone_options = {**options, "min_length": alone.shape[1] + 11} if name == "min_length" else options
        theirs, ours = both(talker, prompts=alone, mask=torch.ones_like(alone), **alone_options)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", sorted(WORKS))
def test_greedy_text_is_transformers_own_where_tokens_of_the_text_are_named(talker, name):
    free = talker.generate(PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, do_sample=False)[:, 5:]
    first, second, third = free[1, :3].tolist()
    model = talker
    options = {
        "bad_words_ids": dict(bad_words_ids=[[second], [first, third]]),
        "suppress_tokens": dict(suppress_tokens=[second, third]),
        "begin_suppress_tokens": dict(begin_suppress_tokens=[first]),
        "sequence_bias": dict(sequence_bias=[[[first, second], -50.0], [[third], 5.0]]),
        "remove_invalid_values": dict(remove_invalid_values=True),
        "renormalize_logits": dict(renormalize_logits=True, return_dict_in_generate=True, output_scores=True),
        "watermarking_config": dict(watermarking_config=WatermarkingConfig(bias=8.0, context_width=1)),
        "forced_bos_token_id": dict(forced_bos_token_id=11),
    }[name]
    prompts, mask = (torch.tensor([[3], [9]]), torch.ones(2, 1)) if name == "forced_bos_token_id" else (PROMPTS, MASK)
    if name == "remove_invalid_values":
        model = copy.deepcopy(talker)
        model.lm_head.weight.data[11] = torch.nan
        with pytest.raises(ValueError, match="NaN logits"):
            both(model, do_sample=False)
    theirs, ours = both(model, prompts=prompts, mask=mask, do_sample=False, **options)
    if name == "renormalize_logits":
        torch.testing.assert_close(ours.scores[3][1].float(), theirs.scores[3][1])
        assert float(ours.scores[3][1].exp().sum()) == pytest.approx(1)
        return
    assert ours.tolist() == theirs.tolist()
    plain = model.generate(prompts, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
    assert name == "remove_invalid_values" or theirs.tolist() != plain.tolist(), "the option changes nothing here"


def law_of_generate(model, prompt, tokens, **options):
    """The law of the next tokens by transformers' own processors, behind every text one by one."""
    law = {(): 1.0}
    for step in range(tokens):
        longer = {}
        for past, chance in law.items():
            ids = torch.cat([prompt, torch.tensor([past], dtype=torch.long)], dim=1)
            scores = model.generate(
                ids, max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True, **options
            ).scores[0][0]
            longer |= {(*past, token): chance * p for token, p in enumerate(scores.double().softmax(-1).tolist()) if p}
        law = longer
        assert len(law) > 1 and step < tokens
    return law


LAWS = {
    "repetition_penalty": dict(repetition_penalty=2.5, top_k=0),
    "min_p": dict(min_p=0.35, temperature=1.5),
    "typical_p": dict(typical_p=0.6, repetition_penalty=1.3),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=3, top_p=0.95),
    "all of them": dict(
        no_repeat_ngram_size=3, repetition_penalty=1.7, temperature=2.0, min_p=0.1, epsilon_cutoff=0.05
    ),
}


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "rsd-s"])
@pytest.mark.parametrize("options", LAWS)
def test_law_with_options_is_transformers_own_by_enumeration(options, name, monkeypatch):
    model, prompt = make_model(vocab=3), torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS[name](model))
    if name == "hydra":
        drafter.tree = type(drafter.tree)([(0,), (1,), (0, 0), (1, 1)])
    custom = as_custom_generate(drafter)
    law = enumerate_law(
        lambda: tuple(
            model.generate(prompt, custom_generate=custom, max_new_tokens=3, do_sample=True, **LAWS[options])[
                0, 2:
            ].tolist()
        ),
        monkeypatch,
    )
    assert distance(law, law_of_generate(model, prompt, 3, **LAWS[options])) < 1e-6


@pytest.mark.parametrize(
    "warpers",
    [
        [TopPLogitsWarper(0.1, min_tokens_to_keep=2)],
        [TopPLogitsWarper(0.5, filter_value=-2.0)],
        [TopKLogitsWarper(2, filter_value=-2.0)],
        [TopKLogitsWarper(2), TemperatureLogitsWarper(3.0)],
        [TopPLogitsWarper(0.6), TemperatureLogitsWarper(3.0)],
        [TemperatureLogitsWarper(3.0), TopPLogitsWarper(0.6), TopKLogitsWarper(2)],
        [TemperatureLogitsWarper(3.0), TopKLogitsWarper(3), TopPLogitsWarper(0.7)],
    ],
    ids=lambda warpers: " ".join(type(warper).__name__[:-12] for warper in warpers),
)
def test_warpers_given_as_processors_work_in_the_order_given(warpers, monkeypatch):
    """Those that end the list and do what `Sampling` does are left to it, and no others."""
    model, prompt = make_model(vocab=4), torch.tensor([[0, 2]])
    options = {"top_k": 0, "logits_processor": LogitsProcessorList(warpers)}
    law = enumerate_law(
        lambda: tuple(
            model.generate(prompt, custom_generate=as_custom_generate(), max_new_tokens=2, do_sample=True, **options)[
                0, 2:
            ].tolist()
        ),
        monkeypatch,
    )
    assert distance(law, law_of_generate(model, prompt, 2, **options)) < 1e-6


@pytest.mark.parametrize("name", SAMPLING)
def test_scores_of_a_sampled_text_are_transformers_own(name):
    model = make_model()
    options = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
               "temperature": 3.0, **SAMPLING[name]}  # fmt: skip
    drafter = Knowing(model.generate(PROMPTS[2:], max_new_tokens=6, do_sample=False)[:, 5:].tolist())
    custom = as_custom_generate(drafter, generator=torch.Generator().manual_seed(0))
    ours = model.generate(PROMPTS[2:], custom_generate=custom, max_new_tokens=6, **options)
    assert len(ours.scores) == len(ours.logits) == 6 and ours.sequences.shape == (1, 11)
    for step in range(6):
        theirs = model.generate(ours.sequences[:, : 5 + step], max_new_tokens=1, **options)
        torch.testing.assert_close(ours.scores[step].float(), theirs.scores[0])
        torch.testing.assert_close(ours.logits[step].float(), theirs.logits[0])
        assert theirs.scores[0][0, ours.sequences[0, 5 + step]] > -torch.inf


def test_scores_of_a_batch_are_transformers_own_up_to_each_rows_end(talker):
    theirs, ours = both(talker, do_sample=False, repetition_penalty=1.2, return_dict_in_generate=True,
                        output_scores=True, output_logits=True)  # fmt: skip
    assert ours.sequences.tolist() == theirs.sequences.tolist() and ours.past_key_values is None
    assert len(ours.scores) == len(theirs.scores) == len(ours.logits)
    pads = 0
    for step, (one, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        for row, text in enumerate(theirs.sequences[:, 5:].tolist()):
            if talker.generation_config.eos_token_id in text[:step]:
                assert one[row, 0] == 0 and float(one[row].exp().sum()) == 1
                pads += 1
            else:
                torch.testing.assert_close(one[row].float(), other[row])
    assert pads
    quiet = both(talker, do_sample=False, return_dict_in_generate=True)
    assert quiet[1].scores is None and quiet[1].sequences.tolist() == quiet[0].sequences.tolist()


def test_several_samples_of_one_prompt(talker):
    options = dict(do_sample=True, num_return_sequences=4, top_k=1, max_new_tokens=6)
    theirs = talker.generate(PROMPTS[2:], **options)
    assert talker.generate(PROMPTS[2:], custom_generate=as_custom_generate(), **options).tolist() == theirs.tolist()


def test_the_models_own_generation_config_has_the_say(talker):
    model = copy.deepcopy(talker)
    model.generation_config.update(repetition_penalty=2.0, no_repeat_ngram_size=2, min_new_tokens=9, max_new_tokens=10)
    theirs = model.generate(PROMPTS, attention_mask=MASK)
    drafter = Knowing(theirs[:, 5:].tolist())
    ours = model.generate(PROMPTS, attention_mask=MASK, custom_generate=as_custom_generate(drafter))
    assert ours.tolist() == theirs.tolist() != both(talker, do_sample=False)[0].tolist()
    ours = model.generate(
        PROMPTS, attention_mask=MASK, custom_generate=as_custom_generate(), generation_config=GenerationConfig(
            repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=LENGTH, min_new_tokens=0))  # fmt: skip
    assert ours.tolist() == both(talker, do_sample=False)[0].tolist()


def test_rows_that_end_are_filled_with_the_end_token_where_no_padding_is_named(talker):
    model = copy.deepcopy(talker)
    model.generation_config.pad_token_id = None
    theirs, ours = both(model, do_sample=False)
    assert ours.tolist() == theirs.tolist() and theirs[0, -1] == model.generation_config.eos_token_id


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_tree_cannot_do_is_refused_by_name(talker, name):
    options = {"max_new_tokens": 4, name: REFUSED[name]}
    if name in ("output_attentions", "output_hidden_states"):
        options["return_dict_in_generate"] = True
    with pytest.raises(ValueError, match={"stop_strings": "stop strings", "token_healing": "okenizer"}.get(name, name)):
        talker.generate(PROMPTS[2:], custom_generate=as_custom_generate(), **options)


@pytest.mark.parametrize("name", sorted(WITHOUT_MEANING - {"transformers_version", "_from_model_config"}))
def test_what_means_nothing_to_transformers_either_changes_nothing(talker, name):
    values = {"assistant_ensemble_weight": 0.5, "num_assistant_tokens_schedule": "heuristic", "early_stopping": True, "low_memory": True,
              "disable_compile": True, "cache_config": None, "compile_config": None,
              "continuous_batching_config": None}  # fmt: skip
    options = {"do_sample": False, name: values.get(name, 2)}
    theirs, ours = both(talker, prompts=PROMPTS[2:], mask=MASK[2:], **options)
    free = talker.generate(PROMPTS[2:], max_new_tokens=LENGTH, do_sample=False)
    assert ours.tolist() == theirs.tolist() == free.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda model: dict(assistant_model=model), "assistant_model"),
        (lambda model: dict(synced_gpus=True), "synced_gpus"),
        (lambda model: dict(past_key_values=model(PROMPTS[2:, :2], use_cache=True).past_key_values), "past_key_values"),
        (lambda model: dict(position_ids=torch.arange(5)[None] + 3), "position_ids"),
        (lambda model: dict(inputs_embeds=model.get_input_embeddings()(PROMPTS[2:])), "inputs_embeds"),
        (
            lambda model: dict(watermarking_config=SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=3)),
            "SynthIDText",
        ),
        (lambda model: dict(guidance_scale=2.0, negative_prompt_ids=PROMPTS[2:]), "guidance_scale=2.0"),
    ],
)
def test_other_arguments_that_a_tree_cannot_take_are_refused_by_name(talker, options, words):
    with pytest.raises(ValueError, match=words):
        talker.generate(PROMPTS[2:], custom_generate=as_custom_generate(), max_new_tokens=4, **options(talker))


def test_positions_that_transformers_would_make_are_taken(talker):
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    theirs, ours = both(talker, do_sample=False, position_ids=positions)
    assert ours.tolist() == theirs.tolist()


# Processors


class Favourite(LogitsProcessor):
    """Another token is likelier for each row; counts who asks."""

    def __init__(self, favourites: list[int]) -> None:
        self.favourites, self.shapes = favourites, set()

    def __call__(self, input_ids, scores):
        self.shapes.add(tuple(scores.shape))
        scores = scores.clone()
        for row, token in enumerate(self.favourites):
            if input_ids.shape[1] % 3:
                scores[row, token] += 40
        return scores


def test_a_processor_that_knows_its_rows_by_number_finds_them(talker):
    favourite = Favourite([4, 5, 6])
    theirs, ours, wrong = both(talker, ("knowing", "hydra"), do_sample=False, logits_processor=[favourite])
    assert ours.tolist() == theirs.tolist() == wrong.tolist() and favourite.shapes == {(3, 40)}
    assert {4, 5, 6} <= set(theirs[:, 5:].flatten().tolist())
    allowed = lambda batch, ids: [batch + 10, batch + 20, (int(ids[-1]) * 7 + 1) % 40]  # noqa: E731
    theirs, ours = both(talker, do_sample=False, prefix_allowed_tokens_fn=allowed)
    assert ours.tolist() == theirs.tolist()


def test_generate_takes_a_processor_or_a_list(talker):
    single = RepetitionPenaltyLogitsProcessor(2.0)
    longer = MinLengthLogitsProcessor(16, talker.generation_config.eos_token_id)
    for given in (single, [single], LogitsProcessorList([single]), [single, longer]):
        theirs = talker.generate(PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, do_sample=False,
                                 logits_processor=LogitsProcessorList(given if isinstance(given, list) else [given]))  # fmt: skip
        for drafter in (None, Knowing(theirs[:, 5:].tolist()), scramble(DRAFTERS["fspad"](talker))):
            ours = generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, drafter=drafter,
                            logits_processor=given)  # fmt: skip
            assert ours.sequences.tolist() == theirs.tolist()
    right = torch.tensor([[3, 1, 3, 0, 0], [17, 0, 0, 0, 0], [9, 8, 7, 9, 8]])
    ours = generate(
        talker, right, attention_mask=(right > 0).long(), max_new_tokens=LENGTH, logits_processor=[single, longer]
    )
    assert ours.sequences[:, 5:].tolist() == theirs[:, 5:].tolist()


def test_what_is_no_processor_or_criterion_is_refused(talker):
    for name in ("logits_processor", "stopping_criteria"):
        with pytest.raises(TypeError, match=f"{name} must be a function"):
            generate(talker, PROMPTS, max_new_tokens=2, **{name: [3]})
    with pytest.raises(ValueError, match="scores of the shape it was given"):
        generate(talker, PROMPTS, max_new_tokens=2, logits_processor=lambda ids, scores: scores[:, :5])
    with pytest.raises(ValueError, match="no token is possible"):
        generate(talker, PROMPTS, max_new_tokens=2, logits_processor=lambda ids, scores: scores - torch.inf)


def test_a_code_that_is_ruled_out_is_not_accepted_for_its_neighbours_sake():
    model = make_model(vocab=6)
    acceptance = RelaxedAcceptance(nearest_codes(torch.zeros(6, 2)), delta=1.0)
    drafter = scramble(DRAFTERS["hydra"](model))

    def never_three(ids, scores):
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)

    for temperature in (0.0, 1.0):
        options = dict(drafter=drafter, acceptance=acceptance, max_new_tokens=30, temperature=temperature,
                       eos_token_id=[], generator=torch.Generator().manual_seed(0))  # fmt: skip
        said = [generate(model, torch.tensor([[1, 2]]), logits_processor=rule, **options).new_tokens[0]
                for rule in (None, never_three)]  # fmt: skip
        assert 3 in said[0] and 3 not in said[1]


def test_without_processors_nothing_is_processed(talker, monkeypatch):
    for name in ("TreeProcessors", "StopCheck", "_left_padded"):
        monkeypatch.setattr(f"paperworks.decoding.engine.{name}", lambda *args, **kwargs: 1 / 0)
    generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=4, temperature=0.7, top_k=5, top_p=0.9)
    for options in (dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=5, top_p=0.9)):
        talker.generate(PROMPTS, attention_mask=MASK, custom_generate=as_custom_generate(), max_new_tokens=4, **options)
    with pytest.raises(ZeroDivisionError):
        talker.generate(PROMPTS, custom_generate=as_custom_generate(), max_new_tokens=4, do_sample=True, min_p=0.1)


# Stopping criteria


class Sum(StoppingCriteria):
    """Stops a row when the sum of its new tokens passes a bound; looks at nothing but the text."""

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, 5:].sum(1) > self.bound


class AnyRow(StoppingCriteria):
    """Stops all rows when one of them has said a token, as criteria of old did."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return bool((input_ids[:, 5:] == self.token).any())


@pytest.mark.parametrize("kind", ["sum", "any"])
@pytest.mark.parametrize("filled", [True, False])
def test_stopping_criteria_of_a_batch_are_transformers_own(kind, filled, talker):
    model = copy.deepcopy(talker)
    if not filled:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    free = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, do_sample=False)[:, 5:]
    criterion = Sum(80) if kind == "sum" else AnyRow(int(free[1, 6]))
    theirs, ours, wrong = both(
        model, ("knowing", "hydra"), do_sample=False, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert ours.tolist() == theirs.tolist() == wrong.tolist() and theirs.shape[1] < 5 + LENGTH
    for drafter in (None, Knowing(theirs[:, 5:].tolist())):
        statistics = Statistics()
        options = dict(attention_mask=MASK, max_new_tokens=LENGTH, drafter=drafter, stopping_criteria=criterion)
        pieces = list(stream(model, PROMPTS, statistics=statistics, **options))
        texts = [[token for piece in pieces for token in piece[row]] for row in range(3)]
        result = generate(model, PROMPTS, **options)
        assert result.sequences.tolist() == theirs.tolist()
        assert result.new_tokens == texts
        assert [sum(row) + 1 for row in statistics.emitted] == [len(text) for text in texts]
        assert all(count > 0 for row in statistics.emitted for count in row)


def test_criteria_see_scores_only_where_these_are_asked_for(talker):
    seen = []

    class Unsure(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(None if scores is None else len(scores))
            assert scores is None or (input_ids.shape[1] == 5 + len(scores) and scores[-1].shape == (3, 40))
            return torch.zeros(3, dtype=torch.bool)

    both(talker, do_sample=False, stopping_criteria=StoppingCriteriaList([Unsure()]))
    assert set(seen) == {None}
    both(talker, do_sample=False, stopping_criteria=StoppingCriteriaList([Unsure()]), output_scores=True,
         return_dict_in_generate=True)  # fmt: skip
    assert seen[-1] == LENGTH or seen[-1] > 6


def test_a_streamer_given_to_generate_is_fed_and_ended(talker):
    class Recorder:
        def __init__(self):
            self.seen, self.ended = [], 0

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended += 1

    recorder = Recorder()
    options = dict(max_new_tokens=8, do_sample=False, repetition_penalty=1.5)
    text = talker.generate(PROMPTS[2:], custom_generate=as_custom_generate(), streamer=recorder, **options)
    assert recorder.seen == text[0].tolist() and recorder.ended == 1
    with pytest.raises(ValueError, match="a streamer prints one prompt, got 3"):
        talker.generate(PROMPTS, custom_generate=as_custom_generate(), streamer=recorder, **options)


def test_two_models_that_take_turns_take_criteria_as_a_list_or_alone(talker):
    decoding = EntropyAdaptiveDecoding(talker, talker, EntropySwitch(2.0, min_stay=1))
    whole = decoding.generate(PROMPTS[2:], max_new_tokens=LENGTH, eos_token_id=[]).new_tokens[0]
    seen = []

    class Fourth(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores[-1].shape)
            return torch.tensor([input_ids.shape[1] == 9])

    for given in (Fourth(), [Fourth()], StoppingCriteriaList([Fourth()])):
        text = decoding.generate(PROMPTS[2:], max_new_tokens=LENGTH, eos_token_id=[], stopping_criteria=given)
        assert text.new_tokens[0] == whole[:4]
    assert set(seen) == {(1, 40)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(repetition_penalty=1.2), "no logits processors"),
        (dict(stopping_criteria=StoppingCriteriaList([AnyRow(3)])), "no stopping criteria"),
        (dict(return_dict_in_generate=True), "no return_dict_in_generate"),
        (dict(length_penalty=2.0, num_beams=3), "length_penalty"),
        (dict(early_stopping=True, num_beams=3), "stops when nothing better can come"),
        (dict(num_return_sequences=2, num_beams=3), "leave num_beams, num_return_sequences"),
        (dict(num_beams=2), "the search has 3 beams of its own"),
        (dict(use_cache=False), "use_cache"),
        (dict(do_sample=True), "leave num_beams"),
    ],
)
def test_conditional_beam_search_keeps_to_or_refuses_options_too(talker, options, words):
    search = ConditionalBeamSearch(talker, lambda hidden, tokens: -hidden.square().mean(-1), num_beams=3)
    plain = dict(attention_mask=MASK, max_new_tokens=5, custom_generate=search.custom_generate)
    with pytest.raises(ValueError, match=words):
        talker.generate(PROMPTS, **plain, **options)
    expected = search.generate(PROMPTS, attention_mask=MASK, max_new_tokens=5).sequences[:, 0].tolist()
    assert talker.generate(PROMPTS, **plain).tolist() == expected
    # Given its own number of beams, transformers repeats the prompts.
    assert talker.generate(PROMPTS, **plain, num_beams=3).tolist() == expected


# Infinite logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", [None, "hydra", "rsd-s"])
def test_infinite_logits_are_reported_and_never_a_token_outside_the_vocabulary(temperature, drafter):
    model = make_model()
    made = None if drafter is None else scramble(DRAFTERS[drafter](model))
    model.lm_head.weight.data[5] *= 1e308
    model.lm_head.weight.data[5] *= 1e10
    options = dict(drafter=made, max_new_tokens=6, temperature=temperature, eos_token_id=[])
    with pytest.raises(ValueError, match=r"infinite logits|NaN logits"):
        generate(model, PROMPTS[2:], **options)
    model = make_model()
    with pytest.raises(ValueError, match="infinite logits"):
        generate(model, PROMPTS[2:], logits_processor=lambda ids, scores: scores.index_fill(1, torch.tensor([5]), torch.inf),
                 max_new_tokens=3, temperature=temperature)  # fmt: skip


def test_the_lowest_temperature_is_nearly_greedy(talker):
    greedy = generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH).new_tokens
    assert (
        generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, temperature=1.2e-38).new_tokens == greedy
    )
    with pytest.raises(ValueError, match="temperature must be 0"):
        generate(talker, PROMPTS, temperature=1e-50)


# Raw errors that were


def test_a_draft_vocabulary_below_the_trees_width_is_one_sentence_or_a_smaller_tree(talker):
    for name in ("hydra", "chimera"):
        kind = type(DRAFTERS[name](talker))
        with pytest.raises(ValueError, match="wants the best 5 tokens but only 3 are scored"):
            kind.from_target(talker, vocabulary=3, tree=[(rank,) for rank in range(5)])
    small = scramble(Hydra.from_target(talker, vocabulary=3))
    assert max(max(path) for path in small.tree.paths) == 2
    data = collect(talker, [([], row.tolist()) for row in PROMPTS])
    assert fit_tree(small, talker, data, nodes=4).shape[1] == 3
    expected = generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH).new_tokens
    assert generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, drafter=small).new_tokens == expected
    fewer = scramble(DRAFTERS["fspad"](talker).__class__.from_target(talker, vocabulary=2, top_k=6, nodes=20, depth=3))
    assert generate(talker, PROMPTS, attention_mask=MASK, max_new_tokens=LENGTH, drafter=fewer).new_tokens == expected


@pytest.mark.parametrize("vocabulary", [0, 41, torch.tensor([3, 40]), torch.tensor([-1])])
def test_a_draft_vocabulary_of_tokens_that_are_not_there_is_refused(talker, vocabulary):
    with pytest.raises(ValueError, match=r"all within 0\.\.39"):
        Hydra.from_target(talker, vocabulary=vocabulary)


def test_a_draft_model_that_does_not_know_a_token_of_the_text_says_so(talker):
    drafter = RecursiveSpeculation.from_target(talker, draft=make_model(vocab=20), vocabulary=20)
    with pytest.raises(ValueError, match=r"holds token 31, but the draft model knows only 0\.\.19"):
        generate(talker, torch.tensor([[3, 31]]), drafter=drafter, max_new_tokens=4)
