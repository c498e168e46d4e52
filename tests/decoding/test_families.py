"""Every causal LM of transformers: its own greedy text, or a sentence that says why not; and drafts as good as it gets."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BigBirdConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
)

from paperworks.decoding import (
    ClassifierFreeGuidance,
    ConditionalBeamSearch,
    ConstantBranching,
    DynamicInference,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    Hydra,
    Medusa,
    RecursiveSpeculation,
    SuperposedDecoding,
    Target,
    TemporalFusion,
    TokenTree,
    TreeCache,
    collect,
    generate,
    train_drafter,
)
from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization
from tests.decoding.conftest import CONTRACT, DRAFTERS, make_model, scramble
from tests.decoding.families import (
    NAMES,
    NEW,
    PAGE,
    PROMPTS,
    SIZES,
    VOCAB,
    Through,
    build,
    loosen,
    outcome,
    own_text,
    ragged,
    row,
    sentence,
)

# One of each way to limit what a layer sees, to place tokens and to score them, and of what the papers measure on.
DECODERS = (
    "llama", "qwen2", "mistral", "qwen3_moe", "phi3", "gemma2", "gemma3_text", "gemma3n_text", "llama4_text", "gpt_neo",
    "modernbert-decoder", "bloom", "mpt", "gpt2", "opt", "gpt_neox", "codegen", "cohere", "granite", "bert", "bart",
    "deepseek_v3", "hrm_text", "longcat_flash", "roformer",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_family_writes_transformers_own_text_or_says_why_not(name):
    found = outcome(name)
    assert row(name, found) in PAGE.read_text().splitlines(), "run python -m tests.decoding.families"


def _decoders(model, prompt):
    """Each other decoder of the room in the setting where it must write the model's own greedy text."""
    options = dict(max_new_tokens=NEW, eos_token_id=[])

    def fusion():
        server = TemporalFusion(model, max_concurrency=2, max_seq_len=40)
        server.submit(PROMPTS[1], **options)
        handle = server.submit(prompt, **options)
        return handle.result()

    return {
        "superposed": lambda: SuperposedDecoding(model, drafts=1).generate(prompt, **options).new_tokens[0][0],
        # The small model's entropy passes 0 at once, so that the large one catches up and writes on.
        "entropy-adaptive": lambda: (
            EntropyAdaptiveDecoding(model, copy.deepcopy(model), EntropySwitch(0.0, min_stay=2))
            .generate(prompt, **options)
            .new_tokens[0]
        ),
        "dynamic": lambda: (
            DynamicInference(model).generate(prompt, exit_threshold=2, stop_threshold=2, **options).new_tokens[0]
        ),
        "beam": lambda: (
            ConditionalBeamSearch(model, lambda h, t: torch.zeros(t.shape[:-1]), num_beams=1, weight=0.0)
            .generate(prompt, **options)
            .new_tokens[0][0]
        ),
        "fusion": fusion,
        "hidden states": lambda: (
            HiddenStateOptimization(model, steps=0, window=4).generate(prompt, **options).new_tokens[0]
        ),
    }


# Each refuses what it has not: states that can be scored, tokens that a vector can stand for, layers in one list, branches.
REFUSED = {
    "bert": {"dynamic"},
    "bart": {"beam"},
    "gemma3n_text": {"superposed"},
    "gpt_neo": {"beam"},
    "hrm_text": {"dynamic"},
    "longcat_flash": {"dynamic"},
    "modernbert-decoder": {"dynamic"},
    "mpt": {"beam"},
    "roformer": {"beam", "dynamic"},
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_other_decoders_write_the_models_own_text_in_their_limit(name):
    model = build(name)
    loosen(model)
    text = own_text(model, PROMPTS[0])
    for decoder, write in _decoders(model, PROMPTS[0]).items():
        if decoder in REFUSED.get(name, ()):
            with pytest.raises(ValueError) as refused:
                write()
            sentence(refused.value, model)
        else:
            assert write() == text, decoder


@pytest.mark.parametrize(("name", "wide"), [("mistral", 1000), ("gemma3_text", 1000), ("gpt_neo", None)])
def test_the_window_behind_which_families_are_tried_matters(name, wide):
    model = build(name)
    loosen(model)
    unlimited = copy.deepcopy(model)
    if wide:
        unlimited.config.sliding_window = wide
    else:
        unlimited.transformer.h[1].attn.attention.bias = unlimited.transformer.h[0].attn.attention.bias
    assert own_text(model, PROMPTS[0]) != own_text(unlimited, PROMPTS[0])


SMALL = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (BertConfig(**SMALL), "set up as an encoder, which looks ahead: load it with is_decoder=True"),
        (Gemma2Config(**SMALL, head_dim=8, use_bidirectional_attention=True), "looks ahead, so that it cannot write"),
        (LlamaConfig(**SMALL, is_causal=False), "looks ahead, so that it cannot write"),
        (BigBirdConfig(**SMALL, is_decoder=True), "load it with attention_type='original_full'"),
        (
            MistralConfig(**SMALL, head_dim=8, sliding_window=8, per_layer_config={0: {"sliding_window": 4}}),
            "different values of sliding_window",
        ),
    ],
)
def test_attention_that_a_mask_cannot_tell_is_refused(config, match):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=match) as refused:
        generate(model, PROMPTS[0][None], max_new_tokens=4)
    sentence(refused.value, model)


