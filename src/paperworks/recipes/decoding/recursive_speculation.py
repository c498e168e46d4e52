"""Drafts sampled without replacement against drafts that may repeat, at one budget of verified tokens."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

_SINGLE, _REPEATING = "single sequence", "independent sequences"
_OURS = ("RSD-C", "RSD-S")


@recipe(
    "recursive-speculation",
    baseline="plain decoding",
    gpu=5,
    columns=("speed", "speed-up", "accepted per call", "memory-bound speed-up", "drafting share"),
    tiny={
        "model": "tiny-random-llama",
        "prompt_count": 2,
        "new_tokens": 12,
        "train_tokens": 600,
        "epochs": 1.0,
        "draft_vocabulary": 64,
        "nodes": 4,
        "depth": 2,
        "repeats": 1,
        "equality_prompts": 2,
    },
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "draft": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "prompts": "mt_bench",
        "prompt_count": 80,
        "draft_vocabulary": 0,
        "nodes": 30,
        "depth": 5,
    },
)
def recursive_speculation(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    draft: Annotated[str, Model("*", "first layer")] = "first layer",
    prompts: Annotated[str, Data("built-in", "mt_bench")] = "built-in",
    prompt_count: Annotated[int, Between(1, 32)] = 8,
    new_tokens: Annotated[int, Between(1, 384)] = 96,
    train_tokens: Annotated[int, Between(1, 96_000)] = 24_000,
    epochs: Annotated[float, Between(0, 12)] = 3.0,
    draft_vocabulary: Annotated[int, Between(0, 16_384)] = 4096,
    nodes: Annotated[int, Between(1, 32)] = 8,
    depth: Annotated[int, Between(1, 8)] = 2,
    temperature: Annotated[float, Between(0, 4)] = 1.0,
    top_p: Annotated[float, Between(0, 1)] = 1.0,
    repeats: Annotated[int, Between(1, 4)] = 1,
    equality_prompts: Annotated[int, Between(0, 40)] = 20,
    seed: int = 0,
) -> None:
    """Trees drawn without replacement (RSD-C, RSD-S) against a single sequence and independent ones.

    All four verify as many drafted tokens a target call: one sequence of them all, or trees of `depth`. Text is sampled,
    turn by turn with plain decoding, and follows the target's law exactly with each, so that accepted tokens and speed
    are all there is to compare.

    Args:
        run: Keeps what is measured.
        model: Name of the target.
        draft: Name of a smaller model with the same tokenizer, or "first layer": a copy of the target's first layer
            between its embedding and its head, trained on text that the target writes itself.
        prompts: Prompts to decode, built-in or mt_bench, evenly spread over the set.
        prompt_count: How many of them.
        new_tokens: Tokens to generate for each.
        train_tokens: Answer tokens the model writes to train the first layer on.
        epochs: Passes over them.
        draft_vocabulary: Draft only the most frequent tokens, so many; 0 drafts all. A named draft always drafts all.
        nodes: Drafted tokens a call, a multiple of `depth`.
        depth: Of the trees.
        temperature: Of target and draft alike.
        top_p: Probability of the most likely tokens that both sample from.
        repeats: Texts of each prompt.
        equality_prompts: Prompts whose text at temperature 0 and in float32 is compared with transformers' greedy text.
        seed: Of text, order and weights.
    """
    import torch

    from paperworks.decoding import (
        ConstantBranching,
        Drafter,
        IndependentSequences,
        RecursiveSpeculation,
        StochasticBeam,
        generate,
    )
    from paperworks.decoding.recursive_speculation import TreeSampler
    from paperworks.hub import load_model
    from paperworks.nn import pack_linears
    from paperworks.recipes.decoding.drafting import (
        compare_texts,
        cpu_friendly_dtype,
        prompt_ids,
        speed_figure,
        trained,
    )

    if not temperature > 0:
        raise UsageError(f"text is sampled at a temperature above 0, given {temperature}")
    if depth < 1 or nodes < depth or nodes % depth:
        raise UsageError(f"a tree of {nodes} nodes is not {depth} deep everywhere: give nodes as a multiple of depth")
    target, tokenizer, ids = prompt_ids(model, prompts, prompt_count, dtype=cpu_friendly_dtype())
    options: dict[str, Any]
    if draft == "first layer":
        source: Any = trained(
            run, "First layer", target, tokenizer, model=model, tokens=train_tokens, epochs=epochs,
            vocabulary=draft_vocabulary, nodes=nodes, seed=seed,
        )  # fmt: skip
        options = {"draft": source.draft, "vocabulary": source.vocabulary}
    else:
        options = {"draft": pack_linears(load_model(draft, dtype=target.dtype, device=target.device)[0])}
    width = nodes // depth
    trees: dict[str, TreeSampler] = {
        _SINGLE: ConstantBranching((1,) * nodes),
        _REPEATING: IndependentSequences(width, depth),
        "RSD-C": ConstantBranching((width,) + (1,) * (depth - 1)),
        "RSD-S": StochasticBeam(width, depth),
    }
    drafters: dict[str, Drafter] = {
        name: RecursiveSpeculation.from_target(target, tree=tree, **options) for name, tree in trees.items()
    }
    if equality_prompts:
        ours = {name: drafters[name] for name in _OURS}
        compare_texts(run, model, prompts, equality_prompts, new_tokens, ours)
    share = _share(drafters[_SINGLE], target)
    emitted: dict[str, list[list[int]]] = {name: [[] for _ in ids] for name in drafters}
    calls: dict[str, list[int]] = {name: [0] * len(ids) for name in drafters}
    drafting: dict[str, list[float]] = {name: [] for name in drafters}
    generators = {name: torch.Generator(target.device).manual_seed(seed) for name in ("", *drafters)}

    def decode(name: str) -> Callable[[int], int]:
        def call(index: int) -> int:
            result = generate(
                target, ids[index], drafter=drafters.get(name), max_new_tokens=new_tokens, temperature=temperature,
                top_p=top_p, generator=generators[name],
            )  # fmt: skip
            if name:
                cost = result.statistics
                emitted[name][index] += cost.emitted[0]
                calls[name][index] = cost.target_calls
                drafting[name].append(cost.drafting_seconds / (cost.drafting_seconds + cost.target_seconds))
            return len(result.new_tokens[0])

        return call

    speed_up = run.compare(
        baseline=("plain decoding", decode("")),
        method={name: decode(name) for name in drafters},
        over=range(len(ids)),
        repeats=repeats,
        unit="tokens/s",
    )
    # A text that ends with its first token needs no call: as if decoded plainly.
    efficiency = {name: [fmean(tokens or [1]) for tokens in rows] for name, rows in emitted.items()}
    for name, tree in trees.items():
        tau = fmean(efficiency[name])
        bound = tau / (share * tree.depth + 1)
        run.record("accepted per call", tau, unit="tokens", better="higher", series=name)
        run.record("calls", sum(calls[name]), unit="passes", better="lower", series=name)
        run.record("drafting share", fmean(drafting[name]), unit="of time", better="lower", series=name)
        run.record("memory-bound speed-up", bound, unit="x", better="higher", series=name)
    # The paper's claim comes last, for lists show the last.
    for against in (_REPEATING, _SINGLE):
        for name in _OURS:
            run.ratio(
                "accepted per call, ratio",
                method=efficiency[name],
                baseline=efficiency[against],
                better="higher",
                series=name,
                against=against,
            )
    means = {name: fmean(values) for name, values in efficiency.items()}
    run.figure(speed_figure(f"Drafts without replacement: {nodes} drafted tokens a call", speed_up, means, _SINGLE))


def _share(drafter: Any, target: Any) -> float:
    """Weights that a pass of the draft reads, over the target's: of its head only the rows of the vocabulary."""
    head = drafter.draft.get_output_embeddings().weight
    unread = 0 if drafter.vocabulary is None else (len(head) - len(drafter.vocabulary)) * head.shape[1]
    weights = sum(parameter.numel() for parameter in drafter.draft.parameters()) - unread
    return float(weights / sum(parameter.numel() for parameter in target.parameters()))
