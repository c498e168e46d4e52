"""Several drafts from the passes of one, against nucleus samples and beam search, on real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.measure import Effect
from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

_OURS = ("Superposed", "Superposed without n-grams")
_BASELINE = "nucleus, one by one"


@recipe(
    "superposed-decoding",
    baseline=_BASELINE,
    gpu=5,
    columns=("speed-up", "passes", "perplexity", "distinct drafts", "distinct tokens"),
    rows=(_BASELINE, "nucleus, one batch", "greedy", "beam search", "Superposed*"),
    tiny={"model": "tiny-random-llama", "corpus_tokens": 20_000, "prompt_count": 3},
    large={
        "model": "HuggingFaceTB/SmolLM2-1.7B",
        "corpus": "wikitext-2",
        "corpus_tokens": 2_000_000,
        "prompt_count": 500,
    },
)
def superposed_decoding(
    run: Run,
    model: Annotated[str, Model()] = "smollm2-135m",
    corpus: Annotated[str, Data("standard library", "wikitext-2")] = "standard library",
    corpus_tokens: Annotated[int, Between(1, 2_400_000)] = 600_000,
    prompt_count: Annotated[int, Between(1, 128)] = 32,
    prompt_tokens: Annotated[int, Between(1, 60)] = 15,
    new_tokens: Annotated[int, Between(1, 40)] = 10,
    drafts: Annotated[int, Between(1, 12)] = 3,
    alpha: Annotated[float, Between(0, 1)] = 0.54,
    temperature: Annotated[float, Between(0, 4)] = 0.06,
    top_tokens: Annotated[int, Between(1, 36)] = 9,
    top_p: Annotated[float, Between(0, 1)] = 0.9,
    repeats: Annotated[int, Between(1, 4)] = 1,
    seed: int = 0,
) -> None:
    """Drafts of held-out beginnings: their speed, and how likely the model itself finds them.

    The baseline are as many nucleus samples, drawn one after the other and in one batch; beam search and greedy decoding
    show how likely a text can be. All end after the same number of tokens. N-grams are counted on the rest of the corpus.

    Args:
        run: Keeps what is measured.
        model: Name of the model.
        corpus: Text for the n-gram model and the prompts: "standard library" for the documentation within this Python,
            or a text that the hub knows (wikitext-2, a .txt file).
        corpus_tokens: About so many tokens of it at most.
        prompt_count: Documents whose beginnings are continued; they are kept from the n-gram model.
        prompt_tokens: Tokens of a beginning.
        new_tokens: Tokens of a draft.
        drafts: Drafts of each prompt.
        alpha: Share of the n-gram model in the scores.
        temperature: Of superposed decoding.
        top_tokens: Tokens that superposed decoding considers.
        top_p: Probability of the tokens that a nucleus sample draws from.
        repeats: Turns for each prompt.
        seed: Of order and samples.
    """
    import torch

    from paperworks.decoding import NGramModel, SuperposedDecoding, Target, generate
    from paperworks.hub import load_model
    from paperworks.nn import pack_linears
    from paperworks.recipes.decoding.drafting import cpu_friendly_dtype, refusals

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_model(model, dtype=cpu_friendly_dtype(), device=device)
    with refusals():
        Target(target)
    pack_linears(target)
    prompts, rest = _split(_documents(corpus, seed), tokenizer, prompt_count, prompt_tokens, corpus_tokens)
    prompts = [prompt.to(device) for prompt in prompts]
    ngram = NGramModel().fit(rest)
    run.log(f"n-grams of {sum(map(len, rest)):,} tokens; prompts from {len(prompts)} other documents")
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": []}
    sampling = {"temperature": 1.0, "top_p": top_p, "generator": generator, **options}

    def superposed(**scores: Any) -> Callable[[Any], list[list[int]]]:
        decoding = SuperposedDecoding(target, drafts=drafts, temperature=temperature, top_tokens=top_tokens, **scores)
        return lambda prompt: decoding.generate(prompt, **options).new_tokens[0]

    def beam_search(prompt: Any) -> list[list[int]]:
        with torch.inference_mode():
            texts = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), num_beams=drafts, num_return_sequences=drafts,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False,
            )  # fmt: skip
        written: list[list[int]] = texts[:, prompt.shape[1] :].tolist()
        return written

    methods: dict[str, Callable[[Any], list[list[int]]]] = {
        _BASELINE: lambda prompt: [generate(target, prompt, **sampling).new_tokens[0] for _ in range(drafts)],
        "nucleus, one batch": lambda prompt: generate(target, prompt.expand(drafts, -1), **sampling).new_tokens,
        "greedy": lambda prompt: generate(target, prompt, **options).new_tokens,
        "beam search": beam_search,
        "Superposed": superposed(ngram=ngram, alpha=alpha),
        "Superposed without n-grams": superposed(),
    }
    texts: dict[str, dict[int, list[list[int]]]] = {name: {} for name in methods}
    passes = dict.fromkeys(methods, 0)

    def writing(name: str) -> Callable[[int], int]:
        def count(*_: Any) -> None:
            passes[name] += 1

        def call(index: int) -> int:
            passes[name] = 0
            hook = target.register_forward_hook(count)
            texts[name][index] = methods[name](prompts[index])
            hook.remove()
            return len(texts[name][index])

        return call

    speed_up = run.compare(
        baseline=(_BASELINE, writing(_BASELINE)),
        method={name: writing(name) for name in methods if name != _BASELINE},
        over=range(len(prompts)),
        repeats=repeats,
        unit="drafts/s",
    )
    perplexity: dict[str, list[float]] = {name: [] for name in methods}
    for index, prompt in run.progress(list(enumerate(prompts)), "the model reads all drafts"):
        for name, written in texts.items():
            perplexity[name].append(_perplexity(target, prompt, written[index]))
    for name, written in texts.items():
        run.record("passes", passes[name], unit="a prompt", better="lower", series=name)
        run.record("perplexity", fmean(perplexity[name]), better="lower", series=name)
        run.record(
            "distinct drafts", fmean(len(set(map(tuple, rows))) for rows in written.values()), unit="a prompt",
            better="higher", series=name,
        )  # fmt: skip
        run.record(
            "distinct tokens", fmean(map(_distinct_tokens, written.values())), unit="of all of a prompt",
            better="higher", series=name,
        )  # fmt: skip
    for name, other in [*((name, _BASELINE) for name in methods if name != _BASELINE), _OURS]:
        run.ratio(
            "perplexity, ratio", method=perplexity[name], baseline=perplexity[other], better="lower", series=name,
            against=other,
        )  # fmt: skip
    cosines = (
        torch.stack([_cosines(target, prompt, drafts) for prompt in run.progress(prompts, "mixing")]).mean(0).tolist()
    )
    for layer in sorted({len(cosines) // 2, len(cosines) - 1}):
        run.record("cosine of mixed and mean states", cosines[layer], better="higher", series=f"layer {layer}")
    run.figure(_figure(speed_up, perplexity, cosines, drafts))


def _documents(corpus: str, seed: int) -> Iterator[list[str]]:
    """Groups of texts that belong together, in random order: the docstrings of a module, a page, a paragraph."""
    import random

    from paperworks.hub import TextData, load_dataset

    shuffle = random.Random(seed).shuffle
    if corpus == "standard library":
        yield from _standard_library(shuffle)
        return
    # Of WikiText-2 the part that is meant to be learnt from; other texts have one part.
    text = load_dataset(corpus, split="train") if corpus == "wikitext-2" else load_dataset(corpus)
    if not isinstance(text, TextData):
        raise UsageError(f"{corpus} is no running text: give wikitext-2, a .txt file or standard library")
    paragraphs = list(text.paragraphs)
    shuffle(paragraphs)
    yield from ([paragraph] for paragraph in paragraphs)


def _standard_library(shuffle: Callable[[list[Any]], None]) -> Iterator[list[str]]:
    """The docstrings of each module of the standard library, and the pages of its built-in help."""
    import ast
    import sys
    import sysconfig
    from pathlib import Path
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for name in sorted(sys.stdlib_module_names)
        for file in (root / f"{name}.py", *sorted((root / name).rglob("*.py")))
        if file.is_file() and not {"test", "tests", "pydoc_data"} & set(file.relative_to(root).parts)
    ]
    sources: list[Any] = [*files, *topics.values()]
    shuffle(sources)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in sources:
        if isinstance(source, str):
            yield [source]
            continue
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates, and files in other encodings
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        yield [text for node in nodes if (text := ast.get_docstring(node))]


def _split(
    documents: Iterator[list[str]], tokenizer: Any, count: int, prompt_tokens: int, limit: int
) -> tuple[list[Any], list[list[int]]]:
    """Beginnings (1, prompt_tokens) of `count` texts, one a group, and the ids of the groups behind those.

    Raises:
        UsageError: There is too little text.
    """
    import torch

    prompts: list[Any] = []
    rest: list[list[int]] = []
    total = 0
    for texts in documents:
        rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
        if len(prompts) < count:
            # The longest is prose rather than a label.
            longest: list[int] = max(rows, key=len, default=[])
            prompts += [torch.tensor([longest[:prompt_tokens]])] if len(longest) > prompt_tokens else []
            continue
        rest += rows
        total += sum(map(len, rows))
        if total >= limit:
            break
    if len(prompts) < count or not any(len(row) > 1 for row in rest):
        raise UsageError(f"the corpus is too small for {count} prompts and n-grams: lower prompt_count")
    return prompts, rest


def _perplexity(target: Any, prompt: Any, drafts: Sequence[Sequence[int]]) -> float:
    """What the model at temperature 1 makes of all tokens of a prompt's drafts together."""
    import torch

    new = torch.tensor(drafts, device=prompt.device)
    ids = torch.cat([prompt.expand(len(new), -1), new], dim=1)
    with torch.inference_mode():
        logits = target(ids, logits_to_keep=new.shape[1] + 1).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), new.flatten()).exp())


