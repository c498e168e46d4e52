"""One execution of an objective: the shape of its runs, what was chosen so far, and what is pinned from an earlier one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from paperworks.uncertainty.vi.strategies import Strategy

Shape = tuple[int, ...]

# What draws random numbers in torch.distributions; each takes a generator.
_RANDOM = {
    "bernoulli", "bernoulli_", "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal",
    "normal_", "poisson", "rand", "rand_like", "randint", "randn", "randn_like", "random_", "randperm", "uniform_",
    "_sample_dirichlet", "_standard_gamma",
}  # fmt: skip


class Generated(TorchFunctionMode):
    """Within it torch's random functions draw from a generator, so that the global random state stays as it was.

    The distributions of torch take no generator; this hands it to the functions that they call.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, with the generator where it draws."""
        given = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM and given.get("generator") is None:
            given = {**given, "generator": self.generator}
        return func(*args, **given)


def drawn(distribution: Distribution, shape: Shape, generator: torch.Generator | None, *, pathwise: bool) -> Tensor:
    """A value of `distribution` for each run of `shape`; with a derivative along the noise where `pathwise`."""
    before = len(shape) - len(distribution.batch_shape)
    if shape[before:] != distribution.batch_shape:
        distribution, before = distribution.expand(torch.Size(shape)), 0
    draw = distribution.rsample if pathwise else distribution.sample
    extra = torch.Size(shape[:before])
    if generator is None:
        return draw(extra)
    with Generated(generator):
        return draw(extra)


@dataclass(eq=False)
class Site:
    """A choice that an execution made.

    Attributes:
        name: Of the choice.
        distribution: What it was drawn from.
        strategy: How its derivative is estimated.
        value: (*runs, *event).
        lead: Dimensions that this choice put before those of the runs, one entry a value that is tried.
        plates: Those dimensions of `shape` that belong to plates around it, counted from the right.
        shape: Of the runs from here on, with `lead`.
        differentiable: Whether gradients were wanted where it was made.
        generator: Of the execution.
    """

    name: str
    distribution: Distribution
    strategy: Strategy
    value: Tensor
    lead: Shape
    plates: tuple[int, ...]
    shape: Shape
    differentiable: bool
    generator: torch.Generator | None

    @cached_property
    def log_prob(self) -> Tensor:
        """Log density of the value, (*runs)."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.distribution.log_prob(self.value)

    def over_plates(self, terms: Tensor) -> Tensor:
        """Sum of what belongs to each of the runs, over the plates around this choice."""
        terms = terms.expand(torch.broadcast_shapes(terms.shape, self.shape))
        return terms.sum(self.plates) if self.plates else terms


@dataclass(eq=False)
class Cost:
    """What `add_cost` added, summed over plates."""

    value: Tensor


@dataclass(eq=False)
class Pinned:
    """Something random without a parameter, the same when the program is run again."""

    name: str
    value: Tensor


Entry = Site | Cost | Pinned


