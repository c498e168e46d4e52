"""Near collapse on digits: what a layer shrinks, layer after layer, and which weight decay changes it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.neural_collapse import LOSSES, descend
from paperworks.recipes.representation.samples import CLASSED, Samples, samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from matplotlib.figure import Figure

VARIABILITY = "within / between classes"


@recipe(
    "near-collapse",
    baseline="the features of the layer before, and decay of the head",
    columns=(VARIABILITY, "NC1", "implied beta", "within / between classes, ratio", "NC1 at the end"),
    rows=("pixels", "layer*", "weakest layer", "*, squared error"),
    tiny={"per_class": 6, "width": 16, "depth": 2, "steps": 30, "seeds": 2, "long_steps": 40},
    large={"width": 512, "depth": 10, "steps": 5000, "seeds": 10, "long_steps": 20_000},
)
def near_collapse(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    per_class: Annotated[int, Between(1, 160)] = 40,
    width: Annotated[int, Between(1, 128)] = 64,
    depth: Annotated[int, Between(1, 8)] = 4,
    steps: Annotated[int, Between(1, 600)] = 150,
    long_steps: Annotated[int, Between(1, 2400)] = 600,
    decay: Annotated[float, Between(0, 1)] = 5e-4,
    seeds: Annotated[int, Between(1, 32)] = 8,
    seed: int = 0,
) -> None:
    """The shrink factors against the exact solver, greedily added layers, and decay of body or head, on digits or your own samples.

    Imperfections within classes go through the solver at full collapse and are held against the two factors. Then
    layers are trained one at a time over frozen ones, each with a head of its own, and the variability within classes
    is measured after each and compared with the layer before; of the first network it is said how freely each layer moved
    its features, as the beta at which the theory's solver would have left as much. Last, whole networks are trained to the
    end by squared error and by cross-entropy, with the decay of body or head doubled or left out.

    Args:
        run: Keeps what is measured.
        data: What to learn to tell apart: a table or folder of images of your own, or a name.
        per_class: Samples of each class, at most.
        width: Of hidden layers.
        depth: Layers added one after the other.
        steps: Of training, for each.
        long_steps: Of training a whole network, well past zero error.
        decay: Weight decay.
        seeds: Networks.
        seed: Of the first.
    """
    import numpy as np
    import torch

    from paperworks.representation import implied_beta, orthogonal_collapse
    from paperworks.representation import near_collapse as analysis

    own = samples(data)
    betas = (2.0, 10.0, 50.0)
    lam_w, lam_h = 0.3, 0.2
    generator = torch.Generator().manual_seed(seed)
    H, y, W = orthogonal_collapse(3, 4, 7, lam_w=lam_w, lam_h=lam_h, generator=generator)
    change = torch.randn(3, 4, 7, dtype=torch.float64, generator=generator)
    change = (change - change.mean(1, keepdim=True)).reshape(12, 7)
    on = change @ torch.linalg.pinv(W) @ W
    found, told = [], []
    for beta in run.progress(betas, "shrink factors"):
        moved = (analysis(H + 1e-6 * change, y, lam_w=lam_w, lam_h=lam_h, beta=beta).features - H) / 1e-6
        moved_on = moved @ torch.linalg.pinv(W) @ W
        found.append([
            float((moved_on * on).sum() / on.square().sum()),
            float(((moved - moved_on) * (change - on)).sum() / (change - on).square().sum()),
        ])  # fmt: skip
        told.append(analysis(H, y, lam_w=lam_w, lam_h=lam_h, beta=beta).shrink)
    off = np.abs(np.array(found) / np.array(told) - 1).max(0)
    for name, error in zip(("along the class means", "across them"), off, strict=True):
        run.record("largest error of a shrink factor", error, better="lower", series=name)

    greedy = [
        _greedy(own, per_class, width, depth, steps, decay, number)
        for number in run.progress(range(seed, seed + seeds), "layers")
    ]
    layers = [[_variability(features, labels) for features in seen] for seen, labels in greedy]
    for number, reached in enumerate(zip(*layers, strict=True)):
        series = f"layer {number}" if number else "pixels"
        for name, figures in zip((VARIABILITY, "NC1"), zip(*reached, strict=True), strict=True):
            run.record(name, float(np.mean(figures)), better="lower", series=series)
    # What each layer leaves of the variability before it; of each network the layer that takes away least.
    left = np.array([[np.divide(later, earlier) for earlier, later in pairwise(one)] for one in layers])
    for kind, name in enumerate((VARIABILITY, "NC1")):
        for number in range(depth):
            shares = left[:, number, kind].tolist()
            run.ratio(
                f"{name}, ratio", method=shares, baseline=[1.0] * seeds, better="lower", series=f"layer {number + 1}",
                against="the layer before",
            )  # fmt: skip
        run.ratio(
            f"{name}, ratio", method=left[:, :, kind].max(1).tolist(), baseline=[1.0] * seeds, better="lower",
            series="weakest layer", against="the layer before",
        )  # fmt: skip
    seen, labels = greedy[0]
    for number in run.progress(range(depth), "implied beta"):
        if layers[0][number + 1][0] < layers[0][number][0]:
            found_beta = implied_beta(
                seen[number], labels, layers[0][number + 1][0], lam_w=10 * decay, lam_h=decay
            )  # fmt: skip
            run.record("implied beta", found_beta, better="higher", series=f"layer {number + 1}")

    variants = {"both": (1, 1), "body x2": (2, 1), "body 0": (0, 1), "head x2": (1, 2), "head 0": (1, 0)}
    # Two centred means are a simplex always, so that NC2 says nothing of two classes.
    measures = ("NC1", "NC2") if len(own.classes) > 2 else ("NC1",)
    shown: dict[str, list[float]] = {}
    for loss in LOSSES:
        whole = {
            name: [
                _whole(own, per_class, width, long_steps, decay * body, decay * head, number, loss)
                for number in range(seed, seed + seeds)
            ]
            for name, (body, head) in run.progress(list(variants.items()), f"weight decay, {loss}")
        }
        for name, reached_by in whole.items():
            for kind, measure in enumerate(f"{one} at the end" for one in measures):
                values = [one[kind] for one in reached_by]
                run.record(measure, float(np.mean(values)), better="lower", series=f"{name}, {loss}")
        ends = {name: np.array(reached_by)[:, : len(measures)] for name, reached_by in whole.items()}
        for change_of in ("x2", "0"):
            # How far, on a logarithmic scale, a change of decay takes each seed's network from where it was.
            body, head = (np.abs(np.log(ends[f"{part} {change_of}"] / ends["both"])) for part in ("body", "head"))
            for kind, measure in enumerate(measures):
                run.difference(
                    f"{measure} moved by decay {change_of}", method=body[:, kind].tolist(),
                    baseline=head[:, kind].tolist(), unit="nats", series=f"body, {loss}", against="head",
                )  # fmt: skip
        shown |= {f"{name}, {loss}": [one[0] for one in reached_by] for name, reached_by in whole.items()}
    run.figure(_figure([[one[0] for one in network] for network in layers], shown))


def _greedy(
    own: Samples, per_class: int, width: int, depth: int, steps: int, decay: float, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pixels and what each layer makes of them, trained over frozen ones; and the labels."""
    import torch
    from torch import nn

    x, y = own.drawn([per_class] * len(own.classes), seed)
    wanted, seen = nn.functional.one_hot(y).float(), [x]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for _ in range(depth):
            layer = nn.Sequential(nn.Linear(seen[-1].shape[1], width), nn.ReLU())
            head = nn.Linear(width, len(own.classes), bias=False)
            parameters = [*layer.parameters(), *head.parameters()]

            def objective(
                layer: nn.Module = layer, head: nn.Module = head, given: torch.Tensor = seen[-1]
            ) -> torch.Tensor:
                error = (head(layer(given)) - wanted).square().sum() / 2 / len(given)
                return error + decay / 2 * sum(one.square().sum() for one in [*layer.parameters(), *head.parameters()])

            descend(parameters, objective, steps)
            with torch.no_grad():
                seen.append(layer(seen[-1]))
    return seen, y


