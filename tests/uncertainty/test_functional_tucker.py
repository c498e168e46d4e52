"""FunctionalTucker (arXiv 2311.04829): each line that must be true of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from paperworks.state_space import StateSpaceGP
from paperworks.uncertainty.functional_tucker import (
    CPCore,
    FunctionalTucker,
    IndependentRows,
    MeanField,
    TuckerCore,
    _second_moments,
)


def table(n=120, seed=0, noise=0.1):
    """Two functions of each of three indices, mixed by a core."""
    random = np.random.default_rng(seed)
    X = random.uniform(size=(n, 3))
    a, b, c = X.T
    functions = (
        (np.sin(6 * a), np.cos(6 * a)), (np.exp(-2 * b), np.sin(5 * b)), (c - 0.5, np.cos(4 * c)),
    )  # fmt: skip
    f = np.einsum("abc,an,bn,cn->n", random.normal(size=(2, 2, 2)), *map(np.stack, functions))
    return X, f + noise * random.normal(size=n)


def posterior(core=None, priors=None, seed=0, **options):
    X, y = table()
    priors = priors or [StateSpaceGP("matern32", 0.5) for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    return MeanField(
        torch.from_numpy(X), torch.from_numpy(y), priors, core or TuckerCore([2, 3, 2]), generator=generator, **options
    )


def random_core(ranks, seed=0):
    """A core whose covariance is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    core, size = TuckerCore(ranks), math.prod(ranks)
    root = torch.randn(1, size, size, dtype=torch.float64, generator=generator) / math.sqrt(size)
    mean = torch.randn(1, size, dtype=torch.float64, generator=generator)
    core.restore({"mean": mean, "cov": root @ root.mT})
    return core


def random_functions(ranks, n, seed=1):
    """Means (1, n, R) and covariances (1, n, R, R) of each mode."""
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(1, n, rank, dtype=torch.float64, generator=generator) for rank in ranks]
    roots = [0.6 * torch.randn(1, n, rank, rank, dtype=torch.float64, generator=generator) for rank in ranks]
    return means, [root @ root.mT for root in roots]


@pytest.mark.parametrize("kernel, nu", [("matern12", 0.5), ("matern32", 1.5)])
def test_2_one_mode_of_rank_one_is_gaussian_process_regression(kernel, nu):
    random = np.random.default_rng(0)
    t = random.uniform(3, 7, 40)
    t[5:8] = t[4]
    y = np.sin(3 * t) + 0.3 * random.normal(size=40)
    order = random.permutation(40)
    scaled, z = (t - t.min()) / np.ptp(t), y / y.std()
    theirs = GaussianProcessRegressor(Matern(0.3, nu=nu), alpha=0.05, optimizer=None).fit(scaled[:, None], z)
    new = np.linspace(2, 8, 30)
    wanted, std = theirs.predict((new[:, None] - t.min()) / np.ptp(t), return_std=True)
    # So many observations of the noise before that no data moves it from .05.
    model = FunctionalTucker(
        1, "cp", kernel, 0.3, a0=1e11, b0=5e9, intercept=False, max_iter=3, n_restarts=1, random_state=0
    )
    for rows in (np.arange(40), order):
        mean, spread = model.fit(t[rows, None], y[rows]).predict(new[:, None], return_std=True)
        assert np.abs(mean - wanted * y.std()).max() < 1e-8
        assert np.abs(spread - np.sqrt(std**2 + 0.05) * y.std()).max() < 1e-8
    latent, band = model.latent(0, new)
    assert np.abs(latent[:, 0] - wanted).max() < 1e-8 and np.abs(band[:, 0] - std).max() < 1e-8


