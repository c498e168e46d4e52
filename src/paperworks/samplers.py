"""Markov chain Monte Carlo: many chains at once, for posteriors whose gradient is at hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chains:
    """What chains drew.

    Attributes:
        values: (chains, draws, d).
        acceptance: Mean acceptance probability after burn-in; 1 where nothing is rejected.
        step_size: Of the last step.
        clamped: Of SGHMC, in what share of weights and steps after burn-in no noise was left to add to the gradients'.
    """

    values: Tensor
    acceptance: float = 1.0
    step_size: float = math.nan
    clamped: float = 0.0

    @property
    def flat(self) -> Tensor:
        """All draws, (chains * draws, d)."""
        return self.values.flatten(0, 1)

    def r_hat(self) -> NDArray[np.float64]:
        """Rank-normalised split R-hat of each coordinate (d,), near 1 where chains agree; by arviz."""
        return self._told("rhat")

    def ess(self) -> NDArray[np.float64]:
        """Bulk effective sample size of each coordinate (d,); by arviz."""
        return self._told("ess")

    def _told(self, name: str) -> NDArray[np.float64]:
        from arviz_stats.base import array_stats

        found = getattr(array_stats, name)(self.values.detach().cpu().numpy(), chain_axis=0, draw_axis=1)
        return np.asarray(found, dtype=np.float64)


def hmc(
    log_density: LogDensity,
    start: Tensor,
    *,
    draws: int = 500,
    burn_in: int = 500,
    thin: int = 1,
    path_length: float = math.pi / 2,
    step_size: float = 0.02,
    most_leapfrogs: int = 200,
    target_acceptance: float = 0.8,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Chains:
    """Hamiltonian Monte Carlo with unit mass, all chains in step.

    The step size is found by dual averaging (arXiv 1111.4246) in burn-in, one for all chains, and fixed after it. Lengths of
    paths vary by a tenth, so that none is a whole period of the target.

    Args:
        log_density: Of positions (chains, d), the unnormalised log density of each (chains,), differentiable.
        start: (chains, d).
        draws: Kept of each chain.
        burn_in: Steps before, in which the step size is found; 0 keeps `step_size`.
        thin: Steps a draw.
        path_length: Time integrated in a step; pi / 2 brings a standard normal from anywhere to an independent place.
        step_size: Of a leapfrog, at first.
        most_leapfrogs: In a step; a path is shorter where it would want more.
        target_acceptance: What dual averaging aims at.
        generator: Of all that is random.
        progress: Called after each step.

    Raises:
        ValueError: A number out of range, a start that is not (chains, d), or one without a finite density.

    Example:
        >>> normal = lambda x: -x.square().sum(1) / 2
        >>> generator = torch.Generator().manual_seed(0)
        >>> chains = hmc(normal, torch.zeros(4, 2), draws=200, burn_in=200, generator=generator)
        >>> chains.values.shape, bool(abs(chains.flat.var() - 1) < 0.2)
        (torch.Size([4, 200, 2]), True)
    """
    _check(start, draws=draws, burn_in=burn_in, thin=thin)
    for name, value in (("path_length", path_length), ("step_size", step_size), ("most_leapfrogs", most_leapfrogs)):
        if not 0 < value < math.inf or (name == "most_leapfrogs" and not isinstance(value, Integral)):
            raise ValueError(f"{name} is a {'whole ' * (name == 'most_leapfrogs')}number above 0, got {value}")
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance is between 0 and 1, got {target_acceptance}")
    position = start.detach().clone()
    density, slope = _slope(log_density, position)
    if not bool(density.isfinite().all()):
        raise ValueError("the log density is not finite where the chains start: start them where it is")
    first_size, averaged, error = step_size, 0.0, 0.0
    accepted, kept = [], []
    for step in range(burn_in + draws * thin):
        # As many leapfrogs as bring it that far, and a little more or less.
        share = 0.9 + 0.2 * float(torch.rand((), generator=generator, device=position.device))
        count = min(most_leapfrogs, max(1, math.ceil(share * path_length / step_size)))
        momentum = torch.randn(position.shape, generator=generator, dtype=position.dtype, device=position.device)
        moved, pushed, new_density, new_slope = _leapfrogs(log_density, position, momentum, slope, step_size, count)
        log_ratio = new_density - density + (momentum.square() - pushed.square()).sum(1) / 2
        # A path that left what numbers hold is no proposal.
        probability = torch.nan_to_num(log_ratio, nan=-math.inf).clamp(max=0).exp()
        chance = torch.rand(len(position), generator=generator, dtype=position.dtype, device=position.device)
        taken = chance < probability
        position = torch.where(taken[:, None], moved, position)
        slope = torch.where(taken[:, None], new_slope, slope)
        density = torch.where(taken, new_density, density)
        if step < burn_in:
            error += (target_acceptance - float(probability.mean()) - error) / (step + 11)
            log_step = math.log(10 * first_size) - math.sqrt(step + 1) / 0.05 * error
            averaged += (step + 1) ** -0.75 * (log_step - averaged)
            step_size = math.exp(log_step if step + 1 < burn_in else averaged)
        else:
            accepted.append(float(probability.mean()))
            if (step - burn_in + 1) % thin == 0:
                kept.append(position)
        progress()
    return Chains(torch.stack(kept, dim=1), float(np.mean(accepted)), step_size)


def _leapfrogs(
    log_density: LogDensity, position: Tensor, momentum: Tensor, slope: Tensor, step_size: float, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, momentum, log density and its slope at the end of a path."""
    momentum = momentum + step_size / 2 * slope
    for left in reversed(range(count)):
        position = position + step_size * momentum
        density, slope = _slope(log_density, position)
        momentum = momentum + (step_size if left else step_size / 2) * slope
    return position, momentum, density, slope


