"""Neural collapse on digits: how far training to the end goes, and where imbalanced classes end up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Between, recipe
from paperworks.lab.run import Run
from paperworks.recipes.representation.samples import CLASSED, Samples, samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from paperworks.representation import FrameGeometry, NeuralCollapse

LENGTHS = "largest error of a row's length"
# Each with what decay is multiplied by: under cross-entropy that of squared error would take the features to zero.
LOSSES = {"squared error": 1.0, "cross-entropy": 1e-3}


class Trained(NamedTuple):
    """A network's collapse at the end, its classifier, recall of the rarest class, and steps with errors and NC1."""

    metric: NeuralCollapse
    weight: Tensor
    recall: float
    path: list[tuple[int, int, float]]

    @property
    def at_zero_error(self) -> float:
        """NC1 at the first of these steps without an error; at the last where all have some."""
        return next((nc1 for _, wrong, nc1 in self.path if not wrong), self.path[-1][2])


@recipe(
    "neural-collapse",
    baseline="the network at initialisation and at zero training error, and the frame of balanced classes",
    columns=("NC1, ratio", "NC2, ratio", "NC3, ratio", "fall of NC1", "distance of the rows (NC2)"),
    rows=("squared error*", "cross-entropy*", "end of training", "predicted frame"),
    tiny={"classes": 3, "smallest": 5, "largest": 15, "width": 16, "depth": 2, "steps": 60, "seeds": 2},
    large={"width": 1024, "steps": 20_000, "seeds": 10},
)
def neural_collapse(
    run: Run,
    data: Annotated[str, CLASSED] = "digits",
    classes: Annotated[int, Between(2, 10)] = 10,
    smallest: Annotated[int, Between(1, 60)] = 15,
    largest: Annotated[int, Between(1, 174)] = 150,
    width: Annotated[int, Between(1, 256)] = 128,
    depth: Annotated[int, Between(1, 6)] = 3,
    steps: Annotated[int, Between(1, 6000)] = 1500,
    seeds: Annotated[int, Between(1, 20)] = 5,
    restarts: Annotated[int, Between(1, 4)] = 1,
    seed: int = 0,
) -> None:
    """Networks trained on digits, or your own samples, far past zero error, against the closed form of the unconstrained feature model.

    Perceptrons with a few linear layers at their end learn balanced classes, by squared error without a bias and by
    cross-entropy with one, features and linear layers decaying: NC1 to NC3 of the linear layer that has collapsed least
    are compared with those at initialisation. With one linear layer it is told how far NC1 falls after the first step
    without a training error; imbalanced classes are compared with the predicted frame, and with that of balanced classes;
    then decay is raised past the smallest class's threshold.

    Args:
        run: Keeps what is measured.
        data: What to learn to tell apart: a table or folder of images of your own, or a name.
        classes: Classes to tell apart, at most; digits where nothing else is given.
        smallest: Samples of the rarest class, at most.
        largest: Samples of the commonest, at most; those between are spaced geometrically.
        width: Of the hidden layers, of the features, and of what is between linear layers.
        depth: Linear layers at the end of the networks that are compared with initialisation.
        steps: Of training, each on all samples.
        seeds: Networks.
        restarts: Starting points of the solver.
        seed: Of the first network.
    """
    import numpy as np
    import torch

    from paperworks.representation import frame_geometry, unconstrained_features

    own = samples(data)
    classes = min(classes, len(own.classes))
    wanted = np.geomspace(largest, smallest, classes).round().astype(int).tolist()
    own, counts = own.as_many(wanted)
    smallest, noun = counts[-1], "digit" if data == "digits" else "class"
    if own.X.shape[1] < 2:
        raise UsageError(f"{data} has one feature, and a network is to learn from several")
    edge = smallest**0.5 / sum(counts)
    lam = 0.3 * edge

    most_alike = int(np.bincount(own.y).min())
    even = [min(max(2, sum(counts) // classes), most_alike)] * classes
    frame = frame_geometry(counts, lam_w=lam, lam_h=lam)
    found = unconstrained_features(
        counts, classes + 2, lam_w=lam, lam_h=lam, restarts=restarts, generator=torch.Generator().manual_seed(seed)
    )
    run.record(LENGTHS, row_error(found.product, frame), better="lower", series="solver")
    networks = range(seed, seed + seeds)
    for loss, share in LOSSES.items():
        pairs = [
            deep(even, width, depth, share * lam, steps, number, loss, own)
            for number in run.progress(networks, f"{depth} layers, {loss}")
        ]
        for name in ("NC1", "NC2", "NC3"):
            # Two rows are a simplex from the beginning.
            if name == "NC2" and classes == 2 and loss == "cross-entropy":
                continue
            run.ratio(
                f"{name}, ratio", method=[after[name] for _, after in pairs],
                baseline=[before[name] for before, _ in pairs], better="lower",
                series=f"{loss}, worst of {depth} layers", against="initialisation",
            )  # fmt: skip
    balanced = [train(even, width, lam, steps, number, own) for number in run.progress(networks, "balanced")]
    imbalanced = [train(counts, width, lam, steps, number, own) for number in run.progress(networks, "imbalanced")]
    first, last = [one.at_zero_error for one in balanced], [one.path[-1][2] for one in balanced]
    run.record("NC1", float(np.mean(first)), better="lower", series="zero training error")
    run.record("NC1", float(np.mean(last)), better="lower", series="end of training")
    run.ratio("fall of NC1", method=first, baseline=last, series="end of training", against="zero training error")
    run.record(LENGTHS, max(row_error(one.weight, frame) for one in imbalanced), better="lower", series="network")
    run.ratio(
        "distance of the rows (NC2)",
        method=[float(one.metric.against(frame)["nc2_gof"]) for one in imbalanced],
        baseline=[float(one.metric.compute()["nc2_of"]) for one in imbalanced],
        better="lower", series="predicted frame", against="balanced frame",
    )  # fmt: skip

    # Below its threshold the rarest class's |p|^2 = sqrt(n) - N lam falls on a line, which is followed to zero.
    shares, squared = (0.4, 0.6, 0.8, 1.2), []
    for share in run.progress(shares, "decay"):
        one = train(counts, width, share * edge, steps, seed, own)
        squared.append(float(one.weight[-1].square().sum()))
        logit = float(one.metric.class_means[-1] @ one.weight[-1].double())
        run.record(f"rarest {noun}'s own logit", logit, better="higher", series=f"{share:g} of the threshold")
        run.record(f"rarest {noun}'s recall", one.recall, better="higher", series=f"{share:g} of the threshold")
    slope, offset = np.polyfit(shares[:-1], squared[:-1], 1)
    run.record("threshold found / predicted", float(-offset / slope), better="lower", series="network")
    run.record(f"squared row of the rarest {noun}", squared[-1], better="lower", series="1.2 of the threshold")
    run.compare(
        baseline=(
            "solver",
            lambda decay: unconstrained_features(counts, classes, lam_w=decay, lam_h=decay, restarts=1),
        ),
        method={"closed form": lambda decay: frame_geometry(counts, lam_w=decay, lam_h=decay)},
        over=[share * edge for share in (0.1, 0.2, 0.3, 0.5, 0.8)],
        repeats=1,
    )
    run.figure(_figure(balanced[0].path, imbalanced[0].weight, frame, shares, squared, smallest, edge))


def train(counts: Sequence[int], width: int, lam: float, steps: int, seed: int, own: Samples | None = None) -> Trained:
    """A network with two hidden layers, and features of any sign, on so many of each class; of digits by default."""
    import torch
    from torch import nn

    from paperworks.representation import NeuralCollapse

    x, y = (own or samples()).drawn(counts, seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        head = nn.Linear(width, len(counts), bias=False)
    model = nn.Sequential(body, head)
    wanted, path, every = nn.functional.one_hot(y).float(), [], max(1, steps // 60)

    def objective() -> Tensor:
        features = body(x)
        error = (head(features) - wanted).square().sum() / 2 / len(x)
        return error + lam / 2 * (features.square().sum() + head.weight.square().sum())

    def watch(step: int) -> None:
        if (step + 1) % every == 0 or step == steps - 1:
            metric = NeuralCollapse(len(counts), weight=head.weight)
            with torch.no_grad():
                features = body(x)
            metric.update(features, y)
            wrong = int((head(features).argmax(1) != y).sum())
            path.append((step + 1, wrong, float(metric.compute()["nc1"])))

    descend(list(model.parameters()), objective, steps, watch)
    with torch.no_grad():
        recall = float((model(x[y == len(counts) - 1]).argmax(1) == len(counts) - 1).float().mean())
    return Trained(NeuralCollapse.from_model(model, [(x, y)], "1"), head.weight.detach(), recall, path)


def deep(
    counts: Sequence[int],
    width: int,
    depth: int,
    lam: float,
    steps: int,
    seed: int,
    loss: str,
    own: Samples | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """NC1 to NC3 of the linear layer that has collapsed least, at initialisation and at the end.

    Layer j is measured on the features that enter it, with the product of the layers from j on as the classifier.
    """
    import torch
    from torch import nn

    x, y = (own or samples()).drawn(counts, seed)
    entropy = loss == "cross-entropy"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width))
        sizes = [width] * depth + [len(counts)]
        layers = nn.ModuleList(
            nn.Linear(sizes[number], sizes[number + 1], bias=entropy and number == depth - 1) for number in range(depth)
        )
    wanted = nn.functional.one_hot(y).float()

    def objective() -> Tensor:
        features = made = body(x)
        for layer in layers:
            made = layer(made)
        error = nn.functional.cross_entropy(made, y) if entropy else (made - wanted).square().sum() / 2 / len(x)
        decayed = [features, *(layer.weight for layer in layers)]
        return error + lam / 2 * sum((one.square().sum() for one in decayed), torch.zeros(()))

    def worst() -> dict[str, float]:
        # Of squared error the frame is orthogonal, of cross-entropy with a bias a simplex.
        frame = "etf" if entropy else "of"
        found: dict[str, list[float]] = {"NC1": [], "NC2": [], "NC3": []}
        with torch.no_grad():
            made = body(x)
            for number, layer in enumerate(layers):
                product: Any = layer.weight
                for later in layers[number + 1 :]:
                    product = later.weight @ product
                metric = NeuralCollapse(len(counts), weight=product)
                metric.update(made, y)
                told = metric.compute()
                for name, value in (("NC1", told["nc1"]), ("NC2", told[f"nc2_{frame}"]), ("NC3", told[f"nc3_{frame}"])):
                    found[name].append(float(value))
                made = layer(made)
        return {name: max(values) for name, values in found.items()}

    from paperworks.representation import NeuralCollapse

    before = worst()
    descend([*body.parameters(), *layers.parameters()], objective, steps)
    return before, worst()


def row_error(rows: Tensor, frame: FrameGeometry) -> float:
    """The largest relative error of a row's length among the classes that have one."""
    wanted = frame.weight_squared.sqrt()
    kept = ~frame.collapsed
    return float(((rows.double().norm(dim=1) - wanted) / wanted)[kept].abs().max())


def descend(
    parameters: Sequence[nn.Parameter],
    objective: Callable[[], Tensor],
    steps: int,
    each: Callable[[int], None] | None = None,
) -> None:
    """Adam on the whole objective, its rate falling to zero along a cosine."""
    import torch

    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        objective().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if each is not None:
            each(step)


def _figure(
    path: list[tuple[int, int, float]],
    weight: Tensor,
    frame: FrameGeometry,
    shares: Sequence[float],
    squared: Sequence[float],
    smallest: int,
    edge: float,
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.semilogy([step for step, *_ in path], [nc1 for *_, nc1 in path], color="#1f6f8b")
    zero = next((step for step, wrong, _ in path if not wrong), None)
    if zero is not None:
        left.axvline(zero, color="#333333", linestyle=":", label="zero training error")
        left.legend(frameon=False)
    left.set(xlabel="step", ylabel="NC1, balanced")
    middle.plot(frame.counts, frame.weight_squared.sqrt(), color="#333333", label="predicted")
    middle.plot(frame.counts, weight.norm(dim=1), "o", color="#1f6f8b", label="network")
    middle.set(xlabel="samples of a class", ylabel="length of its row")
    middle.legend(frameon=False)
    total = float(frame.counts.sum())
    right.plot([0, 1, 1.3], [smallest**0.5, smallest**0.5 - total * edge, 0], color="#333333", label="predicted")
    right.plot(shares, squared, "o", color="#1f6f8b", label="network")
    right.set(xlabel="decay / predicted threshold", ylabel="squared row of the rarest class")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
