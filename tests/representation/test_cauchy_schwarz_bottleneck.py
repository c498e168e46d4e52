"""The Cauchy-Schwarz information bottleneck (arXiv 2404.17951)."""

from __future__ import annotations

import math
import shutil
from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm, qmc
from sklearn.datasets import load_diabetes
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperworks.representation.cauchy_schwarz_bottleneck import (
    BottleneckNetwork,
    CauchySchwarzBottleneck,
    CauchySchwarzBottleneckRegressor,
    conditional_cs_divergence,
    cs_divergence,
    cs_mutual_information,
    fgsm,
    hsic,
    information_plane,
    pgd,
    train_bottleneck,
)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel(u, v, sigma):
    return math.exp(-float(((u - v) ** 2).sum()) / (2 * sigma**2))


def by_loops(x, y, y_hat, sigma_x, sigma_y, transpose=False, official=False):
    """The formula of the paper, term by term."""
    n, sums = len(x), [0.0, 0.0, 0.0]
    for j in range(n):
        row = [kernel(x[j], x[i], sigma_x) for i in range(n)]
        w = 1 / (sum(k**2 for k in row) if official else sum(row) ** 2)
        for i in range(n):
            cross = (y_hat[i], y[j]) if transpose else (y_hat[j], y[i])
            for term, pair in enumerate(((y[j], y[i]), (y_hat[j], y_hat[i]), cross)):
                sums[term] += w * row[i] * kernel(*pair, sigma_y)
    return math.log(sums[0]) + math.log(sums[1]) - 2 * math.log(sums[2])


@pytest.mark.parametrize("seed", range(3))
def test_1_mutual_information_is_the_divergence_of_kernel_density_estimates_by_quadrature(seed):
    x, t = normal(6, seed=seed), normal(6, seed=seed + 10)
    grid = np.linspace(-9, 9, 1201)
    of_x, of_t = (norm.pdf(grid[:, None], one.numpy(), s / math.sqrt(2)) for one, s in ((x, 0.8), (t, 0.5)))
    joint, product = of_x @ of_t.T / 6, np.outer(of_x.mean(1), of_t.mean(1))
    inner = [float((p * q).sum()) for p, q in ((joint, joint), (product, product), (joint, product))]
    expected = math.log(inner[0] * inner[1] / inner[2] ** 2)
    found = cs_mutual_information(x, t, 0.8, 0.5, normalize=False)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_1_mutual_information_is_at_least_zero_zero_for_a_constant_and_symmetric():
    for seed in range(30):
        x, t = normal(9, 2, seed=seed), normal(9, 3, seed=100 + seed)
        found = cs_mutual_information(x, t, 0.7, 1.1, normalize=False)
        assert float(found) > 0
        assert float(cs_mutual_information(t, x, 1.1, 0.7, normalize=False)) == pytest.approx(float(found), abs=1e-12)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        moved = cs_mutual_information(x[order], t[order], 0.7, 1.1, normalize=False)
        assert float(moved) == pytest.approx(float(found), abs=1e-12)
        for one, other in ((x, t * 0), (x * 0, t)):
            assert float(cs_mutual_information(one, other, normalize=False)) == pytest.approx(0, abs=1e-12)


def test_2_right_predictions_have_no_divergence_and_order_does_not_matter():
    x, y, y_hat = normal(20, 3), normal(20, 2, seed=1), normal(20, 2, seed=2)
    assert float(conditional_cs_divergence(x, y, y)) == 0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    plain, moved = (conditional_cs_divergence(x[o], y[o], y_hat[o]) for o in (torch.arange(20), order))
    assert float(plain) == pytest.approx(float(moved), abs=1e-12)