def _slope(log_density: LogDensity, position: Tensor) -> tuple[Tensor, Tensor]:
    position = position.detach().requires_grad_()
    with torch.enable_grad():
        density = log_density(position)
        if density.shape != position.shape[:1]:
            raise ValueError(
                f"log_density gives one number a chain, ({len(position)},), and gave {tuple(density.shape)}"
            )
        (slope,) = torch.autograd.grad(density.sum(), position)
    return density.detach(), slope


def sghmc(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    draws: int = 30,
    burn_in: int = 2000,
    thin: int = 2000,
    lr: float = 0.01,
    momentum_decay: float = 0.05,
    generator: torch.Generator | None = None,
    between: Callable[[int, Tensor], object] = lambda step, position: None,
    progress: Callable[[], object] = lambda: None,
) -> Chains:
    """Stochastic gradient Hamiltonian Monte Carlo that adapts to each weight in burn-in, all chains in step.

    Of each weight moving averages of the gradient and its square are kept in burn-in (arXiv 1506.04696, in the form that
    BOHAMIANN has); 1 / sqrt of the second is its inverse mass, fixed afterwards. Nothing is rejected: the smaller `lr`, the
    less its draws differ from the posterior's, and the further apart they have to be.

    Args:
        gradient: Of positions (chains, d), an unbiased estimate (chains, d) of the gradient of minus the log posterior of
            all data; a minibatch's likelihood is counted N / B times.
        start: (chains, d).
        draws: Kept of each chain.
        burn_in: Steps before.
        thin: Steps a draw.
        lr: Step size.
        momentum_decay: Friction a step, above 0 and at most 1.
        generator: Of the noise.
        between: Called with the number of each step and the positions before it, to draw hyper-parameters anew, say.
        progress: Called after each step.

    Raises:
        ValueError: A number out of range, or a start that is not (chains, d).
        FloatingPointError: A chain diverged.

    Warns:
        RuntimeWarning: In more than a tenth of all weights and steps after burn-in there is no noise left to add: draws are
            then spread by what minibatches happen to add. A smaller `lr` or more `momentum_decay` helps.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> chains = sghmc(lambda x: x, torch.zeros(32, 1), draws=100, burn_in=500, thin=20, lr=0.03, generator=generator)
        >>> bool(abs(chains.flat.var() - 1) < 0.2)
        True
    """
    _check(start, draws=draws, burn_in=burn_in, thin=thin)
    if not lr > 0 or not 0 < momentum_decay <= 1:
        raise ValueError(f"lr is above 0 and momentum_decay above 0 and at most 1, got {lr} and {momentum_decay}")
    position, momentum = start.detach().clone(), torch.zeros_like(start)
    window, mean, square, inverse_mass = (torch.ones_like(start) for _ in range(4))
    clamped, kept = 0.0, []
    for step in range(burn_in + draws * thin):
        between(step, position)
        slope = gradient(position).detach()
        if slope.shape != position.shape:
            raise ValueError(
                f"gradient gives {tuple(position.shape)}, as the positions are, and gave {tuple(slope.shape)}"
            )
        if step < burn_in:
            window += 1 - window * mean.square() / square
            mean += (slope - mean) / (window + 1)
            square += (slope.square() - square) / (window + 1)
            inverse_mass = square.clamp_min(1e-16).rsqrt()
        variance = 2 * lr**2 * momentum_decay * inverse_mass - lr**4
        if step >= burn_in:
            clamped += float((variance <= 0).double().mean())
        noise = torch.randn(position.shape, generator=generator, dtype=position.dtype, device=position.device)
        momentum = (1 - momentum_decay) * momentum - lr**2 * inverse_mass * slope
        momentum += variance.clamp_min(0).sqrt() * noise
        position = position + momentum
        if not bool(position.isfinite().all()):
            raise FloatingPointError(f"a chain diverged at step {step}: take a smaller lr than {lr}")
        if step >= burn_in and (step - burn_in + 1) % thin == 0:
            kept.append(position)
        progress()
    share = clamped / (draws * thin)
    if share > 0.1:
        warnings.warn(
            f"in {share:.0%} of weights and steps the gradients' noise left none to add, so that the draws are spread by "
            "minibatches alone: take a smaller lr or a larger momentum_decay",
            RuntimeWarning,
            stacklevel=2,
        )
    return Chains(torch.stack(kept, dim=1), step_size=lr, clamped=share)


