"""Programs that make named choices, what can be asked of them, and programs made of others by approximate inference."""

from __future__ import annotations

import functools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from paperworks.uncertainty.vi.execution import (
    Execution,
    Plate,
    check_fits,
    current,
    executing,
    run_shape,
    under_way,
)
from paperworks.uncertainty.vi.strategies import Reinforce, Strategy, checked, plain

Choices = Mapping[str, Any]


class Observed(dict[str, Any]):
    """Values of choices, some of which are data: these have no dimension but those of the batch and their event's."""

    def __init__(self, data: Choices, others: Choices | None = None) -> None:
        super().__init__({**(others or {}), **data})
        self.data = frozenset(data)
        if both := self.data & set(others or ()):
            raise ValueError(
                f"{', '.join(sorted(both))} is data, and what draws the other choices makes it too: leave it out of one of both"
            )


@dataclass(frozen=True)
class Trace:
    """What a program did.

    Attributes:
        choices: Value of each choice by name, (*runs, *event).
        log_density: Of all choices together, or an estimate of it, (*runs).
        log_densities: Of each choice given those before it; empty where only all together have one.
        event_dims: How many of the last dimensions of each choice are of its event.
        result: What the program returned.
    """

    choices: dict[str, Tensor]
    log_density: Tensor
    log_densities: Mapping[str, Tensor]
    event_dims: Mapping[str, int]
    result: Any = None


class Density(ABC):
    """Something to draw from with a density, exact or estimated: a `Program`, a `Marginal` or a `Normalize`."""

    @abstractmethod
    def random_weighted(self, args: Sequence[Any]) -> Trace:
        """Draw; exp(-log_density) is unbiased for the reciprocal of the density of what was drawn."""

    @abstractmethod
    def estimate_logpdf(self, choices: Choices, args: Sequence[Any]) -> Tensor:
        """A number of which exp is unbiased for the density of given choices, (*runs)."""


class Program(Density):
    """A Python function that makes named choices by `sample`; made by the decorator `program`.

    Called within another program or an objective, it runs as if its body stood there.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Run the body as part of what is running."""
        return self.function(*args)

    def trace(self, args: Sequence[Any], given: Choices, *, complete: bool = False) -> Trace:
        """Run with some choices given, the others drawn; `complete` where all are to be given."""
        execution, tracer = current("a program"), _Tracer(given, complete)
        with execution.taking(tracer.sample, execution.names):
            result = self.function(*args)
        if unused := set(given) - set(tracer.choices):
            raise ValueError(
                f"the program makes no choice named {', '.join(sorted(unused))}: it makes {', '.join(tracer.choices) or 'none'}"
            )
        return Trace(
            tracer.choices, total(tracer.log_densities.values()), tracer.log_densities, tracer.event_dims, result
        )

    def random_weighted(self, args: Sequence[Any]) -> Trace:
        """Draw all choices; the density is exact."""
        return self.trace(args, {})

    def estimate_logpdf(self, choices: Choices, args: Sequence[Any]) -> Tensor:
        """The exact log density of all choices."""
        return self.trace(args, choices, complete=True).log_density


def program(function: Callable[..., Any]) -> Program:
    """Make a Python function that calls `sample` a program: a model or a guide.

    Args:
        function: Takes tensors, modules or whatever else; what it needs of data comes as arguments too.

    Example:
        >>> from torch.distributions import Normal
        >>> @program
        ... def model():
        ...     x = sample("x", Normal(0.0, 1.0))
        ...     sample("y", Normal(x, 1.0))
        >>> round(log_density(model, {"x": 0.5, "y": 1.0}).item(), 4)
        -2.0879
    """
    if not callable(function):
        raise TypeError(f"a program is a function, got {type(function).__name__}")
    return Program(function)


