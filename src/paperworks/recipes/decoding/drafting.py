"""What recipes of the decoding room share: prompts as token ids, and drafters trained alike and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from paperworks import __version__
from paperworks.errors import UsageError
from paperworks.lab.cache import cached_folder
from paperworks.lab.display import span
from paperworks.lab.recipe import Between, Data, Model
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import torch

    from paperworks.decoding import Drafter, DraftingData

# Drafters that are trained alike: name in tables and on the command line, class in `paperworks.decoding`, its options.
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Medusa": ("Medusa", {}),
    "Hydra": ("Hydra", {}),
    "Hydra, 3 heads": ("Hydra", {"heads": 3}),
    "Hydra++": ("Hydra", {"prefix_layer": True, "layers": 4}),
    "Chimera": ("Chimera", {}),
    "Chimera, no trigrams": ("Chimera", {"trigram": False}),
    "Chimera, no context": ("Chimera", {"context_layers": 0}),
    # The published 60 nodes from 6 levels of 10 would cost more time than they save where 16 nodes are kept.
    "EAGLE-2": ("FSPAD", {"feature_sampling": False, "partial_alignment": False, "depth": 4, "top_k": 4}),
    "EAGLE-2, feature sampling": ("FSPAD", {"partial_alignment": False, "depth": 4, "top_k": 4}),
    "EAGLE-2, partial alignment": ("FSPAD", {"feature_sampling": False, "depth": 4, "top_k": 4}),
    "EAGLE-2, two layers": (
        "FSPAD",
        {"feature_sampling": False, "partial_alignment": False, "layers": 2, "depth": 4, "top_k": 4},
    ),
    "FSPAD": ("FSPAD", {"depth": 4, "top_k": 4}),
    "First layer": ("RecursiveSpeculation", {"draft": 1}),
    "First 4 layers": ("RecursiveSpeculation", {"draft": 4}),
}
# Answer tokens written, and kept, at once: a hundred a text. A GPU writes hundreds of texts in the time of a few.
_PART = {"cpu": 12_000, "cuda": 48_000}
# Sequences a step of training, and from how many tokens on it is said how long all will take.
_BATCH, _LONG = 8, 6000
# Beside a drafter: how often each rank is right where its tree has a fixed shape, else tokens a call by number of nodes.
_RANKS, _ACCEPTED = "ranks.safetensors", "accepted.json"
# The numbers of nodes, on so many held-out texts of so many tokens.
_SIZES, _TEXTS, _LENGTH = (4, 8, 12, 16), 4, 48


@dataclass(frozen=True)
class Drafting:
    """What recipes share that train drafters alike and decode the same prompts with each.

    Args:
        model: Name of the target.
        prompts: Prompts to decode, built-in or mt_bench, evenly spread over the set.
        prompt_count: How many of them.
        new_tokens: Tokens to generate for each.
        train_tokens: Answer tokens the model writes to train the drafters on.
        epochs: Passes over them.
        draft_vocabulary: Draft only the most frequent tokens, so many; 0 drafts all.
        nodes: Drafted tokens a call; 0 for as many as give the most tokens a second on this machine, none where no drafting pays.
        repeats: Turns for each prompt.
        equality_prompts: Prompts whose text in float32 is compared with transformers' greedy text.
    """

    model: Annotated[str, Model()] = "smollm2-135m"
    prompts: Annotated[str, Data("built-in", "mt_bench")] = "built-in"
    prompt_count: Annotated[int, Between(1, 32)] = 8
    new_tokens: Annotated[int, Between(1, 384)] = 96
    train_tokens: Annotated[int, Between(1, 96_000)] = 24_000
    epochs: Annotated[float, Between(0, 12)] = 3.0
    draft_vocabulary: Annotated[int, Between(0, 16_384)] = 4096
    nodes: Annotated[int, Between(0, 32)] = 8
    repeats: Annotated[int, Between(1, 4)] = 1
    equality_prompts: Annotated[int, Between(0, 40)] = 20


# What their table shows.
COLUMNS = ("speed", "speed-up", "accepted per call", "drafting share", "same text")

# What these parameters are at scale tiny, which takes seconds, and at scale paper, on a GPU.
TINY: dict[str, object] = {
    "model": "tiny-random-llama", "prompt_count": 2, "new_tokens": 12, "train_tokens": 600, "epochs": 1.0,
    "draft_vocabulary": 64, "nodes": 4, "equality_prompts": 2,
}  # fmt: skip
LARGE: dict[str, object] = {
    "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct", "prompts": "mt_bench", "prompt_count": 80,
    "train_tokens": 2_000_000, "draft_vocabulary": 32_000,
}  # fmt: skip


def cpu_friendly_dtype() -> torch.dtype:
    """bfloat16 where the processor or GPU multiplies it in hardware, else float32."""
    import torch

    from paperworks.nn import multiplies_bfloat16

    return torch.bfloat16 if multiplies_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else torch.float32


@contextmanager
def refusals() -> Iterator[None]:
    """What a method says of a user's model that it cannot take is bad use, and no failed run."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def load_target(model: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model that will not be trained, on the GPU where there is one, laid out for few tokens at a time; its tokenizer."""
    import torch

    from paperworks.decoding import Target
    from paperworks.hub import load_model
    from paperworks.nn import pack_linears

    if not torch.cuda.is_available():
        # Under a mask too, attention shares keys between heads and does not copy them for each.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    target, tokenizer = load_model(model, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    with refusals():
        Target(target)
    return pack_linears(target), tokenizer


