"""Codes without passive variables against full ones: dependence and accuracy, mean and sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import numpy as np


@recipe(
    "variable-activity",
    baseline="the full code",
    headline="accuracy kept",
    tiny={"epochs": 2, "latent": 6, "folds": 2, "hidden": 16},
    large={"epochs": 1000},
)
def variable_activity(
    run: Run, latent: int = 16, hidden: int = 128, epochs: int = 150, folds: int = 5, seed: int = 0
) -> None:
    """Digits at three strengths of regularisation: what passive variables do to mean and sampled codes.

    While the model trains whose passive variables are looked at last, its codes are kept at doubling epochs: how the
    variables that end passive vary together, and how they correlate, shows where correlated mean codes come from.

    Args:
        run: Keeps what is measured.
        latent: Latent variables.
        hidden: Size of the two hidden layers on each side.
        epochs: Passes over the digits.
        folds: Of the cross-validated logistic regression.
        seed: Of first weights, order and noise.
    """
    import math

    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from paperworks.hub import load_dataset
    from paperworks.recipes.representation.vae import VAE, train
    from paperworks.representation.variable_activity import PassiveFilter, representation_report

    data = load_dataset("digits")
    rows = torch.tensor(data.X / 16, dtype=torch.float32)
    bars: dict[str, dict[str, float]] = {}
    checkpoints: dict[int, np.ndarray] = {}
    for beta in run.progress((0.25, 1.0, 2.0), "training"):
        series = f"beta {beta:g}"
        torch.manual_seed(seed)
        own = torch.Generator().manual_seed(seed)
        model = VAE(64, latent, (hidden, hidden))
        checkpoints.clear()

        def keep(epoch: int, model: VAE = model) -> None:
            if epoch == epochs or epoch.bit_count() == 1:
                with torch.no_grad():
                    checkpoints[epoch] = model.encode(rows)[0].double().numpy()

        train(
            model, lambda batch, m=model, b=beta, g=own: m.loss(batch, b, math.sqrt(0.1), g),  # type: ignore[misc]
            rows, epochs, 64, own, keep,
        )  # fmt: skip
        with torch.no_grad():
            mean, log_var = model.encode(rows)
        mu, var = mean.numpy(), log_var.exp().numpy()
        chosen = PassiveFilter(allow_empty=True).fit(mu, var)
        report = chosen.report_
        for kind in ("active", "mixed", "passive"):
            run.record(f"{kind} variables", len(report.indices(kind)), better="higher", series=series)
        table = representation_report(mu, var, random_state=seed)
        bars[series] = {}
        groups = {"full": "full", "without passive": "active+mixed"}
        for label, group in groups.items():
            if (group, "mean") not in table:
                continue
            for code in ("mean", "sampled"):
                value = table[group, code]["total_correlation"]
                if math.isfinite(value):
                    bars[series][f"{label}, {code}"] = value
                    run.record(
                        f"total correlation, {code}", value, unit="nats", better="lower", series=f"{series}, {label}"
                    )
        if chosen.get_support().any():
            classify = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
            scores = {
                "full": cross_val_score(classify, mu, data.y, cv=folds),
                "without passive": cross_val_score(classify, chosen.transform(mu), data.y, cv=folds),
            }
            for label, values in scores.items():
                run.record("accuracy", float(values.mean()), better="higher", series=f"{series}, {label}")
            run.ratio(
                "accuracy kept", method=scores["without passive"].tolist(), baseline=scores["full"].tolist(),
                series=series, against="the full code",
            )  # fmt: skip
    passive = report.indices("passive")
    origin = {epoch: _largest_with_another(mu, passive) for epoch, mu in checkpoints.items()} if len(passive) else {}
    for epoch, (covariance, correlation) in origin.items():
        series = f"beta {beta:g}, epoch {epoch}"
        run.record("largest covariance of a passive variable", covariance, better="lower", series=series)
        run.record("largest correlation of a passive variable", correlation, better="lower", series=series)
    run.figure(_figure(bars, origin))


def _largest_with_another(mu: np.ndarray, passive: np.ndarray) -> tuple[float, float]:
    """Of mean codes (N, d): each passive variable's largest covariance and correlation with another one, on average."""
    import numpy as np

    largest = []
    for matrix in (np.cov(mu.T), np.corrcoef(mu.T)):
        others = np.abs(matrix[passive])
        others[np.arange(len(passive)), passive] = 0
        largest.append(float(others.max(1).mean()))
    return largest[0], largest[1]


def _figure(bars: dict[str, dict[str, float]], origin: dict[int, tuple[float, float]]) -> Any:
    """Total correlation of each code at each strength, and where it comes from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes, right = figure.subplots(1, 2)
    for name, values in zip(("covariance", "correlation"), zip(*origin.values(), strict=True), strict=False):
        right.plot(list(origin), values, "o-", label=f"largest {name}")
    right.set(xlabel="epochs", xscale="log", title="variables that end passive, mean code")
    if origin:
        right.legend(frameon=False, fontsize=8)
    names = ["full, mean", "full, sampled", "without passive, mean", "without passive, sampled"]
    for place, name in enumerate(names):
        at = [index + 0.2 * (place - 1.5) for index, values in enumerate(bars.values()) if name in values]
        axes.bar(at, [values[name] for values in bars.values() if name in values], 0.18, label=name)
    axes.set(ylabel="total correlation, nats", yscale="log")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
