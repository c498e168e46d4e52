"""How the gradient of an expectation over one choice is estimated from the rest of the program."""

from __future__ import annotations

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Chi2,
    Dirichlet,
    Distribution,
    FisherSnedecor,
    Gamma,
    Independent,
    Normal,
    StudentT,
    TransformedDistribution,
)

from paperworks.uncertainty.vi.execution import Execution, Shape, Site, check_fits, drawn

Replay = Callable[[Tensor, Shape], Tensor]
"""The value of the rest of the program for another value of a choice, which may put dimensions before those of the runs."""

MOST_BRANCHES = 2**20

_IMPLICIT = (Gamma, Beta, Dirichlet, Chi2, StudentT, FisherSnedecor)


class Strategy(ABC):
    """How one choice x ~ d is made, and how the rest k(x) of the program becomes an estimate of E[k(x)].

    A rest is a surrogate: a tensor whose value is unbiased and whose gradient is unbiased too. `reduce` turns the surrogate of
    k(x) into that of E[k(x)]; the choices made last are reduced first.
    """

    @abstractmethod
    def check(self, distribution: Distribution) -> str:
        """What of the distribution does not go with this strategy, empty where all does."""

    def start(self, distribution: Distribution, execution: Execution) -> tuple[Tensor, Shape]:
        """The value to go on with, and the dimensions that it puts before those of the runs."""
        return drawn(distribution, execution.shape, execution.generator, pathwise=False), ()

    @abstractmethod
    def reduce(self, site: Site, rest: Tensor, replay: Replay) -> Tensor:
        """The surrogate of E[k(x)].

        Args:
            site: The choice.
            rest: The surrogate of k(x), (*lead, *runs).
            replay: Runs the rest again for another value.
        """


@dataclass(frozen=True)
class Reparam(Strategy):
    """x = g(eps, theta), differentiated through x: for distributions with `rsample`.

    It is biased where the rest of the program jumps in x. A Python branch on x (`if x > 0`) is refused; `torch.where` on
    two branches that do not meet cannot be seen, and is for the user to avoid: take `Reinforce` or `MVD` there.
    """

    def check(self, distribution: Distribution) -> str:
        """Needs `rsample`, and noise that is not itself of the parameters."""
        if not distribution.has_rsample:
            return "it has no rsample: take Reinforce, or Enum for few values"
        return (
            "its noise depends on the parameters: take Implicit" if isinstance(_base(distribution), _IMPLICIT) else ""
        )

    def start(self, distribution: Distribution, execution: Execution) -> tuple[Tensor, Shape]:
        """A value with a derivative."""
        value = drawn(distribution, execution.shape, execution.generator, pathwise=True)
        return (value.as_subclass(Reparameterized) if value.requires_grad else value), ()

    def reduce(self, site: Site, rest: Tensor, replay: Replay) -> Tensor:
        """The derivative has gone through x already."""
        return rest


@dataclass(frozen=True)
class Implicit(Reparam):
    """Implicit reparameterisation (arXiv 1805.08498), by torch: for gamma, beta, Dirichlet and what is made of them."""

    def check(self, distribution: Distribution) -> str:
        """Needs one of those."""
        return "" if isinstance(_base(distribution), _IMPLICIT) else "it is no gamma, beta or Dirichlet: take Reparam"


@dataclass(frozen=True, eq=False)
class Reinforce(Strategy):
    """grad k(x) + (k(x) - b) grad log d(x), the score function: for any distribution with a density.

    k is the whole rest of the program, with what `add_cost` adds after the choice; costs before it are not weighed.

    Args:
        baseline: b, a number or a tensor with one entry for each of the runs, (*runs). It may depend on earlier choices,
            and cannot on this one, being given before it is made. No gradient flows through it.
    """

    baseline: float | Tensor | None = None

    def check(self, distribution: Distribution) -> str:
        """Needs a density."""
        return "" if type(distribution).log_prob is not Distribution.log_prob else "it has no density"

    def reduce(self, site: Site, rest: Tensor, replay: Replay) -> Tensor:
        """Add the score term, whose value is zero."""
        if not (torch.is_grad_enabled() and site.differentiable and site.log_prob.requires_grad):
            return rest
        baseline = 0.0 if self.baseline is None else self.baseline
        if isinstance(baseline, Tensor):
            baseline = baseline.detach()
            check_fits(f"the baseline of {site.name}", baseline.shape, tuple(rest.shape))
        log_prob = site.over_plates(site.log_prob)
        return rest + (rest.detach() - baseline) * (log_prob - log_prob.detach())


