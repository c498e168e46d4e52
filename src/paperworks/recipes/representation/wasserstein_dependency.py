"""Wasserstein against plain predictive coding: how many of the factors that two views share are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.samples import CLASSED, Samples, samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Generator, Tensor

    from paperworks.representation import Dependency

    Draw = Callable[[int], tuple[Tensor, Tensor, Tensor]]

ACCURACY = "probe accuracy"
GAINED = "accuracy gained"
LIPSCHITZ: dict[str, Any] = {"CPC": None, "WPC": "one_sided_gp"}


@recipe(
    "wasserstein-dependency",
    baseline="contrastive predictive coding (CPC), which is the same loss with a free critic",
    columns=(ACCURACY, "accuracy of the worst factor", "bound on mutual information", "gradient norm", "accuracy kept"),
    rows=("codes,*", "digit grids,*", "grids,*"),
    tiny={"factors": 4, "values": 4, "steps": 60, "grid_steps": 20, "side": 2, "width": 32, "probed": 300, "seeds": 2, "grid_seeds": 2},
    large={"factors": 16, "steps": 20_000, "grid_steps": 20_000, "width": 1024, "seeds": 10, "grid_seeds": 10},
)  # fmt: skip
def wasserstein_dependency(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    factors: Annotated[int, Between(1, 16)] = 8,
    values: Annotated[int, Between(2, 32)] = 8,
    side: Annotated[int, Between(1, 6)] = 3,
    width: Annotated[int, Between(1, 512)] = 256,
    steps: Annotated[int, Between(1, 3200)] = 800,
    grid_steps: Annotated[int, Between(1, 2000)] = 500,
    lam: Annotated[float, Between(0, 1000)] = 10.0,
    batch_size: Annotated[int, Between(2, 64)] = 16,
    large_batch: Annotated[int, Between(2, 256)] = 64,
    probed: Annotated[int, Between(2, 8000)] = 2000,
    seeds: Annotated[int, Between(1, 20)] = 5,
    grid_seeds: Annotated[int, Between(1, 20)] = 5,
    seed: int = 0,
) -> None:
    """Pairs that share independent factors, as noisy codes and as grids of samples; what is left in the encoder of them.

    In y each factor has the same value as in x but looks different: another code, or in the grids, which are of digits or
    your own samples, another sample of the class after. Encoders are trained on fresh pairs, frozen, and a linear classifier reads each factor off their codes.

    Args:
        run: Keeps what is measured.
        data: Whose samples make the grids: a table or folder of images of your own, or a name.
        factors: Independent factors of the codes.
        values: Of each factor; together they share factors * log(values) nats.
        side: Samples in a row and in a column of a grid.
        width: Of the two hidden layers.
        steps: Of Adam, on codes.
        grid_steps: Of Adam, on grids.
        lam: Weight of the gradient penalty.
        batch_size: Pairs a step; the loss can tell at most log(batch_size) nats.
        large_batch: Another, which helps the baseline.
        probed: Samples to fit the linear classifiers on, and half as many to test them.
        seeds: Codes and encoders.
        grid_seeds: Encoders of grids.
        seed: Of the first.
    """
    import torch

    own = samples(data)
    grids = "digit grids" if data == "digits" else "grids"
    sizes = sorted({batch_size, large_batch})
    # A quarter of the factors: the more the two views share, the more is lost to a bound of log(batch_size).
    few = "codes of a quarter of the factors"
    accuracies: dict[str, dict[str, list[list[float]]]] = {}
    seen: dict[str, Dependency] = {}
    work = [
        (f"{kind}, batch {size}", make, size, count, number)
        for kind, make, many, count in (
            ("codes", partial(_codes, factors, values), seeds, steps),
            (few, partial(_codes, max(1, factors // 4), values), seeds, steps),
            (grids, partial(_grids, own, side), grid_seeds, grid_steps),
        )
        for size in sizes
        for number in range(seed, seed + many)
    ]  # fmt: skip
    for setting, make, size, count, number in run.progress(work, "training"):
        for method, lipschitz in LIPSCHITZ.items():
            generator = torch.Generator().manual_seed(number)
            train, test = make(generator)
            scores, report = _probed(train, test, lipschitz, lam, width, size, count, probed, number)
            accuracies.setdefault(setting, {}).setdefault(method, []).append(scores)
            seen[f"{setting}, {method}"] = report
    gains: dict[str, list[float]] = {}
    for setting, by_method in accuracies.items():
        means = {method: [sum(one) / len(one) for one in rows] for method, rows in by_method.items()}
        for method, rows in means.items():
            series = f"{setting}, {method}"
            run.record(ACCURACY, sum(rows) / len(rows), better="higher", series=series)
            lowest = [min(one) for one in by_method[method]]
            run.record("accuracy of the worst factor", sum(lowest) / len(lowest), better="higher", series=series)
            run.record(
                "bound on mutual information", seen[series].info_nce, unit="nats", better="higher", series=series
            )
            run.record("gradient norm", float(seen[series].gradient_norms.mean()), better="lower", series=series)
        run.difference(GAINED, method=means["WPC"], baseline=means["CPC"], series=f"{setting}, WPC", against="CPC")
        gains[setting] = [own - plain for own, plain in zip(means["WPC"], means["CPC"], strict=True)]
        run.ratio(
            "accuracy kept", method=means["WPC"], baseline=means["CPC"], series=f"{setting}, WPC", against="CPC"
        )  # fmt: skip
    for size in sizes:
        run.difference(
            f"{GAINED}, as more is shared", method=gains[f"codes, batch {size}"], baseline=gains[f"{few}, batch {size}"],
            series=f"codes, batch {size}", against=few,
        )  # fmt: skip
    for kind in ("codes", grids) if len(sizes) > 1 else ():
        small, large = (f"{kind}, batch {size}" for size in sizes)
        run.difference(
            f"{GAINED}, by small batches", method=gains[small], baseline=gains[large], series=small, against=large
        )
    run.figure(_figure(accuracies))


def _codes(factors: int, values: int, generator: Generator) -> tuple[Draw, Draw]:
    """Draws x, y and the factors' values: each value has a code of 16 numbers in x, and another in y."""
    import torch

    tables = torch.randn(2, factors, values, 16, generator=generator)

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(values, (n, factors), generator=generator)
        codes = tables[:, torch.arange(factors), chosen]
        x, y = (codes + 0.05 * torch.randn(codes.shape, generator=generator)).flatten(2)
        return x, y, chosen

    return draw, draw


