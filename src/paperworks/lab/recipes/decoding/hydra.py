"""Hydra draft heads and Medusa's against plain decoding, on a real model."""

from __future__ import annotations

from typing import Any

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run


@recipe(
    "hydra",
    baseline="plain decoding",
    tiny={
        "model": "tiny-random-llama",
        "prompt_count": 2,
        "new_tokens": 12,
        "train_tokens": 600,
        "epochs": 1.0,
        "draft_vocabulary": 64,
        "nodes": 4,
        "prefix_layer": True,
        "repeats": 1,
        "equality_prompts": 2,
    },
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "prompts": "mt_bench",
        "prompt_count": 80,
        "train_tokens": 2_000_000,
        "draft_vocabulary": 32_000,
        "nodes": 63,
        "prefix_layer": True,
    },
)
def hydra(
    run: Run,
    model: str = "smollm2-135m",
    prompts: str = "built-in",
    prompt_count: int = 8,
    new_tokens: int = 128,
    train_tokens: int = 40_000,
    epochs: float = 4.0,
    draft_vocabulary: int = 8192,
    nodes: int = 16,
    prefix_layer: bool = False,
    repeats: int = 1,
    equality_prompts: int = 4,
    seed: int = 0,
) -> None:
    """Hydra draft heads against plain decoding on the same prompts.

    Medusa heads and Hydra's are trained alike on text that the model writes itself, and decode held-out prompts
    greedily, turn by turn with plain decoding, transformers' own `generate` and its prompt look-up.

    Args:
        run: Keeps what is measured.
        model: Name of the target.
        prompts: Prompts to decode, built-in or mt_bench, evenly spread over the set.
        prompt_count: How many of them.
        new_tokens: Tokens to generate for each.
        train_tokens: Answer tokens the model writes to train the heads on.
        epochs: Passes over them.
        draft_vocabulary: Draft only the most frequent tokens, so many; 0 drafts all.
        nodes: Drafted tokens a call.
        prefix_layer: Train and measure Hydra++ too, whose heads read through an attention layer.
        repeats: Turns for each prompt.
        equality_prompts: Prompts whose text in float32 is compared with transformers' greedy text.
        seed: Of text, order and weights.
    """
    import torch

    from paperworks.decoding import Drafter, Hydra, Medusa, generate
    from paperworks.lab.drafting import cpu_friendly_dtype, prompt_ids, trained

    target, tokenizer, ids = prompt_ids(model, prompts, prompt_count, dtype=cpu_friendly_dtype())
    heads: dict[str, tuple[type[Drafter], dict[str, Any]]] = {
        "Medusa": (Medusa, {}),
        "Hydra": (Hydra, {}),
    }
    if prefix_layer:
        heads["Hydra++"] = (Hydra, {"prefix_layer": True, "layers": 4})
    drafters = {
        name: trained(
            run, name, kind, options, target, tokenizer, model=model, tokens=train_tokens, epochs=epochs,
            vocabulary=draft_vocabulary, nodes=nodes, seed=seed,
        )
        for name, (kind, options) in heads.items()
    }  # fmt: skip

    accepted: dict[str, dict[int, float]] = {name: {} for name in drafters}
    drafting: dict[str, list[float]] = {name: [] for name in drafters}

    def decode(name: str | None) -> Any:
        def call(index: int) -> int:
            result = generate(target, ids[index], drafter=drafters[name] if name else None, max_new_tokens=new_tokens)
            if name:
                cost = result.statistics
                accepted[name][index] = cost.accepted_per_call
                drafting[name].append(cost.drafting_seconds / (cost.drafting_seconds + cost.target_seconds))
            return len(result.new_tokens[0])

        return call

    def theirs(**options: Any) -> Any:
        def call(index: int) -> int:
            with torch.inference_mode():
                text = target.generate(ids[index], max_new_tokens=new_tokens, do_sample=False, **options)
            return int(text.shape[1] - ids[index].shape[1])

        return call

    speed_up = run.compare(
        baseline=("plain decoding", decode(None)),
        method={
            "transformers generate": theirs(),
            "transformers prompt look-up": theirs(prompt_lookup_num_tokens=10),
            **{name: decode(name) for name in drafters},
        },
        over=range(len(ids)),
        repeats=repeats,
        unit="tokens/s",
    )
    for name in drafters:
        run.record(
            "accepted per call", _mean(list(accepted[name].values())), unit="tokens", better="higher", series=name
        )
        run.record("drafting share", _mean(drafting[name]), unit="of time", better="lower", series=name)
    order = range(len(ids))
    for name in (name for name in drafters if name != "Medusa"):
        run.ratio(
            "accepted per call, ratio",
            method=[accepted[name][index] for index in order],
            baseline=[accepted["Medusa"][index] for index in order],
            better="higher",
            series=name,
            against="Medusa",
        )
    if equality_prompts:
        _compare_texts(run, model, prompts, equality_prompts, new_tokens, drafters)
    run.figure(_figure(speed_up, {name: _mean(list(values.values())) for name, values in accepted.items()}))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _compare_texts(run: Run, model: str, prompts: str, count: int, new_tokens: int, drafters: dict[str, Any]) -> None:
    """Record for how many prompts the text in float32 is transformers' own greedy text, token for token."""
    import copy

    import torch

    from paperworks.decoding import generate
    from paperworks.lab.drafting import prompt_ids

    target, _, ids = prompt_ids(model, prompts, count, dtype=torch.float32)
    rows = {"plain decoding": None, **{name: copy.deepcopy(drafter).float() for name, drafter in drafters.items()}}
    same = dict.fromkeys(rows, 0)
    for prompt in run.progress(ids, "comparing texts in float32"):
        with torch.inference_mode():
            expected = target.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
        for name, drafter in rows.items():
            text = generate(target, prompt, drafter=drafter, max_new_tokens=new_tokens).sequences
            same[name] += text.tolist() == expected.tolist()
    for name, number in same.items():
        run.record("same text", number, unit=f"of {len(ids)}", better="higher", series=name)


def _figure(speed_up: dict[str, Any], accepted: dict[str, float]) -> Any:
    """Speed against plain decoding with intervals, and accepted tokens beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    names = list(speed_up)[::-1]
    values = [speed_up[name].value for name in names]
    lows = [speed_up[name].value - (speed_up[name].low or speed_up[name].value) for name in names]
    highs = [(speed_up[name].high or speed_up[name].value) - speed_up[name].value for name in names]
    colours = ["#1f6f8b" if name.startswith("Hydra") else "#a9b4bc" for name in names]
    left.barh(names, values, xerr=[lows, highs], color=colours, ecolor="#333333", capsize=3)
    left.axvline(1, color="#333333", linewidth=0.8)
    left.set_xlabel("speed against plain decoding")
    right.bar(list(accepted), list(accepted.values()), color=["#a9b4bc", "#1f6f8b", "#1f6f8b"][: len(accepted)])
    right.axhline(1, color="#333333", linewidth=0.8)
    right.set_ylabel("tokens a target call")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Hydra: draft heads that see what was drafted before them", fontsize=11)
    return figure