def _distinct_tokens(drafts: Sequence[Sequence[int]]) -> float:
    tokens = [token for draft in drafts for token in draft]
    return len(set(tokens)) / len(tokens)


def _cosines(target: Any, prompt: Any, count: int) -> Any:
    """Cosine, layer by layer, of the state behind the mean of the `count` best tokens' embeddings and the mean state.

    A weight of 1 / count each is the hardest case: the nearer one draft's weight is to 1, the nearer is the cosine.

    Returns:
        (layers + 1,), from the embedding, where it is 1, to the state that the head reads.
    """
    import torch

    with torch.inference_mode():
        best = target(prompt, logits_to_keep=1).logits[0, -1].topk(count).indices
        embed = target.get_input_embeddings()
        newest = torch.cat([embed(best), embed(best).mean(0, keepdim=True)])
        past = embed(prompt).expand(count + 1, -1, -1)
        states = target(
            inputs_embeds=torch.cat([past, newest[:, None]], dim=1), output_hidden_states=True, logits_to_keep=1
        ).hidden_states
    last = torch.stack([state[:, -1].float() for state in states])
    return torch.cosine_similarity(last[:, -1], last[:, :-1].mean(1), dim=-1)


def _figure(
    speed_up: Mapping[str, Effect], perplexity: Mapping[str, Sequence[float]], cosines: Sequence[float], drafts: int
) -> Any:
    """Perplexity against speed, and how linear the model is, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, values in perplexity.items():
        place = (speed_up[name].value if name in speed_up else 1.0, fmean(values))
        left.plot(*place, "o", color="#1f6f8b" if name in _OURS else "#a9b4bc")
        left.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    left.set_xlabel(f"drafts a second, against {_BASELINE}")
    left.set_ylabel("perplexity of the drafts under the model")
    left.margins(x=0.25, y=0.1)
    right.plot(range(len(cosines)), cosines, "o-", color="#1f6f8b", markersize=3)
    right.set_xlabel("layer")
    right.set_ylabel("cosine of mixed and mean states")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Superposed decoding: {drafts} drafts from the passes of one", fontsize=11)
    return figure
