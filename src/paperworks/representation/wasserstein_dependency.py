"""Wasserstein dependency measure: contrastive learning that does not stop once pairs can be told apart (arXiv 1903.11780)."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from scipy.optimize import linprog
from scipy.sparse import coo_array
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from paperworks.representation.features import evaluated

Lipschitz = Literal["gp", "one_sided_gp", "spectral"]
Objective = Literal["info_nce", "dual"]

_PAIRS_AT_ONCE = 2**17
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_EXPANDING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus)


@dataclass(frozen=True)
class Dependency:
    """What a critic tells of pairs, none of which it should have been trained on.

    Attributes:
        wasserstein: Mean score of pairs less that of pairs put together at random, in the units of the data's metric: a
            lower bound of W1(p(x, y), p(x) p(y)) where the critic is 1-Lipschitz.
        conservative: The same divided by the largest gradient norm seen, where that is above 1.
        info_nce: log B less the contrastive loss, a lower bound of the mutual information in nats, at most log B.
        batch_size: B.
        gradient_norms: Of the critic between pairs and random pairs, (N,).
        joint_scores: Of the pairs, (N,).
        product_scores: Of the other pairs within each batch.
    """

    wasserstein: float
    conservative: float
    info_nce: float
    batch_size: int
    gradient_norms: Tensor
    joint_scores: Tensor
    product_scores: Tensor

    @property
    def saturation(self) -> float:
        """Share of log B that the contrastive bound reaches; near 1 it has nothing left to learn from."""
        return self.info_nce / math.log(self.batch_size)

    def plot(self) -> Any:
        """Scores of pairs and of random ones, and the critic's gradient norms, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for scores, label, colour in (
            (self.joint_scores, "pairs", "#1f6f8b"), (self.product_scores, "random pairs", "#c8553d"),
        ):  # fmt: skip
            left.hist(scores.cpu().numpy(), bins=50, density=True, alpha=0.7, label=label, color=colour)
        left.set(xlabel="score", ylabel="density")
        left.legend(frameon=False)
        right.hist(self.gradient_norms.cpu().numpy(), bins=50, color="#1f6f8b")
        right.axvline(1, color="black", linewidth=0.8)
        right.set(xlabel="gradient norm of the critic", ylabel="pairs")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


class ConcatCritic(nn.Sequential):
    """A multi-layer perceptron that scores a pair of codes put side by side.

    Args:
        dim_x: Size of the first code.
        dim_y: Size of the second.
        hidden: Sizes of the hidden layers.

    Example:
        >>> ConcatCritic(3, 2)(torch.ones(5, 3), torch.ones(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, dim_x: int, dim_y: int, hidden: Sequence[int] = (64, 64)) -> None:
        sizes = [dim_x + dim_y, *hidden]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, gx: Tensor, hy: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (N,) of the pairs of rows of (N, dim_x) and (N, dim_y)."""
        scores: Tensor = super().forward(torch.cat([gx, hy], 1))
        return scores.squeeze(1)


