"""Scale mixtures of wide networks (arXiv 2107.01408): the lines of its file, against closed forms and sampled networks."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch.autograd import gradcheck

from paperworks.uncertainty.scale_mixture_nngp import (
    NNGPKernel,
    ScaleMixtureNNGPClassifier,
    ScaleMixtureNNGPRegressor,
    WideNetworkLimit,
    _evenly,
    _StudentTProcess,
    inverse_gamma_divergence,
)

K = torch.tensor([[1, 0.5, 0.2], [0.5, 1, 0.5], [0.2, 0.5, 1]], dtype=torch.float64)


def of_table(X, Z):
    return K[X[:, 0].long()][:, Z[:, 0].long()]


def small(**options):
    """The three points of the file's first line, of which two were seen."""
    known = {"kernel": of_table, "noise": 0.1, "learn": False, "standardize": False} | options
    return ScaleMixtureNNGPRegressor(**known).fit([[0], [1]], [1.0, -1.0])


# Line 1.
def test_student_t_of_three_points():
    model = small()
    assert float(model._given.quadratic) == pytest.approx(10 / 3)
    law = model._predictive(torch.tensor([[2.0]], dtype=torch.float64))
    assert (
        float(law.df) == 6
        and float(law.loc) == pytest.approx(-0.5)
        and float(law.scale) ** 2 == pytest.approx(1.065625)
    )
    assert model.log_evidence_ == pytest.approx(-3.635873479860, abs=1e-9)
    assert model.log_predictive_density([[2]], [2.0])[0] == pytest.approx(-3.378646246, abs=1e-8)
    joint = stats.multivariate_t([0, 0], K[:2, :2].numpy() + 0.1 * np.eye(2), 4)
    assert model.log_evidence_ == pytest.approx(joint.logpdf([1, -1]), abs=1e-10)
    mean, std = model.predict([[2]], return_std=True)
    assert (mean[0], std[0] ** 2) == pytest.approx((-0.5, 1.065625 * 6 / 4))
    posterior = model.scale_posterior_
    assert (float(posterior.concentration), float(posterior.rate)) == pytest.approx((3, 2 + 5 / 3))


@pytest.mark.parametrize(("options", "close"), [
    ({"method": "quadrature"}, 1e-9), ({"method": "importance", "n_samples": 100_000}, 2e-2),
    ({"method": "importance", "n_samples": 100_000, "proposal": "prior"}, 2e-2),
    ({"prior": stats.invgamma(2, scale=2)}, 1e-9), ({"prior": stats.invgamma(2, scale=2).logpdf}, 1e-9),
])  # fmt: skip
def test_other_ways_to_the_same_integral(options, close):
    model = small(**options)
    assert model.log_predictive_density([[2]], [2.0])[0] == pytest.approx(-3.378646246, abs=close)
    assert model.log_evidence_ == pytest.approx(-3.635873479860, abs=1e-9)
    assert model.predict_quantiles([[2]], [0.1, 0.9])[0] == pytest.approx(
        small().predict_quantiles([[2]], [0.1, 0.9])[0], abs=close
    )
    assert np.isnan(model.ess_) == (model.method != "importance")


# Line 2.
def test_burr_prior():
    model = small(prior=("burr12", 2.0, 1.0))
    assert model.log_evidence_ == pytest.approx(-3.748669100, abs=1e-8)
    assert model.log_predictive_density([[2]], [2.0])[0] == pytest.approx(-3.460726981, abs=1e-8)
    assert float(model.scale_posterior_.mean) == pytest.approx(1.683628881, abs=1e-8)


# Step 5, against integrals by SciPy.
def test_noise_apart_from_the_scale():
    model = small(noise_model="independent")
    prior, noise = stats.invgamma(2, scale=2), 0.1 * np.eye(3)

    def joint(y, points):
        table = K.numpy()[:points, :points]

        def density(log):
            law = stats.multivariate_normal(np.zeros(points), np.exp(log) * table + noise[:points, :points])
            return np.exp(log) * prior.pdf(np.exp(log)) * law.pdf(y)

        return quad(density, -12, 12, epsabs=1e-13, limit=400)[0]

    seen = joint([1, -1], 2)
    assert model.log_evidence_ == pytest.approx(math.log(seen), abs=1e-8)
    found = model.log_predictive_density([[2]] * 3, [2.0, -0.5, 0.0])
    assert found == pytest.approx([math.log(joint([1, -1, y], 3) / seen) for y in (2.0, -0.5, 0.0)], abs=1e-7)
    assert not np.allclose(found, small().log_predictive_density([[2]] * 3, [2.0, -0.5, 0.0]), atol=1e-3)


