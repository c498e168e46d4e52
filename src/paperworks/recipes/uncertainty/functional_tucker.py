"""FunBaT on a tensor with real indices: error against binned Tucker, a Gaussian process and boosted trees, and time by size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from paperworks.errors import UsageError
from paperworks.lab.measure import time_in_turn
from paperworks.lab.recipe import Between, Data, recipe
from paperworks.lab.run import Run
from paperworks.recipes.uncertainty.tables import Scores, Split, record_scores, scored, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[Any]

METHOD, BINNED, PROCESS, TREES, LINEAR = (
    "FunBaT",
    "binned Tucker",
    "Gaussian process",
    "boosted trees",
    "linear interpolation",
)
MADE, RATES = "made-up tensor", "exchange rates"
COLOURS = {METHOD: "#1f6f8b", BINNED: "#c98b2b", PROCESS: "#5f9e6e", TREES: "#8a8a8a", LINEAR: "#8a8a8a"}
# Of a size that a run from the page may take; exchange_rate adds currencies by day to what "auto" makes.
MEASURED = Data("auto", "diabetes", "exchange_rate", "uci:*")
# Lengthscales, in shares of an index's range: the one with the highest lower bound is taken.
LENGTHSCALES = (0.1, 0.3, 1.0)
# Grids of binned Tucker, in shares of the finest: the one with the highest lower bound is taken. Rows of fine grids seldom
# start well, and sweeps over them are cheap, so that they have so many times the starts of FunBaT.
GRIDS, MORE_STARTS = (1 / 6, 1 / 3, 1 / 2, 0.7, 0.85, 1.0), 10
# Times of the filter and smoother, that its slope is taken over.
STEPS = (1000, 4000, 16_000)
# A fifth of the days lies in gaps.
GAPS_TO_REST = 0.25


@recipe(
    "functional-tucker",
    baseline="Bayesian Tucker on bins, an exact Gaussian process with a product of Matern kernels, boosted trees",
    columns=(
        "RMSE to the noiseless values, made-up tensor",
        "RMSE, ratio, made-up tensor against binned Tucker",
        "RMSE, ratio, made-up tensor against Gaussian process",
        "NLL, made-up tensor",
        "coverage, made-up tensor",
        "fit time, made-up tensor",
    ),
    tiny={
        "entries": 120, "bins": 4, "sweeps": 3, "starts": 1, "gp_steps": 2, "seeds": 2, "steps": 64, "timed_entries": 30,
        "repeats": 1,
    },
    large={"entries": 6000, "rank": 5, "sweeps": 100, "seeds": 10},
)  # fmt: skip
def functional_tucker(
    run: Run,
    data: Annotated[str, MEASURED] = "auto",
    entries: Annotated[int, Between(20, 3000)] = 1500,
    rank: Annotated[int, Between(1, 5)] = 2,
    bins: Annotated[int, Between(2, 120)] = 60,
    sweeps: Annotated[int, Between(1, 80)] = 20,
    starts: Annotated[int, Between(1, 5)] = 3,
    gp_steps: Annotated[int, Between(1, 60)] = 30,
    seeds: Annotated[int, Between(2, 10)] = 5,
    steps: Annotated[int, Between(16, 16_000)] = 16_000,
    timed_entries: Annotated[int, Between(10, 3000)] = 1500,
    repeats: Annotated[int, Between(1, 10)] = 3,
    seed: int = 0,
) -> None:
    """A tensor of rank two at random places in the cube, or a table of your own whose features are its indices.

    Each seed has places, core and noise of its own, and all methods see the same entries. FunBaT takes the lengthscale with the
    highest lower bound among three, and binned Tucker, with ten times the starts, the grid among six that has the lowest
    error on a tenth of its entries, which serves it better. The process fits a lengthscale of each index, its variance and the noise by the marginal likelihood. On a
    table, a tenth is tested in each split.

    On exchange rates, currencies are a categorical mode and days a continuous one, blocks of 20 % of all days are left out, and
    what one would do otherwise is to interpolate each currency between the days around a gap.

    A sweep is timed in turn with the same sweep written as plain loops over entries and steps, which has the same result;
    whole fits of three sweeps by the number of entries, and filter and smoother by that of steps.

    Args:
        run: Keeps what is measured.
        data: A table of your own whose last column is a number and whose others are indices (.csv, .parquet, .npz), a name,
            exchange_rate, or auto for the made-up tensor, and exchange rates where they are at hand.
        entries: To fit; two thirds as many are tested. Of a table, at most so many rows.
        rank: Of each mode.
        bins: Of each index, in the finest of six grids of binned Tucker; the coarsest has a sixth.
        sweeps: At most, of FunBaT and of binned Tucker.
        starts: Random starts of both.
        gp_steps: Of L-BFGS, for the process.
        seeds: Tensors, splits or sets of gaps.
        steps: Times of the longest filter timed, and entries of the largest fit; two smaller ones have a quarter and a
            sixteenth.
        timed_entries: Of the sweep that is timed.
        repeats: Of all timings.
        seed: Of the first.
    """
    # Tensors of their own: grids and starts of the baseline were chosen on those of the first numbers.
    numbers = range(seed + 100, seed + 100 + seeds)
    options = {"ranks": rank, "max_iter": sweeps, "tol": 1e-3, "n_restarts": starts}
    if data == "auto":
        fits = _made_up(run, entries, numbers, options, bins, gp_steps)
        if _at_hand("exchange_rate"):
            _gaps(run, entries, numbers, options)
        _timed(run, timed_entries, steps, repeats, seed)
        run.figure(_figure(*fits))
    elif data == "exchange_rate":
        _gaps(run, entries, numbers, options)
    else:
        _table(run, data, entries, numbers, options, bins, gp_steps)


def made_up(entries: int, seed: int) -> tuple[Split, Array]:
    """A tensor of rank two at places in the cube, with noise of sd .1 on entries of unit sd, and its noiseless values to test."""
    import numpy as np

    random = np.random.default_rng(seed)
    W, tested = random.standard_normal((2, 2, 2)), entries * 2 // 3
    X = random.uniform(size=(entries + tested, 3))
    f = np.einsum("abc,an,bn,cn->n", W, *(np.stack(function(t)) for function, t in zip(functions(), X.T, strict=True)))
    f /= f.std()
    y = f + 0.1 * random.standard_normal(len(f))
    return Split(MADE, X[:entries], y[:entries], X[entries:], y[entries:]), f[entries:]


def functions() -> list[Any]:
    """The two functions of each index, as functions of it."""
    import numpy as np

    pi = np.pi
    return [
        lambda t: (np.sin(2 * pi * t), np.cos(2 * pi * t)),
        lambda t: (2 * np.exp(-2 * t) * np.sin(1.5 * pi * t), (1 - t) * np.sin(4 * pi * t)),
        lambda t: (2 * np.sin(2 * pi * t) ** 2 * np.cos(2 * pi * t), t - 0.5),
    ]


class Chosen:
    """The estimator with the highest lower bound among several, with `fit` and all that the best has.

    Args:
        candidates: Estimators with `elbo_`.
    """

    def __init__(self, candidates: Sequence[Any]) -> None:
        self.candidates = candidates

    def fit(self, X: Array, y: Array) -> Any:
        """The best of them, fitted."""
        return max((one.fit(X, y) for one in self.candidates), key=lambda one: one.elbo_)


class HeldOut:
    """The estimator with the lowest error on a tenth of the rows among several, fitted to all of them then.

    Args:
        candidates: Estimators.
        seed: Of the rows held out.
    """

    def __init__(self, candidates: Sequence[Any], seed: int) -> None:
        self.candidates, self.seed = candidates, seed

    def fit(self, X: Array, y: Array) -> Any:
        """The best of them, fitted."""
        import numpy as np

        order = np.random.default_rng(self.seed).permutation(len(y))
        held, kept = order[: len(y) // 10 + 1], order[len(y) // 10 + 1 :]
        errors = [np.mean((one.fit(X[kept], y[kept]).predict(X[held]) - y[held]) ** 2) for one in self.candidates]
        return self.candidates[int(np.argmin(errors))].fit(X, y)


class Binned:
    """Bayesian Tucker on a grid: indices are put into equal bins of the cube that was fitted, and the bins are categories.

    Args:
        bins: Of each index.
        options: Of `FunctionalTucker`.
    """

    def __init__(self, bins: int, options: dict[str, Any]) -> None:
        from paperworks.uncertainty.functional_tucker import FunctionalTucker

        self.bins, self._of = bins, lambda modes: FunctionalTucker(modes=modes, **options)

    def fit(self, X: Array, y: Array) -> Binned:
        """Fit the ends of the grid, and a Tucker decomposition of it."""
        import numpy as np

        self.low, self.span = X.min(0), np.where(np.ptp(X, axis=0) > 0, np.ptp(X, axis=0), 1.0)
        self.model = self._of(("categorical",) * X.shape[1]).fit(self._binned(X), y)
        self.elbo_ = self.model.elbo_
        return self

    def _binned(self, X: Array) -> Array:
        import numpy as np

        return np.clip(np.floor((X - self.low) / self.span * self.bins), 0, self.bins - 1)

    def predict(self, X: Array, return_std: bool = False) -> Any:
        """As that of the decomposition, at the bins."""
        return self.model.predict(self._binned(X), return_std)

    def predict_quantiles(self, X: Array, quantiles: Sequence[float]) -> Any:
        """The same."""
        return self.model.predict_quantiles(self._binned(X), quantiles)

    def log_predictive_density(self, X: Array, y: Array) -> Any:
        """The same."""
        return self.model.log_predictive_density(self._binned(X), y)


class Process:
    """An exact Gaussian process with a product of Matern-3/2 kernels, one of each index, fitted by marginal likelihood.

    Args:
        steps: Of L-BFGS.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def fit(self, X: Array, y: Array) -> Process:
        """Fit lengthscales, variance and noise, from lengthscales of .3 of each index's range."""
        import numpy as np
        import torch

        self.low, self.span = X.min(0), np.where(np.ptp(X, axis=0) > 0, np.ptp(X, axis=0), 1.0)
        self.mean, self.scale = y.mean(), y.std() or 1.0
        self.X, z = self._scaled(X), torch.from_numpy((y - self.mean) / self.scale)
        logs = torch.tensor([0.3] * X.shape[1] + [1.0, 0.05], dtype=torch.float64).log().requires_grad_()
        optimizer = torch.optim.LBFGS([logs], max_iter=self.steps, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            root, _ = self._root(logs)
            solved = torch.linalg.solve_triangular(root, z[:, None], upper=False)
            value = solved.square().sum() / 2 + root.diagonal().log().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.logs = logs.detach()
        self.root, _ = self._root(self.logs)
        self.weights = torch.cholesky_solve(z[:, None], self.root)
        return self

    def _scaled(self, X: Array) -> torch.Tensor:
        import torch

        return torch.from_numpy((X - self.low) / self.span)

    def _kernel(self, logs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        value = logs[-2].exp()
        for k in range(rows.shape[1]):
            r = 3**0.5 * (rows[:, None, k] - columns[None, :, k]).abs() / logs[k].exp()
            value = value * (1 + r) * (-r).exp()
        return value

    def _root(self, logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        K = self._kernel(logs, self.X, self.X)
        noisy = K + (logs[-1].exp() + 1e-8) * torch.eye(len(K), dtype=K.dtype)
        return torch.linalg.cholesky(noisy), K

    def _law(self, X: Array) -> torch.distributions.Normal:
        import torch

        across = self._kernel(self.logs, self._scaled(X), self.X)
        solved = torch.linalg.solve_triangular(self.root, across.T, upper=False)
        variance = (self.logs[-2].exp() - solved.square().sum(0)).clamp(min=0) + self.logs[-1].exp()
        mean = (across @ self.weights)[:, 0] * self.scale + self.mean
        return torch.distributions.Normal(mean, variance.sqrt() * self.scale)

    def predict(self, X: Array, return_std: bool = False) -> Any:
        """Means, and standard deviations with noise."""
        law = self._law(X)
        return (law.mean.numpy(), law.stddev.numpy()) if return_std else law.mean.numpy()

    def predict_quantiles(self, X: Array, quantiles: Sequence[float]) -> Any:
        """Quantiles (n, q)."""
        import torch

        law = self._law(X)
        return torch.stack([law.icdf(torch.tensor(level, dtype=torch.float64)) for level in quantiles], dim=1).numpy()

    def log_predictive_density(self, X: Array, y: Array) -> Any:
        """Of targets."""
        import torch

        return self._law(X).log_prob(torch.from_numpy(y)).numpy()


class Trees:
    """Gradient boosting, with the spread of its errors on a tenth held out; what one takes for a table."""

    def fit(self, X: Array, y: Array) -> Trees:
        """Fit until a tenth of the rest is told no better."""
        import numpy as np
        from sklearn.ensemble import HistGradientBoostingRegressor

        held = len(y) // 10 + 1
        self.model = HistGradientBoostingRegressor(max_iter=300, early_stopping=True, random_state=0).fit(
            X[held:], y[held:]
        )
        self.spread = float(np.sqrt(np.mean((self.model.predict(X[:held]) - y[:held]) ** 2))) or 1e-6
        return self

    def predict(self, X: Array, return_std: bool = False) -> Any:
        """Means, and one standard deviation for all."""
        import numpy as np

        mean = self.model.predict(X)
        return (mean, np.full(len(X), self.spread)) if return_std else mean

    def predict_quantiles(self, X: Array, quantiles: Sequence[float]) -> Any:
        """Of a normal distribution."""
        from scipy.stats import norm

        return self.model.predict(X)[:, None] + self.spread * norm.ppf(quantiles)

    def log_predictive_density(self, X: Array, y: Array) -> Any:
        """Of a normal distribution."""
        from scipy.stats import norm

        return norm.logpdf(y, self.model.predict(X), self.spread)


def _methods(options: dict[str, Any], bins: int, gp_steps: int, seed: int) -> dict[str, Any]:
    from paperworks.uncertainty.functional_tucker import FunctionalTucker

    options = options | {"random_state": seed}
    grids = sorted({max(2, round(bins * share)) for share in GRIDS})
    often = options | {"n_restarts": MORE_STARTS * options["n_restarts"]}
    return {
        METHOD: Chosen([FunctionalTucker(lengthscale=one, **options) for one in LENGTHSCALES]),
        BINNED: HeldOut([Binned(one, often) for one in grids], seed),
        PROCESS: Process(gp_steps),
        TREES: Trees(),
    }


def _made_up(
    run: Run, entries: int, numbers: range, options: dict[str, Any], bins: int, gp_steps: int
) -> tuple[Any, dict[str, list[float]]]:
    """Score all on tensors of their own, and return the last FunBaT with the errors of all."""
    import numpy as np

    scores: dict[str, list[Scores]] = {}
    errors: dict[str, list[float]] = {}
    covered, model = [], None
    for number in run.progress(list(numbers), "tensors"):
        part, f = made_up(entries, number)
        for name, method in _methods(options, bins, gp_steps, number).items():
            kept = _Kept(method)
            scores.setdefault(name, []).append(scored(lambda kept=kept: kept, part))  # type: ignore[misc]
            mean, std = kept.fitted.predict(part.X_test, return_std=True)
            errors.setdefault(name, []).append(float(np.sqrt(np.mean((mean - f) ** 2))))
            if name == METHOD:
                model = kept.fitted
                without_noise = np.sqrt(np.maximum(std**2 - model.noise_**2, 0))
                covered.append(float(np.mean(np.abs(mean - f) < 1.645 * without_noise)))
    for name, values in errors.items():
        run.mean(f"RMSE to the noiseless values, {MADE}", values, better="lower", series=name)
        if name != METHOD:
            run.ratio(
                f"RMSE, ratio, {MADE}",
                method=errors[METHOD],
                baseline=values,
                better="lower",
                series=METHOD,
                against=name,
            )
    run.mean("coverage of the noiseless values", covered, better="higher", series=METHOD)
    record_scores(run, {MADE: dict(scores)}, METHOD, ())
    for other in (BINNED, PROCESS, TREES):
        run.difference(
            f"NLL less that of others, {MADE}", method=[one.nll for one in scores[METHOD]],
            baseline=[one.nll for one in scores[other]], unit="nats", better="lower", series=METHOD, against=other,
        )  # fmt: skip
    return model, errors


class _Kept:
    """An estimator that keeps what its `fit` returned."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def fit(self, X: Array, y: Array) -> Any:
        self.fitted = self.method.fit(X, y)
        return self.fitted


def _table(run: Run, data: str, rows: int, numbers: range, options: dict[str, Any], bins: int, gp_steps: int) -> None:
    """Score all on splits of a table."""
    name = Path(data).name
    scores: dict[str, list[Scores]] = {}
    for number in run.progress(list(numbers), "splits"):
        part = split(data, rows, number)
        if part.X.shape[1] > 4:
            options = options | {"core": "cp"}
        for method, made in _methods(options, bins, gp_steps, number).items():
            scores.setdefault(method, []).append(scored(lambda made=made: made, part))  # type: ignore[misc]
    record_scores(run, {name: dict(scores)}, METHOD, (BINNED, PROCESS, TREES))


def _at_hand(name: str) -> bool:
    from paperworks.hub import datasets

    return any(entry.name == name and entry.available for entry in datasets())


def _gaps(run: Run, days: int, numbers: range, options: dict[str, Any]) -> None:
    """Exchange rates of the first days, with blocks of a fifth of them left out."""
    import numpy as np

    from paperworks.hub import SeriesData, load_dataset
    from paperworks.uncertainty.functional_tucker import FunctionalTucker

    loaded = load_dataset("exchange_rate")
    if not isinstance(loaded, SeriesData):
        raise UsageError("exchange_rate holds no series: replace what is there")
    values = loaded.values[:days]
    values = (values - values.mean(0)) / np.where(np.ptp(values, axis=0) > 0, values.std(0), 1.0)
    T, currencies = values.shape
    width = max(2, T // 50)
    ours, theirs, nll = [], [], []
    for number in run.progress(list(numbers), "gaps"):
        # Neither the first nor the last block, beyond which there is nothing to interpolate to.
        blocks = np.random.default_rng(number).permutation(np.arange(1, T // width - 1))[: max(1, T // width // 5)]
        left = np.isin(np.arange(T) // width, blocks)
        day, currency = (one.ravel() for one in np.meshgrid(np.arange(T), np.arange(currencies), indexing="ij"))
        X, y, gone = np.column_stack([currency, day]).astype(float), values.ravel(), left[day]
        rank = max(options["ranks"], min(5, currencies))
        models = [
            FunctionalTucker(
                **options | {"ranks": rank}, kernel="matern12", lengthscale=one, modes=("categorical", "continuous"),
                random_state=number,
            )
            for one in (0.03, 0.1, 0.3)
        ]  # fmt: skip
        model = Chosen(models).fit(X[~gone], y[~gone])
        ours.append(float(np.sqrt(np.mean((model.predict(X[gone]) - y[gone]) ** 2))))
        nll.append(float(-model.log_predictive_density(X[gone], y[gone]).mean()))
        seen = np.flatnonzero(~left)
        line = np.stack([np.interp(np.flatnonzero(left), seen, values[seen, c]) for c in range(currencies)], axis=1)
        theirs.append(float(np.sqrt(np.mean((line - values[left]) ** 2))))
    for name, figures in ((METHOD, ours), (LINEAR, theirs)):
        run.mean(f"RMSE in gaps, {RATES}", figures, better="lower", series=name)
    run.mean(f"NLL in gaps, {RATES}", nll, unit="nats", better="lower", series=METHOD)
    run.ratio(
        f"RMSE in gaps, ratio, {RATES}", method=ours, baseline=theirs, better="lower", series=METHOD, against=LINEAR,
        test_to_train=GAPS_TO_REST,
    )  # fmt: skip


def _timed(run: Run, entries: int, steps: int, repeats: int, seed: int) -> None:
    """A sweep against plain loops, and filter and smoother by the number of steps."""
    import numpy as np
    import torch

    from paperworks.state_space import StateSpaceGP
    from paperworks.uncertainty.functional_tucker import FunctionalTucker, MeanField, TuckerCore

    part, _ = made_up(entries, seed)
    prior = StateSpaceGP("matern32", 0.3)
    ours = MeanField(
        torch.from_numpy(part.X), torch.from_numpy(part.y), [prior] * 3, TuckerCore([2, 2, 2]),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    ours.sweep()
    run.compare(
        baseline=("loops", lambda: PlainSweep(ours).sweep()),
        method={METHOD: lambda: ours.sweep()},
        repeats=repeats,
    )
    random = np.random.default_rng(seed)
    lengths = [max(8, steps * one // max(STEPS)) for one in STEPS]
    tasks = {}
    for length in lengths:
        # Two functions, as those of a mode, and what entries say to them.
        t, shift = (
            torch.from_numpy(np.sort(random.uniform(size=length))),
            torch.from_numpy(random.normal(size=(length, 2))),
        )
        precision = shift[:, :, None] * shift[:, None, :]
        tasks[f"{length} steps"] = lambda given=(t, precision, shift): (prior.posterior(*given), None)[1]
    seconds = [np.array(one.seconds).ravel() for one in time_in_turn(tasks, repeats=max(2, repeats)).values()]
    for name, each in zip(tasks, seconds, strict=True):
        run.record("time of filter and smoother", float(np.median(each)), unit="s", better="lower", series=name)
    slopes = [float(np.polyfit(np.log(lengths), np.log(turn), 1)[0]) for turn in zip(*seconds, strict=True)]
    run.mean("slope of log time of the filter in log steps", slopes, better="lower", series=METHOD)
    fits = {}
    for length in lengths:
        given, _ = made_up(length, seed)
        model = FunctionalTucker(lengthscale=0.3, max_iter=3, tol=0.0, n_restarts=1, random_state=seed)
        fits[f"{length} entries"] = lambda model=model, given=given: (model.fit(given.X, given.y), None)[1]
    seconds = [np.array(one.seconds).ravel() for one in time_in_turn(fits, repeats=max(2, repeats)).values()]
    for name, each in zip(fits, seconds, strict=True):
        run.record("time of three sweeps", float(np.median(each)), unit="s", better="lower", series=name)
    slopes = [float(np.polyfit(np.log(lengths), np.log(turn), 1)[0]) for turn in zip(*seconds, strict=True)]
    run.mean("slope of log fit time in log entries", slopes, better="lower", series=METHOD)


class PlainSweep:
    """The sweep of `MeanField` in plain loops, over entries and over steps, from the same state: what it is timed against.

    Args:
        start: With one start, of which a copy is made.
    """

    def __init__(self, start: Any) -> None:
        self.y, self.tau = start.y.numpy(), float(start.tau)
        self.priors = [mode.prior for mode in start.modes]
        self.places = [mode.places.numpy() for mode in start.modes]
        self.rows = [mode.rows.numpy() for mode in start.modes]
        self.ranks = start.core.ranks
        self.w, self.cov = start.core.mean[0].numpy(), start.core.cov[0].numpy()
        self.means = [mode.mean[0].numpy().copy() for mode in start.modes]
        self.seconds = [_full(mode.second[0].numpy(), rank) for mode, rank in zip(start.modes, self.ranks, strict=True)]
        self.a0, self.b0 = float(start.a0), float(start.b0)

    def sweep(self) -> None:
        """Each mode, the core, the noise."""
        import numpy as np

        for k in range(len(self.ranks)):
            self._mode(k)
        size = len(self.w)
        gram, shift, square = np.eye(size), np.zeros(size), np.zeros((size, size))
        linear = np.zeros(size)
        for n, y in enumerate(self.y):
            z, zz = self._kron(n, range(len(self.ranks)))
            square += zz
            linear += y * z
        gram, shift = gram + self.tau * square, self.tau * linear
        self.cov = np.linalg.inv(gram)
        self.w = self.cov @ shift
        second = self.cov + np.outer(self.w, self.w)
        error = float(self.y @ self.y) - 2 * self.w @ linear + float((second * square).sum())
        self.tau = (self.a0 + len(self.y) / 2) / (self.b0 + error / 2)

    def _kron(self, n: int, modes: Any) -> tuple[Array, Array]:
        import numpy as np

        z, zz = np.ones(1), np.ones((1, 1))
        for j in modes:
            z, zz = np.kron(z, self.means[j][self.rows[j][n]]), np.kron(zz, self.seconds[j][self.rows[j][n]])
        return z, zz

    def _mode(self, k: int) -> None:
        import numpy as np

        R, T = self.ranks[k], len(self.places[k])
        order = [k, *(j for j in range(len(self.ranks)) if j != k)]
        W = self.w.reshape(self.ranks).transpose(order).reshape(R, -1)
        size = W.shape[1]
        second = (self.cov + np.outer(self.w, self.w)).reshape(*self.ranks, *self.ranks)
        second = second.transpose(*order, *(len(self.ranks) + j for j in order)).reshape(R, size, R, size)
        precision, shift = np.zeros((T, R, R)), np.zeros((T, R))
        for n, y in enumerate(self.y):
            z, zz = self._kron(n, order[1:])
            precision[self.rows[k][n]] += self.tau * np.einsum("iajb,ab->ij", second, zz)
            shift[self.rows[k][n]] += self.tau * y * (W @ z)
        self.means[k], cov = _loop_smoother(self.priors[k], self.places[k], precision, shift)
        self.seconds[k] = cov + self.means[k][:, :, None] * self.means[k][:, None, :]


def _full(packed: Array, rank: int) -> Array:
    import numpy as np

    found = np.zeros((len(packed), rank, rank))
    rows, columns = np.triu_indices(rank)
    found[:, rows, columns] = found[:, columns, rows] = packed
    return found


def _loop_smoother(prior: Any, t: Array, precision: Array, shift: Array) -> tuple[Array, Array]:
    """Kalman filter and Rauch-Tung-Striebel smoother, step by step: means (T, R) and covariances (T, R, R)."""
    import numpy as np
    import torch

    T, R = shift.shape
    one = np.eye(R)
    A, Q = (
        np.stack([np.kron(each, one) for each in part.numpy()])
        for part in prior.transition(torch.from_numpy(np.diff(t)))
    )
    D = prior.order * R
    H = np.eye(R, D)
    m, P = np.zeros(D), np.kron(prior.stationary().numpy(), one)
    filtered, predicted = [], []
    for i in range(T):
        if i:
            m, P = A[i - 1] @ m, A[i - 1] @ P @ A[i - 1].T + Q[i - 1]
        predicted.append((m, P))
        gain = P @ H.T @ np.linalg.inv(np.eye(R) + precision[i] @ H @ P @ H.T)
        m, P = m + gain @ (shift[i] - precision[i] @ H @ m), P - gain @ precision[i] @ H @ P
        filtered.append((m, P))
    means, covs = [H @ m], [H @ P @ H.T]
    for i in range(T - 2, -1, -1):
        (before, spread), (ahead, wide) = filtered[i], predicted[i + 1]
        G = np.linalg.solve(wide, A[i] @ spread).T
        m, P = before + G @ (m - ahead), spread + G @ (P - wide) @ G.T
        means.append(H @ m)
        covs.append(H @ P @ H.T)
    return np.stack(means[::-1]), np.stack(covs[::-1])


def _figure(model: Any, errors: dict[str, list[float]]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    *planes, bars = figure.subplots(1, 4)
    t = np.linspace(0, 1, 200)
    for k, (axes, truth) in enumerate(zip(planes, functions(), strict=True)):
        mean, std = model.latent(k, t)
        # Functions are known but for an invertible mixing: the true ones are shown as the mixing nearest to ours.
        true = np.stack(truth(t), 1)
        mixed = true @ np.linalg.lstsq(true, mean, rcond=None)[0]
        for r in range(mean.shape[1]):
            colour = ("#1f6f8b", "#c98b2b", "#7a5c99", "#5f9e6e", "#8a8a8a")[r % 5]
            axes.plot(t, mean[:, r], color=colour)
            axes.fill_between(
                t, mean[:, r] - 1.645 * std[:, r], mean[:, r] + 1.645 * std[:, r], color=colour, alpha=0.25
            )
            axes.plot(t, mixed[:, r], "k--", linewidth=0.8)
        axes.set(title=f"functions of index {k + 1}", xlabel="index")
    names = list(errors)
    bars.bar(range(len(names)), [np.mean(errors[name]) for name in names], color=[COLOURS[name] for name in names])
    bars.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize="small")
    bars.set(title="RMSE", yscale="log")
    for axes in (*planes, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
