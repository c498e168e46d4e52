"""Programmable variational inference: bounds on a noisy cone, estimators on images of several digits, and what it costs."""

from __future__ import annotations

import math
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from paperworks.uncertainty.vi import Estimator

# Objectives on the cone, and where the guide's parameters start: mean and log deviation of x and y, or log deviations
# about the ring. IWELBO starts on one side, for between both modes it takes long to leave the middle.
STARTS = {
    "ELBO": (0.0, 0.0, 0.0, 0.0),
    "IWELBO (5)": (3.0, 0.0, 0.0, 0.0),
    "HVI": (0.0, 0.0),
    "IWHVI (5)": (0.0, 0.0),
    "DIWHVI (5, 5)": (0.0, 0.0),
}
BEST = "DIWHVI (5, 5)"
PYRO, PYRO_RENYI = "Pyro, ELBO", "Pyro, Renyi (5)"
EVIDENCE = -5.323232
ESTIMATORS = ("Enum", "MVD", "Reinforce, baseline", "Reinforce")
BASELINED = "Reinforce, baseline"
COLOURS = {"Enum": "#1f6f8b", "MVD": "#5f9e6e", BASELINED: "#c98b2b", "Reinforce": "#8a8a8a"}
NOISE, CODE, TESTED, EVERY = 0.3, 8, 256, 20


@recipe(
    "programmable-vi",
    baseline="Pyro: its ELBO and Renyi bound, its enumeration and score-function estimators; a gradient written by hand",
    columns=(
        "bound on the cone",
        "test ELBO of the images",
        "flips all right",
        "steps to the baselined ELBO against Reinforce, baseline",
        "seconds to the baselined ELBO against Reinforce, baseline",
        "speed-up against by hand, batch 1024",
    ),
    tiny={
        "cone_steps": 10, "image_steps": 40, "draws": 4, "slots": 2, "seeds": 2, "evaluated": 200, "batches": "8",
        "timed": 2,
    },
    large={"image_steps": 5000, "slots": 6, "seeds": 10, "evaluated": 1_000_000, "batches": "64, 128, 256, 512, 1024"},
    gpu=1,
)  # fmt: skip
def programmable_vi(
    run: Run,
    data: Annotated[str, Data("digits", "wine", "breast_cancer")] = "digits",
    cone_steps: Annotated[int, Between(1, 5000)] = 5000,
    draws: Annotated[int, Between(1, 64)] = 64,
    evaluated: Annotated[int, Between(1, 200_000)] = 200_000,
    slots: Annotated[int, Between(1, 5)] = 4,
    image_steps: Annotated[int, Between(1, 600)] = 600,
    batches: str = "64, 1024",
    timed: Annotated[int, Between(1, 8)] = 8,
    seeds: Annotated[int, Between(2, 5)] = 5,
    seed: int = 0,
) -> None:
    """Bounds on the evidence of a noisy cone, estimators of one gradient on images of several digits, and overhead.

    On the cone x, y ~ N(0, 10^2), z ~ N(x^2 + y^2, (.1 + (x^2 + y^2) / 100)^2), z = 5, a mean-field guide and one on a ring, whose angle is
    summed out, are trained by five objectives, and by Pyro's ELBO and Renyi bound. Pyro's Renyi bound takes one estimate
    a step, as it cannot take several. All trainings by one objective are one batch.

    An image has several slots, each with a row of `data` or empty, and noise. The guide says of each slot whether it is
    empty, and of what is in it a code. The same objective is trained with four estimators for the flips. What the score function with a
    baseline reaches in the end is what the others are to reach, in steps and in seconds of training alone.

    Last, the gradient of a variational autoencoder is timed beside one written by hand and Pyro's, also without the checks of
    arguments that torch.distributions makes, and that of the images beside Pyro's.

    Args:
        run: Keeps what is measured.
        data: What lies in the slots: a table of your own, images, or a name. A table's columns are stretched to 0 and 1.
        cone_steps: Of SGD, of 1e-3.
        draws: A step on the cone.
        evaluated: Draws by which the final bound is told.
        slots: Of an image; Enum runs 2 to their power branches.
        image_steps: Of Adam, of 1e-3, with 64 images each.
        batches: Sizes of the autoencoder's batches that are timed, with commas between.
        timed: Batches that are timed, of each size.
        seeds: Trainings of each kind.
        seed: Of the first.
    """
    sizes = _sizes(batches)
    rows = _rows(data)
    bounds = _cone(run, cone_steps, draws, evaluated, seeds, seed)
    for name, values in bounds.items():
        run.mean("bound on the cone", values, unit="nats", better="higher", series=name)
        if name != BEST:
            run.difference(
                "bound gained on the cone", method=bounds[BEST], baseline=values, unit="nats", better="higher",
                series=BEST, against=name,
            )  # fmt: skip
        run.record("bound short of the evidence", EVIDENCE - _mean(values), unit="nats", better="lower", series=name)
    trained = _images(run, rows, slots, image_steps, seeds, seed)
    _record_images(run, trained)
    _time_autoencoders(run, sizes, timed, seed)
    _time_images(run, rows, slots, timed, seed)
    run.figure(_figure(bounds, trained))


