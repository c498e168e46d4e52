"""The Cauchy-Schwarz bottleneck on tables: error against squared error, VIB and HSIC, at equal compression and attacked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    Part = tuple[Tensor, Tensor]

METHOD, PLAIN, COMPRESSED = "CS bottleneck", "squared error", "squared error, compressed"
# Weights of the compression to begin the search with: about those that halve I(x; t).
STARTS = {COMPRESSED: 0.03, "VIB": 0.1, "HSIC": 0.3, METHOD: 0.03}
# Losses under heavy-tailed noise, and for each the scales from which the best on the samples to choose by is taken: of the
# target's kernel, or where Huber's loss turns from squared to absolute.
HEAVY = {PLAIN: (1.0,), "absolute error": (1.0,), "Huber": (0.1, 0.3, 1.0), METHOD: (0.5, 1.0, 2.0)}
# Tables are split at random, 20 % to test and 60 % to train on.
TEST_TO_TRAIN = 1 / 3
# Attacks on every network, in shares of the largest; the tables and bars are of none and of the half.
SHARES = (0.0, 1 / 12, 1 / 6, 1 / 3, 0.5, 1.0)
NONE, HALF = 0, 4
COLOURS = {PLAIN: "#8a8a8a", COMPRESSED: "#5f9e6e", "VIB": "#c98b2b", "HSIC": "#7a5c99", METHOD: "#1f6f8b"}


class Trained(NamedTuple):
    """What a network reached: I(x; t) over the samples to choose by, then what was measured on those it never saw.

    `errors` are root mean squared ones, under the attacks of `SHARES`; of `median_chosen_by`, the median of all absolute
    errors over the samples to choose by.
    """

    chosen_by: float
    information: float
    errors: tuple[float, ...]
    median_error: float
    median_chosen_by: float


@recipe(
    "cauchy-schwarz-bottleneck",
    baseline="squared error, alone and with a VIB or HSIC bottleneck; absolute and Huber's error under heavy tails",
    columns=(
        "RMSE, all tables against squared error, compressed",
        "RMSE, all tables against VIB",
        "RMSE, all tables against HSIC",
        "RMSE under FGSM of 0.3, all tables against VIB",
        "RMSE under FGSM of 0.3, all tables against HSIC",
        "median error under heavy tails",
    ),
    tiny={"samples": 120, "hidden": 16, "bottleneck": 8, "epochs": 3, "trials": 2, "seeds": 2, "most_tables": 1},
    large={
        "samples": 10_000,
        "hidden": 128,
        "bottleneck": 128,
        "epochs": 200,
        "rate": 1e-4,
        "noise": True,
        "seeds": 10,
    },
)
def cauchy_schwarz_bottleneck(
    run: Run,
    data: Annotated[str, Data("auto", "diabetes", "uci:*")] = "auto",
    samples: Annotated[int, Between(10, 1600)] = 800,
    hidden: Annotated[int, Between(1, 128)] = 64,
    bottleneck: Annotated[int, Between(1, 128)] = 32,
    epochs: Annotated[int, Between(1, 240)] = 60,
    rate: Annotated[float, Between(0, 1)] = 2e-3,
    sigma: Annotated[float, Between(0, 100)] = 0.3,
    sigma_y: Annotated[float, Between(0, 100)] = 3.0,
    noise: bool = False,
    kept: Annotated[float, Between(0, 1)] = 0.5,
    trials: Annotated[int, Between(1, 20)] = 5,
    eps: Annotated[float, Between(0, 10)] = 0.6,
    seeds: Annotated[int, Between(1, 20)] = 5,
    most_tables: Annotated[int, Between(1, 24)] = 6,
    seed: int = 0,
) -> None:
    """Equal networks on regression tables, by five objectives: test error, as it is and under attacks of FGSM.

    Without compression the Cauchy-Schwarz divergence stands against squared error. With it, the weight beta of each
    objective is sought until the network keeps `kept` of the I(x; t) that squared error alone keeps, so that all are
    compared at equal compression. Squared error itself cannot compress; it also stands there with the method's I(x; t) added,
    so that only the prediction term differs. I(x; t) is the normalised Cauchy-Schwarz one,
    with median kernels, and with t's noise where there is any; it is matched over the samples to choose by.

    On one table pairs are its splits, on several the tables. Last, where `data` is auto, without compression on made-up samples whose noise has heavy tails, against squared error and what one would
    rather take there, absolute error and Huber's, each with its scale chosen on samples kept apart: the median of all
    absolute errors is measured.

    Args:
        run: Keeps what is measured.
        data: A table of your own whose last column is a number (.csv, .parquet, .npz), a name, or auto for those at hand.
        samples: Of each table, at most: 60 % to train on, 20 % to choose by, 20 % to test.
        hidden: Size of the encoder's two layers and of the decoder's.
        bottleneck: Size of t.
        epochs: Passes over the samples.
        rate: Adam's.
        sigma: Width of the kernel of features, which are standardised, in the divergence; elsewhere it is the median.
        sigma_y: Width of the kernel of standardised targets.
        noise: Noise on the method's t too while training, as VIB has it.
        kept: Share of I(x; t) that is left.
        trials: Networks trained to find a weight that leaves it.
        eps: Size of the largest attack, in standard deviations of a feature; smaller ones are made too.
        seeds: Splits and first weights.
        most_tables: Tables at most: diabetes, and those of UCI that are at hand.
        seed: Of the first.
    """
    from paperworks.hub import datasets

    uci = [entry.name for entry in datasets() if entry.name.startswith("uci:") and entry.available]
    tables = ["diabetes", *uci][:most_tables] if data == "auto" else [data]
    training = noise, (hidden, hidden), bottleneck, epochs, rate, eps
    called = {name: Path(name).name for name in tables}
    plain: dict[str, list[dict[str, Trained]]] = {name: [] for name in called.values()}
    tried: dict[str, list[dict[str, list[Trained]]]] = {name: [] for name in called.values()}
    for table, number in run.progress([(n, s) for n in tables for s in range(seed, seed + seeds)], "training"):
        parts, name = _parts(table, samples, number), called[table]

        def trained(objective: str, beta: float, parts: tuple[Part, Part, Part] = parts, seed: int = number) -> Trained:
            return _train(parts, objective, beta, sigma, sigma_y, *training, seed)

        plain[name].append({objective: trained(objective, 0.0) for objective in (PLAIN, METHOD)})
        wanted = kept * plain[name][-1][PLAIN].chosen_by
        tried[name].append({
            objective: _sought(lambda beta, of=objective: trained(of, beta), start, wanted, trials)  # type: ignore[misc]
            for objective, start in STARTS.items()
        })  # fmt: skip
    compressed = {
        name: [
            {PLAIN: alone[PLAIN], **{objective: seen[0] for objective, seen in by_objective.items()}}
            for alone, by_objective in zip(plain[name], tried[name], strict=True)
        ]
        for name in plain
    }
    _record(run, plain, compressed, eps)
    heavy: dict[str, list[float]] = {}
    for objective, scales in run.progress(list(HEAVY.items()) if data == "auto" else [], "heavy tails"):
        heavy[objective] = []
        for number in range(seed, seed + seeds):
            made = _heavy_tailed(samples, number)
            reached = [_train(made, objective, 0.0, sigma, scale, *training, number) for scale in scales]
            heavy[objective].append(min(reached, key=lambda one: one.median_chosen_by).median_error)
    for objective, medians in heavy.items():
        run.mean("median error under heavy tails", medians, better="lower", series=objective)
        if objective != METHOD:
            run.ratio(
                "median error under heavy tails, ratio", method=heavy[METHOD], baseline=medians, better="lower",
                series=METHOD, against=objective,
            )  # fmt: skip
    run.figure(_figure(plain, tried, compressed))


def _parts(name: str, samples: int, seed: int) -> tuple[Part, Part, Part]:
    """Samples of a table, drawn at random."""
    import numpy as np

    from paperworks.hub import TableData, load_dataset

    loaded = load_dataset(name)
    if not isinstance(loaded, TableData):
        raise UsageError(f"{name} is no table, and one is wanted whose last column is a number")
    X, y = loaded.measured().X, loaded.y
    if len(y) < 10:
        raise UsageError(f"{name} has {len(y)} rows: give 10 or more, to train on, to choose by and to test")
    chosen = np.random.default_rng(seed).permutation(len(y))[:samples]
    return _split(X[chosen], y[chosen])


def _heavy_tailed(samples: int, seed: int) -> tuple[Part, Part, Part]:
    """Ten features, y the sum of their sines, and noise of Student's t distribution with two degrees of freedom."""
    import numpy as np

    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, 10))
    return _split(x, np.sin(x).sum(1) + random.standard_t(2, samples))


