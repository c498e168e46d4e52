"""Conformal sets under attack, on digits or one's own table: rules and concepts against the main model alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, Data, recipe
from paperworks.lab.run import Run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from paperworks.uncertainty.certified_conformal import CertifiedConformalClassifier, Rule, SmoothedModel

    Means = Mapping[str, Tensor]

ALONE, MEAN, RAISED = "main model alone", "mean of main and trait networks", "main model, odds raised"
TRAITS, SHARED, SHUFFLED = "COLEP, trait => class", "COLEP, class => shared concept", "COLEP, shuffled traits"
BONFERRONI = "COLEP, trait => class, bonferroni"
RADII = (0.125, 0.25, 0.5)
MIDDLE = 0.25
# The attack on the main model is the same where its odds are raised, and sets of other thresholds meet the same inputs.
ATTACKS = {ALONE: ALONE, RAISED: ALONE, MEAN: MEAN, TRAITS: TRAITS, BONFERRONI: TRAITS, SHARED: SHARED}
# Rows are split at random: half to train, a quarter to calibrate, a quarter to test.
TEST_TO_TRAIN = 0.5
# Of the worst-case bounds that are told against attacked coverage.
ETA = 0.01
# Concepts that several digits share.
DIGITS = {
    "closed loop": (0, 6, 8, 9),
    "straight stroke": (1, 4, 7),
    "closed top": (0, 8, 9),
}
COLOURS = {
    ALONE: "#8a8a8a", RAISED: "#c98b2b", MEAN: "#5f9e6e", SHUFFLED: "#b0657a", SHARED: "#7a5c99", TRAITS: "#1f6f8b",
}  # fmt: skip


class Found(NamedTuple):
    """Of one series on the test rows of one split; certified coverage by radius, the others at the middle one.

    The last two are of plain and of certified sets under attack, None where a series is not attacked.
    """

    coverage: float
    size: float
    accuracy: float
    certified: tuple[float, ...]
    certified_size: float
    attacked: float | None
    certified_attacked: float | None


@recipe(
    "certified-conformal",
    baseline="the main model alone, smoothed (RSCP), with its odds raised, and its mean with a second network",
    columns=(
        "certified coverage at 0.25",
        "certified coverage gained at 0.25 against main model alone",
        "accuracy",
        "set size",
        "size of certified sets at 0.25",
        "coverage of certified sets under PGD of 0.25",
    ),
    tiny={"rows": 240, "hidden": 16, "epochs": 4, "n": 400, "attack_steps": 2, "seeds": 2, "resamplings": 10},
    large={"n": 100_000, "hidden": 512, "attack_steps": 100},
)
def certified_conformal(
    run: Run,
    data: Annotated[str, Data("digits", "wine", "breast_cancer")] = "digits",
    rows: Annotated[int, Between(60, 1797)] = 1797,
    hidden: Annotated[int, Between(1, 128)] = 64,
    epochs: Annotated[int, Between(1, 200)] = 80,
    sigma: Annotated[float, Between(0.01, 10)] = 0.25,
    n: Annotated[int, Between(10, 1000)] = 1000,
    bound_failure: Annotated[float, Between(1e-6, 0.01)] = 0.001,
    votes: Literal["hard", "soft"] = "hard",
    score: Literal["aps", "hps"] = "aps",
    alpha: Annotated[float, Between(0.01, 0.5)] = 0.1,
    weight: Annotated[float, Between(0, 20)] = 4.0,
    attack_steps: Annotated[int, Between(1, 40)] = 20,
    resamplings: Annotated[int, Between(1, 1000)] = 1000,
    seeds: Annotated[int, Between(1, 12)] = 10,
    seed: int = 0,
) -> None:
    """Prediction sets of attacked digits, or your own table: coverage certified and under attack, with rules and without.

    Equal networks are trained with the noise they are smoothed with: the main one tells classes, one tells traits that a
    single class has, one tells concepts that classes share (even, upper half; for digits closed loop, straight stroke,
    closed top) and their opposites. Traits imply their class, classes their shared concepts. Both are compared with the main
    model alone; with the mean of both networks; with the main model's odds raised for all classes until its sets are as
    large; and with traits that stand for the wrong classes. Each network is smoothed in the same way, and all sets have one
    score. Certified coverage is that of plain sets at the worst place within the radius, on test rows, with the chance that
    bounds fail taken off. The attack, projected gradient descent, goes through networks and circuit of each series.

    Last, calibration and test rows are drawn anew: how often is coverage under attack below the bound that calibration
    rows alone give?

    Args:
        run: Keeps what is measured.
        data: A table or folder of images of your own with classes, or a name; columns are stretched to 0 and 1.
        rows: Taken at random, at most.
        hidden: Size of each network's two hidden layers.
        epochs: Passes over the training rows.
        sigma: Standard deviation of the noise, in training and smoothing.
        n: Draws of noise.
        bound_failure: Chance with which the bounds of one probability fail.
        votes: Whether smoothed networks vote or their probabilities are averaged.
        score: Of a label, see `CertifiedConformalClassifier`.
        alpha: Share of rows whose class may be missing.
        weight: Of each rule.
        attack_steps: Of projected gradient descent.
        resamplings: Calibration sets drawn anew, over all seeds.
        seeds: Splits and first weights.
        seed: Of the first.
    """
    import numpy as np

    X, y, classes = _rows(data, rows, seed)
    settings = {"sigma": sigma, "n": n, "alpha": bound_failure, "votes": votes}
    options = {"alpha": alpha, "score": score}
    found: dict[str, list[Found]] = {}
    below = 0
    shares = np.array_split(np.arange(resamplings), seeds)
    for number, share in zip(run.progress(range(seed, seed + seeds), "splits"), shares, strict=True):
        split = _Split(X, y, classes, data == "digits", hidden, epochs, settings, weight, options, number)
        attacked = {name: split.attacked(name, attack_steps) for name in dict.fromkeys(ATTACKS.values())}
        for name in (ALONE, RAISED, MEAN, SHARED, SHUFFLED, TRAITS, BONFERRONI):
            found.setdefault(name, []).append(split.measured(name, attacked.get(ATTACKS.get(name, ""))))
        below += split.violations(TRAITS, attacked[TRAITS], len(share))
    _record(run, found)
    run.record(
        f"certified coverage above that under PGD of {MIDDLE}",
        below,
        unit=f"of {resamplings}",
        better="lower",
        series=TRAITS,
    )
    live = {name: split.live(name) for name in (ALONE, TRAITS)}
    run.compare(
        baseline=(ALONE, lambda part: live[ALONE].predict_set_certified(part, MIDDLE)),
        method={TRAITS: lambda part: live[TRAITS].predict_set_certified(part, MIDDLE)},
        over=list(split.tested.split(max(1, len(split.tested) // 5)))[:5], repeats=1,
    )  # fmt: skip
    run.figure(_figure(found))


class _Split:
    """Networks of one split, and what they say of the rows that they were not trained on."""

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        classes: int,
        digits: bool,
        hidden: int,
        epochs: int,
        settings: dict[str, Any],
        weight: float,
        options: dict[str, Any],
        seed: int,
    ) -> None:
        import numpy as np
        import torch
        from torch import nn

        from paperworks.uncertainty.certified_conformal import SmoothedModel

        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(X)))
        training, rest = order[: len(X) // 2], order[len(X) // 2 :]
        self.X, self.y, self.calibrating, self.classes = X[rest], y[rest], len(rest) // 2, classes
        self.weight, self.options, self.seed = weight, options, seed
        self.table = torch.from_numpy(shared_concepts(classes, digits))
        x, labels = X[training], y[training]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            main = _network(x, labels, classes, nn.Softmax(1), hidden, epochs, settings["sigma"])
            traits = _network(x, torch.eye(classes)[labels], classes, nn.Sigmoid(), hidden, epochs, settings["sigma"])
            shared = _network(
                x, self.table[labels].float(), self.table.shape[1], nn.Sigmoid(), hidden, epochs, settings["sigma"]
            )
        networks = {"main": main, "traits": traits, "shared": shared, "mean": _mean(main, traits)}
        self.models = {name: SmoothedModel(network, **settings) for name, network in networks.items()}
        self.clean = {name: model(self.X) for name, model in self.models.items()}
        self.raised = self._raised()

    @property
    def tested(self) -> Tensor:
        return self.X[self.calibrating :]

    def parts(self, series: str) -> tuple[list[str], list[list[Rule]]]:
        """The networks of a series, and its rules."""
        from paperworks.uncertainty.certified_conformal import Rule

        K = self.classes
        if series in (TRAITS, BONFERRONI, SHUFFLED):
            step = 1 if series == SHUFFLED else 0
            return ["main", "traits"], [[Rule(K + k, (k + step) % K, self.weight)] for k in range(K)]
        if series == SHARED:
            # A concept and its opposite are one family.
            families = self.table.T.reshape(-1, 2, K).tolist()
            return ["main", "shared"], [
                [Rule(j, K + 2 * f + side, self.weight) for side in (0, 1) for j in range(K) if family[side][j]]
                for f, family in enumerate(families)
            ]
        return ["mean" if series == MEAN else "main"], []

    def live(self, series: str, rows: int = 100) -> CertifiedConformalClassifier:
        """A classifier of the networks themselves, calibrated on a few rows."""
        from paperworks.uncertainty.certified_conformal import CertifiedConformalClassifier, KnowledgeCircuit

        names, rules = self.parts(series)
        sizes = [self.clean[name].shape[1] for name in names]
        circuit = KnowledgeCircuit(self.classes, sum(sizes) - self.classes, rules, pc_weight=1.0)
        main, *concepts = (self.models[name] for name in names)
        rows = min(rows, self.calibrating)
        return CertifiedConformalClassifier(main, concepts, circuit, **self.options).fit_calibration(
            self.X[:rows], self.y[:rows]
        )

    def known(self, series: str, means: Sequence[Means]) -> CertifiedConformalClassifier:
        """A classifier whose rows are (which of the means, number of a row): what is known is not computed again."""
        import torch

        from paperworks.uncertainty.certified_conformal import CertifiedConformalClassifier, KnowledgeCircuit

        names, rules = self.parts(series)
        models: list[Any] = [
            _remembered(self.models[name], torch.stack([one[name] for one in means])) for name in names
        ]
        concepts = sum(self.clean[name].shape[1] for name in names) - self.classes
        if series == RAISED:
            from paperworks.uncertainty.certified_conformal import Rule

            # What always holds and implies every class.
            models.append(_remembered(self.models["main"], torch.ones(len(means), len(self.X), 1), certain=True))
            concepts, rules = 1, [[Rule(self.classes, k, self.raised)] for k in range(self.classes)]
        circuit = KnowledgeCircuit(self.classes, concepts, rules, pc_weight=1.0)
        calibration: Literal["pooled", "bonferroni"] = "bonferroni" if series == BONFERRONI else "pooled"
        return CertifiedConformalClassifier(models[0], models[1:], circuit, calibration=calibration, **self.options)

    def rows(self, which: int, numbers: Tensor) -> Tensor:
        import torch

        return torch.stack([torch.full_like(numbers, which), numbers], 1).double()

    def attacked(self, series: str, steps: int) -> dict[str, Tensor]:
        """What the networks of a series say of all rows under the attack on it."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        moved = self.live(series, 20).attack(self.X, self.y, MIDDLE, steps=steps, draws=32, generator=generator)
        return {name: self.models[name](moved) for name in self.parts(series)[0]}

    def measured(self, series: str, attacked: Means | None) -> Found:
        import numpy as np
        import torch

        means = [self.clean] if attacked is None else [self.clean, attacked]
        numbers = torch.arange(len(self.X))
        calibrating, tested = numbers[: self.calibrating], numbers[self.calibrating :]
        classifier = self.known(series, means).fit_calibration(self.rows(0, calibrating), self.y[calibrating])
        clean, y = self.rows(0, tested), self.y[tested]
        truth = np.arange(len(y)), y.numpy()
        sets = classifier.predict_set(clean)
        moved = None if attacked is None else self.rows(1, tested)
        return Found(
            coverage=float(sets[truth].mean()),
            size=float(sets.sum(1).mean()),
            accuracy=float((classifier.predict(clean) == truth[1]).mean()),
            certified=tuple(classifier.worst_case_coverage(radius, clean, y, eta=None) for radius in RADII),
            certified_size=float(classifier.predict_set_certified(clean, MIDDLE).sum(1).mean()),
            attacked=None if moved is None else float(classifier.predict_set(moved)[truth].mean()),
            certified_attacked=None if moved is None else float(classifier.predict_set_certified(moved, MIDDLE)[truth].mean()),
        )  # fmt: skip

    def violations(self, series: str, attacked: Means, resamplings: int) -> int:
        """How often coverage under attack is below the bound that calibration rows give, these drawn anew."""
        import numpy as np
        import torch

        random, count = np.random.default_rng(self.seed), 0
        classifier = self.known(series, [self.clean, attacked])
        for _ in range(resamplings):
            order = torch.from_numpy(random.permutation(len(self.X)))
            calibrating, tested = order[: self.calibrating], order[self.calibrating :]
            classifier.fit_calibration(self.rows(0, calibrating), self.y[calibrating])
            bound = classifier.worst_case_coverage(MIDDLE, eta=ETA)
            sets = classifier.predict_set(self.rows(1, tested))
            count += bool(sets[np.arange(len(tested)), self.y[tested].numpy()].mean() < bound)
        return count

    def _raised(self) -> float:
        """By what log odds the main model's sets become as large as those with traits, on the calibration rows."""
        import torch

        calibrating = torch.arange(self.calibrating)

        def size(series: str) -> float:
            rows = self.rows(0, calibrating)
            classifier = self.known(series, [self.clean]).fit_calibration(rows, self.y[calibrating])
            return float(classifier.predict_set(rows).sum(1).mean())

        wanted, low, high = size(TRAITS), 0.0, 8.0
        for _ in range(8):
            self.raised = (low + high) / 2
            low, high = (low, self.raised) if size(RAISED) > wanted else (self.raised, high)
        return self.raised