def encode(tokenizer: Any, text: str, *, chat: bool = True) -> torch.Tensor:
    """What a user says as (1, length) token ids, through the chat template where there is one and `chat` wants it."""
    import torch

    if chat and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    return torch.tensor([tokenizer.encode(text)])


def prompt_ids(model: str, prompts: str, count: int, *, dtype: torch.dtype) -> tuple[Any, Any, list[torch.Tensor]]:
    """The model, its tokenizer, and `count` prompts as (1, length) token ids, evenly spread over their set.

    Raises:
        UsageError: There are not so many prompts.
    """
    from paperworks.hub import prompts as load_prompts

    texts = load_prompts(prompts)
    if not 1 <= count <= len(texts):
        raise UsageError(
            f"{prompts} has {len(texts)} prompts, so {count} of them cannot be taken: give 1 to {len(texts)}"
        )
    target, tokenizer = load_target(model, dtype=dtype)
    return (
        target,
        tokenizer,
        [encode(tokenizer, text).to(target.device) for text in texts[:: len(texts) // count][:count]],
    )


def _example_questions() -> list[str]:
    """What users ask, beside which the model asks itself more; none of `paperworks.hub.prompts`, which stay held out."""
    return (
        resources.files("paperworks.recipes.decoding")
        .joinpath("questions.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )


def drafting_data(
    run: Run,
    target: Any,
    tokenizer: Any,
    *,
    model: str,
    tokens: int,
    seed: int,
    temperature: float,
    estimate: Callable[[DraftingData, float], object] = lambda part, seconds: None,
) -> DraftingData:
    """Text that the target wrote itself, with its hidden states; the same for every drafter.

    It is written and kept in parts, so that a run that was stopped goes on where it was, and a longer one begins with
    what a shorter one wrote. Every other part answers what the model asks by itself, which is what it knows best; the rest
    what it asks behind examples, for by itself it asks much the same few things.

    Args:
        run: Shows progress.
        target: The model that writes.
        tokenizer: Its tokenizer.
        model: The model's name.
        tokens: Answer tokens.
        seed: Of the text.
        temperature: Of the text.
        estimate: Called once, behind the first part that had to be written or, if none had, the last: with that part, and
            the seconds that the parts behind it will take if they all have to be written.
    """
    from paperworks.decoding import DraftingData, collect, self_written

    size = min(_PART.get(target.device.type, _PART["cpu"]), tokens)
    examples = _example_questions()
    parts, count, told = [], -(-tokens // size), False
    seconds: list[float] = []
    with run.progress(tokens, "the target writes its training text") as bar:
        for part in range(count):
            index, behind_examples = divmod(part, 2)
            asking = {"examples": examples, "question_temperature": 1.0} if behind_examples else {}

            def build(folder: Path, index: int = index, asking: dict[str, Any] = asking) -> None:
                import torch

                start = perf_counter()
                generator = torch.Generator(target.device).manual_seed(1000 * seed + index)
                pairs = self_written(
                    target, tokenizer, tokens=size, temperature=temperature,
                    batch_size=max(1, size // 100), generator=generator, progress=bar.advance, **asking,
                )  # fmt: skip
                collect(target, pairs, progress=False).save(folder / "data.safetensors")
                seconds.append(perf_counter() - start)

            key = {
                "model": model_identity(model, target), "tokens": size, "part": index, "seed": seed,
                "temperature": temperature, "version": __version__, **asking,
            }  # fmt: skip
            folder = cached_folder("drafting-data", key, build)
            parts.append(DraftingData.load(folder / "data.safetensors"))
            bar.advance(size * (part + 1) - bar.bar.done)
            if not told and (seconds or part == count - 1):
                told = True
                estimate(parts[-1], (count - 1 - part) * sum(seconds))
    return DraftingData.join(parts)


def drafter_named(method: str) -> str:
    """The name in `DRAFTERS` that `method` spells in any case.

    Raises:
        UsageError: There is none.

    Example:
        >>> drafter_named("fspad")
        'FSPAD'
    """
    name = next((name for name in DRAFTERS if name.lower() == method.lower()), None)
    if name is None:
        known = ", ".join(name.lower() for name in DRAFTERS)
        raise UsageError(f"there is no method {method!r}: drafters are {known}; and plain drafts nothing")
    return name


def untrained(name: str, target: Any, vocabulary: torch.Tensor | int = 0) -> Drafter:
    """A fresh drafter called `name` (see `DRAFTERS`) for some tokens, or the first so many; 0 stands for all.

    Raises:
        UsageError: It cannot draft for this model.
    """
    import paperworks.decoding

    kind, options = DRAFTERS[name]
    if isinstance(vocabulary, int):
        vocabulary = min(vocabulary, len(target.get_output_embeddings().weight)) or None  # type: ignore[assignment]
    with refusals():
        return getattr(paperworks.decoding, kind).from_target(target, vocabulary=vocabulary, **options)  # type: ignore[no-any-return]


def trained(
    run: Run,
    name: str,
    target: Any,
    tokenizer: Any,
    *,
    model: str,
    tokens: int,
    epochs: float,
    vocabulary: int,
    nodes: int | None,
    seed: int,
    temperature: float = 0.7,
) -> Drafter:
    """The drafter called `name` (see `DRAFTERS`), trained on the common data; kept between runs.

    Args:
        run: Shows progress.
        name: One of `DRAFTERS`.
        target: The model to draft for.
        tokenizer: Its tokenizer.
        model: The model's name.
        tokens: Answer tokens that the target writes to train on.
        epochs: Passes over them.
        vocabulary: Draft only the most frequent tokens, so many; 0 drafts all.
        nodes: Drafted tokens a call; a tree of fixed shape is fitted to what greedy decoding accepts on held-out text. It
            may differ from call to call: what was trained is kept for all. If None, so many as give the most tokens a second
            on this machine, none where no drafting pays.
        seed: Of text, order and weights.
        temperature: Of the text.
    """
    from safetensors.torch import save_file

    from paperworks.decoding import TreeShape, rank_accuracy, train_drafter

    if nodes is not None and nodes < 1:
        raise UsageError(f"a call drafts at least 1 token, got nodes={nodes}: leave drafting out with plain decoding")
    kind, options = DRAFTERS[name]
    fresh: list[Path] = []

    def build(folder: Path) -> None:
        import torch

        # What cannot be is refused before the model writes its text.
        untrained(name, target, vocabulary)

        def estimate(part: DraftingData, writing: float) -> None:
            if tokens >= _LONG:
                sequences = len(part) * tokens / min(tokens, _PART.get(target.device.type, _PART["cpu"]))
                training = (
                    epochs * sequences / _BATCH * _step_seconds(untrained(name, target, vocabulary), target, part)
                )
                run.log(
                    f"{name}: about {span(writing)} to write its text and {span(training)} to train on it; the text is kept, "
                    "so that it goes on from there if it is stopped"
                )

        data = drafting_data(
            run, target, tokenizer, model=model, tokens=tokens, seed=seed, temperature=temperature, estimate=estimate
        )  # fmt: skip
        train, held_out = data.split(max(1, min(64, len(data) // 10)))
        torch.manual_seed(seed)
        known = len(target.get_output_embeddings().weight)
        drafter: Any = untrained(name, target, train.frequent_tokens(min(vocabulary, known)) if vocabulary else 0)
        batch = min(_BATCH, len(train))
        with run.progress(max(1, round(epochs * len(train) / batch)), f"training {name}") as bar:
            train_drafter(
                drafter, target, train, epochs=epochs, batch_size=batch,
                generator=torch.Generator().manual_seed(seed), progress=bar.advance,
            )  # fmt: skip
        if isinstance(getattr(drafter, "tree", None), TreeShape):
            accuracy = rank_accuracy(drafter, target, held_out, greedy=True)
            save_file({"accuracy": accuracy}, folder / _RANKS)
        # As the model has them, in half the space where that is bfloat16.
        drafter.to(target.dtype)
        if hasattr(drafter, "nodes"):
            (folder / _ACCEPTED).write_text(json.dumps(_accepted(drafter, target, held_out)))
        drafter.save_pretrained(folder)
        fresh.append(folder)

    key = {
        "model": model_identity(model, target), "kind": kind, "options": options, "tokens": tokens, "epochs": epochs,
        "vocabulary": vocabulary, "seed": seed, "temperature": temperature, "examples": _example_questions(),
        "version": __version__,
    }  # fmt: skip
    folder = cached_folder("drafters", key, build)
    if fresh:
        run.log(f"{name} for {Path(model).name} lies in {folder}")
    return fitted(run, name, folder, target, nodes)


def shipped(run: Run, target: Any, *, model: str, nodes: int | None) -> Drafter | None:
    """The Hydra heads that come with the package for this very model, with a tree for this machine; None where there are none.

    Args:
        run: Told which tree was chosen.
        target: The model to draft for.
        model: The model's name.
        nodes: As for `trained`.
    """
    from paperworks.decoding.identity import difference

    folder = Path(str(resources.files("paperworks.recipes.decoding").joinpath("heads", Path(model).name)))
    if not (folder / "config.json").is_file():
        return None
    made_for = json.loads((folder / "config.json").read_text(encoding="utf-8"))["made_for"]
    return fitted(run, "Hydra", folder, target, nodes) if difference(made_for, target) is None else None


def fitted(run: Run, name: str, folder: Path, target: Any, nodes: int | None) -> Drafter:
    """A drafter that was trained and lies in a folder, with a tree of so many nodes, or the best for this machine.

    Args:
        run: Told which tree was chosen.
        name: What the drafter is called.
        folder: Where it lies, with what was measured on held-out text.
        target: The model to draft for.
        nodes: As for `trained`.
    """
    from safetensors.torch import load_file

    from paperworks.decoding import Drafter, TreeShape
    from paperworks.decoding.costs import choose_nodes, choose_tree
    from paperworks.nn import pack_linears

    drafter = pack_linears(Drafter.from_pretrained(folder, target))
    if (folder / _RANKS).exists():
        accuracy = load_file(folder / _RANKS)["accuracy"]
        if nodes is not None:
            drafter.tree = TreeShape.best(accuracy, nodes)  # type: ignore[assignment]
        else:
            choice = choose_tree(drafter, target, accuracy)  # type: ignore[arg-type]
            drafter.tree = choice.tree  # type: ignore[assignment]
            run.log(f"{name} on this machine: {choice}")
    elif (folder / _ACCEPTED).exists():
        if nodes is None:
            accepted = {int(size): tokens for size, tokens in json.loads((folder / _ACCEPTED).read_text()).items()}
            nodes, gain = choose_nodes(drafter, target, accepted)  # type: ignore[arg-type]
            told = f"{nodes} nodes, about {gain:.2f} times plain decoding" if nodes else "no drafting pays here"
            run.log(f"{name} on this machine: {told}")
        drafter.nodes = nodes  # type: ignore[assignment]
    return drafter  # type: ignore[return-value]


def _accepted(drafter: Any, target: Any, held_out: DraftingData) -> dict[int, float]:
    """Tokens that a call gives by number of nodes, greedily behind held-out questions."""
    from paperworks.decoding import Target, generate

    found, before, most = {}, drafter.nodes, Target(target).context or 2**31
    rows = [row for row in range(len(held_out)) if bool(held_out.mask[row].any())][:_TEXTS]
    prompts = [held_out.tokens[row, : int(held_out.mask[row].int().argmax())][None].to(target.device) for row in rows]
    for size in _SIZES:
        drafter.nodes = size
        costs = [
            generate(target, prompt, drafter=drafter, max_new_tokens=min(_LENGTH, most - prompt.shape[1])).statistics
            for prompt in prompts
        ]
        # Where a text ends at once nothing is told.
        emitted = [count for cost in costs for row in cost.emitted for count in row] or [1]
        found[size] = sum(emitted) / len(emitted)
    drafter.nodes = before
    return found


def _step_seconds(drafter: Drafter, target: Any, part: DraftingData) -> float:
    """How long a step of training takes: of three steps of a drafter that is thrown away, the shorter of the last two."""
    from paperworks.decoding import train_drafter

    batch, ends = min(_BATCH, len(part)), [perf_counter()]
    train_drafter(
        drafter, target, part, epochs=3 * batch / len(part), batch_size=batch,
        progress=lambda steps: ends.append(perf_counter()),
    )  # fmt: skip
    return min(later - earlier for earlier, later in pairwise(ends[1:]))


def pit(
    run: Run, names: Sequence[str], work: Drafting, *, against: str | None, title: str, seed: int, ready: bool = False
) -> None:
    """Train drafters alike, decode the same prompts greedily with each in turn, and record what each gains and costs.

    Turns are shared with plain decoding and with what transformers offers by itself. All drafters have the same data,
    draft vocabulary and number of drafted tokens a call.

    Args:
        run: Keeps what is measured.
        names: The drafters, of `DRAFTERS`.
        work: Model, prompts and training.
        against: That one of them with which the accepted tokens of the others are compared, None for none.
        title: Of the figure.
        seed: Of text, order and weights.
        ready: Take the heads that come with the package and train nothing; `names` is Hydra alone.

    Raises:
        UsageError: No heads come with the package for this model.
    """
    import torch

    from paperworks.decoding import generate

    target, tokenizer, ids = prompt_ids(work.model, work.prompts, work.prompt_count, dtype=cpu_friendly_dtype())
    for name in names:
        untrained(name, target, work.draft_vocabulary)
    nodes = work.nodes or None
    drafters: dict[str, Any] = {}
    if ready:
        drafters[names[0]] = shipped(run, target, model=work.model, nodes=nodes)
        if drafters[names[0]] is None:
            raise UsageError(
                f"no heads come with paperworks for {work.model}, only for smollm2-135m: leave --heads out, and they are trained"
            )
    for name in names if not ready else ():
        drafters[name] = trained(
            run, name, target, tokenizer, model=work.model, tokens=work.train_tokens, epochs=work.epochs,
            vocabulary=work.draft_vocabulary, nodes=nodes, seed=seed,
        )  # fmt: skip
    accepted: dict[str, dict[int, float]] = {name: {} for name in drafters}
    calls: dict[str, dict[int, int]] = {name: {} for name in drafters}
    drafting: dict[str, list[float]] = {name: [] for name in drafters}

    def decode(name: str | None) -> Callable[[int], int]:
        def call(index: int) -> int:
            result = generate(
                target, ids[index], drafter=drafters[name] if name else None, max_new_tokens=work.new_tokens
            )
            if name:
                cost = result.statistics
                accepted[name][index] = cost.accepted_per_call
                calls[name][index] = cost.target_calls
                drafting[name].append(cost.drafting_seconds / (cost.drafting_seconds + cost.target_seconds))
            return len(result.new_tokens[0])

        return call

    def theirs(**options: Any) -> Callable[[int], int]:
        def call(index: int) -> int:
            with torch.inference_mode():
                text = target.generate(ids[index], max_new_tokens=work.new_tokens, do_sample=False, **options)
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
        repeats=work.repeats,
        unit="tokens/s",
    )
    for name in drafters:
        mean = fmean(accepted[name].values())
        run.record("accepted per call", mean, unit="tokens", better="higher", series=name)
        run.record("calls", sum(calls[name].values()), unit="passes", better="lower", series=name)
        run.record("drafting share", fmean(drafting[name]), unit="of time", better="lower", series=name)
    order = range(len(ids))
    for name in [name for name in drafters if name != against] if against else []:
        assert against is not None
        run.ratio(
            "accepted per call, ratio",
            method=[accepted[name][index] for index in order],
            baseline=[accepted[against][index] for index in order],
            better="higher",
            series=name,
            against=against,
        )
        run.ratio(
            "speed, ratio",
            method=speed_up[name].repeats,
            baseline=speed_up[against].repeats,
            better="higher",
            series=name,
            against=against,
        )
    if work.equality_prompts:
        compare_texts(run, work.model, work.prompts, work.equality_prompts, work.new_tokens, drafters)
    run.figure(
        speed_figure(title, speed_up, {name: fmean(values.values()) for name, values in accepted.items()}, against)
    )


def compare_texts(run: Run, model: str, prompts: str, count: int, new_tokens: int, drafters: dict[str, Any]) -> None:
    """Record for how many prompts the text in float32 is transformers' own greedy text, token for token."""
    import copy

    import torch
    from torch.nn.utils.rnn import pad_sequence

    from paperworks.decoding import generate

    target, _, ids = prompt_ids(model, prompts, count, dtype=torch.float32)
    rows = [row[0] for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    with run.progress(2 + len(drafters), "comparing texts in float32") as bar:
        with torch.inference_mode():
            expected = target.generate(padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        bar.advance()
        for name, drafter in {"plain decoding": None, **drafters}.items():
            in_float32 = None if drafter is None else copy.deepcopy(drafter).float()
            texts = generate(
                target, padded, attention_mask=mask, drafter=in_float32, max_new_tokens=new_tokens,
                pad_token_id=int(target.generation_config.pad_token_id or 0),
            ).sequences  # fmt: skip
            same = sum(ours.tolist() == theirs.tolist() for ours, theirs in zip(texts, expected, strict=True))
            run.record("same text", same, unit=f"of {count}", better="higher", series=name)
            bar.advance()


def speed_figure(title: str, speed_up: dict[str, Any], accepted: dict[str, float], against: str | None) -> Any:
    """Speed against plain decoding with intervals, and accepted tokens beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.35 * len(speed_up)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    names = list(speed_up)[::-1]
    values = [speed_up[name].value for name in names]
    lows = [speed_up[name].value - speed_up[name].ends[0] for name in names]
    highs = [speed_up[name].ends[1] - speed_up[name].value for name in names]

    def colour(name: str) -> str:
        return "#1f6f8b" if name in accepted and name != against else "#a9b4bc"

    left.barh(names, values, xerr=[lows, highs], color=[colour(name) for name in names], ecolor="#333333", capsize=3)
    left.axvline(1, color="#333333", linewidth=0.8)
    left.set_xlabel("speed against plain decoding")
    right.barh(list(accepted)[::-1], list(accepted.values())[::-1], color=[colour(name) for name in accepted][::-1])
    right.axvline(1, color="#333333", linewidth=0.8)
    right.set_xlabel("tokens a target call")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def model_identity(model: str, target: Any) -> dict[str, Any]:
    """What tells this model from another of the same name: type, size and a digest of all its weights."""
    from paperworks.decoding.identity import weights_digest

    return {
        "name": Path(model).name,
        "parameters": sum(parameter.numel() for parameter in target.parameters()),
        "dtype": str(target.dtype),
        "weights": weights_digest(target),
    }
