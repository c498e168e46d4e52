"""A large model that takes over where a small one is unsure, against taking over at random, at one cost."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from paperworks.decoding import EntropyAdaptiveDecoding, Generation
    from paperworks.decoding.entropy_adaptive import Model as Writer
    from paperworks.decoding.entropy_adaptive import SwitchedGeneration
    from paperworks.lab.measure import Effect

_SHARES = (0.25, 0.5, 0.75)


@recipe(
    "entropy-adaptive-decoding",
    baseline="large alone",
    gpu=4,
    columns=(
        "speed-up",
        "divergence",
        "large fraction",
        "cost",
        "real cost",
        "divergence at equal cost, ratio against random",
    ),
    tiny={
        "model": "tiny-random-llama",
        "small": "First layer",
        "prompt_count": 3,
        "calibration_prompts": 2,
        "new_tokens": 16,
        "min_stay": 2,
        "train_tokens": 300,
        "epochs": 1.0,
        "vocabulary": 64,
    },
    large={
        "model": "Qwen/Qwen2.5-14B-Instruct",
        "small": "Qwen/Qwen2.5-1.5B-Instruct",
        "prompts": "gsm8k",
        "prompt_count": 200,
        "calibration_prompts": 20,
        "new_tokens": 400,
    },
)
def entropy_adaptive_decoding(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    small: Annotated[str, Model("*", "First layer", "First 4 layers")] = "First 4 layers",
    prompts: Annotated[str, Data("built-in", "mt_bench", "gsm8k")] = "built-in",
    prompt_count: Annotated[int, Between(1, 48)] = 12,
    calibration_prompts: Annotated[int, Between(1, 16)] = 4,
    new_tokens: Annotated[int, Between(1, 256)] = 64,
    window: Annotated[int, Between(1, 20)] = 5,
    min_stay: Annotated[int, Between(0, 40)] = 10,
    temperature: Annotated[float, Between(0, 4)] = 0.7,
    train_tokens: Annotated[int, Between(1, 96_000)] = 24_000,
    epochs: Annotated[float, Between(0, 12)] = 3.0,
    vocabulary: Annotated[int, Between(0, 32_768)] = 8192,
    seed: int = 0,
) -> None:
    """The whole curve of quality against cost, beside random, evenly spread and whole-prompt use of the large model.

    Texts are sampled. How far they are from the large model's own is measured by the Kullback-Leibler divergence of their
    law from its law, in bits a token: the chain rule makes it the mean over tokens of the divergence of the writer's law
    from the large model's, 0 for tokens that this wrote. For three shares of the text the threshold is calibrated on
    other prompts. Random turns are the method's own for the same prompt, begun at a random place, so that their lengths
    and cost are the same.

    Args:
        run: Keeps what is measured.
        model: Name of the large model.
        small: Name of a smaller model with the same tokenizer; or "First 4 layers" or "First layer" of the large one,
            which learn its law from text that it writes itself.
        prompts: Prompts to continue, evenly spread over their set: built-in, mt_bench, gsm8k, with which accuracy is measured
            too, or a text file of your own with one a line.
        prompt_count: How many of them.
        calibration_prompts: Others, to find thresholds on.
        new_tokens: Tokens to write for each at most.
        window: Laws over which entropy is averaged.
        min_stay: Tokens between two switches at least.
        temperature: Of the texts.
        train_tokens: Answer tokens the large model writes for the first layers to learn from.
        epochs: Passes over them.
        vocabulary: Most frequent tokens whose scores they learn; 0 for all. As embedding and head stay the large
            model's, that settles the states, and with them the scores of all other tokens.
        seed: Of text, order and random turns.
    """
    from transformers import SuppressTokensLogitsProcessor

    from paperworks.decoding import EntropyAdaptiveDecoding, EntropySwitch, Target, generate
    from paperworks.recipes.decoding.drafting import DRAFTERS, cpu_friendly_dtype, encode, load_target, trained

    if not temperature > 0:
        raise UsageError(f"temperature is above 0 where texts are sampled, given {temperature}")
    questions, numbers = _questions(prompts, calibration_prompts + prompt_count)
    large, tokenizer = load_target(model, dtype=cpu_friendly_dtype())
    if DRAFTERS.get(small, ("",))[0] == "RecursiveSpeculation":
        student: Any = trained(
            run, small, large, tokenizer, model=model, tokens=train_tokens, epochs=epochs,
            vocabulary=vocabulary, nodes=1, seed=seed,
        )  # fmt: skip
        little, words = student.draft, tokenizer
    else:
        little, words = load_target(small, dtype=cpu_friendly_dtype())
    ids = [encode(tokenizer, text).to(large.device) for text in questions]
    rule = EntropySwitch(math.inf, window, min_stay)
    decoding = EntropyAdaptiveDecoding(little, large, rule, tokenizers=(words, tokenizer))
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature}
    # Where the head is padded, rows that stand for no token are left out here too.
    padding = range(decoding.vocabulary, Target(large).vocab_size)
    process = [SuppressTokensLogitsProcessor(list(padding), device=large.device)] if padding else None
    thresholds = {
        share: decoding.calibrate(ids[:calibration_prompts], share, generator=_seeded(large, seed), **options)
        for share in run.progress(_SHARES, "calibrating thresholds")
    }
    ids, numbers = ids[calibration_prompts:], numbers[calibration_prompts:]
    plain: dict[int, Generation] = {}
    made: dict[str, dict[int, SwitchedGeneration]] = {}

    def large_alone(index: int) -> int:
        plain[index] = generate(
            large, ids[index], generator=_seeded(large, seed + index), logits_processor=process, **options
        )
        return len(plain[index].new_tokens[0])

    def writing(name: str, switch: Callable[[int], Any]) -> Callable[[int], int]:
        made[name] = {}

        def call(index: int) -> int:
            decoding.switch = switch(index)
            made[name][index] = decoding.generate(ids[index], generator=_seeded(large, seed + index), **options)
            return len(made[name][index].models)

        return call

    methods = {"small alone": writing("small alone", lambda index: rule)}
    for share, threshold in thresholds.items():
        own = f"EAD {share:.0%}"
        methods[own] = writing(own, lambda index, tau=threshold: replace(rule, threshold=tau))  # type: ignore[misc]
        for kind, turns in (("random", _begun_anywhere), ("even", _spread_evenly)):
            methods[f"{kind} {share:.0%}"] = writing(
                f"{kind} {share:.0%}",
                lambda index, own=own, turns=turns: Turns(turns(made[own][index].models, seed + index)),  # type: ignore[misc]
            )
    speed_up = run.compare(
        baseline=("large alone", large_alone),
        method=methods,
        over=range(len(ids)),
        repeats=1,
        unit="tokens/s",
    )
    order = range(len(ids))
    switched = {name: [rows[index] for index in order] for name, rows in made.items()}
    texts: dict[str, Sequence[Any]] = {"large alone": [plain[index] for index in order], **switched}
    divergence: dict[str, list[float]] = {name: [] for name in texts}
    surprise: dict[str, list[float]] = {name: [] for name in texts}
    for index in run.progress(order, "reading all texts with both models"):
        behind = [rows[index] for rows in texts.values()]
        for name, scores in zip(texts, _read(decoding, ids[index], behind, temperature), strict=True):
            divergence[name].append(scores[0])
            surprise[name].append(scores[1])
    right: dict[str, list[float]] = {}
    for name, rows in texts.items():
        run.record("divergence", fmean(divergence[name]), unit="bits a token", better="lower", series=name)
        run.record("perplexity to large", 2 ** fmean(surprise[name]), better="lower", series=name)
        if prompts == "gsm8k":
            found = [_last_number(tokenizer.decode(text.new_tokens[0])) for text in rows]
            right[name] = [float(one == other) for one, other in zip(found, numbers, strict=True)]
            run.record("accuracy", fmean(right[name]), unit="of answers", better="higher", series=name)
    for name, written in switched.items():
        for what, unit in (
            ("large_fraction", "of tokens"), ("cost", "of large alone"), ("real_cost", "of large alone"),
            ("switches", "a text"),
        ):  # fmt: skip
            value = fmean(getattr(text, what) for text in written)
            run.record(what.replace("_", " "), value, unit=unit, better="lower", series=name)
    for share in _SHARES:
        # A prompt that is the large model's with the chance f has no divergence then, and the small one's otherwise.
        parts = zip(switched[f"EAD {share:.0%}"], divergence["small alone"], strict=True)
        divergence[f"whole prompts {share:.0%}"] = [(1 - text.large_fraction) * whole for text, whole in parts]
    advantage: dict[tuple[str, str], Effect] = {}
    # Lists show the last.
    for kind in ("whole prompts", "even", "random"):
        for series, shares in (*((f"EAD {share:.0%}", (share,)) for share in _SHARES), ("EAD, all shares", _SHARES)):
            baseline = _mean(divergence, kind, shares)
            # Where the large model wrote everything nothing is left to compare.
            if any(baseline):
                advantage[kind, series] = run.ratio(
                    "divergence at equal cost, ratio", method=_mean(divergence, "EAD", shares), baseline=baseline,
                    better="lower", series=series, against=kind,
                )  # fmt: skip
    for name in (f"EAD {share:.0%}" for share in _SHARES):
        if any(divergence["small alone"]):
            run.ratio(
                "divergence left", method=divergence[name], baseline=divergence["small alone"], better="lower",
                series=name, against="small alone",
            )  # fmt: skip
        if any(right.get("large alone", ())):
            run.ratio(
                "accuracy kept", method=right[name], baseline=right["large alone"], series=name, against="large alone"
            )
    run.figure(_figure(switched, divergence, advantage, speed_up))


@dataclass
class Turns:
    """A switch that is not asked: who writes is laid down beforehand, and begins anew at the end."""

    turns: Sequence[Writer]
    rolling: float = math.nan

    def __post_init__(self) -> None:
        self.made = 0
        self.active = self.writer = self.turns[0]

    def step(self, entropy: float) -> Writer:
        """The model for the next token."""
        self.made += 1
        self.writer, self.active = self.active, self.turns[self.made % len(self.turns)]
        return self.active


def _begun_anywhere(turns: Sequence[Writer], seed: int) -> Sequence[Writer]:
    first = random.Random(seed).randrange(len(turns))
    return [*turns[first:], *turns[:first]]


def _spread_evenly(turns: Sequence[Writer], seed: int) -> Sequence[Writer]:
    """As many tokens by the large model, at equal distances."""
    count, total = turns.count("large"), len(turns)
    return ["large" if (t + 1) * count // total > t * count // total else "small" for t in range(total)]


def _questions(name: str, count: int) -> tuple[list[str], list[float]]:
    """Evenly spread prompts, and the numbers that answer them, 0 where none does."""
    from paperworks.hub import load_dataset
    from paperworks.hub import prompts as load_prompts

    if name == "gsm8k":
        pairs = [(item.question, item.number) for item in load_dataset("gsm8k")]
    else:
        pairs = [(text, 0.0) for text in load_prompts(name)]
    if not 2 <= count <= len(pairs):
        raise UsageError(f"{name} has {len(pairs)} prompts, so {count} of them cannot be taken: ask for fewer")
    pairs = pairs[:: len(pairs) // count][:count]
    return [text for text, _ in pairs], [number for _, number in pairs]


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _read(
    decoding: EntropyAdaptiveDecoding, prompt: Any, texts: Sequence[Any], temperature: float
) -> list[tuple[float, float]]:
    """For each text behind one prompt, in bits a token: its law's divergence from the large model's, and its surprise."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def log_law(model: Any) -> torch.Tensor:
        begin = model(prompt, use_cache=True, logits_to_keep=1)
        begin.past_key_values.batch_repeat_interleave(len(tokens))
        # Padding stands behind the tokens that count, which do not see it.
        rest = model(tokens[:, :-1], past_key_values=begin.past_key_values).logits
        logits = torch.cat([begin.logits.expand(len(tokens), -1, -1), rest], dim=1)[..., : decoding.vocabulary]
        return (logits.float() / temperature).log_softmax(-1)

    new = [text.sequences[0, prompt.shape[1] :] for text in texts]
    tokens = pad_sequence(new, batch_first=True)
    with torch.inference_mode():
        small, large = log_law(decoding.small), log_law(decoding.large)
        divergence = torch.nn.functional.kl_div(large, small, reduction="none", log_target=True).sum(-1) / math.log(2)
        surprise = -large.gather(-1, tokens[..., None])[..., 0] / math.log(2)
    scores = []
    for text, row, far, near in zip(texts, new, divergence, surprise, strict=True):
        by_small = torch.tensor([name == "small" for name in getattr(text, "models", ())] or [False], device=far.device)
        scores.append((float((far[: len(row)] * by_small).mean()), float(near[: len(row)].mean())))
    return scores


