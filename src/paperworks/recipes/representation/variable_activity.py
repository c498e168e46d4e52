"""Codes without passive variables against full ones: dependence and accuracy, mean and sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.samples import CLASSED, Samples, samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

# Strengths of regularisation.
BETAS = (0.25, 1.0, 2.0)
FULL, KEPT = "full", "without passive"
CODES = ("mean", "sampled")
KINDS = ("active", "mixed", "passive")
DEPENDENCE = {"total correlation": "nats", "mutual information": "nats"}
CLASSIFIERS = ("logistic regression", "boosted trees")
# A quarter of the samples is for the test.
TEST_TO_TRAIN = 1 / 3


class Trained(NamedTuple):
    """What one autoencoder's codes are like.

    `variables` counts each kind, `dependence` is by measure, group of variables and code, `correlation` the largest of a
    passive variable with another, on average, by code (none without passive variables), and `accuracy` is by classifier,
    group and code. What is not defined, as dependence within one variable, is left out.
    """

    variables: dict[str, int]
    dependence: dict[tuple[str, str, str], float]
    correlation: dict[str, float]
    accuracy: dict[tuple[str, str, str], float]
    origin: dict[int, tuple[float, float]]


@recipe(
    "variable-activity",
    baseline="the full code, and the mean code against the sampled one",
    tiny={"epochs": 2, "latent": 6, "hidden": 16, "seeds": 2},
    large={"epochs": 1000, "seeds": 20},
    columns=(
        "passive variables", "total correlation, mean", "total correlation, sampled",
        "accuracy, logistic regression", "accuracy, boosted trees",
    ),
    rows=("beta *, full", "beta *, without passive"),
)  # fmt: skip
def variable_activity(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    latent: Annotated[int, Between(1, 64)] = 16,
    hidden: Annotated[int, Between(1, 256)] = 128,
    epochs: Annotated[int, Between(1, 600)] = 150,
    seeds: Annotated[int, Between(1, 20)] = 6,
    seed: int = 0,
) -> None:
    """Digits, or your own samples, at three strengths of regularisation: what passive variables do to mean and sampled codes.

    A pair is one autoencoder with a split, first weights, order and noise of its own. Dependence within the codes is that
    of all samples; classifiers learn from the codes of those that the autoencoder learnt from, and are tested on the
    others. In some trainings too few variables are left to depend on one another: intervals are over the others.

    While the first model at each strength trains its codes are kept at doubling epochs: how the variables that end passive
    vary together, and how they correlate, shows where correlated mean codes come from.

    Args:
        run: Keeps what is measured.
        data: What to encode: a table or folder of images of your own, or a name.
        latent: Latent variables.
        hidden: Size of the two hidden layers on each side.
        epochs: Passes over the samples.
        seeds: Autoencoders at each strength.
        seed: Of the first split, first weights, order and noise.
    """
    own = samples(data)
    work = [(beta, number) for beta in BETAS for number in range(seed, seed + seeds)]
    found: dict[float, list[Trained]] = {beta: [] for beta in BETAS}
    for beta, number in run.progress(work, "training"):
        found[beta].append(_trained(own, beta, latent, hidden, epochs, number, watched=number == seed))
    for beta, trained in found.items():
        _record(run, f"beta {beta:g}", trained)
    _record_growth(run, found)
    for epoch, (covariance, correlation) in found[BETAS[-1]][0].origin.items():
        series = f"beta {BETAS[-1]:g}, epoch {epoch}"
        run.record("largest covariance of a passive variable", covariance, better="lower", series=series)
        run.record(
            "largest correlation of a passive variable while training", correlation, better="lower", series=series
        )
    run.figure(_figure(found))


def _trained(own: Samples, beta: float, latent: int, hidden: int, epochs: int, seed: int, *, watched: bool) -> Trained:
    import math

    import numpy as np
    import torch
    from sklearn.model_selection import train_test_split

    from paperworks.recipes.representation.vae import VAE, train
    from paperworks.representation import PassiveFilter, representation_report

    rows = torch.tensor(own.X, dtype=torch.float32)
    seen, unseen = train_test_split(np.arange(len(rows)), test_size=0.25, stratify=own.y, random_state=seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = VAE(rows.shape[1], latent, (hidden, hidden))
    generator = torch.Generator().manual_seed(seed)
    checkpoints: dict[int, Array] = {}

    def keep(epoch: int) -> None:
        if watched and (epoch == epochs or epoch.bit_count() == 1):
            with torch.no_grad():
                checkpoints[epoch] = model.encode(rows)[0].double().numpy()

    train(
        model, lambda batch: model.loss(batch, beta, math.sqrt(0.1), generator), rows[torch.from_numpy(seen)], epochs, 64,
        generator, keep,
    )  # fmt: skip
    with torch.no_grad():
        mean, log_var = model.encode(rows)
    mu, var = mean.double().numpy(), log_var.double().exp().numpy()
    report = PassiveFilter(KINDS).fit(mu, var).report_
    table = representation_report(mu, var, random_state=seed)
    groups = {FULL: FULL, KEPT: "active+mixed"}
    dependence = {
        (measure, label, code): table[group, code][measure.replace(" ", "_")]
        for measure in DEPENDENCE
        for label, group in groups.items()
        for code in CODES
        if (group, code) in table and math.isfinite(table[group, code][measure.replace(" ", "_")])
    }
    sampled = mu + np.sqrt(var) * np.random.default_rng(seed).standard_normal(mu.shape)
    passive, kept = report.indices("passive"), report.indices("active", "mixed")
    accuracy = {
        (classifier, label, code): _accuracy(classifier, values[:, columns], own.y, seen, unseen, seed)
        for classifier in CLASSIFIERS
        for label, columns in ((FULL, np.arange(latent)), (KEPT, kept))
        for code, values in zip(CODES, (mu, sampled), strict=True)
        if len(columns)
    }
    return Trained(
        {kind: len(report.indices(kind)) for kind in KINDS}, dependence,
        {code: _largest_with_another(values, passive)[1] for code, values in zip(CODES, (mu, sampled), strict=True)}
        if len(passive) and latent > 1 else {},
        accuracy,
        {epoch: _largest_with_another(codes, passive) for epoch, codes in checkpoints.items()}
        if len(passive) and latent > 1 else {},
    )  # fmt: skip


def _accuracy(
    classifier: str, code: Array, labels: NDArray[np.int64], seen: NDArray[np.intp], unseen: NDArray[np.intp], seed: int
) -> float:
    """Accuracy on samples that neither autoencoder nor classifier has seen."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if classifier == "boosted trees":
        made = HistGradientBoostingClassifier(max_iter=30, random_state=seed)
    else:
        # Each code gets the penalty that suits it.
        plain = LogisticRegression(max_iter=300, tol=1e-3)
        made = make_pipeline(StandardScaler(), GridSearchCV(plain, {"C": [0.1, 1.0, 10.0]}, cv=3))
    return float(made.fit(code[seen], labels[seen]).score(code[unseen], labels[unseen]))


