"""CertifiedConformalClassifier, its circuit and its smoothed models (arXiv 2403.11348)."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm
from torch import nn

from paperworks.uncertainty.certified_conformal import (
    CertifiedConformalClassifier,
    KnowledgeCircuit,
    Rule,
    SmoothedModel,
    conformal_quantile,
)

CALIBRATIONS = ("pooled", "bonferroni", "per_class")
SCORES = ("hps", "aps")


def as_given(x):
    """A model whose inputs are its probabilities."""
    return x


def worlds(variables: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([0, 1], repeat=variables)), dtype=torch.float64)


def brute_force(circuit: KnowledgeCircuit, pi: torch.Tensor) -> torch.Tensor:
    """Corrected probabilities by sums over all 2^N worlds of each group."""
    mu = worlds(circuit.n_variables)
    prior = (pi[:, None] * mu + (1 - pi[:, None]) * (1 - mu)).prod(-1)
    total, mean = torch.zeros(pi.shape[1], dtype=torch.float64), torch.zeros_like(pi)
    for group, weight in zip(circuit.rules, circuit.beta, strict=True):
        kept = sum(rule.weight * (1 - mu[:, rule.if_] * (1 - mu[:, rule.then])) for rule in group)
        joint = prior * torch.exp(kept)
        held = torch.zeros_like(total)
        for rule in group:
            held[[rule.if_, rule.then]] = 1
        mean = mean + weight * held * (joint @ mu) / joint.sum(1, keepdim=True)
        total = total + weight * held
    mean = torch.where(total > 0, mean / total.clamp_min(1e-300), pi)
    return (1 - circuit.pc_weight) * pi + circuit.pc_weight * mean


def random_circuit(seed: int, most: int = 8) -> tuple[KnowledgeCircuit, np.random.Generator]:
    random = np.random.default_rng(seed)
    variables = int(random.integers(2, most + 1))
    classes = int(random.integers(1, variables + 1))
    groups = [
        [
            Rule(*map(int, random.choice(variables, 2, replace=False)), weight=float(random.uniform(0, 4)))
            for _ in range(random.integers(1, 8))
        ]
        for _ in range(random.integers(1, 4))
    ]
    return (
        KnowledgeCircuit(
            classes, variables - classes, groups, beta=random.uniform(0.2, 2, len(groups)).tolist(),
            pc_weight=float(random.uniform(0.2, 1)),
        ),
        random,
    )  # fmt: skip


def boxes(circuit: KnowledgeCircuit, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ends = np.sort(random.uniform(size=(2, 1, circuit.n_variables)), axis=0)
    return torch.from_numpy(ends[0]), torch.from_numpy(ends[1])


@pytest.mark.parametrize("p, q, w", [(0.3, 0.6, 2.0), (0.9, 0.05, 1.0), (0.5, 0.5, 0.0), (0.01, 0.99, 7.0)])
def test_1_one_rule_has_a_closed_form(p, q, w):
    circuit = KnowledgeCircuit(1, 1, [[Rule(0, 1, w)]], pc_weight=1.0)
    found = circuit(torch.tensor([p, q], dtype=torch.float64))
    true = p * q * math.exp(w) + p * (1 - q)
    assert found[0].item() == pytest.approx(true / (true + (1 - p) * math.exp(w)), abs=1e-14)
    # The conclusion: it is 1 with q in all worlds but that in which the premise alone is true.
    of_one = q * math.exp(w)
    assert found[1].item() == pytest.approx(of_one / (of_one + (1 - q) * (p + (1 - p) * math.exp(w))), abs=1e-14)
    if (p, q, w) == (0.3, 0.6, 2.0):
        assert found[0].item() == pytest.approx(0.218959411, abs=5e-10)


def test_1_no_weight_or_no_rules_change_nothing_and_great_weight_is_logic():
    pi = torch.rand(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for circuit in (
        KnowledgeCircuit(3, 2),
        KnowledgeCircuit(3, 2, [[Rule(0, 3, 0.0), Rule(1, 4, 0.0)]], pc_weight=1.0),
    ):
        assert torch.allclose(circuit(pi), pi, atol=1e-15)
        assert all(torch.allclose(end, pi, atol=1e-15) for end in circuit.bounds(pi, pi))
    certain = KnowledgeCircuit(1, 1, [[Rule(0, 1, 500.0)]], pc_weight=1.0)
    assert certain(torch.tensor([0.4, 0.0], dtype=torch.float64))[0].item() < 1e-100
    assert certain(torch.tensor([0.4, 1.0], dtype=torch.float64))[0].item() == pytest.approx(0.4, abs=1e-15)
    # Evidence that leaves only the violated world.
    assert certain(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist() == [1.0, 0.0]


def test_many_rows_are_taken_in_parts(monkeypatch):
    circuit, random = random_circuit(3)
    pi = torch.from_numpy(random.uniform(size=(2, 11, circuit.n_variables)))
    whole = circuit(pi)
    monkeypatch.setattr("paperworks.uncertainty.certified_conformal._MOST_NUMBERS", 1)
    assert torch.allclose(circuit(pi), whole, rtol=0, atol=1e-15)


def test_evidence_against_great_weights_is_evidence():
    # What rules would have is e^1400 times as likely, and impossible.
    rules = [Rule(0, 4, 350.0), Rule(1, 4, 350.0), Rule(2, 5, 350.0), Rule(3, 5, 350.0), Rule(0, 5, 0.0)]
    circuit = KnowledgeCircuit(4, 2, [rules], pc_weight=1.0)
    pi = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert circuit(pi).tolist() == pi.tolist() and circuit(pi.float()).tolist() == pi.tolist()


def test_mixtures_are_of_circuits_that_hold_a_variable():
    # Variable 0 is in both circuits, 1 in the first, 2 in the second, 3 in none.
    first, second = [Rule(0, 1, 2.0)], [Rule(0, 2, 3.0)]
    pi = torch.tensor([[0.7, 0.2, 0.4, 0.9]], dtype=torch.float64)
    alone = [KnowledgeCircuit(4, 0, [group], pc_weight=1.0)(pi)[0] for group in (first, second)]
    mixed = KnowledgeCircuit(4, 0, [first, second], beta=[1.0, 3.0], pc_weight=0.25)(pi)[0]
    means = torch.stack([0.25 * alone[0][0] + 0.75 * alone[1][0], alone[0][1], alone[1][2], pi[0, 3]])
    assert torch.allclose(mixed, 0.75 * pi[0] + 0.25 * means, atol=1e-15)
    assert KnowledgeCircuit(4, 0).pc_weight == 0.5 and Rule(0, 1).weight == 1.0
    equal = KnowledgeCircuit(4, 0, [first, second], pc_weight=1.0)(pi)[0, 0]
    assert equal.item() == pytest.approx(float(alone[0][0] + alone[1][0]) / 2, abs=1e-15)


@pytest.mark.parametrize("seed", range(25))
def test_2_blocks_are_brute_force_over_all_worlds(seed):
    circuit, random = random_circuit(seed)
    pi = torch.from_numpy(random.uniform(size=(12, circuit.n_variables)))
    pi[:4] = torch.from_numpy(random.integers(0, 2, (4, circuit.n_variables))).double()
    found = circuit(pi)
    assert torch.allclose(found, brute_force(circuit, pi), rtol=0, atol=1e-12)
    assert bool(((found >= 0) & (found <= 1)).all())
    # Any batch shape, and in float32 to its own digits.
    assert torch.equal(circuit(pi.reshape(3, 4, -1)).reshape(12, -1), found)
    assert torch.allclose(circuit(pi.float()).double(), found, atol=1e-5) and circuit(pi.float()).dtype == torch.float32


@pytest.mark.parametrize("seed", range(4))
def test_2_gradients_are_those_of_differences(seed):
    circuit, random = random_circuit(seed, most=6)
    pi = torch.from_numpy(random.uniform(0.05, 0.95, size=(2, circuit.n_variables))).requires_grad_()
    assert torch.autograd.gradcheck(circuit, (pi,))


def test_many_classes_of_one_concept_take_no_enumeration():
    # 2^60 worlds, in closed form given the concept.
    classes, q, w = 60, 0.3, 1.5
    circuit = KnowledgeCircuit.from_table(np.ones((classes, 1)), weight=w, pc_weight=1.0)
    p = torch.linspace(0.01, 0.99, classes, dtype=torch.float64)
    found = circuit(torch.cat([p, torch.tensor([q], dtype=torch.float64)]))
    kept = (1 - p + p * math.exp(-w)).prod()
    assert found[-1].item() == pytest.approx(float(q / (q + (1 - q) * kept)), abs=1e-14)
    with pytest.raises(ValueError, match="split the rules into more groups"):
        KnowledgeCircuit.from_table(np.ones((20, 20)), groups=[list(range(20))])


@pytest.mark.parametrize("seed", range(25))
def test_3_exact_bounds_are_attained_at_corners_and_interior_points_lie_between(seed):
    circuit, random = random_circuit(seed, most=7)
    lo, hi = boxes(circuit, random)
    low, high = circuit.bounds(lo, hi)
    at_corners = brute_force(circuit, lo + (hi - lo) * worlds(circuit.n_variables))
    assert torch.allclose(low[0], at_corners.min(0).values, rtol=0, atol=1e-12)
    assert torch.allclose(high[0], at_corners.max(0).values, rtol=0, atol=1e-12)
    inside = circuit(lo + (hi - lo) * torch.from_numpy(random.uniform(size=(1000, circuit.n_variables))))
    assert bool(((inside >= low - 1e-12) & (inside <= high + 1e-12)).all())
    loose_low, loose_high = circuit.bounds(lo, hi, "interval")
    assert bool(((loose_low <= low + 1e-12) & (loose_high >= high - 1e-12)).all())


def test_3_interval_bounds_are_the_papers_and_never_tighter_at_the_ends_of_everything():
    # One rule: V1 = p (q + (1 - q) e^-w) and V0 = 1 - p, with q lowest and highest in turn.
    circuit = KnowledgeCircuit(1, 1, [[Rule(0, 1, 1.0)]], pc_weight=1.0)
    lo, hi = torch.tensor([0.3, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)
    low, high = circuit.bounds(lo, hi, "interval")
    true = [p * (q + (1 - q) * math.exp(-1)) for p, q in ((0.3, 0.2), (0.5, 0.9))]
    assert low[0].item() == pytest.approx(true[0] / (true[0] + 0.7), abs=1e-14)
    assert high[0].item() == pytest.approx(true[1] / (true[1] + 0.5), abs=1e-14)
    # Two classes share a concept: numerator and denominator take the other class to different ends.
    shared = KnowledgeCircuit(2, 1, [[Rule(0, 2, 2.0), Rule(1, 2, 2.0)]], pc_weight=1.0)
    lo, hi = torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64), torch.tensor([0.6, 0.9, 0.7], dtype=torch.float64)
    exact, loose = shared.bounds(lo, hi), shared.bounds(lo, hi, "interval")
    assert (loose[1] - loose[0] > exact[1] - exact[0] + 0.01)[:2].all()
    for chain in (KnowledgeCircuit(3, 0, [[Rule(0, 1), Rule(1, 2)]]), shared):
        low, high = chain.bounds(torch.zeros(3), torch.ones(3), "interval")
        assert (low <= chain(torch.zeros(3))).all() and (high >= chain(torch.ones(3))).all()


@pytest.mark.parametrize("method", ["exact", "interval"])
@pytest.mark.parametrize("seed", range(5))
def test_3_a_box_of_one_point_has_that_points_probability(seed, method):
    circuit, random = random_circuit(seed)
    pi = torch.from_numpy(random.uniform(size=(6, circuit.n_variables)))
    for end in circuit.bounds(pi, pi, method):
        assert torch.allclose(end, circuit(pi), rtol=0, atol=1e-12)


class Exactly(SmoothedModel):
    """A model whose smoothed value is known, and so are its bounds."""

    def __init__(self, smoothed, sigma):
        super().__init__(smoothed, sigma, n=1, alpha=1e-12)

    def forward(self, x):
        return self.f(x)

    def bounds(self, estimate, delta):
        z = torch.special.ndtri(estimate)
        return tuple(torch.special.ndtr(z + sign * delta / self.sigma) for sign in (-1, 1))


def three_classes(rows: int, seed: int, spread: float = 1.0):
    """Points around the corners of a triangle, and which corner."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, rows)
    corners = np.array([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])
    return torch.from_numpy(corners[y] + spread * random.standard_normal((rows, 2))), torch.from_numpy(y), corners