def test_2_with_equal_x_it_is_the_two_sample_divergence():
    y, y_hat = normal(20, 1, seed=1), normal(20, 1, seed=2)
    found = conditional_cs_divergence(torch.ones(20, 3, dtype=torch.float64), y, y_hat)
    assert float(found) == pytest.approx(float(cs_divergence(y, y_hat)), abs=1e-12) and float(found) > 0.001
    permuted = y[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    assert float(conditional_cs_divergence(0 * y, y, permuted)) == pytest.approx(0, abs=1e-12)


def test_2_with_a_sharp_kernel_it_is_the_correntropy_loss():
    x, y, y_hat = normal(20, 3), normal(20, 1, seed=1), normal(20, 1, seed=2)
    expected = -2 * math.log(np.mean([kernel(a, b, 0.9) for a, b in zip(y, y_hat, strict=True)]))
    assert float(conditional_cs_divergence(x, y, y_hat, 1e-3, 0.9)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("official", [False, True])
def test_3_indices_are_in_the_order_of_the_paper(official):
    x = normal(8, 2) * torch.linspace(0.1, 2, 8, dtype=torch.float64)[:, None]
    y, y_hat = normal(8, 2, seed=1), normal(8, 2, seed=2)
    found = float(conditional_cs_divergence(x, y, y_hat, 0.9, 0.7, official=official))
    assert found == pytest.approx(by_loops(x, y, y_hat, 0.9, 0.7, official=official), abs=1e-12)
    assert abs(found - by_loops(x, y, y_hat, 0.9, 0.7, transpose=True, official=official)) > 1e-3


def test_3_numbers_without_a_second_dimension_are_samples():
    x, y, y_hat = normal(8), normal(8, seed=1), normal(8, seed=2)
    expected = by_loops(x[:, None], y[:, None], y_hat[:, None], 1.0, 1.0)
    assert float(conditional_cs_divergence(x, y, y_hat)) == pytest.approx(expected, abs=1e-12)


def test_4_wide_kernels_only_see_the_means():
    x, y, y_hat = normal(12, 2), normal(12, seed=1), normal(12, seed=2) + 0.5
    sigma = 1e3
    alike = sigma**2 * conditional_cs_divergence(0 * x, y, y_hat, 1.0, sigma)
    assert float(alike) == pytest.approx(float((y.mean() - y_hat.mean()) ** 2), rel=1e-3)
    assert abs(float(alike) - float((y - y_hat).square().mean())) > 0.1
    # Otherwise each pair counts with w_j K_ji, and spreads enter as well.
    K = torch.tensor([[kernel(a, b, 1.0) for a in x] for b in x], dtype=torch.float64)
    P = K / K.sum(1, keepdim=True) ** 2
    P /= P.sum()

    def squares(u, v):
        return float((P * (u[:, None] - v).square()).sum())

    expected = squares(y_hat, y) - squares(y, y) / 2 - squares(y_hat, y_hat) / 2
    assert float(sigma**2 * conditional_cs_divergence(x, y, y_hat, 1.0, sigma)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("m", "s"), [(0.7, 1.5), (1.0, 1.0), (0.0, 0.5)])
def test_5_samples_of_gaussians_have_the_smoothed_closed_form(m, s):
    def closed(v1, v2):
        return math.log((v1 + v2) / (2 * math.sqrt(v1 * v2))) + m**2 / (v1 + v2)

    assert closed(1, s**2) == pytest.approx(math.log((1 + s**2) / (2 * s)) + m**2 / (1 + s**2))
    # Quantiles have the distribution's moments without chance.
    quantiles = torch.from_numpy(norm.ppf((np.arange(1500) + 0.5) / 1500))
    smoothed = closed(1 + 0.8**2 / 2, s**2 + 0.8**2 / 2)
    assert float(cs_divergence(quantiles, m + s * quantiles, 0.8)) == pytest.approx(smoothed, abs=1e-3)
    assert abs(smoothed - closed(1, s**2)) > 0.02


def test_5_many_samples_and_a_narrow_kernel_reach_the_closed_form():
    a, b = normal(5000).float(), 0.7 + 1.5 * normal(5000, seed=1).float()
    expected = math.log((1 + 1.5**2) / (2 * 1.5)) + 0.7**2 / (1 + 1.5**2)
    assert float(cs_divergence(a, b, 0.05)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_5_divergence_of_gaussians_against_kullback_leibler(seed):
    """At most both of them for equal means, the same for equal covariances; between, only half of it is at most both."""
    A, B, m = normal(2, 2, seed=seed), normal(2, 2, seed=seed + 50), normal(2, seed=seed + 100)
    S, T = (C @ C.T + 0.3 * torch.eye(2, dtype=torch.float64) for C in (A, B))
    same = torch.zeros(2, dtype=torch.float64)
    p, r = (torch.distributions.MultivariateNormal(same, C) for C in (S, T))
    q, moved = (torch.distributions.MultivariateNormal(m, C) for C in (T, S))

    def divergence(mean, C, D):
        overlaps = ((same, 2 * C, 1), (same, 2 * D, 1), (mean, C + D, -2))
        return sum(sign * multivariate_normal.logpdf(at.numpy(), np.zeros(2), V.numpy()) for at, V, sign in overlaps)

    def both(one, other):
        return [float(torch.distributions.kl_divergence(*pair)) for pair in ((one, other), (other, one))]

    assert 0 < divergence(same, S, T) <= min(both(p, r))
    assert divergence(m, S, S) == pytest.approx(both(p, moved)[0], rel=1e-9)
    assert divergence(m, S, T) / 2 <= min(both(p, q))
    sigma = 0.8
    wide = [C + sigma**2 / 2 * torch.eye(2, dtype=torch.float64) for C in (S, T)]
    samples = [
        torch.from_numpy(qmc.MultivariateNormalQMC(mean, C.numpy(), rng=seed).random(1024))
        for mean, C in ((np.zeros(2), S), (m.numpy(), T))
    ]
    assert float(cs_divergence(*samples, sigma)) == pytest.approx(divergence(m, *wide), rel=0.02, abs=5e-3)


def test_5_it_may_exceed_kullback_leibler_where_means_and_variances_differ():
    m, s, sigma = 10.0, 2.0, 0.05
    quantiles = torch.from_numpy(norm.ppf((np.arange(1500) + 0.5) / 1500))
    found = float(cs_divergence(quantiles, m + s * quantiles, sigma))
    kl = math.log(s) + (1 + m**2) / (2 * s**2) - 0.5
    assert math.log((1 + s**2) / (2 * s)) + m**2 / (1 + s**2) > kl + 5 and found > kl + 5


def test_6_normalised_information_of_x_with_itself_is_one_and_has_no_base():
    x, t = normal(15, 3), normal(15, 2, seed=1)
    assert float(cs_mutual_information(x, x)) == pytest.approx(1, abs=1e-9)
    parts = [cs_mutual_information(*pair, normalize=False) / math.log(2) for pair in ((x, t), (x, x), (t, t))]
    bits = parts[0] / (parts[1] * parts[2]).sqrt()
    assert float(cs_mutual_information(x, t)) == pytest.approx(float(bits), abs=1e-9) and 0 < bits < 1


def test_6_gradients_are_those_of_finite_differences():
    x, y, y_hat, t = (normal(8, d, seed=d).requires_grad_() for d in (3, 1, 2, 4))
    assert torch.autograd.gradcheck(lambda *one: cs_mutual_information(*one), (x, t))
    assert torch.autograd.gradcheck(cs_divergence, (y, y_hat[:, :1].detach().requires_grad_()))
    loss = CauchySchwarzBottleneck(beta=0.5)
    assert torch.autograd.gradcheck(loss, (x, y, y_hat[:, :1].detach().requires_grad_(), t))


@pytest.mark.parametrize("official", [False, True])
def test_6_duplicated_rows_collapse_and_far_targets_give_finite_gradients(official):
    x, y = normal(4, 3).repeat(2, 1), normal(4, 1, seed=1).repeat(2, 1)
    loss = CauchySchwarzBottleneck(beta=0.5, official=official)
    for t in (normal(4, 2).repeat(2, 1), torch.zeros(8, 2, dtype=torch.float64)):
        for y_hat in (y.clone(), y + 1000):
            given = [one.clone().requires_grad_() for one in (x, y, y_hat, t)]
            value = loss(*given)
            assert bool(value.isfinite())
            value.backward()
            assert all(bool(one.grad.isfinite().all()) for one in given)


def test_7_without_beta_only_the_prediction_counts():
    x, y, y_hat, t = normal(10, 3), normal(10, 1, seed=1), normal(10, 1, seed=2), normal(10, 4, seed=3)
    prediction, compression = conditional_cs_divergence(x, y, y_hat, 0.9, 0.8), cs_mutual_information(x, t, 0.9, 0.7)
    assert torch.equal(CauchySchwarzBottleneck(0, 0.9, 0.8, 0.7)(x, y, y_hat, t), prediction)
    whole = CauchySchwarzBottleneck(0.3, 0.9, 0.8, 0.7)(x, y, y_hat, t)
    assert float(whole) == pytest.approx(float(prediction + 0.3 * compression), abs=1e-12)
    wider = CauchySchwarzBottleneck(0.3, 0.9, 0.8, 0.7, sigma_compression=2.0)(x, y, y_hat, t)
    compression = cs_mutual_information(x, t, 2.0, 0.7)
    assert float(wider) == pytest.approx(float(prediction + 0.3 * compression), abs=1e-12)


def test_7_training_without_beta_equals_training_by_the_divergence_alone():
    X, y = normal(40, 3).numpy(), normal(40, 1, seed=1).numpy()
    model = CauchySchwarzBottleneckRegressor((8,), 4, 0, epochs=3, lr=1e-2, validation_fraction=0, random_state=0)
    trained = model.fit(X, y).network_

    def rebuilt(beta):
        random = np.random.RandomState(0)
        order = random.permutation(40)
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
            network = BottleneckNetwork(3, (8,), 4).double()
        x, target = (torch.from_numpy((v - v.mean(0)) / v.std(0))[order] for v in (X, y))

        def objective(x, y):
            t = network.encode(x)
            return conditional_cs_divergence(x, y, network.decoder(t)) + beta * cs_mutual_information(x, t)

        train_bottleneck(network, objective, x, target, lr=1e-2, epochs=3, generator=generator)
        return network

    for beta, same in ((0.0, True), (0.5, False)):
        pairs = zip(trained.parameters(), rebuilt(beta).parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs) is same


def test_7_scaling_x_and_its_kernel_together_changes_nothing():
    x, y, y_hat, t = normal(10, 3), normal(10, 1, seed=1), normal(10, 1, seed=2), normal(10, 4, seed=3)
    for scale in (0.01, 100.0):
        for width in (0.9, "median"):
            plain = CauchySchwarzBottleneck(0.3, width)(x, y, y_hat, t)
            scaled = CauchySchwarzBottleneck(0.3, width if width == "median" else scale * width)(scale * x, y, y_hat, t)
            assert float(plain) == pytest.approx(float(scaled), abs=1e-10)


def test_rotating_features_changes_nothing():
    x, y, y_hat, t = normal(10, 3), normal(10, 1, seed=1), normal(10, 1, seed=2), normal(10, 4, seed=3)
    Q, R = (torch.linalg.qr(normal(d, d, seed=9)).Q for d in (3, 4))
    loss = CauchySchwarzBottleneck(0.3)
    assert float(loss(x @ Q, y, y_hat, t @ R)) == pytest.approx(float(loss(x, y, y_hat, t)), abs=1e-10)


def exactly(measure, x, t, y_hat=None, official=False):
    """What the functions estimate, with unit kernels, by the formulas as they stand in the paper, on lists of mpmath's numbers."""

    def matrix(u, v):
        return [[mpmath.exp(-sum((a - b) ** 2 for a, b in zip(r, s, strict=True)) / 2) for s in v] for r in u]

    def total(rows):
        return mpmath.fsum(v for row in rows for v in row)

    def times(u, v):
        return [[a * b for a, b in zip(r, s, strict=True)] for r, s in zip(u, v, strict=True)]

    def information(K, Q):
        rows = [mpmath.fsum(k) * mpmath.fsum(q) for k, q in zip(K, Q, strict=True)]
        return mpmath.log(total(times(K, Q))) + mpmath.log(total(K) * total(Q)) - 2 * mpmath.log(mpmath.fsum(rows))

    def independence(K, Q):
        centred = []
        for one in (K, Q):
            rows = [mpmath.fsum(row) / len(one) for row in one]
            mean = mpmath.fsum(rows) / len(one)
            centred.append(
                [[v - a - b + mean for v, b in zip(row, rows, strict=True)] for row, a in zip(one, rows, strict=True)]
            )
        return total(times(*centred)) / len(K) ** 2

    K, Q = matrix(x, x), matrix(t, t)
    if measure == "divergence":
        mean = [total(one) / len(one) / len(one[0]) for one in (K, Q, matrix(x, t))]
        return mpmath.log(mean[0]) + mpmath.log(mean[1]) - 2 * mpmath.log(mean[2])
    if measure == "conditional":
        rows = [mpmath.fsum(v**2 for v in row) if official else mpmath.fsum(row) ** 2 for row in K]
        W = [[v / w for v in row] for row, w in zip(K, rows, strict=True)]
        sums = [total(times(W, one)) for one in (Q, matrix(y_hat, y_hat), matrix(y_hat, t))]
        return mpmath.log(sums[0]) + mpmath.log(sums[1]) - 2 * mpmath.log(sums[2])
    of = information if measure == "information" else independence
    alone = of(K, K) * of(Q, Q)
    return of(K, Q), of(K, Q) / mpmath.sqrt(alone) if alone > 1e-60 else mpmath.mpf(0)


@pytest.fixture
def many_digits():
    with mpmath.workdps(80):
        yield


def numbers(rows):
    return [[mpmath.mpf(value) for value in row] for row in rows.detach().double().tolist()]


def samples(n, scale, offset, dtype, seed):
    return (scale * normal(n, 2, seed=seed) + offset).to(dtype)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("many_digits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1e5])
def test_estimates_agree_with_many_digits_at_any_scale(dtype, offset):
    """Large and small inputs, wide kernels, offsets, duplicates, one sample: to the last digits of the result's dtype."""
    offset = min(offset, 100.0) if dtype == torch.float16 else offset
    cases = [(6, *both) for both in product((1e-4, 0.01, 1.0, 1e4), repeat=2)] + [(1, 1.0, 0.01), (2, 0.01, 1e-4)]
    for seed, (n, of_x, of_t) in enumerate(cases):
        x, t = samples(n, of_x, offset, dtype, seed), samples(n, of_t, offset, dtype, seed + 50)
        y_hat = (t.double() + 0.01 * of_t * normal(n, 2, seed=seed + 100)).to(dtype)
        if n > 2:
            x[1], t[1], y_hat[1] = x[0], t[0], y_hat[0]
        if not all(bool(one.isfinite().all()) for one in (x, t, y_hat)):
            continue
        # Where the truth is 0, a formula to 80 digits leaves specks.
        near = {"rel": 1e-7, "abs": 1e-25}
        for found, measure, *given in (
            (cs_divergence(y_hat, t), "divergence", y_hat, t),
            (conditional_cs_divergence(x, t, y_hat), "conditional", x, t, y_hat),
        ):
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            assert float(found) == pytest.approx(float(exactly(measure, *map(numbers, given))), **near)
        official = conditional_cs_divergence(x, t, y_hat, official=True)
        expected = exactly("conditional", *map(numbers, (x, t, y_hat)), official=True)
        assert float(official) == pytest.approx(float(expected), **near)
        for function, measure in ((cs_mutual_information, "information"), (hsic, "independence")):
            expected = exactly(measure, numbers(x), numbers(t))
            for found, truth in zip((function(x, t, normalize=False), function(x, t)), expected, strict=True):
                assert float(found) == pytest.approx(float(truth), **near)


@pytest.mark.usefixtures("many_digits")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_many_digits_at_any_scale(dtype):
    for seed, (of_x, of_t) in enumerate(product((0.01, 1.0), (1e-3, 1.0))):
        scales = (of_x, of_t, of_t)
        given = [samples(4, scale, 0, dtype, 7 * seed + k).requires_grad_() for k, scale in enumerate(scales)]
        x, t, y_hat = given
        loss = CauchySchwarzBottleneck(0.5)(x, t, y_hat, t) + hsic(x, t) + cs_divergence(t, y_hat)

        def exact(x, t, y_hat):
            return (
                exactly("conditional", x, t, y_hat) + exactly("information", x, t)[1] / 2
                + exactly("independence", x, t)[1] + exactly("divergence", t, y_hat)
            )  # fmt: skip

        for place, gradient in enumerate(torch.autograd.grad(loss, given)):
            assert gradient.dtype == dtype
            tolerance = float(gradient.abs().max()) * max(1e-6, torch.finfo(dtype).eps)
            for row, column in ((0, 0), (3, 1)):
                ends, step = [], mpmath.mpf("1e-20")
                for sign in (1, -1):
                    moved = [numbers(one) for one in given]
                    moved[place][row][column] += sign * step
                    ends.append(exact(*moved))
                expected = float((ends[0] - ends[1]) / (2 * step))
                assert float(gradient[row, column]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_information_of_narrow_codes_keeps_its_value(dtype):
    """t = c x keeps as much of x for every small c; constants in a root, or logarithms in float32, lose that."""
    x = normal(200).to(dtype)
    values = [float(cs_mutual_information(x, c * x)) for c in (0.03, 0.01, 1e-3, 1e-8)]
    assert values == pytest.approx([values[-1]] * 4, rel=2e-3) and 0.7 < values[-1] < 0.9


def test_normalised_information_of_two_samples_and_widths_far_apart_is_above_one():
    x, t = torch.tensor([0.0, 100.0]), torch.tensor([0.0, 1e-4])
    assert float(cs_mutual_information(x, t)) == pytest.approx(1 / math.sqrt(math.log(2)), rel=1e-6)
    assert float(hsic(x, t)) == pytest.approx(1, rel=1e-6)


def test_median_widths_are_those_of_the_samples_they_are_for():
    x, y, y_hat, t = normal(9, 3), 5 * normal(9, 2, seed=1), 2 * normal(9, 2, seed=2), 0.2 * normal(9, 4, seed=3)
    widths = [float(torch.pdist(one).median()) for one in (x, y, t, torch.cat([y, y_hat]))]
    of_x, of_y, of_t, of_both = widths
    # An even number of distances has two in the middle: the smaller is taken.
    assert float(cs_divergence(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 7.0]), "median")) == float(
        cs_divergence(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 7.0]), 3.0)
    )
    assert torch.equal(cs_divergence(y, y_hat, "median"), cs_divergence(y, y_hat, of_both))
    median, given = (conditional_cs_divergence(x, y, y_hat, *two) for two in (("median", "median"), (of_x, of_y)))
    assert torch.equal(median, given)
    for measure in (cs_mutual_information, hsic):
        assert torch.equal(measure(x, t, "median", "median"), measure(x, t, of_x, of_t))
        assert not torch.allclose(measure(x, t, of_x, of_t), measure(x, t, of_x, of_x))
    whole = CauchySchwarzBottleneck(0.5, "median", "median", "median", sigma_compression=2.0)(x, y, y_hat, t)
    assert float(whole) == pytest.approx(float(given + 0.5 * cs_mutual_information(x, t, 2.0, of_t)), abs=1e-12)


def test_one_sample_and_constants_tell_nothing():
    x, one = normal(6, 2).float(), torch.ones(1, 2)
    for measure in (cs_mutual_information, hsic):
        for given in ((x, torch.full((6, 3), 0.1)), (torch.full((6, 2), 1e5), x), (one, one)):
            assert float(measure(*given)) == 0
        moving = one.clone().requires_grad_()
        measure(moving, one).backward()
        assert not moving.grad.any()
    assert float(cs_divergence(one, one + 3)) == pytest.approx(18)


@parametrize_with_checks(
    [CauchySchwarzBottleneckRegressor((16,), 8, lr=1e-2, epochs=30, batch_size=32, random_state=0)]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return X.astype(np.float32), y


def test_regressor_predicts_and_beta_compresses(diabetes):
    X, y = diabetes
    kept = []
    for beta in (0.0, 2.0):
        model = CauchySchwarzBottleneckRegressor((32,), 8, beta, lr=1e-2, epochs=25, random_state=0)
        model.fit(X[:300], y[:300])
        assert model.score(X[300:], y[300:]) > 0.3
        assert model.predict(X[:2]).dtype == np.float32 and model.transform(X).shape == (442, 8)
        plane = model.information_plane(X[300:], y[300:])
        kept.append(plane.compression)
        error = np.mean((model.predict(X[300:]) - y[300:]) ** 2)
        assert plane.prediction == pytest.approx(0.5 * math.log2(np.var(y[300:]) / error), abs=1e-4)
    assert kept[1] < 0.8 * kept[0]


def test_the_epoch_that_does_best_on_held_out_samples_is_kept(diabetes):
    X, y = diabetes
    model = CauchySchwarzBottleneckRegressor((32,), 8, lr=3e-2, epochs=30, random_state=1).fit(X[:150], y[:150])
    order = np.random.RandomState(1).permutation(150)[:15]
    error = np.mean((model.predict(X[order]) - y[order]) ** 2) / model.target_scale_[0] ** 2
    assert len(model.validation_errors_) == 30 and model.validation_errors_[-1] > min(model.validation_errors_)
    assert error == pytest.approx(min(model.validation_errors_), rel=1e-4)


def test_noise_on_the_bottleneck_is_only_there_while_training_and_its_variance_is_trained(diabetes):
    X, y = diabetes
    options = {"hidden": (8,), "bottleneck": 4, "lr": 1e-2, "stochastic": True, "random_state": 0}
    one, two = (CauchySchwarzBottleneckRegressor(epochs=epochs, **options).fit(X, y) for epochs in (1, 5))
    assert not torch.equal(one.network_.log_var.weight, two.network_.log_var.weight)
    assert np.array_equal(two.transform(X), two.transform(X))
    x = torch.from_numpy(X[:5])
    assert not torch.equal(two.network_.train().encode(x), two.network_.encode(x))


def test_saved_and_loaded_it_predicts_the_same(diabetes, tmp_path):
    X, y = diabetes
    for name, target in (("one", y), ("two", np.stack([y, -y], 1))):
        model = CauchySchwarzBottleneckRegressor((8,), 4, epochs=2, stochastic=True, random_state=0).fit(X, target)
        model.save_pretrained(tmp_path / name)
        loaded = CauchySchwarzBottleneckRegressor.from_pretrained(tmp_path / name)
        assert loaded.get_params() == model.get_params()
        assert np.array_equal(loaded.predict(X), model.predict(X)) and loaded.predict(X).shape == target.shape


def test_damaged_or_foreign_folders_are_one_clear_sentence(diabetes, tmp_path):
    CauchySchwarzBottleneckRegressor((8,), 4, epochs=1, random_state=0).fit(*diabetes).save_pretrained(tmp_path / "one")
    for name, spoil in (
        ("config.json", lambda text: b"{}"),
        ("config.json", lambda text: text.replace(b'"bottleneck": 4', b'"bottleneck": 5')),
        ("model.safetensors", lambda text: text[:-8]),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "one", broken, dirs_exist_ok=True)
        (broken / name).write_bytes(spoil((broken / name).read_bytes()))
        with pytest.raises(ValueError, match="holds no saved CauchySchwarzBottleneckRegressor"):
            CauchySchwarzBottleneckRegressor.from_pretrained(broken)
    with pytest.raises(ValueError, match="holds no saved"):
        CauchySchwarzBottleneckRegressor.from_pretrained(tmp_path / "nowhere")


def test_options_of_numpy_are_saved(diabetes, tmp_path):
    sizes = np.array([8]), np.int64(4)
    model = CauchySchwarzBottleneckRegressor(*sizes, np.float32(0.5), epochs=np.int64(1), random_state=np.int64(0))
    model.fit(*diabetes).save_pretrained(tmp_path)
    loaded = CauchySchwarzBottleneckRegressor.from_pretrained(tmp_path)
    assert (loaded.hidden, loaded.beta, loaded.random_state) == ((8,), 0.5, 0)


def test_columns_in_another_order_are_refused(diabetes):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(diabetes[0], columns=list("abcdefghij"))
    model = CauchySchwarzBottleneckRegressor((8,), 4, epochs=1, random_state=0).fit(frame, diabetes[1])
    moved = frame[list("bacdefghij")]
    for use in (
        model.predict,
        model.transform,
        lambda X: model.score(X, diabetes[1]),
        lambda X: model.information_plane(X, diabetes[1]),
    ):
        use(frame)
        with pytest.raises(ValueError, match="feature names"):
            use(moved)


def test_a_large_mean_takes_no_digits_from_float32_features_or_targets(diabetes):
    X, y = diabetes
    far, high = X + np.float32(1e5), y.astype(np.float32) + np.float32(1e5)
    fits = [
        CauchySchwarzBottleneckRegressor((8,), 4, epochs=3, lr=1e-2, random_state=0).fit(*given).predict(given[0])
        for given in ((far, high), ((far - 1e5).astype(np.float32), high - np.float32(1e5)))
    ]
    assert np.ptp(fits[1]) > 10 and np.allclose(fits[0] - np.float32(1e5), fits[1], atol=0.05)


def test_an_interrupted_fit_leaves_what_was_fitted(diabetes, monkeypatch):
    X, y = diabetes
    model = CauchySchwarzBottleneckRegressor((8,), 4, epochs=2, random_state=0).fit(X, y)
    before, module = model.predict(X), "paperworks.representation.cauchy_schwarz_bottleneck.train_bottleneck"

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(10 * X, -y)
    assert np.array_equal(model.predict(X), before)


def test_evaluation_leaves_the_network_as_it_was():
    x, y = normal(9, 3).float(), normal(9, 1, seed=1).float()
    network = BottleneckNetwork(3, (4,), 2, stochastic=True, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        network.train(training)
        assert information_plane(network, x, y) == information_plane(network, x, y)
        assert network.training is training
        with torch.no_grad():
            fgsm(network, x, y, 0.1)
        assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def test_attacks_raise_the_error_and_stay_in_reach():
    x, y = normal(20, 3), normal(20, 1, seed=1)
    torch.manual_seed(0)
    network = BottleneckNetwork(3, (8,), 4).double().requires_grad_(False)
    before = (network(x) - y).square().sum(1)
    attacked = fgsm(network, x, y, 0.01)
    slope = torch.stack([
        ((network(x + d) - y).square().sum(1) - (network(x - d) - y).square().sum(1)) for d in 1e-6 * torch.eye(3).double()
    ], 1)  # fmt: skip
    assert torch.allclose(attacked, x + 0.01 * slope.sign(), atol=1e-12)
    harder = pgd(network, x, y, eps=0.3)
    assert float((harder - x).abs().max()) <= 0.25 + 1e-9
    assert float((pgd(network, x, y, eps=0.1) - x).abs().max()) == pytest.approx(0.1)
    assert float((network(harder) - y).square().sum()) > float((network(attacked) - y).square().sum()) > before.sum()


def test_bad_input_is_one_clear_sentence(diabetes):
    x, y, t = normal(5, 3), normal(5, 1), normal(5, 2)
    network = BottleneckNetwork(3, (4,), 2).double()
    fitted = CauchySchwarzBottleneckRegressor((4,), 2, epochs=1).fit(*diabetes)
    for given in ((x.numpy(), t), (x, t.numpy())):
        for measure in (cs_mutual_information, hsic, cs_divergence):
            with pytest.raises(TypeError, match="is a tensor, got ndarray"):
                measure(*given)
    for call, words in (
        (lambda: cs_divergence(x, y), "as many columns"),
        (lambda: conditional_cs_divergence(x, y, t), "of one shape"),
        (lambda: cs_mutual_information(x, t[:3]), "same N samples"),
        (lambda: cs_mutual_information(x * float("nan"), t), "NaN"),
        (lambda: cs_divergence(x[:0], x), "floating-point"),
        (lambda: cs_divergence(x.long(), x), "floating-point"),
        (lambda: cs_divergence(x, x, -1.0), "number above 0"),
        (lambda: cs_divergence(x, x, None), "number above 0"),
        (lambda: hsic(x, t[:3]), "same N samples"),
        (lambda: cs_mutual_information(x * 0, t, "median"), "median distance is 0"),
        (lambda: CauchySchwarzBottleneck(-1), "beta is"),
        (lambda: CauchySchwarzBottleneck(sigma_x=0), "number above 0"),
        (lambda: CauchySchwarzBottleneck(sigma_t="mean"), "number above 0"),
        (lambda: information_plane(network, x, 0 * y + 0.1), "targets are the same"),
        (lambda: information_plane(network, x, y[:, 0]), "of the shape of the predictions"),
        (lambda: fgsm(network, x, y[:, 0], 0.1), "of the shape of the predictions"),
        (lambda: fgsm(network, x, y, -0.1), "eps is a number"),
        (lambda: pgd(network, x, y, steps=0), "steps at least 1"),
        (
            lambda: train_bottleneck(
                network, lambda x, y: (network(x) - y).square().mean(), x, y, validation=(x, y[:, 0]), epochs=1
            ),
            "of the shape of",
        ),
        (lambda: fitted.information_plane(diabetes[0], diabetes[1][:9]), "of each of 442 samples"),
        (lambda: fitted.information_plane(diabetes[0], np.nan * diabetes[1]), "y contains NaN"),
        *(
            (lambda given=given: CauchySchwarzBottleneckRegressor(**given).fit(*diabetes), words)
            for given, words in (
                ({"bottleneck": 0}, "bottleneck is a whole number of at least 1"),
                ({"epochs": 2.5}, "epochs is a whole number"),
                ({"hidden": (4, 0)}, "whole numbers of at least 1"),
                ({"lr": 0}, "lr is above 0"),
                ({"validation_fraction": 1.0}, "below 1"),
                ({"beta": -1}, "beta is"),
            )
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_loss_hands_its_options_on():
    generator = torch.Generator().manual_seed(3)
    x, y, y_hat, t = (torch.randn(12, width, generator=generator, dtype=torch.float64) for width in (3, 1, 1, 2))
    for official in (False, True):
        alone = CauchySchwarzBottleneck(0.0, 0.5, 1.0, 1.0, official=official)(x, y, y_hat, t)
        assert float(alone) == pytest.approx(float(conditional_cs_divergence(x, y, y_hat, 0.5, 1.0, official=official)))
    for normalize in (False, True):
        whole, alone = (
            CauchySchwarzBottleneck(beta, 0.7, 1.0, 0.9, normalize=normalize)(x, y, y_hat, t) for beta in (2.0, 0.0)
        )
        expected = 2 * cs_mutual_information(x, t, 0.7, 0.9, normalize=normalize)
        assert float(whole - alone) == pytest.approx(float(expected))
    said = [float(conditional_cs_divergence(x, y, y_hat, 0.5, 1.0, official=official)) for official in (False, True)]
    assert said[0] != pytest.approx(said[1], rel=1e-3)
    nats, share = (float(cs_mutual_information(x, t, 0.7, 0.9, normalize=normalize)) for normalize in (False, True))
    assert nats != pytest.approx(share, rel=1e-3)


def test_noise_on_the_code_has_the_variance_that_is_said():
    network = BottleneckNetwork(2, (4,), 3, stochastic=True, generator=torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        network.log_var.weight.zero_()
        network.log_var.bias.copy_(torch.tensor([-2.0, 0.0, 2.0]))
    x = torch.zeros(20_000, 2)
    with torch.no_grad():
        spread = network.encode(x).var(0)
    assert spread.tolist() == pytest.approx([math.exp(-2), 1.0, math.exp(2)], rel=0.05)


def test_the_rate_falls_every_tenth_epoch():
    # The slope is always 1, so that Adam moves the weight by its rate in each step.
    moved = []
    for epochs in (10, 20, 30):
        network = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            network.weight.zero_()
        train_bottleneck(
            network, lambda x, y, network=network: network.weight.sum(), torch.ones(4, 1), torch.ones(4, 1), lr=0.01,
            decay=0.5, epochs=epochs, batch_size=4,
        )  # fmt: skip
        moved.append(-float(network.weight.detach()))
    assert moved == pytest.approx([0.1, 0.1 + 0.05, 0.1 + 0.05 + 0.025], rel=1e-3)
