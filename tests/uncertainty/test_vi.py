"""Programmable variational inference (arXiv 2406.15742), line by line of its file, against enumeration and quadrature."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Gamma,
    Independent,
    Laplace,
    Normal,
    Poisson,
    Uniform,
)

from paperworks.uncertainty import vi
from paperworks.uncertainty.vi import strategies
from paperworks.uncertainty.vi.strategies import drawn

ENUM, MVD, REINFORCE = vi.Enum(), vi.MVD(), vi.Reinforce()
NAMED = {"E": ENUM, "M": MVD, "R": REINFORCE}


def f64(*values, grad=False):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=grad)


def outcomes(monkeypatch, estimate):
    """All that `estimate()` can come to, each with its probability: every draw of finitely many values is made every way."""
    path, sizes = [], []

    def scripted(distribution, shape, generator, *, pathwise):
        nonlocal probability, place
        p = distribution.probs.detach()
        flip = isinstance(distribution, Bernoulli)
        chances = torch.stack([1 - p, p], -1) if flip else p
        picked = []
        for run in chances.expand(*shape, chances.shape[-1]).reshape(-1, chances.shape[-1]).tolist():
            if place == len(path):
                path.append(0)
                sizes.append(len(run))
            picked.append(path[place])
            probability *= run[path[place]]
            place += 1
        return torch.tensor(picked, dtype=torch.float64 if flip else torch.int64).reshape(shape)

    monkeypatch.setattr(strategies, "drawn", scripted)
    monkeypatch.setattr("paperworks.uncertainty.vi.execution.drawn", scripted)
    # Of what is enumerated all is valid.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    found = []
    while True:
        probability, place = 1.0, 0
        result = estimate()
        found.append((probability, result))
        del path[place:], sizes[place:]
        while path and path[-1] == sizes[-1] - 1:
            path.pop()
            sizes.pop()
        if not path:
            break
        path[-1] += 1
    monkeypatch.setattr(strategies, "drawn", drawn)
    monkeypatch.setattr("paperworks.uncertainty.vi.execution.drawn", drawn)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    assert sum(chance for chance, _ in found) == pytest.approx(1, abs=1e-12)
    return found


def moments(found):
    """Mean and variance of arrays with their probabilities."""
    chances = np.array([chance for chance, _ in found])
    values = np.array([np.asarray(value) for _, value in found])
    mean = np.tensordot(chances, values, 1)
    return mean, np.tensordot(chances, (values - mean) ** 2, 1)


def gradient(estimator, *parameters, **options):
    value, slopes = estimator.value_and_grad(parameters, **options)
    return np.concatenate([[value.item()], *(slope.reshape(-1).numpy() for slope in slopes)])


def on_nodes(monkeypatch, nodes):
    """Make the draws of normals and uniforms come from these standard nodes, one tensor a draw."""
    queue = iter(nodes)

    def scripted(distribution, shape, generator, *, pathwise):
        node = next(queue)
        if isinstance(distribution, Uniform):
            return node.expand(shape)
        value = distribution.loc + distribution.scale * node
        return (value if pathwise else value.detach()).expand(shape)

    monkeypatch.setattr(strategies, "drawn", scripted)


def hermite(count):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


# 1. Three choices, all of them enumerated.

P = {"a": 0.3, "b1": 0.6, "b0": 0.2}
SLOPE = f64(1.0, 0.0, -1.0)
TABLE = f64(0.2, 0.3, 0.5)


def three_model():
    a = vi.sample("a", Bernoulli(f64(0.5)))
    b = vi.sample("b", Bernoulli(torch.where(a == 1, f64(0.7), f64(0.3))))
    c = vi.sample("c", Categorical(f64(1 / 3, 1 / 3, 1 / 3)))
    which = ((a + b + c) % 3).long()
    vi.sample("y", Bernoulli(TABLE[which]))
    # Of c there is no prior of its own.
    vi.add_cost(math.log(3))


MODEL = vi.program(three_model)


def three(first, second, third, branching=False):
    @vi.program
    def guide(p, logits):
        a = vi.sample("a", Bernoulli(p[0]), first)
        of_b = (p[1] if a else p[2]) if branching else torch.where(a == 1, p[1], p[2])
        b = vi.sample("b", Bernoulli(of_b), second)
        vi.sample("c", Categorical(logits=logits + b[..., None] * SLOPE), third)

    return guide


def brute_elbo(p, logits):
    total = 0
    for a, b, c in itertools.product((0, 1), (0, 1), range(3)):
        of_b = p[1] if a else p[2]
        q = (p[0] if a else 1 - p[0]) * (of_b if b else 1 - of_b) * torch.softmax(logits + b * SLOPE, 0)[c]
        joint = 0.5 * (0.7 if b == a else 0.3) * TABLE[(a + b + c) % 3]
        total = total + q * (joint.log() - q.log())
    return total


def three_parameters():
    return f64(0.3, 0.6, 0.2, grad=True), f64(0.5, 0.0, -0.5, grad=True)


def of_three(monkeypatch, first, second, third, branching=False):
    p, logits = three_parameters()
    guide = three(first, second, third, branching)
    estimator = vi.elbo(MODEL, guide, {"y": 1.0}, guide_args=(p, logits))
    return moments(outcomes(monkeypatch, lambda: gradient(estimator, p, logits)))


ALL = ["".join(three) for three in itertools.product("EMR", "EMR", "ER")]


@pytest.mark.parametrize("named", ALL)
def test_1_every_assignment_of_strategies_is_unbiased(monkeypatch, named):
    p, logits = three_parameters()
    exact = brute_elbo(p, logits)
    slopes = torch.autograd.grad(exact, (p, logits))
    mean, variance = of_three(monkeypatch, *(NAMED[letter] for letter in named))
    assert mean == pytest.approx(np.concatenate([[exact.item()], *(one.numpy() for one in slopes)]), abs=1e-10)
    assert mean == pytest.approx([-0.4005850909, 0.9951, 0.0876, 0.2270, -0.2839, 0.1185, 0.1654], abs=5e-5)
    assert mean[0] == pytest.approx(-0.4005850909, abs=1e-10)
    told = {"EEE": 0, "EER": 1.6562, "EME": 3.4800, "MEE": 4.8108, "REE": 4.8350, "MME": 10.4813, "RRR": 21.5352}
    if named in told:
        assert variance[1:].sum() == pytest.approx(told[named], abs=6e-5)


def test_1_baseline_lowers_variance_and_keeps_the_mean(monkeypatch):
    plain, _ = of_three(monkeypatch, *[REINFORCE] * 3)
    mean, variance = of_three(monkeypatch, *[vi.Reinforce(baseline=-0.4005850909)] * 3)
    assert mean == pytest.approx(plain, abs=1e-10)
    assert variance[1:].sum() == pytest.approx(12.9754, abs=6e-5)


@pytest.mark.parametrize("named", ["EEE", "EME", "MME", "RER", "RRR"])
def test_1_programs_that_branch_in_python_have_the_same_law(monkeypatch, named):
    chosen = [vi.Enum(parallel=False) if letter == "E" else NAMED[letter] for letter in named]
    found = of_three(monkeypatch, *chosen, branching=True)
    expected = of_three(monkeypatch, *(NAMED[letter] for letter in named))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-10)


# 2. One flip.


@pytest.mark.parametrize(
    ("strategy", "variance"),
    [
        (REINFORCE, 27.4286),
        (vi.Reinforce(2.0), 0.7619),
        (vi.Reinforce(2.4), 0.0),
        (vi.Reinforce(f64(2.4)), 0.0),
        (ENUM, 0.0),
        (MVD, 0.0),
    ],
)
def test_2_one_flip(monkeypatch, strategy, variance):
    p = f64(0.3, grad=True)

    @vi.expectation
    def objective(p):
        return 1 + 2 * vi.sample("v", Bernoulli(p), strategy)

    mean, spread = moments(outcomes(monkeypatch, lambda: gradient(objective(p), p)))
    assert mean == pytest.approx([1.6, 2], abs=1e-12)
    assert spread[1] == pytest.approx(variance, abs=6e-5)


# 3. A normal, by quadrature that is exact for these polynomials.


def normal_square(strategy):
    @vi.expectation
    def objective(loc, scale):
        return vi.sample("x", Normal(loc, scale), strategy) ** 2

    return objective


@pytest.mark.parametrize(
    ("strategy", "variances"), [(vi.Reparam(), (4, 12)), (REINFORCE, (30, 136)), (vi.Reinforce(2.0), (18, 96))]
)
def test_3_normal_square(monkeypatch, strategy, variances):
    nodes, weights = hermite(20)
    on_nodes(monkeypatch, [nodes])
    loc, scale = (torch.ones(20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = normal_square(strategy)(loc, scale).surrogate(batch_shape=(20,))
    for slopes, variance in zip(torch.autograd.grad(values.sum(), (loc, scale)), variances, strict=True):
        mean = (weights * slopes).sum()
        assert mean.item() == pytest.approx(2, abs=1e-10)
        assert (weights * (slopes - mean) ** 2).sum().item() == pytest.approx(variance, abs=1e-8)


def test_3_measure_valued_derivatives_of_a_normal():
    """Also where k jumps: P(x > 0) has derivatives n(0) and -m n(0) / s at s = 1."""
    loc, scale = (torch.full((400_000,), value, dtype=torch.float64, requires_grad=True) for value in (0.6, 1.3))

    @vi.expectation
    def both(loc, scale):
        x = vi.sample("x", Normal(loc, scale), MVD)
        return x**2 + 10 * (x > 0)

    values = both(loc, scale).surrogate(batch_shape=loc.shape, generator=torch.Generator().manual_seed(0))
    height = stats.norm(0.6, 1.3).pdf(0)
    expected = 2 * 0.6 + 10 * height, 2 * 1.3 - 10 * 0.6 / 1.3 * height
    for slopes, wanted in zip(torch.autograd.grad(values.sum(), (loc, scale)), expected, strict=True):
        error = slopes.std().item() / len(slopes) ** 0.5
        assert slopes.mean().item() == pytest.approx(wanted, abs=4 * error)
        assert error < 0.03
    assert values.mean().item() == pytest.approx(0.6**2 + 1.3**2 + 10 * stats.norm.cdf(0.6 / 1.3), abs=0.05)


# 4. A conjugate pair.

EVIDENCE = -1.5155121235


@vi.program
def conjugate():
    x = vi.sample("x", Normal(f64(0.0), f64(1.0)))
    vi.sample("y", Normal(x, f64(1.0)))


@vi.program
def normal_guide(loc, scale):
    vi.sample("x", Normal(loc, scale), vi.Reparam())


@pytest.mark.parametrize("seed", range(3))
def test_4_posterior_as_guide_gives_the_evidence_at_every_draw(seed):
    args = f64(0.5), f64(0.5).sqrt()
    assert torch.distributions.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).item() == pytest.approx(EVIDENCE)
    generator = torch.Generator().manual_seed(seed)
    for estimator in (
        vi.elbo(conjugate, normal_guide, {"y": 1.0}, guide_args=args),
        vi.iwelbo(conjugate, normal_guide, {"y": f64(1.0)}, 3, guide_args=args),
    ):
        values = estimator.surrogate(batch_shape=(7,), generator=generator)
        assert values.tolist() == pytest.approx([EVIDENCE] * 7, abs=1e-10)


@pytest.mark.parametrize(
    ("particles", "bound"), [(1, -1.91893853), (2, -1.65347379), (3, -1.59406662), (4, -1.57013868)]
)
def test_4_prior_as_guide(monkeypatch, particles, bound):
    nodes, weights = hermite(26)
    grid = torch.stack(torch.meshgrid(*[nodes] * particles, indexing="ij")).flatten(1)
    total = torch.stack(torch.meshgrid(*[weights] * particles, indexing="ij")).flatten(1).prod(0)
    on_nodes(monkeypatch, [grid])
    estimator = vi.iwelbo(conjugate, normal_guide, {"y": 1.0}, particles, guide_args=(f64(0.0), f64(1.0)))
    values = estimator.value(batch_shape=(grid.shape[1],))
    assert (total * values).sum().item() == pytest.approx(bound, abs=2e-7)


# 5. and 6. Marginals and posteriors by SIR, enumerated.

Q, X, M = f64(0.2, 0.5, 0.3), f64(0.9, 0.4, 0.1), f64(0.5, 0.25, 0.25)


@vi.program
def table():
    r = vi.sample("r", Categorical(Q), REINFORCE)
    vi.sample("x", Bernoulli(X[r]), REINFORCE)


@vi.program
def proposal(choices):
    assert list(choices) == ["x"]
    vi.sample("r", Categorical(M), REINFORCE)


@pytest.mark.parametrize(
    ("particles", "estimated", "weighted", "swapped"),
    [
        (1, -1.09667740, -0.71252156, 3.7847),
        (2, -0.99190274, -0.80065998, 3.0378),
        (3, -0.95671450, -0.83101249, 2.8053),
    ],
)
def test_5_marginal_densities(monkeypatch, particles, estimated, weighted, swapped):
    marginal = vi.Marginal(table, ["x"], vi.SIR(particles, proposal))
    found = outcomes(monkeypatch, lambda: vi.log_density(marginal, {"x": 1.0}).item())
    assert sum(chance * math.exp(value) for chance, value in found) == pytest.approx(0.41, abs=1e-10)
    assert sum(chance * value for chance, value in found) == pytest.approx(estimated, abs=1e-8)
    assert sum(chance * math.exp(-value) for chance, value in found) == pytest.approx(swapped, abs=6e-5)

    def drawn_with():
        trace = vi.simulate(marginal)
        assert list(trace.choices) == ["x"]
        return trace.choices["x"].item(), trace.log_density.item()

    ones = [(chance, value) for chance, (x, value) in outcomes(monkeypatch, drawn_with) if x == 1]
    share = sum(chance for chance, _ in ones)
    assert share == pytest.approx(0.41, abs=1e-12)
    assert sum(c * math.exp(-value) for c, value in ones) / share == pytest.approx(1 / 0.41, abs=1e-10)
    assert sum(c * value for c, value in ones) / share == pytest.approx(weighted, abs=1e-8)


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_5_default_proposal_is_the_prior(monkeypatch, particles):
    marginal = vi.Marginal(table, ["x"], vi.SIR(particles))
    found = outcomes(monkeypatch, lambda: vi.log_density(marginal, {"x": 1.0}).item())
    assert sum(chance * math.exp(value) for chance, value in found) == pytest.approx(0.41, abs=1e-10)

    def drawn_with():
        trace = vi.simulate(marginal)
        return trace.choices["x"].item(), trace.log_density.item()

    for value, density in ((1, 0.41), (0, 0.59)):
        those = [(chance, weight) for chance, (x, weight) in outcomes(monkeypatch, drawn_with) if x == value]
        share = sum(chance for chance, _ in those)
        assert sum(c * math.exp(-weight) for c, weight in those) / share == pytest.approx(1 / density, abs=1e-10)


@pytest.mark.parametrize(
    ("particles", "law", "wake"),
    [
        (1, (0.5, 0.25, 0.25), -2.136398),
        (2, (0.515086, 0.343609, 0.141304), -1.931779),
        (5, (0.479839, 0.427290, 0.092871), -1.836181),
    ],
)
def test_6_posterior_by_sir(monkeypatch, particles, law, wake):
    posterior = vi.Normalize(table, {"x": 1.0}, vi.SIR(particles, proposal))

    def drawn_with():
        trace = vi.simulate(posterior)
        return int(trace.choices["r"]), trace.log_density.item()

    found = outcomes(monkeypatch, drawn_with)
    shares = [sum(chance for chance, (r, _) in found if r == value) for value in range(3)]
    assert shares == pytest.approx(law, abs=1e-6)
    for value, share in enumerate(shares):
        inverse = sum(chance * math.exp(-weight) for chance, (r, weight) in found if r == value) / share
        assert inverse == pytest.approx(1 / share, abs=1e-9)
        if particles == 5:
            continue
        given = outcomes(monkeypatch, lambda value=value: vi.log_density(posterior, {"r": value}).item())
        assert sum(chance * math.exp(weight) for chance, weight in given) == pytest.approx(share, abs=1e-10)
    objective = vi.p_wake(table, table, {"x": 1.0}, particles, proposal=proposal)
    assert moments(outcomes(monkeypatch, lambda: objective.value().item()))[0] == pytest.approx(wake, abs=1e-6)


def test_6_many_particles_draw_from_the_posterior():
    posterior = vi.Normalize(table, {"x": 1.0}, vi.SIR(300, proposal))
    r = vi.simulate(posterior, draws=10_000, generator=torch.Generator().manual_seed(0)).choices["r"]
    assert (torch.bincount(r) / len(r)).tolist() == pytest.approx([0.439024, 0.487805, 0.073171], abs=0.02)

    @vi.expectation
    def evidence():
        return posterior.log_evidence().exp()

    assert evidence().value(draws=2000, generator=torch.Generator().manual_seed(0)).item() == pytest.approx(
        0.41, abs=2e-3
    )


# 7. The noisy cone.

Z = {"z": 5.0}


@vi.program
def cone():
    x, y = (vi.sample(name, Normal(f64(0.0), f64(10.0))) for name in "xy")
    square = x**2 + y**2
    vi.sample("z", Normal(square, 0.1 + square / 100))


@vi.program
def mean_field(theta):
    for name, loc, log_scale in zip("xy", theta[:2], theta[2:], strict=True):
        vi.sample(name, Normal(loc, log_scale.exp()), vi.Reparam())


@vi.program
def ring(theta):
    angle = 2 * torch.pi * vi.sample("u", Uniform(f64(0.0), f64(1.0)), vi.Reparam())
    for name, wave, log_scale in zip("xy", (torch.cos, torch.sin), theta, strict=True):
        vi.sample(name, Normal(5**0.5 * wave(angle), log_scale.exp()), vi.Reparam())


def test_7_evidence_of_the_cone():
    """In polar coordinates r^2 is exponential with mean 200."""

    def integrand(square):
        return stats.expon(scale=200).pdf(square) * stats.norm(square, 0.1 + square / 100).pdf(5)

    evidence, _ = integrate.quad(integrand, 0, 12, points=[5], epsabs=1e-14)
    assert math.log(evidence) == pytest.approx(-5.323232068, abs=1e-8)


def of_mean_field(monkeypatch, theta, count=60):
    nodes, weights = hermite(count)
    u, v = (one.reshape(-1) for one in torch.meshgrid(nodes, nodes, indexing="ij"))
    on_nodes(monkeypatch, [u, v])
    parameters = f64(*theta, grad=True)
    values = vi.elbo(cone, mean_field, Z, guide_args=(parameters,)).surrogate(batch_shape=u.shape)
    mean = (torch.outer(weights, weights).reshape(-1) * values).sum()
    return mean.item(), torch.autograd.grad(mean, parameters)[0]


def test_7_mean_field_bound(monkeypatch):
    assert of_mean_field(monkeypatch, (2.2, 0, -3, -1.2))[0] == pytest.approx(-8.402646, abs=1e-6)
    for theta in ((2.2190, 0, -3.3871, -1.2765), (-2.2190, 0, -3.3871, -1.2765), (0, 2.2190, -1.2765, -3.3871)):
        value, slope = of_mean_field(monkeypatch, theta)
        assert value == pytest.approx(-8.074537, abs=1e-6)
        assert slope.abs().max() < 0.02


def of_ring(monkeypatch, log_scale):
    nodes, weights = hermite(30)
    around = torch.arange(40, dtype=torch.float64) / 40
    u, a, b = (one.reshape(-1) for one in torch.meshgrid(around, nodes, nodes, indexing="ij"))
    weights = torch.einsum("i,j,k->ijk", torch.ones(40, dtype=torch.float64) / 40, weights, weights).reshape(-1)
    on_nodes(monkeypatch, [u, a, b])
    theta = f64(log_scale, log_scale, grad=True)
    values = vi.hvi_elbo(cone, ring, ["x", "y"], Z, guide_args=(theta,)).surrogate(batch_shape=u.shape)
    mean = (weights * values).sum()
    return mean.item(), torch.autograd.grad(mean, theta)[0]


def test_7_hierarchical_bound(monkeypatch):
    assert of_ring(monkeypatch, -3.0)[0] == pytest.approx(-9.752810, abs=1e-5)
    value, slope = of_ring(monkeypatch, -3.0476)
    assert value == pytest.approx(-9.748135, abs=1e-5) and slope.abs().max() < 2e-3


@pytest.mark.parametrize(
    ("objective", "theta", "expected", "error"),
    [
        (lambda theta: vi.iwelbo(cone, mean_field, Z, 5, guide_args=(theta,)), (2.2, 0, -3, -1.2), -7.724, 0.01),
        (lambda theta: vi.iwhvi(cone, ring, ["x", "y"], Z, 5, guide_args=(theta,)), (-3, -3), -8.185, 0.01),
        (lambda theta: vi.diwhvi(cone, ring, ["x", "y"], Z, 5, 5, guide_args=(theta,)), (-3, -3), -7.787, 0.01),
        (lambda theta: vi.iwhvi(cone, ring, ["x", "y"], Z, 5, guide_args=(theta,)), (-2.05, -2.05), -12.58, 0.06),
        (lambda theta: vi.diwhvi(cone, ring, ["x", "y"], Z, 5, 5, guide_args=(theta,)), (-2.05, -2.05), -7.309, 0.01),
    ],
)
def test_7_importance_weighted_bounds(objective, theta, expected, error):
    value = objective(f64(*theta)).value(draws=100_000, generator=torch.Generator().manual_seed(0))
    assert value.item() == pytest.approx(expected, abs=error)
    assert value < -5.323232068 - 1.9


# 8. What a Reinforce choice lets through.


def test_8_no_gradient_through_the_value_of_reinforce():
    loc = f64(0.4, grad=True)
    seen = {}

    @vi.program
    def guide(loc):
        seen["x"] = vi.sample("x", Normal(loc, 1.0), REINFORCE)

    @vi.expectation
    def objective(loc):
        trace = vi.simulate(guide, (loc,))
        seen["density"] = trace.log_density
        return trace.choices["x"] * f64(1.0)

    objective(loc).surrogate(generator=torch.Generator().manual_seed(0))
    assert not seen["x"].requires_grad
    (slope,) = torch.autograd.grad(seen["density"], loc)
    assert slope.item() == pytest.approx(seen["x"].item() - 0.4)


# What the algorithm says beyond the numbered lines.


def flips(strategy):
    @vi.program
    def guide(p):
        a = vi.sample("a", Bernoulli(p[0]), strategy)
        vi.sample("b", Bernoulli(torch.where(a == 1, p[1], p[2])), strategy)

    return guide


@vi.program
def flips_model():
    a = vi.sample("a", Bernoulli(f64(0.4)))
    b = vi.sample("b", Bernoulli(torch.where(a == 1, f64(0.9), f64(0.3))))
    vi.sample("y", Bernoulli(0.1 + 0.3 * a + 0.5 * b))


def brute_iwelbo(p, particles):
    weights, chances = [], []
    for a, b in itertools.product((0, 1), repeat=2):
        of_b = p[1] if a else p[2]
        q = (p[0] if a else 1 - p[0]) * (of_b if b else 1 - of_b)
        prior = (0.4 if a else 0.6) * ((0.9 if b else 0.1) if a else (0.3 if b else 0.7))
        weights.append(prior * (0.1 + 0.3 * a + 0.5 * b) / q)
        chances.append(q)
    total = 0
    for chosen in itertools.product(range(4), repeat=particles):
        chance = math.prod(chances[one] for one in chosen)
        total = total + chance * (sum(weights[one] for one in chosen) / particles).log()
    return total


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("strategy", [ENUM, vi.Enum(parallel=False), MVD, REINFORCE])
def test_strategies_within_particles_are_unbiased(monkeypatch, strategy, particles):
    p = f64(0.3, 0.6, 0.2, grad=True)
    exact = brute_iwelbo(p, particles)
    expected = [exact.item(), *torch.autograd.grad(exact, p)[0].tolist()]
    estimator = vi.iwelbo(flips_model, flips(strategy), {"y": 1.0}, particles, guide_args=(p,))
    mean, variance = moments(outcomes(monkeypatch, lambda: gradient(estimator, p)))
    assert mean == pytest.approx(expected, abs=1e-10)
    assert (variance.max() < 1e-20) == isinstance(strategy, vi.Enum)


@pytest.mark.parametrize(("first", "second"), [(ENUM, REINFORCE), (REINFORCE, MVD)])
def test_marginal_of_discrete_choices_is_unbiased_within_other_choices(monkeypatch, first, second):
    w = f64(0.3, 0.6, grad=True)

    @vi.program
    def inner(outer, w):
        r = vi.sample("r", Bernoulli(w[0] + 0.2 * outer), second)
        vi.sample("x", Bernoulli(w[1] - 0.3 * r + 0.1 * outer), REINFORCE)

    @vi.expectation
    def objective(w):
        outer = vi.sample("outer", Bernoulli(w.mean()), first)
        trace = vi.simulate(vi.Marginal(inner, ["x"], vi.SIR(2)), (outer, w))
        return trace.choices["x"] * (1 + outer) + (-trace.log_density).exp()

    def exact(w):
        total = 0
        for outer in (0, 1):
            chance = w.mean() if outer else 1 - w.mean()
            ones = w[1] + 0.1 * outer - 0.3 * (w[0] + 0.2 * outer)
            # E[exp(-w) | x] is 1 / q(x), so that its expectation over x is the number of values of x.
            total = total + chance * (ones * (1 + outer) + 2)
        return total

    expected = [exact(w).item(), *torch.autograd.grad(exact(w), w)[0].tolist()]
    mean, _ = moments(outcomes(monkeypatch, lambda: gradient(objective(w), w)))
    assert mean == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("index", [REINFORCE, ENUM])
def test_wake_trains_through_the_sampler_with_an_index_strategy(monkeypatch, index):
    logits = f64(0.1, 0.4, -0.2, grad=True)

    @vi.program
    def guide(logits):
        vi.sample("r", Categorical(logits=logits), REINFORCE)

    def exact(logits):
        m, joint, total = logits.softmax(0), Q * X, 0
        for pair in itertools.product(range(3), repeat=2):
            weights = joint[list(pair)] / m[list(pair)]
            for place, one in enumerate(pair):
                total = total + m[list(pair)].prod() * weights[place] / weights.sum() * m[one].log()
        return total

    def frozen(logits, at):
        m, joint, total = at.softmax(0), Q * X, 0
        for pair in itertools.product(range(3), repeat=2):
            weights = joint[list(pair)] / m[list(pair)]
            for place, one in enumerate(pair):
                total = total + m[list(pair)].prod() * weights[place] / weights.sum() * logits.log_softmax(0)[one]
        return total

    for chosen, truth in ((index, exact(logits)), (None, frozen(logits, logits.detach()))):
        objective = vi.q_wake(table, guide, {"x": 1.0}, 2, index=chosen, guide_args=(logits,))
        mean, _ = moments(outcomes(monkeypatch, lambda: gradient(objective, logits)))
        expected = [truth.item(), *torch.autograd.grad(truth, logits)[0].tolist()]
        assert mean == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("strategy", [ENUM, MVD, REINFORCE])
def test_a_frozen_sampler_has_no_gradient_whatever_its_strategies(monkeypatch, strategy):
    """Even where its distributions were made before: of E[log q(x)] only log q is differentiated."""
    p = f64(0.3, grad=True)

    @vi.program
    def model():
        vi.sample("y", Bernoulli(0.2 + 0.5 * vi.sample("a", Bernoulli(f64(0.4)))))

    guide = vi.program(lambda law: vi.sample("a", law, strategy))
    weights, chances = np.array([0.6 * 0.2 / 0.7, 0.4 * 0.7 / 0.3]), np.array([0.7, 0.3])
    share = 0.0
    for pair in itertools.product((0, 1), repeat=2):
        pair = list(pair)
        share += chances[pair].prod() * (weights[pair] * pair).sum() / weights[pair].sum()
    expected = [share * math.log(0.3) + (1 - share) * math.log(0.7), share / 0.3 - (1 - share) / 0.7]

    def estimate():
        return gradient(vi.q_wake(model, guide, {"y": 1.0}, 2, guide_args=(Bernoulli(p),)), p)

    mean, _ = moments(outcomes(monkeypatch, estimate))
    assert mean == pytest.approx(expected, abs=1e-10)


def test_symmetric_divergence(monkeypatch):
    """With the posterior itself as proposal SIR draws from it, whatever the number of particles."""
    exact = Q * X / (Q * X).sum()

    @vi.program
    def truth(choices):
        vi.sample("r", Categorical(exact), REINFORCE)

    @vi.program
    def guide(probabilities):
        vi.sample("r", Categorical(probabilities), ENUM)

    q = f64(0.3, 0.3, 0.4)
    objective = vi.symmetric(table, guide, {"x": 1.0}, 2, proposal=truth, guide_args=(q,))
    mean, _ = moments(outcomes(monkeypatch, lambda: objective.value().item()))
    assert mean == pytest.approx(-((q - exact) * (q / exact).log()).sum().item(), abs=1e-10)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # E x^2 of a gamma is a (a + 1) / b^2, E x of a beta a / (a + b).
        (lambda a, b: (Gamma(a, b), 2), (2.0 * 3 / 2.25, 5 / 2.25, -2 * 6 / 1.5**3)),
        (lambda a, b: (Beta(a, b), 1), (2 / 3.5, 1.5 / 3.5**2, -2 / 3.5**2)),
    ],
)
def test_implicit_reparameterisation(make, expected):
    a, b = f64(2.0, grad=True), f64(1.5, grad=True)

    @vi.expectation
    def objective(a, b):
        distribution, power = make(a, b)
        return vi.sample("x", distribution, vi.Implicit()) ** power

    found = gradient(objective(a, b), a, b, draws=200_000, generator=torch.Generator().manual_seed(0))
    assert found == pytest.approx(expected, abs=0.03)


def test_costs_before_a_choice_are_not_charged_to_it(monkeypatch):
    p = f64(0.3, 0.6, grad=True)

    def objective(early):
        @vi.expectation
        def of(p):
            a = vi.sample("a", Bernoulli(p[0]), REINFORCE)
            if early:
                vi.add_cost(5 * a)
            b = vi.sample("b", Bernoulli(p[1]), REINFORCE)
            return b + (0 if early else 5 * a)

        return of(p)

    mean, variance = moments(outcomes(monkeypatch, lambda: gradient(objective(True), p)))
    later, more = moments(outcomes(monkeypatch, lambda: gradient(objective(False), p)))
    assert mean == pytest.approx([2.1, 5, 1], abs=1e-12) and later == pytest.approx(mean, abs=1e-12)
    assert variance[1] == pytest.approx(more[1], abs=1e-12)
    # Of b alone: b times its score, 1 / .6 where b is 1.
    assert variance[2] == pytest.approx(1 / 0.6 - 1, abs=1e-12) and more[2] > 2 * variance[2]


def test_costs_in_a_plate_are_summed_and_charged_in_every_branch(monkeypatch):
    p = f64(0.3, grad=True)

    @vi.expectation
    def objective(p):
        first = vi.sample("first", Bernoulli(p), ENUM)
        with vi.replicate(2):
            vi.add_cost(vi.sample("v", Bernoulli(p), MVD) * (1 + first))
        return f64(0.0)

    mean, _ = moments(outcomes(monkeypatch, lambda: gradient(objective(p), p)))
    assert mean == pytest.approx([2 * 0.3 * 1.3, 2 + 4 * 0.3], abs=1e-12)


def test_minibatch_is_unbiased():
    values = torch.arange(6, dtype=torch.float64)
    p = f64(0.4, grad=True)

    @vi.expectation
    def objective(p):
        chance = vi.minibatch(6, 2, lambda rows: (values[rows] / 15).sum()) * p
        return vi.sample("v", Bernoulli(chance.clamp(max=1)), MVD) * 3

    generator = torch.Generator().manual_seed(0)
    found = np.mean([gradient(objective(p), p, draws=8, generator=generator) for _ in range(800)], axis=0)
    assert found == pytest.approx([1.2, 3], abs=0.15)


def test_a_minibatch_is_the_same_in_every_run_of_one_estimate():
    seen = []

    @vi.expectation
    def objective(p):
        vi.minibatch(50, 3, lambda rows: seen.append(rows) or p)
        return vi.sample("v", Bernoulli(p), MVD) * 3

    objective(f64(0.4, grad=True)).surrogate(generator=torch.Generator().manual_seed(0))
    assert len(seen) == 2 and torch.equal(*seen) and len(seen[0].unique()) == 3


def test_products_and_exponentials_of_expectations():
    """E times E by two draws, exp(E) by a Poisson number of factors; log of a draw is below log E."""
    loc = f64(0.7, grad=True)
    inner = vi.expectation(lambda loc: vi.sample("x", Normal(loc, 0.5), vi.Reparam()) ** 2)

    @vi.expectation
    def square(loc):
        return inner(loc).draw() * inner(loc).draw()

    @vi.expectation
    def exponential(loc):
        return inner(loc).exp(rate=1.0)

    mean = 0.7**2 + 0.5**2
    for objective, value, slope in (
        (square(loc), mean**2, 2 * mean * 1.4),
        (exponential(loc), math.exp(mean), math.exp(mean) * 1.4),
    ):
        found = gradient(objective, loc, draws=400_000, generator=torch.Generator().manual_seed(0))
        assert found == pytest.approx([value, slope], abs=0.04)
    logarithm = vi.expectation(lambda loc: inner(loc).draw().log())(loc)
    assert logarithm.value(draws=10_000, generator=torch.Generator().manual_seed(0)) < math.log(mean)


def test_exponential_with_a_discrete_expectation_is_unbiased():
    p = f64(0.3, grad=True)
    inner = vi.expectation(lambda p: 0.5 + vi.sample("v", Bernoulli(p), REINFORCE))
    objective = vi.expectation(lambda p: inner(p).exp(0.8))
    found = gradient(objective(p), p, draws=400_000, generator=torch.Generator().manual_seed(1))
    assert found == pytest.approx([math.exp(0.8)] * 2, abs=0.05)


def test_batch_and_draws_are_one_tensor_and_equal_a_hand_written_estimator():
    torch.manual_seed(0)
    x = (torch.rand(16, 12) < 0.4).float()
    encoder, decoder = torch.nn.Linear(12, 6), torch.nn.Linear(3, 12)

    @vi.program
    def model(decoder):
        z = vi.sample("z", Independent(Normal(torch.zeros(3), torch.ones(3)), 1))
        vi.sample("x", Independent(Bernoulli(logits=decoder(z)), 1))

    @vi.program
    def guide(encoder, x):
        loc, log_scale = encoder(x).chunk(2, -1)
        vi.sample("z", Independent(Normal(loc, log_scale.exp()), 1), vi.Reparam())

    estimator = vi.elbo(model, guide, {"x": x}, model_args=(decoder,), guide_args=(encoder, x))
    value, slopes = estimator.value_and_grad(draws=4, batch_shape=(16,), generator=torch.Generator().manual_seed(1))
    noise = torch.empty(4, 16, 3).normal_(generator=torch.Generator().manual_seed(1))
    loc, log_scale = encoder(x).chunk(2, -1)
    z = loc + log_scale.exp() * noise
    by_hand = (
        Normal(0.0, 1.0).log_prob(z).sum(-1)
        + Bernoulli(logits=decoder(z)).log_prob(x).sum(-1)
        - Normal(loc, log_scale.exp()).log_prob(z).sum(-1)
    ).mean()
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-6)
    expected = torch.autograd.grad(by_hand, [*decoder.parameters(), *encoder.parameters()])
    for slope, wanted in zip(slopes, expected, strict=True):
        assert torch.allclose(slope, wanted, atol=1e-6)
    assert estimator.surrogate(draws=4, batch_shape=(16,)).shape == (16,)
    assert type(estimator.surrogate(batch_shape=(16,))) is torch.Tensor


def test_each_item_of_a_batch_has_a_score_of_its_own(monkeypatch):
    p = f64(0.3, 0.6, grad=True)
    objective = vi.expectation(lambda p: vi.sample("v", Bernoulli(p), REINFORCE) * f64(1.0, 100.0))
    mean, variance = moments(outcomes(monkeypatch, lambda: gradient(objective(p), p, batch_shape=(2,))))
    assert mean[1:] == pytest.approx([0.5, 50])
    assert variance[1] == pytest.approx((1 / 0.3 - 1) / 4)


# What the room's contract asks of estimators.


def test_same_generator_same_result_and_global_state_untouched():
    theta = f64(-3.0, -3.0, grad=True)
    estimator = vi.diwhvi(cone, ring, ["x", "y"], Z, 3, 2, guide_args=(theta,))
    before = torch.get_rng_state()
    one, again, other = (
        estimator.value_and_grad(draws=5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one[0], again[0]) and torch.equal(one[1][0], again[1][0]) and not torch.equal(one[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "distribution",
    [
        Normal(0.0, 1.0), Uniform(0.0, 1.0), Laplace(0.0, 1.0), Gamma(2.0, 1.0), Beta(2.0, 1.0), Poisson(2.0), Bernoulli(0.3),
        Categorical(torch.ones(3)), torch.distributions.Dirichlet(torch.ones(3)), torch.distributions.Exponential(1.0),
        torch.distributions.Cauchy(0.0, 1.0), torch.distributions.Binomial(5, torch.tensor(0.4)),
        torch.distributions.Geometric(0.3), torch.distributions.VonMises(0.0, 1.0), torch.distributions.StudentT(4.0),
        torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.distributions.LogNormal(0.0, 1.0),
        torch.distributions.Gumbel(0.0, 1.0), torch.distributions.NegativeBinomial(3.0, torch.tensor(0.4)),
        torch.distributions.LKJCholesky(3, 1.0), torch.distributions.Wishart(torch.tensor(4.0), torch.eye(2)),
        torch.distributions.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(0.3)),
        torch.distributions.OneHotCategorical(torch.ones(3)), torch.distributions.ContinuousBernoulli(0.3),
        torch.distributions.MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.zeros(2), 1.0)),
    ],
    ids=lambda distribution: type(distribution).__name__,
)  # fmt: skip
def test_every_distribution_draws_from_the_generator(distribution):
    law = vi.program(lambda: vi.sample("x", distribution))
    before = torch.get_rng_state()
    one, again, other = (
        vi.simulate(law, draws=6, generator=torch.Generator().manual_seed(seed)).choices["x"] for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert one.shape == (6, *distribution.event_shape) and torch.equal(one, again) and not torch.equal(one, other)


def test_threads_do_not_meet():
    theta = f64(-3.0, -3.0)
    estimator = vi.iwhvi(cone, ring, ["x", "y"], Z, 5, guide_args=(theta,))
    alone = [estimator.value(draws=200, generator=torch.Generator().manual_seed(seed)).item() for seed in range(4)]
    found = {}

    def work(seed):
        found[seed] = estimator.value(draws=200, generator=torch.Generator().manual_seed(seed)).item()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == alone


def test_order_of_rows_changes_nothing(monkeypatch):
    x = f64(0.3, -1.2, 2.0)
    objective = vi.expectation(lambda loc, x: -((vi.sample("m", Normal(loc, 1.0), vi.Reparam()) - x) ** 2))
    noise = f64(0.5, 1.5, -0.3)
    on_nodes(monkeypatch, [noise])
    straight = objective(f64(0.0), x).value(batch_shape=(3,))
    on_nodes(monkeypatch, [noise.flip(0)])
    assert torch.equal(objective(f64(0.0), x.flip(0)).value(batch_shape=(3,)).flip(0), straight)


# Bad input, each in a sentence.


def of(body, *args, **options):
    return vi.expectation(body)(*args).surrogate(**options)


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: 1.0 if x > 0 else 2.0,
        lambda x: 1.0 if (2 * x.exp().detach() - 1) > 0 else 2.0,
        lambda x: float(x),
        lambda x: int(x),
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: [1.0, 2.0][(x > 0).long()],
        lambda x: max(x, torch.zeros_like(x)),
    ],
)
def test_a_reparam_sample_decides_no_branch(branch):
    loc = f64(0.4, grad=True)
    with pytest.raises(ValueError, match=r"Reparam sample.*Reinforce, MVD or Enum"):
        of(lambda loc: branch(vi.sample("x", Normal(loc, 1.0), vi.Reparam())), loc)


def test_other_samples_decide_branches_and_torch_reads_reparam_ones():
    loc = f64(0.4, grad=True)
    for strategy in (REINFORCE, MVD):
        assert of(lambda loc, s=strategy: 1.0 if vi.sample("x", Normal(loc, 1.0), s) > 0 else 2.0, loc).item() in (1, 2)
    assert of(lambda loc: vi.sample("y", Normal(vi.sample("x", Normal(loc, 1.0)), 1.0)), loc).requires_grad


def test_what_is_refused():
    p = f64(0.3, grad=True)
    cases = [
        (ValueError, "Enum cannot.*'x' from Normal", lambda: vi.sample("x", Normal(p, 1.0), ENUM), {}),
        (ValueError, "Reparam cannot.*Bernoulli.*Reinforce", lambda: vi.sample("x", Bernoulli(p), vi.Reparam()), {}),
        (ValueError, "MVD cannot.*Poisson", lambda: vi.sample("x", Poisson(p), MVD), {}),
        (ValueError, "Implicit cannot.*Normal", lambda: vi.sample("x", Normal(p, 1.0), vi.Implicit()), {}),
        (ValueError, "Reparam cannot.*take Implicit", lambda: vi.sample("x", Gamma(p, 1.0), vi.Reparam()), {}),
        (ValueError, "one choice each", lambda: vi.sample("x", Independent(Bernoulli(p.expand(2)), 1), ENUM), {}),
        (TypeError, "strategy of choice 'x'", lambda: vi.sample("x", Bernoulli(p), "enum"), {}),
        (TypeError, "torch.distributions", lambda: vi.sample("x", 3.0), {}),
        (TypeError, "name of the choice", lambda: vi.sample(Bernoulli(p), "x"), {}),
        (ValueError, r"\(2,\).*runs of shape \(\).*Independent", lambda: vi.sample("x", Normal(p.expand(2), 1.0)), {}),
        (ValueError, r"\(3,\).*runs of shape \(4,\)", lambda: vi.sample("x", Normal(p.expand(3), 1.0)), {"draws": 4}),
        (ValueError, r"returns.*\(2,\)", lambda: p.expand(2), {}),
        (TypeError, "number or a tensor, got NoneType", lambda: None, {}),
        (ValueError, "branches in Python", lambda: 1.0 if vi.sample("x", Bernoulli(p), ENUM) else 0.0, {}),
        (ValueError, "branches in Python", lambda: 1.0 if vi.sample("x", Bernoulli(p)) else 0.0, {"draws": 3}),
        (ValueError, "two choices named 'x'", lambda: vi.sample("x", Bernoulli(p)) + vi.sample("x", Bernoulli(p)), {}),
        (ValueError, "baseline of x", lambda: vi.sample("x", Bernoulli(p), vi.Reinforce(torch.ones(3))), {}),
        (ValueError, "a cost", lambda: vi.add_cost(torch.ones(3)) or p, {}),
        (ValueError, "at least 1", lambda: p, {"draws": 0}),
        (ValueError, "1 to 4, got 5", lambda: vi.minibatch(4, 5, lambda rows: p), {}),
        (ValueError, "in an objective", lambda: vi.simulate(table, draws=3).log_density, {}),
        (ValueError, "rate is above 0", lambda: vi.expectation(lambda: p)().exp(0.0), {}),
        (TypeError, "@program", lambda: vi.simulate(lambda: p).log_density, {}),
    ]
    for error, sentence, body, options in cases:
        with pytest.raises(error, match=sentence):
            of(body, **options)
    with pytest.raises(ValueError, match="branches: take Reinforce"):
        vi.iwelbo(flips_model, flips(ENUM), {"y": 1.0}, 30, guide_args=(f64(0.3, 0.6, 0.2),)).value()
    with pytest.raises(RuntimeError, match="expectation"):
        vi.sample("x", Bernoulli(p))
    with pytest.raises(ValueError, match="nothing to differentiate"):
        vi.expectation(lambda: f64(1.0))().value_and_grad()


def test_choices_that_do_not_fit_a_program_are_refused():
    for sentence, choices in (
        ("choices lack 'x'", {"r": 1}),
        ("no choice named q", {"r": 1, "x": 1.0, "q": 2}),
        ("outside the support of Bernoulli", {"r": 1, "x": 3.0}),
        ("event of shape", {"r": 1, "x": 1.0, "v": torch.zeros(3)}),
        (r"runs of shape \(\)", {"r": 1, "x": torch.ones(2)}),
    ):

        @vi.program
        def one(more="v" in choices):
            table()
            if more:
                vi.sample("v", Independent(Normal(torch.zeros(2), 1.0), 1))

        with pytest.raises(ValueError, match=sentence):
            vi.log_density(one, choices)
    with pytest.raises(TypeError, match="tensor or a number, got str"):
        vi.log_density(table, {"r": "one", "x": 1.0})
    with pytest.raises(ValueError, match="density of these"):
        vi.log_density(vi.Marginal(table, ["x"], vi.SIR(2)), {"r": 1})
    with pytest.raises(ValueError, match="to be kept"):
        vi.simulate(vi.Marginal(table, ["q"], vi.SIR(2)))
    with pytest.raises(TypeError, match="list of names"):
        vi.Marginal(table, "x", vi.SIR(2))
    with pytest.raises(ValueError, match="at least one choice"):
        vi.Marginal(table, [], vi.SIR(2))
    with pytest.raises(ValueError, match="given data"):
        vi.Normalize(table, {}, vi.SIR(2))
    with pytest.raises(TypeError, match="SIR"):
        vi.Normalize(table, {"x": 1.0}, 5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        vi.SIR(0)
    with pytest.raises(TypeError, match="under @program"):
        vi.Marginal(table.function, ["x"], vi.SIR(2))
    impossible = vi.program(
        lambda: vi.sample("x", Categorical(logits=f64(0.0, -math.inf) + vi.sample("r", Normal(0.0, 1.0))))
    )
    with pytest.raises(ValueError, match="density above zero"):
        vi.simulate(vi.Normalize(impossible, {"x": 1}, vi.SIR(2)))


def test_a_program_with_randomness_of_its_own_is_found_out():
    turn = itertools.count()

    def body():
        p = f64(0.3, grad=True)
        vi.sample("a", Bernoulli(p), MVD)
        name = f"b{next(turn)}"
        return vi.sample(name, Bernoulli(p), MVD)

    with pytest.raises(ValueError, match="goes through sample"):
        of(body)


def test_choices_of_a_program_and_of_its_parts_share_names():
    part = vi.program(lambda: vi.sample("x", Bernoulli(f64(0.3))))
    whole = vi.program(lambda: part() + part())
    with pytest.raises(ValueError, match="two choices named 'x'"):
        vi.simulate(whole)
    trace = vi.simulate(vi.program(lambda: part() + vi.sample("y", Bernoulli(f64(0.5)))))
    assert list(trace.choices) == ["x", "y"] and trace.result == sum(trace.choices.values())


def test_a_loss_is_a_plain_tensor_also_where_a_path_feeds_a_score():
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for strategy in (vi.Reinforce(), vi.Enum(), vi.Enum(parallel=False), vi.MVD()):

        @vi.expectation
        def hybrid(weight, strategy=strategy):
            x = vi.sample("x", Normal(weight, 1.0), vi.Reparam())
            v = vi.sample("v", Bernoulli(logits=weight * x), strategy)
            return v * x

        loss = hybrid(weight).surrogate(draws=3, generator=torch.Generator().manual_seed(0))
        assert type(loss) is Tensor and f"{float(loss):.3f}" == f"{loss.item():.3f}"
        value, (slope,) = hybrid(weight).value_and_grad(draws=3, generator=torch.Generator().manual_seed(0))
        assert type(value) is Tensor and type(slope) is Tensor and value.item() == loss.item() and slope.item() != 0


def test_what_fails_within_an_objective_and_is_caught_leaves_nothing_behind():
    @vi.program
    def bad():
        vi.sample("x", Normal(0.0, 1.0))
        raise KeyError("out")

    @vi.expectation
    def objective():
        with contextlib.suppress(KeyError):
            vi.log_density(bad, {"x": 7.0, "z": 7.0})
        with contextlib.suppress(KeyError), vi.replicate(3):
            raise KeyError("out")
        with contextlib.suppress(KeyError):
            inner().draw()
        return vi.sample("z", Normal(0.0, 1.0)) + vi.sample("x", Normal(0.0, 1.0))

    @vi.expectation
    def inner():
        vi.sample("x", Normal(0.0, 1.0))
        raise KeyError("out")

    generator = torch.Generator().manual_seed(0)
    assert (
        objective().surrogate(generator=generator).shape == () == objective().value(draws=2, generator=generator).shape
    )
    assert float(objective().value(generator=generator)) < 7


def rows():
    @vi.program
    def model():
        z = vi.sample("z", Normal(0.0, 1.0))
        vi.sample("y", Normal(z, 1.0))

    @vi.program
    def guide():
        vi.sample("z", Normal(0.0, 1.0))

    return model, guide


def test_rows_of_data_are_no_particles_or_draws():
    model, guide = rows()
    data = {"y": torch.arange(5.0)}
    for estimator, options in (
        (vi.iwelbo(model, guide, data, 5), {}),
        (vi.elbo(model, guide, data), {"draws": 5}),
        (vi.q_wake(model, guide, data, 5), {}),
    ):
        with pytest.raises(ValueError, match="data y"):
            estimator.value(**options)
    assert vi.iwelbo(model, guide, data, 5).value(batch_shape=(5,)).shape == (5,)


def test_data_is_not_drawn_too():
    model, guide = rows()

    @vi.program
    def also_y():
        vi.sample("z", Normal(0.0, 1.0))
        vi.sample("y", Normal(5.0, 1.0))

    @vi.program
    def proposal(given):
        also_y()

    for estimator in (vi.elbo(model, also_y, {"y": 1.0}), vi.p_wake(model, also_y, {"y": 1.0}, 3)):
        with pytest.raises(ValueError, match="y is"):
            estimator.value()
    posterior = vi.Normalize(model, {"y": 1.0}, vi.SIR(4, proposal))
    with pytest.raises(ValueError, match="y is given"):
        vi.simulate(posterior)
    with pytest.raises(ValueError, match="y is data"):
        vi.log_density(vi.Normalize(model, {"y": 1.0}, vi.SIR(4)), {"z": 0.5, "y": 9.0})


@pytest.mark.parametrize("parallel", [True, False])
def test_values_that_are_impossible_count_nothing(parallel):
    logits = torch.tensor([0.3, -0.2, -math.inf], dtype=torch.float64)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    @vi.program
    def guide(shift):
        vi.sample("k", Categorical(logits=logits + shift), vi.Enum(parallel))

    @vi.program
    def model():
        vi.sample("k", Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)))

    value, (slope,) = vi.elbo(model, guide, {}, guide_args=(shift,)).value_and_grad()
    p = (logits[:2]).softmax(0)
    expected = (p * (torch.tensor([0.2, 0.3], dtype=torch.float64).log() - p.log())).sum()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert bool(slope.isfinite().all()) and float(slope[2]) == 0 and float(slope[:2].abs().min()) > 0.01


def test_a_density_within_a_program_is_refused_and_an_expectation_within_an_objective_named():
    model, guide = rows()

    @vi.program
    def outer():
        z = vi.simulate(guide).choices["z"]
        vi.sample("x", Normal(z, 1.0))

    with pytest.raises(ValueError, match="call the inner program"):
        vi.log_density(outer, {"x": 1.0})

    @vi.expectation
    def nested():
        return vi.elbo(model, guide, {"y": 1.0}).surrogate()

    with pytest.raises(RuntimeError, match=r"\.draw\(\)"):
        nested().value()


def test_draws_within_a_program_have_choices_of_their_own():
    @vi.expectation
    def inner():
        return vi.sample("x", Normal(0.0, 1.0))

    @vi.program
    def outer():
        return vi.sample("x", Normal(inner().draw() + inner().draw(), 1.0))

    trace = vi.simulate(outer, generator=torch.Generator().manual_seed(0))
    assert list(trace.choices) == ["x"]


def test_arguments_of_models_and_proposals_reach_them():
    @vi.program
    def model(scale):
        z = vi.sample("z", Normal(0.0, scale))
        vi.sample("y", Normal(z, 1.0))

    @vi.program
    def guide(scale):
        r = vi.sample("r", Normal(0.0, 1.0))
        vi.sample("z", Normal(r, scale))

    @vi.program
    def narrow(given, scale):
        vi.sample("r", Normal(given["z"], 1e-3))

    @vi.program
    def plain_guide():
        vi.sample("z", Normal(0.0, 2.0))

    data, generator = {"y": 1.0}, lambda: torch.Generator().manual_seed(0)
    for of in (
        lambda scale: vi.iwelbo(model, plain_guide, data, 3, model_args=(scale,)),
        lambda scale: vi.q_wake(model, plain_guide, data, 3, model_args=(scale,)),
        lambda scale: vi.p_wake(model, plain_guide, data, 3, model_args=(scale,)),
        lambda scale: vi.symmetric(model, plain_guide, data, 3, model_args=(scale,)),
    ):
        assert of(1.0).value(generator=generator()).item() != of(3.0).value(generator=generator()).item()
    for of in (vi.iwhvi, vi.diwhvi):
        counts = (4,) if of is vi.iwhvi else (2, 4)
        first, other = (
            of(model, guide, ["z"], data, *counts, proposal=proposal, model_args=(1.0,), guide_args=(1.0,)).value(
                draws=50, generator=generator()
            )
            for proposal in (None, narrow)
        )
        assert first.item() != other.item()
    assert (
        not vi.elbo(model, plain_guide, data, model_args=(torch.tensor(1.0, requires_grad=True),)).value().requires_grad
    )


def test_a_number_added_within_a_plate_is_added_for_every_copy():
    @vi.expectation
    def objective(cost):
        with vi.replicate(3):
            vi.add_cost(cost)
        return torch.zeros(())

    assert objective(2.0).value().item() == 6.0 == objective(torch.tensor(2.0)).value().item()
