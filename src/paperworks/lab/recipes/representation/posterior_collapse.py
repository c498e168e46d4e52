"""Closed forms of linear VAEs against training: which latent variables collapse, before and after."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

_BETAS = (0.1, 0.5, 1.0, 2.0, 4.0)


@recipe(
    "posterior-collapse",
    baseline="training and measuring",
    headline="rank correlation with prediction",
    tiny={"epochs": 1, "latent": 4, "seeds": 1, "fit_latent": 2, "fit_steps": 200},
    large={"epochs": 300, "seeds": 10},
)
def posterior_collapse(
    run: Run,
    latent: int = 16,
    epochs: int = 60,
    seeds: int = 2,
    fit_latent: int = 4,
    fit_steps: int = 3000,
    eta_dec: float = 0.5,
    seed: int = 0,
) -> None:
    """What the theory predicts on digits from second moments alone, against what training gives.

    A linear conditional and a linear hierarchical VAE are trained, and the divergence of each latent variable compared with
    its closed form. Then a conditional VAE with ReLU layers, the top left quarter given and the rest to model, is trained at
    five beta, and a hierarchical one at three beta1 and three beta2.

    Args:
        run: Keeps what is measured.
        latent: Latent variables of the nonlinear models.
        epochs: Passes over the digits for each.
        seeds: Nonlinear models at each setting.
        fit_latent: Latent variables of the linear models.
        fit_steps: Steps of L-BFGS on the linear models, at most.
        eta_dec: Standard deviation of the decoder.
        seed: Of first weights, order and noise.
    """
    import numpy as np
    import torch
    from scipy.stats import spearmanr

    from paperworks.lab.hub import load_dataset
    from paperworks.lab.vae import VAE, HierarchicalVAE, train
    from paperworks.representation.posterior_collapse import (
        LinearCVAE,
        LinearHVAE2,
        PosteriorCollapse,
        linear_cvae_solution,
        linear_hvae_solution,
    )

    pixels = torch.tensor(load_dataset("digits").X / 16).reshape(-1, 8, 8)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, :4] = True
    rows = torch.cat([pixels[:, corner], pixels[:, ~corner]], 1)
    rows = rows - rows.mean(0)
    x, y, given = rows[:, :16], rows[:, 16:], 16

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

    def measured_share(model: Any, loss: Any, own: torch.Generator) -> float:
        train(model, lambda batch: loss(batch, own), single, epochs, 128, own)
        return float(PosteriorCollapse.from_encoder(model.encode, single.split(512)).compute().active_units)

    def conditional(beta: float, number: int) -> float:
        torch.manual_seed(seed + number)
        model = VAE(rows.shape[1], latent, (16,), given)
        own = torch.Generator().manual_seed(seed + number)
        return measured_share(model, lambda batch, g: model.loss(batch, beta, eta_dec, g), own)

    def hierarchical(beta1: float, beta2: float, number: int) -> float:
        torch.manual_seed(seed + number)
        model = HierarchicalVAE(rows.shape[1], latent, 64)
        own = torch.Generator().manual_seed(seed + number)
        return measured_share(model, lambda batch, g: model.loss(batch, beta1, beta2, eta_dec, g), own)

    def predicted_share(beta: float) -> float:
        return 1 - linear_cvae_solution(x, y, latent, beta=beta, eta_dec=eta_dec).n_collapsed / latent

    predicted = [predicted_share(beta) for beta in _BETAS]
    sweep = run.progress(_BETAS, "conditional VAEs")
    found = [[conditional(beta, number) for number in range(seeds)] for beta in sweep]
    for beta, share, values in zip(_BETAS, predicted, found, strict=True):
        run.record("active units predicted", share, better="higher", series=f"beta {beta:g}")
        run.record("active units", fmean(values), better="higher", series=f"beta {beta:g}")
    means = [fmean(values) for values in found]
    if len(set(means)) > 1 and len(set(predicted)) > 1:
        run.record("rank correlation with prediction", float(spearmanr(predicted, means)[0]), better="higher")
    for which in ("beta1", "beta2"):
        for value in run.progress((0.5, 1.0, 4.0), f"hierarchical VAEs, {which}"):
            beta1, beta2 = (value, 1.0) if which == "beta1" else (1.0, value)
            values = [hierarchical(beta1, beta2, number) for number in range(seeds)]
            run.record("active units of z2", fmean(values), better="higher", series=f"{which} {value:g}")

    def closed_form() -> None:
        predicted_share(1.0)

    def training() -> None:
        conditional(1.0, 0)

    run.compare(baseline=("training and measuring", training), method={"closed form": closed_form}, repeats=1, warmup=0)
    run.figure(_figure(pairs, predicted, found))


def _figure(pairs: dict[str, Any], predicted: list[float], found: list[list[float]]) -> Any:
    """Divergence measured against predicted, and active units against beta."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (theory, measured)), marker in zip(pairs.items(), "os", strict=True):
        left.plot(sorted(theory.tolist()), sorted(measured), marker, label=name)
    left.axline((0, 0), slope=1, color="#999999", lw=1)
    left.set(xlabel="divergence predicted, nats", ylabel="divergence measured, nats")
    right.plot(_BETAS, predicted, "k--", label="linear theory")
    right.plot(_BETAS, [fmean(values) for values in found], "o-", color="#c8553d", label="ReLU CVAE")
    right.set(xlabel="beta", ylabel="active units", xscale="log", title="digits")
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure
