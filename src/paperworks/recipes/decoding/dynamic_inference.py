"""Code completion that leaves the model early or stops, against all layers, random exits and confident ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from pathlib import Path

    from paperworks.decoding import DynamicInference
    from paperworks.decoding.dynamic_inference import Reading

_LIBRARY = "standard library"
_OFF = 100.0


@recipe(
    "dynamic-inference",
    baseline="all layers",
    gpu=3,
    columns=("speed-up", "layers a token", "quality", "quality, ratio", "agreement", "agreement at equal cost, ratio"),
    rows=("all layers", "exit at*", "confident*", "layer*"),
    tiny={
        "model": "tiny-random-llama",
        "prompts": "standard library",
        "prompt_count": 6,
        "context": 24,
        "head_blocks": 8,
        "controller_blocks": 8,
        "test_blocks": 2,
        "block": 64,
        "every": 1,
        "vocabulary": 0,
    },
    large={
        "model": "Qwen/Qwen3-0.6B-Base",
        "prompt_count": 160,
        "context": 256,
        "head_blocks": 4000,
        "controller_blocks": 1000,
        "test_blocks": 200,
        "vocabulary": 0,
    },
)
def dynamic_inference(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    data: Annotated[str, Data(_LIBRARY, "wikitext-2")] = _LIBRARY,
    prompts: Annotated[Literal["auto", "humaneval", "standard library"], Data()] = "auto",
    prompt_count: Annotated[int, Between(1, 96)] = 24,
    context: Annotated[int, Between(1, 384)] = 96,
    new_tokens: Annotated[int, Between(1, 40)] = 10,
    head_blocks: Annotated[int, Between(1, 320)] = 80,
    controller_blocks: Annotated[int, Between(1, 128)] = 32,
    test_blocks: Annotated[int, Between(1, 48)] = 12,
    block: Annotated[int, Between(2, 1024)] = 256,
    every: Annotated[int, Between(1, 12)] = 3,
    vocabulary: Annotated[int, Between(0, 32_768)] = 8192,
    head: Literal["tuned", "linear"] = "tuned",
    seed: int = 0,
) -> None:
    """Code completions cut short layer by layer and token by token, against completions with all layers.

    Heads and controller are trained on files of Python's standard library, or on a text of one's own: its beginning
    trains, its end is read and completed. Prompts are code or text cut at a random place. The curve of quality against layers and time is measured over thresholds, beside exits at a fixed layer, exits of a
    confident head, and the controller's own exits dealt out at random, which cost the same.

    Args:
        run: Keeps what is measured.
        model: Name of the model.
        data: Text to train on, "standard library", or a text or code file of one's own in UTF-8.
        prompts: What to complete; auto takes the end of a text of one's own, else HumanEval where it can be had, else
            held-out standard library.
        prompt_count: How many completions.
        context: Tokens of each prompt.
        new_tokens: Tokens of each completion.
        head_blocks: Blocks of text to train the heads on.
        controller_blocks: Other blocks, to train the controller on.
        test_blocks: Further blocks, to read with the true tokens before each position.
        block: Tokens a block.
        every: Layers from one decision to the next.
        vocabulary: Most frequent tokens that heads may put out; 0 for all.
        head: Kind of heads.
        seed: Of text, cuts and order.
    """
    import torch

    from paperworks.decoding import DynamicInference
    from paperworks.hub import load_model
    from paperworks.recipes.decoding.drafting import cpu_friendly_dtype, refusals

    own = None if data == _LIBRARY else _own_text(data)
    if own is not None and prompts == _LIBRARY:
        raise UsageError(f"the end of {data} is what is completed: leave prompts out, or give humaneval")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_model(model, dtype=cpu_friendly_dtype(), device=device)
    options: dict[str, Any] = {"every": every, "head": head}
    with refusals():
        DynamicInference(target, vocabulary=torch.arange(1), **options)
    sizes = (head_blocks, controller_blocks, test_blocks)
    if own is None:
        (learnt, judged, test), held_out = _corpus(tokenizer, sizes, block, seed)
    else:
        pieces = 0 if prompts == "humaneval" else prompt_count
        (learnt, judged, test), held_out = _own_corpus(tokenizer, data, own, sizes, block, pieces, context + new_tokens)
    dynamic = _trained(run, model, target, learnt, judged, vocabulary, seed, options)
    with run.progress(len(test), "reading held-out text") as bar:
        _record_reading(run, dynamic.read(test, progress=bar.advance))
    # A text of one's own is completed where nothing else is asked for.
    wanted = prompts if own is None or prompts == "humaneval" else "held out"
    ids, truths = _tasks(run, tokenizer, wanted, held_out, prompt_count, context, new_tokens, seed)
    curves = _complete(run, dynamic, ids.to(device), truths, seed)
    run.figure(_figure(curves))


def _corpus(tokenizer: Any, sizes: Sequence[int], block: int, seed: int) -> tuple[list[Any], list[list[int]]]:
    """Blocks of the running interpreter's standard library in as many parts as sizes, and files in none of them."""
    import random
    import sysconfig
    from pathlib import Path

    import torch

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(seed).shuffle(files)
    texts: Iterator[str] = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    parts = []
    for size in sizes:
        ids: list[int] = []
        for text in texts:
            ids += tokenizer.encode(text[:40_000], add_special_tokens=False, verbose=False)
            if len(ids) >= size * block:
                break
        # Where the library is too small for the sizes asked for, parts are what there is.
        whole = min(size, len(ids) // block)
        parts.append(torch.tensor(ids[: whole * block]).view(whole, block))
    return parts, [tokenizer.encode(text[:4000], add_special_tokens=False, verbose=False) for text in texts]


def _own_text(data: str) -> str:
    """What a text or code file holds, or a set of running text by name."""
    from pathlib import Path

    from paperworks.hub import TextData, load_dataset, readers

    file = Path(data).expanduser()
    if file.is_file() and file.suffix.lower() not in (".txt", ".csv", ".parquet", ".npz"):
        try:
            return readers.text(file.name, "", [file]).text
        except (ValueError, OSError) as error:
            raise UsageError(f"{data} cannot be read as text or code: {error}") from error
    if file.is_dir():
        raise UsageError(f"{data} is a folder: give one file, which `cat {data}/* > own.txt` makes of several")
    found = load_dataset(data)
    if not isinstance(found, TextData):
        raise UsageError(f"{data} is no running text: give a text or code file, wikitext-2 or {_LIBRARY}")
    return found.text


def _own_corpus(
    tokenizer: Any, name: str, text: str, sizes: Sequence[int], block: int, pieces: int, length: int
) -> tuple[list[Any], list[list[int]]]:
    """Blocks from a text's beginning in as many parts as sizes; the rest in pieces of more than `length` tokens."""
    import torch

    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    taken = sum(sizes) * block
    spare = len(ids) - pieces * (length + 1)
    if spare < taken:
        fitting = [size * spare // taken for size in sizes]
        options = ("head_blocks", "controller_blocks", "test_blocks")
        fewer = ", ".join(f"{option} {size}" for option, size in zip(options, fitting, strict=True))
        raise UsageError(
            f"{name} has {len(ids):,} tokens, and {sum(sizes)} blocks of {block} with {pieces} prompts take "
            f"{taken + pieces * (length + 1):,}: give more text, or "
            + (fewer if min(fitting) > 0 else "lower block, context and prompt_count")
        )
    starts = [sum(sizes[:part]) * block for part in range(len(sizes))]
    parts = [
        torch.tensor(ids[start : start + size * block]).view(size, block)
        for start, size in zip(starts, sizes, strict=True)
    ]
    rest = ids[taken:]
    # Prompts that share no token are so many witnesses.
    return parts, [rest[len(rest) * piece // pieces : len(rest) * (piece + 1) // pieces] for piece in range(pieces)]


def _trained(
    run: Run, name: str, model: Any, learnt: Any, judged: Any, vocabulary: int, seed: int, options: dict[str, Any]
) -> DynamicInference:
    """Heads trained on one part of the corpus and the controller on another; kept between runs."""
    import hashlib

    import torch

    from paperworks import __version__
    from paperworks.decoding import DynamicInference
    from paperworks.lab.cache import cached_folder
    from paperworks.recipes.decoding.drafting import model_identity

    def build(folder: Path) -> None:
        words = None
        if vocabulary:
            counts = torch.bincount(learnt.flatten(), minlength=model.config.vocab_size)
            words = counts.argsort(descending=True, stable=True)[:vocabulary].sort().values
        dynamic = DynamicInference(model, vocabulary=words, **options)
        order = torch.Generator().manual_seed(seed)
        # Small batches, as there is little text: many steps matter more than calm ones.
        with run.progress(len(learnt), "training heads") as bar:
            dynamic.fit_heads(learnt, epochs=1, batch_size=1, learning_rate=2e-3, generator=order, progress=bar.advance)
        with run.progress(20 * len(judged) // 2, "training the controller") as bar:
            dynamic.fit_controller(
                judged, epochs=20, batch_size=2, learning_rate=1e-2, generator=order, progress=bar.advance
            )
        dynamic.save_pretrained(folder)

    text = hashlib.sha256(learnt.numpy().tobytes() + judged.numpy().tobytes()).hexdigest()
    key = {
        "model": model_identity(name, model), "text": text, "block": learnt.shape[1], "vocabulary": vocabulary, "seed": seed,
        **options, "version": __version__,
    }  # fmt: skip
    return DynamicInference.from_pretrained(cached_folder("dynamic-inference", key, build), model)


def _tasks(
    run: Run,
    tokenizer: Any,
    prompts: str,
    held_out: list[list[int]],
    count: int,
    context: int,
    new_tokens: int,
    seed: int,
) -> tuple[Any, list[list[int]]]:
    """Prompts (count, context) and the tokens that truly follow each: text cut at random places."""
    import random

    import torch

    from paperworks.hub import load_dataset

    # Where a cut may come first, and the tokens.
    sources = [(context, ids) for ids in held_out]
    if prompts in ("auto", "humaneval"):
        try:
            sources = [
                (
                    max(context, len(tokenizer.encode(problem.prompt))),
                    tokenizer.encode(problem.prompt + problem.solution),
                )
                for problem in load_dataset("humaneval")
            ]
            run.log(f"completing solutions of {len(sources)} problems of HumanEval")
        except UsageError as error:
            if prompts == "humaneval":
                raise
            run.log(f"completing held-out files of the standard library, as HumanEval is not here: {error}")
    sources = [(first, ids) for first, ids in sources if first < len(ids) - new_tokens]
    if not sources:
        raise UsageError("no code is left to complete: lower head_blocks, controller_blocks or context")
    chance = random.Random(seed)
    chance.shuffle(sources)
    cuts = [(chance.randrange(first, len(ids) - new_tokens), ids) for first, ids in (sources * count)[:count]]
    return (
        torch.tensor([ids[cut - context : cut] for cut, ids in cuts]),
        [ids[cut : cut + new_tokens] for cut, ids in cuts],
    )


def _record_reading(run: Run, reading: Reading) -> None:
    """Record what teacher forcing says of many positions: how deep tokens are decided, and whom STOP stops."""
    first = reading.first_correct
    third = int((reading.layers <= reading.layers[-1] / 3).sum())
    for name, mask in (("right within a third", (first > 0) & (first <= third)), ("right behind any layer", first > 0)):
        run.record(name, _share(mask), unit="of tokens", better="higher", series="heads")
    wrong = reading.predictions[-1] != reading.tokens
    run.record("wrong tokens", _share(wrong), unit="of tokens", better="lower", series="all layers")
    for threshold in (0.5, 0.7, 0.9):
        series = f"stop at {threshold:g}"
        stopped = reading.decide(_OFF, threshold)[1] < 0
        run.record("stopped tokens", _share(stopped), unit="of tokens", better="lower", series=series)
        if bool(stopped.any()) and bool(wrong.any()):
            run.record(
                "wrong among stopped tokens", _share(wrong[stopped]), unit="of tokens", better="higher", series=series
            )


def _complete(
    run: Run, dynamic: DynamicInference, ids: Any, truths: list[list[int]], seed: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Complete every prompt in every way, in turn; points (layers a token, speed-up, agreement) of each kind of exit."""
    import torch

    from paperworks.decoding import Completion
    from paperworks.decoding.layer_exit import Action, Policy

    new_tokens, depth = len(truths[0]), dynamic.layers[-1]
    made: dict[str, dict[int, Completion]] = {}

    def completing(name: str, **options: Any) -> Callable[[int], None]:
        made[name] = {}
        options = {"exit_threshold": _OFF, "stop_threshold": _OFF, **options}

        def call(index: int) -> None:
            made[name][index] = dynamic.generate(ids[index], max_new_tokens=new_tokens, eos_token_id=[], **options)

        return call

    def fixed(at: int) -> Policy:
        return lambda layer, hidden: Action.EXIT if layer == at else Action.CONTINUE

    def confident(threshold: float) -> Policy:
        def policy(layer: int, hidden: Any) -> Action:
            if layer == depth:
                return Action.EXIT
            sure = float(dynamic.logits(layer, hidden).float().softmax(-1).max()) > threshold
            return Action.EXIT if sure else Action.CONTINUE

        return policy

    kinds: dict[str, dict[str, dict[str, Any]]] = {
        "controller": {f"exit at {t:g}": {"exit_threshold": t} for t in (0.5, 0.7, 0.9, 0.97)},
        "confident head": {f"confident at {t:g}": {"policy": confident(t)} for t in (0.5, 0.9)},
        "fixed layer": {
            f"layer {layer}": {"policy": fixed(layer)}
            for layer in sorted({dynamic.layers[len(dynamic.layers) * part // 4] for part in (1, 2, 3)})
        },
        "stop": {
            "stop at 0.9": {"stop_threshold": 0.9},
            "exit and stop at 0.9": {"exit_threshold": 0.9, "stop_threshold": 0.9},
        },
    }
    speed_up = run.compare(
        baseline=("all layers", completing("all layers")),
        method={name: completing(name, **options) for kind in kinds.values() for name, options in kind.items()},
        over=range(len(ids)),
        repeats=1,
        unit="s",
    )
    order = range(len(ids))
    whole = [made["all layers"][index].new_tokens[0] for index in order]

    def layers(name: str) -> float:
        # The first token is the prompt's pass, which is the same for all.
        spent = [sum(made[name][index].exit_layers[1:]) + (made[name][index].stopped_at or 0) for index in order]
        return sum(spent) / sum(len(made[name][index].exit_layers) - 1 for index in order)

    def agreement(name: str, texts: list[list[int]]) -> list[float]:
        return [rouge_l(made[name][index].new_tokens[0], texts[index]) for index in order]

    def record(name: str) -> None:
        run.record("layers a token", layers(name), unit="layers", better="lower", series=name)
        run.record("agreement", fmean(agreement(name, whole)), unit="ROUGE-L", better="higher", series=name)
        run.record("quality", fmean(agreement(name, truths)), unit="ROUGE-L", better="higher", series=name)

    plain = agreement("all layers", truths)
    curves: dict[str, list[tuple[float, float, float]]] = {"random exits": []}
    record("all layers")
    for kind in ("controller", "confident head", "fixed layer"):
        curves[kind] = []
        for name in kinds[kind]:
            record(name)
            curves[kind].append((layers(name), speed_up[name].value, fmean(agreement(name, whole))))
            if any(plain):
                run.ratio(
                    "quality, ratio", method=agreement(name, truths), baseline=plain, series=name, against="all layers"
                )
    for name in kinds["controller"]:
        pool = torch.tensor([layer for index in order for layer in made[name][index].exit_layers[1:]])
        dealt = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))].tolist()

        def at_random(layer: int, hidden: Any, dealt: list[int] = dealt) -> Action:
            if layer < dealt[-1]:
                return Action.CONTINUE
            dealt.pop()
            return Action.EXIT

        random = f"random for {name}"
        complete = completing(random, policy=at_random)
        for index in run.progress(order, f"random exits at the cost of {name}"):
            complete(index)
        record(random)
        run.ratio(
            "agreement at equal cost, ratio", method=agreement(name, whole), baseline=agreement(random, whole),
            series=name, against="random exits",
        )  # fmt: skip
        curves["random exits"].append((layers(random), speed_up[name].value, fmean(agreement(random, whole))))
    _record_stops(run, dynamic, ids, whole, truths)
    return curves


def _record_stops(
    run: Run, dynamic: DynamicInference, ids: Any, whole: list[list[int]], truths: list[list[int]]
) -> None:
    """Record where stops alone cut the completions with all layers, and how good those would have been."""
    import torch

    # Exits off, decisions while generating are those with the text given: one reading serves all thresholds.
    text = torch.cat([ids.cpu(), torch.tensor(whole)], 1)
    plain = [rouge_l(made, true) for made, true in zip(whole, truths, strict=True)]
    run.record("length", len(whole[0]), unit="tokens", better="higher", series="all layers")
    reading = dynamic.read(torch.cat([text, text[:, -1:]], 1))
    for threshold in (0.5, 0.7, 0.9, 0.97):
        series = f"stop at {threshold:g}"
        # The second new token is the first that may be stopped; the state that decides on it is the first one's.
        stops = reading.decide(_OFF, threshold)[1][:, ids.shape[1] : -1] < 0
        kept = torch.where(stops.any(1), stops.int().argmax(1) + 1, len(whole[0])).tolist()
        quality = [rouge_l(made[:count], true) for made, count, true in zip(whole, kept, truths, strict=True)]
        run.record("length", fmean(kept), unit="tokens", better="higher", series=series)
        run.record("quality when stopped", fmean(quality), unit="ROUGE-L", better="higher", series=series)
        stopped = stops.any(1).tolist()
        run.record("stopped", fmean(stopped), unit="of completions", better="lower", series=series)
        if any(stopped):
            whole_quality = fmean(value for value, stop in zip(plain, stopped, strict=True) if stop)
            run.record(
                "quality had the stopped run on", whole_quality, unit="ROUGE-L", better="lower", series=series
            )  # fmt: skip


def rouge_l(made: Sequence[int], true: Sequence[int]) -> float:
    """ROUGE-L of two token sequences: the F-measure of their longest common subsequence.

    Example:
        >>> rouge_l([1, 2, 3, 4], [1, 3, 5])  # 2 in common, of 4 and of 3
        0.5714285714285714
    """
    if not made or not true:
        return 0.0
    row = [0] * (len(true) + 1)
    for token in made:
        above = row[:]
        for index, other in enumerate(true, 1):
            row[index] = above[index - 1] + 1 if token == other else max(above[index], row[index - 1])
    return 2 * row[-1] / (len(made) + len(true))


def _share(mask: Any) -> float:
    return float(mask.double().mean())


def _figure(curves: dict[str, list[tuple[float, float, float]]]) -> Any:
    """Agreement with the text of all layers, against layers and against speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {
        "controller": {"color": "#1f6f8b", "marker": "o"},
        "random exits": {"color": "#a9b4bc", "marker": "o", "linestyle": "--"},
        "fixed layer": {"color": "#a9b4bc", "marker": "^", "linestyle": ":"},
        "confident head": {"color": "#333333", "marker": "s"},
    }
    for name, style in styles.items():
        layers, speeds, agreement = zip(*sorted(curves[name]), strict=True)
        left.plot(layers, agreement, label=name, **style)  # type: ignore[arg-type]
        if name != "random exits":
            right.plot(speeds, agreement, **style)  # type: ignore[arg-type]
    left.set_xlabel("layers a token")
    left.set_ylabel("agreement with all layers (ROUGE-L)")
    left.legend(frameon=False)
    right.set_xlabel("speed against all layers")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Leaving the model where the controller says so", fontsize=11)
    return figure