def _grids(own: Samples, side: int, generator: Generator) -> tuple[Draw, Draw]:
    """Draws grids of samples, grids of samples of the classes after, and the classes; of samples to train on, and of others."""
    import torch

    images, labels, classes = torch.tensor(own.X, dtype=torch.float32), torch.tensor(own.y), len(own.classes)
    shuffled = torch.randperm(len(images), generator=generator)

    def drawer(rows: Tensor) -> Draw:
        by_class = [images[rows[labels[rows] == label]] for label in range(classes)]
        counts = torch.tensor([len(one) for one in by_class])
        if not counts.all():
            few = own.classes[int(counts.argmin())]
            raise UsageError(
                f"{own.name} has too few samples of class {few} to train on some and test on others: give more"
            )
        stacked, first = torch.cat(by_class), counts.cumsum(0) - counts

        def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
            chosen = torch.randint(classes, (n, side * side), generator=generator)
            grids = []
            for shown in (chosen, (chosen + 1) % classes):
                place = (torch.rand(shown.shape, generator=generator) * counts[shown]).long()
                grids.append(stacked[first[shown] + place].flatten(1))
            return grids[0], grids[1], chosen

        return draw

    tested = len(images) // 3
    return drawer(shuffled[tested:]), drawer(shuffled[:tested])


def _probed(
    train: Draw, test: Draw, lipschitz: Any, lam: float, width: int, batch_size: int, steps: int, probed: int, seed: int
) -> tuple[list[float], Dependency]:
    """Train encoders; the accuracy of a linear classifier on the codes for each factor, and what the critic tells."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torch import nn

    from paperworks.representation import WassersteinDependency

    size = train(2)[0].shape[1]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        g, h = (
            nn.Sequential(
                nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32)
            )
            for _ in range(2)
        )  # fmt: skip
    points = torch.Generator().manual_seed(seed)
    loss = WassersteinDependency(g, h, lipschitz=lipschitz, lam=lam)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        x, y, _ = train(batch_size)
        optimiser.zero_grad()
        loss(x, y, generator=points).backward()
        optimiser.step()
    x, _, wanted = train(probed)
    test_x, test_y, told = test(probed // 2)
    with torch.no_grad():
        codes, test_codes = (g(one).double().numpy() for one in (x, test_x))
    accuracies = []
    for factor in range(wanted.shape[1]):
        # Codes of a Lipschitz critic can be small, and a penalised classifier would read less off them.
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
        probe.fit(codes, wanted[:, factor].numpy())
        accuracies.append(float(probe.score(test_codes, told[:, factor].numpy())))
    return accuracies, loss.diagnose(test_x, test_y, batch_size=batch_size, generator=points)


def _figure(accuracies: dict[str, dict[str, list[list[float]]]]) -> Figure:
    """Accuracy of each factor, worst first, by method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(accuracies), 3.2), layout="constrained")
    plots = figure.subplots(1, len(accuracies), sharey=True)
    for axes, (setting, by_method) in zip(plots, accuracies.items(), strict=True):
        for (method, rows), colour in zip(by_method.items(), ("#c8553d", "#1f6f8b"), strict=True):
            ranked = [sum(one) / len(one) for one in zip(*(sorted(row) for row in rows), strict=True)]
            axes.plot(range(1, len(ranked) + 1), ranked, "o-", color=colour, label=method)
        axes.set(title=setting, xlabel="factors, the worst first")
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].set(ylabel=ACCURACY)
    plots[0].legend(frameon=False)
    return figure