def _split(X: NDArray[Any], y: NDArray[Any]) -> tuple[Part, Part, Part]:
    """Samples to train on, to choose by and to test, standardised by the first."""
    import torch
    from sklearn.preprocessing import StandardScaler

    ends = [int(0.6 * len(X)), int(0.8 * len(X))]
    features, targets = (
        torch.tensor(StandardScaler().fit(values[: ends[0]]).transform(values), dtype=torch.float32)
        for values in (X, y[:, None])
    )
    train, validation, test = zip(features.tensor_split(ends), targets.tensor_split(ends), strict=True)
    return train, validation, test


def _train(
    parts: tuple[Part, Part, Part],
    objective: str,
    beta: float,
    sigma: float,
    sigma_y: float,
    noise: bool,
    hidden: tuple[int, int],
    bottleneck: int,
    epochs: int,
    rate: float,
    eps: float,
    seed: int,
) -> Trained:
    import torch
    import torch.nn.functional as F

    from paperworks.representation import CauchySchwarzBottleneck
    from paperworks.representation.cauchy_schwarz_bottleneck import (
        BottleneckNetwork,
        cs_mutual_information,
        fgsm,
        train_bottleneck,
    )

    (x, y), validation, (x_test, y_test) = parts
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = BottleneckNetwork(
            x.shape[1], hidden, bottleneck, generator=generator,
            stochastic=objective == "VIB" or (noise and objective == METHOD),
        )  # fmt: skip
    loss = CauchySchwarzBottleneck(beta, sigma, sigma_y, "median", sigma_compression="median")

    def of_batch(x: Tensor, y: Tensor) -> Tensor:
        t = network.encode(x)
        y_hat = network.decoder(t)
        if objective == METHOD:
            return loss(x, y, y_hat, t)
        if objective == "absolute error":
            return F.l1_loss(y_hat, y)
        if objective == "Huber":
            return F.huber_loss(y_hat, y, delta=sigma_y)
        error = F.mse_loss(y_hat, y)
        if objective == COMPRESSED:
            return error + beta * cs_mutual_information(x, t, "median", "median")
        if objective == "VIB":
            mean, log_var = network.code(x)
            assert log_var is not None
            return error + beta / 2 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return error + beta * _hsic(x, t) if objective == "HSIC" else error

    train_bottleneck(
        network, of_batch, x, y, validation=validation, lr=rate, epochs=epochs, generator=generator
    )  # fmt: skip
    attacked = [fgsm(network, x_test, y_test, share * eps) for share in SHARES]
    with torch.no_grad():
        errors = tuple(float(F.mse_loss(network(given), y_test).sqrt()) for given in attacked)
        median_error, median_chosen_by = (
            float((network(given) - wanted).abs().median()) for given, wanted in ((x_test, y_test), validation)
        )
        network.train()
        chosen_by, information = (
            float(cs_mutual_information(given, network.encode(given), "median", "median"))
            for given in (validation[0], x_test)
        )
    return Trained(chosen_by, information, errors, median_error, median_chosen_by)


