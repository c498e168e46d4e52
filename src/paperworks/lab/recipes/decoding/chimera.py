"""Chimera's draft network and Medusa's independent heads against plain decoding, on a real model."""

from __future__ import annotations

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run


@recipe(
    "chimera",
    baseline="plain decoding",
    tiny={
        "model": "tiny-random-llama",
        "prompt_count": 2,
        "new_tokens": 12,
        "train_tokens": 600,
        "epochs": 1.0,
        "draft_vocabulary": 64,
        "nodes": 4,
        "ablations": True,
        "repeats": 1,
        "equality_prompts": 2,
    },
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "prompts": "mt_bench",
        "prompt_count": 80,
        "train_tokens": 2_000_000,
        "draft_vocabulary": 32_000,
        "nodes": 23,
        "ablations": True,
    },
)
def chimera(
    run: Run,
    model: str = "smollm2-135m",
    prompts: str = "built-in",
    prompt_count: int = 8,
    new_tokens: int = 96,
    train_tokens: int = 24_000,
    epochs: float = 3.0,
    draft_vocabulary: int = 4096,
    nodes: int = 8,
    ablations: bool = False,
    repeats: int = 1,
    equality_prompts: int = 20,
    seed: int = 0,
) -> None:
    """Chimera against plain decoding and Medusa's heads on the same prompts.

    Both are trained alike on text that the model writes itself, and decode held-out prompts greedily, turn by turn with
    plain decoding, transformers' own `generate` and its prompt look-up.

    Args:
        run: Keeps what is measured.
        model: Name of the target.
        prompts: Prompts to decode, built-in or mt_bench, evenly spread over the set.
        prompt_count: How many of them.
        new_tokens: Tokens to generate for each.
        train_tokens: Answer tokens the model writes to train the drafters on.
        epochs: Passes over them.
        draft_vocabulary: Draft only the most frequent tokens, so many; 0 drafts all.
        nodes: Drafted tokens a call.
        ablations: Train and measure Chimera without its trigrams, and without its context encoder, too.
        repeats: Turns for each prompt.
        equality_prompts: Prompts whose text in float32 is compared with transformers' greedy text.
        seed: Of text, order and weights.
    """
    from paperworks.lab.drafting import pit

    pit(
        run,
        ["Medusa", "Chimera", *(["Chimera, no trigrams", "Chimera, no context"] if ablations else [])],
        against="Medusa",
        title="Chimera: a draft network that sees every earlier token",
        model=model,
        prompts=prompts,
        prompt_count=prompt_count,
        new_tokens=new_tokens,
        train_tokens=train_tokens,
        epochs=epochs,
        draft_vocabulary=draft_vocabulary,
        nodes=nodes,
        repeats=repeats,
        equality_prompts=equality_prompts,
        seed=seed,
    )
