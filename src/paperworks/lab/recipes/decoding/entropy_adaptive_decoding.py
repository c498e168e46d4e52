"""A large model that takes over where a small one is unsure, against taking over at random, at one cost."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from paperworks.errors import UsageError
from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from paperworks.decoding import Generation
    from paperworks.decoding.entropy_adaptive import Model, SwitchedGeneration
    from paperworks.lab.measure import Ratio

_SHARES = (0.25, 0.5, 0.75)


@recipe(
    "entropy-adaptive-decoding",
    baseline="large alone",
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
    model: str = "smollm2-135m",
    small: str = "First 4 layers",
    prompts: Literal["built-in", "mt_bench", "gsm8k"] = "built-in",
    prompt_count: int = 12,
    calibration_prompts: int = 4,
    new_tokens: int = 64,
    window: int = 5,
    min_stay: int = 10,
    train_tokens: int = 24_000,
    epochs: float = 3.0,
    vocabulary: int = 8192,
    seed: int = 0,
) -> None:
    """The whole curve of quality against cost, beside random, evenly spread and whole-prompt use of the large model.

    Texts are greedy. Their quality is the share of tokens that are the large model's own choice behind the text before
    them: 1 for the large model alone. For three shares of the text the threshold is calibrated on other prompts. Random
    turns are the method's own for the same prompt, begun at a random place, so that their lengths and cost are the same.

    Args:
        run: Keeps what is measured.
        model: Name of the large model.
        small: Name of a smaller model with the same tokenizer; or "First 4 layers" or "First layer" of the large one,
            which learn its law from text that it writes itself.
        prompts: Prompts to continue, evenly spread over their set; with gsm8k accuracy is measured too.
        prompt_count: How many of them.
        calibration_prompts: Others, to find thresholds on.
        new_tokens: Tokens to write for each at most.
        window: Laws over which entropy is averaged.
        min_stay: Tokens between two switches at least.
        train_tokens: Answer tokens the large model writes for the first layers to learn from.
        epochs: Passes over them.
        vocabulary: Most frequent tokens whose scores they learn; 0 for all. As embedding and head stay the large
            model's, that settles the states, and with them the scores of all other tokens.
        seed: Of text, order and random turns.
    """
    from paperworks.decoding import EntropyAdaptiveDecoding, EntropySwitch, generate
    from paperworks.lab.drafting import DRAFTERS, cpu_friendly_dtype, encode, load_target, trained
    from paperworks.nn import pack_linears

    questions, numbers = _questions(prompts, calibration_prompts + prompt_count)
    large, tokenizer = load_target(model, dtype=cpu_friendly_dtype())
    if DRAFTERS.get(small, ("",))[0] == "RecursiveSpeculation":
        student: Any = trained(
            run, small, large, tokenizer, model=model, tokens=train_tokens, epochs=epochs,
            vocabulary=vocabulary, nodes=1, seed=seed,
        )  # fmt: skip
        little, words = pack_linears(student.draft), tokenizer
    else:
        little, words = load_target(small, dtype=cpu_friendly_dtype())
    ids = [encode(tokenizer, text).to(large.device) for text in questions]
    rule = EntropySwitch(math.inf, window, min_stay)
    decoding = EntropyAdaptiveDecoding(little, large, rule, tokenizers=(words, tokenizer))
    thresholds = {
        share: decoding.calibrate(ids[:calibration_prompts], share, max_new_tokens=new_tokens)
        for share in run.progress(_SHARES, "calibrating thresholds")
    }
    ids, numbers = ids[calibration_prompts:], numbers[calibration_prompts:]
    plain: dict[int, Generation] = {}
    made: dict[str, dict[int, SwitchedGeneration]] = {}

    def large_alone(index: int) -> int:
        plain[index] = generate(large, ids[index], max_new_tokens=new_tokens)
        return len(plain[index].new_tokens[0])

    def writing(name: str, switch: Callable[[int], Any]) -> Callable[[int], int]:
        made[name] = {}

        def call(index: int) -> int:
            decoding.switch = switch(index)
            made[name][index] = decoding.generate(ids[index], max_new_tokens=new_tokens)
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
    agreement: dict[str, list[float]] = {name: [] for name in texts}
    for index in run.progress(order, "reading all texts with the large model"):
        continuations = [rows[index].sequences[0, ids[index].shape[1] :] for rows in texts.values()]
        for name, value in zip(texts, _own_choices(large, ids[index], continuations), strict=True):
            agreement[name].append(value)
    right: dict[str, list[float]] = {}
    for name, rows in texts.items():
        run.record("agreement", fmean(agreement[name]), unit="of tokens", better="higher", series=name)
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
        # A prompt that is the large model's with the chance f: in the mean f of its quality and 1 - f of the small one's.
        parts = [(text.large_fraction, index) for index, text in enumerate(switched[f"EAD {share:.0%}"])]
        agreement[f"whole prompts {share:.0%}"] = [
            f * agreement["large alone"][index] + (1 - f) * agreement["small alone"][index] for f, index in parts
        ]
    advantage = {
        (kind, series): run.ratio(
            "agreement at equal cost, ratio",
            method=_mean(agreement, "EAD", shares),
            baseline=_mean(agreement, kind, shares),
            series=series,
            against=kind,
        )
        for kind in ("random", "even", "whole prompts")
        for series, shares in [*((f"EAD {share:.0%}", [share]) for share in _SHARES), ("EAD, all shares", _SHARES)]
    }
    for share in _SHARES:
        name = f"EAD {share:.0%}"
        for what, values in (("agreement", agreement), ("accuracy", right)):
            if any(values.get("large alone", ())):
                run.ratio(
                    f"{what} kept", method=values[name], baseline=values["large alone"], series=name,
                    against="large alone",
                )  # fmt: skip
    run.figure(_figure(switched, agreement, advantage, speed_up))


@dataclass
class Turns:
    """A switch that is not asked: who writes is laid down beforehand, and begins anew at the end."""

    turns: Sequence[Model]
    rolling: float = math.nan

    def __post_init__(self) -> None:
        self.made = 0
        self.active = self.writer = self.turns[0]

    def step(self, entropy: float) -> Model:
        """The model for the next token."""
        self.made += 1
        self.writer, self.active = self.active, self.turns[self.made % len(self.turns)]
        return self.active


def _begun_anywhere(turns: Sequence[Model], seed: int) -> Sequence[Model]:
    first = random.Random(seed).randrange(len(turns))
    return [*turns[first:], *turns[:first]]


def _spread_evenly(turns: Sequence[Model], seed: int) -> Sequence[Model]:
    """As many tokens by the large model, at equal distances."""
    count, total = turns.count("large"), len(turns)
    return ["large" if (t + 1) * count // total > t * count // total else "small" for t in range(total)]


def _questions(name: str, count: int) -> tuple[list[str], list[float]]:
    """Evenly spread prompts, and the numbers that answer them, 0 where none does."""
    from paperworks.lab.hub import load_dataset
    from paperworks.lab.hub import prompts as load_prompts

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


def _own_choices(large: Any, prompt: Any, continuations: Sequence[Any]) -> list[float]:
    """Share of each continuation's tokens that the large model would have chosen behind the text before them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = pad_sequence(list(continuations), batch_first=True)
    with torch.inference_mode():
        begin = large(prompt, use_cache=True, logits_to_keep=1)
        begin.past_key_values.batch_repeat_interleave(len(rows))
        # Padding stands behind the tokens that count, which do not see it.
        choices = large(rows[:, :-1], past_key_values=begin.past_key_values).logits.argmax(-1)
    first = begin.logits.argmax(-1).expand(len(rows), -1)
    same = torch.cat([first, choices], dim=1) == rows
    return [float(row[: len(text)].float().mean()) for row, text in zip(same, continuations, strict=True)]