def _hsic(x: Tensor, t: Tensor) -> Tensor:
    """Normalised Hilbert-Schmidt independence criterion with median Gaussian kernels, from 0 to 1."""
    import torch

    centred = []
    for values in (x, t):
        # A floor: where t collapses there is no distance.
        width = torch.pdist(values.detach()).median().clamp_min(1e-6)
        K = (torch.cdist(values, values).square() / (-2 * width**2)).exp()
        centred.append(K - K.mean(0) - K.mean(1, keepdim=True) + K.mean())
    K, Q = centred
    return (K * Q).sum() / (K.square().sum() * Q.square().sum() + 1e-12).sqrt()


def _sought(trained: Callable[[float], Trained], start: float, wanted: float, trials: int) -> list[Trained]:
    """Networks whose beta is sought so that they leave the wanted I(x; t); the nearest comes first."""
    loose: tuple[float, float] | None = None
    tight: tuple[float, float] | None = None
    place, seen = math.log(start), []
    for _ in range(trials):
        seen.append(trained(math.exp(place)))
        left = seen[-1].chosen_by
        if left > wanted:
            loose = place, left
        else:
            tight = place, left
        if loose and tight:
            share = (loose[1] - wanted) / (loose[1] - tight[1])
            # Away from both ends, for I(x; t) may fall in a jump.
            place = loose[0] + min(max(share, 0.15), 0.85) * (tight[0] - loose[0])
        else:
            place += math.log(3) if loose else -math.log(3)
    return sorted(seen, key=lambda one: abs(math.log(max(one.chosen_by, 1e-12) / wanted)))