def nuts(
    log_density: LogDensity,
    start: Tensor,
    *,
    draws: int = 500,
    burn_in: int = 500,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> Chains:
    """The No-U-Turn sampler of Pyro, one chain after another: the reference, and no match in speed for `hmc` in many chains.

    Args:
        log_density: As for `hmc`.
        start: (chains, d).
        draws: Kept of each chain.
        burn_in: Steps before, in which step size and masses are found.
        target_acceptance: What the step size aims at.
        seed: Of Pyro's random numbers; the process's are left as they were.

    Raises:
        ValueError: As for `hmc`.
    """
    import random

    import pyro
    from pyro.infer.mcmc import MCMC, NUTS

    _check(start, draws=draws, burn_in=burn_in, thin=1)
    if not bool(_slope(log_density, start)[0].isfinite().all()):
        raise ValueError("the log density is not finite where the chains start: start them where it is")

    def potential(places: dict[str, Tensor]) -> Tensor:
        return -log_density(places["x"][None])[0]

    found: list[Tensor] = []
    # Pyro seeds all of the process's random numbers.
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        pyro.set_rng_seed(seed)
        for place in start:
            kernel: Any = NUTS(potential_fn=potential, target_accept_prob=target_acceptance)
            run: Any = MCMC(
                kernel, num_samples=draws, warmup_steps=burn_in, initial_params={"x": place}, disable_progbar=True
            )
            run.run()
            found.append(run.get_samples()["x"])
    random.setstate(others[0])
    np.random.set_state(others[1])
    return Chains(torch.stack(found))


def _check(start: Tensor, *, draws: int, burn_in: int, thin: int) -> None:
    if start.ndim != 2 or not start.numel() or not start.is_floating_point():
        raise ValueError(
            f"chains start from floating-point numbers (chains, d), got {tuple(start.shape)} of {start.dtype}"
        )
    for name, value, least in (("draws", draws, 1), ("burn_in", burn_in, 0), ("thin", thin, 1)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is a whole number of at least {least}, got {value}")
