"""LANTERN's relaxed acceptance against exact speculation, on an image model with a codebook of near-duplicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.measure import Effect
from paperworks.lab.recipe import Between, Data, Model, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import torch

    from paperworks.decoding import DraftingData, Hydra, RelaxedAcceptance
    from paperworks.recipes.decoding.images import ImageModel

_EXACT = "exact speculation"


@recipe(
    "lantern",
    baseline=_EXACT,
    gpu=3,
    # Greedy ones, whose baseline is another, are among all figures.
    rows=("plain decoding", _EXACT, "*delta *[0-9]"),
    columns=("speed-up", "accepted per call", "accepted per call, ratio", "digit as asked", "Fréchet distance"),
    tiny={
        "data": "digits",
        "size": 8,
        "codes": 32,
        "hidden_size": 16,
        "layers": 1,
        "epochs": 0.1,
        "deltas": "0.1,0.5",
        "neighbours": 8,
        "draft_images": 40,
        "nodes": 4,
        "samples": 20,
        "timed_images": 2,
        "text_model": "tiny-random-llama",
    },
    large={
        "size": 24,
        "codes": 4096,
        "hidden_size": 768,
        "layers": 12,
        "epochs": 30.0,
        "neighbours": 1000,
        "draft_images": 9000,
        "nodes": 30,
        "samples": 2000,
    },
)
def lantern(
    run: Run,
    data: Annotated[str, Data("auto", "mnist-10k", "digits")] = "auto",
    size: Annotated[int, Between(2, 24)] = 12,
    patch: Annotated[int, Between(1, 8)] = 2,
    codes: Annotated[int, Between(2, 4096)] = 1024,
    hidden_size: Annotated[int, Between(2, 256)] = 128,
    layers: Annotated[int, Between(1, 8)] = 4,
    epochs: Annotated[float, Between(0, 8)] = 2.0,
    guidance: Annotated[float, Between(1, 8)] = 2.0,
    deltas: str = "0.05,0.1,0.2,0.4",
    neighbours: Annotated[int, Between(1, 400)] = 100,
    draft_images: Annotated[int, Between(1, 8000)] = 2000,
    draft_epochs: Annotated[float, Between(0, 12)] = 3.0,
    nodes: Annotated[int, Between(1, 24)] = 6,
    samples: Annotated[int, Between(1, 1200)] = 300,
    timed_images: Annotated[int, Between(1, 120)] = 30,
    text_model: Annotated[str, Model()] = "smollm2-135m",
    seed: int = 0,
) -> None:
    """Relaxed acceptance at each budget delta against exact speculation with the same drafts.

    A transformer is trained to write handwritten digits as codes for small patches, of which many look alike, with
    classifier-free guidance, and Hydra heads to draft for it. Images are sampled at temperature 1. What relaxing
    costs is measured thrice: as the total variation between the law of one step and the target's, which delta does not
    bound; as the Fréchet distance of the images from real ones; and as the share that shows the digit asked for.

    Args:
        run: Keeps what is measured.
        data: Images to learn: mnist-10k, scikit-learn's digits, or the first of them that is at hand (auto); or your own, a
            folder with one subfolder a class or an .npz file.
        size: Side of the images in pixels.
        patch: Side of a patch, which one code stands for.
        codes: Codes in the codebook.
        hidden_size: Width of the image model.
        layers: Its layers.
        epochs: Passes over the images in its training.
        guidance: Scale of classifier-free guidance; 1 for none.
        deltas: Budgets to try, separated by commas, each within 0 and 1.
        neighbours: Nearest codes that may be counted with a drafted one.
        draft_images: Images to train the draft heads on.
        draft_epochs: Passes over them.
        nodes: Drafted codes a call.
        samples: Images to sample for quality and acceptance, of all classes in turn.
        timed_images: Images to time, one by one, besides the greedy one of each class.
        text_model: A language model to compare how sure each is of its next token; empty for none.
        seed: Of training and samples.
    """
    import torch

    from paperworks.decoding import Exact, RelaxedAcceptance, generate, nearest_codes
    from paperworks.decoding.guidance import ClassifierFreeGuidance
    from paperworks.recipes.decoding.images import frechet_distance, image_model

    budgets = _budgets(deltas)
    world = image_model(
        run, data=data, size=size, patch=patch, codes=codes, hidden_size=hidden_size, layers=layers, epochs=epochs,
        seed=seed,
    )  # fmt: skip
    target: Any = world.model
    if guidance != 1:
        target = ClassifierFreeGuidance(world.model, condition=range(world.null), null=world.null, scale=guidance)
    heads, held_out = _heads(run, world, target, guidance, draft_images, draft_epochs, nodes, seed)

    near = nearest_codes(world.codebook.vectors, min(neighbours, codes - 1))
    shuffle = torch.randperm(codes, generator=torch.Generator().manual_seed(seed))
    far = nearest_codes(world.codebook.vectors[shuffle], min(neighbours, codes - 1))
    relaxed = {
        f"delta {delta:g}": RelaxedAcceptance(near, delta=delta, first_code=world.first_code) for delta in budgets
    }
    control = f"random neighbours, delta {budgets[-1]:g}"
    relaxed[control] = RelaxedAcceptance(far, delta=budgets[-1], first_code=world.first_code)
    accepts: dict[str, Exact] = {_EXACT: Exact(), **relaxed}

    _record_certainty(run, target, held_out, text_model)
    departure = {name: _departure(run, name, accept, target, heads, held_out) for name, accept in relaxed.items()}

    length = world.codes[0].numel()
    labels = torch.arange(samples) % world.null

    def write(name: str | None, prompts: torch.Tensor, temperature: float, number: int) -> Any:
        drafter, accept = (heads, accepts[name]) if name is not None else (None, None)
        if not temperature and name == _EXACT:
            accept = None
        return generate(
            target, prompts[:, None], drafter=drafter, acceptance=accept, max_new_tokens=length,
            temperature=temperature, eos_token_id=[], generator=torch.Generator().manual_seed(number),
        )  # fmt: skip

    real = world.judge.features(world.images(world.sequences[:, 1:])[:, None])
    accepted: dict[str, list[float]] = {}
    shown: dict[str, torch.Tensor] = {}
    for name in run.progress([None, *accepts], "sampling images"):
        result = write(name, labels, 1.0, seed)
        images = world.images(torch.tensor(result.new_tokens))
        series = name or "plain decoding"
        shown[series] = images[: world.null]
        right = (world.judge.tell(images[:, None])[:, 0] == labels).float().mean()
        run.record("digit as asked", 100 * float(right), unit="%", better="higher", series=series)
        distance = frechet_distance(world.judge.features(images[:, None]), real)
        run.record("Fréchet distance", distance, better="lower", series=series)
        if name is not None:
            accepted[name] = [fmean(row) for row in result.statistics.emitted]
            most_likely = write(name, torch.arange(world.null), 0.0, seed).statistics.emitted
            accepted[f"{name}, greedy"] = [fmean(row) for row in most_likely]
    for way in ("", ", greedy"):
        for name in accepts:
            series = name + way
            run.record("accepted per call", fmean(accepted[series]), unit="codes", better="higher", series=series)
            if name != _EXACT:
                run.ratio(
                    "accepted per call, ratio", method=accepted[series], baseline=accepted[_EXACT + way], series=series,
                    against=_EXACT + way,
                )  # fmt: skip

    def timed(name: str | None, temperature: float = 1.0) -> Callable[[int], int]:
        return lambda index: len(write(name, labels[index : index + 1], temperature, seed + index).new_tokens[0])

    speed_up = run.compare(
        baseline=(_EXACT, timed(_EXACT)),
        method={"plain decoding": timed(None), **{name: timed(name) for name in relaxed if name != control}},
        over=range(min(timed_images, samples)),
        repeats=1,
        unit="codes/s",
    )
    compared = {"plain decoding": None, f"delta {budgets[-1]:g}": f"delta {budgets[-1]:g}", control: control}
    run.compare(
        baseline=(f"{_EXACT}, greedy", timed(_EXACT, 0.0)),
        method={f"{series}, greedy": timed(name, 0.0) for series, name in compared.items()},
        # Greedy, a class has one image.
        over=range(min(world.null, samples)),
        repeats=3,
        unit="codes/s",
    )
    run.figure(_figure(speed_up, accepted, departure, shown, budgets))


def _budgets(deltas: str) -> list[float]:
    try:
        budgets = [float(delta) for delta in deltas.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < delta <= 1 for delta in budgets) or len(set(budgets)) < len(budgets):
        raise UsageError(f"deltas are different numbers above 0 and at most 1, separated by commas, not {deltas!r}")
    return budgets


def _heads(
    run: Run, world: ImageModel, target: Any, guidance: float, images: int, epochs: float, nodes: int, seed: int
) -> tuple[Hydra, DraftingData]:
    """Hydra heads trained on images and the target's states, kept between runs, and what was held out."""
    import torch

    from paperworks import __version__
    from paperworks.decoding import Drafter, Hydra, collect, fit_tree, train_drafter
    from paperworks.lab.cache import cached_folder

    sequences = world.sequences.tolist()
    known = sequences[: -world.held_out][:images]

    def read(rows: Sequence[list[int]]) -> DraftingData:
        with run.progress(len(rows), "the target reads images") as bar:
            return collect(target, [(row[:1], row[1:]) for row in rows], batch_size=64, progress=bar.advance)

    held_out = read(sequences[-world.held_out :][:100])

    def build(folder: Path) -> None:
        torch.manual_seed(seed)
        heads = Hydra.from_target(target, heads=4)
        data = read(known)
        with run.progress(max(1, round(epochs * len(data) / 16)), "training Hydra") as bar:
            train_drafter(
                heads, target, data, epochs=epochs, batch_size=16, learning_rate=3e-3,
                generator=torch.Generator().manual_seed(seed), progress=bar.advance,
            )  # fmt: skip
        fit_tree(heads, target, held_out, nodes=nodes, greedy=False)
        heads.save_pretrained(folder)

    key = {
        "model": float(world.model.lm_head.weight.detach().double().abs().sum()), "guidance": guidance, "images": len(known),
        "epochs": epochs, "nodes": nodes, "seed": seed, "version": __version__,
    }  # fmt: skip
    return Drafter.from_pretrained(cached_folder("image-drafters", key, build), target), held_out  # type: ignore[return-value]