def triangle(smoothed=None, **options):
    """Probabilities of three classes and of two concepts, "right" and "above", with rules."""
    corners = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]], dtype=torch.float64)

    def main(x):
        return torch.softmax(2 * x.to(corners) @ corners.T, 1)

    def concepts(x):
        return torch.sigmoid(3 * x.double())

    table = [[1, 0], [0, 1], [0, 0]]
    circuit = KnowledgeCircuit.from_table(table, weight=2.0, pc_weight=1.0)
    make = smoothed or (lambda f: f)
    return CertifiedConformalClassifier(make(main), make(concepts), circuit, **options)


@pytest.mark.parametrize("calibration, score", [*itertools.product(CALIBRATIONS, SCORES)])
def test_3_without_a_radius_the_certified_set_is_the_plain_one_and_sets_grow_with_it(calibration, score):
    x, y, _ = three_classes(300, 0)
    new = three_classes(200, 1)[0]
    options = {"calibration": calibration, "score": score}
    for make in (None, lambda f: Exactly(f, 0.5), lambda f: SmoothedModel(f, 0.5, n=300)):
        classifier = triangle(make, **options).fit_calibration(x, y)
        plain = classifier.predict_set(new)
        assert np.array_equal(classifier.predict_set_certified(new, 0.0), plain)
        assert classifier.worst_case_coverage(0.0, new, three_classes(200, 1)[1], eta=None) == pytest.approx(
            plain[np.arange(200), three_classes(200, 1)[1]].mean()
        )
    # Exact smoothed values, in the limit of a radius of nothing.
    exact = triangle(lambda f: Exactly(f, 0.5), **options).fit_calibration(x, y)
    assert np.array_equal(exact.predict_set_certified(new, 1e-13), exact.predict_set(new))
    sets = [exact.predict_set_certified(new, delta) for delta in (0.0, 0.05, 0.1, 0.3, 1.0)]
    assert all((small <= large).all() for small, large in itertools.pairwise(sets))
    assert sets[-1].sum() > sets[0].sum()
    worst = [exact.worst_case_coverage(delta, eta=None) for delta in (0.0, 0.05, 0.1, 0.3, 1.0)]
    assert worst == sorted(worst, reverse=True) and worst[-1] < worst[0]