def _sizes(batches: str) -> list[int]:
    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 5 or not all(1 <= size <= 4096 for size in sizes) or len(set(sizes)) < len(sizes):
        raise UsageError(
            f"batches are up to five different whole numbers of 1 to 4096 with commas between, not {batches!r}"
        )
    return sizes


def _rows(data: str) -> Tensor:
    """What may lie in a slot, (n, width) within 0 and 1."""
    import numpy as np
    import torch

    from paperworks.hub import ImageData, TableData, load_dataset

    loaded = load_dataset(data)
    if isinstance(loaded, ImageData):
        return torch.tensor(loaded.resized(8).as_table().X, dtype=torch.float32)
    if not isinstance(loaded, TableData):
        raise UsageError(f"{data} is neither a table nor images, of which a row or an image lies in a slot")
    # scikit-learn has its digits as a table, with ink from 0 to 16.
    if data == "digits":
        return torch.tensor(loaded.X / 16, dtype=torch.float32)
    low, extent = loaded.X.min(0), np.ptp(loaded.X, axis=0)
    return torch.tensor((loaded.X - low) / np.where(extent > 0, extent, 1), dtype=torch.float32)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The noisy cone.


def _cone(run: Run, steps: int, draws: int, evaluated: int, seeds: int, seed: int) -> dict[str, list[float]]:
    """The bound that each objective reaches, one a training, in exact terms of its own objective."""
    import torch

    objectives = _cone_objectives()
    bounds: dict[str, list[float]] = {}
    for name, objective in objectives.items():
        theta = torch.tensor([STARTS[name]] * seeds, dtype=torch.float64, requires_grad=True)
        generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.SGD([theta], lr=1e-3)
        for _ in run.progress(steps, f"cone, {name}"):
            optimizer.zero_grad()
            (-objective(theta).surrogate(draws=draws, batch_shape=(seeds,), generator=generator).sum()).backward()
            optimizer.step()
        bounds[name] = _evaluated(objective(theta.detach()), evaluated, seeds, seed)
    for name, of in ((PYRO, "ELBO"), (PYRO_RENYI, "IWELBO (5)")):
        theta = _pyro_cone(run, name, STARTS[of], steps, draws, seeds, seed)
        bounds[name] = _evaluated(objectives[of](theta), evaluated, seeds, seed)
    return bounds


def _evaluated(estimator: Estimator, draws: int, seeds: int, seed: int) -> list[float]:
    """The expectation for each training, by draws that no training saw."""
    import torch

    generator = torch.Generator().manual_seed(10_000 + seed)
    parts = [min(10_000, draws - done) for done in range(0, draws, 10_000)]
    values = [estimator.value(draws=part, batch_shape=(seeds,), generator=generator) * part for part in parts]
    return (torch.stack(values).sum(0) / draws).tolist()