def _record(
    run: Run,
    plain: Mapping[str, Sequence[Mapping[str, Trained]]],
    compressed: Mapping[str, Sequence[Mapping[str, Trained]]],
    eps: float,
) -> None:
    import numpy as np

    for table, alone in plain.items():
        run.ratio(
            f"RMSE without compression, {table}", method=[one[METHOD].errors[NONE] for one in alone],
            baseline=[one[PLAIN].errors[NONE] for one in alone], better="lower", series=METHOD, against=PLAIN,
            test_to_train=TEST_TO_TRAIN,
        )  # fmt: skip
        for objective in (PLAIN, *STARTS):
            left = np.mean([one[objective].information for one in compressed[table]])
            run.record(f"I(x; t), compressed, {table}", float(left), better="lower", series=objective)
    for attack, share in enumerate(SHARES):
        values = {
            table: {objective: [one[objective].errors[attack] for one in chosen] for objective in (PLAIN, *STARTS)}
            for table, chosen in compressed.items()
        }
        means = {table: {one: float(np.mean(errors)) for one, errors in each.items()} for table, each in values.items()}
        name = f"RMSE under FGSM of {share * eps:g}" if share else "RMSE"
        for table, each in values.items() if attack in (NONE, HALF) else ():
            for objective, errors in each.items():
                run.record(f"{name}, {table}", means[table][objective], better="lower", series=objective)
                if objective != METHOD:
                    run.ratio(
                        f"{name} against {objective}, {table}", method=each[METHOD], baseline=errors, better="lower",
                        series=METHOD, against=objective, test_to_train=TEST_TO_TRAIN,
                    )  # fmt: skip
        for objective in (PLAIN, *STARTS):
            if objective != METHOD:
                several = list(means.values()) if len(means) > 1 else _splits(values)
                run.ratio(
                    f"{name}, all tables", method=[each[METHOD] for each in several],
                    baseline=[each[objective] for each in several], better="lower", series=METHOD, against=objective,
                    test_to_train=None if len(means) > 1 else TEST_TO_TRAIN,
                )  # fmt: skip
        unit = f"of {len(values)}"
        for objective in (PLAIN, *STARTS):
            if objective != METHOD:
                lower = sum(each[METHOD] < each[objective] for each in means.values())
                run.record(
                    f"tables with a lower {name} than {objective}", lower, unit=unit, better="higher", series=METHOD
                )  # fmt: skip
        for objective in STARTS:
            lowest = sum(min(STARTS, key=each.__getitem__) == objective for each in means.values())
            run.record(
                f"tables with the lowest {name}, compressed", lowest, unit=unit, better="higher", series=objective
            )


def _splits(values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, float]]:
    """The errors of one table, split by split."""
    [errors] = values.values()
    return [dict(zip(errors, split, strict=True)) for split in zip(*errors.values(), strict=True)]


def _figure(
    plain: Mapping[str, Sequence[Mapping[str, Trained]]],
    tried: Mapping[str, Sequence[Mapping[str, Sequence[Trained]]]],
    compressed: Mapping[str, Sequence[Mapping[str, Trained]]],
) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2.2 * len(plain), 6), layout="constrained")
    above, below = figure.subplots(2, len(plain), squeeze=False)
    for table, plane, bars in zip(plain, above, below, strict=True):
        for objective in (PLAIN, *STARTS):
            seen = [one for each in tried[table] for one in each.get(objective, ())]
            seen += [each[objective] for each in plain[table] if objective in each]
            plane.plot(
                [one.information for one in seen], [one.errors[NONE] for one in seen], "o", markersize=3.5, alpha=0.7,
                color=COLOURS[objective], label=objective,
            )  # fmt: skip
            heights = np.array(
                [[one[objective].errors[attack] for attack in (NONE, HALF)] for one in compressed[table]]
            )
            shift = 0.16 * list(COLOURS).index(objective) - 0.32
            bars.bar(
                np.arange(2) + shift, heights.mean(0), 0.16, yerr=heights.std(0) / len(heights) ** 0.5,
                color=COLOURS[objective],
            )  # fmt: skip
        plane.set(title=table, xlabel="I(x; t)")
        bars.set_xticks([0, 1], ["clean", "FGSM"])
        for axes in (plane, bars):
            axes.spines[["top", "right"]].set_visible(False)
    above[0].set_ylabel("RMSE")
    below[0].set_ylabel("RMSE, compressed alike")
    above[0].legend(frameon=False, fontsize="small")
    return figure
