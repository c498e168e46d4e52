"""Next-row and next-frame prediction against next-token prediction, on clips of moving digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.lab.measure import Effect
from paperworks.lab.recipe import Between, Data, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from paperworks.decoding import NextBlockPrediction
    from paperworks.recipes.decoding.images import Codebook

_TOKEN = "next token"
_TEMPERATURES = (0.7, 0.85, 1.0)


@recipe(
    "next-block-prediction",
    baseline=_TOKEN,
    gpu=3,
    columns=("speed-up", "Fréchet distance", "Fréchet distance, continued", "bits a token", "digit as asked"),
    tiny={
        "data": "digits",
        "frames": 2,
        "size": 8,
        "codes": 16,
        "hidden_size": 16,
        "layers": 1,
        "train_clips": 64,
        "samples": 20,
        "groups": 2,
        "timed_clips": 2,
    },
    large={
        "frames": 16,
        "size": 32,
        "codes": 1024,
        "hidden_size": 768,
        "layers": 12,
        "train_clips": 1_000_000,
        "batch_size": 128,
        "samples": 2000,
        "timed_clips": 50,
    },
)
def next_block_prediction(
    run: Run,
    data: Annotated[str, Data("auto", "mnist-10k", "digits")] = "auto",
    frames: Annotated[int, Between(1, 8)] = 4,
    size: Annotated[int, Between(2, 24)] = 12,
    patch: Annotated[int, Between(1, 8)] = 2,
    codes: Annotated[int, Between(2, 1024)] = 256,
    hidden_size: Annotated[int, Between(2, 256)] = 128,
    layers: Annotated[int, Between(1, 8)] = 4,
    train_clips: Annotated[int, Between(1, 20_000)] = 5000,
    batch_size: Annotated[int, Between(1, 64)] = 16,
    samples: Annotated[int, Between(1, 1000)] = 250,
    groups: Annotated[int, Between(1, 16)] = 4,
    timed_clips: Annotated[int, Between(1, 40)] = 10,
    timed_batch: Annotated[int, Between(1, 4)] = 1,
    seed: int = 0,
) -> None:
    """Rows and frames at a time against token by token: passes, wall clock, likelihood and look of the clips.

    Clips of handwritten digits that move and bounce are cut into codes for small patches. Three decoders of one size are
    trained alike but for their block: a token, a row, a frame. Each then makes clips of a given digit, at the
    temperature that suited it best in a first group, and continues clips of which it is given the first half. The
    Fréchet distance is taken over features of a network that tells digit and direction.

    Args:
        run: Keeps what is measured.
        data: Images of the digits: mnist-10k, scikit-learn's digits, or the first of them that is at hand (auto); or your
            own, a folder with one subfolder a class or an .npz file.
        frames: Frames of a clip.
        size: Side of a frame in pixels; a digit's is two thirds of it.
        patch: Side of a patch, which one code stands for.
        codes: Codes in the codebook.
        hidden_size: Width of the decoders.
        layers: Their layers.
        train_clips: Clips that each is trained on.
        batch_size: Clips of a training step.
        samples: Clips of a group, of all digits in turn.
        groups: Groups to sample for the Fréchet distance and its interval.
        timed_clips: How often each makes clips against the clock.
        timed_batch: Clips made at once then.
        seed: Of clips, training and samples.
    """
    import torch

    from paperworks.recipes.decoding.images import Codebook, Judge, fit, frechet_distance, identity, pixels

    digits, classes = pixels(data, 2 * size // 3)
    kinds = int(classes.max()) + 1
    clips, moves = moving_clips(digits, frames, size, seed)
    held_out, given, side = len(clips) // 10, frames // 2, size // patch
    codebook = Codebook.fit(clips[:-held_out], codes=codes, patch=patch, seed=seed)
    tokens = codebook.encode(clips)
    shown = codebook.decode(tokens)
    blocks = {_TOKEN: (1, 1, 1), "next row": (1, 1, side), "next frame": (1, side, side)}
    models = {
        name: _trained(
            run, name, block, codebook, tokens[:-held_out], classes[:-held_out], kinds=kinds, data=identity(data, digits), hidden_size=hidden_size,
            layers=layers, train_clips=train_clips, batch_size=batch_size, seed=seed,
        )
        for name, block in blocks.items()
    }  # fmt: skip

    torch.manual_seed(seed)
    judge = Judge((frames, size, size), [kinds, 8])
    told = torch.stack([classes, moves], dim=1)
    steps = max(1, train_clips // 16)
    with run.progress(steps, "training the judge") as bar:
        fit(
            judge, judge.loss, [shown[:-held_out], told[:-held_out]], steps=steps, batch_size=64, seed=seed,
            advance=bar.advance,
        )  # fmt: skip
    real = judge.features(shown)
    asked = torch.arange(samples) % kinds
    begun = torch.arange(len(clips) - held_out, len(clips)).repeat(-(-samples // held_out))[:samples]

    def group(name: str, number: int, temperature: float, continued: bool) -> Tensor:
        """Clips of the digits asked for, or that go on from the first half of held-out ones."""
        return codebook.decode(
            models[name].generate(
                samples, label=classes[begun] if continued else asked, temperature=temperature,
                given=tokens[begun, :given] if continued else None,
                generator=torch.Generator().manual_seed(1000 * seed + number),
            )
        )  # fmt: skip

    def distance(clips: Tensor) -> float:
        return frechet_distance(judge.features(clips), real)

    distances: dict[str, list[float]] = {}
    strips = {"real": shown[-held_out:]}
    for name, model in run.progress(list(models.items()), "sampling clips"):
        run.record("passes a clip", model.blocks, better="lower", series=name)
        temperature = min(_TEMPERATURES, key=lambda t: distance(group(name, 0, t, False)))
        run.record("best temperature", temperature, better="higher", series=name)
        made = [group(name, 1 + number, temperature, False) for number in range(groups)]
        distances[name] = [distance(clips) for clips in made]
        right = (judge.tell(torch.cat(made))[:, 0] == asked.repeat(groups)).float().mean()
        run.record("digit as asked", 100 * float(right), unit="%", better="higher", series=name)
        strips[name] = made[0]
    _compare(run, "Fréchet distance", distances)
    _compare(
        run,
        "Fréchet distance, continued",
        {name: [distance(group(name, 1 + n, 1.0, True)) for n in range(groups)] for name in models},
    )
    test = slice(-min(held_out, 300), None)
    for known, what in ((0, "bits a token"), (given, "bits a token, continued")):
        count = math.log(2) * (frames - known) * side**2
        with torch.no_grad():
            cost = {
                name: (-model.log_prob(tokens[test], classes[test], given_frames=known) / count).tolist()
                for name, model in models.items()
            }
        _compare(run, what, cost)

    def make(name: str) -> Callable[[int], int]:
        def call(number: int) -> int:
            label = torch.full((timed_batch,), number % kinds)
            return (
                models[name].generate(timed_batch, label=label, generator=torch.Generator().manual_seed(number)).numel()
            )

        return call

    speed_up = run.compare(
        baseline=(_TOKEN, make(_TOKEN)),
        method={name: make(name) for name in models if name != _TOKEN},
        over=range(timed_clips),
        repeats=1,
        unit="tokens/s",
    )
    run.figure(_figure(strips, speed_up, distances))


def moving_clips(images: Tensor, frames: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips in which each image moves by a pixel a frame, aslant or straight, and bounces off the sides.

    Args:
        images: (n, side, side).
        frames: Frames of a clip.
        size: Side of a frame.
        seed: Of where each begins and where it goes.

    Returns:
        Clips (n, frames, size, size), and directions within 0..7, (n,).
    """
    import torch

    n, side = images.shape[:2]
    room = size - side
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(8, (n,), generator=generator)
    steps = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])[moves]
    start = torch.randint(room + 1, (n, 2), generator=generator)
    walked = (start[:, None] + steps[:, None] * torch.arange(frames)[:, None]) % (2 * room)
    place = room - (room - walked).abs()  # a walk beyond either side comes back
    line = torch.arange(side)
    clips = torch.zeros(n, frames, size, size)
    clips[
        torch.arange(n)[:, None, None, None], torch.arange(frames)[:, None, None],
        (place[..., 0, None] + line)[..., None], (place[..., 1, None] + line)[..., None, :],
    ] = images[:, None]  # fmt: skip
    return clips, moves