def shared_concepts(classes: int, digits: bool) -> Any:
    """Which class has which concept, (classes, concepts), each concept followed by its opposite."""
    import numpy as np

    number = np.arange(classes)
    concepts = [number % 2 == 0, number >= classes / 2]
    if digits:
        concepts += [np.isin(number, having) for having in DIGITS.values()]
    return np.stack([side for concept in concepts for side in (concept, ~concept)], 1)


def _rows(data: str, rows: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Rows within 0 and 1, their classes, and how many classes there are."""
    import numpy as np
    import torch

    from paperworks.hub import ImageData, TableData, load_dataset

    loaded = load_dataset(data)
    if isinstance(loaded, ImageData):
        loaded = loaded.as_table()
    if not isinstance(loaded, TableData):
        raise UsageError(f"{data} is neither a table nor images, and samples with their classes are wanted")
    _, y = np.unique(loaded.labelled().y, return_inverse=True)
    low, extent = loaded.X.min(0), np.ptp(loaded.X, axis=0)
    # scikit-learn has the digits' ink from 0 to 16.
    X = loaded.X / 16 if data == "digits" else (loaded.X - low) / np.where(extent > 0, extent, 1)
    if len(y) < 60 or y.max() < 1:
        raise UsageError(
            f"{Path(data).name} has {len(y)} rows of {y.max() + 1} classes: give 60 or more, of two classes at least"
        )
    chosen = np.random.default_rng(seed).permutation(len(y))[:rows]
    return torch.tensor(X[chosen], dtype=torch.float32), torch.tensor(y[chosen]), int(y.max()) + 1


def _network(
    x: Tensor, wanted: Tensor, outputs: int, last: nn.Module, hidden: int, epochs: int, sigma: float
) -> nn.Module:
    """A perceptron with two hidden layers, trained with noise on its inputs."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    body = nn.Sequential(
        nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
    optimizer = torch.optim.Adam(body.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            logits = body(x[batch] + sigma * torch.randn(x[batch].shape))
            several = wanted.is_floating_point()
            loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
            optimizer.zero_grad()
            loss(logits, wanted[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return nn.Sequential(body, last).requires_grad_(False)


def _mean(first: nn.Module, second: nn.Module) -> nn.Module:
    """A network that says what two say on average."""
    from torch import nn

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.ModuleList([first, second])

        def forward(self, x: Tensor) -> Tensor:
            return (self.both[0](x) + self.both[1](x)) / 2

    return Mean()


def _remembered(model: SmoothedModel, means: Tensor, certain: bool = False) -> SmoothedModel:
    """A smoothed model of what is known already: a row says which of the means (kinds, rows, outputs) is its own."""
    from paperworks.uncertainty.certified_conformal import SmoothedModel

    class Remembered(SmoothedModel):
        def forward(self, x: Tensor) -> Tensor:
            kind, number = x.long().T
            return means.double()[kind, number]

        def bounds(self, estimate: Tensor, delta: float) -> tuple[Tensor, Tensor]:
            return (estimate, estimate) if certain else super().bounds(estimate, delta)

    return Remembered(model.f, model.sigma, model.n, model.alpha, votes=model.votes)


def _record(run: Run, found: Mapping[str, Sequence[Found]]) -> None:
    for series, each in found.items():
        figures: dict[str, tuple[Literal["higher", "lower"], list[float | None]]] = {
            "coverage": ("higher", [one.coverage for one in each]),
            "set size": ("lower", [one.size for one in each]),
            "accuracy": ("higher", [one.accuracy for one in each]),
            f"size of certified sets at {MIDDLE}": ("lower", [one.certified_size for one in each]),
            f"coverage under PGD of {MIDDLE}": ("higher", [one.attacked for one in each]),
            f"coverage of certified sets under PGD of {MIDDLE}": ("higher", [one.certified_attacked for one in each]),
        }
        for place, radius in enumerate(RADII):
            figures[f"certified coverage at {radius}"] = ("higher", [one.certified[place] for one in each])
        for name, (better, values) in figures.items():
            if None not in values:
                run.mean(name, [value for value in values if value is not None], better=better, series=series)
        for other in (ALONE, MEAN, RAISED, SHUFFLED):
            if series not in (TRAITS, SHARED) or (series == SHARED and other != ALONE):
                continue
            for place, radius in enumerate(RADII):
                run.difference(
                    f"certified coverage gained at {radius}", method=[one.certified[place] for one in each],
                    baseline=[one.certified[place] for one in found[other]], series=series, against=other,
                    test_to_train=TEST_TO_TRAIN,
                )  # fmt: skip
            run.difference(
                "accuracy gained", method=[one.accuracy for one in each], baseline=[one.accuracy for one in found[other]],
                series=series, against=other, test_to_train=TEST_TO_TRAIN,
            )  # fmt: skip


def _figure(found: Mapping[str, Sequence[Found]]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for series, colour in COLOURS.items():
        each = found[series]
        certified = np.array([one.certified for one in each])
        error = certified.std(0) / len(each) ** 0.5
        left.errorbar(RADII, certified.mean(0), error, marker="o", color=colour, label=series, capsize=2)
        size, middle = np.array([one.size for one in each]), certified[:, RADII.index(MIDDLE)]
        right.errorbar(
            size.mean(), middle.mean(), error[RADII.index(MIDDLE)], size.std() / len(each) ** 0.5, "o", color=colour
        )
    left.set(xlabel="radius of the attack", ylabel="certified coverage", xticks=RADII)
    left.legend(frameon=False, fontsize="small")
    right.set(xlabel="classes in a plain set", ylabel=f"certified coverage at {MIDDLE}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
