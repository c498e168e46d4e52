"""The Cauchy-Schwarz bottleneck on tables: error against squared error, VIB and HSIC, at equal compression and attacked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from torch import Tensor

    Part = tuple[Tensor, Tensor]

METHOD, PLAIN = "CS bottleneck", "squared error"
# Weights from where each objective about halves I(x; t) on these tables, a factor of two apart.
BETAS = {PLAIN: (0.0,), "VIB": (0.05, 0.1, 0.2), "HSIC": (0.3, 0.6, 1.2), METHOD: (0.0, 0.1, 0.2, 0.4)}
COLOURS = {PLAIN: "#8a8a8a", "VIB": "#c98b2b", "HSIC": "#7a5c99", METHOD: "#1f6f8b"}


class Trained(NamedTuple):
    """What a network reached: error on the samples it was chosen by, then what was measured on those it never saw."""

    validation: float
    information: float
    error: float
    attacked: float


@recipe(
    "cauchy-schwarz-bottleneck",
    baseline="squared error, alone and with a VIB or HSIC bottleneck",
    tiny={"samples": 120, "hidden": 16, "bottleneck": 8, "epochs": 3, "seeds": 2, "most_tables": 1},
    large={"samples": 10_000, "hidden": 128, "bottleneck": 128, "epochs": 200, "rate": 1e-3, "seeds": 10},
)
def cauchy_schwarz_bottleneck(
    run: Run,
    samples: int = 800,
    hidden: int = 64,
    bottleneck: int = 32,
    epochs: int = 25,
    rate: float = 5e-3,
    sigma: float = 0.3,
    sigma_y: float = 1.5,
    kept: float = 0.5,
    eps: float = 0.3,
    seeds: int = 3,
    most_tables: int = 6,
    seed: int = 0,
) -> None:
    """Equal networks on regression tables, by four objectives: test error, as it is and under FGSM.

    Without compression the Cauchy-Schwarz divergence stands against squared error. With it, each objective takes the
    weight beta that predicts the validation samples best, among those that leave at most `kept` of the I(x; t) that
    squared error alone leaves, or the one that leaves least. I(x; t) is the normalised Cauchy-Schwarz one over test
    samples, with median kernels, and with t's noise where there is any.

    Args:
        run: Keeps what is measured.
        samples: Of each table, at most: 60 % to train on, 20 % to choose by, 20 % to test.
        hidden: Size of the encoder's two layers and of the decoder's.
        bottleneck: Size of t.
        epochs: Passes over the samples.
        rate: Adam's.
        sigma: Width of the kernel of features, which are standardised, in the divergence; elsewhere it is the median.
        sigma_y: Width of the kernel of standardised targets.
        kept: Share of I(x; t) that may be left.
        eps: Size of the attack, in standard deviations of a feature.
        seeds: Splits and first weights.
        most_tables: Tables at most: diabetes, and those of UCI that are at hand.
        seed: Of the first.
    """
    from paperworks.lab.hub import datasets

    uci = [entry.name for entry in datasets() if entry.name.startswith("uci:") and entry.available]
    tables = ["diabetes", *uci][:most_tables]
    found: dict[str, list[dict[str, dict[float, Trained]]]] = {name: [] for name in tables}
    for name, number in run.progress([(n, s) for n in tables for s in range(seed, seed + seeds)], "training"):
        parts = _parts(name, samples, number)
        found[name].append({
            objective: {
                beta: _train(
                    parts, objective, beta, sigma, sigma_y, (hidden, hidden), bottleneck, epochs, rate, eps, number
                )
                for beta in betas
            }
            for objective, betas in BETAS.items()
        })  # fmt: skip
    compressed = {name: [_compressed(one, kept) for one in reached] for name, reached in found.items()}
    _record(run, found, compressed)
    run.figure(_figure(found, compressed))


def _parts(name: str, samples: int, seed: int) -> tuple[Part, Part, Part]:
    """Samples to train on, to choose by and to test, standardised by the first."""
    import numpy as np
    import torch
    from sklearn.preprocessing import StandardScaler

    from paperworks.lab.hub import load_dataset
    from paperworks.lab.hub.data import TableData

    data = load_dataset(name)
    assert isinstance(data, TableData)
    chosen = np.random.default_rng(seed).permutation(len(data.y))[:samples]
    ends = [int(0.6 * len(chosen)), int(0.8 * len(chosen))]
    x, y = (
        torch.tensor(StandardScaler().fit(values[: ends[0]]).transform(values), dtype=torch.float32)
        for values in (data.X[chosen], data.y[chosen, None])
    )
    train, validation, test = zip(x.tensor_split(ends), y.tensor_split(ends), strict=True)
    return train, validation, test


def _train(
    parts: tuple[Part, Part, Part],
    objective: str,
    beta: float,
    sigma: float,
    sigma_y: float,
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
            x.shape[1], hidden, bottleneck, stochastic=objective == "VIB", generator=generator
        )  # fmt: skip
    loss = CauchySchwarzBottleneck(beta, sigma, sigma_y, "median", sigma_compression="median")

    def of_batch(x: Tensor, y: Tensor) -> Tensor:
        t = network.encode(x)
        y_hat = network.decoder(t)
        if objective == METHOD:
            return loss(x, y, y_hat, t)
        error = F.mse_loss(y_hat, y)
        if objective == "VIB":
            mean, log_var = network.code(x)
            assert log_var is not None
            return error + beta / 2 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return error + beta * _hsic(x, t) if objective == "HSIC" else error

    errors = train_bottleneck(
        network, of_batch, x, y, validation=validation, lr=rate, epochs=epochs, generator=generator
    )  # fmt: skip
    attacked = fgsm(network, x_test, y_test, eps)
    with torch.no_grad():
        rmse = [float(F.mse_loss(network(given), y_test).sqrt()) for given in (x_test, attacked)]
        information = cs_mutual_information(x_test, network.train().encode(x_test), "median", "median")
    return Trained(min(errors) ** 0.5, float(information), *rmse)


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


def _compressed(reached: Mapping[str, Mapping[float, Trained]], kept: float) -> dict[str, Trained]:
    """Of each objective the network to compare at equal compression; squared error alone cannot compress."""
    bound = kept * reached[PLAIN][0.0].information
    return {
        objective: min(
            by_beta.values(),
            key=lambda one: (0, one.validation) if one.information <= bound else (1, one.information),
        )
        for objective, by_beta in reached.items()
    }


def _record(
    run: Run,
    found: Mapping[str, Sequence[Mapping[str, Mapping[float, Trained]]]],
    compressed: Mapping[str, Sequence[Mapping[str, Trained]]],
) -> None:
    import numpy as np

    best = {"RMSE": 0, "RMSE under FGSM": 0}
    for table, chosen in compressed.items():
        run.ratio(
            f"RMSE without compression, {table}", method=[one[METHOD][0.0].error for one in found[table]],
            baseline=[one[PLAIN][0.0].error for one in found[table]], better="lower", series=METHOD, against=PLAIN,
        )  # fmt: skip
        for objective in BETAS:
            left = np.mean([one[objective].information for one in chosen])
            run.record(f"I(x; t), compressed, {table}", float(left), better="lower", series=objective)
        for name, of in (("RMSE", "error"), ("RMSE under FGSM", "attacked")):
            values = {objective: [getattr(one[objective], of) for one in chosen] for objective in BETAS}
            for objective, each in values.items():
                run.record(f"{name}, {table}", float(np.mean(each)), better="lower", series=objective)
                if objective != METHOD:
                    run.ratio(
                        f"{name} against {objective}, {table}", method=values[METHOD], baseline=each, better="lower",
                        series=METHOD, against=objective,
                    )  # fmt: skip
            best[name] += min(values, key=lambda objective: float(np.mean(values[objective]))) == METHOD
    for name, times in best.items():
        run.record(f"tables with the lowest {name}", times, unit=f"of {len(found)}", better="higher", series=METHOD)


def _figure(
    found: Mapping[str, Sequence[Mapping[str, Mapping[float, Trained]]]],
    compressed: Mapping[str, Sequence[Mapping[str, Trained]]],
) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2.2 * len(found), 6), layout="constrained")
    above, below = figure.subplots(2, len(found), squeeze=False)
    for table, plane, bars in zip(found, above, below, strict=True):
        for objective, betas in BETAS.items():
            seen = np.array([[one[objective][beta] for beta in betas] for one in found[table]]).mean(0)
            plane.plot(seen[:, 1], seen[:, 2], "o-", color=COLOURS[objective], label=objective)
        plane.set(title=table, xlabel="I(x; t)")
        heights = {o: np.array([[one[o].error, one[o].attacked] for one in compressed[table]]).mean(0) for o in BETAS}
        for shift, (objective, pair) in enumerate(heights.items()):
            bars.bar(np.arange(2) + 0.2 * shift - 0.3, pair, 0.2, color=COLOURS[objective])
        bars.set_xticks([0, 1], ["clean", "FGSM"])
        for axes in (plane, bars):
            axes.spines[["top", "right"]].set_visible(False)
    above[0].set_ylabel("RMSE")
    below[0].set_ylabel("RMSE, compressed")
    above[0].legend(frameon=False, fontsize="small")
    return figure