def wrong_circuit(seed: int) -> KnowledgeCircuit:
    random = np.random.default_rng(seed)
    rules = [Rule(*map(int, random.choice(5, 2, replace=False)), weight=float(random.uniform(0, 5))) for _ in range(8)]
    return KnowledgeCircuit(3, 2, [rules], pc_weight=1.0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("circuit", [KnowledgeCircuit(3, 2), wrong_circuit(0)])
def test_4_pooled_sets_cover_as_often_as_they_should_whatever_the_rules(circuit, score):
    random, n, alpha, hits = np.random.default_rng(5), 49, 0.1, []
    for _ in range(500):
        y = random.integers(0, 3, n + 200)
        pi = random.uniform(0.02, 0.98, (n + 200, 5))
        pi[np.arange(len(y)), y] = random.beta(4, 2, len(y))
        classifier = CertifiedConformalClassifier(as_given, circuit=circuit, alpha=alpha, score=score)
        sets = classifier.fit_calibration(pi[:n], y[:n]).predict_set(pi[n:])
        hits.append(sets[np.arange(200), y[n:]].mean())
    error = 3 * np.std(hits) / 500**0.5
    assert 1 - alpha - error <= np.mean(hits) <= 1 - alpha + 1 / (n + 1) + error


def test_4_each_binary_problem_may_be_valid_and_the_true_class_never_there():
    random = np.random.default_rng(0)
    y = random.integers(0, 20, 4000)
    pi = np.full((4000, 20), 0.0) + random.uniform(0.0, 0.01, (4000, 20))
    coverage = {}
    for calibration in CALIBRATIONS:
        classifier = CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(20), calibration=calibration)
        classifier.fit_calibration(pi[:2000], y[:2000])
        sets = classifier.predict_set(pi[2000:])
        coverage[calibration] = sets[np.arange(2000), y[2000:]].mean()
        if calibration == "per_class":
            # A class's problem is right where the true label, there or not, is no stranger than its threshold.
            scores = np.where(np.eye(20, dtype=bool)[y[2000:]], 1 - pi[2000:], pi[2000:])
            assert (scores <= classifier.thresholds()).mean(0).min() >= 0.88
    assert coverage["per_class"] == 0.0
    assert coverage["pooled"] >= 0.88 and coverage["bonferroni"] >= 0.88


def test_6_quantiles_are_order_statistics_and_infinite_where_there_are_too_few():
    scores = torch.from_numpy(np.random.default_rng(0).permutation(199)).double()
    for n, alpha, index in ((9, 0.1, 9), (99, 0.1, 90), (199, 0.05, 190), (19, 0.05, 19), (10, 0.1, 10), (50, 0.2, 41)):
        assert conformal_quantile(scores[:n], alpha).item() == scores[:n].sort().values[index - 1].item()
    assert conformal_quantile(scores[:8], 0.1).item() == math.inf
    x, y, _ = three_classes(8, 0)
    assert triangle().fit_calibration(x, y).predict_set(three_classes(50, 1)[0]).all()
    assert np.isinf(triangle().fit_calibration(x, y).thresholds()).all()
    assert np.isfinite(triangle().fit_calibration(*three_classes(9, 0)[:2]).thresholds()).all()


def test_5_confidence_intervals_are_clopper_and_pearsons_and_hoeffdings():
    hard = SmoothedModel(as_given, 0.5, n=200, votes="hard")
    votes = np.array([0, 1, 57, 100, 199, 200])
    lo, hi = hard.mean_interval(votes / 200, 0.01)
    assert lo[1:] == pytest.approx(beta.ppf(0.005, votes[1:], 201 - votes[1:]), abs=1e-12) and lo[0] == 0
    assert hi[:-1] == pytest.approx(beta.ppf(0.995, votes[:-1] + 1, 200 - votes[:-1]), abs=1e-12) and hi[-1] == 1
    soft = SmoothedModel(as_given, 0.5, n=200, votes="soft")
    means = np.linspace(0, 1, 21)
    lo, hi = soft.mean_interval(means, 0.01)
    half = math.sqrt(math.log(2 / 0.01) / 400)
    assert (lo >= means - half).all() and (hi <= means + half).all() and (lo <= means).all() and (hi >= means).all()
    # At no vote, where the relative entropy is -log(1 - g).
    assert hi[0] == pytest.approx(1 - math.exp(-math.log(200) / 200), abs=1e-12) and lo[0] == 0
    assert 1 - lo[-1] == pytest.approx(hi[0], abs=1e-12)
    assert hi[10] < 0.5 + half and hi[1] - means[1] < 0.6 * half


def test_5_bounds_go_from_a_mean_to_g_to_g_nearby_to_a_mean_there():
    sigma, n, delta, level, seen = 0.4, 300, 0.2, 0.02 / 4, 0.7
    hard, soft = (SmoothedModel(as_given, sigma, n=n, alpha=0.02, votes=votes) for votes in ("hard", "soft"))
    estimate = torch.tensor([[seen]], dtype=torch.float64)
    g = beta.ppf(level, 210, 91), beta.ppf(1 - level, 211, 90)
    nearby = [norm.cdf(norm.ppf(one) + sign * delta / sigma) for one, sign in zip(g, (-1, 1), strict=True)]
    low, high = (end.item() for end in hard.bounds(estimate, delta))
    assert low == pytest.approx(binom.ppf(level, n, nearby[0]) / n, abs=1e-12)
    assert high == pytest.approx(binom.ppf(1 - level, n, nearby[1]) / n, abs=1e-12)

    def entropy(mean, g):
        return mean * math.log(mean / g) + (1 - mean) * math.log((1 - mean) / (1 - g))

    # Each step with probability level on each side, by Chernoff.
    allowed = math.log(1 / level) / n
    g = [brentq(lambda g: entropy(seen, g) - allowed, *ends) for ends in ((1e-9, seen), (seen, 1 - 1e-9))]
    nearby = [norm.cdf(norm.ppf(one) + sign * delta / sigma) for one, sign in zip(g, (-1, 1), strict=True)]
    low, high = (end.item() for end in soft.bounds(estimate, delta))
    assert low == pytest.approx(brentq(lambda mean: entropy(mean, nearby[0]) - allowed, 1e-9, nearby[0]), abs=1e-9)
    assert high == pytest.approx(brentq(lambda mean: entropy(mean, nearby[1]) - allowed, nearby[1], 1 - 1e-9), abs=1e-9)