def _largest_with_another(codes: Array, passive: NDArray[np.int64]) -> tuple[float, float]:
    """Of codes (N, d): each passive variable's largest covariance and correlation with another one, on average."""
    import numpy as np

    largest = []
    for matrix in (np.cov(codes.T), np.corrcoef(codes.T)):
        others = np.abs(np.atleast_2d(matrix)[passive])
        others[np.arange(len(passive)), passive] = 0
        largest.append(float(others.max(1).mean()))
    return largest[0], largest[1]


def _record(run: Run, beta: str, trained: Sequence[Trained]) -> None:
    for kind in KINDS:
        run.mean(
            f"{kind} variables", [one.variables[kind] for one in trained],
            better="lower" if kind == "passive" else "higher", series=f"{beta}, {FULL}",
        )  # fmt: skip
    for label in (FULL, KEPT):
        series = f"{beta}, {label}"
        for measure, unit in DEPENDENCE.items():
            pairs = [
                [one.dependence[measure, label, code] for code in CODES]
                for one in trained
                if all((measure, label, code) in one.dependence for code in CODES)
            ]
            if not pairs:
                continue
            mean, sampled = (list(one) for one in zip(*pairs, strict=True))
            for code, values in zip(CODES, (mean, sampled), strict=True):
                run.mean(f"{measure}, {code}", values, unit=unit, better="lower", series=series)
            run.ratio(
                f"{measure} of the mean code", method=mean, baseline=sampled, better="lower", series=series,
                against="the sampled code",
            )  # fmt: skip
        for classifier in CLASSIFIERS:
            told = [
                one.accuracy[classifier, label, "mean"]
                for one in trained
                if (classifier, label, "mean") in one.accuracy
            ]
            if told:
                run.mean(f"accuracy, {classifier}", told, better="higher", series=series)
    correlations = [one.correlation for one in trained if one.correlation]
    if correlations:
        mean, sampled = ([one[code] for one in correlations] for code in CODES)
        for code, values in zip(CODES, (mean, sampled), strict=True):
            run.mean(f"largest correlation of a passive variable, {code}", values, better="lower", series=beta)
        run.ratio(
            "largest correlation of a passive variable", method=mean, baseline=sampled, better="lower", series=beta,
            against="the sampled code",
        )  # fmt: skip
    for classifier in CLASSIFIERS:
        for code in CODES:
            both = [
                [one.accuracy[classifier, label, code] for label in (KEPT, FULL)]
                for one in trained
                if (classifier, KEPT, code) in one.accuracy
            ]
            if both:
                kept, full = (list(one) for one in zip(*both, strict=True))
                run.difference(
                    "accuracy gained without passive variables", method=kept, baseline=full,
                    series=f"{beta}, {code} code, {classifier}", against="the full code", test_to_train=TEST_TO_TRAIN,
                )  # fmt: skip


