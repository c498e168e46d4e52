"""Near collapse on digits: what a layer shrinks, layer after layer, and which weight decay changes it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.neural_collapse import descend, digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from matplotlib.figure import Figure

VARIABILITY = "within / between classes"


@recipe(
    "near-collapse",
    baseline="the features of the layer before",
    headline="within / between classes",
    tiny={"per_class": 6, "width": 16, "depth": 2, "steps": 30, "seeds": 2, "long_steps": 40},
    large={"width": 512, "depth": 10, "steps": 5000, "seeds": 10, "long_steps": 20_000},
)
def near_collapse(
    run: Run,
    per_class: int = 40,
    width: int = 64,
    depth: int = 4,
    steps: int = 150,
    long_steps: int = 600,
    decay: float = 5e-4,
    seeds: int = 3,
    seed: int = 0,
) -> None:
    """The shrink factors against the exact solver, greedily added layers, and decay of body or head on digits.

    Imperfections within classes go through the solver at full collapse and are held against the two factors. Then
    layers are trained one at a time over frozen ones, each with a head of its own, and the variability within classes
    is measured after each; of the first network it is said how freely each layer moved its features, as the beta at which
    the theory's solver would have left as much. Last, whole networks are trained to the end with the decay of body or head
    doubled or left out.

    Args:
        run: Keeps what is measured.
        per_class: Samples of each digit.
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
        _greedy(per_class, width, depth, steps, decay, number)
        for number in run.progress(range(seed, seed + seeds), "layers")
    ]
    layers = [[_variability(features, labels) for features in seen] for seen, labels in greedy]
    for number, reached in enumerate(zip(*layers, strict=True)):
        run.record(
            VARIABILITY, float(np.mean(reached)), better="lower", series=f"layer {number}" if number else "pixels"
        )
    run.ratio(
        VARIABILITY, method=[one[-1] for one in layers], baseline=[one[1] for one in layers], better="lower",
        series=f"layer {depth}", against="layer 1",
    )  # fmt: skip
    falls = [later < earlier for one in layers for earlier, later in pairwise(one)]
    run.record("layers that lower it", float(np.mean(falls)), better="higher", series="greedy layers")
    seen, labels = greedy[0]
    for number in run.progress(range(depth), "implied beta"):
        if layers[0][number + 1] < layers[0][number]:
            found_beta = implied_beta(
                seen[number], labels, layers[0][number + 1], lam_w=10 * decay, lam_h=decay
            )  # fmt: skip
            run.record("implied beta", found_beta, better="higher", series=f"layer {number + 1}")

    variants = {"both": (1, 1), "body x2": (2, 1), "body 0": (0, 1), "head x2": (1, 2), "head 0": (1, 0)}
    whole = {
        name: [_whole(per_class, width, long_steps, decay * body, decay * head, number) for number in range(seed, seed + seeds)]
        for name, (body, head) in run.progress(list(variants.items()), "weight decay")
    }  # fmt: skip
    moved_by = {name: np.abs(np.log(np.array(values) / whole["both"])) for name, values in whole.items()}
    for name, values in whole.items():
        run.record("NC1 at the end", float(np.mean(values)), better="lower", series=name)
    for change_of in ("x2", "0"):
        run.ratio(
            f"NC1 moved by decay {change_of}", method=moved_by[f"body {change_of}"].tolist(),
            baseline=moved_by[f"head {change_of}"].tolist(), series="body", against="head",
        )  # fmt: skip
    run.figure(_figure(layers, whole))


def _greedy(
    per_class: int, width: int, depth: int, steps: int, decay: float, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pixels and what each layer makes of them, trained over frozen ones; and the labels."""
    import torch
    from torch import nn

    x, y = digits([per_class] * 10, seed)
    wanted, seen = nn.functional.one_hot(y).float(), [x]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for _ in range(depth):
            layer = nn.Sequential(nn.Linear(seen[-1].shape[1], width), nn.ReLU())
            head = nn.Linear(width, 10, bias=False)
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


def _variability(features: torch.Tensor, labels: torch.Tensor) -> float:
    from paperworks.representation import NeuralCollapse

    metric = NeuralCollapse(10)
    metric.update(features, labels)
    return float(metric.compute()["nc1_trace_ratio"])


def _whole(per_class: int, width: int, steps: int, of_body: float, of_head: float, seed: int) -> float:
    """NC1 of a network of two hidden layers, with decay of its body and of its head."""
    import torch
    from torch import nn

    from paperworks.representation import NeuralCollapse

    x, y = digits([per_class] * 10, seed)
    wanted = nn.functional.one_hot(y).float()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        head = nn.Linear(width, 10, bias=False)

    def objective() -> torch.Tensor:
        error = (head(body(x)) - wanted).square().sum() / 2 / len(x)
        squared = sum((one.square().sum() for one in body.parameters()), torch.zeros(()))
        return error + of_body / 2 * squared + of_head / 2 * head.weight.square().sum()

    descend([*body.parameters(), *head.parameters()], objective, steps)
    metric = NeuralCollapse.from_model(nn.Sequential(body, head), [(x, y)], "1")
    return float(metric.compute()["nc1"])


def _figure(layers: Sequence[Sequence[float]], whole: dict[str, list[float]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in layers:
        left.semilogy(one, "o-", color="#1f6f8b")
    left.set(xlabel="layers, trained one after the other", ylabel=VARIABILITY)
    right.bar(list(whole), [sum(values) / len(values) for values in whole.values()], color="#1f6f8b")
    right.set(yscale="log", ylabel="NC1 at the end", xlabel="weight decay")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