@pytest.mark.parametrize("votes", ["soft", "hard"])
def test_5_intervals_hold_as_often_as_they_say(votes):
    random, n = np.random.default_rng(0), 60
    for g in (0.03, 0.3, 0.9):
        draws = random.binomial(n, g, 20_000) / n
        model = SmoothedModel(as_given, 0.5, n=n, votes=votes)
        lo, hi = model.mean_interval(draws, 0.1)
        assert ((lo <= g) & (g <= hi)).mean() >= 0.9 - 0.007


LINEAR_W, LINEAR_B = torch.tensor([1.5, -2.0], dtype=torch.float64), 0.3


def linear(x: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(x.to(LINEAR_W) @ LINEAR_W + LINEAR_B)


def linear_smoothed(x: torch.Tensor, sigma: float, votes: str) -> torch.Tensor:
    """Phi((w.x + b) / sqrt(1 + sigma^2 |w|^2)); of hard votes the share of noise that leaves w.x + b above 0."""
    z, norm_w = x @ LINEAR_W + LINEAR_B, float(LINEAR_W.norm())
    scale = sigma * norm_w if votes == "hard" else math.sqrt(1 + (sigma * norm_w) ** 2)
    return torch.special.ndtr(z / scale)


@pytest.mark.parametrize("votes", ["soft", "hard"])
def test_5_a_linear_classifiers_smoothed_value_and_attack_lie_within_the_bounds(votes):
    sigma, n = 0.5, 4000
    x = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = SmoothedModel(linear, sigma, n=n, votes=votes, alpha=1e-3)
    estimate = model(x)
    g = linear_smoothed(x, sigma, votes)
    assert (estimate[:, 0] - g).abs().max() < 5 * 0.5 / n**0.5
    lo, hi = model.mean_interval(estimate, 1e-3)
    assert ((lo[:, 0] <= g.numpy()) & (g.numpy() <= hi[:, 0])).all()
    direction = LINEAR_W / LINEAR_W.norm()
    for delta in (0.125, 0.25, 0.5):
        low, high = model.bounds(estimate, delta)
        for sign in (-1, 1):
            moved = x + sign * delta * direction
            for value in (linear_smoothed(moved, sigma, votes), model(moved)[:, 0]):
                assert bool(((low[:, 0] <= value) & (value <= high[:, 0])).all())
    # Hard votes of a linear classifier are the case in which the bound is reached: up to the draws it is tight.
    if votes == "hard":
        many = SmoothedModel(linear, sigma, n=10**9, votes="hard")
        low, high = many.bounds(g[:, None], 0.25)
        assert torch.allclose(low[:, 0], linear_smoothed(x - 0.25 * direction, sigma, votes), atol=5e-4)
        assert torch.allclose(high[:, 0], linear_smoothed(x + 0.25 * direction, sigma, votes), atol=5e-4)


def test_5_the_seed_decides_the_draws_and_batches_nothing():
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = SmoothedModel(linear, 0.5, n=700)
    assert torch.equal(model(x), SmoothedModel(linear, 0.5, n=700, seed=0)(x))
    assert not torch.equal(model(x), SmoothedModel(linear, 0.5, n=700, seed=1)(x))
    assert torch.allclose(model(x[7:8]), model(x)[7:8], atol=1e-15)
    assert torch.allclose(SmoothedModel(linear, 0.5, n=700, batch_size=3)(x), model(x), atol=1e-15)


@pytest.mark.parametrize("votes", ["soft", "hard"])
def test_5_certified_numbers_hold_under_the_optimal_attack_in_1000_draws(votes):
    """Each draw: calibration samples, labels from the model's own probabilities, test samples at their worst place."""
    sigma, delta, alpha, n, draws = 0.5, 0.25, 0.1, 200, 400
    random = np.random.default_rng(1)
    x = torch.from_numpy(random.standard_normal((2000, 2)))
    y = (torch.from_numpy(random.uniform(size=len(x))) < linear(x)).long()
    # The true class is made unlikely: against the direction for class 1, along it for class 0.
    attacked = x + delta * (1 - 2 * y[:, None]) * LINEAR_W / LINEAR_W.norm()
    smoothed = SmoothedModel(lambda x: torch.stack([1 - linear(x), linear(x)], 1), sigma, n=draws, votes=votes)
    means = smoothed(torch.cat([x, attacked]))
    values = means.unique()
    bounds_of = smoothed.bounds(values, delta)

    class Remembered(SmoothedModel):
        """Of the number of a row what is known of it."""

        def forward(self, x):
            return means[x[:, 0].long()]

        def bounds(self, estimate, delta):
            return tuple(end[torch.searchsorted(values, estimate)] for end in bounds_of)

    main = Remembered(linear, sigma, n=draws, votes=votes)
    certified, plain, bounds = [], [], []
    for _ in range(1000):
        chosen = torch.from_numpy(random.permutation(len(x)))
        classifier = CertifiedConformalClassifier(main, circuit=KnowledgeCircuit(2), alpha=alpha)
        classifier.fit_calibration(chosen[:n, None], y[chosen[:n]])
        moved, truth = chosen[n:, None] + len(x), (np.arange(len(x) - n), y[chosen[n:]].numpy())
        certified.append(classifier.predict_set_certified(moved, delta)[truth].mean())
        plain.append(classifier.predict_set(moved)[truth].mean())
        bounds.append(classifier.worst_case_coverage(delta, eta=0.01))
    assert np.mean(certified) >= 1 - alpha - 3 * np.std(certified) / 1000**0.5
    assert 0.1 < np.mean(bounds) < np.mean(plain) < np.mean(certified)
    assert (np.array(plain) < bounds).sum() == 0


def test_8_worst_case_coverage_is_the_share_that_stays_less_what_chance_takes():
    x, y, _ = three_classes(400, 0)
    classifier = triangle(lambda f: SmoothedModel(f, 0.5, n=500, alpha=1e-3)).fit_calibration(x, y)
    lo, hi = (
        torch.cat(ends, 1) for ends in zip(*(model.bounds(model(x), 0.2) for model in classifier.models), strict=True)
    )
    low = classifier.circuit(lo).gather(1, y[:, None])[:, 0]
    share = float((1 - low <= classifier.thresholds()[0]).double().mean())
    # A class depends on itself, its concept, and whatever other class implies that: two variables here.
    assert classifier.worst_case_coverage(0.2, eta=None) == pytest.approx(share - 0.002, abs=1e-12)
    assert classifier.worst_case_coverage(0.2, eta=0.05) == pytest.approx(
        share - 0.002 - math.sqrt(math.log(20) / 800), abs=1e-12
    )
    assert classifier.worst_case_coverage(0.2, x, y, eta=0.05) == classifier.worst_case_coverage(0.2, eta=0.05)
    assert classifier.worst_case_coverage(5.0) == 0.0


def test_7_certified_sets_allow_for_the_draws():
    x, y, _ = three_classes(400, 0)
    new = three_classes(300, 1)[0]
    classifier = triangle(lambda f: SmoothedModel(f, 0.5, n=500, alpha=1e-2)).fit_calibration(x, y)
    scores = 1 - classifier.circuit(classifier.probabilities_).gather(1, y[:, None])[:, 0]
    most = conformal_quantile(scores, 0.1 - 0.02)
    _, hi = (
        torch.cat(end, 1) for end in zip(*(model.bounds(model(new), 0.1) for model in classifier.models), strict=True)
    )
    assert np.array_equal(
        classifier.predict_set_certified(new, 0.1), (1 - classifier.circuit(hi)[:, :3] <= most).numpy()
    )
    greedy = triangle(lambda f: SmoothedModel(f, 0.5, n=500, alpha=0.06)).fit_calibration(x, y)
    with pytest.raises(ValueError, match="smaller alpha, and more draws"):
        greedy.predict_set_certified(new, 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_4_aps_scores_are_the_mass_above_and_a_share_of_ones_own(seed):
    random = np.random.default_rng(seed)
    classifier = CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(3), score="aps")
    p, u = torch.from_numpy(random.uniform(size=(500, 3))), torch.from_numpy(random.uniform(size=(500, 1)))
    above = torch.where(1 - p > p, 1 - p, 0.0)
    assert torch.allclose(classifier._lowest_score(p, p, u), above + u * p, atol=1e-15)
    assert torch.allclose(classifier._highest_score(p, p, u), above + u * p, atol=1e-15)
    ends = np.sort(random.uniform(size=(2, 500, 3)), axis=0)
    low, high = torch.from_numpy(ends[0]), torch.from_numpy(ends[1])
    within = low + (high - low) * torch.linspace(0, 1, 401, dtype=torch.float64)[:, None, None]
    scores = classifier._lowest_score(within, within, u)
    assert bool((classifier._lowest_score(low, high, u) <= scores.amin(0) + 1e-12).all())
    assert bool((classifier._highest_score(low, high, u) >= scores.amax(0) - 1e-12).all())
    # On a grid the jump at 1/2 is missed by at most a step.
    assert (classifier._lowest_score(low, high, u) - scores.amin(0)).abs().max() < 3e-3
    assert (classifier._highest_score(low, high, u) - scores.amax(0)).abs().max() < 3e-3


def test_the_share_u_is_uniform_each_inputs_own_and_the_seeds():
    classifier = CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(3), score="aps")
    grid = torch.from_numpy(np.random.default_rng(0).integers(0, 17, (20_000, 8)) / 16.0)
    grid = torch.unique(grid, dim=0)
    u = classifier._uniform(grid)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and len(torch.unique(u)) == len(grid)
    assert np.histogram(u, 20, (0, 1))[0] / len(u) == pytest.approx(0.05, abs=0.007)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(u, grid[:, 0])[0, 1]) < 0.03
    other = CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(3), score="aps", random_state=1)
    assert abs(np.corrcoef(u, other._uniform(grid))[0, 1]) < 0.03


