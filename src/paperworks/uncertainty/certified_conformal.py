"""CertifiedConformalClassifier: sets whose coverage survives bounded attack, by rules in a probabilistic circuit (COLEP, arXiv 2403.11348)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv, ndtr, ndtri, rel_entr
from scipy.stats import binom
from torch import Tensor, nn

Array = NDArray[np.float64]
Model = Callable[[Tensor], Tensor]
Votes = Literal["soft", "hard"]
Score = Literal["hps", "aps"]
Calibration = Literal["pooled", "bonferroni", "per_class"]
Method = Literal["exact", "interval"]

# Variables that are summed over one world after another, 2 to this power of them.
_MOST_IN_COVER = 16
# The exponential of minus this is still a number in float64.
_MOST_WEIGHT = 700.0
# Numbers that one block of a circuit makes at once: more rows are taken in parts.
_MOST_NUMBERS = 2**22
# Draws of noise that are made at once; how many decides what they are, so it is the same for every batch of rows.
_DRAWS = 256


@dataclass(frozen=True)
class Rule:
    """If one variable is true then another is: violated in worlds where the first is 1 and the second 0.

    Variables are numbered, classes first: of N_c classes and L concepts, class j is j and concept l is N_c + l.

    Attributes:
        if_: The premise.
        then: The conclusion.
        weight: A world that keeps the rule is e^weight times as likely as one that violates it; 0 for no rule at all.

    Raises:
        ValueError: Two times the same variable, a negative one, or a weight that is negative or not finite.

    Example:
        >>> Rule(if_=3, then=10, weight=2.0)
        Rule(if_=3, then=10, weight=2.0)
    """

    if_: int
    then: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, variable in (("if_", self.if_), ("then", self.then)):
            if not isinstance(variable, Integral) or isinstance(variable, bool) or variable < 0:
                raise ValueError(f"{name} is the number of a variable, counted from 0, got {variable!r}")
        if self.if_ == self.then:
            raise ValueError(f"a rule is between two variables, and variable {self.if_} implies itself anyway")
        if not isinstance(self.weight, Real) or not 0 <= self.weight < math.inf:
            raise ValueError(f"a rule's weight is a finite number of at least 0, got {self.weight!r}")


class _Masses(NamedTuple):
    """Sums over the worlds in which each variable is 1, and is 0, its own factor left out, times exp(-log_scale)."""

    one: Tensor
    zero: Tensor
    log_scale: Tensor


class _Block(nn.Module):
    """Variables of one circuit that rules connect.

    A cover holds a variable of every rule, so that, given the cover's values, the others are independent: their sums
    factorise, and only the 2^c worlds of the cover are gone through.
    """

    variables: Tensor
    worlds: Tensor
    is_premise: Tensor
    is_conclusion: Tensor
    premise_rules: Tensor
    premise_at: Tensor
    premise_violated: Tensor
    conclusion_rules: Tensor
    conclusion_at: Tensor
    conclusion_violated: Tensor
    inner_rules: Tensor
    inner_violated: Tensor

    def __init__(self, rules: Sequence[tuple[int, Rule]]) -> None:
        super().__init__()
        cover = _vertex_cover([rule for _, rule in rules])
        rest = sorted({variable for _, rule in rules for variable in (rule.if_, rule.then)} - set(cover))
        if len(cover) > _MOST_IN_COVER:
            raise ValueError(
                f"the rules that connect variables {', '.join(map(str, sorted(cover)[:6]))}, ... take {len(cover)} of them to be "
                f"summed over together, and at most {_MOST_IN_COVER} can be: split the rules into more groups"
            )
        place = {variable: number for number, variable in enumerate([*cover, *rest])}
        size = len(cover)
        # World number w has bit v of w as the value of the cover's variable v.
        worlds = (torch.arange(2**size)[:, None] >> torch.arange(size)) & 1
        kinds: dict[str, list[tuple[int, int, int]]] = {"premise": [], "conclusion": [], "inner": []}
        for number, rule in rules:
            first, second = place[rule.if_], place[rule.then]
            kind = "premise" if first >= size else "conclusion" if second >= size else "inner"
            kinds[kind].append((number, first, second))
        of: dict[str, Tensor] = {
            kind: torch.tensor(found, dtype=torch.long).reshape(-1, 3).T for kind, found in kinds.items()
        }
        self.size = size
        variables = torch.tensor([*cover, *rest])
        for name, values in {
            "variables": variables,
            "is_premise": torch.isin(variables, torch.tensor([rule.if_ for _, rule in rules])),
            "is_conclusion": torch.isin(variables, torch.tensor([rule.then for _, rule in rules])),
            "worlds": worlds.double(),
            "premise_rules": of["premise"][0],
            "premise_at": of["premise"][1] - size,
            "premise_violated": (1 - worlds[:, of["premise"][2]]).double(),
            "conclusion_rules": of["conclusion"][0],
            "conclusion_at": of["conclusion"][2] - size,
            "conclusion_violated": worlds[:, of["conclusion"][1]].double(),
            "inner_rules": of["inner"][0],
            "inner_violated": (worlds[:, of["inner"][1]] * (1 - worlds[:, of["inner"][2]])).double(),
        }.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, one: Tensor, zero: Tensor, weights: Tensor) -> _Masses:
        """Masses (..., m) from the factors of each variable's being 1 and 0, (..., m), and all rules' weights."""
        c, worlds = self.size, self.worlds.to(one)
        others = one.new_zeros(len(worlds), len(self.variables) - c)
        if_one = others.index_add(1, self.premise_at, -self.premise_violated.to(one) * weights[self.premise_rules])
        if_zero = others.index_add(
            1, self.conclusion_at, -self.conclusion_violated.to(one) * weights[self.conclusion_rules]
        )
        # Of the variables outside the cover, (..., worlds, m - c): e^-weight for each rule violated, then their sum.
        if_one, if_zero = if_one.exp(), if_zero.exp()
        factor = zero[..., None, c:] * if_zero + one[..., None, c:] * if_one
        log = factor.log().sum(-1) - self.inner_violated.to(one) @ weights[self.inner_rules]
        of_cover = worlds * one[..., None, :c] + (1 - worlds) * zero[..., None, :c]
        without = _product_of_others(of_cover)
        prior = of_cover.prod(-1)
        possible = torch.where(prior > 0, log.detach(), -math.inf)
        log_scale = possible.amax(-1, keepdim=True)
        # Worlds that cannot be may weigh more than all that can; they are multiplied by 0, and must not be infinite.
        scaled = (log - log_scale).clamp(max=600).exp()
        joint = (prior * scaled)[..., None]
        without = without * scaled[..., None]
        ones = torch.cat([(worlds * without).sum(-2), (joint * if_one / factor).sum(-2)], -1)
        zeros = torch.cat([((1 - worlds) * without).sum(-2), (joint * if_zero / factor).sum(-2)], -1)
        return _Masses(ones, zeros, log_scale)


class KnowledgeCircuit(nn.Module):
    """Class and concept probabilities, corrected by rules in probabilistic circuits.

    Of N = N_c + L independent variables with probabilities pi, a circuit holds the worlds mu in {0, 1}^N in proportion to
    prod_i pi_i^mu_i (1 - pi_i)^(1 - mu_i) exp(sum_k w_k 1[mu keeps rule k]), and what it says of a variable is its marginal
    probability there. Variables in several circuits take the mean of theirs, weighted by `beta`; those in no rule keep pi.
    Last, v of it is mixed with 1 - v of pi.

    Each circuit falls into blocks of variables that rules connect, whose sums are exact: their cost is 2 to the power of a
    block's cover (for classes that imply a few concepts, the concepts), not of the block.

    Implications between variables make worlds attract (f(1,1) f(0,0) >= f(1,0) f(0,1) for each rule), so that by the FKG
    inequality every corrected probability rises with every pi_i. Its least and greatest values over a box are therefore at the
    box's lowest and highest corner, and exact bounds cost two evaluations, where the paper enumerates corners.

    Args:
        n_classes: Classes N_c.
        n_concepts: Concepts L.
        rule_groups: Rules of each circuit, as one concept family each; none for probabilities as they are.
        beta: Weight of each circuit in the mean; equal ones by default.
        pc_weight: v, the share of the corrected probability.

    Attributes:
        weights: Weights of all rules (R,), group after group, in float64.
        rules: The rules of each group as given.
        table: Which class implies which concept, bool (N_c, L).
        support: Which variables each corrected probability depends on, bool (N, N).

    Raises:
        ValueError: A number out of range, a rule between variables that are not there, or rules that connect too many.
        TypeError: A group is not made of rules.

    Example:
        >>> circuit = KnowledgeCircuit(1, 1, [[Rule(if_=0, then=1, weight=2.0)]], pc_weight=1.0)
        >>> circuit(torch.tensor([[0.3, 0.6]], dtype=torch.float64))[0, 0].item()
        0.2189594...
    """

    n_classes: int
    n_concepts: int
    pc_weight: float
    rules: tuple[tuple[Rule, ...], ...]
    beta: tuple[float, ...]
    blocks: nn.ModuleList
    weights: Tensor
    table: Tensor
    support: Tensor

    def __init__(
        self,
        n_classes: int,
        n_concepts: int = 0,
        rule_groups: Sequence[Sequence[Rule]] = (),
        beta: Sequence[float] | None = None,
        pc_weight: float = 0.5,
    ) -> None:
        super().__init__()
        for name, number, least in (("n_classes", n_classes, 1), ("n_concepts", n_concepts, 0)):
            if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {number!r}")
        if not isinstance(pc_weight, Real) or not 0 <= pc_weight <= 1:
            raise ValueError(f"pc_weight is a share between 0 and 1, got {pc_weight!r}")
        self.n_classes, self.n_concepts, self.pc_weight = int(n_classes), int(n_concepts), float(pc_weight)
        if any(isinstance(group, Rule) for group in rule_groups):
            raise TypeError(
                "rule_groups holds a list of rules for each circuit, got a rule by itself: put it into a list"
            )
        self.rules = tuple(tuple(group) for group in rule_groups)
        self.beta = (1.0,) * len(self.rules) if beta is None else tuple(float(weight) for weight in beta)
        if len(self.beta) != len(self.rules) or not all(0 < weight < math.inf for weight in self.beta):
            raise ValueError(f"beta holds a number above 0 for each of {len(self.rules)} groups of rules, got {beta}")
        _check_rules(self.rules, self.n_variables)
        numbered = list(enumerate(rule for group in self.rules for rule in group))
        self.register_buffer("weights", torch.tensor([rule.weight for _, rule in numbered], dtype=torch.float64))
        table = torch.zeros(self.n_classes, self.n_concepts, dtype=torch.bool)
        support = torch.eye(self.n_variables, dtype=torch.bool)
        blocks, shares = [], []
        for group, weight in zip(self.rules, self.beta, strict=True):
            mine, numbered = numbered[: len(group)], numbered[len(group) :]
            for block in map(_Block, _connected(mine, self.n_variables)):
                blocks.append(block)
                shares.append(weight)
                support[block.variables[:, None], block.variables] = True
            for rule in group:
                if rule.if_ < self.n_classes <= rule.then:
                    table[rule.if_, rule.then - self.n_classes] = True
        self.blocks = nn.ModuleList(blocks)
        places = torch.cat([torch.zeros(0, dtype=torch.long), *(block.variables for block in blocks)])
        share = torch.cat([
            torch.zeros(0, dtype=torch.float64),
            *(torch.full((len(block.variables),), weight, dtype=torch.float64) for block, weight in zip(blocks, shares, strict=True)),
        ])  # fmt: skip
        total = torch.zeros(self.n_variables, dtype=torch.float64).index_add(0, places, share)
        for name, values in {
            "table": table,
            "support": support,
            "_places": places,
            "_share": share / total[places],
            "_untouched": (total == 0).double(),
        }.items():
            self.register_buffer(name, values, persistent=False)

    @property
    def n_variables(self) -> int:
        """Variables N, classes and concepts."""
        return self.n_classes + self.n_concepts

    @classmethod
    def from_table(
        cls,
        table: ArrayLike,
        groups: Sequence[Sequence[int]] | None = None,
        *,
        weight: float = 1.0,
        beta: Sequence[float] | None = None,
        pc_weight: float = 0.5,
    ) -> Self:
        """The circuit of a table of classes and concepts: each class implies each concept that it has.

        A class is held down where a concept of its own is not seen, so concepts that exclude one another (even and odd) tell
        most when both are there.

        Args:
            table: Whether a class has a concept (N_c, L), 0 or 1.
            groups: Concepts (0 to L - 1) of each circuit; a circuit for each concept by default.
            weight: Of every rule.
            beta: As for the constructor.
            pc_weight: As for the constructor.

        Raises:
            ValueError: The table holds other than 0 and 1, or a group names a concept that is not there.

        Example:
            >>> KnowledgeCircuit.from_table([[1, 0], [0, 1], [1, 0]]).rules[0]
            (Rule(if_=0, then=3, weight=1.0), Rule(if_=2, then=3, weight=1.0))
        """
        has = np.asarray(table)
        if has.ndim != 2 or not np.isin(has, (0, 1)).all():
            raise ValueError(f"the table holds 0 or 1 for each class and concept, (N_c, L), got {_described(has)}")
        classes, concepts = has.shape
        chosen = [[concept] for concept in range(concepts)] if groups is None else [list(group) for group in groups]
        for concept in (concept for group in chosen for concept in group):
            if not isinstance(concept, Integral) or not 0 <= concept < concepts:
                raise ValueError(f"groups name concepts from 0 to {concepts - 1}, got {concept!r}")
        rules = [
            [Rule(j, classes + int(one), weight) for one in group for j in range(classes) if has[j, one]]
            for group in chosen
        ]
        return cls(classes, concepts, rules, beta, pc_weight)

    def forward(self, pi: Tensor) -> Tensor:
        """Corrected probabilities (..., N) of probabilities (..., N), differentiable; in float64 inside, as pi is outside.

        Raises:
            ValueError: Another number of variables, or values that are not within 0 and 1.
        """
        return self._corrected(self._checked(pi).double(), self.weights).to(pi.dtype)

    def bounds(self, lo: Tensor, hi: Tensor, method: Method = "exact") -> tuple[Tensor, Tensor]:
        """The least and the greatest corrected probabilities (..., N) for pi anywhere between lo and hi (..., N).

        Args:
            lo: Least probabilities.
            hi: Greatest probabilities.
            method: "exact", or "interval" for the paper's bounds, which take numerator and denominator to their extremes
                one by one: looser, for comparison.

        Raises:
            ValueError: As for `forward`; a lower end above its upper one; another method.
        """
        lo, hi = self._checked(lo), self._checked(hi)
        if lo.shape != hi.shape or bool((lo > hi).any()):
            raise ValueError("bounds are of one shape, the lower ones at most as large as the upper ones")
        if method == "exact":
            low, high = self.forward(lo), self.forward(hi)
            # Of rounding alone.
            return torch.minimum(low, high), torch.maximum(low, high)
        if method != "interval":
            raise ValueError(f"method is exact or interval, got {method!r}")
        least, greatest = lo.double(), hi.double()
        ends = [self._interval(block, least, greatest) for block in self._blocks()]
        low, high = self._mixed(least, [end[0] for end in ends]), self._mixed(greatest, [end[1] for end in ends])
        return low.to(lo.dtype), high.to(hi.dtype)

    def fit_weights(self, pi: ArrayLike, truth: ArrayLike, *, most_iterations: int = 200) -> Self:
        """Fit the rules' weights, so that corrected probabilities make the truth likeliest; on other data than calibration's.

        Args:
            pi: Base models' probabilities (n, N).
            truth: What each variable is (n, N), 0 or 1.
            most_iterations: Of L-BFGS-B, which keeps weights at 0 or above.

        Raises:
            ValueError: Shapes that do not fit, values out of range, or a circuit without rules.
        """
        if not len(self.weights):
            raise ValueError("this circuit has no rules whose weights could be fitted")
        given = self._checked(torch.as_tensor(np.asarray(pi), dtype=torch.float64))
        wanted = torch.as_tensor(np.asarray(truth), dtype=torch.float64)
        if (
            wanted.shape != given.shape
            or given.ndim != 2
            or not len(given)
            or not bool(((wanted == 0) | (wanted == 1)).all())
        ):
            raise ValueError(
                f"truth is 0 or 1 for each of pi's values, (n, {self.n_variables}), got {_described(wanted.numpy())}"
            )
        device = self.weights.device
        given, wanted = given.to(device), wanted.to(device)

        def loss(values: Array) -> tuple[float, Array]:
            weights = torch.tensor(values, device=device, requires_grad=True)
            error = F.binary_cross_entropy(self._corrected(given, weights), wanted)
            error.backward()  # type: ignore[no-untyped-call]
            assert weights.grad is not None
            return float(error.detach()), weights.grad.cpu().numpy()

        # As large as any block may hold, shared among the rules on a variable.
        most = _MOST_WEIGHT / max(1, max(_rules_on_one_variable(group) for group in self.rules))
        start = self.weights.cpu().numpy().clip(0, most)
        found = minimize(
            loss,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, most)] * len(start),
            options={"maxiter": most_iterations},
        )
        self.weights.copy_(torch.from_numpy(found.x))
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write rules, their weights and the mixture to a folder, as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = iter(self.weights.tolist())
        kept = {
            "n_classes": self.n_classes,
            "n_concepts": self.n_concepts,
            "rule_groups": [[asdict(rule) | {"weight": next(weights)} for rule in group] for group in self.rules],
            "beta": list(self.beta),
            "pc_weight": self.pc_weight,
        }
        (folder / "circuit.json").write_text(json.dumps(kept, indent=2, default=int), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a circuit that `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds none, or a damaged one.
        """
        try:
            kept = json.loads((Path(folder) / "circuit.json").read_text(encoding="utf-8"))
            kept["rule_groups"] = [[Rule(**rule) for rule in group] for group in kept["rule_groups"]]
            return cls(**kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}, or a damaged one: {error}") from error

    def _checked(self, pi: Tensor) -> Tensor:
        if not torch.is_tensor(pi) or not pi.is_floating_point() or pi.shape[-1:] != (self.n_variables,):
            raise ValueError(
                f"probabilities are a floating-point tensor (..., {self.n_variables}), one for each class and concept, got "
                f"{_described(pi)}"
            )
        # NaN is not within either.
        if not bool(((pi >= 0) & (pi <= 1)).all()):
            raise ValueError("probabilities are within 0 and 1, got some that are not")
        return pi

    def _blocks(self) -> Iterator[_Block]:
        for block in self.blocks:
            assert isinstance(block, _Block)
            yield block

    def _corrected(self, pi: Tensor, weights: Tensor) -> Tensor:
        largest = max((len(block.worlds) * len(block.variables) for block in self._blocks()), default=1)
        rows = max(1, _MOST_NUMBERS // largest)
        if pi.ndim > 1 and pi.shape[:-1].numel() > rows:
            parts = [self._corrected(part, weights) for part in pi.flatten(0, -2).split(rows)]
            return torch.cat(parts).reshape(pi.shape)
        found = []
        for block in self._blocks():
            one = pi[..., block.variables]
            masses = block(one, 1 - one, weights)
            true, false = one * masses.one, (1 - one) * masses.zero
            found.append(true / (true + false))
        return self._mixed(pi, found)

    def _mixed(self, pi: Tensor, found: Sequence[Tensor]) -> Tensor:
        """The blocks' probabilities in one mean (..., N), mixed with pi."""
        shared = torch.cat([pi[..., :0], *found], -1) * self._buffer("_share").to(pi)
        mean = (self._buffer("_untouched").to(pi) * pi).index_add(-1, self._buffer("_places"), shared)
        return (1 - self.pc_weight) * pi + self.pc_weight * mean

    def _buffer(self, name: str) -> Tensor:
        found = getattr(self, name)
        assert torch.is_tensor(found)
        return found

    def _interval(self, block: _Block, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds 1 / (1 + V0 / V1) of a block from the extremes of V1 and of V0, each variable's own value known."""
        low, high = lo[..., block.variables], hi[..., block.variables]
        weights, premise, conclusion = self.weights.to(lo), block.is_premise, block.is_conclusion
        # Masses fall with premises and rise with conclusions; of what is both, its two factors are taken one by one.
        most = block(torch.where(conclusion, high, low), torch.where(premise, 1 - low, 1 - high), weights)
        least = block(
            torch.where(premise & ~conclusion, high, low),
            torch.where(conclusion & ~premise, 1 - low, 1 - high),
            weights,
        )
        scale = (least.log_scale - most.log_scale).exp()
        least_one, least_zero = least.one * scale, least.zero * scale
        lower = low * least_one / (low * least_one + (1 - low) * most.zero)
        upper = high * most.one / (high * most.one + (1 - high) * least_zero)
        # Where nothing is known of a variable, a mass may be 0, and its share of nothing says nothing.
        return torch.nan_to_num(lower, nan=0.0), torch.nan_to_num(upper, nan=1.0)


class SmoothedModel(nn.Module):
    """A model's mean output under Gaussian noise on its input, which no attacker within a ball can move far.

    Of f(x) within 0 and 1 (with hard votes 0 or 1), g(x) = E f(x + sigma xi), and Phi^-1(g) changes by at most delta / sigma within an l2 distance of
    delta. What is computed is the mean over `n` draws of noise, which the seed fixes: the same for every row and call, so that
    the mean is a function of x, and conformal prediction with it exact, however few the draws are. That the mean at x stays
    near g(x) holds for inputs that were chosen without knowledge of the draws; keep the seed from who may attack.

    Confidence intervals are Clopper and Pearson's for hard votes, and for soft outputs those of the Chernoff bound with the
    relative entropy (Hoeffding, 1963, theorem 1), which for means near 0 and 1 are far narrower than Hoeffding's better known
    ones.

    Args:
        f: From inputs (B, ...) to probabilities (B, K), or (B,) for K = 1; logits are refused where they show. Noise is put on
            the input, so it is in the input's unit. A module is put into evaluation mode for the while.
        sigma: Standard deviation of the noise; f should have been trained with it.
        n: Draws.
        alpha: Probability that `bounds` does not hold, for each of the K outputs.
        votes: "hard" for the share of draws for which f is above 1/2, as the paper has it, "soft" for the mean of f.
        seed: Of the draws.
        batch_size: Inputs of f at a time.

    Raises:
        ValueError: A number out of range, or other votes.
        TypeError: f cannot be called.

    Example:
        >>> steep = SmoothedModel(lambda x: (x > 0).double(), sigma=0.5, n=2000)
        >>> g = steep(torch.tensor([[0.0], [0.5], [5.0]]))
        >>> (g - torch.tensor([[0.5], [0.841], [1.0]])).abs().max().item() < 0.03
        True
        >>> lo, hi = steep.bounds(g, delta=0.25)
        >>> bool((lo < g).all() and (g <= hi).all())
        True
    """

    f: Model
    sigma: float
    n: int
    alpha: float
    votes: Votes
    seed: int
    batch_size: int

    def __init__(
        self,
        f: Model,
        sigma: float,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        votes: Votes = "hard",
        seed: int = 0,
        batch_size: int = 8192,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"f is called with inputs and gives probabilities, got a {type(f).__name__}")
        if not isinstance(sigma, Real) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma is a finite number above 0, got {sigma!r}")
        if not isinstance(alpha, Real) or not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, ends excluded, got {alpha!r}")
        for name, number, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {number!r}")
        if votes not in ("soft", "hard"):
            raise ValueError(f"votes are soft or hard, got {votes!r}")
        self.f, self.sigma, self.n, self.alpha = f, float(sigma), int(n), float(alpha)
        self.votes, self.seed, self.batch_size = votes, int(seed), int(batch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean outputs (B, K) of inputs (B, ...), in float64 and without gradients.

        Raises:
            ValueError: f gives other than probabilities, as many for each input.
        """
        x = _in_dtype_of(self.f, x)
        generator = torch.Generator().manual_seed(self.seed)
        draws = min(_DRAWS, self.n)
        rows = max(1, self.batch_size // draws)
        sums: list[Tensor] = []
        with torch.no_grad(), _evaluating(self.f):
            for begin in range(0, self.n, draws):
                noise = torch.randn((draws, *x.shape[1:]), generator=generator, dtype=torch.float32)[: self.n - begin]
                noise = self.sigma * noise.to(x)
                found = [self._outputs(part, noise) for part in x.split(rows)]
                sums = found if begin == 0 else [one + other for one, other in zip(sums, found, strict=True)]
        return torch.cat(sums) / self.n

    def _outputs(self, x: Tensor, noise: Tensor) -> Tensor:
        """Sums over the draws (B, K)."""
        inputs = (x[:, None] + noise).flatten(0, 1)
        found = _probabilities(self.f(inputs), len(inputs)).double()
        if self.votes == "hard":
            found = (found > 0.5).double()
        return found.reshape(len(x), len(noise), -1).sum(1)

    def bounds(self, estimate: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        """Between what the mean lies at any point within delta of where it was found, each with probability 1 - alpha.

        From the mean at one place to g there, by a confidence interval; from that to g anywhere within delta; and from that to
        the mean of so many draws there, again by the probabilities that it strays. At delta = 0 it is the mean itself.

        Args:
            estimate: What `forward` gave, (B, K).
            delta: Radius of the ball, in the input's l2 norm.

        Returns:
            Lower and upper bounds (B, K), within 0 and 1.

        Raises:
            ValueError: A radius that is negative or not finite.
        """
        _check_radius(delta)
        if delta == 0:
            return estimate, estimate
        found = estimate.cpu().numpy().astype(np.float64)
        level = self.alpha / 4
        lo, hi = self.mean_interval(found, 2 * level)
        shift = delta / self.sigma
        lo, hi = ndtr(ndtri(lo) - shift), ndtr(ndtri(hi) + shift)
        if self.votes == "hard":
            lo, hi = binom.ppf(level, self.n, lo) / self.n, binom.ppf(1 - level, self.n, hi) / self.n
        else:
            allowed = math.log(1 / level) / self.n
            lo = _farthest(lo, 0.0, lambda mean: _relative_entropy(mean, lo) <= allowed)
            hi = _farthest(hi, 1.0, lambda mean: _relative_entropy(mean, hi) <= allowed)
        low, high = (torch.from_numpy(np.asarray(end)).to(estimate) for end in (lo, hi))
        return torch.minimum(low, estimate), torch.maximum(high, estimate)

    def mean_interval(self, estimate: ArrayLike, alpha: float) -> tuple[Array, Array]:
        """Confidence intervals of g where the mean over the draws is `estimate`: each holds with probability 1 - alpha."""
        found = np.asarray(estimate, dtype=np.float64)
        if self.votes == "hard":
            votes = np.round(found * self.n)
            # Clopper and Pearson's ends are quantiles of beta distributions, but for none and for all votes.
            lo = np.where(votes > 0, betaincinv(np.maximum(votes, 1), self.n - votes + 1, alpha / 2), 0.0)
            hi = np.where(votes < self.n, betaincinv(votes + 1, np.maximum(self.n - votes, 1), 1 - alpha / 2), 1.0)
            return lo, hi
        allowed = math.log(2 / alpha) / self.n
        return (
            _farthest(found, 0.0, lambda g: _relative_entropy(found, g) <= allowed),
            _farthest(found, 1.0, lambda g: _relative_entropy(found, g) <= allowed),
        )


class CertifiedConformalClassifier:
    """Split conformal prediction on corrected probabilities of smoothed models, with coverage certified under attack.

    Each class j is a binary problem with probability pi_j of being true: C(x) = {j : score_j(x, 1) <= Q_j}, with Q from the
    scores of a calibration set. With "hps" the score of a label is 1 minus its probability; with "aps" it is the mass that is
    ranked above it, and a share u of its own, where u is uniform.

    For an input that may have been moved by up to delta, `predict_set_certified` keeps each class whose score is small enough
    anywhere within delta: with probability 1 - alpha or more the true class is there, whatever the attack. `predict_set`
    knows of no attack; `worst_case_coverage` bounds from below how often it holds the true class all the same. All this is
    for calibration and test samples that are exchangeable before the attack, for smoothed models whose draws the attacker
    does not know, and for models and rules that were made on other data.

    The guarantee differs from the released code in three ways. Smoothed probabilities are what is calibrated, as well as
    what is bounded. Sets at test time allow both for the draws where the input was found and for those where it came from. And
    "per_class", the calibration of the paper's text, only guarantees each binary problem: that of the true class may fail
    in every sample. "pooled", the default, takes one threshold from the scores of the true classes; "bonferroni" splits alpha
    among the classes.

    Args:
        main: Probabilities of the N_c classes, (B, N_c), of inputs (B, ...): a `SmoothedModel`, or any model whose inputs are not
            attacked. Probabilities of the concepts as well, (B, N), where `concepts` is None.
        concepts: Probabilities of the L concepts (B, L): one model, or a list of models that give some each, (B, ...) or (B,).
        circuit: Rules between classes and concepts; one without rules leaves the main model alone.
        alpha: Share of samples whose class may be missing.
        score: "hps" or "aps".
        calibration: "pooled", "bonferroni" or "per_class".
        set_correction: Also form a set of each concept that classes imply, its likelier answer always among it, and remove
            classes that contradict one with a single answer; alpha is split between classes and concepts.
        bound: How probabilities are bounded through the circuit, see `KnowledgeCircuit.bounds`.
        random_state: Of u.

    Attributes:
        probabilities_: Models' probabilities of the calibration samples (n, N).
        labels_: Their classes (n,).

    Raises:
        ValueError: A number out of range or an option that is not there.
        TypeError: No circuit, or a model that cannot be called.

    Example:
        >>> X = torch.linspace(-2, 2, 200, dtype=torch.float64)[:, None]
        >>> main = SmoothedModel(lambda x: torch.cat([torch.sigmoid(-x), torch.sigmoid(x)], 1), sigma=0.5, n=500)
        >>> classifier = CertifiedConformalClassifier(main, circuit=KnowledgeCircuit(2))
        >>> _ = classifier.fit_calibration(X, (X[:, 0] > 0).long())
        >>> classifier.predict_set([[-1.0], [1.0]]).tolist()
        [[True, False], [False, True]]
        >>> classifier.predict_set_certified([[-1.0], [0.2]], delta=0.25).tolist()
        [[True, False], [True, True]]
    """

    models: list[Model]
    circuit: KnowledgeCircuit
    alpha: float
    score: Score
    calibration: Calibration
    set_correction: bool
    bound: Method
    random_state: int
    probabilities_: Tensor
    labels_: Tensor

    def __init__(
        self,
        main: Model,
        concepts: Model | Sequence[Model] | None = None,
        circuit: KnowledgeCircuit | None = None,
        *,
        alpha: float = 0.1,
        score: Score = "hps",
        calibration: Calibration = "pooled",
        set_correction: bool = False,
        bound: Method = "exact",
        random_state: int = 0,
    ) -> None:
        if not isinstance(circuit, KnowledgeCircuit):
            raise TypeError(
                f"circuit is a KnowledgeCircuit, got {type(circuit).__name__}: KnowledgeCircuit(n_classes) has no rules"
            )
        if not isinstance(alpha, Real) or not 0 < alpha < 1:
            raise ValueError(f"alpha is a share between 0 and 1, ends excluded, got {alpha!r}")
        for name, value, allowed in (
            ("score", score, ("hps", "aps")), ("calibration", calibration, ("pooled", "bonferroni", "per_class")),
            ("bound", bound, ("exact", "interval")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
        if not isinstance(random_state, Integral) or random_state < 0:
            raise ValueError(f"random_state is a whole number of at least 0, got {random_state!r}")
        several = [] if concepts is None else list(concepts) if isinstance(concepts, (list, tuple)) else [concepts]
        self.models = [main, *several]
        for model in self.models:
            if not callable(model):
                raise TypeError(f"models are called with inputs and give probabilities, got a {type(model).__name__}")
        self.circuit, self.alpha, self.score, self.calibration = circuit, float(alpha), score, calibration
        self.set_correction, self.bound, self.random_state = bool(set_correction), bound, int(random_state)
        if set_correction and not bool(circuit.table.any()):
            raise ValueError("set_correction goes by rules from classes to concepts, and this circuit has none")

    def fit_calibration(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Self:
        """Take in samples that neither models nor rules were made on.

        Args:
            X: Inputs (n, ...), as clean as they come.
            y: Their classes (n,), whole numbers from 0 to N_c - 1; not every class needs to be there.

        Raises:
            ValueError: Values that are not finite, none at all, labels that are no classes, or models whose outputs are not
                as many as the circuit has variables.
        """
        x = _inputs(X)
        labels = self._classes_of(y, len(x))
        found = self._models_say(x)
        self._shape, self._outputs = tuple(x.shape[1:]), [one.shape[1] for one in found]
        self.probabilities_, self.labels_ = torch.cat(found, 1), labels
        self._u = self._uniform(x)
        return self

    def predict_set(self, X: ArrayLike | Tensor) -> NDArray[np.bool_]:
        """Which classes are in the set of each input, bool (B, N_c); coverage is 1 - alpha without an attack."""
        x = self._new(X)
        pi = self.circuit(torch.cat(self._models_say(x), 1))
        return self._sets(pi, pi, self._uniform(x), self.alpha).numpy()

    def predict_set_certified(self, X: ArrayLike | Tensor, delta: float) -> NDArray[np.bool_]:
        """Which classes are in the set of each input, bool (B, N_c); coverage is 1 - alpha for inputs moved by up to delta.

        Args:
            X: Inputs (B, ...), each at most delta away from where it would be without an attack.
            delta: Radius, in the l2 norm and the input's unit.

        Raises:
            ValueError: A radius that is negative or not finite, models that are not smoothed, or an alpha which the chance
                that bounds fail uses up.
        """
        x = self._new(X)
        lo, hi = self._bounds(self._models_say(x), delta)
        return self._sets(lo, hi, self._uniform(x), self.alpha - self._failure(delta)).numpy()

    def worst_case_coverage(
        self,
        delta: float,
        X: ArrayLike | Tensor | None = None,
        y: ArrayLike | Tensor | None = None,
        *,
        eta: float | None = 0.05,
    ) -> float:
        """A lower bound of how often `predict_set` holds the true class if every input is moved by up to delta.

        It is the share of samples whose class stays in the set anywhere within delta, less the chance that bounds fail, less
        sqrt(log(1 / eta) / 2n) for n being finite (Dvoretzky, Kiefer, Wolfowitz and Massart; Hoeffding for new samples).

        Args:
            delta: Radius, in the l2 norm and the input's unit.
            X: Other samples than calibration's (n, ...); the calibration samples by default, which only "pooled" without set
                correction allows, for one threshold is chosen on them and not many.
            y: Their classes.
            eta: Probability, over the samples, that the bound does not hold, at most 1/2; None for the value that it would
                tend to with more samples.

        Raises:
            ValueError: As for `predict_set_certified`; eta out of range; calibration samples where they are not allowed.
        """
        self._calibrated()
        if eta is not None and not (isinstance(eta, Real) and 0 < eta <= 0.5):
            raise ValueError(f"eta is a probability above 0 and at most 1/2, or None, got {eta!r}")
        if (X is None) != (y is None):
            raise ValueError(
                "samples come with their classes: give both X and y, or neither for the calibration samples"
            )
        if X is None:
            if eta is not None and (self.calibration != "pooled" or self.set_correction):
                raise ValueError(
                    f"with several thresholds (calibration={self.calibration!r}, set_correction={self.set_correction}) the samples "
                    "they were chosen on bound nothing: give other samples X and y, or eta=None"
                )
            found, labels, u = list(self.probabilities_.split(self._outputs, 1)), self.labels_, self._u
        else:
            x = self._new(X)
            labels, found, u = self._classes_of(y, len(x)), self._models_say(x), self._uniform(x)
        lo, hi = self._bounds(found, delta)
        truths, places = self._truths(labels), self._problems()
        likely = truths[:, places].bool()
        low, high = (torch.where(likely, one[:, places], 1 - two[:, places]) for one, two in ((lo, hi), (hi, lo)))
        kept = self._highest_score(low, high, u[:, None]) <= self._thresholds(self.alpha)
        # Where one threshold serves all classes, too, only the true one's counts.
        own = torch.ones_like(kept)
        own[:, : self.circuit.n_classes] = truths[:, : self.circuit.n_classes].bool()
        share = float((kept | ~own).all(1).double().mean())
        slack = 0.0 if eta is None else math.sqrt(math.log(1 / eta) / (2 * len(labels)))
        return max(0.0, share - self._failure(delta) - slack)

    def corrected_probabilities(self, X: ArrayLike | Tensor) -> Array:
        """Corrected probabilities of classes, then concepts, (B, N); each by itself, so that classes' need not add up to 1."""
        return self.circuit(torch.cat(self._models_say(self._new(X)), 1)).numpy()

    def predict(self, X: ArrayLike | Tensor) -> NDArray[np.int64]:
        """The class with the highest corrected probability of each input (B,)."""
        found: NDArray[np.int64] = self.corrected_probabilities(X)[:, slice(self.circuit.n_classes)].argmax(1)
        return found

    def thresholds(self) -> Array:
        """The largest score with which a class is in its set, (N_c,); infinite where the calibration set is too small."""
        self._calibrated()
        return self._thresholds(self.alpha)[: self.circuit.n_classes].numpy()

    def attack(
        self,
        X: ArrayLike | Tensor,
        y: ArrayLike | Tensor,
        delta: float,
        *,
        steps: int = 20,
        draws: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Inputs within delta whose true class has become unlikely: projected gradient descent through models and circuit.

        The attack starts anywhere on the ball's surface, goes down the log odds of the true class's corrected probability by
        steps of 2.5 delta / `steps`, and keeps the worst input that it has come by. The noise is its own, not the classifier's.

        Args:
            X: Inputs (B, ...).
            y: Their classes (B,).
            delta: Radius, in the l2 norm.
            steps: Of gradient descent.
            draws: Of noise, over which the attack takes means.
            generator: Of noise and starts.

        Returns:
            Inputs (B, ...), in float64 on the CPU.

        Raises:
            ValueError: As for `fit_calibration`, or a number out of range.
        """
        _check_radius(delta)
        for name, number in (("steps", steps), ("draws", draws)):
            if not isinstance(number, Integral) or number < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {number!r}")
        x = self._new(X)
        labels = self._classes_of(y, len(x))
        noise = torch.randn((draws, *x.shape[1:]), generator=generator, dtype=x.dtype)
        start = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        rows = max(
            1,
            min((model.batch_size for model in self.models if isinstance(model, SmoothedModel)), default=8192) // draws,
        )
        parts = zip(x.split(rows), labels.split(rows), start.split(rows), strict=True)
        return torch.cat([self._attacked(*part, noise, delta, int(steps)) for part in parts])

    def _attacked(self, x: Tensor, labels: Tensor, start: Tensor, noise: Tensor, delta: float, steps: int) -> Tensor:
        moved = delta * start / _norm(start).clamp_min(1e-12)
        worst, lowest = moved, torch.full((len(x),), math.inf, dtype=torch.float64)
        for step in range(steps + 1):
            at = (x + moved).requires_grad_()
            own = self._soft(at, noise).gather(1, labels[:, None])[:, 0]
            odds = own.clamp(1e-12, 1 - 1e-12).logit()
            better = odds.detach() < lowest
            lowest = torch.where(better, odds.detach(), lowest)
            worst = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), moved, worst)
            if step == steps:
                break
            (slope,) = torch.autograd.grad(odds.sum(), at)
            moved = moved - 2.5 * delta / steps * slope / _norm(slope).clamp_min(1e-12)
            moved = moved * (delta / _norm(moved).clamp_min(1e-12)).clamp(max=1)
        return x + worst

    def _soft(self, x: Tensor, noise: Tensor) -> Tensor:
        """Corrected probabilities (B, N) of the models' means over draws of noise, differentiable in x."""
        found = []
        with torch.enable_grad():
            for model in self.models:
                smoothed = isinstance(model, SmoothedModel)
                f = model.f if isinstance(model, SmoothedModel) else model
                inputs = (x[:, None] + model.sigma * noise).flatten(0, 1) if isinstance(model, SmoothedModel) else x
                with _evaluating(f):
                    outputs = _probabilities(f(_in_dtype_of(f, inputs)), len(inputs)).double().cpu()
                found.append(outputs.reshape(len(x), -1, outputs.shape[1]).mean(1) if smoothed else outputs)
            return self.circuit(torch.cat(found, 1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write circuit, calibration and options to a folder, as JSON and safetensors; models are kept by whoever made them."""
        self._calibrated()
        folder = Path(folder)
        self.circuit.save_pretrained(folder)
        save_file(
            {"probabilities": self.probabilities_, "labels": self.labels_, "u": self._u},
            folder / "calibration.safetensors",
        )
        kept = {
            "classifier": type(self).__name__,
            "options": {name: getattr(self, name) for name in _OPTIONS},
            "models": [_smoothing(model) for model in self.models],
            "fingerprints": [_fingerprint(model) for model in self.models],
            "shape": list(self._shape),
            "outputs": self._outputs,
        }
        (folder / "config.json").write_text(json.dumps(kept, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, main: Model, concepts: Model | Sequence[Model] | None = None) -> Self:
        """Read a classifier that `save_pretrained` wrote.

        Args:
            folder: Where it is.
            main: The model that it was calibrated with, smoothed alike.
            concepts: Those of the concepts.

        Raises:
            ValueError: The folder holds none, or a damaged one; or these are modules with other weights, or are smoothed in
                another way: thresholds guarantee nothing with them.
        """
        folder = Path(folder)
        try:
            kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "calibration.safetensors")
            if kept["classifier"] != cls.__name__:
                raise ValueError(f"it is a {kept['classifier']}")
            found = cls(main, concepts, KnowledgeCircuit.from_pretrained(folder), **kept["options"])
            found.probabilities_, found.labels_ = tensors["probabilities"], tensors["labels"]
            found._u = tensors["u"]
            found._shape, found._outputs = tuple(kept["shape"]), kept["outputs"]
            smoothing, fingerprints = kept["models"], kept["fingerprints"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}, or a damaged one: {error}") from error
        given = [_smoothing(model) for model in found.models]
        if given != smoothing:
            raise ValueError(f"thresholds hold for models smoothed as in calibration, {smoothing}, got {given}")
        if (held := [_fingerprint(model) for model in found.models]) != fingerprints:
            changed = ", ".join(
                str(number) for number, pair in enumerate(zip(held, fingerprints, strict=True)) if pair[0] != pair[1]
            )
            raise ValueError(
                f"thresholds hold for the weights that were calibrated, and model {changed} (main is 0) has others"
            )
        return found

    def _calibrated(self) -> None:
        if not hasattr(self, "probabilities_"):
            raise ValueError("this classifier has no thresholds yet: call fit_calibration with samples kept apart")

    def _new(self, X: ArrayLike | Tensor) -> Tensor:
        self._calibrated()
        x = _inputs(X)
        if tuple(x.shape[1:]) != self._shape:
            raise ValueError(
                f"inputs are (B, {', '.join(map(str, self._shape))}), as in calibration, got {tuple(x.shape)}"
            )
        return x

    def _classes_of(self, y: ArrayLike | Tensor | None, rows: int) -> Tensor:
        labels = np.asarray(y.detach().cpu() if torch.is_tensor(y) else y)
        if labels.shape != (rows,) or labels.dtype.kind not in "iu":
            raise ValueError(f"y holds a whole number for each of {rows} inputs, its class, got {_described(labels)}")
        if labels.min() < 0 or labels.max() >= self.circuit.n_classes:
            raise ValueError(
                f"classes are from 0 to {self.circuit.n_classes - 1}, got {labels.min()} to {labels.max()}"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _models_say(self, x: Tensor) -> list[Tensor]:
        """Each model's probabilities (B, k), in float64 on the CPU, together one for each variable."""
        found = []
        for model in self.models:
            if isinstance(model, SmoothedModel):
                found.append(model(x).cpu())
                continue
            with torch.no_grad(), _evaluating(model):
                found.append(_probabilities(model(_in_dtype_of(model, x)), len(x)).double().cpu())
        given = [one.shape[1] for one in found]
        if sum(given) != self.circuit.n_variables:
            raise ValueError(
                f"the circuit has {self.circuit.n_classes} classes and {self.circuit.n_concepts} concepts, and the models give "
                f"{' + '.join(map(str, given))} probabilities"
            )
        return found

    def _bounds(self, found: Sequence[Tensor], delta: float) -> tuple[Tensor, Tensor]:
        """Bounds (B, N) of corrected probabilities within delta of where the models say this."""
        _check_radius(delta)
        ends = []
        for model, estimate in zip(self.models, found, strict=True):
            if isinstance(model, SmoothedModel):
                ends.append(model.bounds(estimate, delta))
            elif delta == 0:
                ends.append((estimate, estimate))
            else:
                raise ValueError(
                    "what an attack does to a model is bounded for smoothed ones: wrap each model in SmoothedModel, and calibrate"
                )
        lo, hi = (torch.cat(end, 1) for end in zip(*ends, strict=True))
        if delta == 0:
            pi = self.circuit(lo)
            return pi, pi
        return self.circuit.bounds(lo, hi, self.bound)

    def _failure(self, delta: float) -> float:
        """The chance that a bound fails on which the true class's place in the set depends."""
        if delta == 0:
            return 0.0
        each = torch.cat([
            torch.full((outputs,), model.alpha if isinstance(model, SmoothedModel) else 0.0, dtype=torch.float64)
            for model, outputs in zip(self.models, self._outputs, strict=True)
        ])  # fmt: skip
        needed = self.circuit.support.double() @ each
        failure = float(each.sum() if self.set_correction else needed[: self.circuit.n_classes].max())
        if failure >= self.alpha:
            raise ValueError(
                f"the bounds of all probabilities fail with a chance of up to {failure:.3g}, which leaves nothing of alpha = "
                f"{self.alpha:g}: give each SmoothedModel a smaller alpha, and more draws"
            )
        return failure

    def _problems(self) -> Tensor:
        """The variables of which sets are formed: the classes, and with set correction the concepts that classes imply."""
        implied = self.circuit.table.any(0) & self.set_correction
        return torch.cat([torch.arange(self.circuit.n_classes), self.circuit.n_classes + implied.nonzero()[:, 0]])

    def _truths(self, labels: Tensor) -> Tensor:
        """What each variable is by a sample's class (n, N), 0 or 1."""
        return torch.cat([F.one_hot(labels, self.circuit.n_classes), self.circuit.table[labels].long()], 1)

    def _thresholds(self, alpha: float) -> Tensor:
        """Of each problem, so that together they fail with probability alpha."""
        problems, truths = self._problems(), self._truths(self.labels_)
        classes, concepts = self.circuit.n_classes, len(problems) - self.circuit.n_classes
        pi = self.circuit(self.probabilities_)
        likely = torch.where(truths.bool(), pi, 1 - pi)[:, problems]
        scores = self._lowest_score(likely, likely, self._u[:, None])
        if self.calibration == "pooled":
            own = scores.gather(1, self.labels_[:, None]).expand(-1, classes)
            scores = torch.cat([own, scores[:, classes:]], 1)
        together = 1 if self.calibration == "pooled" else classes
        share = 1 if self.calibration == "per_class" else together + concepts
        return conformal_quantile(scores, alpha / share)

    def _sets(self, lo: Tensor, hi: Tensor, u: Tensor, alpha: float) -> Tensor:
        """Which classes (B, N_c) are in the sets of corrected probabilities anywhere between lo and hi (B, N)."""
        problems, classes, u = self._problems(), self.circuit.n_classes, u[:, None]
        low, high, most = lo[:, problems], hi[:, problems], self._thresholds(alpha)
        true = self._lowest_score(low, high, u) <= most
        kept = true[:, :classes]
        if self.set_correction:
            false = self._lowest_score(1 - high, 1 - low, u) <= most
            # The likelier answer is always in a concept's set: an empty one would tell nothing.
            absent = ~(true | (high >= 0.5))[:, classes:]
            present = ~(false | (low <= 0.5))[:, classes:]
            has = self.circuit.table[:, problems[classes:] - classes]
            kept = kept & ~(absent[:, None] & has).any(-1) & ~(present[:, None] & ~has).any(-1)
        return kept

    def _lowest_score(self, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        """The lowest score of a label whose probability is anywhere between low and high."""
        if self.score == "hps":
            return 1 - high
        # From 1/2 on a label is ranked first, and its score rises with its probability.
        return torch.where(high >= 0.5, u * low.clamp(min=0.5), 1 - (1 - u) * high)

    def _highest_score(self, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        """The highest score of a label whose probability is anywhere between low and high."""
        if self.score == "hps":
            return 1 - low
        return torch.where(low < 0.5, 1 - (1 - u) * low, u * high)

    def _uniform(self, x: Tensor) -> Tensor:
        """A number between 0 and 1 for each input (B,), made of the input and the seed: the same whatever the batch."""
        bits = x.reshape(len(x), -1).numpy().view(np.uint64)
        bits = bits ^ (bits >> np.uint64(32))
        odd = np.random.default_rng(self.random_state).integers(2**64, size=bits.shape[1] + 1, dtype=np.uint64)
        mixed = (bits * (odd[1:] | np.uint64(1))).sum(1, dtype=np.uint64) + odd[0]
        return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_OPTIONS = ("alpha", "score", "calibration", "set_correction", "bound", "random_state")


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores, infinite where there are not that many.

    Args:
        scores: Scores (n, ...).
        alpha: Share of new scores that may be larger.

    Example:
        >>> scores = torch.arange(1.0, 10.0)
        >>> conformal_quantile(scores, 0.1).item(), conformal_quantile(scores, 0.05).item()
        (9.0, inf)
    """
    n = len(scores)
    # Rounding makes 10 * 0.9 a little more than 9.
    index = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if index > n:
        return torch.full_like(scores[0], math.inf)
    return scores.kthvalue(max(1, index), dim=0).values


def _relative_entropy(mean: Array, g: Array) -> Array:
    """Of a coin that shows heads with probability `mean` to one that does with probability g, in nats."""
    found: Array = rel_entr(mean, g) + rel_entr(1 - mean, 1 - g)
    return found


def _farthest(start: Array, end: float, allowed: Callable[[Array], NDArray[np.bool_]]) -> Array:
    """How far one may go from start towards end; from the first place that is not allowed on none is."""
    inside, outside = start, np.full_like(start, end)
    for _ in range(60):
        middle = (inside + outside) / 2
        fine = allowed(middle)
        inside, outside = np.where(fine, middle, inside), np.where(fine, outside, middle)
    # The outer end, so that rounding makes intervals wider.
    return outside


def _product_of_others(values: Tensor) -> Tensor:
    """For each entry of the last dimension the product of all the others."""
    ones = torch.ones_like(values[..., :1])
    before = torch.cat([ones, values[..., :-1]], -1).cumprod(-1)
    after = torch.cat([ones, values.flip(-1)[..., :-1]], -1).cumprod(-1).flip(-1)
    return before * after


def _vertex_cover(rules: Sequence[Rule]) -> list[int]:
    """Variables of which every rule has one, those with the most rules first."""
    left = {(rule.if_, rule.then) for rule in rules}
    cover = []
    while left:
        count: dict[int, int] = {}
        for pair in left:
            for variable in pair:
                count[variable] = count.get(variable, 0) + 1
        chosen = max(count, key=lambda variable: (count[variable], variable))
        cover.append(chosen)
        left = {pair for pair in left if chosen not in pair}
    return cover


def _connected(rules: Sequence[tuple[int, Rule]], variables: int) -> list[list[tuple[int, Rule]]]:
    """Rules in parts that share no variable."""
    if not rules:
        return []
    ends = np.array([(rule.if_, rule.then) for _, rule in rules]).T
    graph = coo_array((np.ones(len(rules)), (ends[0], ends[1])), shape=(variables, variables))
    part = connected_components(graph, directed=False)[1][ends[0]]
    return [[rule for rule, own in zip(rules, part, strict=True) if own == one] for one in np.unique(part)]


def _check_rules(groups: Sequence[Sequence[Rule]], variables: int) -> None:
    for group in groups:
        total: dict[int, float] = {}
        for rule in group:
            if not isinstance(rule, Rule):
                raise TypeError(f"a group holds rules, got a {type(rule).__name__}: give a group for each circuit")
            for variable in (rule.if_, rule.then):
                if variable >= variables:
                    raise ValueError(f"variables are numbered from 0 to {variables - 1}, and {rule} names {variable}")
                total[variable] = total.get(variable, 0.0) + rule.weight
        if total and max(total.values()) > _MOST_WEIGHT:
            raise ValueError(
                f"weights of the rules on one variable add up to at most {_MOST_WEIGHT:g}, got {max(total.values()):g}: 50 is as "
                "good as certain"
            )


def _rules_on_one_variable(group: Sequence[Rule]) -> int:
    variables = [variable for rule in group for variable in (rule.if_, rule.then)]
    return max((variables.count(variable) for variable in set(variables)), default=0)


def _check_radius(delta: float) -> None:
    if not isinstance(delta, Real) or not 0 <= delta < math.inf:
        raise ValueError(f"delta is a radius, a finite number of at least 0, got {delta!r}")


def _inputs(X: ArrayLike | Tensor) -> Tensor:
    """Inputs (B, ...) in float64 on the CPU."""
    try:
        x = X.detach().cpu().double() if torch.is_tensor(X) else torch.from_numpy(np.array(X, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"inputs are numbers, (B, ...), got a {type(X).__name__} that holds others: {error}"
        ) from error
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"inputs are (B, ...) with at least one input and one feature, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("inputs hold NaN or infinity: give finite numbers")
    return x.contiguous()


def _in_dtype_of(f: Model, x: Tensor) -> Tensor:
    """Inputs as a module's weights are, in dtype and device; as they are for what is no module or has no weights."""
    weights = (
        next((one for one in f.parameters() if one.is_floating_point()), None) if isinstance(f, nn.Module) else None
    )
    return x if weights is None else x.to(weights)


def _probabilities(outputs: Any, rows: int) -> Tensor:
    """A model's outputs (B, K), checked."""
    if not torch.is_tensor(outputs) or outputs.ndim not in (1, 2) or len(outputs) != rows:
        raise ValueError(
            f"a model gives probabilities (B, K) of inputs (B, ...), and of {rows} inputs gave {_described(outputs)}"
        )
    if not bool(((outputs >= 0) & (outputs <= 1)).all()):
        raise ValueError(
            "a model gives probabilities within 0 and 1, and gave others: end it with a sigmoid or softmax"
        )
    return outputs.reshape(rows, -1)


def _fingerprint(model: Model) -> str:
    """Of a module's weights and buffers; empty for what is no module."""
    f = model.f if isinstance(model, SmoothedModel) else model
    digest = hashlib.sha256()
    for name, values in f.state_dict().items() if isinstance(f, nn.Module) else ():
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if isinstance(f, nn.Module) else ""


def _smoothing(model: Model) -> dict[str, Any]:
    names = ("sigma", "n", "alpha", "votes", "seed")
    return {name: getattr(model, name) for name in names} if isinstance(model, SmoothedModel) else {}


@contextmanager
def _evaluating(f: Model) -> Iterator[None]:
    """A module in evaluation mode, each part brought back to its own mode afterwards."""
    parts = [part for part in f.modules() if part.training] if isinstance(f, nn.Module) else []
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def _norm(x: Tensor) -> Tensor:
    """The l2 norm of each input (B, 1, ...)."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def _described(values: Any) -> str:
    if hasattr(values, "shape") and hasattr(values, "dtype"):
        return f"{tuple(values.shape)} of {values.dtype}"
    return f"a {type(values).__name__}"
