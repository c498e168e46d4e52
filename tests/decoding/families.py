"""A tiny random model of every entry of transformers' causal-LM mapping, and what the engine makes of it.

`python -m tests.decoding.families` writes docs/models.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paperworks.decoding import Target, TokenTree, TreeCache, generate
from paperworks.decoding.drafter import Drafter

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 61
# Every field of this name that a configuration has is given this value. The window is shorter than the prompts.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "ffn_intermediate_size", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers",), 2),
    **dict.fromkeys(("encoder_layers",), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "vocab_size": VOCAB,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LATENT = {
    "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TWICE = ["sliding_attention", "full_attention"] * 2
# The last two of four layers read the keys and values of the first two.
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _TWICE}
_PLAIN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_EYE = {"hidden_size": 32, "mlp_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32}
_SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 16, "intermediate_size": 48} | _EYE
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
_DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "reformer",
)  # fmt: skip
# Why an entry is not built.
NOT_BUILT = {
    "gemma3n": "its vision part needs the package timm",
    "gemma4_assistant": "it drafts for its own target, from that target's states, and writes no text alone",
    "gemma4_unified_assistant": "it drafts for its own target, from that target's states, and writes no text alone",
    "musicgen": "transformers makes no causal LM of its composite configuration",
    "musicgen_melody": "transformers makes no causal LM of its composite configuration",
}
# What a configuration needs beside that.
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _DECODERS},
    **{name: _LATENT for name in ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite")},
    **{name: _LATENT for name in ("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu")},
    **{name: _LATENT | _LINEAR for name in ("bailing_hybrid", "kimi_linear")},
    **{name: {"use_sliding_window": True, "max_window_layers": 1} for name in ("qwen2", "qwen3")},
    **{name: {"use_sliding_window": True} for name in ("qwen2_moe", "qwen3_moe", "smollm3")},
    **{name: {"rotary_dim": 4} for name in ("codegen", "gptj")},
    **{name: {"layer_types": ["conv", "full_attention"]} for name in ("lfm2", "lfm2_moe", "lfm3")},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 101},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"layer_types": ["sliding_attention", "compressed_sparse_attention"]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": _LATENT | {"index_n_heads": 4, "index_head_dim": 8},
    "fuyu": {"text_config": {"model_type": "persimmon"} | {key: SIZES[key] for key in _PLAIN}},
    "gemma3": {"vision_config": _SIGLIP},
    "gemma3n_text": _SHARED | _PER_LAYER | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED | _PER_LAYER,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "got_ocr2": {"text_config": {"model_type": "qwen2"} | {key: SIZES[key] for key in _PLAIN}, "vision_config": _EYE},
    "granitemoehybrid": _MAMBA | _LINEAR,
    "hy_v4": {"q_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 8},
    **{name: {"layer_types": ["hybrid_sliding", "hybrid"]} for name in ("inkling_text", "inkling2_text")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_text": {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax": _LINEAR,
    "modernbert-decoder": {"local_attention": 16},
    "moshi": {"sliding_window": 128},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"} | {key: SIZES[key] for key in _PLAIN}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 8}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {"is_decoder": True, "shape_vocab_size": 9, "pronunciation_vocab_size": 9},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
    },
    "xlstm": {"num_heads": 2},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "mamba_headdim": 16, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip
# Parts of a composite configuration that the class has no use for.
_UNUSED = {"audio_encoder_config", "depth_decoder_config"}


def configuration(name: str) -> Any:
    """A small configuration of a model type."""
    kind: Any = CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {field: value for field, value in SIZES.items() if field in fields | set(kind.attribute_map)}
    if {"layer_types", "sliding_window"} <= fields:
        values["layer_types"] = ["sliding_attention", "full_attention"]
    values |= SPECIAL.get(name, {})
    for part, inner in kind.sub_configs.items():
        if part in values or part in _UNUSED:
            continue
        if (known := getattr(inner, "model_type", None)) in CONFIG_MAPPING and CONFIG_MAPPING[known] is inner:
            values[part] = configuration(known)
        elif dataclasses.is_dataclass(inner):
            values[part] = {f.name: SIZES[f.name] for f in dataclasses.fields(inner) if f.name in SIZES}
    return kind(**values)


class Through(Drafter):
    """Random trees, through each of which runs as much of the text to come as there is room for."""

    def __init__(self, texts: list[list[int]], nodes: int = 9) -> None:
        super().__init__()
        self.texts, self.nodes = texts, nodes

    def start(self, target: Any, batch: int, sampling: Any) -> dict[str, Any]:
        """How much of each text has been read, and a source of randomness."""
        return {"read": [-1] * batch, "generator": torch.Generator().manual_seed(0)}

    def propose(self, state: dict[str, Any], committed: Any, root: Tensor, generator: Any = None) -> TokenTree:
        """Right nodes stand among wrong ones, in any order."""
        draw = state["generator"]
        # The prompt is no part of the text.
        new = committed.lengths if min(state["read"]) >= 0 else [1] * len(root)
        state["read"] = [read + count for read, count in zip(state["read"], new, strict=True)]
        tokens = torch.randint(VOCAB, (len(root), self.nodes), generator=draw)
        tokens[:, 0] = root
        parents = torch.full_like(tokens, -1)
        for row, (text, read) in enumerate(zip(self.texts, state["read"], strict=True)):
            path = [0]
            for node in range(1, self.nodes):
                depth = read + len(path)
                if depth < len(text) and float(torch.rand(1, generator=draw)) < 0.5:
                    tokens[row, node], parents[row, node] = text[depth], path[-1]
                    path.append(node)
                else:
                    parents[row, node] = int(torch.randint(node, (1,), generator=draw))
        return TokenTree(tokens, parents)


class Outcome(NamedTuple):
    """What becomes of a family.

    Attributes:
        kind: "trees": all is as transformers' own text, trees and ragged batches too. "paths": one prompt at a time, and
            of trees one path. "refused" by a sentence. "not built" here.
        note: The sentence, or why it is not built.
        scored: Whether states alone can be scored as the model scores them, as draft heads do; else that is refused.
    """

    kind: Literal["trees", "paths", "refused", "not built"]
    note: str = ""
    scored: bool = False


PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)) for length in (20, 5, 11)
]
NEW = 8


def build(name: str) -> Any:
    """A random model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name)).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1 or not re.search("norm|ln_", key.lower()):
            nn.init.normal_(parameter, std=0.2)
    # Nothing but the model's own law: some configurations force a first or a last token.
    model.generation_config = GenerationConfig()
    return model