class _Tracer:
    """Takes the choices of a program that is running: those given, and draws the others."""

    def __init__(self, given: Choices, complete: bool) -> None:
        self.given, self.complete = given, complete
        self.choices: dict[str, Tensor] = {}
        self.log_densities: dict[str, Tensor] = {}
        self.event_dims: dict[str, int] = {}

    def sample(self, name: str, distribution: Distribution, strategy: Strategy) -> Tensor:
        if name in self.choices:
            raise ValueError(f"the program makes two choices named {name!r}: give each its own name")
        execution = current("sample")
        if name in self.given:
            value = _as_value(name, self.given[name], distribution)
            if name in getattr(self.given, "data", ()):
                # Else it might fit particles or draws of the same number, and be one of them.
                check_fits(f"data {name}", value.shape[: value.ndim - len(distribution.event_shape)], execution.batch)
            log_density = _log_prob(name, distribution, value)
            check_fits(name, log_density.shape, execution.shape)
        elif self.complete:
            raise ValueError(
                f"choices lack {name!r}, which the program makes: give {', '.join(self.given) or 'it'} too"
            )
        else:
            site = execution.draw(name, distribution, strategy)
            value, log_density = site.value, site.log_prob
        self.choices[name], self.log_densities[name] = value, log_density
        self.event_dims[name] = len(distribution.event_shape)
        return value


def sample(name: str, distribution: Distribution, strategy: Strategy | None = None) -> Tensor:
    """Make a choice.

    Args:
        name: Of the choice, its own within a program.
        distribution: Of torch.distributions, of one event for each of the runs: what belongs to one run is one event
            (`Independent`).
        strategy: How gradients of the rest are estimated, `Reparam()`, `Reinforce(baseline)`, `Enum()`, `MVD()` or
            `Implicit()`; by default the path through the noise where torch has one, else `Reinforce()`. It matters only where the choice is
            drawn, not where its value is given.

    Returns:
        (*runs, *event). With `Enum` all values at once, in a new first dimension, so that what is computed from it
        broadcasts, as torch does, from the last dimension.

    Raises:
        ValueError: The strategy does not go with the distribution, its density does not fit the runs, or a choice of this name
            has been made.
        TypeError: `distribution` or `strategy` is none.
        RuntimeError: No program or objective is running.
    """
    execution = current("sample")
    return execution.sample(name, distribution, checked(name, distribution, strategy))


