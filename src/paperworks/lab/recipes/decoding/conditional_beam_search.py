"""Beam search conditioned on not being degenerate, and states that learn while they read, on a real model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import torch

    from paperworks.decoding.attribute_classifier import AttributeClassifier

_ASK = "Answer in one or two sentences."
_BASELINE = "beam search"
_METHOD = "conditional beam search"


@recipe(
    "conditional-beam-search",
    baseline="transformers' beam search; reading without learning",
    tiny={
        "model": "tiny-random-llama",
        "prompt_count": 3,
        "train_prompts": 4,
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
        "prompt_count": 20,
        "train_prompts": 20,
        "samples": 64,
        "new_tokens": 128,
        "candidates": 10,
        "blocks": 64,
        "block": 1024,
    },
)
def conditional_beam_search(
    run: Run,
    model: str = "smollm2-135m",
    prompt_count: int = 12,
    train_prompts: int = 24,
    samples: int = 8,
    new_tokens: int = 64,
    num_beams: int = 5,
    candidates: int = 5,
    weight: float = 1.0,
    length_penalty: float = 1.0,
    text: str = "wikitext-2",
    blocks: int = 6,
    block: int = 384,
    window: int = 32,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> None:
    """Beams judged by a classifier on the model's states, against beam search; and reading with learning states.

    The classifier learns from texts that the model samples for other prompts whether a beginning leads to a text that is
    complete, not empty and not repetitive. Then held-out prompts are answered in turn by transformers' beam search,
    greedily, and by the conditional search. Separately, blocks of text are read with and without hidden-state optimisation.

    Args:
        run: Keeps what is measured.
        model: Name of the model.
        prompt_count: Held-out built-in prompts to answer, each in one or two sentences.
        train_prompts: Other built-in prompts, to sample the classifier's texts for.
        samples: Texts for each of them, at temperatures from 0.3 to 1.
        new_tokens: Tokens of a text at most; one that has not ended by then is unfinished.
        num_beams: Beams of both searches.
        candidates: Tokens that the conditional search expands each beam with.
        weight: Of the classifier.
        length_penalty: Of both searches; 1 is transformers' default.
        text: Data set, file, or "built-in" (the prompts themselves), to read.
        blocks: Blocks of it.
        block: Tokens a block.
        window: Tokens that are read before the states learn from them.
        learning_rate: Of the states.
        seed: Of samples, order and weights.
    """
    import torch

    from paperworks.lab.hub import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Steps as small as those of the states are lost in bfloat16.
    target, tokenizer = load_model(model, dtype=torch.float32, device=device)
    target.requires_grad_(False)
    tokens = _blocks(tokenizer, text, blocks, block).to(device)
    wrong = _search(
        run, target, tokenizer, model, prompt_count, train_prompts, samples, new_tokens, seed, num_beams=num_beams,
        candidates=candidates, weight=weight, length_penalty=length_penalty,
    )  # fmt: skip
    curves = _read(run, target, tokens, window=window, learning_rate=learning_rate)
    run.figure(_figure(wrong, curves))


def _search(
    run: Run,
    target: Any,
    tokenizer: Any,
    model: str,
    prompt_count: int,
    train_prompts: int,
    samples: int,
    new_tokens: int,
    seed: int,
    **options: Any,
) -> dict[str, Counter[str]]:
    """Answer held-out prompts with each search; how often each kind of degenerate text came of each."""
    import torch

    from paperworks.decoding import generate
    from paperworks.decoding.attribute_classifier import degeneracy
    from paperworks.decoding.conditional_beam_search import ConditionalBeamSearch
    from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization
    from paperworks.errors import UsageError
    from paperworks.lab.drafting import encode
    from paperworks.lab.hub import prompts as load_prompts

    texts = load_prompts()
    if prompt_count + train_prompts > len(texts) or min(prompt_count, train_prompts) < 1:
        raise UsageError(
            f"there are {len(texts)} prompts, so {prompt_count} to answer and {train_prompts} to learn from cannot be taken"
        )
    encoded = [encode(tokenizer, f"{text} {_ASK}").to(target.device) for text in texts]
    tests = encoded[:: len(encoded) // prompt_count][:prompt_count]
    others = [ids for ids in encoded if not any(ids is test for test in tests)][:train_prompts]
    ends = tokenizer.eos_token_id
    classifier = _classifier(run, target, model, others, samples, new_tokens, ends, seed)
    search = ConditionalBeamSearch(target, classifier, **options)
    answers: dict[str, dict[int, list[int]]] = {"greedy": {}, _BASELINE: {}, _METHOD: {}}

    def greedy(index: int) -> list[int]:
        return generate(target, tests[index], max_new_tokens=new_tokens, eos_token_id=ends).new_tokens[0]

    def beams(index: int) -> list[int]:
        with torch.inference_mode():
            found = target.generate(
                tests[index], attention_mask=torch.ones_like(tests[index]), num_beams=options["num_beams"],
                length_penalty=options["length_penalty"], max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends,
                pad_token_id=ends,
            )  # fmt: skip
        return found[0, tests[index].shape[1] :].tolist()  # type: ignore[no-any-return]

    def conditional(index: int) -> list[int]:
        return search.generate(tests[index], max_new_tokens=new_tokens, eos_token_id=ends).new_tokens[0][0]

    def kept(name: str, call: Callable[[int], list[int]]) -> Callable[[int], int]:
        def timed(index: int) -> int:
            answers[name][index] = call(index)
            return len(answers[name][index])

        return timed

    run.compare(
        baseline=(_BASELINE, kept(_BASELINE, beams)),
        method={"greedy": kept("greedy", greedy), _METHOD: kept(_METHOD, conditional)},
        over=range(len(tests)),
        repeats=1,
        unit="tokens/s",
    )
    plain = HiddenStateOptimization(target, steps=0, window=4096)
    faults: dict[str, list[str | None]] = {}
    for name, found in answers.items():
        faults[name] = [degeneracy(found[index], {ends}) for index in range(len(tests))]
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
    run: Run, target: Any, model: str, prompts: list[torch.Tensor], samples: int, new_tokens: int, end: int, seed: int
) -> AttributeClassifier:
    """A classifier of texts that are not degenerate, kept for the next run."""
    import json

    import torch

    from paperworks import __version__
    from paperworks.decoding import collect, generate
    from paperworks.decoding.attribute_classifier import AttributeClassifier, degeneracy
    from paperworks.lab.cache import cached_folder
    from paperworks.lab.drafting import model_identity

    temperatures = (0.3, 0.5, 0.7, 1.0)

    def build(folder: Path) -> None:
        generator = torch.Generator(target.device).manual_seed(seed)
        pairs: list[tuple[list[int], list[int]]] = []
        with run.progress(len(prompts) * samples, "sampling texts to judge") as bar:
            for prompt in prompts:
                for share, temperature in enumerate(temperatures):
                    count = len(range(share, samples, len(temperatures)))
                    if count:
                        texts = generate(
                            target, prompt.expand(count, -1), max_new_tokens=new_tokens, temperature=temperature,
                            eos_token_id=end, generator=generator,
                        ).new_tokens  # fmt: skip
                        pairs += [(prompt[0].tolist(), text) for text in texts]
                        bar.advance(count)
        labels = torch.tensor([degeneracy(text, {end}) is None for _, text in pairs])
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
        "new_tokens": new_tokens, "seed": seed, "version": __version__,
    }  # fmt: skip
    folder = cached_folder("attribute-classifiers", key, build)
    told = json.loads((folder / "fit.json").read_text())
    run.record("good samples", told["good"], unit="of texts", better="higher", series="sampling")
    run.record("held-out loss", told["loss"], unit="nats", better="lower", series="classifier")
    run.record("held-out loss", told["prior"], unit="nats", better="lower", series="base rate")
    run.record("temperature", told["T"], better="lower", series="classifier")
    return AttributeClassifier.from_pretrained(folder, device=target.device)


def _blocks(tokenizer: Any, text: str, blocks: int, block: int) -> torch.Tensor:
    """The beginning of a text as token ids, (blocks, block)."""
    import torch

    from paperworks.errors import UsageError
    from paperworks.lab.hub import TextData, load_dataset
    from paperworks.lab.hub import prompts as load_prompts

    if text == "built-in":
        words = "\n".join(load_prompts())
    else:
        data = load_dataset(text)
        if not isinstance(data, TextData):
            raise UsageError(f"{text} is no running text: give wikitext-2, a .txt file or built-in")
        words = data.text
    # A token has four characters or so: twice that is enough, and a long text is not encoded for nothing.
    ids = tokenizer.encode(words[: 8 * blocks * block], add_special_tokens=False, verbose=False)
    if len(ids) < blocks * block:
        raise UsageError(f"{text} has {len(ids)} tokens, too few for {blocks} blocks of {block}: ask for fewer")
    return torch.tensor(ids[: blocks * block]).view(blocks, block)


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