# Line 3.
def test_a_narrow_prior_is_the_gaussian_process_and_no_prior_moves_the_mean():
    X = np.random.default_rng(0).normal(size=(12, 3))
    y, new = np.sin(X.sum(1)), np.random.default_rng(1).normal(size=(5, 3))
    options = {"learn": False, "standardize": False, "noise": 0.1, "w_std": 1.3, "b_std": 0.4}
    known = ScaleMixtureNNGPRegressor(**options, prior=("point", 1.0)).fit(X, y)
    narrow = ScaleMixtureNNGPRegressor(**options, alpha=1e8, beta=1e8).fit(X, y)
    kernel = NNGPKernel(4, w_std=1.3, b_std=0.4)
    of = lambda a, b: kernel(torch.from_numpy(a), torch.from_numpy(b)).detach().numpy()  # noqa: E731
    weights = np.linalg.solve(of(X, X) + 0.1 * np.eye(12), of(X, new)).T
    mean, variance = weights @ y, np.diag(of(new, new)) + 0.1 - (weights * of(new, X)).sum(1)
    for model in (known, narrow):
        found, std = model.predict(new, return_std=True)
        assert found == pytest.approx(mean, abs=1e-9) and std**2 == pytest.approx(variance, rel=1e-6)
    assert narrow.log_evidence_ == pytest.approx(known.log_evidence_, abs=1e-6)
    for prior in (("burr12", 2.0, 1.0), stats.lognorm(1.0), "invgamma"):
        assert ScaleMixtureNNGPRegressor(**options, prior=prior).fit(X, y).predict(new) == pytest.approx(mean, abs=1e-9)


# Line 4.
@pytest.mark.parametrize("options", [{}, {"prior": ("burr12", 2.0, 1.0)}, {"noise_model": "independent"}])
def test_evidence_is_the_sum_of_one_step_predictions(options):
    random = np.random.default_rng(3)
    X, y = random.normal(size=(9, 2)), random.normal(size=9)
    options = {"learn": False, "standardize": False, "noise": 0.05, "b_std": 0.5} | options
    make = lambda: ScaleMixtureNNGPRegressor(**options)  # noqa: E731
    first = make().fit(X[:1], y[:1]).log_evidence_
    steps = [make().fit(X[:n], y[:n]).log_predictive_density(X[[n]], y[[n]])[0] for n in range(1, 9)]
    assert first + sum(steps) == pytest.approx(make().fit(X, y).log_evidence_, abs=1e-8)