@torch.no_grad()
def loosen(model: Any) -> None:
    """Give a model a head that does not see what all states have in common, or it would say one token again and again."""
    head = model.get_output_embeddings()
    states: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, args: states.append(args[0])):
        for prompt in PROMPTS:
            model(prompt[None])
    mean = nn.functional.normalize(torch.cat(states, 1)[0].mean(0), dim=0)
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    head.weight = nn.Parameter(weight - torch.outer(weight @ mean, mean))


def own_text(model: Any, prompt: Tensor, new: int = NEW) -> list[int]:
    """transformers' greedy text."""
    text = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return text[0, len(prompt) :].tolist()


def ragged(prompts: list[Tensor]) -> dict[str, Tensor]:
    """Prompts of several lengths, padded on the left."""
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    ones = nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": ones}


def sentence(error: Exception, model: Any) -> str:
    """A refusal, which names the model and says what to do."""
    text = str(error)
    assert isinstance(error, (ValueError, TypeError)) and type(model).__name__ in text and ":" in text, repr(error)
    return text


@torch.no_grad()
def scored(model: Any) -> bool:
    """Whether a drafter can score states as the model does, of all tokens or of some in any order.

    Raises:
        AssertionError: it could, and scores otherwise, or it could not, and no sentence says so.
    """
    target = Target(model)
    try:
        target.check_states()
    except ValueError as error:
        sentence(error, model)
        return False
    logits, hidden = target.prefill([PROMPTS[1]], TreeCache(target.config, 1))
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))
    for vocabulary in (torch.arange(VOCAB), order, order[:9]):
        torch.testing.assert_close(target.logits(hidden[:, -1], vocabulary), logits[:, vocabulary])
    return True