def test_falcon_with_alibi_reads_one_prompt_and_one_path():
    model = make(FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True))
    text = own_text(model, PROMPTS[0])
    assert generate(model, PROMPTS[0], drafter=Through([text]), max_new_tokens=NEW).new_tokens == [text]
    with pytest.raises(ValueError, match="FalconForCausalLM tells places by where keys lie in its cache"):
        generate(model, **ragged(PROMPTS), max_new_tokens=NEW)


def test_gpt_neo_reads_trees_and_batches_up_to_its_window():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128)
    model = make(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=40))
    texts = [own_text(model, prompt) for prompt in PROMPTS]
    assert generate(model, **ragged(PROMPTS), drafter=Through(texts), max_new_tokens=NEW).new_tokens == texts
    # And past it with one path of each tree.
    long = own_text(model, PROMPTS[0], 60)
    result = generate(model, PROMPTS[0], drafter=Through([long]), max_new_tokens=60)
    assert result.new_tokens == [long] and result.statistics.target_calls < 40
    with pytest.raises(ValueError, match="give the prompts one by one"):
        generate(model, **ragged(PROMPTS), max_new_tokens=60)


def test_llama4_reads_trees_and_batches_until_its_attention_is_tempered():
    config = dict(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    model = make(Llama4TextConfig(**config, floor_scale=24, no_rope_layers=[1, 0], attention_chunk_size=8))
    text = own_text(model, PROMPTS[0])
    assert generate(model, PROMPTS[0], drafter=Through([text]), max_new_tokens=NEW).new_tokens == [text]
    with pytest.raises(ValueError, match="give the prompts one by one"):
        generate(model, **ragged(PROMPTS), max_new_tokens=NEW)
    texts = [own_text(model, prompt, 6) for prompt in PROMPTS[1:]]
    assert generate(model, **ragged(PROMPTS[1:]), max_new_tokens=6).new_tokens == texts


def test_a_text_that_passes_the_turning_point_of_longrope_is_refused():
    options = {"original_max_position_embeddings": 16, "rope_parameters": LONG}
    model = make(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0, **options))
    for prompt, new in ((PROMPTS[0], NEW), (PROMPTS[1], NEW)):
        text = own_text(model, prompt, new)
        assert generate(model, prompt, drafter=Through([text]), max_new_tokens=new).new_tokens == [text]
    for prompts in ([PROMPTS[2]], PROMPTS[:2]):
        with pytest.raises(ValueError, match="Phi3ForCausalLM changes its rotary frequencies at 16 tokens"):
            generate(model, **ragged(prompts), max_new_tokens=NEW)