def _cone_objectives() -> dict[str, Callable[[Tensor], Estimator]]:
    """Objectives of parameters (trainings, 4) of the mean field, or (trainings, 2) of the ring."""
    import torch
    from torch.distributions import Normal, Uniform

    from paperworks.uncertainty import vi

    zero, one, ten = (torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0, 10.0))
    z = {"z": 5.0}

    @vi.program
    def cone() -> None:
        x, y = vi.sample("x", Normal(zero, ten)), vi.sample("y", Normal(zero, ten))
        square = x**2 + y**2
        vi.sample("z", Normal(square, 0.1 + square / 100))

    @vi.program
    def mean_field(theta: Tensor) -> None:
        for place, name in enumerate("xy"):
            vi.sample(name, Normal(theta[..., place], theta[..., 2 + place].exp()), vi.Reparam())

    @vi.program
    def ring(theta: Tensor) -> None:
        angle = 2 * math.pi * vi.sample("u", Uniform(zero, one), vi.Reparam())
        vi.sample("x", Normal(math.sqrt(5) * angle.cos(), theta[..., 0].exp()), vi.Reparam())
        vi.sample("y", Normal(math.sqrt(5) * angle.sin(), theta[..., 1].exp()), vi.Reparam())

    keep = ["x", "y"]
    return {
        "ELBO": lambda theta: vi.elbo(cone, mean_field, z, guide_args=(theta,)),
        "IWELBO (5)": lambda theta: vi.iwelbo(cone, mean_field, z, 5, guide_args=(theta,)),
        "HVI": lambda theta: vi.hvi_elbo(cone, ring, keep, z, guide_args=(theta,)),
        "IWHVI (5)": lambda theta: vi.iwhvi(cone, ring, keep, z, 5, guide_args=(theta,)),
        "DIWHVI (5, 5)": lambda theta: vi.diwhvi(cone, ring, keep, z, 5, 5, guide_args=(theta,)),
    }


def _pyro_cone(run: Run, name: str, start: tuple[float, ...], steps: int, draws: int, seeds: int, seed: int) -> Tensor:
    """The mean field's parameters (trainings, 4) after as many steps of Pyro."""
    import pyro
    import torch
    from pyro.distributions import Normal
    from pyro.infer import RenyiELBO, Trace_ELBO

    ten = torch.tensor(10.0, dtype=torch.float64)

    def model(theta: Tensor) -> None:
        with pyro.plate("trainings", len(theta)):
            x, y = pyro.sample("x", Normal(0.0, ten)), pyro.sample("y", Normal(0.0, ten))
            square = x**2 + y**2
            pyro.sample("z", Normal(square, 0.1 + square / 100), obs=torch.tensor(5.0, dtype=torch.float64))

    def guide(start: Tensor) -> None:
        theta = pyro.param("theta", start)
        with pyro.plate("trainings", len(theta)):
            for place, of in enumerate("xy"):
                pyro.sample(of, Normal(theta[:, place], theta[:, 2 + place].exp()))

    def trained(start: Tensor, loss: Any) -> Tensor:
        with pyro.get_param_store().scope():
            theta = pyro.param("theta", start)
            optimizer = torch.optim.SGD([theta], lr=1e-3)
            for _ in run.progress(steps, f"cone, {name}"):
                optimizer.zero_grad()
                loss.loss_and_grads(model, guide, start)
                optimizer.step()
            return theta.detach().clone()

    places = torch.tensor([start] * seeds, dtype=torch.float64)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if name == PYRO:
            return trained(places, Trace_ELBO(draws, vectorize_particles=True, max_plate_nesting=1))
        # It weighs all trainings of a plate together, so that each is trained alone.
        renyi = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        return torch.cat([trained(place[None], renyi) for place in places])


# Images of several slots.


class Images(NamedTuple):
    """Images (n, slots, width), and which of their slots are filled (n, slots)."""

    pixels: Tensor
    filled: Tensor


class Trained(NamedTuple):
    """How a training went: after `steps` its test ELBO, seconds of training until then, and at the end how many images have all flips right."""

    steps: list[int]
    elbo: list[float]
    seconds: list[float]
    right: float


def _draw_images(rows: Tensor, slots: int, count: int, generator: Any) -> Images:
    import torch

    which = torch.randint(len(rows), (count, slots), generator=generator)
    filled = (torch.rand(count, slots, generator=generator) < 0.5).float()
    noise = NOISE * torch.randn(count, slots, rows.shape[1], generator=generator)
    return Images(filled[..., None] * rows[which] + noise, filled)