@pytest.mark.parametrize("spread", [0.6, 0.25])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_9_set_correction_removes_what_contradicts_a_concept(calibration, spread):
    x, y, _ = three_classes(600, 0, spread=spread)
    new, labels, _ = three_classes(2000, 1, spread=spread)
    plain, corrected = (
        triangle(calibration=calibration, set_correction=correction).fit_calibration(x, y)
        for correction in (False, True)
    )
    sets = corrected.predict_set(new)
    problems = {"pooled": 1, "bonferroni": 3, "per_class": None}[calibration]
    share = 0.1 if problems is None else 0.1 / (problems + 2)
    # By hand: the sets of both concepts, and of the classes, each at its share of alpha.
    table = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    calibrated, found = (corrected.circuit(torch.cat(corrected._models_say(data), 1)).numpy() for data in (x, new))
    kept = np.ones((2000, 3), dtype=bool)
    for variable in range(5):
        truth = (y == variable).numpy() if variable < 3 else table[y.numpy(), variable - 3]
        scores = np.where(truth, 1 - calibrated[:, variable], calibrated[:, variable])
        if variable < 3 and calibration == "pooled":
            scores = 1 - calibrated[np.arange(600), y.numpy()]
        most = np.sort(scores)[math.ceil(601 * (1 - share) - 1e-9) - 1]
        one, zero = 1 - found[:, variable] <= most, found[:, variable] <= most
        if variable < 3:
            kept[:, variable] &= one
        else:
            # The likelier answer is there in any case.
            one, zero = one | (found[:, variable] >= 0.5), zero | (found[:, variable] <= 0.5)
            kept &= ~((zero & ~one)[:, None] & table[:, variable - 3])
            kept &= ~((one & ~zero)[:, None] & ~table[:, variable - 3])
    assert np.array_equal(sets, kept)
    if calibration != "per_class":
        assert sets[np.arange(2000), labels.numpy()].mean() >= 0.9 - 0.02
    assert not np.array_equal(sets, plain.predict_set(new))
    # Under attack a concept contradicts only what it contradicts anywhere within delta.
    smoothed = triangle(lambda f: Exactly(f, 0.5), calibration=calibration, set_correction=True).fit_calibration(x, y)
    assert (smoothed.predict_set_certified(new, 0.1) >= smoothed.predict_set(new)).all()
    # By hand again, from bounds; of a concept the answer that is true has to stay in its set.
    failure, radius = smoothed._failure(0.6), 0.6
    for alpha, what in ((0.1, "worst"), (0.1 - failure, "certified")):
        share = alpha if problems is None else alpha / (problems + 2)
        calibrated = smoothed.circuit(smoothed.probabilities_).numpy()
        ends = [model.bounds(model(new), radius) for model in smoothed.models]
        lo, hi = (
            one.numpy() for one in smoothed.circuit.bounds(*(torch.cat(end, 1) for end in zip(*ends, strict=True)))
        )
        kept, stays = np.ones((2000, 3), dtype=bool), np.ones(2000, dtype=bool)
        for variable in range(5):
            truth = (y == variable).numpy() if variable < 3 else table[y.numpy(), variable - 3]
            scores = np.where(truth, 1 - calibrated[:, variable], calibrated[:, variable])
            if variable < 3 and calibration == "pooled":
                scores = 1 - calibrated[np.arange(600), y.numpy()]
            most = np.sort(scores)[math.ceil(601 * (1 - share) - 1e-9) - 1]
            one, zero = 1 - hi[:, variable] <= most, lo[:, variable] <= most
            if variable < 3:
                kept[:, variable] &= one
                stays &= (labels.numpy() != variable) | (1 - lo[:, variable] <= most)
            else:
                one, zero = one | (hi[:, variable] >= 0.5), zero | (lo[:, variable] <= 0.5)
                kept &= ~(~one[:, None] & table[:, variable - 3]) & ~(~zero[:, None] & ~table[:, variable - 3])
                has = table[labels.numpy(), variable - 3]
                stays &= np.where(has, 1 - lo[:, variable], hi[:, variable]) <= most
        if what == "certified":
            assert np.array_equal(smoothed.predict_set_certified(new, radius), kept)
        else:
            found = smoothed.worst_case_coverage(radius, new, labels, eta=None)
            assert found == pytest.approx(max(0.0, stays.mean() - failure), abs=1e-12) and found < 0.95
    worst = smoothed.worst_case_coverage(0.1, new, labels)
    attacked = smoothed.predict_set(smoothed.attack(new, labels, 0.1, steps=5, draws=8, generator=torch.Generator()))
    assert attacked[np.arange(2000), labels.numpy()].mean() >= worst