def _laws(target: Any, data: DraftingData) -> torch.Tensor:
    """The target's law at every place of held-out images, (images, length, vocab)."""
    from paperworks.decoding import Target

    return Target(target).logits(data.hidden).softmax(-1)


def _record_certainty(run: Run, target: Any, held_out: DraftingData, text_model: str) -> None:
    """How probable the most probable next token is, on images and on text."""
    import torch

    run.record("top-1 probability", float(_laws(target, held_out)[:, :-1].amax(-1).mean()), better="higher",
               series="image model")  # fmt: skip
    if text_model:
        from paperworks.hub import load_model, prompts

        model, tokenizer = load_model(text_model, dtype=torch.float32)
        tops = []
        for text in prompts()[:20]:
            with torch.inference_mode():
                logits = model(torch.tensor([tokenizer.encode(text)])).logits
            tops.append(logits.softmax(-1).amax(-1)[0, :-1])
        run.record("top-1 probability", float(torch.cat(tops).mean()), better="higher", series=text_model)


def _departure(
    run: Run, name: str, accept: RelaxedAcceptance, target: Any, heads: Hydra, held_out: DraftingData
) -> tuple[float, float]:
    """Record how far one step's law is from the target's, over the places of held-out images."""
    import torch

    from paperworks.decoding import Target

    with torch.inference_mode():
        first = next(heads.predictions(Target(target), held_out.tokens, held_out.hidden, held_out.mask))
        law = _laws(target, held_out)[tuple(first.positions.T)]
        children = first.logits.topk(heads.tree.levels[0].width).indices
        moved = accept.judged_by(law, children[:, 0]).gather(1, children[:, :1]) - law.gather(1, children[:, :1])
        distance = (accept.output_law(law, children) - law).abs().sum(-1) / 2
    run.record("mass moved to a draft", float(moved.mean()), better="lower", series=name)
    mean, high = float(distance.mean()), float(distance.quantile(0.99))
    run.record("total variation of a step", mean, better="lower", series=name)
    run.record("total variation of a step, 99 %", high, better="lower", series=name)
    return mean, high