def _networks(width: int, slots: int, seed: int) -> nn.ModuleDict:
    """Presence of all slots from the whole image, a code from each slot, and a slot from its code."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.ModuleDict({
            "presence": nn.Sequential(
                nn.Flatten(-2), nn.Linear(width * slots, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, slots)
            ),
            "encoder": nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 2 * CODE)),
            "decoder": nn.Sequential(nn.Linear(CODE, 128), nn.ReLU(), nn.Linear(128, width), nn.Sigmoid()),
        })  # fmt: skip


def _image_objective(slots: int) -> Callable[..., Estimator]:
    """The ELBO of networks and images with a strategy for the flips."""
    import torch
    from torch.distributions import Bernoulli, Independent, Normal

    from paperworks.uncertainty import vi

    @vi.program
    def model(networks: nn.ModuleDict) -> None:
        code = vi.sample("code", Independent(Normal(torch.zeros(slots, CODE), 1.0), 2))
        here = [vi.sample(f"here {slot}", Bernoulli(torch.tensor(0.5))) for slot in range(slots)]
        filled = torch.stack(torch.broadcast_tensors(*here), -1)
        vi.sample("pixels", Independent(Normal(filled[..., None] * networks["decoder"](code), NOISE), 2))

    @vi.program
    def guide(networks: nn.ModuleDict, pixels: Tensor, strategy: vi.Strategy) -> None:
        # Codes first, so that they are decoded once and not in each branch of the flips.
        loc, log_scale = networks["encoder"](pixels).chunk(2, -1)
        vi.sample("code", Independent(Normal(loc, log_scale.exp()), 2), vi.Reparam())
        logits = networks["presence"](pixels)
        for slot in range(slots):
            vi.sample(f"here {slot}", Bernoulli(logits=logits[..., slot]), strategy)

    def objective(networks: nn.ModuleDict, pixels: Tensor, strategy: vi.Strategy) -> Estimator:
        return vi.elbo(
            model, guide, {"pixels": pixels}, model_args=(networks,), guide_args=(networks, pixels, strategy)
        )

    return objective


def _images(run: Run, rows: Tensor, slots: int, steps: int, seeds: int, seed: int) -> dict[str, list[Trained]]:
    trained: dict[str, list[Trained]] = {name: [] for name in ESTIMATORS}
    work = [(number, name) for number in range(seed, seed + seeds) for name in ESTIMATORS]
    for number, name in run.progress(work, "images"):
        trained[name].append(_train_images(rows, slots, steps, name, number))
    return trained


def _train_images(rows: Tensor, slots: int, steps: int, name: str, seed: int) -> Trained:
    import torch

    from paperworks.uncertainty import vi

    networks, objective = _networks(rows.shape[1], slots, seed), _image_objective(slots)
    generator = torch.Generator().manual_seed(seed)
    test = _draw_images(rows, slots, TESTED, torch.Generator().manual_seed(10_000 + seed))
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3)
    fixed = {"Enum": vi.Enum(), "MVD": vi.MVD(), "Reinforce": vi.Reinforce()}
    running, spent = 0.0, 0.0
    found = Trained([], [], [], 0.0)
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            value = objective(networks, test.pixels, vi.Enum()).value(
                batch_shape=(TESTED,), generator=torch.Generator().manual_seed(seed)
            )
            found.steps.append(step)
            found.elbo.append(value.mean().item())
            found.seconds.append(spent)
        if step == steps:
            break
        images = _draw_images(rows, slots, 64, generator)
        begun = perf_counter()
        strategy = fixed.get(name) or vi.Reinforce(baseline=running)
        optimizer.zero_grad()
        elbo = objective(networks, images.pixels, strategy).surrogate(batch_shape=(64,), generator=generator).mean()
        (-elbo).backward()
        optimizer.step()
        running = elbo.item() if step == 0 else 0.9 * running + 0.1 * elbo.item()
        spent += perf_counter() - begun
    with torch.no_grad():
        said = networks["presence"](test.pixels) > 0
    return found._replace(right=(said == (test.filled == 1)).all(-1).float().mean().item())


def _reached(one: Trained, target: float, of: list[Any]) -> float | None:
    """When the test ELBO first was as high as `target`, in steps or seconds, between two evaluations along a line."""
    if one.elbo[0] >= target:
        return float(of[0])
    for (before, after), (low, high) in zip(pairwise(one.elbo), pairwise(of), strict=True):
        if before < target <= after:
            return float(low + (high - low) * (target - before) / (after - before))
    return None


def _record_images(run: Run, trained: Mapping[str, list[Trained]]) -> None:
    targets = [one.elbo[-1] for one in trained[BASELINED]]
    for name, each in trained.items():
        last = [one.elbo[-1] for one in each]
        run.mean("test ELBO of the images", last, unit="nats", better="higher", series=name)
        run.mean("flips all right", [one.right for one in each], better="higher", series=name)
        run.mean("seconds a training", [one.seconds[-1] for one in each], unit="s", better="lower", series=name)
        for other in ESTIMATORS:
            if ESTIMATORS.index(other) > ESTIMATORS.index(name):
                run.difference(
                    "test ELBO gained", method=last, baseline=[one.elbo[-1] for one in trained[other]], unit="nats",
                    better="higher", series=name, against=other,
                )  # fmt: skip
        reached = [_reached(one, target, one.steps) for one, target in zip(each, targets, strict=True)]
        share = sum(one is not None for one in reached) / len(targets)
        run.record("trainings that reach the baselined ELBO", share, better="higher", series=name)
        if name != BASELINED and share == 1:
            for what in ("steps", "seconds"):
                # The baselined one itself may have been there before its end.
                ours, theirs = (
                    [
                        _reached(one, target, getattr(one, what)) or 0.0
                        for one, target in zip(those, targets, strict=True)
                    ]
                    for those in (each, trained[BASELINED])
                )
                run.ratio(
                    f"{what} to the baselined ELBO", method=ours, baseline=theirs, better="lower", series=name,
                    against=BASELINED,
                )  # fmt: skip


# What it costs.


def _time_autoencoders(run: Run, sizes: list[int], timed: int, seed: int) -> None:
    """A gradient of an autoencoder of 784 pixels, 400 hidden units and 20 dimensions, for batches of each size."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.distributions import Bernoulli, Independent, Normal

    from paperworks.uncertainty import vi

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        encoder, decoder = (
            nn.Sequential(nn.Linear(inputs, 400), nn.Tanh(), nn.Linear(400, outputs)).to(device)
            for inputs, outputs in ((784, 40), (20, 784))
        )
    generator = torch.Generator(device).manual_seed(seed)
    zeros, ones = torch.zeros(20, device=device), torch.ones(20, device=device)

    @vi.program
    def model(decoder: nn.Module, checked: bool) -> None:
        z = vi.sample("z", Independent(Normal(zeros, ones, checked), 1, checked))
        vi.sample("x", Independent(Bernoulli(logits=decoder(z), validate_args=checked), 1, checked))

    @vi.program
    def guide(encoder: nn.Module, x: Tensor, checked: bool) -> None:
        loc, log_scale = encoder(x).chunk(2, -1)
        vi.sample("z", Independent(Normal(loc, log_scale.exp(), checked), 1, checked), vi.Reparam())

    def programmed(x: Tensor, checked: bool = True) -> None:
        model_args, guide_args = (decoder, checked), (encoder, x, checked)
        estimator = vi.elbo(model, guide, {"x": x}, model_args=model_args, guide_args=guide_args)
        backward(-estimator.surrogate(batch_shape=x.shape[:1], generator=generator).mean())

    def unchecked(x: Tensor) -> None:
        programmed(x, checked=False)

    def by_hand(x: Tensor) -> None:
        loc, log_scale = encoder(x).chunk(2, -1)
        noise = torch.randn(loc.shape, generator=generator, device=device)
        z = loc + log_scale.exp() * noise
        likelihood = -F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(-1)
        divergence = (log_scale + (noise**2 - z**2) / 2).sum(-1)
        backward(-(likelihood + divergence).mean())

    import pyro
    from pyro.infer import Trace_ELBO

    def pyro_model(x: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(zeros, ones).to_event(1))
            pyro.sample("x", pyro.distributions.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def pyro_guide(x: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", pyro.distributions.Normal(loc, log_scale.exp()).to_event(1))

    of_pyro = Trace_ELBO(max_plate_nesting=1)

    def by_pyro(x: Tensor) -> None:
        backward(of_pyro.differentiable_loss(pyro_model, pyro_guide, x) / len(x))

    def backward(loss: Tensor) -> None:
        for part in (encoder, decoder):
            part.zero_grad()
        loss.backward()

    for size in sizes:
        given = [(torch.rand(size, 784, generator=generator, device=device) < 0.3).float() for _ in range(timed)]
        run.compare(
            baseline=(f"by hand, batch {size}", by_hand),
            method={
                f"vi, batch {size}": programmed, f"vi unchecked, batch {size}": unchecked, f"Pyro, batch {size}": by_pyro,
            },
            over=given, repeats=3, warmup=2,
        )  # fmt: skip


def _time_images(run: Run, rows: Tensor, slots: int, timed: int, seed: int) -> None:
    """A gradient on 64 images by enumeration and by the score function, here and in Pyro."""
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO

    from paperworks.uncertainty import vi

    networks, objective = _networks(rows.shape[1], slots, seed), _image_objective(slots)
    generator = torch.Generator().manual_seed(seed)

    def pyro_model(pixels: Tensor, enumerated: bool) -> None:
        pyro.module("networks", networks)
        with pyro.plate("images", len(pixels)):
            code = pyro.sample("code", dist.Normal(torch.zeros(slots, CODE), 1.0).to_event(2))
            here = [pyro.sample(f"here {slot}", dist.Bernoulli(torch.tensor(0.5))) for slot in range(slots)]
            filled = torch.stack(torch.broadcast_tensors(*here), -1)
            law = dist.Normal(filled[..., None] * networks["decoder"](code), NOISE).to_event(2)
            pyro.sample("pixels", law, obs=pixels)

    def pyro_guide(pixels: Tensor, enumerated: bool) -> None:
        pyro.module("networks", networks)
        with pyro.plate("images", len(pixels)):
            loc, log_scale = networks["encoder"](pixels).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(2))
            logits = networks["presence"](pixels)
            for slot in range(slots):
                infer = {"enumerate": "parallel"} if enumerated else {}
                pyro.sample(f"here {slot}", dist.Bernoulli(logits=logits[..., slot]), infer=infer)

    def ours(strategy: vi.Strategy) -> Callable[[Tensor], None]:
        def step(pixels: Tensor) -> None:
            networks.zero_grad()
            estimator = objective(networks, pixels, strategy)
            (-estimator.surrogate(batch_shape=pixels.shape[:1], generator=generator).mean()).backward()

        return step

    def theirs(loss: Any, enumerated: bool) -> Callable[[Tensor], None]:
        def step(pixels: Tensor) -> None:
            networks.zero_grad()
            loss.loss_and_grads(pyro_model, pyro_guide, pixels, enumerated)

        return step

    given = [_draw_images(rows, slots, 64, generator).pixels for _ in range(timed)]
    for name, strategy, loss in (
        ("Enum", vi.Enum(), TraceEnum_ELBO(max_plate_nesting=1)),
        # Pyro's own score function with the least to do: TraceGraph_ELBO takes two to three times as long.
        ("Reinforce", vi.Reinforce(), Trace_ELBO(max_plate_nesting=1)),
    ):
        # Neither checks distributions.
        with pyro.validation_enabled(False):
            run.compare(
                baseline=(f"Pyro, images by {name}", theirs(loss, name == "Enum")),
                method={f"vi, images by {name}": ours(strategy)}, over=given, repeats=3, warmup=2,
            )  # fmt: skip


def _figure(bounds: Mapping[str, list[float]], trained: Mapping[str, list[Trained]]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    cone, steps, seconds = figure.subplots(1, 3)
    names = list(bounds)[::-1]
    for place, name in enumerate(names):
        colour = "#8a8a8a" if name.startswith("Pyro") else "#1f6f8b"
        cone.plot(bounds[name], [place] * len(bounds[name]), "o", color=colour, alpha=0.6)
    cone.axvline(EVIDENCE, color="#333333", linewidth=0.8, linestyle="--")
    cone.set_yticks(range(len(names)), names)
    cone.set(xlabel="bound on the cone, nats (dashed: evidence)")
    for axes, what in ((steps, "steps"), (seconds, "seconds")):
        for name, each in trained.items():
            curves = np.array([one.elbo for one in each])
            along = np.mean([getattr(one, what) for one in each], axis=0)
            axes.plot(along, curves.mean(0), color=COLOURS[name], label=name)
            axes.fill_between(along, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.15, linewidth=0)
        # The first evaluations are far below.
        low = np.median([one.elbo[len(one.elbo) // 8] for each in trained.values() for one in each])
        high = max(max(one.elbo) for each in trained.values() for one in each)
        axes.set(xlabel=what, ylabel="test ELBO of the images, nats", ylim=(low, high + 0.05 * abs(high - low) + 1e-6))
    steps.legend(frameon=False, fontsize="small")
    for axes in (cone, steps, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
