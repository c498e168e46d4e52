"""Gaussian processes in state-space form, against dense Gaussian process regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from paperworks.state_space import StateSpaceGP

T = torch.tensor([0, 0.1, 0.35, 0.6, 1], dtype=torch.float64)
Y = torch.tensor([0.5, -0.2, 1, 0.3, -0.7], dtype=torch.float64)
KERNELS = ("matern12", "matern32")
both_kernels = pytest.mark.parametrize("kernel", KERNELS)


def gram(kernel, t, lengthscale, variance):
    """Of scikit-learn, so that no line of ours is on both sides."""
    nu = {"matern12": 0.5, "matern32": 1.5}[kernel]
    return torch.from_numpy(variance * Matern(lengthscale, nu=nu)(t[:, None].numpy()))


def dense(K, precision, shift):
    """Mean, covariance and log normaliser of N(0, K) times exp(shift^T u - u^T precision u / 2), all (n, n)."""
    damped = torch.eye(len(K), dtype=K.dtype) + K @ precision
    mean, cov = torch.linalg.solve(damped, K @ shift), torch.linalg.solve(damped, K)
    return mean, cov, (shift @ mean - torch.linalg.slogdet(damped).logabsdet) / 2


@pytest.mark.parametrize(
    "kernel, mean, variance, log_marginal",
    [
        (
            "matern32", (0.8228283096, 0.4792901, -0.4760158630), (0.1280802660, 0.5342399598, 0.5549897696),
            -5.9662645472,
        ),
        (
            "matern12", (0.6304522010, 0.2284146258, -0.3390201634), (0.4004396983, 0.7484075794, 0.7489128684),
            -5.5323199693,
        ),
    ],
)  # fmt: skip
def test_paper_14_line_1_reference_values(kernel, mean, variance, log_marginal):
    gp, at = StateSpaceGP(kernel, lengthscale=0.3), torch.tensor([0.45, -0.2, 1.2], dtype=torch.float64)
    found = gp.smooth(T, Y, 0.05, at=at)
    assert found[0].tolist() == pytest.approx(mean, abs=2e-7)
    assert found[1].tolist() == pytest.approx(variance, abs=2e-7)
    assert float(found[0][0]) == pytest.approx(mean[0], abs=1e-10)
    assert float(gp.log_marginal(T, Y, 0.05)) == pytest.approx(log_marginal, abs=1e-7)


@both_kernels
def test_paper_14_line_1_smoother_is_scikit_learns_regression(kernel):
    random = np.random.default_rng(0)
    t, y = np.sort(random.uniform(-1, 4, 60)), random.normal(size=60)
    nu = {"matern12": 0.5, "matern32": 1.5}[kernel]
    theirs = GaussianProcessRegressor(ConstantKernel(1.7) * Matern(0.4, nu=nu), alpha=0.05, optimizer=None)
    theirs.fit(t[:, None], y)
    at = np.concatenate([np.linspace(-3, 6, 40), t[:5]])
    gp = StateSpaceGP(kernel, 0.4, 1.7)
    mean, variance = gp.smooth(torch.from_numpy(t), torch.from_numpy(y), 0.05, at=torch.from_numpy(at))
    wanted, std = theirs.predict(at[:, None], return_std=True)
    assert np.abs(mean.numpy() - wanted).max() < 1e-11
    assert np.abs(variance.numpy() - std**2).max() < 1e-11
    log_marginal = float(gp.log_marginal(torch.from_numpy(t), torch.from_numpy(y), 0.05))
    assert log_marginal == pytest.approx(theirs.log_marginal_likelihood(), abs=1e-9)


@both_kernels
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 11, 50])
def test_coupled_singular_factors_at_close_and_equal_times(kernel, length):
    generator = torch.Generator().manual_seed(length)
    t = torch.rand(length, dtype=torch.float64, generator=generator).sort().values
    if length > 3:
        t[1], t[3] = t[0] + 1e-14, t[2]
    R, n_starts = 3, 2
    root = 5 * torch.randn(n_starts, length, R, 1, dtype=torch.float64, generator=generator)
    precision, shift = root @ root.mT, 4 * torch.randn(n_starts, length, R, dtype=torch.float64, generator=generator)
    # Where nothing is seen.
    precision[:, length // 2], shift[:, length // 2] = 0, 0
    new = torch.tensor([0.9, -0.4, 1.6, 0.31, float(t[0]), float(t[-1])], dtype=torch.float64)
    found = StateSpaceGP(kernel, 0.2, 1.7).posterior(t, precision, shift)
    mean, cov = found.at(new)
    K = torch.kron(gram(kernel, torch.cat([t, new]), 0.2, 1.7), torch.eye(R, dtype=torch.float64))
    for start in range(n_starts):
        size = len(K)
        J, e = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        J[: length * R, : length * R] = torch.block_diag(*precision[start])
        e[: length * R] = shift[start].flatten()
        wanted, spread, log_normalizer = dense(K, J, e)
        blocks = torch.stack([spread[i : i + R, i : i + R] for i in range(0, size, R)])
        assert torch.allclose(torch.cat([found.mean[start], mean[start]]).flatten(), wanted, atol=1e-9)
        assert torch.allclose(torch.cat([found.cov[start], cov[start]]), blocks, atol=1e-11)
        assert float(found.log_normalizer[start]) == pytest.approx(float(log_normalizer), abs=1e-8)


@both_kernels
def test_filter_has_seen_nothing_that_comes_later(kernel):
    gp = StateSpaceGP(kernel, 0.3, 2.0)
    mean, variance = gp.filter(T, Y, 0.05)
    for last in range(len(T)):
        seen = slice(0, last + 1)
        K = gram(kernel, T[seen], 0.3, 2.0)
        solved = torch.linalg.solve(K + 0.05 * torch.eye(last + 1, dtype=torch.float64), K[:, -1])
        assert float(mean[last]) == pytest.approx(float(solved @ Y[seen]), abs=1e-12)
        assert float(variance[last]) == pytest.approx(float(K[-1, -1] - solved @ K[:, -1]), abs=1e-12)


@both_kernels
def test_divergence_from_the_prior_is_that_of_normal_distributions(kernel):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 2, 2, dtype=torch.float64, generator=generator)
    precision, shift = root @ root.mT, torch.randn(5, 2, dtype=torch.float64, generator=generator)
    found = StateSpaceGP(kernel, 0.3).posterior(T, precision, shift)
    K = torch.kron(gram(kernel, T, 0.3, 1.0), torch.eye(2, dtype=torch.float64))
    mean, cov, _ = dense(K, torch.block_diag(*precision), shift.flatten())
    law = torch.distributions.MultivariateNormal
    wanted = torch.distributions.kl_divergence(law(mean, (cov + cov.T) / 2), law(torch.zeros_like(mean), K))
    assert float(found.kl) == pytest.approx(float(wanted), abs=1e-10)


@both_kernels
def test_log_marginal_is_differentiated_through(kernel):
    values = torch.tensor([0.3, 1.2, 0.05], dtype=torch.float64, requires_grad=True)
    lengthscale, variance, noise = values
    value = StateSpaceGP(kernel, lengthscale, variance).log_marginal(T, Y, noise)
    (slope,) = torch.autograd.grad(value, values)

    def wanted(given):
        lengthscale, variance, noise = given
        r = (T[:, None] - T).abs() / lengthscale
        K = torch.exp(-r) if kernel == "matern12" else (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)
        law = torch.distributions.MultivariateNormal(
            torch.zeros(5, dtype=torch.float64), variance * K + noise * torch.eye(5, dtype=torch.float64)
        )
        return law.log_prob(Y)

    expected = torch.autograd.functional.jacobian(wanted, values.detach())
    assert torch.allclose(slope, expected, rtol=1e-9)
    # Several series and noise of each observation, at once.
    several, each = torch.stack([Y, 2 * Y]), torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4])
    gp = StateSpaceGP(kernel, 0.3)
    both = gp.log_marginal(T, several, each)
    assert both.tolist() == pytest.approx([float(gp.log_marginal(T, one, each)) for one in several], abs=1e-12)


@both_kernels
def test_steps_compose_and_tiny_ones_keep_their_digits(kernel):
    gp = StateSpaceGP(kernel, 0.3, 1.4)
    steps = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    A, Q = gp.transition(steps)
    assert torch.allclose(A[1] @ A[0], A[2], atol=1e-14)
    assert torch.allclose(A[1] @ Q[0] @ A[1].T + Q[1], Q[2], atol=1e-13)
    P = gp.stationary()
    assert torch.allclose(Q, P - A @ P @ A.mT, atol=1e-13)
    A, Q = gp.transition(torch.tensor([1e-9, 0.0, 1e3], dtype=torch.float64))
    rate = math.sqrt(3) / 0.3 if gp.order == 2 else 1 / 0.3
    first = 4 / 3 * (rate * 1e-9) ** 3 if gp.order == 2 else 2 * rate * 1e-9
    assert float(Q[0, 0, 0]) == pytest.approx(1.4 * first, rel=1e-7)
    if gp.order == 2:
        assert float(Q[0, 0, 1]) == pytest.approx(1.4 * 2 * rate * (rate * 1e-9) ** 2, rel=1e-7)
        assert float(Q[0, 1, 1]) == pytest.approx(1.4 * rate**2 * 4 * rate * 1e-9, rel=1e-7)
    assert torch.equal(A[1], torch.eye(gp.order, dtype=torch.float64)) and not Q[1].any()
    assert not A[2].any() and torch.allclose(Q[2], P)


@both_kernels
def test_paths_have_the_priors_covariance(kernel):
    t = torch.tensor([-1, -0.9, -0.9, 0.2, 0.8], dtype=torch.float64)
    gp = StateSpaceGP(kernel, 0.7, 2.0)
    paths = gp.sample(t, 40_000, generator=torch.Generator().manual_seed(0))
    assert paths.shape == (40_000, 5) and torch.equal(paths[:, 1], paths[:, 2])
    assert torch.allclose(paths.T @ paths / len(paths), gram(kernel, t, 0.7, 2.0), atol=0.05)
    again = gp.sample(t, 40_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(paths, again)
    assert gp.sample(t[:1], 3).shape == (3, 1)


def test_many_precise_observations_are_followed():
    random = np.random.default_rng(0)
    t = np.sort(random.uniform(size=3000))
    gp, wave = StateSpaceGP("matern32", 0.3), torch.sin(9 * torch.from_numpy(t))
    mean, variance = gp.smooth(torch.from_numpy(t), wave, 1e-10)
    assert float((mean - wave).abs().max()) < 1e-4
    assert float(variance.min()) > 0 and float(variance.max()) <= 1e-10 * (1 + 1e-6)


def test_bad_input_is_a_sentence():
    gp = StateSpaceGP()
    for call, words in (
        (lambda: StateSpaceGP("matern52"), "matern12, matern32"), (lambda: StateSpaceGP(lengthscale=0.0), "lengthscale"),
        (lambda: StateSpaceGP(variance=math.nan), "variance"), (lambda: gp.smooth(T.flip(0), Y, 0.1), "ascend"),
        (lambda: gp.smooth(T, Y, 0.0), "above 0"), (lambda: gp.smooth(T, Y / 0, 0.1), "finite"),
        (lambda: gp.smooth(T[:0], Y[:0], 0.1), "at least one"), (lambda: gp.smooth(T, Y[:4], 0.1), "5 times"),
        (lambda: gp.smooth(T, Y, 0.1, at=T * math.nan), "finite"), (lambda: gp.sample(T.flip(0)), "ascend"),
        (lambda: gp.posterior(T, torch.zeros(5, 2, 2), torch.zeros(5, 3)), "precision"),
        (lambda: gp.sample(T, 0), "n is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