# Line 5.
def test_divergences_of_the_classifier():
    a, b = torch.tensor([3.0, 2.5], dtype=torch.float64)
    assert float(inverse_gamma_divergence(a, b, 2.0, 2.0)) == pytest.approx(0.0759242572, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    process = _StudentTProcess(
        NNGPKernel(2, b_std=0.5), torch.randn(4, 2, generator=generator, dtype=torch.float64), 3, 2.0, 2.0, None
    )
    assert float(process.divergence()) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for one in (process.mean, process.lower, process.log_diagonal, process.log_a, process.log_b):
            one.add_(0.3 * torch.randn(one.shape, generator=generator, dtype=torch.float64))
        # In values at the inducing inputs, as the file has it.
        kernel = process.kernel(process.inducing, process.inducing)
        kernel = kernel + 1e-6 * kernel.diagonal().mean() * torch.eye(4)
        factor = torch.linalg.cholesky(kernel)
        means, covariances = process.mean @ factor.T, factor @ process.factor() @ process.factor().mT @ factor.T
        a, b = process.scale()
        expected = sum(
            (kernel.logdet() - S.logdet() - 4 + torch.trace(torch.linalg.solve(kernel, S)) + a / b * m @ torch.linalg.solve(kernel, m)) / 2
            for m, S in zip(means, covariances, strict=True)
        ) + inverse_gamma_divergence(a, b, 2.0, 2.0)  # fmt: skip
    assert float(process.divergence()) == pytest.approx(float(expected), abs=1e-8)
    law = stats.invgamma(float(a), scale=float(b))
    integral = quad(lambda x: law.pdf(x) * (law.logpdf(x) - stats.invgamma(2, scale=2).logpdf(x)), 0, np.inf)[0]
    assert float(inverse_gamma_divergence(a, b, 2.0, 2.0)) == pytest.approx(integral, abs=1e-6)


def test_gradients_of_the_classifiers_bound():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    process = _StudentTProcess(NNGPKernel(2, b_std=0.5), X[:3] + 0.1, 3, 2.0, 2.0, None)
    # Draws of a gamma law by rejection are no smooth function of its shape: that gradient is checked below.
    names = [name for name, _ in process.named_parameters() if name != "log_a"]
    values = [
        one.detach() + 0.1 * torch.randn(one.shape, generator=generator, dtype=torch.float64)
        for name, one in process.named_parameters() if name in names
    ]  # fmt: skip

    class Bound(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.process = process

        def forward(self):
            drawn = torch.Generator().manual_seed(5)
            return self.process.log_likelihood(X, y, 3, drawn) - self.process.divergence()

    bound = Bound()

    def of(*weights):
        given = {f"process.{name}": one for name, one in zip(names, weights, strict=True)}
        return torch.func.functional_call(bound, given, ())

    assert gradcheck(of, [one.requires_grad_() for one in values], atol=1e-4, rtol=1e-3)
    # E s^2 = b / (a - 1).
    process.log_a.data = torch.tensor(math.log(4.0), dtype=torch.float64)
    process.log_b.data = torch.tensor(math.log(2.0), dtype=torch.float64)
    process.draw_scale(200_000, generator).mean().backward()
    assert float(process.log_a.grad) == pytest.approx(-4 * 2 / 9, rel=0.02)
    assert float(process.log_b.grad) == pytest.approx(2 / 3, rel=0.02)


# Line 6.
def test_values_of_one_draw_share_their_scale():
    identity = lambda X, Z: (X[:, :1] == Z[:, 0]).double()  # noqa: E731
    model = ScaleMixtureNNGPRegressor(kernel=identity, alpha=1.5, beta=2.0, noise=1e-9, learn=False, standardize=False)
    draws = np.abs(model.fit([[0.0]], [0.0]).sample_y([[1.0], [2.0]], 400_000, random_state=0))
    assert (draws > 3).all(0).mean() == pytest.approx(0.0084, abs=0.001)
    assert (draws[0] > 3).mean() == pytest.approx(2 * stats.t(4).sf(3), abs=0.001)
    process = _StudentTProcess(NNGPKernel(1, b_std=0.5), torch.zeros(1, 2, dtype=torch.float64), 2, 2.0, 2.0, None)
    process.moments = lambda X: (torch.zeros(2, len(X)).double(), torch.ones(2, len(X)).double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(400_000, 2, 1, generator=generator, dtype=torch.float64)
        both = process.draws(torch.zeros(1, 2), process.draw_scale(400_000, generator), noise)[:, 0].abs()
    assert float((both > 3).all(1).double().mean()) == pytest.approx(0.0084, abs=0.001)


# Line 7.
@pytest.mark.parametrize("train", ["readout", "all"])
def test_wide_networks_trained_to_the_end_are_as_their_limit(train):
    generator = torch.Generator().manual_seed(2)
    X = torch.tensor([[-1.0, 0.2], [0.3, 1.0], [1.2, -0.4], [0.5, 0.4]], dtype=torch.float64)
    y, width, alpha = torch.tensor([3.0, -1.5, 0.9], dtype=torch.float64), 1000, 0.7
    found = []
    for _ in range(600):
        hidden = (X @ torch.randn(2, width, generator=generator, dtype=torch.float64)) / 2**0.5
        v = torch.randn(width, generator=generator, dtype=torch.float64)
        s2 = alpha / np.random.RandomState(len(found)).gamma(alpha)
        features = hidden.relu() / width**0.5
        f = s2**0.5 * features @ v
        K = features @ features.T
        if train == "all":
            # Through the first layer: the slope of f in its weights, s v phi' x / sqrt(2 width).
            slopes = (hidden > 0).double() * v / width**0.5
            K = K + (slopes @ slopes.T) * (X @ X.T) / 2
        found.append(float(f[3] + K[3, :3] @ torch.linalg.solve(K[:3, :3], y - f[:3])))
    law = WideNetworkLimit(1, train=train, alpha=alpha, beta=alpha).predictive(X[:3], y, X[3:])
    limit = stats.t(float(law.df), float(law.loc), float(law.scale))
    assert stats.kstest(found, limit.cdf).pvalue > 0.01
    posterior = ScaleMixtureNNGPRegressor(1, alpha=alpha, beta=alpha, noise=1e-9, learn=False, standardize=False).fit(
        X[:3], y
    )
    other = posterior._predictive(X[3:])
    assert stats.kstest(found, stats.t(float(other.df), float(other.loc), float(other.scale)).cdf).pvalue < 1e-6


def test_limits_with_other_priors_of_the_scale():
    X, y = torch.tensor([[-1.0], [0.5]], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    new = torch.tensor([[2.0]], dtype=torch.float64)
    mean, covariance = WideNetworkLimit(b_std=0.3).moments(X, y, new)
    at = torch.tensor([0.7], dtype=torch.float64)
    known = WideNetworkLimit(b_std=0.3, prior=("point", 2.0)).predictive(X, y, new)
    assert float(known.log_prob(at)) == pytest.approx(
        stats.norm(float(mean), (2 * float(covariance)) ** 0.5).logpdf(0.7)
    )
    by_nodes = WideNetworkLimit(b_std=0.3, prior=stats.invgamma(2, scale=2)).predictive(X, y, new)
    assert float(by_nodes.log_prob(at)) == pytest.approx(
        float(WideNetworkLimit(b_std=0.3).predictive(X, y, new).log_prob(at)), abs=1e-7
    )


# Line 8.
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_without_a_prior_of_the_scale_predictions_are_of_the_unit_of_y(scale):
    random = np.random.default_rng(0)
    X, y, new = random.normal(size=(6, 2)), random.normal(size=6), random.normal(size=(4, 2))
    make = lambda: ScaleMixtureNNGPRegressor(alpha=0, beta=0, noise=0.1, learn=False, standardize=False)  # noqa: E731
    first, second = (np.array(make().fit(X, given).predict(new, return_std=True)) for given in (y, scale * y))
    assert second == pytest.approx(scale * first, rel=1e-9)
    assert make().fit(X[:1], y[:1]).predict(new, return_std=True)[1] == pytest.approx(np.inf)


# Line 9.
def test_a_mixture_is_better_than_a_fitted_scale_where_points_are_few():
    random = np.random.default_rng(4)
    gains = {}
    for n in (4, 16):
        found = []
        for _ in range(120):
            X = random.normal(size=(n + 20, 3))
            kernel = NNGPKernel(4, w_std=math.sqrt(2), b_std=math.sqrt(0.1))
            table = kernel(torch.from_numpy(X), torch.from_numpy(X)).detach().numpy()
            table /= np.diag(table).mean()
            s2 = 2 / random.gamma(2.0)
            y = np.sqrt(s2) * np.linalg.cholesky(table + 0.05 * np.eye(n + 20)) @ random.normal(size=n + 20)
            lookup = lambda A, B, table=table: torch.from_numpy(table)[A[:, 0].long()][:, B[:, 0].long()]  # noqa: E731
            rows, options = (
                np.arange(n + 20)[:, None],
                {"kernel": lookup, "noise": 0.05, "learn": False, "standardize": False},
            )
            mixture = ScaleMixtureNNGPRegressor(**options).fit(rows[:n], y[:n])
            fitted = ("point", float(mixture._given.quadratic) / n)
            known = [mixture, *(
                ScaleMixtureNNGPRegressor(**options, prior=prior).fit(rows[:n], y[:n]) for prior in (fitted, ("point", s2))
            )]  # fmt: skip
            found.append([-one.log_predictive_density(rows[n:], y[n:]).mean() for one in known])
        gains[n] = np.mean(found, 0)
    for t, fitted, oracle in gains.values():
        assert oracle < t < fitted
    assert gains[4][1] - gains[4][0] > 5 * (gains[16][1] - gains[16][0]) > 0
    assert gains[4][0] == pytest.approx(0.899, abs=0.2)


def test_kernel_is_that_of_wide_networks_and_has_gradients_where_rows_are_the_same():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for activation, phi in (("relu", torch.relu), ("erf", torch.erf)):
        kernel = NNGPKernel(2, activation, w_std=1.3, b_std=0.4)
        total, draws = torch.zeros(4, 4, dtype=torch.float64), 400
        for _ in range(draws):
            h = X
            for width in (3, 300):
                W, b = (
                    torch.randn(width, 300, generator=generator, dtype=torch.float64),
                    torch.randn(300, generator=generator, dtype=torch.float64),
                )
                h = phi(1.3 * h @ W / width**0.5 + 0.4 * b)
            total += h @ h.T / 300 / draws
        assert torch.allclose(kernel(X, X), total, rtol=0.03, atol=0.01)
        assert torch.allclose(kernel.diagonal(X), kernel(X, X).diagonal(), rtol=1e-12)
    twice = torch.cat([X, X[:1]]).requires_grad_()
    NNGPKernel(3, b_std=0.2)(twice, twice).sum().backward()
    assert bool(twice.grad.isfinite().all())


def test_learning_climbs_the_evidence_to_that_of_scikit_learn():
    from gpytorch.kernels import RBFKernel

    random = np.random.default_rng(0)
    X = random.uniform(-2, 2, size=(25, 1))
    y = np.sin(2 * X[:, 0]) + 0.2 * random.normal(size=25)
    kernel = ConstantKernel(1.0, "fixed") * RBF(1.0) + WhiteKernel(0.1)
    theirs = GaussianProcessRegressor(kernel).fit(X, y)
    ours = ScaleMixtureNNGPRegressor(
        kernel=RBFKernel(), prior=("point", 1.0), noise=0.1, standardize=False, max_iter=100
    ).fit(X, y)
    assert ours.log_evidence_ == pytest.approx(theirs.log_marginal_likelihood_value_, abs=1e-3)
    assert ours.predict(X) == pytest.approx(theirs.predict(X), abs=1e-3)
    started = ScaleMixtureNNGPRegressor(noise=0.3, b_std=0.5, learn=False).fit(X, y).log_evidence_
    assert ScaleMixtureNNGPRegressor(noise=0.3, b_std=0.5).fit(X, y).log_evidence_ > started + 1


def test_tasks_tell_how_scales_are_spread():
    random = np.random.default_rng(0)
    kernel = NNGPKernel(2, w_std=1.4, b_std=0.3)
    tasks = []
    for _ in range(80):
        X = random.normal(size=(10, 2))
        table = kernel(torch.from_numpy(X), torch.from_numpy(X)).detach().numpy()
        y = np.sqrt(3 / random.gamma(3.0)) * np.linalg.cholesky(table + 0.05 * np.eye(10)) @ random.normal(size=10)
        tasks.append((X, y))
    start = ScaleMixtureNNGPRegressor(
        2, w_std=1.4, b_std=0.3, noise=0.1, alpha=1.0, beta=1.0, standardize=False, max_iter=8
    )
    learned = start.fit_tasks(tasks)
    assert not learned.learn and learned.alpha == pytest.approx(3, rel=0.5) and start.alpha == 1.0
    # The kernel's extent and beta are told apart by nothing, so that noise is told in shares of the extent.
    assert learned.noise / learned.w_std**4 == pytest.approx(0.05 / 1.4**4, rel=0.5)
    before, after = (
        np.mean([one.fit(X[:5], y[:5]).log_predictive_density(X[5:], y[5:]).sum() for X, y in tasks])
        for one in (start.set_params(learn=False), learned)
    )
    assert after > before
    with pytest.raises(ValueError, match="standardize=False"):
        ScaleMixtureNNGPRegressor().fit_tasks(tasks)
    with pytest.raises(ValueError, match="two tasks"):
        start.fit_tasks(tasks[:1])


def test_few_draws_that_count_are_told_and_replaced():
    random = np.random.default_rng(0)
    X = random.normal(size=(300, 2))
    options = {"noise": 0.5, "b_std": 0.5, "learn": False, "method": "importance", "n_samples": 200}
    with pytest.warns(RuntimeWarning, match="draws from the prior"):
        model = ScaleMixtureNNGPRegressor(**options, proposal="prior", alpha=40.0, beta=0.5).fit(X, X[:, 0])
    exact = ScaleMixtureNNGPRegressor(noise=0.5, b_std=0.5, learn=False, alpha=40.0, beta=0.5).fit(X, X[:, 0])
    assert model.predict(X[:5], return_std=True)[1] == pytest.approx(exact.predict(X[:5], return_std=True)[1], rel=1e-6)
    assert ScaleMixtureNNGPRegressor(**options).fit(X, X[:, 0]).ess_ > 150


def test_as_a_botorch_model():
    from botorch.acquisition import qExpectedImprovement
    from botorch.sampling.get_sampler import get_sampler

    random = np.random.default_rng(0)
    X = 5 + 3 * random.normal(size=(10, 2))
    y = 100 + 10 * np.sin(X.sum(1))
    for options in ({"b_std": 0.4, "noise": 0.01}, {"b_std": 0.4, "noise": 0.01, "prior": ("point", 1.0)}):
        model = ScaleMixtureNNGPRegressor(**options).fit(X, y)
        surrogate = model.as_botorch()
        new = torch.from_numpy(5 + random.normal(size=(3, 4, 2))).requires_grad_()
        posterior = surrogate.posterior(new, observation_noise=True)
        flat = new.detach().reshape(-1, 2).numpy()
        mean, std = model.predict(flat, return_std=True)
        assert posterior.mean.detach().numpy().reshape(-1) == pytest.approx(mean, rel=1e-8)
        assert posterior.variance.detach().numpy().reshape(-1) == pytest.approx(std**2, rel=1e-4)
        sampler = get_sampler(posterior, torch.Size([4096]), seed=0)
        drawn = sampler(posterior)[..., 0].detach().numpy().reshape(4096, -1)
        levels = model.predict_quantiles(flat, [0.05, 0.5, 0.95])
        assert (drawn[..., None] <= levels).mean(0) == pytest.approx(np.tile([0.05, 0.5, 0.95], (12, 1)), abs=0.02)
        # Draws share their scale: the largest deviations of far rows come together.
        deviations = np.abs(drawn - mean) / std
        both = np.corrcoef(deviations[:, 0], deviations[:, -1])[0, 1]
        assert ("prior" in options) or both > 0.02
        sampler = get_sampler(posterior, torch.Size([64]), seed=0)
        value = qExpectedImprovement(surrogate, float(y.max()), sampler)(new)
        assert value.shape == (3,) and bool((value >= 0).all())
        value.sum().backward()
        assert bool(new.grad.isfinite().all())
    with pytest.raises(ValueError, match="t or normal"):
        ScaleMixtureNNGPRegressor(prior=("burr12", 2.0, 1.0), learn=False).fit(X, y).as_botorch()


def test_a_classifier_without_a_scale_is_the_sparse_gaussian_process():
    random = np.random.default_rng(0)
    X = random.normal(size=(60, 2))
    y = (X[:, 0] + 0.3 * random.normal(size=60) > 0).astype(int)
    options = {"depth": 2, "n_inducing": 20, "n_samples": 30, "max_epoch": 40, "lr": 0.05, "n_pred_samples": 500}
    known = ScaleMixtureNNGPClassifier(**options, prior=("point", 1.0)).fit(X, y)
    narrow = ScaleMixtureNNGPClassifier(**options, alpha=1e7, beta=1e7).fit(X, y)
    assert known.elbo_[-1] > known.elbo_[0] and known.score(X, y) > 0.8
    assert narrow.predict_proba(X) == pytest.approx(known.predict_proba(X), abs=0.12)
    mixed = ScaleMixtureNNGPClassifier(**options).fit(X, y)
    assert mixed.scale_ != (2.0, 2.0) and mixed.elbo_[-1] > mixed.elbo_[0]


def test_inducing_inputs_are_different_rows_of_all_classes():
    X = torch.arange(20.0, dtype=torch.float64)[:, None] // 2
    y = torch.tensor([0] * 16 + [1] * 4)
    chosen = _evenly(X, y, 4, np.random.RandomState(0))
    assert len(chosen) == 4 == len(chosen.unique()) and int((chosen >= 8).sum()) >= 1
    distinct = _evenly(torch.arange(20.0, dtype=torch.float64)[:, None], y, 6, np.random.RandomState(0))
    assert int((distinct >= 16).sum()) == 3
    assert len(_evenly(X, y, 50, np.random.RandomState(0))) == 10


@pytest.mark.parametrize(("options", "told"), [
    ({"depth": 0}, "depth"), ({"activation": "tanh"}, "relu or erf"), ({"prior": "normal"}, "prior is"),
    ({"prior": ("burr12", 2.0)}, "prior is"), ({"prior": ("point", -1.0)}, "prior is"), ({"alpha": 0.0}, "both"),
    ({"noise": 0.0}, "above 0"), ({"method": "guess"}, "method is one of"), ({"w_std": 0.0}, "w_std"),
    ({"method": "importance", "noise_model": "independent"}, "quadrature"),
    ({"method": "importance", "prior": ("point", 1.0)}, "nothing to draw"),
    ({"method": "importance", "prior": stats.invgamma(2).logpdf, "proposal": "prior"}, "cannot be drawn"),
    ({"kernel": lambda X, Z: X @ Z.T[:, :1]}, "covariances"),
    ({"prior": lambda s2: s2[:1]}, "log density"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ScaleMixtureNNGPRegressor(learn=False, **options).fit([[0.0], [1.0], [2.0]], [0.0, 1.0, 0.5])


def test_a_kernel_of_ones_own_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="is code"):
        small().save_pretrained(tmp_path)


def test_what_is_learned_by_default_fits():
    X = np.linspace(-2, 2, 40)[:, None]
    model = ScaleMixtureNNGPRegressor().fit(X, np.cos(2 * X[:, 0]))
    assert model.score(X, np.cos(2 * X[:, 0])) > 0.99
    low, lower = (
        ScaleMixtureNNGPRegressor(noise=noise, b_std=0.3).fit(X, np.cos(2 * X[:, 0])) for noise in (1e-8, 1e-10)
    )
    assert (
        lower.log_evidence_
        > ScaleMixtureNNGPRegressor(noise=1e-10, b_std=0.3, learn=False).fit(X, np.cos(2 * X[:, 0])).log_evidence_ + 1
    )
    assert np.isfinite(low.log_evidence_)


def test_the_tangent_kernel_is_that_of_deep_networks():
    depth, width, w, b = 2, 600, 1.2, 0.4
    X = torch.tensor([[0.5, -1.0], [1.0, 0.7], [-0.3, 0.2]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, 2), (width,), (width, width), (width,), (width,)]
    total = torch.zeros(3, 3, dtype=torch.float64)
    for activation in ("relu", "erf"):
        phi, total = getattr(torch, activation), torch.zeros(3, 3, dtype=torch.float64)
        for _ in range(3):
            weights = [
                torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
            ]

            def network(x):
                W0, b0, W1, b1, v = weights
                h = phi(w * x @ W0.T / 2**0.5 + b * b0)
                h = phi(w * h @ W1.T / width**0.5 + b * b1)
                return h @ v / width**0.5

            slopes = torch.stack(
                [torch.cat([one.reshape(-1) for one in torch.autograd.grad(network(x), weights)]) for x in X]
            )
            total += slopes @ slopes.T / 3
        assert torch.allclose(
            NNGPKernel(depth, activation, w_std=w, b_std=b).tangent(X, X), total, rtol=0.05, atol=0.04
        )
    assert bool(NNGPKernel(2).tangent(torch.zeros(2, 2, dtype=torch.float64), X).isfinite().all())


def test_a_prior_as_narrow_or_as_wide_as_one_likes():
    X, y = np.array([[0.0], [1.0]]), np.array([1.0, -1.0])
    C = K[:2, :2].numpy() + 0.1 * np.eye(2)
    of_scale = lambda s2: stats.multivariate_normal(np.zeros(2), s2 * C).pdf(y)  # noqa: E731
    for prior in (
        stats.norm(1, 1e-4), stats.norm(1.01, 1e-5), stats.uniform(1, 0.01), stats.uniform(0.5, 1), stats.lognorm(3.0),
        stats.invgamma(1e6, scale=1e6), stats.gamma(0.5),
    ):  # fmt: skip
        low, high = prior.ppf([1e-12, 1 - 1e-12])
        expected = quad(
            lambda log: np.exp(log) * prior.pdf(np.exp(log)) * of_scale(np.exp(log)),
            np.log(max(low, 1e-30)),
            np.log(high),
            limit=800,
            epsabs=1e-14,
            points=[np.log(prior.median())],
        )[0]
        assert small(prior=prior).log_evidence_ == pytest.approx(math.log(expected), abs=1e-4), prior.dist.name
    with pytest.raises(ValueError, match="mass below 0"):
        small(prior=stats.norm(0, 1))
    with pytest.raises(ValueError, match="no mass"):
        small(prior=lambda s2: np.full(len(s2), -np.inf))
    tiny = ScaleMixtureNNGPRegressor(
        kernel=of_table, noise=0.1, learn=False, standardize=False, alpha=0, beta=0, method="quadrature"
    )
    exact = ScaleMixtureNNGPRegressor(kernel=of_table, noise=0.1, learn=False, standardize=False, alpha=0, beta=0)
    found, known = (
        one.fit([*X, [2]], 1e-18 * np.array([1.0, -1, 0.5])).predict([[2]], return_std=True)[1] for one in (tiny, exact)
    )
    assert found == pytest.approx(known, rel=1e-6)


def test_a_variance_that_is_infinite_is_told_by_quadrature_too():
    for options in ({"alpha": 0.2, "beta": 0.2}, {"alpha": 0, "beta": 0}, {"prior": ("burr12", 0.3, 1.0)}):
        model = ScaleMixtureNNGPRegressor(
            kernel=of_table, noise=0.1, learn=False, standardize=False, method="quadrature", **options
        )
        assert model.fit([[0]], [1.0]).predict([[2]], return_std=True)[1][0] == np.inf
    assert np.isfinite(small(prior=("burr12", 2.0, 1.0)).predict([[2]], return_std=True)[1][0])


def test_what_is_set_after_a_fit_changes_nothing_of_it():
    X, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20.0)
    model = ScaleMixtureNNGPRegressor().fit(X, y)
    before = model.predict(X, return_std=True)
    model.set_params(alpha=200.0, beta=1.0, prior=("point", 3.0), noise=9.0)
    assert np.array_equal(model.predict(X, return_std=True), before)
    assert float(model.scale_posterior_.concentration) == 12.0
    assert all(one.grad is None and not one.requires_grad for one in model.kernel_.parameters())


def test_posteriors_of_the_same_rows_and_without_noise():
    from botorch.acquisition.objective import ScalarizedPosteriorTransform

    random = np.random.default_rng(0)
    X, y = random.normal(size=(15, 2)), random.normal(size=15)
    model = ScaleMixtureNNGPRegressor(noise=0.3, learn=False, b_std=0.4).fit(X, 50 * y)
    surrogate, twice = model.as_botorch(), torch.from_numpy(np.repeat(X[:1], 3, 0))
    posterior = surrogate.posterior(twice)
    assert bool(posterior.mean.isfinite().all()) and posterior.rsample(torch.Size([4])).shape == (4, 3, 1)
    noisy = surrogate.posterior(twice, observation_noise=True)
    law, scale2 = model._predictive(model._features(X[:1])), model.target_scale_[0] ** 2
    # Noise is scaled as the rest is.
    added = (
        0.3
        * float(model._given.noise / 0.3)
        * float(model.scale_posterior_.rate / (model.scale_posterior_.concentration - 1))
        * scale2
    )
    assert float(noisy.variance[0] - posterior.variance[0]) == pytest.approx(added, rel=1e-3)
    levels = torch.tensor([0.05, 0.95], dtype=torch.float64)[:, None, None]
    assert noisy.quantile(levels)[:, 0, 0].numpy() == pytest.approx(
        model.predict_quantiles(X[:1], [0.05, 0.95])[0], rel=1e-6
    )
    at = noisy.mean + 3.0
    assert float(noisy.density(at)[0]) == pytest.approx(
        float(np.exp(model.log_predictive_density(X[:1], [float(at[0])])[0])), rel=1e-6
    )
    assert float(law.df) == noisy.degrees
    with pytest.raises(ValueError, match="objective instead"):
        surrogate.posterior(twice, posterior_transform=ScalarizedPosteriorTransform(torch.ones(1, dtype=torch.float64)))


def test_a_point_scale_of_a_classifier_is_its_own():
    process = _StudentTProcess(NNGPKernel(1, b_std=0.5), torch.zeros(2, 2, dtype=torch.float64), 3, 2.0, 2.0, 4.0)
    assert process.draw_scale(5, torch.Generator()).tolist() == [4.0] * 5
    with torch.no_grad():
        process.mean += 1.0
    # Six values of 1, under variances of 4.
    assert float(process.divergence()) == pytest.approx(6 / 4 / 2)


def test_tasks_that_are_none_are_refused():
    good = (np.zeros((3, 2)) + np.arange(3)[:, None], np.arange(3.0))
    start = ScaleMixtureNNGPRegressor(standardize=False)
    for bad in (
        (np.full((3, 2), np.nan), np.arange(3.0)),
        (np.ones((3, 3)), np.arange(3.0)),
        (np.ones((0, 2)), np.ones(0)),
        (np.ones(3), np.ones(3)),
    ):
        with pytest.raises(ValueError):
            start.fit_tasks([good, bad])
    with pytest.raises(ValueError, match="above 0"):
        ScaleMixtureNNGPRegressor(standardize=False, alpha=0, beta=0).fit_tasks([good, good])


@pytest.mark.parametrize(("call", "told"), [
    (lambda: ScaleMixtureNNGPRegressor(alpha=0, beta=0).fit([[0.0], [1.0]], [2.0, 2.0]), "leave their scale open"),
    (lambda: ScaleMixtureNNGPRegressor(kernel="rbf").fit([[0.0], [1.0]], [2.0, 1.0]), "kernel is"),
    (lambda: ScaleMixtureNNGPRegressor(max_iter=0).fit([[0.0], [1.0]], [2.0, 1.0]), "max_iter"),
    (lambda: ScaleMixtureNNGPRegressor(kernel=lambda X, Z: (X @ Z.T).numpy(), learn=False).fit([[0.0], [1.0]], [2.0, 1.0]), "as a tensor"),
    (lambda: ScaleMixtureNNGPRegressor(kernel=lambda X, Z: -X @ Z.T, learn=False).fit([[0.0], [1.0]], [2.0, 1.0]), "not positive definite"),
    (lambda: small().sample_y(np.zeros((10_001, 1))), "10,001"),
    (lambda: WideNetworkLimit(alpha=0, beta=0), "improper"),
    (lambda: WideNetworkLimit().moments(torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 1)), "y \(n,\)"),
    (lambda: WideNetworkLimit().moments(torch.full((2, 1), torch.nan), torch.ones(2), torch.ones(1, 1)), "NaN"),
])  # fmt: skip
def test_more_that_cannot_be(call, told):
    with pytest.raises(ValueError, match=told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