def outcome(name: str) -> Outcome:
    """Let the engine write plainly, with trees, in a ragged batch and with trees in one, and compare.

    Raises:
        AssertionError: a text that is not transformers' own, or an error that is no sentence.
    """
    if name in NOT_BUILT:
        return Outcome("not built", NOT_BUILT[name])
    model = build(name)
    try:
        Target(model)
    except (TypeError, ValueError) as error:
        return Outcome("refused", sentence(error, model))
    loosen(model)
    texts = [own_text(model, prompt) for prompt in PROMPTS]
    assert len({token for text in texts for token in text}) > 7, f"a text of few tokens shows little: {texts}"
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": []}
    plain = [generate(model, prompt[None], **options).new_tokens[0] for prompt in PROMPTS]
    assert plain == texts, f"plainly {plain}, not {texts}"
    drafted = [
        generate(model, prompt[None], drafter=Through([text]), **options)
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    trees = [result.new_tokens[0] for result in drafted]
    assert trees == texts, f"with trees {trees}, not {texts}"
    accepted = sum(map(len, texts)) / sum(result.statistics.target_calls for result in drafted)
    assert accepted > 1.5, f"hardly a node is accepted: {accepted} tokens a call"
    try:
        together = generate(model, **ragged(PROMPTS), **options).new_tokens
    except ValueError as error:
        return Outcome("paths", sentence(error, model), scored(model))
    assert together == texts, f"in a ragged batch {together}, not {texts}"
    together = generate(model, **ragged(PROMPTS), drafter=Through(texts), **options).new_tokens
    assert together == texts, f"with trees in a ragged batch {together}, not {texts}"
    return Outcome("trees", scored=scored(model))


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_TEXT = {"trees": "all", "paths": "one prompt, one path", "refused": "-", "not built": "not tried"}


def row(name: str, found: Outcome) -> str:
    """A family's line in the docs."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    heads = "yes" if found.scored else "no" if found.kind in ("trees", "paths") else "-"
    # What follows the colon is the same for many.
    note = found.note.partition(": ")[0] if found.kind == "refused" else found.note if found.kind == "not built" else ""
    return f"| `{name}` | {kind} | {_TEXT[found.kind]} | {heads} | {note.removeprefix(kind).strip()} |"


def page(outcomes: dict[str, Outcome]) -> str:
    """The docs' page on models."""
    kinds = Counter(found.kind for found in outcomes.values())
    heads = sum(found.scored for found in outcomes.values())
    return f"""# Models

Which of transformers' causal language models the decoding room takes. A tiny random model is made for each entry of its
mapping (version {transformers.__version__}), with windows and chunks shorter than the prompts, and its greedy text by
`model.generate` is compared with ours: plain, with random trees through which that text runs, in a batch of prompts of
three lengths, and with trees in that batch. This page is written by `python -m tests.decoding.families`, and
`tests/decoding/test_families.py` holds each line of it.

Of {len(outcomes)} entries {len(outcomes) - kinds["not built"]} are built:

- {kinds["trees"]} write transformers' own text in all of these ways (`all`).
- {kinds["paths"]} tell places by where keys lie in the cache (no position ids, ALiBi, GPT-Neo's local layers). They write
  transformers' own text for one prompt at a time; of a drafted tree the path of first children is read, which leaves the law
  as it is. Batches are refused (`one prompt, one path`).
- {kinds["refused"]} are refused by a sentence (`-`): their layers keep a running state, an index or something else than keys and
  values, from which a rejected draft cannot be taken back.

Draft heads (Medusa, Hydra, Chimera, FSPAD) and early exits score states by the model's own head. That works for {heads} of
them; the others put more than a linear head between state and scores, and are refused there. A draft model
(`RecursiveSpeculation`) works for all that write at all. Chimera, FSPAD and Hydra's prefix layer are layers of the model's own
architecture; where none can be had alone they say so, too.

| model type | class | text | draft heads | why not |
| --- | --- | --- | --- | --- |
""" + "".join(row(name, found) + "\n" for name, found in outcomes.items())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page({name: outcome(name) for name in NAMES}))