def simulate(
    density: Density,
    args: Sequence[Any] = (),
    *,
    draws: int | None = None,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Trace:
    """Run a program, or draw from a marginal or posterior, and keep its choices and their log density.

    In an objective derivatives flow through the choices, by their strategies, and through the density. Outside it is
    plain sampling: of choices with `rsample` derivatives flow, of others none, whatever their strategies.

    Args:
        density: The program; or a `Marginal` or `Normalize`, whose log density is an estimate.
        args: Its arguments.
        draws: How many, in a dimension before the batch; outside of an objective only.
        batch_shape: As for `Estimator.surrogate`; outside of an objective only.
        generator: Of all that is random; outside of an objective only.

    Raises:
        ValueError: As for `sample`, or runs are given where the objective has its own.
        TypeError: `density` is no program.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> @program
        ... def coins(p):
        ...     first = sample("first", Bernoulli(p))
        ...     sample("second", Bernoulli(0.5 + first / 4))
        >>> trace = simulate(coins, (0.5,), draws=3, generator=torch.Generator().manual_seed(0))
        >>> sorted(trace.choices), trace.log_density.shape
        (['first', 'second'], torch.Size([3]))
    """
    _check_density(density)
    with _top_level(draws, batch_shape, generator):
        return density.random_weighted(tuple(args))


def log_density(
    density: Density,
    choices: Choices,
    args: Sequence[Any] = (),
    *,
    draws: int | None = None,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The log density of given choices, (*runs): of a program exact, of a `Marginal` or `Normalize` an estimate.

    Args:
        density: The program.
        choices: A value of every choice, by name: tensors (*runs, *event) or numbers.
        args: As for `simulate`.
        draws: As for `simulate`.
        batch_shape: As for `simulate`.
        generator: As for `simulate`.

    Raises:
        ValueError: A choice is missing or is not made, its value is outside of the support, or its density does not fit the runs.
        TypeError: `density` is no program.
    """
    _check_density(density)
    with _top_level(draws, batch_shape, generator):
        return density.estimate_logpdf(choices, tuple(args))


def add_cost(cost: Tensor | float) -> None:
    """Add to what the objective returns, from here: choices of `Reinforce` made later are not charged with it.

    Args:
        cost: (*runs); in a plate its sum over the copies is added.

    Raises:
        ValueError: Its shape does not fit the runs.
        RuntimeError: No objective is running.
    """
    current("add_cost").add_cost(cost)


def minibatch(n: int, m: int, terms: Callable[[Tensor], Tensor]) -> Tensor:
    """An unbiased estimate of the sum of n terms, by m of them.

    Args:
        n: How many there are.
        m: How many are looked at, drawn without replacement and the same for all runs.
        terms: Takes the indices (m,) of those, and gives the sum of their terms, (*runs).

    Raises:
        ValueError: m is not within 1..n.
        RuntimeError: No objective is running.
    """
    if not 1 <= m <= n:
        raise ValueError(f"a minibatch of {n} terms has 1 to {n}, got {m}")
    execution = current("minibatch")
    generator = execution.generator
    device = "cpu" if generator is None else generator.device
    indices = execution.pin("a minibatch", lambda: torch.randperm(n, generator=generator, device=device)[:m])
    return n / m * terms(indices)


@contextmanager
def replicate(copies: int) -> Iterator[Plate]:
    """Make every run so many independent ones, as the particles of a bound are.

    Args:
        copies: How many.

    Yields:
        A plate with `dim`, the dimension of the copies counted from the right, and `log_mean_exp`, `log_sum_exp` and
        `mean`, which bring what was computed within it back to one number a run.

    Raises:
        ValueError: There is no copy.
        RuntimeError: No objective is running.
    """
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"copies is a whole number of at least 1, got {copies}")
    with current("replicate").plate(copies) as plate:
        yield plate


class Particle(NamedTuple):
    """One of the particles of `SIR`.

    Attributes:
        choices: Those that were missing, by name.
        event_dims: As of a `Trace`.
        log_joint: Log density of all choices together.
        log_weight: That less the proposal's log density.
    """

    choices: dict[str, Tensor]
    event_dims: Mapping[str, int]
    log_joint: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class SIR:
    """Sampling importance resampling.

    Args:
        particles: N.
        proposal: A program m(choices, *args) that draws what is missing, given the choices that are there and the
            arguments of the program that is inferred in; by default that program itself with those choices fixed, its prior.
        index: How the gradient through the particle chosen is estimated, for `Normalize`.
    """

    particles: int
    proposal: Density | None = None
    index: Strategy = Reinforce()  # noqa: RUF009

    def __post_init__(self) -> None:
        if not isinstance(self.particles, int) or self.particles < 1:
            raise ValueError(f"particles is a whole number of at least 1, got {self.particles}")
        if self.proposal is not None:
            _check_density(self.proposal)

    def propose(self, target: Program, given: Choices, args: Sequence[Any]) -> Particle:
        """Draw the choices that are missing."""
        if self.proposal is None:
            trace = target.trace(args, given)
            others = {name: value for name, value in trace.choices.items() if name not in given}
            return Particle(others, trace.event_dims, trace.log_density, _given(trace, given))
        proposed = self.proposal.random_weighted((given, *args))
        if both := set(given) & set(proposed.choices):
            raise ValueError(
                f"{', '.join(sorted(both))} is given, and the proposal draws it too: leave it out of the proposal"
            )
        data = {name: given[name] for name in getattr(given, "data", ())}
        others = {name: value for name, value in given.items() if name not in data}
        joint = target.estimate_logpdf(Observed(data, {**others, **proposed.choices}), args)
        return Particle(proposed.choices, proposed.event_dims, joint, joint - proposed.log_density)

    def weigh(self, trace: Trace, given: Choices, args: Sequence[Any]) -> Tensor:
        """The log weight of a particle whose missing choices are known, from the trace of all choices."""
        if self.proposal is None:
            return _given(trace, given)
        others = {name: value for name, value in trace.choices.items() if name not in given}
        return trace.log_density - self.proposal.estimate_logpdf(others, (given, *args))


class Marginal(Density):
    """The distribution of some choices of a program, its density estimated.

    Two estimates, with different guarantees. `estimate_logpdf(x)`, for a given x: r_1..r_N from the proposal m,
    log (1/N) sum q(r_i, x) / m(r_i | x); exp of it is unbiased for q(x). `random_weighted()`, for an x drawn here: the r drawn with it is
    one of the N; exp(-w) is unbiased for 1/q(x). The weight of every particle, also of the one that was drawn with x, is
    over the proposal; the authors' release leaves that out for this one, which is right for a uniform prior of r only.

    Args:
        program: Of all choices.
        keep: Names of those that remain.
        algorithm: How the others are summed out.

    Raises:
        ValueError: No name is kept.
        TypeError: No program, names or algorithm.

    Example:
        >>> from torch.distributions import Normal
        >>> @program
        ... def pair():
        ...     r = sample("r", Normal(0.0, 1.0))
        ...     sample("x", Normal(r, 1.0))
        >>> marginal = Marginal(pair, ["x"], SIR(10_000))
        >>> found = log_density(marginal, {"x": 0.0}, generator=torch.Generator().manual_seed(0))
        >>> f"{found:.1f} {Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0)):.1f}"
        '-1.3 -1.3'
    """

    def __init__(self, program: Program, keep: Sequence[str], algorithm: SIR) -> None:
        _check_program(program, algorithm)
        if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
            raise TypeError(f"keep is a list of names, got {keep!r}")
        if not keep:
            raise ValueError("keep names at least one choice")
        self.program, self.keep, self.algorithm = program, tuple(keep), algorithm

    def random_weighted(self, args: Sequence[Any]) -> Trace:
        """Draw (r, x), keep x, with the reciprocal estimate of its density."""
        trace = self.program.random_weighted(args)
        if missing := set(self.keep) - set(trace.choices):
            raise ValueError(f"the program makes no choice named {', '.join(sorted(missing))}, which is to be kept")
        kept = {name: trace.choices[name] for name in self.keep}
        if len(kept) == len(trace.choices):
            return trace
        retained = self.algorithm.weigh(trace, kept, args)
        estimate = _with_retained(self.algorithm, self.program, kept, args, retained)
        return Trace(kept, estimate, {}, trace.event_dims, trace.result)

    def estimate_logpdf(self, choices: Choices, args: Sequence[Any]) -> Tensor:
        """An estimate of the log density of x, exp of it unbiased."""
        if set(choices) != set(self.keep):
            raise ValueError(
                f"a marginal over {', '.join(self.keep)} has a density of these, got {', '.join(choices) or 'none'}"
            )
        with replicate(self.algorithm.particles) as plate:
            return plate.log_mean_exp(self.algorithm.propose(self.program, choices, args).log_weight)


class Normalize(Density):
    """The posterior of a program's other choices given data, by sampling importance resampling.

    At a finite number of particles it draws from something between proposal and posterior; its densities are of what it
    draws from: `random_weighted` with an unbiased reciprocal, `estimate_logpdf` unbiased.

    Args:
        program: Of latent choices and data.
        data: Values of some choices, by name.
        algorithm: With particles, proposal and how the gradient through the index is estimated.

    Raises:
        ValueError: There is no data.
        TypeError: No program or algorithm.
    """

    def __init__(self, program: Program, data: Choices, algorithm: SIR) -> None:
        _check_program(program, algorithm)
        if not data:
            raise ValueError("a posterior is given data: name at least one choice and its value")
        self.program, self.data, self.algorithm = program, Observed(data), algorithm

    def random_weighted(self, args: Sequence[Any]) -> Trace:
        """Draw particles, choose one by weight; the log density is log p(x, y) less the log evidence that they estimate."""
        with replicate(self.algorithm.particles) as plate:
            particle = self.algorithm.propose(self.program, self.data, args)
            weights, runs = plate.terms(particle.log_weight), plate.execution.shape
            evidence = plate.log_mean_exp(weights)
        if not bool(plain(evidence > -math.inf).all()):
            raise ValueError(
                "no particle has a density above zero: give a proposal that reaches where the data is likely"
            )
        law = Categorical(logits=weights.movedim(plate.dim, -1))
        index = plate.execution.draw("the particle", law, self.algorithm.index).value

        def chosen(values: Tensor, event_dims: int) -> Tensor:
            """What belongs to the particle of that index, (*runs, *event)."""
            values = values.expand(
                torch.broadcast_shapes(values.shape, (*runs, *values.shape[values.ndim - event_dims :]))
            )
            where = index.unsqueeze(plate.dim).reshape(*index.unsqueeze(plate.dim).shape, *[1] * event_dims)
            values = values.reshape(*[1] * (where.ndim - values.ndim), *values.shape)
            return torch.take_along_dim(values, where, plate.dim - event_dims).squeeze(plate.dim - event_dims)

        choices = {name: chosen(value, particle.event_dims[name]) for name, value in particle.choices.items()}
        return Trace(choices, chosen(particle.log_joint, 0) - evidence, {}, particle.event_dims)

    def estimate_logpdf(self, choices: Choices, args: Sequence[Any]) -> Tensor:
        """Its log density, log p(x, y) less the log evidence by N particles, of which x is one."""
        trace = self.program.trace(args, Observed(self.data, choices), complete=True)
        weight = self.algorithm.weigh(trace, self.data, args)
        return trace.log_density - _with_retained(self.algorithm, self.program, self.data, args, weight)

    def log_evidence(self, args: Sequence[Any] = ()) -> Tensor:
        """An estimate of log p(data), exp of it unbiased, (*runs); in an objective."""
        with replicate(self.algorithm.particles) as plate:
            return plate.log_mean_exp(self.algorithm.propose(self.program, self.data, args).log_weight)


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of log densities, zero where there are none."""
    found = list(terms)
    return functools.reduce(operator.add, found) if found else torch.zeros(())


def _given(trace: Trace, given: Choices) -> Tensor:
    """Log density of the given choices of a program whose others are drawn from it."""
    return total(trace.log_densities[name] for name in given)


def _with_retained(algorithm: SIR, target: Program, given: Choices, args: Sequence[Any], retained: Tensor) -> Tensor:
    """The log mean exp of the weights of N particles, one of which is there already."""
    if algorithm.particles == 1:
        return retained
    with replicate(algorithm.particles - 1) as plate:
        others = plate.log_sum_exp(algorithm.propose(target, given, args).log_weight)
    return torch.logaddexp(others, retained) - math.log(algorithm.particles)


def _as_value(name: str, value: Any, distribution: Distribution) -> Tensor:
    """A given value as a tensor whose last dimensions are the event."""
    if isinstance(value, bool | int | float):
        # Of no dimension, so that float64 takes over nothing. Those who draw from a Categorical index by it.
        whole = isinstance(distribution, Categorical)
        value = torch.tensor(value, dtype=torch.int64 if whole else torch.float64)
    if not isinstance(value, Tensor):
        raise TypeError(f"the value of choice {name!r} is a tensor or a number, got {type(value).__name__}")
    event = tuple(distribution.event_shape)
    if tuple(value.shape[value.ndim - len(event) :]) != event or value.ndim < len(event):
        raise ValueError(f"choice {name!r} is an event of shape {event}, got a value of shape {tuple(value.shape)}")
    return value


def _log_prob(name: str, distribution: Distribution, value: Tensor) -> Tensor:
    try:
        return distribution.log_prob(value)
    except ValueError as error:
        raise ValueError(
            f"the value given for choice {name!r} has no density: it lies outside the support of {type(distribution).__name__}, "
            f"is not a number, or its shape {tuple(value.shape)} does not fit {tuple(distribution.batch_shape)}"
        ) from error


def _check_density(density: Any) -> None:
    if isinstance(density, Density):
        return
    raise TypeError(f"give a program (a function under @program), a Marginal or a Normalize, got {density!r}")


def _check_program(target: Any, algorithm: Any) -> None:
    if not isinstance(target, Program):
        raise TypeError(f"give a program, a function under @program, got {target!r}")
    if not isinstance(algorithm, SIR):
        raise TypeError(f"the algorithm is SIR(particles, proposal), got {algorithm!r}")


@contextmanager
def _top_level(draws: int | None, batch_shape: Sequence[int], generator: torch.Generator | None) -> Iterator[None]:
    """Plain sampling where no objective is running."""
    if not under_way():
        shape = run_shape(draws, batch_shape)
        with executing(Execution(shape, generator, estimating=False, batch=tuple(batch_shape))):
            yield
        return
    if current("simulate").tracing:
        raise ValueError(
            "simulate and log_density are asked of a program by an objective, and not within another program, whose density "
            "would then be random: call the inner program as a function"
        )
    if draws is not None or batch_shape or generator is not None:
        raise ValueError(
            "in an objective runs and generator are its own: give draws, batch_shape and generator to the estimator"
        )
    yield