def _mean(values: Mapping[str, Sequence[float]], kind: str, shares: Sequence[float]) -> list[float]:
    """Mean over shares for each prompt."""
    return [fmean(row) for row in zip(*(values[f"{kind} {share:.0%}"] for share in shares), strict=True)]


def _figure(
    texts: Mapping[str, Sequence[SwitchedGeneration]],
    agreement: Mapping[str, Sequence[float]],
    advantage: Mapping[tuple[str, str], Ratio],
    speed_up: Mapping[str, Ratio],
) -> Any:
    """Quality against the paper's cost, the same against measured time, and the advantage at equal cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    cost = {name: fmean(text.cost for text in rows) for name, rows in texts.items()} | {"large alone": 1.0}
    looks = {"EAD": ("#1f6f8b", "o-"), "random": ("#a9b4bc", "s--"), "even": ("#c9a66b", "^--")}
    for kind, (colour, style) in looks.items():
        names = ["small alone", *(f"{kind} {share:.0%}" for share in _SHARES), "large alone"]
        height = [fmean(agreement[name]) for name in names]
        left.plot([cost[name] for name in names], height, style, color=colour, label=kind)
        seconds = [1 / speed_up[name].value if name in speed_up else 1.0 for name in names]
        middle.plot(seconds, height, style, color=colour, label=kind)
    ends = [(cost[name], fmean(agreement[name])) for name in ("small alone", "large alone")]
    left.plot(*zip(*ends, strict=True), ":", color="#333333", label="whole prompts")
    left.set(xlabel="parameters a token, of large alone", ylabel="tokens the large model would have chosen")
    middle.set(xlabel="time, of large alone")
    for place, (kind, (colour, _)) in enumerate(list(looks.items())[1:]):
        ratios = [advantage[kind, f"EAD {share:.0%}"] for share in _SHARES]
        values = [ratio.value for ratio in ratios]
        spread = [
            [ratio.value - (ratio.low or ratio.value) for ratio in ratios],
            [(ratio.high or ratio.value) - ratio.value for ratio in ratios],
        ]
        at = [share + 0.02 * (place - 0.5) for share in _SHARES]
        right.errorbar(at, values, yerr=spread, fmt="o", color=colour, capsize=3, label=f"against {kind}")
    right.axhline(1, color="#333333", linewidth=0.8)
    right.set(xlabel="share of the large model asked for", ylabel="agreement at equal cost, ratio")
    left.legend(frameon=False)
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Entropy adaptive decoding: what the large model is worth where the small one is unsure", fontsize=11
    )
    return figure