def _figure(
    speed_up: Mapping[str, Effect],
    accepted: Mapping[str, list[float]],
    departure: Mapping[str, tuple[float, float]],
    shown: Mapping[str, torch.Tensor],
    budgets: Sequence[float],
) -> Any:
    """Gain and departure by delta, and images of every class by each setting."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 3, 4])
    relaxed = [f"delta {delta:g}" for delta in budgets]
    ratios = [speed_up[name] for name in relaxed]
    left.errorbar(
        budgets, [ratio.value for ratio in ratios], color="#1f6f8b", marker="o", capsize=3, label="speed",
        yerr=[[r.value - r.ends[0] for r in ratios], [r.ends[1] - r.value for r in ratios]],
    )  # fmt: skip
    exact = fmean(accepted[_EXACT])
    left.plot(
        budgets, [fmean(accepted[name]) / exact for name in relaxed], "--o", color="#d08770", label="codes a call"
    )
    left.axhline(1, color="#333333", linewidth=0.8)
    left.set(xlabel="delta", ylabel="against exact speculation")
    left.legend(frameon=False)
    middle.plot(budgets, [departure[name][0] for name in relaxed], "-o", color="#1f6f8b", label="one step, mean")
    middle.plot(budgets, [departure[name][1] for name in relaxed], "--o", color="#d08770", label="one step, 99 %")
    middle.plot(budgets, budgets, color="#333333", linewidth=0.8, label="delta")
    middle.set(xlabel="delta", ylabel="total variation from the target")
    middle.legend(frameon=False)
    rows = [torch.cat(list(images), dim=1) for images in shown.values()]
    right.imshow(torch.cat(rows).numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="equal")
    height = len(rows[0])
    right.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(shown), fontsize=7)
    right.set_xticks([])
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Relaxed acceptance of image codes that look alike", fontsize=11)
    return figure