@dataclass(frozen=True)
class Enum(Strategy):
    """sum_v d(v) k(v), exact: the rest of the program is run for every value. Its cost multiplies over choices.

    In a plate of n runs, as particles of `iwelbo` are, a choice of V values has V^n joint ones.

    Args:
        parallel: All values at once, in a new dimension before those of the runs. Otherwise the program is run once a
            value, so that it may branch on the value in Python, and needs less memory.
    """

    parallel: bool = True

    def check(self, distribution: Distribution) -> str:
        """Needs finitely many values."""
        if distribution.has_enumerate_support:
            return ""
        return "its values cannot be counted out (of Independent choices make one choice each)"

    def start(self, distribution: Distribution, execution: Execution) -> tuple[Tensor, Shape]:
        """All values, or the first."""
        values = _joint_values(distribution, execution.shape, execution.plates)
        return (values, values.shape[:1]) if self.parallel else (values[0], ())

    def reduce(self, site: Site, rest: Tensor, replay: Replay) -> Tensor:
        """Weigh each value by its probability."""
        if site.lead:
            return _share(site.over_plates(site.log_prob).exp(), rest).sum(0)
        first, *others = _joint_values(site.distribution, site.shape, site.plates)
        total = _share(self._probability(site, first), rest)
        for value in others:
            total = total + _share(self._probability(site, value), replay(value, ()))
        return total

    def _probability(self, site: Site, value: Tensor) -> Tensor:
        with torch.set_grad_enabled(site.differentiable and torch.is_grad_enabled()):
            return site.over_plates(site.distribution.log_prob(value)).exp()


@dataclass(frozen=True)
class MVD(Strategy):
    """Measure-valued derivative: the rest is run again at other values, without derivative, and differences are weighed.

    For a flip v of probability p the program is run once more at 1 - v, with later choices of its own: d/dp is
    (-1)^v (k(1 - v) - k(v)), which is k(1) - k(0) in expectation.

    For a normal x = m + s z it is run three times more. With w of density w exp(-w^2/2), d/dm is
    (k(m + s w) - k(m - s w)) / (s sqrt(2 pi)); with u of density u^2 exp(-u^2/2) / sqrt(2 pi), d/ds is (k(m + s u) - k(x)) / s.
    Unlike `Reparam` it is unbiased where k jumps.
    """

    def check(self, distribution: Distribution) -> str:
        """Needs a flip or a normal of one number."""
        return "" if type(distribution) in (Bernoulli, Normal) else "it is no Bernoulli or Normal of single numbers"

    def reduce(self, site: Site, rest: Tensor, replay: Replay) -> Tensor:
        """Add what the parameters' derivatives are, with value zero."""
        if not (torch.is_grad_enabled() and site.differentiable):
            return rest
        if isinstance(site.distribution, Bernoulli):
            return self._flip(site, site.distribution, rest, replay)
        assert isinstance(site.distribution, Normal)
        return self._normal(site, site.distribution, rest, replay)

    def _flip(self, site: Site, flip: Bernoulli, rest: Tensor, replay: Replay) -> Tensor:
        p = flip.probs
        if not p.requires_grad:
            return rest
        other = _others(site, 1 - site.value, replay)
        return rest + _weighed(site, (1 - 2 * site.value) * (p - p.detach()), other - rest.detach())

    def _normal(self, site: Site, normal: Normal, rest: Tensor, replay: Replay) -> Tensor:
        m, s = normal.loc.detach(), normal.scale.detach()
        result = rest
        if normal.loc.requires_grad:
            w = _length(site, 2)
            up, down = (_others(site, m + sign * s * w, replay) for sign in (1, -1))
            result = result + _weighed(site, (normal.loc - m) / (s * math.sqrt(2 * math.pi)), up - down)
        if normal.scale.requires_grad:
            u = _length(site, 3) * (2 * site.value.new_empty(site.shape).random_(0, 2, generator=site.generator) - 1)
            other = _others(site, m + s * u, replay)
            result = result + _weighed(site, (normal.scale - s) / s, other - rest.detach())
        return result