@dataclass(eq=False)
class Execution:
    """One execution of an objective.

    Attributes:
        shape: Of the runs at this point: dimensions that choices put before, plates, draws and batch.
        generator: Of all that is random.
        prefix: Entries of an earlier execution that are taken as they are.
        estimating: Whether derivatives are estimated. Otherwise every choice is simply drawn.
        plates: Dimensions of plates under way, counted from the right.
        entries: What has been chosen so far.
        names: Of choices that the objective itself makes.
        batch: The last dimensions of `shape`, one entry for each item of a batch of data.
        sample: What takes a choice: the objective itself, or the program that is traced in it.
    """

    shape: Shape
    generator: torch.Generator | None
    prefix: Sequence[Entry] = ()
    estimating: bool = True
    plates: tuple[int, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    batch: Shape = ()
    sample: Callable[[str, Distribution, Strategy], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sample = self._sample

    def _sample(self, name: str, distribution: Distribution, strategy: Strategy) -> Tensor:
        if name in self.names:
            raise ValueError(f"the objective makes two choices named {name!r}: give each its own name")
        self.names.add(name)
        return self.draw(name, distribution, strategy).value

    def draw(self, name: str, distribution: Distribution, strategy: Strategy) -> Site:
        """Make a choice, or take that of the prefix.

        Raises:
            ValueError: The distribution is of another shape than the runs, or the program makes another choice than before.
        """
        check_fits(name, distribution.batch_shape, self.shape)
        differentiable = torch.is_grad_enabled()
        pinned = self._pinned(name)
        if pinned is not None:
            assert isinstance(pinned, Site)
            value, lead = pinned.value, pinned.lead
        elif self.estimating:
            value, lead = strategy.start(distribution, self)
        else:
            value, lead = drawn(distribution, self.shape, self.generator, pathwise=distribution.has_rsample), ()
        self.shape = (*lead, *self.shape)
        site = Site(name, distribution, strategy, value, lead, self.plates, self.shape, differentiable, self.generator)
        self.entries.append(site)
        return site

    def pin(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Something random without a parameter, made once."""
        pinned = self._pinned(name)
        value = make() if pinned is None else pinned.value
        self.entries.append(Pinned(name, value))
        return value

    def add_cost(self, cost: Tensor | float) -> None:
        """Add to what the objective returns, here."""
        if isinstance(cost, Tensor):
            check_fits("a cost", cost.shape, self.shape)
            cost = cost.expand(self.shape)
            cost = cost.sum(self.plates) if self.plates else cost
        else:
            copies = math.prod(self.shape[plate] for plate in self.plates)
            cost = torch.tensor(cost * copies, dtype=torch.float64)
        self.entries.append(Cost(cost))

    @contextmanager
    def plate(self, size: int) -> Iterator[Plate]:
        """Make every run `size` runs."""
        plate = Plate(self, size, -1 - len(self.shape))
        self.shape, self.plates = (size, *self.shape), (*self.plates, plate.dim)
        try:
            yield plate
        finally:
            place = len(self.shape) + plate.dim
            self.shape, self.plates = (*self.shape[:place], *self.shape[place + 1 :]), self.plates[:-1]

    @contextmanager
    def taking(self, sample: Callable[[str, Distribution, Strategy], Tensor], names: set[str]) -> Iterator[None]:
        """Have choices taken by `sample`, and known by `names` where the objective makes them."""
        before = self.sample, self.names
        self.sample, self.names = sample, names
        try:
            yield
        finally:
            self.sample, self.names = before

    @property
    def tracing(self) -> bool:
        """Whether a program is run to see its choices, and not the objective itself."""
        return self.sample != self._sample

    def _pinned(self, name: str) -> Site | Pinned | None:
        if len(self.entries) >= len(self.prefix):
            return None
        pinned = self.prefix[len(self.entries)]
        if isinstance(pinned, Cost) or pinned.name != name:
            raise ValueError(
                f"run again with the same choices, the program went on with {name!r} where something else came before: "
                "whatever is random in it goes through sample"
            )
        return pinned


@dataclass(frozen=True)
class Plate:
    """Independent copies of runs; `dim` is their dimension, counted from the right."""

    execution: Execution
    size: int
    dim: int

    def terms(self, values: Tensor) -> Tensor:
        """`values` with one entry for each of the runs of now."""
        return values.expand(torch.broadcast_shapes(values.shape, self.execution.shape))

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """Logarithm of the sum of exp over the copies, within the plate."""
        return self.terms(values).logsumexp(self.dim)

    def log_mean_exp(self, values: Tensor) -> Tensor:
        """Logarithm of the mean of exp over the copies, within the plate."""
        return self.log_sum_exp(values) - math.log(self.size)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the copies, within the plate."""
        return self.terms(values).mean(self.dim)


_CURRENT: ContextVar[Execution | None] = ContextVar("execution", default=None)


def current(what: str) -> Execution:
    """The execution under way.

    Raises:
        RuntimeError: There is none.
    """
    execution = _CURRENT.get()
    if execution is None:
        raise RuntimeError(
            f"{what} is called in an objective or a program while it runs: write expectation(...) around it"
        )
    return execution


def under_way() -> bool:
    """Whether an objective or a program is running."""
    return _CURRENT.get() is not None


@contextmanager
def executing(execution: Execution) -> Iterator[None]:
    """Make it the execution under way."""
    token = _CURRENT.set(execution)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def check_fits(name: str, shape: Sequence[int], runs: Shape) -> None:
    """Refuse a density that is not one number for each of the runs.

    Raises:
        ValueError: It is not.
    """
    if len(shape) <= len(runs) and all(
        size in (1, run) for size, run in zip(reversed(shape), reversed(runs), strict=False)
    ):
        return
    raise ValueError(
        f"{name!r} has a density or value of shape {tuple(shape)} where there are runs of shape {runs}: make the last "
        "dimensions one event (torch.distributions.Independent), or give batch_shape"
    )


def run_shape(draws: int | None, batch_shape: Sequence[int]) -> Shape:
    """Shape of the runs.

    Raises:
        ValueError: `draws` or a size is below 1.
    """
    shape = tuple(batch_shape) if draws is None else (draws, *batch_shape)
    if any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(
            f"draws and the sizes in batch_shape are whole numbers of at least 1, got {draws} and {batch_shape}"
        )
    return shape