def test_2_an_index_split_in_two_entries_and_the_order_of_rows_change_nothing():
    X, y = table(40)
    model = FunctionalTucker(2, lengthscale=0.5, max_iter=6, random_state=0)
    order = np.random.default_rng(0).permutation(40)
    first, second = model.fit(X, y).predict(X), model.fit(X[order], y[order]).predict(X)
    assert np.allclose(first, second, atol=1e-9)
    # One entry seen with half the noise is two entries of its value: their messages add up.
    once = posterior(n_starts=1)
    X, y = (torch.from_numpy(one) for one in table())
    twice = MeanField(
        X.repeat(2, 1), y.repeat(2), [mode.prior for mode in once.modes], TuckerCore([2, 3, 2]),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    once.a = 2 * once.a
    for one in (once, twice):
        one.update_core()
    for k in range(3):
        once.update_mode(k)
        twice.update_mode(k)
        assert torch.allclose(once.modes[k].precision, twice.modes[k].precision, rtol=1e-8)
        assert torch.allclose(once.modes[k].mean, twice.modes[k].mean, atol=1e-9)
    assert len(twice.modes[0].places) == 120


@pytest.mark.parametrize("core", ["tucker", "cp"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_3_the_lower_bound_never_falls(core, damping):
    priors = [StateSpaceGP("matern32", 0.5), StateSpaceGP("matern12", 0.7, 2.0), IndependentRows(1.5)]
    X, y = table(60)
    X[:, 2] = np.round(4 * X[:, 2])
    found = MeanField(
        torch.from_numpy(X), torch.from_numpy(y), priors, TuckerCore([2, 3, 2]) if core == "tucker" else CPCore(2, 3),
        intercept=True, n_starts=2, damping=damping, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found.sweep()
    bound = found.elbo()
    first = bound
    for _ in range(10 if damping else 50):
        for update in (
            *(lambda k=k: found.update_mode(k) for k in range(3)), found.update_core, found.update_intercept,
            found.update_noise,
        ):  # fmt: skip
            update()
            after = found.elbo()
            assert (after - bound).min() > -1e-8
            bound = after
    assert (bound - first).min() > 0.5


def test_3_the_bound_is_the_evidence_where_the_posterior_is_of_its_family():
    # One function, no core: with the noise held, what is left of the bound is exact.
    X, y = table(30)
    a0, b0 = 1e9, 1e8
    found = MeanField(
        torch.from_numpy(X[:, :1]), torch.from_numpy(y), [StateSpaceGP("matern32", 0.4)], CPCore(1, 1), a0=a0, b0=b0
    )
    found.a, found.b = torch.tensor([a0], dtype=torch.float64), torch.tensor([b0], dtype=torch.float64)
    found.update_mode(0)
    order = np.argsort(X[:, 0])
    t, sorted_y = torch.from_numpy(X[order, 0]), torch.from_numpy(y[order])
    wanted = StateSpaceGP("matern32", 0.4).log_marginal(t, sorted_y, 0.1)
    assert float(found.elbo()) == pytest.approx(float(wanted), abs=1e-4)


def test_3_each_term_of_the_bound_is_torchs_divergence():
    found = posterior(n_starts=2, intercept=True)
    for _ in range(3):
        found.sweep()
    law, kl = torch.distributions, torch.distributions.kl_divergence
    total = torch.zeros(2, dtype=torch.float64)
    X, y = (torch.from_numpy(one) for one in table())
    for start in range(2):
        core = law.MultivariateNormal(found.core.mean[start], found.core.cov[start])
        standard = law.MultivariateNormal(torch.zeros_like(found.core.mean[start]), torch.eye(12, dtype=torch.float64))
        assert float(found.core.kl[start]) == pytest.approx(float(kl(core, standard)), abs=1e-9)
        noise, before = law.Gamma(found.a[start], found.b[start]), law.Gamma(found.a0[start], found.b0[start])
        constant = law.Normal(found.constant[start], found.constant_variance[start].sqrt())
        one = law.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
        # What the bound expects of each entry, by draws of all that is not known.
        generator = torch.Generator().manual_seed(start)
        expected = len(y) / 2 * (found.a[start].digamma() - found.b[start].log() - math.log(2 * math.pi))
        for n in (0, 40):
            means, covs = [], []
            for k, mode in enumerate(found.modes):
                mean, cov = mode.prior.posterior(mode.places, mode.precision[start], mode.shift[start]).at(
                    X[n : n + 1, k]
                )
                means.append(mean[None])
                covs.append(cov[None])
            w, u = drawn(found.core, means, covs, 100_000, generator, start)
            c = constant.mean + constant.stddev * torch.randn(100_000, dtype=torch.float64, generator=generator)
            exact_mean, exact_second = moments_of(found, start, means, covs)
            v = found.constant_variance[start] + found.constant[start] ** 2
            exact = y[n] ** 2 - 2 * y[n] * (exact_mean + found.constant[start]) + exact_second + v
            exact = exact + 2 * found.constant[start] * exact_mean
            assert float(exact) == pytest.approx(float((y[n] - c - product(w, u)).square().mean()), rel=0.03)
        total[start] = (
            expected - found.tau[start] / 2 * found.squared_error()[start] - kl(core, standard) - kl(noise, before)
            - kl(constant, one) - sum(mode.kl[start] for mode in found.modes)
        )  # fmt: skip
    assert torch.allclose(found.elbo(), total, atol=1e-8)


def moments_of(found, start, means, covs):
    core = TuckerCore(found.core.ranks)
    core.restore({name: value[[start]] for name, value in found.core.state().items()})
    mean, second = core.moments(means, [_second_moments(m, c) for m, c in zip(means, covs, strict=True)])
    return mean[0, 0], second[0, 0]


def drawn(core, means, covs, n, generator, start=0):
    """Draws of the core, (n, R_1, ..., R_K), and of the functions at the first entry, each (n, R)."""

    def normal(mean, cov):
        root = torch.linalg.cholesky(cov + 1e-13 * torch.eye(len(cov), dtype=torch.float64))
        return mean + torch.randn(n, len(mean), dtype=torch.float64, generator=generator) @ root.T

    w = normal(core.mean[start], core.cov[start]).reshape(n, *core.ranks)
    return w, [normal(mean[0, 0], cov[0, 0]) for mean, cov in zip(means, covs, strict=True)]


def product(w, u):
    return torch.einsum("nabc,na,nb,nc->n", w, *u)


@pytest.mark.parametrize("damping", [0.3, 0.8])
def test_3_damping_changes_the_path_and_not_where_it_ends(damping):
    # Rows and no core, so that sweeps are cheap and the end is near.
    X, y = (torch.from_numpy(one) for one in table(80))
    X = (5 * X).floor()

    def swept(share, sweeps):
        found = MeanField(
            X, y, [IndependentRows(1.0)] * 3, CPCore(1, 3), damping=share, generator=torch.Generator().manual_seed(0)
        )
        for _ in range(sweeps):
            found.sweep()
        return found

    plain, damped = swept(0.0, 150), swept(damping, int(150 / (1 - damping)))
    assert float(damped.elbo()) == pytest.approx(float(plain.elbo()), abs=0.05)
    assert torch.allclose(plain.tau, damped.tau, rtol=1e-3)
    assert abs(float(swept(0.0, 3).elbo() - swept(damping, 3).elbo())) > 0.1
    # Where plain sweeps end, a damped one goes nowhere.
    held, plain.damping = plain.modes[0].second, damping
    plain.sweep()
    assert torch.allclose(plain.modes[0].second, held, atol=1e-3 * float(held.abs().max()))
    # Neither a core nor a mode takes in what is new at once.
    for core in (TuckerCore([2, 2, 2]), CPCore(2, 3)):
        priors = [StateSpaceGP("matern32", 0.5), IndependentRows(1.0), StateSpaceGP("matern12", 0.5)]
        found = MeanField(X, y, priors, core, damping=damping, generator=torch.Generator().manual_seed(0))
        found.sweep()
        before = [mode.precision.clone() for mode in found.modes], core.state().get("cov", torch.zeros(0)).clone()
        found.damping = 0.0
        found.update_mode(0)
        wanted = damping * before[0][0] + (1 - damping) * found.modes[0].precision
        again = MeanField(
            X,
            y,
            priors,
            type(core)(*([[2, 2, 2]] if core.state() else [2, 3])),
            damping=damping,
            generator=torch.Generator().manual_seed(0),
        )
        again.sweep()
        again.update_mode(0)
        assert torch.allclose(again.modes[0].precision, wanted, rtol=1e-10)


def test_4_moments_agree_with_a_million_draws_and_need_the_cores_covariance():
    ranks, n = (2, 3, 2), 1_000_000
    core = random_core(ranks)
    means, covs = random_functions(ranks, 1)
    seconds = [_second_moments(mean, cov) for mean, cov in zip(means, covs, strict=True)]
    w, u = drawn(core, means, covs, n, torch.Generator().manual_seed(2))
    without = TuckerCore(ranks)
    without.restore({"mean": core.mean, "cov": torch.zeros_like(core.cov)})
    for k, (contraction, others) in enumerate(
        (("nabc,nb,nc->na", (1, 2)), ("nabc,na,nc->nb", (0, 2)), ("nabc,na,nb->nc", (0, 1)))
    ):
        told = torch.einsum(contraction, w, *(u[j] for j in others))
        wanted = told.T @ told / n
        quadratic, linear = core.messages(k, means, seconds)
        rows, columns = torch.triu_indices(ranks[k], ranks[k])
        scale = wanted.diagonal().mean()
        assert torch.allclose(quadratic[0, 0], wanted[rows, columns], atol=0.01 * scale)
        assert torch.allclose(linear[0, 0], told.mean(0), atol=0.01 * scale.sqrt())
        assert not torch.allclose(without.messages(k, means, seconds)[0][0, 0], wanted[rows, columns], atol=0.1 * scale)
    y = torch.tensor([0.7], dtype=torch.float64)
    error = y**2 - 2 * y * core.moments(means, seconds)[0][0] + core.moments(means, seconds)[1][0]
    assert float(error) == pytest.approx(float((y - product(w, u)).square().mean()), rel=0.01)
    second, linear = core.statistics(means, seconds, torch.stack([y, torch.ones(1)], dim=1).double())
    assert float(y**2 - 2 * core.expected(linear[..., 0]) + core.expected_square(second)) == pytest.approx(float(error))
    left = float(y**2 - 2 * y * core.moments(means, seconds)[0][0] + without.moments(means, seconds)[1][0])
    assert left < 0.9 * float(error)


def test_4_the_core_is_bayesian_linear_regression_on_all_products():
    X, y = table(50)
    found = posterior(n_starts=1)
    mode_means = [mode.mean[0, mode.rows] for mode in found.modes]
    covs = [0.0001 * torch.eye(rank, dtype=torch.float64) for rank in (2, 3, 2)]
    _, y = (torch.from_numpy(one) for one in table())
    gram, shift = torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for n in range(len(y)):
        z, zz = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        for mean, cov in zip(mode_means, covs, strict=True):
            z, zz = torch.kron(z, mean[n]), torch.kron(zz, cov + torch.outer(mean[n], mean[n]))
        gram, shift = gram + 10 * zz, shift + 10 * y[n] * z
    cov = torch.linalg.inv(gram)
    assert torch.allclose(found.core.cov[0], cov, atol=1e-12)
    assert torch.allclose(found.core.mean[0], cov @ shift, atol=1e-11)


def test_5_unfoldings_times_kronecker_products_are_the_prediction():
    ranks = (2, 3, 4)
    core = random_core(ranks)
    W = core.mean_tensor()[0]
    means, covs = random_functions(ranks, 7)
    seconds = [_second_moments(mean, torch.zeros_like(cov)) for mean, cov in zip(means, covs, strict=True)]
    wanted = torch.einsum("abc,na,nb,nc->n", W, *(mean[0] for mean in means))
    for k in range(3):
        _, linear = core.messages(k, means, seconds)
        assert torch.allclose((linear * means[k]).sum(-1)[0], wanted, atol=1e-12)
    assert torch.allclose(core.moments(means, seconds)[0][0], wanted, atol=1e-12)


def test_6_one_rank_without_a_core_is_a_core_of_one():
    one = TuckerCore([1, 1, 1])
    one.restore({"mean": torch.ones(1, 1, dtype=torch.float64), "cov": torch.zeros(1, 1, 1, dtype=torch.float64)})
    cp = CPCore(1, 3)
    means, covs = random_functions((1, 1, 1), 9)
    seconds = [_second_moments(mean, cov) for mean, cov in zip(means, covs, strict=True)]
    weights = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(3):
        for ours, theirs in zip(cp.messages(k, means, seconds), one.messages(k, means, seconds), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-13)
    for ours, theirs in zip(cp.moments(means, seconds), one.moments(means, seconds), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-13)
    ours, theirs = (core.statistics(means, seconds, weights) for core in (cp, one))
    assert torch.allclose(cp.expected_square(ours[0]), one.expected_square(theirs[0]), atol=1e-12)
    assert torch.allclose(cp.expected(ours[1][..., 0]), one.expected(theirs[1][..., 0]), atol=1e-12)


def test_6_without_a_core_higher_ranks_are_a_superdiagonal_one():
    ranks = (3, 3, 3)
    full, cp = TuckerCore(ranks), CPCore(3, 3)
    full.restore({"mean": cp.mean_tensor().reshape(1, 27), "cov": torch.zeros(1, 27, 27, dtype=torch.float64)})
    means, covs = random_functions(ranks, 5)
    seconds = [_second_moments(mean, cov) for mean, cov in zip(means, covs, strict=True)]
    for k in range(3):
        for ours, theirs in zip(cp.messages(k, means, seconds), full.messages(k, means, seconds), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12)
    for ours, theirs in zip(cp.moments(means, seconds), full.moments(means, seconds), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_6_categorical_modes_are_a_bayesian_tucker_table():
    random = np.random.default_rng(0)
    factors = [random.normal(size=(size, 2)) for size in (8, 7, 6)]
    whole = np.einsum("abc,ia,jb,kc->ijk", random.normal(size=(2, 2, 2)), *factors)
    places = np.stack(np.indices(whole.shape), -1).reshape(-1, 3)
    y = whole.ravel() / whole.std() + 0.05 * random.normal(size=whole.size)
    left = random.permutation(len(y))[:250]
    kinds = ("categorical",) * 3
    model = FunctionalTucker(2, modes=kinds, intercept=False, tol=1e-3, random_state=0).fit(10 * places[left], y[left])
    error = model.predict(10 * places) - whole.ravel() / whole.std()
    assert np.sqrt(np.mean(error**2)) < 0.05
    # A row given all else is Bayesian linear regression on what the others make of it.
    found = posterior(TuckerCore([2, 2, 2]), [IndependentRows(1.5)] * 3)
    found.update_mode(0)
    mode = found.modes[0]
    for row in (0, 17):
        precision = torch.eye(2, dtype=torch.float64) / 1.5 + mode.precision[0, row]
        wanted = torch.linalg.solve(precision, mode.shift[0, row])
        assert torch.allclose(mode.mean[0, row], wanted, atol=1e-12)
        assert torch.allclose(mode.second[0, row], _second_moments(wanted, torch.linalg.inv(precision)), atol=1e-12)
    # A category that nobody has seen is the prior's.
    known = FunctionalTucker(2, modes=("categorical", "continuous", "continuous"), random_state=0, max_iter=5)
    known.fit(*table(60))
    latent, band = known.latent(0, [99.0])
    assert not latent.any() and band == pytest.approx(1.0)


@pytest.mark.parametrize("intercept", [True, False])
def test_7_predictions_scale_with_targets(intercept):
    X, y = table()
    model = FunctionalTucker(2, lengthscale=0.5, max_iter=8, intercept=intercept, random_state=0)
    mean, std = model.fit(X, y).predict(X + 0.01, return_std=True)
    noise, bound = model.noise_, model.elbo_
    scaled = model.fit(X, 1e3 * y).predict(X + 0.01, return_std=True)
    assert np.allclose(scaled[0], 1e3 * mean, rtol=1e-6, atol=1e-3) and np.allclose(scaled[1], 1e3 * std, rtol=1e-6)
    assert model.noise_ == pytest.approx(1e3 * noise)
    assert model.elbo_ == pytest.approx(bound - len(y) * math.log(1e3), abs=1e-3)
    moved = model.fit(X, y + 50).predict(X + 0.01)
    assert np.allclose(moved - 50, mean, atol=1e-5) == intercept


def test_7_intervals_cover_and_the_error_is_below_the_noise():
    X, y = table(900, seed=1)
    f = table(900, seed=1, noise=0.0)[1]
    model = FunctionalTucker(2, lengthscale=0.3, tol=1e-3, random_state=0).fit(X[:700], y[:700])
    mean, std = model.predict(X[700:], return_std=True)
    assert np.sqrt(np.mean((mean - f[700:]) ** 2)) < 0.06
    low, high = model.predict_quantiles(X[700:], [0.05, 0.95]).T
    assert 0.85 < np.mean((low <= y[700:]) & (y[700:] <= high)) < 0.97
    without_noise = np.sqrt(std**2 - model.noise_**2)
    assert 0.8 < np.mean(np.abs(mean - f[700:]) < 1.645 * without_noise) < 0.995
    assert model.noise_ == pytest.approx(0.1, rel=0.15)


def test_the_true_functions_are_recovered_but_for_their_mixing():
    random = np.random.default_rng(3)
    X, pi = random.uniform(size=(800, 2)), np.pi
    truth = (
        lambda t: np.stack([np.sin(2 * pi * t) ** 2 * np.cos(2 * pi * t), np.sin(2 * pi * t)], 1),
        lambda t: np.stack([np.exp(-2 * t) * np.sin(1.5 * pi * t), t], 1),
    )
    f = np.einsum("na,ab,nb->n", truth[0](X[:, 0]), np.array([[3.0, 0.5], [-0.5, 1.0]]), truth[1](X[:, 1]))
    model = FunctionalTucker(2, lengthscale=0.3, tol=1e-3, intercept=False, random_state=0)
    model.fit(X, f / f.std() + 0.05 * random.normal(size=800))
    t = np.linspace(0.02, 0.98, 100)
    for mode, functions in enumerate(truth):
        mean, std = model.latent(mode, t)
        wanted = functions(t)
        mixed = mean @ np.linalg.lstsq(mean, wanted, rcond=None)[0]
        assert (1 - ((mixed - wanted) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0)).min() > 0.97
        assert std.min() > 0 and std.max() < 0.5


def test_a_constant_takes_the_mean_that_a_product_of_functions_cannot():
    X, y = table(400, seed=2)
    f = table(400, seed=2, noise=0.0)[1]
    errors = {}
    for offset in (0.0, 10.0):
        for intercept in (True, False):
            model = FunctionalTucker(
                2, lengthscale=0.4, tol=1e-3, intercept=intercept, random_state=0, n_restarts=2, max_iter=30
            ).fit(X[:300], y[:300] + offset)
            errors[offset, intercept] = np.sqrt(np.mean((model.predict(X[300:]) - f[300:] - offset) ** 2))
    assert errors[0.0, True] == pytest.approx(errors[10.0, True], rel=1e-3)
    assert errors[10.0, False] > 1.3 * errors[10.0, True]


def test_moments_of_predictions_are_those_of_draws():
    X, y = table(60)
    model = FunctionalTucker(2, lengthscale=0.4, max_iter=6, random_state=0).fit(X, y)
    at = np.array([[0.31, 0.62, 0.93]])
    mean, std = model.predict(at, return_std=True)
    generator = torch.Generator().manual_seed(0)
    scaled = torch.from_numpy((at - model.feature_mean_) / model.feature_scale_)
    pairs = [one.at(scaled[:, k]) for k, one in enumerate(model._posteriors)]
    w, u = drawn(model._core, [pair[0][None] for pair in pairs], [pair[1][None] for pair in pairs], 400_000, generator)
    constant, spread = model._tensors["constant"]
    draws = (product(w, u) + constant) * model.target_scale_[0] + model.target_mean_[0]
    assert float(draws.mean()) == pytest.approx(mean[0], abs=0.01 * std[0])
    wanted = float(draws.var()) + float(spread) * model.target_scale_[0] ** 2 + model.noise_**2
    assert std[0] == pytest.approx(math.sqrt(wanted), rel=0.01)
    # Of one row too little is known of the constant to leave its variance out.
    model.fit(X[:1], y[:1])
    scaled = torch.from_numpy((at - model.feature_mean_) / model.feature_scale_)
    pairs = [one.at(scaled[:, k]) for k, one in enumerate(model._posteriors)]
    mean, second = model._core.moments(
        [pair[0][None] for pair in pairs], [_second_moments(*pair)[None] for pair in pairs]
    )
    _, spread = model._tensors["constant"]
    wanted = float(second - mean.square() + spread) + model.noise_**2
    assert float(spread) > 0.1 and model.predict(at, return_std=True)[1][0] == pytest.approx(
        math.sqrt(wanted), rel=1e-9
    )


def test_kept_in_files_with_modes_and_per_mode_options(tmp_path):
    X, y = table(50)
    X[:, 1] = np.round(3 * X[:, 1])
    model = FunctionalTucker(
        (2, 1, 3), lengthscale=[0.2, 1.0, 0.5], variance=(1.0, 2.0, 1.0), max_iter=4, random_state=1,
        modes=["continuous", "categorical", "continuous"],
    ).fit(X, y)  # fmt: skip
    model.save_pretrained(tmp_path)
    read = FunctionalTucker.from_pretrained(tmp_path)
    assert np.array_equal(model.predict(X), read.predict(X)) and read.core_.shape == (2, 1, 3)
    assert np.array_equal(model.latent(2, X[:, 2])[0], read.latent(2, X[:, 2])[0])
    assert (read.noise_, read.elbo_, read.n_iter_) == (model.noise_, model.elbo_, model.n_iter_)
    assert np.array_equal(read.elbos_, model.elbos_) and np.array_equal(read.core_, model.core_)


def test_the_best_start_is_kept_and_sweeps_end():
    X, y = table()
    several = FunctionalTucker(2, lengthscale=0.5, max_iter=10, n_restarts=4, random_state=0).fit(X, y)
    alone = [
        FunctionalTucker(2, lengthscale=0.5, max_iter=10, n_restarts=1, random_state=seed).fit(X, y).elbo_
        for seed in range(3)
    ]
    assert several.elbo_ > min(alone)
    assert np.diff(several.elbos_).min() > -1e-8 and several.n_iter_ == len(several.elbos_) == 10
    rough = FunctionalTucker(2, lengthscale=0.5, tol=0.1, n_restarts=2, random_state=0).fit(X, y)
    fine = FunctionalTucker(2, lengthscale=0.5, tol=0.003, n_restarts=2, random_state=0).fit(X, y)
    assert rough.n_iter_ < fine.n_iter_ < 100 and rough.elbo_ < fine.elbo_
    assert np.diff(fine.elbos_)[-1] < 0.003 * len(y) <= np.diff(fine.elbos_)[-3]


def test_more_entries_than_a_block_holds(monkeypatch):
    X, y = table(50)
    model = FunctionalTucker(2, lengthscale=0.5, max_iter=4, random_state=0)
    whole = model.fit(X, y).predict(X)
    monkeypatch.setattr("paperworks.uncertainty.functional_tucker._BLOCK", 500)
    assert np.allclose(model.fit(X, y).predict(X), whole, atol=1e-8)


def test_bad_arguments_are_a_sentence():
    X, y = table(20)
    for options, words in (
        ({"core": "tt"}, "tucker, cp"), ({"kernel": "rbf"}, "matern12"), ({"ranks": 0}, "ranks"), ({"ranks": 2.5}, "ranks"),
        ({"ranks": (2, 2)}, "3 columns"), ({"ranks": (2, 3, 2), "core": "cp"}, "one rank"),
        ({"lengthscale": 0.0}, "lengthscale"), ({"lengthscale": (0.1, 0.2)}, "3 columns"), ({"variance": -1.0}, "variance"),
        ({"modes": ("continuous",)}, "3 columns"), ({"modes": "categorical"}, "modes"),
        ({"modes": ("continuous", "continuous", "time")}, "time"), ({"a0": 0.0}, "a0"), ({"b0": math.inf}, "b0"),
        ({"damping": 1.0}, "damping"), ({"max_iter": 0}, "max_iter"), ({"tol": -1.0}, "tol"), ({"n_restarts": 0}, "n_restarts"),
        ({"ranks": 40}, "lower ranks"), ({"modes": ("categorical",) * 3, "variance": 0.0}, "variance"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            FunctionalTucker(random_state=0).set_params(**options).fit(X, y)
    model = FunctionalTucker(1, max_iter=1, random_state=0).fit(X, y)
    for mode, t, words in (
        (3, [0.1], "0 to 2"),
        (0, [math.nan], "finite"),
        (0, [], "at least one"),
        (-1, [0.1], "0 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            model.latent(mode, t)


def test_damping_mixes_core_and_noise_too():
    from paperworks.uncertainty.functional_tucker import MeanField, TuckerCore

    random = np.random.default_rng(0)
    X, y = torch.from_numpy(random.uniform(size=(60, 2))), torch.from_numpy(random.normal(size=60))
    prior = StateSpaceGP("matern32", 0.3)
    fields = [
        MeanField(X, y, [prior] * 2, TuckerCore([2, 2]), damping=damping, generator=torch.Generator().manual_seed(0))
        for damping in (0.0, 0.75)
    ]
    for field in fields:
        field.a, field.b = torch.tensor([4.0], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64)
        before = field.core._precision.clone(), field.core._shift.clone(), field.a.clone(), field.b.clone()
        field.update_core()
        field.update_noise()
        after = field.core._precision, field.core._shift, field.a, field.b
        if field.damping == 0.0:
            undamped = [one.clone() for one in after]
    for old, new, free in zip(before[:2], after[:2], undamped[:2], strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * free)
    assert float(after[2]) == pytest.approx(0.75 * 4 + 0.25 * float(undamped[2]))
    assert float(after[3]) == pytest.approx(0.75 * 8 + 0.25 * float(fields[1].b0 + fields[1].squared_error() / 2))


def test_each_mode_has_the_lengthscale_and_variance_that_are_its_own():
    random = np.random.default_rng(0)
    X, y = random.uniform(size=(40, 2)), random.normal(size=40)
    model = FunctionalTucker(1, lengthscale=(0.1, 0.7), variance=(1.0, 3.0), max_iter=2, n_restarts=1).fit(X, y)
    first, second = (one.gp for one in model._posteriors)
    assert (float(first.lengthscale), float(second.lengthscale)) == (0.1, 0.7)
    assert (float(first.variance), float(second.variance)) == (1.0, 3.0)
