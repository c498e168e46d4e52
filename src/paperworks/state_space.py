"""Gaussian processes over time in state-space form: exact inference in time linear in the number of times."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

Kernel = Literal["matern12", "matern32"]


class StateSpaceGP:
    """A Gaussian process f(t) with a Matern kernel, as a linear stochastic differential equation of state (f, f', ...).

    At times t_1 <= ... <= t_T its states are a Markov chain, x_{i+1} = A x_i + N(0, Q) with x_1 ~ N(0, P), so that exact
    regression costs O(T) and not O(T^3). Filter and smoother run as a parallel scan (arXiv 1905.13002): some log2 T levels,
    each for all times at once. No matrix is inverted that may be singular, so that times may lie as close together as they
    like, or be the same.

    Args:
        kernel: "matern12" (nu = 1/2, continuous paths) or "matern32" (nu = 3/2, paths with a derivative).
        lengthscale: Above 0, in the unit of t; a tensor of no dimensions is differentiated through.
        variance: Of f(t), above 0; a tensor of no dimensions is differentiated through.

    Attributes:
        order: Size s of the state, 1 or 2.

    Raises:
        ValueError: An unknown kernel, or a lengthscale or variance that is not above 0.

    Example:
        >>> gp = StateSpaceGP("matern32", lengthscale=0.3)
        >>> t, y = torch.tensor([0, 0.1, 0.35, 0.6, 1]), torch.tensor([0.5, -0.2, 1, 0.3, -0.7])
        >>> mean, variance = gp.smooth(t, y, noise=0.05, at=torch.tensor([0.45, -0.2]))
        >>> [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in variance.tolist()]
        ([0.8228, 0.4793], [0.1281, 0.5342])
        >>> round(float(gp.log_marginal(t, y, noise=0.05)), 4)
        -5.9663
    """

    def __init__(
        self, kernel: Kernel = "matern32", lengthscale: float | Tensor = 1.0, variance: float | Tensor = 1.0
    ) -> None:
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel is one of {', '.join(get_args(Kernel))}, got {kernel!r}")
        for name, value in (("lengthscale", lengthscale), ("variance", variance)):
            if not 0 < float(torch.as_tensor(value).detach()) < math.inf:
                raise ValueError(f"{name} is a number above 0, got {float(value)}")
        self.kernel = kernel
        self.order = 1 if kernel == "matern12" else 2
        self.lengthscale = torch.as_tensor(lengthscale, dtype=torch.float64)
        self.variance = torch.as_tensor(variance, dtype=torch.float64)

    def stationary(self) -> Tensor:
        """Covariance P of the state at any one time, (s, s)."""
        if self.order == 1:
            return self.variance.reshape(1, 1)
        return torch.stack([self.variance, 3 * self.variance / self.lengthscale.square()]).diag()

    def transition(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """A and Q = P - A P A^T, each (..., s, s), over steps of time (...) that are not negative.

        Q is right to its last digits however small a step is, because nothing is subtracted: it is written by the incomplete
        gamma function, P(3, 2 x) = 1 - e^{-2x} (1 + 2x + 2x^2).
        """
        step = torch.as_tensor(step, dtype=torch.float64)
        if self.order == 1:
            ratio = step / self.lengthscale
            return (-ratio).exp()[..., None, None], (-self.variance * torch.expm1(-2 * ratio))[..., None, None]
        rate = math.sqrt(3) / self.lengthscale
        x = rate * step
        A = torch.stack([1 + x, step, -rate.square() * step, 1 - x], dim=-1) * (-x).exp()[..., None]
        decayed = (-2 * x).exp()
        lost = torch.special.gammainc(torch.full_like(x, 3.0), 2 * x)
        cross = 2 * rate * x.square() * decayed
        Q = torch.stack([lost, cross, cross, rate.square() * (lost + 4 * x * decayed)], dim=-1) * self.variance
        return A.unflatten(-1, (2, 2)), Q.unflatten(-1, (2, 2))

    def posterior(self, t: Tensor, precision: Tensor, shift: Tensor) -> StateSpacePosterior:
        """R independent processes u(t), given a factor exp(shift^T u - u^T precision u / 2) at each time.

        Such factors are observations in information form: y = H u + noise of variance v is precision = H^T H / v and shift =
        H^T y / v. They may couple the processes, and may be singular or zero.

        Args:
            t: Times (T,), ascending, the same ones allowed.
            precision: (..., T, R, R), symmetric and positive semi-definite.
            shift: (..., T, R).

        Raises:
            ValueError: Times that are not ascending or not finite, or shapes that do not fit.
        """
        t = _ascending(t)
        if shift.ndim < 2 or shift.shape[-2] != len(t) or precision.shape != (*shift.shape, shift.shape[-1]):
            raise ValueError(
                f"for {len(t)} times shift is (..., {len(t)}, R) and precision (..., {len(t)}, R, R), got "
                f"{tuple(shift.shape)} and {tuple(precision.shape)}"
            )
        return StateSpacePosterior(self, t, precision.double(), shift.double())

    def filter(self, t: Tensor, y: Tensor, noise: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (..., T), of f at each time given the observations up to and with it.

        Args:
            t: Times (T,), ascending.
            y: Observations (..., T).
            noise: Their variance, above 0, a number or (..., T).

        Raises:
            ValueError: As for `posterior`, values that are not finite, or a variance that is not above 0.
        """
        found = self._observed(t, y, noise)
        mean, cov = found.filtered
        return mean[..., 0], cov[..., 0, 0]

    def smooth(self, t: Tensor, y: Tensor, noise: float | Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of f given all observations: Gaussian process regression.

        Args:
            t: Times (T,), ascending.
            y: Observations (..., T).
            noise: Their variance, above 0, a number or (..., T).
            at: Times (M,) in any order; those observed by default.

        Returns:
            Both (..., M).

        Raises:
            ValueError: As for `filter`.
        """
        found = self._observed(t, y, noise)
        mean, cov = (found.mean, found.cov) if at is None else found.at(at)
        return mean[..., 0], cov[..., 0, 0]

    def log_marginal(self, t: Tensor, y: Tensor, noise: float | Tensor) -> Tensor:
        """Log density (...) of the observations, in nats; differentiable in kernel, noise and y.

        Args:
            t: Times (T,), ascending.
            y: Observations (..., T).
            noise: Their variance, above 0, a number or (..., T).

        Raises:
            ValueError: As for `filter`.
        """
        found = self._observed(t, y, noise)
        y, variance = _numbers(y, noise)
        return found.log_normalizer - ((2 * math.pi * variance).log() + y.square() / variance).sum(-1) / 2

    def sample(self, t: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Paths f(t) drawn from the prior, (n, T), at times (T,) that ascend.

        Raises:
            ValueError: Times that are not ascending or not finite, or no paths.
        """
        if n < 1:
            raise ValueError(f"n is a number of paths, at least 1, got {n}")
        t = _ascending(t)
        A, Q = self.transition(t.diff())
        # What comes in before each time: at the first the stationary state itself.
        roots = _root(torch.cat([self.stationary()[None], Q]))
        drawn = roots @ torch.randn(n, len(t), self.order, 1, generator=generator, dtype=torch.float64)
        nothing, column = drawn.new_zeros(n, len(t), self.order, self.order), torch.zeros_like(drawn)
        chain = _Elements(A.expand(n, *A.shape), drawn[:, 1:], nothing[:, 1:], column[:, 1:], nothing[:, 1:])
        states, _ = _scan(chain, _State(drawn[:, :1], nothing[:, :1]), _Message(column[:, :1], nothing[:, :1]))
        return states.mean[..., 0, 0]

    def _observed(self, t: Tensor, y: Tensor, noise: float | Tensor) -> StateSpacePosterior:
        y, variance = _numbers(y, noise)
        if not bool(y.isfinite().all()) or not bool((variance > 0).all() and variance.isfinite().all()):
            raise ValueError("observations are finite numbers, and the variance of their noise is above 0")
        return self.posterior(t, (1 / variance)[..., None, None], (y / variance)[..., None])


class StateSpacePosterior:
    """R processes u(t) given factors at T times; made by `StateSpaceGP.posterior`.

    Attributes:
        gp: The prior of each process.
        times: (T,).
        mean: Of u at these times given all factors, (..., T, R).
        cov: (..., T, R, R).
        log_normalizer: Log of the factors' expected product under the prior, (...).
        kl: Kullback-Leibler divergence of all u(t) from the prior, (...), in nats.
    """

    def __init__(self, gp: StateSpaceGP, t: Tensor, precision: Tensor, shift: Tensor) -> None:
        self.gp, self.times, self._precision, self._shift = gp, t, precision, shift[..., None]
        R, D = shift.shape[-1], gp.order * shift.shape[-1]
        self._seen = _Message(_padded(self._shift, D, 1), _padded(precision, D, D))
        A, Q = (_stacked(part, R).expand(*shift.shape[:-2], len(t) - 1, D, D) for part in gp.transition(t.diff()))
        chain = _Elements(A, A.new_zeros(*A.shape[:-1], 1), Q, *_parts(self._seen, 0, -1))
        first = _stacked(gp.stationary()[None], R).expand(*shift.shape[:-2], 1, D, D)
        before, end = _State(first.new_zeros(*first.shape[:-1], 1), first), _parts(self._seen, -1)
        self._predicted, self._to_come = _scan(chain, before, end)
        self._before = before
        known = _given(self._predicted, self._to_come)
        self.mean, self.cov = known.mean[..., :R, 0], known.cov[..., :R, :R]

    @cached_property
    def log_normalizer(self) -> Tensor:
        """Log of the factors' expected product under the prior, (...)."""
        R = self.mean.shape[-1]
        m, P = self._predicted.mean[..., :R, :], self._predicted.cov[..., :R, :R]
        left = self._shift - self._precision @ m
        gain = torch.eye(R, dtype=P.dtype) + P @ self._precision
        solved = torch.linalg.solve(gain, P @ left)
        plain = m.mT @ (self._shift + left) + left.mT @ solved
        return (plain[..., 0, 0] - torch.linalg.slogdet(gain).logabsdet).sum(-1) / 2

    @cached_property
    def kl(self) -> Tensor:
        """Kullback-Leibler divergence of all u(t) from the prior, (...), in nats."""
        mean = self.mean[..., None]
        expected = (self._shift.mT @ mean)[..., 0, 0] - (self._precision * (self.cov + mean @ mean.mT)).sum(
            (-2, -1)
        ) / 2
        return expected.sum(-1) - self.log_normalizer

    @cached_property
    def filtered(self) -> tuple[Tensor, Tensor]:
        """Mean (..., T, R) and covariance (..., T, R, R) of u at each time given the factors up to and with it."""
        R = self.mean.shape[-1]
        return self._past.mean[..., :R, 0], self._past.cov[..., :R, :R]

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., M, R) and covariance (..., M, R, R) of u at any times (M,), in any order, given all factors.

        The state before a time is brought forward to it and what later factors say back to it, which is exact between the
        times with factors, before and after them.

        Raises:
            ValueError: Times that are not finite.
        """
        t = _finite(t).contiguous()
        R, last = self.mean.shape[-1], len(self.times) - 1
        after = torch.searchsorted(self.times, t, right=True)
        # Before the first time the stationary state is what is known, and after the last nothing is to come.
        nothing = _Message(*map(torch.zeros_like, _parts(self._seen, -1)))
        states, messages = _joined(self._before, self._past), _joined(self._to_come, nothing)
        since, until = t - self.times[(after - 1).clamp(min=0)], self.times[after.clamp(max=last)] - t
        there = _forward(_State(*(part[..., after, :, :] for part in states)), self._stretch(since.clamp(min=0)))
        back = _backward(self._stretch(until.clamp(min=0)), _Message(*(part[..., after, :, :] for part in messages)))
        known = _given(there, back)
        return known.mean[..., :R, 0], known.cov[..., :R, :R]

    @cached_property
    def _past(self) -> _State:
        """The state at each time given the factors up to and with it."""
        return _given(self._predicted, self._seen)

    def _stretch(self, step: Tensor) -> _Elements:
        """Steps of time without factors."""
        A, Q = (_stacked(part, self.mean.shape[-1]) for part in self.gp.transition(step))
        column = A.new_zeros(*A.shape[:-1], 1)
        return _Elements(A, column, Q, column, torch.zeros_like(A))


class _State(NamedTuple):
    """What is known of a state from before it: its mean (..., D, 1) and covariance (..., D, D)."""

    mean: Tensor
    cov: Tensor


class _Message(NamedTuple):
    """What is known of a state x from it and after it: exp(shift^T x - x^T precision x / 2), (..., D, 1) and (..., D, D)."""

    shift: Tensor
    precision: Tensor


class _Elements(NamedTuple):
    """A stretch of the chain from state x to state z: its factors and p(z | x, factors).

    p(z | x, factors) = N(transition x + offset, noise), and p(factors | x) is proportional to exp(shift^T x - x^T precision
    x / 2).
    """

    transition: Tensor
    offset: Tensor
    noise: Tensor
    shift: Tensor
    precision: Tensor


_Any = TypeVar("_Any", _State, _Message, _Elements)


def _scan(chain: _Elements, before: _State, end: _Message) -> tuple[_State, _Message]:
    """What is known of each of n + 1 states from before it, and from it on, given the n stretches between them.

    Neighbours are put together until one stretch is left, and what is known at its ends is then carried to the states in
    between, level by level.
    """
    length = chain.shift.shape[-3]
    if length == 0:
        return before, end
    if length == 1:
        return _joined(before, _forward(before, chain)), _joined(_backward(chain, end), end)
    pairs, left = divmod(length, 2)
    first, second = _parts(chain, 0, 2 * pairs, 2), _parts(chain, 1, 2 * pairs, 2)
    halved = _composed(first, second)
    states, messages = _scan(_joined(halved, _parts(chain, -1)) if left else halved, before, end)
    between = _forward(_parts(states, 0, pairs), first)
    after = _backward(second, _parts(messages, 1, 1 + pairs))
    return _interleaved(states, between), _interleaved(messages, after)


def _composed(first: _Elements, second: _Elements) -> _Elements:
    """Two stretches as one."""
    S = _damped(first.noise, second.precision)
    A = second.transition @ S
    back = S @ first.transition
    JX = second.precision @ back
    return _Elements(
        A @ first.transition,
        A @ (first.offset + first.noise @ second.shift) + second.offset,
        A @ first.noise @ second.transition.mT + second.noise,
        back.mT @ (second.shift - second.precision @ first.offset) + first.shift,
        first.transition.mT @ JX + first.precision,
    )


def _forward(state: _State, stretch: _Elements) -> _State:
    """The state after a stretch, from what is known of the one before it."""
    known = _given(state, _Message(stretch.shift, stretch.precision))
    return _State(
        stretch.transition @ known.mean + stretch.offset,
        stretch.transition @ known.cov @ stretch.transition.mT + stretch.noise,
    )


def _backward(stretch: _Elements, message: _Message) -> _Message:
    """What is known of the state before a stretch, from what is known of the one after it."""
    back = _damped(stretch.noise, message.precision) @ stretch.transition
    return _Message(
        back.mT @ (message.shift - message.precision @ stretch.offset) + stretch.shift,
        stretch.transition.mT @ message.precision @ back + stretch.precision,
    )


def _given(state: _State, message: _Message) -> _State:
    """The state given a message."""
    S = _damped(state.cov, message.precision)
    return _State(S @ (state.mean + state.cov @ message.shift), S @ state.cov)


def _damped(cov: Tensor, precision: Tensor) -> Tensor:
    """(I + cov precision)^-1, whose eigenvalues lie in (0, 1], so that it is there for singular factors too."""
    product = cov @ precision
    product.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.inv_ex(product)[0]


def _parts(these: _Any, start: int, stop: int | None = None, step: int = 1) -> _Any:
    """Those of a chain from `start` to `stop`."""
    return type(these)(*(part[..., start:stop:step, :, :] for part in these))


def _joined(these: _Any, those: _Any) -> _Any:
    return type(these)(*(torch.cat(parts, dim=-3) for parts in zip(these, those, strict=True)))


def _interleaved(evens: _Any, odds: _Any) -> _Any:
    """The first of `evens`, the first of `odds`, and so on; what is left of `evens` comes last."""
    pairs = odds[0].shape[-3]
    together = type(evens)(
        *(torch.stack(parts, dim=-3).flatten(-4, -3) for parts in zip(_parts(evens, 0, pairs), odds, strict=True))
    )
    return _joined(together, _parts(evens, pairs))


def _stacked(part: Tensor, R: int) -> Tensor:
    """Of the states of R processes, their values first: matrices (..., s, s) as (..., s R, s R)."""
    return (part[..., :, None, :, None] * torch.eye(R, dtype=part.dtype)[:, None]).flatten(-4, -3).flatten(-2)


def _padded(part: Tensor, rows: int, columns: int) -> Tensor:
    """Matrices with zeros below and beside them."""
    return torch.nn.functional.pad(part, (0, columns - part.shape[-1], 0, rows - part.shape[-2]))


def _root(cov: Tensor) -> Tensor:
    """Lower Cholesky factors of (..., s, s) with s = 1 or 2, which may be zero."""
    first = cov[..., 0, 0].sqrt()
    if cov.shape[-1] == 1:
        return first[..., None, None]
    below = torch.where(first > 0, cov[..., 1, 0] / first, 0.0)
    second = (cov[..., 1, 1] - below.square()).clamp(min=0).sqrt()
    return torch.stack([first, torch.zeros_like(first), below, second], dim=-1).unflatten(-1, (2, 2))


def _finite(t: Tensor) -> Tensor:
    t = torch.as_tensor(t, dtype=torch.float64)
    if t.ndim != 1 or not len(t) or not bool(t.isfinite().all()):
        raise ValueError(f"times are finite numbers (T,), at least one, got shape {tuple(t.shape)}")
    return t


def _ascending(t: Tensor) -> Tensor:
    t = _finite(t)
    if not bool((t.diff() >= 0).all()):
        raise ValueError("times ascend: sort them, and what is observed with them")
    return t


def _numbers(y: Tensor, noise: float | Tensor) -> tuple[Tensor, Tensor]:
    y, variance = torch.broadcast_tensors(
        torch.as_tensor(y, dtype=torch.float64), torch.as_tensor(noise, dtype=torch.float64)
    )
    return y, variance