class WassersteinDependency(nn.Module):
    """Wasserstein predictive coding (Ozair et al., 2019, arXiv 1903.11780): a contrastive loss with a Lipschitz critic.

    Of a batch of pairs the critic f(x, y) is to score each x highest with its own y. With mutual information well above
    log B a few factors are enough for that, and plain contrastive predictive coding (`lipschitz=None`: CPC, InfoNCE)
    learns no others. A critic that is 1-Lipschitz in its INPUTS is never done: scores grow with how far apart outcomes
    are, so all factors count. The metric is Euclidean on (x, y), so scale inputs as their differences matter to you.

    Args:
        g: Encoder of x, any shape to (N, d); what is trained here, and the representation.
        h: Encoder of y; may be the same module.
        critic: "bilinear", f = g(x) . h(y), or a module that takes (N, d) and (N, d') and gives N scores, as `ConcatCritic`.
            Encoders in half precision are run as they are; scores, gradient norms and losses are in float32.
        lipschitz: "gp" pulls the critic's gradient norms to 1 and "one_sided_gp" only down to it, at points between pairs
            and random pairs; "spectral" bounds every linear and convolution layer, in place; None leaves the critic free.
        lam: Weight of the gradient penalty.
        metric_scale: What x and y are multiplied by in the metric.
        objective: "info_nce", which trains better, or "dual", the measure itself: scores of pairs less those of random ones.

    Raises:
        ValueError: Values out of range, or an encoder that cannot be held Lipschitz: batch norm mixes samples, and
            spectral bounds need layers that do not expand distances.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> g, h = (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))
        >>> wpc = WassersteinDependency(g, h)
        >>> x = torch.randn(8, 6)
        >>> wpc(x, x + 0.1).backward()
        >>> wpc.diagnose(x, x + 0.1).info_nce <= math.log(8)
        True
    """

    def __init__(
        self,
        g: nn.Module,
        h: nn.Module,
        *,
        critic: Literal["bilinear"] | nn.Module = "bilinear",
        lipschitz: Lipschitz | None = "gp",
        lam: float = 10.0,
        metric_scale: tuple[float, float] = (1.0, 1.0),
        objective: Objective = "info_nce",
    ) -> None:
        super().__init__()
        if lipschitz not in (None, *get_args(Lipschitz)) or objective not in get_args(Objective):
            raise ValueError(
                f"lipschitz is one of {', '.join(get_args(Lipschitz))} or None, and objective info_nce or dual, "
                f"got {lipschitz!r} and {objective!r}"
            )
        if critic != "bilinear" and not isinstance(critic, nn.Module):
            raise TypeError(f"critic is 'bilinear' or a module of two codes, got {critic!r}")
        if not 0 <= lam < math.inf:
            raise ValueError(f"lam is a finite number of at least 0, got {lam}")
        if len(metric_scale) != 2 or not all(0 < scale < math.inf for scale in metric_scale):
            raise ValueError(f"metric_scale is two finite numbers above 0, of x and of y, got {metric_scale}")
        self.g, self.h = g, h
        self.critic = critic if isinstance(critic, nn.Module) else None
        self.lipschitz, self.lam, self.metric_scale, self.objective = lipschitz, lam, tuple(metric_scale), objective
        self._penalised = lipschitz in ("gp", "one_sided_gp") and lam > 0
        if objective == "dual" and not self._penalised and lipschitz != "spectral":
            raise ValueError("a free critic makes the dual as large as it likes: choose a lipschitz and a lam above 0")
        if self._penalised:
            _refuse_batch_norm(self)
        if lipschitz == "spectral":
            if self.metric_scale != (1.0, 1.0):
                raise ValueError("spectral bounds are in the encoders' own inputs: scale those, and leave metric_scale")
            _bound_layers(self)

    def forward(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            x: (B, ...), finite; discrete data as embeddings whose distances mean something.
            y: (B, ...), where y[i] belongs to x[i]; the others serve as its negatives.
            generator: Of the points where the gradient is penalised.

        Raises:
            ValueError: Fewer than two pairs, batches of different sizes, or values that are not finite.
            TypeError: Inputs that are no tensors, or without a metric: whole numbers, where the critic is to be Lipschitz.
        """
        self._check(x, y)
        if self.objective == "info_nce":
            scores = self.scores(x, y)
            loss = F.cross_entropy(scores, torch.arange(len(x), device=scores.device))
        else:
            loss = (self.values(x, y[derangement(len(y), generator).to(y.device)]) - self.values(x, y)).mean()
        if not self._penalised:
            return loss
        return loss + self.lam * self.penalty(x, y, generator=generator)

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        """The critic f at pairs of rows, (N,)."""
        gx, hy = self._codes(x, y)
        return self._bilinear(gx * hy).sum(1) if self.critic is None else self._valued(gx, hy)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """The critic at all pairs, (N, M) for N rows of x and M of y; each is encoded once."""
        gx, hy = self._codes(x, y)
        if self.critic is None:
            return self._bilinear(gx @ hy.T)
        rows = max(1, _PAIRS_AT_ONCE // len(hy))
        return torch.cat([
            self._valued(part.repeat_interleave(len(hy), 0), hy.repeat(len(part), 1)).view(len(part), len(hy))
            for part in gx.split(rows)
        ])  # fmt: skip

    def penalty(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared distance of the critic's gradient norms from 1, or from at most 1; differentiable."""
        excess = self.gradient_norms(x, y, generator=generator, create_graph=True) - 1
        return (excess.relu() if self.lipschitz == "one_sided_gp" else excess).square().mean()

    def gradient_norms(
        self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, create_graph: bool = False
    ) -> Tensor:
        """Norms of the critic's gradient in both inputs together, (N,), at points between pairs and random pairs.

        Args:
            x: (N, ...).
            y: (N, ...); the points are (x[i], u y[i] + (1 - u) y[j]) with u uniform and j a random other sample.
            generator: Of u and j.
            create_graph: Whether they are to be differentiated in the encoders' weights.
        """
        other = y[derangement(len(y), generator).to(y.device)]
        device = None if generator is None else generator.device
        u = torch.rand(len(y), dtype=y.dtype, generator=generator, device=device).to(y.device)
        at_x = x.detach().requires_grad_()
        at_y = torch.lerp(other, y, u.view(-1, *[1] * (y.ndim - 1))).detach().requires_grad_()
        with torch.enable_grad(), _twice_differentiable(self):
            values = self.values(at_x, at_y)
            # Each sample's score depends on its own inputs only, so the gradient of the sum holds them all.
            gradients = torch.autograd.grad(
                values.sum(), (at_x, at_y), create_graph=create_graph, materialize_grads=True
            )  # fmt: skip
        parts = [_wide(one.flatten(1)) / scale for one, scale in zip(gradients, self.metric_scale, strict=True)]
        return torch.linalg.vector_norm(torch.cat(parts, 1), dim=1)

    def diagnose(
        self, x: Tensor, y: Tensor, *, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Dependency:
        """What the critic tells of held-out pairs, as it would be used (`eval` mode, left as it was).

        Args:
            x: (N, ...).
            y: (N, ...).
            batch_size: Negatives come from batches of this many, the last one left out where it is smaller; all N where None,
                and then the order of pairs changes no score.
            generator: Of the points where gradients are taken.

        Raises:
            ValueError: As in `forward`, or a batch size that is not between 2 and N.
        """
        self._check(x, y)
        size = len(x) if batch_size is None else batch_size
        if not 2 <= size <= len(x):
            raise ValueError(f"batch_size is from 2 to the {len(x)} pairs, got {batch_size}")
        with evaluated(self):
            whole = len(x) // size * size
            batches = zip(x[:whole].split(size), y[:whole].split(size), strict=True)
            scores = torch.stack([self.scores(*batch) for batch in batches]).double()
            norms = self.gradient_norms(x, y, generator=generator).detach()
        joint = scores.diagonal(dim1=1, dim2=2)
        product = scores[:, ~torch.eye(size, dtype=torch.bool, device=scores.device)]
        wasserstein = float(joint.mean() - product.mean())
        return Dependency(
            wasserstein, wasserstein / max(1.0, float(norms.max())),
            math.log(size) + float((joint - scores.logsumexp(2)).mean()), size, norms, joint.flatten(), product.flatten(),
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """Write encoders' and critic's weights and the settings: model.safetensors and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        config = {
            "critic": "bilinear" if self.critic is None else "own", "lipschitz": self.lipschitz, "lam": self.lam,
            "metric_scale": self.metric_scale, "objective": self.objective,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, g: nn.Module, h: nn.Module, *, critic: nn.Module | None = None
    ) -> WassersteinDependency:
        """Read what `save_pretrained` wrote into encoders, and a critic where it is not bilinear, of the same make.

        Raises:
            ValueError: The folder holds none, a critic of one's own was saved and none is given, or the other way round, or
                weights do not fit.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            own = config.pop("critic") == "own"
            config["metric_scale"] = tuple(config["metric_scale"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} holds no saved WassersteinDependency: {error}") from error
        if own != (critic is not None):
            raise ValueError("give a critic if and only if the saved one was a module of your own")
        model = cls(g, h, critic="bilinear" if critic is None else critic, **config)
        try:
            load_model(model, Path(folder) / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved WassersteinDependency, or a damaged one: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"the weights in {folder} are of other encoders than those given: {error}") from error
        return model

    def _codes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gx, hy = self.g(x), self.h(y)
        if gx.ndim != 2 or hy.ndim != 2 or (self.critic is None and gx.shape[1] != hy.shape[1]):
            raise ValueError(
                "encoders give (N, d), a bilinear critic takes one d for both, "
                f"got {tuple(gx.shape)} and {tuple(hy.shape)}"
            )
        if self.critic is not None:
            return gx, hy
        gx, hy = _wide(gx), _wide(hy)
        return (_onto_ball(gx), _onto_ball(hy)) if self.lipschitz == "spectral" else (gx, hy)

    def _valued(self, gx: Tensor, hy: Tensor) -> Tensor:
        assert self.critic is not None
        values = self.critic(gx, hy)
        if not isinstance(values, Tensor) or values.shape not in ((len(gx),), (len(gx), 1)):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"a critic gives one score for each of its {len(gx)} pairs, got {got}")
        return _wide(values).view(-1)

    def _bilinear(self, product: Tensor) -> Tensor:
        # On the unit ball the gradient in each input is at most 1, and in both together sqrt(2).
        return product / math.sqrt(2) if self.lipschitz == "spectral" else product

    def _check(self, x: Tensor, y: Tensor) -> None:
        _check_tensors(x, y)
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(
                f"x and y are two or more pairs, as many of the one as of the other, got {len(x)} and {len(y)}"
            )
        for one in (x, y):
            if self.lipschitz is not None and not one.is_floating_point():
                raise TypeError(f"{one.dtype} has no metric to be Lipschitz in: embed discrete inputs as vectors first")
            if not bool(one.isfinite().all()):
                raise ValueError("inputs hold NaN or infinity: clean or clip them before measuring dependence")


def wasserstein_dependency(
    x: Tensor,
    y: Tensor,
    *,
    critic: nn.Module | None = None,
    lipschitz: Literal["gp", "one_sided_gp"] = "one_sided_gp",
    lam: float = 100.0,
    steps: int = 3000,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    held_out: float = 0.25,
    generator: torch.Generator | None = None,
) -> Dependency:
    """Estimate W1(p(x, y), p(x) p(y)) from pairs: a critic climbs the dual, and is read off on pairs it has not seen.

    Inputs are centred and divided by one common number, their root mean squared size, so that scaling the data scales the
    result; the critic runs in their dtype, or its own where it is given, in float32 at least for narrower inputs. The penalty
    is soft: a critic overshoots by about the result / (2 lam sizes); see `Dependency.conservative`.

    Args:
        x: (N, ...), finite.
        y: (N, ...).
        critic: Module of two flattened batches (N, d) and (N, d') that gives N scores, trained in place; where None, `ConcatCritic`.
        lipschitz: The gradient penalty.
        lam: Its weight.
        steps: Of Adam.
        learning_rate: Its rate, that falls to zero along a cosine.
        batch_size: Pairs a step, and a batch of the evaluation.
        held_out: Share of the pairs to evaluate on.
        generator: Of weights, split, batches and points.

    Raises:
        TypeError: Inputs that are no tensors, or of whole numbers.
        ValueError: Values out of range, too few pairs, constant data, values that are not finite, a critic in half
            precision or one that diverges.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(400, 1, generator=generator)
        >>> found = wasserstein_dependency(x, x, steps=50, batch_size=32, generator=generator)
        >>> found.wasserstein > 0.1
        True
    """
    if not 0 < held_out < 1 or steps < 1 or batch_size < 2 or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"held_out lies between 0 and 1, steps is at least 1, batch_size at least 2 and learning_rate above 0, got "
            f"{held_out}, {steps}, {batch_size} and {learning_rate}"
        )
    generator = generator or torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
    _check_tensors(x, y)
    own = None if critic is None else next(critic.parameters(), None)
    if own is not None and own.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"Adam's steps are lost in {own.dtype} weights of a critic: give critic.float()")
    unit, (x, y) = _standardised(x, y, torch.promote_types(x.dtype, torch.float32) if own is None else own.dtype)
    order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    kept = len(x) - round(held_out * len(x))
    if not 2 <= kept <= len(x) - 2:
        raise ValueError(f"{len(x)} pairs leave fewer than two to train or to evaluate on: give more")
    (train_x, test_x), (train_y, test_y) = ((one[order[:kept]], one[order[kept:]]) for one in (x, y))
    if critic is None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
            critic = ConcatCritic(x.shape[1], y.shape[1]).to(x)
    measure = WassersteinDependency(
        nn.Identity(), nn.Identity(), critic=critic, lipschitz=lipschitz, lam=lam, objective="dual"
    )
    optimiser = torch.optim.Adam(measure.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        rows = torch.randint(kept, (batch_size,), generator=generator, device=generator.device).to(x.device)
        optimiser.zero_grad()
        measure(train_x[rows], train_y[rows], generator=generator).backward()
        optimiser.step()
        schedule.step()
    if not all(bool(weight.isfinite().all()) for weight in measure.parameters()):
        raise ValueError(f"the critic diverged: take a smaller learning_rate than {learning_rate:g}, or a larger lam")
    found = measure.diagnose(test_x, test_y, batch_size=min(batch_size, len(test_x)), generator=generator)
    return Dependency(
        unit * found.wasserstein, unit * found.conservative, found.info_nce, found.batch_size, found.gradient_norms,
        unit * found.joint_scores, unit * found.product_scores,
    )  # fmt: skip


def exact_wasserstein_dependency(x: Tensor, y: Tensor, p: Tensor | None = None) -> float:
    """W1(p(x, y), p(x) p(y)) of discrete data by linear programming, for the Euclidean metric on (x, y).

    Only the mass in which the two differ has to travel, from where there is too much to where there is too little.

    Args:
        x: Atoms, (n, ...).
        y: Atoms, (m, ...).
        p: Joint probabilities, (n, m); where None, x and y are n pairs of equal weight. The programme has up to
            (nm / 2)^2 unknowns.

    Raises:
        TypeError: Atoms or probabilities that are no tensors.
        ValueError: Shapes that do not fit, probabilities that are negative or do not add up to 1, or values not finite.

    Example:
        >>> x = torch.tensor([[-1.5], [1.5]])
        >>> round(exact_wasserstein_dependency(x, x, torch.eye(2) / 2), 6)
        1.5
    """
    _check_tensors(x, y, *(() if p is None else (p,)))
    if p is None:
        if len(x) != len(y):
            raise ValueError(f"without p, x and y are pairs, as many of each, got {len(x)} and {len(y)}")
        p = torch.eye(len(x), dtype=torch.float64) / len(x)
    joint = p.detach().cpu().double().numpy()
    if joint.shape != (len(x), len(y)) or not (joint >= 0).all() or abs(joint.sum() - 1) > 1e-6:
        raise ValueError(
            f"p holds probabilities for {len(x)} x {len(y)} atoms that add up to 1, got shape {joint.shape} and sum "
            f"{joint.sum():g}"
        )
    atoms = [one.detach().cpu().double().reshape(len(one), -1).numpy() for one in (x, y)]
    if not all(np.isfinite(one).all() for one in atoms):
        raise ValueError("atoms hold NaN or infinity")
    joint = joint / joint.sum()
    # Rounding leaves specks of mass that no plan has to move.
    excess = joint - np.outer(joint.sum(1), joint.sum(0))
    excess[np.abs(excess) < 1e-14] = 0
    sources, sinks = np.argwhere(excess > 0), np.argwhere(excess < 0)
    if not len(sources) or not len(sinks):
        return 0.0
    supply, demand = excess[excess > 0], -excess[excess < 0]
    cost = cdist(*(np.hstack([atoms[0][one[:, 0]], atoms[1][one[:, 1]]]) for one in (sources, sinks)))
    n, m = cost.shape
    column = np.arange(n * m)
    constraints = coo_array(
        (np.ones(2 * n * m), (np.r_[column // m, n + column % m], np.r_[column, column])), shape=(n + m, n * m)
    )
    # Scaled to 1, so that the solver's absolute tolerances mean the same for weak and strong dependence, and in any unit.
    mass, unit = supply.sum(), cost.max() or 1.0
    plan = linprog(
        cost.ravel() / unit, A_eq=constraints.tocsr(), b_eq=np.r_[supply / mass, demand / demand.sum()], method="highs"
    )
    if plan.status:
        raise RuntimeError(f"the linear programme did not solve: {plan.message}")
    return float(mass * unit * plan.fun)


def derangement(size: int, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation that leaves nothing in its place, (size,): one cycle through all.

    Raises:
        ValueError: Fewer than two to permute.

    Example:
        >>> bool((derangement(5) == torch.arange(5)).any())
        False
    """
    if size < 2:
        raise ValueError(f"a sample needs another one to be paired with, got {size} in all")
    order = torch.randperm(size, generator=generator, device=None if generator is None else generator.device)
    found = torch.empty_like(order)
    found[order] = order.roll(-1)
    return found


class _PatchBound(nn.Module):
    """Divides a normalised convolution kernel by the root of how many patches a pixel can lie in."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(patches)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def _bound_layers(model: nn.Module) -> None:
    """Make every layer 1-Lipschitz; refuse what may expand distances."""
    leaves = [module for module in model.modules() if not list(module.children())]
    for leaf in leaves:
        padded = isinstance(leaf, _CONVOLUTIONS) and leaf.padding_mode not in ("zeros", "circular")
        if padded or not isinstance(leaf, (nn.Linear, *_CONVOLUTIONS, *_NOT_EXPANDING)):
            raise ValueError(
                f"spectral bounds hold for linear layers, convolutions padded with zeros, and ReLU, Tanh, Sigmoid or "
                f"Softplus between them, got {leaf}: exchange it or use lipschitz='gp'"
            )
    for leaf in leaves:
        if isinstance(leaf, (nn.Linear, *_CONVOLUTIONS)):
            spectral_norm(leaf)
        if isinstance(leaf, _CONVOLUTIONS):
            patches = math.prod(math.ceil(k / s) for k, s in zip(leaf.kernel_size, leaf.stride, strict=True))
            parametrize.register_parametrization(leaf, "weight", _PatchBound(patches))


def _refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is {type(module).__name__}, with which a sample's score depends on the others', so its gradient "
                "cannot be penalised: use layer or group norm"
            )


@contextlib.contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Plain kernels: fused attention and cuDNN's recurrent networks have no second derivative."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn: Callable[..., Any] = torch.backends.cudnn.flags
    with sdpa_kernel(SDPBackend.MATH), cudnn(enabled=False) if recurrent else contextlib.nullcontext():
        yield


def _wide(values: Tensor) -> Tensor:
    """At least float32: sums in half precision keep two or three digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _onto_ball(codes: Tensor) -> Tensor:
    return codes / torch.linalg.vector_norm(codes, dim=1, keepdim=True).clamp_min(1)


def _check_tensors(*given: Tensor) -> None:
    for one in given:
        if not isinstance(one, Tensor) or not one.ndim:
            what = "a single number" if isinstance(one, Tensor) else type(one).__name__
            raise TypeError(f"samples are tensors of one sample a row, got {what}: torch.as_tensor makes one")


def _standardised(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[float, tuple[Tensor, Tensor]]:
    """The data's root mean squared size, and the flattened data centred and divided by it."""
    if len(x) != len(y):
        raise ValueError(f"x and y are pairs, as many of each, got {len(x)} and {len(y)}")
    for one in (x, y):
        if not one.is_floating_point():
            raise TypeError(f"{one.dtype} has no metric: embed discrete inputs as vectors first")
        if not len(one) or not bool(one.isfinite().all()):
            raise ValueError("inputs are empty or hold NaN or infinity: clean them before measuring dependence")
    if all(bool((one == one[0]).all()) for one in (x, y)):
        raise ValueError("both inputs are constant: there is nothing to depend on")
    # In float64, where it is: a large mean would take digits from what is near it.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    x, y = (one.detach().to(wide).flatten(1) for one in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    unit = math.sqrt(float((x.square().sum() + y.square().sum()) / len(x)))
    return unit, ((x / unit).to(dtype), (y / unit).to(dtype))