def _record_growth(run: Run, found: Mapping[float, Sequence[Trained]]) -> None:
    """How the gap between mean and sampled codes grows with regularisation, and what of it is left without passive variables."""

    def gaps(beta: float, measure: str, label: str) -> list[float | None]:
        return [
            one.dependence[measure, label, "mean"] / one.dependence[measure, label, "sampled"]
            if all(one.dependence.get((measure, label, code), 0) > 0 for code in CODES)
            else None
            for one in found[beta]
        ]

    least, most = BETAS[0], BETAS[-1]
    for measure in DEPENDENCE:
        comparisons = [
            ("growth of the gap between codes", measure, gaps(most, measure, FULL), gaps(least, measure, FULL), f"beta {least:g}"),
            *(
                ("gap left without passive variables", f"{measure}, beta {beta:g}", gaps(beta, measure, KEPT), gaps(beta, measure, FULL), "the full code")
                for beta in BETAS
            ),
        ]  # fmt: skip
        for name, series, method, baseline, against in comparisons:
            pairs = [
                (one, other)
                for one, other in zip(method, baseline, strict=True)
                if one is not None and other is not None
            ]
            if pairs:
                ours, theirs = (list(one) for one in zip(*pairs, strict=True))
                run.ratio(
                    name, method=ours, baseline=theirs, better="higher" if "growth" in name else "lower", series=series,
                    against=against,
                )  # fmt: skip


def _figure(found: Mapping[float, Sequence[Trained]]) -> Figure:
    """Total correlation of each code at each strength, and where it comes from."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes, right = figure.subplots(1, 2)
    origin = found[BETAS[-1]][0].origin
    for name, values in zip(("covariance", "correlation"), zip(*origin.values(), strict=True), strict=False):
        right.plot(list(origin), values, "o-", label=f"largest {name}")
    right.set(xlabel="epochs", xscale="log", title="variables that end passive, mean code")
    if origin:
        right.legend(frameon=False, fontsize=8)
    for place, (label, code) in enumerate([(label, code) for label in (FULL, KEPT) for code in CODES]):
        for index, trained in enumerate(found.values()):
            told = [
                one.dependence["total correlation", label, code]
                for one in trained
                if ("total correlation", label, code) in one.dependence
            ]
            at, colour = index + 0.2 * (place - 1.5), f"C{place}"
            axes.plot([at] * len(told), told, "o", markersize=3, alpha=0.5, color=colour)
            axes.bar(
                at,
                np.mean(told) if told else 0,
                0.18,
                color=colour,
                alpha=0.6,
                label=None if index else f"{label}, {code}",
            )
    axes.set(ylabel="total correlation, nats", yscale="log")
    axes.set_xticks(range(len(found)), [f"beta {beta:g}" for beta in found])
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