class Reparameterized(Tensor):
    """What is computed from a `Reparam` sample: a tensor that does not decide a Python branch.

    Torch's own checks of arguments may read it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What is computed from it is of its kind; as torch's own does it, in half the time."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if type(result) is Tensor:
                return result.as_subclass(cls)
            if isinstance(result, tuple | list):
                return type(result)([one.as_subclass(cls) if type(one) is Tensor else one for one in result])
            return result

    def __bool__(self) -> bool:
        """Refused, for a branch has no derivative."""
        return self._read(Tensor.__bool__)

    def __float__(self) -> float:
        """Refused as well."""
        return self._read(Tensor.__float__)

    def __int__(self) -> int:
        """Refused as well."""
        return self._read(Tensor.__int__)

    def __index__(self) -> int:
        """Refused as well."""
        return self._read(Tensor.__index__)

    def item(self) -> Any:
        """Refused as well."""
        return self._read(Tensor.item)

    def tolist(self) -> Any:
        """Refused as well."""
        return self._read(Tensor.tolist)

    def _read(self, how: Callable[[Tensor], Any]) -> Any:
        caller = sys._getframe(2).f_globals.get("__name__", "")
        if caller == "torch" or caller.startswith("torch."):
            with torch._C.DisableTorchFunctionSubclass():
                return how(self)
        raise ValueError(
            "a Python number or branch was asked of a Reparam sample, and the gradient through it would be biased: take "
            "Reinforce, MVD or Enum for this choice, or write the rest of the program in tensors"
        )


def plain(value: Tensor) -> Tensor:
    """The same tensor, free to be read."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def checked(name: str, distribution: Distribution, strategy: Strategy | None) -> Strategy:
    """The strategy of a choice, where there is none the one with the least variance that torch has.

    Raises:
        TypeError: They are no distribution and strategy.
        ValueError: They do not go together.
    """
    if not isinstance(name, str):
        raise TypeError(f"the first argument of sample is the name of the choice, got {type(name).__name__}")
    if not isinstance(distribution, Distribution):
        raise TypeError(f"choice {name!r} is drawn from a torch.distributions.Distribution, got {distribution!r}")
    if strategy is None:
        if not distribution.has_rsample:
            return Reinforce()
        return Implicit() if isinstance(_base(distribution), _IMPLICIT) else Reparam()
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"the strategy of choice {name!r} is one of Reparam(), Reinforce(), Enum(), MVD() and Implicit(), got {strategy!r}"
        )
    if wrong := strategy.check(distribution):
        raise ValueError(
            f"{type(strategy).__name__} cannot be the strategy of choice {name!r} from {type(distribution).__name__}: {wrong}"
        )
    return strategy


def _share(probability: Tensor, rest: Tensor) -> Tensor:
    """Their product, zero with its gradient where a value is impossible, whatever the rest is there."""
    possible = probability > 0
    return torch.where(possible, probability * torch.where(possible, rest, 0), 0)


def _base(distribution: Distribution) -> Distribution:
    """What an Independent or transformed distribution is made of."""
    while isinstance(distribution, Independent | TransformedDistribution):
        distribution = distribution.base_dist
    return distribution


def _joint_values(distribution: Distribution, shape: Shape, plates: tuple[int, ...]) -> Tensor:
    """All values (K, *shape, *event) that the runs of the plates can have together, K = V^n."""
    support = distribution.enumerate_support(expand=False)
    event = distribution.event_shape
    copies = math.prod(shape[plate] for plate in plates)
    if copies * math.log(len(support)) > math.log(MOST_BRANCHES):
        raise ValueError(
            f"Enum would run {len(support)} values to the power of {copies} branches: take Reinforce or MVD where there are "
            "many particles"
        )
    which = torch.tensor(list(itertools.product(range(len(support)), repeat=copies)), device=support.device)
    values = support.reshape(len(support), *event)[which]
    return values.reshape(len(which), *_plates_only(shape, plates), *event).expand(len(which), *shape, *event)


def _plates_only(shape: Shape, plates: tuple[int, ...]) -> Shape:
    """The shape with ones in place of all but the plates."""
    return tuple(size if place - len(shape) in plates else 1 for place, size in enumerate(shape))


def _length(site: Site, numbers: int) -> Tensor:
    """For each run the length of so many standard normal numbers."""
    return site.value.new_empty((*site.shape, numbers)).normal_(generator=site.generator).norm(dim=-1)


def _one_at_a_time(site: Site) -> Tensor | None:
    """For each of n runs in the plates a mask that picks it, (n, *shape); None outside of plates."""
    if not site.plates:
        return None
    copies = math.prod(site.shape[plate] for plate in site.plates)
    chosen = torch.eye(copies, dtype=torch.bool, device=site.value.device)
    return chosen.reshape(copies, *_plates_only(site.shape, site.plates))


def _others(site: Site, values: Tensor, replay: Replay) -> Tensor:
    """The rest at other values, without derivative; in plates one run's value at a time, in a dimension before."""
    chosen = _one_at_a_time(site)
    with torch.no_grad():
        if chosen is None:
            return replay(values, ())
        return replay(torch.where(chosen, values, site.value), chosen.shape[:1])


def _weighed(site: Site, change: Tensor, difference: Tensor) -> Tensor:
    """The sum over plates of the changes of a parameter (*shape), each times its own difference."""
    chosen = _one_at_a_time(site)
    if chosen is None:
        return change * difference
    change = change.expand(site.shape)
    return (torch.where(chosen, change, 0).sum(site.plates) * difference).sum(0)