def _trained(
    run: Run,
    name: str,
    block: tuple[int, int, int],
    codebook: Codebook,
    tokens: Tensor,
    classes: Tensor,
    *,
    kinds: int,
    data: str | int,
    hidden_size: int,
    layers: int,
    train_clips: int,
    batch_size: int,
    seed: int,
) -> NextBlockPrediction:
    """A decoder of this block, trained now or on an earlier run."""
    import torch

    from paperworks import __version__
    from paperworks.decoding import NextBlockPrediction
    from paperworks.lab.cache import cached_folder
    from paperworks.recipes.decoding.images import fit

    codes = len(codebook.vectors)
    frames, rows, columns = tokens.shape[1:]
    grid = (frames, rows, columns)

    def build(folder: Path) -> None:
        torch.manual_seed(seed)
        model = NextBlockPrediction(
            vocab_size=codes, grid=grid, block=block, classes=kinds, hidden_size=hidden_size, layers=layers
        )
        for table in (model.backbone.embed_tokens, model.head):
            table.weight.data.copy_(codebook.embedding(hidden_size, seed))
        steps = max(1, train_clips // batch_size)
        with run.progress(steps, f"training {name}") as bar:
            fit(
                model, model.loss, [tokens, classes], steps=steps, batch_size=batch_size, seed=seed,
                advance=bar.advance,
            )  # fmt: skip
        model.save_pretrained(folder)

    key = {
        "data": data, "codebook": float(codebook.vectors.double().sum()),
        "grid": list(grid), "block": list(block), "hidden_size": hidden_size, "layers": layers,
        "train_clips": train_clips, "batch_size": batch_size, "seed": seed, "version": __version__,
    }  # fmt: skip
    return NextBlockPrediction.from_pretrained(cached_folder("block-models", key, build))


def _compare(run: Run, what: str, figures: Mapping[str, Sequence[float]]) -> None:
    """Record a mean of each model, and its ratio to next-token prediction's."""
    for name, values in figures.items():
        run.record(what, fmean(values), better="lower", series=name)
        if name != _TOKEN:
            run.ratio(
                f"{what}, ratio", method=values, baseline=figures[_TOKEN], better="lower", series=name, against=_TOKEN
            )


def _figure(strips: Mapping[str, Tensor], speed_up: Mapping[str, Effect], distances: Mapping[str, list[float]]) -> Any:
    """Clips of each model, how much faster it makes them, and how far they are from real ones."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[5, 2, 2])
    shown = min(6, *map(len, strips.values()))
    rows = [
        torch.nn.functional.pad(torch.cat(list(clips[:shown].flatten(0, 1)), dim=1), (0, 0, 1, 1))
        for clips in strips.values()
    ]
    height = len(rows[0])
    left.imshow(torch.cat(rows).numpy(), cmap="gray_r", vmin=0, vmax=1)
    for row in range(1, len(rows)):
        left.axhline(height * row - 0.5, color="#a9b4bc", linewidth=0.8)
    left.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(strips))
    left.set_xticks([])
    names = list(speed_up)[::-1]
    ratios = [speed_up[name] for name in names]
    middle.barh(
        names, [ratio.value for ratio in ratios], color="#1f6f8b", ecolor="#333333", capsize=3,
        xerr=[[r.value - r.ends[0] for r in ratios], [r.ends[1] - r.value for r in ratios]],
    )  # fmt: skip
    middle.set_xlabel("speed against next token")
    names = list(distances)[::-1]
    right.barh(names, [fmean(distances[name]) for name in names], color="#d08770")
    right.set_xlabel("Fréchet distance")
    for axes in (middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Moving digits, whole blocks at a time", fontsize=11)
    return figure