def _variability(features: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Tr Sigma_W / tr Sigma_B, and NC1."""
    from paperworks.representation import NeuralCollapse

    metric = NeuralCollapse(int(labels.max()) + 1)
    metric.update(features, labels)
    found = metric.compute()
    return float(found["nc1_trace_ratio"]), float(found["nc1"])


def _whole(
    own: Samples, per_class: int, width: int, steps: int, of_body: float, of_head: float, seed: int, loss: str
) -> tuple[float, float]:
    """NC1 and NC2 of the features of a network of two hidden layers, with decay of its body and of its head."""
    import torch
    from torch import nn

    from paperworks.representation import NeuralCollapse

    x, y = own.drawn([per_class] * len(own.classes), seed)
    wanted = nn.functional.one_hot(y).float()
    entropy = loss == "cross-entropy"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        head = nn.Linear(width, len(own.classes), bias=entropy)

    def objective() -> torch.Tensor:
        made = head(body(x))
        error = nn.functional.cross_entropy(made, y) if entropy else (made - wanted).square().sum() / 2 / len(x)
        squared = sum((one.square().sum() for one in body.parameters()), torch.zeros(()))
        return error + of_body / 2 * squared + of_head / 2 * head.weight.square().sum()

    descend([*body.parameters(), *head.parameters()], objective, steps)
    found = NeuralCollapse.from_model(nn.Sequential(body, head), [(x, y)], "1").compute()
    return float(found["nc1"]), float(found["nc2_means_etf"])


def _figure(layers: Sequence[Sequence[float]], whole: dict[str, list[float]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in layers:
        left.semilogy(one, "o-", color="#1f6f8b")
    left.set(xlabel="layers, trained one after the other", ylabel=VARIABILITY)
    right.bar(list(whole), [sum(values) / len(values) for values in whole.values()], color="#1f6f8b")
    right.set(yscale="log", ylabel="NC1 at the end")
    right.tick_params(axis="x", rotation=90)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
