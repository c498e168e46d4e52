"""Closed forms of linear VAEs against training: which latent variables collapse, before and after."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.samples import CLASSED

_BETAS = (0.1, 0.5, 1.0, 2.0, 4.0)
_RHOS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


class Sweep(NamedTuple):
    """Values of what is swept, and at each the active units predicted, and those of each model."""

    values: list[float]
    predicted: list[float]
    found: list[list[float]]


@recipe(
    "posterior-collapse",
    baseline="training and measuring, and the model with independent x and y or lower weights",
    columns=("divergence, largest error", "active units", "active units predicted", "rank correlation with prediction"),
    tiny={"epochs": 1, "latent": 4, "seeds": 1, "fit_latent": 2, "fit_steps": 200},
    large={"epochs": 300, "seeds": 10},
)
def posterior_collapse(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    latent: Annotated[int, Between(1, 64)] = 16,
    epochs: Annotated[int, Between(1, 240)] = 60,
    seeds: Annotated[int, Between(1, 20)] = 5,
    fit_latent: Annotated[int, Between(1, 16)] = 4,
    fit_steps: Annotated[int, Between(1, 12_000)] = 3000,
    eta_dec: Annotated[float, Between(0.001, 10)] = 0.5,
    seed: int = 0,
) -> None:
    """What the theory predicts, on digits or your own rows, from second moments alone, against what training gives.

    A linear conditional and a linear hierarchical VAE are trained, and the divergence of each latent variable compared with
    its closed form. Then a conditional VAE with ReLU layers, the top left quarter of the image given (of a table the first
    quarter of its columns) and the rest to model, is trained at
    five beta, and a hierarchical one at three beta1, three beta2 and three standard deviations of the decoder. Last, the
    conditional one models Gaussian y of as many columns as it has variables, given x that correlates with y by rho.

    Args:
        run: Keeps what is measured.
        data: What to model: a table or folder of images of your own, or a name; its target is not used.
        latent: Latent variables of the nonlinear models.
        epochs: Passes over the rows for each.
        seeds: Nonlinear models at each setting.
        fit_latent: Latent variables of the linear models.
        fit_steps: Steps of L-BFGS on the linear models, at most.
        eta_dec: Standard deviation of the decoder.
        seed: Of first weights, order and noise.
    """
    import numpy as np
    import torch
    from scipy.stats import spearmanr

    from paperworks.recipes.representation.samples import rows as rows_of
    from paperworks.recipes.representation.vae import VAE, HierarchicalVAE, train
    from paperworks.representation.posterior_collapse import (
        LinearCVAE,
        LinearHVAE2,
        PosteriorCollapse,
        linear_cvae_solution,
        linear_hvae_solution,
    )

    known, shape = rows_of(data)
    if known.shape[1] < 2:
        raise UsageError(f"{data} has one column, and some are modelled given others: give two or more")
    height, width = shape or (1, known.shape[1])
    pixels = torch.tensor(known).reshape(-1, height, width)
    corner = torch.zeros(height, width, dtype=torch.bool)
    if shape:
        corner[: max(1, height // 2), : max(1, width // 2)] = True
    else:
        corner[0, : max(1, width // 4)] = True
    rows = torch.cat([pixels[:, corner], pixels[:, ~corner]], 1)
    rows = rows - rows.mean(0)
    given = int(corner.sum())
    x, y = rows[:, :given], rows[:, given:]

    own = torch.Generator().manual_seed(seed)
    linear = LinearCVAE(given, y.shape[1], fit_latent, eta_dec=eta_dec, generator=own)
    linear.fit(rows.mT @ rows / len(rows), fit_steps)
    meter = PosteriorCollapse(fit_latent)
    with torch.no_grad():
        meter.update(*linear.encode(y, x))
    pairs = {"linear CVAE": (linear_cvae_solution(x, y, fit_latent, eta_dec=eta_dec).kl, meter.compute().kl)}
    options: dict[str, Any] = {"beta1": 2.0, "beta2": 0.5, "eta_dec": eta_dec}
    two = LinearHVAE2(rows.shape[1], fit_latent, fit_latent, generator=own, **options)
    two.fit(rows.mT @ rows / len(rows), fit_steps)
    meter = PosteriorCollapse(fit_latent)
    with torch.no_grad():
        meter.update(*two.encode(rows))
    pairs["linear HVAE"] = (linear_hvae_solution(rows, fit_latent, fit_latent, **options).kl, meter.compute().kl)
    for name, (theory, measured) in pairs.items():
        gap = np.abs(np.sort(theory.numpy()) - np.sort(measured)).max()
        run.record("divergence, largest error", float(gap), unit="nats", better="lower", series=name)

    single = rows.float()

    def measured_share(model: Any, loss: Any, rows: torch.Tensor, number: int) -> float:
        own = torch.Generator().manual_seed(seed + number)
        train(model, lambda batch: loss(batch, own), rows, epochs, 128, own)
        return float(PosteriorCollapse.from_encoder(model.encode, rows.split(512)).compute().active_units)

    def conditional(rows: torch.Tensor, given: int, beta: float, hidden: int, number: int) -> float:
        torch.manual_seed(seed + number)
        model = VAE(rows.shape[1], latent, (hidden,), given)
        return measured_share(model, lambda batch, own: model.loss(batch, beta, eta_dec, own), rows, number)

    def hierarchical(number: int, beta1: float = 1.0, beta2: float = 1.0, eta_dec: float = eta_dec) -> float:
        torch.manual_seed(seed + number)
        model = HierarchicalVAE(rows.shape[1], latent, 64)
        return measured_share(model, lambda batch, own: model.loss(batch, beta1, beta2, eta_dec, own), single, number)

    def predicted_share(x: torch.Tensor, y: torch.Tensor, beta: float) -> float:
        return 1 - linear_cvae_solution(x, y, latent, beta=beta, eta_dec=eta_dec).n_collapsed / latent

    def against_prediction(name: str, hidden: int, cases: dict[float, tuple[torch.Tensor, int, float]]) -> Sweep:
        """Active units predicted and measured, for each value of what is swept: its rows, columns given, and beta."""
        sweep = Sweep(list(cases), [], [])
        for value, (rows, given, beta) in run.progress(list(cases.items()), f"conditional VAEs, {name}"):
            sweep.predicted.append(predicted_share(rows[:, :given].double(), rows[:, given:].double(), beta))
            sweep.found.append([conditional(rows, given, beta, hidden, number) for number in range(seeds)])
            series = f"{name} {value:g}"
            run.record("active units predicted", sweep.predicted[-1], better="higher", series=series)
            run.record("active units", fmean(sweep.found[-1]), better="higher", series=series)
        means = [fmean(values) for values in sweep.found]
        if len(set(means)) > 1 and len(set(sweep.predicted)) > 1:
            correlation = float(spearmanr(sweep.predicted, means)[0])
            run.record("rank correlation with prediction", correlation, better="higher", series=f"sweep of {name}")
        return sweep

    def correlated(rho: float) -> torch.Tensor:
        own = torch.Generator().manual_seed(seed)
        y, noise = torch.randn(2, len(rows), latent, generator=own)
        return torch.cat([rho * y + (1 - rho**2) ** 0.5 * noise, y], 1)

    digits = against_prediction("beta", 16, {beta: (single, given, beta) for beta in _BETAS})
    # With few hidden units the decoder could not copy x, and the variables would have to.
    gaussian = against_prediction("rho", 8 * latent, {rho: (correlated(rho), latent, 1.0) for rho in _RHOS})
    run.difference(
        "active units, difference", method=gaussian.found[-1], baseline=gaussian.found[0], better="lower",
        series=f"rho {_RHOS[-1]:g}", against=f"rho {_RHOS[0]:g}",
    )  # fmt: skip
    for name, values in {"beta1": (0.5, 1.0, 4.0), "beta2": (0.5, 1.0, 4.0), "eta_dec": (0.25, 0.5, 1.0)}.items():
        found = [
            [hierarchical(number, **{name: value}) for number in range(seeds)]
            for value in run.progress(values, f"hierarchical VAEs, {name}")
        ]
        for value, shares in zip(values, found, strict=True):
            run.record("active units of z2", fmean(shares), better="higher", series=f"{name} {value:g}")
        run.difference(
            "active units of z2, difference", method=found[-1], baseline=found[0], series=f"{name} {values[-1]:g}",
            against=f"{name} {values[0]:g}", better="higher" if name == "beta1" else "lower",
        )  # fmt: skip

    def closed_form(beta: float) -> None:
        predicted_share(x, y, beta)

    def training(beta: float) -> None:
        conditional(single, given, beta, 16, 0)

    run.compare(
        baseline=("training and measuring", training),
        method={"closed form": closed_form},
        over=_BETAS,
        repeats=1,
        warmup=0,
    )
    run.figure(_figure(pairs, {f"beta, {Path(data).name}": digits, "rho, Gaussian": gaussian}))


def _figure(pairs: dict[str, Any], sweeps: dict[str, Sweep]) -> Any:
    """Divergence measured against predicted, and active units along each sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (1 + len(sweeps)), 3.4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(sweeps))
    for (name, (theory, measured)), marker in zip(pairs.items(), "os", strict=True):
        left.plot(sorted(theory.tolist()), sorted(measured), marker, label=name)
    left.axline((0, 0), slope=1, color="#999999", lw=1)
    left.set(xlabel="divergence predicted, nats", ylabel="divergence measured, nats")
    for axes, (name, sweep) in zip(others, sweeps.items(), strict=True):
        axes.plot(sweep.values, sweep.predicted, "k--", label="linear theory")
        axes.plot(sweep.values, [fmean(values) for values in sweep.found], "o-", color="#c8553d", label="ReLU CVAE")
        axes.set(xlabel=name, ylabel="active units", xscale="log" if min(sweep.values) > 0 else "linear")
    for axes in (left, *others):
        axes.legend(frameon=False)
    return figure