def test_9_a_concept_that_may_be_either_contradicts_no_class():
    # A rule without weight changes no probability, and says which class has the concept.
    circuit = KnowledgeCircuit(2, 1, [[Rule(0, 2, 0.0)]])
    classifier = CertifiedConformalClassifier(as_given, circuit=circuit, set_correction=True)
    y = np.tile([0, 1], 50)
    classifier.fit_calibration(np.stack([np.full(100, 0.5), np.full(100, 0.5), np.where(y == 0, 0.9, 0.1)], 1), y)
    for low, high, kept in ((0.2, 0.6, [True, True]), (0.2, 0.4, [False, True]), (0.6, 0.7, [True, False])):
        ends = (torch.tensor([[0.5, 0.5, end]], dtype=torch.float64) for end in (low, high))
        assert classifier._sets(*ends, torch.zeros(1), 0.1).tolist() == [kept]


def test_10_rule_weights_are_the_likeliest():
    random = np.random.default_rng(0)
    truth_circuit = KnowledgeCircuit(2, 1, [[Rule(0, 2, 1.5), Rule(1, 2, 3.0)]], pc_weight=1.0)
    pi = torch.from_numpy(random.uniform(0.1, 0.9, (20_000, 3)))
    mu = worlds(3)
    kept = sum(rule.weight * (1 - mu[:, rule.if_] * (1 - mu[:, rule.then])) for rule in truth_circuit.rules[0])
    joint = (pi[:, None] * mu + (1 - pi[:, None]) * (1 - mu)).prod(-1) * torch.exp(kept)
    chosen = torch.multinomial(joint, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    circuit = KnowledgeCircuit(2, 1, [[Rule(0, 2), Rule(1, 2)]], pc_weight=1.0).fit_weights(pi, mu[chosen])
    assert circuit.weights.tolist() == pytest.approx([1.5, 3.0], abs=0.25)
    # Rules that the truth contradicts are given up.
    denied = KnowledgeCircuit(1, 1, [[Rule(0, 1)]], pc_weight=1.0)
    denied.fit_weights(np.full((50, 2), 0.5), np.tile([1.0, 0.0], (50, 1)))
    assert denied.weights.tolist() == pytest.approx([0.0], abs=1e-9)


@pytest.mark.parametrize("smoothed", [True, False])
def test_10_the_attack_stays_in_its_ball_and_reaches_a_linear_classifiers_worst(smoothed):
    x = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    y = (linear(x) > 0.5).long()

    def main(x):
        return torch.stack([1 - linear(x), linear(x)], 1)

    model = SmoothedModel(main, 0.5, n=100, batch_size=640) if smoothed else main
    classifier = CertifiedConformalClassifier(model, circuit=KnowledgeCircuit(2)).fit_calibration(x, y)
    attacked = classifier.attack(x, y, 0.25, generator=torch.Generator().manual_seed(0))
    assert (attacked - x).norm(dim=1).max() <= 0.25 + 1e-12
    worst_way = (1 - 2 * y[:, None]) * LINEAR_W / LINEAR_W.norm()
    assert ((attacked - x) * worst_way).sum(1).min() > 0.95 * 0.25
    again = classifier.attack(x, y, 0.25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attacked, again)
    assert torch.equal(classifier.attack(x, y, 0.0, generator=torch.Generator()), x)


def test_10_gradients_of_the_attack_go_through_the_circuit():
    # The main model is flat: only the concept, by the rule, gives the class away.
    def main(x):
        return torch.full((len(x), 1), 0.6, dtype=torch.float64)

    def concept(x):
        return torch.sigmoid(x[:, :1])

    circuit = KnowledgeCircuit(1, 1, [[Rule(0, 1, 3.0)]], pc_weight=1.0)
    classifier = CertifiedConformalClassifier(main, concept, circuit).fit_calibration(
        torch.ones(20, 2), np.zeros(20, int)
    )
    attacked = classifier.attack(torch.ones(5, 2), np.zeros(5, int), 0.5, generator=torch.Generator().manual_seed(0))
    assert attacked[:, 0].max() < 1 - 0.95 * 0.5


class Network(nn.Module):
    """A small network with dropout, of which one layer is switched off; its state must be what it was."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Flatten(), nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(16, outputs)
            )
        self.layers[3].eval()

    def forward(self, x):
        return torch.sigmoid(self.layers(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_networks_of_any_dtype_are_taken_and_left_as_they_were(dtype):
    x, y, _ = three_classes(60, 0)
    main, first, second = Network(3, 0).to(dtype), Network(1, 1).to(dtype), Network(1, 2)
    before = [parameter.clone() for parameter in main.parameters()]
    circuit = KnowledgeCircuit.from_table([[1, 0], [0, 1], [0, 0]])
    state = torch.random.get_rng_state()
    models = [SmoothedModel(model, 0.3, n=64, alpha=1e-3) for model in (main, first, second)]
    classifier = CertifiedConformalClassifier(models[0], models[1:], circuit).fit_calibration(x, y)
    sets = classifier.predict_set_certified(x, 0.1)
    classifier.attack(x, y, 0.1, steps=2, draws=4, generator=torch.Generator())
    assert np.array_equal(sets, classifier.predict_set_certified(x, 0.1))
    assert main.training and main.layers[4].training and not main.layers[3].training
    assert all(torch.equal(one, other) for one, other in zip(before, main.parameters(), strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in main.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert classifier.corrected_probabilities(x).shape == (60, 5) and classifier.predict(x).shape == (60,)


def test_a_model_may_give_classes_and_concepts_together_and_inputs_may_be_images():
    images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (images.mean((1, 2, 3)) > 0.5).long()

    def both(x):
        brightness = torch.sigmoid(20 * (x.mean((1, 2, 3)) - 0.5))
        return torch.stack([1 - brightness, brightness, brightness], 1)

    circuit = KnowledgeCircuit(2, 1, [[Rule(1, 2)]])
    together = CertifiedConformalClassifier(SmoothedModel(both, 0.1, n=64), circuit=circuit).fit_calibration(images, y)
    apart = CertifiedConformalClassifier(
        SmoothedModel(lambda x: both(x)[:, :2], 0.1, n=64), SmoothedModel(lambda x: both(x)[:, 2], 0.1, n=64), circuit
    ).fit_calibration(images, y)
    assert np.allclose(together.corrected_probabilities(images), apart.corrected_probabilities(images), atol=1e-12)
    assert np.array_equal(together.predict_set(images), apart.predict_set(images))
    assert together.attack(images, y, 0.2, steps=2, draws=8, generator=torch.Generator()).shape == images.shape


@pytest.mark.parametrize("score", SCORES)
def test_order_of_rows_and_batches_change_nothing_and_the_seed_keeps_everything(score):
    x, y, _ = three_classes(120, 0)
    new = three_classes(80, 1)[0]
    order, shuffled = np.random.default_rng(0).permutation(80), np.random.default_rng(1).permutation(120)

    def make():
        return triangle(lambda f: SmoothedModel(f, 0.5, n=200), score=score)

    first = make().fit_calibration(x, y)
    second = make().fit_calibration(x[shuffled], y[shuffled])
    for call in (lambda one, X: one.predict_set(X), lambda one, X: one.predict_set_certified(X, 0.1)):
        sets = call(first, new)
        assert np.array_equal(call(first, new[order]), sets[order])
        assert np.array_equal(np.concatenate([call(first, new[:7]), call(first, new[7:])]), sets)
        assert np.array_equal(call(second, new), sets) and np.array_equal(call(make().fit_calibration(x, y), new), sets)
    frame = pd.DataFrame(new.numpy(), columns=["a", "b"])
    assert np.array_equal(first.predict_set(frame), first.predict_set(new))
    assert first.worst_case_coverage(0.1) == second.worst_case_coverage(0.1)


@pytest.mark.parametrize("calibration, score", [*itertools.product(CALIBRATIONS, SCORES)])
def test_files_keep_circuit_and_thresholds(tmp_path, calibration, score):
    x, y, _ = three_classes(150, 0)
    new = three_classes(60, 1)[0]
    made = triangle(
        lambda f: SmoothedModel(f, 0.5, n=200), calibration=calibration, score=score, random_state=3, alpha=0.15
    )
    made.circuit.fit_weights(torch.cat(made._models_say(x), 1), made._truths(y))
    made.fit_calibration(x, y).save_pretrained(tmp_path)
    read = CertifiedConformalClassifier.from_pretrained(tmp_path, *made.models)
    assert torch.equal(read.circuit.weights, made.circuit.weights) and read.circuit.pc_weight == 1.0
    assert np.array_equal(read.thresholds(), made.thresholds())
    assert np.array_equal(read.predict_set(new), made.predict_set(new))
    assert np.array_equal(read.predict_set_certified(new, 0.1), made.predict_set_certified(new, 0.1))
    assert read.worst_case_coverage(0.1, eta=None) == made.worst_case_coverage(0.1, eta=None)
    circuit = KnowledgeCircuit.from_pretrained(tmp_path)
    assert torch.equal(circuit(made.probabilities_), made.circuit(made.probabilities_))
    other, concepts = SmoothedModel(made.models[0].f, 0.25, n=200), made.models[1]
    with pytest.raises(ValueError, match=r"smoothed as in calibration.*0\.25"):
        CertifiedConformalClassifier.from_pretrained(tmp_path, other, concepts)
    with pytest.raises(ValueError, match="holds no saved"):
        CertifiedConformalClassifier.from_pretrained(tmp_path / "nothing", *made.models)
    (tmp_path / "circuit.json").write_text(json.dumps({"n_classes": 3}))
    with pytest.raises(ValueError, match="holds no saved"):
        CertifiedConformalClassifier.from_pretrained(tmp_path, *made.models)


def test_files_are_of_the_weights_that_were_calibrated(tmp_path):
    x, y, _ = three_classes(60, 0)
    main, concepts = (SmoothedModel(Network(outputs, 0), 0.3, n=64, alpha=1e-3) for outputs in (3, 2))
    made = CertifiedConformalClassifier(main, concepts, KnowledgeCircuit.from_table([[1, 0], [0, 1], [0, 0]]))
    made.fit_calibration(x, y).save_pretrained(tmp_path)
    assert CertifiedConformalClassifier.from_pretrained(tmp_path, main, concepts).predict_set(x).shape == (60, 3)
    with torch.no_grad():
        concepts.f.layers[1].bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"model 1 \(main is 0\) has others"):
        CertifiedConformalClassifier.from_pretrained(tmp_path, main, concepts)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_class_may_be_missing_in_calibration_and_one_concept_or_none_is_enough(calibration):
    x, y, _ = three_classes(200, 0)
    without = y != 2
    classifier = triangle(calibration=calibration).fit_calibration(x[without], y[without])
    assert classifier.predict_set(x).shape == (200, 3) and np.isfinite(classifier.thresholds()).all()
    corners = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]], dtype=torch.float64)

    def main(x):
        return torch.softmax(2 * x @ corners.T, 1)

    one = CertifiedConformalClassifier(
        main,
        lambda x: torch.sigmoid(3 * x[:, 0]),
        KnowledgeCircuit.from_table([[1], [0], [0]]),
        calibration=calibration,
    ).fit_calibration(x, y)
    none = CertifiedConformalClassifier(main, circuit=KnowledgeCircuit(3), calibration=calibration).fit_calibration(
        x, y
    )
    pi = main(x).numpy()
    assert np.array_equal(none.corrected_probabilities(x), pi)
    assert np.array_equal(none.predict_set(x), 1 - pi <= none.thresholds())
    assert one.predict_set(x).shape == (200, 3) and not np.array_equal(one.corrected_probabilities(x)[:, :3], pi)


def test_rules_from_a_table_are_its_ones_by_group():
    table = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 0]])
    circuit = KnowledgeCircuit.from_table(table, [[0, 1], [2]], weight=2.0)
    assert circuit.rules == ((Rule(0, 3, 2.0), Rule(2, 3, 2.0), Rule(1, 4, 2.0)), (Rule(0, 5, 2.0), Rule(1, 5, 2.0)))
    assert np.array_equal(circuit.table.numpy(), table.astype(bool)) and circuit.n_variables == 6
    # Class 0 depends on concept 0 and class 2 by it, on concept 2 and class 1; not on concept 1.
    assert circuit.support[0].tolist() == [True, True, True, True, False, True]


def test_bad_input_is_one_clear_sentence():
    for make, words in (
        (lambda: Rule(0, 0), "between two variables"),
        (lambda: Rule(-1, 2), "if_ is the number"),
        (lambda: Rule(0, 1.5), "then is the number"),
        (lambda: Rule(0, 1, -1.0), "at least 0, got -1.0"),
        (lambda: Rule(0, 1, math.nan), "finite number"),
        (lambda: KnowledgeCircuit(0), "n_classes is a whole number of at least 1"),
        (lambda: KnowledgeCircuit(2, -1), "n_concepts"),
        (lambda: KnowledgeCircuit(2, 1, [[Rule(0, 3)]]), "from 0 to 2, and Rule.* names 3"),
        (lambda: KnowledgeCircuit(2, 1, [[Rule(0, 2, 1000.0)]]), "at most 700, got 1000"),
        (lambda: KnowledgeCircuit(2, 1, [[Rule(0, 2)]], beta=[1.0, 2.0]), "each of 1 groups"),
        (lambda: KnowledgeCircuit(2, 1, [[Rule(0, 2)]], beta=[0.0]), "above 0"),
        (lambda: KnowledgeCircuit(2, 1, pc_weight=1.5), "pc_weight is a share"),
        (lambda: KnowledgeCircuit.from_table([[0, 2]]), "0 or 1 for each class"),
        (lambda: KnowledgeCircuit.from_table([[0, 1]], [[2]]), "from 0 to 1, got 2"),
        (lambda: KnowledgeCircuit(2)(torch.tensor([[0.1, 1.2]])), "within 0 and 1"),
        (lambda: KnowledgeCircuit(2)(torch.tensor([[0.1, math.nan]])), "within 0 and 1"),
        (lambda: KnowledgeCircuit(2)(torch.tensor([[0, 1]])), "floating-point tensor"),
        (lambda: KnowledgeCircuit(2)(torch.rand(3, 3)), r"\(\.\.\., 2\)"),
        (lambda: KnowledgeCircuit(2).bounds(torch.ones(2), torch.zeros(2)), "at most as large"),
        (lambda: KnowledgeCircuit(2).bounds(torch.zeros(2), torch.ones(2), "loose"), "exact or interval"),
        (lambda: KnowledgeCircuit(2).fit_weights(np.ones((3, 2)), np.ones((3, 2))), "no rules"),
        (lambda: KnowledgeCircuit(1, 1, [[Rule(0, 1)]]).fit_weights(np.ones((3, 2)), np.ones((2, 2))), "0 or 1"),
        (lambda: SmoothedModel(as_given, 0.0), "sigma is a finite number above 0"),
        (lambda: SmoothedModel(as_given, 0.5, n=0), "n is a whole number"),
        (lambda: SmoothedModel(as_given, 0.5, alpha=1.0), "alpha is a probability"),
        (lambda: SmoothedModel(as_given, 0.5, votes="mixed"), "soft or hard"),
        (lambda: SmoothedModel(as_given, 0.5, n=8)(torch.zeros(2, 2)), "sigmoid or softmax"),
        (lambda: SmoothedModel(lambda x: x[:1], 0.5, n=8)(torch.zeros(2, 2)), "gives probabilities"),
        (lambda: SmoothedModel(as_given, 0.5).bounds(torch.zeros(2, 2), -1.0), "at least 0, got -1.0"),
        (lambda: triangle(alpha=0.0), "alpha is a share"),
        (lambda: triangle(score="raps"), "hps or aps, got 'raps'"),
        (lambda: triangle(calibration="split"), "pooled, bonferroni or per_class"),
        (lambda: triangle(bound="both"), "exact or interval"),
        (lambda: triangle(random_state=-1), "random_state"),
        (lambda: CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(2), set_correction=True), "has none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()
    for make, words in (
        (lambda: SmoothedModel(3, 0.5), "got a int"),
        (lambda: CertifiedConformalClassifier(as_given), "circuit is a KnowledgeCircuit"),
        (lambda: CertifiedConformalClassifier("model", circuit=KnowledgeCircuit(2)), "got a str"),
        (lambda: KnowledgeCircuit(2, 1, [Rule(0, 2)]), "put it into a list"),
    ):
        with pytest.raises(TypeError, match=words):
            make()


def test_bad_samples_are_one_clear_sentence_and_lose_nothing():
    x, y, _ = three_classes(100, 0)
    classifier = triangle().fit_calibration(x, y)
    before = classifier.predict_set(x)
    nothing = x.clone()
    nothing[3, 0] = math.nan
    for call, words in (
        (lambda: triangle().predict_set(x), "call fit_calibration"),
        (lambda: triangle().thresholds(), "call fit_calibration"),
        (lambda: classifier.fit_calibration(x[:0], y[:0]), "at least one input"),
        (lambda: classifier.fit_calibration(nothing, y), "NaN or infinity"),
        (lambda: classifier.fit_calibration(x, y[:-1]), "each of 100 inputs"),
        (lambda: classifier.fit_calibration(x, y.double()), "a whole number for each"),
        (lambda: classifier.fit_calibration(x, np.array(["a"] * 100)), "a whole number for each"),
        (lambda: classifier.fit_calibration(x, y + 1), "from 0 to 2, got 1 to 3"),
        (lambda: classifier.predict_set(nothing), "NaN or infinity"),
        (lambda: classifier.predict_set(x[:, :1]), r"\(B, 2\), as in calibration, got \(100, 1\)"),
        (lambda: classifier.predict_set(x[:, :0]), "at least one input and one feature"),
        (lambda: classifier.predict_set([["a", "b"]]), "inputs are numbers"),
        (lambda: classifier.predict_set_certified(x, 0.1), "wrap each model in SmoothedModel"),
        (lambda: classifier.predict_set_certified(x, -0.1), "at least 0, got -0.1"),
        (lambda: classifier.predict_set_certified(x, math.inf), "finite number"),
        (lambda: classifier.worst_case_coverage(0.0, eta=0.7), "at most 1/2"),
        (lambda: classifier.worst_case_coverage(0.0, x), "give both X and y"),
        (lambda: classifier.attack(x, y, 0.1, steps=0), "steps is a whole number"),
        (lambda: triangle(calibration="bonferroni").fit_calibration(x, y).worst_case_coverage(0.0), "other samples X and y"),
        (lambda: CertifiedConformalClassifier(as_given, circuit=KnowledgeCircuit(3)).fit_calibration(x.abs().clamp(max=1), y), "the models give 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert np.array_equal(classifier.predict_set(x), before)
