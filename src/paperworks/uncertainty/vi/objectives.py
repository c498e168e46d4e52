"""Objectives of variational inference, each to be maximised; written as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paperworks.uncertainty.vi.estimator import Estimator, expectation
from paperworks.uncertainty.vi.programs import (
    SIR,
    Choices,
    Density,
    Marginal,
    Normalize,
    Observed,
    Program,
    Trace,
    log_density,
    replicate,
    simulate,
)
from paperworks.uncertainty.vi.strategies import Reinforce, Strategy


def elbo(
    model: Density,
    guide: Density,
    data: Choices,
    *,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """The evidence lower bound E_q[log p(x, y) - log q(x)].

    Args:
        model: A program of latent choices x and data y.
        guide: A program of the latent choices; or a `Marginal` or `Normalize` of one, which gives a lower bound still.
        data: Values of y by name.
        model_args: Arguments of the model.
        guide_args: Arguments of the guide.

    Example:
        >>> from torch.distributions import Normal
        >>> from paperworks.uncertainty.vi import program, sample
        >>> @program
        ... def model():
        ...     x = sample("x", Normal(0.0, 1.0))
        ...     sample("y", Normal(x, 1.0))
        >>> @program
        ... def guide(mean, scale):
        ...     sample("x", Normal(mean, scale))
        >>> exact = torch.tensor(0.5), torch.tensor(0.5).sqrt()
        >>> round(elbo(model, guide, {"y": 1.0}, guide_args=exact).value().item(), 4)
        -1.5155
    """
    return expectation(_log_weight)(model, guide, data, model_args, guide_args)


def iwelbo(
    model: Density,
    guide: Density,
    data: Choices,
    particles: int,
    *,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """The importance weighted bound E[log (1/N) sum_i p(x_i, y) / q(x_i)] (arXiv 1509.00519).

    Args:
        model: As for `elbo`.
        guide: As for `elbo`.
        data: As for `elbo`.
        particles: N; one is the `elbo`.
        model_args: As for `elbo`.
        guide_args: As for `elbo`.
    """

    @expectation
    def bound(*args: Any) -> Tensor:
        with replicate(particles) as plate:
            return plate.log_mean_exp(_log_weight(*args))

    return bound(model, guide, data, model_args, guide_args)


def hvi_elbo(
    model: Density,
    guide: Program,
    keep: Sequence[str],
    data: Choices,
    *,
    proposal: Density | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """The bound of hierarchical variational inference: the `elbo` of a guide with choices of its own summed out by one.

    Args:
        model: As for `elbo`.
        guide: A program of the latent choices and others.
        keep: Names of the latent choices.
        data: As for `elbo`.
        proposal: Of the guide's other choices, see `SIR`.
        model_args: As for `elbo`.
        guide_args: As for `elbo`.
    """
    return iwhvi(model, guide, keep, data, 1, proposal=proposal, model_args=model_args, guide_args=guide_args)


def iwhvi(
    model: Density,
    guide: Program,
    keep: Sequence[str],
    data: Choices,
    inner: int,
    *,
    proposal: Density | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """`hvi_elbo` with `inner` proposals to sum the guide's own choices out (importance weighted HVI)."""
    marginal = Marginal(guide, keep, SIR(inner, proposal))
    return elbo(model, marginal, data, model_args=model_args, guide_args=guide_args)


def diwhvi(
    model: Density,
    guide: Program,
    keep: Sequence[str],
    data: Choices,
    particles: int,
    inner: int,
    *,
    proposal: Density | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """`iwelbo` of so many particles with the guide of `iwhvi` (doubly importance weighted HVI)."""
    marginal = Marginal(guide, keep, SIR(inner, proposal))
    return iwelbo(model, marginal, data, particles, model_args=model_args, guide_args=guide_args)


def q_wake(
    model: Program,
    guide: Density,
    data: Choices,
    particles: int,
    *,
    proposal: Density | None = None,
    index: Strategy | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """What trains a guide on the posterior: E[log q(x)], x of the posterior by SIR of so many particles.

    Args:
        model: As for `elbo`, a program.
        guide: As for `elbo`.
        data: As for `elbo`.
        particles: N.
        proposal: Of the sampler, see `SIR`; by default the guide.
        index: None holds the sampler fixed, as reweighted wake-sleep does, so that the gradient is that of log q(x) alone. A strategy,
            `Reinforce()` or `Enum()`, lets the gradient through the particles and the one chosen.
        model_args: As for `elbo`.
        guide_args: As for `elbo`.
    """

    @expectation
    def objective(*args: Any) -> Tensor:
        x = _of_posterior(model, guide, data, particles, proposal, index, model_args, guide_args)
        return log_density(guide, x.choices, guide_args)

    return objective(model, guide, data, model_args, guide_args)


def p_wake(
    model: Program,
    guide: Density,
    data: Choices,
    particles: int,
    *,
    proposal: Density | None = None,
    index: Strategy | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """What trains a model on the posterior: E[log p(x, y)], x as for `q_wake`."""

    @expectation
    def objective(*args: Any) -> Tensor:
        x = _of_posterior(model, guide, data, particles, proposal, index, model_args, guide_args)
        return log_density(model, Observed(data, x.choices), model_args)

    return objective(model, guide, data, model_args, guide_args)


def symmetric(
    model: Program,
    guide: Density,
    data: Choices,
    particles: int,
    *,
    proposal: Density | None = None,
    index: Strategy | None = None,
    model_args: Sequence[Any] = (),
    guide_args: Sequence[Any] = (),
) -> Estimator:
    """Minus the symmetric divergence KL(q || p) + KL(p || q) of guide and posterior, the latter by SIR as for `q_wake`.

    It is elbo + E[log q(x) - log p(x, y)]: the evidence cancels.
    """

    @expectation
    def objective(*args: Any) -> Tensor:
        x = _of_posterior(model, guide, data, particles, proposal, index, model_args, guide_args)
        reverse = log_density(guide, x.choices, guide_args) - log_density(model, Observed(data, x.choices), model_args)
        return _log_weight(*args) + reverse

    return objective(model, guide, data, model_args, guide_args)


def _log_weight(
    model: Density, guide: Density, data: Choices, model_args: Sequence[Any], guide_args: Sequence[Any]
) -> Tensor:
    """The log weight log p(x, y) - log q(x) at an x of the guide."""
    x = simulate(guide, guide_args)
    return log_density(model, Observed(data, x.choices), model_args) - x.log_density


def _of_posterior(
    model: Program,
    guide: Density,
    data: Choices,
    particles: int,
    proposal: Density | None,
    index: Strategy | None,
    model_args: Sequence[Any],
    guide_args: Sequence[Any],
) -> Trace:
    proposed = _Applied(guide, tuple(guide_args)) if proposal is None else proposal
    posterior = Normalize(model, data, SIR(particles, proposed, Reinforce() if index is None else index))
    with torch.set_grad_enabled(index is not None and torch.is_grad_enabled()):
        return simulate(posterior, model_args)


@dataclass(frozen=True)
class _Applied(Density):
    """A guide as a proposal: it has arguments of its own."""

    density: Density
    args: tuple[Any, ...]

    def random_weighted(self, args: Sequence[Any]) -> Trace:
        return self.density.random_weighted(self.args)

    def estimate_logpdf(self, choices: Mapping[str, Any], args: Sequence[Any]) -> Tensor:
        return self.density.estimate_logpdf(choices, self.args)
