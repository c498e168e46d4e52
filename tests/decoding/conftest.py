"""Tiny models of every supported family, and exhaustive enumeration of what a decoder may do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from paperworks.decoding import FSPAD, Chimera, Hydra, Medusa, RecursiveSpeculation, StochasticBeam, generate
from paperworks.decoding.drafter import Drafter

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
FAMILIES = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, **SIZES),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, **SIZES),
    "qwen3": lambda vocab: Qwen3Config(vocab_size=vocab, **SIZES),
    "gemma3": lambda vocab: Gemma3TextConfig(
        vocab_size=vocab, sliding_window=6, layer_types=["sliding_attention", "full_attention"], **SIZES
    ),
}
TREE = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
_GPT = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
# The families that drafters and copies are held to besides: soft-caps, scales, learned positions, windows without kinds.
CONTRACT = {
    **FAMILIES,
    "mistral": lambda vocab: MistralConfig(vocab_size=vocab, sliding_window=6, **SIZES),
    "gemma2": lambda vocab: Gemma2Config(
        vocab_size=vocab, sliding_window=6, final_logit_softcapping=5.0, attn_logit_softcapping=5.0, **SIZES
    ),
    "cohere": lambda vocab: CohereConfig(vocab_size=vocab, logit_scale=0.25, **SIZES),
    "granite": lambda vocab: GraniteConfig(vocab_size=vocab, logits_scaling=3.0, embedding_multiplier=2.0, **SIZES),
    "gpt2": lambda vocab: GPT2Config(**_GPT | {"vocab_size": vocab}),
    "codegen": lambda vocab: CodeGenConfig(**_GPT | {"vocab_size": vocab}, n_ctx=64, rotary_dim=4),
    "gpt_neox": lambda vocab: GPTNeoXConfig(vocab_size=vocab, **SIZES),
    "opt": lambda vocab: OPTConfig(
        vocab_size=vocab, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip
# Heads with a bias that their families do not have: beside a cap, a factor and a divisor.
BIASED = ("gemma2", "cohere", "granite")
DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "medusa": lambda model: Medusa.from_target(model, heads=3, tree=TREE),
    "hydra": lambda model: Hydra.from_target(model, heads=3, tree=TREE, tie_lm_head=False),
    "hydra++": lambda model: Hydra.from_target(model, heads=3, tree=TREE, layers=3, prefix_layer=True),
    "chimera": lambda model: Chimera.from_target(model, heads=3, tree=TREE),
    "chimera, untied": lambda model: Chimera.from_target(
        model, heads=3, tree=TREE, context_layers=2, tie_lm_head=False, memoise=True
    ),
    "eagle-2": lambda model: FSPAD.from_target(
        model, nodes=6, depth=3, top_k=2, feature_sampling=False, partial_alignment=False
    ),
    "fspad": lambda model: FSPAD.from_target(model, nodes=6, depth=3, top_k=2),
    "rsd-s": lambda model: RecursiveSpeculation.from_target(
        model, draft=make_model(vocab=len(model.get_output_embeddings().weight)), tree=StochasticBeam(2, 3)
    ),
}


def make_model(
    family: str = "llama", vocab: int = 40, dtype: torch.dtype = torch.float64, implementation: str = "sdpa"
):
    """A random model of a family whose law is far from uniform."""
    torch.manual_seed(7)
    # These two have no other attention.
    implementation = "eager" if family in ("gemma2", "codegen") else implementation
    model = AutoModelForCausalLM.from_config(CONTRACT[family](vocab), attn_implementation=implementation)
    if family in BIASED:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocab))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def scramble(drafter: Drafter) -> Drafter:
    """Random weights, so that drafts vary and are mostly wrong."""
    torch.manual_seed(11)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return drafter.eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def prompt() -> Tensor:
    return torch.tensor([[3, 1, 2, 0, 2]])


def enumerate_law(run: Callable[[], Hashable], monkeypatch: pytest.MonkeyPatch) -> dict[Hashable, float]:
    """The exact law of what `run` returns, by running it once for every sequence of random choices it can make."""
    law: dict[Hashable, float] = defaultdict(float)
    pending: list[tuple[int, ...]] = [()]
    while pending:
        given, made, chance = pending.pop(), [], [1.0]

        def choose(probabilities: Tensor, generator: object = None) -> Tensor:
            flat = probabilities.reshape(-1).tolist()
            assert len(flat) == probabilities.shape[-1], "one row at a time"
            if len(made) < len(given):
                choice = given[len(made)]
            else:
                choice, *others = (index for index, p in enumerate(flat) if p > 0)
                pending.extend((*made, other) for other in others)
            made.append(choice)
            chance[0] *= flat[choice]
            return torch.full(probabilities.shape[:-1], choice)

        with monkeypatch.context() as patch:
            patch.setattr("paperworks.decoding.acceptance.draw", choose)
            law[run()] += chance[0]
    assert abs(sum(law.values()) - 1) < 1e-12
    return law


def model_law(model: torch.nn.Module, prompt: Tensor, tokens: int) -> dict[tuple[int, ...], float]:
    """The model's own law of the next `tokens` tokens, by forward passes over every continuation."""
    law = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for past, chance in law.items():
            ids = torch.cat([prompt, torch.tensor([past], dtype=torch.long)], dim=1)
            with torch.no_grad():
                probabilities = model(ids).logits[0, -1].softmax(-1).tolist()
            longer |= {(*past, token): chance * p for token, p in enumerate(probabilities)}
        law = longer
    return law


def distance(one: dict, other: dict) -> float:
    """Largest difference of probability."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def output(model: torch.nn.Module, prompt: Tensor, **options: object) -> tuple[int, ...]:
    return tuple(generate(model, prompt, eos_token_id=[], **options).new_tokens[0])