def _seeded(model: Any, seed: int) -> Any:
    import torch

    return torch.Generator(model.device).manual_seed(seed)


def _mean(values: Mapping[str, Sequence[float]], kind: str, shares: Sequence[float]) -> list[float]:
    """Mean over shares for each prompt."""
    return [fmean(row) for row in zip(*(values[f"{kind} {share:.0%}"] for share in shares), strict=True)]


def _figure(
    texts: Mapping[str, Sequence[SwitchedGeneration]],
    divergence: Mapping[str, Sequence[float]],
    advantage: Mapping[tuple[str, str], Effect],
    speed_up: Mapping[str, Effect],
) -> Any:
    """Quality against the paper's cost, the same against measured time, and the advantage at equal cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    cost = {name: fmean(text.cost for text in rows) for name, rows in texts.items()} | {"large alone": 1.0}
    looks = {"EAD": ("#1f6f8b", "o-"), "random": ("#a9b4bc", "s--"), "even": ("#c9a66b", "^--")}
    for kind, (colour, style) in looks.items():
        names = ["small alone", *(f"{kind} {share:.0%}" for share in _SHARES), "large alone"]
        height = [fmean(divergence[name]) for name in names]
        left.plot([cost[name] for name in names], height, style, color=colour, label=kind)
        seconds = [1 / speed_up[name].value if name in speed_up else 1.0 for name in names]
        middle.plot(seconds, height, style, color=colour, label=kind)
    ends = [(cost[name], fmean(divergence[name])) for name in ("small alone", "large alone")]
    left.plot(*zip(*ends, strict=True), ":", color="#333333", label="whole prompts")
    left.set(xlabel="parameters a token, of large alone", ylabel="divergence from large alone, bits a token")
    middle.set(xlabel="time, of large alone")
    for place, (kind, (colour, _)) in enumerate(list(looks.items())[1:]):
        found = {
            share: advantage[kind, f"EAD {share:.0%}"] for share in _SHARES if (kind, f"EAD {share:.0%}") in advantage
        }
        ratios = list(found.values())
        values = [ratio.value for ratio in ratios]
        spread = [
            [ratio.value - ratio.ends[0] for ratio in ratios],
            [ratio.ends[1] - ratio.value for ratio in ratios],
        ]
        at = [share + 0.02 * (place - 0.5) for share in found]
        right.errorbar(at, values, yerr=spread, fmt="o", color=colour, capsize=3, label=f"against {kind}")
    right.axhline(1, color="#333333", linewidth=0.8)
    right.set(xlabel="share of the large model asked for", ylabel="divergence at equal cost, ratio")
    left.legend(frameon=False)
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Entropy adaptive decoding: what the large model is worth where the small one is unsure", fontsize=11
    )
    return figure