# Drafts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", ["all", "permuted", "reduced"])
@pytest.mark.parametrize("family", CONTRACT)
def test_an_exact_copy_of_the_target_is_accepted_whole(family, vocabulary, temperature):
    model = make_model(family)
    prompt = torch.tensor([[3, 1, 2, 0, 2, 9]])
    tokens = None
    if vocabulary != "all":
        tokens = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    if vocabulary == "reduced":
        if temperature:
            pytest.skip("what is drafted of fewer tokens is another law")
        said = set(generate(model, prompt, max_new_tokens=21, eos_token_id=[]).new_tokens[0])
        tokens = torch.tensor([token for token in tokens.tolist() if token in said or token % 3 == 0])
    drafter = RecursiveSpeculation.from_target(
        model, draft=copy.deepcopy(model), tree=ConstantBranching((1, 1, 1)), vocabulary=tokens
    )
    result = generate(
        model, prompt, drafter=drafter, max_new_tokens=21, temperature=temperature, eos_token_id=[],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert result.statistics.emitted == [[4, 4, 4, 4, 4]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONTRACT)
def test_heads_that_hand_the_state_on_say_what_the_target_says(family, tied):
    model = make_model(family)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits, hidden = Target(model).prefill([tokens[0, :5]], TreeCache(model.config, 1))
        for vocabulary in (None, order):
            drafter = Medusa.from_target(
                model, heads=1, tree=[(0,), (1,)], vocabulary=vocabulary, tie_lm_head=tied
            ).eval()
            # All that a fresh head adds to the state is this bias.
            torch.nn.init.zeros_(drafter.heads[0].first.bias)
            wanted = logits[0] if vocabulary is None else logits[0, vocabulary]
            said = next(drafter.predictions(Target(model), tokens[:, :6], hidden, torch.ones(1, 6).bool()))
            torch.testing.assert_close(said.logits[3], Target(model).logits(hidden[0, 3], vocabulary))
            committed = SimpleNamespace(hidden=hidden, last_hidden=hidden[:, -1])
            tree = drafter.propose(drafter.start(Target(model), 1, None), committed, torch.tensor([5]))
            best = wanted.topk(2).indices
            assert tree.tokens[0, 1:].tolist() == (best if vocabulary is None else vocabulary[best]).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "codegen"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_end_with_the_context(family, name):
    model = make_model(family)
    prompt = torch.randint(40, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    drafter = scramble(DRAFTERS[name](model))
    assert (
        generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[]).sequences.tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=32),
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
                  word_embed_proj_dim=16, max_position_embeddings=32),
    ],
)  # fmt: skip
def test_a_draft_with_a_shorter_context_is_refused(config, model):
    drafter = RecursiveSpeculation.from_target(model, draft=AutoModelForCausalLM.from_config(config).double().eval())
    prompt = torch.randint(40, (1, 20), generator=torch.Generator().manual_seed(0))
    assert len(generate(model, prompt, drafter=drafter, max_new_tokens=12, eos_token_id=[]).new_tokens[0]) == 12
    with pytest.raises(ValueError, match="a text may have 33 tokens, but the draft model's context holds 32"):
        generate(model, prompt, drafter=drafter, max_new_tokens=13, eos_token_id=[])


def test_what_a_bert_says_is_read_but_not_scored_from_its_states():
    model = build("bert")
    written = [([1, 2], [3, 4, 5]), ([1], [6, 7])]
    data = collect(model, written)
    with pytest.raises(ValueError, match="more to its states than a linear head") as refused:
        Hydra.from_target(model)
    sentence(refused.value, model)
    drafter = RecursiveSpeculation.from_target(model, draft=copy.deepcopy(model))
    with pytest.raises(ValueError, match="more to its states than a linear head"):
        train_drafter(drafter, model, data)


def test_guidance_keeps_a_models_scale():
    model = make_model("cohere")
    guided = ClassifierFreeGuidance(model, condition=[1], null=2, scale=1.0)
    prompt = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(guided(prompt).logits, model(prompt).logits)
    assert Target(guided).scorer().scale == 0.25


def test_trees_are_cut_to_their_first_path_where_only_paths_are_read():
    tokens, parents = torch.arange(7)[None], torch.tensor([[-1, 0, 0, 1, 1, 3, 2]])
    path = TokenTree(tokens, parents).first_path()
    assert path.tokens.tolist() == [[0, 1, 3, 5]] and path.is_chain
    law = torch.randn(1, 7, 9).softmax(-1)
    drawn = TokenTree(tokens, parents, law, "without_replacement").first_path()
    assert drawn.draw == "without_replacement" and bool((drawn.draft_probs == law[:, [0, 1, 3, 5]]).all())
