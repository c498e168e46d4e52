"""Beam search conditioned on not being degenerate, and states that learn while they read, on a real model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import torch

    from paperworks.decoding.attribute_classifier import AttributeClassifier

# Texts sampled together.
_AT_ONCE = 64
_BASELINE = "beam search"
_TOTAL = "beam search by total log p"
_METHOD = "conditional beam search"


@recipe(
    "conditional-beam-search",
    baseline="transformers' beam search; reading without learning",
    gpu=2,
    columns=(
        "speed-up against beam search",
        "degenerate",
        "length",
        "log p a token",
        "perplexity",
        "perplexity, ratio",
    ),
    tiny={
        "model": "tiny-random-llama",
        "prompt_count": 3,
        "train_prompts": 4,
        "opening": 6,
        "samples": 4,
        "new_tokens": 20,
        "num_beams": 2,
        "candidates": 4,
        "text": "built-in",
        "blocks": 2,
        "block": 48,
        "window": 16,
    },
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "prompt_count": 200,
        "train_prompts": 200,
        "samples": 64,
        "new_tokens": 256,
        "candidates": 10,
        "blocks": 64,
        "block": 1024,
    },
)
def conditional_beam_search(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    prompt_count: Annotated[int, Between(1, 128)] = 32,
    train_prompts: Annotated[int, Between(1, 128)] = 32,
    opening: Annotated[int, Between(1, 64)] = 16,
    samples: Annotated[int, Between(1, 32)] = 8,
    new_tokens: Annotated[int, Between(1, 256)] = 64,
    num_beams: Annotated[int, Between(1, 10)] = 5,
    candidates: Annotated[int, Between(1, 20)] = 5,
    weight: Annotated[float, Between(0, 10)] = 1.0,
    length_penalty: Annotated[float, Between(-4, 4)] = 1.0,
    text: Annotated[str, Data("built-in", "wikitext-2")] = "wikitext-2",
    blocks: Annotated[int, Between(1, 24)] = 6,
    block: Annotated[int, Between(2, 1024)] = 384,
    window: Annotated[int, Between(1, 128)] = 32,
    learning_rate: Annotated[float, Between(0, 1)] = 0.0,
    seed: int = 0,
) -> None:
    """Beams judged by a classifier on the model's states, against beam search; and reading with learning states.

    The classifier learns from paragraphs that the model samples after other openings whether a beginning leads to one
    that is complete, not empty and not repetitive. Then held-out openings are continued in turn by transformers' beam
    search (by log p a token, and by total log p), greedily, and by the conditional search. Separately, blocks of text are
    read with and without hidden-state optimisation.

    Args:
        run: Keeps what is measured.
        model: Name of the model.
        prompt_count: Openings of held-out paragraphs to continue, raw text without a chat template.
        train_prompts: Openings of other paragraphs, to sample the classifier's texts for.
        opening: Tokens of an opening.
        samples: Texts for each of them, at temperatures from 0.3 to 1.
        new_tokens: Tokens of a text at most; one that has not ended by then is unfinished.
        num_beams: Beams of both searches.
        candidates: Tokens that the conditional search expands each beam with.
        weight: Of the classifier.
        length_penalty: Of the conditional search and the baseline; 1 (log p a token) is transformers' default.
        text: Data set, file, or "built-in" (the prompts themselves), to continue and to read.
        blocks: Blocks of it.
        block: Tokens a block.
        window: Tokens that are read before the states learn from them.
        learning_rate: Of the states; 0 takes the best of 0.003, 0.01 and 0.03 on text that is not measured.
        seed: Of samples, order and weights.
    """
    import torch

    from paperworks.decoding import Target
    from paperworks.hub import load_model
    from paperworks.recipes.decoding.drafting import refusals

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Steps as small as those of the states are lost in bfloat16.
    target, tokenizer = load_model(model, dtype=torch.float32, device=device)
    with refusals():
        Target(target)
    target.requires_grad_(False)
    learn, judge = _texts(text)
    tokens = _blocks(tokenizer, judge, blocks, block).to(device)
    if not learning_rate:
        held_out = _blocks(tokenizer, learn, max(1, blocks // 2), block).to(device)
        learning_rate = _best_rate(run, target, held_out, window)
    others = _openings(tokenizer, learn, train_prompts, opening)
    tests = _openings(tokenizer, judge, prompt_count, opening)
    wrong = _search(
        run, target, tokenizer, model, [ids.to(device) for ids in tests], [ids.to(device) for ids in others], samples,
        new_tokens, seed, num_beams=num_beams, candidates=candidates, weight=weight, length_penalty=length_penalty,
    )  # fmt: skip
    curves = _read(run, target, tokens, window=window, learning_rate=learning_rate)
    run.figure(_figure(wrong, curves))


def _search(
    run: Run,
    target: Any,
    tokenizer: Any,
    model: str,
    tests: list[torch.Tensor],
    others: list[torch.Tensor],
    samples: int,
    new_tokens: int,
    seed: int,
    **options: Any,
) -> dict[str, Counter[str]]:
    """Continue held-out openings with each search; how often each kind of degenerate text came of each."""
    import torch

    from paperworks.decoding import generate
    from paperworks.decoding.attribute_classifier import degeneracy
    from paperworks.decoding.conditional_beam_search import ConditionalBeamSearch
    from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization

    ends = _ends(tokenizer)
    classifier = _classifier(run, target, model, others, samples, new_tokens, ends, seed)
    search = ConditionalBeamSearch(target, classifier, **options)
    answers: dict[str, dict[int, list[int]]] = {"greedy": {}, _BASELINE: {}, _TOTAL: {}, _METHOD: {}}

    def greedy(index: int) -> list[int]:
        return generate(target, tests[index], max_new_tokens=new_tokens, eos_token_id=ends).new_tokens[0]

    def beams(length_penalty: float) -> Callable[[int], list[int]]:
        def call(index: int) -> list[int]:
            with torch.inference_mode():
                found = target.generate(
                    tests[index], attention_mask=torch.ones_like(tests[index]), num_beams=options["num_beams"],
                    length_penalty=length_penalty, max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends,
                    pad_token_id=ends[0],
                )  # fmt: skip
            return found[0, tests[index].shape[1] :].tolist()  # type: ignore[no-any-return]

        return call

    def conditional(index: int) -> list[int]:
        return search.generate(tests[index], max_new_tokens=new_tokens, eos_token_id=ends).new_tokens[0][0]

    def kept(name: str, call: Callable[[int], list[int]]) -> Callable[[int], int]:
        def timed(index: int) -> int:
            answers[name][index] = call(index)
            return len(answers[name][index])

        return timed

    run.compare(
        baseline=(_BASELINE, kept(_BASELINE, beams(options["length_penalty"]))),
        method={
            "greedy": kept("greedy", greedy),
            _TOTAL: kept(_TOTAL, beams(0.0)),
            _METHOD: kept(_METHOD, conditional),
        },
        over=range(len(tests)),
        repeats=1,
        unit="tokens/s",
    )
    plain = HiddenStateOptimization(target, steps=0, window=4096)
    faults: dict[str, list[str | None]] = {}
    for name, found in answers.items():
        faults[name] = [degeneracy(found[index], ends) for index in range(len(tests))]
        log_p = []
        for index, ids in enumerate(tests):
            whole = torch.cat([ids, ids.new_tensor([found[index]])], dim=1)
            log_p.append(float(plain.log_likelihood(whole)[0, ids.shape[1] - 1 :].sum()))
        lengths = [len(found[index]) for index in range(len(tests))]
        run.record("degenerate", _share(faults[name]), unit="of texts", better="lower", series=name)
        for kind in ("empty", "unfinished", "repetitive"):
            share = _share([fault == kind for fault in faults[name]])
            run.record(kind, share, unit="of texts", better="lower", series=name)
        run.record("log p", _mean(log_p), unit="nats", better="higher", series=name)
        each = [value / length for value, length in zip(log_p, lengths, strict=True)]
        run.record("log p a token", _mean(each), unit="nats", better="higher", series=name)
        run.record("length", _mean(lengths), unit="tokens", better="higher", series=name)
        for index in range(min(3, len(tests))):
            run.log(
                f"{name}: {tokenizer.decode(found[index], skip_special_tokens=True)!r} ({faults[name][index] or 'good'})"
            )
    if any(faults[_BASELINE]):
        run.ratio(
            "degenerate, ratio", method=[float(fault is not None) for fault in faults[_METHOD]],
            baseline=[float(fault is not None) for fault in faults[_BASELINE]], better="lower", series=_METHOD,
            against=_BASELINE,
        )  # fmt: skip
    return {name: Counter(fault for fault in found if fault) for name, found in faults.items()}


def _classifier(
    run: Run,
    target: Any,
    model: str,
    prompts: list[torch.Tensor],
    samples: int,
    new_tokens: int,
    ends: list[int],
    seed: int,
) -> AttributeClassifier:
    """A classifier of texts that are not degenerate, kept for the next run."""
    import json

    import torch

    from paperworks import __version__
    from paperworks.decoding import collect, generate
    from paperworks.decoding.attribute_classifier import AttributeClassifier, degeneracy
    from paperworks.lab.cache import cached_folder
    from paperworks.recipes.decoding.drafting import model_identity

    temperatures = (0.3, 0.5, 0.7, 1.0)

    def build(folder: Path) -> None:
        generator = torch.Generator(target.device).manual_seed(seed)
        pairs: list[tuple[list[int], list[int]]] = []
        for share, temperature in run.progress(list(enumerate(temperatures)), "sampling texts to judge"):
            count = len(range(share, samples, len(temperatures)))
            for part in torch.split(torch.cat(prompts).repeat_interleave(count, 0), _AT_ONCE):
                texts = generate(
                    target, part, max_new_tokens=new_tokens, temperature=temperature, eos_token_id=ends,
                    generator=generator,
                ).new_tokens  # fmt: skip
                pairs += zip(part.tolist(), texts, strict=True)
        labels = torch.tensor([degeneracy(text, ends) is None for _, text in pairs])
        torch.manual_seed(seed)
        classifier = AttributeClassifier.from_target(target, new_tokens)
        fit = classifier.fit(collect(target, pairs), labels, generator=torch.Generator().manual_seed(seed))
        classifier.save_pretrained(folder)
        told = {
            "good": _share(labels.tolist()),
            "loss": fit.held_out_loss,
            "prior": fit.prior_loss,
            "T": fit.temperature,
        }
        (folder / "fit.json").write_text(json.dumps(told))

    key = {
        "model": model_identity(model, target), "prompts": [prompt[0].tolist() for prompt in prompts], "samples": samples,
        "ends": ends, "new_tokens": new_tokens, "seed": seed, "version": __version__,
    }  # fmt: skip
    folder = cached_folder("attribute-classifiers", key, build)
    told = json.loads((folder / "fit.json").read_text())
    run.record("good samples", told["good"], unit="of texts", better="higher", series="sampling")
    run.record("held-out loss", told["loss"], unit="nats", better="lower", series="classifier")
    run.record("held-out loss", told["prior"], unit="nats", better="lower", series="base rate")
    run.record("temperature", told["T"], better="lower", series="classifier")
    return AttributeClassifier.from_pretrained(folder, device=target.device)


def _texts(text: str) -> tuple[str, str]:
    """Running text to learn and choose from, and other text to measure on."""
    from paperworks.errors import UsageError
    from paperworks.hub import TextData, load_dataset
    from paperworks.hub import prompts as load_prompts

    if text == "built-in":
        lines = list(load_prompts())
    else:
        data = load_dataset(text)
        if not isinstance(data, TextData):
            raise UsageError(f"{text} is no running text: give wikitext-2, a .txt file or built-in")
        if data.split == "test":
            return load_dataset(text, split="valid").text, data.text  # type: ignore[union-attr]
        lines = list(data.paragraphs)
    return "\n".join(lines[: len(lines) // 2]), "\n".join(lines[len(lines) // 2 :])


def _openings(tokenizer: Any, text: str, count: int, length: int) -> list[torch.Tensor]:
    """The first tokens of `count` paragraphs at least twice as long, evenly spread over a text; each (1, length)."""
    import torch

    from paperworks.errors import UsageError

    # No paragraph has more tokens than characters.
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 2 * length and not line.startswith(" =")]
    found = [
        ids[:length]
        for ids in (tokenizer.encode(line[: 40 * length], add_special_tokens=False) for line in lines)
        if len(ids) >= 2 * length
    ]
    if not 1 <= count <= len(found):
        raise UsageError(
            f"the text has {len(found)} paragraphs of at least {2 * length} tokens, so {count} openings cannot be taken"
        )
    return [torch.tensor([ids]) for ids in found[:: len(found) // count][:count]]


def _ends(tokenizer: Any) -> list[int]:
    """Tokens that end a paragraph: the end of text, and what a line break is."""
    breaks = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n"))
    return sorted({tokenizer.eos_token_id, *(ids[0] for ids in breaks if len(ids) == 1)})


def _blocks(tokenizer: Any, text: str, blocks: int, block: int) -> torch.Tensor:
    """The beginning of a text as token ids, (blocks, block)."""
    import torch

    from paperworks.errors import UsageError

    # A token has four characters or so: twice that is enough, and a long text is not encoded for nothing.
    ids = tokenizer.encode(text[: 8 * blocks * block], add_special_tokens=False, verbose=False)
    if len(ids) < blocks * block:
        raise UsageError(f"the text has {len(ids)} tokens, too few for {blocks} blocks of {block}: ask for fewer")
    return torch.tensor(ids[: blocks * block]).view(blocks, block)


def _best_rate(run: Run, target: Any, tokens: torch.Tensor, window: int) -> float:
    """The learning rate of the states under which text that is not measured is likeliest."""
    from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization

    rates = (0.003, 0.01, 0.03)
    likely = {}
    with run.progress(len(rates), "choosing the learning rate") as bar:
        for rate in rates:
            reader = HiddenStateOptimization(target, window=window, learning_rate=rate)
            likely[rate] = float(reader.log_likelihood(tokens).mean())
            bar.advance()
    best = max(rates, key=likely.__getitem__)
    run.record("learning rate", best, better="higher", series="hidden-state optimisation")
    return best


def _read(run: Run, target: Any, tokens: torch.Tensor, **options: Any) -> dict[str, list[float]]:
    """Read blocks of text (blocks, block) plainly and with learning states; log-loss in each eighth of a block."""
    import torch

    from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization

    blocks, block = tokens.shape
    readers = {
        "plain": HiddenStateOptimization(target, steps=0, window=block),
        "hidden-state optimisation": HiddenStateOptimization(target, **options),
    }
    read: dict[str, dict[int, torch.Tensor]] = {name: {} for name in readers}

    def call(name: str) -> Callable[[int], int]:
        def timed(index: int) -> int:
            read[name][index] = readers[name].log_likelihood(tokens[index])[0]
            return block

        return timed

    first, *others = readers
    run.compare(
        baseline=(first, call(first)), method={name: call(name) for name in others}, over=range(blocks), repeats=1,
        unit="tokens/s",
    )  # fmt: skip
    losses = {name: [-float(found[index].mean()) for index in range(blocks)] for name, found in read.items()}
    for name in readers:
        run.record("perplexity", math.exp(_mean(losses[name])), better="lower", series=name)
    for name in others:
        run.ratio(
            "perplexity, ratio", method=[math.exp(loss) for loss in losses[name]],
            baseline=[math.exp(loss) for loss in losses[first]], better="lower", series=name, against=first,
        )  # fmt: skip
    stacked = {name: -torch.stack([found[index] for index in range(blocks)]).mean(0) for name, found in read.items()}
    return {name: [float(part.mean()) for part in loss.tensor_split(8)] for name, loss in stacked.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(values: Sequence[object]) -> float:
    return sum(map(bool, values)) / len(values)


def _figure(wrong: dict[str, Counter[str]], curves: dict[str, list[float]]) -> Any:
    """Degenerate texts of each search by kind; and perplexity along a block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    below = [0] * len(wrong)
    for kind, colour in {"empty": "#33475b", "unfinished": "#a9b4bc", "repetitive": "#1f6f8b"}.items():
        heights = [counts[kind] for counts in wrong.values()]
        left.bar([name.replace(" ", "\n") for name in wrong], heights, bottom=below, color=colour, label=kind)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    left.set_ylabel("degenerate texts")
    left.legend(frameon=False)
    for (name, losses), colour in zip(curves.items(), ("#a9b4bc", "#1f6f8b"), strict=True):
        right.plot([math.exp(loss) for loss in losses], "o-", color=colour, label=name)
    right.set_xlabel("eighth of the block")
    right.set_ylabel("perplexity")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Making the most of a model: conditional beam search, and states that learn", fontsize=11)
    return figure
