"""Recipes of the room, and `generate`, with models of other families: they run, or refuse before anything is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from paperworks.consult.writing import write
from paperworks.errors import UsageError
from paperworks.hub import load_model
from paperworks.lab import execute
from paperworks.recipes.decoding.drafting import DRAFTERS, Drafting, cpu_friendly_dtype, encode, load_target

LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=1024)  # fmt: skip
# Sizes as in tiny-random-llama, whose tokenizer, of 128 bytes, all of them share; Qwen2's table is padded.
CONFIGS = {
    "llama": lambda: LlamaConfig(vocab_size=128, **LLAMA),
    "qwen2": lambda: Qwen2Config(vocab_size=160, **LLAMA),
    "gemma2": lambda: Gemma2Config(vocab_size=128, head_dim=8, sliding_window=16, query_pre_attn_scalar=8, **LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=1024),
    "opt": lambda: OPTConfig(vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                             max_position_embeddings=1024, word_embed_proj_dim=32),
    "gpt-neox": lambda: GPTNeoXConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, max_position_embeddings=1024),
}  # fmt: skip
SMALL = {"train_tokens": 200, "epochs": 0.1, "draft_vocabulary": 64, "nodes": 4}
DRAFTING = {"prompt_count": 1, "new_tokens": 8, **SMALL}
RECIPES = {
    "hydra": {**DRAFTING, "equality_prompts": 1},
    "chimera": {**DRAFTING, "equality_prompts": 1},
    "fspad": {**DRAFTING, "equality_prompts": 1, "ablations": False},
    "recursive-speculation": {**DRAFTING, "equality_prompts": 1},
    "superposed-decoding": {"corpus_tokens": 3000, "prompt_count": 1, "new_tokens": 4},
    "entropy-adaptive-decoding": {"prompt_count": 2, "calibration_prompts": 2, "new_tokens": 6, "train_tokens": 100},
    "dynamic-inference": {
        "prompt_count": 1,
        "new_tokens": 3,
        "head_blocks": 2,
        "controller_blocks": 2,
        "test_blocks": 1,
    },
    "temporal-fusion": {"requests": 2, "longest": 4, "rounds": 1},
    "conditional-beam-search": {},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a random model of each family and the tokenizer."""
    root = tmp_path_factory.mktemp("models")
    _, tokenizer = load_model("tiny-random-llama")
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch):
    """What one recipe's model wrote serves the next; figures, which know no family, are drawn but not kept."""
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: shared_cache / name)
    monkeypatch.setattr("paperworks.lab.run.Run.figure", lambda *args: None)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_recipe_runs_with_every_family(family, name, folders):
    options = {**RECIPES[name]}
    if name == "entropy-adaptive-decoding":
        options["small"] = str(folders / family)
    options["model"] = str(folders / family)
    run = execute(name, scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback


# The models have two layers.
METHODS = [name for name in DRAFTERS if "," not in name and name != "First 4 layers"]


@pytest.mark.parametrize("family", CONFIGS)
def test_generate_writes_with_every_method_and_family(family, folders, monkeypatch):
    """Drafters are trained on what the recipes' model wrote; the text is that without one."""
    monkeypatch.setattr("paperworks.recipes.decoding.drafting.Drafting", lambda: Drafting(**SMALL))
    options = {"model": str(folders / family), "max_new_tokens": 12, "temperature": 0.0}
    texts = {name: write("Once upon", method=name, **options).text for name in ("plain", *METHODS)}
    assert set(texts.values()) == {texts["plain"]}


def test_a_drafter_that_cannot_be_is_refused_before_the_model_writes(folders, monkeypatch):
    monkeypatch.setattr("paperworks.decoding.self_written", lambda *args, **options: 1 / 0)
    with pytest.raises(UsageError, match="takes 1 to 1 of the target's 2 first layers, got 4"):
        write("Once upon", model=str(folders / "gpt2"), method="First 4 layers")


@pytest.fixture(scope="session")
def opinionated(folders):
    """A folder whose generation config has a repetition penalty and samples, as Qwen2.5-Instruct's does."""
    model, tokenizer = load_model(str(folders / "gpt2"))
    model.generation_config.eos_token_id = None
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.6, no_repeat_ngram_size=3
    )
    model.save_pretrained(folders / "opinionated")
    tokenizer.save_pretrained(folders / "opinionated")
    return folders / "opinionated"


def own_text(folder, **options):
    """transformers' text behind "Once upon", with what the model's generation config asks for."""
    model, tokenizer = load_target(str(folder), dtype=cpu_friendly_dtype())
    ids = encode(tokenizer, "Once upon")
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
    return tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_follows_the_models_generation_config(opinionated):
    options = {"model": str(opinionated), "method": "plain", "max_new_tokens": 12}
    greedy = write("Once upon", temperature=0.0, **options).text
    assert greedy == own_text(opinionated, do_sample=False)
    assert greedy != own_text(opinionated, do_sample=False, repetition_penalty=1.0, no_repeat_ngram_size=0)
    sampled = [write("Once upon", seed=seed, **options).text for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    # What is given has the say: of one token there is no choice.
    assert write("Once upon", top_k=1, **options).text == greedy


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"num_beams": 4}, {}, "num_beams=4"),
        ({}, {"top_k": 5}, "the text is greedy"),
        ({}, {"temperature": -1.0}, "temperature must be 0"),
        ({}, {"max_new_tokens": 5000}, "context holds 1024"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_written_is_said_before_a_drafter_is_trained(
    config, options, words, folders, tmp_path, monkeypatch
):
    monkeypatch.setattr("paperworks.recipes.decoding.drafting.trained", lambda *args, **kwargs: 1 / 0)
    model, tokenizer = load_model(str(folders / "llama"))
    model.generation_config.update(**config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=words):
        write("Once upon", model=str(tmp_path), method="hydra", **options)
