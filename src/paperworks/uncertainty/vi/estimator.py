"""Expectations of programs as values with unbiased gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.uncertainty.vi.execution import (
    Cost,
    Execution,
    Pinned,
    Shape,
    Site,
    check_fits,
    current,
    executing,
    run_shape,
    under_way,
)
from paperworks.uncertainty.vi.strategies import plain


def expectation(objective: Callable[..., Any]) -> Callable[..., Estimator]:
    """The expectation of what a program returns, over all its choices, as a function of its arguments.

    The program calls `sample`, `simulate`, `log_density`, `add_cost` and plain PyTorch, and returns one number for each of
    the runs. It may be run several times for one estimate; all that is random in it goes through `sample`.

    Args:
        objective: The program.

    Returns:
        A function of the same arguments that gives an `Estimator`.

    Example:
        >>> from torch.distributions import Normal
        >>> from paperworks.uncertainty.vi import Reparam, sample
        >>> @expectation
        ... def square(mean):
        ...     return sample("x", Normal(mean, 1.0), Reparam()) ** 2
        >>> mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> value, (slope,) = square(mean).value_and_grad(draws=100_000, generator=torch.Generator().manual_seed(0))
        >>> f"{value:.1f} {slope:.1f}"
        '2.0 2.0'
    """

    @wraps(objective)
    def of(*args: Any, **options: Any) -> Estimator:
        return Estimator(objective, args, options)

    return of


@dataclass(frozen=True)
class Estimator:
    """An expectation, to be estimated.

    Args:
        objective: The program.
        args: Its arguments.
        options: Its keyword arguments.
    """

    objective: Callable[..., Any]
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None

    def surrogate(
        self,
        *,
        draws: int | None = None,
        batch_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A tensor whose value is an unbiased estimate and whose gradient is an unbiased estimate of the gradient.

        Args:
            draws: Independent estimates of which the mean is taken, in one dimension before the batch. With None there is
                one, and choices have no such dimension, so that a program may branch on a choice in Python (not on one of
                `Reparam`, and on one of `Enum` only with `parallel=False`).
            batch_shape: Of independent expectations, one for each item of a batch of data: densities are (*batch_shape), as
                those of torch.distributions are.
            generator: Of all that is random; torch's global state by default.

        Returns:
            (*batch_shape); call `.mean().backward()` on it.

        Raises:
            ValueError: Densities or what is returned do not fit the runs, a strategy does not fit its distribution, two choices bear
                one name, `choices` lack one, or a `Reparam` sample is made a Python number.
            TypeError: What the objective returns is no number or tensor.
            RuntimeError: An objective is running, where `draw` is meant.
        """
        if under_way():
            raise RuntimeError(
                "an expectation within an objective is a part of it: write .draw(), which shares its runs and generator"
            )
        shape = run_shape(draws, batch_shape)
        estimate = self._continue(Execution(shape, generator, batch=tuple(batch_shape)))
        return estimate if draws is None else estimate.mean(0)

    def value(
        self, *, draws: int | None = None, batch_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """An estimate without gradient, (*batch_shape); arguments as for `surrogate`."""
        with torch.no_grad():
            return self.surrogate(draws=draws, batch_shape=batch_shape, generator=generator)

    def value_and_grad(
        self,
        parameters: Sequence[Tensor] | None = None,
        *,
        draws: int | None = None,
        batch_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """An estimate, as a mean over the batch, and its gradient in each parameter.

        Args:
            parameters: Tensors that require gradients; by default those among the arguments, also within modules, dictionaries and
                lists, in their order.
            draws: As for `surrogate`.
            batch_shape: As for `surrogate`.
            generator: As for `surrogate`.

        Raises:
            ValueError: There are no parameters, or as for `surrogate`.
        """
        found = list(dict.fromkeys(_parameters((self.args, self.options or {})) if parameters is None else parameters))
        if not found or not all(isinstance(one, Tensor) and one.requires_grad for one in found):
            raise ValueError("there is nothing to differentiate by: give tensors or modules that require gradients")
        total = self.surrogate(draws=draws, batch_shape=batch_shape, generator=generator).mean()
        if not total.requires_grad:
            return total, tuple(torch.zeros_like(one) for one in found)
        return total.detach(), tuple(map(plain, torch.autograd.grad(total, found, materialize_grads=True)))

    def draw(self) -> Tensor:
        """One estimate as part of another objective, (*runs), each call with choices of its own.

        What is linear in it stays unbiased, and so does a product of several calls. Of exp(E) use `exp`; log(E.draw()) is
        in expectation at most log E, a bound.

        Raises:
            RuntimeError: No objective is running.
        """
        execution = current("Estimator.draw")
        with execution.taking(execution._sample, set()):
            return _checked(self.objective(*self.args, **(self.options or {})), execution)

    def exp(self, rate: float = 1.0) -> Tensor:
        """An unbiased estimate of the exponential of E as part of another objective, (*runs).

        It is exp(rate) times the product of N estimates over rate, N ~ Poisson(rate). Its variance is finite, and least where
        rate is about as large as estimates are.

        Args:
            rate: Mean number of estimates in a run.

        Raises:
            ValueError: `rate` is not above 0.
            RuntimeError: No objective is running.
        """
        if not rate > 0:
            raise ValueError(f"rate is above 0, got {rate}")
        execution = current("Estimator.exp")
        generator = execution.generator
        device = "cpu" if generator is None else generator.device
        rates = torch.full(execution.shape, float(rate), dtype=torch.float64, device=device)
        number = execution.pin("the number of factors", lambda: torch.poisson(rates, generator))
        most = int(number.max())
        if not most:
            return torch.tensor(math.exp(rate), dtype=torch.float64)
        with execution.plate(most) as plate:
            factors = plate.terms(self.draw() / rate)
            place = torch.arange(most, device=device).reshape(-1, *[1] * (-1 - plate.dim))
            used = (place < number).to(factors.device)
            product = torch.where(used, factors, 1).prod(plate.dim)
        return product * math.exp(rate)

    def _continue(self, execution: Execution) -> Tensor:
        """Run the objective and reduce the choices that the execution's prefix does not pin, the last one first."""
        start = execution.shape
        with executing(execution):
            try:
                result = _checked(self.objective(*self.args, **(self.options or {})), execution)
            except RuntimeError as error:
                if "Boolean value of Tensor with more than one value" not in str(error):
                    raise
                raise ValueError(
                    "the program branches in Python on a choice of several runs at once: write the branch with torch.where, or take "
                    "draws=None, no batch_shape and Enum(parallel=False)"
                ) from error
        rest = plain(result).expand(execution.shape)
        entries = execution.entries

        def replay(place: int, value: Tensor, lead: Shape) -> Tensor:
            site = entries[place]
            assert isinstance(site, Site)
            pinned = [*entries[:place], replace(site, value=value, lead=lead)]
            return self._continue(replace(execution, shape=start, prefix=pinned, entries=[], names=set()))

        for place in reversed(range(len(execution.prefix), len(entries))):
            entry = entries[place]
            if isinstance(entry, Cost):
                rest = rest + plain(entry.value)
            elif not isinstance(entry, Pinned):
                # Parameters of a choice may have been computed from a Reparam sample.
                rest = plain(entry.strategy.reduce(entry, rest, partial(replay, place)))
        return rest


def _checked(result: Any, execution: Execution) -> Tensor:
    """What an objective returned, as a tensor that fits the runs."""
    if not isinstance(result, Tensor):
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise TypeError(f"an objective returns a number or a tensor, got {type(result).__name__}")
        result = torch.tensor(float(result), dtype=torch.float64)
    check_fits("what the objective returns", result.shape, execution.shape)
    return result


def _parameters(found: Any) -> Iterator[Tensor]:
    """Tensors that require gradients, in order."""
    if isinstance(found, Tensor):
        if found.requires_grad:
            yield found
    elif isinstance(found, nn.Module):
        yield from (one for one in found.parameters() if one.requires_grad)
    elif isinstance(found, Mapping | list | tuple):
        for one in found.values() if isinstance(found, Mapping) else found:
            yield from _parameters(one)
