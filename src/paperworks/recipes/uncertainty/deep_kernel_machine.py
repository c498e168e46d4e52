"""Deep kernel machines on regression tables, against the kernel that does not learn and a sparse Gaussian process; and in finite width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.lab.measure import time_in_turn
from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.uncertainty.tables import MEASURED, Scores, names_of, record_scores, scored, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

METHOD, FIXED, SPARSE = "deep kernel machine", "NNGP", "sparse GP, RBF"
COLOURS = {METHOD: "#1f6f8b", SPARSE: "#c8553d"}
TRIED = (1.0, 10.0, 100.0)


@recipe(
    "deep-kernel-machine",
    baseline="the neural network Gaussian process of the same kernel, and a sparse Gaussian process with an RBF kernel",
    columns=("NLL, all tables", "RMSE, all tables", "coverage, all tables", "fit time, all tables", "tables with the lowest NLL"),
    rows=(METHOD, FIXED, SPARSE),
    tiny={
        "most_tables": 1, "rows": 60, "splits": 2, "inducing": 10, "steps": 8, "width": 8, "chains": 2, "draws": 10,
        "largest": 400, "repeats": 2,
    },
    large={"rows": 10_000, "splits": 20, "inducing": 300, "steps": 400, "width": 1024, "largest": 64_000},
)  # fmt: skip
def deep_kernel_machine(
    run: Run,
    data: Annotated[str, MEASURED] = "auto",
    most_tables: Annotated[int, Between(1, 8)] = 5,
    rows: Annotated[int, Between(30, 2000)] = 500,
    splits: Annotated[int, Between(2, 20)] = 5,
    layers: Annotated[int, Between(1, 4)] = 2,
    inducing: Annotated[int, Between(5, 200)] = 50,
    steps: Annotated[int, Between(5, 800)] = 200,
    width: Annotated[int, Between(4, 512)] = 256,
    chains: Annotated[int, Between(2, 32)] = 8,
    draws: Annotated[int, Between(10, 600)] = 150,
    largest: Annotated[int, Between(160, 32_000)] = 16_000,
    repeats: Annotated[int, Between(2, 10)] = 3,
    seed: int = 0,
) -> None:
    """A kernel that learns against the same one that does not, on tables; then finite machines against the wide limit, and fit time by rows.

    All have as many inducing rows and steps; nu is chosen by a tenth of the training rows, on which nothing else depends. The
    finite machine is sampled by Hamiltonian Monte Carlo over its features, of five points of a sine.

    Args:
        run: Keeps what is measured.
        data: A table of your own whose last column is a number (.csv, .parquet, .npz), a name, or auto for those at hand.
        most_tables: Tables at most.
        rows: Of each table, at most.
        splits: Of each table, a tenth to test.
        layers: Of the machine.
        inducing: Inducing rows of all three.
        steps: Of Adam, of all three.
        width: Of the widest finite machine; a quarter and a sixteenth of it are sampled too.
        chains: Of the sampler.
        draws: Of each chain.
        largest: Rows of the longest fit that is timed; a quarter and a sixteenth of them are timed too.
        repeats: Of these timings.
        seed: Of the first split.
    """
    scores = _tables(run, names_of(data, most_tables), rows, splits, layers, inducing, steps, seed)
    if data == "auto":
        errors = _finite(run, width, chains, draws, seed)
        times = _by_rows(run, largest, inducing, layers, repeats, seed)
        run.figure(_figure(scores, errors, times))


def _tables(
    run: Run, names: list[str], rows: int, splits: int, layers: int, inducing: int, steps: int, seed: int
) -> dict[str, dict[str, list[Scores]]]:
    import numpy as np

    from paperworks.recipes.uncertainty.baselines import SparseGP
    from paperworks.uncertainty import DeepKernelMachineRegressor

    budget: dict[str, Any] = {"n_layers": layers, "n_inducing": inducing, "max_iter": steps}
    makes = {
        METHOD: lambda: DeepKernelMachineRegressor(**budget, nus=TRIED),
        FIXED: lambda: DeepKernelMachineRegressor(**budget, nu=math.inf),
        SPARSE: lambda: SparseGP(inducing, steps),
    }
    scores: dict[str, dict[str, list[Scores]]] = {}
    for name, number in run.progress([(n, s) for n in names for s in range(seed, seed + splits)], "tables"):
        part = split(name, rows, number)
        for told, make in makes.items():
            scores.setdefault(part.name, {}).setdefault(told, []).append(scored(make, part))
    record_scores(run, scores, METHOD, [FIXED, SPARSE])  # type: ignore[arg-type]
    for figure, unit, better in (
        ("NLL", "nats", "lower"), ("RMSE", "", "lower"), ("coverage", "", "higher"), ("fit time", "s", "lower"),
    ):  # fmt: skip
        field = {"NLL": "nll", "RMSE": "rmse", "fit time": "fit_seconds"}.get(figure, figure)
        means = {
            told: [float(np.mean([getattr(one, field) for one in each[told]])) for each in scores.values()]
            for told in makes
        }
        for told, values in means.items():
            run.record(f"{figure}, all tables", float(np.mean(values)), unit=unit, better=better, series=told)  # type: ignore[arg-type]
            if figure in ("NLL", "RMSE") and told != METHOD and len(names) > 1:
                run.difference(
                    f"{figure} less that of others, all tables", method=means[METHOD], baseline=values, unit=unit,
                    better="lower", series=METHOD, against=told,
                )  # fmt: skip
    best = [min((float(np.mean([s.nll for s in each[one]])), one) for one in makes)[1] for each in scores.values()]
    for told in makes:
        run.record(
            "tables with the lowest NLL", best.count(told), unit=f"of {len(scores)}", better="higher", series=told
        )
    return scores


def _finite(run: Run, width: int, chains: int, draws: int, seed: int) -> dict[int, float]:
    """How far the posterior's mean Gram matrix of machines of finite width is from the limit's, of five points of a sine."""
    import torch

    from paperworks.linalg import relu_gram
    from paperworks.samplers import hmc

    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    F = torch.stack([x, torch.ones_like(x)], 1)
    G0 = F @ F.T / 2 + 0.001 * torch.eye(5)
    K0 = relu_gram(G0, G0.diagonal(), G0.diagonal()) + 1e-4 * torch.eye(5)
    y, C = torch.sin(2 * x), torch.linalg.cholesky(K0)

    def log_likelihood(G: Tensor) -> Tensor:
        each = G.diagonal(dim1=-2, dim2=-1)
        K = relu_gram(G, each, each) + 0.3 * torch.eye(5, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=torch.float64), K)
        return law.log_prob(y)

    T = torch.eye(5, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([T], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        lower = T.tril()
        divergence = (lower.square().sum() - 5) / 2 - lower.diagonal().abs().log().sum()
        found = divergence - log_likelihood(C @ lower @ lower.T @ C.T)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)
    V = (C @ T.tril()).detach()
    optimum, errors = V @ V.T, {}
    for N in run.progress(sorted({max(4, width // share) for share in (1, 4, 16)}), "finite machines"):
        generator = torch.Generator().manual_seed(seed)

        def log_density(flat: Tensor, N: int = N) -> Tensor:
            features = C @ flat.reshape(-1, 5, N)
            return N * log_likelihood(features @ features.mT / N) - flat.square().sum(1) / 2

        start = torch.randn(chains, 5 * N, generator=generator, dtype=torch.float64)
        found = hmc(log_density, start, draws=draws, burn_in=draws, path_length=1.0, generator=generator)
        features = C @ found.flat.reshape(-1, 5, N)
        grams = features @ features.mT / N
        errors[N] = float((grams.mean(0) - optimum).norm() / optimum.norm())
        run.record("relative error of the mean Gram matrix", errors[N], better="lower", series=f"width {N}")
        spread = float(((grams - optimum).square().sum((1, 2)).mean()).sqrt() / optimum.norm())
        run.record("relative distance of a Gram matrix", spread, better="lower", series=f"width {N}")
    start_error = float((K0 - optimum).norm() / optimum.norm())
    run.record("relative error of the mean Gram matrix", start_error, better="lower", series="the prior's")
    return errors


def _by_rows(run: Run, largest: int, inducing: int, layers: int, repeats: int, seed: int) -> dict[int, float]:
    """Time of a few steps by rows."""
    import numpy as np

    from paperworks.uncertainty import DeepKernelMachineRegressor

    random = np.random.default_rng(seed)
    sizes = [largest // 16, largest // 4, largest]
    tasks = {}
    for n in sizes:
        X = random.normal(size=(n, 8))
        y = np.sin(X.sum(1)) + 0.1 * random.normal(size=n)

        def fit(X: Any = X, y: Any = y) -> None:
            model = DeepKernelMachineRegressor(layers, nu=10.0, n_inducing=min(inducing, len(X) // 2), max_iter=5)
            model.fit(X, y)

        tasks[f"{n} rows"] = fit
    seconds = [np.array(one.seconds).ravel() for one in time_in_turn(tasks, repeats=repeats).values()]
    for name, each in zip(tasks, seconds, strict=True):
        run.record("time of five steps", float(np.median(each)), unit="s", better="lower", series=name)
    slopes = [float(np.polyfit(np.log(sizes), np.log(turn), 1)[0]) for turn in zip(*seconds, strict=True)]
    run.mean("slope of log time in log rows", slopes, better="lower", series=METHOD)
    return dict(zip(sizes, (float(np.median(each)) for each in seconds), strict=True))


def _figure(scores: dict[str, dict[str, list[Scores]]], errors: dict[int, float], times: dict[int, float]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for place, name in enumerate((METHOD, SPARSE)):
        above = [
            [one.nll - fixed.nll for one, fixed in zip(each[name], each[FIXED], strict=True)]
            for each in scores.values()
        ]
        means = [np.mean(one) for one in above]
        errs = [np.std(one) / len(one) ** 0.5 for one in above]
        places = np.arange(len(scores)) + 0.36 * place - 0.18
        left.bar(places, means, 0.34, yerr=errs, color=COLOURS[name], label=name)
    left.axhline(0, color="#333333", linewidth=0.8)
    left.set_xticks(range(len(scores)), [name.removeprefix("uci:") for name in scores], fontsize="small")
    left.set(ylabel="NLL above the NNGP's, nats")
    left.legend(frameon=False, fontsize="small")
    widths = list(errors)
    middle.loglog(widths, list(errors.values()), "o-", color=COLOURS[METHOD], label="finite machines")
    middle.loglog(
        widths, [errors[widths[0]] * widths[0] / one for one in widths], ":", color="#777777", label="1 / width"
    )
    middle.set(xlabel="width", ylabel="relative error of the mean Gram matrix")
    middle.legend(frameon=False, fontsize="small")
    right.loglog(list(times), list(times.values()), "o-", color=COLOURS[METHOD])
    right.set(xlabel="rows", ylabel="time of five steps, s")
    for axes, ticks in ((middle, widths), (right, list(times))):
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
